"""Check that the package ``selva`` is the one of this program: the official SelVA package has the same name

Every script imports this module first. Where Python finds the other package, or a mixture of both in one folder, the
script ends in one line that says which one was found and what to do, instead of in an ImportError from its middle.

It also sets how PyTorch's threads wait for each other, which has to be done before PyTorch is imported.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import MutableMapping
from pathlib import Path

OURS = 'DISTRIBUTION = "selva-lora"'  # a line of our selva/__init__.py; it is read, because the other may do anything
SPIN_COUNT = 20_000  # rounds of waiting, about a millisecond; as PyTorch comes, 300,000


def foreign_selva() -> Path | None:
    """Return the folder of the package ``selva`` that an import would take, if it is not ours."""
    spec = importlib.util.find_spec("selva")
    if spec is None:  # nothing to confuse it with; the import itself will say so
        return None
    folder = Path(next(iter(spec.submodule_search_locations or ()), spec.origin or ""))
    try:
        is_ours = OURS in (folder / "__init__.py").read_text(encoding="utf-8", errors="replace")
    except OSError:  # the other package may do without this file
        is_ours = False
    return None if is_ours else folder


def complaint(folder: Path) -> str:
    """Return one line on the package in ``folder`` and what to do."""
    return (
        f"error: Python finds another package called selva in {folder}, probably the official SelVA, before the one of "
        "selva-lora; install selva-lora into an environment of its own (python -m venv), and take that folder out of "
        "PYTHONPATH if it is there"
    )


def wait_briefly(environment: MutableMapping[str, str]) -> None:
    """Let a thread of PyTorch that waits for another one sleep soon, unless the user has said how they wait.

    As PyTorch comes on Linux (libgomp), it keeps its core busy for many milliseconds. Where other programs run, that is
    the core that the awaited thread needs, and each of the thousands of waits of a training step lasts that long.
    """
    if "OMP_WAIT_POLICY" not in environment:
        environment.setdefault("GOMP_SPINCOUNT", str(SPIN_COUNT))


wait_briefly(os.environ)
if (_found := foreign_selva()) is not None:
    sys.exit(complaint(_found))
