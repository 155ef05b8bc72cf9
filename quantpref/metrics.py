"""From scores to the numbers of an arm, and from two arms to the tests between them (EXPERIMENT: Scores)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

from quantpref import statistics as st
from quantpref.comparisons import Comparison
from quantpref.runs import UserError, atomic_file
from quantpref.scoring import ORDERS, Scores

Floats = NDArray[np.float64]
NEAR_TIE_NATS = 0.05  # a probability within 1.3 points of one half


def arm_metrics(scores: Scores, validation: Scores) -> dict[str, Any]:
    """One arm's numbers on the test, its temperature from validation. Shares in 0..1, margins in nats."""
    margins, orders, n = scores.margins, scores.order_margins, len(scores.margins)
    right = st.correctness(margins)
    temperature, at_bound = st.fit_temperature(validation.margins)
    calibrated = margins / temperature
    a_preferred = np.repeat([True, False], n)
    return {
        "accuracy": float(right.mean()),
        "accuracy_ci95": list(st.wilson_interval(float(right.sum()), n)),
        "confidence": st.confidence(margins),
        "mean_margin": float(margins.mean()),
        "accuracy_preferred_first": float(st.correctness(orders[:, 0]).mean()),
        "accuracy_preferred_second": float(st.correctness(orders[:, 1]).mean()),
        "accuracy_single_order": float(st.correctness(orders.ravel()).mean()),
        "confidence_single_order": st.confidence(orders.ravel()),
        "brier_single_order": st.brier(orders.ravel()),
        "flip_rate": float(flipped(scores).mean()),
        "answer_mass": float(scores.answer_mass.mean()),
        "ties": int((margins == 0).sum()),
        "auc": st.auc((scores.logp_a - scores.logp_b).T.ravel(), a_preferred),
        "brier": st.brier(margins),
        "nll": st.nll(margins),
        "ece": st.ece(margins),
        "temperature": temperature,
        "temperature_at_bound": at_bound,
        "brier_calibrated": st.brier(calibrated),
        "nll_calibrated": st.nll(calibrated),
        "ece_calibrated": st.ece(calibrated),
        "near_ties": float((np.abs(margins) < NEAR_TIE_NATS).mean()),
        "reliability": {"raw": _bins(margins), "calibrated": _bins(calibrated)},
        "confidence_histogram": _histogram(np.tanh(margins / 2)),
    }


def _bins(margins: Floats) -> dict[str, list[float]]:
    return {name: values.tolist() for name, values in st.reliability_bins(margins)._asdict().items()}


def _histogram(confidences: Floats) -> dict[str, list[float]]:
    counts, edges = np.histogram(confidences, bins=40, range=(-1, 1))
    return {"edges": edges.tolist(), "counts": counts.tolist()}


def baseline_metrics(margins: Floats) -> dict[str, Any]:
    right = st.correctness(margins)
    return {
        "accuracy": float(right.mean()),
        "accuracy_ci95": list(st.wilson_interval(float(right.sum()), len(right))),
    }


def flipped(scores: Scores) -> NDArray[np.bool_]:
    """(n,): whether the two orders prefer different films."""
    first, second = np.sign(scores.order_margins).T
    return first != second


def probability(margins: Floats) -> Floats:
    """P of the preferred film: sigmoid(margin), without overflow."""
    return expit(margins)


def secondary_tests(
    arms: Mapping[str, Scores],
    metrics: Mapping[str, dict[str, Any]],
    users: Sequence[str],
    seed: int,
    controls: Mapping[str, tuple[Sequence[str], Mapping[str, Scores]]],
) -> list[dict[str, Any]]:
    """DPO against SFT in other respects, against sft-more, and on each control set, under one Holm correction.

    controls: by name the users of a control set's comparisons, and the scores on it.

    Each is the mean over comparisons of DPO's value less the other arm's, tested by the user-level
    sign-flip permutation.
    """

    def brier_calibrated(arm: str) -> Floats:
        return (1 - probability(arms[arm].margins / metrics[arm]["temperature"])) ** 2

    differences = {
        "confidence": 2 * (probability(arms["dpo"].margins) - probability(arms["sft"].margins)),
        "brier_calibrated": brier_calibrated("dpo") - brier_calibrated("sft"),
        "flip_rate": flipped(arms["dpo"]).astype(float) - flipped(arms["sft"]).astype(float),
    }
    if "sft-more" in arms:
        better = st.correctness(arms["dpo"].margins) - st.correctness(arms["sft-more"].margins)
        differences["accuracy_against_sft_more"] = better
    of_users = dict.fromkeys(differences, users)
    for name, (control_users, scores) in controls.items():
        test = f"accuracy_on_{name}"
        differences[test] = st.correctness(scores["dpo"].margins) - st.correctness(scores["sft"].margins)
        of_users[test] = control_users
    tests: list[dict[str, Any]] = [
        {"test": name, "difference": float(d.mean()), "p_value": st.sign_flip_p(d, of_users[name], seed)}
        for name, d in differences.items()
    ]
    for row, adjusted in zip(tests, st.holm([t["p_value"] for t in tests]), strict=True):
        row["p_holm"] = float(adjusted)
    return tests


def write_predictions(path: Path, comparisons: Sequence[Comparison], arms: Mapping[str, Scores]) -> None:
    """predictions.parquet: one row per arm, comparison and order, from which every number follows."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    n = len(comparisons)
    tables = [
        pa.table(
            {
                "arm": [arm] * (2 * n),
                "comparison": pa.array([c.line for c in comparisons] * 2, pa.int64()),
                "user": [c.cluster for c in comparisons] * 2,
                "order": [ORDERS[0]] * n + [ORDERS[1]] * n,
                "logp_a": scores.logp_a.T.ravel(),
                "logp_b": scores.logp_b.T.ravel(),
                "preferred": ["A"] * n + ["B"] * n,
            }
        )
        for arm, scores in arms.items()
    ]
    with atomic_file(path) as temporary:
        pq.write_table(pa.concat_tables(tables), temporary)


def read_predictions(path: Path, comparisons: Sequence[Comparison]) -> dict[str, Scores]:
    """The scores behind a finished evaluation, in the order of `comparisons`."""
    import pyarrow.parquet as pq

    try:
        rows = pq.read_table(path).to_pylist()
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); evaluate again") from None
    try:
        found = {(r["arm"], r["comparison"], r["order"]): (r["logp_a"], r["logp_b"]) for r in rows}
        arms = list(dict.fromkeys(r["arm"] for r in rows))
        values = {a: np.array([[found[a, c.line, o] for o in ORDERS] for c in comparisons]) for a in arms}
    except KeyError as error:
        raise UserError(f"{path}: holds no {error.args[0]}; evaluate again") from None
    return {arm: Scores(v[..., 0], v[..., 1]) for arm, v in values.items()}
