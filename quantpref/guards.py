"""What stops a training run where it goes wrong: numbers that are not finite, exhausted memory, a full disk."""

import contextlib
import math
import resource
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from quantpref.checkpoints import trained_weights
from quantpref.resume import KEPT
from quantpref.runs import RunError

FIRST_REWARD = 0.01  # beta times the log-ratio of policy and reference, before the first step


class NonFiniteError(RunError):
    """Training met a loss, gradient or weight that is not a finite number."""

    def __init__(self, step: int, numbers: Mapping[str, float]) -> None:
        self.step, self.numbers = step, {name: str(value) for name, value in numbers.items()}
        found = ", ".join(f"{name} {value}" for name, value in self.numbers.items())
        super().__init__(f"step {step}: {found} is not finite; lower the learning rate, and begin anew with --fresh")


class Guards:
    """Mixed into a transformers Trainer, before it: stops at the first number that is not finite."""

    def _get_grad_norm(self: Any, model: Any, grad_norm: Any = None) -> Any:
        """Called between backward and the optimiser's step, with the step's summed loss in `_tr_loss`."""
        norm = super()._get_grad_norm(model, grad_norm)  # type: ignore[misc]
        numbers = {"loss": float(self._tr_loss), "grad_norm": float(norm)}
        if not all(map(math.isfinite, numbers.values())):
            raise NonFiniteError(self.state.global_step + 1, numbers)
        return norm

    def _save_checkpoint(self: Any, model: Any, trial: Any) -> None:
        """The last step saves too, so that no adapter becomes final with weights that are not finite."""
        broken = sum(not bool(weight.isfinite().all()) for weight in trained_weights(self.model).values())
        if broken:
            raise NonFiniteError(self.state.global_step, {"weights": math.nan})
        super()._save_checkpoint(model, trial)  # type: ignore[misc]

    def log(self: Any, logs: dict[str, float], start_time: float | None = None) -> None:
        super().log(logs, start_time)  # type: ignore[misc]
        rewards = {key: logs[key] for key in ("rewards/chosen", "rewards/rejected") if key in logs}
        if self.state.global_step == 1 and any(abs(reward) > FIRST_REWARD for reward in rewards.values()):
            raise RunError(
                f"DPO's rewards before the first step are {rewards}, not 0: the reference is not the adapter that"
                " training started from"
            )


@contextlib.contextmanager
def out_of_memory(doing: str, change: str) -> Iterator[None]:
    """Exhausted memory as one line: the numbers, and the one setting to change."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise RunError(f"{doing}: out of memory ({memory_text()}); {change}") from error
    except RuntimeError as error:  # what torch raises on a CPU
        if "can't allocate memory" not in str(error):
            raise
        raise RunError(f"{doing}: out of memory ({memory_text()}); {change}") from error


def memory_text() -> str:
    if not torch.cuda.is_available():
        return f"peak {peak_memory_gib():.1f} GiB resident"
    free, total = (n / 2**30 for n in torch.cuda.mem_get_info())
    return f"peak {peak_memory_gib():.1f} GiB of ours, {free:.1f} of {total:.1f} GiB free"


def peak_memory_gib() -> float:
    """The GPU's peak since the last reset; on a CPU, the process' peak resident size."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def smaller_batch(micro: int, effective: int) -> str:
    """The setting that needs less memory and changes no result, or failing that the one that does."""
    smaller = [n for n in range(1, micro) if effective % n == 0]
    if smaller:
        return f"the same command with --per-device-train-batch-size {smaller[-1]} goes on from the last checkpoint"
    return "take a smaller base with --base-model"


def disk_gib(weights: int, pairs: int, arms: int) -> float:
    """What `arms` trainings of `weights` adapter weights write at most.

    Each adapter, and of one the checkpoints while the next is being saved: weights and AdamW's moments in
    float32 (8-bit moments take less), and two log-probabilities a pair; 2 MiB for the small files of each.
    """
    tensors = 4 * (arms * weights + (KEPT + 1) * (3 * weights + 2 * pairs))
    return tensors / 2**30 + (arms + KEPT + 1) * 2 / 1024


def check_disk(folder: Path, needed_gib: float) -> None:
    free = free_gib(folder)
    if free < needed_gib:
        raise RunError(
            f"{folder}: {free:.2f} GiB free, {needed_gib:.2f} needed for adapters and checkpoints; free some space, or"
            " choose another --output-dir"
        )


def free_gib(folder: Path) -> float:
    there = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    return shutil.disk_usage(there).free / 2**30
