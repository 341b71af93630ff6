"""An adapter for tiny_16k that changes every layer it is on."""

from __future__ import annotations

import torch

from selva.lora.config import LoRAConfig
from selva.lora.inject import inject_lora
from selva.lora.merge import Adapter
from selva.lora.state import adapter_tensors, lora_parameters
from selva.weights.load import load_generator


def make_adapter(seed: int = 0, targets: tuple[str, ...] = ("attn.qkv",), **more) -> Adapter:
    model = load_generator("tiny_16k")
    inject_lora(model, LoRAConfig(rank=2, targets=targets, **more), torch.Generator().manual_seed(seed))
    with torch.no_grad():
        for parameter in lora_parameters(model):
            parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(seed))
    return Adapter(adapter_tensors(model), {"variant": "tiny_16k", "clip_features": "use"})
