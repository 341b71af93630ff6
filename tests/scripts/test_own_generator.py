"""`--generator FILE`: an exported generator in train_lora.py and infer.py, from the file to the sound."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from script_args import TINY
from tiny_adapter import make_adapter

import infer
import train_lora
from scripts import adapter as adapter_script
from selva.checkpoint import load_adapter, save_adapter
from selva.training.base.mmaudio_files import write_weights
from selva.weights.find import generator_mark
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


def test_an_adapter_of_another_generator_is_told_wherever_it_meets_one(tmp_path, generators, capsys):
    own, made = generators["other.safetensors"], make_adapter()
    trained_on_own, plain = tmp_path / "own.pt", tmp_path / "plain.pt"
    save_adapter(trained_on_own, made.tensors, {**made.meta, "generator": generator_mark(own)})
    save_adapter(plain, made.tensors, made.meta)
    mark = generator_mark(own)["mark"]
    here, variants = f"other.safetensors ({mark})", "the generator of the variant"
    for file, base, before, now in ((trained_on_own, [], here, variants), (plain, ["--base", own], variants, here),
                                    (trained_on_own, ["--base", own], "", ""), (plain, [], "", "")):
        for command, is_used in (("bake", "baked into"), ("check", "checked for")):
            more = ["--output", tmp_path / "baked", "--overwrite"] if command == "bake" else ["--variant", "tiny_16k"]
            assert adapter_script.main([str(a) for a in (command, file, *base, *more)]) == 0
            said = capsys.readouterr().err
            assert (f"was trained on {before} and is {is_used} {now} (--base)" in said) == bool(before), said
            assert ("was trained on" in said) == bool(before), said
    for command in (["check", str(plain), "--variant", "tiny_16k"],
                    ["bake", str(plain), "--output", str(tmp_path / "x.pth")]):
        assert adapter_script.main([*command, "--base", str(tmp_path / "none")]) == 1
        assert "none: no such file" in capsys.readouterr().err
        assert adapter_script.main([*command, "--base", str(tmp_path / "baked")]) == 0
        assert "was trained on" in capsys.readouterr().err  # the generator in that folder
    assert adapter_script.main(["info", str(trained_on_own), str(plain)]) == 0
    said = capsys.readouterr().out
    assert f"base model: tiny_16k, with --generator {here}\n" in said and "base model: tiny_16k\n" in said


@pytest.mark.parametrize("clip_features", ["use", "empty"])
def test_a_baked_adapter_sounds_as_the_adapter_itself(feature_dir, tmp_path, capsys, clip_features):
    """Without an adapter infer.py passes the empty CLIP features of official SelVA, and training passes real ones."""
    features, made = sorted(feature_dir.glob("*.npz"))[0], make_adapter()
    save_adapter(tmp_path / "a.pt", made.tensors, {**made.meta, "clip_features": clip_features})
    expected = sound(features, tmp_path / "expected", "--adapter", tmp_path / "a.pt")
    for name in ("folder", "file.safetensors", "file.pth"):
        capsys.readouterr()
        assert adapter_script.main(["bake", str(tmp_path / "a.pt"), "--output", str(tmp_path / name)]) == 0
        said = capsys.readouterr()
        path = Path(said.out.strip())
        assert path.is_file() and path.suffix == (".pth" if name.endswith(".pth") else ".safetensors")
        (use_it,) = re.findall(r"to use it: (.*)", said.err)
        assert use_it == f"--variant tiny_16k --generator {path} --clip_features {clip_features}"
        assert np.array_equal(sound(features, tmp_path / f"told {name}", *use_it.split()), expected)
        if path.suffix == ".safetensors":  # says it itself
            assert np.array_equal(sound(features, tmp_path / f"auto {name}", "--generator", path), expected)


def test_files_that_are_no_generator_of_the_variant(feature_dir, tmp_path, capsys):
    torch.save({"final_layer.conv.bias": torch.zeros(20)}, tmp_path / "a.pth")
    for file, message in ((tmp_path / "none.pth", "--generator"), (tmp_path / "a.pth", "expected the generator of")):
        arguments = ["--data_dir", str(feature_dir), "--output_dir", str(tmp_path / "run"), *QUICK]
        assert train_lora.main([*arguments, "--generator", str(file)]) in (1, 2)
        said = capsys.readouterr().err
        assert message in said and file.name in said and "Traceback" not in said
