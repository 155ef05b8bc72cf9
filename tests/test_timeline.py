"""The packed ratings and the sweep through them, against loops; and the same comparisons by a pandas loop."""

import json
from collections import Counter

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.build_scale import pandas_loop, simulate_ratings
from quantpref import negatives
from quantpref.negatives import balanced_sides
from quantpref.ratings import Options, build
from quantpref.runs import UserError
from quantpref.timeline import BETWEEN, LIKED, LOW, build_timeline, pack, unpack

columns = st.integers(1, 5).flatmap(
    lambda n: st.lists(st.lists(st.integers(0, 2000), min_size=n, max_size=n), min_size=1, max_size=30)
)


@given(rows=columns)
def test_packing_keeps_the_parts_and_their_order(rows):
    parts = [np.array(part, np.uint32) for part in zip(*rows, strict=True)]
    sizes = [int(part.max()) + 1 for part in parts]
    key = pack(*zip(parts, sizes, strict=True))
    for part, again in zip(parts, unpack(key, *sizes), strict=True):
        assert again.tolist() == part.tolist()
    assert [rows[i] for i in np.argsort(key, kind="stable")] == sorted(rows)


def test_what_does_not_fit_into_64_bits_is_refused():
    one = np.zeros(1, np.uint32)
    assert len(pack((one, 2**32), (one, 2**32))) == 1
    with pytest.raises(UserError, match=r"need 65 bits each, more than 64: .* \(docs/SCALING.md\)"):
        pack((one, 2**32), (one, 2**33))


@settings(max_examples=100, deadline=None)
@given(
    rows=st.lists(
        st.tuples(st.integers(5, 9), st.integers(20, 30), st.sampled_from((1.0, 3.0, 5.0)), st.integers(0, 12)),
        min_size=1,
        max_size=50,
    )
)
def test_a_timeline_by_loops(rows):
    table = pl.DataFrame(rows, schema=["user", "film", "rating", "time"], orient="row")
    found = build_timeline(table, 4, 2)
    first: dict[tuple[int, int], tuple[int, float]] = {}
    for user, film, rating, time in rows:
        first[user, film] = min(first.get((user, film), (99, 9.0)), (time, rating))
    grades = {1.0: LOW, 3.0: BETWEEN, 5.0: LIKED}
    expected = sorted((user, time, film, grades[rating]) for (user, film), (time, rating) in first.items())
    read = zip(found.users[found.user], found.seconds[found.moment], found.films[found.film], found.grade, strict=True)
    assert [tuple(map(int, row)) for row in read] == expected
    times = sorted((time, film) for _, time, film, _ in expected)
    assert found.films[found.chronicle].tolist() == [film for _, film in times]
    for moment, second in enumerate(found.seconds.tolist()):
        assert found.before[moment] == sum(time < second for time, _ in times)
        assert set(found.films[: found.known[moment]].tolist()) == {film for time, film in times if time < second}


def test_sides_are_balanced_along_time():
    rng = np.random.default_rng(0)
    n = 2000
    moment = rng.permutation(n)
    there = rng.random((2, n)) < [[0.9], [0.6]]  # the film below is more often missing
    gap = np.where(there, rng.integers(1, 50, (2, n)), 0)
    equal = rng.random(n) < 0.2
    gap[:, equal], there[:, equal] = 0, True
    side = balanced_sides(there, gap, moment, rng)
    some = there.any(axis=0)
    assert there[side[some], np.flatnonzero(some)].all()
    signs = np.where(equal | ~some, 0, 1 - 2 * side)[np.argsort(moment)]
    for part in np.array_split(signs, 5):
        assert abs(part.mean()) < 0.03
    # Where nothing is to be evened, the nearer film is taken.
    assert balanced_sides(np.ones((2, 1), bool), np.array([[3], [2]]), np.zeros(1, int), rng).tolist() == [1]
    assert balanced_sides(np.ones((2, 1), bool), np.array([[2], [3]]), np.zeros(1, int), rng).tolist() == [0]


@pytest.fixture(scope="module")
def simulated(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ratings")
    simulate_ratings(folder, 8000, 120, 500)
    return folder


@pytest.mark.parametrize("kind", negatives.KINDS)
def test_blocks_and_cores_decide_nothing(simulated, kind, monkeypatch):
    paths, options = (simulated / "ratings.csv", simulated / "movies.csv"), Options(1, kind, comparisons_per_user=3)
    whole = build(*paths, options).comparisons
    monkeypatch.setattr(negatives, "BLOCK", 7)
    monkeypatch.setattr("os.cpu_count", lambda: 5)
    assert build(*paths, options).comparisons == whole and len(whole) > 300


def test_a_pandas_loop_makes_the_same_comparisons(simulated, tmp_path):
    """Up to the other film, which the loop takes as the nearest on either side; ours is never nearer than that."""
    built = build(simulated / "ratings.csv", simulated / "movies.csv", Options(1, "popularity")).comparisons
    pandas_loop(simulated, tmp_path / "loop.jsonl", 10**9)
    loop = {}
    for line in (tmp_path / "loop.jsonl").read_text().splitlines():
        user, time, *films = json.loads(line).values()
        loop[str(user)] = (time, films)
    assert set(loop) == {c.user for c in built} and len(built) > 100
    rated = pl.read_csv(simulated / "ratings.csv")
    nearer = Counter()
    for c in built:
        time, (*history, preferred, other) = loop[c.user]
        assert (c.time, [str(m) for m in c.history], str(c.preferred)) == (time, history, preferred)
        earlier = Counter(rated.filter(pl.col("timestamp") < time)["movieId"].to_list())
        level, *gaps = (earlier[int(name.split()[1])] for name in (preferred, str(c.other), other))
        ours, theirs = (abs(gap - level) for gap in gaps)
        assert ours >= theirs
        nearer[ours == theirs] += 1
    assert nearer[True] > nearer[False]
