#!/usr/bin/env python3
"""Step 3 of 3: base, SFT and DPO side by side on one 4-bit base, and the verdict.

python evaluate_dpo.py --preset tiny --show 5
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from config import Config, parse_config
from quantpref.comparisons import Comparison, fingerprint
from quantpref.experiment import Data, check_adapter, load_data
from quantpref.runs import RunError, UserError, atomic_folder, one_line_errors, read_json, set_aside, sha256, write_json

RESULTS, PREDICTIONS = "results.json", "predictions.parquet"


def main(config: Config) -> None:
    data = load_data(config)
    folders = adapter_folders(config)
    identity = run_identity(config, data, folders)
    results = finished_results(config, identity)
    if results is None:
        results = evaluate(config, data, folders, identity)
        show(config, data.split.test, results)
        for file in sorted(p for p in config.evaluation_folder.rglob("*") if p.is_file()):
            print(f"wrote {file}")
    else:
        outcome = results["verdict"]["outcome"]
        print(f"{config.evaluation_folder}: finished with these adapters and this test: {outcome}; see report.md there")
        if config.show:
            show_samples(config, data.split.test, results)


def adapter_folders(config: Config) -> dict[str, Path]:
    """The arms' folders, all there, or one line that says which step is missing."""
    folders = {"sft": config.sft_folder, "dpo": config.dpo_folder}
    if config.sft_more_folder.exists():
        folders["sft-more"] = config.sft_more_folder
    for arm, folder in folders.items():
        if not folder.is_dir():
            raise UserError(
                f"{folder}: the {arm.upper()} adapter is missing; run train_dpo.py with the same flags first"
            )
    return folders


def run_identity(config: Config, data: Data, folders: dict[str, Path]) -> dict[str, Any]:
    """What makes two evaluations the same: the adapters' weights and the test comparisons."""
    return {
        "adapters": {
            arm: sha256(file)
            for arm, folder in folders.items()
            if (file := folder / "adapter_model.safetensors").is_file()
        },
        "test": fingerprint(data.split.test),
        "base_model": config.base_model,
    }


def finished_results(config: Config, identity: dict[str, Any]) -> dict[str, Any] | None:
    """Results of the same evaluation; those of another one are set aside, not overwritten."""
    if not config.evaluation_folder.exists():
        return None
    path = config.evaluation_folder / RESULTS
    results = read_json(path) if path.is_file() else {}
    if results.get("identity") == identity:
        return results
    print(f"an evaluation of other adapters or another test is now {set_aside(config.evaluation_folder)}")
    return None


def evaluate(config: Config, data: Data, folders: dict[str, Path], identity: dict[str, Any]) -> dict[str, Any]:
    from quantpref.backends import choose_backend

    backend = choose_backend(config.backend)
    from quantpref import models
    from quantpref.baselines import baseline_margins
    from quantpref.metrics import arm_metrics, baseline_metrics, secondary_tests, write_predictions
    from quantpref.report import markdown
    from quantpref.runs import environment, write_text

    models.quiet()
    base = models.load_base(config.base_model, config.base_revision, backend, config.max_length)
    manifests = {arm: check_adapter(folder, base.manifest(), data) for arm, folder in folders.items()}
    check_lineage(folders, manifests, identity)
    failed = folders["dpo"] / "failed.json"
    if failed.is_file():
        folders = {arm: folder for arm, folder in folders.items() if arm != "dpo"}
    adapters = {arm: models.read_adapter(folder) for arm, folder in folders.items()}

    test, validation = data.split.test, data.split.validation
    scores = score_arms(base, adapters, {"test": test, "validation": validation}, config)
    refuse_twins({arm: s["test"] for arm, s in scores.items()})
    arms = {arm: arm_metrics(s["test"], s["validation"]) for arm, s in scores.items()}
    baselines = baseline_margins(data.split.train, test)
    on_test = {arm: s["test"] for arm, s in scores.items()}
    users = [c.cluster for c in test]
    results = {
        "verdict": None,
        "arms": arms,
        "baselines": {name: baseline_metrics(margins) for name, margins in baselines.items()},
        "secondary_tests": secondary_tests(on_test, arms, users, config.seed) if "dpo" in arms else [],
        "data": {
            **data.manifest,
            "n_test": len(test),
            "n_train": len(data.split.train),
            "n_validation": len(validation),
            "users_test": len(set(users)),
            "test_file": str(data.test_file),
            "test_sha256": sha256(data.test_file),
        },
        "base": base.manifest(),
        "adapters": {arm: manifest for arm, manifest in manifests.items() if manifest},
        "identity": identity,
        "environment": environment(),
        "config": config.as_json(),
    }
    if failed.is_file():
        results["verdict"] = failed_verdict(read_json(failed))
    else:
        sft_known = (manifests["dpo"] or {}).get("sft_training_rows_known", False)
        results["verdict"] = verdict(results, on_test, users, dpo_losses(folders["dpo"]), sft_known, config.seed)
    with atomic_folder(config.evaluation_folder) as folder:
        write_predictions(folder / PREDICTIONS, test, on_test)
        write_predictions(
            folder / "predictions_validation.parquet", validation, {arm: s["validation"] for arm, s in scores.items()}
        )
        write_json(folder / RESULTS, results)
        write_text(folder / "report.md", markdown(results))
    return results


def check_lineage(folders: dict[str, Path], manifests: dict[str, Any], identity: dict[str, Any]) -> None:
    """DPO and sft-more must have started from this very SFT adapter."""
    for arm in manifests.keys() - {"sft"}:
        manifest = manifests[arm]
        if manifest is None:
            raise UserError(
                f"{folders[arm]}: has no manifest.json, so nobody knows what it is; train it with train_dpo.py"
            )
        if manifest["lineage"]["started_from"] != identity["adapters"].get("sft"):
            raise UserError(
                f"{folders[arm]}: started from another SFT adapter than {folders['sft']}; give that one with"
                " --sft-adapter, or train again"
            )


def score_arms(
    base: Any, adapters: dict[str, Any], parts: dict[str, list[Comparison]], config: Config
) -> dict[str, dict[str, Any]]:
    """Scores by arm and part: one loaded base, adapters switched on and off."""
    from rich.progress import track

    from quantpref.models import attach
    from quantpref.scoring import score, scoring_rows

    rows = {
        part: scoring_rows(base.tokenizer, comparisons, config.max_length, config.response)
        for part, comparisons in parts.items()
    }
    for part, found in rows.items():
        if found.shortened:
            print(f"{found.shortened} prompts of the {part} were shortened to --max-length {config.max_length}")
    model = attach(base, adapters)
    scores: dict[str, dict[str, Any]] = {arm: {} for arm in ("base", *adapters)}
    for arm, part in track([(a, p) for a in scores for p in rows], description="scoring"):
        if arm == "base":
            with model.disable_adapter():
                scores[arm][part] = score(model, base.tokenizer.pad_token_id, rows[part])
        else:
            model.set_adapter(arm)
            scores[arm][part] = score(model, base.tokenizer.pad_token_id, rows[part])
    return scores


def refuse_twins(scores: dict[str, Any]) -> None:
    """Two arms with the same numbers are one adapter twice, or an adapter that is not switched on."""
    arms = list(scores)
    for i, one in enumerate(arms):
        for other in arms[i + 1 :]:
            if (scores[one].logp_a == scores[other].logp_a).all():
                raise RunError(f"arms {one} and {other} give the same scores on every row; they are the same model")


def dpo_losses(folder: Path) -> list[float]:
    path = folder / "training_log.jsonl"
    try:
        return [json.loads(line)["loss"] for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError, KeyError):
        raise UserError(f"{path}: missing or damaged; DPO's stability cannot be judged, train it again") from None


def verdict(
    results: dict[str, Any],
    scores: dict[str, Any],
    users: Sequence[str],
    losses: list[float],
    sft_known: bool,
    seed: int,
) -> dict[str, Any]:
    """The paired test between SFT and DPO, and the rule fixed before the data was seen."""
    from quantpref import power
    from quantpref import statistics as st
    from quantpref.verdict import TRUE_GAINS_PP, VerdictInputs, decide, instability_reasons

    arms, n = results["arms"], len(users)
    right = {arm: st.correctness(s.margins) for arm, s in scores.items()}
    test = st.paired_test(right["sft"], right["dpo"], users, seed)
    more = st.paired_test(right["sft-more"], right["dpo"], users, seed) if "sft-more" in right else None
    folds = st.fold_differences_pp(right["dpo"] - right["sft"], st.user_folds(users, seed=seed))
    best, best_row = max(results["baselines"].items(), key=lambda item: item[1]["accuracy"])
    differences = right["dpo"] - right["sft"]
    inputs = VerdictInputs(
        n_comparisons=n,
        accuracy_sft=arms["sft"]["accuracy"],
        accuracy_dpo=arms["dpo"]["accuracy"],
        difference_pp=test.difference_pp,
        ci95_pp=test.ci95_pp,
        p_value=test.p_value,
        confidence_sft=arms["sft"]["confidence"],
        confidence_dpo=arms["dpo"]["confidence"],
        fold_differences_pp=folds,
        seed_differences_pp=test.seed_differences_pp,
        discordance=test.discordance,
        minimum_detectable_effect_pp=power.minimum_detectable_effect_pp(n, test.discordance, test.design_effect),
        comparisons_needed_for_2pp=power.comparisons_needed(2, test.discordance, test.design_effect),
        chance_of_supported={
            gain: power.chance_of_supported_observed(float(gain), differences, users, seed) for gain in TRUE_GAINS_PP
        },
        best_baseline=best,
        best_baseline_accuracy=best_row["accuracy"],
        sft_more_difference_pp=more.difference_pp if more else None,
        sft_more_ci95_pp=more.ci95_pp if more else None,
        instability=instability_reasons(losses),
        sft_training_rows_known=sft_known,
    )
    decided = decide(inputs)
    return {
        "outcome": decided.outcome,
        "reasons": list(decided.reasons),
        **{k: list(v) if isinstance(v, tuple) else v for k, v in vars(inputs).items()},
        "test": test.test,
        "mcnemar_p": test.mcnemar_p,
        "wins": test.wins,
        "losses": test.losses,
        "design_effect": test.design_effect,
    }


def failed_verdict(failed: dict[str, Any]) -> dict[str, Any]:
    from quantpref.verdict import failed_training_verdict

    decided = failed_training_verdict(f"step {failed['step']}: {failed['numbers']}")
    numbers = ("difference_pp", "ci95_pp", "p_value", "minimum_detectable_effect_pp", "comparisons_needed_for_2pp",
               "chance_of_supported")  # fmt: skip
    return {"outcome": decided.outcome, "reasons": list(decided.reasons), **dict.fromkeys(numbers)}


def show(config: Config, test: list[Comparison], results: dict[str, Any]) -> None:
    from quantpref.report import table, verdict_text

    if config.show:
        show_samples(config, test, results)
    print(f"\n{table(results)}\n\n{verdict_text(results)}\n")


def show_samples(config: Config, test: list[Comparison], results: dict[str, Any]) -> None:
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
                chosen.append(
                    f"{arm.upper()}: {answer} ({'correct' if margin > 0 else 'wrong' if margin < 0 else 'half'})"
                )
        print(f"\nSample {i + 1}/{count}  line {comparison.line}: {', '.join(map(str, comparison.history))}")
        for label, movie in (("A", comparison.option_a), ("B", comparison.option_b)):
            mark = "  <- preferred" if label == comparison.label else ""
            print(f"  Option {label}: {movie} ({movie.genre_text}){mark}")
        print(f"  {', '.join(chosen)}")


if __name__ == "__main__":
    with one_line_errors():
        main(parse_config(sys.argv[1:], __doc__ or ""))
