#!/usr/bin/env python3
"""Does the analysis keep its promises? Whole experiments with a known truth, through the real paired test and verdict.

    python benchmarks/simulate_verdict.py      # prints Markdown; exit status 1 where a requirement does not hold

Rows a to c simulate which arm is right and take DPO's confidence as higher, which can only raise the share of
SUPPORTED. Rows d simulate the margins, so that accuracy, confidence and folds come from the same numbers.
"""

import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # read when numpy loads: there is a process per core

import numpy as np
from rich.console import Console
from rich.progress import track

from config import parse_flags
from quantpref import statistics as st
from quantpref.runs import RunError, UserError, one_line_errors
from quantpref.verdict import TRUE_GAINS_PP, VerdictInputs, decide

DISCORDANCE = 0.15
BOTH_RIGHT = 0.75  # share of the concordant comparisons that both arms have right; no test depends on it
USER_EFFECT = 0.5  # the chance that DPO wins a user's discordant comparisons is Beta(1/2, 1/2): mostly near 0 or 1
MARGIN_MEAN, MARGIN_SD = 1.0, 1.295  # nats: each arm is right in Phi(1 / 1.295) = 78 %
MARGIN_CORRELATION = 0.8  # between the arms, within a comparison: 15 % discordant
BLOCK = 50  # replications in one task of a process
COVERS, HIGHER = "interval covers the true gain", "DPO's confidence higher"
MEASURES = (COVERS, "SUPPORTED", "PARTIALLY SUPPORTED", "NOT SUPPORTED", "p < 0.05", "McNemar p < 0.05", HIGHER)


@dataclass(frozen=True)
class Flags:
    replications: int = 2_500
    """Simulated experiments per row; with fewer than 1,000 a requirement can fail by chance alone."""
    seed: int = 0
    """Every replication has random numbers of its own: its data, and the seed of its tests and folds."""


@dataclass(frozen=True)
class Row:
    name: str
    users: int
    per_user: int = 1
    gain_pp: float = 0.0
    """True gain; of rows with one comparison per user only."""
    margin_scale: float | None = None
    """DPO's margins are this many times as large; None simulates right and wrong in place of margins."""


ROWS = (
    Row("a: null, 400 users x 1", 400),
    Row("b: gain of 5 points, 2,000 users x 1", 2_000, gain_pp=5),
    Row("c: correlated null, 200 users x 10", 200, 10),
    Row("c: correlated null, 100 users x 10", 100, 10),
    Row("d: null margins, 1,208 users x 1", 1_208, margin_scale=1),
    Row("d: the same, DPO's margins 11 times as large", 1_208, margin_scale=11),  # 1 + 1 / beta at beta 0.1
)
REQUIREMENTS: tuple[tuple[int, str, str, Callable[[float], bool]], ...] = (
    (0, COVERS, "93.5 to 96.5", lambda share: 0.935 <= share <= 0.965),
    (0, "SUPPORTED", "below 2.5", lambda share: share < 0.025),
    (0, "PARTIALLY SUPPORTED", "40 to 50: the report says almost half", lambda share: 0.4 <= share <= 0.5),
    (1, "SUPPORTED", "above 90", lambda share: share > 0.9),
    (2, "p < 0.05", "4 to 6.5", lambda share: 0.04 <= share <= 0.065),
    (4, "SUPPORTED", "below 2.5", lambda share: share < 0.025),
    (5, "SUPPORTED", "below 2.5", lambda share: share < 0.025),
)


def arms(row: Row, rng: np.random.Generator) -> tuple[st.Floats, st.Floats, float, float]:
    """Correctness (n,) of SFT and of DPO, and the confidence of both, in one simulated experiment."""
    n = row.users * row.per_user
    if row.margin_scale is not None:
        shared, own = rng.normal(size=n), rng.normal(size=(2, n))
        mixed = np.sqrt(MARGIN_CORRELATION) * shared + np.sqrt(1 - MARGIN_CORRELATION) * own
        sft, dpo = (MARGIN_MEAN + MARGIN_SD * mixed) * [[1], [row.margin_scale]]
        return st.correctness(sft), st.correctness(dpo), st.confidence(sft), st.confidence(dpo)
    wins = np.full(row.users, 0.5 + row.gain_pp / 100 / DISCORDANCE / 2)
    if row.per_user > 1:
        wins = rng.beta(USER_EFFECT, USER_EFFECT, row.users)
    dpo_wins = rng.random(n) < np.repeat(wins, row.per_user)
    discordant, both = rng.random(n) < DISCORDANCE, rng.random(n) < BOTH_RIGHT
    return np.where(discordant, ~dpo_wins, both) + 0.0, np.where(discordant, dpo_wins, both) + 0.0, 0.4, 0.5


def experiment(row: Row, rng: np.random.Generator) -> list[float]:
    """One experiment, analysed as evaluate_dpo.py does: 0 or 1 per measure, discordance, design effect."""
    sft, dpo, confidence_sft, confidence_dpo = arms(row, rng)
    users, seed = np.repeat(np.arange(row.users), row.per_user), int(rng.integers(2**32))
    test = st.paired_test(sft, dpo, users, seed)
    inputs = VerdictInputs(
        n_comparisons=len(users),
        accuracy_sft=float(sft.mean()),
        accuracy_dpo=float(dpo.mean()),
        difference_pp=test.difference_pp,
        ci95_pp=test.ci95_pp,
        p_value=test.p_value,
        confidence_sft=confidence_sft,
        confidence_dpo=confidence_dpo,
        fold_differences_pp=st.fold_differences_pp(dpo - sft, st.user_folds(users, seed=seed)),
        seed_differences_pp=test.seed_differences_pp,
        discordance=test.discordance,
        # What follows is quoted in the reasons and decides nothing; its real values would only cost time.
        minimum_detectable_effect_pp=0.0,
        comparisons_needed_for_2pp=1,
        chance_of_supported=dict.fromkeys(TRUE_GAINS_PP, 0.0),
        best_baseline="always-A",
        best_baseline_accuracy=0.5,
    )
    outcome, (low, high), mcnemar_p = decide(inputs).outcome, test.ci95_pp, test.mcnemar_p
    assert mcnemar_p is not None  # it is there with one training seed
    found = [low <= row.gain_pp <= high, *(outcome == name for name in MEASURES[1:4])]
    found += [test.p_value < st.ALPHA, mcnemar_p < st.ALPHA, confidence_dpo > confidence_sft]
    return [*map(float, found), test.discordance, test.design_effect]


def block(seed: int, number: int, start: int, stop: int) -> list[list[float]]:
    return [experiment(ROWS[number], np.random.default_rng([seed, number, r])) for r in range(start, stop)]


def simulate(seed: int, n: int) -> st.Floats:
    """All experiments, of shape (rows, n, measures + 2), on all cores."""
    tasks = [(seed, i, start, min(start + BLOCK, n)) for i in range(len(ROWS)) for start in range(0, n, BLOCK)]
    with ProcessPoolExecutor() as pool:
        done = pool.map(block, *zip(*tasks, strict=True))
        found = [one for part in track(done, "simulating", len(tasks), console=Console(stderr=True)) for one in part]
    return np.array(found).reshape(len(ROWS), n, -1)


def percent(share: float, n: int) -> str:
    """With its binomial standard error, which 0 and 1 do not have."""
    error = f" ± {100 * (share * (1 - share) / n) ** 0.5:.2f}" if 0 < share < 1 else ""
    return f"{100 * share:.2f}{error}"


def table(*rows: list[str]) -> None:
    for row in (rows[0], ["---"] * len(rows[0]), *rows[1:]):
        print(f"| {' | '.join(row)} |")


def main(flags: Flags) -> None:
    if flags.replications < 1 or flags.seed < 0:
        raise UserError("--replications must be 1 or more, and --seed 0 or more")
    start, n = time.perf_counter(), flags.replications
    shares = simulate(flags.seed, n).mean(axis=1)
    took = f"{time.perf_counter() - start:.0f} s on {os.cpu_count()} cores"
    print(f"{n:,} simulated experiments per row, seed {flags.seed}, {took}; percent ± binomial standard error.\n")
    found = []
    for row, means in zip(ROWS, shares, strict=True):
        cells = [percent(share, n) for share in means[:-2]]
        cells[-1] = "assumed" if row.margin_scale is None else cells[-1]
        correlation = f"{(means[-1] - 1) / (row.per_user - 1):.3f}" if row.per_user > 1 else "-"
        found.append([row.name, *cells, f"{100 * means[-2]:.1f}", correlation])
    table(["experiment", *MEASURES, "discordant", "correlation within a user"], *found)
    print()
    judged, failed = [], 0
    for number, measure, required, holds in REQUIREMENTS:
        share = float(shares[number, MEASURES.index(measure)])
        failed += not holds(share)
        judged.append([ROWS[number].name, measure, required, percent(share, n), "yes" if holds(share) else "**no**"])
    table(["experiment", "share", "required", "found", "holds"], *judged)
    if failed:
        raise RunError(f"{failed} of {len(REQUIREMENTS)} requirements do not hold")


if __name__ == "__main__":
    with one_line_errors():
        main(parse_flags(Flags, sys.argv[1:], description=__doc__))
