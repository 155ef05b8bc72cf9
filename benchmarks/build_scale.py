#!/usr/bin/env python3
"""How long the builder takes and how much memory, at 1/100, 1/10 and the whole of MovieLens-32M's size and skew.

python benchmarks/build_scale.py --folder /tmp/scale

The ratings are simulated here: people with 20 ratings or more, as many as a lognormal has it, films by a
Zipf-Mandelbrot law, each person's within five weeks. `build` is the real command in a process of its own, twice, the
second time counting. Beside it the same work by a plain pandas groupby loop, where that ends within the budget.
"""

import argparse
import csv
import os
import sys
import time
from pathlib import Path

import numpy as np
import polars as pl

ROOT = Path(__file__).resolve().parent.parent
RATINGS, USERS, FILMS = 32_000_000, 200_948, 87_585  # MovieLens-32M
SHARES = (100, 10, 1)
COMPARISONS = 200_000
FIRST_SECOND, LAST_SECOND, SPAN_SECONDS = 789_652_009, 1_697_164_147, 3_000_000  # 1995 to 2023


def simulate_ratings(folder: Path, ratings: int, users: int, films: int, seed: int = 0) -> None:
    """ratings.csv and movies.csv with MovieLens' columns; users in order, as there."""
    rng = np.random.default_rng(seed)
    activity = rng.lognormal(0, 1.3, users)
    counts = 20 + rng.poisson(activity / activity.sum() * max(0, 1.2 * ratings - 20 * users))
    fame = 1 / (np.arange(films) + 50.0)
    key = np.repeat(np.arange(users), counts) * films
    key += np.searchsorted(np.cumsum(fame / fame.sum()), rng.random(len(key)))
    key.sort()
    key = key[np.concatenate(([True], key[1:] != key[:-1]))]  # nobody rates a film twice
    if len(key) > ratings:
        key = key[np.sort(rng.permutation(len(key))[:ratings])]
    user, film = np.divmod(key, films)
    start = rng.integers(FIRST_SECOND, LAST_SECOND - SPAN_SECONDS, users)
    stars = rng.choice(np.arange(1, 11) / 2, len(key), p=np.array([1, 3, 2, 7, 5, 20, 12, 27, 9, 14]) / 100)
    table = {"userId": user + 1, "movieId": film + 1, "rating": stars}
    table["timestamp"] = start[user] + rng.integers(0, SPAN_SECONDS, len(key))
    pl.DataFrame(table).write_csv(folder / "ratings.csv")
    with (folder / "movies.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("movieId", "title", "genres"))
        writer.writerows((i, f"Film {i} ({1930 + i % 90})", "Drama|Comedy") for i in range(1, films + 1))


def measured(command: list[str], log: Path) -> tuple[str, int]:
    """Seconds by the clock, seconds of all cores, GiB resident at most; and exit status of a process of its own.

    On a machine with other work the clock runs on while the process waits; the cores' seconds don't.
    """
    start = time.perf_counter()
    with log.open("w") as out:
        child = os.posix_spawn(
            command[0], command, os.environ,
            file_actions=[(os.POSIX_SPAWN_DUP2, out.fileno(), 1), (os.POSIX_SPAWN_DUP2, out.fileno(), 2)],
        )  # fmt: skip
        _, status, usage = os.wait4(child, 0)
    seconds, cpu = time.perf_counter() - start, usage.ru_utime + usage.ru_stime
    return f"{seconds:.1f} | {cpu:.1f} | {usage.ru_maxrss / 2**20:.2f}", os.waitstatus_to_exitcode(status)


def pandas_loop(folder: Path, out: Path, limit: int) -> None:
    """A plain way to the same comparisons, up to the draw among films equally near: popularity negatives."""
    import pandas as pd

    rated = pd.read_csv(folder / "ratings.csv").sort_values(["userId", "timestamp", "movieId"])
    movies = pd.read_csv(folder / "movies.csv").set_index("movieId")
    by_time = rated.sort_values("timestamp")
    rows = []
    for user, own in rated.groupby("userId"):
        for row in own.itertuples():
            before = own[own.timestamp < row.timestamp]
            if row.rating >= 4 and len(before) >= 5:
                earlier = by_time[by_time.timestamp < row.timestamp]
                counts = earlier.groupby("movieId").size()
                fit = counts[~counts.index.isin(own.movieId)]
                if len(fit):
                    other = (fit - counts.get(row.movieId, 0)).abs().idxmin()
                    titles = [movies.title[m] for m in (*before.movieId[-5:], row.movieId, other)]
                    rows.append((user, row.timestamp, *titles))
                break
    pd.DataFrame(rows[:limit]).to_json(out, orient="records", lines=True)


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="for the simulated files: 1 GB")
    parser.add_argument("--negatives", default="popularity", help="as data/build_contrastive.py has it")
    parser.add_argument("--shares", type=int, nargs="*", default=list(SHARES), help="one part in so many of 32M")
    parser.add_argument("--budget", type=int, default=600, help="seconds that the pandas loop may take")
    parser.add_argument("--pandas", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main() -> None:
    options = arguments()
    if options.pandas:
        pandas_loop(options.folder, options.pandas, COMPARISONS)
        return
    print("| ratings | users | films | comparisons | build, s | CPU s | peak GiB | pandas loop, s | CPU s | peak GiB |")
    print(f"|{' ---: |' * 10}")
    for share in options.shares:
        folder = options.folder / f"part-{share}"
        if not (folder / "movies.csv").is_file():
            folder.mkdir(parents=True, exist_ok=True)
            # Films are shared: ten times fewer ratings see about three times fewer of them.
            simulate_ratings(folder, RATINGS // share, USERS // share, int(FILMS / share**0.5))
        print(row_of_table(folder, share, options.negatives, options.budget), flush=True)


def row_of_table(folder: Path, share: int, negatives: str, budget: int) -> str:
    built = folder / f"{negatives}.jsonl"
    build = [
        sys.executable, str(ROOT / "data" / "build_contrastive.py"), "ratings", "--ratings",
        str(folder / "ratings.csv"), "--movies", str(folder / "movies.csv"), "--negatives", negatives,
        "--limit", str(COMPARISONS), "--out", str(built),
    ]  # fmt: skip
    for _ in ("cold", "warm"):
        for old in folder.glob(f"{negatives}.*"):
            old.unlink()
        numbers, status = measured(build, folder / "build.log")
        if status:
            sys.exit((folder / "build.log").read_text())
    with built.open("rb") as file:
        comparisons = sum(1 for _ in file)
    loop = ["/usr/bin/timeout", str(budget), sys.executable, __file__, "--folder", str(folder)]
    loop += ["--pandas", str(folder / "pandas.jsonl")]
    pandas, status = measured(loop, folder / "pandas.log")
    if status:
        pandas = f"over {budget}, stopped | - | -"
    sizes = f"{RATINGS // share:,} | {USERS // share:,} | {int(FILMS / share**0.5):,} | {comparisons:,}"
    return f"| {sizes} | {numbers} | {pandas} |"


if __name__ == "__main__":
    main()
