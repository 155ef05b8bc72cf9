"""An interrupted run goes on to the very bits of an uninterrupted one, or says why it does not."""

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
from tiny_runs import adapters, ask_to_stop, at_step, evaluate, tiny, train

from config import ROOT
from quantpref import runs
from quantpref.runs import MANIFEST, read_json, write_manifest


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A run of two DPO epochs without a break: 7 steps an epoch."""
    config = tiny(tmp_path_factory.mktemp("straight"), num_train_epochs=2)
    status, _, err = train(config)
    assert status == 0, err
    return config


def elsewhere(straight, tmp_path, **settings):
    return replace(straight, output_dir=tmp_path / "run with ä", **settings)


def same(one, other):
    """The same adapters, and the same logs with every step once."""
    assert adapters(one) == adapters(other) and len(adapters(one)) == 2
    for a, b in ((one.sft_folder, other.sft_folder), (one.dpo_folder, other.dpo_folder)):
        assert (a / "training_log.jsonl").read_text() == (b / "training_log.jsonl").read_text()
    rows = [json.loads(line) for line in (other.dpo_folder / "training_log.jsonl").open()]
    assert [row["step"] for row in rows] == list(range(1, 15))
    for of in ("steps", "tokens_seen", "first_loss", "last_tenth_mean_loss"):
        assert read_json(one.dpo_folder / MANIFEST)[of] == read_json(other.dpo_folder / MANIFEST)[of]
    return True


@pytest.mark.parametrize(
    ("kind", "step", "signum", "status"),
    [("sft", 4, signal.SIGTERM, 143), ("dpo", 7, signal.SIGTERM, 143),
     ("dpo", 10, signal.SIGTERM, 143), ("dpo", 14, signal.SIGINT, 130)],
)  # fmt: skip
def test_stop_and_go_on(straight, tmp_path, monkeypatch, kind, step, signum, status):
    """In SFT, at the end of DPO's first epoch, in its second, and after the last step."""
    config = elsewhere(straight, tmp_path)
    with monkeypatch.context() as patch:
        at_step(patch, step, ask_to_stop(signum), kind)
        found, _, err = train(config)
    assert found == status and f"stopped after step {step}; the same command (without --fresh) goes on" in err
    assert not config.dpo_folder.exists() and not (config.output_dir / ".lock").exists()
    found, out, err = train(config)
    assert found == 0, err
    assert f"goes on from {config.checkpoints_of(config.dpo_folder).parent / kind}_checkpoints/checkpoint-{step}" in out
    assert same(straight, config)
    assert train(config)[1].count("\n") == 1  # finished, in one line
    assert [p.name for p in config.output_dir.glob("*_checkpoints/*")] == ["training_log.jsonl"] * 2


@pytest.fixture
def unfinished(straight, tmp_path, monkeypatch):
    """The straight run's SFT, and DPO stopped after step 5: checkpoints of steps 3 and 5."""
    config = elsewhere(straight, tmp_path)
    shutil.copytree(straight.sft_folder, config.sft_folder)
    with monkeypatch.context() as patch:
        at_step(patch, 5, ask_to_stop())
        assert train(config)[0] == 143
    checkpoints = config.checkpoints_of(config.dpo_folder)
    assert sorted(p.name for p in checkpoints.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-5"]
    return config


def damaged(path, how):
    content = bytearray(path.read_bytes())
    if how == "deleted":
        path.unlink()
    elif how == "cut":
        path.write_bytes(content[: len(content) // 2])
    else:
        content[len(content) // 2] ^= 4
        path.write_bytes(content)


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(straight, unfinished):
    checkpoints = unfinished.checkpoints_of(unfinished.dpo_folder)
    newest = checkpoints / "checkpoint-5"
    names = sorted(p.name for p in newest.iterdir())
    assert names == ["manifest.json", "state.json", "tensors.safetensors", "trainer_state.json"]
    whole = newest.with_name("whole")
    shutil.copytree(newest, whole)
    from quantpref.resume import newest as find

    for name in names:
        for how in ("deleted", "cut", "flipped"):
            damaged(newest / name, how)
            path, [fault] = find(checkpoints)
            assert path == checkpoints / "checkpoint-3" and str(newest / name) in fault
            shutil.rmtree(newest)
            shutil.copytree(whole, newest)
    damaged(newest / "tensors.safetensors", "flipped")
    shutil.rmtree(whole)
    status, out, err = train(unfinished)
    assert status == 0, err
    assert f"{newest / 'tensors.safetensors'}: is" in out and "this checkpoint is not used" in out
    assert "goes on from" in out and "checkpoint-3" in out
    assert same(straight, unfinished)


def test_with_no_whole_checkpoint_it_begins_anew(straight, unfinished):
    for path in unfinished.checkpoints_of(unfinished.dpo_folder).glob("checkpoint-*"):
        (path / "state.json").unlink()
    status, out, _ = train(unfinished)
    assert status == 0 and out.count("this checkpoint is not used") == 2 and "goes on from" not in out
    assert same(straight, unfinished)


def test_other_settings_versions_or_base_are_refused_by_name(unfinished, monkeypatch, tmp_path):
    status, _, err = train(replace(unfinished, beta=0.3, learning_rate=1e-5))
    assert status == 2 and "--beta was 0.1, is 0.3; --learning-rate was 0.0001, is 1e-05" in err and "--fresh" in err
    with monkeypatch.context() as patch:
        patch.setattr("quantpref.experiment.versions", lambda: {**runs.versions(), "torch": "9.9"})
        status, _, err = train(unfinished)
    assert status == 2 and f"torch was {runs.versions()['torch']}, is 9.9" in err
    checkpoint = unfinished.checkpoints_of(unfinished.dpo_folder) / "checkpoint-5"
    manifest = read_json(checkpoint / MANIFEST)
    write_manifest(checkpoint, {**manifest, "base": {**manifest["base"], "fingerprint": "0" * 64}})
    status, _, err = train(unfinished)
    assert status == 2 and "made on base" in err and "0000" in err
    assert not unfinished.dpo_folder.exists()


def test_the_micro_batch_may_change(unfinished):
    """It decides nothing but rounding, and is what an exhausted memory asks to change."""
    status, out, err = train(replace(unfinished, per_device_train_batch_size=2))
    assert status == 0, err
    assert "checkpoint-5" in out
    rows = [json.loads(line) for line in (unfinished.dpo_folder / "training_log.jsonl").open()]
    assert [row["step"] for row in rows] == list(range(1, 15))


def test_fresh_begins_anew_beside_the_old_run(straight, unfinished):
    checkpoints = unfinished.checkpoints_of(unfinished.dpo_folder)
    status, out, err = train(replace(unfinished, fresh=True))
    assert status == 0, err
    assert f"{checkpoints} is now {checkpoints}.1" in out and "goes on from" not in out
    assert (checkpoints.with_name("dpo_checkpoints.1") / "checkpoint-5" / MANIFEST).is_file()
    assert same(straight, unfinished)  # SFT was finished, and stayed


def test_leftovers_of_a_kill_go_and_nothing_else(straight, unfinished):
    stale = unfinished.checkpoints_of(unfinished.dpo_folder) / ".checkpoint-9.123.tmp"
    stale.mkdir()
    (stale / "tensors.safetensors").write_bytes(b"half")
    mine = unfinished.output_dir / "notes.txt"
    mine.write_text("mine")
    assert train(unfinished)[0] == 0
    assert not stale.exists() and mine.read_text() == "mine"


def test_two_runs_in_one_folder(tmp_path):
    """The second is told so; when the first is killed, its lock is gone with it."""
    config = tiny(tmp_path)
    holder = subprocess.Popen(
        [sys.executable, "-c", "import sys, time; from pathlib import Path; from quantpref.runs import locked\n"
         "with locked(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)", str(config.output_dir)],
        cwd=ROOT, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert holder.stdout.readline() == "held\n"
    status, _, err = train(config)
    assert status == 1 and f"another run is at work there (process {holder.pid})" in err
    holder.kill()
    holder.wait()
    assert (config.output_dir / ".lock").exists()  # the file stays, and holds nobody out
    with runs.locked(config.output_dir):
        assert (config.output_dir / ".lock").read_text() == f"{os.getpid()}\n"
    assert not (config.output_dir / ".lock").exists()


def test_a_second_signal_stops_at_once(tmp_path):
    """Even inside a step that never ends."""
    program = (
        "import logging, time; logging.getLogger('bitsandbytes').setLevel(logging.ERROR)\n"
        "from quantpref.interrupts import FinishStep\n"
        "with FinishStep():\n"
        "    print('in', flush=True)\n"
        "    while True: time.sleep(1)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout.readline() == b"in\n"
    process.send_signal(signal.SIGTERM)
    assert b"once more to stop at once" in process.stderr.readline()
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 143


def test_terminated_before_training_is_one_line(tmp_path):
    program = (
        "import os, signal; from quantpref.runs import one_line_errors\n"
        "with one_line_errors(): os.kill(os.getpid(), signal.SIGTERM)"
    )
    ended = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert (
        ended.returncode == 143 and ended.stderr == "error: interrupted; nothing unfinished stands under a final name\n"
    )


def test_an_evaluation_that_was_changed_is_made_again(straight):
    status, _, err = evaluate(straight)
    assert status == 0, err
    predictions = straight.evaluation_folder / "predictions.parquet"
    before = predictions.read_bytes()
    assert evaluate(straight)[1].count("\n") == 1
    damaged(predictions, "flipped")
    status, out, _ = evaluate(straight)
    assert status == 0 and f"{predictions}: is not the file that its manifest records; evaluating again" in out
    assert "an earlier evaluation is now" in out and predictions.read_bytes() == before
