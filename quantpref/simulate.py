"""The simulated population behind the embedded data set: real films, made-up users with known tastes.

A user likes some genres and an era. Each watches film after film, drawn without replacement with
probability proportional to exp(utility / noise):

    utility(user, film) = effect * (genre taste + era taste) + popularity * fame(film)

Five films are the history, the sixth is the preferred one, and a film of like popularity that the user did
not watch is the other. Since the tastes are known, so is what somebody who knew them would score.
"""

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from quantpref.comparisons import Comparison, Movie, counterbalance
from quantpref.runs import ROOT

CATALOGUE = ROOT / "data" / "catalogue.csv"
HISTORY_FILMS = 5
NEIGHBOURS = 10  # the other film is one of the ten nearest in popularity
FIRST_SECOND = 1_577_836_800  # 2020-01-01: simulated users rate in the two years after it
TWO_YEARS_SECONDS = 2 * 365 * 24 * 3600

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Population:
    """How strongly taste, popularity and chance drive what simulated users watch."""

    effect: float = 2.0
    """Weight of the user's taste, in units of utility; 0 makes everybody alike."""
    popularity: float = 1.0
    """Weight of a film's fame; 0 makes all films equally well known."""
    noise: float = 1.0
    """Scale of the Gumbel noise on utilities: larger is closer to watching at random."""
    null: bool = False
    """Decide by a coin which of the two candidates is the preferred one: no history can tell it."""


@dataclass(frozen=True)
class Simulation:
    """`comparisons`, and per comparison the true utilities of the two candidates (taste alone)."""

    comparisons: list[Comparison]
    taste_preferred: Floats
    taste_other: Floats

    @property
    def oracle_accuracy(self) -> float:
        """Share of comparisons in which the preferred film has the higher true taste (a tie: half)."""
        return float(np.mean(0.5 + 0.5 * np.sign(self.taste_preferred - self.taste_other)))


def load_catalogue(path: Path = CATALOGUE) -> list[Movie]:
    with path.open(encoding="utf-8", newline="") as file:
        return [Movie(row["title"], int(row["year"]), tuple(row["genres"].split("|"))) for row in csv.DictReader(file)]


def film_features(catalogue: list[Movie]) -> tuple[Floats, Floats]:
    """Genre matrix (films, genres) with rows of unit length, and years in units of 20 years from 1985."""
    genres = sorted({g for movie in catalogue for g in movie.genres})
    matrix = np.array([[g in movie.genres for g in genres] for movie in catalogue], dtype=float)
    years = np.array([(movie.year - 1985) / 20 for movie in catalogue])
    return matrix / np.linalg.norm(matrix, axis=1, keepdims=True), years


def watch(
    catalogue: list[Movie], users: int, films: int, population: Population, seed: int
) -> tuple[NDArray[np.int64], Floats, Floats]:
    """Simulate `users` people who each watch `films` films in order.

    Returns:
        Film indices (users, films) in the order of watching; tastes (users, catalogue), without
        popularity; and the log of each film's expected share of the audience (catalogue,), which tastes
        shape too: a film that suits most people is seen more.
    """
    rng = np.random.default_rng(seed)
    features, years = film_features(catalogue)
    ranks = np.random.default_rng(0).permutation(len(catalogue)) + 1
    # Zipf-Mandelbrot: skewed, but flat at the head, or else no two of the best-known films would be alike in
    # popularity.
    fame = -np.log(ranks + 30.0)
    genre_taste = rng.standard_normal((users, features.shape[1])) @ features.T
    favourite_year = rng.normal(0.0, 0.8, (users, 1))
    era_taste = 0.5 - 0.5 * (years - favourite_year) ** 2
    taste = population.effect * (genre_taste + era_taste)
    utility = (taste + population.popularity * fame) / population.noise
    share = np.exp(utility - np.logaddexp.reduce(utility, axis=1, keepdims=True)).mean(axis=0)
    # The Gumbel-max trick: the order of utility + noise is sampling without replacement from the softmax.
    order = np.argsort(-(utility + rng.gumbel(size=utility.shape)), axis=1)
    return order[:, :films], taste, np.log(share)


def simulate(
    users: int, population: Population = Population(), seed: int = 3407, catalogue: list[Movie] | None = None
) -> Simulation:
    """One comparison for each of `users` people, labels A in half of them."""
    films = load_catalogue() if catalogue is None else catalogue
    watched, taste, log_share = watch(films, users, HISTORY_FILMS + 1, population, seed)
    rng = np.random.default_rng((seed, 1))
    times = FIRST_SECOND + rng.integers(0, TWO_YEARS_SECONDS, users)
    preferred, other = watched[:, -1].copy(), np.empty(users, dtype=np.int64)
    for user in range(users):
        distance = np.abs(log_share - log_share[preferred[user]])
        distance[watched[user]] = np.inf
        other[user] = rng.choice(np.argsort(distance, kind="stable")[:NEIGHBOURS])
    if population.null:
        swapped = rng.random(users) < 0.5
        preferred[swapped], other[swapped] = other[swapped], preferred[swapped]
    comparisons = [
        Comparison(
            history=tuple(Movie(films[f].title, films[f].year) for f in watched[user, :HISTORY_FILMS]),
            option_a=films[preferred[user]],
            option_b=films[other[user]],
            label="A",
            user=str(user + 1),
            time=int(times[user]),
        )
        for user in range(users)
    ]
    rows = np.arange(users)
    return Simulation(counterbalance(comparisons, seed), taste[rows, preferred], taste[rows, other])
