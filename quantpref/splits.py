"""Which comparisons are for training, validation and test: users apart, and by flag the times too."""

from collections.abc import Sequence
from typing import Literal

from quantpref.comparisons import Comparison, Split, split_by_user
from quantpref.runs import UserError

SplitBy = Literal["user", "time"]


def split_comparisons(
    comparisons: Sequence[Comparison], by: SplitBy, train: float, validation: float, seed: int
) -> Split:
    """Shares `train` and `validation`, the rest for the test; users are never in two parts."""
    if by == "user":
        return split_by_user(comparisons, train, validation, seed)
    return split_by_time(comparisons, train, validation)


def split_by_time(comparisons: Sequence[Comparison], train: float, validation: float) -> Split:
    """Cut at two moments, so that training ends before validation begins, and that before the test.

    A user stands where their last comparison does; earlier ones that fall before the cut are left out, since nobody
    may be trained on and tested.

    Raises:
        UserError: a comparison without a time, or too few moments to cut at.
    """
    for c in comparisons:
        if c.time is None:
            raise UserError(f"line {c.line} has no time, so --split time has nothing to go by; use --split user")
    times = sorted(c.time or 0 for c in comparisons)
    cuts = [times[min(len(times) - 1, round(len(times) * share))] for share in (train, train + validation)]
    part_of = {id(c): sum((c.time or 0) >= cut for cut in cuts) for c in comparisons}
    last: dict[str, int] = {}
    for c in comparisons:
        last[c.cluster] = max(last.get(c.cluster, 0), part_of[id(c)])
    parts: tuple[list[Comparison], list[Comparison], list[Comparison]] = ([], [], [])
    for c in comparisons:
        if part_of[id(c)] == last[c.cluster]:
            parts[part_of[id(c)]].append(c)
    if not all(parts):
        raise UserError(
            f"{len(set(times))} moment(s) of {len(last)} user(s) cannot be cut into train, validation and test; bring"
            " more, or change --train-fraction and --validation-fraction, or use --split user"
        )
    return Split(*parts)
