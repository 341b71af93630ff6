"""selva.training.report: which adapter of a run the page advises, and why."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from selva.training.report import adapter_to_use


@pytest.mark.parametrize(("held_out", "best_step", "written", "name", "words"), [
    (3, 40, True, "adapter_best.pt", "adapter_best.pt is step 40, where the loss of the held-out clips was lowest"),
    (3, 100, True, "adapter_best.pt", "lowest at the last step"),
    (3, 0, False, "adapter_final.pt", "never fell below that of the base model"),
    (0, 0, False, "adapter_final.pt", "No clips were held out"),
    (0, 0, True, "adapter_final.pt", "No clips were held out"),
])
def test_the_best_adapter_is_advised_where_there_is_one(tmp_path, held_out, best_step, written, name, words):
    if written:
        (tmp_path / "adapter_best.pt").touch()
    run: Any = SimpleNamespace(val_clips=range(held_out), best_step=best_step, step=100)
    chosen, why = adapter_to_use(run, tmp_path / "adapter_final.pt")
    assert chosen == tmp_path / name and words in why
