"""scoring.py on a model whose answer can be computed by hand: batches, padding, orders and the two columns."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from quantpref import prompts
from quantpref.comparisons import flip
from quantpref.runs import RunError
from quantpref.scoring import ORDERS, Scores, ScoringRows, score, scoring_rows

A, B = 5, 6
VOCABULARY = 11


class Llama:
    """Answers for a packed model: a token's logits are a sine per word of all ids on its path, by their place."""

    on_gpu, device = False, torch.device("cpu")

    def __init__(self):
        self.columns = []

    def statistics(self, batch):
        self.columns.append(len(batch.ids))
        ids, end = batch.ids.tolist(), batch.end.tolist()
        paths = [[ids[k] for k in range(q + 1) if q < end[k]] for q in batch.columns.tolist()]
        found = torch.stack([logits_of(path) for path in paths]).log_softmax(-1)
        return SimpleNamespace(log_probs=found.gather(1, batch.tokens[:, None])[:, 0])


def logits_of(ids):
    summary = float(sum(token * (place + 1) for place, token in enumerate(ids)))
    return torch.sin(summary * (1 + torch.arange(VOCABULARY)) / 7)


def by_hand(ids):
    found = logits_of(ids).tolist()
    total = math.log(sum(math.exp(x) for x in found))
    return found[A] - total, found[B] - total


IDS = [[3, 1], [4, 1, 5, 9], [2, 6], [3, 1, 5, 8, 9, 7], [9], [3, 1, 5, 8, 4, 6]]
ROWS = ScoringRows(IDS, prompts.AnswerSlot((), A, B), 0)


@pytest.mark.parametrize(
    ("columns_per_batch", "columns"), [(1, [2, 2, 6, 6, 4, 1]), (8, [8, 6, 5]), (10, [10, 5]), (10_000, [15])]
)
def test_scores_are_those_of_each_row_alone(columns_per_batch, columns):
    """In sorted order: 2 tokens; 2, with 4 more, with 2 others after four in common; 4 and 1 that share nothing."""
    llama, seen = Llama(), []
    found = score(llama, ROWS, columns_per_batch, seen.append)
    n = len(IDS) // 2
    for order in (0, 1):
        for i in range(n):
            expected = by_hand(IDS[order * n + i])
            assert (found.logp_a[i, order], found.logp_b[i, order]) == pytest.approx(expected, abs=1e-5)
    assert llama.columns == columns and sum(seen) == len(IDS) and len(seen) == len(columns)
    assert found.logp_a.flags["C_CONTIGUOUS"] and found.logp_a.dtype == np.float64


def test_a_probability_that_is_not_a_number_stops_it():
    class Broken(Llama):
        def statistics(self, batch):
            answer = super().statistics(batch)
            answer.log_probs[0] = torch.nan
            return answer

    with pytest.raises(RunError, match="^the model gave a log-probability that is not finite"):
        score(Broken(), ROWS)


def test_what_follows_from_the_log_probabilities():
    assert ORDERS == ("preferred_first", "preferred_second")
    scores = Scores(np.log([[0.5, 0.1], [0.2, 0.3]]), np.log([[0.25, 0.4], [0.6, 0.3]]))
    expected = np.log([[2, 4], [1 / 3, 1]])
    assert scores.order_margins == pytest.approx(expected)
    assert scores.margins == pytest.approx(expected.mean(axis=1))
    assert scores.answer_mass == pytest.approx(np.array([[0.75, 0.5], [0.8, 0.6]]))


@pytest.mark.parametrize("form", ["reasoned", "verdict"])
def test_rows_end_where_the_answer_stands(tokenizer, comparisons, form):
    made = comparisons(4)
    rows = scoring_rows(tokenizer, made, 2048, form)
    assert len(rows.ids) == 8 and rows.shortened == 0
    assert tokenizer.decode([rows.slot.token_a]).strip().endswith("A")
    for half, first in enumerate((True, False)):
        for i, comparison in enumerate(made):
            shown = comparison if (comparison.label == "A") == first else flip(comparison)
            text = tokenizer.decode(rows.ids[4 * half + i], skip_special_tokens=True)
            whole = prompts.prompt(shown) + "The better recommendation is Option"
            assert text.replace(" ", "").rstrip() == whole.replace(" ", "")


def test_rows_that_are_too_long_are_shortened_and_counted(tokenizer, comparisons):
    made = comparisons(3)
    whole = scoring_rows(tokenizer, made, 2048, "verdict")
    longest = max(map(len, whole.ids))
    cut = scoring_rows(tokenizer, made, longest - 4, "verdict")
    assert 0 < cut.shortened <= 6 and max(map(len, cut.ids)) < longest
