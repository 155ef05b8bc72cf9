"""TRL's trainers on packed rows: literal tensors, single rows by hand, and TRL's own trainers beside them."""

import functools
import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM
from trl import DPOConfig

from config import PRESETS
from quantpref import shared_prefix
from quantpref.comparisons import load
from quantpref.models import Base, new_adapter
from quantpref.packed_llama import Learner, PackedLlama, TokenStatistics
from quantpref.prompts import pairs_dataset, tokenise
from quantpref.runs import RunError
from quantpref.shared_prefix import (
    Answer,
    CompletionCollator,
    PairCollator,
    SharedPrefixDPOTrainer,
    packed_fields,
    scatter,
)

TINY = PRESETS["tiny"]
TWO_PAIRS = [
    {"prompt_ids": [1, 2], "chosen_ids": [5, 6, 9], "rejected_ids": [5, 7, 8, 9], "row": 3},
    {"prompt_ids": [1], "chosen_ids": [6, 9], "rejected_ids": [7, 9], "row": 4},
]


@pytest.fixture(autouse=True)
def no_padding(monkeypatch):
    """As on a CPU: a GPU gets few shapes, by padding, which has a test of its own."""
    monkeypatch.setattr(shared_prefix, "COLUMNS_MULTIPLE", 1)
    monkeypatch.setattr(shared_prefix, "TOKENS_MULTIPLE", 1)


@pytest.fixture
def model():
    return LlamaForCausalLM.from_pretrained(TINY.base_model, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def pairs(tokenizer):
    return tokenise(tokenizer, load(TINY.data)[:5])[0]


def examples_of(pairs):
    return [
        {"prompt_ids": p.prompt_ids, "chosen_ids": p.chosen_ids, "rejected_ids": p.rejected_ids, "row": i}
        for i, p in enumerate(pairs)
    ]


def as_lists(fields):
    return {name: value.tolist() if isinstance(value, torch.Tensor) else value for name, value in fields.items()}


def by_hand(model, prompt, response):
    """Log-probability of each response token, one unpadded row, float64."""
    with torch.no_grad():
        logits = model.double()(torch.tensor([prompt + response])).logits[0]
    model.float()
    logs = logits.log_softmax(-1)
    return [logs[len(prompt) - 1 + i, token].item() for i, token in enumerate(response)]


def test_packed_fields_are_these():
    fields = packed_fields([([1, 2], [5, 6]), ([1, 2], [5, 7, 8])], padding_id=0)
    # Columns: 1 2 5 6 | 7 8. The first response token is asked about at the prompt's last column.
    assert as_lists(fields) == {
        "tree_ids": [1, 2, 5, 6, 7, 8],
        "tree_positions": [0, 1, 2, 3, 3, 4],
        "tree_end": [6, 6, 6, 4, 6, 6],
        "tree_columns": [1, 2, 1, 2, 4],
        "tree_tokens": [5, 6, 5, 7, 8],
        "asked": 5,
    }


def test_packed_fields_are_padded_for_a_gpu(monkeypatch):
    monkeypatch.setattr(shared_prefix, "COLUMNS_MULTIPLE", 4)
    monkeypatch.setattr(shared_prefix, "TOKENS_MULTIPLE", 8)
    fields = packed_fields([([1, 2], [5, 6]), ([1, 2], [5, 7, 8])], padding_id=9)
    assert as_lists(fields) == {
        "tree_ids": [1, 2, 5, 6, 7, 8, 9, 9],
        "tree_positions": [0, 1, 2, 3, 3, 4, 0, 0],
        "tree_end": [6, 6, 6, 4, 6, 6, 7, 8],
        "tree_columns": [1, 2, 1, 2, 4, 0, 0, 0],
        "tree_tokens": [5, 6, 5, 7, 8, 0, 0, 0],
        "asked": 5,  # what lies beyond, `Answer` drops
    }


def test_pair_collator_builds_these_rows():
    batch = PairCollator(pad_token_id=0)(TWO_PAIRS)
    assert as_lists(batch) == {
        # TRL's rows: the chosen responses, then the rejected ones.
        "input_ids": [[1, 2, 5, 6, 9, 0], [1, 6, 9, 0, 0, 0], [1, 2, 5, 7, 8, 9], [1, 7, 9, 0, 0, 0]],
        "attention_mask": [[1, 1, 1, 1, 1, 0], [1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]],
        "completion_mask": [[0, 0, 1, 1, 1, 0], [0, 1, 1, 0, 0, 0], [0, 0, 1, 1, 1, 1], [0, 1, 1, 0, 0, 0]],
        # One tree: 1 2 5 | 6 9 | 7 8 9 || 6 9 | 7 9, where || goes on from the first column.
        "tree_ids": [1, 2, 5, 6, 9, 7, 8, 9, 6, 9, 7, 9],
        "tree_positions": [0, 1, 2, 3, 4, 3, 4, 5, 1, 2, 1, 2],
        "tree_end": [12, 8, 8, 5, 5, 8, 8, 8, 10, 10, 12, 12],
        "tree_columns": [1, 2, 3, 0, 8, 1, 2, 5, 6, 0, 10],
        "tree_tokens": [5, 6, 9, 6, 9, 5, 7, 8, 9, 7, 9],
        "asked": 11,
        "row": [3, 4],
    }


def test_completion_collator_builds_these_rows():
    batch = CompletionCollator(pad_token_id=0)(TWO_PAIRS)
    assert as_lists(batch) == {
        "input_ids": [[1, 2, 5, 6, 9], [1, 6, 9, 0, 0]],
        "attention_mask": [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]],
        "labels": [[-100, -100, 5, 6, 9], [-100, 6, 9, -100, -100]],
        "tree_ids": [1, 2, 5, 6, 9, 6, 9],
        "tree_positions": [0, 1, 2, 3, 4, 1, 2],
        "tree_end": [7, 5, 5, 5, 5, 7, 7],
        "tree_columns": [1, 2, 3, 0, 5],
        "tree_tokens": [5, 6, 9, 6, 9],
        "asked": 5,
    }


def test_statistics_are_put_back_row_by_row():
    mask = torch.tensor([[False, True, True], [True, False, False]])
    values = torch.tensor([1.0, 2.0, 3.0])
    found = scatter(TokenStatistics(values, values + 10, values + 20, values == 2), mask)
    assert found.log_probs.tolist() == [[0, 1, 2], [3, 0, 0]]
    assert found.entropy.tolist() == [[0, 11, 12], [13, 0, 0]]
    assert found.mean_logits.tolist() == [[0, 21, 22], [23, 0, 0]]
    assert found.is_top1.tolist() == [[False, False, True], [False, False, False]]
    assert found.label_mask is mask and found.aux_loss is None


@pytest.mark.parametrize("multiples", [(1, 1), (128, 256)])
def test_answers_equal_single_rows(model, pairs, monkeypatch, multiples):
    monkeypatch.setattr(shared_prefix, "COLUMNS_MULTIPLE", multiples[0])
    monkeypatch.setattr(shared_prefix, "TOKENS_MULTIPLE", multiples[1])
    examples = examples_of(pairs)
    batch = PairCollator(pad_token_id=0)(examples)
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    found = Answer(PackedLlama(model).statistics)(labels=labels, fused_lm_head=True, **batch)
    assert found.log_probs.shape == labels[:, 1:].shape
    for half, key in enumerate(("chosen_ids", "rejected_ids")):
        for i, example in enumerate(examples):
            row = half * len(examples) + i
            expected = by_hand(model, example["prompt_ids"], example[key])
            assert found.log_probs[row][found.label_mask[row]].tolist() == pytest.approx(expected, abs=2e-5)
            assert not found.log_probs[row][~found.label_mask[row]].any()


def test_sft_answers_equal_single_rows(model, pairs):
    batch = CompletionCollator(pad_token_id=0)(examples_of(pairs))
    found = Answer(PackedLlama(model).statistics)(**batch)
    for row, pair in enumerate(pairs):
        expected = by_hand(model, pair.prompt_ids, pair.chosen_ids)
        assert found.log_probs[row][found.label_mask[row]].tolist() == pytest.approx(expected, abs=2e-5)
    assert int(found.label_mask.sum()) == sum(len(p.chosen_ids) for p in pairs)


@pytest.fixture
def dpo(model, tokenizer, pairs, tmp_path):
    """A function that builds a trainer, whose policy has left the reference by `drift` in each weight of B."""

    def build(drift: float):
        policy = new_adapter(Base(model, tokenizer, "transformers", "", "", None), 16, 16, seed=1)
        trainer = SharedPrefixDPOTrainer(
            model=policy,
            args=DPOConfig(output_dir=str(tmp_path), report_to="none", bf16=False, max_length=None, beta=0.3,
                           per_device_train_batch_size=2, remove_unused_columns=False, gradient_checkpointing=False,
                           dataloader_pin_memory=False),
            train_dataset=pairs_dataset(pairs),
            data_collator=PairCollator(pad_token_id=tokenizer.pad_token_id),
            processing_class=tokenizer,
        )  # fmt: skip
        generator = torch.Generator().manual_seed(5)
        for name, weight in policy.named_parameters():
            if "lora_B.default" in name:
                weight.data += drift * torch.randn(weight.shape, generator=generator)
        trainer.create_optimizer()
        return trainer, Learner(trainer.llama)

    return build


def batch_of(trainer, *rows):
    return trainer.data_collator([trainer.train_dataset[i] for i in rows])


def test_the_first_loss_is_ln_2(dpo):
    trainer, learner = dpo(drift=0.0)
    assert trainer.compute_loss(learner, batch_of(trainer, 0, 1)).item() == pytest.approx(math.log(2), abs=1e-7)


def test_a_wrong_reference_stops_the_run_before_its_first_step(dpo):
    trainer, learner = dpo(drift=0.2)
    with pytest.raises(RunError, match="the reference is not the adapter that training started from"):
        trainer.compute_loss(learner, batch_of(trainer, 0, 1))
    trainer.state.global_step = 1  # later the policy is meant to have left it
    assert trainer.compute_loss(learner, batch_of(trainer, 0, 1)).isfinite()


def asked_again(*_):
    raise AssertionError("asked again")


def test_the_reference_scores_each_pair_once(dpo, pairs, monkeypatch):
    trainer, learner = dpo(drift=0.2)
    trainer.state.global_step = 1
    first = trainer.compute_loss(learner, batch_of(trainer, 3, 1)).item()
    assert trainer.reference.isnan().all(1).tolist() == [True, False, True, False, True]
    with trainer.model.disable_adapter():  # the reference is a fresh adapter, which changes nothing
        for i in (1, 3):
            expected = [
                sum(by_hand(trainer.model, pairs[i].prompt_ids, r))
                for r in (pairs[i].chosen_ids, pairs[i].rejected_ids)
            ]
            assert trainer.reference[i].tolist() == pytest.approx(expected, abs=1e-4)

    monkeypatch.setattr(trainer.llama, "frozen", asked_again)
    assert trainer.compute_loss(learner, batch_of(trainer, 3, 1)).item() == first
    trainer.compute_loss(learner, batch_of(trainer, 1, 3))  # by row number, not by place in a batch
    with pytest.raises(AssertionError, match="asked again"):
        trainer.compute_loss(learner, batch_of(trainer, 0, 1))


def test_the_reference_is_kept_once_all_pairs_are_known(dpo, tmp_path, monkeypatch):
    trainer, learner = dpo(drift=0.2)
    trainer.state.global_step = 1
    path = tmp_path / "kept.safetensors"
    trainer.keep_reference(path)
    for rows in ((0, 1), (2, 3)):
        trainer.compute_loss(learner, batch_of(trainer, *rows))
    assert not path.exists()
    loss = trainer.compute_loss(learner, batch_of(trainer, 4, 0)).item()

    known, trainer.reference = trainer.reference, torch.full((5, 2), torch.nan)
    trainer.keep_reference(path)
    assert torch.equal(trainer.reference, known)
    monkeypatch.setattr(trainer.llama, "frozen", asked_again)
    assert trainer.compute_loss(learner, batch_of(trainer, 4, 0)).item() == loss


@functools.cache
def beside_trl():
    """One program for all cases: starting it takes longer than a case."""
    run = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("trl_reference.py"))], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-2000:]
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="TRL's loss kernel needs Triton")
@pytest.mark.parametrize("case", ["reasoned", "verdict", "sft"])
def test_loss_metrics_and_gradients_equal_trl(case):
    """TRL's own trainers and kernel, float32; gradients relative to each matrix' largest."""
    found = beside_trl()[case]
    trl, ours = found["loss"]
    assert ours == pytest.approx(trl, rel=1e-5)
    assert abs(trl - math.log(2)) > 1e-3  # the policy had left the reference, so that there is something to compare
    named = {"entropy", "mean_token_accuracy", "num_tokens"}
    dpo = {"rewards/margins", "rewards/accuracies", "logps/chosen", "logits/chosen"}
    assert (named if case == "sft" else named | dpo) <= found["metrics"].keys()
    for name, (theirs, our) in found["metrics"].items():
        assert our == pytest.approx(theirs, rel=1e-5, abs=1e-5), name
    assert found["gradient_names"][0] == found["gradient_names"][1]
    assert len(found["gradients"]) == 56
    for name, (size, difference) in found["gradients"].items():
        assert size > 1e-3, name
        assert difference <= 3e-5 * size, name
