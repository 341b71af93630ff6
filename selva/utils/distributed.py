"""Several processes training one adapter, started by ``torchrun``: their ranks and their messages.

The frozen base and the data are the same everywhere, so only adapter gradients travel. Every process draws the noise of
the whole global batch and computes its own slice of it: N processes do what one does with a batch N times as large.
"""

from __future__ import annotations

import datetime
import itertools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from selva.utils import torchrun

# The others wait for rank 0 while it writes a checkpoint and a sample, which takes minutes on a slow machine.
TIMEOUT = datetime.timedelta(hours=2)
# While rank 0 does what may take a day, such as encoding a large data set, it shows life in these intervals, and the
# others wait as long as it does.
PULSE_SEC, SILENCE_SEC = 5.0, 600.0


@dataclass(frozen=True)
class World:
    """This process among all: ``rank`` from 0 to ``size`` - 1; on its own it is 0 of 1.

    Attributes:
        store: the key-value store that the processes share; None on its own.
        hosts: the group through which they exchange what no device has to know; None is the one of all messages.
    """

    rank: int = 0
    size: int = 1
    store: Any = field(default=None, compare=False, repr=False)
    hosts: Any = field(default=None, compare=False, repr=False)
    _firsts: Iterator[int] = field(default_factory=itertools.count, compare=False, repr=False)

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

    @contextmanager
    def agreement(self) -> Iterator[Callable[[bool], bool]]:
        """Yield ``ask(flag)``, True once any process has set it; all must ask equally often, and get equal answers.

        Nobody waits for a device, and hardly for another process: an answer takes the flags of the call before into
        account, which have arrived meanwhile. A process on its own gets its own flag back.
        """
        if self.size == 1:
            yield lambda flag: flag
            return
        pending: list[tuple[Any, Tensor]] = []

        def answer() -> bool:
            work, votes = pending.pop()
            work.wait()
            return bool(votes)  # on the CPU

        def ask(flag: bool) -> bool:
            before = bool(pending) and answer()
            votes = torch.tensor(float(flag or before))
            pending.append((dist.all_reduce(votes, group=self.hosts, async_op=True), votes))
            return before

        yield ask
        if pending:  # a process that leaves in the middle of a message ends the others with an error
            answer()

    def wait(self) -> None:
        """Wait until all processes have come here."""
        if self.size > 1:
            dist.barrier()

    @contextmanager
    def main_first(self, what: str) -> Iterator[None]:
        """Do the block in rank 0, then in the others; who is waited for shows life, and is waited for without a limit.

        All processes must come here in the same order, and leave together. If the block fails in rank 0, the others do
        it too, and fail.

        Args:
            what: that is done, for messages.

        Raises:
            TimeoutError: a process has shown no life for ``SILENCE_SEC``.
        """
        with self._together(what, main_first=True):
            yield

    @contextmanager
    def at_once(self, what: str) -> Iterator[None]:
        """Do the block in all processes at the same time, and leave together; as :meth:`main_first` otherwise."""
        with self._together(what, main_first=False):
            yield

    @contextmanager
    def _together(self, what: str, main_first: bool) -> Iterator[None]:
        if self.size == 1:
            yield
            return
        name = f"selva/main_first/{next(self._firsts)}"
        if main_first and not self.is_main:
            self._wait_for(name, 0, what)
        with _pulse(self.store, f"{name}/{self.rank}"):
            yield
        for rank in range(self.size):
            self._wait_for(name, rank, what)

    def _wait_for(self, name: str, rank: int, what: str) -> None:
        last, seen = -1, time.monotonic()
        while not self.store.add(f"{name}/{rank}/done", 0):
            pulse = self.store.add(f"{name}/{rank}/pulse", 0)
            if pulse != last:
                last, seen = pulse, time.monotonic()
            elif time.monotonic() - seen > SILENCE_SEC:
                raise TimeoutError(f"{what}: process {rank} has shown no life for {SILENCE_SEC:.0f} s, expected a sign "
                                   f"every {PULSE_SEC:.0f} s; look at its log, and start again")
            time.sleep(PULSE_SEC / 10)


@contextmanager
def _pulse(store: Any, name: str) -> Iterator[None]:
    """Count a key of the store up while the block runs, and set another one when it ends, in whatever way."""
    stop = threading.Event()

    def beat() -> None:
        while not stop.wait(PULSE_SEC):
            store.add(f"{name}/pulse", 1)

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        store.add(f"{name}/done", 1)


@contextmanager
def join_world(device: torch.device) -> Iterator[World]:
    """Yield this process's place as ``torchrun`` set it in the environment; without torchrun, the only one.

    Tensors travel through NCCL between CUDA devices and through gloo otherwise, what the hosts agree on through gloo.
    """
    if torchrun.world_size() == 1:
        yield World()
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    store, rank, size = next(rendezvous("env://", timeout=TIMEOUT))
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=store, rank=rank, world_size=size,
                            timeout=TIMEOUT)
    world = World(rank, size, store, hosts=dist.new_group(backend="gloo", timeout=TIMEOUT))
    yield world
    world.wait()  # a process that leaves while another one still writes can abort in gloo's threads
    # Not after an error: it would wait, before anybody reads the error, for messages that the others never send.
    dist.destroy_process_group()
