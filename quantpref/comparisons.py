"""Comparisons: who watched what, two candidates, and which of them the user preferred.

Read from the JSONL format of data/README.md by a reader that says file and line of anything wrong.
"""

import codecs
import hashlib
import json
import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from quantpref.runs import UserError, atomic_file, sha256

Label = Literal["A", "B"]
NO_GENRES = "no genres listed"  # MovieLens' own words for a film without genres

INSTRUCTION = "Given the user's viewing history, decide which of the two movies the user would prefer."

_FILM = re.compile(r"(?P<title>\S.*?) \((?P<year>[1-9][0-9]{3})\)")
_HISTORY_BOUNDARY = re.compile(r"(?<=\(\d{4}\)), ")
# Where the history may end: a full stop, a line break, or both stand before "Option A: ".
_OPTION_A = re.compile(r"\s*(?:\.\s+|\.?\s*\n\s*)Option A: ")
_OPTION_B = re.compile(r"(?<=\s)Option B: ")
_OPTION = re.compile(r"(?P<title>\S.*) \((?P<year>[1-9][0-9]{3})\) \((?P<genres>[^()]+)\)\.?\s*")
_LABEL = re.compile(r"Option ([AB])\b")
_SURROGATE = re.compile("[\ud800-\udfff]")
_PLAIN_INTEGER = re.compile(r"0|[1-9][0-9]{0,17}")


@dataclass(frozen=True, slots=True)
class Movie:
    """A film as the text shows it. Films in a history carry no genres: the text does not show them."""

    title: str
    year: int
    genres: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.title} ({self.year})"

    @property
    def genre_text(self) -> str:
        return "|".join(self.genres) or NO_GENRES


@dataclass(frozen=True, slots=True)
class Comparison:
    """One user's history, oldest film first, two candidates, and the label of the preferred one."""

    history: tuple[Movie, ...]
    option_a: Movie
    option_b: Movie
    label: Label
    user: str | None = None
    time: int | None = None  # Unix seconds of the preferred film's rating
    line: int = 0  # in its data file, from 1; 0 for one that came from no file
    instruction: str = INSTRUCTION

    @property
    def preferred(self) -> Movie:
        return self.option_a if self.label == "A" else self.option_b

    @property
    def other(self) -> Movie:
        return self.option_b if self.label == "A" else self.option_a

    @property
    def cluster(self) -> str:
        """The user; without one, the line stands for a user of its own."""
        return self.user if self.user is not None else f"line {self.line}"

    @property
    def key(self) -> tuple[str, ...]:
        """What makes two rows the same comparison, in whichever order the candidates stand."""
        return (*map(str, self.history), "|", *sorted((str(self.option_a), str(self.option_b))))


@dataclass(frozen=True, slots=True)
class Split:
    """Line-disjoint and user-disjoint parts of one data file."""

    train: list[Comparison]
    validation: list[Comparison]
    test: list[Comparison]

    def manifest(self) -> dict[str, Any]:
        """Counts and hashes: two runs used the same split exactly when these are equal."""
        return {
            name: {"comparisons": len(part), "users": len({c.cluster for c in part}), "sha256": fingerprint(part)}
            for name, part in (("train", self.train), ("validation", self.validation), ("test", self.test))
        }  # fmt: skip


def flip(comparison: Comparison) -> Comparison:
    """The same comparison with the candidates exchanged, and so the label."""
    return replace(
        comparison,
        option_a=comparison.option_b,
        option_b=comparison.option_a,
        label="B" if comparison.label == "A" else "A",
    )


def with_preferred_first(comparison: Comparison, first: bool) -> Comparison:
    return comparison if (comparison.label == "A") == first else flip(comparison)


def counterbalance(comparisons: Sequence[Comparison], seed: int) -> list[Comparison]:
    """Show the preferred film first in exactly half of the rows (one more or less if odd), seeded."""
    rng = random.Random(f"orders {seed}")  # noqa: S311 - an experiment's seed, not a secret
    extra = rng.random() < 0.5
    first = [i < (len(comparisons) + extra) // 2 for i in range(len(comparisons))]
    rng.shuffle(first)
    return [with_preferred_first(c, f) for c, f in zip(comparisons, first, strict=True)]


def split_by_user(comparisons: Sequence[Comparison], train: float, validation: float, seed: int) -> Split:
    """Divide the users at random: shares `train` and `validation`, the rest for the test.

    Depends on the set of users and the seed alone, not on the order of the lines.
    """
    users = sorted({c.cluster for c in comparisons})
    random.Random(f"split {seed}").shuffle(users)  # noqa: S311
    first, second = round(len(users) * train), round(len(users) * (train + validation))
    part_of = {user: (i >= first) + (i >= second) for i, user in enumerate(users)}
    parts: tuple[list[Comparison], list[Comparison], list[Comparison]] = ([], [], [])
    for comparison in comparisons:
        parts[part_of[comparison.cluster]].append(comparison)
    if not all(parts):
        raise UserError(
            f"{len(users)} user(s) cannot be split into train, validation and test; bring more users, or change"
            " --train-fraction and --validation-fraction"
        )
    return Split(*parts)


def fingerprint(comparisons: Iterable[Comparison]) -> str:
    """SHA-256 over the comparisons' content, whatever their order and that of their candidates."""
    digest = hashlib.sha256()
    for row in sorted(
        "\x1f".join((c.cluster, *c.key, str(c.preferred), c.preferred.genre_text, c.other.genre_text))
        for c in comparisons
    ):
        digest.update(row.encode() + b"\n")
    return digest.hexdigest()


def load(path: Path) -> list[Comparison]:
    """Read a JSONL file of comparisons, each line checked.

    Raises:
        UserError: the file, its line and what is wrong there.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give a file with --data") from None
    lines[0] = lines[0].removeprefix(codecs.BOM_UTF8)  # Windows editors put one there
    if lines[-1] == b"":
        lines.pop()
    if not lines:
        raise UserError(f"{path}: the file is empty; it needs one comparison a line")
    comparisons = []
    for number, line in enumerate(lines, start=1):
        try:
            comparisons.append(parse_line(line, number))
        except ValueError as error:
            raise UserError(f"{path}, line {number}: {error}") from None
    return comparisons


def parse_line(line: bytes, number: int) -> Comparison:
    """One JSONL line as a comparison; a ValueError says what is wrong with it and what to do."""
    if not line.strip():
        raise ValueError("blank; remove the line, one comparison a line")
    try:
        row = json.loads(line.decode("utf-8"), parse_constant=_no_constant, object_pairs_hook=_no_repetition)
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 (byte {error.start + 1}); save the file as UTF-8") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg} at column {error.colno}); one object a line") from None
    except RecursionError:
        raise ValueError("not JSON of ours (nested too deeply); one flat object a line") from None
    if not isinstance(row, dict):
        raise ValueError(f"a JSON object was expected, found {type(row).__name__}; one object a line")
    instruction, text, output = (_text_field(row, name) for name in ("instruction", "input", "output"))
    label = _LABEL.search(output)
    if label is None:
        raise ValueError(f'"output" names neither "Option A" nor "Option B": {output[:60]!r}; add the label')
    history, option_a, option_b = parse_input(text)
    comparison = Comparison(
        history=history,
        option_a=option_a,
        option_b=option_b,
        label="A" if label[1] == "A" else "B",
        user=_user_field(row),
        time=_time_field(row),
        line=number,
        instruction=instruction,
    )
    _check_films(comparison)
    return comparison


def parse_input(text: str) -> tuple[tuple[Movie, ...], Movie, Movie]:
    """Split `History: ... . Option A: ... . Option B: ... .` into films.

    Titles may hold commas, colons, parentheses, full stops, even "Option A:"; so every reading is
    tried, and a text that can be read in no way or in two ways is a ValueError.
    """
    if not text.startswith("History: "):
        raise ValueError(f'"input" must start with "History: ", found {text[:40]!r}')
    readings = []
    for a in _OPTION_A.finditer(text):
        history = _parse_history(text[len("History: ") : a.start()])
        for b in _OPTION_B.finditer(text, a.end()) if history else ():
            option_a = _parse_option(text[a.end() : b.start()])
            option_b = _parse_option(text[b.end() :])
            if option_a and option_b:
                readings.append((history, option_a, option_b))
    if len(readings) == 1:
        return readings[0]
    found = "cannot be read" if not readings else f"can be read in {len(readings)} ways"
    raise ValueError(
        f'"input" {found} as "History: TITLE (YEAR), ... . Option A: TITLE (YEAR) (Genre|Genre). Option B: TITLE'
        f' (YEAR) (Genre|Genre).": {text[-90:]!r}; correct the line'
    )


def _parse_history(text: str) -> tuple[Movie, ...]:
    films = [_parse_film(part) for part in _HISTORY_BOUNDARY.split(text)]
    return tuple(film for film in films if film) if all(films) else ()


# A file of 200,000 lines names few thousand films: reading each once makes `load` twice as fast and a third as large.
@lru_cache(maxsize=2**17)
def _parse_film(text: str) -> Movie | None:
    film = _FILM.fullmatch(text)
    return Movie(film["title"], int(film["year"])) if film else None


@lru_cache(maxsize=2**17)
def _parse_option(text: str) -> Movie | None:
    option = _OPTION.fullmatch(text)
    if option is None:
        return None
    genres = () if option["genres"] == NO_GENRES else tuple(option["genres"].split("|"))
    return Movie(option["title"], int(option["year"]), genres)


def _check_films(comparison: Comparison) -> None:
    if str(comparison.option_a) == str(comparison.option_b):
        raise ValueError(f"both options are {comparison.option_a}; a comparison needs two films; correct the line")
    seen = set(map(str, comparison.history))
    if len(seen) < len(comparison.history):
        raise ValueError("a film stands twice in the history; remove the repetition")
    for movie in (comparison.option_a, comparison.option_b):
        if str(movie) in seen:
            raise ValueError(
                f"{movie} is an option and in the history; the answer would be given away; remove the line"
            )
        if len(set(movie.genres)) < len(movie.genres) or not all(g.strip() == g != "" for g in movie.genres):
            raise ValueError(f"{movie}: genres {movie.genre_text!r} are empty or repeated; correct them")


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON; use a number or leave the field out")


def _no_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f'field "{twice}" stands twice; keep one')
    return row


def _text_field(row: dict[str, Any], name: str) -> str:
    value = row.get(name)
    if not isinstance(value, str) or (name != "instruction" and not value.strip()):
        found = "missing" if name not in row else f"{value!r:.40}"
        raise ValueError(f'field "{name}" must be a text, found {found}; correct the line')
    return _whole_characters(name, value)


def _whole_characters(name: str, text: str) -> str:
    """Refuse half of a surrogate pair (an escape such as \\ud83d alone): no tokenizer or file can hold it."""
    if _SURROGATE.search(text):
        raise ValueError(f'field "{name}" holds half a character (a lone surrogate escape); correct the line')
    return text


def _user_field(row: dict[str, Any]) -> str | None:
    if "user" not in row:
        return None
    user = row["user"]
    if isinstance(user, bool) or not isinstance(user, str | int) or user == "":
        raise ValueError(f'field "user" must be a text or an integer, found {user!r:.40}; correct or leave it out')
    return _whole_characters("user", str(user))


def _time_field(row: dict[str, Any]) -> int | None:
    if "time" not in row:
        return None
    time = row["time"]
    if isinstance(time, bool) or not isinstance(time, int) or time < 0:
        raise ValueError(
            f'field "time" must be Unix seconds (an integer >= 0), found {time!r:.40}; correct or leave it out'
        )
    return time


def save(path: Path, comparisons: Iterable[Comparison]) -> str:
    """Write comparisons as JSONL, atomically; returns the file's SHA-256.

    Raises:
        UserError: a comparison that `load` would refuse or read as another one, such as a title "A (1999), B".
    """
    from quantpref.prompts import input_text, response

    with atomic_file(path) as temporary, temporary.open("wb") as file:
        for number, c in enumerate(comparisons, start=1):
            row: dict[str, Any] = {
                "instruction": c.instruction,
                "input": input_text(c),
                "output": response(c, c.label),
            }
            if c.user is not None:
                row["user"] = int(c.user) if _PLAIN_INTEGER.fullmatch(c.user) else c.user
            if c.time is not None:
                row["time"] = c.time
            try:
                line = json.dumps(row, ensure_ascii=False).encode()
                if parse_line(line, c.line) != c:
                    raise ValueError("it would be read back as another comparison; change its titles or genres")
            except ValueError as error:
                raise UserError(f"{path}, line {number}: cannot be saved: {error}") from None
            file.write(line + b"\n")
    return sha256(path)
