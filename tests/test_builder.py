"""data/build_contrastive.py as a user runs it: what it writes, what its card says, what it refuses."""

import hashlib
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
from test_ratings import write_csv, write_dat

from config import ROOT
from quantpref.comparisons import load

FILMS = [(film, f"Film {film} ({1960 + film})", "Drama|Comedy") for film in range(1, 61)]


def people(users: int = 60, rated: int = 14) -> list[tuple[int, int, float, int]]:
    rng = random.Random(3)
    return [
        (user, film, rng.choice((1, 2, 4, 5)), 1000 * user + 10 * k)
        for user in range(1, users + 1)
        for k, film in enumerate(rng.sample(range(1, 61), rated))
    ]


@pytest.fixture(scope="module")
def dump(tmp_path_factory) -> tuple[Path, Path]:
    return write_dat(tmp_path_factory.mktemp("dump"), people(), FILMS)


def builder(*flags, status: int = 0) -> str:
    command = [sys.executable, ROOT / "data/build_contrastive.py", *map(str, flags)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr
    if status:
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    return done.stdout + done.stderr


def from_dump(dump, out: Path, *flags, status: int = 0) -> str:
    return builder("ratings", "--ratings", dump[0], "--movies", dump[1], "--out", out, *flags, status=status)


@pytest.mark.parametrize("split", ["user", "time"])
@pytest.mark.parametrize("kind", ["random", "popularity", "disliked", "hard"])
def test_every_kind_and_split_with_card_and_control(dump, tmp_path, kind, split):
    out = tmp_path / "mine.jsonl"
    text = from_dump(dump, out, "--negatives", kind, "--split", split, "--comparisons-per-user", 2)
    rows = load(out)
    card = json.loads((tmp_path / "mine.card.json").read_text())
    matched = tmp_path / "mine.popularity-matched.jsonl"
    assert {path.name for path in tmp_path.iterdir()} == {
        "mine.jsonl", "mine.card.json", "mine.card.md", *([matched.name] if kind != "popularity" else []),
    }  # fmt: skip
    assert card["sha256"] == hashlib.sha256(out.read_bytes()).hexdigest() in text
    assert card["sources"] == {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in dump}
    assert (card["options"]["negatives"], card["options"]["split"]) == (kind, split)
    assert card["comparisons"] == card["counts"]["comparisons_kept"] == len(rows)
    assert card["users"] == len({c.user for c in rows})
    kept = card["counts"]["comparisons_kept"] + card["counts"]["comparisons_dropped_no_other_film"]
    assert kept + card["counts"]["comparisons_dropped_same_as_another_users"] > 100
    if kind != "popularity":
        found = card["controls"]["popularity-matched"]
        assert found["sha256"] == hashlib.sha256(matched.read_bytes()).hexdigest()
        for c, m in zip(rows, load(matched), strict=True):
            assert (c.user, c.history, c.preferred, c.time) == (m.user, m.history, m.preferred, m.time)
    report = card["leakage"]
    assert report["leaks"] == [] and 0.49 < report["labels_a"] < 0.51
    assert {"always_a", "popularity", "past_popularity", "all_time_popularity", "release_year"} <= (
        report["baselines"].keys()
    )
    for name, row in report["baselines"].items():
        assert row["accuracy_ci95"][0] <= row["accuracy"] <= row["accuracy_ci95"][1]
        assert f"{row['accuracy']:.1%}  {name} (" in text
    assert f"## Leakage, split by {split}" in (tmp_path / "mine.card.md").read_text()


def test_the_same_input_and_seed_give_the_same_bytes_in_every_file(dump, tmp_path):
    folder = tmp_path / "other"
    folder.mkdir()
    shuffled = people()
    random.Random(1).shuffle(shuffled)
    turned = write_csv(folder, shuffled, FILMS[::-1])
    from_dump(dump, tmp_path / "1" / "mine.jsonl")
    from_dump(dump, tmp_path / "2" / "mine.jsonl")
    from_dump(turned, tmp_path / "3" / "mine.jsonl")
    names = [path.name for path in sorted((tmp_path / "1").iterdir())]
    assert len(names) == 4
    for name in names:
        one, two, three = ((tmp_path / str(k) / name).read_bytes() for k in (1, 2, 3))
        assert one == two, name
        assert one == three or "card" in name  # the card names the sources


def test_a_simulated_file_has_its_card(tmp_path):
    builder("simulate", "--users", 200, "--out", tmp_path / "s.jsonl")
    card = json.loads((tmp_path / "s.card.json").read_text())
    assert card["options"]["effect"] == 2.0 and list(card["sources"]) == ["catalogue.csv"]
    assert {path.name for path in tmp_path.iterdir()} == {"s.jsonl", "s.card.json", "s.card.md"}
    assert card["controls"] == {} and card["leakage"]["baselines"]["always_a"]["accuracy"] == 0.5


def test_too_few_users_to_split_still_make_a_file_to_test_on(tmp_path):
    assert "no leakage report: 2 user(s) cannot be split" in builder(
        "simulate", "--users", 2, "--out", tmp_path / "s.jsonl"
    )
    assert "Too few users" in (tmp_path / "s.card.md").read_text() and len(load(tmp_path / "s.jsonl")) == 2
    assert "cannot be split" in builder("simulate", "--users", 2, "--strict", "--out", tmp_path / "t.jsonl", status=2)


def test_a_shortcut_above_the_limit_is_refused_and_nothing_is_written(dump, tmp_path):
    """Everybody likes one film next that nobody dislikes: counting popularity finds it."""
    rows = [(user, film, 5, 1000 * user + film) for user in range(1, 41) for film in range(1, 8)]
    rows += [(99, film, 1, film) for film in range(8, 61)]
    folder = tmp_path / "dump"
    folder.mkdir()
    given = write_dat(folder, [r if r[1] < 6 else (*r[:1], r[1] + r[0] % 9 * 2, *r[2:]) for r in rows], FILMS)
    out = tmp_path / "mine.jsonl"
    for flags in (("--max-shortcut", 0.7), ("--strict",)):
        text = from_dump(given, out, *flags, status=2)
        assert f"{out}: " in text and "popularity alone is right in" in text and "--max-shortcut" in text
        assert list(tmp_path.iterdir()) == [folder]
    from_dump(given, out, "--strict", "--max-shortcut", 1)
    assert out.is_file()


@pytest.mark.parametrize("there", ["mine.jsonl", "mine.card.json", "mine.card.md", "mine.popularity-matched.jsonl"])
def test_nothing_is_replaced(dump, tmp_path, there):
    (tmp_path / there).write_text("mine")
    assert f"{there}: exists; choose another --out" in from_dump(dump, tmp_path / "mine.jsonl", status=2)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]


def test_what_fails_half_way_leaves_nothing(dump, tmp_path, monkeypatch):
    """Here the card cannot be written, after the comparisons are."""
    import quantpref.card
    from data.build_contrastive import Ratings, main

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(quantpref.card, "write_json", full)
    with pytest.raises(OSError, match="No space left"):
        main(Ratings(tmp_path / "mine.jsonl", ratings=dump[0], movies=dump[1]))
    assert list(tmp_path.iterdir()) == []


def cut(text: str) -> str:
    return text[: text.rindex("::") - 2]


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (cut, "line 840: '60::"),
        (lambda t: t.replace("::", "|"), "line 1: expected user::film::rating::time or a CSV header"),
        (lambda t: t.replace("\n2::", "\n2:", 1), "line 15: expected user::film::rating::time, found '2:"),
        (lambda t: t + "7::99::5::1000\n", "line 841: film 99 is not in the movies file"),
        (lambda t: t + "7::9::5::-1000\n", "line 841: time -1000 is negative; give Unix seconds"),
        (lambda t: t + "7::9::6::1000\n", "line 841: rating 6 is above 5, the scale of most ratings"),
        (lambda t: "", "line 1: expected user::film::rating::time or a CSV header"),
        (None, "cannot be read (Is a directory)"),
    ],
    ids=["cut", "separator", "one separator", "film", "time", "rating", "empty", "folder"],
)
def test_wrong_ratings_are_one_line_and_leave_nothing(dump, tmp_path, damage, said):
    ratings, out = tmp_path / "ratings.dat", tmp_path / "out" / "mine.jsonl"
    if damage is None:
        ratings.mkdir()
    else:
        ratings.write_text(damage(dump[0].read_text()))
    text = from_dump((ratings, dump[1]), out, status=2)
    assert text.startswith(f"error: {ratings}") and said in text
    assert not out.parent.exists()
