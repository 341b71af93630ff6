"""Exponential moving average of trained parameters, which wanders less than the parameters themselves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class EMA:
    """Averages of parameters by name.

    The decay rises to its value over the first steps, so that the average does not cling to the initialisation.

    Args:
        parameters: what is trained; the average starts with their values.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        self.parameters, self.decay = dict(parameters), decay
        self.average = {name: p.detach().clone() for name, p in self.parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take the parameters after ``step`` updates into the average."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(  # pyright: ignore[reportPrivateImportUsage]  -- one kernel; torch has no public name for it
            list(self.average.values()), list(self.parameters.values()), 1 - decay)

    def start_at(self, values: Mapping[str, Tensor]) -> None:
        """Begin with these values, by the names of the parameters."""
        for name, value in self.average.items():
            value.copy_(values[name])

    def state(self) -> dict[str, Any]:
        """Return the state that :meth:`restore` continues from."""
        return self.average

    def restore(self, average: Mapping[str, Tensor]) -> None:
        """Continue from the stored averages of the same names."""
        self.start_at(average)

    def applied(self) -> AbstractContextManager[None]:
        """Put the average into the model for the duration of the block."""
        return applied(self.parameters, self.average)


@contextmanager
def applied(parameters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> Iterator[None]:
    """Put ``values`` into the parameters of the same names for the duration of the block."""
    trained = {name: p.detach().clone() for name, p in parameters.items()}
    _copy(parameters, values)
    try:
        yield
    finally:
        _copy(parameters, trained)


@torch.no_grad()
def _copy(parameters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> None:
    for name, parameter in parameters.items():
        parameter.copy_(values[name])
