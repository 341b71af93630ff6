"""Graphs: the work of a function on the device, recorded once and then started again as a whole.

A step of a small model is a few thousand short kernels, and a GPU is done with them sooner than Python can start them.
A CUDA graph holds all of them and is started by a single call. What it does is fixed when it is recorded: the addresses
of tensors, their shapes, and every number that came from Python. So a function that is to be recorded

- gets all that changes from call to call in tensors, which are copied to the place where the recorded work reads them;
- reads nothing back to the host, and copies nothing from it;
- leaves its random numbers to the generator of the device, whose state counts at each start as in any other call.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from selva.utils.device import is_out_of_memory
from selva.utils.errors import UserError

log = logging.getLogger(__name__)

WARM_UPS = 2  # calls of a kind before it is recorded: libraries choose their algorithms, optimisers make their state
MOST_GRAPHS = 64  # each takes a few MiB of the device; calls of further kinds run as without graphs

Tensors = tuple[Tensor, ...]


class Recording(NamedTuple):
    """Recorded work: ``replay`` does it all, whereupon ``outputs``, always the same tensors, hold what it returned."""

    replay: Callable[[], None]
    outputs: Tensors


class GraphBackend(Protocol):
    """Recorder of functions of tensors."""

    def warm_up(self, function: Callable[[], Tensors]) -> Tensors:
        """Call the function where a recording of it will run."""
        ...

    def record(self, function: Callable[[], Tensors]) -> Recording:
        """Return a recording of the function, whose work is **not** done by that: the first replay does it."""
        ...


class CudaGraphs:
    """CUDA graphs of one device. All of them share their memory, as no two run at the same time."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)  # the default stream cannot record
        self.pool = torch.cuda.graph_pool_handle()

    def warm_up(self, function: Callable[[], Tensors]) -> Tensors:
        usual = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(usual)
        try:
            with torch.cuda.stream(self.stream):
                outputs = function()
        finally:
            usual.wait_stream(self.stream)
        # Copies that belong to the usual stream: the others' memory may be given away while it still reads them.
        return tuple(output.clone() for output in outputs)

    def record(self, function: Callable[[], Tensors]) -> Recording:
        graph = torch.cuda.CUDAGraph()
        # The outer block brings the usual stream back after a failure, which torch.cuda.graph does not. Other threads,
        # which read data, may go on meanwhile.
        with torch.cuda.stream(self.stream), torch.cuda.graph(
                graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
            outputs = function()
        return Recording(graph.replay, outputs)


@dataclasses.dataclass
class _Graph:
    """A recording, the tensors that it reads its arguments from, and whatever else must live as long as it."""

    recording: Recording
    inputs: Sequence[Tensor]
    kept: Any
    given: list[tuple[Tensor, int] | None] = dataclasses.field(init=False)  # what was copied last, and its version

    def __post_init__(self) -> None:
        self.given = [None] * len(self.inputs)

    def run(self, arguments: Sequence[Tensor]) -> Tensors:
        with torch.no_grad():
            for i, (target, value) in enumerate(zip(self.inputs, arguments, strict=True)):
                last = self.given[i]
                if last is not None and last[0] is value and last[1] == value._version:
                    continue  # such as the conditions of a sound, the same at every step
                target.copy_(value, non_blocking=True)
                self.given[i] = None if value.is_inference() else (value, value._version)
        self.recording.replay()
        return tuple(output.clone() for output in self.recording.outputs)  # the next replay overwrites them


class GraphedCalls:
    """Calls of functions that are recorded as graphs, one for every kind of call, after :data:`WARM_UPS` calls of it.

    Where something cannot be recorded, all calls run as without graphs from then on, and one line in the log says why.
    So they do where memory ends: graphs keep that of their work, which is not there for calls of other kinds.

    Args:
        what: is done, for messages. required: a failure to record is an error.

    Attributes:
        problem: the reason why nothing is recorded any more; None as long as all goes well.
        draws: the functions take random numbers of the device, which a failure to record ends: its generator goes on
            waiting for the end of the recording, and refuses every other call (PyTorch 2.11).
        repeatable: the functions can be called again when memory ended in the middle of them, after their ``recover``.
    """

    def __init__(self, backend: GraphBackend, what: str, *, required: bool = False) -> None:
        self.backend, self.what, self.required = backend, what, required
        self.problem: str | None = None
        self.draws, self.repeatable = False, True
        self._known: dict[Hashable, int | _Graph] = {}  # kind -> calls so far, or its graph
        self._full = False

    @property
    def num_graphs(self) -> int:
        """Number of graphs that are recorded."""
        return sum(isinstance(known, _Graph) for known in self._known.values())

    def clear(self) -> None:
        """Forget all graphs: tensors that they read or write have been replaced."""
        self._known.clear()
        self._full = False

    def __call__(
        self, kind: Hashable, function: Callable[..., Tensors], *arguments: Any,
        keep: Callable[[], Any] = lambda: None, recover: Callable[[], object] = lambda: None,
    ) -> Tensors:
        """Return ``function(*arguments)``.

        Args:
            kind: of the call: all that the function depends on beside the values of tensors; shapes are added here.
            arguments: tensors, and dataclasses of them, whose other fields must be the same for one kind.
            keep: makes and returns what a graph reads beside its arguments and what may otherwise be freed before it.
            recover: called after a failure, to take back what the interrupted function had changed on the host. It is
                not kept: whose method it is, which has these calls, would live until cycles are looked for.
        """
        if self.problem is not None:
            return function(*arguments)
        tensors = [tensor for argument in arguments for tensor in leaves(argument)]
        key = (kind, *((tuple(tensor.shape), tensor.dtype) for tensor in tensors))
        known = self._known.get(key, 0)
        if isinstance(known, _Graph):
            return known.run(tensors)
        if known == 0 and len(self._known) >= MOST_GRAPHS:
            if not self._full:
                log.info("%s: only the first %d of its lengths or shapes run as CUDA graphs", self.what, MOST_GRAPHS)
            self._full = True
            return function(*arguments)
        try:
            if known < WARM_UPS:
                self._known[key] = known + 1
                return self.backend.warm_up(functools.partial(function, *arguments))
            graph = self._recorded(function, arguments, tensors, keep)
        except Exception as error:  # whatever it is, the work can be done without
            recording = known >= WARM_UPS
            if not (recording or (self.num_graphs and self.repeatable and is_out_of_memory(error))):
                raise
            self._give_up(error, recording, recover)
        else:
            self._known[key] = graph
            return graph.run(tensors)
        return function(*arguments)  # not above, where the error still holds what the failure has left in memory

    def _recorded(
        self, function: Callable[..., Tensors], arguments: Sequence[Any], tensors: Sequence[Tensor],
        keep: Callable[[], Any],
    ) -> _Graph:
        with torch.inference_mode(False):  # a graph may be used outside it as well
            inputs = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in tensors]
        for target, value in zip(inputs, tensors, strict=True):
            target.copy_(value)  # numbers that make sense, should a backend look at them
        own = iter(inputs)
        placed = [with_leaves(argument, own) for argument in arguments]
        kept = keep()  # made now, where it has been forgotten: while recording, nothing can come from the host
        return _Graph(self.backend.record(functools.partial(function, *placed)), inputs, kept)

    def _give_up(self, error: Exception, recording: bool, recover: Callable[[], object]) -> None:
        cause = error.__context__ or error  # ending a recording that has failed raises an error of its own
        if not isinstance(cause, Exception):
            raise cause  # Ctrl-C or SIGTERM, which is no failure
        self.problem = str(cause).strip().split("\n")[0] or type(cause).__name__
        self.clear()
        recover()
        if self.draws and recording:
            raise UserError(f"the {self.what} cannot be recorded as a CUDA graph: {self.problem}; it draws random "
                            "numbers on the device (--lora_dropout), which this process cannot any more. Start again "
                            "with --resume auto --cuda_graph off") from error
        if self.required:
            raise RuntimeError(f"the {self.what} cannot be recorded as a CUDA graph: {self.problem}; use --cuda_graph "
                               "auto, which goes on without") from error
        log.warning("the %s runs without CUDA graphs, more slowly: %s", self.what, self.problem)


def graphed_calls(
    choice: str, device: torch.device, what: str, problem: str | None = None
) -> GraphedCalls | None:
    """Return the recorder of ``what`` on a device, None where it runs without graphs; the log says why.

    Args:
        choice: one of ``selva.utils.device.GRAPH_CHOICES``; "auto" means on CUDA, where nothing stands against it.
        problem: what stands against it.

    Raises:
        ValueError: the choice is "on", and it cannot be done.
    """
    if choice == "off" or (choice == "auto" and device.type != "cuda"):
        return None
    if device.type != "cuda":
        problem = f"the device is {device.type}, which has none"
    elif not torch.cuda.is_available():
        problem = problem or "there is no CUDA device"
    if problem is None:
        return GraphedCalls(CudaGraphs(device), what, required=choice == "on")
    if choice == "on":
        raise UserError(f"--cuda_graph on: no CUDA graph is possible here: {problem}; use --cuda_graph auto")
    log.info("the %s runs without CUDA graphs: %s", what, problem)
    return None


def leaves(value: Any) -> Iterator[Tensor]:
    """Yield the tensors of a value: of itself, or of the fields of a dataclass, in their order."""
    if isinstance(value, Tensor):
        yield value
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from leaves(getattr(value, field.name))


def with_leaves(value: Any, tensors: Iterator[Tensor]) -> Any:
    """Return a value with the next tensors in place of its own, in the order of :func:`leaves`."""
    if isinstance(value, Tensor):
        return next(tensors)
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return value
    fields = {field.name: with_leaves(getattr(value, field.name), tensors) for field in dataclasses.fields(value)}
    return dataclasses.replace(value, **fields)
