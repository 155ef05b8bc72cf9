"""What a test of this size can see: detectable effects, and the simulated chance of SUPPORTED.

Gains and effects are in percentage points, discordance is the share of comparisons that one arm alone has
right. The closed forms are Connor's (1987) for paired proportions.
"""

import math

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import ndtr, ndtri

from quantpref.statistics import (
    ALPHA,
    BLOCK,
    FOLDS,
    MINIMUM_GAIN_PP,
    POWER,
    Floats,
    finite,
    mcnemar_p,
    user_index,
)


def _check_power(n: float, discordance: float, design_effect: float, gain_pp: float) -> None:
    if n < 1 or not 0 <= discordance <= 1 or not design_effect > 0 or not 0 <= gain_pp <= 100:
        raise ValueError(
            "power: needs n >= 1, discordance in [0, 1], design effect > 0, gain in [0, 100] pp, "
            f"got {n}, {discordance}, {design_effect}, {gain_pp}"
        )


def comparisons_needed(effect_pp: float, discordance: float, design_effect: float = 1.0) -> int:
    """Comparisons that show a true difference with 80 % power at two-sided 0.05.

    n = (z_a sqrt(psi) + z_b sqrt(psi - d^2))^2 / d^2 (Connor 1987, p. 209; Lachin 1992), times the
    design effect. A difference d needs psi >= d: a smaller discordance (0 too) is raised to d.
    """
    _check_power(1, discordance, design_effect, effect_pp)
    if effect_pp == 0:
        raise ValueError("comparisons_needed: no number of comparisons shows an effect of 0")
    d = effect_pp / 100
    psi = max(discordance, d)
    root = ndtri(1 - ALPHA / 2) * math.sqrt(psi) + ndtri(POWER) * math.sqrt(psi - d**2)
    return math.ceil(design_effect * root**2 / d**2)


def minimum_detectable_effect_pp(n: int, discordance: float, design_effect: float = 1.0) -> float:
    """Difference (pp) that n comparisons show with 80 % power: `comparisons_needed` solved for d.

    Where d would exceed the discordance, that is raised to d: with 0 observed, the effect whose
    discordant pairs all favour one arm. 100 where no difference is large enough.
    """
    _check_power(n, discordance, design_effect, 0)
    za, zb, m = float(ndtri(1 - ALPHA / 2)), float(ndtri(POWER)), n / design_effect
    if m <= za**2:
        return 100.0
    root = math.sqrt(m - za**2 + zb**2)
    d = math.sqrt(discordance) * (za * math.sqrt(m) + zb * root) / (m + zb**2)
    if d >= discordance:  # psi = d: m d = (z_a + z_b sqrt(1 - d))^2, quadratic in sqrt(1 - d)
        d = 1 - ((math.sqrt(m) * root - za * zb) / (m + zb**2)) ** 2
    return 100 * d


def _share_supported(fold_sums: Floats, n: ArrayLike, p: Floats) -> float:
    """Share of replications (rows of fold_sums) that the rule calls SUPPORTED."""
    large = 100 * fold_sums.sum(axis=1) / n > MINIMUM_GAIN_PP
    return float(np.mean(large & (p < ALPHA) & (fold_sums > 0).all(axis=1)))


def chance_of_supported(gain_pp: float, n: int, discordance: float, seed: int = 0, replications: int = 2_000) -> float:
    """Simulated chance of SUPPORTED at a true gain with n users of one comparison, one seed.

    The folds' wins, losses and concordant pairs are trinomial: P(win) + P(loss) = discordance
    (raised to at least the gain), P(win) - P(loss) = gain; p is exact McNemar's. DPO's confidence
    is taken as the higher one.
    """
    _check_power(n, discordance, 1, gain_pp)
    gain = gain_pp / 100
    psi = max(discordance, gain)
    sizes = [n // FOLDS + (fold < n % FOLDS) for fold in range(FOLDS)]
    chances = [(psi + gain) / 2, (psi - gain) / 2, 1 - psi]
    counts = np.random.default_rng(seed).multinomial(sizes, chances, (replications, FOLDS))
    wins, losses = counts[..., 0], counts[..., 1]
    p = mcnemar_p(wins.sum(axis=1), losses.sum(axis=1))
    return _share_supported((wins - losses).astype(float), n, p)


def chance_of_supported_observed(
    gain_pp: float,
    differences: ArrayLike,
    users: ArrayLike,
    seed: int = 0,
    replications: int = 2_000,
) -> float:
    """The same chance with the observed discordance, cluster sizes and correlation.

    One seed and one comparison per user: `chance_of_supported`. Otherwise users are drawn with
    replacement, wins and losses exchanged in half of them (no true gain, clusters kept); then each
    loss becomes a win with probability gain / mean |difference|, and, where that exceeds 1,
    concordant comparisons become wins for the rest. p is the normal limit of the sign-flip test.
    "Positive for every seed" is not simulated: over several seeds this is an upper bound.
    """
    _check_power(1, 0, 1, gain_pp)
    values = np.atleast_2d(finite(differences, "differences"))
    d, gain = values.mean(axis=0), gain_pp / 100
    index, n_users = user_index(users, len(d))
    if len(values) == 1 and n_users == len(d):
        return chance_of_supported(gain_pp, len(d), float(np.mean(d**2)), seed, replications)
    # By user: won and lost mass, comparisons won, lost, and all
    columns = [np.maximum(d, 0), np.maximum(-d, 0), d > 0, d < 0, np.ones(len(d))]
    table = np.array([np.bincount(index, column) for column in columns])
    mass, concordant = np.abs(d).mean(), np.mean(d == 0)
    turn = min(1.0, gain / mass) if mass else 0.0
    add = min(1.0, max(0.0, gain - mass) / concordant) if concordant else 0.0
    rng, supported, block = np.random.default_rng(seed), 0.0, max(1, BLOCK // (8 * n_users))
    for start in range(0, replications, block):
        size = min(block, replications - start)
        drawn = table[:, rng.integers(0, n_users, (size, n_users))]
        sums = _simulated_sums(drawn, turn, add, rng)
        folds = np.stack([sums[:, fold::FOLDS].sum(axis=1) for fold in range(FOLDS)], axis=1)
        z = np.abs(sums.sum(axis=1)) / np.sqrt(np.maximum(np.sum(sums**2, axis=1), 1e-12))
        supported += size * _share_supported(folds, drawn[-1].sum(axis=1), 2 * ndtr(-z))
    return supported / replications


def _simulated_sums(drawn: Floats, turn: float, add: float, rng: np.random.Generator) -> Floats:
    """Drawn users (5 columns, size, U) -> their summed differences (size, U) at the gain."""
    won, lost, n_won, n_lost, n = drawn
    exchange = rng.random(won.shape) < 0.5
    won, lost = np.where(exchange, lost, won), np.where(exchange, won, lost)
    n_losses = np.where(exchange, n_won, n_lost)
    turned = lost * rng.binomial(n_losses.astype(int), turn) / np.maximum(n_losses, 1)
    return won - lost + 2 * turned + rng.binomial((n - n_won - n_lost).astype(int), add)
