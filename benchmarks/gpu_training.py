#!/usr/bin/env python3
"""Training on a GPU: ours beside TRL's and Unsloth's own DPO, one base, one data set, one call.

    python benchmarks/llama3_shape.py --tokenizer TOKENIZER --out BASE      # a folder, for Unsloth
    python benchmarks/gpu_training.py --base TOKENIZER --rows ours trl spread --out out/ours.json
    python benchmarks/gpu_training.py --base BASE --rows unsloth --out out/unsloth.json

The pairs are the embedded texts whose mean lengths under Llama 3's tokenizer are FACTS': about 112 prompt and 44
response tokens. Effective batch 8, LoRA r 16, learning rate 5e-5, AdamW 8-bit, bf16, the same order of rows for all.
A row's speed is that of its steady steps; what came before them is start-up. Ours includes the reference pass, spread
over three epochs; the peers' "tuned" rows have theirs for nothing.
"""

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from config import PRESETS, parse_flags
from quantpref.runs import environment, one_line_errors, write_json

EFFECTIVE, BETA = 8, 0.1
PARAMETERS = 6_979_321_856  # of the projections of Llama 3 8B: what a token is multiplied with


@dataclass(frozen=True)
class Bench:
    base: Path
    """Folder of Llama 3's tokenizer: the base, of random weights, is made in memory. For Unsloth, a base's folder."""
    out: Path
    """JSON file to write."""
    rows: tuple[Literal["ours", "trl", "spread", "unsloth", "growth", "lengths"], ...]
    """Which rows to measure; unsloth in a process of its own, since it patches the others."""
    pairs: int = 800
    """Pairs of the main row, over three epochs."""
    peer_steps: int = 110
    """Steps of a tuned peer; those with checkpointing take a fifth."""


def main(bench: Bench) -> None:
    results: dict[str, Any] = {}
    if "unsloth" in bench.rows:
        unsloth_rows(bench, results)
    else:
        our_rows(bench, results)
    results["environment"] = environment()
    write_json(bench.out, results)
    for name, row in results.items():
        print(name, json.dumps({k: v for k, v in row.items() if k != "losses"}))


def our_rows(bench: Bench, results: dict[str, Any]) -> None:
    from llama3_shape import base_in_memory

    from quantpref import models
    from quantpref.backends import choose_backend

    models.quiet()
    choose_backend("transformers")
    base = base_in_memory(bench.base)
    texts = text_pairs(base.tokenizer, bench.pairs)

    def measure(name: str, run: Callable[[], dict[str, Any]]) -> None:
        try:
            results[name] = run()
        except Exception as error:  # a peer that breaks must not cost the other rows
            results[name] = {"error": repr(error)[:500]}
        write_json(bench.out, results)
        print(name, {k: v for k, v in results[name].items() if k != "losses"}, flush=True)

    if "ours" in bench.rows:
        results["matmul"] = {"tflops": matmul_tflops()}
        measure("ours, texts", lambda: ours(base, texts, epochs=3))
        numbers = random_pairs(400, 112, 44)
        measure("ours, random ids, nothing shared but the prompt", lambda: ours(base, numbers, epochs=3))
    if "trl" in bench.rows:
        steps = bench.peer_steps
        measure("TRL, micro-batch 1 x 8, checkpointing", lambda: trl(base, texts, steps // 10, micro=1, usual=True))
        measure("TRL, micro-batch 8", lambda: trl(base, texts, steps // 2, micro=8))
        measure("prefix tree over plain transformers + SDPA mask", lambda: plain_tree(base, texts, steps // 2))
    if "spread" in bench.rows:
        measure("ours, 50 steps", lambda: ours(base, texts[:400], epochs=1))
        measure("TRL, micro-batch 8, 50 steps", lambda: trl(base, texts[:400], 50, micro=8))
        measure("TRL, micro-batch 4 x 2, 50 steps", lambda: trl(base, texts[:400], 50, micro=4))
    if "growth" in bench.rows:
        for n in (256, 1024, 6040):
            measure(f"ours, {n} pairs once", lambda n=n: ours(base, text_pairs(base.tokenizer, n), epochs=1))
    if "lengths" in bench.rows:
        for prompt, micro in ((112, 8), (512, 2), (1800, 1)):
            row = random_pairs(160, prompt, 44)
            measure(f"ours, prompts of {prompt}, {micro} at a time", lambda r=row, m=micro: ours(base, r, 1, micro=m))


def text_pairs(tokenizer: Any, count: int) -> list[Any]:
    """The embedded comparisons nearest to 112 prompt and 44 response tokens; `mean_tokens` says what they come to."""
    from quantpref.comparisons import counterbalance, load
    from quantpref.prompts import tokenise

    pairs, _ = tokenise(tokenizer, counterbalance(load(PRESETS["tiny"].data), 1))

    def distance(pair: Any) -> int:
        return abs(len(pair.prompt_ids) - 112) + abs(len(pair.chosen_ids) - 44) + abs(len(pair.rejected_ids) - 44)

    nearest = set(sorted(range(len(pairs)), key=lambda i: distance(pairs[i]))[:count])
    return [pair for i, pair in enumerate(pairs) if i in nearest]


def random_pairs(count: int, prompt: int, response: int) -> list[Any]:
    """Pairs of random ids: nothing is shared but each pair's own prompt."""
    import torch

    from quantpref.prompts import TokenisedPair

    generator = torch.Generator().manual_seed(0)

    def ids(n: int) -> list[int]:
        return torch.randint(1000, 120_000, (n,), generator=generator).tolist()

    return [TokenisedPair(ids(prompt), ids(response), ids(response)) for _ in range(count)]


def settings(folder: str, micro: int, steps: int, epochs: int, usual: bool) -> dict[str, Any]:
    """DPOConfig of one row; `usual`: gradient checkpointing, and the reference scored in each step."""
    return {
        "output_dir": folder, "per_device_train_batch_size": micro, "gradient_accumulation_steps": EFFECTIVE // micro,
        "num_train_epochs": epochs, "max_steps": steps, "learning_rate": 5e-5, "lr_scheduler_type": "linear",
        "warmup_steps": 5, "weight_decay": 0.01, "optim": "adamw_8bit", "bf16": True, "beta": BETA,
        "gradient_checkpointing": usual, "precompute_ref_log_probs": not usual, "max_length": None,
        "logging_steps": 1, "logging_nan_inf_filter": False, "save_strategy": "no", "report_to": "none",
        "disable_tqdm": True, "remove_unused_columns": False, "dataloader_num_workers": 1, "seed": 3407,
    }  # fmt: skip


def run(trainer: Any, pairs: Sequence[Any], warm_up: int, epochs: int) -> dict[str, Any]:
    """Train; steady steps are those after `warm_up` in each epoch, and the median over them."""
    import torch
    from transformers import PrinterCallback, TrainerCallback

    times: list[float] = []
    losses: list[float] = []

    class Clock(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if "loss" in kwargs["logs"]:
                times.append(time.perf_counter())
                losses.append(kwargs["logs"]["loss"])

    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Clock())
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    trainer.train()
    wall = time.perf_counter() - started
    deltas = [b - a for a, b in zip([started, *times], times, strict=False)]
    per_epoch = len(deltas) // epochs
    medians = [
        statistics.median(deltas[e * per_epoch + (warm_up if e == 0 else 1) : (e + 1) * per_epoch])
        for e in range(epochs)
    ]
    step = statistics.mean(medians)
    tokens = [statistics.mean(len(getattr(p, side)) for p in pairs) for side in ("prompt_ids", "chosen_ids")]
    return {
        "pairs_per_second": EFFECTIVE / step, "step_seconds": step, "epoch_step_seconds": medians,
        "steady_steps": len(deltas) - warm_up - epochs + 1, "wall_seconds": wall,
        "start_up_seconds": wall - sum(medians) * per_epoch, "first_loss": losses[0], "losses": losses,
        "last_loss": losses[-1], "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
        "reserved_gib": torch.cuda.max_memory_reserved() / 2**30, "mean_tokens": tokens,
    }  # fmt: skip


def ours(base: Any, pairs: Sequence[Any], epochs: int, micro: int = EFFECTIVE) -> dict[str, Any]:
    from trl import DPOConfig

    from quantpref import models, training
    from quantpref.prompts import pairs_dataset
    from quantpref.shared_prefix import PairCollator, SharedPrefixDPOTrainer

    model = models.new_adapter(base, 16, 16, seed=0)
    with tempfile.TemporaryDirectory() as folder:
        with training.Float32Adapter(model):
            trainer = SharedPrefixDPOTrainer(
                model=model, args=DPOConfig(**(settings(folder, micro, -1, epochs, usual=True) | UNUSED)),
                train_dataset=pairs_dataset(pairs), processing_class=base.tokenizer,
                data_collator=PairCollator(pad_token_id=base.tokenizer.pad_token_id),
            )  # fmt: skip
        found = run(trainer, pairs, warm_up=min(25, len(pairs) // EFFECTIVE // 2), epochs=epochs)
    shapes = sorted(trainer.llama.replays)
    columns = statistics.mean(shape[0] for shape in shapes) if shapes else 0.0
    model.unload()
    flops = 2 * PARAMETERS * columns * (EFFECTIVE // micro) * (2 + 1 / 3)
    return found | {"shapes": shapes, "matmul_tflop_per_step": flops / 1e12}


UNUSED = {"gradient_checkpointing": False}  # ours keeps activations, and scores the reference by itself


def trl(base: Any, pairs: Sequence[Any], steps: int, micro: int, usual: bool = False) -> dict[str, Any]:
    from trl import DPOConfig, DPOTrainer

    from quantpref import models
    from quantpref.prompts import pairs_dataset

    class Plain(DPOTrainer):
        def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
            return dataset  # the same token ids as ours

    base.model.gradient_checkpointing_disable()  # an earlier row may have switched it on
    model = models.new_adapter(base, 16, 16, seed=0)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Plain(
            model=model, args=DPOConfig(**settings(folder, micro, steps, 1, usual)),
            train_dataset=pairs_dataset(pairs), processing_class=base.tokenizer,
        )  # fmt: skip
        found = run(trainer, pairs, warm_up=3, epochs=1)
    model.unload()
    return found


def plain_tree(base: Any, pairs: Sequence[Any], steps: int) -> dict[str, Any]:
    """Our rows through transformers' and peft's own forward, with a dense mask: what packing alone gives."""
    import torch
    from trl import DPOConfig, DPOTrainer

    from quantpref import models
    from quantpref.kernels import token_statistics
    from quantpref.packed_llama import TokenStatistics, TreeBatch
    from quantpref.prompts import pairs_dataset
    from quantpref.shared_prefix import PairCollator, SharedPrefixDPOTrainer

    class PlainTree(SharedPrefixDPOTrainer):
        def create_optimizer(self, model: Any = None) -> Any:
            return DPOTrainer.create_optimizer(self)

        def _wrap_model(self, model: Any, *args: Any, **kwargs: Any) -> Any:
            return model

        def _compute_loss(self, model: Any, inputs: Any, return_outputs: bool) -> Any:
            self.reference = self.reference.nan_to_num(0.0)  # its pass is free here, as in the tuned rows

            def statistics_of(tree: TreeBatch) -> TokenStatistics:
                at = torch.arange(len(tree.end), device=tree.end.device)
                sees = (at[None] <= at[:, None]) & (at[:, None] < tree.end[None])
                hidden = self.model.get_base_model().model(
                    input_ids=tree.ids[None], position_ids=tree.positions[None], attention_mask=sees[None, None],
                    use_cache=False,
                ).last_hidden_state[0, tree.columns]  # fmt: skip
                logits = hidden @ self.model.get_base_model().lm_head.weight.T.to(hidden.dtype)
                return TokenStatistics(*token_statistics(logits, tree.tokens))

            return super()._compute_loss(statistics_of, inputs, return_outputs)

        def _check_first_loss(self, loss: float) -> None:
            pass  # the reference is not computed here

    base.model.gradient_checkpointing_disable()
    model = models.new_adapter(base, 16, 16, seed=0)
    with tempfile.TemporaryDirectory() as folder:
        trainer = PlainTree(
            model=model, args=DPOConfig(**(settings(folder, EFFECTIVE, steps, 1, usual=True) | UNUSED)),
            train_dataset=pairs_dataset(pairs), processing_class=base.tokenizer,
            data_collator=PairCollator(pad_token_id=base.tokenizer.pad_token_id),
        )  # fmt: skip
        found = run(trainer, pairs, warm_up=5, epochs=1)
    model.unload()
    return found


def unsloth_rows(bench: Bench, results: dict[str, Any]) -> None:
    import os

    os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")
    from unsloth import FastLanguageModel, PatchDPOTrainer  # isort: skip

    PatchDPOTrainer()
    import torch
    from trl import DPOConfig, DPOTrainer

    from quantpref.models import LORA_TARGETS
    from quantpref.prompts import pairs_dataset

    class Plain(DPOTrainer):
        def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
            return dataset

    tuned, usual = ("Unsloth, micro-batch 8", 8, False), ("Unsloth, micro-batch 1 x 8, checkpointing", 1, True)
    for name, micro, usual_settings in (tuned, usual):
        model, tokenizer = FastLanguageModel.from_pretrained(
            str(bench.base), max_seq_length=2048, dtype=torch.bfloat16, load_in_4bit=True
        )
        model = FastLanguageModel.get_peft_model(
            model, r=16, lora_alpha=16, lora_dropout=0.0, bias="none", target_modules=list(LORA_TARGETS),
            use_gradient_checkpointing="unsloth" if usual_settings else False, random_state=0,
        )  # fmt: skip
        pairs = text_pairs(tokenizer, bench.pairs)
        steps = bench.peer_steps // (5 if usual_settings else 1)
        with tempfile.TemporaryDirectory() as folder:
            trainer = Plain(
                model=model, ref_model=None, args=DPOConfig(**settings(folder, micro, steps, 1, usual_settings)),
                train_dataset=pairs_dataset(pairs), processing_class=tokenizer,
            )  # fmt: skip
            results[name] = run(trainer, pairs, warm_up=5, epochs=1)
        print(name, {k: v for k, v in results[name].items() if k != "losses"}, flush=True)
        del model, trainer
        torch.cuda.empty_cache()


def matmul_tflops() -> float:
    """bf16, 8192 cubed, random data: what this card's matrix units give."""
    import torch

    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    for _ in range(5):
        a @ b
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(20):
        a @ b
    torch.cuda.synchronize()
    return 20 * 2 * 8192**3 / (time.perf_counter() - started) / 1e12


if __name__ == "__main__":
    with one_line_errors():
        main(parse_flags(Bench, sys.argv[1:], description=__doc__))
