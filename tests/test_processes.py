"""Two processes, joined by gloo, give what one process gives: the same training, the same scores."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file

from config import ROOT
from quantpref import processes
from quantpref.comparisons import save
from quantpref.simulate import simulate

# What `accelerate launch` runs with several GPUs; on a CPU it starts one process, whatever --num_processes says.
TWO = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29617")


def run(launcher, script, *flags, status=0):
    offline = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    command = [sys.executable, *launcher, str(ROOT / script), "--preset", "tiny", *map(str, flags)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=os.environ | offline)
    assert done.returncode == status, done.stdout[-1000:] + done.stderr[-3000:]
    return done.stdout, done.stderr


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The same training by one process and by two, without sft-more."""
    folder = tmp_path_factory.mktemp("processes")
    save(folder / "people.jsonl", simulate(80, seed=5).comparisons)
    printed = {}
    for name, launcher in (("one", ()), ("two", TWO)):
        flags = ("--data", folder / "people.jsonl", "--output-dir", folder / name, "--no-sft-more", "--save-steps", 3)
        printed[name], _ = run(launcher, "train_dpo.py", *flags)
    return folder, printed


def rows(folder: Path, arm: str):
    log = folder / f"llama3_{arm}_4bit_final" / "training_log.jsonl"
    return [json.loads(line) for line in log.read_text().splitlines()]


@pytest.mark.parametrize("arm", ["sft", "dpo"])
def test_two_processes_train_as_one(runs, arm):
    folder, _ = runs
    one, two = (rows(folder / name, arm) for name in ("one", "two"))
    assert [row["step"] for row in one] == [row["step"] for row in two] == list(range(1, 8))
    for a, b in zip(one, two, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-6)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)
        assert a["num_tokens"] == b["num_tokens"]
    weights = [load_file(folder / n / f"llama3_{arm}_4bit_final" / "adapter_model.safetensors") for n in ("one", "two")]
    for name, a in weights[0].items():
        # AdamW makes a whole step of a gradient that is nothing but rounding, so a few elements may differ.
        assert (a - weights[1][name]).abs().mean() < 1e-5, name


def test_only_the_first_process_prints_and_writes(runs):
    folder, printed = runs
    assert printed["two"].count("wrote ") == printed["one"].count("wrote ") == 2
    manifest = json.loads((folder / "two" / "llama3_dpo_4bit_final" / "manifest.json").read_text())
    assert manifest["steps"] == 7 and manifest["first_loss"] == pytest.approx(0.693147, abs=1e-6)
    assert not list(folder.glob("two/.*.tmp"))


def test_two_processes_score_to_the_same_bits(runs, tmp_path):
    folder, _ = runs
    predictions = []
    for name, launcher in (("one", ()), ("two", TWO)):
        shutil.copytree(folder / "one", tmp_path / name)
        flags = ("--data", folder / "people.jsonl", "--output-dir", tmp_path / name, "--no-sft-more")
        run(launcher, "evaluate_dpo.py", *flags)
        predictions.append(pq.read_table(tmp_path / name / "evaluation" / "predictions.parquet"))
    assert predictions[0].equals(predictions[1]) and len(predictions[0]) > 0


def test_a_batch_that_cannot_be_shared_out_is_refused(runs, tmp_path):
    folder, _ = runs
    flags = ("--data", folder / "people.jsonl", "--output-dir", tmp_path, "--effective-batch-size", 7)
    _, err = run(TWO, "train_dpo.py", *flags, status=1)
    assert "--effective-batch-size 7 cannot be shared out by 2 processes" in err


def test_alone(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "2")
    assert (processes.count(), processes.rank(), processes.is_first()) == (4, 2, False)
    with processes.alone():
        assert (processes.count(), processes.rank(), processes.gather("x")) == (1, 0, ["x"])
    assert processes.count() == 4
