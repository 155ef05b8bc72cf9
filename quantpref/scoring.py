"""Scores: the answer slot's log-probabilities of A and B, in both orders, one forward a prompt and order."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from quantpref.comparisons import Comparison, with_preferred_first
from quantpref.prompts import AnswerSlot, ResponseForm, fit, tokenise
from quantpref.runs import RunError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ORDERS = ("preferred_first", "preferred_second")


@dataclass(frozen=True)
class Scores:
    """log p(A) and log p(B) in nats over the whole vocabulary, (n, 2): column 0 preferred first, 1 second."""

    logp_a: NDArray[np.float64]
    logp_b: NDArray[np.float64]

    @property
    def order_margins(self) -> NDArray[np.float64]:
        """(n, 2): log p(preferred) - log p(other) of each order."""
        return (self.logp_a - self.logp_b) * np.array([1.0, -1.0])

    @property
    def margins(self) -> NDArray[np.float64]:
        """(n,): the mean over both orders, in which position bias cancels."""
        return self.order_margins.mean(axis=1)

    @property
    def answer_mass(self) -> NDArray[np.float64]:
        """(n, 2): p(A) + p(B)."""
        return np.exp(self.logp_a) + np.exp(self.logp_b)


@dataclass(frozen=True)
class ScoringRows:
    """Token ids up to the answer slot, (2n rows: preferred first, then second), and the slot."""

    ids: list[list[int]]
    slot: AnswerSlot
    shortened: int


def scoring_rows(
    tokenizer: "PreTrainedTokenizerBase", comparisons: Sequence[Comparison], max_length: int, form: ResponseForm
) -> ScoringRows:
    both = [with_preferred_first(c, first) for first in (True, False) for c in comparisons]
    both, shortened = fit(tokenizer, both, max_length, form)
    pairs, slot = tokenise(tokenizer, both, form)
    return ScoringRows([[*p.prompt_ids, *slot.prefix_ids] for p in pairs], slot, shortened)


def score(
    model: Any, pad_token_id: int, rows: ScoringRows, tokens_per_batch: int = 16_384, progress: Any = None
) -> Scores:
    """Score `rows` with the model's active adapter. Results do not depend on how rows fall into batches.

    Raises:
        RunError: a log-probability that is not finite.
    """
    import torch

    model.eval()
    answers = torch.tensor([rows.slot.token_a, rows.slot.token_b])
    order = sorted(range(len(rows.ids)), key=lambda i: len(rows.ids[i]))
    found = np.empty((len(rows.ids), 2))
    start = 0
    while start < len(order):
        # The longest of the next rows is the last one, as they are sorted.
        end = start + 1
        while end < len(order) and len(rows.ids[order[end]]) * (end + 1 - start) <= tokens_per_batch:
            end += 1
        batch = order[start:end]
        found[batch] = _answer_log_probs(model, [rows.ids[i] for i in batch], pad_token_id, answers)
        if progress is not None:
            progress(len(batch))
        start = end
    if not np.isfinite(found).all():
        raise RunError("the model gave a log-probability that is not finite; the base or the adapter is broken")
    a, b = found.reshape(2, -1, 2).transpose(2, 1, 0)
    return Scores(np.ascontiguousarray(a), np.ascontiguousarray(b))


def _answer_log_probs(model: Any, ids: list[list[int]], pad: int, answers: Any) -> NDArray[np.float64]:
    """(rows, 2): log p of the two answers after each row; left padding puts every slot in the last column."""
    import torch

    longest = max(map(len, ids))
    padded = torch.tensor([[pad] * (longest - len(row)) + row for row in ids])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in ids])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    device = model.device
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        logits = model(
            input_ids=padded.to(device),
            attention_mask=mask.to(device),
            position_ids=positions.to(device),
            use_cache=False,
            logits_to_keep=1,
        ).logits
        return torch.log_softmax(logits[:, -1].float(), -1)[:, answers.to(device)].double().cpu().numpy()
