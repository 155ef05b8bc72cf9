"""comparisons.py: awkward titles, wrong files, orders and splits."""

import json
import random
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from quantpref.comparisons import (
    NO_GENRES,
    Comparison,
    Movie,
    counterbalance,
    fingerprint,
    flip,
    load,
    parse_input,
    save,
    split_by_user,
    with_preferred_first,
)
from quantpref.prompts import chosen, input_text, rejected
from quantpref.runs import UserError

ROOT = Path(__file__).resolve().parent.parent
AWKWARD = [
    Movie("Se7en (a.k.a. Seven)", 1995),
    Movie("E.T. the Extra-Terrestrial", 1982),
    Movie("Option A: The Movie", 1999),
    Movie("Option B: The Return", 2001),
    Movie("10,000 BC", 2008),
    Movie("Good Night, and Good Luck.", 2005),
    Movie("Amélie (Le fabuleux destin d'Amélie Poulain)", 2001),
    Movie("七人の侍", 1954),
    Movie("1984", 1984),
    Movie('"Crocodile" Dundee \\ {0}', 1986),
    Movie("History: The End", 1990),
    Movie("Dr. Strangelove or: How I Learned to Stop Worrying", 1964),
]  # fmt: skip
PLAIN = [Movie(f"Plain {i}", 1970 + i) for i in range(12)]
FIVE = "Heat (1995), Alien (1979), Big (1988), Jaws (1975), Rocky (1976)"
ROW = {
    "instruction": "Which one?",
    "input": f"History: {FIVE}. Option A: Fargo (1996) (Crime|Drama). Option B: Babe (1995) (Comedy).",
    "output": "The better recommendation is Option A. Reasoning: ...",
}


def write(path: Path, *rows: dict | str | bytes, end: bytes = b"\n") -> Path:
    lines = [
        row if isinstance(row, bytes) else (row if isinstance(row, str) else json.dumps(row)).encode() for row in rows
    ]
    path.write_bytes(b"".join(line + end for line in lines))
    return path


# Titles


@pytest.mark.parametrize("title", AWKWARD, ids=lambda movie: re.sub("[^A-Za-z0-9]+", "-", str(movie)))
@pytest.mark.parametrize("place", ["first", "middle", "last", "a", "b"])
def test_awkward_titles_are_read_wherever_they_stand(tmp_path, title, place):
    history, a, b = PLAIN[:5], replace(PLAIN[5], genres=("Drama",)), replace(PLAIN[6], genres=("Comedy", "War"))
    if place in ("a", "b"):
        option = replace(title, genres=("Film-Noir", "Sci-Fi"))
        a, b = (option, b) if place == "a" else (a, option)
    else:
        history[{"first": 0, "middle": 2, "last": 4}[place]] = title
    made = Comparison(tuple(history), a, b, "B", user="7", time=12, line=1)
    save(tmp_path / "x.jsonl", [made])
    assert load(tmp_path / "x.jsonl") == [made]


def test_awkward_titles_all_at_once():
    films = [replace(film, genres=("Drama", NO_GENRES)) for film in AWKWARD]
    for a, b in ((films[2], films[3]), (films[3], films[2]), (films[0], films[1]), (films[5], films[10])):
        history = tuple(film for film in AWKWARD if str(film) not in (str(a), str(b)))
        assert parse_input(input_text(Comparison(history, a, b, "A"))) == (history, a, b)


@pytest.mark.parametrize(
    "text",
    [
        f"History: {FIVE}.\nOption A: Fargo (1996) (Crime|Drama).\nOption B: Babe (1995) (Comedy).",
        f"History: {FIVE}\nOption A: Fargo (1996) (Crime|Drama)\nOption B: Babe (1995) (Comedy)",
        f"History: {FIVE}.\r\n\r\nOption A: Fargo (1996) (Crime|Drama).\r\nOption B: Babe (1995) (Comedy).\r\n",
        f"History: {FIVE} .  Option A: Fargo (1996) (Crime|Drama).   Option B: Babe (1995) (Comedy). ",
    ],
)
def test_newlines_before_the_options(text):
    assert parse_input(text) == parse_input(ROW["input"])
    history, a, b = parse_input(text)
    assert ", ".join(map(str, history)) == FIVE
    assert (a, b) == (Movie("Fargo", 1996, ("Crime", "Drama")), Movie("Babe", 1995, ("Comedy",)))


@pytest.mark.parametrize(
    "text",
    [
        ROW["input"].replace("History: ", "Watched: "),
        ROW["input"].replace(" (1976)", ""),
        ROW["input"].replace(FIVE, ""),
        ROW["input"].replace("Option A:", "Option C:"),
        ROW["input"].replace("Option B:", "Option C:"),
        ROW["input"].replace(" (Comedy)", ""),
        ROW["input"].replace("(1995) (Comedy)", "(95) (Comedy)"),
        ROW["input"].replace("(Comedy)", "(Com(edy))"),
        ROW["input"].replace("Jaws", "Ja\nws"),
        # Two readings: where the first candidate ends cannot be told.
        ROW["input"].replace("Babe", "X (1990) (War). Option B: Babe"),
    ],
)
def test_texts_that_have_no_single_reading_are_refused(tmp_path, text):
    path = write(tmp_path / "x.jsonl", ROW, {**ROW, "input": text})
    with pytest.raises(UserError, match=rf'^{re.escape(str(path))}, line 2: "input" .*History: '):
        load(path)


# Flip, and round trips


def test_flip_exchanges_label_and_options(comparisons):
    for c in comparisons(20):
        other = flip(c)
        assert (other.option_a, other.option_b) == (c.option_b, c.option_a)
        assert {other.label, c.label} == {"A", "B"}
        assert (other.preferred, other.other) == (c.preferred, c.other)
        assert (other.history, other.user, other.line, other.key) == (c.history, c.user, c.line, c.key)
        assert flip(other) == c
        assert chosen(other) != chosen(c) and rejected(other) != rejected(c)


def test_with_preferred_first(comparisons):
    for c in comparisons(20):
        assert with_preferred_first(c, True).option_a == c.preferred and with_preferred_first(c, True).label == "A"
        assert with_preferred_first(c, False).option_b == c.preferred and with_preferred_first(c, False).label == "B"


# What titles are made of here: pieces that the format itself uses, and any characters.
PIECES = st.sampled_from(
    [
        "(", ")", " (1999)", "(1999), ", ", ", ". ", "Option A: ", "Option B: ", ". Option A: ", "History: ",
        " ", "|", "(Drama)", "(Drama). Option B: ", "é", "侍", "\u2028", "\x85", "🎬", '"', "\\", "\ud800", "\udfff",
        "{", "T", "\x00", "\n", "\r", "٣",
    ]
)  # fmt: skip
TITLES = st.lists(PIECES | st.characters(), min_size=1, max_size=5).map("".join)
MOVIES = st.builds(Movie, TITLES, st.integers(1900, 2030) | st.integers(-5, 20_000))
GENRE_TEXTS = st.lists(st.sampled_from(["Drama", "Sci-Fi", NO_GENRES]) | TITLES, max_size=3).map(tuple)
OPTIONS = st.builds(Movie, TITLES, st.integers(1900, 2030), GENRE_TEXTS)
USERS = st.none() | st.integers(-(10**20), 10**20).map(str) | TITLES | st.sampled_from(["007", "²", "٣", "", "+1"])
ANY_COMPARISON = st.builds(
    Comparison,
    st.lists(MOVIES, max_size=4).map(tuple),
    OPTIONS,
    OPTIONS,
    st.sampled_from("AB"),
    USERS,
    st.none() | st.integers(-2, 2**40),
    st.just(1),
    st.just("Which one?") | TITLES,
)


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ANY_COMPARISON)
def test_what_is_saved_is_what_is_loaded_or_saving_refuses(tmp_path, made):
    path = tmp_path / "x.jsonl"
    path.unlink(missing_ok=True)
    try:
        save(path, [made])
    except UserError as error:
        assert str(error).startswith(f"{path}, line 1: cannot be saved: ")
        assert list(tmp_path.iterdir()) == []
    else:
        assert load(path) == [made]


NICE = st.text(st.characters(categories=["L", "N", "P", "S", "Zs"], exclude_characters="()"), min_size=1, max_size=12)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.tuples(NICE, st.integers(1000, 9999)), min_size=3, max_size=7, unique=True),
    st.permutations(["Drama", "Sci-Fi", "Children's", "Film-Noir", NO_GENRES]),
    st.sampled_from("AB"),
    st.none() | st.integers(0, 10**15).map(str),
)
def test_ordinary_titles_are_never_refused(tmp_path, films, genres, label, user):
    assume(all(title == title.strip() and ". Option" not in title for title, _ in films))
    movies = [Movie(*film) for film in films]
    a, b = replace(movies[0], genres=tuple(genres[:2])), replace(movies[1], genres=tuple(genres[2:]))
    made = Comparison(tuple(movies[2:]), a, b, label, user, line=1)
    save(tmp_path / "x.jsonl", [made])
    assert load(tmp_path / "x.jsonl") == [made]


@pytest.mark.parametrize(
    "change",
    [
        {"history": (Movie("A (1999), B", 2000),)},
        {"history": ()},
        {"history": (Movie("Fargo", 1996),)},
        {"option_a": Movie("Fargo", 996)},
        {"option_a": Movie("Fargo", 1996, ("Crime|Drama",))},
        {"option_a": Movie("Fargo", 1996, ("Crime)",))},
        {"option_a": Movie("Babe", 1995)},
        {"option_a": Movie("Far\ud800go", 1996)},
        {"user": ""},
        {"time": -1},
    ],
    ids=lambda change: next(iter(change)),
)
def test_saving_refuses_what_loading_would_change(tmp_path, change):
    good = Comparison((Movie("Heat", 1995),), Movie("Fargo", 1996), Movie("Babe", 1995), "A", line=1)
    save(tmp_path / "good.jsonl", [good])
    with pytest.raises(UserError, match=r"x\.jsonl, line 2: cannot be saved: "):
        save(tmp_path / "x.jsonl", [good, replace(good, **change)])
    assert [file.name for file in tmp_path.iterdir()] == ["good.jsonl"]


def test_users_and_times_keep_their_form_in_the_file(tmp_path):
    good = Comparison((Movie("Heat", 1995),), Movie("Fargo", 1996), Movie("Babe", 1995), "A", line=1)
    users = ["7", "007", "anna", "-3", None, "9" * 5000]
    save(tmp_path / "x.jsonl", [replace(good, user=user, time=9, line=i + 1) for i, user in enumerate(users)])
    rows = [json.loads(line) for line in (tmp_path / "x.jsonl").read_text().splitlines()]
    assert [row.get("user") for row in rows] == [7, "007", "anna", "-3", None, "9" * 5000]
    assert "user" not in rows[4] and rows[0]["time"] == 9
    assert [c.user for c in load(tmp_path / "x.jsonl")] == users


# Wrong files: (line 7, what the message says)


def without(name: str) -> dict:
    return {key: value for key, value in ROW.items() if key != name}


SAME_FILM = ROW["input"].replace("Fargo (1996)", "Babe (1995)")
WRONG = {
    "not JSON": (b'{"instruction": ', r"not JSON \(.* at column \d+\); one object a line"),
    "cut": (json.dumps(ROW).encode()[:90], r"not JSON"),
    "two objects": (json.dumps(ROW) + json.dumps(ROW), r"not JSON \(Extra data at column \d+\); one object a line"),
    "blank": (b"", "blank; remove the line"),
    "only spaces": (b"  \t\r", "blank; remove the line"),
    "an array": ([1, 2], "a JSON object was expected, found list; one object a line"),
    "a number": (b"7", "a JSON object was expected, found int"),
    "too deep": (b"[" * 100_000, "nested too deeply"),
    "no instruction": (without("instruction"), 'field "instruction" must be a text, found missing; correct'),
    "no input": (without("input"), 'field "input" must be a text, found missing; correct the line'),
    "no output": (without("output"), 'field "output" must be a text, found missing; correct the line'),
    "empty output": ({**ROW, "output": " "}, 'field "output" must be a text'),
    "null": ({**ROW, "output": None}, 'field "output" must be a text, found None; correct the line'),
    "number for text": ({**ROW, "input": 5}, 'field "input" must be a text, found 5; correct the line'),
    "neither label": ({**ROW, "output": "Fargo, since ..."}, 'neither "Option A" nor "Option B".*; add the label'),
    "a longer word": ({**ROW, "output": "Option Alpha"}, 'neither "Option A" nor "Option B"'),
    "the same film": ({**ROW, "input": SAME_FILM}, r"both options are Babe \(1995\).*; correct the line"),
    "in history": ({**ROW, "input": ROW["input"].replace("Babe", "Heat")}, r"Heat \(1995\) is an option and in the"),
    "history twice": ({**ROW, "input": ROW["input"].replace("Alien (1979)", "Big (1988)")}, "a film stands twice"),
    "genre twice": ({**ROW, "input": ROW["input"].replace("Crime|Drama", "War|War")}, "empty or repeated; correct"),
    "genre empty": ({**ROW, "input": ROW["input"].replace("Crime|Drama", "War|")}, "empty or repeated; correct"),
    "latin-1": ('{"input": "Amélie"}'.encode("latin-1"), r"not UTF-8 \(byte 14\); save the file as UTF-8"),
    "UTF-16": (json.dumps(ROW).encode("utf-16"), "not UTF-8"),
    "half a character": ({**ROW, "input": ROW["input"].replace("Jaws", "Ja\ud83dws")}, "half a character.*; correct"),
    "half a user": ({**ROW, "user": "\udc00"}, 'field "user" holds half a character.*; correct'),
    "NaN": ({**ROW, "time": float("nan")}, "NaN is not JSON; use a number or leave the field out"),
    "Infinity": ({**ROW, "other": float("-inf")}, "-Infinity is not JSON; use a number or leave the field out"),
    "user twice": (b'{"user": 1, ' + json.dumps(ROW | {"user": 2}).encode()[1:], 'field "user" stands twice; keep one'),
    "user true": ({**ROW, "user": True}, 'field "user" must be a text or an integer, found True; correct'),
    "user 1.5": ({**ROW, "user": 1.5}, 'field "user" must be a text or an integer, found 1.5'),
    "user null": ({**ROW, "user": None}, 'field "user" must be a text or an integer, found None'),
    "user empty": ({**ROW, "user": ""}, 'field "user" must be a text or an integer'),
    "time text": ({**ROW, "time": "noon"}, r'field "time" must be Unix seconds .*, found \'noon\'; correct'),
    "time true": ({**ROW, "time": True}, 'field "time" must be Unix seconds'),
    "time negative": ({**ROW, "time": -1}, 'field "time" must be Unix seconds'),
    "time fraction": ({**ROW, "time": 1.5}, 'field "time" must be Unix seconds'),
    "huge number": (b'{"user": ' + b"1" * 5000 + b"}", "integer"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_lines_are_named(tmp_path, name):
    wrong, message = WRONG[name]
    wrong = wrong if isinstance(wrong, str | bytes) else json.dumps(wrong)
    path = write(tmp_path / "mine.jsonl", *[ROW] * 6, wrong, ROW)
    with pytest.raises(UserError, match=rf"(?s)^{re.escape(str(path))}, line 7: .*{message}") as error:
        load(path)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500 + len(str(path))
    assert error.value.__cause__ is None and error.value.__suppress_context__


def test_wrong_files_are_named(tmp_path, comparisons):
    with pytest.raises(UserError, match=r"empty\.jsonl: the file is empty; it needs one comparison a line"):
        load(write(tmp_path / "empty.jsonl"))
    with pytest.raises(UserError, match=r"gone\.jsonl: cannot be read \(No such file.*; give a file with --data"):
        load(tmp_path / "gone.jsonl")
    with pytest.raises(UserError, match=r"cannot be read \(Is a directory"):
        load(tmp_path)
    with pytest.raises(UserError, match=r"1 user\(s\) cannot be split.*; bring more users, or change --train-fraction"):
        split_by_user(comparisons(30, rows_per_user=30), 0.7, 0.1, 3407)


def test_a_wrong_file_is_one_line_on_stderr(tmp_path):
    path = write(tmp_path / "mine.jsonl", *[ROW] * 6, b"{", ROW)
    command = [sys.executable, "train_dpo.py", "--preset", "tiny", "--data", path, "--output-dir", tmp_path / "out"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 2
    assert re.fullmatch(rf"error: {re.escape(str(path))}, line 7: not JSON .*; one object a line\n", ended.stderr)
    assert not (tmp_path / "out").exists()


def test_windows_files_load(tmp_path):
    expected = load(write(tmp_path / "unix.jsonl", ROW, ROW))
    assert load(write(tmp_path / "crlf.jsonl", ROW, ROW, end=b"\r\n")) == expected
    with_mark = tmp_path / "bom.jsonl"
    with_mark.write_bytes(b"\xef\xbb\xbf" + (tmp_path / "crlf.jsonl").read_bytes())
    assert load(with_mark) == expected
    no_last_newline = tmp_path / "cut.jsonl"
    no_last_newline.write_bytes((tmp_path / "unix.jsonl").read_bytes()[:-1])
    assert load(no_last_newline) == expected


def test_a_byte_order_mark_elsewhere_is_refused(tmp_path):
    path = write(tmp_path / "x.jsonl", ROW, b"\xef\xbb\xbf" + json.dumps(ROW).encode())
    with pytest.raises(UserError, match="line 2: not JSON"):
        load(path)


@pytest.mark.parametrize(
    ("output", "label"),
    [
        ("Option B", "B"),
        ("I recommend Option A because Option B is too long.", "A"),
        ("**Option B**: the user likes crime, unlike Option A.", "B"),
        ("The better recommendation is Option B. Reasoning: Option A ...", "B"),
        ("Optional: Option Alpha aside, Option B.", "B"),
        ("答えは Option A です", "A"),
    ],
)
def test_other_wordings_load_where_the_label_stands_first(tmp_path, output, label):
    (found,) = load(write(tmp_path / "x.jsonl", {**ROW, "output": output, "extra": [1.5, None]}))
    assert found.label == label
    assert found.preferred.title == {"A": "Fargo", "B": "Babe"}[label]
    assert found.instruction == "Which one?"


# Orders


@pytest.mark.parametrize("n", [1, 2, 7, 100, 101])
def test_counterbalance_is_exactly_half(comparisons, n):
    rows = comparisons(n)
    sizes = set()
    for seed in range(12):
        balanced = counterbalance(rows, seed)
        sizes.add(sum(c.label == "A" for c in balanced))
        assert [c.key for c in balanced] == [c.key for c in rows]
        assert [c.preferred for c in balanced] == [c.preferred for c in rows]
        assert balanced == counterbalance(rows, seed)
        # Neither the order nor the label that the file has tells where the preferred film comes to stand.
        assert balanced == counterbalance([flip(c) for c in rows], seed)
        assert balanced == counterbalance([with_preferred_first(c, True) for c in rows], seed)
    assert sizes == ({n // 2} if n % 2 == 0 else {n // 2, n // 2 + 1})


def test_counterbalance_by_another_seed_is_another(comparisons):
    rows = comparisons(40)
    assert len({tuple(c.label for c in counterbalance(rows, seed)) for seed in range(20)}) == 20


# Split


@pytest.mark.parametrize("n_users", [10, 11, 37, 203])
@pytest.mark.parametrize(("train", "validation"), [(0.7, 0.1), (0.5, 0.25), (0.6, 0.2)])
def test_split_is_by_user(comparisons, n_users, train, validation):
    rows = comparisons(3 * n_users, rows_per_user=3)
    split = split_by_user(rows, train, validation, 3407)
    parts = (split.train, split.validation, split.test)
    users = [{c.user for c in part} for part in parts]
    assert sum(map(len, users)) == len(set.union(*users)) == n_users
    assert Counter(c.line for part in parts for c in part) == Counter(c.line for c in rows)
    for found, share in zip(users, (train, validation, 1 - train - validation), strict=True):
        assert abs(len(found) - share * n_users) <= 1
    shuffled = random.Random(1).sample(rows, len(rows))
    again = split_by_user(shuffled, train, validation, 3407)
    assert [{c.user for c in part} for part in (again.train, again.validation, again.test)] == users
    assert again.manifest() == split.manifest()
    assert split_by_user(rows, train, validation, 3407) == split
    other = split_by_user(rows, train, validation, 3408)
    assert {c.user for c in other.test} != users[2] and other.manifest() != split.manifest()
    assert split.manifest()["test"] == {
        "comparisons": 3 * len(users[2]), "users": len(users[2]), "sha256": fingerprint(split.test)
    }  # fmt: skip


def test_split_does_not_depend_on_hash_seeds():
    """The same users in another process, whose sets have another order."""
    program = (
        "from quantpref.comparisons import *; m = Movie('A', 2000)\n"
        "rows = [Comparison((m,), m, m, 'A', str(i)) for i in range(50)]\n"
        "print([c.user for c in split_by_user(rows, 0.7, 0.1, 1).test])"
    )
    runs = [
        subprocess.run(
            [sys.executable, "-c", program], cwd=ROOT, env={"PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in ("1", "2")
    ]
    assert runs[0] == runs[1] and len(runs[0]) > 40


@pytest.mark.parametrize("n_users", [1, 2, 3])
def test_too_few_users_to_split(comparisons, n_users):
    with pytest.raises(UserError, match=rf"^{n_users} user\(s\) cannot be split"):
        split_by_user(comparisons(n_users), 0.7, 0.1, 3407)


# Fingerprint


def test_fingerprint_ignores_orders_only(comparisons):
    rows = comparisons(12, rows_per_user=2)
    expected = fingerprint(rows)
    assert fingerprint(rows[::-1]) == expected
    assert fingerprint([flip(c) for c in rows]) == expected
    assert fingerprint([*rows[:3], flip(rows[3]), *rows[4:]]) == expected
    assert fingerprint([replace(c, line=0, instruction="another", time=5) for c in rows]) == expected
    row = rows[3]
    changed = [
        replace(row, label="A"),  # the other film is preferred
        replace(row, user="99"),
        replace(row, user=None),
        replace(row, history=row.history[::-1]),
        replace(row, option_a=replace(row.option_a, year=1900)),
        replace(row, option_b=replace(row.option_b, title="Another")),
        replace(row, option_b=replace(row.option_b, genres=("Drama",))),
        replace(row, option_a=replace(row.option_a, genres=row.option_b.genres), option_b=row.option_b),
    ]
    fingerprints = [fingerprint([*rows[:3], c, *rows[4:]]) for c in changed]
    # Where both films have the same genres the label alone still counts.
    alike = replace(row, option_a=replace(row.option_a, genres=row.option_b.genres))
    assert fingerprint([alike]) != fingerprint([replace(alike, label="A" if alike.label == "B" else "B")])
    assert len({expected, *fingerprints, fingerprint(rows[1:]), fingerprint([*rows, rows[0]])}) == len(changed) + 3


# The file that people bring


def test_the_file_that_people_bring(tmp_path, comparisons):
    """6,040 lines, "A" on every one, no user: it loads, is counterbalanced and splits by line."""
    shown = [with_preferred_first(c, True) for c in comparisons(6040, rows_per_user=0, films=70)]
    path = tmp_path / "contrastive_rec_train.jsonl"
    save(path, shown)
    assert {key for line in path.read_text().splitlines() for key in json.loads(line)} == {*ROW}
    rows = load(path)
    assert len(rows) == 6040 and {c.label for c in rows} == {"A"} and {c.user for c in rows} == {None}
    split = split_by_user(rows, 0.7, 0.1, 3407)
    assert [len(part) for part in (split.train, split.validation, split.test)] == [4228, 604, 1208]
    lines = [{c.line for c in part} for part in (split.train, split.validation, split.test)]
    assert set.union(*lines) == set(range(1, 6041))
    assert split.manifest()["train"]["users"] == 4228
    assert sum(c.label == "A" for c in counterbalance(split.train, 3407)) == 2114


# Found by mutation: changes that no test above noticed.


def test_the_first_second_of_1970_and_no_instruction_are_fine(tmp_path):
    [made] = load(write(tmp_path / "x.jsonl", {**ROW, "time": 0, "instruction": ""}))
    assert (made.time, made.instruction) == (0, "")


def test_the_reason_and_the_field_are_named(tmp_path):
    two_ways = "History: Heat (1995). Option A: X (1990) (Drama). Option B: Y (1991) (War). Option B: Z (1992) (War)."
    for row, said in (
        ({**ROW, "input": "History: Heat (1995). Option A: X."}, '"input" cannot be read as'),
        ({**ROW, "input": two_ways}, '"input" can be read in 2 ways as'),
        ('{"instruction": "", "input": "", "output": "", "user": 1, "user": 2}', 'field "user" stands twice; keep one'),
    ):
        with pytest.raises(UserError, match=f"line 1: {re.escape(said)}"):
            load(write(tmp_path / "x.jsonl", row))
