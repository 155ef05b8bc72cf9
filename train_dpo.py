#!/usr/bin/env python3
"""Step 2 of 3: train the SFT baseline where it is missing, then DPO from it.

python train_dpo.py --preset tiny
python train_dpo.py --data my_comparisons.jsonl          # Llama 3 8B on a 24 GB card
accelerate launch train_dpo.py --data my_comparisons.jsonl          # on every GPU of this machine
"""

import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from config import Config, parse_config
from quantpref import processes
from quantpref.experiment import (
    FAILED,
    Data,
    check_adapter,
    difference,
    failure,
    load_data,
    read_manifest,
    version_changes,
)
from quantpref.resume import made_with, newest
from quantpref.runs import RunError, UserError, damage, locked, one_line_errors, remove_leftovers, set_aside


def main(config: Config) -> None:
    processes.start()
    data = load_data(config)
    if not (config.retrain_sft or config.fresh) and finished(config, data):
        print(f"{config.output_dir}: finished with these settings; next: evaluate_dpo.py with the same flags")
        return
    with locked(config.output_dir) if processes.is_first() else nullcontext():
        if processes.is_first():
            clear_the_way(config)
        processes.wait()
        finished(config, data)
        check_unfinished(config, data)
        train(config, data)


def train(config: Config, data: Data) -> None:
    print_plan(config, data)
    from quantpref.backends import choose_backend

    backend = choose_backend(config.backend)
    from quantpref import models, training

    models.quiet()
    base = models.load_base(config.base_model, config.base_revision, backend, config.max_length)
    print(f"base {base.name}: 4-bit nf4, {base.backend}, fingerprint {base.fingerprint[:12]}")
    missing = [folder for folder in arms(config) if not folder.exists()]
    training.check_space(base, len(data.split.train), len(missing), config)
    manifest = {"base": base.manifest(), "data": data.manifest}

    if not config.sft_folder.exists():
        training.train_sft(base, data.split.train, config, config.sft_folder, manifest)
    sft = models.read_adapter(config.sft_folder)
    manifest |= sft_provenance(config, base.manifest(), data, sft.config.base_model_name_or_path)
    if config.sft_more and not config.sft_more_folder.exists():
        training.train_sft(base, data.split.train, config, config.sft_more_folder, manifest, start=sft)
    if not config.dpo_folder.exists():
        training.train_dpo(base, data.split.train, config, config.dpo_folder, manifest, sft)
    if config.dpo_from_base and not config.dpo_from_base_folder.exists():
        training.train_dpo(base, data.split.train, config, config.dpo_from_base_folder, manifest, None)
    for folder in arms(config):
        print(f"wrote {folder}")
    print("next: evaluate_dpo.py with the same flags")


def clear_the_way(config: Config) -> None:
    """What killed runs left half-written goes; what --fresh and --retrain-sft replace is renamed, never lost."""
    derived = [config.output_dir / "llama3_sft_4bit_final", config.sft_more_folder, config.dpo_folder]
    replaced = derived if config.retrain_sft else []
    if config.fresh:
        unfinished = [folder for folder in arms(config) if not folder.exists() or (folder / FAILED).is_file()]
        replaced = [*replaced, *(folder for folder in unfinished if folder not in replaced)]
    for folder in replaced:
        for path in (folder, config.checkpoints_of(folder)):
            if path.exists():
                print(f"{path} is now {set_aside(path)}")
    remove_leftovers(config.output_dir)
    for folder in arms(config):
        remove_leftovers(config.checkpoints_of(folder))


def check_unfinished(config: Config, data: Data) -> None:
    """Refuse to train on from checkpoints that other settings, data or library versions have made."""
    for folder in arms(config):
        checkpoints = config.checkpoints_of(folder)
        if folder.exists() or not checkpoints.is_dir():
            continue
        path, _ = newest(checkpoints)
        if path and (changes := difference(config, made_with(path), data) + version_changes(made_with(path))):
            raise UserError(
                f"{path} is of an unfinished run with other settings ({'; '.join(changes)}); take those again, give"
                " --fresh to begin anew beside it, or choose another --output-dir"
            )


def arms(config: Config) -> list[Path]:
    """The folders that this run is to leave behind."""
    folders = [] if config.sft_adapter else [config.sft_folder]
    more = [config.sft_more_folder] if config.sft_more else []
    from_base = [config.dpo_from_base_folder] if config.dpo_from_base else []
    return [*folders, *more, config.dpo_folder, *from_base]


def finished(config: Config, data: Data) -> bool:
    """True where every adapter is there, made with these settings; with others, refuse to touch them."""
    if config.sft_adapter and not config.sft_adapter.is_dir():
        raise UserError(f"--sft-adapter {config.sft_adapter}: no such folder; leave it out to train one")
    there = [folder for folder in arms(config) if folder.exists()]
    for folder in there:
        if (folder / FAILED).is_file():
            raise RunError(f"{folder}: {failure(folder)}; evaluate it, or give --fresh to begin anew beside it")
        manifest = read_manifest(folder)
        if manifest is None:
            raise UserError(f"{folder}: holds no manifest of a run; move it away, or choose another --output-dir")
        if changes := difference(config, manifest, data):
            raise UserError(
                f"{folder} is finished with other settings ({'; '.join(changes)}); choose another --output-dir"
            )
        if fault := damage(folder):
            raise UserError(f"{fault}; restore it, or move {folder} away to train it again")
    return len(there) == len(arms(config))


def print_plan(config: Config, data: Data) -> None:
    """Counts, and what a test of this size can see: said before anything is trained."""
    from quantpref.power import chance_of_supported, minimum_detectable_effect_pp

    split, n = data.split, len(data.split.test)
    print(
        f"{config.data}: {len(split.train):,} comparisons to train on, {len(split.validation):,} for validation,"
        f" {n:,} to test on; {data.manifest['labels_a'] / data.manifest['comparisons']:.0%} of the labels are A,"
        " training shows the preferred film first in half"
    )
    chances = ", ".join(f"{chance_of_supported(gain, n, 0.15):.0%} at {gain}" for gain in (2, 3, 5))
    print(
        f"with 15 % of the test answers differing, this test sees {minimum_detectable_effect_pp(n, 0.15):.1f} points"
        f" with 80 % power; the chance of SUPPORTED at a true gain in points: {chances}"
    )


def sft_provenance(config: Config, base: dict[str, Any], data: Data, made_on: str | None) -> dict[str, Any]:
    """Whether the SFT adapter's training rows are known; one of another base or split is refused."""
    known = check_adapter(config.sft_folder, base, data) is not None
    if not known:
        names = [str(name).rstrip("/").rsplit("/", 1)[-1].lower() for name in (made_on, config.base_model)]
        if names[0] != names[1]:
            raise UserError(
                f"{config.sft_folder}: made for base {made_on}, not {config.base_model}; give that --base-model"
            )
        print(f"warning: nobody knows which rows {config.sft_folder} was trained on; the test may be contaminated")
    return {"sft_training_rows_known": known}


if __name__ == "__main__":
    with one_line_errors():
        main(parse_config(sys.argv[1:], __doc__ or ""))
