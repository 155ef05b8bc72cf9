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

PAD, A, B = 0, 5, 6
VOCABULARY = 11


class Model:
    """Logits of the last column: for each token of the row, its id times its place (from 1), in a sine per word."""

    device = torch.device("cpu")

    def __init__(self):
        self.calls, self.training = [], True

    def eval(self):
        self.training = False

    def __call__(self, *, input_ids, attention_mask, position_ids, use_cache, logits_to_keep):
        assert not self.training and use_cache is False and logits_to_keep == 1 and torch.is_inference_mode_enabled()
        assert (attention_mask[:, -1] == 1).all()  # the slot stands in the last column of every row
        self.calls.append(tuple(input_ids.shape))
        summary = (input_ids * (position_ids + 1) * attention_mask).sum(1, keepdim=True)
        assert ((attention_mask == 1) | (input_ids == PAD)).all()
        return SimpleNamespace(logits=logits_of(summary.double())[:, None])


def logits_of(summary):
    return torch.sin(summary * (1 + torch.arange(VOCABULARY)) / 7)


def by_hand(ids):
    summary = torch.tensor([[float(sum(token * (place + 1) for place, token in enumerate(ids)))]]).double()
    found = logits_of(summary)[0].float().tolist()
    total = math.log(sum(math.exp(x) for x in found))
    return found[A] - total, found[B] - total


IDS = [[3, 1], [4, 1, 5, 9], [2, 6], [5, 3, 5, 8, 9, 7], [9], [3, 2, 3, 8, 4, 6]]
ROWS = ScoringRows(IDS, prompts.AnswerSlot((), A, B), 0)


@pytest.mark.parametrize("tokens_per_batch", [1, 6, 7, 12, 13, 10_000])
def test_scores_are_those_of_each_row_alone(tokens_per_batch):
    model, seen = Model(), []
    found = score(model, PAD, ROWS, tokens_per_batch, seen.append)
    n = len(IDS) // 2
    for order in (0, 1):
        for i in range(n):
            expected = by_hand(IDS[order * n + i])
            assert (found.logp_a[i, order], found.logp_b[i, order]) == pytest.approx(expected, abs=1e-5)
    assert sum(seen) == len(IDS) and all(rows * columns <= max(tokens_per_batch, 6) for rows, columns in model.calls)
    assert len(model.calls) == len(seen)
    if tokens_per_batch == 10_000:
        assert model.calls == [(6, 6)]
    if tokens_per_batch == 12:
        assert model.calls == [(3, 2), (2, 6), (1, 6)]
    assert found.logp_a.flags["C_CONTIGUOUS"] and found.logp_a.dtype == np.float64


def test_a_probability_that_is_not_a_number_stops_it():
    class Broken(Model):
        def __call__(self, **inputs):
            answer = super().__call__(**inputs)
            answer.logits[0] = torch.nan
            return answer

    with pytest.raises(RunError, match="^the model gave a log-probability that is not finite"):
        score(Broken(), PAD, ROWS)


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
