"""Generator whose adapters can be exchanged, so that one loaded model makes the sounds of several adapters."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from selva.lora.merge import MERGED_ATTRIBUTE, Adapter, merge_adapters
from selva.models.generator import Generator, cast_frozen_
from selva.sampling import NO_GRAPHS, SamplingGraphs
from selva.weights.find import generator_change

log = logging.getLogger(__name__)

AdapterPairs = Sequence[tuple[Adapter, float]]


def warn_of_other_generators(adapters: AdapterPairs, generator: Path | None) -> None:
    """Warn of adapters that were trained on other weights of the same variant than those in use."""
    for adapter, _ in adapters:
        if change := generator_change(adapter.meta, generator):
            log.warning("%s was trained on %s and is used with %s (--generator)", adapter.source, *change)


class AdapterSwitch:
    """A generator in ``dtype``, with the adapters merged that were asked for last.

    Every exchange starts from the float32 base weights and is rounded once, so that the result equals, bit for bit,
    that of a fresh process; nothing is ever subtracted. The base weights of the layers that change are kept in memory
    from the second exchange on, or from the first if :meth:`expect` announced more; adapters of other layers make it
    read the weight file again.

    Args:
        load: returns the base generator in float32 on the CPU.
        dtype: what the matrices are stored in. device: where the generator works.
        graphs: of passes of the generator, which go when it goes.
    """

    def __init__(
        self, load: Callable[[], Generator], dtype: torch.dtype, device: torch.device,
        graphs: SamplingGraphs = NO_GRAPHS,
    ) -> None:
        self.generator: Generator | None = None
        self.graphs = graphs
        self._load, self._dtype, self._device = load, dtype, device
        self._base: dict[str, dict[str, Tensor]] = {}  # layer -> float32 parameters on the CPU
        self._kept: set[str] = set()  # layers whose base weights are kept when the generator is loaded
        self._merged: set[str] = set()  # layers that differ from the base now

    def expect(self, adapters: Iterable[Adapter]) -> None:
        """Announce adapters that will be exchanged later."""
        self._kept |= {name for adapter in adapters for name in adapter.layer_names()}

    def set(self, adapters: AdapterPairs) -> Generator:
        """Return the generator with these (adapter, strength) pairs merged, and no others.

        Raises:
            ValueError: an adapter does not fit; names every layer that it cannot be applied to.
        """
        names = {name for adapter, strength in adapters if strength != 0 for name in adapter.layer_names()}
        if self.generator is not None and names | self._merged <= self._base.keys():
            self._exchange(self.generator, adapters, names)
            return self.generator
        if self.generator is not None:
            self._kept |= names | self._merged
        self.free()
        generator = self._load()
        layers = dict(generator.named_modules())
        kept = {name: layers[name] for name in sorted(self._kept) if name in layers}
        base = {name: {key: p.detach().clone() for key, p in _own(layer)} for name, layer in kept.items()}
        merge_adapters(generator, adapters)
        cast_frozen_(generator, self._dtype)
        self.generator, self._base, self._merged = generator.to(self._device), base, names
        return self.generator

    @torch.no_grad()
    def _exchange(self, generator: Generator, adapters: AdapterPairs, names: set[str]) -> None:
        layers = dict(generator.named_modules())
        touched = [layers[name].float() for name in names | self._merged]
        for name in names | self._merged:
            for key, parameter in _own(layers[name]):
                parameter.copy_(self._base[name][key])
            setattr(layers[name], MERGED_ATTRIBUTE, False)
        self._merged = set()
        try:
            merge_adapters(generator, adapters)
            self._merged = names
        finally:
            for layer in touched:
                layer.to(self._dtype)

    def free(self) -> None:
        """Let go of the generator; the next :meth:`set` loads it again."""
        self.generator, self._base, self._merged = None, {}, set()
        self.graphs.clear()


def _own(layer: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return list(layer.named_parameters(recurse=False))
