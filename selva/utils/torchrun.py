"""Environment of ``torchrun``, which is read here only: the place of this process among those started together."""

from __future__ import annotations

import os
import socket


def rank() -> int:
    """Return the number of this process among all, from 0; 0 without torchrun."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Return the number of processes on all machines; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    """Return the number of this process on its machine, from 0, which is that of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_world_size() -> int:
    """Return the number of processes on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def is_main_process() -> bool:
    """Return True in the process that prints and writes for all: rank 0, or the only one."""
    return rank() == 0


def process_environment(rank: int, size: int, port: int) -> dict[str, str]:
    """Return the variables that torchrun would give to one of ``size`` processes of this machine; none for one alone.

    Args:
        port: a free one, the same for all of them.
    """
    if size == 1:
        return {}
    own = {name: str(rank) for name in ("RANK", "LOCAL_RANK")}
    return {**own, "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port)}


def work_alone() -> tuple[int, int]:
    """Return (rank, world size), and let this process work by itself from now on, on its own GPU, as if alone."""
    own = rank(), world_size()
    os.environ.update({"RANK": "0", "WORLD_SIZE": "1"})
    return own


def launch_id() -> str:
    """Return a text that processes started together share and that an earlier launch did not have; "" for one alone."""
    if world_size() == 1:
        return ""
    names = ("TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT")
    launch = " ".join(os.environ.get(name, "") for name in names)
    if os.environ.get("LOCAL_WORLD_SIZE") == str(world_size()):  # one machine: its torchrun is our parent
        launch += f" {socket.gethostname()} {os.getppid()}"
    return launch
