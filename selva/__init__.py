"""SelVA LoRA: teach video-to-audio models new sounds.

    from selva import SoundGenerator
    SoundGenerator("small_16k", "weights").generate("cat.mp4", "a cat purring").save("cat.flac")
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# Name -> module; imported on first use, because most of them need PyTorch, and `import selva` should cost nothing.
_EXPORTS = {
    "SamplingConfig": "selva.sampling",
    "Sound": "selva.inference.request",
    "SoundGenerator": "selva.inference.engine",
    "SoundRequest": "selva.inference.request",
    "load_adapter": "selva.checkpoint",
    "load_features": "selva.features",
    "merge_adapter": "selva.lora.merge",
}
__all__ = ["__version__", *_EXPORTS]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXPORTS})
