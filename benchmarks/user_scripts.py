"""The scripts that users have, run as they run them."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from selva.utils.errors import UserError

log = logging.getLogger("selva.user_scripts")

ROOT = Path(__file__).resolve().parents[1]


def run_script(script: str, *arguments: Any) -> float:
    """Run a script and return the CPU seconds that it took, with its own processes; zero on Windows.

    Args:
        script: its path in the checkout.

    Raises:
        UserError: it fails; its messages have gone to the terminal.
    """
    before, command = _cpu_seconds(), [sys.executable, str(ROOT / script), *map(str, arguments)]
    log.info("%s", " ".join(command[1:]))
    done = subprocess.run(command, stdout=subprocess.DEVNULL, check=False)
    if done.returncode:
        raise UserError(f"{script} ended with exit code {done.returncode}; its messages are above")
    return _cpu_seconds() - before


def _cpu_seconds() -> float:
    times = os.times()
    return times.children_user + times.children_system
