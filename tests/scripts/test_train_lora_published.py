"""train_lora.py on the files of other programs, and for them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from script_args import TINY
from torch import nn

import train_lora
from selva.checkpoint import load_adapter
from selva.lora.inject import principal_factors
from selva.lora.merge import merge_adapter
from selva.weights.load import load_generator

RANK = 2
QUICK = [*TINY, "--steps", "6", "--batch_size", "2", "--warmup_steps", "1", "--save_every", "2", "--no_preview",
         "--precision", "fp32", "--val_fraction", "0"]


def put_step_file(path: Path, step: int = 4) -> None:
    """Write the default of ComfyUI-SelVA's node after a few steps: PiSSA with rsLoRA, alpha twice the rank."""
    scale, tensors, moments = 2 * RANK / RANK**0.5, {}, {"lora_A": [], "lora_B": []}
    for name, layer in load_generator("tiny_16k").named_modules():
        if isinstance(layer, nn.Linear) and name.endswith("attn.qkv"):
            a, b = principal_factors(layer.weight, RANK)
            tensors[f"{name}.linear.weight"] = layer.weight - scale * b @ a
            if layer.bias is not None:
                tensors[f"{name}.linear.bias"] = layer.bias.clone()
            for key, value in (("lora_A", a), ("lora_B", b)):
                tensors[f"{name}.{key}"] = value + 0.01 * torch.ones_like(value)
                moments[key].append({"step": torch.tensor(float(step)), "exp_avg": torch.zeros_like(value),
                                     "exp_avg_sq": torch.full_like(value, 1e-6)})
    states = [*moments["lora_A"], *moments["lora_B"]]
    count = len(moments["lora_A"])
    group = {"lr": 1e-4, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0, "amsgrad": False, "maximize": False,
             "foreach": None, "capturable": False, "differentiable": False, "fused": None, "initial_lr": 1e-4}
    torch.save({
        "state_dict": tensors, "step": step,
        "optimizer": {"state": dict(enumerate(states)), "param_groups": [
            {**group, "params": list(range(count))}, {**group, "params": list(range(count, 2 * count))}]},
        "scheduler": {"base_lrs": [1e-4, 1e-4], "last_epoch": step, "lr_lambdas": [None, None]},
        "meta": {"variant": "tiny_16k", "rank": RANK, "alpha": 2.0 * RANK, "target": ["attn.qkv"], "steps": 100,
                 "timestep_mode": "uniform", "init_mode": "pissa", "use_rslora": True, "lora_dropout": 0.0},
    }, path)


def test_the_default_step_file_of_comfyui_selva_is_continued(feature_dir, tmp_path, capsys):
    file = tmp_path / "adapter_step00004.pt"
    put_step_file(file)
    run = ["--data_dir", str(feature_dir), "--output_dir", str(tmp_path / "run"), *QUICK, "--resume", str(file)]
    assert train_lora.main(run) == 1
    error = capsys.readouterr().err
    flags = "--rank 2 --alpha 4 --rslora --init pissa --target attn.qkv"
    assert f"{file}: a step file of ComfyUI-SelVA; cannot resume with other adapter settings" in error
    assert f"({flags})" in error
    assert train_lora.main([*run, *flags.split()]) == 0
    assert "--weight_decay 0.0, now 1e-06" in capsys.readouterr().err
    # Two steps on, the final adapter is that of the file and little more, and an ordinary one.
    before, after = (load_generator("tiny_16k") for _ in range(2))
    base = load_generator("tiny_16k").state_dict()
    merge_adapter(before, load_adapter(file))
    final = load_adapter(tmp_path / "run" / "adapter_final.pt")
    assert not final.is_pissa and final.meta["rank"] == 2 * RANK == final.meta["alpha"]
    merge_adapter(after, final)
    name = f"{final.layer_names()[0]}.weight"
    moved = (after.state_dict()[name] - before.state_dict()[name]).norm()
    assert 0 < moved < 0.2 * (before.state_dict()[name] - base[name]).norm()
    # From here on --resume auto goes on, with the same settings.
    again = [*run[:-2], "--steps", "8", "--resume", "auto", *flags.split()]
    assert train_lora.main(again) == 0
    assert (tmp_path / "run" / "adapter_step00008.pt").exists()


@pytest.mark.parametrize("resume", [[], ["--resume", "auto"]])
def test_no_training_starts_with_pissa_at_another_scale(feature_dir, tmp_path, capsys, resume):
    run = ["--data_dir", str(feature_dir), "--output_dir", str(tmp_path / "run"), *QUICK]
    assert train_lora.main([*run, "--init", "pissa", "--rslora", *resume]) in (1, 2)
    assert "init 'pissa' starts with scale 1" in capsys.readouterr().err
    assert not list((tmp_path / "run").glob("adapter*"))


def test_the_format_of_the_adapter(feature_dir, tmp_path, capsys):
    out = tmp_path / "run"
    run = ["--data_dir", str(feature_dir), "--output_dir", str(out), *QUICK, "--steps", "2"]
    assert train_lora.main([*run, "--adapter_format", "safetensors"]) == 0
    printed = capsys.readouterr()
    assert printed.out == f"{out / 'adapter_final.safetensors'}\n"
    assert "ComfyUI-SelVA does not read .safetensors adapters; --adapter_format both" in printed.err
    assert not (out / "adapter_final.pt").exists()
    assert train_lora.main([*run, "--adapter_format", "both"]) == 0
    assert capsys.readouterr().out == f"{out / 'adapter_final.pt'}\n" and (out / "adapter_final.safetensors").exists()
