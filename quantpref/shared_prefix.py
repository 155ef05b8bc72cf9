"""SFT and DPO by TRL's trainers, asked for the same numbers by way of prefix trees.

TRL's losses and metrics ask a model for per-token log-probabilities of padded rows: the chosen responses, then the
rejected ones. `Answer` gives them in the model's place, from one packed row in which whatever rows share is computed
once: a pair's prompt, the common start of its two responses, the instruction in front of all prompts.
"""

import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from trl import DPOTrainer, SFTTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

from quantpref import processes
from quantpref.checkpoints import Checkpoints
from quantpref.guards import Guards
from quantpref.kernels import TRITON
from quantpref.packed_llama import Learner, PackedLlama, TokenStatistics, TreeBatch
from quantpref.prefix_tree import pack
from quantpref.reference import read_reference, unknown, write_reference
from quantpref.runs import RunError

TREE = "tree_"  # what a batch's fields of the packed row begin with

# Graphs are replayed for shapes that come back, so a GPU sees few shapes.
COLUMNS_MULTIPLE, TOKENS_MULTIPLE = (128, 256) if torch.cuda.is_available() and TRITON else (1, 1)


def packed_fields(rows: Sequence[tuple[list[int], list[int]]], padding_id: int) -> dict[str, Any]:
    """Rows of (prompt, response) as the fields of a TreeBatch, and how many tokens are asked about.

    Each token of each response is asked about, row by row, at the column before it.
    """
    tree = pack([prompt + response for prompt, response in rows], COLUMNS_MULTIPLE, padding_id)
    columns = [c for (prompt, _), path in zip(rows, tree.paths, strict=True) for c in path[len(prompt) - 1 : -1]]
    tokens = [token for _, response in rows for token in response]
    padding = [0] * (-len(tokens) % TOKENS_MULTIPLE)
    fields = {"ids": tree.ids, "positions": tree.positions, "end": tree.end}
    fields |= {"columns": columns + padding, "tokens": tokens + padding}
    return {**{TREE + name: torch.tensor(values) for name, values in fields.items()}, "asked": len(tokens)}


class Answer:
    """Stands in for the model in TRL's losses: what it asks for, from packed rows."""

    def __init__(self, statistics: Callable[[TreeBatch], TokenStatistics]) -> None:
        self.statistics = statistics

    def __call__(self, *, labels: Tensor, asked: int, **batch: Any) -> SimpleNamespace:
        tree = TreeBatch(**{name.removeprefix(TREE): t for name, t in batch.items() if name.startswith(TREE)})
        found = TokenStatistics(*(values[:asked] for values in self.statistics(tree)))
        return scatter(found, labels[:, 1:] != -100)


def scatter(statistics: TokenStatistics, mask: Tensor) -> SimpleNamespace:
    """Put the N values back into the padded shape, zero elsewhere, as TRL's fused head does."""
    return SimpleNamespace(
        **{
            name: torch.zeros(mask.shape, dtype=values.dtype, device=mask.device).masked_scatter(mask, values)
            for name, values in statistics._asdict().items()
        },
        label_mask=mask,
        aux_loss=None,
    )


class PairCollator(DataCollatorForPreference):
    """TRL's two padded rows per pair, which its loss reads, the packed row, which the model reads, and row numbers."""

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        rows = [(e["prompt_ids"], e[side]) for side in ("chosen_ids", "rejected_ids") for e in examples]
        packed = packed_fields(rows, self.pad_token_id)
        return {**super().torch_call(examples), **packed, "row": [e["row"] for e in examples]}


class CompletionCollator:
    """SFT: prompts with their chosen responses, labels only on the responses, and the packed row."""

    def __init__(self, pad_token_id: int) -> None:
        self.pad_token_id = pad_token_id

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        rows = [(e["prompt_ids"], e["chosen_ids"]) for e in examples]
        ids = [torch.tensor(prompt + response) for prompt, response in rows]
        labels = [torch.tensor([-100] * len(prompt) + response) for prompt, response in rows]

        def padded(tensors: list[Tensor], value: int) -> Tensor:
            return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value)

        return {
            "input_ids": padded(ids, self.pad_token_id),
            "attention_mask": padded([torch.ones_like(row) for row in ids], 0),
            "labels": padded(labels, -100),
            **packed_fields(rows, self.pad_token_id),
        }


class PackedTraining(Guards, Checkpoints):
    """What SFT and DPO share: Trainer's loop drives a `Learner`, one flat parameter, in place of the whole model.

    Trainer walks over all modules and parameters several times a step; of a peft model on 8 billion weights that
    takes longer than a third of the step itself.
    """

    def create_optimizer(self: Any, model: Any = None) -> Any:
        """TRL's choice of optimiser and settings, on the flat adapter."""
        self.model.train()
        self.llama = PackedLlama(self.model, train="default")
        kind, settings = self.get_optimizer_cls_and_kwargs(self.args, self.model)
        group = {"params": [self.llama.adapters.flat], "weight_decay": self.args.weight_decay}
        self.optimizer = kind([group], **settings)
        return self.optimizer

    def _wrap_model(self: Any, model: Any, training: bool = True, dataloader: Any = None) -> Any:
        wrapped = self.accelerator.prepare_model(Learner(self.llama))
        self.llama.adapters.attach()  # DDP has moved the flat parameter
        return wrapped

    def floating_point_ops(self, inputs: Any) -> int:
        return 0  # Trainer would count 8 billion weights, every step

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: our manifest says what this folder is."""


class CompletionSFTTrainer(PackedTraining, SFTTrainer):
    """TRL's SFTTrainer on `CompletionCollator`'s rows."""

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        return super().compute_loss(Answer(model), inputs, *args, **kwargs)


class SharedPrefixDPOTrainer(PackedTraining, DPOTrainer):
    """TRL's DPOTrainer on `PairCollator`'s rows.

    The frozen reference scores each pair once, in the batch in which the policy first meets it, and the numbers are
    kept for later epochs. In a batch of the same shape the two run the same kernels, so that before the first step
    they agree to the last bit and the loss is ln 2.
    """

    reference_file: Path | None = None

    def __init__(self, **settings: Any) -> None:
        pairs = settings["train_dataset"]
        rows = pairs.add_column("row", list(range(len(pairs))))
        super().__init__(**{**settings, "train_dataset": rows})
        self.precompute_ref_logps = True  # TRL's loss then reads them from the batch
        self.reference = unknown(len(rows))

    def keep_reference(self, path: Path | None) -> None:
        """Take the reference's numbers from this file, or write them there once all are known."""
        self.reference_file = path
        kept = read_reference(path, len(self.reference)) if path else None
        if kept is not None:
            self.reference = kept

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return dataset  # prompts.tokenise has made and checked the ids

    def _compute_loss(self, model: Any, inputs: Any, return_outputs: bool) -> Any:
        loss = self.loss_of(Answer(model), inputs)
        if self.state.global_step == 0:
            self._check_first_loss(float(loss.detach()))
        return loss

    def loss_of(self, answer: Any, inputs: Any) -> Tensor:
        """TRL's loss of what stands in for the model, and its metrics on the way."""
        chosen, rejected = self._reference_of(inputs).unbind(1)
        inputs = {**inputs, "ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
        return super()._compute_loss(answer, inputs, return_outputs=False)

    def _reference_of(self, inputs: Any) -> Tensor:
        """(B, 2): the reference's log-probabilities of these pairs' chosen and rejected responses."""
        rows, device = torch.tensor(inputs["row"]), self.accelerator.device
        if self.reference[rows].isnan().any():
            labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
            # TRL has frozen a copy of the adapter that training starts from, and called it "ref".
            answer = Answer(functools.partial(self.llama.frozen, "ref"))(**{**inputs, "labels": labels})
            found = answer.log_probs.sum(1).view(2, -1).T.contiguous()
            everywhere, found = self.accelerator.gather((rows.to(device), found))
            self.reference[everywhere.cpu()] = found.cpu()
            if self.reference_file and processes.is_first() and not self.reference.isnan().any():
                write_reference(self.reference_file, self.reference)
        return self.reference[rows].to(device)

    def _check_first_loss(self, loss: float) -> None:
        """Before the first step the policy is the reference: margin 0, loss ln 2, or the reference is wrong."""
        if math.isfinite(loss) and not abs(loss - math.log(2)) <= 1e-3:  # else Guards stops it, with the numbers
            raise RunError(
                f"DPO's loss before the first step is {loss:.5f}, not ln 2 = {math.log(2):.5f}: the reference is not"
                " the adapter that training started from"
            )
