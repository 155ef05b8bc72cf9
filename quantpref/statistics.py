"""Intervals, paired tests and calibration: arrays in, numbers out.

A margin is log p(preferred) - log p(other) in nats, one per comparison. Differences are
candidate - reference (DPO - SFT), of shape (n,) or, for several runs, (seeds, n). Randomness is
local and seeded; the order of rows and the names of users change no result but the folds'.
"""

import heapq
import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import bdtr, expit, ndtri

# The pre-set rule of EXPERIMENT.md; here because the chance of SUPPORTED simulates it.
MINIMUM_GAIN_PP = 2.0
ALPHA = 0.05
POWER = 0.80
FOLDS = 5
RESAMPLES = 10_000
TEMPERATURE_BOUNDS = (0.05, 100.0)
BLOCK = 1 << 22  # array elements in one block of resamples: bounds memory at tens of MB

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def finite(values: ArrayLike, name: str) -> Floats:
    array = np.asarray(values, dtype=float)
    if array.size == 0 or not np.isfinite(array).all():
        raise ValueError(f"{name}: needs at least one value, all finite")
    return array


# Scores of one arm


def correctness(margins: ArrayLike) -> Floats:
    """1 for a margin above 0, 0.5 for exactly 0 (a tie is half right), else 0; same shape."""
    return 0.5 * (np.sign(finite(margins, "margins")) + 1)


def confidence(margins: ArrayLike) -> float:
    """Mean of 2 sigmoid(margin) - 1, which is tanh(margin / 2); in [-1, 1]."""
    return float(np.tanh(finite(margins, "margins") / 2).mean())


def brier(margins: ArrayLike) -> float:
    """Mean of (1 - P)^2, P = sigmoid(margin); in [0, 1], half of Brier's (1950) two-class sum."""
    return float(np.mean(expit(-finite(margins, "margins")) ** 2))


def nll(margins: ArrayLike) -> float:
    """Mean of -log sigmoid(margin) in nats, without overflow."""
    return float(np.logaddexp(0, -finite(margins, "margins")).mean())


class ReliabilityBins(NamedTuple):
    """Per bin, lowest c first: comparisons, mean c = max(P, 1 - P), share right."""

    size: Ints
    confidence: Floats
    share_right: Floats


def reliability_bins(margins: ArrayLike, bins: int = 15) -> ReliabilityBins:
    """Equal-mass bins of c = max(P, 1 - P): sizes differ by one at most, none is empty.

    Comparisons with one c share their mean rightness, so that the order of rows never matters.
    """
    margins = finite(margins, "margins").ravel()
    c, index, same = np.unique(expit(np.abs(margins)), return_inverse=True, return_counts=True)
    right = np.bincount(index, correctness(margins)) / same
    parts = [part for part in np.array_split(np.sort(index), bins) if len(part)]
    return ReliabilityBins(
        np.array([len(part) for part in parts]),
        np.array([c[part].mean() for part in parts]),
        np.array([right[part].mean() for part in parts]),
    )


def ece(margins: ArrayLike, bins: int = 15) -> float:
    """Sum over bins of (size / n) |share right - mean c|, in [0, 1] (Guo et al. 2017, eq. 3)."""
    table = reliability_bins(margins, bins)
    return float(np.average(np.abs(table.share_right - table.confidence), weights=table.size))


def auc(logp_a_minus_b: ArrayLike, a_is_preferred: ArrayLike) -> float:
    """Area under the ROC curve of l_A - l_B (n,) against "A is preferred" (n,).

    ValueError unless both labels occur.
    """
    from sklearn.metrics import roc_auc_score  # slow to import

    labels = np.asarray(a_is_preferred, dtype=bool)
    if labels.all() or not labels.any():
        raise ValueError("auc: needs rows where A is preferred and rows where B is")
    return float(roc_auc_score(labels, finite(logp_a_minus_b, "logp_a_minus_b")))


def fit_temperature(validation_margins: ArrayLike) -> tuple[float, bool]:
    """T in [0.05, 100] with the least NLL of sigmoid(margin / T), and whether it hits a bound.

    Guo et al. 2017, eq. 9. The NLL is convex in a = 1 / T: its minimum is the root of its slope,
    mean(-m sigmoid(-a m)). Margins that are all 0 fit every T alike: 1.0, no bound.
    """
    from scipy.optimize import brentq  # slow to import

    margins = finite(validation_margins, "validation_margins")
    if not margins.any():
        return 1.0, False

    def slope(a: float) -> float:
        return float(np.mean(-margins * expit(-a * margins)))

    low, high = TEMPERATURE_BOUNDS
    if slope(1 / low) <= 0:  # sharper never hurts: nearly every margin is right
        return low, True
    if slope(1 / high) >= 0:  # flatter never hurts: no better than a coin
        return high, True
    return float(1 / brentq(slope, 1 / high, 1 / low, xtol=1e-12)), False


def wilson_interval(successes: float, n: int) -> tuple[float, float]:
    """95 % score interval of a proportion (Wilson 1927); successes may be half-integers (ties)."""
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"wilson_interval: needs 0 <= successes <= n, n >= 1: {successes}, {n}")
    z, p = float(ndtri(0.975)), successes / n
    centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2)) / (1 + z**2 / n)
    return 0.0 if successes == 0 else centre - half, 1.0 if successes == n else centre + half


# Paired tests


def mcnemar_p(wins: ArrayLike, losses: ArrayLike) -> Floats:
    """Exact two-sided p (McNemar 1947): wins ~ Binomial(wins + losses, 1/2). Elementwise."""
    wins, losses = np.asarray(wins, dtype=float), np.asarray(losses, dtype=float)
    pairs = (wins + losses).astype(np.int64)
    return np.minimum(1.0, 2 * bdtr(np.minimum(wins, losses), pairs, 0.5))


def user_index(users: ArrayLike, n: int) -> tuple[Ints, int]:
    """Number the users 0..U-1 by name as text (7 and "7" are one user): index (n,), U."""
    names = np.asarray(users).astype(str)
    if names.shape != (n,):
        raise ValueError(f"users: needs one per comparison, {n}, got shape {names.shape}")
    unique, index = np.unique(names, return_inverse=True)
    return index, len(unique)


def _user_totals(differences: ArrayLike, users: ArrayLike) -> tuple[Floats, Ints]:
    """Differences (n,) or (seeds, n) -> sums by user (seeds, U), comparisons by user (U,)."""
    values = np.atleast_2d(finite(differences, "differences"))
    index, n_users = user_index(users, values.shape[1])
    return np.array([np.bincount(index, row) for row in values]), np.bincount(index)


def _resampled_totals(patterns: Floats, repeats: Ints, size: int, rng: np.random.Generator) -> Floats:
    """Totals (size, columns) over U users drawn with replacement from patterns x repeats."""
    n_users = int(repeats.sum())
    if len(patterns) * 8 <= n_users:  # few distinct users: draw how often each kind occurs
        return rng.multinomial(n_users, repeats / n_users, size) @ patterns
    drawn = np.repeat(np.arange(len(patterns)), repeats)[rng.integers(0, n_users, (size, n_users))]
    return np.stack([column[drawn].sum(axis=1) for column in patterns.T], axis=1)


def paired_bootstrap(
    differences: ArrayLike, users: ArrayLike, seed: int = 0, resamples: int = RESAMPLES
) -> tuple[float, float]:
    """95 % percentile interval of the mean difference, in its unit, resampling whole users.

    Efron & Tibshirani 1993, ch. 13; clusters: Cameron, Gelbach & Miller 2008. Of (seeds, n) the
    seeds are resampled too, independently (two or three seeds understate their spread).
    Exchanged arms mirror the interval exactly, unless the difference is 0.
    """
    sums, counts = _user_totals(differences, users)
    seeds, sign = len(sums), -1.0 if sums.sum() < 0 else 1.0
    columns = np.vstack([sign * sums, counts]).T
    patterns, repeats = np.unique(columns, axis=0, return_counts=True)
    rng, means = np.random.default_rng(seed), np.empty(resamples)
    block = max(1, BLOCK // len(columns))
    for start in range(0, resamples, block):
        size = min(block, resamples - start)
        totals = _resampled_totals(patterns, repeats, size, rng)
        weights = rng.multinomial(seeds, np.full(seeds, 1 / seeds), size) / seeds
        means[start : start + size] = (totals[:, :-1] * weights).sum(axis=1) / totals[:, -1]
    low, high = np.sort(sign * np.quantile(means, [0.025, 0.975])) + 0.0  # no -0.0
    return float(low), float(high)


def sign_flip_p(differences: ArrayLike, users: ArrayLike, seed: int = 0, permutations: int = RESAMPLES) -> float:
    """Two-sided p of "no difference": each user's summed difference gets a random sign.

    p = (1 + flips at least as extreme) / (1 + flips) (Phipson & Smyth 2010), 1 if nothing
    differs. Of (seeds, n) the mean over seeds is tested. Equal sums count as extreme, which makes
    it conservative with few users: size 3.5-4 % at 40-120 users of ten, 4.5 % from 200.
    """
    sums = _user_totals(differences, users)[0].mean(axis=0)
    sizes = np.sort(np.abs(sums[sums != 0]))
    if not len(sizes):
        return 1.0
    rng, extreme, block = np.random.default_rng(seed), 0, max(1, BLOCK // len(sizes))
    observed = abs(sums.sum()) - 1e-9 * sizes.sum()  # rounding must not break a tie
    for start in range(0, permutations, block):
        shape = (min(block, permutations - start), -(-len(sizes) // 8))
        random_bytes = rng.integers(0, 256, shape, dtype=np.uint8)
        plus = np.unpackbits(random_bytes, axis=1, count=len(sizes))
        extreme += int(np.sum(np.abs(2 * (plus @ sizes) - sizes.sum()) >= observed))
    return (1 + extreme) / (1 + permutations)


def holm(p_values: ArrayLike) -> Floats:
    """Holm-adjusted p values (m,) in the given order (Holm 1979): compare each with alpha."""
    p = np.asarray(p_values, dtype=float)
    if not ((p >= 0) & (p <= 1)).all():
        raise ValueError("holm: p values must be in [0, 1]")
    order, adjusted = np.argsort(p, kind="stable"), np.empty(len(p))
    adjusted[order] = np.minimum(1, np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)))
    return adjusted


def design_effect(differences: ArrayLike, users: ArrayLike) -> float:
    """Variance of the mean with users as clusters / with all comparisons independent (Kish 1965).

    Of (seeds, n) the mean over seeds. 1 with one comparison per user, one user or no variation.
    """
    values = np.atleast_2d(finite(differences, "differences")).mean(axis=0)
    residuals = values - values.mean()
    sums, counts = _user_totals(residuals, users)
    n_users, n = len(counts), len(values)
    if n_users in (1, n) or not residuals.any():
        return 1.0
    independent = np.sum(residuals**2) * n / (n - 1)
    return float(np.sum(sums**2) * n_users / (n_users - 1) / independent)


@dataclass(frozen=True)
class PairedTest:
    """Candidate's accuracy - reference's on the same comparisons; `_pp` in percentage points."""

    difference_pp: float
    ci95_pp: tuple[float, float]
    p_value: float
    test: str  # the test that gave p_value
    wins: int | None  # comparisons that only the candidate has right; None over several seeds
    losses: int | None
    mcnemar_p: float | None
    discordance: float  # mean squared difference: the share that one arm alone has right
    design_effect: float
    seed_differences_pp: tuple[float, ...]


def paired_test(
    correct_reference: ArrayLike,
    correct_candidate: ArrayLike,
    users: ArrayLike,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> PairedTest:
    """Exact McNemar where every user has one comparison, else the user-level sign-flip test.

    correct_*: 0, 0.5 (tie; it leaves McNemar's table) or 1, shape (n,) or (seeds, n). Over several
    seeds: means over seeds, their interval resamples seeds and users, p is the sign-flip's (a
    mean over seeds has no table). ValueError on other values or unequal shapes.
    """
    pair = [np.atleast_2d(finite(c, "correct")) for c in (correct_reference, correct_candidate)]
    if pair[0].shape != pair[1].shape or not np.isin(pair, [0, 0.5, 1]).all():
        raise ValueError("paired_test: needs two arrays of one shape, of 0, 0.5 and 1")
    differences = pair[1] - pair[0]
    seeds, n = differences.shape
    wins = losses = table_p = None
    if seeds == 1:
        wins, losses = int(np.sum(differences == 1)), int(np.sum(differences == -1))
        table_p = float(mcnemar_p(wins, losses))
    p, test = table_p, "exact McNemar"
    if p is None or user_index(users, n)[1] < n:
        p, test = sign_flip_p(differences, users, seed, resamples), "user-level sign-flip"
    low, high = paired_bootstrap(differences, users, seed, resamples)
    return PairedTest(
        difference_pp=float(100 * differences.sum() / differences.size),
        ci95_pp=(100 * low, 100 * high),
        p_value=p,
        test=test,
        wins=wins,
        losses=losses,
        mcnemar_p=table_p,
        discordance=float(np.mean(differences.mean(axis=0) ** 2)),
        design_effect=design_effect(differences, users),
        seed_differences_pp=tuple(float(100 * row.sum() / n) for row in differences),
    )


def user_folds(users: ArrayLike, folds: int = FOLDS, seed: int = 0) -> Ints:
    """Fold 0..folds-1 of every comparison (n,): disjoint by user, balanced in comparisons.

    Users in the order of their names are shuffled, then handed out, those with most comparisons
    first, to the fold that has fewest. ValueError with fewer users than folds.
    """
    index, n_users = user_index(users, len(np.asarray(users)))
    if n_users < folds:
        raise ValueError(f"user_folds: {folds} folds need {folds} users or more, got {n_users}")
    counts, shuffled = np.bincount(index), np.random.default_rng(seed).permutation(n_users)
    fold_of_user, heap = np.empty(n_users, dtype=np.int64), [(0, fold) for fold in range(folds)]
    for user in shuffled[np.argsort(-counts[shuffled], kind="stable")]:
        size, fold = heapq.heappop(heap)
        fold_of_user[user] = fold
        heapq.heappush(heap, (size + int(counts[user]), fold))
    return fold_of_user[index]


def fold_differences_pp(differences: ArrayLike, folds: ArrayLike) -> tuple[float, ...]:
    """100 x mean difference (n,) or (seeds, n) in each fold 0, 1, ... of `folds` (n,)."""
    values, fold = np.atleast_2d(finite(differences, "differences")), np.asarray(folds)
    parts = [values[:, fold == number] for number in range(fold.max() + 1)]
    return tuple(float(100 * part.sum() / part.size) for part in parts)
