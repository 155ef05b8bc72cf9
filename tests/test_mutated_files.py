"""Damaged files are refused by file and line, or mean what an independent reader says. `make faults` tries more."""

import random

from mutations import accepted_comparisons, accepted_ratings, mutated

from quantpref.comparisons import save
from quantpref.simulate import simulate


def people(folder, n=6):
    """A valid file of comparisons, with and without users and times."""
    path = folder / "people.jsonl"
    save(path, simulate(n, seed=3).comparisons)
    return path.read_bytes()


def dumps(rng):
    """A valid rating dump in one of the two layouts: ratings, movies."""
    films = [(i, f"Film {i}, The ({1980 + i})", "Drama|Comedy" if i % 2 else "Sci-Fi") for i in range(1, 12)]
    rows = [(u, 1 + (u + k) % 11, 3 + (u + k) % 3, 978300000 + 97 * k + u) for u in range(1, 6) for k in range(9)]
    if rng.random() < 0.5:
        ratings = "".join("::".join(map(str, row)) + "\n" for row in rows)
        movies = "".join("::".join(map(str, film)) + "\n" for film in films)
    else:
        ratings = "userId,movieId,rating,timestamp\n" + "".join(",".join(map(str, row)) + "\n" for row in rows)
        movies = "movieId,title,genres\n" + "".join(f'{i},"{title}",{genres}\n' for i, title, genres in films)
    return ratings.encode(), movies.encode()


def mutated_comparisons(folder, count, seed):
    """How many of `count` mutated files are accepted; the first that breaks a rule stays in `folder`."""
    rng, content, path = random.Random(seed), people(folder), folder / "mutated.jsonl"
    accepted = 0
    for _ in range(count):
        path.write_bytes(mutated(content, rng))
        accepted += accepted_comparisons(path)
    return accepted


def mutated_ratings(folder, count, seed):
    rng, ratings, movies = random.Random(seed), folder / "ratings.x", folder / "movies.x"
    accepted = 0
    for _ in range(count):
        files = list(dumps(rng))
        which = rng.randrange(2)
        files[which] = mutated(files[which], rng)
        ratings.write_bytes(files[0])
        movies.write_bytes(files[1])
        accepted += accepted_ratings(ratings, movies)
    return accepted


def test_mutated_comparisons(tmp_path):
    assert 0 < mutated_comparisons(tmp_path, 400, seed=1) < 400


def test_mutated_ratings(tmp_path):
    assert 0 < mutated_ratings(tmp_path, 80, seed=1) < 80
