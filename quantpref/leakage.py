"""What could make a result on these comparisons mean less than it seems: leaks, and shortcuts past the history.

A leak is a defect of the split or of a row. A shortcut is a rule that does not look at the history and still finds the
preferred film; a model that learns it ranks well and personalises nothing.
"""

import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from quantpref.baselines import baseline_margins
from quantpref.comparisons import Comparison, Movie, Split
from quantpref.metrics import baseline_metrics
from quantpref.runs import UserError
from quantpref.titles import natural_title

SHORTCUTS = ("always_a", "popularity", "past_popularity", "release_year")  # none of them looks at the history
STRICT_MAX_SHORTCUT = 0.65  # of the usual random negatives, counting popularity passes 0.75 and more
MOST_COUNTED = 10_000  # training and test comparisons that the baselines look at: seconds, in place of minutes
PARTS = ("train", "validation", "test")


def leakage_report(split: Split, seed: int, shortcuts: Mapping[str, float] | None = None) -> dict[str, Any]:
    """Leaks with a count and an example each; facts about labels and titles; baselines with their intervals.

    shortcuts: accuracies counted elsewhere, by name, that are judged as baselines too.
    """
    parts = dict(zip(PARTS, (split.train, split.validation, split.test), strict=True))
    copies, flipped = _shared_comparisons(parts)
    rows = [c for part in parts.values() for c in part]
    train, test = (_some(part, seed) for part in (split.train, split.test))
    baselines = {name: baseline_metrics(margins) for name, margins in baseline_margins(train, test).items()}
    return {
        "leaks": [
            {"leak": leak, "count": len(found), "example": found[0]}
            for leak, found in (
                ("user in two parts", _shared_users(parts)),
                ("same comparison in two parts", copies),
                ("flipped copy in two parts", flipped),
                ("option in its own history, spelled otherwise", _respelled(rows)),
                ("rating from after the comparison", _future_ratings(rows)),
            )
            if found
        ],
        "labels_a": sum(c.label == "A" for c in rows) / len(rows),
        "duplicate_titles": _duplicate_titles(rows),
        "comparisons_with_a_film_of_a_later_year": sum(map(_later_year, rows)),
        **_cold(split),
        "baselines": {**baselines, **(shortcuts or {})},
        "baselines_counted_on": {"train": len(train), "test": len(test)},
    }


def refuse(report: Mapping[str, Any], path: Path, max_shortcut: float | None, strict: bool) -> None:
    """UserError for a shortcut above the limit, and under `strict` for any leak too."""
    if strict and report["leaks"]:
        leaks = "; ".join(f"{leak['leak']} ({leak['count']}, such as {leak['example']})" for leak in report["leaks"])
        raise UserError(f"{path}: {leaks}; remove these rows, or leave out --strict")
    limit = STRICT_MAX_SHORTCUT if strict and max_shortcut is None else max_shortcut
    if above := shortcuts_above(report, limit):
        name, accuracy = above[0]
        raise UserError(
            f"{path}: {name.replace('_', ' ')} alone is right in {accuracy:.1%}, above the limit of {limit:.1%}"
            " (--max-shortcut): a model need not look at the history; build the file with --negatives popularity, or"
            " raise the limit"
        )


def shortcuts_above(report: Mapping[str, Any], limit: float | None) -> list[tuple[str, float]]:
    """Name and accuracy of the shortcuts above the limit, the best one first."""
    found = [(name, report["baselines"][name]["accuracy"]) for name in SHORTCUTS if name in report["baselines"]]
    return sorted(((n, a) for n, a in found if limit is not None and a > limit), key=lambda pair: -pair[1])


def _some(comparisons: Sequence[Comparison], seed: int) -> list[Comparison]:
    """All, or MOST_COUNTED of them drawn at random."""
    if len(comparisons) <= MOST_COUNTED:
        return list(comparisons)
    chosen = np.random.default_rng([seed, 5]).choice(len(comparisons), MOST_COUNTED, replace=False)
    return [comparisons[i] for i in np.sort(chosen).tolist()]


def _places(parts: Mapping[str, Iterable[Comparison]], key: Any) -> dict[Any, dict[str, Comparison]]:
    """By key the first comparison of each part that has it, where it is in more parts than one."""
    places: defaultdict[Any, dict[str, Comparison]] = defaultdict(dict)
    for name, part in parts.items():
        for c in part:
            places[key(c)].setdefault(name, c)
    return {k: found for k, found in places.items() if len(found) > 1}


def _where(found: Mapping[str, Comparison]) -> str:
    return " and ".join(f"line {c.line} ({name})" for name, c in found.items())


def _shared_users(parts: Mapping[str, Sequence[Comparison]]) -> list[str]:
    return [f"user {user}, {_where(found)}" for user, found in _places(parts, lambda c: c.cluster).items()]


def _shared_comparisons(parts: Mapping[str, Sequence[Comparison]]) -> tuple[list[str], list[str]]:
    """The same history and options: as they stand, and with the options exchanged."""
    found: tuple[list[str], list[str]] = ([], [])
    for places in _places(parts, lambda c: c.key).values():
        first, *others = places.values()
        for flipped in {str(c.option_a) != str(first.option_a) for c in others}:
            found[flipped].append(_where(places))
    return found


def _respelled(rows: Iterable[Comparison]) -> list[str]:
    """The loader refuses a film that is an option and in the history, but only where it is spelled the same."""
    found = []
    for c in rows:
        seen = {same_film(movie.title, movie.year): movie for movie in c.history}
        found += [
            f"line {c.line}, {movie} and {seen[same_film(movie.title, movie.year)]}"
            for movie in (c.preferred, c.other)
            if same_film(movie.title, movie.year) in seen
        ]
    return found


@cache
def same_film(title: str, year: int) -> tuple[str, int]:
    """What two spellings of one film share: no case, accents, punctuation, or place of the article.

    Symbols stay: "+1" and "1" are two films.
    """
    letters = unicodedata.normalize("NFKD", natural_title(title).casefold())
    return "".join(c for c in letters if unicodedata.category(c)[0] not in "MPZ") or title, year


def _future_ratings(rows: Iterable[Comparison]) -> list[str]:
    """A history that holds a film which the same user rated at the time of the comparison or later.

    A file tells when a film was rated only of preferred films, so a user's comparisons are held against each other.
    """
    rated: dict[tuple[str, str], Comparison] = {}
    timed = [c for c in rows if c.user is not None and c.time is not None]
    for c in timed:
        rated[c.cluster, str(c.preferred)] = c
    found = []
    for c in timed:
        for movie in c.history:
            later = rated.get((c.cluster, str(movie)))
            if later is not None and (later.time or 0) >= (c.time or 0):
                found.append(f"line {c.line}, whose user rated {movie} later (line {later.line})")
    return found


def _duplicate_titles(rows: Iterable[Comparison]) -> dict[str, Any]:
    """Films that seem to be one film under several spellings."""
    spellings: defaultdict[tuple[str, int], set[str]] = defaultdict(set)
    for movie in {m for c in rows for m in (*c.history, c.option_a, c.option_b)}:
        spellings[same_film(movie.title, movie.year)].add(str(movie))
    several = sorted(" = ".join(sorted(names)) for names in spellings.values() if len(names) > 1)
    return {"films": len(several), "examples": several[:3]}


def _later_year(c: Comparison) -> bool:
    """Festivals and other countries explain a few of these; many mean that times or years are wrong."""
    if c.time is None:
        return False
    year = datetime.fromtimestamp(c.time, UTC).year
    films: tuple[Movie, ...] = (*c.history, c.option_a, c.option_b)
    return any(movie.year > year for movie in films)


def _cold(split: Split) -> dict[str, int]:
    """Test comparisons whose film no training comparison shows: nothing was learnt about it."""
    seen = {str(m) for c in split.train for m in (*c.history, c.option_a, c.option_b)}
    return {
        "test_comparisons_preferred_film_cold": sum(str(c.preferred) not in seen for c in split.test),
        "test_comparisons_other_film_cold": sum(str(c.other) not in seen for c in split.test),
    }
