"""prompts.py: exact tokens, the answer slot for any tokenizer, and rows that are too long."""

import re
from dataclasses import replace
from pathlib import Path
from statistics import mean

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from quantpref.comparisons import Comparison, Movie, flip, load
from quantpref.prompts import (
    AnswerSlot,
    TokenisedPair,
    chosen,
    fit,
    input_text,
    pairs_dataset,
    prompt,
    rejected,
    response,
    tokenise,
)
from quantpref.runs import UserError

ROOT = Path(__file__).resolve().parent.parent
LLAMA3 = ROOT / ".carry" / "llama3-tokenizer"
EMBEDDED = ROOT / "data" / "contrastive_rec_train.jsonl"
BOS, EOS = "<|begin_of_text|>", "<|end_of_text|>"

ONE = Comparison(
    (Movie("The Matrix", 1999), Movie("10,000 BC", 2008)),
    Movie("Fargo", 1996, ("Crime", "Drama")),
    Movie("Jaws", 1975, ("Action",)),
    "B",
    line=1,
)
AWKWARD = Comparison(
    (Movie("Option A: The Movie", 1999), Movie("Good Night, and Good Luck.", 2005)),
    Movie("Se7en (a.k.a. Seven)", 1995, ("Crime", "Thriller")),
    Movie("Option A: The Recommendation is Option B.", 1982, ("Children's", "Sci-Fi")),
    "A",
    line=2,
)

PROMPT_TOKENS = [
    BOS, "###", "ĠInstruction", ":", "Ċ", "Given", "Ġthe", "Ġuser", "'s", "Ġviewing", "Ġhistory", ",", "Ġdecide",
    "Ġwhich", "Ġof", "Ġthe", "Ġtwo", "Ġmovies", "Ġthe", "Ġuser", "Ġwould", "Ġprefer", ".", "Ċ", "Ċ", "###",
    "ĠInput", ":", "Ċ", "History", ":", " The Matrix (1999)", ",", "Ġ1", "0", ",", "00", "0", "ĠB", "C", "Ġ(",
    "2008", ").", "ĠOption", "ĠA", ":", " Fargo (1996)", "Ġ(", "Crime", "|", "Drama", ").", "ĠOption", "ĠB", ":",
    " Jaws (1975)", "Ġ(", "Action", ").", "Ċ", "Ċ", "###", "ĠResponse", ":", "Ċ",
]  # fmt: skip
# Of the committed tokenizer: a base that is made anew may number its tokens in another way.
PROMPT_IDS = [
    0, 302, 399, 28, 201, 424, 274, 311, 339, 349, 449, 14, 459, 464, 298, 274, 434, 454, 274, 311, 443, 351, 16,
    201, 201, 302, 397, 28, 201, 369, 28, 1395, 14, 667, 18, 14, 881, 18, 277, 37, 259, 576, 276, 271, 273, 28,
    1360, 259, 474, 94, 328, 276, 271, 277, 28, 1191, 259, 490, 276, 201, 201, 302, 400, 28, 201,
]  # fmt: skip
CHOSEN_IDS = [
    373, 457, 466, 393, 271, 277, 16, 456, 28, 284, 311, 448, 461, 358, 460, 452, 388, 436, 446, 375, 223, 490, 16,
    271, 273, 259, 474, 94, 328, 11, 462, 432, 463, 403, 435, 450, 349, 465, 16, 1,
]  # fmt: skip
REJECTED_IDS = [
    373, 457, 466, 393, 271, 273, 16, 456, 28, 284, 311, 448, 461, 358, 460, 452, 388, 436, 446, 375, 223, 474, 94,
    328, 16, 271, 277, 259, 490, 11, 462, 432, 463, 403, 435, 450, 349, 465, 16, 1,
]  # fmt: skip


# The texts


def test_the_texts_word_for_word():
    assert prompt(ONE) == (
        "### Instruction:\nGiven the user's viewing history, decide which of the two movies the user would prefer.\n\n"
        "### Input:\nHistory: The Matrix (1999), 10,000 BC (2008). Option A: Fargo (1996) (Crime|Drama). Option B: Jaws"
        " (1975) (Action).\n\n### Response:\n"
    )
    assert chosen(ONE) == (
        "The better recommendation is Option B. Reasoning: The user has shown a strong preference for themes found in"
        " Action. Option A (Crime|Drama) does not align with their recent viewing patterns."
    )
    assert rejected(ONE) == (
        "The better recommendation is Option A. Reasoning: The user has shown a strong preference for themes found in"
        " Crime|Drama. Option B (Action) does not align with their recent viewing patterns."
    )
    assert chosen(ONE, "verdict") == "The better recommendation is Option B."
    assert rejected(ONE, "verdict") == "The better recommendation is Option A."


def test_braces_in_the_texts_are_only_text():
    odd = replace(ONE, instruction="{input} {0}", history=(Movie("{instruction}", 1990),))
    assert prompt(odd).startswith(
        "### Instruction:\n{input} {0}\n\n### Input:\nHistory: {instruction} (1990). Option A"
    )


@pytest.mark.parametrize("c", [ONE, AWKWARD, flip(ONE), flip(AWKWARD)], ids=lambda c: f"line {c.line} {c.label}")
def test_rejected_exchanges_labels_and_genres(c):
    """Never the same label at the verdict, whatever the titles say: the trap of chained replacement."""
    verdict = len("The better recommendation is Option ")
    assert {chosen(c)[verdict], rejected(c)[verdict]} == {"A", "B"}
    assert chosen(c)[verdict] == c.label
    exchange = {"A": "B", "B": "A"}
    for text, recommended, other in ((chosen(c), c.preferred, c.other), (rejected(c), c.other, c.preferred)):
        label = text[verdict]
        assert f"themes found in {recommended.genre_text}. Option {exchange[label]} ({other.genre_text}) does" in text
        assert text.count("Option A") == text.count("Option B") == 1
    # The rejected answer is what would be right had the user preferred the other film.
    assert rejected(c) == chosen(replace(c, label=exchange[c.label]))
    # Flipping the comparison exchanges the labels, and the genres stay with their films.
    parts = [re.split("(?<=Option )[AB]", text) for text in (chosen(c), rejected(c))]
    assert [re.split("(?<=Option )[AB]", text) for text in (chosen(flip(c)), rejected(flip(c)))] == parts
    assert [chosen(flip(c))[verdict], rejected(flip(c))[verdict]] == [exchange[c.label], c.label]


def test_a_film_without_genres():
    c = replace(ONE, option_b=Movie("Jaws", 1975))
    assert "(no genres listed)" in input_text(c) and "found in no genres listed." in response(c, "B")


# Tokens


def test_exact_token_ids(tokenizer):
    (pair,), slot = tokenise(tokenizer, [ONE])
    assert tokenizer.convert_ids_to_tokens(pair.prompt_ids) == PROMPT_TOKENS
    assert pair == TokenisedPair(PROMPT_IDS, CHOSEN_IDS, REJECTED_IDS)
    assert slot == AnswerSlot((373, 457, 466, 393, 271), 273, 277)
    assert tokenizer.convert_ids_to_tokens([273, 277]) == ["ĠA", "ĠB"]
    (verdict,), same_slot = tokenise(tokenizer, [ONE], "verdict")
    assert verdict == TokenisedPair(PROMPT_IDS, [*CHOSEN_IDS[:7], 1], [*REJECTED_IDS[:7], 1])
    assert same_slot == slot


def check_pairs(tokenizer, rows, form="reasoned"):
    """What must hold for any tokenizer: prefixes, one BOS and EOS, texts, and where the answers part."""
    pairs, slot = tokenise(tokenizer, rows, form)
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    assert slot.token_a != slot.token_b
    for c, pair in zip(rows, pairs, strict=True):
        for ids, text in ((pair.chosen_ids, chosen(c, form)), (pair.rejected_ids, rejected(c, form))):
            whole = tokenizer(prompt(c) + text, add_special_tokens=False)["input_ids"]
            assert [*pair.prompt_ids, *ids] == [*bos, *whole, tokenizer.eos_token_id]
            assert ids.count(tokenizer.eos_token_id) == 1
        assert pair.prompt_ids[: len(bos)] == bos and not {*bos, tokenizer.eos_token_id} & {
            *pair.prompt_ids[len(bos) :]
        }
        n, (preferred, other) = len(slot.prefix_ids), (slot.token_a, slot.token_b)[:: 1 if c.label == "A" else -1]
        assert pair.chosen_ids[:n] == pair.rejected_ids[:n] == [*slot.prefix_ids]
        assert (pair.chosen_ids[n], pair.rejected_ids[n]) == (preferred, other)
    return slot


@pytest.mark.parametrize("form", ["reasoned", "verdict"])
def test_pairs_of_the_embedded_tokenizer(tokenizer, form):
    rows = load(EMBEDDED)[:200]
    slot = check_pairs(tokenizer, [ONE, AWKWARD, flip(ONE), flip(AWKWARD), *rows], form)
    assert tokenizer.decode([*slot.prefix_ids]) == "The better recommendation is Option"


# Other tokenizers, made here

TEXTS = [part for c in (ONE, AWKWARD) for part in (prompt(c), chosen(c), rejected(c))]
ALPHABET = sorted({character for text in TEXTS for character in text} | set("0123456789?"))
ROWS = [ONE, AWKWARD, flip(ONE), flip(AWKWARD)]


def wrapped(tokenizer: Tokenizer, bos: str | None = "<s>", eos: str | None = "</s>") -> PreTrainedTokenizerFast:
    tokenizer.add_special_tokens([token for token in (bos, eos) if token])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos)


def character_level() -> Tokenizer:
    made = Tokenizer(models.WordLevel({character: i for i, character in enumerate(ALPHABET)}, unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    made.decoder = decoders.Fuse()
    return made


def byte_level_bpe(vocabulary_tokens: int) -> Tokenizer:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_tokens,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(TEXTS, trainer)
    return made


def test_a_character_level_tokenizer():
    tokenizer = wrapped(character_level())
    slot = check_pairs(tokenizer, ROWS)
    assert tokenizer.convert_ids_to_tokens([*slot.prefix_ids]) == list("The better recommendation is Option ")
    assert tokenizer.convert_ids_to_tokens([slot.token_a, slot.token_b]) == ["A", "B"]


@pytest.mark.parametrize("vocabulary_tokens", [256, 300, 600])
def test_byte_level_bpe_without_added_tokens(vocabulary_tokens):
    tokenizer = wrapped(byte_level_bpe(vocabulary_tokens))
    odd = replace(ONE, history=(Movie("Amélie", 2001), Movie("七人の侍", 1954)))
    slot = check_pairs(tokenizer, [*ROWS, odd])
    answers = tokenizer.batch_decode([[slot.token_a], [slot.token_b]])
    assert [answer.strip() for answer in answers] == ["A", "B"]
    assert tokenizer.decode([*slot.prefix_ids]).strip() == "The better recommendation is Option"


def test_labels_of_several_tokens_part_at_the_first_that_differs():
    made = character_level()
    made.normalizer = normalizers.Sequence(
        [normalizers.Replace(Regex("A"), "ab12"), normalizers.Replace(Regex("B"), "ab32")]
    )
    tokenizer = wrapped(made)
    slot = check_pairs(tokenizer, ROWS)
    assert tokenizer.convert_ids_to_tokens([*slot.prefix_ids]) == list("The better recommendation is Option ab")
    assert tokenizer.convert_ids_to_tokens([slot.token_a, slot.token_b]) == ["1", "3"]


def test_labels_of_one_and_of_two_tokens():
    vocabulary = {token: i for i, token in enumerate([*ALPHABET, " A"])}
    tokenizer = wrapped(Tokenizer(models.BPE(vocabulary, [(" ", "A")])))
    slot = check_pairs(tokenizer, ROWS)
    assert tokenizer.convert_ids_to_tokens([slot.token_a, slot.token_b]) == [" A", " "]


def test_a_merge_across_the_boundary_is_refused():
    vocabulary = {token: i for i, token in enumerate([*ALPHABET, "\nT"])}
    tokenizer = wrapped(Tokenizer(models.BPE(vocabulary, [("\n", "T")])))
    with pytest.raises(UserError, match="^line 1: the prompt's tokens are not a prefix of prompt [+] response"):
        tokenise(tokenizer, ROWS)


def test_without_a_begin_of_text_token():
    tokenizer = wrapped(character_level(), bos=None)
    check_pairs(tokenizer, ROWS)
    (pair,), _ = tokenise(tokenizer, [ONE])
    assert tokenizer.convert_ids_to_tokens(pair.prompt_ids[:3]) == ["#", "#", "#"]


def test_without_an_end_of_text_token_is_refused():
    with pytest.raises(UserError, match="no end-of-text token; set eos_token in tokenizer_config.json"):
        tokenise(wrapped(character_level(), eos=None), ROWS)


class Stub:
    """A tokenizer by code points, but for what `change` makes of a text."""

    bos_token_id, eos_token_id, unk_token_id, added_tokens_decoder = 0, 1, None, {}

    def __init__(self, change):
        self.change = change

    def __call__(self, texts, add_special_tokens):
        assert not add_special_tokens
        return {"input_ids": [[ord(character) for character in self.change(text)] for text in texts]}


def test_answers_that_do_not_differ_are_refused():
    same = Stub(lambda text: text[: text.find("Response:\n") + 10] + "The same in both")
    with pytest.raises(UserError, match="the same tokens; there is nothing to prefer"):
        tokenise(same, [ONE])


def test_an_answer_at_another_token_on_another_line_is_refused():
    """For example `Option a` on the lines that hold a certain word."""
    unsteady = Stub(lambda text: text.replace("is Option A", "is Option a") if "Se7en" in text else text)
    tokenise(unsteady, [ONE, flip(ONE)])
    tokenise(unsteady, [AWKWARD])
    with pytest.raises(UserError, match="^line 2: the answer stands at another token here than on the lines before"):
        tokenise(unsteady, [ONE, AWKWARD])


def test_nothing_to_tokenise_is_refused(tokenizer):
    with pytest.raises(UserError, match="no comparisons"):
        tokenise(tokenizer, [])


@pytest.mark.parametrize("token", [BOS, EOS, "<|pad|>"])
@pytest.mark.parametrize("place", ["history", "option", "instruction"])
def test_control_tokens_in_the_text_are_refused(tokenizer, token, place):
    film = Movie(f"The {token} Story", 1990, ("Drama",))
    change = {"history": {"history": (film,)}, "option": {"option_a": film}, "instruction": {"instruction": token}}
    with pytest.raises(
        UserError, match="^line 7: the text holds .*, a control token of this tokenizer; remove it"
    ) as e:
        tokenise(tokenizer, [ONE, replace(ONE, line=7, **change[place])])
    assert token in str(e.value)


def test_what_only_looks_like_a_control_token_is_text(tokenizer):
    check_pairs(tokenizer, [replace(ONE, history=(Movie("<|end of text|> </s> <s>", 1990),))])


def test_unknown_characters_are_not_control_tokens():
    made = character_level()
    made.add_special_tokens(["?"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="?")
    check_pairs(tokenizer, [replace(ONE, history=(Movie("七人の侍", 1954),))])


# Llama 3's own tokenizer, which is not ours to keep in the repository


@pytest.fixture(scope="module")
def llama3():
    if not LLAMA3.is_dir():
        pytest.skip(f"make it with ../shared/tools/llama3_tokenizer.py {LLAMA3}")
    return AutoTokenizer.from_pretrained(LLAMA3)


def test_llama3_answer_tokens_and_lengths(llama3):
    rows = load(EMBEDDED)[::16]
    slot = check_pairs(llama3, [ONE, AWKWARD, flip(ONE), flip(AWKWARD), *rows])
    assert (slot.token_a, slot.token_b) == (362, 426)
    assert llama3.batch_decode([[362], [426]]) == [" A", " B"]
    assert llama3.decode([*slot.prefix_ids]) == "The better recommendation is Option"
    pairs, _ = tokenise(llama3, rows)
    assert mean(len(pair.prompt_ids) for pair in pairs) == pytest.approx(104, abs=1)
    assert mean(len(pair.chosen_ids) for pair in pairs) == pytest.approx(46, abs=1)


@pytest.mark.parametrize("token", ["<|eot_id|>", "<|reserved_special_token_7|>", EOS])
def test_llama3_control_tokens_are_refused(llama3, token):
    with pytest.raises(UserError, match="^line 1: the text holds"):
        tokenise(llama3, [replace(ONE, history=(Movie(token, 1990),))])


# Rows that are too long


def lengths(tokenizer, rows):
    pairs, _ = tokenise(tokenizer, rows)
    return [len(p.prompt_ids) + max(len(p.chosen_ids), len(p.rejected_ids)) for p in pairs]


def test_fit_drops_the_oldest_films_and_counts_rows(tokenizer, comparisons):
    rows = [replace(c, history=c.history[i % 5 :]) for i, c in enumerate(comparisons(25))]
    limit = max(lengths(tokenizer, [replace(c, history=c.history[-3:]) for c in rows]))
    assert limit < max(lengths(tokenizer, rows))
    fitted, shortened = fit(tokenizer, rows, limit)
    for before, after in zip(rows, fitted, strict=True):
        assert after == replace(before, history=after.history)
        assert after.history == before.history[-len(after.history) :]
        kept = len(after.history)
        # Not one film more than needed is dropped.
        if kept < len(before.history):
            assert lengths(tokenizer, [replace(before, history=before.history[-kept - 1 :])])[0] > limit
    assert max(lengths(tokenizer, fitted)) <= limit
    assert shortened == sum(len(a.history) < len(b.history) for a, b in zip(fitted, rows, strict=True)) > 0


def test_fit_leaves_rows_of_exactly_the_limit(tokenizer, comparisons):
    rows = comparisons(5)
    assert fit(tokenizer, rows, max(lengths(tokenizer, rows))) == (rows, 0)
    fitted, shortened = fit(tokenizer, rows, max(lengths(tokenizer, rows)) - 1)
    assert fitted != rows and shortened >= 1
    assert fit(tokenizer, [], 10) == ([], 0)


def test_fit_counts_both_responses(tokenizer):
    """The longer response decides, chosen or rejected: TRL pads or cuts by it."""
    long = replace(ONE, option_a=Movie("Fargo", 1996, tuple(f"Genre {i}" for i in range(40))))
    for row in (long, flip(long), replace(long, label="A")):
        (length,) = lengths(tokenizer, [row])
        assert fit(tokenizer, [row], length) == ([row], 0)
        assert fit(tokenizer, [row], length - 1)[1] == 1


def test_fit_refuses_what_cannot_fit(tokenizer):
    with pytest.raises(
        UserError, match="^line 1: longer than 60 tokens even with one history film; raise --max-length"
    ):
        fit(tokenizer, [ONE], 60)
    with pytest.raises(UserError, match=r"^Fargo \(1996\): longer than 60"):
        fit(tokenizer, [replace(ONE, line=0)], 60)


def test_pairs_as_a_dataset(tokenizer):
    pairs, _ = tokenise(tokenizer, ROWS)
    dataset = pairs_dataset(pairs)
    assert dataset.column_names == ["prompt_ids", "chosen_ids", "rejected_ids"]
    assert dataset[0] == {"prompt_ids": PROMPT_IDS, "chosen_ids": CHOSEN_IDS, "rejected_ids": REJECTED_IDS}
    assert [row["chosen_ids"] for row in dataset] == [pair.chosen_ids for pair in pairs]
