"""Fixtures shared by all tests: a fixed seed, and golden cases that know how to compare themselves."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from golden_case import GOLDEN_ERRORS, GoldenCase, note_golden_errors

THREADS = torch.get_num_threads()


@pytest.fixture(autouse=True)
def _fixed_seed():
    torch.manual_seed(0)
    np.random.seed(0)


@pytest.fixture(autouse=True)
def _threads_of_before():
    """Scripts that run in this process may set the number of threads, which decides how sums are rounded."""
    yield
    if torch.get_num_threads() != THREADS:
        torch.set_num_threads(THREADS)


@pytest.fixture
def latin1_folder(tmp_path) -> Path:
    """An empty folder whose name is Latin-1, as on disks from before UTF-8."""
    folder = tmp_path / "caf\udce9"
    try:
        folder.mkdir()
    except (OSError, UnicodeError):
        pytest.skip("this system has no such names")
    return folder


@pytest.fixture(scope="module")
def golden():
    """``golden("generator_tiny_v1")`` -> :class:`GoldenCase`; large weights live only as long as the test module."""
    return GoldenCase


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """Lift a limit on the size of files, which stands for a full disk in some tests, before pytest reports."""
    try:
        import resource
    except ImportError:  # Windows
        return (yield)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        return (yield)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Processes of several send each other text in UTF-8, so what a test has logged of other names is written in it."""
    report = yield
    report.sections = [(name, text.encode("utf-8", "backslashreplace").decode()) for name, text in report.sections]
    return report


def pytest_sessionfinish(session):
    """A process of several (pytest -n) hands its golden errors to the one that prints the summary."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["golden_errors"] = GOLDEN_ERRORS


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    for name, errors in getattr(node, "workeroutput", {}).get("golden_errors", {}).items():
        note_golden_errors(name, errors)


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
