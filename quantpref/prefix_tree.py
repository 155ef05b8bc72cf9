"""Many token rows as one: every prefix that several rows share stands, and is computed, once.

    rows        prompt 1 + chosen, prompt 1 + rejected, prompt 2 + chosen, ...
    columns     [ instruction | prompt 1 | chosen | rejected | prompt 2 | chosen | rejected | ... | padding ]
    end         the column after the last one that goes on from this one

The rows form a tree, laid out depth first. A token attends to its own path from the root: column k is on the path of
column q exactly where k <= q < end[k]. One integer a column is the whole attention mask, and each row sees exactly
what it would see alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class PrefixTree:
    """T columns. `ids`, `positions` (in its row) and `end` of each; `paths`: for each row the columns of its tokens."""

    ids: list[int]
    positions: list[int]
    end: list[int]
    paths: list[list[int]]


def common_prefix_length(a: Sequence[int], b: Sequence[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def pack(rows: Sequence[list[int]], multiple: int = 1, padding_id: int = 0) -> PrefixTree:
    """Lay out token rows as a prefix tree, padded to a multiple of columns; padding attends to itself alone.

    In sorted order each row shares with the tree exactly what it shares with the row before.
    """
    ids: list[int] = []
    positions: list[int] = []
    end: list[int] = []
    paths: list[list[int]] = [[] for _ in rows]
    path: list[int] = []
    before: list[int] = []
    for i in sorted(range(len(rows)), key=lambda i: rows[i]):
        shared = common_prefix_length(before, rows[i])
        for column in path[shared:]:
            end[column] = len(ids)
        path = path[:shared] + list(range(len(ids), len(ids) + len(rows[i]) - shared))
        ids += rows[i][shared:]
        positions += range(shared, len(rows[i]))
        end += [0] * (len(ids) - len(end))
        paths[i], before = path, rows[i]
    for column in path:
        end[column] = len(ids)
    padding = -len(ids) % multiple
    end += range(len(ids) + 1, len(ids) + padding + 1)
    return PrefixTree(ids + [padding_id] * padding, positions + [0] * padding, end, paths)
