"""results.json in words: the printed table, and report.md, from results.json alone."""

from typing import Any

NAMES = {
    "always_a": "Always A",
    "popularity": "Popularity",
    "genre_overlap": "Genre overlap",
    "co_occurrence": "Co-occurrence",
    "release_year": "Newer film",
    "logistic_regression": "Log. regression",
    "base": "Base, no adapter",
    "sft": "SFT Baseline",
    "sft-more": "SFT, trained on",
    "dpo": "DPO Optimized",
}


def table(results: dict[str, Any]) -> str:
    """The table of EXPERIMENT.md: base and baselines above, SFT and DPO last."""
    lines = [f"{'Model':<18} {'Accuracy (95% CI)':<23} {'Confidence':<11} Improvement"]
    for name, row in _rows(results):
        low, high = (100 * x for x in row["accuracy_ci95"])
        accuracy = f"{row['accuracy']:.2%} ({low:.1f}-{high:.1f})"
        confidence = f"{row['confidence']:.4f}" if "confidence" in row else "-"
        lines.append(f"{NAMES.get(name, name):<18} {accuracy:<23} {confidence:<11} {_improvement(name, results)}")
    return "\n".join(lines)


def _rows(results: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    arms = results["arms"]
    order = ["base", *(a for a in arms if a not in ("base", "sft", "dpo")), "sft", "dpo"]
    return [*results["baselines"].items(), *((a, arms[a]) for a in order if a in arms)]


def _improvement(name: str, results: dict[str, Any]) -> str:
    from quantpref.verdict import p_text

    if name != "dpo" or results["verdict"]["p_value"] is None:
        return "-"
    verdict = results["verdict"]
    return f"{verdict['difference_pp']:+.2f} pp ({p_text(verdict['p_value'])})"


def verdict_text(results: dict[str, Any]) -> str:
    verdict = results["verdict"]
    return "\n".join([f"VERDICT: {verdict['outcome']}", *(f"  - {reason}" for reason in verdict["reasons"])])


def markdown(results: dict[str, Any]) -> str:
    """report.md: the verdict on top, the table, every arm's numbers, and what was run."""
    data, arms = results["data"], results["arms"]
    numbers = [key for key, value in arms["base"].items() if not isinstance(value, list)]
    head = f"| | {' | '.join(arms)} |\n| --- |{' ---: |' * len(arms)}\n"
    rows = "\n".join(f"| {key} | " + " | ".join(_number(arm[key]) for arm in arms.values()) + " |" for key in numbers)
    return f"""# DPO against SFT in 4-bit recommendation: {results["verdict"]["outcome"]}

```
{table(results)}

{verdict_text(results)}
```

## Every number

{head}{rows}

Accuracies and probabilities are in 0..1, margins and NLL in nats; `_calibrated` is after one temperature per arm, fitted
on the validation users; `_single_order` is the mean over the two orders of the options, each judged alone.

## What was run

{data["n_test"]:,} test comparisons of {data["users_test"]:,} users from `{data["test_file"]}` (SHA-256 `{data["sha256"]}`), base
`{results["base"]["model"]}` (fingerprint `{results["base"]["fingerprint"][:16]}`), seed {results["config"]["seed"]}, device
{results["environment"]["device"]}. Every number can be recomputed from `predictions.parquet`.
"""


def _number(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)
