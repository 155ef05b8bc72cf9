"""A realistic results.json for the tests of report and figures, in the schema that evaluate_dpo.py writes."""

from typing import Any

import numpy as np

from quantpref import statistics as st
from quantpref.verdict import VerdictInputs, decide

GENRES = ("Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama", "Fantasy",
          "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western")  # fmt: skip
SKILL = {"base": (0.05, 0.9), "sft": (0.75, 1.1), "sft-more": (0.85, 1.3), "dpo": (2.6, 3.1)}  # mean, sd of margins


def example_results(n: int = 1208, gain: bool = True) -> dict[str, Any]:
    """All keys, optional ones included. gain: DPO clearly better; else PARTIALLY SUPPORTED with p >= 0.05."""
    rng = np.random.default_rng(7)
    shared = rng.normal(size=n)
    margins = {arm: mean + sd * (0.9 * shared + 0.44 * rng.normal(size=n)) for arm, (mean, sd) in SKILL.items()}
    if not gain:
        margins["dpo"] = 2.5 * margins["sft"] + 0.2 * rng.normal(size=n) + 0.08
    arms = {arm: _arm(m, rng) for arm, m in margins.items()}
    baselines = {
        name: {"accuracy": share, "accuracy_ci95": list(st.wilson_interval(round(share * n), n))}
        for name, share in (
            ("always_a", 0.5), ("popularity", 0.571), ("genre_overlap", 0.668), ("co_occurrence", 0.644),
            ("release_year", 0.4938), ("logistic_regression", 0.702),
        )
    }  # fmt: skip
    return {
        "verdict": _verdict(margins, arms),
        "arms": arms,
        "baselines": baselines,
        "secondary_tests": [
            {"test": "confidence", "difference": 0.2411, "p_value": 0.0001, "p_holm": 0.0004},
            {"test": "brier_calibrated", "difference": -0.0107, "p_value": 0.1458, "p_holm": 0.3648},
            {"test": "flip_rate", "difference": 0.025, "p_value": 0.6217, "p_holm": 0.6217},
            {"test": "accuracy_against_sft_more", "difference": 0.031, "p_value": 0.1216, "p_holm": 0.3648},
        ],
        "controls": _controls(arms, baselines, n),
        "training": _training(rng),
        "slices": _slices(rng, n),
        "disagreements": [_disagreement(i, rng) for i in range(20)],
        "reasoning_check": {
            arm: {"n": 100, "form": 0.99, "agrees": 1.0, "exact_genres": 0.97} for arm in ("sft", "dpo")
        },
        **_provenance(n),
    }


def _controls(arms: dict[str, Any], baselines: dict[str, Any], n: int) -> dict[str, Any]:
    """Popularity falls on the matched set, every arm on the one with other users' histories."""

    def on(share: float, main: float) -> dict[str, Any]:
        lost = 100 * (main - share)
        return {
            "accuracy": share,
            "accuracy_ci95": list(st.wilson_interval(round(share * n), n)),
            "main_accuracy": main,
            "main_less_control_pp": lost,
            "ci95_pp": [lost - 3.1, lost + 3.1],
        }

    return {
        name: {
            "n": n,
            "sha256": "0" * 64,
            "arms": {arm: on(0.5 + (row["accuracy"] - 0.5) * kept, row["accuracy"]) for arm, row in arms.items()},
            "baselines": {
                rule: on(popular if rule == "popularity" else row["accuracy"], row["accuracy"])
                for rule, row in baselines.items()
            },
        }
        for name, kept, popular in (("popularity-matched", 0.8, 0.5), ("swapped-user", 0.3, 0.571))
    }


def failed_results() -> dict[str, Any]:
    """DPO's training ended on a NaN: no arm, no numbers in the verdict."""
    results = example_results()
    del results["arms"]["dpo"]
    for control in results["controls"].values():
        del control["arms"]["dpo"]
    for key in ("slices", "disagreements", "reasoning_check"):
        del results[key]
    results["secondary_tests"] = []
    results["adapters"].pop("dpo")
    results["training"]["dpo"] = [*results["training"]["dpo"][:100], {"step": 101, "loss": None}]
    nothing = ("difference_pp", "ci95_pp", "p_value", "minimum_detectable_effect_pp")
    results["verdict"] = {
        "outcome": "NOT SUPPORTED",
        "reasons": ["DPO was unstable: training ended on a non-finite loss (step 101: loss nan)."],
        **dict.fromkeys(nothing),
    }
    return results


def _arm(margins: np.ndarray, rng: np.random.Generator) -> dict[str, Any]:
    temperature = float(np.std(margins))
    right, bias = st.correctness(margins), rng.normal(0.3, 0.6, len(margins))
    first, second = margins + bias, margins - bias
    return {
        "accuracy": float(right.mean()),
        "accuracy_ci95": list(st.wilson_interval(float(right.sum()), len(right))),
        "confidence": st.confidence(margins),
        "mean_margin": float(margins.mean()),
        "accuracy_preferred_first": float(st.correctness(first).mean()),
        "accuracy_preferred_second": float(st.correctness(second).mean()),
        "flip_rate": float((np.sign(first) != np.sign(second)).mean()),
        "answer_mass": 0.99998,
        "ties": 0,
        "brier": st.brier(margins),
        "nll": st.nll(margins),
        "ece": st.ece(margins),
        "temperature": temperature,
        "temperature_at_bound": False,
        "brier_calibrated": st.brier(margins / temperature),
        "nll_calibrated": st.nll(margins / temperature),
        "ece_calibrated": st.ece(margins / temperature),
        "reliability": {"raw": _bins(margins), "calibrated": _bins(margins / temperature)},
        "confidence_histogram": {
            "edges": np.linspace(-1, 1, 41).tolist(),
            "counts": np.histogram(np.tanh(margins / 2), np.linspace(-1, 1, 41))[0].tolist(),
        },
    }


def _bins(margins: np.ndarray) -> dict[str, list[float]]:
    return {key: value.tolist() for key, value in st.reliability_bins(margins)._asdict().items()}


def _verdict(margins: dict[str, np.ndarray], arms: dict[str, Any]) -> dict[str, Any]:
    right = {arm: st.correctness(m) for arm, m in margins.items()}
    users = [str(i) for i in range(len(right["sft"]))]
    test = st.paired_test(right["sft"], right["dpo"], users, resamples=500)
    inputs = VerdictInputs(
        n_comparisons=len(users),
        accuracy_sft=arms["sft"]["accuracy"],
        accuracy_dpo=arms["dpo"]["accuracy"],
        difference_pp=test.difference_pp,
        ci95_pp=test.ci95_pp,
        p_value=test.p_value,
        confidence_sft=arms["sft"]["confidence"],
        confidence_dpo=arms["dpo"]["confidence"],
        fold_differences_pp=st.fold_differences_pp(right["dpo"] - right["sft"], st.user_folds(users)),
        seed_differences_pp=test.seed_differences_pp,
        discordance=test.discordance,
        minimum_detectable_effect_pp=3.1,
        comparisons_needed_for_2pp=2941,
        chance_of_supported={"2": 0.21, "3": 0.64, "5": 0.96},
        best_baseline="logistic_regression",
        best_baseline_accuracy=0.702,
    )
    decided = decide(inputs)
    numbers = {key: list(v) if isinstance(v, tuple) else v for key, v in vars(inputs).items()}
    return {"outcome": decided.outcome, "reasons": list(decided.reasons), **numbers}


def _training(rng: np.random.Generator, steps: int = 528) -> dict[str, list[dict[str, float]]]:
    at = np.arange(1, steps + 1)
    sft = 1.2 + 10 * np.exp(-at / 25) + 0.08 * rng.normal(size=steps)
    more = 1.15 - 0.1 * at / steps + 0.08 * rng.normal(size=steps)
    margin = 2.2 * (1 - np.exp(-at / 180)) + 0.25 * rng.normal(size=steps)
    accuracy = np.clip(np.round(8 * (0.55 + 0.2 * (1 - np.exp(-at / 120)) + 0.15 * rng.normal(size=steps))) / 8, 0, 1)
    loss = 0.693 - 0.2 * (1 - np.exp(-at / 150)) + 0.08 * rng.normal(size=steps)
    rows = zip(at, loss, margin, accuracy, strict=True)
    return {
        "sft": [{"step": int(s), "loss": float(x)} for s, x in zip(at, sft, strict=True)],
        "sft-more": [{"step": int(s), "loss": float(x)} for s, x in zip(at, more, strict=True)],
        "dpo": [
            {"step": int(s), "loss": float(x), "rewards/margins": float(m), "rewards/accuracies": float(a)}
            for s, x, m, a in rows
        ],
    }


def _slices(rng: np.random.Generator, n: int) -> dict[str, list[dict[str, Any]]]:
    kinds = {
        "popularity quartile of the preferred film": ["1 (least known)", "2", "3", "4 (best known)"],
        "popularity gap": ["preferred film far less known", "less known", "better known", "far better known"],
        "genre overlap of the options": ["none", "some", "the same genres"],
        "main genre of the preferred film": list(GENRES),
    }
    return {kind: [_slice(name, n // len(names), rng) for name in names] for kind, names in kinds.items()}


def _slice(name: str, size: int, rng: np.random.Generator) -> dict[str, Any]:
    sft, gain, half = 0.75 + 0.05 * rng.normal(), 4 + 3 * rng.normal(), 70 / size**0.5
    return {
        "slice": name,
        "n": size,
        "sft": float(sft),
        "dpo": float(sft + gain / 100),
        "difference_pp": float(gain),
        "ci95_pp": [float(gain - half), float(gain + half)],
    }


def _disagreement(index: int, rng: np.random.Generator) -> dict[str, Any]:
    return {
        "comparison": 17 + index,
        "history": ["Heat (1995)", "Léon: The Professional (1994)", "City of Lost Children, The (1995)",
                    "Seven (a.k.a. Se7en) (1995)", "Usual Suspects, The (1995)"],
        "option_a": "Good, the Bad and the Ugly, The (1966) (Action|Western)",
        "option_b": "<script>alert(1)</script> & `Sons` (1999) (Comedy|Drama)",
        "preferred": "AB"[index % 2],
        "p_sft": float(rng.uniform(0.02, 0.4)),
        "p_dpo": float(rng.uniform(0.6, 0.98)),
    }  # fmt: skip


def _provenance(n: int) -> dict[str, Any]:
    digest = "3bc1ce844d52d438dd1ebc35fd3dbeee7d1319657ed29ff426331ebc744ac9e8"
    base = {
        "model": "unsloth/llama-3-8b-bnb-4bit",
        "revision": None,
        "fingerprint": "bea041f0d33775ad9514db6a1aad8f976b4ef6d7c67ee5be82e0dde5779b5f3a",
        "backend": "transformers",
        "quantisation": {"bits": 4, "type": "nf4", "double_quantisation": True},
        "dtype": "bfloat16",
    }
    environment = {"versions": {"python": "3.11.7", "torch": "2.13.0", "trl": "1.15.0"}, "device": "NVIDIA H100",
                   "git_commit": None}  # fmt: skip
    adapter = {
        "base": base,
        "counts": {"pairs": 4228, "preferred_first": 2114, "shortened": 0},
        "adapter_sha256": digest[::-1],
        "seed": 3407,
        "environment": environment,
        "steps": 528,
        "first_loss": 0.6931,
        "last_tenth_mean_loss": 0.4871,
        "wall_seconds": 312.4,
        "pairs_per_second": 13.5,
        "tokens_seen": 934123,
    }
    lineage = {"sft": {"started_from": None, "reference": None}, "dpo": {"started_from": digest, "reference": digest},
               "sft-more": {"started_from": digest, "reference": None}}  # fmt: skip
    return {
        "data": {
            "file": "data/contrastive_rec_train.jsonl",
            "sha256": digest,
            "comparisons": 6040,
            "split": {"train": {"comparisons": 4228, "users": 4228}, "test": {"comparisons": n, "users": n}},
            "n_test": n,
            "n_train": 4228,
            "users_test": n,
            "test_file": "data/contrastive_rec_train.jsonl",
        },
        "base": base,
        "adapters": {arm: {**adapter, "kind": arm, "lineage": found} for arm, found in lineage.items()},
        "environment": environment,
        "config": {"data": "data/contrastive_rec_train.jsonl", "beta": 0.1, "learning_rate": 5e-5, "seed": 3407},
    }
