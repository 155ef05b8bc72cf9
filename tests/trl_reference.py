"""Run TRL's own DPOTrainer, two padded rows a pair and its own Triton loss kernel, and ours; print both as JSON.

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
from transformers import AutoTokenizer, LlamaForCausalLM
from trl import DPOConfig, DPOTrainer

from config import PRESETS
from quantpref.comparisons import load
from quantpref.models import Base, new_adapter
from quantpref.prompts import pairs_dataset, tokenise
from quantpref.shared_prefix import SharedPrefixCollator, SharedPrefixDPOTrainer

TINY = PRESETS["tiny"]


class TwoRows(DPOTrainer):
    """TRL's trainer, given the same token ids."""

    def _prepare_dataset(self, dataset, *args, **kwargs):
        return dataset


class Ours(SharedPrefixDPOTrainer):
    """Ours, from a policy that has already left its reference."""

    def _check_first_loss(self, loss):
        pass


def one_batch(kind, tokenizer, dataset, response, folder):
    model = LlamaForCausalLM.from_pretrained(TINY.base_model, dtype=torch.float32)
    policy = new_adapter(Base(model, tokenizer, "transformers", "", "", None), 16, 16, seed=1)
    generator = torch.Generator().manual_seed(5)

    def disturb():
        for name, weight in policy.named_parameters():
            if "lora_B.default" in name:
                weight.data += 0.03 * torch.randn(weight.shape, generator=generator)

    disturb()  # the reference is an adapter that does something
    extra = {"data_collator": SharedPrefixCollator(pad_token_id=tokenizer.pad_token_id)} if kind is Ours else {}
    trainer = kind(
        model=policy,
        args=DPOConfig(
            output_dir=folder, per_device_train_batch_size=len(dataset), beta=0.3, report_to="none", bf16=False,
            max_length=None, remove_unused_columns=False, gradient_checkpointing=False, dataloader_pin_memory=False,
        ),
        train_dataset=dataset,
        processing_class=tokenizer,
        **extra,
    )  # fmt: skip
    disturb()  # the policy has left it
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, next(iter(trainer.get_train_dataloader())))
    loss.backward()
    gradients = {n: p.grad for n, p in policy.named_parameters() if p.requires_grad}
    return loss.item(), {k: v[0] for k, v in trainer._metrics["train"].items()}, gradients


def main(response: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(TINY.base_model)
    pairs, _ = tokenise(tokenizer, load(TINY.data)[:4], response)
    dataset = pairs_dataset(pairs)
    with tempfile.TemporaryDirectory() as folder:
        trl_loss, trl_metrics, trl_gradients = one_batch(TwoRows, tokenizer, dataset, response, folder)
        our_loss, our_metrics, our_gradients = one_batch(Ours, tokenizer, dataset, response, folder)
    print(
        json.dumps(
            {
                "loss": [trl_loss, our_loss],
                "metrics": {k: [trl_metrics[k], our_metrics[k]] for k in trl_metrics},
                "gradient_names": [sorted(trl_gradients), sorted(our_gradients)],
                "gradients": {
                    n: [float(trl_gradients[n].abs().max()), float((our_gradients[n] - trl_gradients[n]).abs().max())]
                    for n in trl_gradients
                },
            }
        )
    )


if __name__ == "__main__":
    main(sys.argv[1])
