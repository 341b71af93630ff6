"""SelVA LoRA: teach video-to-audio models new sounds.

    from selva import SoundGenerator
    SoundGenerator("small_16k", "weights").generate("cat.mp4", "a cat purring").save("cat.flac")
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from selva.utils.lazy import lazy_exports
from selva.utils.version import __version__

if TYPE_CHECKING:
    from selva.checkpoint import load_adapter
    from selva.extraction.python import extract
    from selva.features import load_features
    from selva.flow import SamplingConfig
    from selva.inference.engine import SoundGenerator
    from selva.inference.python import generate
    from selva.inference.request import Sound, SoundRequest
    from selva.lora.merge import merge_adapter
    from selva.training.python import train

DISTRIBUTION = "selva-lora"  # the official SelVA has a package of this name too; ``selva_lora`` tells them apart

__all__ = [
    "SamplingConfig",
    "Sound",
    "SoundGenerator",
    "SoundRequest",
    "__version__",
    "extract",
    "generate",
    "load_adapter",
    "load_features",
    "merge_adapter",
    "train",
]

__getattr__, __dir__ = lazy_exports(__name__, {
    "SamplingConfig": "selva.flow",
    "Sound": "selva.inference.request",
    "SoundGenerator": "selva.inference.engine",
    "SoundRequest": "selva.inference.request",
    "extract": "selva.extraction.python",
    "generate": "selva.inference.python",
    "load_adapter": "selva.checkpoint",
    "load_features": "selva.features",
    "merge_adapter": "selva.lora.merge",
    "train": "selva.training.python",
})
