"""The three scripts as a user runs them, on the embedded base: what they write, say and refuse."""

import json
import math
import os
import shutil
import subprocess
import sys
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file, save_file
from scipy.optimize import minimize_scalar
from scipy.stats import binomtest
from sklearn.metrics import roc_auc_score

from config import ROOT
from quantpref.comparisons import counterbalance, flip, load, save, split_by_user
from quantpref.controls import MATCHED, control_file
from quantpref.runs import write_manifest
from quantpref.simulate import simulate


def run(*arguments, status=0, cwd=ROOT):
    """A command as a user types it; returns its output, and checks exit status and the one-line error."""
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], capture_output=True, text=True, cwd=cwd,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""},
    )  # fmt: skip
    assert done.returncode == status, (
        f"{arguments}: exit {done.returncode}\n{done.stdout[-1500:]}\n{done.stderr[-3000:]}"
    )
    assert "Traceback" not in done.stderr
    if status:
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    return done.stdout + done.stderr


def script(name, out, data, *more, status=0):
    return run(ROOT / name, "--preset", "tiny", "--data", data, "--output-dir", out, *more, status=status)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """240 simulated people, one comparison each, and a control set with other other films beside them."""
    path = tmp_path_factory.mktemp("data") / "with umlaut ä" / "small.jsonl"
    rows = simulate(240, seed=11).comparisons
    save(path, rows)
    save(control_file(path, MATCHED), [other_film(c, rows) for c in rows])
    return path


def other_film(c, rows):
    """The comparison with the first other film of the others that it does not show."""
    shown = {m.title for m in (*c.history, c.option_a, c.option_b)}
    film = next(r.other for r in rows if r.other.title not in shown)
    return replace(c, **{"option_b" if c.label == "A" else "option_a": film})


@pytest.fixture(scope="module")
def out(data, tmp_path_factory):
    """A finished run: verify, train, evaluate."""
    folder = tmp_path_factory.mktemp("run")
    verified = script("verify_dpo_setup.py", folder, data)
    assert "✗" not in verified and "loss 0.6931 (ln 2 = 0.6931)" in verified
    trained = script("train_dpo.py", folder, data)
    assert "168 comparisons to train on, 24 for validation, 48 to test on" in trained
    evaluated = script("evaluate_dpo.py", folder, data, "--show", 3)
    assert "Sample 3/3" in evaluated and "VERDICT: " in evaluated
    return folder


def results_of(folder):
    return json.loads((folder / "evaluation" / "results.json").read_text(encoding="utf-8"))


def manifest(folder, arm):
    return json.loads((folder / f"llama3_{arm}_4bit_final" / "manifest.json").read_text(encoding="utf-8"))


def test_adapters_stand_with_their_manifests(out):
    sft, more, dpo = (manifest(out, arm) for arm in ("sft", "sft_more", "dpo"))
    assert sft["lineage"] == {"started_from": None, "reference": None}
    assert more["lineage"] == {"started_from": sft["adapter_sha256"], "reference": None}
    assert dpo["lineage"] == {"started_from": sft["adapter_sha256"], "reference": sft["adapter_sha256"]}
    assert sft["base"] == more["base"] == dpo["base"] and len(dpo["base"]["fingerprint"]) == 64
    assert sft["data"] == dpo["data"] and dpo["data"]["comparisons"] == 240
    assert sft["counts"] == dpo["counts"] == {"pairs": 168, "preferred_first": 84, "shortened": 0}
    assert dpo["trainable_weights"] == 155_648 and dpo["steps"] == 21
    assert dpo["first_loss"] == pytest.approx(math.log(2), abs=1e-6)


def test_training_log_has_every_step(out):
    log = [json.loads(line) for line in (out / "llama3_dpo_4bit_final" / "training_log.jsonl").open()]
    assert [row["step"] for row in log] == list(range(1, 22))
    assert {"loss", "learning_rate", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"} <= (
        log[0].keys()
    )
    assert log[0]["rewards/margins"] == 0 and log[-1]["rewards/margins"] != 0


def test_every_adapter_moved_away_from_the_one_it_started_from(out):
    sft, more, dpo = (
        load_file(out / f"llama3_{arm}_4bit_final" / "adapter_model.safetensors") for arm in ("sft", "sft_more", "dpo")
    )
    assert sft.keys() == dpo.keys() and len(sft) == 56
    for name in sft:
        assert not sft[name].equal(dpo[name]) and not sft[name].equal(more[name]) and not more[name].equal(dpo[name])


def check_the_other_numbers(out, results):
    """AUC, ECE, answer mass, single orders and calibration by sklearn, scipy and loops."""
    tables = {
        name: pq.read_table(out / "evaluation" / f"predictions{name}.parquet").to_pylist()
        for name in ("", "_validation")
    }
    for arm, numbers in results["arms"].items():
        rows = [row for row in tables[""] if row["arm"] == arm]
        a_less_b = np.array([row["logp_a"] - row["logp_b"] for row in rows])
        a_preferred = np.array([row["preferred"] == "A" for row in rows])
        single = np.where(a_preferred, a_less_b, -a_less_b)
        assert numbers["auc"] == pytest.approx(roc_auc_score(a_preferred, a_less_b))
        assert numbers["answer_mass"] == pytest.approx(
            np.mean([math.exp(row["logp_a"]) + math.exp(row["logp_b"]) for row in rows])
        )
        assert numbers["accuracy_single_order"] == pytest.approx(np.mean(single > 0))
        assert numbers["confidence_single_order"] == pytest.approx(np.mean(2 / (1 + np.exp(-single)) - 1))
        assert numbers["brier_single_order"] == pytest.approx(np.mean((1 - 1 / (1 + np.exp(-single))) ** 2))

        def two_order(rows_of):
            margins = defaultdict(list)
            for row in rows_of:
                sign = 1 if row["preferred"] == "A" else -1
                margins[row["comparison"]].append(sign * (row["logp_a"] - row["logp_b"]))
            return np.array([sum(pair) / 2 for pair in margins.values()])

        margins = two_order(rows)
        assert numbers["mean_margin"] == pytest.approx(margins.mean())
        sure = 1 / (1 + np.exp(-np.abs(margins)))
        bins = np.array_split(np.argsort(sure, kind="stable"), 15)
        ece = sum(len(b) * abs(sure[b].mean() - (margins[b] > 0).mean()) for b in bins) / len(margins)
        assert numbers["ece"] == pytest.approx(ece, abs=1e-6)
        seen = two_order([row for row in tables["_validation"] if row["arm"] == arm])
        best = minimize_scalar(
            lambda log_t, seen=seen: np.mean(np.logaddexp(0, -seen / math.exp(log_t))),
            bounds=(math.log(0.05), math.log(100)), method="bounded", options={"xatol": 1e-8},
        )  # fmt: skip
        scaled = margins / math.exp(best.x)
        assert numbers["nll_calibrated"] == pytest.approx(np.mean(np.logaddexp(0, -scaled)), rel=1e-3)
        assert numbers["brier_calibrated"] == pytest.approx(np.mean((1 - 1 / (1 + np.exp(-scaled))) ** 2), rel=1e-3)


def test_results_follow_from_the_predictions(out, data):
    """Plain loops over predictions.parquet, sharing no code with the package."""
    results = results_of(out)
    margins = defaultdict(dict)
    for row in pq.read_table(out / "evaluation" / "predictions.parquet").to_pylist():
        a_less_b = row["logp_a"] - row["logp_b"]
        margin = a_less_b if row["preferred"] == "A" else -a_less_b
        margins[row["arm"]].setdefault(row["comparison"], {})[row["order"]] = margin
    assert set(margins) == {"base", "sft", "dpo", "sft-more"} == set(results["arms"])
    right = {}
    for arm, rows in margins.items():
        assert len(rows) == 48
        means = {line: (m["preferred_first"] + m["preferred_second"]) / 2 for line, m in rows.items()}
        right[arm] = {line: m > 0 for line, m in means.items()}
        numbers = results["arms"][arm]
        assert numbers["accuracy"] == pytest.approx(sum(right[arm].values()) / 48)
        sigmoid = [1 / (1 + math.exp(-m)) for m in means.values()]
        assert numbers["confidence"] == pytest.approx(sum(2 * p - 1 for p in sigmoid) / 48)
        assert numbers["brier"] == pytest.approx(sum((1 - p) ** 2 for p in sigmoid) / 48)
        assert numbers["nll"] == pytest.approx(sum(-math.log(p) for p in sigmoid) / 48)
        for order in ("preferred_first", "preferred_second"):
            share = sum(m[order] > 0 for m in rows.values()) / 48
            assert numbers[f"accuracy_{order}"] == pytest.approx(share)
        flips = sum((m["preferred_first"] > 0) != (m["preferred_second"] > 0) for m in rows.values())
        assert numbers["flip_rate"] == pytest.approx(flips / 48)
    check_the_other_numbers(out, results)
    wins = sum(right["dpo"][line] and not right["sft"][line] for line in right["dpo"])
    losses = sum(right["sft"][line] and not right["dpo"][line] for line in right["dpo"])
    verdict = results["verdict"]
    assert verdict["difference_pp"] == pytest.approx(100 * (wins - losses) / 48)
    assert verdict["p_value"] == pytest.approx(binomtest(wins, wins + losses).pvalue if wins + losses else 1.0)
    assert verdict["ci95_pp"][0] <= verdict["difference_pp"] <= verdict["ci95_pp"][1]
    test_lines = {c.line for c in split_by_user(load(data), 0.7, 0.1, 3407).test}
    assert set(right["dpo"]) == test_lines
    assert results["baselines"]["always_a"]["accuracy"] == 0.5
    assert results["data"]["n_test"] == 48


def test_control_sets_are_scored_and_follow_from_their_predictions(out, data):
    """Plain loops again: accuracy on each set, on the same comparisons of the main test, and what is lost."""
    results = results_of(out)
    assert list(results["controls"]) == ["popularity-matched", "swapped-user"]

    def right(name):
        margins = defaultdict(float)
        for row in pq.read_table(out / "evaluation" / f"predictions{name}.parquet").to_pylist():
            sign = 1 if row["preferred"] == "A" else -1
            margins[row["arm"], row["comparison"]] += sign * (row["logp_a"] - row["logp_b"])
        return {key: margin > 0 for key, margin in margins.items()}

    main, test = right(""), {c.line: c for c in split_by_user(load(data), 0.7, 0.1, 3407).test}
    for name, control in results["controls"].items():
        found = right(f"_{name}")
        rows = load(out / "evaluation" / f"{name}.jsonl")
        assert control["n"] == len(rows) == len(found) / 4 == 48
        for arm, numbers in control["arms"].items():
            share = sum(ok for (of, _), ok in found.items() if of == arm) / 48
            lost = sum(main[key] - ok for key, ok in found.items() if key[0] == arm) / 48
            assert numbers["accuracy"] == pytest.approx(share)
            assert numbers["main_accuracy"] == pytest.approx(results["arms"][arm]["accuracy"])
            assert numbers["main_less_control_pp"] == pytest.approx(100 * lost)
            assert numbers["ci95_pp"][0] <= 100 * lost <= numbers["ci95_pp"][1]
        for c, shown in zip(test.values(), rows, strict=True):
            assert shown.preferred == c.preferred and shown.user == c.user
            assert (shown.history == c.history) == (name == "popularity-matched")
        [tested] = [t for t in results["secondary_tests"] if t["test"] == f"accuracy_on_{name}"]
        gain = control["arms"]["dpo"]["accuracy"] - control["arms"]["sft"]["accuracy"]
        assert tested["difference"] == pytest.approx(gain)
    assert "What the model personalises" in (out / "evaluation" / "report.md").read_text(encoding="utf-8")


def test_verify_names_what_it_finds_in_the_data(data, tmp_path):
    """Counts and shortcuts always; under --strict a leak fails the check."""
    rows = [replace(c, user=f"{c.line % 120}") for c in load(data)]
    one, other = rows[0], rows[120]
    film = one.history[0]
    late = {"option_a" if other.label == "A" else "option_b": replace(film, genres=("Drama",)), "time": one.time + 1}
    rows[120] = replace(other, **late, history=tuple(m for m in other.history if m.title != film.title))
    leaking = tmp_path / "leaking.jsonl"
    save(leaking, rows)
    text = script("verify_dpo_setup.py", tmp_path, leaking)
    assert f"! leakage        rating from after the comparison: 1, such as line 1, whose user rated {film}" in text
    assert "always a 50.0%" in text and "films" in text
    done = subprocess.run(
        [sys.executable, ROOT / "verify_dpo_setup.py", "--preset", "tiny", "--data", leaking, "--strict",
         "--output-dir", tmp_path],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1 and "✗ leakage        rating from after the comparison" in done.stdout
    assert done.stderr == "error: 1 check(s) failed; see the crosses above\n"
    refused = script("train_dpo.py", tmp_path, leaking, "--strict", status=2)
    assert "rating from after the comparison (1, such as line 1" in refused


def test_the_same_command_again_is_one_line(out, data):
    for name in ("train_dpo.py", "evaluate_dpo.py"):
        text = script(name, out, data)
        assert text.count("\n") == 1 and "finished" in text


def test_other_settings_in_a_finished_folder_are_refused(out, data):
    text = script("train_dpo.py", out, data, "--beta", 0.3, status=2)
    assert "--beta was 0.1, is 0.3" in text and "--output-dir" in text


def test_same_seed_same_bits_and_another_cut_the_same_result(out, data, tmp_path):
    """SFT in micro-batches of 8 again, then DPO 2 x 4 and 8 x 1 against 1 x 8."""
    again = script("train_dpo.py", tmp_path / "again", data, "--no-sft-more")
    assert "wrote" in again
    for arm in ("sft", "dpo"):
        assert manifest(tmp_path / "again", arm)["adapter_sha256"] == manifest(out, arm)["adapter_sha256"]
    sft = out / "llama3_sft_4bit_final"
    script("train_dpo.py", tmp_path / "cut", data, "--no-sft-more", "--sft-adapter", sft,
           "--per-device-train-batch-size", 2)  # fmt: skip
    one, other = (
        load_file(folder / "llama3_dpo_4bit_final" / "adapter_model.safetensors") for folder in (out, tmp_path / "cut")
    )
    worst = max(float((one[name] - other[name]).abs().max()) for name in one)
    assert 0 < worst < 2e-3  # Adam divides by the gradient's size, which blows float error up in small gradients


def test_beta_from_the_same_sft_adapter(out, data, tmp_path):
    sft = out / "llama3_sft_4bit_final"
    more = ("--beta", 0.3, "--sft-adapter", sft, "--no-sft-more")
    script("train_dpo.py", tmp_path, data, *more)
    assert not (tmp_path / "llama3_sft_4bit_final").exists()
    script("evaluate_dpo.py", tmp_path, data, *more)
    verdict = " ".join(results_of(tmp_path)["verdict"]["reasons"])
    assert "the gain of extra training is not excluded" in verdict and "contaminated" not in verdict


def test_a_foreign_sft_adapter_is_called_contaminated(out, data, tmp_path):
    foreign = tmp_path / "llama3.2-lora-final"
    shutil.copytree(out / "llama3_sft_4bit_final", foreign)
    (foreign / "manifest.json").unlink()
    more = ("--sft-adapter", foreign, "--no-sft-more")
    assert "contaminated" in script("train_dpo.py", tmp_path / "out", data, *more)
    assert "contaminated" in script("evaluate_dpo.py", tmp_path / "out", data, *more)
    config = json.loads((foreign / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "unsloth/llama-3-8b-bnb-4bit"
    (foreign / "adapter_config.json").write_text(json.dumps(config))
    assert "made for base" in script("train_dpo.py", tmp_path / "other", data, *more, status=2)


def test_test_data_with_the_preferred_film_exchanged_turns_accuracy_round(out, data, tmp_path):
    before = results_of(out)["arms"]
    test = split_by_user(load(data), 0.7, 0.1, 3407).test
    exchanged = [replace(c, label="B" if c.label == "A" else "A") for c in test]
    save(tmp_path / "exchanged.jsonl", exchanged)
    copied = tmp_path / "run"
    shutil.copytree(out, copied)
    text = script("evaluate_dpo.py", copied, data, "--test-data", tmp_path / "exchanged.jsonl")
    assert "evaluation.1" in text  # the earlier one is not lost
    after = results_of(copied)["arms"]
    for arm in before:
        assert after[arm]["accuracy"] == pytest.approx(1 - before[arm]["accuracy"])
        assert after[arm]["confidence"] == pytest.approx(-before[arm]["confidence"], abs=1e-4)


def test_test_data_that_was_trained_on_is_refused(out, data, tmp_path):
    train = counterbalance(split_by_user(load(data), 0.7, 0.1, 3407).train, seed=1)
    save(tmp_path / "test.jsonl", [flip(c) for c in train[:3]])
    text = script("evaluate_dpo.py", out, data, "--test-data", tmp_path / "test.jsonl", status=2)
    assert "test.jsonl, line 1: this comparison is in the training data too" in text


def test_wrong_input_is_one_line_and_leaves_nothing(data, tmp_path):
    lines = data.read_text(encoding="utf-8").splitlines()
    row = json.loads(lines[6])

    def written(name, line_7):
        path = tmp_path / name
        content = [line.encode() for line in lines[:9]]
        content[6] = line_7 if isinstance(line_7, bytes) else json.dumps(line_7, ensure_ascii=False).encode()
        path.write_bytes(b"\n".join(content) + b"\n")
        return path

    film = row["input"].split("Option A: ")[1].split(". Option B")[0]
    cases = {
        "json": (b'{"instruction": ', "line 7: not JSON"),
        "field": ({k: v for k, v in row.items() if k != "output"}, 'line 7: field "output"'),
        "label": ({**row, "output": "No idea."}, "line 7:"),
        "twice": ({**row, "input": f"{row['input'].split('Option B: ')[0]}Option B: {film}."}, "line 7: both options"),
        "encoding": (b'{"instruction": "\xff"}', "line 7: not UTF-8"),
    }
    out = tmp_path / "out"
    for name, (line_7, words) in cases.items():
        text = script("train_dpo.py", out, written(f"{name}.jsonl", line_7), status=2)
        assert f"{name}.jsonl, {words}" in text, text
    (tmp_path / "empty.jsonl").write_bytes(b"")
    assert "empty" in script("train_dpo.py", out, tmp_path / "empty.jsonl", status=2)
    (tmp_path / "one.jsonl").write_text(json.dumps({**row, "user": 1}) + "\n", encoding="utf-8")
    assert "user" in script("train_dpo.py", out, tmp_path / "one.jsonl", status=2)
    assert "cannot be read" in script("train_dpo.py", out, tmp_path / "nowhere.jsonl", status=2)
    assert "--nonsense" in script("train_dpo.py", out, data, "--nonsense", 3, status=2)
    assert "no such folder" in script("train_dpo.py", out, data, "--base-model", tmp_path / "no-base", status=2)
    assert "--preset tiny" in script("train_dpo.py", out, data, "--base-model", "nobody/nothing", status=2)
    assert "missing; run train_dpo.py" in script("evaluate_dpo.py", out, data, status=2)
    assert not list(out.rglob("*")) if out.exists() else True


def test_verify_says_what_is_missing(data, tmp_path):
    done = subprocess.run(
        [sys.executable, ROOT / "verify_dpo_setup.py", "--preset", "tiny", "--data", tmp_path / "no.jsonl",
         "--base-model", tmp_path / "no-base"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1
    assert "✗ data" in done.stdout and "✗ base" in done.stdout and "✗ DPO step" in done.stdout
    assert done.stderr.startswith("error: 3 check(s) failed")


def test_adapter_of_another_base_is_refused(out, data, tmp_path):
    base = tmp_path / "tiny-llama"
    shutil.copytree(ROOT / "models" / "tiny-llama", base)
    weights = load_file(base / "model.safetensors")
    weights["model.norm.weight"] *= 1.01
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    copied = tmp_path / "run"
    shutil.copytree(out, copied, ignore=lambda *_: ["evaluation"])
    text = script("evaluate_dpo.py", copied, data, "--base-model", base, status=2)
    assert "trained on base" in text and not (copied / "evaluation").exists()


def test_edited_weights_are_refused(out, data, tmp_path):
    copied = tmp_path / "run"
    shutil.copytree(out, copied, ignore=lambda *_: ["evaluation"])
    path: Path = copied / "llama3_dpo_4bit_final" / "adapter_model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert "is not the file that its manifest records" in script("evaluate_dpo.py", copied, data, status=2)


def test_two_equal_adapters_are_refused(out, data, tmp_path):
    copied = tmp_path / "run"
    shutil.copytree(out, copied, ignore=lambda *_: ["evaluation"])
    folder = copied / "llama3_dpo_4bit_final"
    shutil.copy(copied / "llama3_sft_4bit_final" / "adapter_model.safetensors", folder)
    changed = {**manifest(copied, "dpo"), "adapter_sha256": manifest(copied, "sft")["adapter_sha256"]}
    write_manifest(folder, changed)
    assert "the same model" in script("evaluate_dpo.py", copied, data, status=1)
    assert not (copied / "evaluation").exists()


def test_a_diverging_dpo_run_is_not_supported(out, data, tmp_path):
    """A learning rate that gives NaN or a loss above ln 2: never an adapter marked final without a word."""
    more = ("--sft-adapter", out / "llama3_sft_4bit_final", "--no-sft-more", "--learning-rate", 1e18)
    text = script("train_dpo.py", tmp_path, data, *more, status=1)
    assert "is not finite" in text
    failed = json.loads((tmp_path / "llama3_dpo_4bit_final" / "failed.json").read_text())
    assert failed["step"] >= 1 and failed["cause"] == "non-finite"
    assert not (tmp_path / "llama3_dpo_4bit_final" / "adapter_model.safetensors").exists()
    assert "NOT SUPPORTED" in script("evaluate_dpo.py", tmp_path, data, *more)
    assert set(results_of(tmp_path)["arms"]) == {"base", "sft"}


def test_further_arms_and_the_16_bit_base(out, data, tmp_path):
    more = ("--sft-adapter", out / "llama3_sft_4bit_final", "--no-sft-more", "--dpo-from-base")
    script("train_dpo.py", tmp_path, data, *more)
    lineage = manifest(tmp_path, "dpo_from_base")["lineage"]
    assert lineage == {"started_from": None, "reference": None}
    assert manifest(tmp_path, "dpo_from_base")["first_loss"] == pytest.approx(math.log(2), abs=1e-6)
    evaluate = (*more, "--adapter", f"other={out / 'llama3_sft_more_4bit_final'}", "--precision", "4bit", "16bit")
    script("evaluate_dpo.py", tmp_path, data, *evaluate)
    results = results_of(tmp_path)
    assert set(results["arms"]) == {"base", "sft", "dpo", "dpo-from-base", "other"}
    assert set(results["against_sft"]) == {"base", "dpo", "dpo-from-base", "other"}
    right = defaultdict(int)
    for row in pq.read_table(tmp_path / "evaluation" / "predictions_16bit.parquet").to_pylist():
        margin = (row["logp_a"] - row["logp_b"]) * (1 if row["preferred"] == "A" else -1)
        right[row["arm"], row["comparison"]] += margin
    for arm, row in results["quantisation"]["arms"].items():
        share = sum(margin > 0 for (of, _), margin in right.items() if of == arm) / 48
        assert row["accuracy_16bit"] == pytest.approx(share)
        assert row["loss_pp"] == pytest.approx(100 * (share - results["arms"][arm]["accuracy"]))
    assert "What quantisation costs" in (tmp_path / "evaluation" / "report.html").read_text(encoding="utf-8")
    assert "NAME=FOLDER" in script("evaluate_dpo.py", tmp_path, data, "--adapter", "dpo=x", status=2)


def test_runs_of_two_seeds_are_judged_together(out, data, tmp_path):
    second = tmp_path / "second"
    script("train_dpo.py", second, data, "--seed", 2)
    script("evaluate_dpo.py", second, data, "--seed", 2)
    script("evaluate_dpo.py", tmp_path / "both", data, "--runs", out, second)
    both, one, other = results_of(tmp_path / "both"), results_of(out), results_of(second)
    assert both["verdict"]["seed_differences_pp"] == pytest.approx(
        [one["verdict"]["difference_pp"], other["verdict"]["difference_pp"]]
    )
    for arm in ("base", "sft", "dpo", "sft-more"):
        mean = (one["arms"][arm]["accuracy"] + other["arms"][arm]["accuracy"]) / 2
        assert both["arms"][arm]["accuracy"] == pytest.approx(mean)
    assert [run["seed"] for run in both["runs"]] == [3407, 2]
    assert "same seed" in script("evaluate_dpo.py", tmp_path / "twice", data, "--runs", out, out, status=2)
    assert "not found" in script("evaluate_dpo.py", tmp_path / "no", data, "--runs", out, tmp_path / "none", status=2)
    exchanged = tmp_path / "other.jsonl"
    save(exchanged, simulate(240, seed=12).comparisons)
    text = script("evaluate_dpo.py", tmp_path / "different", exchanged, "--runs", out, second, status=2)
    assert "was tested on other comparisons" in text
