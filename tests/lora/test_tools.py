"""selva.lora.tools: every tool by an identity."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from lora_toy import ALL, DIM, exported, make_input, make_toy, train_a_little_
from torch import Tensor

from selva.lora.config import LoRAConfig
from selva.lora.inject import inject_lora
from selva.lora.merge import Adapter, merge_adapter, merge_adapters
from selva.lora.state import lora_parameters
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


def trained(seed: int = 3, targets: tuple[str, ...] = ALL, rank: int = 3, **meta) -> Adapter:
    model = make_toy()
    inject_lora(model, LoRAConfig(rank=rank, targets=targets))
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in lora_parameters(model):
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=rng))
    return Adapter(exported(model).tensors, {"alpha": 4.0, **meta}, f"seed{seed}.pt")


def output(*adapters: tuple[Adapter, float]) -> Tensor:
    model = make_toy()
    merge_adapters(model, adapters)
    return model(make_input())


def updates(adapter: Adapter) -> dict[str, Tensor]:
    weights = make_toy().state_dict()
    return {name: adapter.update(name, weights[f"{name}.weight"]) for name in adapter.layer_names()}


def assert_same_updates(found: Adapter, expected: Adapter) -> None:
    torch.testing.assert_close(updates(found), updates(expected), rtol=0, atol=1e-6)  # of values around 0.1


def test_merging_is_applying_both():
    a, b = trained(1), trained(2, ("attn.qkv",), rank=2)
    merged = combine_adapters([(a, 0.8), (b, -0.5)]).adapter
    assert merged.meta["rank"] == 5
    torch.testing.assert_close(output((merged, 1.0)), output((a, 0.8), (b, -0.5)), rtol=1e-5, atol=1e-5)
    assert (output((merged, 1.0)) - output((a, 0.8))).abs().max() > 0.01


def test_merging_to_a_rank_keeps_the_best_of_the_sum():
    """Eckart and Young: no other matrix of the rank is nearer to the sum."""
    a, b = trained(1), trained(2)
    cut = combine_adapters([(a, 0.8), (b, 0.5)], rank=2)
    for name, update in updates(cut.adapter).items():
        whole = 0.8 * updates(a)[name] + 0.5 * updates(b)[name]
        u, s, vh = torch.linalg.svd(whole.flatten(1).double(), full_matrices=False)
        best = ((u[:, :2] * s[:2]) @ vh[:2]).float()
        torch.testing.assert_close(update.flatten(1), best, rtol=0, atol=1e-5)
        assert cut.energy[name] == pytest.approx(float(s[:2].square().sum() / s.square().sum()), rel=1e-6)
        assert cut.energy[name] < 0.999


def test_resizing_to_the_full_rank_changes_nothing():
    adapter = trained()
    assert_same_updates(resize_adapter(adapter, rank=3).adapter, adapter)
    through_svd = resize_adapter(adapter, energy=1.0)
    assert_same_updates(through_svd.adapter, adapter)
    assert set(through_svd.energy.values()) == {1.0}


def test_energy_takes_as_few_directions_as_it_takes():
    model = make_toy()
    values = torch.tensor([1.0, 0.1, 0.001])
    a, b = torch.linalg.qr(torch.randn(DIM, 3))[0].T, torch.linalg.qr(torch.randn(DIM, 3))[0] * values
    adapter = Adapter({"linear1.lora_A": a.contiguous(), "linear1.lora_B": b})
    ranks = [resize_adapter(adapter, energy=energy).ranks["linear1"] for energy in (0.5, 0.99, 0.9999, 1.0)]
    assert ranks == [1, 1, 2, 3]  # 0.9901, 0.999999, 1 of the energy
    with pytest.raises(ValueError, match=r"energy is 1\.5"):
        resize_adapter(adapter, energy=1.5)
    assert layer_numbers(adapter)["linear1"].norm == pytest.approx(float(values.norm()), rel=1e-5)
    assert model.linear1.weight.shape == (DIM, DIM)


def test_a_soup_of_one_is_itself_and_of_three_the_average():
    one = trained(1)
    assert_same_updates(soup([one]).adapter, one)
    three = [trained(seed) for seed in (1, 2, 3)]
    whole = soup(three, rank=9).adapter
    for name, update in updates(whole).items():
        torch.testing.assert_close(update, sum(updates(one)[name] for one in three) / 3, rtol=0, atol=1e-6)
    assert soup(three).adapter.meta["rank"] == 3  # cut to theirs


def test_an_adapter_is_extracted_from_a_model_that_it_was_baked_into():
    base, tuned, adapter = make_toy(), make_toy(), trained()
    merge_adapter(tuned, adapter)
    layers = [name for name, module in base.named_modules() if isinstance(module, torch.nn.Linear | torch.nn.Conv1d)]
    cut = extract_adapter(tuned.state_dict(), base.state_dict(), layers, rank=3)
    torch.testing.assert_close(output((cut.adapter, 1.0)), tuned(make_input()), rtol=1e-4, atol=1e-5)
    assert min(cut.energy.values()) > 1 - 1e-6 and not cut.left_out


def test_what_extraction_leaves_out_is_named():
    base, tuned = make_toy(), make_toy()
    with torch.no_grad():
        tuned.linear1.weight += 1
        tuned.blocks[0].norm.bias += 1
    cut = extract_adapter(tuned.state_dict(), base.state_dict(), ["linear1"], rank=1)
    assert [line.split()[0] for line in cut.left_out] == ["blocks.0.norm.bias"]
    with pytest.raises(ValueError, match="nothing to extract"):
        extract_adapter(base.state_dict(), base.state_dict(), ["linear1"], rank=1)


def test_differences():
    a, b = trained(1), trained(2, ("attn.qkv",))
    same = compare_adapters(a, a)
    assert all(row.difference < 1e-6 * row.norm_a and row.cosine == pytest.approx(1) for row in same.values())
    rows = compare_adapters(a, b)
    x, y = updates(a)["blocks.0.attn.qkv"], updates(b)["blocks.0.attn.qkv"]
    row = rows["blocks.0.attn.qkv"]
    assert row.difference == pytest.approx(float((x - y).norm()), rel=1e-5)
    assert row.cosine == pytest.approx(float((x * y).sum() / x.norm() / y.norm()), abs=1e-5)
    assert (rows["linear1"].norm_b, rows["linear1"].cosine) == (0.0, 0.0)


def test_published_pissa_becomes_an_ordinary_adapter_only_with_its_own_base(caplog):
    model, name = make_toy(), "blocks.0.attn.qkv"
    layer = model.get_submodule(name)
    u, s, vh = torch.linalg.svd(layer.weight.detach(), full_matrices=False)
    a, b = s[:2].sqrt()[:, None] * vh[:2], u[:, :2] * s[:2].sqrt()
    pissa = Adapter({f"{name}.lora_A": a + 0.01, f"{name}.lora_B": b - 0.02,
                     f"{name}.linear.weight": layer.weight.detach() - 2 * b @ a,
                     f"{name}.linear.bias": layer.bias.detach()}, {"alpha": 4.0}, "pissa.pt")
    plain, lost = without_pissa(pissa, model.state_dict())
    assert not plain.is_pissa and plain.meta["rank"] == 4 and lost < 1e-6
    weight = layer.weight.detach()
    torch.testing.assert_close(plain.update(name, weight), pissa.update(name, weight), rtol=0, atol=1e-6)
    other = copy.deepcopy(model.state_dict())
    other[f"{name}.weight"] = torch.randn(other[f"{name}.weight"].shape)
    with pytest.raises(ValueError, match=r"pissa\.pt.*blocks\.0\.attn\.qkv\.linear\.weight was not made from this"):
        without_pissa(pissa, other)
    changed = Adapter({**pissa.tensors, f"{name}.linear.bias": layer.bias.detach() + 1}, pissa.meta, "pissa.pt")
    with pytest.raises(ValueError, match="holds no biases"):
        without_pissa(changed, model.state_dict())
    for refuse in (lambda: combine_adapters([(pissa, 1.0)]), lambda: resize_adapter(pissa, 1), lambda: soup([pissa]),
                   lambda: compare_adapters(pissa, pissa)):
        with pytest.raises(ValueError, match="changed base weights"):
            refuse()


def test_dora_has_no_low_rank_and_is_refused_by_name():
    model = make_toy()
    inject_lora(model, LoRAConfig(rank=2, dora=True))
    train_a_little_(model)
    with pytest.raises(ValueError, match=r"adapter: has DoRA magnitudes \(blocks\.0\.attn\.qkv"):
        combine_adapters([(exported(model), 1.0)])


def test_adapters_that_contradict_each_other_are_refused():
    with pytest.raises(ValueError, match=r"different variant: seed1\.pt: a, seed2\.pt: b"):
        combine_adapters([(trained(1, variant="a"), 1.0), (trained(2, variant="b"), 1.0)])
    wide = Adapter({"linear1.lora_A": torch.ones(1, 5), "linear1.lora_B": torch.ones(DIM, 1)})
    with pytest.raises(ValueError, match=r"other shapes.*linear1"):
        combine_adapters([(trained(), 1.0), (wide, 1.0)])
    with pytest.raises(ValueError, match="every strength is 0"):
        combine_adapters([(trained(), 0.0)])


def named_alike(folder: str, **meta) -> Adapter:
    adapter = trained(**meta)
    return Adapter(adapter.tensors, adapter.meta, f"{folder}/adapter_final.pt")


@pytest.mark.parametrize("first, second, message", [
    ({"variant": "a"}, {"variant": "b"}, "different variant: dog/adapter_final.pt: a, cat/adapter_final.pt: b"),
    ({"clip_features": "use"}, {"clip_features": "empty"}, "clip_features: dog/adapter_final.pt: use, cat/"),
    ({}, {"clip_features": "empty"}, "clip_features: dog/adapter_final.pt: use, cat/adapter_final.pt: empty; "),
    ({"generator": {"name": "my.pth", "mark": "1"}}, {}, "dog/adapter_final.pt: my.pth, cat/adapter_final.pt: that of"),
])
def test_adapters_of_one_file_name_are_compared_too(first, second, message):
    """Every run writes an adapter_final.pt."""
    pair = [named_alike("dog", **first), named_alike("cat", **second)]
    for make in (lambda: combine_adapters([(adapter, 1.0) for adapter in pair]), lambda: soup(pair)):
        with pytest.raises(ValueError, match=re.escape(message)):
            make()
    nameless = [Adapter(adapter.tensors, adapter.meta) for adapter in pair]
    with pytest.raises(ValueError, match="different"):
        soup(nameless)


def test_what_a_merged_adapter_was_made_of():
    """As infer.py does: an adapter that does not say it passes CLIP features, one at strength 0 has no say."""
    pair = [named_alike("dog", clip_features="use"), named_alike("cat")]
    meta = combine_adapters([(pair[0], 1.0), (pair[1], 0.5)]).adapter.meta
    assert meta["clip_features"] == "use"
    assert meta["merged_from"] == [["dog/adapter_final.pt", 1.0], ["cat/adapter_final.pt", 0.5]]
    silent = named_alike("door", clip_features="empty")
    assert combine_adapters([(pair[0], 1.0), (silent, 0.0)]).adapter.meta["clip_features"] == "use"


def test_patterns_choose_layers():
    adapter = trained()
    every = adapter.layer_names()
    assert restricted(adapter, ["*"]).layer_names() == every and restricted(adapter, []) is adapter
    assert restricted(adapter, ["attn.qkv"]).layer_names() == ["blocks.0.attn.qkv", "blocks.1.attn.qkv"]
    assert restricted(adapter, ["blocks.1.*", "linear1"]).layer_names() == [
        name for name in every if name.startswith("blocks.1.") or name.endswith("linear1")]
    with pytest.raises(ValueError, match=r"seed3\.pt: none of its layers fits nothing"):
        restricted(adapter, ["attn.qkv", "nothing"])
