"""Checkpoints in safetensors and JSON: complete, or not there at all; nothing in them can run code.

    dpo_checkpoints/checkpoint-200/
        tensors.safetensors    adapter, optimiser state, random generators, cached reference log-probabilities
        state.json             everything else of these, with the places of the tensors
        trainer_state.json     transformers' own: step, epoch, every logged row
        manifest.json          what the run is made from, and the SHA-256 of the three; written last

transformers' own checkpoints hold the optimiser and the generators as pickles, and are not written atomically.
"""

import random
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.trainer import TRAINER_STATE_NAME

from quantpref.resume import KEPT, numbered
from quantpref.runs import atomic_folder, read_json, write_json, write_manifest

TENSORS, STATE = "tensors.safetensors", "state.json"


class Checkpoints:
    """Mixed into a transformers Trainer, before it: saves and resumes in this format instead of its own."""

    made_with: dict[str, Any]  # what the manifest records; a run made with anything else does not resume
    started: float = 0.0  # when training began on time.monotonic's clock, moved back by earlier sessions
    reference: Any = None  # tensor (pairs, 2), DPO's cached reference log-probabilities; NaN where not yet known

    def _save_checkpoint(self: Any, model: Any, trial: Any) -> None:
        state = self._state()  # every process takes part
        if self.accelerator.is_main_process:
            folder = Path(self.args.output_dir)
            with atomic_folder(folder / f"checkpoint-{self.state.global_step}") as temporary:
                plain, tensors = split(state)
                save_file(tensors, temporary / TENSORS)
                write_json(temporary / STATE, plain)
                self.state.save_to_json(str(temporary / TRAINER_STATE_NAME))
                write_manifest(temporary, self.made_with)
            for path in numbered(folder)[KEPT:]:
                shutil.rmtree(path)
        self.accelerator.wait_for_everyone()

    def _state(self: Any) -> dict[str, Any]:
        return {
            "weights": trained_weights(self.model),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.lr_scheduler.state_dict(),
            "generators": generators(),
            "reference": self.reference,
            "tokens_seen": self._total_train_tokens,
            "seconds": time.monotonic() - self.started,
        }

    def _load_from_checkpoint(self: Any, resume_from_checkpoint: str, model: Any = None) -> None:
        folder = Path(resume_from_checkpoint)
        self._saved = join(read_json(folder / STATE), load_file(folder / TENSORS))
        weights = trained_weights(self.model)
        with torch.no_grad():
            for name, value in self._saved.pop("weights").items():
                weights.pop(name).copy_(value)
        if weights:
            raise RuntimeError(f"{folder}: holds no {next(iter(weights))}")
        if self.reference is not None:
            self.reference.copy_(self._saved.pop("reference"))
        self._total_train_tokens = self._saved["tokens_seen"]
        self.started -= self._saved["seconds"]

    def _load_optimizer_and_scheduler(self: Any, checkpoint: str | None) -> None:
        if checkpoint is not None:
            self.optimizer.load_state_dict(self._saved.pop("optimizer"))
            self.lr_scheduler.load_state_dict(self._saved.pop("scheduler"))

    def _load_rng_state(self: Any, checkpoint: str | None) -> None:
        if checkpoint is not None:
            set_generators(self._saved["generators"])


def trained_weights(model: Any) -> dict[str, Tensor]:
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


def generators() -> dict[str, Any]:
    """The state of every random generator that training may draw from."""
    numpy_state: dict[str, Any] = np.random.get_state(legacy=False)
    key = torch.from_numpy(numpy_state["state"]["key"].astype(np.int64))
    return {
        "python": random.getstate(),
        "numpy": {**numpy_state, "state": {**numpy_state["state"], "key": key}},
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def set_generators(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    numpy_state = state["numpy"]
    key = numpy_state["state"]["key"].numpy().astype(np.uint32)
    np.random.set_state({**numpy_state, "state": {**numpy_state["state"], "key": key}})
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"])


def split(value: Any) -> tuple[Any, dict[str, Tensor]]:
    """Any tree of dicts, lists, tuples, tensors and plain values as JSON, and its tensors by number.

    Dicts become lists of pairs, since JSON would turn an optimiser's integer keys into text.
    """
    tensors: dict[str, Tensor] = {}

    def plain(part: Any) -> Any:
        if isinstance(part, Tensor):
            name = str(len(tensors))
            tensors[name] = part.detach().cpu().clone(memory_format=torch.contiguous_format)  # none share memory then
            return {"tensor": name}
        if isinstance(part, dict):
            return {"dict": [[key, plain(item)] for key, item in part.items()]}
        if isinstance(part, tuple | list):
            return {type(part).__name__: [plain(item) for item in part]}
        if part is None or type(part) in (bool, int, float, str):
            return part
        raise TypeError(f"a checkpoint cannot hold {type(part)}")

    return plain(value), tensors


def join(plain: Any, tensors: dict[str, Tensor]) -> Any:
    """The tree that `split` took apart."""
    if not isinstance(plain, dict):
        return plain
    [(kind, content)] = plain.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: join(item, tensors) for key, item in content}
    items = [join(item, tensors) for item in content]
    return tuple(items) if kind == "tuple" else items
