"""Several processes training one adapter, started by ``torchrun``: their ranks and their messages.

The frozen base and the data are the same everywhere, so only adapter gradients travel. Every process draws the noise of
the whole global batch and computes its own slice of it: N processes do what one does with a batch N times as large.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from selva.utils import torchrun

# The others wait for rank 0 while it writes a checkpoint and a sample, which takes minutes on a slow machine.
TIMEOUT = datetime.timedelta(hours=2)


@dataclass(frozen=True)
class World:
    """This process among all: ``rank`` from 0 to ``size`` - 1; on its own it is 0 of 1."""

    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        """True in the process that writes files and prints."""
        return self.rank == 0

    def own_slice(self, per_process: int) -> slice:
        """Return the slice of a global batch that this process computes."""
        return slice(self.rank * per_process, (self.rank + 1) * per_process)

    def average_gradients_(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """Replace the gradients by their mean over all processes, in place, in one message."""
        if self.size == 1:
            return
        gradients = []
        for parameter in parameters:
            assert parameter.grad is not None
            gradients.append(parameter.grad)
        flat = torch.cat([g.flatten() for g in gradients])
        dist.all_reduce(flat)
        flat /= self.size
        for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(mean.view_as(gradient))

    def sum_(self, values: Tensor) -> Tensor:
        """Return ``values`` summed over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def any(self, flag: bool, device: torch.device) -> bool:
        """Return True where ``flag`` is set in any process; all of them must ask at the same point."""
        return bool(self.sum_(torch.tensor(float(flag), device=device)))

    def wait(self) -> None:
        """Wait until all processes have come here."""
        if self.size > 1:
            dist.barrier()


@contextmanager
def join_world(device: torch.device) -> Iterator[World]:
    """Yield this process's place as ``torchrun`` set it in the environment; without torchrun, the only one.

    Communicates through NCCL between CUDA devices and through gloo otherwise.
    """
    if torchrun.world_size() == 1:
        yield World()
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
    try:
        world = World(dist.get_rank(), dist.get_world_size())
        yield world
        world.wait()  # a process that leaves while another one still writes can abort in gloo's threads
    finally:
        dist.destroy_process_group()
