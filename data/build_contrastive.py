#!/usr/bin/env python3
"""Make a file of comparisons: from ratings that people gave, or from a simulated population.

python data/build_contrastive.py simulate --out FILE
python data/build_contrastive.py ratings --ratings FILE --movies FILE --negatives popularity --out FILE
python data/build_contrastive.py ratings --download ml-1m --out FILE

Beside FILE.jsonl stand its data card, FILE.card.json and FILE.card.md, and where the other films were not chosen by
popularity anyway, the control set FILE.popularity-matched.jsonl.
"""

import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import tyro

from config import Config, parse_flags
from quantpref.baselines import Margins
from quantpref.comparisons import Comparison, save
from quantpref.controls import MATCHED, control_file
from quantpref.leakage import leakage_report, refuse
from quantpref.metrics import baseline_metrics
from quantpref.runs import UserError, one_line_errors, sha256
from quantpref.splits import split_comparisons


@dataclass(frozen=True)
class Made:
    """Comparisons, and what their card says of them."""

    comparisons: list[Comparison]
    sources: list[Path]
    counts: Mapping[str, int | float]
    shortcuts: Mapping[str, Margins]
    matched: list[Comparison] | None = None
    matched_shortcuts: Mapping[str, Margins] | None = None


@dataclass(frozen=True)
class Judged:
    """What both ways of making a file share."""

    out: Path
    """The JSONL file to write; an existing file is never replaced."""
    split: Literal["user", "time"] = "user"
    """The split for which leaks and baselines are counted; train_dpo.py has the same flag."""
    max_shortcut: float | None = None
    """Write nothing where a rule that ignores the history is right in more than this share of the comparisons."""
    strict: bool = False
    """Write nothing where there is any leak, nor, unless --max-shortcut says otherwise, a shortcut above 0.65."""


@dataclass(frozen=True)
class Simulate(Judged):
    """Simulate people with known tastes who watch real films."""

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
class Ratings(Judged):
    """Turn a MovieLens or MovieTweetings dump into comparisons."""

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
    negatives: Literal["random", "popularity", "disliked", "hard"] = "random"
    """The other film: any that the user never rated; of those the one nearest in popularity by then; one that the
    user rated low; or of those never rated the one whose audience overlaps most with the preferred film's."""
    like_threshold: float | None = None
    """A film is liked from this rating on; the default is 80 % of the scale's maximum (4 of 5, 8 of 10)."""
    dislike_threshold: float | None = None
    """A film is disliked up to this rating; the default is 50 % of the scale's maximum (2.5 of 5, 5 of 10)."""
    limit: int | None = None
    """Keep at most this many comparisons, of users drawn at random."""
    seed: int = 3407
    """Seed of the other films and the order of the options."""


def simulated(config: Simulate) -> Made:
    from quantpref.simulate import CATALOGUE, Population, simulate

    if config.users < 1 or config.noise <= 0:
        raise UserError("--users and --noise must be above 0")
    population = Population(config.effect, config.popularity, config.noise, config.null)
    simulation = simulate(config.users, population, config.seed)
    print(f"an oracle that knows every taste is right in {simulation.oracle_accuracy:.1%}")
    comparisons = [replace(c, line=line) for line, c in enumerate(simulation.comparisons, start=1)]
    return Made(comparisons, [CATALOGUE], {"users": config.users, "comparisons_kept": config.users}, {})


def from_ratings(config: Ratings) -> Made:
    from quantpref.download import download_ml_1m
    from quantpref.ratings import Options, build

    ratings, movies = config.ratings, config.movies
    if config.download:
        folder = download_ml_1m(config.download_folder, accept_licence=config.accept_licence)
        ratings, movies = folder / "ratings.dat", folder / "movies.dat"
    if ratings is None or movies is None:
        raise UserError("give --ratings FILE and --movies FILE, or --download ml-1m")
    built = build(
        ratings,
        movies,
        Options(
            seed=config.seed,
            negatives=config.negatives,
            comparisons_per_user=config.comparisons_per_user,
            like_threshold=config.like_threshold,
            dislike_threshold=config.dislike_threshold,
            limit=config.limit,
        ),
    )
    for name, count in built.counts.items():
        print(f"{count:>10,}  {name}")
    return Made(
        built.comparisons, [ratings, movies], built.counts, built.shortcuts, built.matched, built.matched_shortcuts
    )


def judged(config: Simulate | Ratings, made: Made) -> dict[str, Any] | None:
    """The leakage report; None where there are too few users to split, such as in a file to test on.

    What --strict and --max-shortcut refuse is refused before anything is written.
    """
    fractions = Config.train_fraction, Config.validation_fraction
    try:
        split = split_comparisons(made.comparisons, config.split, *fractions, Config.split_seed)
    except UserError as error:
        if config.strict or config.max_shortcut is not None:
            raise
        print(f"no leakage report: {error}")
        return None
    test = np.array([c.line - 1 for c in split.test])
    report = leakage_report(split, Config.split_seed, accuracies(made.shortcuts, test))
    refuse(report, config.out, config.max_shortcut, config.strict)
    for leak in report["leaks"]:
        print(f"leak: {leak['leak']}: {leak['count']}, such as {leak['example']}")
    for name, row in report["baselines"].items():
        low, high = row["accuracy_ci95"]
        print(f"{row['accuracy']:>10.1%}  {name} ({100 * low:.1f}-{100 * high:.1f})")
    return report


def accuracies(shortcuts: Mapping[str, Margins], rows: Any = slice(None)) -> dict[str, Any]:
    return {name: baseline_metrics(margins[rows]) for name, margins in shortcuts.items()}


def main(config: Simulate | Ratings) -> None:
    from quantpref.card import card_files, write_card

    outputs = (config.out, control_file(config.out, MATCHED), *card_files(config.out))
    for path in outputs:
        if path.exists():
            raise UserError(f"{path}: exists; choose another --out or remove it")
    made = simulated(config) if isinstance(config, Simulate) else from_ratings(config)
    report = judged(config, made)
    try:
        write_card(config.out, {**written(config, made), "leakage": report})
    except BaseException:  # nothing of it was there before; a file without its card is not left behind
        for path in outputs:
            path.unlink(missing_ok=True)
        raise


def written(config: Simulate | Ratings, made: Made) -> dict[str, Any]:
    """Write the comparisons and their control set; returns what the card says of them."""
    controls = {}
    if made.matched is not None:
        path = control_file(config.out, MATCHED)
        controls[MATCHED] = {
            "file": path.name,
            "sha256": save(path, made.matched),
            "shortcuts": accuracies(made.matched_shortcuts or {}),
        }
    digest = save(config.out, made.comparisons)
    labels = sum(c.label == "A" for c in made.comparisons)
    print(f"{config.out}: {len(made.comparisons):,} comparisons, {labels:,} of them labelled A, sha256 {digest}")
    return {
        "file": config.out.name,
        "sha256": digest,
        "comparisons": len(made.comparisons),
        "users": len({c.user for c in made.comparisons}),
        "sources": {path.name: sha256(path) for path in made.sources},
        "options": options(config),
        "counts": made.counts,
        "controls": controls,
        "whole_file": accuracies(made.shortcuts),
    }


def options(config: Simulate | Ratings) -> dict[str, Any]:
    """Every option, paths by their last part: the card of the same build is the same wherever it stands."""
    values = {"command": type(config).__name__.lower(), **asdict(config)}
    return {name: value.name if isinstance(value, Path) else value for name, value in values.items()}


if __name__ == "__main__":
    with one_line_errors():
        main(
            parse_flags(
                Annotated[Simulate, tyro.conf.subcommand("simulate")]
                | Annotated[Ratings, tyro.conf.subcommand("ratings")],
                sys.argv[1:],
            )
        )
