#!/usr/bin/env python3
"""Scoring on a GPU: ours beside what others do, per comparison, one base, one call.

    python benchmarks/gpu_scoring.py --base TOKENIZER --out out/scoring.json

(a) generating 150 tokens for each prompt and looking for the answer in the text, one prompt at a time;
(b) two continuations a prompt with full logits, in padded batches, as lm-evaluation-harness does.
"""

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from gpu_training import matmul_tflops
from llama3_shape import base_in_memory

from config import PRESETS, parse_flags
from quantpref import models
from quantpref.backends import choose_backend
from quantpref.comparisons import load, split_by_user
from quantpref.packed_llama import PackedLlama
from quantpref.prefix_tree import pack
from quantpref.runs import environment, one_line_errors, write_json
from quantpref.scoring import score, scoring_rows

ARMS = (None, "sft", "dpo")


@dataclass(frozen=True)
class Bench:
    base: Path
    """Folder of Llama 3's tokenizer: the base, of random weights, is made in memory."""
    out: Path
    """JSON file to write."""
    continuations: int = 128
    """Comparisons that (b) scores, by one arm in both orders."""
    generated: int = 2
    """Prompts that (a) answers."""
    continuation_batch: int = 64
    """Rows in one of (b)'s forward passes."""


def main(bench: Bench) -> None:
    models.quiet()
    choose_backend("transformers")
    base = base_in_memory(bench.base)
    model = models.new_adapter(base, 16, 16, seed=0)
    model.add_adapter("sft", model.peft_config["default"])
    model.add_adapter("dpo", model.peft_config["default"])
    generator = torch.Generator().manual_seed(1)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data = (0.01 * torch.randn(weight.shape, generator=generator)).to(weight)
    model.eval()
    preset = PRESETS["tiny"]
    test = split_by_user(load(preset.data), 0.7, 0.1, preset.split_seed).test
    rows = scoring_rows(base.tokenizer, test, 2048, "reasoned")
    results: dict[str, Any] = {"comparisons": len(test), "matmul_tflops": matmul_tflops(), "environment": environment()}
    results["ours"], scores = ours(model, rows)
    results["two continuations, full logits"], margins = two_continuations(model, base.tokenizer, rows, bench)
    results["150 tokens generated"] = generation(model, base.tokenizer, rows, bench)
    n = len(margins) // 2
    mine = torch.tensor(scores.order_margins[:n].T.flatten())
    results["margins"] = {
        "ours less (b), root mean square, nats": float((mine - margins).pow(2).mean().sqrt()),
        "of (b), standard deviation, nats": float(margins.std()),
        "correlation": float(torch.corrcoef(torch.stack((mine, margins)))[0, 1]),
    }
    each = {
        name: row["seconds_per_comparison"] for name, row in results.items() if "seconds_per_comparison" in str(row)
    }
    results["times ours"] = {name: seconds / each["ours"] for name, seconds in each.items()}
    write_json(bench.out, results)
    print(json.dumps(results, indent=1))


def ours(model: Any, rows: Any) -> tuple[dict[str, Any], Any]:
    """All comparisons, both orders, three arms; the first call compiles, and is stated apart."""
    llama = PackedLlama(model)
    seconds = []
    for arms in ((None,), ARMS):
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
        started = time.perf_counter()
        for arm in arms:
            llama.adapters.use(arm)
            scores = score(llama, rows)
        seconds.append(time.perf_counter() - started)
    tokens, columns = sum(map(len, rows.ids)), len(pack(rows.ids).ids)
    return {
        "seconds": seconds[1], "seconds_of_one_arm_the_first_time": seconds[0],
        "seconds_per_comparison": seconds[1] / len(ARMS) / (len(rows.ids) / 2), "tokens": tokens,
        "columns": columns, "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
    }, scores  # fmt: skip


def two_continuations(model: Any, tokenizer: Any, rows: Any, bench: Bench) -> tuple[dict[str, Any], torch.Tensor]:
    """The last arm; margins (2 n,) of both orders, the preferred film's first."""
    n, total = bench.continuations, len(rows.ids) // 2
    prompts = [*rows.ids[:n], *rows.ids[total : total + n]]
    model.set_adapter("dpo")
    texts = sorted(
        ((prompt, answer, i) for i, prompt in enumerate(prompts) for answer in (rows.slot.token_a, rows.slot.token_b)),
        key=lambda text: len(text[0]),
    )
    found = torch.zeros(len(prompts), 2, dtype=torch.float64)
    for warm in (True, False):
        torch.cuda.synchronize()
        started = time.perf_counter()
        for at in range(0, bench.continuation_batch if warm else len(texts), bench.continuation_batch):
            batch = texts[at : at + bench.continuation_batch]
            for (_, answer, i), value in zip(batch, continuation_log_probs(model, tokenizer, batch), strict=True):
                found[i, 0 if answer == rows.slot.token_a else 1] = value
        torch.cuda.synchronize()
        seconds = time.perf_counter() - started
    signs = torch.tensor([1.0] * n + [-1.0] * n, dtype=torch.float64)
    return {"seconds": seconds, "comparisons": n, "seconds_per_comparison": seconds / n}, (
        found[:, 0] - found[:, 1]
    ) * signs


@torch.inference_mode()
def continuation_log_probs(model: Any, tokenizer: Any, batch: list[Any]) -> list[float]:
    texts = [[*prompt, answer] for prompt, answer, _ in batch]
    longest = max(map(len, texts))
    ids = torch.tensor([text + [tokenizer.pad_token_id] * (longest - len(text)) for text in texts], device="cuda")
    mask = torch.tensor([[1] * len(text) + [0] * (longest - len(text)) for text in texts], device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    logs = torch.log_softmax(logits.float(), -1)
    return [logs[row, len(text) - 2, text[-1]].item() for row, text in enumerate(texts)]


@torch.inference_mode()
def generation(model: Any, tokenizer: Any, rows: Any, bench: Bench) -> dict[str, Any]:
    """Seconds per comparison for one arm: both orders."""
    started = time.perf_counter()
    for prompt in rows.ids[: bench.generated]:
        ids = torch.tensor([prompt], device="cuda")
        with torch.autocast("cuda", torch.bfloat16):
            model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), min_new_tokens=150, max_new_tokens=150,
                do_sample=False, pad_token_id=tokenizer.pad_token_id,
            )  # fmt: skip
    torch.cuda.synchronize()
    seconds = (time.perf_counter() - started) / bench.generated
    return {"prompts": bench.generated, "seconds_per_comparison": 2 * seconds}


if __name__ == "__main__":
    with one_line_errors():
        main(parse_flags(Bench, sys.argv[1:], description=__doc__))
