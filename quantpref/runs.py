"""What keeps a run's files whole: atomic writes, hashes, manifests, one run a folder, and the kinds of failure."""

import contextlib
import fcntl
import hashlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parent.parent
MANIFEST = "manifest.json"
RECORDED_PACKAGES = (
    "torch", "transformers", "trl", "peft", "bitsandbytes", "datasets", "accelerate", "unsloth",
)  # fmt: skip


class UserError(Exception):
    """Wrong input or flags, in one line that says what to do. The scripts exit with status 2."""


class RunError(Exception):
    """A check or a run failed although the input was right. The scripts exit with status 1."""


class Stopped(KeyboardInterrupt):
    """SIGTERM or Ctrl-C was heeded; the scripts exit with 128 + the signal's number, as shells expect."""

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(message)
        self.signum = signum


INTERRUPTED = "interrupted; nothing unfinished stands under a final name"


def _terminated(signum: int, frame: Any) -> NoReturn:
    raise Stopped(signum, INTERRUPTED)


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn the errors that a user can cause into one line on stderr and an exit status."""
    before = signal.signal(signal.SIGTERM, _terminated)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a title that the terminal cannot show must not end a run
    try:
        yield
    except UserError as error:
        fail(str(error), 2)
    except RunError as error:
        fail(str(error), 1)
    except Stopped as stop:
        fail(str(stop), 128 + stop.signum)
    except KeyboardInterrupt:
        fail(INTERRUPTED, 128 + signal.SIGINT)
    except Exception as error:
        status, name = _system_error(error)
        if status is None:  # a defect, or a library's own use of OSError: nothing that a user can act on
            raise
        fail(f"{name}: {os.strerror(status)}; is there space, and the right to write there?", 1)
    finally:
        signal.signal(signal.SIGTERM, before)


def _system_error(error: Exception) -> tuple[int | None, str]:
    """The operating system's error number behind an exception, None where there is none, and the file.

    safetensors and tokenizers, written in Rust, raise types of their own, with the number in the text.
    """
    if isinstance(error, OSError):
        return error.errno, str(error.filename or "writing")
    number = re.search(r"\(os error (\d+)\)", str(error))
    return (int(number[1]) if number else None), "writing"


def fail(message: str, status: int) -> NoReturn:
    sys.stderr.write(f"error: {' '.join(message.split())}\n")
    sys.exit(status)


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary sibling that becomes `path` only when the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        _sync(temporary)
        temporary.replace(path)
        _sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary sibling folder that becomes `path`; an existing `path` is never replaced."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        for file in temporary.rglob("*"):
            _sync(file)
        _sync(temporary)
        temporary.rename(path)  # fails where `path` holds files: nothing finished is overwritten
        _sync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other runs out of `folder`; the operating system takes the lock back however this process ends.

    Raises:
        RunError: another run is at work there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / ".lock"
    while True:
        with path.open("a+", encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                raise RunError(
                    f"{folder}: another run is at work there (process {file.read().strip()}); wait for it, or choose"
                    " another --output-dir"
                ) from None
            # Between open and lock its last holder may have removed the file, and the lock would hold nobody out.
            if not (path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat())):
                continue
            file.truncate(0)
            file.write(f"{os.getpid()}\n")
            file.flush()
            try:
                yield
            finally:
                path.unlink()
            return


def remove_leftovers(folder: Path) -> None:
    """Remove what killed processes were writing in `folder`; only under its lock, as live ones write there too."""
    for path in folder.glob(".*.tmp"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def set_aside(path: Path) -> Path:
    """Rename `path` to the first free `path.1`, `path.2`, ...: nothing earlier is lost."""
    n = 1
    while (aside := path.with_name(f"{path.name}.{n}")).exists():
        n += 1
    path.rename(aside)
    return aside


def write_text(path: Path, text: str) -> None:
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write strict JSON: a NaN in a result is a defect, so it is an error here."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: not found") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error}); restore or remove it") from None


def write_manifest(folder: Path, values: dict[str, Any]) -> None:
    """Write `values` with the SHA-256 of every file in `folder`, and of itself: the last file that a folder gets."""
    own = folder / MANIFEST
    files = {str(p.relative_to(folder)): sha256(p) for p in sorted(folder.rglob("*")) if p.is_file() and p != own}
    values = {name: value for name, value in values.items() if name != "seal"} | {"files": files}
    write_json(own, {**values, "seal": _seal(values)})


def _seal(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def damage(folder: Path) -> str | None:
    """What is wrong with a folder that `write_manifest` completed, as text that names the file; None: it is whole."""
    try:
        values = read_json(folder / MANIFEST)
    except UserError as error:
        return str(error)
    if not isinstance(values, dict) or values.pop("seal", None) != _seal(values):
        return f"{folder / MANIFEST}: is not as it was written"
    for name, digest in values["files"].items():
        path = folder / name
        if not path.is_file():
            return f"{path}: is missing"
        if sha256(path) != digest:
            return f"{path}: is not the file that its manifest records"
    return None


def versions() -> dict[str, str]:
    """Python's and the packages' that a result depends on."""
    found = {"python": sys.version.split()[0]}
    for name in RECORDED_PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def environment() -> dict[str, Any]:
    """Versions, device and git commit, for manifests and results."""
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"versions": versions(), "device": gpu or "cpu", "git_commit": git_commit()}


def git_commit() -> str | None:
    """The commit of this checkout, with `-dirty` where tracked files differ; None outside of git."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(  # noqa: S603 - a fixed command, no shell
            command, capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
