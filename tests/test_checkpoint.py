"""Adapter and step files: what others read, what we read, and what is refused."""

from __future__ import annotations

import copy
import json
import logging
import math
import zipfile
from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
from lora_toy import assert_same_change
from torch import Tensor, nn

from selva.checkpoint import (
    check_same_settings,
    load_adapter,
    load_checkpoint,
    load_newest_checkpoint,
    readable_meta,
    save_adapter,
    save_checkpoint,
    step_file_name,
)
from selva.lora.config import LoRAConfig
from selva.lora.inject import inject_lora, principal_factors
from selva.lora.merge import merge_adapter
from selva.lora.state import load_lora_state_, lora_parameters, lora_plus_groups, lora_state_dict
from selva.utils.errors import UserError

ADAPTERS = Path(__file__).parent / "golden" / "adapters"
DIM = 10
META = {"variant": "tiny_16k", "steps": 2000, "timestep_mode": "uniform"}


class Block(nn.Module):
    def __init__(self, conv: bool) -> None:
        super().__init__()
        self.attn = nn.ModuleDict({"qkv": nn.Linear(DIM, DIM)})
        self.linear1 = nn.Conv1d(DIM, DIM, 3, padding=1) if conv else nn.Linear(DIM, DIM, bias=False)
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:  # (B, tokens, DIM)
        x = x + torch.tanh(self.attn["qkv"](x))
        return x + torch.tanh(self.linear1(x.mT).mT if self.conv else self.linear1(x))


class Toy(nn.Sequential):
    """Block 0 has a convolution as ``linear1``, block 1 a linear layer, as the streams of the generator do."""

    def __init__(self) -> None:
        super().__init__(Block(conv=True), Block(conv=False))


LINEAR = ("attn.qkv", "1.linear1")
CONFIGS = {
    "qkv": LoRAConfig(rank=16),
    "scaled": LoRAConfig(rank=3, alpha=7.0, targets=LINEAR),
    "rslora": LoRAConfig(rank=3, alpha=5.0, targets=LINEAR, rslora=True),
    "ranks": LoRAConfig(rank=4, targets=LINEAR, target_ranks={"1.linear1": 2}),
    "pissa": LoRAConfig(rank=3, targets=LINEAR, init="pissa"),
    "conv": LoRAConfig(rank=3, alpha=7.0, targets=("attn.qkv", "linear1")),
    "dora": LoRAConfig(rank=3, alpha=7.0, targets=LINEAR, dora=True),
    "conv_dora_pissa": LoRAConfig(rank=3, targets=("attn.qkv", "linear1"), dora=True, init="pissa"),
}
NATIVE = {"conv": "convolutions", "dora": "DoRA magnitudes", "conv_dora_pissa": "convolutions and has DoRA magnitudes"}
LINEAR_CONFIGS = [name for name in CONFIGS if name not in NATIVE]


@pytest.fixture
def base() -> Toy:
    torch.manual_seed(1)
    return Toy()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 6, DIM, generator=torch.Generator().manual_seed(2))


def trained(base: Toy, name: str) -> Toy:
    model = copy.deepcopy(base)
    inject_lora(model, CONFIGS[name])
    rng = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in lora_parameters(model):
            parameter += 0.2 * torch.randn(parameter.shape, generator=rng)
    return model


# -- the loader of ComfyUI-SelVA --------------------------------------------------------------------------------------


class WrappedLinear(nn.Module):
    def __init__(self, linear: nn.Linear, rank: int, scale: float) -> None:
        super().__init__()
        self.linear, self.scale = linear, scale
        self.lora_A = nn.Parameter(torch.randn(rank, linear.in_features))
        self.lora_B = nn.Parameter(torch.zeros(linear.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + (x @ self.lora_A.T @ self.lora_B.T) * self.scale


def load_as_comfyui(base: nn.Module, path: Path, strength: float = 1.0, knows_rslora: bool = True) -> nn.Module:
    """Apply an adapter file as the published loader does, leniency included."""
    content = torch.load(path, map_location="cpu", weights_only=True)
    tensors, meta = (content["state_dict"], content.get("meta", {})) if "state_dict" in content else (content, {})
    rank = meta.get("rank", 16)
    alpha, targets = meta.get("alpha", rank), meta.get("target", ["attn.qkv"])
    scale = alpha / math.sqrt(rank) if knows_rslora and meta.get("use_rslora", False) else alpha / rank
    model = copy.deepcopy(base)
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n.endswith(tuple(targets))]
    if not names:
        raise ValueError(f"No layers matched target={targets}")
    for name in names:
        parent, _, child = name.rpartition(".")
        owner = model.get_submodule(parent)
        owner._modules[child] = WrappedLinear(owner.get_submodule(child), rank, scale)
    missing, _unexpected = model.load_state_dict(tensors, strict=False)
    assert not [key for key in missing if "lora_" in key]  # it only warns
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, WrappedLinear):
                module.lora_B *= strength
    return model


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


# -- training state ---------------------------------------------------------------------------------------------------


def make_run(base: Toy, name: str) -> tuple[Toy, torch.optim.AdamW, torch.optim.lr_scheduler.LambdaLR]:
    torch.manual_seed(4)
    model = copy.deepcopy(base)
    inject_lora(model, CONFIGS[name])
    optimizer = torch.optim.AdamW(lora_plus_groups(model, lr=1e-2, ratio=4.0))
    return model, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)


def train(run, x: Tensor, steps: int) -> None:
    model, optimizer, scheduler = run
    for _ in range(steps):
        optimizer.zero_grad()
        (model(x) - 1).square().mean().backward()
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize("name", CONFIGS)
def test_two_plus_two_steps_equal_four(base, x, tmp_path, name):
    whole = make_run(base, name)
    train(whole, x, 4)

    model, optimizer, scheduler = first = make_run(base, name)
    train(first, x, 2)
    path = tmp_path / step_file_name(2)
    save_checkpoint(
        path, model, META, step=2, optimizer=optimizer.state_dict(), scheduler=scheduler.state_dict(),
        extra={"order": [3, 1, 2], "rng": torch.get_rng_state()},
    )

    torch.manual_seed(99)  # the fresh start must not matter
    model, optimizer, scheduler = second = make_run(base, name)
    saved = load_checkpoint(path)
    check_same_settings(saved, CONFIGS[name])
    load_lora_state_(model, saved.lora)
    optimizer.load_state_dict(saved.optimizer)
    scheduler.load_state_dict(saved.scheduler)
    train(second, x, 2)

    assert (saved.step, saved.extra["order"], saved.path) == (2, [3, 1, 2], path)
    found, expected = lora_state_dict(model), lora_state_dict(whole[0])
    assert all(torch.equal(found[key], value) for key, value in expected.items())


@pytest.mark.parametrize("name", CONFIGS)
def test_a_step_file_is_an_adapter_too(base, x, tmp_path, name):
    model = trained(base, name)
    save_checkpoint(tmp_path / "adapter_step00007.pt", model, META, step=7, optimizer={})
    merged = copy.deepcopy(base)
    merge_adapter(merged, load_adapter(tmp_path / "adapter_step00007.pt"))
    assert_same_change(merged(x), model(x), base(x))
    if name not in NATIVE:
        there = load_as_comfyui(base, tmp_path / "adapter_step00007.pt")
        assert_same_change(there(x), model(x), base(x))


@pytest.mark.parametrize("scheduler", [None, "stored"])
def test_comfyui_cannot_continue_a_step_file_and_says_why(base, x, tmp_path, scheduler):
    """Its trainer compares no settings: with our folded scale it would train something else without a word."""
    model, optimizer, schedule = run = make_run(base, "qkv")
    train(run, x, 2)
    path = tmp_path / step_file_name(2)
    save_checkpoint(path, model, META, step=2, optimizer=optimizer.state_dict(),
                    scheduler=schedule.state_dict() if scheduler else None)
    there = torch.load(path, map_location="cpu", weights_only=True)
    _, optimizer, _ = make_run(base, "qkv")
    with pytest.raises(ValueError, match=r"continued with train_lora\.py --resume .* only; ComfyUI-SelVA uses"):
        optimizer.load_state_dict(there["optimizer"])
    saved = load_checkpoint(path)
    optimizer.load_state_dict(saved.optimizer)
    del there["optimizer_state"]
    torch.save({**there, "optimizer": saved.optimizer}, tmp_path / "earlier.pt")  # as earlier versions wrote it
    assert load_checkpoint(tmp_path / "earlier.pt").optimizer.keys() == saved.optimizer.keys()
    assert load_checkpoint(tmp_path / "earlier.pt").optimizer["state"]


def published_step(model: nn.Module, path: Path, **meta: object) -> dict[str, object]:
    """Write a step file as ComfyUI-SelVA's node does by default: PiSSA with rsLoRA, alpha twice the rank."""
    tensors = {}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and name.endswith("attn.qkv"):
            a, b = principal_factors(layer.weight, 3)
            tensors |= {f"{name}.lora_A": a, f"{name}.lora_B": b,
                        f"{name}.linear.weight": layer.weight.detach() - 6 / 3**0.5 * b @ a}
            if layer.bias is not None:
                tensors[f"{name}.linear.bias"] = layer.bias.detach().clone()
    meta = {"variant": "tiny", "rank": 3, "alpha": 6.0, "target": ["attn.qkv"], "steps": 100, "init_mode": "pissa",
            "use_rslora": True, **meta}
    content = {"state_dict": tensors, "optimizer": {}, "scheduler": {}, "step": 50, "meta": meta}
    torch.save(content, path)
    return content


@pytest.mark.parametrize("meta", [{}, {"init_mode": "standard"}])
def test_a_published_pissa_step_file_says_how_to_continue_it(base, tmp_path, meta):
    """Its tensors say that it is PiSSA; its meta may not."""
    path = tmp_path / "adapter_step00050.pt"
    published_step(base, path, **meta)
    saved = load_checkpoint(path)
    with pytest.raises(ValueError) as caught:
        check_same_settings(saved, LoRAConfig())
    flags = "--rank 3 --alpha 6 --rslora --init pissa --target attn.qkv"
    assert f"{path}: a step file of ComfyUI-SelVA; cannot resume" in str(caught.value) and flags in str(caught.value)
    check_same_settings(saved, LoRAConfig(3, 6.0, rslora=True, init="pissa"))


def test_the_targets_of_a_published_file_reach_its_linear_layers_only(base, tmp_path):
    """There ``linear1`` skips convolutions; here it adapts them, and the file has nothing for them."""
    path = tmp_path / "adapter_step00050.pt"
    content = published_step(base, path, init_mode="standard", target=["attn.qkv", "linear1"])
    linear = [name for name, layer in base.named_modules() if isinstance(layer, nn.Linear) and name.endswith("linear1")]
    tensors = {f"{name}.lora_{key}": torch.ones(3, 3) for name in linear for key in "AB"}
    torch.save({**content, "state_dict": {**content["state_dict"], **tensors}}, path)
    endings = " ".join(dict.fromkeys(".".join(name.split(".")[-2:]) for name in linear))
    with pytest.raises(ValueError, match=rf"--target attn\.qkv {endings}\)"):
        check_same_settings(load_checkpoint(path), LoRAConfig())


def test_a_step_file_can_offer_an_average_and_still_resume_the_current_values(base, tmp_path):
    model = trained(base, "qkv")
    current = lora_state_dict(model)
    average = {key: value / 2 for key, value in current.items()}
    path = tmp_path / "adapter_step00001.pt"
    save_checkpoint(path, model, META, step=1, optimizer={}, state=average)
    adapter, saved = load_adapter(path), load_checkpoint(path)
    assert all(torch.equal(adapter.tensors[key], value) for key, value in average.items())
    assert all(torch.equal(saved.lora[key], value) for key, value in current.items())


def test_equal_tensors_are_stored_once(base, tmp_path):
    model = trained(base, "qkv")
    save_adapter(tmp_path / "final.pt", model, META)
    save_checkpoint(tmp_path / "step.pt", model, META, step=1, optimizer={})
    final, step = (tmp_path / "final.pt").stat().st_size, (tmp_path / "step.pt").stat().st_size
    assert step < 1.5 * final


def test_state_that_could_not_be_read_back_is_refused_when_saving(base, tmp_path):
    model = trained(base, "qkv")
    for extra, where in (
        ({"rng": np.zeros(2)}, r"checkpoint\['extra'\]\['rng'\] is a ndarray"),
        ({"when": {(1, 2): 3}}, r"the key \(1, 2\)"),
    ):
        with pytest.raises(ValueError, match=where):
            save_checkpoint(tmp_path / "a.pt", model, META, step=1, optimizer={}, extra=extra)
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_for_inference_cannot_be_resumed(base, tmp_path):
    """Pitfall F8: a final adapter holds no state, and says where to resume from."""
    save_adapter(tmp_path / "adapter_final.pt", trained(base, "qkv"), META)
    with pytest.raises(ValueError, match=r"adapter_final\.pt: cannot resume .* no optimizer, step; resume from"):
        load_checkpoint(tmp_path / "adapter_final.pt")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (LoRAConfig(rank=4, alpha=7.0, targets=LINEAR), "rank is 3 there and 4 now"),
        (LoRAConfig(rank=3, alpha=6.0, targets=LINEAR), "scale is"),
        (LoRAConfig(rank=3, alpha=7.0), "targets is"),
        (LoRAConfig(rank=3, targets=LINEAR, init="pissa"), "init is standard there and pissa now"),
        (LoRAConfig(rank=3, alpha=7.0, targets=LINEAR, target_ranks={"attn.qkv": 2}), "target_ranks is"),
        (LoRAConfig(rank=3, alpha=7.0, targets=LINEAR, dora=True), "dora is False there and True now"),
    ],
)
def test_resuming_with_other_settings_is_refused(base, tmp_path, changed, message):
    """Pitfall F7: alpha, targets, start and kind count, not only the shapes."""
    path = tmp_path / "adapter_step00001.pt"
    save_checkpoint(path, trained(base, "scaled"), META, step=1, optimizer={})
    saved = load_checkpoint(path)
    check_same_settings(saved, LoRAConfig(rank=3, alpha=7.0, targets=LINEAR[::-1], dropout=0.3))
    with pytest.raises(ValueError, match=rf"adapter_step00001\.pt: cannot resume with other .*{message}"):
        check_same_settings(saved, changed)


def test_step_files_are_found_newest_good_first(base, tmp_path, caplog):
    assert load_newest_checkpoint(tmp_path) is None
    for step in (500, 99500, 100500):
        save_checkpoint(tmp_path / step_file_name(step), trained(base, "qkv"), META, step=step, optimizer={})
    (tmp_path / "adapter_step200000_old.pt").write_bytes(b"")
    save_adapter(tmp_path / "adapter_final.pt", trained(base, "qkv"), META)
    assert step_file_name(500) == "adapter_step00500.pt"
    assert load_newest_checkpoint(tmp_path).step == 100500
    newest = tmp_path / "adapter_step100500.pt"
    newest.write_bytes(newest.read_bytes()[:-100])
    with caplog.at_level(logging.WARNING):
        assert load_newest_checkpoint(tmp_path).step == 99500
    assert "adapter_step100500.pt" in caplog.text


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
