"""Fixtures shared by all tests: a fixed seed, and golden cases that know how to compare themselves."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from recipe import compare, load_golden, load_manifest, make_input, make_state_dict, select

GOLDEN = Path(__file__).parent / "golden"
GOLDEN_ERRORS: dict[str, dict[str, float]] = {}  # golden file -> worst errors of this run, shown at its end


@pytest.fixture(autouse=True)
def _fixed_seed():
    torch.manual_seed(0)
    np.random.seed(0)


class GoldenCase:
    """One golden file: its configuration, weights, inputs and expected outputs."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.info, self.stored = load_golden(GOLDEN / name)
        self.config = self.info.get("config", {})

    def inputs(self) -> dict[str, torch.Tensor]:
        return {name: torch.from_numpy(make_input(spec)) for name, spec in self.info["inputs"].items()}

    def weights(self, manifest: str | None = None) -> dict[str, torch.Tensor]:
        entries = load_manifest(GOLDEN / (manifest or self.info["manifest"]))
        return {name: torch.from_numpy(value) for name, value in make_state_dict(entries).items()}

    def check(self, name: str, actual: torch.Tensor) -> None:
        """Compare the full tensor ``actual`` with stored output ``name`` within its own tolerance."""
        spec = self.info["outputs"][name]
        found = select(actual.detach().to(torch.float32).cpu().numpy(), spec.get("index"))
        error = compare(found, self.stored[name])
        worst = GOLDEN_ERRORS.setdefault(self.name, {"rel_l2": 0.0, "max_abs": 0.0})
        worst.update({key: max(value, worst[key]) for key, value in error.items()})
        limit = spec["tolerance"]
        assert error["rel_l2"] <= limit["rel_l2"] and error["max_abs"] <= limit["max_abs"], (
            f"{self.name}/{name}: error {error}, tolerance {limit}"
        )


@pytest.fixture(scope="module")
def golden():
    """``golden("generator_tiny_v1")`` -> :class:`GoldenCase`; large weights live only as long as the test module."""
    return GoldenCase


def pytest_terminal_summary(terminalreporter):
    if GOLDEN_ERRORS:
        terminalreporter.section("worst error per golden file")
        for name, worst in sorted(GOLDEN_ERRORS.items()):
            terminalreporter.line(f"{name:28} rel_l2 {worst['rel_l2']:.1e}   max_abs {worst['max_abs']:.1e}")


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")


def pytest_collection_modifyitems(config, items):
    skip_slow = pytest.mark.skip(reason="slow: run with --slow")
    skip_gpu = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "slow" in item.keywords and not config.getoption("--slow"):
            item.add_marker(skip_slow)
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(skip_gpu)
