"""From scores to results: every arm's numbers, the tests between them, and the verdict. No model, no files."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantpref import power
from quantpref import statistics as st
from quantpref.baselines import Margins, baseline_margins
from quantpref.comparisons import Comparison, Split, fingerprint
from quantpref.metrics import arm_metrics, baseline_metrics, secondary_tests
from quantpref.scoring import Scores
from quantpref.sections import name_of
from quantpref.slices import disagreements, slices
from quantpref.verdict import TRUE_GAINS_PP, VerdictInputs, decide, failed_training_verdict

Rights = Mapping[str, NDArray[np.float64]]  # per arm (seeds, n): 1 right, 0.5 a tie, 0 wrong

ControlSet = tuple[Sequence[Comparison], Mapping[str, Scores]]


def analyse(
    split: Split,
    test: Mapping[str, Scores],
    validation: Mapping[str, Scores],
    seed: int,
    controls: Mapping[str, ControlSet],
    sixteen_bit: Mapping[str, Scores] | None = None,
) -> dict[str, Any]:
    """The parts of results.json that follow from one run's scores, but for the verdict.

    `controls`: the control sets and the scores on them, by name.
    `sixteen_bit`: the same arms' test scores on the base in 16 bits, where that was asked for.
    """
    users = [c.cluster for c in split.test]
    margins = baseline_margins(split.train, split.test)
    arms = {arm: arm_metrics(scores, validation[arm]) for arm, scores in test.items()}
    results: dict[str, Any] = {
        "arms": arms,
        "baselines": {name: baseline_metrics(found) for name, found in margins.items()},
        "controls": {name: control_results(split, test, margins, control, seed) for name, control in controls.items()},
    }
    if "dpo" in test:
        results["secondary_tests"] = secondary_tests(
            test, arms, users, seed, {name: ([c.cluster for c in rows], s) for name, (rows, s) in controls.items()}
        )
        results["against_sft"] = against_sft(test, users, seed)
        results["slices"] = slices(split.train, split.test, test, seed)
        results["disagreements"] = disagreements(split.test, test)
    if sixteen_bit is not None:
        results["quantisation"] = quantisation_loss(test, sixteen_bit, users, seed)
    return results


def control_results(
    split: Split, test: Mapping[str, Scores], margins: Mapping[str, Margins], control: ControlSet, seed: int
) -> dict[str, Any]:
    """Accuracy of every arm and baseline on one control set, and on the same comparisons of the main test.

    `main_less_control_pp`: what is lost when the set takes something away, with an interval clustered by user.
    """
    rows, scores = control
    users = [c.cluster for c in rows]
    place = {c.line: i for i, c in enumerate(split.test)}
    same = np.array([place[c.line] for c in rows])
    pairs = {name: (margins[name], found) for name, found in baseline_margins(split.train, rows).items()}
    pairs |= {arm: (test[arm].margins, found.margins) for arm, found in scores.items()}
    found = {}
    for name, (main, on_control) in pairs.items():
        right, lost = st.correctness(on_control), st.correctness(main[same]) - st.correctness(on_control)
        low, high = st.paired_bootstrap(lost, users, seed)
        found[name] = {
            **baseline_metrics(on_control),
            "main_accuracy": float((right + lost).mean()),
            "main_less_control_pp": float(100 * lost.mean()),
            "ci95_pp": [100 * low, 100 * high],
        }
    return {
        "n": len(rows),
        "sha256": fingerprint(rows),
        "arms": {arm: found[arm] for arm in scores},
        "baselines": {name: row for name, row in found.items() if name not in scores},
    }


def against_sft(test: Mapping[str, Scores], users: Sequence[str], seed: int) -> dict[str, Any]:
    """Every other arm's accuracy less SFT's on the same comparisons, with its interval and p-value."""
    right = {arm: st.correctness(scores.margins) for arm, scores in test.items()}
    found = {}
    for arm in right.keys() - {"sft"}:
        test_of = st.paired_test(right["sft"], right[arm], users, seed)
        found[arm] = {
            "difference_pp": test_of.difference_pp,
            "ci95_pp": list(test_of.ci95_pp),
            "p_value": test_of.p_value,
        }
    return dict(sorted(found.items()))


def quantisation_loss(
    four: Mapping[str, Scores], sixteen: Mapping[str, Scores], users: Sequence[str], seed: int
) -> dict[str, Any]:
    """Accuracy that each arm loses from 16 to 4 bits (points), and DPO's loss less SFT's, with intervals."""
    lost = {arm: st.correctness(sixteen[arm].margins) - st.correctness(four[arm].margins) for arm in sixteen}

    def with_interval(values: NDArray[np.float64]) -> dict[str, Any]:
        low, high = st.paired_bootstrap(values, users, seed)
        return {"loss_pp": float(100 * values.mean()), "ci95_pp": [100 * low, 100 * high]}

    accuracies = {arm: float(st.correctness(scores.margins).mean()) for arm, scores in sixteen.items()}
    arms = {arm: {"accuracy_16bit": accuracies[arm], **with_interval(values)} for arm, values in lost.items()}
    excess = with_interval(lost["dpo"] - lost["sft"]) if "dpo" in lost else None
    return {"arms": arms, "dpo_less_sft": excess}


def verdict(
    results: Mapping[str, Any],
    right: Rights,
    users: Sequence[str],
    instability: Sequence[str],
    sft_known: bool,
    seed: int,
) -> dict[str, Any]:
    """The paired test between SFT and DPO, and the rule that was fixed before the data was seen."""
    arms, n = results["arms"], len(users)
    differences = right["dpo"] - right["sft"]
    test = st.paired_test(right["sft"], right["dpo"], users, seed)
    more = st.paired_test(right["sft-more"], right["dpo"], users, seed) if "sft-more" in right else None
    best, best_row = max(results["baselines"].items(), key=lambda item: item[1]["accuracy"])
    of_a_comparison = differences.mean(axis=0)
    inputs = VerdictInputs(
        n_comparisons=n,
        accuracy_sft=float(right["sft"].mean()),
        accuracy_dpo=float(right["dpo"].mean()),
        difference_pp=test.difference_pp,
        ci95_pp=test.ci95_pp,
        p_value=test.p_value,
        confidence_sft=arms["sft"]["confidence"],
        confidence_dpo=arms["dpo"]["confidence"],
        fold_differences_pp=st.fold_differences_pp(differences, st.user_folds(users, seed=seed)),
        seed_differences_pp=test.seed_differences_pp,
        discordance=test.discordance,
        minimum_detectable_effect_pp=power.minimum_detectable_effect_pp(n, test.discordance, test.design_effect),
        comparisons_needed_for_2pp=power.comparisons_needed(2, test.discordance, test.design_effect),
        chance_of_supported={
            gain: power.chance_of_supported_observed(float(gain), of_a_comparison, users, seed)
            for gain in TRUE_GAINS_PP
        },
        best_baseline=name_of(best),
        best_baseline_accuracy=best_row["accuracy"],
        popularity_accuracy=results["baselines"]["popularity"]["accuracy"],
        sft_more_difference_pp=more.difference_pp if more else None,
        sft_more_ci95_pp=more.ci95_pp if more else None,
        instability=tuple(instability),
        sft_training_rows_known=sft_known,
    )
    decided = decide(inputs)
    return {
        "outcome": decided.outcome,
        "reasons": list(decided.reasons),
        **{name: list(value) if isinstance(value, tuple) else value for name, value in vars(inputs).items()},
        "test": test.test,
        "mcnemar_p": test.mcnemar_p,
        "wins": test.wins,
        "losses": test.losses,
        "design_effect": test.design_effect,
    }


def failed_verdict(failed: Mapping[str, Any]) -> dict[str, Any]:
    """NOT SUPPORTED where DPO ended on a number that is not finite: there is nothing to compare."""
    decided = failed_training_verdict(f"step {failed['step']}: {failed['numbers']}")
    numbers = (
        "difference_pp", "ci95_pp", "p_value", "minimum_detectable_effect_pp", "comparisons_needed_for_2pp",
        "chance_of_supported",
    )  # fmt: skip
    return {"outcome": decided.outcome, "reasons": list(decided.reasons), **dict.fromkeys(numbers)}


def mean_over_runs(runs: Sequence[Mapping[str, Any]], right: Rights, users: Sequence[str], seed: int) -> dict[str, Any]:
    """The arms' numbers as means over runs of several seeds; accuracy's interval resamples seeds and users."""
    arms: dict[str, Any] = {}
    for arm, rights in right.items():
        each = [run["arms"][arm] for run in runs]
        names = [k for k, v in each[0].items() if isinstance(v, float | int) and not isinstance(v, bool)]
        arms[arm] = {name: float(np.mean([row[name] for row in each])) for name in names}
        arms[arm]["accuracy_ci95"] = list(st.paired_bootstrap(rights, users, seed))
        arms[arm]["accuracy_by_run"] = [row["accuracy"] for row in each]
        arms[arm]["accuracy_sd_over_runs"] = float(np.std([row["accuracy"] for row in each], ddof=1))
    return arms
