"""baselines.py against brute-force loops over tiny data made by hand."""

import itertools
import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from quantpref.baselines import baseline_margins, co_occurrence, genre_overlap, popularity
from quantpref.comparisons import Comparison, Movie, flip, load, save
from quantpref.simulate import Population, load_catalogue, watch
from quantpref.statistics import correctness

A, B, C, D, E = (
    Movie("A", 1990, ("Drama",)),
    Movie("B", 1991, ("Drama", "War")),
    Movie("C", 1992, ("Comedy",)),
    Movie("D", 1993, ()),
    Movie("E", 1994, ("Comedy", "War")),
)


def row(history: str, a: Movie, b: Movie, label: str, user: str) -> Comparison:
    films = {m.title: m for m in (A, B, C, D, E)}
    plain = tuple(replace(films[title], genres=()) for title in history)
    return Comparison(plain, a, b, label, user=user)


TRAIN = [
    row("AB", C, D, "A", "1"),
    row("AC", B, E, "B", "2"),
    row("BCD", A, E, "A", "3"),
    row("AD", E, B, "A", "4"),
    row("EC", A, D, "B", "5"),
    row("BA", C, E, "A", "6"),
]
TEST = [row("AB", C, E, "A", "7"), row("CD", A, B, "B", "8"), row("E", D, A, "A", "9"), row("AC", D, E, "B", "10")]
EVERY = [(c, film) for c in (*TRAIN, *TEST) for film in (c.option_a, c.option_b)]


def test_popularity_counts_what_was_watched():
    """Histories and preferred films; the other film of a row was not watched. Counted by hand."""
    rule = popularity(TRAIN)
    for film, watched in zip((A, B, C, D, E), (5, 3, 5, 3, 3), strict=True):
        assert rule(TEST[0], film) == watched / len(TRAIN)
    assert rule(TEST[0], Movie("A", 2020)) == 0  # another film of that title


def test_genre_overlap_by_loops():
    known = {m.title: m.genres for m in (A, B, C, D, E)}  # each is a candidate somewhere in TRAIN
    rule = genre_overlap(TRAIN)
    for c, film in EVERY:
        found = [sum(genre in known[seen.title] for seen in c.history) for genre in film.genres]
        assert rule(c, film) == (sum(found) / len(found) if found else 0)


def test_genre_overlap_knows_only_what_training_shows():
    """B is a candidate of TRAIN[1] and TRAIN[3] alone: without these its genres are unknown in a history."""
    rule = genre_overlap([c for c in TRAIN if B not in (c.option_a, c.option_b)])
    assert rule(row("B", A, C, "A", "7"), A) == 0
    assert genre_overlap(TRAIN)(row("B", A, C, "A", "7"), A) == 1


def test_co_occurrence_by_loops():
    rule = co_occurrence(TRAIN)
    audiences = {m.title: set() for m in (A, B, C, D, E)}
    for c in TRAIN:
        for film in (*c.history, c.preferred):
            audiences[film.title].add(c.user)
    for c, film in EVERY:
        cosines = [
            len(audiences[film.title] & audiences[seen.title])
            / math.sqrt(len(audiences[film.title]) * len(audiences[seen.title]))
            for seen in c.history
        ]
        assert rule(c, film) == pytest.approx(sum(cosines) / len(cosines))
    unseen = Movie("Z", 2000)
    assert rule(TEST[0], unseen) == 0
    assert rule(replace(TEST[0], history=(unseen,)), A) == 0


def test_margins_are_preferred_less_other():
    margins = baseline_margins(TRAIN, TEST)
    assert list(margins) == [
        "always_a", "popularity", "genre_overlap", "co_occurrence", "release_year", "logistic_regression"
    ]  # fmt: skip
    for name, rule in (
        ("popularity", popularity(TRAIN)),
        ("genre_overlap", genre_overlap(TRAIN)),
        ("co_occurrence", co_occurrence(TRAIN)),
        ("release_year", lambda c, film: film.year),
    ):
        assert margins[name] == pytest.approx([rule(c, c.preferred) - rule(c, c.other) for c in TEST])
    assert margins["release_year"].tolist() == [-2, 1, 3, 1]


def test_always_a_is_exactly_half(comparisons):
    """Whatever the labels of the file: each comparison is scored in both orders."""
    rows = comparisons(41)
    assert {c.label for c in rows} == {"A", "B"}
    for test in (rows[20:], [c for c in rows if c.label == "A"]):
        assert correctness(baseline_margins(rows[:20], test)["always_a"]).tolist() == [0.5] * len(test)


def test_the_order_of_the_candidates_decides_nothing(comparisons):
    rows = comparisons(80)
    expected = baseline_margins(rows[:50], rows[50:])
    flipped = baseline_margins([flip(c) for c in rows[:50]], [flip(c) for c in rows[50:]])
    swapped = baseline_margins(rows[:50], [replace(c, label="AB"[c.label == "A"]) for c in rows[50:]])
    for name, margins in expected.items():
        assert flipped[name] == pytest.approx(margins), name
        # With the other film as the preferred one, each rule is right where it was wrong.
        assert swapped[name] == pytest.approx(-margins), name


def taste_rows(n: int, seed: int) -> list[Comparison]:
    """People who like one of two genres watch only it; films of the other are the alternative; years say nothing."""
    rng = np.random.default_rng(seed)
    films = [[Movie(f"{genre} {i}", 1950 + i, (genre,)) for i in range(40)] for genre in ("Drama", "Comedy")]
    rows = []
    for i in range(n):
        liked = int(rng.integers(2))
        seen = [films[liked][k] for k in rng.choice(40, 6, replace=False)]
        history = tuple(replace(m, genres=()) for m in seen[:5])
        rows.append(Comparison(history, seen[5], films[1 - liked][rng.integers(40)], "A", user=str(i)))
    return rows


def test_logistic_regression_finds_what_tells():
    accuracy = {
        name: correctness(m).mean() for name, m in baseline_margins(taste_rows(300, 1), taste_rows(300, 2)).items()
    }
    assert accuracy["genre_overlap"] == accuracy["logistic_regression"] == 1
    assert 0.35 < accuracy["release_year"] < 0.65


def test_logistic_regression_is_not_misled_by_a_rows_own_answer(comparisons):
    """Where only the genres tell, the counts tell in training too, since each row's answer is among them.

    Fitted on the training rows' own counts, the regression trusts popularity and co-occurrence.
    """
    rng = np.random.default_rng(3)
    films = [Movie(f"Film {i}", 1950 + i % 50, (("Drama", "Comedy")[i % 2],)) for i in range(600)]

    def make(n: int, offset: int) -> list[Comparison]:
        rows = []
        for i in range(n):
            picked = [films[k] for k in rng.choice(600, 7, replace=False)]
            history = tuple(replace(m, genres=()) for m in picked[:5])
            majority = Counter(("Drama", "Comedy")[int(m.title.split()[1]) % 2] for m in history).most_common(1)[0][0]
            a, b = picked[5:]
            likes_a = (
                rng.random() < (0.8 if a.genres == (majority,) else 0.2) if a.genres != b.genres else rng.random() < 0.5
            )
            rows.append(Comparison(history, a, b, "A" if likes_a else "B", user=str(offset + i)))
        return rows

    margins = baseline_margins(make(1500, 0), make(1500, 10_000))
    accuracy = {name: correctness(m).mean() for name, m in margins.items()}
    assert accuracy["genre_overlap"] > 0.6
    assert accuracy["logistic_regression"] > accuracy["genre_overlap"] - 0.02


def test_a_single_training_user_is_enough(comparisons):
    rows = comparisons(6, rows_per_user=3)
    for margins in baseline_margins(rows[:3], rows[3:]).values():
        assert margins.shape == (3,) and np.isfinite(margins).all()


def test_every_permutation_of_the_training_rows_gives_the_same():
    expected = baseline_margins(TRAIN, TEST)
    for order in itertools.islice(itertools.permutations(TRAIN), 0, 720, 90):
        for name, margins in baseline_margins(order, TEST).items():
            assert margins == pytest.approx(expected[name], abs=1e-4), name


def test_the_file_that_people_bring_is_given_away_by_popularity(tmp_path):
    """Its shape: 6,040 lines, all "A", no user; skewed popularity; any film not watched as the other."""
    films = load_catalogue()
    watched, _, _ = watch(films, 6040, 6, Population(effect=1.0, popularity=1.4), seed=1)
    rng = np.random.default_rng(2)
    rows = []
    for films_of_user in watched:
        other = rng.choice(np.setdiff1d(np.arange(len(films)), films_of_user))
        history = tuple(Movie(films[f].title, films[f].year) for f in films_of_user[:5])
        rows.append(Comparison(history, films[films_of_user[5]], films[other], "A"))
    save(tmp_path / "brought.jsonl", rows)
    brought = load(tmp_path / "brought.jsonl")
    assert len(brought) == 6040 and {c.label for c in brought} == {"A"} and {c.user for c in brought} == {None}
    margins = baseline_margins(brought, brought)
    assert correctness(margins["always_a"]).mean() == 0.5
    assert 0.79 < correctness(margins["popularity"]).mean() < 0.85
