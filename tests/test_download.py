"""MovieLens-1M from a local server: whole, or one line said and nothing left behind."""

import hashlib
import io
import socket
import stat
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from quantpref import download
from quantpref.download import download_ml_1m
from quantpref.runs import UserError

RATINGS = b"1::1193::5::978300760\n"
MOVIES = "1193::One Flew Over the Cuckoo's Nest (1975)::Drama\n".encode("latin-1")
GOOD = {
    "ml-1m/": b"",
    "ml-1m/ratings.dat": RATINGS,
    "ml-1m/movies.dat": MOVIES,
    "ml-1m/users.dat": b"1::F::1::10::48067\n",
    "ml-1m/README": b"SUMMARY\n",
    "ml-1m/extra.exe": b"not ours to unpack",
}


def zipped(members: dict[str, bytes], link: str | None = None) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            info = zipfile.ZipInfo(name)
            if name == link:
                info.external_attr = (stat.S_IFLNK | 0o777) << 16
            archive.writestr(info, data)
    return buffer.getvalue()


class Server:
    """Serves `pages` by path; `asked` lists what was asked for."""

    def __init__(self) -> None:
        self.pages: dict[str, bytes] = {}
        self.asked: list[str] = []
        self.short_by = 0  # bytes that the length promises and the body lacks
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.asked.append(self.path)
                page = outer.pages.get(self.path)
                if page is None:
                    self.send_error(404)
                    return
                self.send_response(200)
                self.send_header("Content-Length", str(len(page)))
                self.end_headers()
                self.wfile.write(page[: len(page) - outer.short_by])

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/ml-1m.zip"

    def offer(self, archive: bytes, md5: str | None = None) -> None:
        digest = md5 or hashlib.md5(archive).hexdigest()
        self.pages = {
            "/ml-1m.zip": archive,
            "/ml-1m.zip.md5": f"MD5 (ml-1m.zip) = {digest}\n".encode(),
        }


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(download, "STALL_SECONDS", 2.0)
    server = Server()
    thread = threading.Thread(target=server.http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.http.shutdown()
    server.http.server_close()
    thread.join()


def failure(tmp_path: Path, url: str, **options) -> str:
    """The message of a failed download into a folder that is not there yet; it must not stay."""
    with pytest.raises(UserError) as caught:
        download_ml_1m(tmp_path / "a" / "b", url=url, accept_licence=True, **options)
    assert list(tmp_path.iterdir()) == []
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_good_archive(server: Server, tmp_path: Path, capsys: pytest.CaptureFixture):
    server.offer(zipped(GOOD))
    folder = download_ml_1m(tmp_path / "new", url=server.url, accept_licence=True)
    assert folder == tmp_path / "new" / "ml-1m"
    assert (folder / "ratings.dat").read_bytes() == RATINGS
    assert (folder / "movies.dat").read_bytes() == MOVIES
    left = sorted(path.name for path in (tmp_path / "new").rglob("*"))
    assert left == ["README", "ml-1m", "movies.dat", "ratings.dat", "users.dat"]
    terms = capsys.readouterr().out
    assert "no redistribution" in terms and "for research" in terms and "acknowledge" in terms


def test_a_download_is_never_replaced(server: Server, tmp_path: Path):
    (tmp_path / "ml-1m").mkdir()
    with pytest.raises(UserError, match="is there already; pass --ratings .*ratings.dat --movies"):
        download_ml_1m(tmp_path, url=server.url, accept_licence=True)
    assert server.asked == []


@pytest.mark.parametrize(("answer", "accepted"), [("y", True), ("Yes ", True), ("n", False)])
def test_nothing_is_fetched_before_the_licence_is_accepted(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: str, accepted: bool
):
    server.offer(zipped(GOOD))

    def answers(*_: object) -> str:
        assert server.asked == []
        return answer

    monkeypatch.setattr("builtins.input", answers)
    if accepted:
        assert download_ml_1m(tmp_path, url=server.url).is_dir()
        return
    with pytest.raises(UserError, match="licence was not accepted, so nothing was fetched"):
        download_ml_1m(tmp_path, url=server.url)
    assert server.asked == [] and list(tmp_path.iterdir()) == []


def test_no_terminal_to_ask_is_no(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    with pytest.raises(UserError, match="--accept-licence"):
        download_ml_1m(tmp_path, url=server.url)
    assert server.asked == []


def test_a_wrong_md5(server: Server, tmp_path: Path):
    server.offer(zipped(GOOD), md5="0" * 32)
    message = failure(tmp_path, server.url)
    assert message.startswith(f"{server.url}: its MD5 is {hashlib.md5(zipped(GOOD)).hexdigest()}")
    # A given one replaces the published one, and is not fetched.
    server.asked.clear()
    assert f"the published one is {'a' * 32}" in failure(tmp_path, server.url, md5="A" * 32)
    assert server.asked == ["/ml-1m.zip"]


def test_no_md5_published(server: Server, tmp_path: Path):
    server.pages["/ml-1m.zip.md5"] = b"<html>moved</html>"
    assert failure(tmp_path, server.url) == (
        f"{server.url}.md5: holds no MD5, found '<html>moved</html>'; try again later"
    )


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("../ratings.dat", "a path out of its folder ('../ratings.dat')"),
        ("ml-1m/../../etc/ratings.dat", "a path out of its folder"),
        ("/etc/ratings.dat", "a path out of its folder"),
        ("ml-1m\\..\\..\\ratings.dat", "a path out of its folder"),
        ("C:ratings.dat", "a path out of its folder"),
        ("ml-1m/users.dat", "a link ('ml-1m/users.dat')"),
    ],
)
def test_suspicious_members_refuse_the_archive(server: Server, tmp_path: Path, name: str, found: str):
    link = name if "users" in name else None
    server.offer(zipped({**GOOD, name: b"/etc/passwd"}, link))
    message = failure(tmp_path, server.url)
    assert message.startswith(f"{server.url}: holds {found}")
    assert message.endswith("nothing was unpacked")


def test_archives_that_are_not_whole(server: Server, tmp_path: Path):
    server.offer(b"<html>not a zip</html>")
    assert "is not a whole zip archive" in failure(tmp_path, server.url)
    damaged = bytearray(zipped(GOOD))
    damaged[damaged.index(b"movies.dat") + 12] ^= 0xFF
    server.offer(bytes(damaged))
    assert "is not a whole zip archive" in failure(tmp_path, server.url)
    server.offer(zipped({"ml-1m/ratings.dat": RATINGS}))
    assert "holds no movies.dat; check the address" in failure(tmp_path, server.url)
    server.offer(zipped({**GOOD, "other/movies.dat": b"x"}))
    assert "holds movies.dat twice" in failure(tmp_path, server.url)


def test_a_transfer_that_breaks_off(server: Server, tmp_path: Path):
    archive = zipped(GOOD)
    server.offer(archive)
    server.short_by = 10
    message = failure(tmp_path, server.url, md5="0" * 32)
    assert f"broke off after {len(archive) - 10:,} of {len(archive):,} bytes" in message


def test_too_large(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    server.offer(zipped(GOOD))
    monkeypatch.setattr(download, "MAX_ARCHIVE_BYTES", 100)
    assert "too large or too slow" in failure(tmp_path, server.url)


def test_not_found(server: Server, tmp_path: Path):
    assert failure(tmp_path, server.url).startswith(
        f"{server.url}.md5: cannot be fetched (status 404, Not Found); check the network"
    )


def test_no_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/ml-1m.zip"
    message = failure(tmp_path, url)
    assert message.startswith(f"{url}.md5: cannot be fetched (") and "refused" in message


@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://127.0.0.1/x", "ml-1m.zip", "http://["])
def test_other_addresses(tmp_path: Path, url: str):
    assert failure(tmp_path, url).startswith(url)


def test_a_folder_that_cannot_be_made(server: Server, tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        download_ml_1m(tmp_path / "file" / "below", url=server.url, accept_licence=True)
    assert server.asked == []
