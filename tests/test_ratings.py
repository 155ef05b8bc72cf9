"""Dumps of each format become comparisons; wrong ones become one line that says where and what."""

import codecs
import random
import re
from collections import defaultdict
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantpref.comparisons import Comparison, load, save
from quantpref.negatives import BLOCK, KINDS, Negatives
from quantpref.ratings import Counts, Options, build
from quantpref.runs import UserError
from quantpref.splits import SplitBy, split_comparisons
from quantpref.statistics import correctness
from quantpref.titles import natural_title, read_movies

MOVIETWEETINGS = Path(__file__).resolve().parents[2] / "shared/data/movietweetings-100k"
Row = tuple[int, int, float, int]  # user, film, rating, time

# Seven films by ten users, one film a second; everyone likes everything.
ROWS: list[Row] = [(user, 1 + (user + k) % 9, 5, 1000 + 10 * k + user) for user in range(10) for k in range(7)]
FILMS = [(film, f"Film {film} ({1990 + film})", "Drama|Comedy") for film in range(1, 10)]


def write_dat(folder: Path, rows=ROWS, films=FILMS, encoding="utf-8") -> tuple[Path, Path]:
    ratings, movies = folder / "ratings.dat", folder / "movies.dat"
    ratings.write_text("".join("::".join(map(str, row)) + "\n" for row in rows))
    movies.write_text("".join("::".join(map(str, film)) + "\n" for film in films), encoding)
    return ratings, movies


def write_csv(folder: Path, rows=ROWS, films=FILMS) -> tuple[Path, Path]:
    ratings, movies = folder / "ratings.csv", folder / "movies.csv"
    lines = ["userId,movieId,rating,timestamp", *(",".join(map(str, row)) for row in rows)]
    ratings.write_text("\n".join(lines) + "\n")
    quoted = ['{},"{}",{}'.format(film, title.replace('"', '""'), g) for film, title, g in films]
    movies.write_text("\r\n".join(["movieId,title,genres", *quoted]) + "\r\n", newline="")
    return ratings, movies


def make(ratings: Path, movies: Path, **options) -> tuple[list[Comparison], Counts]:
    built = build(ratings, movies, Options(**options))
    return built.comparisons, built.counts


def error_of(ratings: Path, movies: Path, **options) -> str:
    with pytest.raises(UserError) as caught:
        make(ratings, movies, seed=1, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- what is read ---


@pytest.mark.parametrize(
    ("written", "natural"),
    [
        ("Matrix, The", "The Matrix"),
        ("American in Paris, An", "An American in Paris"),
        ("Zed & Two Noughts, A", "A Zed & Two Noughts"),
        ("Misérables, Les", "Les Misérables"),
        ("Enfer, L'", "L'Enfer"),
        ("Avventura, L' (a.k.a. Adventure, The)", "L'Avventura (a.k.a. Adventure, The)"),
        ("Boot, Das (Boat, The)", "Das Boot (Boat, The)"),
        ("Postino, Il", "Il Postino"),
        ("Good, the Bad and the Ugly, The", "The Good, the Bad and the Ugly"),
        (
            "City of Lost Children, The (Cité des enfants perdus, La)",
            "The City of Lost Children (Cité des enfants perdus, La)",
        ),
        ("Hills (Part 1), The (Colline, Le) (x)", "The Hills (Part 1) (Colline, Le) (x)"),
        # No article behind the name: as it is.
        ("Seven (a.k.a. Se7en)", "Seven (a.k.a. Se7en)"),
        (
            "Shanghai Triad (Yao a yao yao dao waipo qiao)",
            "Shanghai Triad (Yao a yao yao dao waipo qiao)",
        ),
        ("Hate (Haine, La)", "Hate (Haine, La)"),
        ("(500) Days of Summer", "(500) Days of Summer"),
        ("Love, Etc.", "Love, Etc."),
        ("Spider Baby or, The Maddest Story", "Spider Baby or, The Maddest Story"),
        ("Odd (X, The (Y))", "Odd (X, The (Y))"),
        (", The", ", The"),
    ],
)
def test_titles_take_their_article_back(written: str, natural: str):
    assert natural_title(written) == natural


def test_movielens_1m_is_latin_1(tmp_path: Path):
    films = [
        *FILMS,
        (10, "City of Lost Children, The (Cité des enfants perdus, La) (1995)", "Sci-Fi"),
    ]
    ratings, movies = write_dat(tmp_path, films=films, encoding="latin-1")
    catalogue = read_movies(movies)
    assert catalogue.movies[10].title == "The City of Lost Children (Cité des enfants perdus, La)"
    assert (catalogue.movies[10].year, catalogue.movies[10].genres) == (1995, ("Sci-Fi",))
    comparisons, counts = make(ratings, movies, seed=1)
    assert len(comparisons) == counts["users_kept"] == 10
    assert (counts["files_in_latin_1"], counts["files_in_csv"]) == (1, 0)
    assert (counts["rating_scale_maximum"], counts["liked_from_rating"]) == (5, 4)


def test_movietweetings_is_utf_8_on_a_scale_of_ten(tmp_path: Path):
    films = [(film, title.replace("Film", "Çà et là: "), genres) for film, title, genres in FILMS]
    rows = [(user, film, rating * 2, time) for user, film, rating, time in ROWS]
    ratings, movies = write_dat(tmp_path, rows, films)
    ratings.write_text(re.sub(r"::(\d)::", r"::000000\1::", ratings.read_text(), flags=re.M))
    comparisons, counts = make(ratings, movies, seed=1)
    assert len(comparisons) == 10
    assert all(c.preferred.title.startswith("Çà et là: ") for c in comparisons)
    assert (counts["rating_scale_maximum"], counts["liked_from_rating"]) == (10, 8)
    assert counts["files_in_latin_1"] == 0


def test_csv_with_quoted_titles_equals_dat(tmp_path: Path):
    films = [(film, f'"Ça", she said, {film}, The ({1990 + film})', "Drama") for film in range(1, 10)]
    rows = [(user, film, 4.5, time) for user, film, _, time in ROWS]
    from_csv, counts = make(*write_csv(tmp_path, rows, films), seed=1)
    from_dat, _ = make(*write_dat(tmp_path, rows, films), seed=1)
    assert from_csv == from_dat
    assert counts["files_in_csv"] == 2
    assert from_csv[0].preferred.title.startswith('The "Ça", she said, ')


def test_columns_in_another_order_bom_and_windows_lines(tmp_path: Path):
    plain, _ = make(*write_csv(tmp_path), seed=1)
    lines = ["timestamp,movieId,tag,rating,userId"]
    lines += [f"{time},{film},x,{rating},{user}" for user, film, rating, time in ROWS]
    ratings = tmp_path / "other.csv"
    ratings.write_bytes(codecs.BOM_UTF8 + "\r\n".join([*lines, ""]).encode())
    assert make(ratings, tmp_path / "movies.csv", seed=1)[0] == plain


def test_empty_lines_and_a_missing_last_newline_do_no_harm(tmp_path: Path):
    ratings, movies = write_dat(tmp_path)
    plain, _ = make(ratings, movies, seed=1)
    ratings.write_text(ratings.read_text().replace("\n", "\n\n", 1) + "\n")
    movies.write_text(movies.read_text().rstrip("\n"))
    assert make(ratings, movies, seed=1)[0] == plain
    ratings.write_text(ratings.read_text().rstrip("\n"))
    assert make(ratings, movies, seed=1)[0] == plain


def test_films_without_year_or_genres_and_ambiguous_titles_are_counted(tmp_path: Path):
    films = [
        *FILMS[:5],
        (6, "Film 6 (1996)", "(no genres listed)"),
        (7, "Film 7 (1997)", ""),
        (8, "Babylon 5", "Sci-Fi"),
        (9, "Fears (1999), and Other Tales (2001)", "Horror"),
    ]
    comparisons, counts = make(*write_csv(tmp_path, films=films), seed=1)
    assert counts["films_read"] == 9
    assert counts["films_dropped_without_year"] == 1
    assert counts["films_dropped_ambiguous_title"] == 1
    assert counts["films_kept_without_genres"] == 2
    lost = sum(film in (8, 9) for _, film, _, _ in ROWS)
    assert counts["ratings_dropped_film_cannot_be_shown"] == lost
    shown = {str(m) for c in comparisons for m in (*c.history, c.option_a, c.option_b)}
    assert shown <= {f"Film {k} ({1990 + k})" for k in range(1, 8)}


def test_two_ids_of_one_title_are_one_film(tmp_path: Path):
    # Film 9 is film 1 again: whoever rated either cannot be offered the other.
    films = [*FILMS[:8], (9, "FILM 1 (1991)", "Drama")]
    comparisons, counts = make(*write_dat(tmp_path, films=films), seed=1, comparisons_per_user=9)
    assert counts["films_merged_same_title_and_year"] == 1
    both = sum({1, 9} <= {f for u, f, _, _ in ROWS if u == user} for user in range(10))
    assert counts["ratings_dropped_same_user_and_film"] == both > 0
    watched = {u: {1 if f == 9 else f for v, f, _, _ in ROWS if v == u} for u in range(10)}
    for c in comparisons:
        assert int(c.other.title.split()[1]) not in watched[int(c.user or "")]
        assert len({str(m) for m in (*c.history, c.option_a, c.option_b)}) == 7


def test_the_first_of_two_ratings_counts_and_one_second_is_one_moment(tmp_path: Path):
    # Film 6 was disliked first; 5, 4, 3, 2, 1 and 7 came in one second, so none of them was before another.
    rows = [(1, film, 5, 100) for film in (5, 4, 3, 2, 1, 7)]
    rows += [(1, 6, 1, 50), (1, 6, 5, 200), (2, 8, 5, 10), (1, 9, 5, 300)]
    comparisons, counts = make(*write_dat(tmp_path, rows), seed=1)
    assert counts["ratings_dropped_same_user_and_film"] == 1
    assert [[str(m)[5:6] for m in c.history] for c in comparisons] == [["2", "3", "4", "5", "7"]]
    assert str(comparisons[0].preferred) == "Film 9 (1999)"
    assert str(comparisons[0].other) == "Film 8 (1998)"
    assert comparisons[0].time == 300


def test_users_are_counted_by_the_reason_they_are_left_out(tmp_path: Path):
    rows: list[Row] = [(1, film, 5, film) for film in range(1, 6)]  # five films only
    rows += [(2, film, 5 if film < 6 else 3, 10 + film) for film in range(1, 8)]  # liked none later
    rows += [(3, film, 4, 20 + film) for film in range(1, 7)]
    rows += [(4, film, 5, 30 + film) for film in range(1, 9)]  # rated all that others had by then
    _, counts = make(*write_dat(tmp_path, rows), seed=1)
    assert counts["users_read"] == 4
    assert counts["users_dropped_too_few_films"] == 1
    assert counts["users_dropped_liked_none_later"] == 1
    assert counts["comparisons_dropped_no_other_film"] == 1
    assert counts["comparisons_kept"] == counts["users_kept"] == 1
    _, counts = make(*write_dat(tmp_path, rows), seed=1, comparisons_per_user=4)
    assert counts["comparisons_dropped_no_other_film"] == 3
    assert counts["comparisons_kept"] == 1


def test_the_threshold_can_be_chosen(tmp_path: Path):
    rows = [(user, film, 3, time) for user, film, _, time in ROWS]
    assert "none liked a film (4 or more)" in error_of(*write_dat(tmp_path, rows))
    assert make(*write_dat(tmp_path, rows), seed=1, like_threshold=3)[1]["comparisons_kept"] == 10
    rows[-1] = (*rows[-1][:2], 55, rows[-1][3])
    assert make(*write_dat(tmp_path, rows), seed=1, like_threshold=3)[1]["comparisons_kept"] == 10


def test_the_window_moves_on(tmp_path: Path):
    rows: list[Row] = [(1, film, 5, 100 + film) for film in range(1, 9)] + [(2, 9, 5, 1)]
    comparisons, _ = make(*write_dat(tmp_path, rows), seed=1, comparisons_per_user=2)
    assert [str(c.preferred) for c in comparisons] == ["Film 6 (1996)", "Film 7 (1997)"]
    assert [c.history[0].title for c in comparisons] == ["Film 1", "Film 2"]
    assert [len(c.history) for c in comparisons] == [5, 5]
    assert all(movie.genres == () for c in comparisons for movie in c.history)
    assert comparisons[0].preferred.genres == ("Drama", "Comedy")


def test_two_users_with_one_history_and_options_are_one_comparison(tmp_path: Path):
    """Else the split could put one of them into training and the other into the test."""
    rows: list[Row] = [(user, film, 5, 100 * user + film) for user in (1, 2) for film in range(1, 7)] + [(3, 8, 5, 1)]
    comparisons, counts = make(*write_dat(tmp_path, rows), seed=1, negatives="popularity")
    assert [c.user for c in comparisons] == ["1"]  # both can only be offered film 8
    assert counts["comparisons_dropped_same_as_another_users"] == 1


def test_limit_keeps_that_many_with_half_of_the_labels(tmp_path: Path):
    paths = write_dat(tmp_path, ROWS[:63])  # the tenth user rated what the first did
    everything, _ = make(*paths, seed=1)
    some, counts = make(*paths, seed=1, limit=4)
    assert [c.label for c in some].count("A") == 2
    assert counts["comparisons_dropped_over_limit"] == len(everything) - 4
    assert {c.key for c in some} < {c.key for c in everything}


def test_the_other_film_is_drawn_uniformly(tmp_path: Path):
    # User 1 has six of ten films, so 2, 5, 8 and 9 are left; 10 is rated by nobody before.
    films = [*FILMS, (10, "Film 10 (2000)", "Drama")]
    rows: list[Row] = [(1, film, 5, 100 + k) for k, film in enumerate((1, 3, 4, 6, 7, 11))]
    rows += [(2, film, 1, film) for film in range(1, 10)] + [(3, 10, 5, 105)]
    paths = write_dat(tmp_path, rows, [*films, (11, "Film 11 (2001)", "Drama")])
    drawn: dict[str, int] = defaultdict(int)
    for seed in range(400):
        drawn[make(*paths, seed=seed)[0][0].other.title] += 1
    assert set(drawn) == {"Film 2", "Film 5", "Film 8", "Film 9"}
    # Chi-squared with 3 degrees of freedom: above 16.3 one time in a thousand.
    assert sum((n - 100) ** 2 / 100 for n in drawn.values()) < 16.3


# --- properties ---

dumps = st.lists(
    st.tuples(st.integers(1, 6), st.integers(1, 12), st.sampled_from((1, 3, 4, 5)), st.integers(0, 30)),
    min_size=60,
    max_size=140,
)
TWELVE = [(film, f"Film {film} ({1990 + film})", "Drama") for film in range(1, 13)]


def check_protocol(comparisons: list[Comparison], rows: list[Row], kind: Negatives) -> None:
    """The protocol again, by plain loops over the rows."""
    ratings: dict[int, dict[int, list[tuple[int, float]]]] = defaultdict(lambda: defaultdict(list))
    for user, film, rating, time in rows:
        ratings[user][film].append((time, rating))
    # Of a film's ratings by one user the first counts.
    of = {user: {film: min(rated) for film, rated in films.items()} for user, films in ratings.items()}

    def film_of(movie) -> int:
        return int(movie.title.split()[1])

    for c in comparisons:
        user, time = int(c.user or ""), c.time or 0
        own = of[user]
        audience = {
            film: {other for other in of if other != user and film in of[other] and of[other][film][0] < time}
            for film in range(1, 13)
        }
        earlier = sorted((film for film in own if own[film][0] < time), key=lambda film: (own[film][0], film))
        preferred, other, history = film_of(c.preferred), film_of(c.other), [film_of(m) for m in c.history]
        assert history == earlier[-5:] and len(history) == 5
        assert own[preferred] >= (time, 4) and own[preferred][0] == time
        assert preferred not in history and other not in history and audience[other]
        if kind == "disliked":
            assert own[other][1] <= 2.5
            continue
        fit = [film for film in audience if film not in own and audience[film]]
        assert other in fit
        level = len(audience[preferred])
        gap = len(audience[other]) - level
        if kind == "popularity":  # nearest on its side
            gaps = [len(audience[film]) - level for film in fit]
            assert abs(gap) == min(abs(g) for g in gaps if g * gap >= 0 and (gap or g == 0))
            assert gap == 0 or 0 not in gaps
        if kind == "hard":
            # Not more raters than RATERS, so nothing is sampled here.
            overlap = {f: len(audience[f] & audience[preferred]) / len(audience[f] | audience[preferred]) for f in fit}
            assert overlap[other] == max(overlap.values()) > 0
    preferred_films = [(c.user, c.preferred) for c in comparisons]
    assert len(set(preferred_films)) == len(preferred_films)
    assert len({c.key for c in comparisons}) == len(comparisons)
    labels = [c.label for c in comparisons]
    assert abs(labels.count("A") - labels.count("B")) <= 1
    assert [(int(c.user or ""), c.time) for c in comparisons] == sorted(
        (int(c.user or ""), c.time) for c in comparisons
    )


@settings(max_examples=120, deadline=None)
@given(
    rows=dumps, per_user=st.integers(1, 4), seed=st.integers(0, 9), kind=st.sampled_from(KINDS), shuffle=st.randoms()
)
def test_every_comparison_follows_the_protocol(
    tmp_path_factory, rows: list[Row], per_user: int, seed: int, kind: Negatives, shuffle: random.Random
):
    folder = tmp_path_factory.mktemp("dump")
    options = Options(seed=seed, comparisons_per_user=per_user, negatives=kind)
    try:
        built = build(*write_dat(folder, rows, TWELVE), options)
    except UserError as error:
        assert "no comparison can be made" in str(error)
        return
    check_protocol(built.comparisons, rows, kind)
    assert built.counts["ratings_read"] == len(rows)
    assert (built.matched is None) == (kind == "popularity")
    if built.matched is not None:
        check_protocol(built.matched, rows, "popularity")
        for c, m in zip(built.comparisons, built.matched, strict=True):
            assert (c.user, c.history, c.preferred, c.label) == (m.user, m.history, m.preferred, m.label)
    check_split(built.comparisons)
    # The same input and seed, whatever the order of its lines, make the same bytes.
    films = TWELVE.copy()
    shuffle.shuffle(films)
    shuffle.shuffle(rows)
    again = build(*write_dat(folder, rows, films), options)
    assert save(folder / "1.jsonl", built.comparisons) == save(folder / "2.jsonl", again.comparisons)
    assert again.matched == built.matched and again.counts == built.counts


def check_split(comparisons: list[Comparison]) -> None:
    """Users are apart however the file is split, and with "time" so are the times."""
    for by in get_args(SplitBy):
        try:
            split = split_comparisons(comparisons, by, 0.5, 0.2, 1)
        except UserError as error:
            assert "cannot be" in str(error)
            continue
        train, validation, test = ({c.user for c in part} for part in (split.train, split.validation, split.test))
        assert not train & validation and not train & test and not validation & test
        if by == "time":
            times = [[c.time or 0 for c in part] for part in (split.train, split.validation, split.test)]
            assert max(times[0]) < min(times[1]) and max(times[1]) < min(times[2])


def test_another_seed_draws_other_films_and_labels(tmp_path: Path):
    paths = write_dat(tmp_path, ROWS[:63])
    first, second = (make(*paths, seed=seed)[0] for seed in (1, 2))
    assert [c.preferred for c in first] == [c.preferred for c in second]
    assert [c.label for c in first] != [c.label for c in second]
    assert [c.other for c in first] != [c.other for c in second]


# --- wrong input ---


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("3::4::5", "expected user::film::rating::time, found '3::4::5'"),
        ("3::4::5::1000::9", "expected user::film::rating::time, found '3::4::5::1000::9'"),
        ("3,4,5,1000", "expected user::film::rating::time, found '3,4,5,1000'"),
        ("3:4:5:1000", "expected user::film::rating::time, found '3:4:5:1000'"),
        ("3:x:4:y:5:z:1000", "expected user::film::rating::time, found '3:x:4:y:5:z:1000'"),
        ("u3::4::5::1000", "user 'u3' is not a whole number; correct the line"),
        ("3::4.0::5::1000", "film '4.0' is not a whole number; correct the line"),
        ("3::99::5::1000", "film 99 is not in the movies file; give that of the same dump"),
        ("3::4::5::-7", "time -7 is negative; give Unix seconds"),
        ("3::4::5::1000.5", "time '1000.5' is not a whole number; correct the line"),
        ("3::4::five::1000", "rating 'five' is not a number from 0 up; correct the line"),
        ("3::4::nan::1000", "rating 'nan' is not a number from 0 up; correct the line"),
        ("3::4::-1::1000", "rating '-1' is not a number from 0 up; correct the line"),
        ("3::4::inf::1000", "rating 'inf' is not a number from 0 up; correct the line"),
        ("3::4::::1000", "rating '' is not a number from 0 up; correct the line"),
        ("3::4::6::1000", "rating 6 is above 5, the scale of most ratings here; correct it, or"),
        ("3::4\xe9::5::1000", "film '4\ufffd' is not a whole number; correct the line"),
    ],
)
@pytest.mark.parametrize("number", [1, 7, 70])
def test_a_wrong_line_of_ratings_is_named(tmp_path: Path, line: str, found: str, number: int):
    ratings, movies = write_dat(tmp_path)
    lines = ratings.read_text().splitlines()
    lines[number - 1] = line
    ratings.write_text("\n".join(lines) + "\n", encoding="latin-1")
    if number == 1 and "::" not in line:
        header = "userId,movieId,rating,timestamp"
        found = f"expected user::film::rating::time or a CSV header {header}, found {line!r};"
    assert error_of(ratings, movies).startswith(f"{ratings}, line {number}: {found}")


def test_a_wrong_line_after_an_empty_one_has_its_own_number(tmp_path: Path):
    ratings, movies = write_csv(tmp_path)
    lines = ratings.read_text().splitlines()
    lines[2], lines[4] = "", "1,2,x,4"
    ratings.write_text("\n".join(lines) + "\n")
    assert error_of(ratings, movies).startswith(f"{ratings}, line 5: rating 'x' is not a number")
    lines[4] = '1,"2",5,4'
    ratings.write_text("\n".join(lines) + "\n")
    assert error_of(ratings, movies).startswith(f"{ratings}, line 5: film '\"2\"' is not a whole")


@pytest.mark.parametrize("write", [write_dat, write_csv])
def test_ratings_cut_anywhere_in_their_last_line_are_refused(tmp_path: Path, write):
    ratings, movies = write(tmp_path)
    whole = ratings.read_bytes()
    last = len(whole.rstrip(b"\n").split(b"\n")[-1])
    number = whole.count(b"\n")
    expected, _ = make(ratings, movies, seed=1)
    for size in range(len(whole) - last, len(whole) + 1):
        ratings.write_bytes(whole[:size])
        if size >= len(whole) - 1:
            assert make(ratings, movies, seed=1)[0] == expected
        elif size > len(whole) - last - 1 and whole[:size][-1:] != b"\n":
            message = error_of(ratings, movies)
            assert message.startswith(f"{ratings}, line {number}: ")


def test_cut_ratings_say_so(tmp_path: Path):
    ratings, movies = write_dat(tmp_path)
    whole = ratings.read_text()
    ratings.write_text(whole[: whole.rindex("::") - 3])
    assert error_of(ratings, movies) == (
        f"{ratings}, line 70: '9::7': the file ends in the middle of this line; copy or fetch it again"
    )
    ratings.write_text(whole[:-2])
    assert error_of(ratings, movies) == (
        f"{ratings}, line 70: time 106 is far before all others: the file ends in the middle of"
        " this line; copy or fetch it again"
    )


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("4::Film 4 (1994)", "expected film::title::genres, found '4::Film 4 (1994)'; correct"),
        ("4|Film 4 (1994)|Drama", "expected film::title::genres, found '4|Film 4 (1994)|Drama'"),
        ("four::Film 4 (1994)::Drama", "film 'four' is not a whole number; correct it"),
        ("2::Film 4 (1994)::Drama", "film 2 stands on line 2 too; remove one"),
        ("4::Film 4 (1994)::Drama (old)", "genres 'Drama (old)' hold parentheses; remove them"),
    ],
)
def test_a_wrong_line_of_movies_is_named(tmp_path: Path, line: str, found: str):
    ratings, movies = write_dat(tmp_path)
    lines = movies.read_text().splitlines()
    lines[3] = line
    movies.write_text("\n".join(lines) + "\n")
    assert error_of(ratings, movies).startswith(f"{movies}, line 4: {found}")


def test_wrong_quotes_in_a_movies_csv_are_named(tmp_path: Path):
    ratings, movies = write_csv(tmp_path)
    lines = movies.read_text().splitlines()
    lines[3] = '3,"Film 3 (1993),Drama'
    movies.write_text("\n".join(lines) + "\n")
    assert error_of(ratings, movies).startswith(f"{movies}, line 4: ")
    lines[3] = "3,Film, 3 (1993),Drama"
    movies.write_text("\n".join(lines) + "\n")
    message = error_of(ratings, movies)
    assert message.startswith(f"{movies}, line 4: expected film,title,genres, found '3,Film, 3")


def test_cut_movies_are_refused(tmp_path: Path):
    ratings, movies = write_dat(tmp_path)
    whole = movies.read_text()
    # Within a genre, at its start, and in the title.
    for end in ("Drama|Com", "Drama|", "Dra", "Film 9 (1999):", "Film 9 (19", "9"):
        movies.write_text(whole[: whole.rindex("9::")] + f"9::{end}")
        assert error_of(ratings, movies).startswith(f"{movies}, line 9: "), end


@pytest.mark.parametrize("content", ["", "\n", "1\t2\t5\t1000\n", "1|2|5|1000\n", "a,b\n1,2\n"])
@pytest.mark.parametrize("which", [0, 1])
def test_empty_or_unknown_files_name_their_first_line(tmp_path: Path, content: str, which: int):
    paths = write_dat(tmp_path)
    paths[which].write_text(content)
    message = error_of(*paths)
    assert message.startswith(f"{paths[which]}, line 1: expected ")
    assert (f"found {content.split(chr(10))[0]!r}" if content.strip() else "found nothing") in message


def test_only_a_header_is_no_dump(tmp_path: Path):
    ratings, movies = write_csv(tmp_path, rows=[])
    assert error_of(ratings, movies) == f"{ratings}: no ratings in it; give a whole file"
    movies.write_text("movieId,title,genres\n")
    assert error_of(ratings, movies).startswith(f"{movies}: no film with a title and a year in it;")


@pytest.mark.parametrize("which", [0, 1])
def test_missing_files_and_folders_are_named(tmp_path: Path, which: int):
    paths = write_dat(tmp_path)
    paths[which].unlink()
    assert error_of(*paths).startswith(f"{paths[which]}: cannot be read (No such file or directory)")
    paths[which].mkdir()
    assert error_of(*paths).startswith(f"{paths[which]}: cannot be read (Is a directory)")


def test_exchanged_files_are_named(tmp_path: Path):
    ratings, movies = write_dat(tmp_path)
    assert error_of(movies, ratings).startswith(f"{ratings}, line 1: expected film::title::genres, found '0::1::5")


@pytest.mark.parametrize(
    "options",
    [{"comparisons_per_user": 0}, {"limit": 0}, {"like_threshold": float("nan")}, {"dislike_threshold": -1.0}],
)
def test_options_out_of_range_are_named(tmp_path: Path, options: dict):
    flag = "--" + next(iter(options)).replace("_", "-")
    assert error_of(*write_dat(tmp_path), **options).startswith(f"{flag} ")


@settings(max_examples=150, deadline=None)
@given(
    which=st.integers(0, 1),
    write=st.sampled_from((write_dat, write_csv)),
    place=st.floats(0, 1),
    length=st.integers(0, 40),
    put=st.one_of(st.binary(max_size=6), st.sampled_from((b"::", b'"', b"\n", b"\r", b",", b"-"))),
)
def test_any_damage_is_one_line_or_harmless(tmp_path_factory, which, write, place, length, put):
    paths = write(tmp_path_factory.mktemp("dump"))
    data = paths[which].read_bytes()
    start = int(place * len(data))
    paths[which].write_bytes(data[:start] + put + data[start + length :])
    try:
        assert make(*paths, seed=1)[0]
    except UserError as error:
        assert str(error).startswith(str(paths[0].parent)) and "\n" not in str(error)


def test_a_film_cannot_be_liked_and_disliked(tmp_path: Path):
    assert error_of(*write_dat(tmp_path), dislike_threshold=4.0).startswith("a film would be both liked (4 or more)")


# --- real ratings ---


@pytest.mark.skipif(not MOVIETWEETINGS.is_dir(), reason="MovieTweetings is not here")
@pytest.mark.parametrize("kind", KINDS)
def test_movietweetings_gives_popularity_away_but_for_popularity_negatives(kind: Negatives):
    paths = MOVIETWEETINGS / "ratings.dat", MOVIETWEETINGS / "movies.dat"
    built = build(*paths, Options(seed=3407, negatives=kind, comparisons_per_user=5))
    assert len(built.comparisons) > 2 * BLOCK  # several blocks of the sweep
    for found in (built.shortcuts, built.matched_shortcuts):
        if found is built.matched_shortcuts and kind == "popularity":
            continue
        for by in get_args(SplitBy):
            test = split_comparisons(built.comparisons, by, 0.7, 0.1, 3407).test
            past = correctness(found["past_popularity"])[[c.line - 1 for c in test]].mean()
            if kind == "popularity" or found is built.matched_shortcuts:
                assert 0.47 < past < 0.53
            elif kind in ("random", "hard"):
                assert past > 0.7


@pytest.mark.skipif(not MOVIETWEETINGS.is_dir(), reason="MovieTweetings is not here")
def test_movietweetings_as_a_whole(tmp_path: Path):
    paths = MOVIETWEETINGS / "ratings.dat", MOVIETWEETINGS / "movies.dat"
    comparisons, counts = make(*paths, seed=3407, comparisons_per_user=5)
    assert (counts["ratings_read"], counts["users_read"]) == (103_328, 8_651)
    assert counts["users_read"] - counts["users_dropped_too_few_films"] == 2_568
    assert len(comparisons) == counts["comparisons_kept"] == 9_324
    # What we write loads as what we built.
    save(tmp_path / "built.jsonl", comparisons)
    for built, loaded in zip(comparisons, load(tmp_path / "built.jsonl"), strict=True):
        assert (built.key, built.label, built.user, built.time) == (
            loaded.key, loaded.label, loaded.user, loaded.time
        )  # fmt: skip
        assert (built.option_a, built.option_b) == (loaded.option_a, loaded.option_b)
