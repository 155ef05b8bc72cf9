"""Rating dumps -> comparisons: five films of a user, a later one that they liked, and another film.

Whole columns at a time; only the last step makes objects. Everything is sorted by its own content before anything is
drawn, so that the order of the input's lines never matters.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray

from quantpref.comparisons import Comparison, Movie
from quantpref.dumps import read_ratings
from quantpref.negatives import NONE, Drawn, Negatives, Rows, draw
from quantpref.runs import UserError
from quantpref.timeline import LIKED, Ints, Timeline, build_timeline
from quantpref.titles import Catalogue, read_movies

HISTORY_FILMS = 5
LIKED_SHARE = 0.8  # of the scale's maximum: 4 of 5, 8 of 10
LOW_SHARE = 0.5  # 2.5 of 5, 5 of 10

Counts = dict[str, int | float]  # in the order in which they arise
Margins = dict[str, NDArray[np.float64]]


@dataclass(frozen=True)
class Options:
    """How comparisons are made of ratings; see data/build_contrastive.py for the flags of these names."""

    seed: int
    negatives: Negatives = "random"
    comparisons_per_user: int = 1
    like_threshold: float | None = None
    dislike_threshold: float | None = None
    limit: int | None = None

    def check(self) -> None:
        for name, least in (
            ("seed", 0), ("comparisons_per_user", 1), ("limit", 1), ("like_threshold", 0), ("dislike_threshold", 0),
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and not least <= value < float("inf"):
                raise UserError(f"--{name.replace('_', '-')} {value}: must be {least} or more")


@dataclass(frozen=True)
class Built:
    """The comparisons, by user id, then time; what was read, kept, and dropped and why; what shortcuts see.

    matched: the same comparisons with another film of like popularity, in the same order; None where the other film
        was chosen by popularity anyway.
    shortcuts: by name the margins (n,) of rules that count all ratings and not the training rows alone.
    """

    comparisons: list[Comparison]
    shortcuts: Margins
    matched: list[Comparison] | None
    matched_shortcuts: Margins | None
    counts: Counts


def build(ratings: Path, movies: Path, options: Options) -> Built:
    """Make comparisons from a MovieLens or MovieTweetings dump; the content tells the format.

    Args:
        ratings: `ratings.dat` or `ratings.csv`.
        movies: `movies.dat` or `movies.csv`.

    Raises:
        UserError: file, line, what was found and what to do; or that no comparison can be made.
    """
    options.check()
    luck_rng, limit_rng, label_rng, matched_rng, other_rng = (
        np.random.default_rng([options.seed, part]) for part in range(5)
    )
    catalogue = read_movies(movies)
    timeline, counts = _read(ratings, catalogue, options)
    rows = preferred_films(timeline, options.comparisons_per_user, counts, luck_rng)
    kept = _sample(len(rows), options.limit, limit_rng)
    counts["comparisons_dropped_over_limit"] = len(rows) - len(kept)
    rows, drawn = _with_other_film(timeline, rows.take(kept), options.negatives, counts, other_rng)
    matched = None
    if options.negatives != "popularity":
        # Drawn for the rows that stay, or the sides of its gaps would be balanced for others.
        matched = draw(timeline, rows, "popularity", matched_rng)
        there = matched.other != NONE
        rows, drawn, matched = rows.take(there), drawn.take(there), matched.take(there)
        counts["comparisons_dropped_no_other_film"] += int((~there).sum())
    if not len(rows):
        raise UserError(
            f"{ratings}: no comparison can be made: of {counts['users_read']} users, none liked a film"
            f" ({counts['liked_from_rating']:g} or more) after {HISTORY_FILMS} others while there was a film left to"
            f" offer (--negatives {options.negatives}); bring more ratings or lower --like-threshold"
        )
    counts["comparisons_kept"] = len(rows)
    counts["users_kept"] = len(np.unique(rows.user))
    counts["comparisons_kept_preferred_film_cold"] = int((drawn.past_preferred == 0).sum())
    finish = _Finish(timeline, catalogue, rows, _preferred_first(len(rows), label_rng))
    return Built(
        comparisons=finish.comparisons(drawn.other),
        shortcuts=finish.shortcuts(drawn, own=options.negatives == "disliked"),
        matched=None if matched is None else finish.comparisons(matched.other),
        matched_shortcuts=None if matched is None else finish.shortcuts(matched, own=False),
        counts=counts,
    )


def _with_other_film(
    timeline: Timeline, rows: Rows, kind: Negatives, counts: Counts, rng: np.random.Generator
) -> tuple[Rows, Drawn]:
    """The rows for which there is another film, each history and options once."""
    drawn = draw(timeline, rows, kind, rng)
    there = drawn.other != NONE
    counts["comparisons_dropped_no_other_film"] = int((~there).sum())
    rows, drawn = rows.take(there), drawn.take(there)
    single = _first_of_its_kind(rows, drawn)
    counts["comparisons_dropped_same_as_another_users"] = int((~single).sum())
    return rows.take(single), drawn.take(single)


def _read(ratings: Path, catalogue: Catalogue, options: Options) -> tuple[Timeline, Counts]:
    """The ratings of films that can be shown, ids of one title being one film by now."""
    rated = read_ratings(ratings, catalogue.stands_for, any_scale=options.like_threshold is not None)
    liked_from = LIKED_SHARE * rated.scale if options.like_threshold is None else options.like_threshold
    disliked_to = LOW_SHARE * rated.scale if options.dislike_threshold is None else options.dislike_threshold
    if disliked_to >= liked_from:
        raise UserError(
            f"a film would be both liked ({liked_from:g} or more) and disliked ({disliked_to:g} or less); lower"
            " --dislike-threshold or raise --like-threshold"
        )
    table, scale, layout = rated.table, rated.scale, rated.layout
    del rated  # two gigabytes at 32 million ratings
    read, users_read = len(table), table["user"].n_unique()
    shown = _shown(table["film"], catalogue)
    table = table.with_columns(film=shown).drop_nulls("film") if shown.null_count() else table.with_columns(film=shown)
    known = len(table)
    timeline = build_timeline(table, liked_from, disliked_to)
    return timeline, {
        "files_in_csv": catalogue.layout.header_lines + layout.header_lines,
        "files_in_latin_1": int(catalogue.encoding == "latin-1"),
        **catalogue.counts,
        "rating_scale_maximum": scale,
        "liked_from_rating": liked_from,
        "disliked_to_rating": disliked_to,
        "users_read": users_read,
        "ratings_read": read,
        "ratings_dropped_film_cannot_be_shown": read - known,
        "ratings_dropped_same_user_and_film": known - len(timeline.film),
        "ratings_kept": len(timeline.film),
    }


def _shown(films: pl.Series, catalogue: Catalogue) -> pl.Series:
    """Each rating's film as it is shown; null where it cannot be."""
    ids = np.array(sorted(catalogue.stands_for), np.int64)
    stands_for = pl.Series([catalogue.stands_for[film] for film in ids.tolist()], dtype=pl.Int64)
    return stands_for.gather(np.searchsorted(ids, films.to_numpy()))


def preferred_films(timeline: Timeline, per_user: int, counts: Counts, rng: np.random.Generator) -> Rows:
    """The first `per_user` films of each user that they liked after five others, with those five.

    "After" by the clock: films rated in the second of the preferred one are neither before nor after it.
    """
    user, n = timeline.user, len(timeline.film)
    new = np.ones(n, np.bool_)
    new[1:] = (user[1:] != user[:-1]) | (timeline.moment[1:] != timeline.moment[:-1])
    same_second = np.maximum.accumulate(np.where(new, np.arange(n, dtype=np.uint32), np.uint32(0)))
    enough = same_second - timeline.start[:-1].astype(np.uint32)[user] >= HISTORY_FILMS
    liked = np.flatnonzero(enough & (timeline.grade == LIKED))
    of = user[liked]
    nth = np.arange(len(liked)) - np.searchsorted(of, of)
    users_enough, users_liked = len(np.unique(user[enough])), len(np.unique(of))
    counts["users_dropped_too_few_films"] = int(counts["users_read"]) - users_enough
    counts["users_dropped_liked_none_later"] = users_enough - users_liked
    chosen = liked[nth < per_user]
    history = same_second[chosen][:, None].astype(np.int64) + np.arange(-HISTORY_FILMS, 0)
    return Rows(
        user=user[chosen].astype(np.int64),
        film=timeline.film[chosen].astype(np.int64),
        moment=timeline.moment[chosen].astype(np.int64),
        history=timeline.film[history].astype(np.int64),
        luck=rng.random(len(chosen)),
    )


def _sample(n: int, limit: int | None, rng: np.random.Generator) -> Ints:
    return np.arange(n) if limit is None or limit >= n else np.sort(rng.permutation(n)[:limit])


def _first_of_its_kind(rows: Rows, drawn: Drawn) -> NDArray[np.bool_]:
    """(n,) False where somebody before has the same history and options: it could be trained on and tested."""
    options = np.sort(np.column_stack((rows.film, drawn.other)), axis=1)
    _, first = np.unique(np.column_stack((rows.history, options)), axis=0, return_index=True)
    single = np.zeros(len(rows), np.bool_)
    single[first] = True
    return single


def _preferred_first(n: int, rng: np.random.Generator) -> NDArray[np.bool_]:
    """The preferred film as A in half of the rows (one more or less if odd)."""
    return (rng.permutation(n) + rng.integers(2)) % 2 == 0


@dataclass(frozen=True)
class _Finish:
    """What two sets of comparisons that differ in the other film share."""

    timeline: Timeline
    catalogue: Catalogue
    rows: Rows
    preferred_first: NDArray[np.bool_]

    def comparisons(self, other: Ints) -> list[Comparison]:
        movies = [self.catalogue.movies[film] for film in self.timeline.films.tolist()]
        # The text shows no genres in a history, so a loaded file has none there either.
        plain = [replace(movie, genres=()) for movie in movies]
        columns = (
            self.preferred_first, self.timeline.users[self.rows.user], self.timeline.seconds[self.rows.moment],
            self.rows.film, other, self.rows.history,
        )  # fmt: skip
        made = []
        for line, row in enumerate(zip(*(c.tolist() for c in columns), strict=True), start=1):
            first, user, time, film, another, history = row
            options: tuple[Movie, Movie] = (movies[film], movies[another])
            a, b = options if first else options[::-1]
            label = "A" if first else "B"
            films = tuple(plain[seen] for seen in history)
            made.append(Comparison(films, a, b, label, user=str(user), time=time, line=line))  # type: ignore[arg-type]
        return made

    def shortcuts(self, drawn: Drawn, own: bool) -> Margins:
        """Past: counted before the comparison's time. All-time: every rating there will be. Others' ratings alone.

        own: whether the other film was rated by the comparison's user too, as the preferred one was.
        """
        total = np.bincount(self.timeline.film, minlength=len(self.timeline.films))
        return {
            "past_popularity": (drawn.past_preferred - drawn.past_other).astype(float),
            "all_time_popularity": (total[self.rows.film] - 1 - (total[drawn.other] - own)).astype(float),
        }
