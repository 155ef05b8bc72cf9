#!/usr/bin/env python3
"""Step 1 of 3: can this machine run the experiment? Looks at everything before hours are spent.

python verify_dpo_setup.py --preset tiny
"""

import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from config import ROOT, Config, parse_config
from quantpref.runs import RunError, UserError, one_line_errors

MARKS = {"ok": "✓", "warn": "!", "fail": "✗"}


@dataclass(frozen=True)
class Check:
    """One finding: `todo` says what to do about a warning or a failure."""

    status: str  # "ok" | "warn" | "fail"
    name: str
    found: str
    todo: str = ""


def judged(fine: bool, name: str, found: str, todo: str, otherwise: str = "fail") -> Check:
    """A tick, or what to do about it."""
    return Check("ok", name, found) if fine else Check(otherwise, name, found, todo)


def main(config: Config) -> None:
    failed = 0
    found: dict[str, Any] = {}  # what earlier checks hand to later ones: the data, the base
    for check in (python, packages, device, data, leakage, power, base, memory, disk, four_bit, dpo_steps):
        for result in run(check, config, found):
            failed += result.status == "fail"
            print(f"{MARKS[result.status]} {result.name:14} {result.found}", flush=True)
            if result.todo:
                print(f"  {'':14} -> {result.todo}", flush=True)
    if failed:
        raise RunError(f"{failed} check(s) failed; see the crosses above")
    print("\neverything is in place; next: train_dpo.py with the same flags")


def run(check: Callable[..., Iterator[Check]], config: Config, found: dict[str, Any]) -> Iterator[Check]:
    """A check that breaks is a check that failed, and the others still run."""
    name = check.__name__.replace("_", " ")
    try:
        yield from check(config, found)
    except (UserError, RunError) as error:
        yield Check("fail", name, str(error))
    except Exception as error:  # whatever a library raises here, it would raise in training too
        yield Check("fail", name, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")


def python(config: Config, found: dict[str, Any]) -> Iterator[Check]:
    version = ".".join(map(str, sys.version_info[:3]))
    yield judged(sys.version_info >= (3, 11), "python", version, "install Python 3.11 or later")


def packages(config: Config, found: dict[str, Any]) -> Iterator[Check]:
    """Installed versions against the pins; another version may work, a missing package cannot."""
    # What stands from "# notebook" on is for the notebook and for working on this project.
    needed = (ROOT / "requirements-cpu.txt").read_text(encoding="utf-8").partition("# notebook")[0]
    pins = re.findall(r"^([\w-]+)==(\S+)", needed, re.MULTILINE)
    missing, other = [], []
    for name, pin in pins:
        try:
            version = metadata.version(name).split("+")[0]
        except metadata.PackageNotFoundError:
            missing.append(name)
            continue
        if version != pin:
            other.append(f"{name} {version} (pinned {pin})")
    todo = "pip install -r requirements.txt (with a GPU) or requirements-cpu.txt"
    if missing:
        yield Check("fail", "packages", f"missing: {', '.join(missing)}", todo)
    if other:
        yield Check("warn", "packages", f"not the tested versions: {', '.join(other)}", todo)
    if not missing and not other:
        yield Check("ok", "packages", f"all {len(pins)} as pinned")


def device(config: Config, found: dict[str, Any]) -> Iterator[Check]:
    import torch

    from quantpref.backends import choose_backend

    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        name = f"{torch.cuda.get_device_name()}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
        yield judged(torch.cuda.is_bf16_supported(), "device", name, "bf16 is needed: Ampere or later")
    elif config.base_model.startswith("/") or Path(config.base_model).is_dir():
        yield Check("ok", "device", f"no GPU; CPU with {torch.get_num_threads()} threads")
    else:
        yield Check("fail", "device", "no GPU, and this base is too large for a CPU", "use a GPU, or --preset tiny")
    found["backend"] = choose_backend(config.backend)
    yield Check("ok", "backend", found["backend"])


def memory(config: Config, found: dict[str, Any]) -> Iterator[Check]:
    """What training will take of the GPU, at one pair and at all pairs of a step in one pass."""
    import torch

    if "base" not in found or not torch.cuda.is_available():
        return
    from quantpref.models import training_memory_gib

    shape, total = found["base"].model.config, torch.cuda.get_device_properties(0).total_memory / 2**30
    one, all_pairs = (training_memory_gib(shape, config.lora_r, 200 * n) for n in (1, config.effective_batch_size))
    text = f"about {one:.1f} GiB at one pair of 200 tokens at a time, {all_pairs:.1f} at {config.effective_batch_size}"
    todo = "take a smaller preset: --preset llama3.2-3b or llama3.2-1b"
    yield judged(one <= 0.95 * total, "memory", f"{text}; the GPU has {total:.1f}", todo)


def disk(config: Config, found: dict[str, Any]) -> Iterator[Check]:
    """Room for each arm's adapter and two checkpoints of it with AdamW's two moments, all in float32."""
    if "base" not in found:
        return
    from quantpref.models import lora_weights

    folder = next(p for p in (config.output_dir.absolute(), *config.output_dir.absolute().parents) if p.exists())
    free = shutil.disk_usage(folder).free / 2**30
    needed = 3 * (1 + 2 * 3) * 4 * lora_weights(found["base"].model.config, config.lora_r) / 2**30
    todo = "free some space, or choose another --output-dir"
    yield judged(free >= needed, "disk", f"{free:.1f} GiB free in {folder} ({needed:.1f} needed)", todo)


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


def base(config: Config, found: dict[str, Any]) -> Iterator[Check]:
    if "backend" not in found:
        return
    from quantpref import models

    models.quiet()
    found["base"] = loaded = models.load_base(
        config.base_model, config.base_revision, found["backend"], config.max_length
    )
    layers = len(models.LORA_TARGETS) * loaded.model.config.num_hidden_layers
    yield Check(
        "ok", "base", f"{loaded.name}: {layers} projections in 4-bit nf4, {loaded.backend}, {loaded.fingerprint[:12]}"
    )


def four_bit(config: Config, found: dict[str, Any]) -> Iterator[Check]:
    """nf4 with double quantisation on this device, against float64 arithmetic of the definition."""
    from quantpref.models import four_bit_error

    error, bound = four_bit_error()
    yield judged(
        error <= bound,
        "4-bit",
        f"nf4 round trip within {error:.2%} of float64's, of each block's maximum (at most {bound:.0%})",
        "bitsandbytes is broken on this device; reinstall the pinned version",
    )


def dpo_steps(config: Config, found: dict[str, Any]) -> Iterator[Check]:
    """Real DPO steps on the real base: ln 2 at the start, an adapter that moves, and the time they take."""
    if not {"base", "data"} <= found.keys():
        yield Check("fail", "DPO step", "not tried, since the base or the data is missing", "see above")
        return
    import math

    from quantpref.training import trial_steps

    train = found["data"].split.train
    with tempfile.TemporaryDirectory() as folder:
        trial = trial_steps(found["base"], train, config, Path(folder) / "llama3_trial_4bit_final")
    yield judged(
        trial["moved"] > 0,
        "DPO step",
        f"loss {trial['first_loss']:.4f} (ln 2 = {math.log(2):.4f}), {trial['moved']} of {trial['weights']} adapter"
        f" matrices moved, {trial['trainable_weights']:,} weights, peak {trial['peak_memory_gib']:.1f} GiB",
        "the optimiser does not reach the adapter",
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
        main(parse_config(sys.argv[1:], __doc__ or ""))
