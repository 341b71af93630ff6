"""selva.data.padding: which latents are of sound that ends before its features do."""

from __future__ import annotations

import pytest
import torch
from make_data import noise

from selva.data.padding import Padding, join_paddings, num_sound_frames, windows_with_sound
from selva.models.zoo import build_mel
from selva.sequence import sequence_config


@pytest.mark.parametrize("mode", ["16k", "44k"])
@pytest.mark.parametrize("samples", [9_000, 12_288, 13_000, 13_311, 13_312, 20_001])
def test_frames_of_sound_are_those_whose_spectrogram_no_padding_reaches(mode, samples):
    """Anything that is put into the padding changes the spectrogram of the other frames, and of them only."""
    sequence = sequence_config(mode, 3.0)
    sound = torch.from_numpy(noise(3.1, sequence.sampling_rate))[: sequence.num_audio_frames]
    padded = sound.clone()
    padded[samples:] = 0
    same = (build_mel(mode)(sound[None]) == build_mel(mode)(padded[None]))[0].all(dim=0)  # (mel frames,)
    frames = same.view(-1, 2).all(dim=1)
    count = num_sound_frames(samples / sequence.sampling_rate, 0.0, sequence)
    # The window of a Hann weighted spectrogram is zero at its first sample, so one more sample changes nothing.
    assert frames[:count].all() and not frames[count + 1 :].any() and (not frames[count] or samples % 256 == 0)
    assert 0 < count < sequence.latent_seq_len


@pytest.mark.parametrize(
    "sound_sec, start_sec, frames", [(8.0, 0, 250), (7.75, 0, 250), (7.74, 0, 241), (2.0, 0, 61), (2.0, 1.0, 30),
                                     (0.01, 0, 1), (2.0, 1.99, 1), (2.0, 2.0, 0), (2.0, 3.0, 0)])
def test_little_padding_is_none_and_a_little_sound_is_a_frame(sound_sec, start_sec, frames):
    assert num_sound_frames(sound_sec, start_sec, sequence_config("16k", 8.0)) == frames


def test_windows_without_sound_are_left_out_but_for_the_first():
    assert windows_with_sound([0.0, 2.56, 5.12, 7.68], 5.8) == [0, 1, 2]
    assert windows_with_sound([0.0, 2.56, 5.12, 7.68], 5.7) == [0, 1]
    assert windows_with_sound([0.0, 2.56], 0.1) == [0]


def test_a_batch_has_the_padding_of_its_clips():
    assert join_paddings([None, None], 3) is None
    one = Padding(torch.tensor([False, False, True]), torch.tensor([1.0, 2.0]))
    found = join_paddings([None, one], 3)
    assert found is not None and found.mask.tolist() == [[False] * 3, [False, False, True]]
    assert torch.equal(found.silence, one.silence)
