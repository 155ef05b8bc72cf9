"""Damaged input files, and independent readers that say what such a file means, if it means anything."""

import json
import random
import re
import signal
from contextlib import contextmanager
from pathlib import Path

from quantpref.comparisons import Comparison, load
from quantpref.dumps import read_ratings
from quantpref.ratings import Options, build
from quantpref.runs import UserError
from quantpref.titles import read_movies

HANG_SECONDS = 60  # for a file of a few lines: a guard against an endless loop, no measure of speed
PIECES = [
    b"\n", b"\r\n", b"\r", b" ", b"\x00", b"\xff", b"\xef\xbb\xbf", b'"', b"\\", b",", b":", b"::", b"|", b"(", b")",
    b".", b"Option A: ", b"Option B: ", b"Option A", b"Option B", b" (1999)", b" (0999)", b", ", b". ", b"History: ",
    b"NaN", b"Infinity", b"null", b"true", b"1e999", b"-1", b"[", b"]", b"{", b"}", b"\\ud83d", b"\\u0041",
    "é".encode(), "١٩٩٩".encode(), b"\xc2\xa0", b"\xe2\x80\xa8", b"userId,movieId", b"0", b"9", b"::5::",
    b"no genres listed",
]  # fmt: skip


def mutated(content: bytes, rng: random.Random) -> bytes:
    """`content` after one to four small accidents: bits, bytes and pieces changed, lost, repeated or moved."""
    for _ in range(rng.choice((1, 1, 2, 4))):
        at = rng.randrange(len(content) + 1)
        to = min(len(content), at + rng.choice((0, 1, 2, 5, 20, 200)))
        kind = rng.randrange(9)
        if kind == 0 and at < len(content):
            content = content[:at] + bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1 :]
        elif kind == 1:
            content = content[:at] + content[to:]
        elif kind == 2:
            content = content[:at] + rng.choice(PIECES) + content[at:]
        elif kind == 3:
            content = content[:at] + rng.choice(PIECES) + content[to:]
        elif kind == 4:
            content = content[:to] + content[at:to] + content[to:]
        elif kind == 5:
            content = content[:at] if rng.random() < 0.3 else content
        elif kind == 6:
            lines = content.split(b"\n")
            one, other = rng.randrange(len(lines)), rng.randrange(len(lines))
            lines[one], lines[other] = lines[other], lines[one]
            content = b"\n".join(lines)
        elif kind == 7:
            old, new = rng.choice(PIECES), rng.choice(PIECES)
            content = content.replace(old, new, rng.choice((1, -1)))
        else:
            content = _other_field(content, rng)
    return content


def _other_field(content: bytes, rng: random.Random) -> bytes:
    """A JSON line with a field lost, renamed, of another type or twice; other content stays as it is."""
    lines = content.split(b"\n")
    which = rng.randrange(len(lines))
    try:
        row = json.loads(lines[which])
        name = rng.choice(sorted(row))
    except (ValueError, IndexError, TypeError):
        return content
    value = row[name]
    if rng.random() < 0.25:
        del row[name]
    elif rng.random() < 0.3:
        row[name.upper()] = row.pop(name)
    else:
        row[name] = rng.choice((None, 0, -1, 1.5, True, [], {}, "", " ", [value], str(value) * 2, 10**30))
    lines[which] = json.dumps(row, ensure_ascii=rng.random() < 0.5).encode(errors="surrogatepass")
    return b"\n".join(lines)


@contextmanager
def no_hang():
    def late(*_):
        raise AssertionError(f"still reading after {HANG_SECONDS} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(HANG_SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


# --- comparisons -------------------------------------------------------------------------------------


def accepted_comparisons(path: Path) -> bool:
    """Load; False where the file is refused in the documented form, True where it is read as it stands."""
    try:
        with no_hang():
            found = load(path)
    except UserError as error:
        text = str(error)
        assert "\n" not in text and len(text) < 1000
        assert re.match(rf"{re.escape(str(path))}(, line \d+: |: the file is empty)", text), text
        return False
    lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    lines = lines[:-1] if lines[-1] == b"" else lines
    assert len(lines) == len(found)
    for number, (line, comparison) in enumerate(zip(lines, found, strict=True), start=1):
        assert comparison.line == number
        _same_meaning(json.loads(line.decode("utf-8")), comparison)
    return True


def _same_meaning(row: dict, c: Comparison) -> None:
    """Every letter of the input stands in the comparison, in its place; spaces and stops between films may differ."""
    assert all(isinstance(row[name], str) for name in ("instruction", "input", "output"))
    films = ", ".join(f"{m.title} ({m.year})" for m in c.history)
    options = [
        f"Option {label}: {m.title} ({m.year}) ({'|'.join(m.genres) or 'no genres listed'})"
        for label, m in (("A", c.option_a), ("B", c.option_b))
    ]
    text = f"History: {films}. {options[0]}. {options[1]}."
    assert re.sub(r"[\s.]", "", text) == re.sub(r"[\s.]", "", row["input"]), (text, row["input"])
    assert row["input"].startswith("History: ") and len(row["input"].split("Option A: ")) >= 2
    first = min((row["output"].find(f"Option {label}") % 10**9, label) for label in "AB")
    assert c.label == first[1] or re.search(rf"Option {first[1]}\w", row["output"])
    assert c.instruction == row["instruction"]
    assert c.user == (str(row["user"]) if "user" in row else None) and type(row.get("user", "")) in (str, int)
    assert c.time == row.get("time") and type(c.time) in (int, type(None))


OUR_NAMES = {"user": "userId", "film": "movieId", "time": "timestamp"}  # a header may use these too


# --- ratings -----------------------------------------------------------------------------------------


def accepted_ratings(ratings: Path, movies: Path) -> bool:
    """Build; False where one of the files is refused in the documented form, True where both are read as they stand."""
    try:
        with no_hang():
            comparisons = build(ratings, movies, Options(seed=1)).comparisons
            catalogue = read_movies(movies)
            table = read_ratings(ratings, catalogue.stands_for, any_scale=False).table
    except UserError as error:
        text = str(error)
        assert "\n" not in text and len(text) < 1000
        assert text.startswith((str(ratings), str(movies))), text
        whole_file = ("no ratings in it", "no film with a title", "no comparison can be made", "can be read; fetch")
        assert re.search(r", line \d+: ", text) or any(words in text for words in whole_file), text
        return False
    rows = [tuple(row) for row in table.select("user", "film", "rating", "time").iter_rows()]
    assert rows == list(_plain_ratings(ratings))
    titles = movies.read_bytes().decode("utf-8", errors="replace")
    titles += movies.read_bytes().decode("latin-1")
    for comparison in comparisons:
        for film in (*comparison.history, comparison.option_a, comparison.option_b):
            assert f"({film.year})" in titles
    return True


def _plain_ratings(path: Path):
    """User, film, rating and time of each line, by split and int alone; blanks and stray returns mean nothing."""
    lines = path.read_bytes().decode("utf-8-sig", errors="replace").replace("\r", "").split("\n")
    columns = ["userId", "movieId", "rating", "timestamp"]
    if "::" not in lines[0]:
        columns = [OUR_NAMES.get(name, name) for name in (n.strip(' "') for n in lines.pop(0).split(","))]
        separator = ","
    else:
        separator = "::"
    for line in lines:
        if line.strip():
            row = dict(zip(columns, (cell.strip() for cell in line.split(separator)), strict=False))
            assert len(line.split(separator)) <= len(columns)
            assert re.fullmatch(r"\d+", row["userId"], re.ASCII) and re.fullmatch(r"\d+", row["timestamp"], re.ASCII)
            yield int(row["userId"]), int(row["movieId"]), float(row["rating"]), int(row["timestamp"])
