"""Runs of several seeds as one result: per comparison the mean over seeds, then the same tests by user."""

from pathlib import Path
from typing import Any

import numpy as np

from config import Config
from quantpref.analysis import mean_over_runs, verdict
from quantpref.comparisons import fingerprint
from quantpref.experiment import Data
from quantpref.metrics import read_predictions
from quantpref.runs import UserError, damage, environment, read_json
from quantpref.statistics import correctness


def aggregate(config: Config, data: Data) -> dict[str, Any]:
    """Read finished evaluations and judge them together.

    Raises:
        UserError: fewer than two runs; one that is not evaluated; runs of different data, base or settings;
            the same seed or adapter twice.
    """
    runs = [_read(folder) for folder in config.runs]
    _check(config, data, runs)
    users = [c.cluster for c in data.split.test]
    scores = [
        read_predictions(folder / "evaluation" / "predictions.parquet", data.split.test) for folder in config.runs
    ]
    shared = [arm for arm in scores[0] if all(arm in other for other in scores)]
    right = {arm: np.array([correctness(other[arm].margins) for other in scores]) for arm in shared}
    results: dict[str, Any] = {
        "arms": mean_over_runs(runs, right, users, config.seed),
        "baselines": runs[0]["baselines"],
        "data": runs[0]["data"],
        "base": runs[0]["base"],
        "runs": [
            {
                "folder": str(folder),
                "seed": run["config"]["seed"],
                "outcome": run["verdict"]["outcome"],
                "difference_pp": run["verdict"]["difference_pp"],
                "accuracy_sft": run["arms"]["sft"]["accuracy"],
                "accuracy_dpo": run["arms"]["dpo"]["accuracy"],
            }
            for folder, run in zip(config.runs, runs, strict=True)
        ],
        "environment": environment(),
        "config": config.as_json(),
    }
    instability = [reason for run in runs for reason in run["verdict"].get("instability", [])]
    known = all(run["verdict"].get("sft_training_rows_known", False) for run in runs)
    results["verdict"] = verdict(results, right, users, instability, known, config.seed)
    return results


def _read(folder: Path) -> dict[str, Any]:
    from quantpref.report import check

    path = folder / "evaluation" / "results.json"
    if not path.is_file():
        raise UserError(f"{path}: not found; run evaluate_dpo.py with --output-dir {folder} first")
    if fault := damage(path.parent):
        raise UserError(f"{fault}; evaluate that run again")
    results = read_json(path)
    check(results)
    if "dpo" not in results["arms"]:
        raise UserError(f"{path}: has no DPO arm, since its training failed; a failed seed is a result: report it")
    return results


def _check(config: Config, data: Data, runs: list[dict[str, Any]]) -> None:
    if len(runs) < 2:
        raise UserError("--runs needs two finished runs or more")
    now = fingerprint(data.split.test)
    for folder, run in zip(config.runs, runs, strict=True):
        if run["identity"]["test"] != now or run["data"]["split"] != runs[0]["data"]["split"]:
            raise UserError(
                f"{folder}: was tested on other comparisons; give all runs, and this command, the same data"
            )
        if run["base"]["fingerprint"] != runs[0]["base"]["fingerprint"]:
            raise UserError(f"{folder}: has another base than {config.runs[0]}")
        apart = {"seed", "output_dir", "show", "report_to", "sft_adapter", "backend", "max_shortcut", "strict"}
        changed = [k for k, v in run["config"].items() if k not in apart and runs[0]["config"].get(k) != v]
        if changed:
            raise UserError(f"{folder}: differs from {config.runs[0]} in {', '.join(changed)}, not in the seed alone")
    for what, values in (
        ("seed", [run["config"]["seed"] for run in runs]),
        ("DPO adapter", [run["identity"]["adapters"]["dpo"] for run in runs]),
    ):
        if len(set(values)) < len(values):
            raise UserError(f"--runs: two runs have the same {what}; they are not independent")
