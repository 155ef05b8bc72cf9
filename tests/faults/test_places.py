"""Bad places to run in: a disk that fills up, one that cannot be written to, no home, no network, no UTF-8."""

import os
import shutil
import subprocess
from contextlib import contextmanager

import pytest
from commands import adapters, command, ends, environment, final_names_are_whole, steps_logged, train_command

from config import ROOT
from quantpref.comparisons import save
from quantpref.simulate import simulate

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounts a tmpfs")


@pytest.fixture(scope="session")
def straight(tmp_path_factory):
    folder = tmp_path_factory.mktemp("places")
    save(folder / "people.jsonl", simulate(120, seed=11).comparisons)
    ends(train_command(folder / "people.jsonl", folder / "run"))
    return folder


@pytest.fixture
def disk(tmp_path):
    """A disk of 40 MiB of its own."""
    folder = tmp_path / "small disk ü"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", folder], check=True)
    yield folder
    subprocess.run(["umount", folder], check=True)


@contextmanager
def filled(disk):
    """Not a byte is free in here."""
    with (disk / "ballast").open("wb", buffering=0) as ballast:
        block = 1 << 20
        while block:
            try:
                ballast.write(b"\0" * block)
            except OSError:
                block //= 2
    try:
        yield
    finally:
        (disk / "ballast").unlink()


def ended_on_a_full_disk(argv, disk, when):
    """Start; fill the disk once `when()` is true; what it says at its end."""
    with subprocess.Popen(
        argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=environment(SLOW_FSYNC="0.02")
    ) as process:
        while process.poll() is None and not when():
            pass
        with filled(disk):
            _, err = process.communicate()
    assert process.returncode == 1, err[-2000:]
    assert err.startswith("error: ") and err.count("\n") == 1 and "No space left on device" in err, err[-2000:]


@needs_root
@pytest.mark.parametrize("kind", ["log or checkpoint of SFT", "adapter of SFT", "checkpoint of DPO", "adapter of DPO"])
def test_the_disk_fills_up_in_training(straight, disk, kind):
    data, out, arm = straight / "people.jsonl", disk / "run", kind.split()[-1].lower()
    if "adapter" in kind:
        moment = lambda: any(out.glob(f".llama3_{arm}_4bit_final.*.tmp"))  # noqa: E731
    else:
        moment = lambda: steps_logged(out, arm) >= 5  # noqa: E731
    ended_on_a_full_disk(train_command(data, out), disk, moment)
    assert not (out / f"llama3_{arm}_4bit_final").exists()
    assert final_names_are_whole(out) >= 1  # a checkpoint to go on from
    assert "goes on from" in ends(train_command(data, out))
    assert adapters(out) == adapters(straight / "run")


@needs_root
def test_the_disk_is_full_when_results_are_written(straight, disk):
    out = disk / "run"
    shutil.copytree(straight / "run", out)
    argv = command("evaluate_dpo.py", straight / "people.jsonl", out)
    ended_on_a_full_disk(argv, disk, lambda: (out / ".lock").exists())
    assert not (out / "evaluation").exists()
    ends(argv)
    final_names_are_whole(out)


@needs_root
def test_the_disk_is_full_when_data_are_written(disk):
    argv = ["data/build_contrastive.py", "simulate", "--users", "20000", "--out", str(disk / "people.jsonl")]
    import sys

    ended_on_a_full_disk([sys.executable, *argv], disk, lambda: True)
    assert list(disk.iterdir()) == []


@needs_root
def test_too_small_a_disk_is_said_before_training(straight, tmp_path):
    folder = tmp_path / "tiny disk"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder], check=True)
    try:
        said = ends(train_command(straight / "people.jsonl", folder / "run"), status=1)
        assert "needed for adapters and checkpoints" in said and not any((folder / "run").iterdir())
    finally:
        subprocess.run(["umount", folder], check=True)


@needs_root
def test_a_disk_that_cannot_be_written_to(straight, disk):
    shutil.copytree(straight / "run", disk / "run")
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    data = straight / "people.jsonl"
    assert "finished" in ends(train_command(data, disk / "run"))  # it has nothing to write
    for argv in (train_command(data, disk / "new"), command("evaluate_dpo.py", data, disk / "run")):
        assert "Read-only file system" in ends(argv, status=1)
    assert "✗ disk" in subprocess.run(
        command("verify_dpo_setup.py", data, disk / "new"), capture_output=True, text=True, cwd=ROOT, env=environment()
    ).stdout  # fmt: skip


@pytest.mark.parametrize(
    "surroundings",
    [
        {"HOME": "/nowhere", "XDG_CACHE_HOME": "/nowhere/cache", "HF_HOME": "/nowhere/hf"},
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"},
        {"FORBID": "network", "HF_HUB_OFFLINE": "0"},
        {"FORBID": "pickle"},
    ],
    ids=["no home", "no UTF-8", "no network", "no pickle"],
)
def test_everything_runs_in(straight, tmp_path, surroundings):
    """Verify, train (stopped once, so that it resumes), evaluate."""
    data, out = straight / "people.jsonl", tmp_path / "run ü ö"
    if "LC_ALL" in surroundings:
        assert "this locale cannot spell" in ends(train_command(data, out), status=2, **surroundings)
        out = tmp_path / "run"
    ends(command("verify_dpo_setup.py", data, out), **surroundings)
    argv = train_command(data, out)
    with subprocess.Popen(
        argv, cwd=ROOT, env=environment(**surroundings), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    ) as process:
        while process.poll() is None and steps_logged(out, "dpo") < 4:
            pass
        process.terminate()
        process.communicate()
    assert process.returncode == 143
    assert "goes on from" in ends(argv, **surroundings)
    assert adapters(out) == adapters(straight / "run")
    assert "VERDICT" in ends(command("evaluate_dpo.py", data, out, "--show", "2"), **surroundings)
