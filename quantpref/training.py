"""SFT and DPO runs: from comparisons and a base to an adapter folder with its manifest."""

import json
import math
import resource
import statistics
import sys
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import PrinterCallback, TrainerCallback
from trl import DPOConfig, SFTConfig

from config import Config
from quantpref.comparisons import Comparison, counterbalance
from quantpref.models import Adapter, Base, attach, device, new_adapter, training_memory_gib
from quantpref.prompts import fit, pairs_dataset, tokenise
from quantpref.runs import MANIFEST, RunError, atomic_folder, environment, sha256, write_json
from quantpref.shared_prefix import (
    CompletionCollator,
    CompletionSFTTrainer,
    PairCollator,
    SharedPrefixDPOTrainer,
)

LOG = "training_log.jsonl"
FAILED = "failed.json"


def training_pairs(base: Base, train: Sequence[Comparison], config: Config) -> tuple[Any, dict[str, int]]:
    """Token ids of the training pairs, half of them with the preferred film first, and what was done.

    SFT and DPO train on the same rows in the same orders, so both call this with the same arguments.
    """
    rows, shortened = fit(base.tokenizer, counterbalance(train, config.seed), config.max_length, config.response)
    pairs, _ = tokenise(base.tokenizer, rows, config.response)
    return pairs_dataset(pairs), {
        "pairs": len(rows),
        "preferred_first": sum(c.label == "A" for c in rows),
        "shortened": shortened,
    }


def micro_batch_size(base: Base, tokens_per_pair: int, config: Config) -> int:
    """Pairs per forward pass: the config's, or the largest divisor of the effective batch that fits.

    Decided before training from the memory that is free; the result does not depend on it.
    """
    if isinstance(config.per_device_train_batch_size, int):
        return config.per_device_train_batch_size
    if device().type == "cpu":
        return config.effective_batch_size
    free_gib = torch.cuda.mem_get_info()[0] / 2**30
    shape = base.model.config
    already = training_memory_gib(shape, config.lora_r, 0)  # the base is loaded: its memory is not free any more
    divisors = [n for n in range(1, config.effective_batch_size + 1) if config.effective_batch_size % n == 0]
    fitting = [
        n
        for n in divisors
        if training_memory_gib(shape, config.lora_r, n * tokens_per_pair) - already <= 0.85 * free_gib
    ]
    return max(fitting, default=1)


def train_sft(
    base: Base,
    train: Sequence[Comparison],
    config: Config,
    folder: Path,
    manifest: dict[str, Any],
    start: Adapter | None = None,
) -> None:
    """SFT on the chosen responses. From `start`, with DPO's passes and learning rate, it is arm sft-more."""
    dataset, counts = training_pairs(base, train, config)
    model = (
        attach(base, {"default": start}) if start else new_adapter(base, config.lora_r, config.lora_alpha, config.seed)
    )
    epochs = config.num_train_epochs if start else config.sft_epochs
    arguments = SFTConfig(
        **_arguments(
            base, dataset, config, epochs, config.learning_rate if start else config.sft_learning_rate, folder
        ),
        dataset_kwargs={"skip_prepare_dataset": True},
        loss_type="nll",
    )
    with Float32Adapter(model):
        trainer = CompletionSFTTrainer(
            model=model,
            args=arguments,
            train_dataset=dataset,
            data_collator=CompletionCollator(base.tokenizer.pad_token_id),
            processing_class=base.tokenizer,
        )
    kind = "sft-more" if start else "sft"
    _run(trainer, base, config, folder, {**manifest, "kind": kind, "counts": counts, **_lineage(start, None)})


def train_dpo(
    base: Base,
    train: Sequence[Comparison],
    config: Config,
    folder: Path,
    manifest: dict[str, Any],
    sft: Adapter | None,
) -> None:
    """DPO from the SFT adapter, with that adapter frozen as the reference.

    Without one it is arm dpo-from-base: a fresh adapter, which changes nothing yet, so that the reference is
    the bare base.
    """
    dataset, counts = training_pairs(base, train, config)
    model = attach(base, {"default": sft}) if sft else new_adapter(base, config.lora_r, config.lora_alpha, config.seed)
    arguments = _arguments(base, dataset, config, config.num_train_epochs, config.learning_rate, folder)
    trainer = _dpo_trainer(base, model, dataset, config, arguments)
    kind = "dpo" if sft else "dpo-from-base"
    _run(trainer, base, config, folder, {**manifest, "kind": kind, "counts": counts, **_lineage(sft, sft)})


def trial_steps(
    base: Base, train: Sequence[Comparison], config: Config, folder: Path, steps: int = 12
) -> dict[str, Any]:
    """A few real DPO steps from a fresh adapter: first loss, what moved, seconds per step.

    The time is the median of the later half, since the first steps warm up. Leaves the base as it was, and
    nothing but logs in `folder`.
    """
    dataset, _ = training_pairs(base, train[: steps * config.effective_batch_size], config)
    model = new_adapter(base, config.lora_r, config.lora_alpha, config.seed)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    trainer = _dpo_trainer(
        base, model, dataset, config, {**_arguments(base, dataset, config, 1, 1e-4, folder), "save_strategy": "no"}
    )
    log = _Log("trial", folder / LOG)
    _train(trainer, log)
    moved = sum(
        not torch.equal(p.detach().to(before[n]), before[n]) for n, p in model.named_parameters() if n in before
    )
    result = {
        "first_loss": log.losses[0],
        "weights": len(before),
        "moved": moved,
        "trainable_weights": sum(p.numel() for p in before.values()),
        "seconds_per_step": statistics.median(b - a for a, b in pairwise(log.times[len(log.times) // 2 :])),
        "per_device_train_batch_size": trainer.args.per_device_train_batch_size,
        "peak_memory_gib": peak_memory_gib(),
    }
    model.unload()
    return result


def _dpo_trainer(
    base: Base, model: PeftModel, dataset: Any, config: Config, arguments: dict[str, Any]
) -> SharedPrefixDPOTrainer:
    with Float32Adapter(model):
        return SharedPrefixDPOTrainer(
            model=model,
            args=DPOConfig(**arguments, beta=config.beta, loss_type=["sigmoid"], disable_dropout=True),
            train_dataset=dataset,
            data_collator=PairCollator(pad_token_id=base.tokenizer.pad_token_id),
            processing_class=base.tokenizer,
        )


def _lineage(start: Adapter | None, reference: Adapter | None) -> dict[str, Any]:
    return {
        "lineage": {
            "started_from": start.sha256 if start else None,
            "reference": reference.sha256 if reference else None,
        }
    }


def _arguments(
    base: Base, dataset: Any, config: Config, epochs: int, learning_rate: float, folder: Path
) -> dict[str, Any]:
    """What SFT and DPO share. TRL's own defaults differ between the two, so each is set here."""
    on_gpu = device().type == "cuda"
    longest = max(len(row["prompt_ids"]) + len(row["chosen_ids"]) + len(row["rejected_ids"]) for row in dataset)
    micro = micro_batch_size(base, longest, config)
    return {
        "output_dir": str(checkpoints_of(folder)),
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": config.effective_batch_size // micro,
        "num_train_epochs": epochs,
        "learning_rate": learning_rate,
        "lr_scheduler_type": "linear",
        "warmup_steps": config.warmup_steps,
        "weight_decay": config.weight_decay,
        "max_grad_norm": 1.0,
        "optim": "adamw_8bit" if on_gpu else "adamw_torch",
        "bf16": on_gpu,
        "gradient_checkpointing": False,
        "max_length": None,  # prompts.fit has shortened what was too long, and counted it
        "logging_steps": 1,
        "logging_nan_inf_filter": False,  # it would log a NaN as 0
        "save_steps": config.save_steps,
        "save_total_limit": 2,
        "seed": config.seed,
        "report_to": config.report_to,
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "dataloader_pin_memory": on_gpu,
    }


def checkpoints_of(folder: Path) -> Path:
    """llama3_dpo_4bit_final -> dpo_checkpoints, beside it."""
    return folder.with_name(folder.name.removeprefix("llama3_").removesuffix("_4bit_final") + "_checkpoints")


class Float32Adapter:
    """Keep the adapter in float32 while TRL builds its trainer.

    TRL casts adapters on a quantised base to bf16, in which a step of 5e-5 is lost on a weight of 0.016.
    """

    def __init__(self, model: PeftModel) -> None:
        self.weights = {n: p for n, p in model.named_parameters() if p.requires_grad}

    def __enter__(self) -> None:
        self.values = {name: weight.detach().float().clone() for name, weight in self.weights.items()}

    def __exit__(self, *_: object) -> None:
        for name, weight in self.weights.items():
            weight.data = self.values[name]


class _Log(TrainerCallback):
    """Progress bar, training_log.jsonl, and a stop at the first number that is not finite."""

    def __init__(self, title: str, path: Path) -> None:
        self.title, self.path = title, path
        self.losses: list[float] = []
        self.times: list[float] = []
        self.progress = Progress(
            TextColumn("{task.description:8}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[numbers]}"),
            console=Console(width=None if sys.stdout.isatty() else 120),  # in a log nothing is cut off
        )

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.file = self.path.open("w", encoding="utf-8")
        self.progress.start()
        self.task = self.progress.add_task(self.title, total=state.max_steps, numbers="")

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        logs = kwargs["logs"]
        if "loss" not in logs:
            return
        row = {"step": state.global_step, **{k: round(v, 8) for k, v in logs.items() if isinstance(v, float | int)}}
        bad = [k for k, v in row.items() if not math.isfinite(v)]
        if bad:
            raise NonFiniteError(state.global_step, {k: str(row[k]) for k in bad})
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()
        self.losses.append(row["loss"])
        self.times.append(time.monotonic())
        numbers = f"loss {row['loss']:.4f}"
        if "rewards/margins" in row:
            numbers += f"  margin {row['rewards/margins']:+.3f}  accuracy {row['rewards/accuracies']:.2f}"
        self.progress.update(self.task, completed=state.global_step, numbers=numbers)

    def close(self) -> None:
        self.progress.stop()
        self.file.close()


class NonFiniteError(RunError):
    """Training met a loss or gradient that is not a number."""

    def __init__(self, step: int, numbers: dict[str, str]) -> None:
        super().__init__(f"step {step}: {numbers} is not finite; lower the learning rate")
        self.step, self.numbers = step, numbers


def _run(trainer: Any, base: Base, config: Config, folder: Path, manifest: dict[str, Any]) -> None:
    """Train, then save the adapter, its log and its manifest under their final name, all or nothing."""
    arguments = trainer.args
    steps = math.ceil(manifest["counts"]["pairs"] / config.effective_batch_size) * int(arguments.num_train_epochs)
    log = _Log(manifest["kind"], Path(arguments.output_dir) / LOG)
    sys.stdout.write(
        f"{manifest['kind']}: {manifest['counts']['pairs']:,} pairs, {steps:,} steps of {config.effective_batch_size}"
        f" ({arguments.per_device_train_batch_size} at a time), learning rate {arguments.learning_rate:g}\n"
    )
    started = time.monotonic()
    try:
        _train(trainer, log)
    except NonFiniteError as error:
        failure = {"step": error.step, "cause": "non-finite", "numbers": error.numbers}
        with atomic_folder(folder) as temporary:
            write_json(temporary / FAILED, {**manifest, "config": config.as_json(), **failure})
        raise
    seconds = time.monotonic() - started
    with atomic_folder(folder) as temporary:
        _save(trainer.model, base, temporary)
        (temporary / LOG).write_bytes(log.path.read_bytes())
        tail = log.losses[-max(1, len(log.losses) // 10) :]
        write_json(
            temporary / MANIFEST,
            {
                **manifest,
                "adapter_sha256": sha256(temporary / "adapter_model.safetensors"),
                "config": config.as_json(),
                "seed": config.seed,
                "environment": environment(),
                "trainable_weights": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
                "steps": trainer.state.global_step,
                "per_device_train_batch_size": arguments.per_device_train_batch_size,
                "first_loss": log.losses[0],
                "last_tenth_mean_loss": sum(tail) / len(tail),
                "wall_seconds": seconds,
                "pairs_per_second": manifest["counts"]["pairs"] * int(arguments.num_train_epochs) / seconds,
                "peak_memory_gib": peak_memory_gib(),
                "tokens_seen": int(trainer.state.log_history[-2].get("num_tokens", 0)),
            },
        )
    trainer.model.unload()  # the base stands bare again, for the next arm


def _train(trainer: Any, log: _Log) -> None:
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(log)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    try:
        trainer.train()
    finally:
        log.close()


def _save(model: PeftModel, base: Base, folder: Path) -> None:
    model.save_pretrained(str(folder), selected_adapters=["default"], save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # peft's empty model card; the manifest says more
    base.tokenizer.save_pretrained(folder)


def peak_memory_gib() -> float:
    """The GPU's peak since the last reset; on a CPU, the process' peak resident size."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
