"""Control sets: whose history is swapped, which file belongs to the data, and what is left out."""

import random
from collections import Counter
from dataclasses import replace

import pytest

from quantpref.comparisons import Movie, save
from quantpref.controls import MATCHED, SWAPPED, control_file, control_sets, matched, swap_histories
from quantpref.runs import UserError


def test_swapped_histories_are_another_users_and_give_nothing_away(comparisons):
    test = comparisons(120, rows_per_user=2, films=200)
    swapped = swap_histories(test, 1)
    of = {c.history: c.user for c in test}
    assert [c.line for c in swapped] == [c.line for c in test]
    for before, after in zip(test, swapped, strict=True):
        assert replace(after, history=before.history) == before
        assert of[after.history] != before.user
        assert not {str(before.option_a), str(before.option_b)} & set(map(str, after.history))


def test_a_swap_depends_on_content_and_seed_alone(comparisons):
    test = comparisons(60, films=200)
    shuffled = random.Random(2).sample(test, len(test))
    assert swap_histories(shuffled, 1) == swap_histories(test, 1) != swap_histories(test, 2)


def test_histories_come_from_users_of_about_the_same_time_and_of_the_same_length(comparisons):
    rows = comparisons(80, films=200)
    test = [replace(c, time=1000 * c.line, history=c.history[: 4 + c.line % 2]) for c in rows]
    donor = {c.history: c for c in test}
    gaps = [abs(donor[c.history].line - c.line) for c in swap_histories(test, 1)]
    assert len(gaps) == 80 and all(len(c.history) == 4 + c.line % 2 for c in swap_histories(test, 1))
    assert Counter(gaps).most_common(1)[0] == (2, 76) or sum(gap <= 6 for gap in gaps) > 70


def test_a_history_that_holds_an_option_is_passed_over(comparisons):
    one, two, three = (replace(c, time=c.line) for c in comparisons(3, films=200))
    two = replace(two, history=(*two.history[:4], Movie(one.option_b.title.upper(), one.option_b.year)))
    swapped = swap_histories([one, two, three], 1)
    assert swapped[0].history == three.history  # the next in line would have been two


def test_who_finds_no_other_history_is_left_out(comparisons):
    rows = comparisons(4, rows_per_user=2, films=200)
    assert swap_histories(rows[:2], 1) == []
    lonely = replace(rows[0], history=rows[0].history[:3])
    assert [c.line for c in swap_histories([lonely, *rows[1:]], 1)] == [2, 3, 4]


@pytest.fixture
def files(tmp_path, comparisons):
    """A data file and its popularity-matched set: the same lines, another other film."""
    data = tmp_path / "mine.jsonl"
    rows = comparisons(20, films=200)
    fresh = Movie("Brand new", 1999, ("Drama",))
    others = [replace(c, **{"option_b" if c.label == "A" else "option_a": fresh}) for c in rows]
    save(data, rows)
    save(control_file(data, MATCHED), others)
    return data, rows, others


def test_the_matched_lines_of_the_test_are_taken(files):
    data, rows, others = files
    assert control_file(data, MATCHED).name == "mine.popularity-matched.jsonl"
    sets = control_sets(data, rows[5:9], 1)
    assert list(sets) == [MATCHED, SWAPPED]
    assert sets[MATCHED] == others[5:9]
    control_file(data, MATCHED).unlink()
    assert list(control_sets(data, rows[5:9], 1)) == [SWAPPED]


@pytest.mark.parametrize("damage", ["label", "history", "user", "missing"])
def test_a_matched_file_of_other_data_is_refused(files, damage):
    data, rows, others = files
    path = control_file(data, MATCHED)
    path.unlink()
    changed = {
        "label": replace(others[7], label="B" if others[7].label == "A" else "A"),
        "history": replace(others[7], history=others[7].history[:4]),
        "user": replace(others[7], user="somebody"),
    }
    save(path, others[:7] if damage == "missing" else [*others[:7], changed[damage], *others[8:]])
    assert matched(path, rows[:7]) == others[:7]
    with pytest.raises(UserError, match=rf"^{path}, line 8: is not that line of the data with another other film"):
        matched(path, rows)
