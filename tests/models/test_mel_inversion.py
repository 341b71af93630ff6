import pytest
import torch

from selva.models.config import MEL_CONFIGS, MelInversionConfig
from selva.models.mel import slaney_filterbank
from selva.models.mel_inversion import MelInversion
from selva.models.random_weights import random_state_dict
from selva.models.zoo import build_mel

RATE = 16_000


@pytest.fixture
def inversion() -> MelInversion:
    return MelInversion(MelInversionConfig()).eval()


def tone(hertz: float, seconds: float = 1.0, start_sec: float = 0.0) -> torch.Tensor:
    times = torch.arange(round(seconds * RATE)) / RATE
    return (0.5 * torch.sin(2 * torch.pi * hertz * times) * (times >= start_sec))[None]


@torch.no_grad()
def test_magnitudes_have_the_sums_that_the_mel_says(inversion):
    mel = build_mel("16k")(tone(440))
    found = inversion.plain_magnitudes(mel)
    assert found.shape == build_mel("16k").magnitudes(tone(440)).shape and (found >= 0).all()
    again = torch.from_numpy(slaney_filterbank(MEL_CONFIGS["16k"])).float() @ found
    loud = mel > mel.max() - 1.5  # decades
    torch.testing.assert_close(again[loud].log10(), mel[loud], atol=0.1, rtol=0)  # a tenth of a decade is 2 dB


@torch.no_grad()
@pytest.mark.parametrize("hertz", [330.0, 2500.0])
def test_a_tone_comes_back_at_its_pitch(inversion, hertz):
    sound = inversion(build_mel("16k")(tone(hertz)))
    assert sound.shape == (1, 1, 62 * 256) and sound.abs().max() <= 1
    spectrum = torch.fft.rfft(sound[0, 0, 4000:12_000]).abs()
    found = spectrum.argmax() * RATE / 8000
    assert abs(found - hertz) < 40  # the width of a mel band at low pitch


@torch.no_grad()
def test_sound_begins_when_it_did(inversion):
    """Half a hop more or less would be 8 ms; a frame of the mel itself reaches 32 ms back."""
    sound = inversion(build_mel("16k")(tone(1000, start_sec=0.5)))[0, 0]
    level = sound.square().unfold(0, 80, 80).mean(-1)  # every 5 ms
    half = (level > 0.25 * level[120:180].mean()).nonzero()[0].item() * 0.005
    assert abs(half - 0.5) < 0.03


@torch.no_grad()
def test_silence_stays_silent(inversion):
    assert inversion(build_mel("16k")(torch.zeros(1, RATE))).abs().max() < 1e-4


@torch.no_grad()
def test_chunks_change_nothing(inversion):
    mel = build_mel("16k")(tone(500))
    assert torch.equal(inversion.in_chunks(mel, 7), inversion(mel))
    with pytest.raises(ValueError, match="chunk_frames is 0"):
        inversion.in_chunks(mel, 0)


@torch.no_grad()
def test_the_network_moves_magnitudes(inversion):
    mel = build_mel("16k")(tone(440))
    before = inversion.magnitudes(mel)
    torch.testing.assert_close(before, inversion.plain_magnitudes(mel))
    inversion.load_published(random_state_dict(inversion))
    assert (inversion.magnitudes(mel) / before.clamp(min=1e-9)).log().abs().mean() > 0.01


def test_wrong_input_is_refused(inversion):
    with pytest.raises(ValueError, match=r"mel is \(1, 128, 10\), expected \(batch, 80, frames\)"):
        inversion(torch.zeros(1, 128, 10))
    with pytest.raises(ValueError, match=r"1 missing: sharpen.0.bias"):
        inversion.load_published({k: v for k, v in inversion.state_dict().items() if k != "sharpen.0.bias"})
