"""A device that is behind the host, with a clock of its own: time passes where the host waits for its work."""

from __future__ import annotations

from typing import Any

import pytest
import torch


class DeviceBehind:
    """Stands for the module ``time`` of what measures; every step of ``run`` is 1 s of work for the device.

    The host waits for it, as for a GPU, where numbers are read, and nowhere else.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, run: Any) -> None:
        self.now = self.work = 0.0
        self.steps = 0
        step = run.train_step

        def train_step():
            result = step()
            self.work += 1.0
            self.steps += 1
            return result

        monkeypatch.setattr(run, "train_step", train_step)
        for name in ("tolist", "item", "__float__"):
            read = getattr(torch.Tensor, name)

            def reading(tensor, read=read):
                self.now, self.work = self.now + self.work, 0.0
                return read(tensor)

            monkeypatch.setattr(torch.Tensor, name, reading)

    def monotonic(self) -> float:
        return self.now
