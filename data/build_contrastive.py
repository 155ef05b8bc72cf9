#!/usr/bin/env python3
"""Make a file of comparisons: from ratings that people gave, or from a simulated population.

python data/build_contrastive.py simulate --out FILE
python data/build_contrastive.py ratings --ratings FILE --movies FILE --out FILE
python data/build_contrastive.py ratings --download ml-1m --out FILE
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import tyro

from config import parse_flags
from quantpref.comparisons import Comparison, save
from quantpref.runs import UserError, one_line_errors


@dataclass(frozen=True)
class Simulate:
    """Simulate people with known tastes who watch real films."""

    out: Path
    """The JSONL file to write; an existing file is never replaced."""
    users: int = 6040
    """People, one comparison each; 6,040 as in MovieLens-1M."""
    effect: float = 2.0
    """Weight of a person's taste in what they watch; 0 makes everybody alike."""
    popularity: float = 1.0
    """Weight of a film's fame; 0 makes all films equally well known."""
    noise: float = 1.0
    """Scale of the chance in what people watch; larger is closer to watching at random."""
    null: bool = False
    """Decide by a coin which candidate is the preferred one, so that no history can tell it."""
    seed: int = 3407
    """Seed of the population, the films watched and the order of the options."""


@dataclass(frozen=True)
class Ratings:
    """Turn a MovieLens or MovieTweetings dump into comparisons."""

    out: Path
    """The JSONL file to write; an existing file is never replaced."""
    ratings: Path | None = None
    """ratings.dat (`user::film::rating::time`) or ratings.csv."""
    movies: Path | None = None
    """movies.dat (`film::Title (Year)::Genre|Genre`) or movies.csv."""
    download: Literal["ml-1m"] | None = None
    """Fetch MovieLens-1M from GroupLens instead, after showing its terms of use."""
    download_folder: Path = Path("data/downloads")
    """Where the downloaded files are kept."""
    accept_licence: bool = False
    """Accept the terms of use shown by --download without being asked."""
    comparisons_per_user: int = 1
    """At most this many comparisons of each user, with different preferred films."""
    like_threshold: float | None = None
    """A film is liked from this rating on; the default is 80 % of the scale's maximum (4 of 5, 8 of 10)."""
    limit: int | None = None
    """Keep at most this many comparisons, of users drawn at random."""
    seed: int = 3407
    """Seed of the other films and the order of the options."""


def simulated(config: Simulate) -> list[Comparison]:
    from quantpref.simulate import Population, simulate

    if config.users < 1 or config.noise <= 0:
        raise UserError("--users and --noise must be above 0")
    population = Population(config.effect, config.popularity, config.noise, config.null)
    simulation = simulate(config.users, population, config.seed)
    print(f"an oracle that knows every taste is right in {simulation.oracle_accuracy:.1%}")
    return simulation.comparisons


def from_ratings(config: Ratings) -> list[Comparison]:
    from quantpref.download import download_ml_1m
    from quantpref.ratings import build

    ratings, movies = config.ratings, config.movies
    if config.download:
        folder = download_ml_1m(config.download_folder, accept_licence=config.accept_licence)
        ratings, movies = folder / "ratings.dat", folder / "movies.dat"
    if ratings is None or movies is None:
        raise UserError("give --ratings FILE and --movies FILE, or --download ml-1m")
    comparisons, counts = build(
        ratings,
        movies,
        seed=config.seed,
        comparisons_per_user=config.comparisons_per_user,
        like_threshold=config.like_threshold,
        limit=config.limit,
    )
    for name, count in counts.items():
        print(f"{count:>10,}  {name}")
    return comparisons


def main(config: Simulate | Ratings) -> None:
    if config.out.exists():
        raise UserError(f"{config.out}: exists; choose another --out or remove it")
    comparisons = simulated(config) if isinstance(config, Simulate) else from_ratings(config)
    digest = save(config.out, comparisons)
    labels = sum(c.label == "A" for c in comparisons)
    print(f"{config.out}: {len(comparisons):,} comparisons, {labels:,} of them labelled A, sha256 {digest}")


if __name__ == "__main__":
    with one_line_errors():
        main(
            parse_flags(
                Annotated[Simulate, tyro.conf.subcommand("simulate")]
                | Annotated[Ratings, tyro.conf.subcommand("ratings")],
                sys.argv[1:],
            )
        )
