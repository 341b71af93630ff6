"""SelVA LoRA: teach video-to-audio models new sounds.

    from selva import SoundGenerator
    SoundGenerator("small_16k", "weights").generate("cat.mp4", "a cat purring").save("cat.flac")
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from selva.utils.lazy import lazy_exports

if TYPE_CHECKING:
    from selva.checkpoint import load_adapter
    from selva.features import load_features
    from selva.flow import SamplingConfig
    from selva.inference.engine import SoundGenerator
    from selva.inference.request import Sound, SoundRequest
    from selva.lora.merge import merge_adapter

__version__ = "0.1.0"
DISTRIBUTION = "selva-lora"  # the official SelVA has a package of this name too; ``selva_lora`` tells them apart

__all__ = [
    "SamplingConfig",
    "Sound",
    "SoundGenerator",
    "SoundRequest",
    "__version__",
    "load_adapter",
    "load_features",
    "merge_adapter",
]

__getattr__, __dir__ = lazy_exports(__name__, {
    "SamplingConfig": "selva.flow",
    "Sound": "selva.inference.request",
    "SoundGenerator": "selva.inference.engine",
    "SoundRequest": "selva.inference.request",
    "load_adapter": "selva.checkpoint",
    "load_features": "selva.features",
    "merge_adapter": "selva.lora.merge",
})
