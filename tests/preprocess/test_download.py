"""Downloads from a server on this machine that behaves as badly as it is told to."""

from __future__ import annotations

import errno
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

from pipelines.dataset.open import open_split
from pipelines.errors import DataError, UserError
from preprocess.download import main, unpack
from preprocess.fetch import fetch

Answer = Callable[["Handler"], None]


class Server(ThreadingHTTPServer):
    """Serves `content` under every path, as `answers` say for the first requests, and well after them."""

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
    """Answer as one should, ranges included."""
    content, asked = handler.server.content, handler.headers.get("Range")
    if not asked or handler.headers.get("If-Range") != handler.server.tag:
        return handler.send(200, content)
    start = int(asked.removeprefix("bytes=").removesuffix("-"))
    if start >= len(content):
        return handler.send(416, b"")
    rest = f"bytes {start}-{len(content) - 1}/{len(content)}"
    return handler.send(206, content[start:], Content_Range=rest)


def breaks_off(handler: Handler) -> None:
    """Promise everything, and send a third of what is asked for."""
    start = int((handler.headers.get("Range") or "bytes=0-").removeprefix("bytes=").removesuffix("-"))
    content = handler.server.content
    rest = content[start : start + len(content) // 3]
    if start:
        where = f"bytes {start}-{len(content) - 1}/{len(content)}"
        return handler.send(206, rest, length=len(content) - start, Content_Range=where)
    return handler.send(200, rest, length=len(content))


def promises_more(handler: Handler) -> None:
    """Say that there is more than there is."""
    handler.send(200, handler.server.content, length=len(handler.server.content) + 1000)


def promises_less(handler: Handler) -> None:
    """Say that there is less than there is, and send that."""
    handler.send(200, handler.server.content[:-500])


def knows_no_ranges(handler: Handler) -> None:
    """Send everything whatever is asked for."""
    handler.send(200, handler.server.content)


def is_silent(handler: Handler) -> None:
    """Say nothing for longer than anybody waits."""
    threading.Event().wait(3)
    handler.close_connection = True


def hangs_up(handler: Handler) -> None:
    """Close the connection without a word."""
    handler.close_connection = True


def refuses(handler: Handler) -> None:
    """There is no such file."""
    handler.send(404, b"")


def stumbles(handler: Handler) -> None:
    """An error of its own."""
    handler.send(503, b"")


@pytest.fixture
def server() -> Iterator[Server]:
    """A server that is up while the test runs."""
    with Server(("127.0.0.1", 0), Handler) as running:
        running.answers, running.asked = [], []
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        yield running
        running.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A small set as it is published: a gzipped tar with the splits in a folder of its own."""
    root = write_tiny(tmp_path_factory.mktemp("small"), train=3, validation=2, format_name="tfrecord_gzip")
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as tar:
        tar.add(root, "cosmoUniverse_small")
    return file.getvalue()


def get(server: Server, path: Path, **options: str) -> None:
    """Fetch without patience."""
    fetch(server.url, path, shown=False, timeout=0.5, pause=0.0, **options)


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
def test_everything_arrives_in_the_end(answers: list[Answer], server: Server, tmp_path: Path) -> None:
    server.content, server.answers = bytes(range(256)) * 4000, list(answers)
    get(server, tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == server.content
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    if answers == [breaks_off]:
        assert server.asked == [None, f"bytes={len(server.content) // 3}-"]


def test_another_run_goes_on(server: Server, tmp_path: Path) -> None:
    server.content, server.answers = bytes(range(256)) * 4000, [breaks_off, *[stumbles] * 5]
    with pytest.raises(DataError, match=r"answers 503 .* 5 times in a row") as refusal:
        get(server, tmp_path / "x")
    assert server.url in str(refusal.value)
    get(server, tmp_path / "x")
    assert server.asked[-1] == f"bytes={len(server.content) // 3}-"
    assert (tmp_path / "x").read_bytes() == server.content


def test_a_file_that_has_changed_is_fetched_anew(server: Server, tmp_path: Path) -> None:
    server.content, server.answers = b"old" * 90000, [breaks_off, *[stumbles] * 5]
    with pytest.raises(DataError):
        get(server, tmp_path / "x")
    server.content, server.tag = b"new" * 90001, '"two"'
    get(server, tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == server.content


@pytest.mark.parametrize(
    ("answer", "said"),
    [(refuses, "answers 404"), (promises_more, "broke off"), (hangs_up, "sensible"), (is_silent, "sensible")],
)
def test_a_server_that_will_not_is_named(answer: Answer, said: str, server: Server, tmp_path: Path) -> None:
    server.content, server.answers = b"x" * 9000, [answer] * 12
    with pytest.raises(DataError, match=said) as refusal:
        get(server, tmp_path / "x")
    assert server.url in str(refusal.value) and not (tmp_path / "x").exists()


def test_a_server_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be reached"):
        fetch("http://127.0.0.1:9/x", tmp_path / "x", shown=False, timeout=0.5, pause=0.0)


def test_another_sum_than_promised_is_refused(server: Server, tmp_path: Path) -> None:
    server.content = b"content"
    with pytest.raises(DataError, match="its SHA-256 is"):
        get(server, tmp_path / "x", sha256=hashlib.sha256(b"other").hexdigest())
    assert list(tmp_path.iterdir()) == [] or not (tmp_path / "x").exists()
    get(server, tmp_path / "x", sha256=hashlib.sha256(b"content").hexdigest().upper())
    assert (tmp_path / "x").read_bytes() == b"content"


def test_the_program_from_address_to_verified_samples(
    server: Server, archive: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.content = archive
    arguments = ["--small", "-o", str(tmp_path / "small"), "--url", server.url]
    assert main(arguments) == 0
    assert "content" in capsys.readouterr().out
    for split, count in (("train", 3), ("validation", 2)):
        assert len(open_split(tmp_path / "small", split)) == count
    assert sorted(path.name for path in (tmp_path / "small").iterdir()) == ["train", "validation"]
    assert main(arguments) == 0
    assert len(server.asked) == 1


def test_a_damaged_sample_in_a_sound_archive_is_fetched_again_on_request(
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
        assert "remove train and validation there" in capsys.readouterr().err
    server.content = archive
    for split in ("train", "validation"):
        shutil.rmtree(root / split)
    assert main(arguments) == 0 and len(open_split(root, "train")) == 3


@pytest.mark.parametrize("answer", [promises_less, lambda handler: handler.send(200, b"<html>Sorry</html>")])
def test_what_is_no_archive_is_refused_and_fetched_again(
    answer: Answer, server: Server, archive: bytes, tmp_path: Path
) -> None:
    server.content, server.answers = archive, [answer]
    done = program("preprocess.download", "--small", "-o", tmp_path / "small", "--url", server.url)
    assert done.code == 1
    assert "is no sound archive" in done.err and "Traceback" not in done.err
    assert list((tmp_path / "small").iterdir()) == []
    assert main(["--small", "-o", str(tmp_path / "small"), "--url", server.url]) == 0


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    """A member of a tar file that is up to no good."""
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
    with pytest.raises(DataError, match="do not trust"):
        unpack(tmp_path / "bad.tar", root)
    assert list(root.iterdir()) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.tar", "deep"]


def test_other_files_are_left_out_and_twins_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name in ("README", "x/train/a.tfrecord", "x/train/b.txt", "x/validation/a.tfrecord"):
            tar.addfile(member(name), io.BytesIO())
    assert unpack(tmp_path / "a.tar", tmp_path) == 2
    with tarfile.open(tmp_path / "b.tar", "w") as tar:
        for name in ("x/train/a.tfrecord", "y/train/a.tfrecord"):
            tar.addfile(member(name), io.BytesIO())
    with pytest.raises(UserError, match="twice"):
        unpack(tmp_path / "b.tar", tmp_path)


@pytest.mark.parametrize(
    ("arguments", "said"), [([], "--small"), (["--small", "--url", "ftp://x/y"], "expected an http")]
)
def test_what_does_not_fit_is_one_line(arguments: list[str], said: str, tmp_path: Path) -> None:
    done = program("preprocess.download", *arguments, "-o", tmp_path / "x")
    assert done.code == 1
    assert said in done.err and "Traceback" not in done.err


@pytest.mark.parametrize(
    "error", [OSError(errno.EHOSTUNREACH, "No route to host"), ssl.SSLError(1, "bad record")]
)
def test_a_network_that_fails_midway_is_tried_again(
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


def test_the_sum_of_an_archive_that_is_there_is_checked(
    server: Server, archive: bytes, tmp_path: Path
) -> None:
    (tmp_path / "small.tgz").write_bytes(archive)
    line = ["--small", "-o", str(tmp_path), "--url", server.url, "--sha256"]
    with pytest.raises(SystemExit):
        main([*line, "0" * 64])
    assert not (tmp_path / "small.tgz").exists() and not (tmp_path / "train").exists()
    server.content = archive
    assert main([*line, hashlib.sha256(archive).hexdigest()]) == 0


def test_what_was_killed_between_the_splits_goes_on(
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
