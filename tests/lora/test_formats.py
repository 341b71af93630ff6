"""selva.lora.formats: other programs' formats, there and back to the last bit; what they cannot hold is refused."""

from __future__ import annotations

import json

import pytest
import torch
from lora_toy import ALL, exported, make_input, make_toy, train_a_little_

from selva.lora.config import LoRAConfig
from selva.lora.formats import alpha_for, from_foreign, from_kohya, from_mmaudio_lora, from_peft, to_kohya, to_peft
from selva.lora.inject import inject_lora
from selva.lora.merge import Adapter, merge_adapter

LAYERS = [name for name, _ in make_toy().named_modules() if name]


def trained(dora: bool = False, rank: int = 3, alpha: float = 5.0, rslora: bool = False) -> Adapter:
    """An adapter whose scale is no power of two, convolutions included."""
    model = make_toy()
    inject_lora(model, LoRAConfig(rank=rank, targets=ALL, dora=dora))
    train_a_little_(model)
    return Adapter(exported(model).tensors, {"rank": rank, "alpha": alpha, "use_rslora": rslora}, "toy.pt")


def assert_same_updates(found: Adapter, expected: Adapter) -> None:
    """Equal to the last bit, every weight."""
    weights = make_toy().state_dict()
    assert found.layer_names() == expected.layer_names()
    for name in expected.layer_names():
        weight = weights[f"{name}.weight"]
        assert torch.equal(found.update(name, weight), expected.update(name, weight)), name


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("rslora", [False, True])
def test_peft_there_and_back_to_the_last_bit(dora, rslora):
    adapter = trained(dora, rslora=rslora)
    tensors, config = to_peft(adapter)
    assert_same_updates(from_peft(tensors, json.loads(json.dumps(config)), "peft"), adapter)


@pytest.mark.parametrize("rslora", [False, True])
def test_kohya_there_and_back_to_the_last_bit(rslora):
    adapter = trained(rslora=rslora, alpha=5.3)
    assert_same_updates(from_kohya(to_kohya(adapter), LAYERS, "kohya"), adapter)


@pytest.mark.parametrize("dora", [False, True])
def test_peft_itself_computes_what_the_merged_model_does(dora):
    peft = pytest.importorskip("peft")
    adapter = trained(dora)
    tensors, config = to_peft(adapter)
    x, merged, model = make_input(), make_toy(), make_toy()
    merge_adapter(merged, adapter)
    own = {key: config[key] for key in ("r", "lora_alpha", "use_rslora", "use_dora", "target_modules")}
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**own))
    result = peft.set_peft_model_state_dict(wrapped, tensors)
    assert not result.unexpected_keys
    base = make_toy()(x)
    change = (merged(x) - base).abs().max()
    assert change > 0.01
    assert (wrapped.eval()(x) - merged(x)).abs().max() < 1e-4 * change
    again = from_peft(peft.get_peft_model_state_dict(wrapped), config, "peft")  # what PEFT writes, we read
    assert_same_updates(again, adapter)


def test_ranks_and_alphas_of_single_layers_are_followed():
    """With PEFT's rank_pattern and alpha_pattern; scales 2, 4 and 1 stand in one file without rounding."""
    shapes = {"blocks.0.attn.qkv": 4, "blocks.1.attn.qkv": 2, "linear1": 4}
    rng = torch.Generator().manual_seed(0)
    outs = {"linear1": 12}
    pairs = {name: (torch.randn(r, 12, generator=rng), torch.randn(outs.get(name, 36), r, generator=rng))
             for name, r in shapes.items()}
    tensors = {f"base_model.model.{name}.lora_{key}.weight": value
               for name, pair in pairs.items() for key, value in zip("AB", pair, strict=True)}
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "rank_pattern": {"blocks.1.attn.qkv": 2},
              "alpha_pattern": {"linear1": 4}}
    adapter = from_peft(tensors, config, "peft")
    for name, scale in (("blocks.0.attn.qkv", 2.0), ("blocks.1.attn.qkv", 4.0), ("linear1", 1.0)):
        a, b = pairs[name]
        assert torch.equal(adapter.update(name, torch.zeros(len(b), 12)), scale * (b @ a)), name


def test_scales_that_would_be_rounded_are_refused_unless_that_is_allowed(caplog):
    layers = {"a": {"lora_A": torch.randn(3, 4), "lora_B": torch.randn(5, 3)}, "b": {"lora_A": torch.randn(3, 4),
                                                                                   "lora_B": torch.randn(5, 3)}}
    content = {"lora_weights": layers, "lora_config": {"a": {"alpha": 3.0}, "b": {"alpha": 4.0}}, "metadata": {}}
    with pytest.raises(ValueError, match=r"b \(scale 1\.33333\).*--fold"):
        from_mmaudio_lora(content, "x.pt")
    adapter = from_mmaudio_lora(content, "x.pt", fold=True)
    assert "rounds it" in caplog.text
    expected = 4 / 3 * layers["b"]["lora_B"] @ layers["b"]["lora_A"]
    torch.testing.assert_close(adapter.update("b", torch.zeros(5, 4)), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "LOHA"}, "method is LOHA"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"modules_to_save": ["final_layer"]}, "modules_to_save"),
        ({"init_lora_weights": "pissa"}, "pissa.*base weights that PEFT has changed"),
        ({"lora_alpha": None}, "lora_alpha is None"),
    ],
)
def test_what_peft_has_and_an_adapter_has_not_is_refused_by_name(change, message):
    tensors, config = to_peft(trained())
    with pytest.raises(ValueError, match=f"dog.*{message}"):
        from_peft(tensors, {**config, **change}, "dog")


def test_other_tensors_are_refused_by_name():
    tensors, config = to_peft(trained())
    with pytest.raises(ValueError, match=r"blocks\.0\.norm\.weight is no LoRA tensor"):
        from_peft({**tensors, "blocks.0.norm.weight": torch.ones(2)}, config, "dog")
    kohya = to_kohya(trained())
    with pytest.raises(ValueError, match=r"lora_te_text_model is no layer of this base model"):
        from_kohya({**kohya, "lora_te_text_model.lora_down.weight": torch.ones(2, 2)}, LAYERS, "dog")
    with pytest.raises(ValueError, match=r"dora_scale is no part of a plain LoRA"):
        from_kohya({**kohya, "lora_unet_linear1.dora_scale": torch.ones(2)}, LAYERS, "dog")


def test_what_a_format_cannot_hold_is_refused_by_name():
    with pytest.raises(ValueError, match=r"DoRA magnitudes.*kohya cannot hold.*blocks\.0\.attn\.qkv"):
        to_kohya(trained(dora=True))
    pissa = Adapter({**trained().tensors, "linear1.linear.weight": torch.ones(12, 12)}, {}, "pissa.pt")
    for convert in (to_kohya, to_peft):
        with pytest.raises(ValueError, match=r"pissa\.pt: holds changed base weights"):
            convert(pissa)
    half = trained(dora=True)
    tensors = {key: value for key, value in half.tensors.items() if key != "linear1.lora_magnitude"}
    with pytest.raises(ValueError, match=r"in all layers or in none.*: linear1"):
        to_peft(Adapter(tensors))


def test_formats_ask_for_what_they_need():
    tensors, _ = to_peft(trained())
    with pytest.raises(ValueError, match=r"adapter_config\.json"):
        from_foreign(tensors, "dog.safetensors")
    with pytest.raises(ValueError, match="--variant"):
        from_foreign(to_kohya(trained()), "dog.safetensors")
    assert from_foreign(trained().tensors, "dog.pt") is None


@pytest.mark.parametrize("rank", [3, 7, 12, 48, 100])
def test_alpha_gives_the_scale_back(rank):
    assert alpha_for(5.3 / rank, rank) / rank == 5.3 / rank
    for scale in (16 / rank**0.5, 0.1, 1 / 3):
        back = torch.tensor([alpha_for(scale, rank) / rank, scale], dtype=torch.float64).float()
        assert back[0] == back[1]
