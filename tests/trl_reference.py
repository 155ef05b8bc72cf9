"""Run TRL's own DPOTrainer and SFTTrainer, on padded rows and with its own Triton loss kernel, and ours; print JSON.

A program of its own, since TRITON_INTERPRET must be set before Triton is imported: test_shared_prefix.py calls it.
"""

import json
import os
import sys
import tempfile
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from datasets import Dataset
from transformers import AutoTokenizer, LlamaForCausalLM
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from config import PRESETS
from quantpref.comparisons import load
from quantpref.models import Base, new_adapter
from quantpref.packed_llama import Learner
from quantpref.prompts import pairs_dataset, tokenise
from quantpref.shared_prefix import CompletionCollator, CompletionSFTTrainer, PairCollator, SharedPrefixDPOTrainer

TINY = PRESETS["tiny"]
PAIRS = slice(1, 3)  # two pairs of different lengths; the interpreter is slow


class TheirDPO(DPOTrainer):
    """TRL's trainer, given the same token ids."""

    def _prepare_dataset(self, dataset, *args, **kwargs):
        return dataset


class OurDPO(SharedPrefixDPOTrainer):
    """Ours, from a policy that has already left its reference."""

    def _check_first_loss(self, loss):
        pass


def disturb(policy, generator):
    """So much that the base, which knows its responses by heart, is unsure of them and has gradients to compare."""
    for name, weight in policy.named_parameters():
        if "lora_B.default" in name:
            weight.data += 0.2 * torch.randn(weight.shape, generator=generator)


def one_batch(kind, config, tokenizer, dataset, collator=None):
    """Loss, metrics and gradients by name of the first batch, which is all rows."""
    model = LlamaForCausalLM.from_pretrained(TINY.base_model, dtype=torch.float32)
    policy = new_adapter(Base(model, tokenizer, "transformers", "", "", None), 16, 16, seed=1)
    generator = torch.Generator().manual_seed(5)
    disturb(policy, generator)  # the reference is an adapter that does something
    trainer = kind(model=policy, args=config, train_dataset=dataset, processing_class=tokenizer, data_collator=collator)
    disturb(policy, generator)  # the policy has left it
    parameters = {p: name for name, p in policy.named_parameters() if "default" in name}
    learner = trainer.model.train()
    if collator is not None:
        trainer.create_optimizer()
        learner = Learner(trainer.llama)
    loss = trainer.compute_loss(learner, next(iter(trainer.get_train_dataloader())))
    loss.backward()
    if collator is None:
        gradients = {name: p.grad for p, name in parameters.items()}
    else:  # one flat gradient, in the order of these matrices
        matrices = trainer.llama.adapters._matrices("default")
        parts = learner.flat.grad.split([m.numel() for m in matrices])
        gradients = {parameters[m]: part.view(m.shape) for m, part in zip(matrices, parts, strict=True)}
    return loss.item(), {k: v[0] for k, v in trainer._metrics["train"].items()}, gradients


def side_by_side(theirs, ours):
    (their_loss, their_metrics, their_gradients), (our_loss, our_metrics, our_gradients) = theirs, ours
    return {
        "loss": [their_loss, our_loss],
        "metrics": {k: [v, our_metrics[k]] for k, v in their_metrics.items()},
        "gradient_names": [sorted(their_gradients), sorted(our_gradients)],
        "gradients": {
            name: [float(gradient.abs().max()), float((our_gradients[name] - gradient).abs().max())]
            for name, gradient in their_gradients.items()
        },
    }


def settings(folder, rows):
    return {
        "output_dir": folder, "per_device_train_batch_size": rows, "report_to": "none", "bf16": False,
        "max_length": None, "remove_unused_columns": False, "gradient_checkpointing": False,
        "dataloader_pin_memory": False,
    }  # fmt: skip


def dpo(tokenizer, response, folder):
    pairs, _ = tokenise(tokenizer, load(TINY.data)[PAIRS], response)
    dataset = pairs_dataset(pairs)
    config = DPOConfig(**settings(folder, len(pairs)), beta=0.3)
    return side_by_side(
        one_batch(TheirDPO, config, tokenizer, dataset),
        one_batch(OurDPO, config, tokenizer, dataset, PairCollator(pad_token_id=tokenizer.pad_token_id)),
    )


def sft(tokenizer, folder):
    pairs, _ = tokenise(tokenizer, load(TINY.data)[PAIRS])
    completion_only = Dataset.from_list(
        [{"input_ids": p.prompt_ids + p.chosen_ids, "labels": [-100] * len(p.prompt_ids) + p.chosen_ids} for p in pairs]
    )
    config = SFTConfig(**settings(folder, len(pairs)), dataset_kwargs={"skip_prepare_dataset": True}, loss_type="nll")
    return side_by_side(
        one_batch(SFTTrainer, config, tokenizer, completion_only),
        one_batch(
            CompletionSFTTrainer, config, tokenizer, pairs_dataset(pairs), CompletionCollator(tokenizer.pad_token_id)
        ),
    )


def main() -> None:
    tokenizer = AutoTokenizer.from_pretrained(TINY.base_model)
    with tempfile.TemporaryDirectory() as folder:
        found = {form: dpo(tokenizer, form, folder) for form in ("reasoned", "verdict")}
        found["sft"] = sft(tokenizer, folder)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
