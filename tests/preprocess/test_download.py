"""Downloads from a local server with programmed faults."""

from __future__ import annotations

import errno
import gzip
import hashlib
import http.client
import io
import shutil
import ssl
import tarfile
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from helpers import program, write_tiny

from pipelines.dataset.open import open_folder
from pipelines.errors import DataError
from preprocess.download import main, unpack
from preprocess.fetch import fetch

pytestmark = pytest.mark.usefixtures("inline_workers")

Answer = Callable[["Handler"], None]


class Server(ThreadingHTTPServer):
    """Serve `content` under every path; `answers` handle the first requests, `well` the others."""

    content = b""
    tag = '"one"'
    answers: list[Answer]
    asked: list[str | None]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/small.tgz"


class Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.server.asked.append(self.headers.get("Range"))
        (self.server.answers.pop(0) if self.server.answers else well)(self)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 (http.server's name)
        pass

    def send(self, status: int, content: bytes, length: int | None = None, **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(content) if length is None else length))
        self.send_header("ETag", self.server.tag)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(content)
        self.close_connection = True


def well(handler: Handler) -> None:
    """Answer correctly, with ranges."""
    content, asked = handler.server.content, handler.headers.get("Range")
    if not asked or handler.headers.get("If-Range") != handler.server.tag:
        return handler.send(200, content)
    start = int(asked.removeprefix("bytes=").removesuffix("-"))
    if start >= len(content):
        return handler.send(416, b"")
    rest = f"bytes {start}-{len(content) - 1}/{len(content)}"
    return handler.send(206, content[start:], Content_Range=rest)


def breaks_off(handler: Handler) -> None:
    """Announce the whole rest, and send a third of it."""
    start = int((handler.headers.get("Range") or "bytes=0-").removeprefix("bytes=").removesuffix("-"))
    content = handler.server.content
    rest = content[start : start + len(content) // 3]
    if start:
        where = f"bytes {start}-{len(content) - 1}/{len(content)}"
        return handler.send(206, rest, length=len(content) - start, Content_Range=where)
    return handler.send(200, rest, length=len(content))


def promises_more(handler: Handler) -> None:
    """Announce more than there is."""
    handler.send(200, handler.server.content, length=len(handler.server.content) + 1000)


def promises_less(handler: Handler) -> None:
    """Announce less than there is, and send that."""
    handler.send(200, handler.server.content[:-500])


def knows_no_ranges(handler: Handler) -> None:
    """Ignore ranges."""
    handler.send(200, handler.server.content)


def is_silent(handler: Handler) -> None:
    """Send nothing until the client times out."""
    threading.Event().wait(3)
    handler.close_connection = True


def hangs_up(handler: Handler) -> None:
    """Close the connection without an answer."""
    handler.close_connection = True


def refuses(handler: Handler) -> None:
    """Answer 404."""
    handler.send(404, b"")


def stumbles(handler: Handler) -> None:
    """Answer 503."""
    handler.send(503, b"")


@pytest.fixture
def server() -> Iterator[Server]:
    """Return a running server."""
    with Server(("127.0.0.1", 0), Handler) as running:
        running.answers, running.asked = [], []
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        yield running
        running.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Return a small data set as published: a gzipped tar with the splits in one folder."""
    root = write_tiny(tmp_path_factory.mktemp("small"), train=3, validation=2, format_name="tfrecord_gzip")
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as tar:
        tar.add(root, "cosmoUniverse_small")
    return file.getvalue()


def get(server: Server, path: Path, **options: str) -> None:
    """Fetch with short timeouts."""
    fetch(server.url, path, shown=False, timeout=0.5, pause=0.0, **options)


def refuses_pythons_library(handler: Handler) -> None:
    """Answer 403 to Python's urllib, as some hosts of data sets do."""
    if "urllib" in handler.headers["User-Agent"]:
        return handler.send(403, b"")
    return well(handler)


def asks_for_patience(status: int) -> Answer:
    """Answer `status`, a refusal that is temporary."""
    return lambda handler: handler.send(status, b"", Retry_After="1")


@pytest.mark.parametrize(
    "answers",
    [
        [],
        [breaks_off],
        [breaks_off, breaks_off, stumbles, breaks_off],
        [stumbles, hangs_up, is_silent],
        [breaks_off, knows_no_ranges],
    ],
    ids=lambda answers: "-".join(answer.__name__ for answer in answers) or "nothing",
)
def test_transfer_completes_after_errors(answers: list[Answer], server: Server, tmp_path: Path) -> None:
    server.content, server.answers = bytes(range(256)) * 4000, list(answers)
    get(server, tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == server.content
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    if answers == [breaks_off]:
        assert server.asked == [None, f"bytes={len(server.content) // 3}-"]


@pytest.mark.parametrize("status", [408, 425, 429])
def test_a_temporary_refusal_is_tried_again(status: int, server: Server, tmp_path: Path) -> None:
    server.content, server.answers = b"content", [asks_for_patience(status)] * 3
    get(server, tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == server.content


def test_a_server_that_refuses_pythons_library(server: Server, tmp_path: Path) -> None:
    server.content, server.answers = b"content", [refuses_pythons_library]
    get(server, tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == server.content


def test_another_run_resumes(server: Server, tmp_path: Path) -> None:
    server.content, server.answers = bytes(range(256)) * 4000, [breaks_off, *[stumbles] * 5]
    with pytest.raises(DataError) as error:
        get(server, tmp_path / "x")
    assert error.value.path == server.url and "503" in error.value.fault
    get(server, tmp_path / "x")
    assert server.asked[-1] == f"bytes={len(server.content) // 3}-"
    assert (tmp_path / "x").read_bytes() == server.content


def test_changed_file_is_fetched_from_its_start(server: Server, tmp_path: Path) -> None:
    server.content, server.answers = b"old" * 90000, [breaks_off, *[stumbles] * 5]
    with pytest.raises(DataError):
        get(server, tmp_path / "x")
    server.content, server.tag = b"new" * 90001, '"two"'
    get(server, tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == server.content


@pytest.mark.parametrize("answer", [refuses, promises_more, hangs_up, is_silent])
def test_server_that_does_not_deliver_is_named(answer: Answer, server: Server, tmp_path: Path) -> None:
    server.content, server.answers = b"x" * 9000, [answer] * 12
    with pytest.raises(DataError) as error:
        get(server, tmp_path / "x")
    assert error.value.path == server.url and not (tmp_path / "x").exists()


def test_unreachable_server_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError) as error:
        fetch("http://127.0.0.1:9/x", tmp_path / "x", shown=False, timeout=0.5, pause=0.0)
    assert error.value.path == "http://127.0.0.1:9/x" and "Connection refused" in error.value.fault


def test_wrong_checksum_is_refused(server: Server, tmp_path: Path) -> None:
    server.content = b"content"
    with pytest.raises(DataError) as error:
        get(server, tmp_path / "x", sha256=hashlib.sha256(b"other").hexdigest())
    assert "SHA-256" in error.value.fault and "it holds text" in error.value.fault
    assert list(tmp_path.iterdir()) == [] or not (tmp_path / "x").exists()
    get(server, tmp_path / "x", sha256=hashlib.sha256(b"content").hexdigest().upper())
    assert (tmp_path / "x").read_bytes() == b"content"


def test_program_downloads_unpacks_and_verifies(
    server: Server, archive: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.content = archive
    arguments = ["--small", "-o", str(tmp_path / "small"), "--url", server.url]
    assert main(arguments) == 0
    assert "content" in capsys.readouterr().out
    for split, count in (("train", 3), ("validation", 2)):
        assert len(open_folder(tmp_path / "small" / split)) == count
    assert sorted(path.name for path in (tmp_path / "small").iterdir()) == [".lock", "train", "validation"]
    assert main(arguments) == 0
    assert len(server.asked) == 1


def test_archive_with_a_damaged_sample(
    server: Server, archive: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, server.content = tmp_path / "small", b""
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar, io.BytesIO() as file:
        with tarfile.open(fileobj=file, mode="w") as other:
            for number, member in enumerate(member for member in tar if member.isfile()):
                content = tar.extractfile(member).read()  # type: ignore[union-attr]
                member.size = len(content) - 5 * (number == 0)
                other.addfile(member, io.BytesIO(content))
        server.content = file.getvalue()
    arguments = ["--small", "-o", str(root), "--url", server.url]
    for _ in range(2):
        assert main(arguments) == 1
        assert "remove train and validation" in capsys.readouterr().err
    server.content = archive
    for split in ("train", "validation"):
        shutil.rmtree(root / split)
    assert main(arguments) == 0 and len(open_folder(root / "train")) == 3


def cut_tar(handler: Handler) -> None:
    """Send the tar without gzip and without its end, cut between two members."""
    content = gzip.decompress(handler.server.content)
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        last = tar.getmembers()[-1]
    handler.send(200, content[: last.offset])


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (promises_less, "is not a valid archive"),
        (cut_tar, "is cut off"),
        (lambda handler: handler.send(200, b""), "it is empty"),
        (lambda handler: handler.send(200, b"<!doctype html><title>Log in</title>"), "an HTML page"),
        (lambda handler: handler.send(200, b'{"error": "gone"}'), "a JSON document"),
        (lambda handler: handler.send(200, b"<?xml version='1.0'?><Error/>"), "an XML document"),
        (lambda handler: handler.send(200, b"PK\x03\x04" + bytes(99)), "a zip archive"),
        (lambda handler: handler.send(200, gzip.compress(b"<html>Sorry</html>")), "is not a valid archive"),
    ],
)
def test_invalid_archive_is_refused_and_fetched_again(
    answer: Answer,
    reason: str,
    server: Server,
    archive: bytes,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    server.content, server.answers = archive, [answer]
    arguments = ["--small", "-o", str(tmp_path / "small"), "--url", server.url]
    with pytest.raises(SystemExit) as end:
        main(arguments)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "small.tgz: " in line]
    assert end.value.code == 1 and line.startswith("error: ") and reason in line and ";" in line
    assert [path.name for path in (tmp_path / "small").iterdir()] == [".lock"]
    if answer is promises_less:
        assert main(arguments) == 0


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    """Return a member of a malicious tar file."""
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


@pytest.mark.parametrize(
    "bad",
    [
        member("../train/a.tfrecord"),
        member("/tmp/train/a.tfrecord"),
        member("train/../../train/a.tfrecord"),
        member("train/a.tfrecord", tarfile.SYMTYPE, "/etc/passwd"),
        member("train/a.tfrecord", tarfile.LNKTYPE, "/etc/passwd"),
        member("train", tarfile.SYMTYPE, "/tmp"),
        member("train/a.tfrecord", tarfile.CHRTYPE),
    ],
    ids=lambda info: f"{info.name} {info.type!r}",
)
def test_no_path_leaves_the_folder(bad: tarfile.TarInfo, tmp_path: Path) -> None:
    root = tmp_path / "deep" / "root"
    root.mkdir(parents=True)
    with tarfile.open(tmp_path / "bad.tar", "w") as tar:
        tar.addfile(member("train/sound.tfrecord"), io.BytesIO())
        tar.addfile(bad)
    with pytest.raises(DataError) as error:
        unpack(tmp_path / "bad.tar", root)
    assert bad.name in error.value.fault
    assert list(root.iterdir()) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.tar", "deep"]


def test_other_files_are_skipped_and_duplicates_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        names = "README", "x/train/a.tfrecord", "x/train/b.txt", "./x/validation/a.tfrecord"
        for name in (
            *names,
            "x/train/._a.tfrecord",
            "__MACOSX/x/train/._a.tfrecord",
            ".old/train/a.tfrecord",
        ):
            tar.addfile(member(name), io.BytesIO())
    assert unpack(tmp_path / "a.tar", tmp_path) == 2
    assert not [path for path in (tmp_path / "train").iterdir() if path.name.startswith(".")]
    with tarfile.open(tmp_path / "b.tar", "w") as tar:
        for name in ("x/train/a.tfrecord", "y/train/a.tfrecord"):
            tar.addfile(member(name), io.BytesIO())
    with pytest.raises(DataError) as error:
        unpack(tmp_path / "b.tar", tmp_path)
    assert error.value.path == str(tmp_path / "b.tar")


@pytest.mark.parametrize(
    ("arguments", "said"), [([], "--small"), (["--small", "--url", "ftp://x/y"], "expected an http")]
)
def test_invalid_arguments_are_one_line(arguments: list[str], said: str, tmp_path: Path) -> None:
    done = program("preprocess.download", *arguments, "-o", tmp_path / "x")
    assert done.code == 1
    assert said in done.err and "Traceback" not in done.err


@pytest.mark.parametrize(
    "error", [OSError(errno.EHOSTUNREACH, "No route to host"), ssl.SSLError(1, "bad record")]
)
def test_network_error_during_the_transfer_is_retried(
    error: OSError, server: Server, archive: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, faults = http.client.HTTPResponse.read1, [error]

    def read1(response: http.client.HTTPResponse, count: int = -1) -> bytes:
        if faults:
            raise faults.pop()
        return read(response, count)

    server.content = archive
    monkeypatch.setattr(http.client.HTTPResponse, "read1", read1)
    fetch(server.url, tmp_path / "a", shown=False, pause=0.01)
    assert (tmp_path / "a").read_bytes() == archive and len(server.asked) == 2


def test_checksum_of_an_archive_that_is_already_there(server: Server, archive: bytes, tmp_path: Path) -> None:
    (tmp_path / "small.tgz").write_bytes(archive)
    line = ["--small", "-o", str(tmp_path), "--url", server.url, "--sha256"]
    with pytest.raises(SystemExit):
        main([*line, "0" * 64])
    assert not (tmp_path / "small.tgz").exists() and not (tmp_path / "train").exists()
    server.content = archive
    assert main([*line, hashlib.sha256(archive).hexdigest()]) == 0


def test_unpacking_killed_between_the_splits_resumes(
    archive: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, root, rename = tmp_path / "small.tgz", tmp_path / "root", Path.rename
    path.write_bytes(archive)
    root.mkdir()

    def stopped(source: Path, target: Path) -> Path:
        if target.parent == root and any((root / split).exists() for split in ("train", "validation")):
            raise KeyboardInterrupt
        return rename(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", stopped)
        with pytest.raises(KeyboardInterrupt):
            unpack(path, root)
    assert unpack(path, root) == 5
    assert sorted(found.name for found in root.iterdir()) == ["train", "validation"]
