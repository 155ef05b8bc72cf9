"""runs.py: nothing half-written, nothing overwritten, one line for what a user can cause."""

import errno
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from quantpref.runs import (
    RunError,
    UserError,
    atomic_file,
    atomic_folder,
    git_commit,
    one_line_errors,
    read_json,
    set_aside,
    sha256,
    write_json,
    write_text,
)

ROOT = Path(__file__).resolve().parent.parent


def tree(folder: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


# Atomic writes


def test_atomic_file_stands_only_when_the_block_ends(tmp_path):
    path = tmp_path / "deep" / "er" / "x.txt"
    with atomic_file(path) as temporary:
        assert temporary.parent == path.parent and temporary != path
        temporary.write_text("new")
        assert not path.exists()
    assert tree(tmp_path) == {"deep": None, "deep/er": None, "deep/er/x.txt": b"new"}


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("written", [True, False])
def test_atomic_file_leaves_the_old_file_on_an_exception(tmp_path, error, written):
    path = tmp_path / "x.txt"
    path.write_text("old")
    with pytest.raises(error), atomic_file(path) as temporary:
        if written:
            temporary.write_text("half")
        raise error
    assert tree(tmp_path) == {"x.txt": b"old"}


def test_atomic_file_replaces_a_file_and_no_folder(tmp_path):
    write_text(tmp_path / "x.txt", "one")
    write_text(tmp_path / "x.txt", "zwei é")
    assert (tmp_path / "x.txt").read_bytes() == "zwei é".encode()
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError):
        write_text(tmp_path / "folder", "x")
    assert tree(tmp_path) == {"x.txt": "zwei é".encode(), "folder": None}


def test_a_block_that_writes_nothing_is_an_error(tmp_path):
    (tmp_path / "x.txt").write_text("old")
    with pytest.raises(FileNotFoundError), atomic_file(tmp_path / "x.txt"):
        pass
    assert tree(tmp_path) == {"x.txt": b"old"}


def test_atomic_folder_stands_only_when_the_block_ends(tmp_path):
    path = tmp_path / "runs" / "one"
    with atomic_folder(path) as temporary:
        (temporary / "sub").mkdir()
        (temporary / "sub" / "x.txt").write_text("x")
        assert not path.exists() and temporary.parent == path.parent
    assert tree(tmp_path) == {"runs": None, "runs/one": None, "runs/one/sub": None, "runs/one/sub/x.txt": b"x"}


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_atomic_folder_leaves_nothing_on_an_exception(tmp_path, error):
    with pytest.raises(error), atomic_folder(tmp_path / "one") as temporary:
        (temporary / "sub").mkdir()
        (temporary / "sub" / "x.txt").write_text("half")
        raise error
    assert tree(tmp_path) == {}


def test_atomic_folder_never_replaces_a_folder_with_files(tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "mine.txt").write_text("mine")
    with pytest.raises(OSError), atomic_folder(tmp_path / "one") as temporary:
        (temporary / "x.txt").write_text("new")
    assert tree(tmp_path) == {"one": None, "one/mine.txt": b"mine"}


def test_atomic_folder_fills_an_empty_folder_and_no_file(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("mine")
    with atomic_folder(tmp_path / "empty") as temporary:
        (temporary / "x.txt").write_text("new")
    with pytest.raises(OSError), atomic_folder(tmp_path / "file") as temporary:
        (temporary / "x.txt").write_text("new")
    assert tree(tmp_path) == {"empty": None, "empty/x.txt": b"new", "file": b"mine"}


def test_atomic_folder_starts_empty_after_a_kill(tmp_path):
    """A process of the same id that was killed half-way left its temporary folder behind."""
    with pytest.raises(SystemExit), atomic_folder(tmp_path / "one") as temporary:
        name = temporary.name
        raise SystemExit
    (tmp_path / name).mkdir()
    (tmp_path / name / "stale.txt").write_text("stale")
    with atomic_folder(tmp_path / "one") as temporary:
        (temporary / "x.txt").write_text("x")
    assert tree(tmp_path) == {"one": None, "one/x.txt": b"x"}


def test_a_killed_process_leaves_nothing_under_a_final_name(tmp_path):
    program = (
        "import os, pathlib, sys; from quantpref.runs import *\n"
        "with atomic_folder(pathlib.Path(sys.argv[1]) / 'run') as folder:\n"
        "    with atomic_file(folder / 'x.txt') as file:\n"
        "        file.write_text('half'); os.kill(os.getpid(), 9)"
    )
    ended = subprocess.run([sys.executable, "-c", program, tmp_path], cwd=ROOT)
    assert ended.returncode == -9
    assert not (tmp_path / "run").exists() and all(p.name.startswith(".") for p in tmp_path.rglob("*"))


def test_set_aside_takes_the_first_free_number(tmp_path):
    names = []
    for i in range(3):
        (tmp_path / "run.v2").mkdir()
        (tmp_path / "run.v2" / "x.txt").write_text(str(i))
        names.append(set_aside(tmp_path / "run.v2").name)
    assert names == ["run.v2.1", "run.v2.2", "run.v2.3"]
    (tmp_path / "run.v2").write_text("a file")
    (tmp_path / "run.v2.2").rename(tmp_path / "moved")
    assert set_aside(tmp_path / "run.v2") == tmp_path / "run.v2.2"
    assert (tmp_path / "run.v2.2").read_text() == "a file" and not (tmp_path / "run.v2").exists()
    assert [(tmp_path / name / "x.txt").read_text() for name in ("run.v2.1", "moved", "run.v2.3")] == ["0", "1", "2"]


# JSON and hashes


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_write_json_refuses_what_is_not_json(tmp_path, number):
    write_json(tmp_path / "x.json", {"é": [1.5, None]})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "x.json", {"arms": [{"accuracy": number}]})
    assert list(tmp_path.iterdir()) == [tmp_path / "x.json"]
    assert read_json(tmp_path / "x.json") == {"é": [1.5, None]}
    assert (tmp_path / "x.json").read_text(encoding="utf-8") == '{\n  "é": [\n    1.5,\n    null\n  ]\n}\n'


def test_read_json_says_what_is_wrong(tmp_path):
    with pytest.raises(UserError, match=r"gone\.json: not found$"):
        read_json(tmp_path / "gone.json")
    for content in (b"{", b"", b"\xff\xfe"):
        (tmp_path / "x.json").write_bytes(content)
        with pytest.raises(UserError, match=r"x\.json: cannot be read as JSON \(.*\); restore or remove it$"):
            read_json(tmp_path / "x.json")
    with pytest.raises(UserError, match="cannot be read as JSON"):
        read_json(tmp_path)


def test_sha256_of_a_file(tmp_path):
    content = os.urandom(3_000_000)
    (tmp_path / "x").write_bytes(content)
    assert sha256(tmp_path / "x") == hashlib.sha256(content).hexdigest()


def test_git_commit():
    found = git_commit()
    if not (ROOT / ".git").exists():
        pytest.skip("not a checkout")
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found is not None and found.removesuffix("-dirty") == head.stdout.strip()


# One line for what a user can cause


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (UserError("x.jsonl, line 7: wrong;\n  correct it"), 2, "error: x.jsonl, line 7: wrong; correct it\n"),
        (RunError("loss is NaN"), 1, "error: loss is NaN\n"),
        (KeyboardInterrupt(), 130, "error: interrupted; nothing unfinished stands under a final name\n"),
        (
            PermissionError(errno.EACCES, "Permission denied", "/x/y"),
            1,
            "error: /x/y: Permission denied; is there space, and the right to write there?\n",
        ),
        (
            OSError(errno.ENOSPC, "No space left on device"),
            1,
            "error: writing: No space left on device; is there space, and the right to write there?\n",
        ),
    ],
)
def test_one_line_and_an_exit_status(capfd, error, status, line):
    with pytest.raises(SystemExit) as stop, one_line_errors():
        raise error
    assert stop.value.code == status
    assert capfd.readouterr() == ("", line)


@pytest.mark.parametrize("error", [ValueError("a defect"), OSError("a library's own"), AssertionError("ours")])
def test_defects_keep_their_traceback(error):
    with pytest.raises(type(error)), one_line_errors():
        raise error


def test_an_output_folder_that_cannot_be_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    command = [sys.executable, "data/build_contrastive.py", "simulate", "--users", "5", "--out", tmp_path / "file/x"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 1 and ended.stderr.startswith("error: ") and ended.stderr.count("\n") == 1
    assert f"{tmp_path / 'file'}" in ended.stderr


def test_manifests_do_not_depend_on_the_terminal(tmp_path):
    """UTF-8 whatever the locale says."""
    program = "import pathlib, sys; from quantpref.runs import *; write_json(pathlib.Path(sys.argv[1]), '\\xe9\\u4f8d')"
    environment = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    subprocess.run([sys.executable, "-c", program, tmp_path / "x"], cwd=ROOT, env=environment, check=True)
    assert json.loads((tmp_path / "x").read_bytes().decode("utf-8")) == "é侍"
