"""statistics.py against scipy, scikit-learn, plain loops, full enumeration and values by hand.

Tolerances of simulated shares are four binomial standard errors of the number of replications.
"""

import itertools
import math
import subprocess
import sys
import time
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, special
from scipy import stats as scipy_stats
from sklearn import metrics

from quantpref import power, statistics
from quantpref.power import (
    chance_of_supported,
    chance_of_supported_observed,
    comparisons_needed,
    minimum_detectable_effect_pp,
)
from quantpref.statistics import (
    auc,
    brier,
    confidence,
    correctness,
    design_effect,
    ece,
    fit_temperature,
    fold_differences_pp,
    holm,
    mcnemar_p,
    nll,
    paired_bootstrap,
    paired_test,
    reliability_bins,
    sign_flip_p,
    user_folds,
    wilson_interval,
)


def four_errors(share, replications):
    return 4 * math.sqrt(share * (1 - share) / replications)


def outcomes(rng, n, discordance, gain=0.0):
    """Differences (n,) of -1, 0, 1 with this discordance and true gain."""
    chances = [(discordance - gain) / 2, 1 - discordance, (discordance + gain) / 2]
    return rng.choice([-1.0, 0.0, 1.0], n, p=chances)


def arms(differences):
    """Correctness of two arms that differ so: right together where they agree."""
    return (differences <= 0).astype(float), (differences >= 0).astype(float)


def clustered(rng, users, per_user, discordance, concentration=0.5, bias=0.0):
    """Differences by user whose discordant comparisons mostly go one way (no gain at bias 0)."""
    lean = rng.beta(concentration, concentration, users)[:, None] + bias
    wins = rng.random((users, per_user)) < lean
    discordant = rng.random((users, per_user)) < discordance
    names = np.repeat(np.arange(users), per_user)
    return np.where(discordant, np.where(wins, 1.0, -1.0), 0.0).ravel(), names


# Scores of one arm


def test_scores_of_hand_computed_margins():
    margins = [math.log(3), 0, -math.log(3), math.log(9)]  # P = 0.75, 0.5, 0.25, 0.9
    assert correctness(margins).tolist() == [1, 0.5, 0, 1]
    assert confidence(margins) == pytest.approx((0.5 + 0 - 0.5 + 0.8) / 4)
    assert brier(margins) == pytest.approx((0.0625 + 0.25 + 0.5625 + 0.01) / 4)
    assert nll(margins) == pytest.approx(-math.log(0.75 * 0.5 * 0.25 * 0.9) / 4)


def test_scores_match_scikit_learn_and_survive_extreme_margins():
    margins = np.random.default_rng(1).normal(0.5, 3, 400)
    p, right = special.expit(margins), np.ones(400)
    assert brier(margins) == pytest.approx(metrics.brier_score_loss(right, p, pos_label=1))
    assert nll(margins) == pytest.approx(metrics.log_loss(right, p, labels=[0, 1]))
    assert confidence(margins) == pytest.approx(np.mean(2 * p - 1))
    with np.errstate(all="raise", under="ignore"):
        assert nll([-1e4, 1e4]) == 5000
        assert brier([-1e4, 1e4]) == 0.5
        assert confidence([-1e4, 1e4]) == 0


@pytest.mark.parametrize("score", [correctness, confidence, brier, nll, ece, fit_temperature])
@pytest.mark.parametrize("margins", [[], [0.1, math.nan], [math.inf]])
def test_scores_refuse_nothing_and_non_finite(score, margins):
    with pytest.raises(ValueError, match="margins"):
        score(margins)


def test_auc_is_the_share_of_pairs_in_order_with_ties_half():
    rng = np.random.default_rng(2)
    score, label = rng.integers(-3, 4, 60).astype(float), rng.random(60) < 0.4
    pairs = [(a > b) + 0.5 * (a == b) for a in score[label] for b in score[~label]]
    assert auc(score, label) == pytest.approx(sum(pairs) / len(pairs))
    assert auc(-score, label) == pytest.approx(1 - sum(pairs) / len(pairs))
    with pytest.raises(ValueError, match="B is"):
        auc([1.0, 2.0], [True, True])


def test_ece_by_hand():
    # c = 0.6, 0.7, 0.8, 0.9; right = 1, 0, tie, 1; bins of two: |0.5 - 0.65|, |0.75 - 0.85|
    c, direction = np.array([0.6, 0.7, 0.8, 0.9]), np.array([1, -1, 1, 1])
    margins = special.logit(c) * direction
    assert ece(margins, bins=2) == pytest.approx((2 * 0.15 + 2 * abs(1.0 - 0.85)) / 4)
    assert ece([0.0, 0.0, 0.0]) == 0  # ties: c = 0.5, half right


def test_ece_and_its_bins_match_a_plain_loop():
    margins = np.random.default_rng(3).normal(0.4, 1.5, 1000)  # no two share a c
    rows = sorted((max(p := 1 / (1 + math.exp(-m)), 1 - p), float(m > 0)) for m in margins)
    expected, start = 0.0, 0
    for b in range(15):
        part = rows[start : start + (67 if b < 1000 % 15 else 66)]
        start += len(part)
        gap = sum(r for _, r in part) / len(part) - sum(c for c, _ in part) / len(part)
        expected += len(part) / 1000 * abs(gap)
    assert start == 1000
    assert ece(margins) == pytest.approx(expected)
    table = reliability_bins(margins)
    assert table.size.tolist() == [67] * 10 + [66] * 5
    assert table.confidence[0] == pytest.approx(np.mean([c for c, _ in rows[:67]]))
    assert table.share_right[-1] == pytest.approx(np.mean([r for _, r in rows[-66:]]))
    assert (np.diff(table.confidence) > 0).all()


@given(st.lists(st.sampled_from([-40.0, -2.0, -1.0, 0.0, 1.0, 2.0, 50.0]), min_size=1), st.randoms())
@settings(max_examples=60, deadline=None)
def test_reliability_bins_ignore_row_order_even_where_c_ties(margins, random):
    shuffled = random.sample(margins, len(margins))
    for ours, theirs in zip(reliability_bins(margins), reliability_bins(shuffled), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    table = reliability_bins(margins)
    assert table.size.sum() == len(margins) and table.size.min() >= 1
    assert np.ptp(table.size) <= 1 and len(table.size) == min(15, len(margins))
    # Sharing rightness among equal c moves none of it: the overall share right is kept.
    overall = np.average(table.share_right, weights=table.size)
    assert overall == pytest.approx(correctness(margins).mean())


def test_temperature_by_hand_and_against_a_general_optimiser():
    assert fit_temperature([2, 2, 2, -2]) == (pytest.approx(2 / math.log(3)), False)  # P = 3/4
    margins = np.random.default_rng(4).normal(1, 4, 500)
    best = optimize.minimize_scalar(
        lambda t: np.mean(np.log1p(np.exp(-margins / t))), bounds=(0.05, 100), method="bounded"
    )
    temperature, at_bound = fit_temperature(margins)
    assert not at_bound
    assert temperature == pytest.approx(best.x, rel=1e-3)
    assert nll(margins / temperature) <= best.fun + 1e-12


def test_temperature_undoes_a_known_scale():
    rng = np.random.default_rng(5)
    true = rng.normal(0, 2, 40_000)
    margins = np.where(rng.random(40_000) < special.expit(true), true, -true)  # calibrated
    assert fit_temperature(margins)[0] == pytest.approx(1, abs=0.05)
    assert fit_temperature(3 * margins)[0] == pytest.approx(3, abs=0.15)


def test_temperature_says_when_it_hits_a_bound():
    assert fit_temperature([1.0, 2.0, 3.0]) == (0.05, True)
    assert fit_temperature([300.0, 800.0]) == (0.05, True)  # slope underflows to 0
    assert fit_temperature([1.0, -2.0]) == (100.0, True)  # worse than a coin
    assert fit_temperature([0.0, 0.0]) == (1.0, False)


@pytest.mark.parametrize(("k", "n"), [(0, 1), (1, 1), (0, 40), (40, 40), (3, 10), (948, 1208)])
def test_wilson_matches_scipy(k, n):
    interval = scipy_stats.binomtest(k, n).proportion_ci(0.95, method="wilson")
    assert wilson_interval(k, n) == pytest.approx((interval.low, interval.high), abs=1e-12)


def test_wilson_with_ties_solves_the_score_equation():
    for bound in wilson_interval(2.5, 10):  # |p_hat - p| = z sqrt(p (1 - p) / n) at both ends
        assert abs(0.25 - bound) == pytest.approx(1.959963985 * math.sqrt(bound * (1 - bound) / 10))
    for k, n in ((11, 10), (-1, 10), (0, 0)):
        with pytest.raises(ValueError, match="wilson"):
            wilson_interval(k, n)


# Paired tests


def test_mcnemar_is_the_binomial_test():
    grid = [*itertools.product(range(12), range(12)), (80, 120), (500, 400), (0, 60)]
    for wins, losses in grid:
        expected = 1.0
        if wins + losses:
            expected = scipy_stats.binomtest(wins, wins + losses, 0.5).pvalue
        assert mcnemar_p(wins, losses) == pytest.approx(expected, rel=1e-9), (wins, losses)
    assert mcnemar_p([1, 8], [9, 2]).tolist() == pytest.approx([22 / 1024, 112 / 1024])


def test_ties_leave_the_table_but_count_half_in_the_difference():
    reference = [1, 0, 0, 0, 0.5, 1, 0]
    candidate = [0, 1, 1, 1, 1.0, 0.5, 0]
    result = paired_test(reference, candidate, range(7))
    assert result.test == "exact McNemar"
    assert (result.wins, result.losses) == (3, 1)
    assert result.p_value == result.mcnemar_p == 0.625  # 2 (1 + 4) / 16
    assert result.difference_pp == pytest.approx(100 * (4.5 - 2.5) / 7)
    assert result.discordance == pytest.approx((4 + 2 * 0.25) / 7)
    assert result.seed_differences_pp == (result.difference_pp,)


def test_several_comparisons_of_a_user_take_the_sign_flip_test():
    rng = np.random.default_rng(6)
    differences, users = clustered(rng, 30, 4, 0.4)
    result = paired_test(*arms(differences), users, seed=9)
    assert result.test == "user-level sign-flip"
    assert result.p_value == sign_flip_p(differences, users, seed=9)
    wins, losses = int((differences > 0).sum()), int((differences < 0).sum())
    assert (result.wins, result.losses) == (wins, losses)
    expected = scipy_stats.binomtest(wins, wins + losses).pvalue
    assert result.mcnemar_p == pytest.approx(expected)
    assert result.mcnemar_p != result.p_value
    once_twice = paired_test([1, 0, 1], [0, 0, 1], ["a", "b", "b"])
    assert once_twice.test == "user-level sign-flip"  # one user with two is enough
    low, high = paired_bootstrap(differences, users, seed=9)
    assert result.ci95_pp == (100 * low, 100 * high)


def test_difference_of_exactly_two_points_is_exactly_two():
    # 0.06 - 0.04 is not 0.02 in floats: the verdict compares with > 2.
    differences = np.repeat([1.0, -1.0, 0.0], [120, 80, 1800])
    assert paired_test(*arms(differences), range(2000)).difference_pp == 2.0


def test_paired_test_refuses_other_shapes_and_values():
    with pytest.raises(ValueError, match="one shape"):
        paired_test([1, 0], [1, 0, 1], range(2))
    with pytest.raises(ValueError, match="0.5"):
        paired_test([1, 0.3], [1, 0], range(2))
    with pytest.raises(ValueError, match="users"):
        paired_test([1, 0], [1, 0], range(3))
    with pytest.raises(ValueError, match="finite"):
        paired_test([1, math.nan], [1, 0], range(2))


def test_sign_flip_matches_full_enumeration():
    rng = np.random.default_rng(7)
    users = np.repeat(np.arange(10), [1, 2, 3, 4, 5, 1, 2, 3, 4, 5])
    differences = rng.choice([-1, -0.5, 0, 0.5, 1], 30, p=[0.1, 0.1, 0.3, 0.2, 0.3])
    sums = [sum(differences[users == user]) for user in range(10)]
    flips = [
        abs(sum(s * x for s, x in zip(signs, sums, strict=True))) for signs in itertools.product([-1, 1], repeat=10)
    ]
    exact = np.mean([flip >= abs(sum(sums)) for flip in flips])
    assert 0.02 < exact < 0.5  # a case that can tell right from wrong
    p = sign_flip_p(differences, users)
    assert p == pytest.approx(exact, abs=four_errors(exact, 10_000))


def test_sign_flip_is_never_zero_and_has_the_plus_one():
    assert sign_flip_p(np.ones(60), range(60)) == 1 / 10_001
    assert sign_flip_p(np.ones(60), range(60), permutations=99) == 1 / 100
    assert sign_flip_p(np.zeros(5), range(5)) == 1
    assert sign_flip_p([0.3], [1]) == 1  # one user: both flips are as extreme
    assert sign_flip_p([0.1, 0.2, -0.3], range(3)) == 1  # a sum that only rounding keeps off 0


def loop_bootstrap(differences, users, rng, resamples):
    """The plain version: draw seeds and users, concatenate their rows, take the mean."""
    differences = np.atleast_2d(differences)
    rows = [np.flatnonzero(users == user) for user in np.unique(users)]
    means = []
    for _ in range(resamples):
        seeds = rng.integers(0, len(differences), len(differences))
        drawn = np.concatenate([rows[i] for i in rng.integers(0, len(rows), len(rows))])
        means.append(differences[seeds][:, drawn].mean())
    return np.quantile(means, [0.025, 0.975])


@pytest.mark.parametrize("case", ["few kinds of users", "continuous", "three seeds"])
def test_bootstrap_matches_a_plain_loop(case):
    rng = np.random.default_rng(8)
    users = np.repeat(np.arange(80), rng.integers(1, 9, 80))
    differences = rng.normal(0.1, 0.3, len(users)) + 0.5 * rng.normal(size=80)[users]
    if case == "few kinds of users":
        users = np.arange(len(users))
        differences = np.sign(np.round(differences))
    if case == "three seeds":
        differences = np.array([differences, differences + 0.6, -differences])
    low, high = paired_bootstrap(differences, users)
    expected = loop_bootstrap(differences, users, rng, 2_000)
    # An end point's Monte Carlo error over 2,000 resamples is about 6 % of a standard error.
    width = expected[1] - expected[0]
    assert (low, high) == pytest.approx(tuple(expected), abs=0.06 * width)


def test_bootstrap_resamples_users_and_not_rows():
    rng = np.random.default_rng(9)
    once = rng.normal(size=200)
    low, high = paired_bootstrap(np.repeat(once, 10), np.repeat(np.arange(200), 10))
    low_1, high_1 = paired_bootstrap(once, np.arange(200))
    assert high - low == pytest.approx(high_1 - low_1, rel=0.06)  # ten copies tell nothing new
    assert high_1 - low_1 == pytest.approx(2 * 1.96 * once.std() / math.sqrt(200), rel=0.06)


def test_bootstrap_divides_by_the_comparisons_drawn():
    users = np.repeat(np.arange(20), np.arange(1, 21))
    assert paired_bootstrap(np.ones(210), users) == (1.0, 1.0)


def test_bootstrap_is_seeded_and_bounded_in_memory():
    differences, users = np.random.default_rng(10).normal(size=6_040), np.arange(6_040)
    tracemalloc.start()
    first = paired_bootstrap(differences, users, seed=1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 150e6  # all indices at once would be 480 MB
    assert first == paired_bootstrap(differences, users, seed=1)
    assert first != paired_bootstrap(differences, users, seed=2)


@pytest.mark.parametrize("block", [7, 1000])
def test_results_in_blocks_are_those_in_one_block(monkeypatch, block):
    rng = np.random.default_rng(11)
    differences, users = clustered(rng, 40, 3, 0.5, bias=0.1)
    low, high = paired_bootstrap(differences, users)
    p = sign_flip_p(differences, users)
    chance = chance_of_supported_observed(8, differences, users)
    monkeypatch.setattr(statistics, "BLOCK", block * 40)
    monkeypatch.setattr(power, "BLOCK", block * 40)
    width = high - low
    assert paired_bootstrap(differences, users) == pytest.approx((low, high), abs=0.05 * width)
    assert sign_flip_p(differences, users) == pytest.approx(p, abs=2 * four_errors(p, 10_000))
    again = chance_of_supported_observed(8, differences, users)
    assert again == pytest.approx(chance, abs=2 * four_errors(chance, 2_000))


def test_several_seeds():
    rng = np.random.default_rng(12)
    reference = np.array([arms(outcomes(rng, 300, 0.2))[0] for _ in range(3)])
    candidate = np.minimum(1, reference + (rng.random((3, 300)) < 0.1))
    result = paired_test(reference, candidate, range(300))
    by_seed = 100 * (candidate - reference).mean(axis=1)
    assert result.seed_differences_pp == pytest.approx(tuple(by_seed))
    assert result.difference_pp == pytest.approx(by_seed.mean())
    assert (result.test, result.mcnemar_p) == ("user-level sign-flip", None)
    assert result.wins is None and result.losses is None
    assert result.p_value == sign_flip_p((candidate - reference).mean(axis=0), range(300))
    assert result.discordance == pytest.approx(np.mean((candidate - reference).mean(axis=0) ** 2))


def test_the_interval_of_several_seeds_holds_the_spread_between_seeds():
    users, none = np.arange(500), np.zeros(500)
    low, high = paired_bootstrap([none, none + 0.1], users)  # nothing varies but the seed
    assert (low, high) == pytest.approx((0.0, 0.1))
    same = np.random.default_rng(13).normal(size=500)
    alone, twice = paired_bootstrap(same, users), paired_bootstrap([same, same], users)
    assert twice == pytest.approx(alone, abs=0.01)  # a copied seed adds and removes nothing


seeds_strategy = st.integers(0, 2**32 - 1)


@given(seeds_strategy, st.integers(1, 40), st.integers(1, 40), st.integers(1, 3))
@settings(max_examples=60, deadline=None)
def test_exchanged_arms_negate_the_result_and_keep_p(seed, n, n_users, runs):
    rng = np.random.default_rng(seed)
    first, second = rng.choice([0, 0.5, 1], (2, runs, n))
    users = rng.integers(0, n_users, n)
    one = paired_test(first, second, users, resamples=200)
    other = paired_test(second, first, users, resamples=200)
    assert other.difference_pp == -one.difference_pp
    assert other.p_value == one.p_value and other.mcnemar_p == one.mcnemar_p
    assert (other.wins, other.losses) == (one.losses, one.wins)
    assert other.seed_differences_pp == tuple(-x for x in one.seed_differences_pp)
    if one.difference_pp:
        assert other.ci95_pp == (-one.ci95_pp[1], -one.ci95_pp[0])


@given(seeds_strategy, st.integers(1, 40), st.integers(1, 40))
@settings(max_examples=60, deadline=None)
def test_row_order_and_user_names_do_not_matter(seed, n, n_users):
    rng = np.random.default_rng(seed)
    first, second = rng.choice([0, 0.5, 1], (2, n))
    users, order = rng.integers(0, n_users, n), rng.permutation(n)
    names = np.array([f"user {code}" for code in rng.permutation(n_users)])
    plain = paired_test(first, second, users, resamples=200)
    shuffled = paired_test(first[order], second[order], names[users][order], resamples=200)
    assert shuffled.design_effect == pytest.approx(plain.design_effect)
    for field in ("difference_pp", "ci95_pp", "p_value", "test", "wins", "losses", "discordance"):
        assert getattr(shuffled, field) == getattr(plain, field), field


@given(seeds_strategy, st.integers(1, 30), st.booleans(), st.integers(1, 3))
@settings(max_examples=40, deadline=None)
def test_identical_arms_differ_by_exactly_nothing(seed, n, alone, runs):
    rng = np.random.default_rng(seed)
    correct = rng.choice([0, 0.5, 1], (runs, n))
    users = np.arange(n) if alone else rng.integers(0, 4, n)
    result = paired_test(correct, correct, users, resamples=100)
    assert (result.difference_pp, result.ci95_pp, result.p_value) == (0, (0, 0), 1)
    assert (result.discordance, result.design_effect) == (0, 1)


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]).tolist() == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]).tolist() == [1, 1]
    assert holm([]).tolist() == []
    with pytest.raises(ValueError, match="holm"):
        holm([0.1, math.nan])


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8), st.floats(0.001, 0.999))
def test_holm_rejects_what_the_step_down_procedure_rejects(p_values, alpha):
    rejected, remaining = set(), sorted(range(len(p_values)), key=p_values.__getitem__)
    while remaining and p_values[remaining[0]] * len(remaining) <= alpha:
        rejected.add(remaining.pop(0))
    ties = {i for i in range(len(p_values)) if any(p_values[i] == p_values[j] for j in rejected)}
    ours = {i for i, p in enumerate(holm(p_values)) if p <= alpha}
    assert rejected <= ours <= rejected | ties


def test_design_effect():
    rng = np.random.default_rng(14)
    once = rng.normal(size=300)
    assert design_effect(once, range(300)) == 1
    assert design_effect(np.zeros(6), [0, 0, 1, 1, 2, 2]) == 1
    assert design_effect([1.0, 0.0], ["a", "a"]) == 1  # one user: no ratio to take
    copies = design_effect(np.repeat(once, 4), np.repeat(np.arange(300), 4))
    assert copies == pytest.approx(4 * (300 / 299) / (1200 / 1199))
    # Independent rows in clusters: 1 but for noise. Equicorrelated: 1 + (m - 1) rho (Kish).
    users = np.repeat(np.arange(2000), 5)
    independent = rng.normal(size=10_000)
    assert design_effect(independent, users) == pytest.approx(1, abs=0.15)
    shared = math.sqrt(0.3) * rng.normal(size=2000)[users] + math.sqrt(0.7) * independent
    assert design_effect(shared, users) == pytest.approx(1 + 4 * 0.3, abs=0.3)


def test_folds_are_disjoint_balanced_and_blind_to_row_order():
    rng = np.random.default_rng(15)
    users = rng.choice([f"u{i}" for i in range(60)], 400)
    folds = user_folds(users)
    assert all(len(set(folds[users == user])) == 1 for user in set(users))
    assert set(folds) == set(range(5))
    sizes = np.bincount(folds)
    assert np.ptp(sizes) <= 2  # 400 comparisons, small users last
    order = rng.permutation(400)
    np.testing.assert_array_equal(user_folds(users[order]), folds[order])
    assert (user_folds(users, seed=1) != folds).any()
    one_each = np.bincount(user_folds(range(1208)))
    assert sorted(one_each) == [241, 241, 242, 242, 242]
    np.testing.assert_array_equal(  # numbers and their text are the same users
        user_folds(range(50)), user_folds([str(i) for i in range(50)])
    )
    shuffled = user_folds(range(1000))
    assert abs(np.corrcoef(shuffled, np.arange(1000))[0, 1]) < 0.15  # not in blocks of names
    with pytest.raises(ValueError, match="5 folds need 5 users or more, got 4"):
        user_folds(["a", "b", "c", "d", "d", "d"])


def test_fold_differences():
    differences, folds = [1, 0, -1, 1, 0.5], [0, 0, 1, 2, 2]
    assert fold_differences_pp(differences, folds) == (50, -100, 75)
    assert fold_differences_pp([differences, [0, 0, 1, 1, 0.5]], folds) == (25, 0, 75)


# Power


def test_the_protocols_numbers():
    found = [round(minimum_detectable_effect_pp(n, 0.15), 1) for n in (100, 1208, 2000)]
    assert found == [10.7, 3.1, 2.4]
    assert comparisons_needed(2, 0.15) == 2941


@given(st.integers(4, 10_000), st.floats(0, 1), st.floats(0.5, 4))
@settings(deadline=None)
def test_effect_and_number_are_inverse(n, discordance, design):
    effect = minimum_detectable_effect_pp(n, discordance, design)
    if effect < 100:
        assert comparisons_needed(effect, discordance, design) == pytest.approx(n, abs=1.001)
        larger = minimum_detectable_effect_pp(2 * n, discordance, design)
        assert larger < effect


def test_power_where_the_discordance_is_small_or_none():
    # All discordant pairs favour one arm: n = (z_a + z_b sqrt(1 - d))^2 / d.
    expected = (1.959964 + 0.841621 * math.sqrt(0.98)) ** 2 / 0.02
    assert comparisons_needed(2, 0) == comparisons_needed(2, 0.01) == math.ceil(expected)
    assert minimum_detectable_effect_pp(math.ceil(expected), 0) == pytest.approx(2, abs=0.01)
    assert minimum_detectable_effect_pp(3, 0.5) == 100  # not even 3 of 3 is significant
    assert comparisons_needed(2, 0.15, design_effect=2) in (5881, 5882)
    for arguments in ((0, 0.1), (2, 1.1), (2, -0.1), (101, 0.1), (2, 0.1, 0), (2, math.nan)):
        with pytest.raises(ValueError):
            comparisons_needed(*arguments)
    with pytest.raises(ValueError):
        minimum_detectable_effect_pp(0, 0.1)


@pytest.mark.parametrize(("n", "discordance"), [(2000, 0.15), (400, 0.3), (1000, 0.005)])
def test_the_minimum_detectable_effect_has_80_percent_power(n, discordance):
    gain = minimum_detectable_effect_pp(n, discordance) / 100
    psi, rng = max(discordance, gain), np.random.default_rng(16)
    counts = rng.multinomial(n, [(psi + gain) / 2, (psi - gain) / 2, 1 - psi], 20_000)
    wins, losses = counts[:, 0], counts[:, 1]
    p = 2 * scipy_stats.binom.cdf(np.minimum(wins, losses), wins + losses, 0.5)
    # 0.012 Monte Carlo, and the exact test is up to a few points weaker than the formula's.
    assert 0.75 < np.mean((p < 0.05) & (wins > losses)) < 0.812


def independent_rule(differences, users):
    """SUPPORTED, by an implementation of its own (two-sided p from scipy or a t test)."""
    names = np.unique(users)
    sums = np.array([differences[users == name].sum() for name in names])
    if len(names) == len(users):
        wins, losses = int((differences > 0).sum()), int((differences < 0).sum())
        p = scipy_stats.binomtest(wins, wins + losses).pvalue if wins + losses else 1.0
    else:
        p = scipy_stats.ttest_1samp(sums, 0).pvalue
    parts = np.array_split(np.random.default_rng(0).permutation(len(names)), 5)
    positive = all(sums[part].sum() > 0 for part in parts)
    return differences.mean() > 0.02 and p < 0.05 and positive


@pytest.mark.parametrize(("n", "gain"), [(400, 5), (1208, 3), (100, 12)])
def test_chance_of_supported_matches_whole_experiments(n, gain):
    rng, users = np.random.default_rng(17), np.arange(n)
    found = [independent_rule(outcomes(rng, n, 0.15, gain / 100), users) for _ in range(300)]
    chance = chance_of_supported(gain, n, 0.15)
    assert 0.1 < chance < 0.9
    assert np.mean(found) == pytest.approx(chance, abs=four_errors(chance, 300))


def test_chance_of_supported_matches_an_exact_sum():
    # 300 users, discordance = gain = 2 %: wins only, Binomial(60, 0.02) in each fold. SUPPORTED
    # needs one or more in every fold and more than 6, for which p < 0.05 (6 of 6 has 0.031).
    fold = scipy_stats.binom.pmf(np.arange(61), 60, 0.02)
    fold[0] = 0
    total = fold
    for _ in range(4):
        total = np.convolve(total, fold)
    exact = total[7:].sum()
    found = chance_of_supported(2, 300, 0, replications=200_000)
    assert found == pytest.approx(exact, abs=four_errors(exact, 200_000))
    assert chance_of_supported(100, 9, 0) == 1  # no comparison is left out of the folds


def test_chance_of_supported_at_the_protocols_marks():
    assert chance_of_supported(0, 400, 0.15) < 0.025
    assert chance_of_supported(5, 2000, 0.15) > 0.9
    chances = [chance_of_supported(gain, 1208, 0.15) for gain in (0, 2, 3, 5, 8)]
    assert chances == sorted(chances) and chances[0] < 0.01 and chances[-1] > 0.95
    # Discordance is raised to the gain: at 5 points all pairs favour DPO, folds and p follow.
    assert chance_of_supported(5, 2000, 0) == chance_of_supported(5, 2000, 0.05) > 0.99
    assert chance_of_supported(2, 10_000, 0.02) == pytest.approx(0.5, abs=0.06)
    assert chance_of_supported(5, 400, 0.15, seed=1) != chance_of_supported(5, 400, 0.15, seed=2)
    for arguments in ((-1, 100, 0.1), (2, 0, 0.1), (2, 100, 1.5), (math.nan, 100, 0.1)):
        with pytest.raises(ValueError):
            chance_of_supported(*arguments)


def test_chance_from_single_comparisons_is_the_trinomials():
    differences = np.repeat([1.0, -1.0, 0.0], [40, 35, 425])
    observed = chance_of_supported_observed(5, differences, range(500))
    assert observed == chance_of_supported(5, 500, 0.15)


@pytest.mark.parametrize(("discordance", "gain"), [(0.3, 0.05), (0.3, 0.0), (0.04, 0.1), (0.0, 0.05)])
def test_simulated_users_have_the_gain_and_keep_their_clustering(discordance, gain):
    rng = np.random.default_rng(18)
    differences, users = clustered(rng, 400, 6, discordance, bias=0.2)
    table = np.array(
        [
            [d[d > 0].sum(), -d[d < 0].sum(), (d > 0).sum(), (d < 0).sum(), len(d)]
            for d in (differences[users == user] for user in range(400))
        ]
    ).T
    mass = np.abs(differences).mean()
    turn = min(1.0, gain / mass) if mass else 0.0
    add = max(0.0, gain - mass) / (differences == 0).mean()
    drawn = table[:, rng.integers(0, 400, (500, 400))]
    sums = power._simulated_sums(drawn, turn, add, rng)
    assert sums.mean() / 6 == pytest.approx(gain, abs=0.003)
    if gain == 0:  # wins and losses exchanged by user: the users' second moment stays
        by_user = np.bincount(users, differences)
        assert np.mean(sums**2) == pytest.approx(np.mean(by_user**2), rel=0.03)


def test_chance_with_clusters_matches_whole_experiments():
    rng = np.random.default_rng(19)
    observed, users = clustered(rng, 150, 5, 0.2)
    # True gain of 4 points: losses of the symmetric population become wins.
    found = []
    for _ in range(300):
        differences, _ = clustered(rng, 150, 5, 0.2)
        turned = (differences < 0) & (rng.random(750) < 0.04 / 0.2)
        found.append(independent_rule(np.where(turned, 1.0, differences), users))
    chance = chance_of_supported_observed(4, observed, users)
    # Twice the Monte Carlo error: the observed users are one sample of that population.
    assert np.mean(found) == pytest.approx(chance, abs=2 * four_errors(chance, 300))
    naive = chance_of_supported(4, 750, 0.2)
    assert 0.1 < chance < naive - 0.05  # clustering costs power


def test_chance_with_clusters_where_nothing_differs_or_seeds_are_many():
    users = np.repeat(np.arange(200), 5)
    assert chance_of_supported_observed(5, np.zeros(1000), users) > 0.95
    assert chance_of_supported_observed(0, np.zeros(1000), users) == 0
    rng = np.random.default_rng(20)
    runs = np.array([outcomes(rng, 600, 0.15) for _ in range(3)])
    alone = chance_of_supported_observed(4, runs[0], range(600))
    assert chance_of_supported_observed(4, runs, range(600)) > alone + 0.1  # means vary less


def test_chance_over_many_seeds_matches_whole_experiments():
    # Twenty seeds whose mean difference is +0.1 or -0.1 for every user; true gain 2.5 points.
    rng = np.random.default_rng(24)
    observed = np.tile(rng.choice([-0.1, 0.1], 600), (20, 1))
    d = np.where(rng.random((4_000, 600)) < 0.625, 0.1, -0.1)
    z = d.sum(axis=1) / math.sqrt(600 * 0.01)
    positive = (d.reshape(4_000, 5, 120).sum(axis=2) > 1e-9).all(axis=1)
    share = np.mean((d.mean(axis=1) > 0.02 + 1e-9) & (z > 1.959964) & positive)
    chance = chance_of_supported_observed(2.5, observed, range(600), replications=4_000)
    assert 0.7 < share < 0.95
    assert chance == pytest.approx(share, abs=1.5 * four_errors(share, 4_000))


def test_chance_is_quick():
    differences, users = clustered(np.random.default_rng(21), 1208, 5, 0.15)
    start = time.perf_counter()
    chance_of_supported_observed(3, differences, users)
    chance_of_supported(3, 6040, 0.15)
    assert time.perf_counter() - start < 2


# Short version of the simulations of benchmarks/RESULTS.md


def test_null_experiments_cover_zero_and_are_seldom_supported():
    rng, covered, supported, partly = np.random.default_rng(22), 0, 0, 0
    for _ in range(1000):
        differences = outcomes(rng, 400, 0.15)
        result = paired_test(*arms(differences), range(400))
        folds = fold_differences_pp(differences, user_folds(range(400)))
        covered += result.ci95_pp[0] <= 0 <= result.ci95_pp[1]
        rule = result.difference_pp > 2 and result.p_value < 0.05 and min(folds) > 0
        supported += rule
        partly += result.difference_pp > 0 and not rule
    assert covered / 1000 == pytest.approx(0.95, abs=four_errors(0.95, 1000))
    assert supported / 1000 < 0.025
    assert partly / 1000 == pytest.approx(0.47, abs=four_errors(0.47, 1000))  # "almost half"


def test_correlated_nulls_keep_their_size_where_mcnemar_does_not():
    rng, flips, tables, covered = np.random.default_rng(23), 0, 0, 0
    for _ in range(1000):
        differences, users = clustered(rng, 60, 10, 0.3)
        result = paired_test(*arms(differences), users, resamples=1_000)
        flips += result.p_value < 0.05
        tables += result.mcnemar_p < 0.05
        covered += result.ci95_pp[0] <= 0 <= result.ci95_pp[1]
    assert flips / 1000 == pytest.approx(0.05, abs=four_errors(0.05, 1000))
    assert covered / 1000 == pytest.approx(0.95, abs=four_errors(0.95, 1000))
    assert tables / 1000 > 0.1  # why the sign flip is the test here


def test_importing_leaves_the_slow_libraries_alone():
    code = (
        "import sys, quantpref.statistics; "
        "print([m for m in ('sklearn', 'scipy.stats', 'scipy.optimize', 'torch') "
        "if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)  # noqa: S603
    assert done.stdout.strip() == "[]"


# Found by mutation: changes that no test above noticed.


@pytest.mark.parametrize("wrong", [[0.5, 1.5], [0.5, 2.5], [-0.1, 0.5], [0.2, math.nan]])
def test_holm_refuses_what_is_no_p_value(wrong):
    with pytest.raises(ValueError, match=r"^holm: p values must be in \[0, 1\]$"):
        holm(wrong)


@pytest.mark.parametrize("scale", [0.002, 0.06, 0.09, 55.0, 80.0, 99.0])
def test_temperatures_near_the_bounds_are_found(scale):
    """Margins whose best temperature is `scale`, to within what 4,000 of them can tell, against plain search."""
    rng = np.random.default_rng(5)
    logits = rng.normal(0, 1.5, 4000)
    margins = scale * np.where(rng.random(4000) < special.expit(logits), logits, -logits)
    found, at_bound = fit_temperature(margins)

    def loss(log_t):
        return np.logaddexp(0, -margins / math.exp(log_t)).mean()

    best = optimize.minimize_scalar(
        loss, bounds=(math.log(0.05), math.log(100)), method="bounded", options={"xatol": 1e-9}
    )
    assert found == pytest.approx(math.exp(best.x), rel=1e-3)
    assert at_bound == (scale < 0.05)


def test_design_effect_of_a_lopsided_difference():
    """Differences with a mean that is not zero: by the definition, cluster by cluster."""
    rng = np.random.default_rng(9)
    users = [f"u{i // 4}" for i in range(80)]
    values = rng.normal(0.7, 1, 80) + np.repeat(rng.normal(0, 0.8, 20), 4)
    residuals = values - values.mean()
    totals = [residuals[4 * k : 4 * k + 4].sum() for k in range(20)]
    clustered = sum(t**2 for t in totals) * 20 / 19
    independent = sum(r**2 for r in residuals) * 80 / 79
    assert design_effect(values, users) == pytest.approx(clustered / independent)


def test_the_number_of_resamples_is_the_one_asked_for():
    rng = np.random.default_rng(3)
    differences = outcomes(rng, 60, 0.4)
    users = [str(i // 3) for i in range(60)]
    result = paired_test(*arms(differences), users, resamples=99)
    assert result.p_value * 100 == pytest.approx(round(result.p_value * 100))
    low, high = paired_bootstrap(differences, users, 0, 99)
    assert result.ci95_pp == pytest.approx((100 * low, 100 * high))


def test_as_many_users_as_folds():
    assert sorted(user_folds([str(i) for i in range(5)])) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (correctness, "margins"), (confidence, "margins"), (brier, "margins"), (nll, "margins"), (ece, "margins"),
        (fit_temperature, "validation_margins"), (lambda x: auc(x, [True, False]), "logp_a_minus_b"),
        (lambda x: design_effect(x, ["a", "b"]), "differences"),
        (lambda x: fold_differences_pp(x, [0, 1]), "differences"),
        (lambda x: paired_test(x, x, ["a", "b"]), "correct"),
    ],
)  # fmt: skip
def test_what_is_not_finite_is_named(call, name):
    with pytest.raises(ValueError, match=rf"^{name}\b"):
        call([0.5, math.nan])
