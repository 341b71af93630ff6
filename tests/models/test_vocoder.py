"""The vocoders: anti-aliasing in closed form, the three spellings of the weights, golden waveforms at full size."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import recipe
import torch
import torch.nn.functional as F

from selva.models import vocoder as vocoder_module
from selva.models.config import VocoderConfig
from selva.models.random_weights import fill_random_
from selva.models.vocoder import (
    AntiAliasedActivation,
    Conv1d,
    ConvTranspose1d,
    SnakeBeta,
    Vocoder,
    antialias_filter,
    downsample_twice,
    fold_weight_norm,
    is_short,
    upsample_twice,
)

GOLDEN = Path(recipe.__file__).parent
CONFIGS = {
    "bigvgan_16k": VocoderConfig(
        num_mels=80,
        upsample_rates=(4, 4, 2, 2, 2, 2),
        upsample_kernels=(8, 8, 4, 4, 4, 4),
        final_bias=True,
        final_tanh=True,
    ),
    "bigvgan_v2_44k": VocoderConfig(
        num_mels=128,
        upsample_rates=(8, 4, 2, 2, 2, 2),
        upsample_kernels=(16, 8, 4, 4, 4, 4),
        final_bias=False,
        final_tanh=False,
    ),
}
SMALL = VocoderConfig(
    num_mels=8,
    upsample_rates=(4, 2),
    upsample_kernels=(8, 4),
    final_bias=True,
    final_tanh=True,
    initial_channels=16,
)
G, V = ".parametrizations.weight.original0", ".parametrizations.weight.original1"


def parametrized_weights(config: VocoderConfig = SMALL) -> dict[str, torch.Tensor]:
    """Weights of a published file: every convolution as magnitude and direction, filters included."""
    weights = {}
    for name, tensor in Vocoder(config).state_dict().items():
        if tensor.ndim == 3:
            layer = name.removesuffix(".weight")
            weights[layer + G] = torch.rand(tensor.shape[0], 1, 1) + 0.5
            weights[layer + V] = torch.randn(tensor.shape)
        else:
            weights[name] = torch.randn(tensor.shape) * 0.1
        if name.endswith(".act.alpha"):
            for suffix in (".upsample.filter", ".downsample.lowpass.filter"):
                weights[name.removesuffix(".act.alpha") + suffix] = torch.rand(1, 1, 12)
    return weights


# ---------------------------------------------------------------------------------------------------------------
# full size, against the reference
# ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
@torch.inference_mode()
def test_golden(golden, name):
    case, inner = golden(name), {}
    vocoder = Vocoder(CONFIGS[name]).load_published(case.weights())
    places = {
        "waveform_before_bounding": vocoder.conv_post,
        "inner_conv_pre": vocoder.conv_pre,
        "inner_upsampled_0": vocoder.ups[0][0],
        "inner_upsampled_1": vocoder.ups[1][0],
        "inner_upsampled_5": vocoder.ups[5][0],
        "inner_resblock_0_activation_0": vocoder.resblocks[0].activations[0],
        "inner_resblock_0": vocoder.resblocks[0],
        "inner_resblock_2": vocoder.resblocks[2],
        "inner_resblock_17": vocoder.resblocks[17],
        "inner_activation_post": vocoder.activation_post,
    }
    for key, module in places.items():
        module.register_forward_hook(lambda _module, _args, output, key=key: inner.update({key: output}))
    waveform = vocoder(case.inputs()["mel"])

    for key, value in inner.items():
        case.check(key, value)
    case.check("waveform", waveform)
    for layer in ("conv_pre", "ups.0.0", "resblocks.4.convs1.1", "conv_post"):
        case.check(f"effective/{layer}.weight", vocoder.get_submodule(layer).weight)
    taps = antialias_filter(torch.device("cpu"), torch.float32).numpy()
    np.testing.assert_allclose(taps, case.stored["buffer/filter"], rtol=0, atol=5e-8)


@pytest.mark.parametrize("name", CONFIGS)
def test_keys_and_shapes_are_the_published_ones_without_weight_norm(golden, name):
    with torch.device("meta"):
        own = {key: list(value.shape) for key, value in Vocoder(CONFIGS[name]).state_dict().items()}
    published = {}
    for key, shape, _dtype, is_buffer in recipe.load_manifest(GOLDEN / golden(name).info["manifest"]):
        if not is_buffer and not key.endswith(G):
            published[key.removesuffix(V) + ".weight" if key.endswith(V) else key] = shape
    assert own == published


# ---------------------------------------------------------------------------------------------------------------
# anti-aliased activation
# ---------------------------------------------------------------------------------------------------------------


def test_the_filter_is_a_symmetric_lowpass():
    taps = antialias_filter(torch.device("cpu"), torch.float64)
    assert torch.equal(taps, taps.flip(0))
    assert taps.sum().item() == pytest.approx(1, abs=1e-12)
    alternating = torch.tensor([1.0, -1.0] * 6, dtype=torch.float64)
    assert abs((taps * alternating).sum().item()) < 1e-12  # nothing at the Nyquist frequency


def test_resampling_keeps_constants_and_slow_waves():
    constant = torch.full((2, 3, 12), 1.7)
    torch.testing.assert_close(upsample_twice(constant), torch.full((2, 3, 14), 1.7), rtol=1e-3, atol=0)
    torch.testing.assert_close(downsample_twice(constant.repeat(1, 1, 2)), torch.full((2, 3, 7), 1.7))

    slow = torch.sin(2 * math.pi * torch.arange(200) / 40)[None, None]
    # Up-sampled points lie a quarter sample before and after the old ones; the filter falls off a little.
    fine = torch.sin(2 * math.pi * (torch.arange(400) / 2 - 0.25) / 40)[None, None]
    torch.testing.assert_close(upsample_twice(slow), fine[..., 5:-5], rtol=0, atol=1e-2)
    torch.testing.assert_close(downsample_twice(upsample_twice(slow)), slow[..., 5:-5], rtol=0, atol=2e-2)


def whole_activation(activation: AntiAliasedActivation, x: torch.Tensor) -> torch.Tensor:
    """The activation as it is defined: filter up, activate, filter down, each over all samples, their edges held."""
    channels = x.shape[1]
    taps = antialias_filter(x.device, x.dtype).expand(channels, 1, -1)
    padded = F.pad(x, (5, 5), mode="replicate")
    fine = activation.act(F.conv_transpose1d(padded, 2 * taps, stride=2, padding=15, groups=channels))
    return F.conv1d(F.pad(fine, (5, 6), mode="replicate"), taps, stride=2, groups=channels)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("length", [1, 2, 5, 23])
def test_chunks_of_an_activation_give_the_whole(monkeypatch, length, channels_last):
    activation = AntiAliasedActivation(3).double()
    with torch.no_grad():
        activation.act.alpha.copy_(torch.tensor([0.0, 0.5, -0.3]))
        activation.act.beta.copy_(torch.tensor([0.3, -0.2, 0.1]))
    x = torch.randn(2, 3, length, dtype=torch.float64, requires_grad=True)
    expected = whole_activation(activation, x)
    inputs = (x, *activation.parameters())
    gradients = torch.autograd.grad(expected.cos().sum(), inputs)
    for chunk in (1, 2, 4, 11, 30):
        monkeypatch.setattr(vocoder_module, "ACTIVATION_CHUNK", chunk * 2 * 3)
        found = activation(x.mT.contiguous().mT if channels_last else x)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)
        for got, wanted in zip(torch.autograd.grad(found.cos().sum(), inputs), gradients, strict=True):
            torch.testing.assert_close(got, wanted, rtol=0, atol=1e-11)


def test_channels_stay_the_inner_axis(monkeypatch):
    """Else every convolution would rearrange what it reads and writes."""
    monkeypatch.setattr(vocoder_module, "ACTIVATION_CHUNK", 4 * 16)
    vocoder = Vocoder(SMALL)
    layers = (AntiAliasedActivation(16), 16), (vocoder.conv_pre, 8), (vocoder.ups[0][0], 16), (vocoder.resblocks[0], 8)
    for layer, channels in layers:
        assert layer(torch.randn(1, 20, channels).mT).stride(1) == 1


@pytest.mark.parametrize("length", [3, 60])
def test_convolutions_of_short_and_long_inputs_are_pytorchs(length):
    dilated, bare = Conv1d(6, 5, 7, padding=9, dilation=3), Conv1d(6, 5, 7, padding=3, bias=False)
    for layer in (dilated, bare, ConvTranspose1d(6, 5, 8, stride=4, padding=2)):
        x = torch.randn(2, length, 6).mT
        assert is_short(x, layer.weight) == (length == 3)
        assert not is_short(x.contiguous(), layer.weight)
        expected = type(layer).__base__.forward(layer, x)
        for layout in (x, x.contiguous()):
            torch.testing.assert_close(layer(layout), expected, rtol=1e-5, atol=1e-6)


def test_channels_do_not_mix():
    x = torch.randn(1, 3, 20)
    x[:, 1] = 0
    assert (upsample_twice(x)[:, 1] == 0).all()
    assert (downsample_twice(x)[:, 1] == 0).all()
    assert upsample_twice(x)[:, 0].abs().sum() > 0


def test_snake_is_its_formula():
    snake = SnakeBeta(2)
    with torch.no_grad():
        snake.alpha.copy_(torch.tensor([0.0, 0.5]))
        snake.beta.copy_(torch.tensor([0.3, -0.2]))
    x = torch.randn(1, 2, 5)
    for c in range(2):
        alpha, beta = math.exp(snake.alpha[c].item()), math.exp(snake.beta[c].item())
        torch.testing.assert_close(snake(x)[:, c], x[:, c] + torch.sin(alpha * x[:, c]) ** 2 / beta)


def test_harmonics_beyond_nyquist_are_suppressed():
    """sin^2 doubles the frequency: 0.35 of the sampling rate becomes 0.7, which aliases to 0.3 without the filters."""
    x = torch.sin(2 * math.pi * 0.35 * torch.arange(1000))[None, None]
    activation = AntiAliasedActivation(1)

    def alias_level(y: torch.Tensor) -> float:
        return torch.fft.rfft(y[0, 0, 100:900].detach()).abs()[240].item()  # 240 / 800 = 0.3

    assert alias_level(activation(x)) < 0.3 * alias_level(activation.act(x))


# ---------------------------------------------------------------------------------------------------------------
# loading
# ---------------------------------------------------------------------------------------------------------------


def test_all_three_spellings_of_the_weights_load():
    parametrized, mel = parametrized_weights(), torch.randn(1, 8, 6)
    legacy = {k.replace(G, ".weight_g").replace(V, ".weight_v"): v for k, v in parametrized.items()}
    plain = fold_weight_norm(legacy)
    assert legacy.keys() != parametrized.keys()
    assert {"conv_pre.weight", "ups.0.0.weight", "ups.0.0.bias"} <= plain.keys()
    untouched = {k: v.clone() for k, v in legacy.items()}

    expected = Vocoder(SMALL).load_published(parametrized)(mel)
    assert expected.abs().max() > 0.01
    for spelling in (legacy, plain, {"generator": legacy}):
        assert torch.equal(Vocoder(SMALL).load_published(spelling)(mel), expected)
    without_filters = {k: v for k, v in plain.items() if not k.endswith("filter")}
    assert torch.equal(Vocoder(SMALL).load_published(without_filters)(mel), expected)
    assert legacy.keys() == untouched.keys() and all(torch.equal(legacy[k], untouched[k]) for k in legacy)


def test_folding_agrees_with_pytorch():
    for layer in (torch.nn.Conv1d(3, 4, 5), torch.nn.ConvTranspose1d(3, 4, 5)):
        normed = torch.nn.utils.parametrizations.weight_norm(layer)
        with torch.no_grad():
            normed.parametrizations.weight.original0.mul_(1.5)
        folded = fold_weight_norm(torch.nn.ModuleDict({"conv": normed}).state_dict())
        assert folded.keys() == {"conv.bias", "conv.weight"}
        torch.testing.assert_close(folded["conv.weight"], normed.weight)


def test_weights_are_folded_before_the_cast():
    weights = parametrized_weights()
    loaded = Vocoder(SMALL).to(torch.bfloat16).load_published(weights)
    assert torch.equal(loaded.conv_pre.weight, fold_weight_norm(weights)["conv_pre.weight"].to(torch.bfloat16))
    halves = {k: v.half() for k, v in weights.items()}
    assert fold_weight_norm(halves)["conv_pre.weight"].dtype == torch.float32


def test_wrong_keys_and_shapes_are_named():
    weights = parametrized_weights()
    missing = {k: v for k, v in weights.items() if k != "conv_post.bias"}
    with pytest.raises(ValueError, match=r"8 mel bands: 1 missing: conv_post\.bias$"):
        Vocoder(SMALL).load_published(missing)
    with pytest.raises(ValueError, match=r"1 unexpected: extra\.weight$"):
        Vocoder(SMALL).load_published({**weights, "extra.weight": torch.zeros(1)})
    half = {k: v for k, v in weights.items() if k != "ups.1.0" + G}
    with pytest.raises(ValueError, match=r"missing: ups\.1\.0\.weight; 1 unexpected: ups\.1\.0\.param.*original1$"):
        Vocoder(SMALL).load_published(half)


# ---------------------------------------------------------------------------------------------------------------
# in chunks
# ---------------------------------------------------------------------------------------------------------------

NARROW = {
    "16k": dataclasses.replace(CONFIGS["bigvgan_16k"], initial_channels=64),
    "44k": dataclasses.replace(CONFIGS["bigvgan_v2_44k"], initial_channels=64),
    "short": dataclasses.replace(
        CONFIGS["bigvgan_16k"], upsample_rates=(8, 8, 4), upsample_kernels=(16, 16, 8), initial_channels=16
    ),
}


def narrow_vocoder(name: str) -> Vocoder:
    return fill_random_(Vocoder(NARROW[name])).double().requires_grad_(False)


@pytest.mark.parametrize("name", NARROW)
def test_context_is_what_the_samples_depend_on(name):
    """Gradients of one frame's samples end inside the context, and at most one frame before its edge."""
    vocoder, config = narrow_vocoder(name), NARROW[name]
    context, hop = config.context_frames, config.hop_length
    mel = torch.randn(1, config.num_mels, 2 * context + 5, dtype=torch.float64, requires_grad=True)
    frame = context + 2
    vocoder(mel)[..., frame * hop : (frame + 1) * hop].abs().sum().backward()
    (reached,) = mel.grad[0].abs().sum(dim=0).nonzero(as_tuple=True)
    assert context - 1 <= frame - reached[0] <= context and context - 1 <= reached[-1] - frame <= context


@pytest.mark.parametrize("name", NARROW)
def test_chunks_give_the_whole(name):
    vocoder, config = narrow_vocoder(name), NARROW[name]
    mel = torch.randn(1, config.num_mels, 2 * config.context_frames + 7, dtype=torch.float64)
    whole = vocoder(mel)
    for chunk_frames in (config.context_frames - 5, mel.shape[-1], 10_000):
        torch.testing.assert_close(vocoder.in_chunks(mel, chunk_frames), whole, rtol=0, atol=1e-12)


def test_less_context_is_not_enough(monkeypatch):
    """So the test above can fail: a third of the context changes samples by more than rounding."""
    vocoder, mel = narrow_vocoder("short"), torch.randn(1, 80, 60, dtype=torch.float64)
    whole, context = vocoder(mel), vocoder.config.context_frames
    monkeypatch.setattr(VocoderConfig, "context_frames", context // 3)
    assert (vocoder.in_chunks(mel, 20) - whole).abs().max() > 1e-6


def test_a_chunk_has_at_least_a_frame():
    with pytest.raises(ValueError, match="chunk_frames is 0"):
        Vocoder(SMALL).in_chunks(torch.zeros(1, 8, 4), 0)


# ---------------------------------------------------------------------------------------------------------------
# shapes, range, precision, settings
# ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_frames", [1, 5])
def test_one_hop_of_samples_per_frame(num_frames):
    assert SMALL.hop_length == 8
    assert CONFIGS["bigvgan_16k"].hop_length == 256
    assert CONFIGS["bigvgan_v2_44k"].hop_length == 512
    vocoder = Vocoder(SMALL)
    mel = torch.randn(2, 8, num_frames)
    assert vocoder(mel).shape == (2, 1, 8 * num_frames)
    torch.testing.assert_close(vocoder(mel)[1:], vocoder(mel[1:]), rtol=1e-4, atol=1e-6)


def test_the_output_is_bounded_by_tanh_or_clamped():
    weights = parametrized_weights()
    weights["conv_post.bias"] = torch.tensor([1.5])
    weights["conv_post" + G] = weights["conv_post" + G] * 0 + 1e-3
    mel = torch.randn(1, 8, 3)
    torch.testing.assert_close(
        Vocoder(SMALL).load_published(weights)(mel), torch.full((1, 1, 24), math.tanh(1.5)), rtol=0, atol=2e-2
    )
    clamped = VocoderConfig(8, (4, 2), (8, 4), final_bias=True, final_tanh=False, initial_channels=16)
    assert (Vocoder(clamped).load_published(weights)(mel) == 1).all()


def test_half_precision_stays_close():
    vocoder, mel = Vocoder(SMALL).load_published(parametrized_weights()), torch.randn(1, 8, 6)
    expected = vocoder(mel)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        auto = vocoder(mel)
    half = vocoder.to(torch.bfloat16)(mel)  # float32 in, as the VAE in float32 gives it
    assert half.dtype == torch.bfloat16
    for other in (auto.float(), half.float()):
        assert (other - expected).std() < 0.1 * expected.std()


def test_every_parameter_gets_a_gradient():
    with torch.inference_mode():
        Vocoder(SMALL)(torch.randn(1, 8, 3))  # the cached taps must not come from here
    vocoder = Vocoder(SMALL)
    vocoder(torch.randn(1, 8, 6)).square().mean().backward()
    without = [name for name, p in vocoder.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert without == []


@pytest.mark.parametrize("shape", [(8, 20), (1, 80, 20), (1, 8, 0)])
def test_a_mel_of_a_wrong_shape_is_refused(shape):
    with pytest.raises(ValueError, match=r"expected \(batch, 8, frames\)"):
        Vocoder(SMALL)(torch.zeros(shape))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"upsample_kernels": (8,)}, "2 upsample_rates and 1 upsample_kernels"),
        ({"upsample_kernels": (7, 4)}, "kernel 7 at rate 4"),
        ({"upsample_kernels": (2, 4)}, "kernel 2 at rate 4"),
        ({"initial_channels": 18}, "initial_channels is 18, expected a multiple of 4"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    good = dict(num_mels=8, upsample_rates=(4, 2), upsample_kernels=(8, 4), final_bias=True, final_tanh=True)
    with pytest.raises(ValueError, match=message):
        VocoderConfig(**{**good, **settings})
