"""Where SFT and DPO differ: accuracy by kind of comparison, and the comparisons they disagree on most."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from quantpref import statistics as st
from quantpref.baselines import popularity
from quantpref.comparisons import Comparison
from quantpref.metrics import probability
from quantpref.scoring import Scores

SMALLEST_GENRE = 20  # comparisons; rarer main genres are counted together


def slices(
    train: Sequence[Comparison], test: Sequence[Comparison], scores: Mapping[str, Scores], seed: int
) -> dict[str, list[dict[str, Any]]]:
    """Accuracy of SFT and DPO in each slice of the test, and their difference with its 95 % interval.

    Popularity is counted in the training rows. Slices are looked at, not tested: no p-values.
    """
    sft, dpo = (st.correctness(scores[arm].margins) for arm in ("sft", "dpo"))
    users = np.array([c.cluster for c in test])
    result: dict[str, list[dict[str, Any]]] = {}
    for name, labels in _labels(train, test).items():
        result[name] = []
        for label in sorted(set(labels)):
            rows = np.array([other == label for other in labels])
            low, high = st.paired_bootstrap((dpo - sft)[rows], users[rows], seed)
            result[name].append(
                {
                    "slice": label,
                    "n": int(rows.sum()),
                    "sft": float(sft[rows].mean()),
                    "dpo": float(dpo[rows].mean()),
                    "difference_pp": float(100 * (dpo - sft)[rows].mean()),
                    "ci95_pp": [100 * low, 100 * high],
                }
            )
    return result


def _labels(train: Sequence[Comparison], test: Sequence[Comparison]) -> dict[str, list[str]]:
    """A label per test comparison and kind of slice."""
    known = popularity(train)
    preferred, other = (
        np.array([known(c, movie) for c, movie in zip(test, movies, strict=True)], dtype=float)
        for movies in ([c.preferred for c in test], [c.other for c in test])
    )
    main = [c.preferred.genres[0] if c.preferred.genres else "none" for c in test]
    return {
        "popularity quartile of the preferred film": _quartiles(preferred, "least known", "best known"),
        "popularity gap": _quartiles(
            np.log1p(preferred) - np.log1p(other), "other better known", "preferred better known"
        ),
        "genre overlap of the options": [_overlap(c) for c in test],
        "main genre of the preferred film": [g if main.count(g) >= SMALLEST_GENRE else "(rarer)" for g in main],
    }


def _quartiles(values: Any, lowest: str, highest: str) -> list[str]:
    names = [f"1 ({lowest})", "2", "3", f"4 ({highest})"]
    return [names[i] for i in np.searchsorted(np.quantile(values, [0.25, 0.5, 0.75]), values)]


def _overlap(comparison: Comparison) -> str:
    a, b = set(comparison.option_a.genres), set(comparison.option_b.genres)
    share = len(a & b) / max(1, len(a | b))
    return "1 none" if share == 0 else "2 up to half" if share <= 0.5 else "3 more than half"


def disagreements(test: Sequence[Comparison], scores: Mapping[str, Scores], most: int = 20) -> list[dict[str, Any]]:
    """The comparisons in which SFT and DPO give the preferred film the most different probabilities."""
    sft, dpo = (probability(scores[arm].margins) for arm in ("sft", "dpo"))
    return [
        {
            "comparison": test[i].line,
            "history": [str(movie) for movie in test[i].history],
            "option_a": f"{test[i].option_a} ({test[i].option_a.genre_text})",
            "option_b": f"{test[i].option_b} ({test[i].option_b.genre_text})",
            "preferred": test[i].label,
            "p_sft": float(sft[i]),
            "p_dpo": float(dpo[i]),
        }
        for i in np.argsort(-np.abs(dpo - sft), kind="stable")[:most]
    ]
