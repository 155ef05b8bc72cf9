"""Scores: the answer slot's log-probabilities of A and B, in both orders, one forward a prompt and order."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from quantpref import processes
from quantpref.comparisons import Comparison, with_preferred_first
from quantpref.prefix_tree import common_prefix_length, pack
from quantpref.prompts import AnswerSlot, ResponseForm, fit, tokenise
from quantpref.runs import RunError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from quantpref.packed_llama import PackedLlama

GPU_COLUMNS, CPU_COLUMNS = 8192, 1024  # of a batch: enough to keep the device busy, little enough to fit anywhere
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
    llama: "PackedLlama", rows: ScoringRows, columns_per_batch: int | None = None, progress: Any = None
) -> Scores:
    """Score `rows` with the adapter that `llama` has in use. Results do not depend on how rows fall into batches.

    In sorted order, prompts that begin alike stand together: both orders of one comparison share its history, and
    all of them the instruction. Of several processes each scores every n-th batch, and all return all scores.

    Raises:
        RunError: a log-probability that is not finite.
    """
    limit = columns_per_batch or (GPU_COLUMNS if llama.on_gpu else CPU_COLUMNS)
    batches = list(_batches(rows.ids, limit))
    mine = batches[processes.rank() :: processes.count()]
    found = []
    for batch in mine:
        found.append(_answer_log_probs(llama, [rows.ids[i] for i in batch], rows.slot, limit))
        if progress is not None:
            progress(len(batch))
    table = np.empty((len(rows.ids), 2))
    for their_batches, their_scores in processes.gather((mine, found)):
        for batch, scores in zip(their_batches, their_scores, strict=True):
            table[batch] = scores
    if not np.isfinite(table).all():
        raise RunError("the model gave a log-probability that is not finite; the base or the adapter is broken")
    a, b = table.reshape(2, -1, 2).transpose(2, 1, 0)
    return Scores(np.ascontiguousarray(a), np.ascontiguousarray(b))


def _batches(ids: list[list[int]], limit: int) -> Iterator[list[int]]:
    """Row numbers in sorted order, cut where a batch's prefix tree would exceed `limit` columns."""
    batch: list[int] = []
    before: list[int] = []
    columns = 0
    for i in sorted(range(len(ids)), key=ids.__getitem__):
        new = len(ids[i]) - (common_prefix_length(before, ids[i]) if batch else 0)
        if batch and columns + new > limit:
            yield batch
            batch, columns, new = [], 0, len(ids[i])
        batch.append(i)
        columns, before = columns + new, ids[i]
    if batch:
        yield batch


def _answer_log_probs(
    llama: "PackedLlama", prompts: list[list[int]], slot: AnswerSlot, limit: int
) -> NDArray[np.float64]:
    """(rows, 2): log p of the two answers after each prompt."""
    import torch

    from quantpref.packed_llama import TreeBatch

    # On a GPU every batch is padded to one length, for which its attention is compiled once.
    tree = pack(prompts, multiple=limit if llama.on_gpu else 1)
    last = torch.tensor([path[-1] for path in tree.paths])
    answers = torch.tensor([slot.token_a, slot.token_b]).repeat(len(prompts))
    ids, positions, end = (torch.tensor(values) for values in (tree.ids, tree.positions, tree.end))
    batch = TreeBatch(ids, positions, end, last.repeat_interleave(2), answers)
    return llama.statistics(batch.to(llama.device)).log_probs.double().cpu().numpy().reshape(-1, 2)
