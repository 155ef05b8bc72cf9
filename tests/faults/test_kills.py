"""SIGKILL at random moments: every restart ends with the very bits of the run that nobody killed."""

import json
import shutil

import pyarrow.parquet as pq
import pytest
from commands import (
    adapters,
    at_a_random_step,
    command,
    ends,
    final_names_are_whole,
    inside_a_save,
    killed,
    seeded,
    train_command,
)

from quantpref.comparisons import save
from quantpref.simulate import simulate

TRAINING_KILLS, EVALUATION_KILLS = 30, 10
SLOW = {"SLOW_FSYNC": "0.05"}  # a save of five files then takes about half a second


@pytest.fixture(scope="session")
def straight(tmp_path_factory):
    """240 people, and a run that nobody killed: training and evaluation."""
    folder = tmp_path_factory.mktemp("straight")
    save(folder / "people.jsonl", simulate(240, seed=11).comparisons)
    ends(train_command(folder / "people.jsonl", folder / "run"))
    ends(command("evaluate_dpo.py", folder / "people.jsonl", folder / "run"))
    return folder


@pytest.mark.parametrize("number", range(TRAINING_KILLS))
def test_killed_in_training(straight, tmp_path, number):
    """Two of five inside a save."""
    rng, data, out = seeded(number), straight / "people.jsonl", tmp_path / "run"
    inside = number % 5 < 2
    moment = (inside_a_save if inside else at_a_random_step)(out, rng)
    alive, said = killed(train_command(data, out), moment, **(SLOW if inside else {}))
    half = [p.name for p in out.glob("**/.*.tmp")]
    whole = final_names_are_whole(out)
    text = ends(train_command(data, out))
    print(f"kill {number}: alive {alive}, inside a save {bool(half)} {half}, {whole} checkpoints, "
          f"went on {'goes on from' in text}")  # fmt: skip
    assert alive, said[-500:]
    assert adapters(out) == adapters(straight / "run")
    for arm in ("sft", "dpo"):
        log = f"llama3_{arm}_4bit_final/training_log.jsonl"
        assert (out / log).read_text() == (straight / "run" / log).read_text()
    assert not list(out.glob("**/.*.tmp")) and not list(out.glob("**/checkpoint-*"))


@pytest.mark.parametrize("number", range(EVALUATION_KILLS))
def test_killed_in_evaluation(straight, tmp_path, number):
    """Half of them while results are being written; no result under a final name, or the whole one."""
    rng, data, out = seeded(100 + number), straight / "people.jsonl", tmp_path / "run"
    shutil.copytree(straight / "run", out, ignore=lambda *_: ["evaluation"])
    evaluate = command("evaluate_dpo.py", data, out)
    writing = number % 2 == 0
    if writing:
        rng.randrange = lambda *_: 0  # the first thing that is written is the result
        moment = inside_a_save(out, rng)
    else:
        import time

        at = time.monotonic() + 4 + 12 * rng.random()
        moment = lambda: time.monotonic() >= at  # noqa: E731
    alive, _ = killed(evaluate, moment, **(SLOW if writing else {}))
    half = [p.name for p in out.glob(".evaluation.*")]
    there = (out / "evaluation").exists()
    final_names_are_whole(out)
    text = ends(evaluate)
    print(f"kill {number}: alive {alive}, while writing {bool(half)}, final name there {there}, {'finished' in text}")
    assert pq.read_table(out / "evaluation" / "predictions.parquet").equals(
        pq.read_table(straight / "run" / "evaluation" / "predictions.parquet")
    )
    mine, other = (
        json.loads((folder / "evaluation" / "results.json").read_text()) for folder in (out, straight / "run")
    )
    assert mine["verdict"] == other["verdict"] and mine["arms"] == other["arms"]
    assert not list(out.glob(".*.tmp"))
