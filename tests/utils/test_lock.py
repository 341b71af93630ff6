"""selva.utils.lock: who holds a folder, and what becomes of the lock of a process that is gone."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from selva.utils.lock import FolderInUse, FolderLock

ROOT = Path(__file__).parents[2]
HOLD = """
import sys, time
from pathlib import Path
from selva.utils.lock import FolderLock
with FolderLock(Path(sys.argv[1]), "trains"):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock of ``tmp_path``."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run.lock")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert process.stdout is not None and process.stdout.readline() == b"held\n"
    yield process
    process.kill()
    process.wait()


def test_the_second_process_is_refused_by_name(tmp_path, holder):
    with pytest.raises(FolderInUse, match=f"in use by process {holder.pid} on {socket.gethostname()} since .* trains"):
        FolderLock(tmp_path / "run.lock", "trains").__enter__()
    assert "process" in (tmp_path / "run.lock").read_text()  # is not spoilt by those who are refused


@pytest.mark.skipif(os.name == "nt", reason="kills by signal")
def test_the_lock_of_a_killed_process_is_taken_over(tmp_path, holder, caplog):
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    with FolderLock(tmp_path / "run.lock", "trains"):
        assert f"process {os.getpid()} on" in (tmp_path / "run.lock").read_text()
    assert f"left by process {holder.pid}" in caplog.text and not (tmp_path / "run.lock").exists()


def test_the_lock_of_another_machine_is_held_until_its_file_is_deleted(tmp_path):
    path = tmp_path / "run.lock"
    path.write_text("process 7 on elsewhere since 2024-01-01 00:00:00\n")
    with pytest.raises(FolderInUse, match=r"process 7 on elsewhere.*delete .*run\.lock"):
        FolderLock(path, "trains").__enter__()
    with FolderLock(path, "encodes", wait=True):  # where a second process does no harm
        pass
    assert not path.exists()


def test_folders_that_were_made_for_the_lock_go_with_it(tmp_path):
    with FolderLock(tmp_path / "a" / "b" / "run.lock", "trains"):
        assert (tmp_path / "a" / "b" / "run.lock").exists()
    assert not (tmp_path / "a").exists()
    with FolderLock(tmp_path / "a" / "b" / "run.lock", "trains"):
        (tmp_path / "a" / "b" / "adapter.pt").write_bytes(b"x")
    assert (tmp_path / "a" / "b" / "adapter.pt").exists()
