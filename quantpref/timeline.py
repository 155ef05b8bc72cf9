"""Ratings as sorted arrays of small numbers: who watched what when, and what was known by then.

A rating becomes one 64-bit number with the most significant part in front, so that a plain sort of integers (no index,
no copy of a table) puts 32 million ratings in order. The arrays below hold 13 bytes a rating and 24 a moment.
"""

from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import NDArray

from quantpref.runs import UserError

Ints = NDArray[np.int64]
Codes = NDArray[np.uint32]

LOW, BETWEEN, LIKED = range(3)  # grades of a rating
GRADES = 3


@dataclass(frozen=True)
class Timeline:
    """n ratings, of each user and film the first alone, by user, then moment, then film id.

    Users, films and moments are numbered from 0. Films are numbered by their first rating, so that those known
    before moment m are exactly the films 0 to known[m] - 1.
    """

    users: Ints
    """Their ids, ascending."""
    films: Ints
    """Their ids."""
    seconds: Ints
    """The moments in Unix seconds, ascending and distinct."""
    start: Ints
    """(users + 1,) where the ratings of each user begin."""
    film: Codes
    moment: Codes
    grade: NDArray[np.uint8]
    chronicle: Codes
    """(n,) the film of every rating, by moment."""
    before: Ints
    """(moments,) how many ratings are older than each moment."""
    known: Ints
    """(moments,) how many films had been rated before each moment."""

    @property
    def user(self) -> Codes:
        """(n,) the user of each rating."""
        return np.repeat(np.arange(len(self.users), dtype=np.uint32), np.diff(self.start))

    def of(self, user: int) -> slice:
        """Where the ratings of one user stand."""
        return slice(self.start[user], self.start[user + 1])


def pack(*parts: tuple[NDArray, int]) -> NDArray[np.uint64]:
    """One number for each row of (codes, how many codes there are), the first part the most significant.

    Raises:
        UserError: more than 64 bits.
    """
    widths = [_bits(size) for _, size in parts]
    if sum(widths) > 64:
        raise UserError(
            f"the ratings need {sum(widths)} bits each, more than 64: this is a job for several machines"
            " (docs/SCALING.md); take a part of the users"
        )
    key = np.zeros(len(parts[0][0]), np.uint64)
    for (codes, _), width in zip(parts, widths, strict=True):
        key <<= np.uint64(width)
        key |= codes.astype(np.uint64)
    return key


def unpack(key: NDArray[np.uint64], *sizes: int) -> list[Codes]:
    """The parts again, in the order in which they were packed."""
    parts, shift = [], 0
    for size in reversed(sizes):
        width = _bits(size)
        parts.append(((key >> np.uint64(shift)) & np.uint64(2**width - 1)).astype(np.uint32))
        shift += width
    return parts[::-1]


def _bits(size: int) -> int:
    return max(1, int(size - 1).bit_length())


def build_timeline(rated: pl.DataFrame, liked_from: float, disliked_to: float) -> Timeline:
    """Number, sort and thin out the ratings (columns user, film, rating, time in Unix seconds).

    Of a film's ratings by one user the first counts; of one second, the lowest.
    """
    users, films, seconds = (rated[name].unique().sort().to_numpy() for name in ("user", "film", "time"))
    rating = rated["rating"]
    grade = (1 + (rating >= liked_from).cast(pl.Int8) - (rating <= disliked_to).cast(pl.Int8)).to_numpy()
    user, moment, film, grade = _in_order(rated, users, films, seconds, grade)
    key = pack((moment, len(seconds)), (film, len(films)))
    key.sort()
    when, chronicle = unpack(key, len(seconds), len(films))
    del key
    first = np.full(len(films), len(film))
    first[chronicle[::-1]] = np.arange(len(film) - 1, -1, -1)  # of several values the last one stays: the earliest
    by_first = np.argsort(first)
    number = np.empty(len(films), np.uint32)
    number[by_first] = np.arange(len(films), dtype=np.uint32)
    before = np.searchsorted(when, np.arange(len(seconds), dtype=np.uint32))
    return Timeline(
        users=users,
        films=films[by_first],
        seconds=seconds,
        start=np.searchsorted(user, np.arange(len(users) + 1, dtype=np.uint32)),
        film=number[film],
        moment=moment,
        grade=grade.astype(np.uint8),
        chronicle=number[chronicle],
        before=before,
        known=np.searchsorted(first[by_first], before),
    )


def _in_order(
    rated: pl.DataFrame, users: Ints, films: Ints, seconds: Ints, graded: NDArray[np.int8]
) -> tuple[Codes, Codes, Codes, Codes]:
    """User, moment, film and grade of the ratings that count, sorted by these."""
    codes: tuple[NDArray, ...] = (
        np.searchsorted(users, rated["user"].to_numpy()).astype(np.uint32),
        np.searchsorted(films, rated["film"].to_numpy()).astype(np.uint32),
        # Nearly every rating has a moment of its own: sorting them is five times faster than looking each up.
        rated["time"].rank("dense").cast(pl.UInt32).to_numpy() - np.uint32(1),
        graded,
    )
    sizes = (len(users), len(films), len(seconds), GRADES)
    key = pack(*zip(codes, sizes, strict=True))
    del codes
    key.sort()
    pair = key >> np.uint64(_bits(len(seconds)) + _bits(GRADES))
    user, film, moment, grade = unpack(key[_first_of_run(pair)], *sizes)
    del pair
    sizes = (len(users), len(seconds), len(films), GRADES)
    key = pack(*zip((user, moment, film, grade), sizes, strict=True))
    key.sort()
    user, moment, film, grade = unpack(key, *sizes)
    return user, moment, film, grade


def _first_of_run(values: NDArray[np.uint64]) -> NDArray[np.bool_]:
    first = np.ones(len(values), np.bool_)
    np.not_equal(values[1:], values[:-1], out=first[1:])
    return first
