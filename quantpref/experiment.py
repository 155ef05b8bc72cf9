"""What the scripts agree on: the split of the data, and which adapters belong to it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from config import Config
from quantpref.comparisons import Comparison, Split, load
from quantpref.runs import MANIFEST, UserError, damage, read_json, sha256, versions
from quantpref.splits import split_comparisons

FAILED = "failed.json"  # in an adapter's folder, in place of the adapter: training met a number that is not finite

# Settings that decide nothing about the weights (the micro-batch: but for rounding), and those that only DPO and
# sft-more read.
NOT_TRAINED_ON = {
    "show", "report_to", "output_dir", "test_data", "sft_more", "dpo_from_base", "retrain_sft", "save_steps", "adapter",
    "precision", "base_model_16bit", "runs", "fresh", "per_device_train_batch_size", "max_shortcut", "strict",
}  # fmt: skip
DPO_ONLY = {"beta", "learning_rate", "num_train_epochs", "sft_adapter"}
NO_BETA = {"beta"}  # sft-more shares DPO's schedule, not its loss


@dataclass(frozen=True)
class Data:
    """The split of the data file, with the test replaced by --test-data where that is given."""

    split: Split
    manifest: dict[str, Any]  # what adapters and results record of it
    test_file: Path


def load_data(config: Config) -> Data:
    """Read and split the data; refuse a test file that shares users or rows with training.

    Raises:
        UserError: anything wrong in a file, or an overlap, with the first line that overlaps; what --strict and
            --max-shortcut refuse.
    """
    data = _load_data(config)
    if config.strict or config.max_shortcut is not None:
        from quantpref.leakage import leakage_report, refuse

        refuse(leakage_report(data.split, config.split_seed), config.data, config.max_shortcut, config.strict)
    return data


def _load_data(config: Config) -> Data:
    comparisons = load(config.data)
    try:
        split = split_comparisons(
            comparisons, config.split, config.train_fraction, config.validation_fraction, config.split_seed
        )
    except UserError as error:
        raise UserError(f"{config.data}: {error}") from None
    manifest: dict[str, Any] = {
        "file": str(config.data),
        "sha256": sha256(config.data),
        "comparisons": len(comparisons),
        "labels_a": sum(c.label == "A" for c in comparisons),
        "split": split.manifest(),
    }
    if config.test_data is None:
        _refuse_overlap(config.data, split.test, split)  # of rows that stand twice: users are apart already
        return Data(split, manifest, config.data)
    test = load(config.test_data)
    _refuse_overlap(config.test_data, test, split)
    if config.split == "time":
        _refuse_earlier(config.test_data, test, split)
    return Data(Split(split.train, split.validation, test), manifest, config.test_data)


def _refuse_overlap(path: Path, test: list[Comparison], split: Split) -> None:
    seen = [*split.train, *split.validation]
    keys = {c.key: c.line for c in reversed(seen)}
    users = {c.user: c.line for c in reversed(seen) if c.user is not None}
    for c in test:
        for shared, line in (("comparison", keys.get(c.key)), ("user", users.get(c.user or ""))):
            if line is not None:
                raise UserError(
                    f"{path}, line {c.line}: this {shared} is in the training data too (line {line} there); remove"
                    " it, and test on other people's rows"
                )


def _refuse_earlier(path: Path, test: list[Comparison], split: Split) -> None:
    end = max(c.time or 0 for c in (*split.train, *split.validation))
    for c in test:
        if c.time is None or c.time <= end:
            raise UserError(
                f"{path}, line {c.line}: its time is {c.time}, and training and validation end at {end}; with --split"
                " time test on what came later"
            )


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of an adapter folder; None where there is none (an adapter made elsewhere)."""
    path = folder / MANIFEST
    return read_json(path) if path.is_file() else None


def failure(folder: Path) -> str:
    """What `failed.json` says, as text."""
    found = read_json(folder / FAILED)
    numbers = ", ".join(f"{name} {value}" for name, value in found["numbers"].items())
    return f"training ended at step {found['step']} on a number that is not finite ({numbers})"


def difference(config: Config, manifest: dict[str, Any], data: Data) -> list[str]:
    """In what the settings and data that made an adapter differ from now, one text a difference."""
    ignored = set(NOT_TRAINED_ON)
    ignored |= {"sft": DPO_ONLY, "sft-more": NO_BETA}.get(manifest.get("kind", ""), set())
    if manifest.get("kind") == "dpo-from-base":
        ignored |= {"sft_adapter", "sft_learning_rate", "sft_epochs"}
    elif manifest.get("kind") != "sft":
        # The SFT adapter that DPO started from is recorded by its hash.
        ignored |= {"sft_adapter", "sft_learning_rate", "sft_epochs", "lora_r", "lora_alpha"}
    then, now = manifest.get("config", {}), config.as_json()
    if now["base_revision"] in (then.get("base_revision"), manifest.get("base", {}).get("revision")):
        ignored.add("base_revision")  # the commit by name that None led to is no difference
    texts = [
        f"--{name.replace('_', '-')} was {then.get(name)!r}, is {now[name]!r}"
        for name in now
        if name not in ignored | {"data", "backend"} and then.get(name) != now[name]
    ]
    started_from = manifest.get("lineage", {}).get("started_from")
    weights = config.sft_folder / "adapter_model.safetensors"
    if started_from and weights.is_file() and sha256(weights) != started_from:
        texts.append(f"it started from another SFT adapter than {config.sft_folder}")
    if manifest.get("data", {}).get("split") != data.manifest["split"]:
        texts.append(f"the data or its split is another ({manifest.get('data', {}).get('file')}, {config.data})")
    return texts


def version_changes(manifest: dict[str, Any]) -> list[str]:
    """Of a checkpoint's manifest: other versions of what computes would not train on to the same weights."""
    then, now = manifest.get("environment", {}).get("versions", {}), versions()
    return [
        f"{name} was {then.get(name, 'missing')}, is {now.get(name, 'missing')}"
        for name in sorted(then.keys() | now.keys())
        if then.get(name) != now.get(name)
    ]


def check_adapter(folder: Path, base: dict[str, Any], data: Data) -> dict[str, Any] | None:
    """Refuse an adapter whose files, base, quantisation or split are not what its manifest and now say.

    Returns its manifest; None for one made elsewhere, whose training rows nobody knows.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        return None
    if fault := damage(folder):
        raise UserError(f"{fault}; restore it, or train again")
    made_on = manifest.get("base", {})
    if made_on.get("fingerprint") != base["fingerprint"]:
        raise UserError(
            f"{folder}: trained on base {made_on.get('model')} ({str(made_on.get('fingerprint'))[:12]}), not on"
            f" {base['model']} ({base['fingerprint'][:12]}); use that base, or train again"
        )
    if made_on.get("quantisation") != base["quantisation"]:
        raise UserError(f"{folder}: trained under {made_on.get('quantisation')}, not {base['quantisation']}")
    if manifest.get("data", {}).get("split") != data.manifest["split"]:
        raise UserError(
            f"{folder}: trained on another split ({manifest.get('data', {}).get('file')}), so its training rows may"
            " be tested on; use the same --data, fractions and --split-seed, or train again"
        )
    revisions = {made_on.get("revision"), base["revision"]} - {None}  # a folder has none: its fingerprint must do
    if len(revisions) > 1:
        raise UserError(
            f"{folder}: trained on revision {made_on['revision']} of {base['model']}, not on {base['revision']}; give"
            f" --base-revision {made_on['revision']}"
        )
    return manifest
