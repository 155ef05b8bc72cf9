"""Fetch MovieLens-1M from GroupLens, whole and checked, or leave nothing behind."""

import contextlib
import hashlib
import http.client
import re
import shutil
import stat
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
import zipfile
import zlib
from pathlib import Path, PurePosixPath

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn

from quantpref.runs import UserError, atomic_folder

ML_1M_URL = "https://files.grouplens.org/datasets/movielens/ml-1m.zip"
ML_1M_TERMS = f"""\
MovieLens-1M: 1,000,209 ratings by 6,040 users, gathered by GroupLens, University of Minnesota.
Its licence, in brief:
 - for research; no commercial use without permission from GroupLens;
 - no redistribution without separate permission, nor of files made from it;
 - acknowledge it in publications: Harper and Konstan (2015), The MovieLens Datasets: History and
   Context. ACM TiiS 5(4), 19;
 - do not state or imply that the University of Minnesota or GroupLens endorse your work.
The README in the archive has the full text; see also https://grouplens.org/datasets/movielens/1m/
Source: {ML_1M_URL}
"""

FILES = ("ratings.dat", "movies.dat", "users.dat", "README")
NEEDED = ("ratings.dat", "movies.dat")
MAX_ARCHIVE_BYTES = 100_000_000  # the real one has about 6 MB, and 25 MB unpacked
MAX_FILE_BYTES = 500_000_000
STALL_SECONDS = 30.0  # without a byte from the server
TOTAL_SECONDS = 1_800.0


def download_ml_1m(
    folder: Path,
    *,
    url: str = ML_1M_URL,
    md5: str | None = None,
    accept_licence: bool = False,
) -> Path:
    """Show the licence, ask, fetch, check and unpack into `folder/ml-1m`.

    Args:
        md5: of the archive, in hexadecimal; default: as published beside it (`url` + ".md5").
        accept_licence: do not ask.

    Returns:
        The folder that holds `ratings.dat` and `movies.dat`.

    Raises:
        UserError: the licence was not accepted, something stands in the way, the server or the
            archive is not as expected. Nothing is left behind then.
    """
    target = folder / "ml-1m"
    if target.exists():
        raise UserError(
            f"{target}: is there already; pass --ratings {target / 'ratings.dat'} --movies"
            f" {target / 'movies.dat'}, or remove it to download again"
        )
    _accept(accept_licence)
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        with (
            atomic_folder(target) as unpacked,
            tempfile.TemporaryDirectory(dir=folder, prefix=".ml-1m.") as temporary,
        ):
            archive = Path(temporary) / "ml-1m.zip"
            published = md5 or _published_md5(f"{url}.md5")
            found = _fetch(url, archive)
            if found != published.lower():
                raise UserError(
                    f"{url}: its MD5 is {found}, the published one is {published.lower()}; the file"
                    " is damaged or not the published one: try again later"
                )
            _unpack(archive, unpacked, url)
    except OSError as error:
        raise UserError(f"{target}: cannot be written ({error.strerror or error})") from None
    finally:
        for path in made:
            with contextlib.suppress(OSError):
                path.rmdir()  # fails where the download stands in it
    return target


def _accept(accept_licence: bool) -> None:
    console = Console(highlight=False, markup=False)
    console.print(ML_1M_TERMS)
    if accept_licence:
        return
    try:
        answer = console.input("Do you accept these terms and want to download it? [y/N] ")
    except EOFError:
        answer = ""
    if answer.strip().lower() not in ("y", "yes"):
        raise UserError("the licence was not accepted, so nothing was fetched; say y or give --accept-licence")


def _published_md5(url: str) -> str:
    with _open(url) as response:
        text = _read(response, url, 4_096).decode("ascii", errors="replace")
    match = re.search(r"\b[0-9a-fA-F]{32}\b", text)
    if not match:
        raise UserError(f"{url}: holds no MD5, found {text.strip()[:60]!r}; try again later")
    return match[0]


def _fetch(url: str, file: Path) -> str:
    """Write the archive to `file`; returns its MD5."""
    digest = hashlib.md5(usedforsecurity=False)  # GroupLens publishes no other
    deadline = time.monotonic() + TOTAL_SECONDS
    console = Console(stderr=True)
    columns = ("ml-1m.zip", BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with (
        _open(url) as response,
        file.open("wb") as out,
        Progress(*columns, console=console, disable=not console.is_terminal) as progress,
    ):
        length = response.headers.get("Content-Length", "")
        expected = int(length) if length.isdecimal() else None
        task = progress.add_task("", total=expected)
        received = 0
        while block := _read(response, url, 1 << 16):
            received += len(block)
            if received > MAX_ARCHIVE_BYTES or time.monotonic() > deadline:
                raise UserError(f"{url}: too large or too slow ({received:,} bytes); check the address")
            digest.update(block)
            out.write(block)
            progress.update(task, completed=received)
    if expected is not None and received != expected:
        raise UserError(f"{url}: broke off after {received:,} of {expected:,} bytes; try again")
    return digest.hexdigest()


def _open(url: str) -> http.client.HTTPResponse:
    try:
        if urllib.parse.urlsplit(url).scheme not in ("http", "https"):
            raise UserError(f"{url}: is not an http or https address; correct it")
        return urllib.request.urlopen(url, timeout=STALL_SECONDS)  # noqa: S310 - checked above
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise _unreachable(url, error) from None


def _read(response: http.client.HTTPResponse, url: str, size: int) -> bytes:
    try:
        return response.read1(size)  # what has come, so that a slow server is noticed
    except (OSError, http.client.HTTPException) as error:
        raise _unreachable(url, error) from None


def _unreachable(url: str, error: Exception) -> UserError:
    reason = getattr(error, "reason", None) or error
    status = f"status {error.code}, " if isinstance(error, urllib.error.HTTPError) else ""
    return UserError(
        f"{url}: cannot be fetched ({status}{reason}); check the network, or fetch it by hand and"
        " pass --ratings and --movies"
    )


def _unpack(archive: Path, folder: Path, url: str) -> None:
    """Write the four known files into `folder`; one suspicious member refuses the whole archive."""
    try:
        with zipfile.ZipFile(archive) as content:
            wanted: dict[str, zipfile.ZipInfo] = {}
            for member in content.infolist():
                name = _checked_name(member, url)
                if name in FILES and not member.is_dir():
                    if name in wanted:
                        raise UserError(f"{url}: holds {name} twice; nothing was unpacked")
                    wanted[name] = member
            missing = [name for name in NEEDED if name not in wanted]
            if missing:
                raise UserError(f"{url}: holds no {' and no '.join(missing)}; check the address")
            for name, member in wanted.items():
                with content.open(member) as source, (folder / name).open("xb") as out:
                    shutil.copyfileobj(source, out)
    except (zipfile.BadZipFile, zlib.error, RuntimeError, EOFError, ValueError) as e:
        raise UserError(f"{url}: is not a whole zip archive ({e}); try again later") from None


def _checked_name(member: zipfile.ZipInfo, url: str) -> str:
    """The member's file name without its folder."""
    path = PurePosixPath(member.filename)
    leaves = path.is_absolute() or ".." in path.parts or re.search(r"[\\:\0]", member.filename)
    mode = member.external_attr >> 16
    special = stat.S_IFMT(mode) not in (0, stat.S_IFREG, stat.S_IFDIR)
    if leaves or special or member.file_size > MAX_FILE_BYTES:
        found = "a path out of its folder" if leaves else "a link" if special else "a huge file"
        raise UserError(f"{url}: holds {found} ({member.filename[:60]!r}); nothing was unpacked")
    return path.name
