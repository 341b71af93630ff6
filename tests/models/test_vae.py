"""The VAE: its building blocks, loading, halves and precision on a small network; golden outputs at full size."""

from __future__ import annotations

from pathlib import Path

import pytest
import recipe
import torch

from selva.models import vae as vae_module
from selva.models.config import VAEConfig, VocoderConfig
from selva.models.mel import MelSpectrogram
from selva.models.vae import VAE, magnitude_silu, magnitude_sum, normalize_rows, pixel_norm
from selva.models.vocoder import Vocoder

GOLDEN = Path(recipe.__file__).parent
CONFIGS = {
    "16k": VAEConfig("16k", hidden_dim=384, latent_dim=20),
    "44k": VAEConfig("44k", hidden_dim=512, latent_dim=40),
}
SMALL = VAEConfig("16k", hidden_dim=48, latent_dim=8)
VOCODER_16K = VocoderConfig(
    num_mels=80,
    upsample_rates=(4, 4, 2, 2, 2, 2),
    upsample_kernels=(8, 8, 4, 4, 4, 4),
    final_bias=True,
    final_tanh=True,
)


def raw_weights(config: VAEConfig = SMALL) -> dict[str, torch.Tensor]:
    """Weights as a published file holds them: rows of arbitrary norm."""
    state = VAE(config).state_dict()
    return {k: torch.randn_like(v) * 3 if v.ndim == 3 and k.endswith("weight") else v.clone() for k, v in state.items()}


@pytest.fixture(scope="module")
def vae_16k(golden):
    return VAE(CONFIGS["16k"]).eval().load_published(golden("vae_16k").weights())


# ---------------------------------------------------------------------------------------------------------------
# full size, against the reference
# ---------------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def test_golden_16k(golden, vae_16k):
    case = golden("vae_16k")
    inputs, inner = case.inputs(), {}
    encoder, decoder = vae_16k.encoder, vae_16k.decoder
    places = {
        "inner_encoder_conv_in": encoder.conv_in,
        "inner_encoder_level_0_block_0": encoder.down[0].block[0],
        "inner_encoder_after_downsample": encoder.down[0].downsample,
        "inner_encoder_level_2_block_1": encoder.down[2].block[1],
        "inner_encoder_mid_attention": encoder.mid.attn_1,
        "inner_encoder_mid_block_2": encoder.mid.block_2,
        "inner_decoder_conv_in": decoder.conv_in,
        "inner_decoder_mid_attention": decoder.mid.attn_1,
        "inner_decoder_level_2_block_2": decoder.up[2].block[2],
        "inner_decoder_level_1_block_2": decoder.up[1].block[2],
        "inner_decoder_after_upsample": decoder.up[1].upsample,
        "inner_decoder_level_0_block_2": decoder.up[0].block[2],
    }
    hooks = [
        module.register_forward_hook(lambda _module, _args, output, name=name: inner.update({name: output}))
        for name, module in places.items()
    ]
    mean, std = vae_16k.encode(inputs["mel_even"])
    decoded = vae_16k.decode(inputs["latent"])
    for hook in hooks:
        hook.remove()
    mean_odd, std_odd = vae_16k.encode(inputs["mel_odd"])

    for name, value in inner.items():
        case.check(name, value)
    for name, value in {
        "mean_even": mean, "std_even": std, "decoded": decoded, "mean_odd": mean_odd, "std_odd": std_odd,
    }.items():
        case.check(name, value)
    for key in ("encoder.conv_in", "encoder.down.0.downsample.conv1", "decoder.conv_out"):
        case.check(f"effective/{key}.weight", vae_16k.get_submodule(key).weight)


@torch.inference_mode()
def test_golden_44k(golden):
    case = golden("vae_44k")
    vae = VAE(CONFIGS["44k"]).eval().load_published(case.weights())
    inputs = case.inputs()
    mean, std = vae.encode(inputs["mel_even"])
    case.check("mean_even", mean)
    case.check("std_even", std)
    case.check("decoded", vae.decode(inputs["latent"]))


@torch.inference_mode()
def test_golden_waveform_to_latent_and_back(golden, vae_16k):
    case = golden("end_to_end_16k")
    inputs = case.inputs()
    shapes = {key: shape for key, shape, *_ in recipe.load_manifest(GOLDEN / "manifests/generator_small_16k.json")}
    latent_mean, latent_std = (torch.from_numpy(recipe.make_value(k, shapes[k])) for k in ("latent_mean", "latent_std"))

    mel = MelSpectrogram("16k")(inputs["waveform"])
    latent = vae_16k.encode(mel)[0].mT  # (B, N, C)
    case.check("mel", mel)
    case.check("latent_mean", latent)
    case.check("latent_normalized", (latent - latent_mean) / latent_std)

    unnormalized = inputs["latent"] * latent_std + latent_mean
    decoded = vae_16k.decode(unnormalized.mT)
    vocoder = Vocoder(VOCODER_16K).load_published(case.weights("manifests/bigvgan_16k.json"))
    case.check("latent_unnormalized", unnormalized)
    case.check("decoded_mel", decoded)
    case.check("waveform_out", vocoder(decoded))


@pytest.mark.parametrize("mode", CONFIGS)
def test_keys_statistics_and_shapes_are_the_published_ones(golden, mode):
    case = golden(f"vae_{mode}")
    with torch.device("meta"):
        state = VAE(CONFIGS[mode]).state_dict()
    manifest = recipe.load_manifest(GOLDEN / case.info["manifest"])
    assert [(k, list(v.shape)) for k, v in state.items()] == [(k, shape) for k, shape, *_ in manifest]

    small = VAE(VAEConfig(mode, hidden_dim=8, latent_dim=2))
    for name in ("data_mean", "data_std"):
        expected = torch.from_numpy(case.stored[f"buffer/{name}"])[None, :, None]
        assert torch.equal(small.get_buffer(name), expected)


@pytest.mark.parametrize("scale", ["small", "tiny"])
def test_golden_pixel_norm(golden, scale):
    case = golden("norm_layers")
    case.check(f"vae.pixel_norm/{scale}", pixel_norm(case.inputs()[f"map_{scale}"]))


# ---------------------------------------------------------------------------------------------------------------
# building blocks
# ---------------------------------------------------------------------------------------------------------------


def test_magnitudes_are_preserved():
    def rms(t: torch.Tensor) -> float:
        return t.detach().square().mean().sqrt().item()

    x = torch.randn(8, 1024, 64)
    assert rms(pixel_norm(5 * x)) == pytest.approx(1, abs=1e-3)
    assert rms(magnitude_silu(x)) == pytest.approx(1, abs=5e-3)
    assert rms(magnitude_sum(x, torch.randn_like(x))) == pytest.approx(1, abs=5e-3)
    assert rms(vae_module.Conv(1024, 64, 3)(x)[..., 1:-1]) == pytest.approx(1, abs=2e-2)


def test_rows_are_normalised_in_float32():
    weight = torch.randn(6, 10, 3) * torch.tensor([0.0, 0.01, 1, 1, 10, 100]).view(-1, 1, 1)
    normal = normalize_rows(weight)
    assert (normal[0] == 0).all()  # a dead row stays one, without NaN
    torch.testing.assert_close(normal[2:].flatten(1).norm(dim=1), torch.ones(4), rtol=2e-4, atol=0)

    half = normalize_rows(weight.half())
    assert half.dtype == torch.float32
    assert torch.equal(half, normalize_rows(weight.half().float()))


def test_a_fresh_network_keeps_the_magnitude():
    vae = VAE(SMALL)
    mean, std = vae.encode(torch.randn(2, 80, 20) * vae.data_std + vae.data_mean)
    assert mean.shape == std.shape == (2, 8, 10)
    assert 0.3 < mean.std() < 3
    mel = vae.decode(torch.randn(2, 8, 10))
    assert mel.shape == (2, 80, 20)
    assert 0.3 < ((mel - vae.data_mean) / vae.data_std).std() < 3


def test_a_batch_is_the_same_as_single_items():
    vae, mel = VAE(SMALL), torch.randn(3, 80, 12) - 2
    torch.testing.assert_close(vae.encode(mel)[0][1:2], vae.encode(mel[1:2])[0], rtol=1e-4, atol=1e-5)


def test_an_odd_last_frame_is_not_seen_by_the_pooling():
    vae = VAE(SMALL)
    assert vae.encode(torch.randn(1, 80, 33))[0].shape == (1, 8, 16)


# ---------------------------------------------------------------------------------------------------------------
# loading
# ---------------------------------------------------------------------------------------------------------------


def test_weights_are_normalised_exactly_once():
    raw = raw_weights()
    untouched = {k: v.clone() for k, v in raw.items()}
    loaded = VAE(SMALL).load_published(raw)
    key = "encoder.mid.attn_1.qkv.weight"
    assert torch.equal(loaded.state_dict()[key], normalize_rows(raw[key]))
    assert all(torch.equal(raw[k], untouched[k]) for k in raw)

    saved = loaded.state_dict()
    again = VAE(SMALL)
    again.load_state_dict(saved)
    assert all(torch.equal(v, saved[k]) for k, v in again.state_dict().items())
    mel = torch.randn(1, 80, 8)
    assert torch.equal(again.encode(mel)[0], loaded.encode(mel)[0])

    with torch.no_grad():
        loaded.encoder.conv_in.weight.zero_()
    assert torch.equal(raw["encoder.conv_in.weight"], untouched["encoder.conv_in.weight"])  # no shared memory


def test_weights_are_normalised_before_the_cast():
    raw = raw_weights()
    key = "decoder.conv_in.weight"
    loaded = VAE(SMALL).to(torch.bfloat16).load_published(raw)
    assert torch.equal(loaded.state_dict()[key], normalize_rows(raw[key]).to(torch.bfloat16))


def test_statistics_come_from_the_checkpoint_if_it_has_any():
    raw = raw_weights()
    raw["data_mean"] = raw["data_mean"] + 1
    assert torch.equal(VAE(SMALL).load_published(raw).data_mean, raw["data_mean"])
    built_in = VAE(SMALL).data_mean
    del raw["data_mean"], raw["data_std"]
    assert torch.equal(VAE(SMALL).load_published(raw).data_mean, built_in)


def test_gains_are_loaded_and_used():
    raw = raw_weights()
    quiet = VAE(SMALL).load_published(raw)
    raw["decoder.learnable_gain"] = torch.tensor(1.0)
    loud = VAE(SMALL).load_published(raw)
    z = torch.randn(1, 8, 4)
    torch.testing.assert_close(loud.decode(z) - loud.data_mean, 2 * (quiet.decode(z) - quiet.data_mean))


def test_wrong_keys_and_shapes_are_named():
    raw = raw_weights()
    missing = {k: v for k, v in raw.items() if k != "encoder.conv_out.weight"}
    with pytest.raises(ValueError, match=r"16k VAE: 1 missing: encoder\.conv_out\.weight$"):
        VAE(SMALL).load_published(missing)
    with pytest.raises(ValueError, match=r"1 unexpected: encoder\.extra\.weight$"):
        VAE(SMALL).load_published({**raw, "encoder.extra.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"encoder\.conv_in\.weight \(48, 80, 3\), expected \(64, 80, 3\)"):
        VAE(VAEConfig("16k", hidden_dim=64, latent_dim=8)).load_published(raw)


def test_halves_can_be_dropped_before_or_after_loading():
    raw, z, mel = raw_weights(), torch.randn(1, 8, 4), torch.randn(1, 80, 8)
    whole = VAE(SMALL).load_published(raw)
    expected_mel, expected_mean = whole.decode(z), whole.encode(mel)[0]

    decoder = VAE(SMALL).drop_encoder().load_published(raw)
    assert torch.equal(decoder.decode(z), expected_mel)
    assert not any(k.startswith("encoder.") for k in decoder.state_dict())
    with pytest.raises(RuntimeError, match="no encoder"):
        decoder.encode(mel)

    assert whole.drop_decoder() is whole
    assert torch.equal(whole.encode(mel)[0], expected_mean)
    with pytest.raises(RuntimeError, match="no decoder"):
        whole.decode(z)


# ---------------------------------------------------------------------------------------------------------------
# precision, gradients, bad input
# ---------------------------------------------------------------------------------------------------------------


def test_half_precision_stays_close():
    vae = VAE(SMALL)
    mel, z = torch.randn(1, 80, 16) - 2, torch.randn(1, 8, 8)
    mean, decoded = vae.encode(mel)[0], vae.decode(z)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(vae.encode(mel)[0].float(), mean, rtol=0.1, atol=0.1)
        torch.testing.assert_close(vae.decode(z).float(), decoded, rtol=0.1, atol=0.1)
    vae.to(torch.bfloat16)
    half_mean, half_std = vae.encode(mel)  # float32 in, as the mel front-end gives it
    assert half_mean.dtype == half_std.dtype == torch.bfloat16
    torch.testing.assert_close(half_mean.float(), mean, rtol=0.1, atol=0.1)
    torch.testing.assert_close(vae.decode(z).float(), decoded, rtol=0.1, atol=0.1)


def test_every_parameter_gets_a_gradient():
    vae = VAE(SMALL)
    mean, std = vae.encode(torch.randn(1, 80, 8))
    vae.decode(mean + std).square().mean().backward()
    without = [name for name, p in vae.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert without == []


@pytest.mark.parametrize("shape", [(80, 20), (1, 128, 20), (1, 80, 1)])
def test_a_mel_of_a_wrong_shape_is_refused(shape):
    with pytest.raises(ValueError, match=r"expected \(batch, 80, at least 2 frames\)"):
        VAE(SMALL).encode(torch.zeros(shape))


@pytest.mark.parametrize("shape", [(8, 20), (1, 20, 8), (1, 8, 0)])
def test_a_latent_of_a_wrong_shape_is_refused(shape):
    with pytest.raises(ValueError, match=r"expected \(batch, 8, frames\)"):
        VAE(SMALL).decode(torch.zeros(shape))


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match=r"'48k'.*16k, 44k"):
        VAEConfig("48k", hidden_dim=48, latent_dim=8)
    with pytest.raises(ValueError, match="latent_dim must be at least 1, got 0"):
        VAEConfig("16k", hidden_dim=48, latent_dim=0)
