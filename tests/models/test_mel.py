"""The mel front-end: closed forms, precision, and the golden spectrograms of both modes."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from selva.models.config import MEL_CONFIGS
from selva.models.mel import MelSpectrogram, hz_to_mel, mel_to_hz, slaney_filterbank

MODES = ("16k", "44k")


@pytest.mark.parametrize("mode", MODES)
def test_golden(golden, mode):
    """Pitfall A1: the Slaney filterbank of the base models, not HTK triangles of peak 1."""
    case, mel = golden(f"mel_{mode}"), MelSpectrogram(mode)
    inputs = case.inputs()
    mel_1s, mel_8s, silence = mel(inputs["waveform_1s"]), mel(inputs["waveform_8s"]), mel(inputs["silence"])
    case.check("mel_1s", mel_1s)
    case.check("mel_8s_mean_over_time", mel_8s.mean(-1))
    case.check("mel_8s_std_over_time", mel_8s.std(-1, correction=0))
    case.check("mel_8s_edges", torch.cat((mel_8s[..., :3], mel_8s[..., -3:]), dim=-1))
    case.check("mel_silence", silence)
    case.check("frames", torch.tensor([m.shape[-1] for m in (mel_1s, mel_8s, silence)]))
    case.check("filterbank", torch.from_numpy(slaney_filterbank(MEL_CONFIGS[mode])))


def test_settings_are_those_of_the_golden_files(golden):
    for mode in MODES:
        theirs, ours = golden(f"mel_{mode}").config, MEL_CONFIGS[mode]
        assert (ours.sampling_rate, ours.n_fft, ours.hop_length, ours.num_mels) == (
            theirs["sampling_rate"], theirs["n_fft"], theirs["hop_size"], theirs["num_mels"]
        )


def test_the_slaney_scale_has_its_published_fixed_points():
    assert hz_to_mel(500.0) == pytest.approx(7.5)
    assert hz_to_mel(1000.0) == pytest.approx(15.0)
    assert hz_to_mel(6400.0) == pytest.approx(42.0)
    hz = np.linspace(0, 22050, 50)
    np.testing.assert_allclose(mel_to_hz(hz_to_mel(hz)), hz, rtol=1e-12, atol=1e-9)


def test_triangles_have_unit_area():
    config = replace(MEL_CONFIGS["44k"], n_fft=2**18)  # fine enough for the sum over bins to be an integral
    area = slaney_filterbank(config).sum(axis=1) * config.sampling_rate / config.n_fft
    np.testing.assert_allclose(area, 1.0, rtol=1e-3)


@pytest.mark.parametrize("mode", MODES)
def test_a_tone_peaks_in_its_own_band(mode):
    config = MEL_CONFIGS[mode]
    band = 40
    edges = mel_to_hz(np.linspace(0, hz_to_mel(config.sampling_rate / 2), config.num_mels + 2))
    time = torch.arange(config.sampling_rate // 4) / config.sampling_rate
    tone = 0.5 * torch.sin(2 * math.pi * float(edges[band + 1]) * time)
    assert (MelSpectrogram(mode)(tone[None])[0, :, 3:-3].argmax(0) == band).all()


def test_loud_samples_are_clamped():
    mel, noise = MelSpectrogram("16k"), torch.randn(1, 4096)
    torch.testing.assert_close(mel(noise * 3), mel((noise * 3).clamp(-1, 1)), rtol=0, atol=0)
    assert not torch.equal(mel(noise * 3), mel(noise * 3 / (noise * 3).abs().max()))


def test_silence_is_the_floor():
    assert (MelSpectrogram("16k")(torch.zeros(1, 2048)) == -5).all()
    torch.testing.assert_close(MelSpectrogram("44k")(torch.zeros(1, 4096)), torch.full((1, 128, 8), math.log(1e-5)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_and_casts_change_nothing(dtype):
    """Pitfall G2: a cast or autocast must not reach the Fourier transform, which refuses half precision."""
    waveform = 0.3 * torch.randn(2, 8000)
    expected = MelSpectrogram("16k")(waveform)
    assert expected.dtype == torch.float32

    with torch.autocast("cpu", dtype=dtype):
        assert torch.equal(MelSpectrogram("16k")(waveform), expected)

    cast = MelSpectrogram("16k").to(dtype)
    assert torch.equal(cast(waveform), expected)
    rounded = cast(waveform.to(dtype))  # only the samples are rounded, not the arithmetic
    assert rounded.dtype == torch.float32
    assert torch.equal(rounded, MelSpectrogram("16k")(waveform.to(dtype).float()))


def test_tables_made_in_inference_mode_serve_training():
    from selva.models import mel as module

    module._tables.cache_clear()
    mel, waveform = MelSpectrogram("16k"), torch.randn(1, 2048) * 0.1
    with torch.inference_mode():
        mel(waveform)
    waveform.requires_grad_()
    mel(waveform).sum().backward()
    assert waveform.grad.isfinite().all() and waveform.grad.abs().sum() > 0


@pytest.mark.parametrize("shape", [(16000,), (1, 1, 16000), (1, 511), (1, 0)])
def test_a_waveform_of_a_wrong_shape_is_refused(shape):
    with pytest.raises(ValueError, match=r"expected \(batch, samples\) with at least 512"):
        MelSpectrogram("16k")(torch.zeros(shape))
    assert MelSpectrogram("16k")(torch.zeros(1, 512)).shape == (1, 80, 2)


def test_an_unknown_mode_is_refused():
    with pytest.raises(ValueError, match=r"'48k'.*16k, 44k"):
        MelSpectrogram("48k")
