"""DPO on one row per pair: the tokens that chosen and rejected share are computed once.

    columns   [ pad | prompt + common start of both responses | rest of chosen | rest of rejected ]
    attends     -     causal                                    prefix + own     prefix + own

Positions restart for the rejected rest, and a mask keeps the two rests apart, so each response sees exactly
what it would see in a row of its own. TRL's DPOTrainer keeps all of its losses and metrics: it asks a model
for per-token log-probabilities, and `SharedPrefix` answers in the model's place.
"""

import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from trl import DPOTrainer, SFTTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

from quantpref.checkpoints import Checkpoints
from quantpref.guards import Guards
from quantpref.runs import RunError

PREFIX, CHOSEN, REJECTED = 1, 2, 3  # segments of a shared row; 0 is padding


def common_prefix_length(a: Sequence[int], b: Sequence[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


class SharedPrefixCollator(DataCollatorForPreference):
    """TRL's two padded rows per pair, which its loss reads, and the shared rows, which the model reads.

    Adds, for B pairs, T columns and two-row length L:
        shared_ids, shared_positions, shared_segments (B, T)
        column_of (2B, L-1): the shared column whose output predicts token t+1 of a two-row row; -1 where
            that token is no part of a response. Rows as TRL orders them: all chosen, then all rejected.
        logits_to_keep: how many of the last columns predict a token of a response.
        row (B,): the pairs' numbers in the training set.
    """

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = super().torch_call(examples)
        prompts = [e["prompt_ids"] for e in examples]
        shared = [common_prefix_length(e["chosen_ids"], e["rejected_ids"]) for e in examples]
        width = max(len(p) + s for p, s in zip(prompts, shared, strict=True))
        tails = [(e["chosen_ids"][s:], e["rejected_ids"][s:]) for e, s in zip(examples, shared, strict=True)]
        wide_chosen = max(len(c) for c, _ in tails)
        columns = width + wide_chosen + max(len(r) for _, r in tails)

        ids = torch.full((len(examples), columns), self.pad_token_id)
        positions, segments = torch.zeros_like(ids), torch.zeros_like(ids)
        column_of = torch.full((2 * len(examples), batch["input_ids"].size(1) - 1), -1)
        for row, (example, s) in enumerate(zip(examples, shared, strict=True)):
            prefix = prompts[row] + example["chosen_ids"][:s]
            start = width - len(prefix)
            parts = ((start, prefix, 0, PREFIX),) + tuple(
                (at, tail, len(prefix), segment)
                for at, tail, segment in zip((width, width + wide_chosen), tails[row], (CHOSEN, REJECTED), strict=True)
            )
            for at, tokens, position, segment in parts:
                ids[row, at : at + len(tokens)] = torch.tensor(tokens)
                positions[row, at : at + len(tokens)] = torch.arange(position, position + len(tokens))
                segments[row, at : at + len(tokens)] = segment
            for half, (at, tail) in enumerate(zip((width, width + wide_chosen), tails[row], strict=True)):
                # The tail's first token is predicted by the prefix's last column, the others by the one before.
                predictors = [*range(width - s - 1, width), *range(at, at + len(tail) - 1)]
                first = len(prompts[row]) - 1
                column_of[half * len(examples) + row, first : first + len(predictors)] = torch.tensor(predictors)
        return {
            **batch,
            "shared_ids": ids,
            "shared_positions": positions,
            "shared_segments": segments,
            "column_of": column_of,
            "row": torch.tensor([e["row"] for e in examples]),
            "logits_to_keep": columns - int(column_of[column_of >= 0].min()),
        }


def attention_mask(segments: Tensor, dtype: torch.dtype) -> Tensor:
    """Additive mask (B, 1, T, T) of shared rows: 0 where a token attends, the dtype's minimum elsewhere.

    A token sees earlier tokens of the prefix and of its own segment. Padding sees itself alone, so that no
    row of the softmax is empty.
    """
    columns = torch.arange(segments.size(1), device=segments.device)
    query, key = segments[:, :, None], segments[:, None, :]
    sees = ((key == PREFIX) | (key == query)) & (key > 0) & (columns[:, None] >= columns)
    sees = sees | torch.eye(len(columns), dtype=torch.bool, device=segments.device)
    return torch.zeros(sees.shape, dtype=dtype, device=sees.device).masked_fill_(~sees, torch.finfo(dtype).min)[:, None]


def token_statistics(logits: Tensor, rows: Tensor, columns: Tensor, tokens: Tensor) -> SimpleNamespace:
    """What TRL's losses and metrics ask about N tokens, from logits (B, K, V); all results (N,), float32.

    `log_probs` carries the gradient: the logit minus the logsumexp over the whole vocabulary.
    """
    logits = logits.float()
    normaliser = logits.logsumexp(-1)
    log_probs = logits[rows, columns, tokens] - normaliser[rows, columns]
    with torch.no_grad():
        probabilities = (logits - normaliser[..., None]).exp()
        entropy = normaliser - (probabilities * logits).sum(-1)
        return SimpleNamespace(
            log_probs=log_probs,
            entropy=entropy[rows, columns],
            mean_logits=logits.mean(-1)[rows, columns],
            is_top1=logits.argmax(-1)[rows, columns] == tokens,
        )


def scatter(statistics: SimpleNamespace, mask: Tensor) -> SimpleNamespace:
    """Put the N values back into the two-row shape, zero elsewhere, as TRL's fused head does."""
    return SimpleNamespace(
        **{
            name: torch.zeros(mask.shape, dtype=values.dtype, device=mask.device).masked_scatter(mask, values)
            for name, values in vars(statistics).items()
        },
        label_mask=mask,
        aux_loss=None,
    )


class SharedPrefix:
    """Stands in for the model in TRL's DPO loss: the same log-probabilities, from one row per pair."""

    def __init__(self, model: PreTrainedModel, dtype: torch.dtype) -> None:
        self.model, self.dtype = model, dtype

    def __call__(
        self,
        *,
        labels: Tensor,
        shared_ids: Tensor,
        shared_positions: Tensor,
        shared_segments: Tensor,
        column_of: Tensor,
        logits_to_keep: int,
        **_: Any,
    ) -> SimpleNamespace:
        mask = labels[:, 1:] != -100
        logits = self.model(
            input_ids=shared_ids,
            attention_mask=attention_mask(shared_segments, self.dtype),
            position_ids=shared_positions,
            use_cache=False,
            logits_to_keep=logits_to_keep,
        ).logits
        rows = mask.nonzero()[:, 0] % len(shared_ids)
        columns = column_of[mask] - (shared_ids.size(1) - logits_to_keep)
        found = token_statistics(logits, rows, columns, labels[:, 1:][mask])
        return scatter(found, mask)


class CompletionCollator:
    """SFT rows: prompts padded on the left, responses on the right, so that responses start together.

    input_ids, attention_mask, position_ids, labels (B, T); labels are -100 but on the response;
    logits_to_keep: how many of the last columns predict a token of a response.
    """

    def __init__(self, pad_token_id: int) -> None:
        self.pad_token_id = pad_token_id

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Tensor | int]:
        width = max(len(e["prompt_ids"]) for e in examples)
        columns = width + max(len(e["chosen_ids"]) for e in examples)
        ids = torch.full((len(examples), columns), self.pad_token_id)
        labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
        for row, example in enumerate(examples):
            prompt, chosen = example["prompt_ids"], example["chosen_ids"]
            start, end = width - len(prompt), width + len(chosen)
            ids[row, start:end] = torch.tensor(prompt + chosen)
            labels[row, width:end] = torch.tensor(chosen)
            mask[row, start:end] = 1
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        return {
            "input_ids": ids,
            "attention_mask": mask,
            "position_ids": positions,
            "labels": labels,
            "logits_to_keep": columns - width + 1,
        }


class CompletionOnly:
    """Stands in for the model in TRL's SFT loss: logits of the responses' columns alone."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    def __call__(
        self,
        *,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        labels: Tensor,
        logits_to_keep: int,
        **_: Any,
    ) -> SimpleNamespace:
        mask = labels[:, 1:] != -100
        rows, columns = mask.nonzero(as_tuple=True)
        logits = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=False,
            logits_to_keep=logits_to_keep,
        ).logits
        columns = columns - (input_ids.size(1) - logits_to_keep)
        found = token_statistics(logits, rows, columns, labels[:, 1:][mask])
        return scatter(found, mask)


class CompletionSFTTrainer(Guards, Checkpoints, SFTTrainer):
    """TRL's SFTTrainer on `CompletionCollator`'s rows; its Triton loss kernel does not run on a CPU."""

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        return super().compute_loss(CompletionOnly(model), inputs, *args, **kwargs)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: our manifest says what this folder is."""


class SharedPrefixDPOTrainer(Guards, Checkpoints, DPOTrainer):
    """TRL's DPOTrainer, asked for the same numbers by way of shared rows.

    The frozen reference scores each pair once, in the batch in which the policy first meets it, and the
    numbers are kept for later epochs. In a batch of the same shape the two run the same kernels, so that
    before the first step they agree to the last bit and the loss is ln 2.
    """

    stand_in = SharedPrefix  # what answers in the model's place; a benchmark puts two plain rows here

    def __init__(self, **settings: Any) -> None:
        pairs = settings["train_dataset"]
        rows = pairs.add_column("row", list(range(len(pairs))))
        super().__init__(**{**settings, "train_dataset": rows})
        self.precompute_ref_logps = True  # TRL's loss then reads them from the batch
        self.reference = torch.full((len(rows), 2), torch.nan, device=self.accelerator.device)

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return dataset  # prompts.tokenise has made and checked the ids

    def _compute_loss(self, model: Any, inputs: Any, return_outputs: bool) -> Any:
        rows = inputs["row"]
        if self.reference[rows].isnan().any():
            self.reference[rows] = torch.stack(self.compute_ref_log_probs(model, inputs), dim=1)
        chosen, rejected = self.reference[rows].unbind(1)
        inputs = {**inputs, "ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
        loss = super()._compute_loss(self.stand_in(model, self.dtype), inputs, return_outputs)
        if self.state.global_step == 0:
            self._check_first_loss(float(loss.detach()))
        return loss

    def compute_ref_log_probs(self, model: Any, inputs: Any) -> Any:
        return super().compute_ref_log_probs(self.stand_in(model, self.dtype), inputs)

    @property
    def dtype(self) -> torch.dtype:
        return self.accelerator.unwrap_model(self.model).dtype

    def _check_first_loss(self, loss: float) -> None:
        """Before the first step the policy is the reference: margin 0, loss ln 2, or the reference is wrong."""
        if math.isfinite(loss) and not abs(loss - math.log(2)) <= 1e-3:  # else Guards stops it, with the numbers
            raise RunError(
                f"DPO's loss before the first step is {loss:.5f}, not ln 2 = {math.log(2):.5f}: the reference is not"
                " the adapter that training started from"
            )

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: our manifest says what this folder is."""
