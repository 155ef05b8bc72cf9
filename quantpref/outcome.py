"""What must hold once an adapter is trained, and before it gets its final name."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from config import Config
from quantpref.checkpoints import trained_weights
from quantpref.comparisons import Comparison
from quantpref.models import Base, attach, base_fingerprint, read_adapter
from quantpref.packed_llama import PackedLlama
from quantpref.runs import RunError
from quantpref.scoring import Scores, ScoringRows, score, scoring_rows

RELOADED_ROWS, RELOADED_COLUMNS = 8, 2048
RELOADED_NATS = {"cpu": 1e-4, "cuda": 0.05}  # the same kernels on a CPU; a GPU computes in bf16
FIRST_MOVED = 4  # the first step's learning rate is 0, and a fresh adapter's A has no gradient before B has moved


class Outcome:
    """Taken before training; afterwards it says whether training changed what it should, and nothing else."""

    def __init__(self, model: Any, base: Base) -> None:
        self.base = base
        self.trained = digests(trained_weights(model))
        self.frozen = digests(_frozen_lora(model))

    def check(self, model: Any, steps: int, folder: Path, rows: Sequence[Comparison], config: Config) -> float:
        """Unloads `model`, so that the base stands bare, and loads what was saved in `folder` the way users do.

        Returns by how many nats the reloaded adapter's margins differ at most from the trained one's.

        Raises:
            RunError: an adapter matrix stood still, the reference or the base moved, or the adapter read back from
                its folder is not the one that was trained.
        """
        now = digests(trained_weights(model))
        still = [name for name, digest in self.trained.items() if now[name] == digest]
        if still and steps >= FIRST_MOVED:
            raise RunError(f"{len(still)} of {len(now)} adapter matrices did not move in training (first: {still[0]})")
        if digests(_frozen_lora(model)) != self.frozen:
            raise RunError("the frozen reference moved in training; DPO's rewards mean nothing")
        slots = scoring_rows(self.base.tokenizer, rows[:RELOADED_ROWS], config.max_length, config.response)
        trained = _score(model, slots)
        model.unload()
        if base_fingerprint(self.base.model, self.base.tokenizer) != self.base.fingerprint:
            raise RunError("the base's weights moved in training; the adapter stands on another base than recorded")
        fresh = attach(self.base, {"default": read_adapter(folder)})
        reloaded = _score(fresh, slots)
        fresh.unload()
        worst = float(np.abs(trained.order_margins - reloaded.order_margins).max())
        if not worst <= RELOADED_NATS[self.base.model.device.type]:
            raise RunError(f"{folder}: read back, the adapter scores up to {worst:.3g} nats off what was trained")
        return worst


def _score(model: Any, rows: ScoringRows) -> Scores:
    llama = PackedLlama(model)
    llama.adapters.use("default")
    return score(llama, rows, columns_per_batch=RELOADED_COLUMNS)


def _frozen_lora(model: Any) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if "lora_" in name and not p.requires_grad}


def digests(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    return {
        name: hashlib.sha256(
            tensor.detach().contiguous().cpu().flatten().view(torch.uint8).numpy().tobytes()
        ).hexdigest()
        for name, tensor in tensors.items()
    }
