"""Files of tensors in folders of any name."""

from __future__ import annotations

import pytest
import torch

from selva.utils.torch_files import read_safetensors, read_torch, write_safetensors, write_torch
from selva.weights.load import read_checkpoint

TENSORS = {"a": torch.arange(6.0).view(2, 3)}


@pytest.fixture
def both_files(latin1_folder):
    write_torch(TENSORS, latin1_folder / "a.pt")
    write_safetensors(TENSORS, latin1_folder / "a.safetensors", {"meta": "{}"})
    return latin1_folder


@pytest.mark.parametrize(("name", "read"), {
    "whole": ("a.pt", read_torch),
    "mapped": ("a.pt", lambda path: read_torch(path, mmap=True)),
    "safetensors": ("a.safetensors", lambda path: read_safetensors(path)[0]),
    "weights": ("a.pt", read_checkpoint),
    "weights, safetensors": ("a.safetensors", read_checkpoint),
}.values(), ids=["whole", "mapped", "safetensors", "weights", "weights, safetensors"])
def test_files_in_a_folder_whose_name_is_not_utf8_are_read(both_files, name, read):
    content = read(both_files / name)
    (both_files / name).unlink()  # what is mapped stays readable
    assert content.keys() == TENSORS.keys() and torch.equal(content["a"], TENSORS["a"])
