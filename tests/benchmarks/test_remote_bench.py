"""remote_bench: requests are delayed and counted, values are checked, and orders after a resume compared."""

from __future__ import annotations

import dataclasses
import http.client
import http.server
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import write_tiny

from benchmarks import remote_bench
from benchmarks.object_store import HOST
from benchmarks.peers.contract import Item
from benchmarks.remote import process
from benchmarks.remote.loaders import REMOTES, Batches, RemoteJob
from benchmarks.remote.proxy import Counts, proxy, read_counts
from pipelines.dataset.open import open_folder

OURS, DISTINCT, SAMPLES = "packed", 3, 8
BODY = bytes(range(256)) * 20_000


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.send_response(200)
        if self.path == "/chunked":
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            self.wfile.write(b"3\r\nabc\r\n0\r\n\r\n")
            return
        self.send_header("Content-Length", str(len(BODY)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(BODY)

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, *args: object) -> None:
        pass


@contextmanager
def _server() -> Iterator[int]:
    with http.server.ThreadingHTTPServer((HOST, 0), _Handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1]
        server.shutdown()


def test_the_proxy_delays_answers_and_counts_requests_and_bytes(tmp_path: Path) -> None:
    with _server() as port, proxy(port, 0.03, tmp_path / "counts") as between:
        assert read_counts(between.file) == Counts(0, 0)
        connection = http.client.HTTPConnection(HOST, between.port)
        started = time.perf_counter()
        for method, path, body in (("GET", "/", BODY), ("HEAD", "/", b""), ("GET", "/chunked", b"abc")):
            connection.request(method, path)
            answer = connection.getresponse()
            assert (answer.status, answer.read()) == (200, body)
        assert time.perf_counter() - started >= 0.09
        connection.close()
        # It counts an answer after it is sent.
        deadline = time.monotonic() + 10
        while read_counts(between.file).requests < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        # A chunked body with its frame.
        assert read_counts(between.file) == Counts(3, len(BODY) + 13)


@pytest.mark.parametrize(
    ("got", "expected"),
    [
        ([[2, 1], [3, 4]], "same batches"),
        ([[1, 3], [2, 4]], "each sample once"),
        ([[1, 2], [3]], "no"),
        ([[1, 2], [3, 3]], "no"),
    ],
)
def test_orders_after_a_resume_are_compared(got: list[list[int]], expected: str) -> None:
    assert remote_bench.compare_orders([[1, 2], [3, 4]], got) == expected


def _task(tmp_path: Path) -> process.Task:
    """A task on the files of this project's row, which it reads as local ones."""
    source = write_tiny(tmp_path, train=DISTINCT, validation=1, size=8) / "train"
    folder = tmp_path / "packed"
    folder.mkdir()
    process.write(process.Task("write", OURS, str(source), str(folder), SAMPLES, 8))
    return process.Task("check", OURS, str(source), "", SAMPLES, 8, url=str(folder), batch=2)


def test_a_resume_continues_the_order_of_an_epoch(tmp_path: Path) -> None:
    task = _task(tmp_path)
    order, same_bits = process.check(task)
    assert same_bits and [len(batch) for batch in order] == [2] * (SAMPLES // 2)
    task = dataclasses.replace(task, action="stop", steps=1, state=str(tmp_path / "state"))
    assert process.stop(task)
    task = dataclasses.replace(task, action="resume")
    assert process.resume(task) == order[1:]
    ranks = [process.resume(dataclasses.replace(task, rank=rank, ranks=2, batch=1)) for rank in range(2)]
    assert [[*one, *other] for one, other in zip(*ranks, strict=True)] == order[1:]


@pytest.mark.parametrize("fault", ["none", "rounding", "value", "missing", "repeated"])
def test_values_and_samples_are_checked(fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = _task(tmp_path)
    split = open_folder(Path(task.source))
    order = {"missing": range(7), "repeated": [*range(SAMPLES), 0]}.get(fault, range(SAMPLES))

    def deliver() -> Iterator[list[Item]]:
        samples = process.numbered([split.read(index) for index in range(DISTINCT)], SAMPLES)
        for index in order:
            counts = samples[index].counts.astype(np.float64)
            volume = torch.from_numpy(np.log1p(counts).astype(np.float32)).permute(3, 0, 1, 2)[None]
            if fault == "rounding":
                volume *= 1 + 2**-23
            if fault == "value" and index == 5:
                volume[0, 3, 7, 7, 7] += 1e-5
            yield [(volume, samples[index].target)]

    def open_(job: RemoteJob) -> Batches:
        return Batches(deliver)

    monkeypatch.setitem(REMOTES, OURS, dataclasses.replace(REMOTES[OURS], open=open_))
    assert not process.stop(task)
    if fault in ("none", "rounding"):
        got, same_bits = process.check(task)
        assert got == [[index] for index in order] and same_bits == (fault == "none")
    else:
        with pytest.raises(ValueError):
            process.check(task)


@pytest.mark.slow
def test_rows_are_measured(tmp_path: Path) -> None:
    flags = ["--size", "32", "--samples", "16", "--distinct", "2", "--rounds", "1", "--latency", "5"]
    (row,) = remote_bench.main([*flags, "--rows", OURS, "--output", str(tmp_path)]).values()
    assert row.same_bits and row.resumes == row.other_ranks == "same batches" and row.first_ms > 5
    first, second = row.epochs
    # Requests for neighbouring samples are joined, and those for the second epoch begin in the first.
    assert first.requests.median > 0.5 and first.mb.median > 0 and first.server_ms.median > 0
    assert second.samples_per_s.median > 0 and second.cpu_ms.median > 0
    (saved,) = tmp_path.glob("*.json")
    assert json.loads(saved.read_text())["results"]["rows"].keys() == {OURS}
