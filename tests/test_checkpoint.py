"""Adapter and step files: what others read, what we read, and what is refused."""

from __future__ import annotations

import copy
import json
import math
import zipfile
from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
from checkpoint_toy import CONFIGS, DIM, LINEAR, LINEAR_CONFIGS, META, NATIVE, Toy, make_input, make_toy, trained
from comfyui_loader import load_as_comfyui
from lora_toy import assert_same_change
from torch import Tensor

from selva.checkpoint import (
    load_adapter,
    load_checkpoint,
    readable_meta,
    save_adapter,
)
from selva.lora.config import LoRAConfig
from selva.lora.merge import merge_adapter
from selva.lora.state import lora_state_dict
from selva.utils.errors import UserError

ADAPTERS = Path(__file__).parent / "golden" / "adapters"
@pytest.fixture
def base() -> Toy:
    return make_toy()


@pytest.fixture
def x() -> Tensor:
    return make_input()


# -- what the loader of ComfyUI-SelVA makes of our files ---------------------------------------------------------------


@pytest.mark.parametrize("name", LINEAR_CONFIGS)
@pytest.mark.parametrize("knows_rslora", [True, False])
def test_comfyui_hears_what_was_trained(base, x, tmp_path, name, knows_rslora):
    model = trained(base, name)
    save_adapter(tmp_path / "a.pt", model, META)
    there = load_as_comfyui(base, tmp_path / "a.pt", knows_rslora=knows_rslora)
    assert (model(x) - base(x)).abs().max() > 0.1
    assert_same_change(there(x), model(x), base(x))
    half = load_as_comfyui(base, tmp_path / "a.pt", strength=0.5)
    here = copy.deepcopy(base)
    merge_adapter(here, load_adapter(tmp_path / "a.pt"), 0.5)
    assert_same_change(here(x), half(x), base(x))
    assert torch.equal(load_as_comfyui(base, tmp_path / "a.pt", strength=0.0)(x), base(x))


def test_rank_16_on_qkv_works_there_as_a_bare_state_dict(base, x, tmp_path):
    model = trained(base, "qkv")
    save_adapter(tmp_path / "a.pt", model, META)
    torch.save(torch.load(tmp_path / "a.pt", weights_only=True)["state_dict"], tmp_path / "raw.pt")
    assert_same_change(load_as_comfyui(base, tmp_path / "raw.pt")(x), model(x), base(x))


@pytest.mark.parametrize("name", NATIVE)
def test_comfyui_refuses_what_it_cannot_apply_with_the_reason(base, tmp_path, name):
    written = save_adapter(tmp_path / "a.pt", trained(base, name), META)
    with pytest.raises(ValueError, match=rf"No layers matched target=\['this adapter .*{NATIVE[name]}, which .*train"):
        load_as_comfyui(base, tmp_path / "a.pt")
    meta = load_adapter(tmp_path / "a.pt").meta
    assert meta["target"] == list(CONFIGS[name].targets) and "native_target" not in meta
    assert readable_meta(written) == meta and "this adapter" in written["target"][0]
    assert LoRAConfig.from_meta(meta) == CONFIGS[name]


def test_a_readable_meta_is_a_copy_of_one_that_hides_nothing(base, tmp_path):
    written = save_adapter(tmp_path / "a.pt", trained(base, "qkv"), META)
    assert readable_meta(written) == written and readable_meta(written) is not written


def test_a_native_adapter_without_its_targets_is_refused(base, tmp_path):
    path = tmp_path / "a.pt"
    save_adapter(path, trained(base, "dora"), META)
    content = torch.load(path, weights_only=True)
    del content["meta"]["native_target"]
    torch.save(content, path)
    with pytest.raises(ValueError, match=r"a\.pt: the meta .* has no native_target"):
        load_adapter(path)


def test_the_file_follows_the_published_rules(base, tmp_path):
    model = trained(base, "rslora")
    written = save_adapter(tmp_path / "adapter_final.pt", model, META)
    content = torch.load(tmp_path / "adapter_final.pt", weights_only=True)
    assert set(content) == {"state_dict", "meta"}
    layers = ["0.attn.qkv", "1.attn.qkv", "1.linear1"]
    assert list(content["state_dict"]) == [f"{layer}.lora_{factor}" for layer in layers for factor in "AB"]
    for tensor in content["state_dict"].values():
        assert type(tensor) is Tensor and tensor.dtype == torch.float32 and tensor.is_contiguous()
    meta = content["meta"]
    assert meta == written == json.loads(json.dumps(meta))
    assert {key: meta[key] for key in ("variant", "rank", "alpha", "target", "steps")} == {
        "variant": "tiny_16k", "rank": 3, "alpha": 3.0, "target": list(LINEAR), "steps": 2000,
    }
    assert (meta["use_rslora"], meta["init_mode"]) == (False, "standard")
    assert LoRAConfig.from_meta(meta) == CONFIGS["rslora"]


# -- our own reader and writer ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("name", CONFIGS)
def test_save_load_merge_gives_the_trained_model(base, x, tmp_path, name, suffix):
    model = trained(base, name)
    path = tmp_path / f"a{suffix}"
    written = save_adapter(path, model, META)
    adapter = load_adapter(path)
    assert adapter.meta == readable_meta(written)
    merged = copy.deepcopy(base)
    merge_adapter(merged, adapter)
    assert_same_change(merged(x), model(x), base(x))
    # Written again, as tensors with the meta that came along, it is the same adapter.
    save_adapter(tmp_path / f"b{suffix}", adapter.tensors, adapter.meta)
    again = load_adapter(tmp_path / f"b{suffix}")
    assert again.meta == adapter.meta
    assert all(torch.equal(again.tensors[key], value) for key, value in adapter.tensors.items())


def test_tensors_are_written_with_their_scale_folded_in(tmp_path):
    a, b = torch.randn(4, DIM), torch.randn(DIM, 4)
    tensors = {"0.attn.qkv.lora_A": a.bfloat16(), "0.attn.qkv.lora_B": b.bfloat16()}
    meta = {"rank": 4, "alpha": 8.0, "use_rslora": True, "target": ["attn.qkv"]}
    save_adapter(tmp_path / "a.pt", tensors, meta)
    adapter = load_adapter(tmp_path / "a.pt")
    assert torch.equal(adapter.tensors["0.attn.qkv.lora_B"], 4 * b.bfloat16().float())
    assert (adapter.scale("0.attn.qkv"), adapter.meta["alpha"], adapter.meta["use_rslora"]) == (1.0, 4.0, False)
    assert meta["alpha"] == 8.0


def test_an_average_is_written_in_place_of_the_current_values(base, tmp_path):
    model = trained(base, "qkv")
    zeros = {key: torch.zeros_like(value, dtype=torch.float64) for key, value in lora_state_dict(model).items()}
    save_adapter(tmp_path / "a.pt", model, META, state=zeros)
    written = torch.load(tmp_path / "a.pt", weights_only=True)["state_dict"]
    assert all(value.dtype == torch.float32 and not value.any() for value in written.values())


def test_all_published_shapes_are_read(caplog):
    final = load_adapter(ADAPTERS / "small_16k_rank4.pt")
    assert (final.meta["variant"], final.meta["rank"]) == ("small_16k", 4)
    assert final.scale("fused_blocks.0.attn.qkv") == 2.0
    assert load_adapter(ADAPTERS / "tiny_rank4_qkv_linear1.pt").meta["target"] == ["attn.qkv", "linear1"]
    step = load_adapter(ADAPTERS / "tiny_step_checkpoint.pt")
    assert step.scale("fused_blocks.0.attn.qkv") == 8.0
    pissa = load_adapter(ADAPTERS / "tiny_pissa_rank4_rslora.pt")
    assert pissa.is_pissa and not final.is_pissa and len(pissa.layer_names()) == 8
    assert pissa.scale("fused_blocks.0.attn.qkv") == 4.0
    assert not caplog.records


@pytest.mark.parametrize(("name", "rank"), [("small_16k_rank4_raw.pt", 4), ("tiny_rank16_raw.pt", 16)])
def test_a_bare_state_dict_is_read_with_a_warning(caplog, name, rank):
    """Pitfall H4: the rank is that of the tensors, not 16."""
    adapter = load_adapter(ADAPTERS / name)
    assert (adapter.meta["rank"], adapter.meta["alpha"]) == (rank, rank)
    assert f"assuming alpha = rank = {rank}" in caplog.text and name in caplog.text


def test_half_precision_tensors_come_as_float32(tmp_path):
    tensors = {"l.lora_A": torch.randn(2, 3).bfloat16(), "l.lora_B": torch.randn(3, 2).bfloat16()}
    torch.save({"state_dict": tensors, "meta": {"rank": 2, "alpha": 2.0, "target": ["l"]}}, tmp_path / "a.pt")
    found = load_adapter(tmp_path / "a.pt").tensors
    assert all(found[key].dtype == torch.float32 and torch.equal(found[key], tensors[key].float()) for key in tensors)


# -- files that are refused -------------------------------------------------------------------------------------------


class Intruder:
    """Unpickling this creates a file: the proof that code ran."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def good_tensors() -> dict[str, Tensor]:
    return {"l.lora_A": torch.ones(2, 3), "l.lora_B": torch.ones(3, 2)}


@pytest.mark.parametrize("load", [load_adapter, load_checkpoint])
def test_code_in_a_file_is_never_run(tmp_path, load):
    """Pitfall H1."""
    path, proof = tmp_path / "evil.pt", tmp_path / "proof"
    torch.save({"state_dict": good_tensors(), "meta": Intruder(proof)}, path)
    with pytest.raises(ValueError, match=r"evil\.pt: .*nothing in it was executed"):
        load(path)
    assert not proof.exists()


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.9, 0.999])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_truncated_file_is_named(base, tmp_path, keep, suffix):
    path = tmp_path / f"cut{suffix}"
    save_adapter(path, trained(base, "qkv"), META)
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content))])
    with pytest.raises(ValueError, match=rf"cut{suffix}: not a readable"):
        load_adapter(path)


def test_flipped_bytes_are_noticed(base, tmp_path):
    path = tmp_path / "bad.pt"
    save_adapter(path, trained(base, "qkv"), META)
    with zipfile.ZipFile(path) as archive:
        start = next(i.header_offset for i in archive.infolist() if i.filename.endswith("data.pkl"))
    content = bytearray(path.read_bytes())
    content[start + 70 : start + 200] = bytes(130)
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"bad\.pt: damaged"):
        load_adapter(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"<!DOCTYPE html><html>Sign in</html>", "looks like a web page"),
        (b"\x80\x02}q\x00.", "not a readable PyTorch file"),
        (b"", "it is empty"),
    ],
)
def test_foreign_bytes_are_explained(tmp_path, content, message):
    path = tmp_path / "adapter.pt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"adapter\.pt.*{message}"):
        load_adapter(path)


def test_a_zip_that_is_no_checkpoint(tmp_path):
    np.savez(tmp_path / "clip.npz", x=np.zeros(3))
    (tmp_path / "clip.npz").rename(tmp_path / "clip.pt")
    with pytest.raises(ValueError, match=r"clip\.pt: damaged, or"):
        load_adapter(tmp_path / "clip.pt")


def test_a_missing_file(tmp_path):
    for name in ("no.pt", "no.safetensors"):
        with pytest.raises(FileNotFoundError, match=name):
            load_adapter(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_checkpoint(tmp_path / "no.pt")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "holds a list"),
        ({"base_model.model.l.lora_A.weight": torch.ones(2, 3), "base_model.model.l.lora_B.weight": torch.ones(3, 2)},
         "format of PEFT.*adapter_config.json; python scripts/adapter.py convert"),
        ({"state_dict": {"l.lora_A.default.weight": torch.ones(2, 3)}, "meta": {}}, "format of PEFT"),
        ({"lora_weights": {"l": {"lora_A": torch.ones(2, 3), "lora_B": torch.ones(3, 2)}},
          "lora_config": {"l": {"rank": 2, "alpha": 4.0}}, "metadata": {}}, "MMAudio-Lora.*adapter.py convert"),
        ({"l.lora_down.weight": torch.ones(2, 3), "l.lora_up.weight": torch.ones(3, 2)},
         "kohya or diffusers.*adapter.py convert"),
        ({"weight": torch.ones(2)}, "not an adapter.*found: weight"),
        ({}, "not an adapter"),
        ({"state_dict": [1], "meta": {}}, "must be dictionaries"),
        ({"state_dict": good_tensors(), "meta": "x"}, "must be dictionaries"),
        ({"state_dict": {**good_tensors(), "l.weight": torch.ones(3, 3)}, "meta": {}}, "l.weight is no LoRA tensor"),
        ({**good_tensors(), "epoch": 3}, "floating-point tensors only.*epoch"),
        ({**good_tensors(), "l.lora_B": torch.ones(3, 2, dtype=torch.int64)}, "floating-point.*l.lora_B"),
        ({"l.lora_A": torch.ones(2, 3)}, "l.lora_B is missing"),
        ({**good_tensors(), "l.lora_B": torch.ones(3, 4)}, "do not fit together"),
        ({**good_tensors(), "l.lora_B": torch.full((3, 2), math.nan)}, "NaN or infinite values: l.lora_B"),
        ({"state_dict": good_tensors(), "meta": {"rank": 4, "alpha": 4.0}}, r"rank in the meta is 4.*\[2\]"),
        ({"state_dict": good_tensors(), "meta": {"alpha": "2"}}, "alpha in the meta is '2'"),
        ({"state_dict": good_tensors(), "meta": {"alpha": math.inf}}, "alpha in the meta is inf"),
        ({"state_dict": good_tensors(), "meta": {"variant": ["a"]}}, r"variant in the meta is \['a'\], expected"),
        ({"state_dict": good_tensors(), "meta": {"variant": 3}}, "variant in the meta is 3"),
        ({"state_dict": good_tensors(), "meta": {"clip_features": ["use"]}}, r"clip_features in the meta is \['use'\]"),
        ({"state_dict": good_tensors(), "meta": {"clip_features": "no"}}, "'no', expected 'use' or 'empty'"),
        ({"state_dict": good_tensors(), "meta": {"generator": "foo"}}, "generator in the meta is 'foo', expected the"),
        ({"state_dict": good_tensors(), "meta": {"generator": {"mark": "1"}}}, "generator in the meta is {'mark'"),
        ({"state_dict": good_tensors(), "meta": {"alpha": 1.0, "use_rslora": "no"}}, "use_rslora in the meta is 'no'"),
        ({"state_dict": good_tensors(), "meta": {"format": "selva-lora-9"}}, "'selva-lora-9' is unknown"),
        ({**good_tensors(), "l.linear.weight": torch.ones(3, 3)}, "PiSSA adapter without alpha"),
    ],
)
def test_a_file_that_is_no_sound_adapter(tmp_path, content, message):
    path = tmp_path / "odd.pt"
    torch.save(content, path)
    with pytest.raises(ValueError, match=rf"(?s)odd\.pt.*{message}"):
        load_adapter(path)


def test_safetensors_with_a_broken_meta(tmp_path):
    safetensors.torch.save_file(good_tensors(), tmp_path / "a.safetensors", metadata={"meta": "{"})
    with pytest.raises(ValueError, match=r"a\.safetensors: not a readable"):
        load_adapter(tmp_path / "a.safetensors")


def test_what_cannot_be_written_leaves_no_file(base, tmp_path):
    model = trained(base, "qkv")
    pissa = load_adapter(ADAPTERS / "tiny_pissa_rank4_rslora.pt")
    attempts = [
        ("a.ckpt", model, META, "written as .pt or .safetensors"),
        ("a.pt", model, {"folder": Path("x")}, r"meta\['folder'\] is a "),
        ("a.pt", model, {"loss": np.float64(1.0)}, r"meta\['loss'\] is a float64"),
        ("a.safetensors", model, {"x": [torch.ones(1)]}, r"meta\['x'\]\[0\] is a Tensor"),
        ("a.pt", base, META, "no adapters to save"),
        ("a.pt", {}, META, "no adapter tensors"),
        ("a.pt", {"l.lora_A": torch.ones(2, 3)}, META, "l.lora_B is missing"),
        ("a.pt", pissa.tensors, pissa.meta, "PiSSA"),
    ]
    for name, source, meta, message in attempts:
        with pytest.raises(ValueError, match=message):
            save_adapter(tmp_path / name, source, meta)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_keeps_the_old_file(base, tmp_path, monkeypatch):
    """Pitfall F8: files are replaced whole or not at all."""
    path = tmp_path / "a.pt"
    save_adapter(path, trained(base, "qkv"), META)
    old = path.read_bytes()

    def full_disk(_content, file):
        Path(file).write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save_adapter(path, trained(base, "scaled"), META)
    assert path.read_bytes() == old and [p.name for p in tmp_path.iterdir()] == ["a.pt"]


def archive_damages(path: Path) -> dict[str, bytes]:
    torch.save({"state_dict": good_tensors(), "meta": META}, path)
    whole = path.read_bytes()
    directory = whole.index(b"PK\x01\x02")
    return {
        "several disks": whole[:-18] + b"\x01\x00\x01\x00" + whole[-14:],
        "zip64 without its end": whole[:-22].replace(b"PK\x06\x06", b"PK\x06\x00") + whole[-22:],
        "several disks in zip64": whole[:-42].replace(b"PK\x06\x06", b"PK\x06\x06") + b"PK\x06\x07" + b"\x07" * 16
        + whole[-22:],
        "no directory": whole[:directory] + bytes(len(whole) - directory - 22) + whole[-22:],
        "encrypted": whole[: directory + 8] + b"\x01" + whole[directory + 9 :],
    }


@pytest.mark.parametrize("load", [load_adapter, load_checkpoint])
def test_an_archive_that_is_damaged_in_its_own_way_is_named(tmp_path, load):
    path = tmp_path / "a.pt"
    for what, content in archive_damages(path).items():
        path.write_bytes(content)
        try:
            load(path)
        except ValueError as error:
            assert str(error).startswith(f"{path}: ") and "\n" not in str(error), what


@pytest.mark.parametrize("tensor", [
    torch.ones(1).expand(1 << 40, 3), torch.eye(3).to_sparse(), torch.ones(2, 3, device="meta"),
    torch.quantize_per_tensor(torch.ones(2, 3), 0.1, 0, torch.qint8),
], ids=["expanded", "sparse", "meta", "quantised"])
def test_a_tensor_without_its_values_is_refused(tmp_path, tensor):
    torch.save({"state_dict": {**good_tensors(), "l.lora_A": tensor}, "meta": META}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"a\.pt: "):
        load_adapter(tmp_path / "a.pt")


@pytest.mark.parametrize("changed", [{"scheduler": 3}, {"lora": [1]}, {"extra": "x"}, {"extra": None}])
def test_a_step_file_with_a_part_of_another_kind_is_refused(tmp_path, changed):
    content = {"state_dict": good_tensors(), "meta": META, "optimizer": {}, "step": 2, **changed}
    torch.save(content, tmp_path / "adapter_step00002.pt")
    with pytest.raises(ValueError, match=f"it has no {next(iter(changed))}"):
        load_checkpoint(tmp_path / "adapter_step00002.pt")


def test_a_safetensors_file_nested_too_deeply_is_named(tmp_path):
    deep = "[" * 100_000 + "]" * 100_000
    safetensors.torch.save_file(good_tensors(), tmp_path / "a.safetensors", metadata={"meta": deep})
    with pytest.raises(ValueError, match=r"a\.safetensors: not a readable"):
        load_adapter(tmp_path / "a.safetensors")


def test_a_file_of_features_is_no_damaged_adapter(tmp_path):
    with pytest.raises(UserError, match=r"dog\.npz: is a file of features"):
        load_adapter(tmp_path / "dog.npz")
