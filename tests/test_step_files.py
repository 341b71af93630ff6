"""Step files: training goes on from them as if it had never stopped, and those of others are told from ours."""

from __future__ import annotations

import copy
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoint_toy import CONFIGS, LINEAR, META, NATIVE, Toy, make_input, make_toy, trained
from comfyui_loader import load_as_comfyui, resume_as_comfyui
from lora_toy import assert_same_change
from torch import Tensor, nn

from selva.checkpoint import (
    check_same_settings,
    load_adapter,
    load_checkpoint,
    load_newest_checkpoint,
    save_adapter,
    save_checkpoint,
    step_file_name,
)
from selva.lora.config import LoRAConfig
from selva.lora.inject import inject_lora, principal_factors
from selva.lora.merge import merge_adapter
from selva.lora.state import load_lora_state_, lora_plus_groups, lora_state_dict

ADAPTERS = Path(__file__).parent / "golden" / "adapters"
@pytest.fixture
def base() -> Toy:
    return make_toy()


@pytest.fixture
def x() -> Tensor:
    return make_input()


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


@pytest.mark.parametrize("lora_plus", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_no_step_file_of_ours_is_continued_there(base, x, tmp_path, name, lora_plus):
    """Whatever its settings are, and however its optimiser groups the parameters."""
    model, optimizer, schedule = run = make_run(base, name)
    train(run, x, 2)
    path = tmp_path / step_file_name(2)
    save_checkpoint(path, model, META, step=2, optimizer=optimizer.state_dict(), scheduler=schedule.state_dict())
    with pytest.raises((ValueError, RuntimeError)):
        resume_as_comfyui(base, path, lora_plus)
    content = torch.load(path, map_location="cpu", weights_only=True)
    if name == "qkv":  # the settings that both have: there its own file would go on
        torch.save({**content, "optimizer": content["optimizer_state"]}, path)
        assert not lora_plus or resume_as_comfyui(base, path, lora_plus) == 2


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
        (LoRAConfig(rank=4, alpha=7.0, targets=LINEAR), "rank was 3 and is 4 now"),
        (LoRAConfig(rank=3, alpha=6.0, targets=LINEAR), "scale was"),
        (LoRAConfig(rank=3, alpha=7.0), "targets was"),
        (LoRAConfig(rank=3, targets=LINEAR, init="pissa"), "init was standard and is pissa now"),
        (LoRAConfig(rank=3, alpha=7.0, targets=LINEAR, target_ranks={"attn.qkv": 2}), "target_ranks was"),
        (LoRAConfig(rank=3, alpha=7.0, targets=LINEAR, dora=True), "dora was False and is True now"),
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
