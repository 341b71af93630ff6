"""Parts that several runs of one process share: the frozen base model, the clips, the sounds to preserve."""

from __future__ import annotations

from collections.abc import Callable, Hashable

from selva.data.cache import remove_temporary_caches
from selva.data.dataset import ClipDataset
from selva.lora.inject import remove_lora
from selva.models.generator import Generator

MOST_PRESERVED = 3  # sets of sounds to preserve that are kept, 200 MB each at most; one for every seed of a sweep


class SharedParts:
    """Keeps what a run has loaded for the next one, which takes it only if it asks for the very same.

    A run changes nothing of it: the base model is frozen, and its adapters are removed before it is given on.
    """

    def __init__(self) -> None:
        self._generator: tuple[Hashable, Generator] | None = None
        self._clips: dict[Hashable, ClipDataset] = {}
        self._preserved: dict[Hashable, ClipDataset] = {}

    def generator(self, key: Hashable, load: Callable[[], Generator]) -> Generator:
        """Return the base model of ``key`` without adapters; one is kept, so another is loaded after it is let go."""
        if self._generator is None or self._generator[0] != key:
            self._generator = None
            self._generator = key, load()
        generator = self._generator[1]
        remove_lora(generator)
        return generator.eval()

    def clips(self, key: Hashable, load: Callable[[], ClipDataset]) -> ClipDataset:
        """Return the clips of ``key``."""
        if key not in self._clips:
            self._clips[key] = load()
        return self._clips[key]

    def preserved(self, key: Hashable, make: Callable[[], ClipDataset]) -> ClipDataset:
        """Return the clips with the sounds to preserve of ``key``, made once."""
        if key not in self._preserved:
            for old in list(self._preserved)[: max(0, len(self._preserved) - MOST_PRESERVED + 1)]:
                del self._preserved[old]
            self._preserved[key] = make()
        return self._preserved[key]

    def clear(self) -> None:
        """Let go of everything, as after the last run, or one that has failed in an unknown way."""
        self.__init__()
        remove_temporary_caches()  # where the clips of a folder that cannot be written have their latents
