"""Weights of a base training as files that other programs load: `.pth` under the published names, and safetensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from selva.utils.files import atomic_path
from selva.utils.torch_files import write_safetensors, write_torch

FOLDER = "export"


def export_weights(folder: Path, name: str, weights: Mapping[str, Tensor], meta: Mapping[str, Any]) -> list[Path]:
    """Write ``<name>.pth`` and ``<name>.safetensors`` and return their paths, each whole or not at all.

    Args:
        weights: state dict of a generator, in float32 on the CPU. meta: stored in the second one, as JSON.

    Raises:
        OSError: they cannot be written.
    """
    paths = [folder / f"{name}.pth", folder / f"{name}.safetensors"]
    tensors = {key: value.contiguous() for key, value in weights.items()}
    with atomic_path(paths[0]) as temporary:
        write_torch(tensors, temporary)
    with atomic_path(paths[1]) as temporary:
        write_safetensors(tensors, temporary, {"meta": json.dumps(dict(meta))})
    return paths
