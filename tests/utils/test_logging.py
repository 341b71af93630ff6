"""Log lines of several processes."""

from __future__ import annotations

import io
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from selva.utils.logging import results_on_stdout, setup_logging

ROOT = Path(__file__).parents[2]
# Buffered as usual, whatever the machine that runs the tests prefers.
ENVIRONMENT = {**{k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}, "PYTHONPATH": str(ROOT)}


def test_only_rank_zero_speaks(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    setup_logging()
    logging.getLogger("selva.x").warning("from rank 1")
    logging.getLogger("selva.x").error("an error of rank 1")
    monkeypatch.setenv("RANK", "0")
    setup_logging()
    logging.getLogger("selva.x").info("from rank 0")
    stderr = capsys.readouterr().err
    assert "from rank 1" not in stderr and "error: an error of rank 1" in stderr and "from rank 0" in stderr


SCRIPT = """
import sys, time
from selva import cli

@cli.entry_point
def main(argv=None):
    for number in range(3):
        print(f"result {number}", flush=FLUSH)
        time.sleep(0.05)
    with open(sys.argv[1], "w") as file:
        file.write("done")
    return CODE

sys.exit(main())
"""


def start(script: str, path: Path, stdout: int) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", script, str(path)], env=ENVIRONMENT, stdout=stdout,
                          stderr=subprocess.PIPE, text=True, timeout=60)


@pytest.mark.parametrize("flush", [True, False])
@pytest.mark.parametrize("code", [0, 1])
def test_a_reader_of_the_results_that_leaves_stops_nothing(tmp_path, flush, code):
    """``infer.py ... | head -1``: the sounds are files, so all of them are made, and the exit code says how it went."""
    read, write = os.pipe()
    os.close(read)
    result = start(SCRIPT.replace("FLUSH", str(flush)).replace("CODE", str(code)), tmp_path / "work", write)
    os.close(write)
    assert result.returncode == code, result.stderr
    assert (tmp_path / "work").read_text() == "done"
    assert "the reader of the output has gone" in result.stderr and "Traceback" not in result.stderr
    assert result.stderr.count("the reader of the output") == 1


@pytest.mark.parametrize("flag, code", [("--version", 0), ("--help", 0), ("--no_such_flag", 2)])
def test_help_that_nobody_reads_is_no_error(tmp_path, flag, code):
    read, write = os.pipe()
    os.close(read)
    result = subprocess.run([sys.executable, str(ROOT / "infer.py"), flag], env=ENVIRONMENT, stdout=write,
                            stderr=subprocess.PIPE, text=True, timeout=60)
    os.close(write)
    assert result.returncode == code and "BrokenPipe" not in result.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_results_that_do_not_fit_on_the_disk_are_an_error(tmp_path):
    with open("/dev/full", "w") as full:
        result = start(SCRIPT.replace("FLUSH", "False").replace("CODE", "0"), tmp_path / "work", full.fileno())
    assert result.returncode == 1 and "No space left on device" in result.stderr
    assert "Traceback" not in result.stderr and "Exception ignored" not in result.stderr


def test_a_result_that_a_stream_cannot_name_is_printed_all_the_same(monkeypatch):
    written = io.BytesIO()
    stream = io.TextIOWrapper(written, encoding="utf-8", write_through=True)
    monkeypatch.setattr(sys, "stdout", stream)
    with results_on_stdout():
        print("caf\udce9/caf\u00e9.npz")
    assert written.getvalue().decode().splitlines() == [r"caf\udce9/caf" + "\u00e9.npz"]
