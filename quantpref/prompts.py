"""The prompt, the chosen and the rejected response, and the answer slot: text and tokens stand here once.

prompt    ### Instruction: ... ### Input: History: ... Option A: ... Option B: ... ### Response:
response  The better recommendation is Option A. Reasoning: ... <end of text>
                                              ^ the answer slot: where the two responses part
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from quantpref.comparisons import Comparison, Label
from quantpref.runs import UserError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

ResponseForm = Literal["reasoned", "verdict"]

PROMPT = "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
VERDICT = "The better recommendation is Option {label}."
REASONING = (
    " Reasoning: The user has shown a strong preference for themes found in {genres}. Option {other_label}"
    " ({other_genres}) does not align with their recent viewing patterns."
)


def input_text(comparison: Comparison) -> str:
    history = ", ".join(map(str, comparison.history))
    a, b = comparison.option_a, comparison.option_b
    return f"History: {history}. Option A: {a} ({a.genre_text}). Option B: {b} ({b.genre_text})."


def prompt(comparison: Comparison) -> str:
    return PROMPT.format(instruction=comparison.instruction, input=input_text(comparison))


def response(comparison: Comparison, label: Label, form: ResponseForm = "reasoned") -> str:
    """The answer that prefers option `label`, with the genres of the two films where they belong.

    `response(c, c.label)` is the chosen text; with the other label it is the rejected one, the answer
    that would be right had the user preferred the other film.
    """
    a, b = comparison.option_a, comparison.option_b
    recommended, other, other_label = (a, b, "B") if label == "A" else (b, a, "A")
    text = VERDICT.format(label=label)
    if form == "reasoned":
        text += REASONING.format(genres=recommended.genre_text, other_label=other_label, other_genres=other.genre_text)
    return text


def chosen(comparison: Comparison, form: ResponseForm = "reasoned") -> str:
    return response(comparison, comparison.label, form)


def rejected(comparison: Comparison, form: ResponseForm = "reasoned") -> str:
    return response(comparison, "B" if comparison.label == "A" else "A", form)


@dataclass(frozen=True, slots=True)
class AnswerSlot:
    """Where the answer stands in the tokenised response, and the two tokens that can stand there."""

    prefix_ids: tuple[int, ...]  # the response's tokens before the slot, equal for both answers
    token_a: int
    token_b: int


@dataclass(frozen=True, slots=True)
class TokenisedPair:
    """One comparison's token ids: `prompt_ids` + `chosen_ids` and `prompt_ids` + `rejected_ids`."""

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]


def _encode(tokenizer: "PreTrainedTokenizerBase", texts: list[str]) -> list[list[int]]:
    return tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []


def tokenise(
    tokenizer: "PreTrainedTokenizerBase",
    comparisons: Sequence[Comparison],
    form: ResponseForm = "reasoned",
) -> tuple[list[TokenisedPair], AnswerSlot]:
    """Tokenise each comparison with both answers and find the answer slot.

    Exactly one begin-of-text token stands before the prompt (where the tokenizer has one), exactly one
    end-of-text token after each response.

    Raises:
        UserError: no end-of-text token; a special token inside the text; a prompt whose tokens are not
            a prefix of prompt + response; answers that do not differ, or not in the same two tokens on
            every line. Training on such rows would teach or measure something else.
    """
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no end-of-text token; set eos_token in tokenizer_config.json")
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    prompts = [prompt(c) for c in comparisons]
    chosen_texts = [p + chosen(c, form) for p, c in zip(prompts, comparisons, strict=True)]
    rejected_texts = [p + rejected(c, form) for p, c in zip(prompts, comparisons, strict=True)]
    ids = zip(
        comparisons,
        _encode(tokenizer, prompts),
        _encode(tokenizer, chosen_texts),
        _encode(tokenizer, rejected_texts),
        strict=True,
    )
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    special = {tokenizer.eos_token_id, *bos, *special} - {tokenizer.unk_token_id}
    pairs, slot = [], None
    for comparison, prompt_ids, chosen_ids, rejected_ids in ids:
        where = _where(comparison)
        n = len(prompt_ids)
        if chosen_ids[:n] != prompt_ids or rejected_ids[:n] != prompt_ids:
            raise UserError(
                f"{where}: the prompt's tokens are not a prefix of prompt + response with this tokenizer; the model"
                " would be trained on one text and scored on another. Use the base model's own tokenizer"
            )
        if inside := special & {*chosen_ids, *rejected_ids}:
            names = ", ".join(map(str, tokenizer.convert_ids_to_tokens(sorted(inside))))
            raise UserError(f"{where}: the text holds {names}, a control token of this tokenizer; remove it")
        pair = TokenisedPair(
            bos + prompt_ids,
            [*chosen_ids[n:], tokenizer.eos_token_id],
            [*rejected_ids[n:], tokenizer.eos_token_id],
        )
        found = answer_slot(pair, comparison.label)
        if slot is not None and found != slot:
            raise UserError(f"{where}: the answer stands at another token here than on the lines before")
        slot = found
        pairs.append(pair)
    if slot is None:
        raise UserError("no comparisons to tokenise")
    return pairs, slot


def _where(comparison: Comparison) -> str:
    return f"line {comparison.line}" if comparison.line else str(comparison.option_a)


def answer_slot(pair: TokenisedPair, label: Label) -> AnswerSlot:
    """The first place where chosen and rejected part, found by comparing them, for any tokenizer.

    An answer of several tokens is told apart by the first one that differs; equal responses have none.
    """
    for position, (c, r) in enumerate(zip(pair.chosen_ids, pair.rejected_ids, strict=False)):
        if c != r:
            a, b = (c, r) if label == "A" else (r, c)
            return AnswerSlot(tuple(pair.chosen_ids[:position]), a, b)
    raise UserError("chosen and rejected responses are the same tokens; there is nothing to prefer")


def fit(
    tokenizer: "PreTrainedTokenizerBase",
    comparisons: Sequence[Comparison],
    max_length: int,
    form: ResponseForm = "reasoned",
) -> tuple[list[Comparison], int]:
    """Shorten rows of more than `max_length` tokens by their oldest history films, never in silence.

    Returns the comparisons and the number of them that were shortened.
    """
    shortened = 0
    result = list(comparisons)
    todo = list(range(len(result)))
    while todo:
        pairs, _ = tokenise(tokenizer, [result[i] for i in todo], form)
        lengths = [len(p.prompt_ids) + max(len(p.chosen_ids), len(p.rejected_ids)) for p in pairs]
        todo = [i for i, length in zip(todo, lengths, strict=True) if length > max_length]
        for i in todo:
            if len(result[i].history) == 1:
                raise UserError(
                    f"{_where(result[i])}: longer than {max_length} tokens even with one history film;"
                    " raise --max-length"
                )
            shortened += len(result[i].history) == len(comparisons[i].history)
            result[i] = replace(result[i], history=result[i].history[1:])
    return result, shortened


def pairs_dataset(pairs: Sequence[TokenisedPair]) -> "Dataset":
    """The pairs as TRL names them after tokenising: `prompt_ids`, `chosen_ids`, `rejected_ids`."""
    from datasets import Dataset

    return Dataset.from_dict(
        {
            "prompt_ids": [p.prompt_ids for p in pairs],
            "chosen_ids": [p.chosen_ids for p in pairs],
            "rejected_ids": [p.rejected_ids for p in pairs],
        }
    )
