#!/usr/bin/env python3
"""Pre-train a small real Llama, so that the whole pipeline, 4-bit included, runs on a laptop.

    python models/pretrain.py --out models/tiny-llama --device cuda

It reads what a language model would have read: which genres and decade a film has, what *other* simulated
people watched, quizzes about facts with two options, which teach what "Option A" refers to, and the words of
the experiment's own answers about random films, with the option drawn by a coin. It never sees a row or a person
of the data set, nor which of two candidates anybody prefers.
"""

import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

from config import parse_flags
from quantpref.comparisons import INSTRUCTION, Comparison, Movie
from quantpref.prompts import PROMPT, REASONING, VERDICT, prompt, response
from quantpref.runs import UserError, atomic_folder, environment, one_line_errors, sha256
from quantpref.simulate import Population, load_catalogue, watch

BOS, EOS, PAD = "<|begin_of_text|>", "<|end_of_text|>", "<|pad|>"
POPULATION_SEED = 20_000  # the data set's population has another seed: these are other people


@dataclass(frozen=True)
class Pretraining:
    """Sizes are multiples of 64, since bitsandbytes' CPU kernels ask for that."""

    out: Path
    """Folder to write; an existing one is never replaced."""
    hidden_size: int = 128
    """Width; 128 with 4 layers is 1.1 million weights."""
    intermediate_size: int = 384
    """Width of the gated MLP."""
    layers: int = 4
    """Decoder blocks."""
    heads: int = 4
    """Attention heads; half as many key-value heads."""
    documents: int = 500_000
    """Texts in the corpus, read again when they are used up."""
    steps: int = 10_000
    """Optimiser steps."""
    rows_per_step: int = 64
    """Rows of --row-tokens each."""
    row_tokens: int = 256
    """Documents are packed end to end into rows of this many tokens."""
    learning_rate: float = 2e-3
    """Peak; 200 steps of warm-up, then a cosine to a tenth."""
    answer_weight: float = 8.0
    """Weight of the quizzes' answer letters in the loss: one token carries the whole lesson."""
    device: str = "cpu"
    """cpu or cuda."""
    seed: int = 1
    """Seed of corpus, weights and order."""


# --- the corpus --------------------------------------------------------------------------------------


def decade(movie: Movie) -> str:
    return f"the {movie.year // 10 * 10}s"


def fact(movie: Movie, rng: random.Random) -> str:
    forms = (
        f"Movie: {movie}. Genres: {movie.genre_text}. Decade: {decade(movie)}.",
        f"{movie} ({movie.genre_text}).",
        f"The genres of {movie} are {movie.genre_text}. It is a movie of {decade(movie)}.",
        PROMPT.format(instruction="Name the genres of the movie.", input=f"Movie: {movie}.")
        + f"The genres are {movie.genre_text}.",
    )
    return rng.choice(forms)


def option(movie: Movie, with_genres: bool) -> str:
    return f"{movie} ({movie.genre_text})" if with_genres else str(movie)


def quiz(question: str, right: Movie, wrong: Movie, rng: random.Random) -> str:
    """In words of its own, never the prompt's: how to answer *that* by taste is what SFT and DPO teach."""
    with_genres = rng.random() < 0.7
    label = rng.choice("AB")
    a, b = (right, wrong) if label == "A" else (wrong, right)
    options = f"Option A: {option(a, with_genres)}. Option B: {option(b, with_genres)}."
    return f"{question}. {options} Answer: Option {label}."


def fact_quiz(films: list[Movie], rng: random.Random) -> str:
    """Which of two films has a genre, or is of a decade."""
    while True:
        right, wrong = rng.sample(films, 2)
        if rng.random() < 0.75:
            genre = rng.choice(right.genres)
            question, fits = genre, genre not in wrong.genres
        else:
            question, fits = f"A movie of {decade(right)}", decade(right) != decade(wrong)
        if fits:
            return quiz(question, right, wrong, rng)


def similarity_quiz(films: list[Movie], rng: random.Random) -> str:
    """Which of two films shares more genres with the ones named."""
    while True:
        *named, a, b = rng.sample(films, rng.choice((3, 4, 5, 7)))
        score_a, score_b = (sum(len({*m.genres} & {*n.genres}) / len(m.genres) for n in named) for m in (a, b))
        if score_a != score_b:
            right, wrong = (a, b) if score_a > score_b else (b, a)
            return quiz(f"Similar to: {', '.join(map(str, named))}", right, wrong, rng)


def coin_flip(films: list[Movie], rng: random.Random) -> str:
    """The words of prompt and response, about random films, answered by a coin: form without any preference."""
    *history, a, b = rng.sample(films, 7)
    comparison = Comparison(tuple(history), a, b, "A")
    return prompt(comparison) + response(comparison, rng.choice(("A", "B")))


def corpus(films: list[Movie], documents: int, seed: int) -> list[str]:
    """15 % facts, 20 % histories, 25 % fact quizzes, 25 % similarity quizzes, 15 % coin flips."""
    rng = random.Random(seed)
    histories = iter(histories_of_others(films, documents // 5 + 4, seed))
    texts = []
    for i in range(documents):
        kind = i % 20
        if kind < 3:
            texts.append(fact(rng.choice(films), rng))
        elif kind < 7:
            texts.append(f"History: {', '.join(map(str, next(histories)))}.")
        elif kind < 12:
            texts.append(fact_quiz(films, rng))
        elif kind < 17:
            texts.append(similarity_quiz(films, rng))
        else:
            texts.append(coin_flip(films, rng))
    return texts


def histories_of_others(films: list[Movie], people: int, seed: int) -> list[list[Movie]]:
    watched = []
    for block in range(0, people, 10_000):
        users = min(10_000, people - block)
        order, _, _ = watch(films, users, 10, Population(), POPULATION_SEED + 1000 * seed + block // 10_000)
        watched += [[films[f] for f in row] for row in order]
    return watched


# --- the tokenizer -----------------------------------------------------------------------------------


def make_tokenizer(films: list[Movie], texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE, so that any text works, with the catalogue's titles and the genres as single tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    genres = sorted({g for movie in films for g in movie.genres})
    words = [PROMPT.format(instruction=INSTRUCTION, input=""), VERDICT, REASONING]
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*texts[:20_000], *words * 2000], trainer)
    # The blank before a title belongs to its token: "History: " is then followed by whole films.
    tokenizer.add_tokens([AddedToken(f" {movie}", normalized=False) for movie in films])
    tokenizer.add_tokens([AddedToken(genre, normalized=False, single_word=True) for genre in genres])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
    )


# --- training ----------------------------------------------------------------------------------------


def pack(tokenizer: PreTrainedTokenizerFast, texts: list[str], row_tokens: int, answer_weight: float):
    """Documents end to end in rows of `row_tokens`: ids and loss weights, both (rows, row_tokens)."""
    letters = [tokenizer.encode(f" Option {x}.", add_special_tokens=False)[-2] for x in "AB"]
    ids: list[int] = []
    weights: list[float] = []
    for text, tokens in zip(texts, tokenizer(texts, add_special_tokens=False)["input_ids"], strict=True):
        ids += [tokenizer.bos_token_id, *tokens, tokenizer.eos_token_id]
        # A quiz ends with "Option A.": the letter is the last token but one.
        is_quiz = text.endswith(("Option A.", "Option B.")) and tokens[-2] in letters
        weights += [1.0] * (len(tokens) - 1) + [answer_weight if is_quiz else 1.0] + [1.0, 1.0]
    rows = len(ids) // row_tokens
    shape = (rows, row_tokens)
    size = rows * row_tokens
    return (
        torch.tensor(np.array(ids[:size], dtype=np.int32).reshape(shape)),
        torch.tensor(np.array(weights[:size], dtype=np.float32).reshape(shape)),
    )


def train(model: LlamaForCausalLM, ids: torch.Tensor, weights: torch.Tensor, config: Pretraining) -> None:
    device = torch.device(config.device)
    model.to(device).train()
    ids, weights = ids.to(device), weights.to(device)
    optimiser = torch.optim.AdamW(
        model.parameters(), lr=config.learning_rate, betas=(0.9, 0.95), weight_decay=0.05, fused=True
    )
    warm_up = torch.optim.lr_scheduler.LinearLR(optimiser, 0.01, 1.0, 200)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, config.steps, config.learning_rate / 10)
    schedule = torch.optim.lr_scheduler.ChainedScheduler([warm_up, cosine])
    generator = torch.Generator().manual_seed(config.seed)
    forward = torch.compile(model) if device.type == "cuda" else model
    order = torch.empty(0, dtype=torch.long)
    started = time.monotonic()
    for step in range(config.steps):
        if len(order) < config.rows_per_step:
            order = torch.cat((order, torch.randperm(len(ids), generator=generator)))
        rows, order = order[: config.rows_per_step].to(device), order[config.rows_per_step :]
        batch, weight = ids[rows].long(), weights[rows][:, 1:]
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits = forward(input_ids=batch[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten(), reduction="none")
        loss = (loss * weight.flatten()).sum() / weight.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        optimiser.zero_grad(set_to_none=True)
        if (step + 1) % 500 == 0:
            elapsed = time.monotonic() - started
            left = elapsed / (step + 1) * (config.steps - step - 1)
            print(f"step {step + 1:,}/{config.steps:,}  loss {loss.item():.4f}  {left:.0f} s left", flush=True)
    model.eval()


@torch.inference_mode()
def quiz_accuracy(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> float:
    """Share of quizzes whose right letter gets the higher logit; the texts were not trained on."""
    a, b = (tokenizer.encode(f" Option {x}.", add_special_tokens=False)[-2] for x in "AB")
    tokenizer.padding_side = "left"
    stems = tokenizer([tokenizer.bos_token + text[: -len(" A.")] for text in texts], add_special_tokens=False,
                      padding=True, return_tensors="pt", return_token_type_ids=False).to(model.device)  # fmt: skip
    logits = model(**stems, logits_to_keep=1).logits[:, -1]
    says_a = (logits[:, a] > logits[:, b]).tolist()
    return sum(said == (text[-2] == "A") for said, text in zip(says_a, texts, strict=True)) / len(texts)


CARD = """# {name}

A small real Llama ({parameters:,} weights, {layers} layers of {hidden_size}, vocabulary {vocabulary:,}) made by
`{command}`. It makes the whole pipeline, 4-bit included, real on a laptop; it is of no use for anything else.

It was pre-trained on made texts about the 500 films of `data/catalogue.csv`: their genres and decades, what
*other* simulated people watched (other seeds than the data set's), two-option quizzes about facts, and the words
of the experiment's prompt and response about random films, answered by a coin. It never saw a row or a person of
the data set, nor which of two candidates anybody prefers.

| | |
| --- | --- |
| tokens seen | {tokens_seen:,} ({steps:,} steps of {rows_per_step} rows of {row_tokens}) |
| accuracy on 1,000 new fact quizzes | {fact_accuracy:.1%} |
| accuracy on 1,000 new similarity quizzes | {similarity_accuracy:.1%} |
| made on | {device}, torch {torch}, in {minutes:.1f} min |
| SHA-256 of model.safetensors | `{digest}` |

Tokenizer: byte-level BPE (any text works) with the catalogue's titles and the 18 genres as single tokens.
Seeds are fixed; another machine's arithmetic gives slightly other weights. Licence: Apache-2.0, as the project.
"""


def main(config: Pretraining) -> None:
    if config.out.exists():
        raise UserError(f"{config.out}: exists; choose another --out or remove it")
    started = time.monotonic()
    set_seed(config.seed)
    films = load_catalogue()
    texts = corpus(films, config.documents, config.seed)
    tokenizer = make_tokenizer(films, texts)
    ids, weights = pack(tokenizer, texts, config.row_tokens, config.answer_weight)
    print(f"{len(texts):,} documents, {ids.numel():,} tokens, vocabulary {len(tokenizer):,}", flush=True)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=-(-len(tokenizer) // 64) * 64,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.heads // 2,
            max_position_embeddings=2048,
            rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    train(model, ids, weights, config)
    rng = random.Random(config.seed + 1)
    fact_accuracy = quiz_accuracy(model, tokenizer, [fact_quiz(films, rng) for _ in range(1000)])
    similarity_accuracy = quiz_accuracy(model, tokenizer, [similarity_quiz(films, rng) for _ in range(1000)])
    print(f"fact quizzes {fact_accuracy:.1%}, similarity quizzes {similarity_accuracy:.1%}", flush=True)
    with atomic_folder(config.out) as folder:
        model.cpu().save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        where = environment()
        card = CARD.format(
            name=config.out.name,
            parameters=model.num_parameters(),
            vocabulary=len(tokenizer),
            command=f"python models/pretrain.py {' '.join(sys.argv[1:])}",
            tokens_seen=config.steps * config.rows_per_step * config.row_tokens,
            fact_accuracy=fact_accuracy,
            similarity_accuracy=similarity_accuracy,
            device_name=where["device"],
            torch=where["versions"]["torch"],
            minutes=(time.monotonic() - started) / 60,
            digest=sha256(folder / "model.safetensors"),
            **{**vars(config), "device": where["device"]},
        )
        (folder / "README.md").write_text(card, encoding="utf-8")


if __name__ == "__main__":
    with one_line_errors():
        main(parse_flags(Pretraining, sys.argv[1:], description=__doc__))
