"""The quickstart's shell script, without running it: it must be readable by bash and name flags that exist."""

from __future__ import annotations

import subprocess
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "scripts" / "quickstart.sh"


def bash(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(["bash", str(SCRIPT), *arguments], capture_output=True, text=True, timeout=60, check=False)


def test_help_explains_and_does_nothing():
    done = bash("--help")
    assert done.returncode == 0 and "--fast" in done.stdout and "report.html" in done.stdout


def test_an_unknown_option_is_wrong_usage():
    done = bash("--quick")
    assert done.returncode == 2 and "--quick" in done.stderr
