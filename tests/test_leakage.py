"""Planted leaks are found and named; shortcuts are counted, judged and refused."""

from dataclasses import replace

import pytest

from quantpref.comparisons import Comparison, Movie, Split, flip, split_by_user
from quantpref.leakage import leakage_report, refuse, same_film, shortcuts_above
from quantpref.runs import UserError


@pytest.fixture
def split(comparisons) -> Split:
    rows = [replace(c, time=1_600_000_000 + c.line) for c in comparisons(60)]
    return split_by_user(rows, 0.7, 0.1, 1)


def planted(split: Split, **parts: list[Comparison]) -> dict[str, dict]:
    """The leaks of a split with more rows in some parts, by name."""
    changed = Split(**{p: [*getattr(split, p), *parts.get(p, [])] for p in ("train", "validation", "test")})
    return {leak["leak"]: leak for leak in leakage_report(changed, 1)["leaks"]}


def test_a_sound_split_has_no_leaks(split):
    assert planted(split) == {}


@pytest.mark.parametrize("part", ["train", "validation"])
def test_a_test_pair_in_training_is_found(split, part):
    copy = replace(split.test[0], user="somebody", line=61)
    leaks = planted(split, **{part: [copy]})
    assert set(leaks) == {"same comparison in two parts"}
    found = leaks["same comparison in two parts"]
    assert found["count"] == 1 and found["example"] == f"line 61 ({part}) and line {split.test[0].line} (test)"


def test_a_flipped_copy_is_found(split):
    leaks = planted(split, train=[replace(flip(split.test[0]), user="somebody", line=61)])
    assert set(leaks) == {"flipped copy in two parts"}
    assert leaks["flipped copy in two parts"]["example"] == f"line 61 (train) and line {split.test[0].line} (test)"


def test_a_user_in_two_parts_is_found(split, comparisons):
    stranger = replace(comparisons(3, seed=5)[2], user=split.train[0].user, line=61)
    leaks = planted(split, test=[stranger])
    assert set(leaks) == {"user in two parts"}
    assert leaks["user in two parts"]["example"].startswith(f"user {stranger.user}, line {split.train[0].line} (train)")


def test_a_future_rating_is_found(split, comparisons):
    """The user's later comparison prefers a film that stands in the history of the earlier one."""
    one, other = comparisons(2, seed=5)
    early = replace(one, user="new", time=1_600_000_000, line=61)
    seen = early.history[3]
    late = replace(other, user="new", time=1_600_000_001, line=62, option_a=replace(seen, genres=("Drama",)), label="A")
    leaks = planted(split, train=[early, late])
    assert set(leaks) == {"rating from after the comparison"}
    assert leaks["rating from after the comparison"]["example"] == f"line 61, whose user rated {seen} later (line 62)"
    # The other way round it is how histories grow.
    assert planted(split, train=[replace(early, time=late.time), replace(late, time=early.time)]) == {}


def test_the_preferred_film_in_its_history_under_another_spelling_is_found(split, comparisons):
    row = comparisons(1, seed=5)[0]
    history = (*row.history[:4], Movie("Matrix, The", 1999))
    row = replace(row, history=history, option_a=Movie("The MATRIX", 1999, ("Action",)), label="A", user="x", line=61)
    leaks = planted(split, test=[row])
    assert set(leaks) == {"option in its own history, spelled otherwise"}
    example = leaks["option in its own history, spelled otherwise"]["example"]
    assert example == "line 61, The MATRIX (1999) and Matrix, The (1999)"


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("Matrix, The", "The matrix", True),
        ("Amélie", "Amelie", True),
        ("Spider-Man 2", "Spider Man 2", True),
        ("WALL·E", "Wall E", True),
        ("+1", "1", False),
        ("Alien", "Aliens", False),
        ("!", "?", False),
    ],
)
def test_spellings_of_one_film(one, other, same):
    assert (same_film(one, 2000) == same_film(other, 2000)) == same
    assert same_film(one, 2000) != same_film(one, 2001)


def test_facts_are_counted(split, comparisons):
    row = replace(comparisons(1, seed=5)[0], user="x", line=61, time=0)  # 1970, with films from 1950 to 2009
    twin = replace(row, line=62, user="y", option_a=Movie("FILM 1!", 1951, ("Drama",)))
    before = leakage_report(split, 1)
    report = leakage_report(replace(split, test=[*split.test, row, twin]), 1)
    assert before["comparisons_with_a_film_of_a_later_year"] == 0
    assert report["comparisons_with_a_film_of_a_later_year"] == 2
    assert before["duplicate_titles"] == {"films": 0, "examples": []}
    assert report["duplicate_titles"] == {"films": 1, "examples": ["FILM 1! (1951) = Film 1 (1951)"]}
    cold = "test_comparisons_{}_film_cold"
    side = "preferred" if twin.label == "A" else "other"
    assert report[cold.format(side)] == before[cold.format(side)] + 1
    labels = [c.label for part in (split.train, split.validation, split.test) for c in part]
    assert before["labels_a"] == labels.count("A") / 60


def by_year(n: int) -> list[Comparison]:
    """The newer film is preferred in three of four rows."""
    old, new = Movie("Old", 1950, ("Drama",)), Movie("New", 2000, ("Drama",))
    history = [Movie(f"Seen {i}", 1960) for i in range(n)]
    return [Comparison((history[i],), new, old, "A" if i % 4 else "B", user=str(i), line=i + 1) for i in range(n)]


def test_a_shortcut_above_the_limit_is_refused(tmp_path):
    rows = by_year(80)
    report = leakage_report(Split(rows[:40], rows[40:60], rows[60:]), 1)
    assert report["baselines"]["release_year"]["accuracy"] == 0.75
    low, high = report["baselines"]["release_year"]["accuracy_ci95"]
    assert low < 0.75 < high
    path = tmp_path / "rows.jsonl"
    for limit, strict in ((None, False), (0.75, False), (0.8, True)):
        refuse(report, path, limit, strict)
    for limit, strict, said in ((0.7, False, "70.0%"), (None, True, "65.0%"), (0.7, True, "70.0%")):
        with pytest.raises(UserError, match=rf"rows.jsonl: .* alone is right in 75.0%, above the limit of {said}"):
            refuse(report, path, limit, strict)


def test_rules_that_read_the_history_are_no_shortcuts():
    baselines = {n: {"accuracy": 0.9} for n in ("genre_overlap", "co_occurrence", "logistic_regression")}
    counted = {"popularity": {"accuracy": 0.7}, "past_popularity": {"accuracy": 0.8}, "always_a": {"accuracy": 0.5}}
    report = {"baselines": baselines | counted}
    assert shortcuts_above(report, 0.6) == [("past_popularity", 0.8), ("popularity", 0.7)]
    assert shortcuts_above(report, None) == []


def test_strict_refuses_leaks_by_name(split, tmp_path):
    rows = replace(split, train=[*split.train, replace(flip(split.test[0]), user="somebody", line=61)])
    report = leakage_report(rows, 1)
    refuse(report, tmp_path, 1.0, strict=False)
    with pytest.raises(UserError, match=r"flipped copy in two parts \(1, such as line 61 \(train\)"):
        refuse(report, tmp_path, 1.0, strict=True)


def test_large_data_is_sampled(split, monkeypatch):
    monkeypatch.setattr("quantpref.leakage.MOST_COUNTED", 10)
    report = leakage_report(split, 1)
    assert report["baselines_counted_on"] == {"train": 10, "test": 10}
    assert report == leakage_report(split, 1)
