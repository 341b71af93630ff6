"""selva.weights.adapters: files of every format, what base models say about them, and baking."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from comfyui_loader import wrap_as_comfyui_
from tiny_adapter import make_adapter

from selva.checkpoint import load_adapter, save_adapter
from selva.lora.merge import Adapter, merge_adapter
from selva.utils.errors import UserError
from selva.weights.adapters import (
    FORMATS,
    adapter_problems,
    bake,
    generator_tensors,
    layer_shapes,
    open_adapter,
    parse_strength,
    write_adapter,
)
from selva.weights.find import baked_clip_features
from selva.weights.load import load_generator

NAMES = {"selva": "a.pt", "comfyui": "c.pt", "peft": "peft", "kohya": "k.safetensors"}


def odd_scale(**more) -> Adapter:
    """An adapter whose scale of 5/2 would round B; both trainers of this model write such files."""
    plain = make_adapter(**more)
    return Adapter(plain.tensors, {**plain.meta, "alpha": 5.0}, "odd.pt")


@pytest.mark.parametrize("to", FORMATS)
@pytest.mark.parametrize("second", FORMATS)
def test_there_and_back_to_the_last_bit(to, second, tmp_path):
    adapter = odd_scale()
    first = open_adapter(write_adapter(adapter, tmp_path / NAMES[to], to))
    found = open_adapter(write_adapter(first, tmp_path / f"2{NAMES[second]}", second))
    assert sorted(found.layer_names()) == sorted(adapter.layer_names())
    assert {key: found.meta[key] for key in adapter.meta if key != "alpha"} | {"alpha": 5.0} == adapter.meta
    for name in adapter.layer_names():
        weight = torch.zeros(layer_shapes("tiny_16k")[name])
        assert torch.equal(found.update(name, weight), adapter.update(name, weight)), name


@pytest.mark.parametrize("knows_rslora", [True, False])
@pytest.mark.parametrize("targets", [("attn.qkv",), ("attn.qkv", "text_block.linear1")])
def test_comfyui_selva_computes_what_the_merged_model_does(tmp_path, knows_rslora, targets):
    adapter = odd_scale(targets=targets)
    rslora = Adapter(adapter.tensors, {**adapter.meta, "use_rslora": True}, "rslora.pt")  # scale 5 / sqrt(2)
    base = load_generator("tiny_16k")
    merged, wrapped = copy.deepcopy(base), copy.deepcopy(base)
    merge_adapter(merged, rslora)
    unexpected = wrap_as_comfyui_(wrapped, write_adapter(rslora, tmp_path / "a.pt", "comfyui"),
                                              knows_rslora)
    assert not unexpected
    name = adapter.layer_names()[-1]
    x = torch.randn(3, adapter.factors(name)[0].shape[1])
    layers = [model.get_submodule(name) for model in (base, merged, wrapped)]
    plain, expected, found = (layer(x) for layer in layers)
    assert (found - expected).abs().max() < 1e-4 * (expected - plain).abs().max()


def test_what_comfyui_cannot_apply_is_refused(tmp_path):
    dora = make_adapter(dora=True)
    with pytest.raises(UserError, match="DoRA magnitudes, which ComfyUI-SelVA cannot apply"):
        write_adapter(dora, tmp_path / "a.pt", "comfyui")
    with pytest.raises(UserError, match="changes convolutions"):
        write_adapter(make_adapter(targets=("latent_block.linear1",)), tmp_path / "a.pt", "comfyui")
    again = open_adapter(write_adapter(dora, tmp_path / "peft", "peft"))
    for key, value in dora.tensors.items():
        assert torch.equal(again.tensors[key], value), key


@pytest.mark.parametrize("to, name, message", [
    ("comfyui", "a.safetensors", "the format comfyui is written as .pt"), ("kohya", "a.pt", "written as .safetensors"),
    ("peft", "a.pt", "is a folder"), ("selva", "a", "written as .pt or"),
])
def test_endings(to, name, message, tmp_path):
    with pytest.raises(UserError, match=message):
        write_adapter(make_adapter(), tmp_path / name, to)


def test_files_of_others_get_the_variant_that_is_given(tmp_path):
    adapter = make_adapter()
    layers = {name: dict(zip(("lora_A", "lora_B"), adapter.factors(name), strict=True))
              for name in adapter.layer_names()}
    torch.save({"lora_weights": layers, "lora_config": {name: {"alpha": 6.0} for name in layers}, "metadata": {}},
               tmp_path / "mm.pt")
    found = open_adapter(tmp_path / "mm.pt", "tiny_16k")
    assert found.meta["variant"] == "tiny_16k" and found.scale(adapter.layer_names()[0]) == 3.0
    with pytest.raises(UserError, match="trained for variant tiny_16k, not small_16k"):
        open_adapter(save_to(tmp_path / "a.pt", adapter), "small_16k")


def save_to(path, adapter: Adapter):
    save_adapter(path, adapter.tensors, adapter.meta)
    return path


def test_a_folder_that_is_none_of_peft(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"without adapter_model\.safetensors"):
        open_adapter(tmp_path)
    write_adapter(make_adapter(), tmp_path / "p", "peft")
    (tmp_path / "p" / "adapter_config.json").write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match=r"adapter_config\.json: not readable as JSON"):
        open_adapter(tmp_path / "p")
    (tmp_path / "p" / "adapter_config.json").write_text(json.dumps([1]), encoding="utf-8")
    with pytest.raises(UserError, match="expected the settings of PEFT"):
        open_adapter(tmp_path / "p")
    (tmp_path / "p" / "adapter_config.json").unlink()
    with pytest.raises(UserError, match=r"without adapter_config\.json beside it"):
        open_adapter(tmp_path / "p")


def test_peft_that_is_replaced_in_halves_is_not_taken_for_whole(tmp_path, monkeypatch):
    """Two files cannot be replaced at once: new tensors must not meet the alpha of the old ones."""
    write_adapter(odd_scale(), tmp_path / "p", "peft")

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("selva.weights.adapters.write_safetensors", interrupted)
        with pytest.raises(KeyboardInterrupt):
            write_adapter(make_adapter(1), tmp_path / "p", "peft")
    assert open_adapter(tmp_path / "p").meta["alpha"] == 5.0  # nothing has changed yet
    with monkeypatch.context() as patch:
        patch.setattr("selva.weights.adapters.atomic_write_text", interrupted)
        with pytest.raises(KeyboardInterrupt):
            write_adapter(make_adapter(1), tmp_path / "p", "peft")
    with pytest.raises(UserError, match=r"without adapter_config\.json beside it"):
        open_adapter(tmp_path / "p")
    again = open_adapter(write_adapter(make_adapter(1), tmp_path / "p", "peft"))
    name = again.layer_names()[0]
    assert again.scale(name) == 1.0


def test_baking_is_the_merged_model_and_is_read_back(tmp_path):
    adapter, merged = odd_scale(targets=("attn.qkv", "latent_block.linear1")), load_generator("tiny_16k")
    merge_adapter(merged, adapter, 0.7)
    path, _ = bake("tiny_16k", None, [(adapter, 0.7)], tmp_path)
    baked, base = generator_tensors(path, "tiny_16k"), load_generator("tiny_16k").state_dict()
    for key, value in merged.state_dict().items():
        assert torch.equal(baked[key], value), key
    assert any(not torch.equal(baked[key], base[key]) for key in baked)
    with pytest.raises(UserError, match="needed: give --selva_dir"):
        bake("small_16k", None, [(adapter, 1.0)], tmp_path)
    torch.save({key: value for key, value in baked.items() if "attn.qkv" not in key}, tmp_path / "half.pth")
    with pytest.raises(UserError, match=r"not a generator of tiny_16k: .* is missing"):
        generator_tensors(tmp_path / "half.pth", "tiny_16k")


def test_a_folder_of_baked_weights_is_the_generator_in_it(tmp_path):
    """A packaged variant ignores a folder of weights, but bake writes such folders for it, too."""
    path, _ = bake("tiny_16k", None, [(make_adapter(), 1.0)], tmp_path / "baked")
    inside, packaged = generator_tensors(tmp_path / "baked", "tiny_16k"), generator_tensors(None, "tiny_16k")
    assert all(torch.equal(inside[key], value) for key, value in generator_tensors(path, "tiny_16k").items())
    assert any(not torch.equal(inside[key], packaged[key]) for key in packaged)
    with pytest.raises(FileNotFoundError, match=r"holds no tiny_16k_generator\.safetensors.* name the file itself"):
        generator_tensors(tmp_path, "tiny_16k")


def test_weights_that_are_not_finite_are_named_and_not_written(tmp_path):
    broken = load_generator("tiny_16k").state_dict()
    broken["final_layer.conv.bias"] = broken["final_layer.conv.bias"] * float("nan")
    torch.save(broken, tmp_path / "nan.pth")
    with pytest.raises(UserError, match=r"nan\.pth: not a usable generator: .*NaN or infinite values in final_layer"):
        generator_tensors(tmp_path / "nan.pth", "tiny_16k")
    for base, strength, name in ((tmp_path / "nan.pth", 1.0, "final_layer"), (None, 1e39, r"joint_blocks\.0")):
        with pytest.raises(UserError, match=rf"b\.pth: not written: with adapter .* infinite values in {name}"):
            bake("tiny_16k", None, [(make_adapter(), strength)], tmp_path / "b.pth", base)
        assert not (tmp_path / "b.pth").exists()


def test_adapters_of_different_clip_features_are_not_baked_together(tmp_path):
    first, second = make_adapter(), make_adapter(1)
    empty = Adapter(second.tensors, {**second.meta, "clip_features": "empty"}, "empty.pt")
    silent = Adapter(first.tensors, {"variant": "tiny_16k"}, "silent.pt")  # of ComfyUI-SelVA, which passes them
    for one in (Adapter(first.tensors, first.meta, "use.pt"), silent):
        with pytest.raises(UserError, match=rf"{one.source}: use, empty\.pt: empty\); .* bake adapters that agree"):
            bake("tiny_16k", None, [(one, 1.0), (empty, 1.0)], tmp_path / "out")
        assert not (tmp_path / "out").exists()
    path, _ = bake("tiny_16k", None, [(first, 0.0), (empty, 1.0)], tmp_path / "out")  # at 0 it has no say
    assert baked_clip_features(path) == "empty"
    again, _ = bake("tiny_16k", None, [(first, 0.0)], tmp_path / "again", base=path)
    assert baked_clip_features(again) == "empty"


def test_what_does_not_fit_a_variant_is_named():
    adapter = make_adapter()
    assert adapter_problems(adapter, "tiny_16k") == []
    problems = adapter_problems(adapter, "large_44k")
    assert problems[0] == "was trained for variant tiny_16k" and any("is for a weight of" in p for p in problems)
    renamed = Adapter({"nowhere." + key: value for key, value in adapter.tensors.items()}, {})
    assert adapter_problems(renamed, "tiny_16k")[0].startswith("tiny_16k has no layer nowhere.")


def test_strengths_behind_a_colon(tmp_path):
    assert parse_strength("dog.pt:0.5")[1] == 0.5 and parse_strength("dog.pt")[1] == 1.0
    (tmp_path / "a:1").write_text("", encoding="utf-8")
    assert parse_strength(str(tmp_path / "a:1")) == (tmp_path / "a:1", 1.0)
    for number in ("loud", "0_8", "\u0668", "nan", ""):  # Python's float takes 0_8 for 8, and an Arabic 8
        with pytest.raises(UserError, match=f"the strength is '{number}', expected a number such as"):
            parse_strength(f"dog.pt:{number}")


def test_an_odd_scale_stays_in_the_meta_only_where_that_is_asked_for(tmp_path):
    adapter = odd_scale()
    save_adapter(tmp_path / "kept.pt", adapter.tensors, adapter.meta, keep_scale=True)
    save_adapter(tmp_path / "folded.pt", adapter.tensors, adapter.meta)
    assert load_adapter(tmp_path / "kept.pt").meta["alpha"] == 5.0
    assert load_adapter(tmp_path / "folded.pt").meta["alpha"] == 2.0
