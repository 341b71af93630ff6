"""Names and loaders of the parts of a published variant, for tests of weight files."""

from __future__ import annotations

from pathlib import Path

import torch

from selva.models.variants import get_variant
from selva.weights import find, load

LOADERS = {
    "generator": load.load_generator,
    "video_encoder": load.load_video_encoder,
    "vae": load.load_vae,
    "vocoder": load.load_vocoder,
    "clip_text": load.load_clip_text,
    "clip_image": load.load_clip_image,
    "t5": load.load_t5,
}
COMFYUI_FILES = {
    "generator": "generator_small_16k_sup_5.pth",
    "video_encoder": "video_enc_sup_5.pth",
    "vae": "ext/v1-16.pth",
    "vocoder": "ext/best_netG.pt",
    "clip_text": "ext/DFN5B-CLIP-ViT-H-14-384/open_clip_model.safetensors",
    "t5": "ext/flan-t5-base/model.safetensors",
}


def assert_loads_everything(variant: str, folder: Path) -> None:
    """Check that every part of a variant can be loaded, finite, frozen and in eval mode."""
    find.check_weights(variant, folder)
    for part in get_variant(variant).parts:
        network = LOADERS[part](variant, folder)
        tensors = [*network.parameters(), *network.buffers()]
        assert tensors and all(torch.isfinite(t).all() or part == "clip_text" for t in tensors), part
        assert not network.training and not any(t.requires_grad for t in tensors), part
