"""SFT and DPO runs: from comparisons and a base to an adapter folder with its manifest."""

import hashlib
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PrinterCallback
from trl import DPOConfig, SFTConfig

from config import Config
from quantpref import processes
from quantpref.checkpoints import trained_weights
from quantpref.comparisons import Comparison, counterbalance
from quantpref.experiment import FAILED
from quantpref.guards import NonFiniteError, check_disk, disk_gib, out_of_memory, peak_memory_gib, smaller_batch
from quantpref.interrupts import FinishStep
from quantpref.models import Adapter, Base, attach, device, lora_weights, new_adapter, training_memory_gib
from quantpref.outcome import Outcome, digests
from quantpref.progress import TrainingLog
from quantpref.prompts import fit, pairs_dataset, prompt, tokenise
from quantpref.reference import reference_file
from quantpref.resume import made_with, remove_checkpoints, to_resume
from quantpref.runs import (
    Stopped,
    UserError,
    atomic_folder,
    environment,
    sha256,
    write_json,
    write_manifest,
)
from quantpref.shared_prefix import (
    CompletionCollator,
    CompletionSFTTrainer,
    PairCollator,
    SharedPrefixDPOTrainer,
)
from quantpref.verdict import instability_reasons

LOG = "training_log.jsonl"


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
    """Pairs per forward pass: the config's, or the largest divisor of each process' share of a step that fits.

    Decided before training from the memory that is free; the result does not depend on it.

    Raises:
        UserError: the effective batch cannot be shared out evenly.
    """
    share, rest = divmod(config.effective_batch_size, processes.count())
    wanted = config.per_device_train_batch_size
    if rest or (isinstance(wanted, int) and share % wanted):
        raise UserError(
            f"--effective-batch-size {config.effective_batch_size} cannot be shared out by {processes.count()}"
            f" processes with --per-device-train-batch-size {wanted}; choose numbers that divide it"
        )
    if isinstance(wanted, int):
        return wanted
    if device().type == "cpu":
        return share
    free_gib = torch.cuda.mem_get_info()[0] / 2**30
    shape = base.model.config
    already = training_memory_gib(shape, config.lora_r, 0)  # the base is loaded: its memory is not free any more
    divisors = [n for n in range(1, share + 1) if share % n == 0]
    fitting = [
        n
        for n in divisors
        if training_memory_gib(shape, config.lora_r, n * tokens_per_pair) - already <= 0.85 * free_gib
    ]
    return max(fitting, default=1)


def check_space(base: Base, pairs: int, arms: int, config: Config) -> None:
    """Refuse to begin where the disk cannot hold what `arms` trainings will write."""
    check_disk(config.output_dir, disk_gib(lora_weights(base.model.config, config.lora_r), pairs, arms))


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
    _run(trainer, base, train, config, folder, {**manifest, "kind": kind, "counts": counts, **_lineage(start, None)})


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
    trainer.keep_reference(_reference_file(base, sft, dataset, config, arguments))
    kind = "dpo" if sft else "dpo-from-base"
    _run(trainer, base, train, config, folder, {**manifest, "kind": kind, "counts": counts, **_lineage(sft, sft)})


def trial_steps(
    base: Base, train: Sequence[Comparison], config: Config, folder: Path, steps: int = 12
) -> dict[str, Any]:
    """A few real DPO steps from a fresh adapter: first loss, what moved, seconds per step, and back from its folder.

    The longest rows are among them, so that the peak of memory is that of training. The time is the median of the
    later half, since the first steps warm up. Leaves the base as it was.
    """
    batch = config.effective_batch_size
    longest = sorted(train, key=lambda c: len(prompt(c)), reverse=True)[:batch]
    others = [c for c in train if c not in longest][: (steps - 1) * batch]
    dataset, _ = training_pairs(base, longest + others, config)
    epochs = math.ceil(steps * batch / len(dataset))
    model = new_adapter(base, config.lora_r, config.lora_alpha, config.seed)
    arguments = {**_arguments(base, dataset, config, epochs, 1e-4, folder), "save_strategy": "no"}
    trainer = _dpo_trainer(base, model, dataset, config, arguments)
    log, outcome = TrainingLog("trial", folder / LOG), Outcome(model, base)
    _train(trainer, log)
    peak, weights = peak_memory_gib(), trained_weights(model)
    moved = sum(digest != outcome.trained[name] for name, digest in digests(weights).items())
    _save(model, base, folder)
    return {
        "first_loss": log.losses[0],
        "weights": len(weights),
        "moved": moved,
        "trainable_weights": sum(weight.numel() for weight in weights.values()),
        "seconds_per_step": statistics.median(b - a for a, b in pairwise(log.times[len(log.times) // 2 :])),
        "per_device_train_batch_size": trainer.args.per_device_train_batch_size,
        "peak_memory_gib": peak,
        "reload_nats": outcome.check(model, trainer.state.global_step, folder, train, config),
    }


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


def _reference_file(
    base: Base, sft: Adapter | None, dataset: Any, config: Config, arguments: dict[str, Any]
) -> Path | None:
    """Where this reference's numbers for these batches are kept, beside the SFT adapter; None where nothing can be."""
    beside = config.sft_folder.absolute().parent
    if not os.access(beside, os.W_OK):
        return None
    identity = {
        "base": base.fingerprint,
        "adapter": sft.sha256 if sft else None,
        "pairs": hashlib.sha256(json.dumps(dataset.to_dict()).encode()).hexdigest(),
        "batches": [config.seed, arguments["per_device_train_batch_size"], processes.count()],
        "environment": {name: environment()[name] for name in ("versions", "device")},
    }
    return reference_file(beside / "reference_log_probs", identity)


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
        "output_dir": str(config.checkpoints_of(folder)),
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": config.effective_batch_size // (micro * processes.count()),
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
        "seed": config.seed,
        "report_to": config.report_to,
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "dataloader_pin_memory": on_gpu,
        "dataloader_num_workers": int(on_gpu),  # the next rows are packed while the GPU works on these
        "dataloader_persistent_workers": on_gpu,
        "use_cpu": not on_gpu,
        "ddp_find_unused_parameters": False,
    }


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


def _run(
    trainer: Any,
    base: Base,
    train: Sequence[Comparison],
    config: Config,
    folder: Path,
    manifest: dict[str, Any],
) -> None:
    """Train, or train on, then save the adapter, its log and its manifest under their final name, all or nothing."""
    arguments, checkpoints = trainer.args, Path(trainer.args.output_dir)
    steps = math.ceil(manifest["counts"]["pairs"] / config.effective_batch_size) * int(arguments.num_train_epochs)
    log = TrainingLog(manifest["kind"], checkpoints / LOG if processes.is_first() else Path(os.devnull))
    sys.stdout.write(
        f"{manifest['kind']}: {manifest['counts']['pairs']:,} pairs, {steps:,} steps of {config.effective_batch_size}"
        f" ({arguments.per_device_train_batch_size} at a time), learning rate {arguments.learning_rate:g}\n"
    )
    recorded = {"config": config.as_json(), "seed": config.seed, "environment": environment()}
    trainer.made_with = {**manifest, **recorded}
    resumed = _resumed(checkpoints, trainer.made_with)
    outcome = Outcome(trainer.model, base)
    trainer.started = time.monotonic()
    try:
        _train(trainer, log, resumed)
    except NonFiniteError as error:
        if not processes.is_first():
            raise
        with atomic_folder(folder) as temporary:
            failure = {"step": error.step, "cause": "non-finite", "numbers": error.numbers}
            write_json(temporary / FAILED, {**trainer.made_with, **failure})
        raise
    results = _results(trainer, log, time.monotonic() - trainer.started)
    if processes.is_first():
        with processes.alone(), atomic_folder(folder) as temporary:
            _save(trainer.model, base, temporary)
            (temporary / LOG).write_bytes(log.path.read_bytes())
            results["adapter_sha256"] = sha256(temporary / "adapter_model.safetensors")
            write_manifest(temporary, trainer.made_with | results)
            outcome.check(trainer.model, trainer.state.global_step, temporary, train, config)
        remove_checkpoints(checkpoints)
    else:
        trainer.model.unload()
    processes.wait()
    for reason in instability_reasons(log.losses) if manifest["kind"].startswith("dpo") else ():
        sys.stdout.write(f"warning: {reason}\n")


def _results(trainer: Any, log: TrainingLog, seconds: float) -> dict[str, Any]:
    """What a manifest says of how training went."""
    tail = log.losses[-max(1, len(log.losses) // 10) :]
    pairs = trainer.made_with["counts"]["pairs"] * int(trainer.args.num_train_epochs)
    return {
        "trainable_weights": sum(weight.numel() for weight in trained_weights(trainer.model).values()),
        "steps": trainer.state.global_step,
        "per_device_train_batch_size": trainer.args.per_device_train_batch_size,
        "first_loss": log.losses[0],
        "last_tenth_mean_loss": sum(tail) / len(tail),
        "wall_seconds": seconds,
        "pairs_per_second": pairs / seconds,
        "peak_memory_gib": peak_memory_gib(),
        "tokens_seen": int(trainer.state.log_history[-2].get("num_tokens", 0)),
    }


def _resumed(checkpoints: Path, now: dict[str, Any]) -> Path | None:
    """The checkpoint to go on from, said in one line, as is every one that cannot be used; None to begin."""
    path, faults = to_resume(checkpoints)
    for fault in faults:
        sys.stdout.write(f"{fault}; this checkpoint is not used\n")
    if path is None:
        return None
    then = made_with(path)["base"]
    if then != now["base"]:
        raise UserError(
            f"{path}: made on base {then}, not on {now['base']}; use that base, or --fresh to begin anew beside it"
        )
    sys.stdout.write(f"goes on from {path}\n")
    return path


def _train(trainer: Any, log: TrainingLog, resumed: Path | None = None) -> None:
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(log)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    arguments = trainer.args
    effective = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps
    doing = f"training with {arguments.per_device_train_batch_size} pair(s) at a time"
    change = smaller_batch(arguments.per_device_train_batch_size, effective)
    try:
        with FinishStep() as stop, out_of_memory(doing, change):
            trainer.add_callback(stop)
            trainer.train(resume_from_checkpoint=str(resumed) if resumed else None)
    finally:
        log.close()
    if stop.signum:
        step = trainer.state.global_step
        raise Stopped(stop.signum, f"stopped after step {step}; the same command (without --fresh) goes on from there")


def _save(model: PeftModel, base: Base, folder: Path) -> None:
    model.save_pretrained(str(folder), selected_adapters=["default"], save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # peft's empty model card; the manifest says more
    base.tokenizer.save_pretrained(folder)
