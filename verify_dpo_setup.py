#!/usr/bin/env python3
"""Step 1 of 3: can this machine run the experiment? Looks at everything before hours are spent.

python verify_dpo_setup.py --preset tiny
python verify_dpo_setup.py --preset tiny --json          # the same findings for machines
"""

import contextlib
import json
import math
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from config import Config, parse_config
from quantpref.preflight import Check, base, device, disk, four_bit, hub, judged, memory, packages, python
from quantpref.runs import RunError, UserError, one_line_errors

MARKS = {"ok": "✓", "warn": "!", "fail": "✗"}


def main(config: Config, as_json: bool) -> None:
    results = []
    found: dict[str, Any] = {}  # what earlier checks hand to later ones: the data, the base
    checks = (python, packages, device, data, leakage, power, hub, base, lengths, memory, disk, four_bit, dpo_steps)
    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        for check in checks:
            for result in run(check, config, found):
                results.append(result)
                if not as_json:
                    print(f"{MARKS[result.status]} {result.name:14} {result.found}", flush=True)
                    if result.todo:
                        print(f"  {'':14} -> {result.todo}", flush=True)
    failed = sum(result.status == "fail" for result in results)
    if as_json:
        print(json.dumps({"failed": failed, "checks": [asdict(result) for result in results]}, indent=2))
    if failed:
        raise RunError(f"{failed} check(s) failed; see the crosses above")
    if not as_json:
        print("\neverything is in place; next: train_dpo.py with the same flags")


def run(check: Callable[..., Iterator[Check]], config: Config, found: dict[str, Any]) -> Iterator[Check]:
    """A check that breaks is a check that failed, and the others still run."""
    name = check.__name__.replace("_", " ")
    try:
        yield from check(config, found)
    except (UserError, RunError) as error:
        yield Check("fail", name, str(error))  # whose second half says what to do
    except Exception as error:  # whatever a library raises here, it would raise in training too
        text = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        yield Check("fail", name, text, "what a library raises here it raises in training too: mend it first")


def data(config: Config, found: dict[str, Any]) -> Iterator[Check]:
    from quantpref.experiment import load_data

    # The leakage check below judges what these two refuse, and shows the rest too.
    found["data"] = loaded = load_data(replace(config, strict=False, max_shortcut=None))
    split, share = loaded.split, loaded.manifest["labels_a"] / loaded.manifest["comparisons"]
    yield Check(
        "ok",
        "data",
        f"{config.data}: {len(split.train):,} comparisons to train on, {len(split.validation):,} for validation,"
        f" {len(split.test):,} to test on",
    )
    yield judged(
        0.4 <= share <= 0.6,
        "labels",
        f"{share:.0%} of the lines say Option A",
        "nothing: training shows the preferred film first in half, the test scores both orders",
        "warn",
    )
    lines: dict[tuple[str, ...], list[int]] = {}
    for comparison in (*split.train, *split.validation, *split.test):
        lines.setdefault(comparison.key, []).append(comparison.line)
    twice = sorted(where for where in lines.values() if len(where) > 1)
    text = f"{len(twice)} comparisons stand more than once"
    example = f" (lines {' and '.join(map(str, sorted(twice[0])[:2]))})" if twice else ""
    todo = "remove the repetitions: each counts as often as it stands there"
    yield judged(not twice, "duplicates", text + example, todo, "warn")


def leakage(config: Config, found: dict[str, Any]) -> Iterator[Check]:
    """Leaks between the parts and within the rows, and what rules score that do not look at the history."""
    if "data" not in found:
        return
    from quantpref.leakage import SHORTCUTS, leakage_report, refuse

    report = leakage_report(found["data"].split, config.split_seed)
    for leak in report["leaks"]:
        text, todo = f"{leak['leak']}: {leak['count']}, such as {leak['example']}", "remove these rows"
        yield Check("fail" if config.strict else "warn", "leakage", text, todo)
    if not report["leaks"]:
        yield Check("ok", "leakage", "no user, comparison or flipped copy in two parts, no later rating in a history")
    twins, later = report["duplicate_titles"], report["comparisons_with_a_film_of_a_later_year"]
    cold = report["test_comparisons_preferred_film_cold"]
    yield Check(
        "ok",
        "films",
        f"{twins['films']} under several spellings {'; '.join(twins['examples'])}".rstrip()
        + f", {later} comparisons with a film of a later year, {cold} test comparisons prefer a film not in training",
    )
    rules = {name: report["baselines"][name] for name in SHORTCUTS if name in report["baselines"]}
    text = ", ".join(
        f"{name.replace('_', ' ')} {row['accuracy']:.1%} ({100 * row['accuracy_ci95'][0]:.1f}-"
        f"{100 * row['accuracy_ci95'][1]:.1f})"
        for name, row in rules.items()
    )
    try:
        refuse({**report, "leaks": []}, config.data, config.max_shortcut, config.strict)
        yield Check("ok", "shortcuts", text)
    except UserError as error:
        yield Check("fail", "shortcuts", text, str(error))


def power(config: Config, found: dict[str, Any]) -> Iterator[Check]:
    """Before any result is known: what a test of this size can see."""
    if "data" not in found:
        return
    from quantpref.power import comparisons_needed, minimum_detectable_effect_pp

    n = len(found["data"].split.test)
    effect = minimum_detectable_effect_pp(n, 0.15)
    yield judged(
        effect <= 3.5,
        "power",
        f"{n:,} test comparisons see a difference of {effect:.1f} points (80 % power, 15 % discordant)",
        f"2 points need {comparisons_needed(2, 0.15):,}: bring more data, or --test-data FILE",
        "warn",
    )


def lengths(config: Config, found: dict[str, Any]) -> Iterator[Check]:
    """Rows that are too long lose their oldest history films; said before anything is trained on them."""
    if not {"base", "data"} <= found.keys():
        return
    from quantpref.prompts import fit

    split = found["data"].split
    shortened = Counter(
        {
            name: fit(found["base"].tokenizer, part, config.max_length, config.response)[1]
            for name, part in (("train", split.train), ("validation", split.validation), ("test", split.test))
        }
    )
    text = f"{shortened.total():,} rows are longer than {config.max_length} tokens"
    parts = ", ".join(f"{count:,} of {name}" for name, count in shortened.items() if count)
    yield judged(
        not shortened.total(),
        "length",
        f"{text} ({parts})" if parts else text,
        "they lose their oldest history films: raise --max-length, or accept it",
        "warn",
    )


def dpo_steps(config: Config, found: dict[str, Any]) -> Iterator[Check]:
    """Real DPO steps on the real base: ln 2 at the start, an adapter that moves and reloads, time and memory."""
    if not {"base", "data"} <= found.keys():
        yield Check("fail", "DPO step", "not tried, since the base or the data is missing", "see above")
        return
    from quantpref.training import trial_steps

    train = found["data"].split.train
    with tempfile.TemporaryDirectory() as folder:
        trial = trial_steps(found["base"], train, config, Path(folder) / "llama3_trial_4bit_final")
    yield judged(
        trial["moved"] == trial["weights"],
        "DPO step",
        f"loss {trial['first_loss']:.4f} (ln 2 = {math.log(2):.4f}), {trial['moved']} of {trial['weights']} adapter"
        f" matrices moved, {trial['trainable_weights']:,} weights, peak {trial['peak_memory_gib']:.1f} GiB",
        "the optimiser does not reach the adapter",
    )
    yield Check(
        "ok", "reload", f"saved and read back, the adapter scores the same within {trial['reload_nats']:.1e} nats"
    )
    steps = math.ceil(len(train) / config.effective_batch_size)
    passes = config.num_train_epochs * (2 if config.sft_more else 1) + config.sft_epochs
    minutes = steps * passes * trial["seconds_per_step"] / 60
    yield Check(
        "ok",
        "time",
        f"about {minutes:.0f} min of training: {steps * passes:,} steps of {trial['seconds_per_step']:.2f} s"
        f" ({trial['per_device_train_batch_size']} pairs at a time)",
    )


if __name__ == "__main__":
    with one_line_errors():
        flags = [flag for flag in sys.argv[1:] if flag != "--json"]
        main(parse_config(flags, __doc__ or ""), as_json=len(flags) < len(sys.argv) - 1)
