"""A stand-in for CUDA graphs on the CPU, as strict as they are: operations are recorded and done again at their places.

Everything that Python decided while recording is fixed: which operations, which numbers, which tensors. A tensor that
was made while recording gets its new values at the same place. Recording itself leaves no trace, as on a GPU, where
nothing runs meanwhile. What a GPU refuses is refused: to read a tensor back, and to make one of numbers of the host, as
the tables of the networks are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from selva.models import blocks
from selva.utils.graph import Recording

REFUSED = {
    torch.ops.aten._local_scalar_dense.default: "reads a number back to the host",
    torch.ops.aten.is_nonzero.default: "reads a truth value back to the host",
    torch.ops.aten.nonzero.default: "has a result whose size the host has to know",
    torch.ops.aten.lift_fresh.default: "copies numbers of the host to the device",
}
TABLES = (blocks.rotary_table, blocks.time_frequencies, blocks.nearest_index)


class RecordedGraphs:
    """See :class:`selva.utils.graph.GraphBackend`. ``warm_ups`` and ``replays`` count what happened."""

    def __init__(self) -> None:
        self.warm_ups = self.replays = 0

    def warm_up(self, function: Callable[[], Any]) -> Any:
        self.warm_ups += 1
        return function()

    def record(self, function: Callable[[], Any]) -> Recording:
        recorder, random_state, before = _Recorder(), torch.get_rng_state(), tables_made()
        try:
            with recorder:
                outputs = function()
            if tables_made() > before:
                raise RuntimeError("a table that is made on the host is copied to the device, which a graph cannot do")
        finally:
            recorder.undo()
            torch.set_rng_state(random_state)

        def replay() -> None:
            self.replays += 1
            recorder.replay()

        return Recording(replay, outputs)


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self._operations: list[tuple[Any, tuple[Any, ...], dict[str, Any], list[Tensor]]] = []
        self._made: set[int] = set()  # addresses of memory that was made while recording, and is kept
        self._before: list[tuple[Tensor, Tensor]] = []  # tensors that were there before, and their values

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in REFUSED:
            raise RuntimeError(f"{func} {REFUSED[func]}, which a graph cannot do")
        schema = func._schema
        if schema.is_mutable:
            for number, argument in enumerate(schema.arguments):
                if argument.alias_info is not None and argument.alias_info.is_write:
                    value = args[number] if number < len(args) else kwargs.get(argument.name)
                    self._save(tensors_in(value))
            results = func(*args, **kwargs)
            self._operations.append((func, args, kwargs, []))
            return results
        results = func(*args, **kwargs)
        if any(result.alias_info is not None for result in schema.returns):
            return results  # a view: its values change with those of its base
        made = [result.detach() for result in tensors_in(results)]
        self._made.update(result.untyped_storage().data_ptr() for result in made)
        self._operations.append((func, args, kwargs, made))
        return results

    def _save(self, tensors: list[Tensor]) -> None:
        for tensor in tensors:
            if tensor.untyped_storage().data_ptr() not in self._made:
                tensor = tensor.detach()
                self._before.append((tensor, tensor.clone()))

    @torch.no_grad()
    def undo(self) -> None:
        for tensor, value in reversed(self._before):
            tensor.copy_(value)
        self._before.clear()

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, made in self._operations:
            results = func(*args, **kwargs)
            if made:
                for place, value in zip(made, tensors_in(results), strict=True):
                    place.copy_(value)


def tables_made() -> int:
    return sum(table.cache_info().misses for table in TABLES)


def tensors_in(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
