"""Fixtures that several test files share."""

import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from quantpref.comparisons import Comparison, Movie

ROOT = Path(__file__).resolve().parent.parent
# Before torch is imported, here and in the commands that tests start: many short runs on the tiny base are over
# before a second thread has warmed up, and on shared cores it makes them slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")
GENRES = ("Action", "Comedy", "Drama", "Horror", "Sci-Fi", "Western")


@pytest.fixture(scope="session")
def tokenizer():
    """The embedded base's tokenizer: byte-level BPE, the catalogue's titles and genres as added tokens."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(ROOT / "models" / "tiny-llama")


def make_comparisons(n: int, rows_per_user: int = 1, films: int = 60, seed: int = 0) -> list[Comparison]:
    """`n` different comparisons of made-up films; three of four are labelled A; no user if rows_per_user is 0."""
    rng = random.Random(seed)
    catalogue = [Movie(f"Film {i}", 1950 + i, tuple(sorted(rng.sample(GENRES, 2)))) for i in range(films)]
    made: list[Comparison] = []
    for i in range(n):
        *history, a, b = rng.sample(catalogue, 7)
        made.append(
            Comparison(
                history=tuple(Movie(m.title, m.year) for m in history),
                option_a=a,
                option_b=b,
                label="B" if i % 4 == 3 else "A",
                user=str(1 + i // rows_per_user) if rows_per_user else None,
                line=i + 1,
            )
        )
    return made


@pytest.fixture(scope="session")
def comparisons() -> Callable[..., list[Comparison]]:
    return make_comparisons
