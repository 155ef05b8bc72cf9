"""The packed layout: literal columns, and random trees against brute force over prefixes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantpref.prefix_tree import PrefixTree, common_prefix_length, pack

# Few different tokens, so that rows share prefixes, repeat each other and begin with whole other rows.
ROWS = st.lists(st.lists(st.integers(1, 3), min_size=1, max_size=6), max_size=8)


def prefixes(rows):
    return {tuple(row[: i + 1]) for row in rows for i in range(len(row))}


def columns_seen(tree, q):
    return {k for k in range(len(tree.ids)) if k <= q < tree.end[k]}


def test_a_small_tree_is_laid_out_like_this():
    tree = pack([[1, 2, 5, 6], [1, 2, 5, 7, 8], [1, 3]], multiple=5, padding_id=9)
    assert tree == PrefixTree(
        ids=[1, 2, 5, 6, 7, 8, 3, 9, 9, 9],
        positions=[0, 1, 2, 3, 3, 4, 1, 0, 0, 0],
        end=[7, 6, 6, 4, 6, 6, 7, 8, 9, 10],
        paths=[[0, 1, 2, 3], [0, 1, 2, 4, 5], [0, 6]],
    )


def test_rows_that_repeat_or_begin_another_add_no_columns():
    tree = pack([[4, 5, 6], [4, 5], [4, 5, 6], [4]])
    assert tree == PrefixTree(
        ids=[4, 5, 6], positions=[0, 1, 2], end=[3, 3, 3], paths=[[0, 1, 2], [0, 1], [0, 1, 2], [0]]
    )


def test_rows_that_share_nothing_do_not_see_each_other():
    tree = pack([[7, 8], [3, 4]])
    assert tree == PrefixTree(ids=[3, 4, 7, 8], positions=[0, 1, 0, 1], end=[2, 2, 4, 4], paths=[[2, 3], [0, 1]])


def test_no_rows_are_no_columns():
    assert pack([], multiple=8) == PrefixTree([], [], [], [])


@pytest.mark.parametrize(
    ("a", "b", "length"), [([1, 2, 3], [1, 2, 4], 2), ([1], [2], 0), ([1, 2], [1, 2, 3], 2), ([], [1], 0)]
)
def test_common_prefix_length(a, b, length):
    assert common_prefix_length(a, b) == common_prefix_length(b, a) == length


@given(ROWS, st.integers(1, 9))
def test_walking_a_path_gives_back_the_row(rows, multiple):
    tree = pack(rows, multiple)
    assert len(tree.paths) == len(rows)
    for row, path in zip(rows, tree.paths, strict=True):
        assert [tree.ids[c] for c in path] == row
        assert [tree.positions[c] for c in path] == list(range(len(row)))


@given(ROWS)
def test_each_column_sees_its_path_from_the_root_and_nothing_else(rows):
    tree = pack(rows)
    ancestors = {path[i]: set(path[: i + 1]) for path in tree.paths for i in range(len(path))}
    assert ancestors == {q: columns_seen(tree, q) for q in range(len(tree.ids))}


@given(ROWS)
def test_each_distinct_prefix_is_one_column(rows):
    tree = pack(rows)
    assert len(tree.ids) == len(tree.positions) == len(tree.end) == len(prefixes(rows))


@given(ROWS, st.integers(1, 9))
def test_padding_changes_nothing_before_it_and_sees_itself_alone(rows, multiple):
    bare, padded = pack(rows), pack(rows, multiple, padding_id=99)
    n, total = len(bare.ids), len(padded.ids)
    assert total % multiple == 0 and 0 <= total - n < multiple
    assert padded.paths == bare.paths
    assert (padded.ids[:n], padded.positions[:n], padded.end[:n]) == (bare.ids, bare.positions, bare.end)
    assert padded.ids[n:] == [99] * (total - n)
    assert padded.positions[n:] == [0] * (total - n)
    assert all(columns_seen(padded, q) == {q} for q in range(n, total))
    assert all(max(columns_seen(padded, q)) < n for q in range(n))


@given(st.data(), ROWS)
def test_the_order_of_rows_only_orders_the_paths(data, rows):
    order = data.draw(st.permutations(range(len(rows))))
    tree, turned = pack(rows), pack([rows[i] for i in order])
    assert (turned.ids, turned.positions, turned.end) == (tree.ids, tree.positions, tree.end)
    assert turned.paths == [tree.paths[i] for i in order]
