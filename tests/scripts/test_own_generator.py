"""`--generator FILE`: an exported generator in train_lora.py and infer.py, from the file to the sound."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from script_args import TINY

import infer
import train_lora
from selva.checkpoint import load_adapter
from selva.training.base.mmaudio_files import write_weights
from selva.weights.load import load_generator

QUICK = [*TINY, "--steps", "2", "--batch_size", "2", "--warmup_steps", "1", "--rank", "2", "--no_preview"]


@pytest.fixture(scope="module")
def generators(tmp_path_factory) -> dict[str, Path]:
    """The shipped generator in both formats, and one with another last layer."""
    folder = tmp_path_factory.mktemp("generators")
    weights = load_generator("tiny_16k").state_dict()
    files = {name: folder / name for name in ("same.pth", "same.safetensors", "other.safetensors")}
    for path in files.values():
        write_weights(path, {**weights, "final_layer.conv.bias": weights["final_layer.conv.bias"] + 0.3}
                      if path.stem == "other" else weights)
    return files


def sound(features: Path, out: Path, *more: str) -> np.ndarray:
    arguments = ["--features", str(features), "--output", str(out / "a.flac"), "--num_steps", "2", "--duration", "1"]
    assert infer.main([*TINY, *arguments, *map(str, more)]) == 0
    return soundfile.read(out / "a.flac")[0]


def test_a_file_takes_the_place_of_the_generator(feature_dir, tmp_path, generators):
    features = sorted(feature_dir.glob("*.npz"))[0]
    shipped = sound(features, tmp_path / "shipped")
    for name, file in generators.items():
        made = sound(features, tmp_path / name, "--generator", file)
        assert np.array_equal(made, shipped) == name.startswith("same"), name
    again = sound(features, tmp_path / "shipped", "--generator", generators["other.safetensors"])
    assert not np.array_equal(again, shipped)  # what lies there is of another generator, and made again


def test_an_adapter_remembers_what_it_was_trained_on(feature_dir, tmp_path, generators, capsys):
    out, other = tmp_path / "run", generators["other.safetensors"]
    arguments = ["--data_dir", str(feature_dir), "--output_dir", str(out), *QUICK]
    assert train_lora.main([*arguments, "--generator", str(other)]) == 0
    meta = load_adapter(out / "adapter_final.pt").meta
    assert meta["generator"]["name"] == "other.safetensors"

    assert train_lora.main([*arguments, "--resume", "auto", "--steps", "3"]) == 1
    said = capsys.readouterr().err
    assert "generator was 'other.safetensors (" in said and "is 'the generator of the variant' now" in said

    features = sorted(feature_dir.glob("*.npz"))[0]
    sound(features, tmp_path / "right", "--adapter", out / "adapter_final.pt", "--generator", other)
    assert "was trained on" not in capsys.readouterr().err
    sound(features, tmp_path / "wrong", "--adapter", out / "adapter_final.pt")
    assert "was trained on other.safetensors" in capsys.readouterr().err


def test_files_that_are_no_generator_of_the_variant(feature_dir, tmp_path, capsys):
    torch.save({"final_layer.conv.bias": torch.zeros(20)}, tmp_path / "a.pth")
    for file, message in ((tmp_path / "none.pth", "--generator"), (tmp_path / "a.pth", "expected the generator of")):
        arguments = ["--data_dir", str(feature_dir), "--output_dir", str(tmp_path / "run"), *QUICK]
        assert train_lora.main([*arguments, "--generator", str(file)]) in (1, 2)
        said = capsys.readouterr().err
        assert message in said and file.name in said and "Traceback" not in said
