"""Low-rank adapters on linear layers and 1-D convolutions: settings, adapted layers, merging.

    config.py   LoRAConfig: settings of an adapter, the layers among them; needs no PyTorch
    layers.py   LoRALinear, LoRAConv1d: the adapted layers
    inject.py   inject_lora, remove_lora: a model gets adapters and loses them
    state.py    parameters of an adapted model: for the optimiser, for resuming, for files
    merge.py    Adapter and merge_adapter: a finished adapter and the base weights
    tools.py    one adapter of several, smaller ones, differences, adapters from fine-tuned models
    formats.py  adapters of other programs, there and back

Knows ``nn.Module`` and none of our networks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from selva.utils.lazy import lazy_exports

if TYPE_CHECKING:
    from selva.lora.config import LoRAConfig
    from selva.lora.formats import from_foreign, from_kohya, from_mmaudio_lora, from_peft, to_kohya, to_peft
    from selva.lora.inject import InjectReport, inject_lora
    from selva.lora.merge import Adapter, merge_adapter
    from selva.lora.tools import (
        combine_adapters,
        compare_adapters,
        extract_adapter,
        layer_numbers,
        resize_adapter,
        restricted,
        soup,
        without_pissa,
    )

__all__ = [
    "Adapter",
    "InjectReport",
    "LoRAConfig",
    "combine_adapters",
    "compare_adapters",
    "extract_adapter",
    "from_foreign",
    "from_kohya",
    "from_mmaudio_lora",
    "from_peft",
    "inject_lora",
    "layer_numbers",
    "merge_adapter",
    "resize_adapter",
    "restricted",
    "soup",
    "to_kohya",
    "to_peft",
    "without_pissa",
]

__getattr__, __dir__ = lazy_exports(__name__, {
    "Adapter": "selva.lora.merge",
    "InjectReport": "selva.lora.inject",
    "LoRAConfig": "selva.lora.config",
    "inject_lora": "selva.lora.inject",
    "merge_adapter": "selva.lora.merge",
    **dict.fromkeys(("from_foreign", "from_kohya", "from_mmaudio_lora", "from_peft", "to_kohya", "to_peft"),
                    "selva.lora.formats"),
    **dict.fromkeys(("combine_adapters", "compare_adapters", "extract_adapter", "layer_numbers", "resize_adapter",
                     "restricted", "soup", "without_pissa"), "selva.lora.tools"),
})
