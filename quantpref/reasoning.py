"""The reasoning check: what the adapters write when they are let, against what they score."""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from quantpref.comparisons import Comparison
from quantpref.prompts import REASONING, VERDICT, ResponseForm, tokenise
from quantpref.scoring import Scores

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHECKED = 100  # comparisons, from the start of the test


def generate(
    model: Any, tokenizer: "PreTrainedTokenizerBase", comparisons: Sequence[Comparison], form: ResponseForm
) -> list[str]:
    """Greedy responses of the active adapter, the options in the file's order; batched, with a KV cache."""
    import torch

    pairs, _ = tokenise(tokenizer, comparisons, form)
    longest = max(len(p.prompt_ids) for p in pairs)
    # No right answer is longer than these two, and some more in case the model rambles.
    room = max(max(len(p.chosen_ids), len(p.rejected_ids)) for p in pairs) + 16
    pad = tokenizer.pad_token_id
    ids = torch.tensor([[pad] * (longest - len(p.prompt_ids)) + p.prompt_ids for p in pairs])
    mask = torch.tensor([[0] * (longest - len(p.prompt_ids)) + [1] * len(p.prompt_ids) for p in pairs])
    with torch.inference_mode(), torch.autocast(model.device.type, torch.bfloat16, enabled=model.device.type == "cuda"):
        found = model.generate(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            max_new_tokens=room,
            do_sample=False,
            pad_token_id=pad,
            eos_token_id=tokenizer.eos_token_id,
        )
    return tokenizer.batch_decode(found[:, longest:], skip_special_tokens=True)


def pattern(form: ResponseForm) -> re.Pattern[str]:
    """The response's form, from the text that prompts.py holds."""
    text = VERDICT + (REASONING if form == "reasoned" else "")
    groups = {"label": "(?P<label>[AB])", "genres": "(?P<genres>.+)", "other_label": "[AB]", "other_genres": ".+"}
    marked = re.escape(text.format(**{name: f"<{name}>" for name in groups}))
    for name, group in groups.items():
        marked = marked.replace(re.escape(f"<{name}>"), group)
    return re.compile(marked)


def reasoning_check(
    texts: Sequence[str], comparisons: Sequence[Comparison], scores: Scores, form: ResponseForm
) -> dict[str, Any]:
    """Shares of the texts that keep the form, agree with the scored choice, and name its film's genres exactly.

    `scores` are the comparisons' own; the choice is the larger log-probability in the order that was shown.
    A text out of form counts against all three. Without reasoning there are no genres to name: None.
    """
    keeps, agrees, exact = 0, 0, 0
    for i, (text, comparison) in enumerate(zip(texts, comparisons, strict=True)):
        found = pattern(form).fullmatch(text.strip())
        if found is None:
            continue
        keeps += 1
        column = 0 if comparison.label == "A" else 1  # preferred first, or second
        agrees += found["label"] == ("A" if scores.logp_a[i, column] > scores.logp_b[i, column] else "B")
        movie = comparison.option_a if found["label"] == "A" else comparison.option_b
        exact += form == "reasoned" and found["genres"] == movie.genre_text
    n = len(texts)
    return {"n": n, "form": keeps / n, "agrees": agrees / n, "exact_genres": exact / n if form == "reasoned" else None}
