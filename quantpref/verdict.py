"""The pre-set rule of EXPERIMENT.md: numbers in, outcome and reasons out.

Fixed before the data is seen. `_pp` is percentage points; accuracies, probabilities and
confidences are shares; differences are DPO - SFT unless their name says otherwise.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Literal

import numpy as np

from quantpref.statistics import ALPHA, FOLDS, MINIMUM_GAIN_PP

Outcome = Literal["SUPPORTED", "PARTIALLY SUPPORTED", "NOT SUPPORTED"]
TRUE_GAINS_PP = ("2", "3", "5")  # keys of chance_of_supported
LN_2 = math.log(2)  # DPO's loss before its first step: above it, training has unlearned

NULL_WARNING = "with no true difference this outcome comes up in almost half of all experiments"
POPULARITY_EXPLAINS = 0.65  # from here on the verdict says so; matched data score near 0.5
CONFIDENCE_WARNING = (
    "DPO's confidence rises with 1/beta by construction, with no better ranking: "
    "look at the calibrated Brier, NLL and ECE beside it."
)


@dataclass(frozen=True)
class VerdictInputs:
    """What the verdict rests on. `decide` refuses numbers that are not finite or disagree."""

    n_comparisons: int
    accuracy_sft: float
    accuracy_dpo: float
    difference_pp: float
    ci95_pp: tuple[float, float]
    p_value: float
    confidence_sft: float
    confidence_dpo: float
    fold_differences_pp: tuple[float, ...]
    """One per fold of the test users, five."""
    seed_differences_pp: tuple[float, ...]
    """One per training seed, so their number is the number of seeds."""
    discordance: float
    minimum_detectable_effect_pp: float
    comparisons_needed_for_2pp: int
    chance_of_supported: Mapping[str, float]
    """Keys "2", "3" and "5": the true gain in percentage points."""
    best_baseline: str
    best_baseline_accuracy: float
    popularity_accuracy: float | None = None
    """What counting how often a film was watched scores on the test."""
    sft_more_difference_pp: float | None = None
    """DPO - sft-more; None where that arm was not trained."""
    sft_more_ci95_pp: tuple[float, float] | None = None
    instability: tuple[str, ...] = ()
    """Sentences of `instability_reasons`; any of them makes it NOT SUPPORTED."""
    sft_training_rows_known: bool = True
    """False for an SFT adapter that came without a record of its training rows."""


@dataclass(frozen=True)
class Verdict:
    """The outcome and its reasons: what decided it first, then what is always said with it."""

    outcome: Outcome
    reasons: tuple[str, ...]


def instability_reasons(
    dpo_losses: Sequence[float], quantisation_loss_lower_pp: float | None = None
) -> tuple[str, ...]:
    """Sentences that say why DPO was unstable; none where it was stable.

    dpo_losses: every step's training loss, in order (nats). quantisation_loss_lower_pp: lower 95 %
    bound of (DPO's loss of accuracy from 16 to 4 bit - SFT's), None where that was not measured.
    """
    losses = list(dpo_losses)
    if not losses:
        raise ValueError("instability_reasons: needs the losses of DPO's training steps")
    if not all(map(math.isfinite, losses)):
        return ("DPO was unstable: training met a non-finite loss.",)
    reasons = []
    tail = losses[-math.ceil(len(losses) / 10) :]
    mean = math.fsum(tail) / len(tail)
    if mean > LN_2:
        reasons.append(
            "DPO was unstable: the mean loss of its last tenth of steps was "
            f"{_number(mean, LN_2, 4)}, above ln 2 = {LN_2:.4f}."
        )
    if quantisation_loss_lower_pp is not None and not quantisation_loss_lower_pp <= MINIMUM_GAIN_PP:
        lower = _number(quantisation_loss_lower_pp, MINIMUM_GAIN_PP)
        reasons.append(
            "DPO was unstable: quantisation costs it more accuracy than SFT; the lower 95 % bound "
            f"of that excess is {lower} points, above {MINIMUM_GAIN_PP:g}."
        )
    return tuple(reasons)


def failed_training_verdict(found: str) -> Verdict:
    """NOT SUPPORTED for a run whose `failed.json` stands in place of the DPO adapter.

    found: what that file says, for instance "step 312: loss nan".
    """
    ended = f"DPO was unstable: training ended on a non-finite loss ({found})."
    return Verdict("NOT SUPPORTED", (ended, "There is no DPO adapter to compare."))


def decide(inputs: VerdictInputs) -> Verdict:
    """Apply the rule. ValueError where an input is not finite, out of range or inconsistent."""
    _check(inputs)
    failed = _failed_criteria(inputs)
    outcome: Outcome
    if inputs.difference_pp <= 0 or inputs.instability:
        outcome, deciding = "NOT SUPPORTED", list(inputs.instability)
        if inputs.difference_pp <= 0:
            text = _number(inputs.difference_pp, 0, sign=True)
            deciding.insert(0, f"The difference of {text} points is not above 0.")
    elif failed:
        outcome, deciding = "PARTIALLY SUPPORTED", failed
    else:
        outcome, deciding = "SUPPORTED", [_all_criteria_hold(inputs)]
    return Verdict(outcome, (_headline(inputs), *deciding, *_always_said(inputs)))


def p_text(p_value: float) -> str:
    """Text such as "p = 0.0003" or "p < 0.0001", never rounded across 0.05."""
    if p_value < 0.0001:
        return "p < 0.0001"
    return f"p = {_number(p_value, ALPHA, 4)}"


def _number(value: float, limit: float, decimals: int = 2, sign: bool = False) -> str:
    """Format with as many more decimals as it takes to stay on the same side of the limit."""
    for places in range(decimals, 17):
        text = f"{value + 0.0:{'+' if sign else ''}.{places}f}"
        shown = float(text)
        if (shown > limit, shown < limit) == (value > limit, value < limit):
            return text
    return repr(value)


def _headline(inputs: VerdictInputs) -> str:
    low, high = (_number(bound, 0, sign=True) for bound in inputs.ci95_pp)
    return (
        f"DPO prefers the right film in {100 * inputs.accuracy_dpo:.2f} % of the comparisons, SFT "
        f"in {100 * inputs.accuracy_sft:.2f} %: a difference of "
        f"{_number(inputs.difference_pp, 0, sign=True)} points (95 % interval {low} to {high}, "
        f"{p_text(inputs.p_value)})."
    )


def _failed_criteria(inputs: VerdictInputs) -> list[str]:
    """One sentence for each criterion of SUPPORTED that does not hold."""
    failed = []
    if not inputs.difference_pp > MINIMUM_GAIN_PP:
        text = _number(inputs.difference_pp, MINIMUM_GAIN_PP, sign=True)
        failed.append(f"The difference of {text} points is not above {MINIMUM_GAIN_PP:g} points.")
    if not inputs.p_value < ALPHA:
        failed.append(f"{p_text(inputs.p_value)} is not below 0.05: {NULL_WARNING}.")
    if not inputs.confidence_dpo > inputs.confidence_sft:
        dpo = _number(inputs.confidence_dpo, inputs.confidence_sft, 4)
        sft = _number(inputs.confidence_sft, inputs.confidence_dpo, 4)
        failed.append(f"DPO's confidence of {dpo} is not above SFT's of {sft}.")
    for kind, differences in (
        ("folds of the test users", inputs.fold_differences_pp),
        ("seeds", inputs.seed_differences_pp),
    ):
        lacking = sum(not difference > 0 for difference in differences)
        if lacking:
            failed.append(
                f"The difference is not positive in {lacking} of the {len(differences)} {kind} "
                f"({_listed(differences)} points)."
            )
    return failed


def _all_criteria_hold(inputs: VerdictInputs) -> str:
    seeds = len(inputs.seed_differences_pp)
    dpo = _number(inputs.confidence_dpo, inputs.confidence_sft, 4)
    sft = _number(inputs.confidence_sft, inputs.confidence_dpo, 4)
    return (
        f"All criteria hold: {_number(inputs.difference_pp, MINIMUM_GAIN_PP, sign=True)} points is "
        f"more than {MINIMUM_GAIN_PP:g}; {p_text(inputs.p_value)} is below 0.05; DPO's confidence "
        f"{dpo} is above SFT's {sft}; the difference is positive in each of the {FOLDS} folds of "
        f"the test users ({_listed(inputs.fold_differences_pp)} points)"
        + (f" and for each of the {seeds} seeds." if seeds > 1 else ".")
    )


def _always_said(inputs: VerdictInputs) -> list[str]:
    """What EXPERIMENT.md wants said whatever the outcome."""
    low, high = inputs.ci95_pp
    chance = {gain: f"{100 * inputs.chance_of_supported[gain]:.1f} %" for gain in TRUE_GAINS_PP}
    taken = "DPO's confidence taken as higher"
    if len(inputs.seed_differences_pp) > 1:
        taken += " and every seed as positive: an upper bound"
    said = []
    if low <= 0 <= high and low <= MINIMUM_GAIN_PP <= high:
        said.append("The 95 % interval holds both 0 and 2 points: this test was too small to tell.")
    said += [
        f"With {inputs.n_comparisons:,} comparisons, {100 * inputs.discordance:.1f} % of them "
        f"discordant, the minimum detectable effect is {inputs.minimum_detectable_effect_pp:.1f} "
        f"points (80 % power, two-sided 0.05); {inputs.comparisons_needed_for_2pp:,} comparisons "
        "are needed to see 2 points.",
        f"The chance of SUPPORTED with this test is {chance['2']} at a true gain of 2 points, "
        f"{chance['3']} at 3 and {chance['5']} at 5 (simulated, {taken}).",
        _baseline_sentence(inputs),
        *_popularity_sentence(inputs),
        _extra_training_sentence(inputs),
        _seeds_sentence(inputs.seed_differences_pp),
        CONFIDENCE_WARNING,
    ]
    if not inputs.sft_training_rows_known:
        said.append(
            "The test may be contaminated: the SFT adapter's training rows are unknown; if test rows are among them, "
            "its accuracy, and that of the DPO adapter built on it, are too high."
        )
    return said


def _baseline_sentence(inputs: VerdictInputs) -> str:
    beaten = [
        name
        for name, accuracy in (("SFT", inputs.accuracy_sft), ("DPO", inputs.accuracy_dpo))
        if inputs.best_baseline_accuracy > accuracy
    ]
    text = {0: "beats neither arm", 1: f"beats {''.join(beaten)} only", 2: "beats both arms"}
    percent = f"{100 * inputs.best_baseline_accuracy:.2f} %"
    return f"The best baseline, {inputs.best_baseline} ({percent}), {text[len(beaten)]}."


def _popularity_sentence(inputs: VerdictInputs) -> list[str]:
    """The shortcut of the usual data: films that nobody watched as the other option."""
    if inputs.popularity_accuracy is None or inputs.popularity_accuracy < POPULARITY_EXPLAINS:
        return []
    return [
        f"Counting how often a film was watched scores {100 * inputs.popularity_accuracy:.2f} %: popularity explains "
        "the data to that extent, and an arm near it may have learnt nothing about the user."
    ]


def _extra_training_sentence(inputs: VerdictInputs) -> str:
    not_excluded = "the gain of extra training is not excluded"
    if inputs.sft_more_difference_pp is None or inputs.sft_more_ci95_pp is None:
        return f"No arm trained SFT on for as long as DPO: {not_excluded}."
    low, high = inputs.sft_more_ci95_pp
    compared = (
        f"Against sft-more, which trained SFT on for as long, DPO differs by "
        f"{_number(inputs.sft_more_difference_pp, 0, sign=True)} points (95 % interval "
        f"{_number(low, 0, sign=True)} to {_number(high, 0, sign=True)}): "
    )
    return compared + ("extra training was excluded." if low > 0 else f"{not_excluded}.")


def _seeds_sentence(differences: tuple[float, ...]) -> str:
    if len(differences) == 1:
        return "Number of seeds: 1, so the spread between training runs is not known."
    mean = math.fsum(differences) / len(differences)
    variance = math.fsum((x - mean) ** 2 for x in differences) / (len(differences) - 1)
    return (
        f"Number of seeds: {len(differences)}, with differences of {_listed(differences)} points "
        f"(standard deviation {math.sqrt(variance):.2f})."
    )


def _listed(differences: Sequence[float]) -> str:
    return ", ".join(_number(x, 0, sign=True) for x in differences)


def _check(inputs: VerdictInputs) -> None:
    """Refuse what no rule can judge: every comparison with a NaN is False, and would pass."""
    for field in fields(inputs):
        value = getattr(inputs, field.name)
        if value is None or isinstance(value, str) or field.name == "instability":
            continue
        numbers = list(value.values()) if isinstance(value, Mapping) else value
        if not np.isfinite(numbers).all():
            raise ValueError(f"verdict: {field.name} is not finite: {value}")
    for name in ("accuracy_sft", "accuracy_dpo", "best_baseline_accuracy", "p_value"):
        if not 0 <= getattr(inputs, name) <= 1:
            raise ValueError(f"verdict: {name} must be in [0, 1], got {getattr(inputs, name)}")
    accuracies_pp = 100 * (inputs.accuracy_dpo - inputs.accuracy_sft)
    if abs(accuracies_pp - inputs.difference_pp) > 1e-6:
        raise ValueError(f"verdict: difference_pp is {inputs.difference_pp:g}, the accuracies give {accuracies_pp:g}")
    seeds = inputs.seed_differences_pp
    if not seeds or abs(math.fsum(seeds) / len(seeds) - inputs.difference_pp) > 1e-6:
        raise ValueError(f"verdict: the mean of seed_differences_pp is not difference_pp: {seeds}")
    if not inputs.ci95_pp[0] <= inputs.ci95_pp[1]:
        raise ValueError(f"verdict: ci95_pp is not (low, high): {inputs.ci95_pp}")
    if len(inputs.fold_differences_pp) != FOLDS:
        raise ValueError(f"verdict: needs {FOLDS} fold differences")
    if set(inputs.chance_of_supported) != set(TRUE_GAINS_PP):
        raise ValueError(f"verdict: chance_of_supported needs the keys {TRUE_GAINS_PP}")
    if (inputs.sft_more_difference_pp is None) != (inputs.sft_more_ci95_pp is None):
        raise ValueError("verdict: sft-more's difference and its interval go together")
