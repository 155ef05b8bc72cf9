"""The films of a MovieLens or MovieTweetings dump, their titles as people write them."""

import csv
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from quantpref.comparisons import NO_GENRES, Movie
from quantpref.dumps import CUT, WHOLE_NUMBER, Layout, find_layout, unreadable
from quantpref.runs import UserError

MOVIE_COLUMNS = {"movieId": "film", "title": "title", "genres": "genres"}

# MovieLens moves a leading article behind the name: "Matrix, The", "Enfer, L'", "Boot, Das".
_ARTICLES = (
    "The|An?|Le|La|Les|L'|Une?|El|Los|Las|Una|Unos|Unas|Il|Lo|I|Gli|Uno|Der|Die|Das|Den|Eine?"
    "|O|Os|As|Um|Uma|De|Het|Det|En|Ett"
)
# Other titles in parentheses may follow and stay as they are. The name's own parentheses must
# close, or an article inside of them would be taken.
_MOVED_ARTICLE = re.compile(rf"((?:[^()]|\([^()]*\))+), ({_ARTICLES})( \(.*\))?")
_YEAR = re.compile(r"(.*\S)\s*\(([1-9][0-9]{3})\)")
# In a history such a title would be read as two films, or as the end of the history.
_AMBIGUOUS = re.compile(r"\([0-9]{4}\), |Option [AB]: ")


@dataclass(frozen=True, slots=True)
class Catalogue:
    """The films of one file.

    movies: the films that can be shown, by id; of several ids with one "title (year)", the lowest.
    stands_for: each id of the file -> its id in `movies`; None for a film that cannot be shown.
    """

    movies: dict[int, Movie]
    stands_for: dict[int, int | None]
    layout: Layout
    encoding: str
    counts: dict[str, int]


def natural_title(title: str) -> str:
    """`Matrix, The` -> `The Matrix`; `Enfer, L' (a.k.a. Hell)` -> `L'Enfer (a.k.a. Hell)`."""
    match = _MOVED_ARTICLE.fullmatch(title)
    if not match:
        return title
    name, article, rest = match.groups()
    return f"{article}{'' if article.endswith(chr(39)) else ' '}{name}{rest or ''}"


def read_movies(path: Path) -> Catalogue:
    """Read `movies.dat` or `movies.csv`, as UTF-8 or else as latin-1.

    Raises:
        UserError: the file, its line, what was found there and what to do.
    """
    text, encoding = _decode(path)
    layout = find_layout(path, text.split("\n", 1)[0], MOVIE_COLUMNS)
    movies: dict[int, Movie] = {}
    line_of: dict[int, int] = {}
    undated = 0
    for line, film, title, genres in _rows(path, text, layout):
        if film in line_of:
            raise UserError(f"{path}, line {line}: film {film} stands on line {line_of[film]} too; remove one")
        line_of[film] = line
        dated = _YEAR.fullmatch(title)
        if dated is None:
            undated += 1
        elif not _AMBIGUOUS.search(title):
            movies[film] = Movie(natural_title(dated[1]), int(dated[2]), genres)
    if not movies:
        raise UserError(f"{path}: no film with a title and a year in it; give a whole movies file")
    kept, stands_for = _merge_twins(movies)
    counts = {
        "films_read": len(line_of),
        "films_dropped_without_year": undated,
        "films_dropped_ambiguous_title": len(line_of) - undated - len(movies),
        "films_merged_same_title_and_year": len(movies) - len(kept),
        "films_kept": len(kept),
        "films_kept_without_genres": sum(not movie.genres for movie in kept.values()),
    }
    every_id = {film: stands_for.get(film) for film in line_of}
    return Catalogue(kept, every_id, layout, encoding, counts)


def _merge_twins(movies: dict[int, Movie]) -> tuple[dict[int, Movie], dict[int, int]]:
    """One film for all ids of one title and year: nobody could tell them apart in a comparison."""
    first: dict[str, int] = {}
    stands_for = {film: first.setdefault(str(movies[film]).casefold(), film) for film in sorted(movies)}
    return {film: movies[film] for film in first.values()}, stands_for


def _rows(path: Path, text: str, layout: Layout) -> Iterator[tuple[int, int, str, tuple[str, ...]]]:
    """Line number, id, title with its year, and genres of each film."""
    line, last_genre, whole_genres = 0, "", {""}
    for line, fields in _csv_rows(path, text) if layout.header_lines else _dat_rows(text):
        where = f"{path}, line {line}"
        if len(fields) != len(layout.columns):
            raise UserError(f"{where}: {layout.wrong_fields(fields)}")
        row = dict(zip(layout.columns, fields, strict=True))
        if not WHOLE_NUMBER.fullmatch(row["film"]):
            raise UserError(f"{where}: film {row['film'][:40]!r} is not a whole number; correct it")
        named = [] if row["genres"].strip() == f"({NO_GENRES})" else row["genres"].split("|")
        genres = tuple(dict.fromkeys(genre.strip() for genre in named if genre.strip()))
        if any(set("()") & set(genre) for genre in genres):
            raise UserError(f"{where}: genres {row['genres'][:60]!r} hold parentheses; remove them")
        whole_genres.update((last_genre, *genres[:-1]))
        last_genre = genres[-1] if genres else ""
        yield line, int(row["film"]), " ".join(row["title"].split()), genres
    # "Com" where other films have "Comedy", or "Drama|": the last line lost its end.
    begun = last_genre not in whole_genres and any(g.startswith(last_genre) for g in whole_genres)
    if text.endswith("|") or (begun and not text.endswith("\n")):
        raise UserError(f"{path}, line {line}: genre {last_genre!r}: {CUT}")


def _dat_rows(text: str) -> Iterator[tuple[int, list[str]]]:
    # str.splitlines would also split at characters that a title may hold.
    for number, line in enumerate(io.StringIO(text, newline=None), start=1):
        if line.strip():
            yield number, line.rstrip("\n").split("::")


def _csv_rows(path: Path, text: str) -> Iterator[tuple[int, list[str]]]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    while True:
        number = reader.line_num + 1
        try:
            fields = next(reader, None)
        except csv.Error as error:
            raise UserError(f"{path}, line {number}: {error}; check its quotes") from None
        if fields is None:
            return
        if fields and number > 1:
            yield number, fields


def _decode(path: Path) -> tuple[str, str]:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise unreadable(path, error) from None
    try:
        return data.decode("utf-8-sig"), "utf-8"
    except UnicodeDecodeError:  # MovieLens-1M; in latin-1 every byte means something
        return data.decode("latin-1"), "latin-1"
