"""Programs whose terminal, reader or disk is gone, and Ctrl-C."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from forked import Forked
from helpers import ROOT, Done, Ranks, config_file, start, write_tiny

from pipelines.console import OutputError, _Stream, check_output
from pipelines.errors import UserError
from pipelines.tables import format_table

NO_READER = "r, w = os.pipe(); os.close(r); os.dup2(w, {0})"
HUNG_UP = "r, w = os.openpty(); os.close(r); os.dup2(w, {0})"
FULL = "os.dup2(os.open('/dev/full', os.O_WRONLY), {0})"
CLOSED = "os.close({0})"

AS_PROGRAM = """
import os, runpy, sys
{0}
from pipelines.console import prepare_program
module, *arguments = sys.argv[1:]
sys.argv = ["-m"]
prepare_program()
sys.argv = [module, *arguments]
runpy.run_module(module, run_name="__main__", alter_sys=True)
"""


def line(streams: str, *words: object) -> list[str]:
    """Return the command of `python -m words...` in a process that runs `streams` first."""
    return [sys.executable, "-c", AS_PROGRAM.format(streams), *map(str, words)]


def run(streams: str, *words: object) -> Done:
    process = start(line(streams, *words))
    out, err = process.communicate(timeout=120)
    return Done(process.wait(), out, err)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("console") / "data", train=8, validation=4)


@pytest.fixture(scope="module")
def trained(data: Path) -> Path:
    """A run of one epoch, trained on two ranks without a terminal or a reader."""
    config = config_file(data.parent / "c.yaml", data, epochs=1, loader={"batch_size": 2})
    folder = data.parent / "run"
    streams = f"{NO_READER.format(1)}; {HUNG_UP.format(2)}"
    words = "cosmoflow_dali.train", "--config", config, "--run-dir", folder
    with Ranks(line(streams, *words), range(2), 2) as ranks:
        assert ranks.end(120)[0] == {0}
    return folder


def test_training_continues_without_a_terminal_and_a_reader(trained: Path) -> None:
    names = "summary.json", "report.html", "predictions.csv", "metrics.jsonl", "mlperf.log"
    assert all((trained / name).stat().st_size for name in names)
    assert len(list((trained / "checkpoints").iterdir())) >= 1


@pytest.mark.parametrize("stream", [HUNG_UP, CLOSED], ids=["hung up", "closed"])
def test_simulation_and_its_workers_continue_without_a_console(stream: str, tmp_path: Path) -> None:
    streams = "; ".join(stream.format(number) for number in (0, 1, 2))
    sizes = "--train", 1, "--validation", 1, "--size", 32, "--voxel", 4, "--steps", 4, "--workers", 1
    assert run(streams, "preprocess.simulate", "-o", tmp_path / "made", *sizes).code == 0
    assert all(any((tmp_path / "made" / split).iterdir()) for split in ("train", "validation"))


def test_evaluate_on_two_ranks_names_a_full_disk_once(data: Path, trained: Path) -> None:
    weights = max((trained / "checkpoints").iterdir())
    words = "cosmoflow_dali.evaluate", "--data-dir", data, "--weights", weights, "--device", "cpu"
    with Ranks(line(FULL.format(1), *words), range(2), 2) as ranks:
        statuses, printed = ranks.end(120)
    assert statuses == {0, 1}
    assert printed.splitlines() == [
        "error: standard output: cannot be written (No space left on device); check free space, or send the "
        "output elsewhere"
    ]


@pytest.mark.parametrize(("stream", "status"), [(NO_READER, 141), (FULL, 1), (CLOSED, 1)])
def test_results_of_programs_that_are_not_taken_end_them(
    stream: str, status: int, data: Path, trained: Path
) -> None:
    weights = max((trained / "checkpoints").iterdir())
    sample = next((data / "validation").glob("*_data.npy"))
    for words in (
        ("cosmoflow_dali.predict", "--weights", weights, sample),
        ("preprocess.verify", data / "validation", "--workers", 1),
        ("preprocess.convert", "--help"),
    ):
        done = run(stream.format(1), *words)
        lines = [text for text in done.err.splitlines() if "standard output" in text]
        assert (done.code, len(lines)) == (status, status == 1), (words, done.err)
        assert "Traceback" not in done.err


def test_results_without_a_reader_still_writes_its_files(trained: Path, tmp_path: Path) -> None:
    done = run(NO_READER.format(1), "cosmoflow_dali.results", trained, "--json", tmp_path / "all.json")
    assert (done.code, done.err) == (141, "")
    assert (tmp_path / "all.json").stat().st_size


def test_closed_descriptors_are_not_given_to_data_files(tmp_path: Path) -> None:
    program = f"""
import os, sys
for number in (0, 1, 2): os.close(number)
sys.stdout = sys.stderr = None
from pipelines.console import open_streams
open_streams()
with open({str(tmp_path / "data")!r}, "w") as file:
    os.system("echo from a library >&2")
    print("lost")
    print("lost", file=sys.stderr)
    file.write(str(file.fileno() > 2))
"""
    assert start([sys.executable, "-c", program]).wait(60) == 0
    assert (tmp_path / "data").read_text() == "True"


def test_a_busy_non_blocking_terminal_is_waited_for() -> None:
    read, write = os.pipe()
    os.set_blocking(write, False)
    content = bytes(range(256)) * 1024
    received = io.BytesIO()

    def drain() -> None:
        while len(received.getvalue()) < len(content):
            received.write(os.read(read, 1 << 16))

    with _Stream(write, "w") as raw, open(read, "rb", closefd=True):
        reader = threading.Thread(target=drain)
        reader.start()
        with io.BufferedWriter(raw) as stream:
            stream.write(content)
        reader.join(30)
    assert received.getvalue() == content and raw.error is None


def test_lost_output_of_another_stream_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        full.write("result")
        with pytest.raises(OutputError) as caught:
            check_output()
        assert not caught.value.reader_gone
        monkeypatch.undo()
        with pytest.raises(OSError, match="space"):
            full.close()


def test_a_name_is_printed_in_one_line_and_as_it_is_in_the_encoding() -> None:
    name = "a\nb\x1b[31m\udcff\u202eé"
    assert str(UserError(name)) == r"a\nb\x1b[31m\udcff\u202eé"
    assert format_table([[name, "x"]]) == r"a\nb\x1b[31m\udcff\u202eé  x"
    code = f"from pipelines.console import open_streams; open_streams(); print({name[-3:]!a})"
    env = os.environ | {"PYTHONIOENCODING": "ascii:strict"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, check=True)
    assert done.stdout == b"\\udcff\\u202e\\xe9\n"


def interrupted(code: str, times: int) -> Forked:
    """Return a process that has run `code` until it printed a line, and got Ctrl-C `times` times."""
    setup = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.argv = ["-m"]
from pipelines.console import prepare_program
prepare_program()
"""
    process = start([sys.executable, "-c", setup + code])
    assert isinstance(process, Forked)
    for count in range(1, times + 1):
        deadline = time.monotonic() + 60
        while process.printed().count("\n") < count:
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
    return process


@pytest.mark.parametrize(
    ("code", "times", "printed"),
    [
        (
            """
from pipelines.distributed.cli import report_errors
from pipelines.distributed.world import World
with report_errors(World(), "stopped; resume"):
    print(1, flush=True); time.sleep(60)
""",
            1,
            "stopped; resume\n",
        ),
        (
            """
from pipelines.distributed.cli import report_errors
from pipelines.distributed.world import World
with report_errors(World(), "stopped; resume"):
    try:
        print(1, flush=True); time.sleep(60)
    finally:
        print(2, flush=True); time.sleep(60)
""",
            2,
            "stopped\n",
        ),
    ],
    ids=["at work", "in the clean-up"],
)
def test_ctrl_c_is_one_line_and_status_130(code: str, times: int, printed: str) -> None:
    process = interrupted(code, times)
    _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (130, printed)


@pytest.mark.parametrize("module", ["cosmoflow_dali.train", "preprocess.convert"])
def test_ctrl_c_while_a_program_is_imported(module: str, tmp_path: Path) -> None:
    for slow in ("torch", "numpy"):
        (tmp_path / f"{slow}.py").write_text("import time; print(1, flush=True); time.sleep(60)")
    process = subprocess.Popen(
        [sys.executable, "-m", module],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "1\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (130, "stopped\n")


def test_packages_that_other_code_imports_change_no_stream_and_no_signal() -> None:
    code = (
        "import signal, sys, cosmoflow_dali, preprocess; "
        "print(sys.stdout is sys.__stdout__, signal.getsignal(signal.SIGINT) is signal.default_int_handler)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "True True\n"
