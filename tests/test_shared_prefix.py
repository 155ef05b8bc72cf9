"""Shared-prefix DPO against literal tensors, against float64 by hand, and against TRL's own trainer."""

import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from config import PRESETS
from quantpref.comparisons import load
from quantpref.prompts import tokenise
from quantpref.shared_prefix import (
    CompletionCollator,
    CompletionOnly,
    SharedPrefix,
    SharedPrefixCollator,
    attention_mask,
    common_prefix_length,
)

TINY = PRESETS["tiny"]


@pytest.fixture(scope="module")
def model():
    return LlamaForCausalLM.from_pretrained(TINY.base_model, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def examples():
    pairs, _ = tokenise(AutoTokenizer.from_pretrained(TINY.base_model), load(TINY.data)[:5])
    return [
        {"prompt_ids": p.prompt_ids, "chosen_ids": p.chosen_ids, "rejected_ids": p.rejected_ids, "row": i}
        for i, p in enumerate(pairs)
    ]


def by_hand(model, prompt, response):
    """Log-probability of each response token, one unpadded row, float64."""
    with torch.no_grad():
        logits = model.double()(torch.tensor([prompt + response])).logits[0]
    model.float()
    logs = logits.log_softmax(-1)
    return [logs[len(prompt) - 1 + i, token].item() for i, token in enumerate(response)]


def test_collator_builds_these_rows():
    batch = SharedPrefixCollator(pad_token_id=0)(
        [
            {"prompt_ids": [1, 2], "chosen_ids": [5, 6, 9], "rejected_ids": [5, 7, 8, 9], "row": 3},
            {"prompt_ids": [1], "chosen_ids": [6, 9], "rejected_ids": [7, 9], "row": 4},
        ]
    )
    assert batch["shared_ids"].tolist() == [[1, 2, 5, 6, 9, 7, 8, 9], [0, 0, 1, 6, 9, 7, 9, 0]]
    assert batch["shared_positions"].tolist() == [[0, 1, 2, 3, 4, 3, 4, 5], [0, 0, 0, 1, 2, 1, 2, 0]]
    assert batch["shared_segments"].tolist() == [[1, 1, 1, 2, 2, 3, 3, 3], [0, 0, 1, 2, 2, 3, 3, 0]]
    # Two-row rows: [1 2 5 6 9], [1 6 9], [1 2 5 7 8 9], [1 7 9]; which column predicts the next token.
    assert batch["column_of"].tolist() == [
        [-1, 1, 2, 3, -1],
        [2, 3, -1, -1, -1],
        [-1, 1, 2, 5, 6],
        [2, 5, -1, -1, -1],
    ]
    assert batch["logits_to_keep"] == 7
    assert batch["row"].tolist() == [3, 4]
    assert batch["input_ids"][:, :3].tolist() == [[1, 2, 5], [1, 6, 9], [1, 2, 5], [1, 7, 9]]


def test_mask_keeps_the_responses_apart():
    sees = attention_mask(torch.tensor([[0, 1, 1, 2, 2, 3]]), torch.float32)[0, 0] == 0
    assert sees.int().tolist() == [
        [1, 0, 0, 0, 0, 0],  # padding sees itself, so that its softmax is not empty
        [0, 1, 0, 0, 0, 0],
        [0, 1, 1, 0, 0, 0],
        [0, 1, 1, 1, 0, 0],
        [0, 1, 1, 1, 1, 0],
        [0, 1, 1, 0, 0, 1],
    ]


def test_common_prefix_length():
    assert common_prefix_length([1, 2, 3], [1, 2, 4]) == 2
    assert common_prefix_length([1], [2]) == 0
    assert common_prefix_length([1, 2], [1, 2, 3]) == 2


def test_log_probabilities_equal_those_of_single_rows(model, examples):
    batch = SharedPrefixCollator(pad_token_id=0)(examples)
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    with torch.no_grad():
        found = SharedPrefix(model, torch.float32)(labels=labels, **batch)
    for half, key in enumerate(("chosen_ids", "rejected_ids")):
        for i, example in enumerate(examples):
            row = half * len(examples) + i
            expected = by_hand(model, example["prompt_ids"], example[key])
            values = found.log_probs[row][found.label_mask[row]].tolist()
            assert values == pytest.approx(expected, abs=2e-5)
            assert found.log_probs[row][~found.label_mask[row]].abs().max() == 0


def test_sft_rows_equal_single_rows(model, examples):
    batch = CompletionCollator(pad_token_id=0)(examples)
    with torch.no_grad():
        found = CompletionOnly(model)(**batch)
    for row, example in enumerate(examples):
        expected = by_hand(model, example["prompt_ids"], example["chosen_ids"])
        assert found.log_probs[row][found.label_mask[row]].tolist() == pytest.approx(expected, abs=2e-5)
    assert int(found.label_mask.sum()) == sum(len(e["chosen_ids"]) for e in examples)


def test_entropy_and_top1_are_what_they_say(model, examples):
    batch = SharedPrefixCollator(pad_token_id=0)(examples[:1])
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    with torch.no_grad():
        found = SharedPrefix(model, torch.float32)(labels=labels, **batch)
        ids = examples[0]["prompt_ids"] + examples[0]["chosen_ids"]
        logits = model(torch.tensor([ids])).logits[0, len(examples[0]["prompt_ids"]) - 1 : -1]
    p = logits.softmax(-1)
    mask = found.label_mask[0]
    assert torch.allclose(found.entropy[0][mask], -(p * p.log()).sum(-1), atol=1e-4)
    assert torch.allclose(found.mean_logits[0][mask], logits.mean(-1), atol=1e-5)
    assert found.is_top1[0][mask].tolist() == (logits.argmax(-1) == torch.tensor(examples[0]["chosen_ids"])).tolist()


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="TRL's loss kernel needs Triton")
@pytest.mark.parametrize("response", ["reasoned", "verdict"])
def test_loss_metrics_and_gradients_equal_trl(response):
    """TRL's own trainer and kernel, float32: every number to 1e-5 of its size."""
    run = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("trl_reference.py")), response], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-2000:]
    found = json.loads(run.stdout.splitlines()[-1])
    trl, ours = found["loss"]
    assert ours == pytest.approx(trl, rel=1e-5)
    assert abs(trl - math.log(2)) > 1e-3  # the policy had left the reference, so that there is something to compare
    assert {"rewards/margins", "rewards/accuracies", "logps/chosen", "entropy"} <= found["metrics"].keys()
    for name, (theirs, our) in found["metrics"].items():
        assert our == pytest.approx(theirs, rel=1e-5, abs=1e-5), name
    assert found["gradient_names"][0] == found["gradient_names"][1]
    assert len(found["gradients"]) == 56
    for name, (size, difference) in found["gradients"].items():
        assert size > 0, name
        assert difference <= 1e-5 * max(1.0, size), name
