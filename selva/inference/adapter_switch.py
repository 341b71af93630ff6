"""Generator whose adapters can be exchanged, so that one loaded model makes the sounds of several adapters."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from selva.checkpoint import load_adapter
from selva.flow import WHOLE_INTERVAL
from selva.lora.merge import MERGED_ATTRIBUTE, Adapter, clip_features_of, merge_adapters
from selva.lora.tools import restricted
from selva.models.generator import Generator, cast_frozen_
from selva.models.variants import Variant
from selva.sampling import NO_GRAPHS, SamplingGraphs
from selva.utils.errors import UserError
from selva.utils.text import listed
from selva.weights.find import baked_clip_features, generator_change

log = logging.getLogger(__name__)

PathLike = str | Path
AdapterSpec = PathLike | Adapter | tuple[PathLike | Adapter, float]
AdapterPairs = Sequence[tuple[Adapter, float]]


def warn_of_other_generators(adapters: AdapterPairs, generator: Path | None) -> None:
    """Warn of adapters that were trained on other weights of the same variant than those in use."""
    for adapter, _ in adapters:
        if change := generator_change(adapter.meta, generator):
            log.warning("%s was trained on %s and is used with %s (--generator)", adapter.source, *change)


def warn_of_missing_prefixes(adapters: AdapterPairs, prompts: Iterable[str], told: set[str]) -> None:
    """Warn of prompts without the words that all prompts of an adapter's training began with.

    Args:
        told: prompts that were looked at before, to which these are added.
    """
    prompts = [prompt for prompt in dict.fromkeys(prompts) if prompt not in told]
    told.update(prompts)
    for adapter, strength in adapters:
        prefixes = adapter.meta.get("prompt_prefix")
        if strength == 0 or not isinstance(prefixes, list) or not prefixes or not all(prefixes):
            continue  # sets without a prefix have taught it other prompts too
        without = [prompt for prompt in prompts if not prompt.startswith(tuple(map(str, prefixes)))]
        if without:
            log.warning("%s was trained with prompts that begin with %s, these do not, so it may hardly act: %s",
                        adapter.source, " or ".join(map(repr, prefixes)), listed([repr(one) for one in without], 5))


def load_adapters(
    specs: Iterable[AdapterSpec], variant: Variant, layers: Sequence[str] = ()
) -> list[tuple[Adapter, float]]:
    """Return (adapter, strength) pairs from files or adapters, each with or without a strength (default 1).

    Args:
        layers: patterns of the layers to keep, see :func:`selva.lora.tools.restricted`; all if there are none.

    Raises:
        ValueError: an adapter says that it was trained for another variant, or is none, or has no layer of a pattern.
    """
    pairs = []
    for spec in specs:
        source, strength = spec if isinstance(spec, tuple) else (spec, 1.0)
        adapter = source if isinstance(source, Adapter) else load_adapter(source)
        trained_for = adapter.meta.get("variant")
        if trained_for is not None and trained_for != variant.name:
            raise UserError(f"{adapter.source if source is adapter else source}: was trained for variant "
                             f"{trained_for}, not {variant.name}; use --variant {trained_for}")
        pairs.append((restricted(adapter, layers), float(strength)))
    return pairs


def uses_clip_features(choice: str, variant: Variant, adapters: AdapterPairs, generator: Path | None = None) -> bool:
    """Return True where CLIP frame features are passed: as asked for, as the adapters were trained, or as released.

    Without adapters, a generator that adapters were baked into may say how those were trained.

    Args:
        generator: the user's own; None for that of the variant.

    Raises:
        ValueError: two adapters were trained differently, and nothing was asked for.
    """
    if choice != "auto":
        return choice == "use"
    trained = clip_features_of(adapters, "choose one") or baked_clip_features(generator)
    return trained == "use" if trained else variant.family == "mmaudio"


class TimedAdapters:
    """Weights of a generator with and without its adapters, for adapters that act in a part of the path only.

    Args:
        weights: (parameter, its values with the adapters, its values without them).
        times: the adapters act from the first to the second of these times, both included.
    """

    def __init__(self, weights: Sequence[tuple[nn.Parameter, Tensor, Tensor]], times: tuple[float, float]) -> None:
        self.times, self._weights, self._active = times, weights, True

    def use(self, active: bool) -> None:
        """Let the adapters act, or not; exchanges references, so nothing is copied or rounded."""
        if active != self._active:
            for parameter, with_adapters, without in self._weights:
                parameter.data = with_adapters if active else without
            self._active = active


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

    def set_for(
        self, adapters: AdapterPairs, times: tuple[float, float]
    ) -> tuple[Generator, TimedAdapters | None]:
        """Return the generator for adapters that act at ``times``, and what exchanges its weights on the way.

        Outside of the interval the weights are those of the base model, bit for bit. None for the whole interval. The
        weights of the layers that change are on the device twice meanwhile.

        Raises:
            ValueError: as :meth:`set`.
        """
        names = {name for adapter, strength in adapters if strength != 0 for name in adapter.layer_names()}
        if times == WHOLE_INTERVAL or not names:
            return self.set(adapters), None
        self._kept |= names
        layers = dict(self.set(()).named_modules())
        base = {name: {key: p.detach().clone() for key, p in _own(layers[name])} for name in names if name in layers}
        generator = self.set(adapters)
        layers = dict(generator.named_modules())
        return generator, TimedAdapters(
            [(p, p.data, base[name][key]) for name in sorted(names) for key, p in _own(layers[name])], times)

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
