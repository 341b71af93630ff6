"""Features of prompts, kept in the cache of a data folder: the text encoder runs once for each, in the first run."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from selva.data.cache import DataCache, Settings
from selva.models.variants import Variant
from selva.utils.text import counted
from selva.weights.find import content_mark, find_weights, packaged_identity
from selva.weights.load import load_clip_text

log = logging.getLogger(__name__)

RECENT_TEXTS = 512  # kept in memory, 0.3 MB each at full size


def weights_mark(variant: Variant, selva_dir: Path | None, part: str) -> Any:
    """Return the identity of the weights of a part, anything that JSON can hold, which other weights do not share."""
    if variant.packaged:
        return [variant.name, packaged_identity(variant.name)]
    paths = find_weights(variant, selva_dir, (part,))[part]
    return ["published", *([path.name, content_mark(path)] for path in paths)]


class TextFeatures:
    """The features of prompts for one variant.

    Args:
        cache: where they are kept.
    """

    def __init__(self, cache: DataCache, variant: Variant, selva_dir: Path | None) -> None:
        self.cache, self.variant, self.selva_dir = cache, variant, selva_dir
        self.shape = variant.generator.text_seq_len, variant.generator.text_dim
        self._recent = functools.lru_cache(maxsize=RECENT_TEXTS)(self._must_find)

    def find(self, prompt: str) -> Tensor | None:
        """Return (77, text_dim) from the cache, or None."""
        features = (self.cache.load("texts", self._settings(prompt)) or {}).get("text_features")
        return features if features is not None and features.shape == self.shape else None

    def __getitem__(self, prompt: str) -> Tensor:
        """Return (77, text_dim); of a prompt that was encoded.

        Raises:
            KeyError: the cache does not hold it any more.
        """
        return self._recent(prompt)

    def _must_find(self, prompt: str) -> Tensor:
        found = self.find(prompt)
        if found is None:
            raise KeyError(prompt)
        return found

    def encode(self, prompts: Iterable[str], device: torch.device) -> None:
        """Encode the prompts that the cache lacks, after another process that encodes for the same folder."""
        missing = sorted({prompt for prompt in prompts if self.find(prompt) is None})
        if not missing:
            return
        with self.cache.building():
            missing = [prompt for prompt in missing if self.find(prompt) is None]  # another process may have been here
            if not missing:
                return
            log.info("encoding %s", counted(len(missing), "prompt"))
            encoder = load_clip_text(self.variant.name, self.selva_dir, device)
            for prompt in missing:
                (features,) = encoder.encode([prompt]).cpu()
                self.cache.save("texts", self._settings(prompt), {"text_features": features})

    def _settings(self, prompt: str) -> Settings:
        return {"prompt": prompt, "clip": self._mark}

    @functools.cached_property
    def _mark(self) -> Any:
        return weights_mark(self.variant, self.selva_dir, "clip_text")
