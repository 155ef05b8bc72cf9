#!/usr/bin/env python3
"""One shared row a pair against two padded rows, through the same seam, loss and 4-bit base; on the CPU.

    make bench

Eight pairs of random ids, 112 prompt + 44 response tokens: FACTS' mean lengths under Llama 3's tokenizer. Forward
and backward of TRL's DPO loss, the two kinds in turns, medians.
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from trl import DPOConfig

from config import PRESETS
from quantpref import models
from quantpref.backends import choose_backend
from quantpref.kernels import token_statistics
from quantpref.packed_llama import Learner, TokenStatistics
from quantpref.prompts import TokenisedPair, pairs_dataset
from quantpref.shared_prefix import Answer, PairCollator, SharedPrefixDPOTrainer, scatter

PROMPT_TOKENS, RESPONSE_TOKENS, PAIRS, ROUNDS = 112, 44, 8, 25


class TwoRows:
    """Chosen and rejected in a padded row each, through transformers and peft; the same log-probabilities."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(self, *, input_ids: Any, attention_mask: Any, labels: Any, **_: Any) -> SimpleNamespace:
        mask = labels[:, 1:] != -100
        rows, columns = mask.nonzero(as_tuple=True)
        kept = input_ids.size(1) - int(columns.min())
        logits = self.model(
            input_ids=input_ids, attention_mask=attention_mask, use_cache=False, logits_to_keep=kept
        ).logits[rows, columns - (input_ids.size(1) - kept)]
        return scatter(TokenStatistics(*token_statistics(logits, labels[:, 1:][mask])), mask)


def random_pairs(vocabulary: int) -> list[TokenisedPair]:
    generator = torch.Generator().manual_seed(0)

    def ids(n: int) -> list[int]:
        return torch.randint(3, vocabulary, (n,), generator=generator).tolist()

    return [TokenisedPair(ids(PROMPT_TOKENS), ids(RESPONSE_TOKENS), ids(RESPONSE_TOKENS)) for _ in range(PAIRS)]


def main() -> None:
    backend = choose_backend("transformers")
    models.quiet()
    base = models.load_base(PRESETS["tiny"].base_model, None, backend)
    model = models.new_adapter(base, 16, 16, seed=0)
    with tempfile.TemporaryDirectory() as folder:
        trainer = SharedPrefixDPOTrainer(
            model=model,
            args=DPOConfig(output_dir=folder, per_device_train_batch_size=PAIRS, report_to="none", bf16=False,
                           max_length=None, remove_unused_columns=False, gradient_checkpointing=False,
                           dataloader_pin_memory=False),
            train_dataset=pairs_dataset(random_pairs(len(base.tokenizer))),
            data_collator=PairCollator(pad_token_id=base.tokenizer.pad_token_id),
            processing_class=base.tokenizer,
        )  # fmt: skip
    trainer.create_optimizer()
    batch = next(iter(trainer.get_train_dataloader()))
    kinds = {"two rows": TwoRows(model), "shared prefix": Answer(Learner(trainer.llama))}
    seconds: dict[str, list[float]] = {name: [] for name in kinds}
    losses = {}
    for _ in range(ROUNDS + 5):
        for name, answer in kinds.items():
            started = time.perf_counter()
            loss = trainer.loss_of(answer, batch)
            loss.backward()
            seconds[name].append(time.perf_counter() - started)
            model.zero_grad()
            losses[name] = loss.item()
    assert abs(losses["two rows"] - losses["shared prefix"]) < 1e-5, losses
    two, one = (statistics.median(times[5:]) for times in seconds.values())
    print(f"two rows {two:.4f} s, shared prefix {one:.4f} s a step of {PAIRS} pairs, medians of {ROUNDS}, 4-bit, CPU")
    print(f"shared prefix: {two / one:.2f}x two rows")


if __name__ == "__main__":
    main()
