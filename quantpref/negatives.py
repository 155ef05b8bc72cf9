"""The other film of a comparison, four ways, each from what others had rated before the comparison's time.

A sweep through time keeps the number of earlier ratings of every film. It is cut into blocks that run on all cores,
and what is drawn does not depend on the cuts: each comparison brings its own random number.
"""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from quantpref.timeline import LOW, Codes, Ints, Timeline, pack, unpack

Negatives = Literal["random", "popularity", "disliked", "hard"]
KINDS: tuple[Negatives, ...] = get_args(Negatives)

BLOCK = 2048  # comparisons; each block starts from its own copy of the counts
RATERS = 32  # of the preferred film, the latest, whose films are counted for `hard`
NONE = -1
_NO_GAP = np.int32(-(2**31))  # its own negative: neither above nor below

Counts = NDArray[np.int32]


@dataclass(frozen=True)
class Rows:
    """Comparisons without their other film: film and user numbers of a Timeline, (n,) and (n, 5)."""

    user: Ints
    film: Ints
    moment: Ints
    history: Ints
    luck: NDArray[np.float64]
    """In [0, 1): decides among equals."""

    def __len__(self) -> int:
        return len(self.user)

    def take(self, which: Ints | NDArray[np.bool_]) -> "Rows":
        return Rows(self.user[which], self.film[which], self.moment[which], self.history[which], self.luck[which])


@dataclass(frozen=True)
class Drawn:
    """(n,) each: the other film, NONE where there is none; others' ratings of both films before the comparison."""

    other: Ints
    past_preferred: Ints
    past_other: Ints

    def take(self, which: NDArray[np.bool_]) -> "Drawn":
        return Drawn(self.other[which], self.past_preferred[which], self.past_other[which])


def draw(timeline: Timeline, rows: Rows, kind: Negatives, rng: np.random.Generator) -> Drawn:
    """Draw the other film of every comparison among the films that somebody had rated by then.

    random: any that the user never rates. popularity: of those, the nearest in number of earlier ratings; the
    other is the better known film as often as it is the less known one. disliked: any that the same user rates low,
    before or after, outside of the history. hard: never rated by the user, and of all films the one whose audience
    overlaps most with the preferred film's (Jaccard, among ratings before the comparison; the preferred film's
    audience is represented by its RATERS latest raters).
    """
    if kind == "popularity":
        return _nearest(timeline, rows, rng)
    choose = {"random": _random, "disliked": _disliked, "hard": _hard}[kind](timeline, rows)
    other = np.full(len(rows), NONE)
    past = np.zeros((2, len(rows)), np.int64)

    def visit(i: int, counts: Counts) -> None:
        film = choose(i, counts)
        if film != NONE:
            other[i] = film
            past[:, i] = counts[rows.film[i]], counts[film]

    _sweep(timeline, rows, visit)
    if kind == "disliked":  # its user's own rating is no news about what others watch
        past[1] -= _rated_before(timeline, rows, other)
    return Drawn(other, *past)


def _sweep(timeline: Timeline, rows: Rows, visit: Callable[[int, Counts], None]) -> None:
    """Call visit(row, ratings of each film before the row's moment) for every row, in blocks on all cores."""
    order = np.argsort(rows.moment, kind="stable")
    counts, done = np.zeros(len(timeline.films), np.int32), 0

    def run(block: Ints, counts: Counts, done: int) -> None:
        for i in block.tolist():
            upto = timeline.before[rows.moment[i]]
            if upto > done:
                np.add.at(counts, timeline.chronicle[done:upto].astype(np.intp), np.int32(1))
                done = upto
            visit(i, counts)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = []
        for block in _blocks(order):
            upto = timeline.before[rows.moment[block[0]]]
            counts += np.bincount(timeline.chronicle[done:upto], minlength=len(counts)).astype(np.int32)
            done = upto
            jobs.append(pool.submit(run, block, counts.copy(), done))
        for job in jobs:
            job.result()


def _blocks(order: Ints) -> Iterator[Ints]:
    for start in range(0, len(order), BLOCK):
        yield order[start : start + BLOCK]


def _random(timeline: Timeline, rows: Rows) -> Callable[[int, Counts], int]:
    def choose(i: int, counts: Counts) -> int:
        known = timeline.known[rows.moment[i]]
        own = np.sort(timeline.film[timeline.of(rows.user[i])]).astype(np.int64)
        own = own[: np.searchsorted(own, known)]
        if len(own) == known:
            return NONE
        # The pick-th film that is not the user's own: step over each own film that stands before it.
        pick = int(rows.luck[i] * (known - len(own)))
        return pick + int(np.searchsorted(own - np.arange(len(own)), pick, side="right"))

    return choose


def _disliked(timeline: Timeline, rows: Rows) -> Callable[[int, Counts], int]:
    def choose(i: int, counts: Counts) -> int:
        mine = timeline.of(rows.user[i])
        film, earlier = timeline.film[mine], timeline.moment[mine] < rows.moment[i]
        by_others = counts[film] - earlier > 0
        fit = film[(timeline.grade[mine] == LOW) & by_others & ~np.isin(film, rows.history[i])]
        return int(np.sort(fit)[int(rows.luck[i] * len(fit))]) if len(fit) else NONE

    return choose


def _hard(timeline: Timeline, rows: Rows) -> Callable[[int, Counts], int]:
    raters_of, moments_of, first = _raters(timeline)

    def choose(i: int, counts: Counts) -> int:
        film, moment, known = rows.film[i], rows.moment[i], timeline.known[rows.moment[i]]
        audience = slice(first[film], first[film + 1])
        earlier = first[film] + np.searchsorted(moments_of[audience], moment)
        raters = raters_of[max(first[film], earlier - RATERS) : earlier]
        seen = [
            timeline.film[mine][: np.searchsorted(timeline.moment[mine], moment)] for mine in map(timeline.of, raters)
        ]
        if not seen:
            return NONE
        together = np.bincount(np.concatenate(seen), minlength=known)
        together[_own(timeline, rows.user[i], known)] = 0
        found = np.flatnonzero(together > 0)
        if not len(found):
            return NONE
        both = np.minimum(together[found] * (counts[film] / len(raters)), counts[found])
        overlap = both / (counts[film] + counts[found] - both)
        best = found[overlap == overlap.max()]
        return int(best[int(rows.luck[i] * len(best))])

    return choose


def _own(timeline: Timeline, user: int, known: int) -> Codes:
    """The films of a user, among those known."""
    film = timeline.film[timeline.of(user)]
    return film[film < known]


def _raters(timeline: Timeline) -> tuple[Codes, Codes, Ints]:
    """Who rated each film and when, by film, then moment; and where each film begins (films + 1,)."""
    sizes = (len(timeline.films), len(timeline.seconds), len(timeline.users))
    key = pack(*zip((timeline.film, timeline.moment, timeline.user), sizes, strict=True))
    key.sort()
    film, moment, user = unpack(key, *sizes)
    return user, moment, np.searchsorted(film, np.arange(sizes[0] + 1, dtype=np.uint32))


def _nearest(timeline: Timeline, rows: Rows, rng: np.random.Generator) -> Drawn:
    """The nearest film at or above the preferred one's popularity or at or below it, whichever keeps the balance."""
    level = np.zeros(len(rows), np.int64)
    film = np.full((2, len(rows)), NONE)  # above, below
    gap = np.zeros((2, len(rows)), np.int64)

    def visit(i: int, counts: Counts) -> None:
        known = timeline.known[rows.moment[i]]
        level[i] = counts[rows.film[i]]
        gaps = counts[:known] - counts[rows.film[i]]
        gaps[_own(timeline, rows.user[i], known)] = _NO_GAP
        for side, towards in enumerate((gaps, -gaps)):
            least = towards.view(np.uint32).min(initial=2**31)  # a gap to the wrong side is a large number here
            if least < 2**31:
                equal = np.flatnonzero(towards == least)
                film[side, i], gap[side, i] = equal[int(rows.luck[i] * len(equal))], least

    _sweep(timeline, rows, visit)
    side, row = balanced_sides(film != NONE, gap, rows.moment, rng), np.arange(len(rows))
    return Drawn(film[side, row], level, level + (1 - 2 * side) * gap[side, row])


def balanced_sides(there: NDArray[np.bool_], gap: Ints, moment: Ints, rng: np.random.Generator) -> Ints:
    """(n,) 0 for the film above, 1 for the one below, from (2, n) which of them exist and how far off they are.

    Nothing is above the most popular film and nothing below one that nobody had rated, and films lie closer together
    below than above: chance or nearness alone would give popularity away. So a tally of both signs is kept through
    time, so that a part cut out of it is balanced too: as long as it is even the nearer film is taken, otherwise the
    one that evens it. Equally popular films do not count.
    """
    side = np.where(there[0], 0, 1)
    counted, free = np.any(gap > 0, axis=0), np.all(there, axis=0)
    coin, tally = rng.random(len(side)) < 0.5, 0
    order = np.argsort(moment, kind="stable")
    for i in order[np.take(counted, order)].tolist():
        if free[i]:
            above, below = gap[:, i].tolist()
            nearer = int(coin[i]) if above == below else int(below < above)
            side[i] = int(tally > 0) if tally else nearer
        tally += 1 - 2 * int(side[i])
    return side


def _rated_before(timeline: Timeline, rows: Rows, films: Ints) -> NDArray[np.bool_]:
    """(n,) whether each row's user rated the film before the row's moment."""
    found = np.zeros(len(rows), np.bool_)
    for i, film in enumerate(films.tolist()):
        mine = timeline.of(rows.user[i])
        found[i] = bool(((timeline.film[mine] == film) & (timeline.moment[mine] < rows.moment[i])).any())
    return found
