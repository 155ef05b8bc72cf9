"""metrics.py against plain loops and scikit-learn, on scores made up here; and the parquet files."""

import math
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sklearn import metrics as sklearn_metrics

from quantpref.metrics import (
    arm_metrics,
    baseline_metrics,
    flipped,
    probability,
    read_predictions,
    secondary_tests,
    write_predictions,
)
from quantpref.runs import UserError
from quantpref.scoring import Scores
from quantpref.statistics import correctness


def made(n: int, seed: int, skill: float = 0.5, position_bias: float = 0.7) -> Scores:
    """Scores of an arm that likes the preferred film by `skill` nats on average, and option A by `position_bias`."""
    rng = np.random.default_rng(seed)
    taste = rng.normal(skill, 1.0, (n, 1)) + rng.normal(0, 0.3, (n, 2))
    difference = taste * [1, -1] + position_bias  # log p(A) - log p(B), preferred first and second
    mass = np.log(rng.uniform(0.6, 1.0, (n, 2)))
    return Scores(mass - np.logaddexp(0, -difference), mass - np.logaddexp(0, difference))


def swapped(scores: Scores) -> Scores:
    """The same answers, had the other film been the preferred one: the two orders change places."""
    return Scores(scores.logp_a[:, ::-1], scores.logp_b[:, ::-1])


N = 203
TEST, VALIDATION = made(N, 1), made(99, 2)


def test_every_number_by_plain_loops():
    found = arm_metrics(TEST, VALIDATION)
    margins, single, first, second, flips, mass = [], [], [], [], 0, []
    for i in range(N):
        (a1, a2), (b1, b2) = TEST.logp_a[i], TEST.logp_b[i]
        one, two = a1 - b1, b2 - a2  # preferred first: A is right; second: B is
        margins.append((one + two) / 2)
        single += [one, two]
        first.append(one > 0)
        second.append(two > 0)
        flips += (one > 0) != (two > 0)
        mass += [math.exp(a1) + math.exp(b1), math.exp(a2) + math.exp(b2)]

    def sigmoid(x):
        return 1 / (1 + math.exp(-x))

    def mean(values):
        return pytest.approx(sum(values) / len(values), rel=1e-12)

    assert found["accuracy"] == mean([m > 0 for m in margins])
    assert found["confidence"] == mean([2 * sigmoid(m) - 1 for m in margins])
    assert found["mean_margin"] == mean(margins)
    assert found["brier"] == mean([(1 - sigmoid(m)) ** 2 for m in margins])
    assert found["nll"] == mean([-math.log(sigmoid(m)) for m in margins])
    assert found["accuracy_preferred_first"] == mean(first)
    assert found["accuracy_preferred_second"] == mean(second)
    assert found["accuracy_single_order"] == mean([m > 0 for m in single])
    assert found["confidence_single_order"] == mean([2 * sigmoid(m) - 1 for m in single])
    assert found["brier_single_order"] == mean([(1 - sigmoid(m)) ** 2 for m in single])
    assert found["flip_rate"] == pytest.approx(flips / N)
    assert found["answer_mass"] == mean(mass)
    assert found["ties"] == 0
    t = found["temperature"]
    assert found["brier_calibrated"] == mean([(1 - sigmoid(m / t)) ** 2 for m in margins])
    assert found["nll_calibrated"] == mean([-math.log(sigmoid(m / t)) for m in margins])
    # Position bias: this arm likes whatever is shown first.
    assert found["accuracy_preferred_first"] > found["accuracy"] > found["accuracy_preferred_second"]
    assert found["accuracy"] > found["accuracy_single_order"]
    z, p = 1.959963984540054, found["accuracy"]
    centre, half = p + z * z / (2 * N), z * math.sqrt(p * (1 - p) / N + z * z / (4 * N * N))
    assert found["accuracy_ci95"] == pytest.approx(
        [(centre - half) / (1 + z * z / N), (centre + half) / (1 + z * z / N)]
    )


def test_against_scikit_learn():
    found = arm_metrics(TEST, VALIDATION)
    shown_first = TEST.logp_a[:, 0] - TEST.logp_b[:, 0]
    shown_second = TEST.logp_a[:, 1] - TEST.logp_b[:, 1]
    a_is_preferred = [1] * N + [0] * N
    expected = sklearn_metrics.roc_auc_score(a_is_preferred, [*shown_first, *shown_second])
    assert found["auc"] == pytest.approx(expected)
    p = 1 / (1 + np.exp(-TEST.margins))
    assert found["nll"] == pytest.approx(sklearn_metrics.log_loss(np.ones(N), p, labels=[0, 1]))
    assert found["brier"] == pytest.approx(sklearn_metrics.brier_score_loss(np.ones(N), p, pos_label=1))
    assert found["accuracy"] == sklearn_metrics.accuracy_score(np.ones(N), p > 0.5)


def test_calibration_by_plain_loops():
    """15 bins of (almost) equal size over c = max(P, 1 - P), lowest first."""
    found = arm_metrics(TEST, VALIDATION)
    for suffix, t in (("", 1.0), ("_calibrated", found["temperature"])):
        pairs = sorted((max(p, 1 - p), p > 0.5) for p in 1 / (1 + np.exp(-TEST.margins / t)))
        error, start = 0.0, 0
        for k in range(15):
            size = N // 15 + (k < N % 15)
            part, start = pairs[start : start + size], start + size
            error += abs(sum(right for _, right in part) - sum(c for c, _ in part)) / N
        assert start == N
        assert found[f"ece{suffix}"] == pytest.approx(error)


def test_temperature_comes_from_validation_alone():
    found = arm_metrics(TEST, VALIDATION)
    grid = np.geomspace(0.05, 100, 20_001)
    losses = [np.logaddexp(0, -VALIDATION.margins / t).mean() for t in grid]
    assert found["temperature"] == pytest.approx(grid[np.argmin(losses)], rel=1e-3)
    assert found["temperature_at_bound"] is False
    assert arm_metrics(made(50, 9), VALIDATION)["temperature"] == found["temperature"]
    always_right = Scores(np.tile([0.0, -3.0], (9, 1)), np.tile([-3.0, 0.0], (9, 1)))
    bound = arm_metrics(TEST, always_right)
    assert (bound["temperature"], bound["temperature_at_bound"]) == (0.05, True)
    # On its own rows the fitted temperature never does worse than none.
    own = arm_metrics(VALIDATION, VALIDATION)
    assert own["nll_calibrated"] <= own["nll"]


def test_the_other_film_preferred_turns_accuracy_round():
    found, turned = arm_metrics(TEST, VALIDATION), arm_metrics(swapped(TEST), VALIDATION)
    assert swapped(TEST).margins == pytest.approx(-TEST.margins)
    for name in ("accuracy", "accuracy_single_order", "auc"):
        assert turned[name] == pytest.approx(1 - found[name])
    for name in ("confidence", "mean_margin", "confidence_single_order"):
        assert turned[name] == pytest.approx(-found[name])
    for name in ("flip_rate", "answer_mass", "ties"):
        assert turned[name] == pytest.approx(found[name])
    assert turned["accuracy_preferred_first"] == pytest.approx(1 - found["accuracy_preferred_second"])
    assert turned["accuracy_ci95"] == pytest.approx([1 - x for x in reversed(found["accuracy_ci95"])])


def test_the_order_of_the_rows_decides_nothing():
    order = np.random.default_rng(0).permutation(N)
    shuffled = arm_metrics(Scores(TEST.logp_a[order], TEST.logp_b[order]), VALIDATION)
    for name, value in arm_metrics(TEST, VALIDATION).items():
        if isinstance(value, float):
            assert shuffled[name] == pytest.approx(value, rel=1e-12), name


def test_an_arm_that_always_says_a_is_at_one_half():
    always_a = Scores(np.full((40, 2), math.log(0.9)), np.full((40, 2), math.log(0.1)))
    found = arm_metrics(always_a, always_a)
    assert found["accuracy"] == found["accuracy_single_order"] == found["auc"] == 0.5
    assert (found["accuracy_preferred_first"], found["accuracy_preferred_second"]) == (1, 0)
    assert (found["flip_rate"], found["ties"], found["confidence"]) == (1, 40, 0)
    assert found["answer_mass"] == pytest.approx(1)


def test_ties_are_half_right():
    a = np.array([[0.0, 0.0], [-1.0, -2.0], [-2.0, -1.0]])
    b = np.array([[0.0, 0.0], [-2.0, -1.0], [-1.0, -2.0]])
    found = arm_metrics(Scores(a, b), VALIDATION)
    assert (found["accuracy"], found["ties"], found["flip_rate"]) == (0.5, 1, 0)


def test_huge_margins_are_finite():
    with np.errstate(over="raise"):
        assert probability(np.array([-1e4, -800.0, 0.0, 800.0])).tolist() == [0, 0, 0.5, 1]
        far = Scores(np.array([[0.0, -2000.0]] * 3), np.array([[-2000.0, 0.0]] * 3))
        numbers = [v for v in arm_metrics(swapped(far), VALIDATION).values() if isinstance(v, float)]
    assert np.isfinite(numbers).all()


def test_baseline_metrics():
    found = baseline_metrics(np.array([2.0, -1.0, 0.0, 0.0, 5.0]))
    assert found["accuracy"] == pytest.approx((1 + 0 + 0.5 + 0.5 + 1) / 5)
    assert found["accuracy_ci95"][0] < 0.6 < found["accuracy_ci95"][1]
    assert baseline_metrics(np.zeros(7))["accuracy"] == 0.5


def test_flipped_by_hand():
    a = np.array([[0.0, 0.0], [0.0, -3.0], [-3.0, 0.0], [0.0, 0.0], [-3.0, -3.0]])
    b = np.array([[-3.0, -3.0], [-3.0, 0.0], [0.0, -3.0], [0.0, 0.0], [0.0, 0.0]])
    # always A; right twice; wrong twice; tied twice; always B
    assert flipped(Scores(a, b)).tolist() == [True, False, False, False, True]


# Secondary tests


def test_secondary_tests_are_dpo_less_sft():
    n, users = 300, [str(i) for i in range(300)]
    arms = {"sft": made(n, 3, 0.4), "dpo": made(n, 4, 1.2, 0.1), "sft-more": made(n, 5, 0.6)}
    numbers = {arm: arm_metrics(scores, VALIDATION) for arm, scores in arms.items()}
    control = (users[:200], {"sft": made(200, 6, 0.1), "dpo": made(200, 7, 0.5)})
    found = {test["test"]: test for test in secondary_tests(arms, numbers, users, 0, {"swapped-user": control})}
    for name in ("confidence", "brier_calibrated", "flip_rate"):
        assert found[name]["difference"] == pytest.approx(numbers["dpo"][name] - numbers["sft"][name]), name
    expected = numbers["dpo"]["accuracy"] - numbers["sft-more"]["accuracy"]
    assert found["accuracy_against_sft_more"]["difference"] == pytest.approx(expected)
    gain = [correctness(control[1][arm].margins).mean() for arm in ("sft", "dpo")]
    assert found["accuracy_on_swapped-user"]["difference"] == pytest.approx(gain[1] - gain[0])
    assert found["confidence"]["p_value"] < 0.001 and found["flip_rate"]["p_value"] < 0.001
    assert found["flip_rate"]["difference"] < 0 < found["confidence"]["difference"]
    # Holm by hand: the k-th smallest p times the number of tests left, never below the one before.
    ordered = sorted(found.values(), key=lambda test: test["p_value"])
    running = 0.0
    for k, test in enumerate(ordered):
        running = max(running, min(1.0, test["p_value"] * (len(ordered) - k)))
        assert test["p_holm"] == pytest.approx(running)


def test_secondary_tests_of_one_arm_against_itself():
    arms = {"sft": TEST, "dpo": TEST}
    numbers = {arm: arm_metrics(TEST, VALIDATION) for arm in arms}
    for test in secondary_tests(arms, numbers, [str(i) for i in range(N)], 0, {}):
        assert (test["difference"], test["p_value"], test["p_holm"]) == (0, 1, 1)


# predictions.parquet


@pytest.fixture
def predictions(tmp_path, comparisons):
    rows = [replace(c, line=3 * c.line) for c in comparisons(20, rows_per_user=2)]
    arms = {"base": made(20, 1), "sft": made(20, 2), "dpo": made(20, 3)}
    write_predictions(tmp_path / "predictions.parquet", rows, arms)
    return tmp_path / "predictions.parquet", rows, arms


def test_predictions_round_trip(predictions):
    path, rows, arms = predictions
    back = read_predictions(path, rows)
    assert list(back) == ["base", "sft", "dpo"]
    for arm, scores in arms.items():
        assert np.array_equal(back[arm].logp_a, scores.logp_a) and np.array_equal(back[arm].logp_b, scores.logp_b)
    order = np.random.default_rng(0).permutation(20)[:13]
    some = read_predictions(path, [rows[i] for i in order])
    assert np.array_equal(some["dpo"].logp_b, arms["dpo"].logp_b[order])
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_predictions_are_as_the_contract_says(predictions):
    path, rows, arms = predictions
    table = pq.read_table(path)
    assert table.column_names == ["arm", "comparison", "user", "order", "logp_a", "logp_b", "preferred"]
    assert (table.schema.field("comparison").type, table.schema.field("logp_a").type) == (pa.int64(), pa.float64())
    assert table.num_rows == 3 * 20 * 2
    by_line = {c.line: c for c in rows}
    keys = set()
    for r in table.to_pylist():
        keys.add((r["arm"], r["comparison"], r["order"]))
        assert r["user"] == by_line[r["comparison"]].cluster
        assert r["preferred"] == {"preferred_first": "A", "preferred_second": "B"}[r["order"]]
        i, column = rows.index(by_line[r["comparison"]]), int(r["order"] == "preferred_second")
        assert (r["logp_a"], r["logp_b"]) == (arms[r["arm"]].logp_a[i, column], arms[r["arm"]].logp_b[i, column])
    assert len(keys) == 120


def test_accuracy_can_be_recomputed_from_the_file(predictions):
    """As a reader would, from the columns alone."""
    path, _, arms = predictions
    for arm, scores in arms.items():
        margins: dict[int, float] = {}
        for r in pq.read_table(path).to_pylist():
            if r["arm"] == arm:
                sign = 1 if r["preferred"] == "A" else -1
                margins[r["comparison"]] = margins.get(r["comparison"], 0) + sign * (r["logp_a"] - r["logp_b"]) / 2
        accuracy = sum(m > 0 for m in margins.values()) / len(margins)
        assert arm_metrics(scores, VALIDATION)["accuracy"] == pytest.approx(accuracy)


def test_broken_predictions_are_one_line(predictions, comparisons):
    path, rows, _ = predictions
    with pytest.raises(UserError, match=r"predictions\.parquet: holds no .*999.*; evaluate again"):
        read_predictions(path, [*rows, replace(rows[0], line=999)])
    pq.write_table(pq.read_table(path).drop_columns(["arm"]), path)
    with pytest.raises(UserError, match=r"predictions\.parquet: holds no arm; evaluate again"):
        read_predictions(path, rows)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(UserError, match=r"predictions\.parquet: cannot be read"):
        read_predictions(path, rows)
    path.unlink()
    with pytest.raises(UserError, match=r"predictions\.parquet: cannot be read"):
        read_predictions(path, rows)
