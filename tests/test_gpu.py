"""On a GPU: both backends train from ln 2, bf16 scores agree with float32's, memory is as predicted."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest
import torch

from config import ROOT
from quantpref.comparisons import save
from quantpref.simulate import simulate

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Llama 3 8B's shape with two layers and random weights, stored in 4-bit, and 115 simulated people."""
    folder = tmp_path_factory.mktemp("gpu")
    run("benchmarks/llama3_shape.py", "--tokenizer", "models/tiny-llama", "--layers", 2, "--out", folder / "base")
    save(folder / "people.jsonl", simulate(115, seed=3).comparisons)
    return folder


def run(*arguments):
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], capture_output=True, text=True, cwd=ROOT,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "UNSLOTH_DISABLE_STATISTICS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]


@pytest.mark.parametrize("backend", ["transformers", "unsloth"])
def test_each_backend_trains_from_ln_2_and_is_evaluated(base, backend):
    if backend == "unsloth" and importlib.util.find_spec("unsloth") is None:
        pytest.skip("Unsloth is not installed")
    flags = (
        "--base-model", base / "base", "--data", base / "people.jsonl", "--backend", backend,
        "--output-dir", base / backend, "--num-train-epochs", 1,
    )  # fmt: skip
    run("train_dpo.py", *flags)
    manifest = json.loads((base / backend / "llama3_dpo_4bit_final" / "manifest.json").read_text())
    assert manifest["first_loss"] == pytest.approx(0.693147, abs=1e-3)
    assert manifest["base"]["backend"] == backend and manifest["steps"] == 10
    assert manifest["trainable_weights"] == 2 * 41_943_040 // 32
    run("evaluate_dpo.py", *flags)
    results = json.loads((base / backend / "evaluation" / "results.json").read_text())
    assert set(results["arms"]) == {"base", "sft", "dpo"}


def test_four_bit_round_trip_on_the_gpu():
    from quantpref.four_bit import four_bit_error, four_bit_product_error

    for measured in (four_bit_error, four_bit_product_error):
        error, bound = measured()
        assert 0 < error < bound
