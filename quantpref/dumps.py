"""The ratings file of a MovieLens or MovieTweetings dump as a table, and how such files divide.

Polars reads the ratings, since a dump may hold millions. It does not say where a line is wrong, so
a table that looks wrong sends a plain walk over the file to find the first line at fault.
"""

import os
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from quantpref.runs import UserError

# The CSV files' names for the columns, in the order of the files without a header.
RATING_COLUMNS = {"userId": "user", "movieId": "film", "rating": "rating", "timestamp": "time"}
TYPES = {"user": pl.Int64, "film": pl.Int64, "rating": pl.Float64, "time": pl.Int64}

SCALES = (5.0, 10.0, 100.0)
SCALE_SHARE = 0.75  # a rating above the scale of so many others is a mistake, not a larger scale

WHOLE_NUMBER = re.compile(r"[0-9]{1,18}")
_DECIMAL = re.compile(r"[0-9]+(\.[0-9]+)?")
CUT = "the file ends in the middle of this line; copy or fetch it again"


@dataclass(frozen=True, slots=True)
class Layout:
    """How lines divide: `::` without a header, or CSV with one; `columns` in the file's order."""

    separator: str
    columns: tuple[str, ...]

    @property
    def header_lines(self) -> int:
        return 1 if self.separator == "," else 0

    def wrong_fields(self, fields: list[str]) -> str:
        return (
            f"expected {self.separator.join(self.columns)}, found"
            f" {self.separator.join(fields)[:60]!r}; correct the line, or fetch the file again"
        )


@dataclass(frozen=True, slots=True)
class Ratings:
    """table: user, film, rating, time (Unix seconds), in the file's order; scale: its maximum."""

    table: pl.DataFrame
    scale: float
    layout: Layout


def find_layout(path: Path, first_line: str, columns: dict[str, str]) -> Layout:
    """Tell the layout by the first line; `columns` maps the CSV's names to ours."""
    names = tuple(columns.values())
    if "::" in first_line:
        return Layout("::", names)
    header = tuple(columns.get(name, name) for name in (cell.strip(' "\r\n') for cell in first_line.split(",")))
    if all(header.count(name) == 1 for name in names):
        return Layout(",", header)
    found = f"found {first_line.strip()[:60]!r}" if first_line.strip() else "found nothing"
    raise UserError(
        f"{path}, line 1: expected {'::'.join(names)} or a CSV header {','.join(columns)}, {found};"
        " give the right file, with that separator"
    )


def unreadable(path: Path, error: OSError) -> UserError:
    return UserError(f"{path}: cannot be read ({error.strerror}); give a file of the dump")


def read_ratings(path: Path, known_films: Collection[int], *, any_scale: bool) -> Ratings:
    """Read `ratings.dat` or `ratings.csv`.

    Args:
        known_films: the ids of the movies file; a rating of another film is an error.
        any_scale: take ratings above the scale of most others too, in place of an error.

    Raises:
        UserError: the file, its line, what was found there and what to do.
    """
    layout = find_layout(path, _first_line(path), RATING_COLUMNS)
    table = _scan(path, layout)
    scale = rating_scale(table["rating"])
    limit = float("inf") if any_scale or table.is_empty() else scale
    sound = pl.all_horizontal(
        pl.col("user") >= 0,
        pl.col("film").is_in(pl.Series(list(known_films), dtype=pl.Int64).implode()),
        pl.col("rating").is_finite() & pl.col("rating").is_between(0, limit),
        pl.col("time") >= 0,
        pl.col("whole"),
    ).fill_null(False)
    if table.is_empty() or not table.select(sound.all()).item():
        lines = _check_lines(path, layout, known_films, limit)
        table = table.drop_nulls()  # no line at fault: what stood out are empty lines
        if not lines:
            raise UserError(f"{path}: no ratings in it; give a whole file")
        if len(table) != lines:
            raise UserError(f"{path}: {len(table)} of {lines} ratings can be read; fetch it again")
    _refuse_cut_time(path, table["time"])
    return Ratings(table.drop("whole"), scale, layout)


def rating_scale(ratings: pl.Series) -> float:
    """The scale's maximum: 5, 10 or 100, the lowest that holds most; else the largest found."""
    found = ratings.drop_nulls()
    for scale in SCALES:
        if (found <= scale).sum() >= SCALE_SHARE * len(found):
            return scale
    return float(found.max())  # type: ignore[arg-type]


def _first_line(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return file.readline(10_000).decode("utf-8-sig", errors="replace")
    except OSError as error:
        raise unreadable(path, error) from None


def _scan(path: Path, layout: Layout) -> pl.DataFrame:
    """Every line, null where a field cannot be read; `whole`: nothing stands where it should not.

    Empty where polars gives up.
    """
    if layout.header_lines:
        names, between = list(layout.columns), []
    else:
        # Polars divides at one character: every second column, between two colons, stays empty.
        between = [f"after_{name}" for name in layout.columns]
        names = [name for pair in zip(layout.columns, between, strict=True) for name in pair]
    scan = pl.scan_csv(
        path,
        glob=False,
        has_header=False,
        skip_rows=layout.header_lines,
        separator=layout.separator[0],
        schema={name: TYPES.get(name, pl.String) for name in (*names, "rest")},
        quote_char=None,
        encoding="utf8-lossy",
        ignore_errors=True,
        missing_columns="insert",
    )
    whole = pl.all_horizontal(pl.col(*between, "rest").is_null()).alias("whole")
    try:
        return scan.select(*TYPES, whole).collect(engine="streaming")
    except pl.exceptions.PolarsError:
        return pl.DataFrame(schema=TYPES | {"whole": pl.Boolean})


def _check_lines(path: Path, layout: Layout, known_films: Collection[int], limit: float) -> int:
    """Walk over the file to its first line at fault, and raise; else the number of ratings."""
    lines = 0
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        for number, line in enumerate(file, start=1):
            if number <= layout.header_lines or not line.strip():
                continue
            lines += 1
            fields = line.rstrip("\n").split(layout.separator)
            fault = _fault(fields, layout, known_films, limit)
            if fault and len(fields) < len(layout.columns) and not line.endswith("\n"):
                fault = f"{line[:60]!r}: {CUT}"
            if fault:
                raise UserError(f"{path}, line {number}: {fault}")
    return lines


def _fault(fields: list[str], layout: Layout, known_films: Collection[int], limit: float) -> str | None:
    """What is wrong with one line of ratings, and what to do; None where nothing is."""
    if len(fields) != len(layout.columns):
        return layout.wrong_fields(fields)
    row = dict(zip(layout.columns, fields, strict=True))
    if row["time"].startswith("-") and WHOLE_NUMBER.fullmatch(row["time"][1:]):
        return f"time {row['time'][:40]} is negative; give Unix seconds"
    for name in ("user", "film", "time"):
        if not WHOLE_NUMBER.fullmatch(row[name]):
            return f"{name} {row[name][:40]!r} is not a whole number; correct the line"
    if not _DECIMAL.fullmatch(row["rating"]):
        return f"rating {row['rating'][:40]!r} is not a number from 0 up; correct the line"
    if float(row["rating"]) > limit:
        return (
            f"rating {row['rating'][:40]} is above {limit:g}, the scale of most ratings here;"
            " correct it, or say from where on a film is liked with --like-threshold"
        )
    if int(row["film"]) not in known_films:
        return f"film {row['film']} is not in the movies file; give that of the same dump"
    return None


def _refuse_cut_time(path: Path, times: pl.Series) -> None:
    """Without a last newline, a last time that lacks digits means a file cut inside of a line."""
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        if file.read(1) == b"\n" or len(times) < 2:
            return
    # A lost digit divides the time by ten; a true one is at most a few times another.
    last, earliest = times[-1], times[:-1].min()
    if last * 2 < earliest:
        with path.open("rb") as file:
            line = sum(1 for _ in file)
        raise UserError(f"{path}, line {line}: time {last} is far before all others: {CUT}")
