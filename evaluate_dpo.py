#!/usr/bin/env python3
"""Step 3 of 3: base, SFT and DPO side by side on one 4-bit base, and the verdict.

python evaluate_dpo.py --preset tiny --show 5
python evaluate_dpo.py --preset tiny --runs outputs/seed-1 outputs/seed-2 --output-dir outputs/seeds
"""

import json
import sys
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from config import Config, parse_config
from quantpref import processes
from quantpref.comparisons import Comparison, fingerprint, save
from quantpref.experiment import FAILED, Data, check_adapter, failure, load_data
from quantpref.runs import (
    RunError,
    UserError,
    atomic_folder,
    damage,
    locked,
    one_line_errors,
    read_json,
    remove_leftovers,
    set_aside,
    sha256,
    write_json,
    write_manifest,
)

RESULTS, PREDICTIONS = "results.json", "predictions.parquet"


def main(config: Config) -> None:
    processes.start()
    data = load_data(config)
    controls: dict[str, list[Comparison]] = {}
    if config.runs:
        from quantpref.aggregate import aggregate

        identity = {"runs": [sha256(run / "evaluation" / RESULTS) for run in config.runs if run.is_dir()]}
    else:
        from quantpref.controls import control_sets

        folders = adapter_folders(config)
        controls = control_sets(data.test_file, data.split.test, config.split_seed)
        identity = run_identity(config, data, folders, controls)
    results = finished_results(config, identity)
    if results is not None:
        outcome = results["verdict"]["outcome"]
        print(
            f"{config.evaluation_folder}: finished with these adapters and this test: {outcome}; see report.html there"
        )
        if config.show:
            show_samples(config, data.split.test)
        return
    with locked(config.output_dir) if processes.is_first() else nullcontext():
        if processes.is_first():
            remove_leftovers(config.output_dir)
        if config.runs:
            results, predictions = aggregate(config, data), {}
        else:
            results, predictions = evaluate(config, data, folders, controls)
        if not processes.is_first():
            return
        if config.evaluation_folder.exists():
            print(f"an earlier evaluation is now {set_aside(config.evaluation_folder)}")
        write(config, {**results, "identity": identity}, predictions, controls)
    show(config, data.split.test, results)


def adapter_folders(config: Config) -> dict[str, Path]:
    """The arms' folders, all there, or one line that says which step is missing."""
    folders = {"sft": config.sft_folder, "dpo": config.dpo_folder}
    optional = {"sft-more": config.sft_more_folder, "dpo-from-base": config.dpo_from_base_folder}
    folders |= {arm: folder for arm, folder in optional.items() if folder.exists()}
    for text in config.adapter:
        name, _, folder = text.partition("=")
        if not name or not folder or name in {"base", *folders}:
            raise UserError(f"--adapter {text}: write NAME=FOLDER, with a name that no other arm has")
        folders[name] = Path(folder)
    for arm, folder in folders.items():
        if arm != "dpo" and (folder / FAILED).is_file():
            raise RunError(
                f"{folder}: {failure(folder)}, so there is no {arm.upper()} arm to compare with; lower its learning"
                " rate and train it again with --fresh"
            )
        if not folder.is_dir():
            raise UserError(
                f"{folder}: the {arm.upper()} adapter is missing; run train_dpo.py with the same flags first"
            )
    return folders


def run_identity(
    config: Config, data: Data, folders: dict[str, Path], controls: Mapping[str, list[Comparison]]
) -> dict[str, Any]:
    """What makes two evaluations the same: the adapters' weights, the comparisons of all sets, the precisions."""
    return {
        "adapters": {
            arm: sha256(file)
            for arm, folder in folders.items()
            if (file := folder / "adapter_model.safetensors").is_file()
        },
        "test": fingerprint(data.split.test),
        "controls": {name: fingerprint(rows) for name, rows in controls.items()},
        "base_model": config.base_model,
        "precision": sorted(config.precision),
    }


def finished_results(config: Config, identity: dict[str, Any]) -> dict[str, Any] | None:
    """Results of the same evaluation, where they are whole."""
    if not config.evaluation_folder.exists():
        return None
    if fault := damage(config.evaluation_folder):
        print(f"{fault}; evaluating again")
        return None
    results: dict[str, Any] = read_json(config.evaluation_folder / RESULTS)
    return results if results.get("identity") == identity else None


def evaluate(
    config: Config, data: Data, folders: dict[str, Path], controls: dict[str, list[Comparison]]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Load, score, decide. Returns the results, and by file name the scores to keep beside them."""
    from quantpref.backends import choose_backend

    backend = choose_backend(config.backend)
    from quantpref import models
    from quantpref.analysis import analyse, failed_verdict, verdict
    from quantpref.runs import environment
    from quantpref.statistics import correctness
    from quantpref.verdict import instability_reasons

    models.quiet()
    base = models.load_base(config.base_model, config.base_revision, backend, config.max_length)
    manifests = {arm: check_adapter(folder, base.manifest(), data) for arm, folder in folders.items()}
    check_lineage(folders, manifests)
    failed = folders["dpo"] / FAILED
    if failed.is_file():
        folders = {arm: folder for arm, folder in folders.items() if arm != "dpo"}
    adapters = {arm: models.read_adapter(folder) for arm, folder in folders.items()}

    model = models.attach(base, adapters)
    parts = {"test": data.split.test, "validation": data.split.validation, **controls}
    test, validation, *of_controls = score_arms(model, base.tokenizer, adapters, parts, config)
    refuse_twins(test)
    scored = {name: (controls[name], scores) for name, scores in zip(controls, of_controls, strict=True)}
    reasoning = check_reasoning(model, base.tokenizer, data.split.test, test, config)
    predictions = {
        PREDICTIONS: (data.split.test, test),
        "predictions_validation.parquet": (data.split.validation, validation),
        **{f"predictions_{name}.parquet": found for name, found in scored.items()},
    }
    sixteen_bit = None
    if "16bit" in config.precision:
        model.unload()
        full = models.load_16bit(config.base_model_16bit or config.base_model, config.base_revision, base)
        [sixteen_bit] = score_arms(
            models.attach(full, adapters), base.tokenizer, adapters, {"test": data.split.test}, config
        )
        predictions["predictions_16bit.parquet"] = (data.split.test, sixteen_bit)

    results = analyse(data.split, test, validation, config.seed, scored, sixteen_bit)
    if failed.is_file():
        results["verdict"] = failed_verdict(read_json(failed))
    else:
        excess = results.get("quantisation", {}).get("dpo_less_sft")
        instability = instability_reasons(dpo_losses(folders["dpo"]), excess["ci95_pp"][0] if excess else None)
        right = {arm: correctness(scores.margins)[None] for arm, scores in test.items()}
        users = [c.cluster for c in data.split.test]
        sft_known = (manifests["dpo"] or {}).get("sft_training_rows_known", False)
        results["verdict"] = verdict(results, right, users, instability, sft_known, config.seed)
    return {
        **results,
        "reasoning_check": reasoning,
        "training": {arm: training_curves(folder) for arm, folder in folders.items()},
        "data": describe(data),
        "base": base.manifest(),
        "adapters": {arm: manifest for arm, manifest in manifests.items() if manifest},
        "environment": environment(),
        "config": config.as_json(),
    }, predictions


def describe(data: Data) -> dict[str, Any]:
    split = data.split
    return {
        **data.manifest,
        "n_train": len(split.train),
        "n_validation": len(split.validation),
        "n_test": len(split.test),
        "users_test": len({c.cluster for c in split.test}),
        "test_file": str(data.test_file),
        "test_sha256": sha256(data.test_file),
    }


def check_lineage(folders: dict[str, Path], manifests: dict[str, Any]) -> None:
    """DPO and sft-more must have started from this very SFT adapter."""
    weights = folders["sft"] / "adapter_model.safetensors"
    for arm in manifests.keys() & {"dpo", "sft-more", "dpo-from-base"}:
        manifest = manifests[arm]
        if manifest is None:
            if (folders[arm] / FAILED).is_file():
                continue
            raise UserError(
                f"{folders[arm]}: has no manifest.json, so nobody knows what it is; train it with train_dpo.py"
            )
        started_from = None if arm == "dpo-from-base" else sha256(weights) if weights.is_file() else "nothing"
        if manifest["lineage"]["started_from"] != started_from:
            raise UserError(
                f"{folders[arm]}: started from another SFT adapter than {folders['sft']}; give that one with"
                " --sft-adapter, or train again"
            )


def score_arms(
    model: Any, tokenizer: Any, adapters: Iterable[str], parts: Mapping[str, list[Comparison]], config: Config
) -> list[dict[str, Any]]:
    """For each part the scores by arm: one loaded base, adapters switched on and off."""
    from rich.progress import track

    from quantpref.guards import out_of_memory
    from quantpref.packed_llama import PackedLlama
    from quantpref.scoring import score, scoring_rows

    llama = PackedLlama(model)
    rows = [scoring_rows(tokenizer, cs, config.max_length, config.response) for cs in parts.values()]
    for part, found in zip(parts, rows, strict=True):
        if found.shortened:
            print(f"{found.shortened} prompts of the {part} were shortened to --max-length {config.max_length}")
    scores: list[dict[str, Any]] = [{} for _ in parts]
    for arm, i in track([(arm, i) for arm in ("base", *adapters) for i in range(len(rows))], description="scoring"):
        llama.adapters.use(None if arm == "base" else arm)
        with out_of_memory(f"scoring {arm}", "take a smaller base with --base-model"):
            scores[i][arm] = score(llama, rows[i])
    return scores


def refuse_twins(scores: Mapping[str, Any]) -> None:
    """Two arms with the same numbers are one adapter twice, or an adapter that is not switched on."""
    arms = list(scores)
    for i, one in enumerate(arms):
        for other in arms[i + 1 :]:
            if (scores[one].logp_a == scores[other].logp_a).all():
                raise RunError(f"arms {one} and {other} give the same scores on every row; they are the same model")


def check_reasoning(
    model: Any, tokenizer: Any, test: list[Comparison], scores: Mapping[str, Any], config: Config
) -> dict[str, Any]:
    """What each trained arm writes about the first comparisons of the test."""
    from quantpref.reasoning import CHECKED, generate, reasoning_check

    found, comparisons = {}, test[:CHECKED]
    for arm in scores.keys() - {"base"}:
        model.set_adapter(arm)
        texts = generate(model, tokenizer, comparisons, config.response)
        found[arm] = reasoning_check(texts, comparisons, scores[arm], config.response)
    return dict(sorted(found.items()))


def dpo_losses(folder: Path) -> list[float]:
    path = folder / "training_log.jsonl"
    try:
        return [json.loads(line)["loss"] for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError, KeyError):
        raise UserError(f"{path}: missing or damaged; DPO's stability cannot be judged, train it again") from None


def training_curves(folder: Path) -> list[dict[str, float]]:
    """What the report draws of an adapter's training log; nothing for an adapter made elsewhere."""
    path = folder / "training_log.jsonl"
    if not path.is_file():
        return []
    keys = ("step", "loss", "rewards/margins", "rewards/accuracies")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [{key: row[key] for key in keys if key in row} for row in rows]


def write(
    config: Config,
    results: dict[str, Any],
    predictions: Mapping[str, Any],
    controls: Mapping[str, list[Comparison]],
) -> None:
    """Scores, control sets, results, report and figures, under their final names all at once or not at all."""
    from quantpref import figures, report
    from quantpref.metrics import write_predictions
    from quantpref.runs import write_text

    with atomic_folder(config.evaluation_folder) as folder:
        for name, (comparisons, scores) in predictions.items():
            write_predictions(folder / name, comparisons, scores)
        for name, comparisons in controls.items():
            save(folder / f"{name}.jsonl", comparisons)
        drawn = figures.draw(results)
        figures.save(drawn, folder / "figures")
        write_text(folder / "report.md", report.markdown(results))
        write_text(folder / "report.html", report.html(results, {k: figures.svg(v) for k, v in drawn.items()}))
        write_json(folder / RESULTS, results)
        write_manifest(folder, {"identity": results["identity"]})


def show(config: Config, test: list[Comparison], results: dict[str, Any]) -> None:
    from quantpref.report import table, verdict_text

    if config.show and not config.runs:
        show_samples(config, test)
    print(f"\n{table(results)}\n\n{verdict_text(results)}\n")
    for file in sorted(p for p in config.evaluation_folder.rglob("*") if p.is_file() and p.suffix != ".pdf"):
        print(f"wrote {file}")


def show_samples(config: Config, test: list[Comparison]) -> None:
    """The first comparisons of the test as the model saw them, and what each arm chose."""
    from quantpref.metrics import read_predictions

    scores = read_predictions(config.evaluation_folder / PREDICTIONS, test)
    count = min(config.show, len(test))
    for i, comparison in enumerate(test[:count]):
        other = "B" if comparison.label == "A" else "A"
        chosen = []
        for arm in ("sft", "dpo"):
            if arm in scores:
                margin = scores[arm].margins[i]
                answer = comparison.label if margin > 0 else other if margin < 0 else "tie"
                how = "correct" if margin > 0 else "wrong" if margin < 0 else "half"
                chosen.append(f"{arm.upper()}: {answer} ({how})")
        print(f"\nSample {i + 1}/{count}  line {comparison.line}: {', '.join(map(str, comparison.history))}")
        for label, movie in (("A", comparison.option_a), ("B", comparison.option_b)):
            mark = "  <- preferred" if label == comparison.label else ""
            print(f"  Option {label}: {movie} ({movie.genre_text}){mark}")
        print(f"  {', '.join(chosen)}")


if __name__ == "__main__":
    with one_line_errors():
        main(parse_config(sys.argv[1:], __doc__ or ""))
