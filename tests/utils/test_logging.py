"""Log lines of several processes."""

from __future__ import annotations

import logging

from selva.utils.logging import setup_logging


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
