"""verdict.py: every branch of the pre-set rule, its boundaries, and the words it must say."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantpref.power import chance_of_supported, comparisons_needed, minimum_detectable_effect_pp
from quantpref.statistics import (
    fold_differences_pp,
    paired_test,
    user_folds,
)
from quantpref.verdict import (
    Verdict,
    VerdictInputs,
    decide,
    failed_training_verdict,
    instability_reasons,
    p_text,
)

SUPPORTED = VerdictInputs(
    n_comparisons=1208,
    accuracy_sft=0.785,
    accuracy_dpo=0.842,
    difference_pp=5.7,
    ci95_pp=(3.1, 8.3),
    p_value=0.0003,
    confidence_sft=0.2341,
    confidence_dpo=0.5821,
    fold_differences_pp=(5.0, 6.5, 4.0, 5.0, 8.0),
    seed_differences_pp=(5.7,),
    discordance=0.15,
    minimum_detectable_effect_pp=3.1188,
    comparisons_needed_for_2pp=2941,
    chance_of_supported={"2": 0.203, "3": 0.4395, "5": 0.8695},
    best_baseline="popularity",
    best_baseline_accuracy=0.7511,
)


def with_difference(difference_pp, **changes):
    """SUPPORTED but for this difference (the accuracies follow) and these changes."""
    accuracy = SUPPORTED.accuracy_sft + difference_pp / 100
    changes = {"seed_differences_pp": (difference_pp,), **changes}
    return replace(SUPPORTED, accuracy_dpo=accuracy, difference_pp=difference_pp, **changes)


def said(inputs):
    return "\n".join(decide(inputs).reasons)


def test_supported_quotes_what_it_rests_on():
    verdict = decide(SUPPORTED)
    assert verdict.outcome == "SUPPORTED"
    assert verdict.reasons[:2] == (
        "DPO prefers the right film in 84.20 % of the comparisons, SFT in 78.50 %: a difference "
        "of +5.70 points (95 % interval +3.10 to +8.30, p = 0.0003).",
        "All criteria hold: +5.70 points is more than 2; p = 0.0003 is below 0.05; DPO's "
        "confidence 0.5821 is above SFT's 0.2341; the difference is positive in each of the 5 "
        "folds of the test users (+5.00, +6.50, +4.00, +5.00, +8.00 points).",
    )


# Each change fails one criterion, the sentence names it with its number.
ONE_FAILS = [
    (with_difference(1.5), "The difference of +1.50 points is not above 2 points."),
    (with_difference(2.0), "The difference of +2.00 points is not above 2 points."),
    (with_difference(1.9999), "The difference of +1.9999 points is not above 2 points."),
    (
        replace(SUPPORTED, p_value=0.05),
        "p = 0.0500 is not below 0.05: with no true difference this outcome comes up in almost "
        "half of all experiments.",
    ),
    (replace(SUPPORTED, p_value=0.050001), "p = 0.050001 is not below 0.05: with no true"),
    (
        replace(SUPPORTED, confidence_dpo=0.2341),
        "DPO's confidence of 0.2341 is not above SFT's of 0.2341.",
    ),
    (
        replace(SUPPORTED, confidence_dpo=0.23409999),
        "DPO's confidence of 0.23409999 is not above SFT's of 0.2341.",
    ),
    (
        replace(SUPPORTED, fold_differences_pp=(5.0, 0.0, 4.0, 5.0, 8.0)),
        "The difference is not positive in 1 of the 5 folds of the test users "
        "(+5.00, +0.00, +4.00, +5.00, +8.00 points).",
    ),
    (
        replace(SUPPORTED, fold_differences_pp=(-0.001, -1.0, 4.0, 5.0, 8.0)),
        "The difference is not positive in 2 of the 5 folds of the test users "
        "(-0.001, -1.00, +4.00, +5.00, +8.00 points).",
    ),
    (
        replace(SUPPORTED, seed_differences_pp=(11.4, 0.0)),
        "The difference is not positive in 1 of the 2 seeds (+11.40, +0.00 points).",
    ),
]


@pytest.mark.parametrize(("inputs", "sentence"), ONE_FAILS)
def test_one_failed_criterion_makes_it_partial_and_is_named(inputs, sentence):
    verdict = decide(inputs)
    assert verdict.outcome == "PARTIALLY SUPPORTED"
    assert verdict.reasons[1].startswith(sentence)
    others = [other for _, other in ONE_FAILS if other in verdict.reasons[2:]]
    assert not others  # only what failed is blamed


@pytest.mark.parametrize(
    "inputs",
    [
        with_difference(2.0000001),
        replace(SUPPORTED, p_value=0.0499999),
        replace(SUPPORTED, confidence_dpo=0.2341001),
        replace(SUPPORTED, fold_differences_pp=(6.5, 1e-9, 4.0, 5.0, 8.0)),
        replace(SUPPORTED, seed_differences_pp=(11.39, 0.01)),
    ],
)
def test_just_inside_every_boundary_is_supported_and_reads_so(inputs):
    verdict = decide(inputs)
    assert verdict.outcome == "SUPPORTED"
    text = verdict.reasons[1]
    assert "+2.00 points is more" not in text and "p = 0.0500 " not in text
    assert "+0.00," not in text and "0.2341 is above SFT's 0.2341;" not in text


@pytest.mark.parametrize(("difference", "shown"), [(0.0, "+0.00"), (-1.0, "-1.00"), (-1e-4, "-0.0001")])
def test_no_gain_is_not_supported_whatever_else_holds(difference, shown):
    verdict = decide(with_difference(difference))
    assert verdict.outcome == "NOT SUPPORTED"
    assert verdict.reasons[1] == f"The difference of {shown} points is not above 0."


def test_the_smallest_gain_is_partial():
    assert decide(with_difference(1e-4)).outcome == "PARTIALLY SUPPORTED"


def test_the_rule_in_full():
    """Every combination of the criteria against the rule written out once more."""
    choices = itertools.product((-1.0, 0.0, 1.5, 2.0, 5.7), (0.01, 0.05), *[(True, False)] * 4)
    for difference, p, confident, all_folds, all_seeds, stable in choices:
        inputs = with_difference(
            difference,
            p_value=p,
            confidence_dpo=0.6 if confident else 0.1,
            fold_differences_pp=(1.0, 1.0, 1.0, 1.0, 1.0 if all_folds else -1.0),
            seed_differences_pp=(difference,) * 2 if all_seeds else (difference + 9, difference - 9),
            instability=() if stable else ("DPO was unstable: x.",),
        )
        if difference <= 0 or not stable:
            expected = "NOT SUPPORTED"
        elif difference > 2 and p < 0.05 and confident and all_folds and all_seeds:
            expected = "SUPPORTED"
        else:
            expected = "PARTIALLY SUPPORTED"
        assert decide(inputs).outcome == expected, inputs
        null_warning = "with no true difference this outcome comes up in almost half"
        assert (null_warning in said(inputs)) == (expected == "PARTIALLY SUPPORTED" and p >= 0.05), inputs


def test_instability_decides_even_over_a_gain():
    reasons = instability_reasons([0.5] * 18 + [0.7, 0.8])
    verdict = decide(replace(SUPPORTED, instability=reasons))
    assert verdict.outcome == "NOT SUPPORTED"
    assert verdict.reasons[1] == (
        "DPO was unstable: the mean loss of its last tenth of steps was 0.7500, above ln 2 = 0.6931."
    )
    both = decide(with_difference(-1.0, instability=reasons)).reasons
    assert both[1] == "The difference of -1.00 points is not above 0." and both[2] == reasons[0]


def test_instability_looks_at_the_last_tenth_and_at_bounds_only_above():
    assert instability_reasons([9.0] * 18 + [0.1, 0.1]) == ()
    assert instability_reasons([0.1] * 17 + [9.0] + [0.1, 0.1]) == ()  # a peak before the tenth
    assert len(instability_reasons([0.1] * 19 + [9.0])) == 1
    assert len(instability_reasons([0.1] * 9 + [1.0])) == 1  # ten steps: the last one
    assert len(instability_reasons([0.1] * 9 + [1.4, 0.1])) == 1  # eleven: the last two
    assert instability_reasons([math.log(2)]) == ()
    assert "was 0.69315, above" in instability_reasons([math.log(2) + 1e-7])[0]


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_non_finite_loss_is_instability(loss):
    assert instability_reasons([0.5, loss, 0.4]) == ("DPO was unstable: training met a non-finite loss.",)
    with pytest.raises(ValueError, match="losses"):
        instability_reasons([])


def test_quantisation_loss_is_instability_above_two_points():
    assert instability_reasons([0.5], None) == instability_reasons([0.5], 2.0) == ()
    assert instability_reasons([0.5], -3.0) == ()
    (reason,) = instability_reasons([0.5], 2.34)
    assert reason == (
        "DPO was unstable: quantisation costs it more accuracy than SFT; the lower 95 % bound of "
        "that excess is 2.34 points, above 2."
    )
    assert "2.0001 points, above 2" in instability_reasons([0.5], 2.0001)[0]
    assert len(instability_reasons([0.8], 3.0)) == 2


def test_a_failed_run_is_not_supported_without_any_number():
    verdict = failed_training_verdict("step 312: loss nan")
    assert verdict == Verdict(
        "NOT SUPPORTED",
        (
            "DPO was unstable: training ended on a non-finite loss (step 312: loss nan).",
            "There is no DPO adapter to compare.",
        ),
    )


# Always said


OUTCOMES = [SUPPORTED, with_difference(1.0), with_difference(-1.0)]


@pytest.mark.parametrize("inputs", OUTCOMES)
def test_what_is_always_said(inputs):
    text = said(inputs)
    for sentence in (
        "95 % interval +3.10 to +8.30",
        "With 1,208 comparisons, 15.0 % of them discordant, the minimum detectable effect is 3.1 "
        "points (80 % power, two-sided 0.05); 2,941 comparisons are needed to see 2 points.",
        "The chance of SUPPORTED with this test is 20.3 % at a true gain of 2 points, "
        "44.0 % at 3 and 87.0 % at 5 (simulated, DPO's confidence taken as higher).",
        "The best baseline, popularity (75.11 %), beats neither arm.",
        "No arm trained SFT on for as long as DPO: the gain of extra training is not excluded.",
        "Number of seeds: 1, so the spread between training runs is not known.",
        "DPO's confidence rises with 1/beta by construction, with no better ranking: look at the "
        "calibrated Brier, NLL and ECE beside it.",
    ):
        assert sentence in text
    assert "unknown: it may" not in text and "extra training was excluded" not in text


@pytest.mark.parametrize(
    ("interval", "small"),
    [
        ((-1.0, 3.0), True),
        ((0.0, 2.0), True),
        ((0.001, 2.5), False),
        ((-1.0, 1.999), False),
        ((-3.0, -0.1), False),
        ((2.0, 4.0), False),
        ((0.0, 0.0), False),
    ],
)
def test_too_small_to_tell_where_the_interval_holds_0_and_2(interval, small):
    for inputs in OUTCOMES:
        text = said(replace(inputs, ci95_pp=interval))
        assert ("this test was too small to tell" in text) == small


@pytest.mark.parametrize(
    ("accuracy", "text"),
    [
        (0.9, "(90.00 %), beats both arms."),
        (0.842, "(84.20 %), beats SFT only."),
        (0.785, "(78.50 %), beats neither arm."),
    ],
)
def test_the_best_baseline_is_compared_with_both_arms(accuracy, text):
    assert f"The best baseline, popularity {text}" in said(replace(SUPPORTED, best_baseline_accuracy=accuracy))
    worse_dpo = with_difference(-5.0, best_baseline_accuracy=0.76)
    assert "beats DPO only" in said(worse_dpo)


def test_extra_training_is_excluded_only_by_an_interval_above_0():
    better = replace(SUPPORTED, sft_more_difference_pp=3.0, sft_more_ci95_pp=(0.5, 5.5))
    assert (
        "Against sft-more, which trained SFT on for as long, DPO differs by +3.00 points (95 % "
        "interval +0.50 to +5.50): extra training was excluded." in said(better)
    )
    for interval in ((0.0, 6.0), (-1.0, 7.0)):
        text = said(replace(better, sft_more_ci95_pp=interval))
        assert "the gain of extra training is not excluded." in text
        assert "extra training was excluded" not in text


def test_the_number_of_seeds_and_their_spread():
    text = said(replace(SUPPORTED, seed_differences_pp=(4.7, 5.7, 6.7)))
    assert "Number of seeds: 3, with differences of +4.70, +5.70, +6.70 points (standard deviation 1.00)." in text
    assert "and for each of the 3 seeds." in text
    assert "every seed as positive: an upper bound" in text


def test_popularity_is_named_where_it_explains_the_data():
    sentence = "popularity explains the data"
    assert sentence not in said(replace(SUPPORTED, popularity_accuracy=0.52))
    text = said(replace(SUPPORTED, popularity_accuracy=0.8218))
    assert sentence in text and "82.18 %" in text


def test_unknown_training_rows_are_said():
    text = said(replace(SUPPORTED, sft_training_rows_known=False))
    assert "The test may be contaminated: the SFT adapter's training rows are unknown" in text


@pytest.mark.parametrize(
    ("p", "text"),
    [
        (1.0, "p = 1.0000"),
        (0.0003, "p = 0.0003"),
        (0.00009999, "p < 0.0001"),
        (0.0, "p < 0.0001"),
        (0.04999, "p = 0.04999"),
        (0.05, "p = 0.0500"),
        (0.049994, "p = 0.04999"),
    ],
)
def test_p_is_never_rounded_across_its_limit(p, text):
    assert p_text(p) == text


@given(st.floats(0, 1))
def test_the_printed_p_falls_on_the_same_side_as_p(p):
    if p >= 0.0001:
        shown = float(p_text(p).removeprefix("p = "))
        assert (shown < 0.05) == (p < 0.05)
        assert shown == pytest.approx(p, abs=0.5001e-4)


# Refusals


BAD = [
    ({"difference_pp": math.nan}, "difference_pp is not finite"),
    ({"p_value": math.nan}, "p_value is not finite"),
    ({"ci95_pp": (math.nan, 1.0)}, "ci95_pp is not finite"),
    ({"fold_differences_pp": (1.0, 1.0, math.nan, 1.0, 1.0)}, "fold_differences_pp is not finite"),
    ({"chance_of_supported": {"2": 0.1, "3": math.inf, "5": 0.1}}, "chance_of_supported is not"),
    ({"confidence_dpo": math.inf}, "confidence_dpo is not finite"),
    ({"p_value": 1.2}, r"p_value must be in \[0, 1\]"),
    ({"accuracy_sft": 78.5}, r"accuracy_sft must be in \[0, 1\]"),
    ({"best_baseline_accuracy": 82.0}, r"best_baseline_accuracy must be in \[0, 1\]"),
    ({"difference_pp": 0.057}, "difference_pp is 0.057, the accuracies give 5.7"),
    ({"ci95_pp": (8.3, 3.1)}, "not \\(low, high\\)"),
    ({"fold_differences_pp": (1.0, 1.0)}, "needs 5 fold differences"),
    ({"seed_differences_pp": ()}, "the mean of seed_differences_pp is not difference_pp"),
    ({"seed_differences_pp": (5.7, 5.6)}, "the mean of seed_differences_pp is not"),
    ({"chance_of_supported": {"2": 0.1}}, "keys"),
    ({"sft_more_difference_pp": 1.0}, "go together"),
]


@pytest.mark.parametrize(("changes", "message"), BAD)
def test_numbers_that_no_rule_can_judge_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        decide(replace(SUPPORTED, **changes))


def test_numpy_numbers_and_lists_are_as_good():
    inputs = replace(
        SUPPORTED,
        n_comparisons=np.int64(1208),
        p_value=np.float64(0.0003),
        fold_differences_pp=list(SUPPORTED.fold_differences_pp),
        comparisons_needed_for_2pp=np.int64(2941),
    )
    assert decide(inputs) == decide(SUPPORTED)


# From arrays to the verdict


def inputs_from(sft, dpo, users):
    """VerdictInputs of two arms' correctness, with DPO's confidence higher."""
    result = paired_test(sft, dpo, users, resamples=500)
    return replace(
        SUPPORTED,
        n_comparisons=len(sft),
        accuracy_sft=float(np.mean(sft)),
        accuracy_dpo=float(np.mean(dpo)),
        difference_pp=result.difference_pp,
        ci95_pp=result.ci95_pp,
        p_value=result.p_value,
        fold_differences_pp=fold_differences_pp(dpo - sft, user_folds(users)),
        seed_differences_pp=result.seed_differences_pp,
        discordance=result.discordance,
        minimum_detectable_effect_pp=minimum_detectable_effect_pp(len(sft), result.discordance),
        comparisons_needed_for_2pp=comparisons_needed(2, result.discordance),
    )


def test_identical_arms_are_not_supported():
    for users in (np.arange(60), np.arange(60) // 3):
        correct = np.random.default_rng(1).choice([0, 0.5, 1], 60)
        inputs = inputs_from(correct, correct, users)
        assert (inputs.difference_pp, inputs.p_value) == (0, 1)
        assert decide(inputs).outcome == "NOT SUPPORTED"


def test_exchanged_arms_never_keep_a_supported_verdict():
    rng = np.random.default_rng(2)
    sft = (rng.random(500) < 0.7).astype(float)
    dpo = np.maximum(sft, rng.random(500) < 0.4)
    assert decide(inputs_from(sft, dpo, np.arange(500))).outcome == "SUPPORTED"
    assert decide(inputs_from(dpo, sft, np.arange(500))).outcome == "NOT SUPPORTED"


@pytest.mark.parametrize(("n", "gain"), [(2000, 0.05), (500, 0.05)])
def test_the_simulated_chance_is_that_of_this_rule(n, gain):
    """Whole experiments through paired_test, the folds and decide; four binomial errors."""
    rng, users, found = np.random.default_rng(3), np.arange(n), 0
    for _ in range(200):
        d = rng.choice([-1, 0, 1], n, p=[(0.15 - gain) / 2, 0.85, (0.15 + gain) / 2])
        inputs = inputs_from((d <= 0).astype(float), (d >= 0).astype(float), users)
        found += decide(inputs).outcome == "SUPPORTED"
    chance = chance_of_supported(100 * gain, n, 0.15)
    assert found / 200 == pytest.approx(chance, abs=4 * math.sqrt(chance * (1 - chance) / 200))
    assert n < 2000 or found / 200 > 0.9


# Found by mutation: changes of the rule that no test above noticed.


def test_an_unstable_gain_is_not_called_a_loss():
    """Between 0 and 1 point, too."""
    inputs = with_difference(0.5, instability=("DPO was unstable: it said so.",))
    verdict = decide(inputs)
    assert verdict.outcome == "NOT SUPPORTED" and verdict.reasons[1] == "DPO was unstable: it said so."
    assert "is not above 0" not in said(inputs)


def test_two_seeds_are_spoken_of_as_two():
    text = said(replace(SUPPORTED, seed_differences_pp=(5.2, 6.2)))
    assert "(+5.00, +6.50, +4.00, +5.00, +8.00 points) and for each of the 2 seeds." in text
    assert "(simulated, DPO's confidence taken as higher and every seed as positive: an upper bound)." in text


def test_an_interval_that_just_touches_zero_holds_it():
    sentence = "The 95 % interval holds both 0 and 2 points: this test was too small to tell."
    touching = with_difference(-1.0, ci95_pp=(-3.0, 0.0))
    assert sentence not in decide(touching).reasons  # it ends before 2
    assert sentence in decide(with_difference(1.0, ci95_pp=(0.0, 2.0))).reasons
    assert sentence in decide(with_difference(1.0, ci95_pp=(-1.0, 2.0))).reasons


def test_every_field_is_checked_whatever_stands_before_it():
    with pytest.raises(ValueError, match="sft_more_difference_pp is not finite"):
        decide(
            replace(SUPPORTED, popularity_accuracy=None, sft_more_difference_pp=math.nan, sft_more_ci95_pp=(0.0, 1.0))
        )
    for half in ({"sft_more_difference_pp": 1.0}, {"sft_more_ci95_pp": (0.0, 1.0)}):
        with pytest.raises(ValueError, match="sft-more's difference and its interval go together"):
            decide(replace(SUPPORTED, **half))


def test_a_difference_half_a_point_off_the_accuracies_is_refused():
    with pytest.raises(ValueError, match="difference_pp is 5.2, the accuracies give 5.7"):
        decide(replace(SUPPORTED, difference_pp=5.2, seed_differences_pp=(5.2,)))


def test_bounds_that_belong_to_one_side():
    assert p_text(0.0001) == "p = 0.0001" and p_text(0.00009999) == "p < 0.0001"
    assert "popularity explains" in said(replace(SUPPORTED, popularity_accuracy=0.65))
    assert decide(replace(SUPPORTED, p_value=0.0)).outcome == "SUPPORTED"


def test_numbers_keep_their_side_of_zero():
    """A tiny loss is never printed as +0.00, nor a tiny gain as -0.00."""
    text = said(with_difference(-0.001, ci95_pp=(-0.004, 0.002)))
    assert "difference of -0.001 points (95 % interval -0.004 to +0.002" in text
    more = said(replace(SUPPORTED, sft_more_difference_pp=0.003, sft_more_ci95_pp=(-0.001, 0.004)))
    assert "by +0.003 points (95 % interval -0.001 to +0.004): the gain" in more


def test_the_contamination_is_explained_whole():
    assert decide(replace(SUPPORTED, sft_training_rows_known=False)).reasons[-1] == (
        "The test may be contaminated: the SFT adapter's training rows are unknown; if test rows are among them, its"
        " accuracy, and that of the DPO adapter built on it, are too high."
    )
