"""Control test sets: the same test comparisons with the history's part, or popularity's, taken out.

popularity-matched   the other film is one of like popularity; a file beside the data, made by the builder, which has
                     the ratings; its line i is line i of the data with another other film
swapped-user         the history is another test user's; made here, of any file. Not the builder: a training user's
                     history was trained on together with its answer, and only the split knows who is in the test
"""

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from quantpref.comparisons import Comparison, load
from quantpref.leakage import same_film
from quantpref.runs import UserError

MATCHED, SWAPPED = "popularity-matched", "swapped-user"


def control_file(data: Path, name: str) -> Path:
    """`mine.jsonl` -> `mine.popularity-matched.jsonl`."""
    return data.with_name(f"{data.stem}.{name}{data.suffix}")


def control_sets(data: Path, test: Sequence[Comparison], seed: int) -> dict[str, list[Comparison]]:
    """The control sets of the test comparisons of a file; one that cannot be made is left out.

    Raises:
        UserError: a popularity-matched file that does not belong to the data.
    """
    path = control_file(data, MATCHED)
    sets = {MATCHED: matched(path, test) if path.is_file() else [], SWAPPED: swap_histories(test, seed)}
    return {name: rows for name, rows in sets.items() if rows}


def matched(path: Path, test: Sequence[Comparison]) -> list[Comparison]:
    """The lines of the popularity-matched file that stand for test comparisons."""
    by_line = {c.line: c for c in load(path)}
    rows = []
    for c in test:
        found = by_line.get(c.line)
        if found is None or (found.user, found.history, found.preferred) != (c.user, c.history, c.preferred):
            raise UserError(
                f"{path}, line {c.line}: is not that line of the data with another other film; build both files"
                " again, or remove this one"
            )
        rows.append(found)
    return rows


def swap_histories(test: Sequence[Comparison], seed: int) -> list[Comparison]:
    """Each history replaced by that of another user, equally long and from about the same time; options are kept.

    Users are lined up by the time of their comparison, at random where there is none, and each takes the history of
    the next in line. From about the same time, since the films of a time tell an era, which is nobody's taste. A
    history that holds one of the options is passed over; a comparison that finds none is left out. Depends on the
    comparisons and the seed, not on their order.
    """
    line = sorted(test, key=lambda c: (c.cluster, c.key))
    random.Random(f"swap {seed}").shuffle(line)  # noqa: S311 - an experiment's seed, not a secret
    lengths: defaultdict[int, list[Comparison]] = defaultdict(list)
    for c in sorted(line, key=lambda c: c.time or 0):
        lengths[len(c.history)].append(c)
    swapped = []
    for queue in lengths.values():
        for i, c in enumerate(queue):
            following = (queue[(i + k) % len(queue)] for k in range(1, len(queue)))
            donor = next((d for d in following if _can_take(c, d)), None)
            if donor is not None:
                swapped.append(replace(c, history=donor.history))
    return sorted(swapped, key=lambda c: c.line)


def _can_take(c: Comparison, donor: Comparison) -> bool:
    options = {same_film(movie.title, movie.year) for movie in (c.option_a, c.option_b)}
    return donor.cluster != c.cluster and options.isdisjoint(same_film(m.title, m.year) for m in donor.history)
