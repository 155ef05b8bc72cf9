"""Users apart however the data are split, and by flag the times too."""

import json
from dataclasses import replace

import pytest
from conftest import make_comparisons
from hypothesis import given, settings
from hypothesis import strategies as st

from config import PRESETS
from quantpref.comparisons import save, split_by_user
from quantpref.experiment import load_data
from quantpref.runs import UserError
from quantpref.splits import split_by_time, split_comparisons


@settings(max_examples=200, deadline=None)
@given(rows=st.lists(st.tuples(st.integers(0, 15), st.integers(0, 40)), min_size=3, max_size=60))
def test_training_ends_before_validation_and_that_before_the_test(rows):
    made = make_comparisons(len(rows))
    timed = [replace(c, user=str(user), time=time) for c, (user, time) in zip(made, rows, strict=True)]
    try:
        split = split_by_time(timed, 0.6, 0.2)
    except UserError as error:
        assert "cannot be cut into train, validation and test" in str(error)
        return
    parts = (split.train, split.validation, split.test)
    for before, after in zip(parts, parts[1:], strict=False):
        assert max(c.time for c in before) < min(c.time for c in after)
    users = [{c.user for c in part} for part in parts]
    assert sum(map(len, users)) == len(set.union(*users)) == len({c.user for c in timed})  # nobody is lost
    # Left out are only rows of people who stand in a later part.
    kept = {c.line for part in parts for c in part}
    last = {user: max(c.time for c in timed if c.user == user) for user in {c.user for c in timed}}
    bounds = [min(c.time for c in part) for part in parts[1:]]
    for c in timed:
        later = any(c.time < bound <= last[c.user] for bound in bounds)
        assert (c.line in kept) != later


def test_shares_are_of_the_comparisons_and_dates_decide(comparisons):
    rows = [replace(c, time=c.line) for c in comparisons(100)]
    split = split_comparisons(rows, "time", 0.7, 0.1, 1)
    assert [len(split.train), len(split.validation), len(split.test)] == [70, 10, 20]
    assert split == split_comparisons(rows[::-1], "time", 0.7, 0.1, 2) or {c.line for c in split.test} == set(
        range(81, 101)
    )
    assert split_comparisons(rows, "user", 0.7, 0.1, 1) == split_by_user(rows, 0.7, 0.1, 1)


@pytest.fixture
def config(tmp_path, comparisons):
    save(tmp_path / "data.jsonl", [replace(c, time=1000 + c.line) for c in comparisons(60, films=300)])
    return replace(PRESETS["tiny"], data=tmp_path / "data.jsonl", split="time")


def test_a_comparison_without_a_time_is_refused(config):
    lines = config.data.read_text().splitlines()
    row = json.loads(lines[6])
    del row["time"]
    config.data.write_text("\n".join([*lines[:6], json.dumps(row), *lines[7:]]) + "\n")
    with pytest.raises(UserError, match=rf"^{config.data}: line 7 has no time, so --split time has nothing to go by"):
        load_data(config)
    assert len(load_data(replace(config, split="user")).split.train) == 42


def test_another_test_file_must_come_later(config, comparisons):
    path = config.data.with_name("test.jsonl")
    rows = [replace(c, user=f"other {c.user}", time=2000) for c in comparisons(9, seed=1)]
    save(path, rows)
    later = replace(config, test_data=path)
    assert len(load_data(later).split.test) == 9
    path.unlink()
    save(path, [replace(c, time=1001 if c.line == 4 else 2000) for c in rows])
    with pytest.raises(UserError, match=rf"^{path}, line 4: its time is 1001, and training and validation end at 1048"):
        load_data(later)
    assert len(load_data(replace(later, split="user")).split.test) == 9


def test_strict_and_max_shortcut_refuse_on_loading(config, comparisons):
    path = config.data.with_name("years.jsonl")
    rows = comparisons(60, films=300)  # three of four labels are A: the newer film as A is the preferred one
    save(path, [
        replace(c, time=c.line, option_a=max(c.option_a, c.option_b, key=lambda m: m.year),
                option_b=min(c.option_a, c.option_b, key=lambda m: m.year), label="A") for c in rows
    ])  # fmt: skip
    brought = replace(config, data=path)
    assert load_data(brought).manifest["labels_a"] == 60
    for flags in ({"strict": True}, {"max_shortcut": 0.9}):
        with pytest.raises(UserError, match=rf"^{path}: release year alone is right in 100.0%, above the limit"):
            load_data(replace(brought, **flags))
    assert load_data(replace(brought, strict=True, max_shortcut=1.0)).split == load_data(brought).split
