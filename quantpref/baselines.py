"""Simple rules in the same table: what a shortcut scores, fitted on the training rows alone.

Each gives a margin per comparison, positive where it prefers the preferred film; 0 counts as half right.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from quantpref.comparisons import Comparison, Movie

Margins = NDArray[np.float64]
FOLDS = 5  # of the training users, for the logistic regression on held-out margins
Preference = Callable[[Comparison, Movie], float]  # how much the rule likes one candidate


def baseline_margins(train: Sequence[Comparison], test: Sequence[Comparison]) -> dict[str, Margins]:
    """Margins (n_test,) of every baseline, by name."""
    margins = _rule_margins(train, test)
    return {
        # Shown in both orders, "always A" is right in one of them: a tie in every comparison.
        "always_a": np.zeros(len(test)),
        **margins,
        "logistic_regression": _logistic(_held_out_margins(train), margins),
    }


def _rule_margins(train: Sequence[Comparison], test: Sequence[Comparison]) -> dict[str, Margins]:
    rules = {
        "popularity": popularity(train),
        "genre_overlap": genre_overlap(train),
        "co_occurrence": co_occurrence(train),
        "release_year": lambda comparison, movie: movie.year,
    }
    return {name: _margins(rule, test) for name, rule in rules.items()}


def _held_out_margins(train: Sequence[Comparison]) -> dict[str, Margins]:
    """Each training row's margins by rules fitted on other users: a row's own answer is among its counts."""
    users = sorted({c.cluster for c in train})
    fold_of = {user: i % FOLDS for i, user in enumerate(users)}
    folds = np.array([fold_of[c.cluster] for c in train])
    result: dict[str, Margins] = {}
    for fold in range(FOLDS):
        rest = [c for c, f in zip(train, folds, strict=True) if f != fold]
        held_out = [c for c, f in zip(train, folds, strict=True) if f == fold]
        for name, margins in _rule_margins(rest, held_out).items():
            result.setdefault(name, np.zeros(len(train)))[folds == fold] = margins
    return result


def _margins(rule: Preference, comparisons: Sequence[Comparison]) -> Margins:
    return np.array([rule(c, c.preferred) - rule(c, c.other) for c in comparisons], dtype=float)


def popularity(train: Sequence[Comparison]) -> Preference:
    """Share of the training rows in which a film was watched, as history or as the preferred film."""
    counts = Counter(str(m) for c in train for m in (*c.history, c.preferred))
    return lambda comparison, movie: counts[str(movie)] / max(1, len(train))


def genre_overlap(train: Sequence[Comparison]) -> Preference:
    """How many history films share a candidate's genre, averaged over its genres.

    The text shows no genres in a history; they are known of films that are a candidate in training.
    """
    genres: dict[str, tuple[str, ...]] = {str(m): m.genres for c in train for m in (c.option_a, c.option_b)}

    def rule(comparison: Comparison, movie: Movie) -> float:
        history = Counter(g for m in comparison.history for g in genres.get(str(m), ()))
        return sum(history[g] for g in movie.genres) / max(1, len(movie.genres))

    return rule


def co_occurrence(train: Sequence[Comparison]) -> Preference:
    """Mean cosine similarity of a candidate and the history's films, by who watched both in training."""
    watched: Counter[str] = Counter()
    together: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for c in train:
        films = sorted({str(m) for m in (*c.history, c.preferred)})
        watched.update(films)
        for a, b in combinations(films, 2):
            together[a][b] += 1
            together[b][a] += 1

    def rule(comparison: Comparison, movie: Movie) -> float:
        name = str(movie)
        pairs = ((together[name][str(m)], watched[name] * watched[str(m)]) for m in comparison.history)
        return sum(both / product**0.5 for both, product in pairs if product) / len(comparison.history)

    return rule


def _logistic(train: dict[str, Margins], test: dict[str, Margins]) -> Margins:
    """Logistic regression on the other rules' margins, standardised, without an intercept.

    Every training row says that the preferred film wins, so each stands also mirrored, as its opposite.
    """
    from sklearn.linear_model import LogisticRegression

    features, unseen = (np.column_stack(list(m.values())) for m in (train, test))
    scale = features.std(axis=0)
    scale[scale == 0] = 1.0
    mirrored = np.vstack((features, -features)) / scale
    model = LogisticRegression(fit_intercept=False).fit(mirrored, np.repeat([1, 0], len(features)))
    return model.decision_function(unseen / scale)
