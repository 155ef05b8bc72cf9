"""Rating dumps -> comparisons: five films of a user, the next that they liked, and another film.

A row of a table stands for one rating, later for one comparison; only the last step makes objects.
Every table is sorted by its own content before anything is drawn, so that the order of the input's
lines never matters.
"""

from pathlib import Path

import numpy as np
import polars as pl

from quantpref.comparisons import Comparison, Movie
from quantpref.dumps import read_ratings
from quantpref.runs import UserError
from quantpref.titles import Catalogue, read_movies

HISTORY_FILMS = 5
LIKED_SHARE = 0.8  # of the scale's maximum: 4 of 5, 8 of 10
_HISTORY = [f"history_{k}" for k in range(1, HISTORY_FILMS + 1)]  # oldest first

Counts = dict[str, int | float]  # in the order in which they arise


def build(
    ratings: Path,
    movies: Path,
    *,
    seed: int,
    comparisons_per_user: int = 1,
    like_threshold: float | None = None,
    limit: int | None = None,
) -> tuple[list[Comparison], Counts]:
    """Make comparisons from a MovieLens or MovieTweetings dump; the content tells the format.

    Args:
        ratings: `ratings.dat` or `ratings.csv`.
        movies: `movies.dat` or `movies.csv`.
        seed: of the other films, the labels and the choice by `limit`.
        comparisons_per_user: at most so many, each with another preferred film.
        like_threshold: the lowest rating that counts as liked; default 80 % of the scale's maximum.
        limit: at most so many comparisons in all, drawn at random; default all.

    Returns:
        The comparisons, by user id, then time; and what was read, kept, and dropped and why.

    Raises:
        UserError: file, line, what was found and what to do; or that no comparison can be made.
    """
    _check_options(seed, comparisons_per_user, like_threshold, limit)
    other_rng, limit_rng, label_rng = (np.random.default_rng([seed, part]) for part in range(3))
    catalogue = read_movies(movies)
    rated = read_ratings(ratings, catalogue.stands_for, any_scale=like_threshold is not None)
    liked_from = LIKED_SHARE * rated.scale if like_threshold is None else like_threshold
    counts: Counts = {
        "files_in_csv": catalogue.layout.header_lines + rated.layout.header_lines,
        "files_in_latin_1": int(catalogue.encoding == "latin-1"),
        **catalogue.counts,
        "rating_scale_maximum": rated.scale,
        "liked_from_rating": liked_from,
    }
    watched = watched_films(rated.table, catalogue, counts)
    rows = preferred_films(watched, liked_from, comparisons_per_user, counts)
    rows = rows.with_columns(other=never_rated(watched, rows, other_rng))
    found = rows.drop_nulls("other")
    kept = _sample(found, limit, limit_rng)
    counts["comparisons_dropped_no_other_film"] = len(rows) - len(found)
    counts["comparisons_dropped_over_limit"] = len(found) - len(kept)
    counts["comparisons_kept"] = len(kept)
    counts["users_kept"] = kept["user"].n_unique()
    if kept.is_empty():
        raise UserError(
            f"{ratings}: no comparison can be made: of {counts['users_read']} users, none liked a"
            f" film ({liked_from:g} or more) after {HISTORY_FILMS} others while there was a film"
            " left to offer; bring more ratings or lower --like-threshold"
        )
    return _comparisons(kept, catalogue, label_rng), counts


def _check_options(seed: int, comparisons_per_user: int, like_threshold: float | None, limit: int | None) -> None:
    for name, value, least in (
        ("seed", seed, 0),
        ("comparisons-per-user", comparisons_per_user, 1),
        ("limit", limit, 1),
        ("like-threshold", like_threshold, 0),
    ):
        if value is not None and not least <= value < float("inf"):
            raise UserError(f"--{name} {value}: must be {least} or more")


def watched_films(rated: pl.DataFrame, catalogue: Catalogue, counts: Counts) -> pl.DataFrame:
    """Each user's films in the order of their ratings; `position` counts from 0 within a user.

    Ids of one title are one film by now. Ratings of one second are ordered by film id, and of a
    film's ratings by one user the first counts (of one second: the lowest).
    """
    ids = pl.DataFrame(
        {"film": list(catalogue.stands_for), "shown": list(catalogue.stands_for.values())},
        schema={"film": pl.Int64, "shown": pl.Int64},
    )
    shown = rated.join(ids, on="film", how="left").drop_nulls("shown").select("user", "time", "rating", film="shown")
    watched = (
        shown.sort("user", "film", "time", "rating")
        .unique(["user", "film"], keep="first", maintain_order=True)
        .sort("user", "time", "film")
        .with_columns(position=pl.int_range(pl.len()).over("user"))
    )
    counts["users_read"] = rated["user"].n_unique()
    counts["ratings_read"] = len(rated)
    counts["ratings_dropped_film_cannot_be_shown"] = len(rated) - len(shown)
    counts["ratings_dropped_same_user_and_film"] = len(shown) - len(watched)
    counts["ratings_kept"] = len(watched)
    return watched


def preferred_films(watched: pl.DataFrame, liked_from: float, per_user: int, counts: Counts) -> pl.DataFrame:
    """A row for each comparison: user, preferred `film`, its rating's `time`, its history."""
    # From position 5 on, the five rows before are the same user's: they are sorted by user.
    before = {name: pl.col("film").shift(HISTORY_FILMS - k) for k, name in enumerate(_HISTORY)}
    candidates = watched.with_columns(**before).filter(pl.col("position") >= HISTORY_FILMS)
    liked = candidates.filter(pl.col("rating") >= liked_from)
    enough, some_liked = candidates["user"].n_unique(), liked["user"].n_unique()
    counts["users_dropped_too_few_films"] = int(counts["users_read"]) - enough
    counts["users_dropped_liked_none_later"] = enough - some_liked
    return liked.filter(pl.int_range(pl.len()).over("user") < per_user)


def never_rated(watched: pl.DataFrame, rows: pl.DataFrame, rng: np.random.Generator) -> pl.Series:
    """For each row a random film that its user never rated and somebody else had rated before.

    Films are ranked by their first rating, so those rated before a row's time are the first `known`
    ranks. Drawing among them without the user's own, of sorted ranks q_0 < q_1 < ..., is drawing
    `pick` among the free ones and stepping over each own film with q_j - j <= pick: exact, and one
    binary search a row instead of a set a user. Null where the user rated every known film.
    """
    films = (
        watched.group_by("film").agg(first_time=pl.col("time").min()).sort("first_time", "film").with_row_index("rank")
    )
    own = watched.join(films.select("film", "rank"), on="film").sort("user", "rank")
    users, start = np.unique(own["user"].to_numpy(), return_index=True)
    user = np.searchsorted(users, own["user"].to_numpy())
    rank = own["rank"].to_numpy().astype(np.int64)
    nth = np.arange(len(own)) - start[user]
    row_user = np.searchsorted(users, rows["user"].to_numpy())
    first_times = films["first_time"].to_numpy()
    known = np.searchsorted(first_times, rows["time"].to_numpy(), side="left")

    def own_below(values: np.ndarray, bound: np.ndarray) -> np.ndarray:
        """How many of each row's user's own films have a value below the row's bound."""
        # One ascending array for all users: a user's values follow those of the users before.
        base = len(films) + 1
        ends = np.searchsorted(user * base + values, row_user * base + bound, side="left")
        return ends - start[row_user]

    free = known - own_below(rank, known)
    pick = np.floor(rng.random(len(rows)) * free).astype(np.int64)
    other = pick + own_below(rank - nth, pick + 1)
    drawn = films["film"].to_numpy()[np.where(free > 0, other, 0)]
    return pl.Series("other", drawn).set(pl.Series(free <= 0), None)


def _sample(rows: pl.DataFrame, limit: int | None, rng: np.random.Generator) -> pl.DataFrame:
    if limit is None or limit >= len(rows):
        return rows
    return rows[np.sort(rng.permutation(len(rows))[:limit])]


def _comparisons(rows: pl.DataFrame, catalogue: Catalogue, rng: np.random.Generator) -> list[Comparison]:
    """Rows as comparisons, the preferred film as A in half of them (one more or less if odd)."""
    preferred_first = (rng.permutation(len(rows)) + rng.integers(2)) % 2 == 0
    movies = catalogue.movies
    # The text shows no genres in a history, so a loaded file has none there either.
    plain = {film: Movie(movie.title, movie.year) for film, movie in movies.items()}
    comparisons = []
    columns = rows.select("user", "time", "film", "other", *_HISTORY)
    for first, row in zip(preferred_first.tolist(), columns.iter_rows(), strict=True):
        user, time, film, other, *history = row
        options = (movies[film], movies[other]) if first else (movies[other], movies[film])
        comparisons.append(
            Comparison(
                history=tuple(plain[film] for film in history),
                option_a=options[0],
                option_b=options[1],
                label="A" if first else "B",
                user=str(user),
                time=time,
            )
        )
    return comparisons
