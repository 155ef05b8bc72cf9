"""experiment.py: no test on training rows, and adapters of other settings, base or split are told apart."""

import hashlib
import json
from dataclasses import fields, replace
from pathlib import Path

import pytest

from config import PRESETS, Config
from quantpref.comparisons import Comparison, fingerprint, flip, load, save
from quantpref.experiment import check_adapter, difference, load_data, read_manifest
from quantpref.runs import UserError, write_manifest

TINY = PRESETS["tiny"]


@pytest.fixture
def config(tmp_path, comparisons):
    save(tmp_path / "data.jsonl", comparisons(60, rows_per_user=2))
    return replace(TINY, data=tmp_path / "data.jsonl", output_dir=tmp_path / "out")


def with_test(config: Config, rows: list[Comparison]) -> Config:
    path = config.data.with_name("test.jsonl")
    save(path, [replace(c, line=i) for i, c in enumerate(rows, start=1)])
    return replace(config, test_data=path)


# Data


def test_load_data_records_file_labels_and_split(config):
    data = load_data(config)
    content = config.data.read_bytes()
    rows = load(config.data)
    assert data.test_file == config.data
    assert data.manifest["sha256"] == hashlib.sha256(content).hexdigest()
    assert (data.manifest["comparisons"], data.manifest["labels_a"]) == (60, sum(c.label == "A" for c in rows))
    assert {name: part["users"] for name, part in data.manifest["split"].items()} == {
        "train": 21, "validation": 3, "test": 6
    }  # fmt: skip
    assert data.manifest["split"]["test"]["sha256"] == fingerprint(data.split.test)
    assert load_data(replace(config, seed=1)).split == data.split  # runs of other seeds share one test
    assert load_data(replace(config, split_seed=1)).manifest["split"] != data.manifest["split"]


def test_another_test_file_takes_the_place_of_the_test_part(config, comparisons):
    strangers = [replace(c, user=f"other {c.user}") for c in comparisons(9, rows_per_user=3, seed=1)]
    own = load_data(config)
    data = load_data(with_test(config, strangers))
    assert [c.key for c in data.split.test] == [c.key for c in strangers]
    assert data.test_file == config.data.with_name("test.jsonl")
    assert (data.split.train, data.split.validation) == (own.split.train, own.split.validation)
    assert data.manifest == own.manifest  # what adapters are checked against does not hang on the test
    # The test part of the same file was never trained on, so it may be tested on.
    assert len(load_data(with_test(config, own.split.test)).split.test) == len(own.split.test)


@pytest.mark.parametrize("part", ["train", "validation"])
@pytest.mark.parametrize("flipped", [False, True])
def test_a_test_row_of_the_training_data_is_refused(config, comparisons, part, flipped):
    seen = getattr(load_data(config).split, part)[-1]
    strangers = [replace(c, user=f"other {c.user}") for c in comparisons(4, seed=1)]
    copy = replace(flip(seen) if flipped else seen, user="somebody else", time=None)
    found = rf"test\.jsonl, line 5: this comparison is in the training data too \(line {seen.line} there\); remove it"
    with pytest.raises(UserError, match=found):
        load_data(with_test(config, [*strangers, copy]))


@pytest.mark.parametrize("part", ["train", "validation"])
def test_a_test_user_of_the_training_data_is_refused(config, comparisons, part):
    seen = getattr(load_data(config).split, part)
    (*strangers, row) = (replace(c, user=f"other {c.user}") for c in comparisons(3, seed=1))
    first = min(c.line for c in seen if c.user == seen[-1].user)
    found = rf"test\.jsonl, line 3: this user is in the training data too \(line {first} there\); remove it"
    with pytest.raises(UserError, match=found):
        load_data(with_test(config, [*strangers, replace(row, user=seen[-1].user)]))


def test_rows_without_users_overlap_by_row_only(tmp_path, comparisons):
    save(tmp_path / "data.jsonl", comparisons(30, rows_per_user=0))
    config = replace(TINY, data=tmp_path / "data.jsonl")
    strangers = comparisons(30, rows_per_user=0, seed=1)  # the same line numbers are not the same people
    assert len(load_data(with_test(config, strangers)).split.test) == 30
    seen = load_data(config).split.train[0]
    with pytest.raises(UserError, match="line 31: this comparison"):
        load_data(with_test(config, [*strangers, seen]))


def test_the_training_file_itself_is_no_test_file(config):
    with pytest.raises(UserError, match=r"data\.jsonl, line \d+: this comparison is in the training data too"):
        load_data(replace(config, test_data=config.data))


def test_a_row_that_stands_twice_is_not_trained_and_tested_on(tmp_path, comparisons):
    """In a file without users each line is its own user, so a split could part the two."""
    rows = comparisons(30, rows_per_user=0)
    path = tmp_path / "data.jsonl"
    save(path, rows)
    config = replace(TINY, data=path)
    split = load_data(config).split
    tested, trained, also_trained = split.test[0].line, split.train[0].line, split.train[1].line
    rows[also_trained - 1] = replace(rows[trained - 1], line=also_trained)
    path.unlink()
    save(path, rows)
    load_data(config)  # twice in training is the file's own affair
    rows[tested - 1] = replace(flip(rows[trained - 1]), line=tested)
    save(path, rows)
    found = rf"data\.jsonl, line {tested}: this comparison is in the training data too \(line \d+ there\); remove it"
    with pytest.raises(UserError, match=found):
        load_data(config)


def test_errors_name_the_file_they_come_from(config, tmp_path, comparisons):
    one_user = tmp_path / "one.jsonl"
    save(one_user, comparisons(5, rows_per_user=5))
    with pytest.raises(UserError, match=rf"^{one_user}: 1 user\(s\) cannot be split .*; bring more users"):
        load_data(replace(config, data=one_user))
    broken = tmp_path / "broken.jsonl"
    broken.write_text(config.data.read_text() + "{\n")
    with pytest.raises(UserError, match=rf"^{broken}, line 61: not JSON"):
        load_data(replace(config, test_data=broken))
    with pytest.raises(UserError, match=r"^gone: cannot be read"):
        load_data(replace(config, test_data=Path("gone")))


# Adapters

ALL_KINDS = {
    "base_model", "base_revision", "train_fraction", "validation_fraction", "split", "split_seed", "response",
    "max_length", "effective_batch_size", "warmup_steps", "weight_decay", "seed",
}  # fmt: skip
SCHEDULE, LORA, SFT = (
    {"learning_rate", "num_train_epochs"},
    {"lora_r", "lora_alpha"},
    {"sft_learning_rate", "sft_epochs"},
)
MATTERS = {
    "sft": ALL_KINDS | LORA | SFT,
    "dpo": ALL_KINDS | SCHEDULE | {"beta"},
    "sft-more": ALL_KINDS | SCHEDULE,
    "dpo-from-base": ALL_KINDS | SCHEDULE | LORA | {"beta"},
}
UNDECIDED = {"per_device_train_batch_size"}  # changes rounding at most


def another(config: Config, name: str) -> Config:
    """`config` with another value of one field."""
    value = getattr(config, name)
    if isinstance(value, bool):
        return replace(config, **{name: not value})
    if isinstance(value, int | float):
        return replace(config, **{name: value * 2 or 1})
    if isinstance(value, tuple):
        return replace(config, **{name: (*value, "more")})
    kind = Path if isinstance(value, Path) or name in ("test_data", "sft_adapter") else str
    return replace(config, **{name: kind("another")})


def manifest_of(config: Config, kind: str, **more: object) -> dict:
    """What training writes, as it comes back from the file."""
    made = {"kind": kind, "config": config.as_json(), "data": load_data(config).manifest, **more}
    return json.loads(json.dumps(made))


@pytest.mark.parametrize("kind", MATTERS)
def test_difference_names_each_changed_flag(config, kind):
    manifest, data = manifest_of(config, kind), load_data(config)
    assert difference(config, manifest, data) == []
    for field in fields(Config):
        changed = another(config, field.name)
        assert changed != config
        texts = difference(changed, manifest, data)
        flag = f"--{field.name.replace('_', '-')}"
        if field.name in MATTERS[kind]:
            then, now = config.as_json()[field.name], changed.as_json()[field.name]
            assert texts == [f"{flag} was {then!r}, is {now!r}"]
        elif field.name not in UNDECIDED:
            assert texts == [], flag
    both = difference(replace(config, seed=1, weight_decay=0.5), manifest, data)
    assert [text.split()[0] for text in both] == ["--weight-decay", "--seed"]


def test_difference_names_another_split(config, comparisons):
    manifest = manifest_of(config, "dpo")
    moved = config.data.with_name("moved.jsonl")
    save(moved, load(config.data)[::-1])
    same = replace(config, data=moved)  # other lines, the same rows
    assert difference(same, manifest, load_data(same)) == []
    save(moved, [flip(replace(c, label="B")) if c.line == 1 else c for c in load(config.data)])
    relabelled = difference(same, manifest, load_data(same))
    assert relabelled == [f"the data or its split is another ({config.data}, {moved})"]


@pytest.mark.parametrize("kind", ["dpo", "sft-more"])
def test_difference_sees_another_sft_adapter(config, kind):
    """--sft-adapter with other weights is another experiment, wherever that folder stands."""
    for name in ("one", "copy", "other"):
        (config.data.parent / name).mkdir()
        (config.data.parent / name / "adapter_model.safetensors").write_bytes(b"other" if name == "other" else b"one")
    started_from = hashlib.sha256(b"one").hexdigest()
    manifest = manifest_of(config, kind, lineage={"started_from": started_from})
    data = load_data(config)
    for name, expected in (
        ("one", 0),
        ("copy", 0),
        ("other", 1),
    ):
        texts = difference(replace(config, sft_adapter=config.data.parent / name), manifest, data)
        assert len(texts) == expected, name
    assert texts == [f"it started from another SFT adapter than {config.data.parent / 'other'}"]


BASE = {"model": "tiny", "revision": "1a2b", "fingerprint": "f" * 64, "quantisation": {"type": "nf4", "double": True}}


@pytest.fixture
def adapter(config):
    """A finished adapter's folder, and a function that changes its manifest."""
    folder = config.output_dir / "adapter"
    folder.mkdir(parents=True)
    (folder / "adapter_model.safetensors").write_bytes(b"weights")
    digest = hashlib.sha256(b"weights").hexdigest()
    manifest = manifest_of(config, "dpo", base=BASE, adapter_sha256=digest)
    write_manifest(folder, manifest)
    return folder, read_manifest(folder)


def test_check_adapter_accepts_its_own(config, adapter):
    folder, manifest = adapter
    assert check_adapter(folder, BASE, load_data(config)) == manifest == read_manifest(folder)


def test_an_adapter_made_elsewhere_has_no_manifest(config, adapter):
    folder, _ = adapter
    (folder / "manifest.json").unlink()
    assert check_adapter(folder, BASE, load_data(config)) is None
    (folder / "manifest.json").write_text("{")
    with pytest.raises(UserError, match=r"manifest\.json: cannot be read as JSON"):
        check_adapter(folder, BASE, load_data(config))


def test_check_adapter_refuses_another_base_quantisation_split_or_weights(config, adapter):
    folder, _ = adapter
    data = load_data(config)
    with pytest.raises(UserError, match="trained on base tiny .*, not on big .*; use that base, or train again"):
        check_adapter(folder, {**BASE, "model": "big", "fingerprint": "e" * 64}, data)
    with pytest.raises(UserError, match="trained under .*'double': True.*, not .*'double': False"):
        check_adapter(folder, {**BASE, "quantisation": {"type": "nf4", "double": False}}, data)
    with pytest.raises(UserError, match="trained on another split .*; use the same --data, fractions and --split-seed"):
        check_adapter(folder, BASE, load_data(replace(config, split_seed=1)))
    with pytest.raises(UserError, match="trained on revision 1a2b of tiny, not on 3c4d; give --base-revision 1a2b"):
        check_adapter(folder, {**BASE, "revision": "3c4d"}, data)
    assert check_adapter(folder, {**BASE, "revision": None}, data)  # the same weights, from a folder
    (folder / "adapter_model.safetensors").write_bytes(b"weightz")
    with pytest.raises(UserError, match=r"adapter_model\.safetensors: is not the file that its manifest records"):
        check_adapter(folder, BASE, data)
    write_manifest(folder, {})
    with pytest.raises(UserError, match="trained on base None"):
        check_adapter(folder, BASE, data)
