"""Reading, preparing and writing sound, and the errors for sound that is not right."""

from __future__ import annotations

import math
import re
from fractions import Fraction

import av
import numpy as np
import pytest
import soundfile
import torch
from make_media import click_time, clicks, make_video, picture_of

from selva.media import audio_blocks, audio_length, extract_audio, prepare_audio, read_audio, write_audio
from selva.utils.errors import UserError

# -- read_audio -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".wav", ".flac", ".aiff"])
def test_lossless_files_come_back_exactly(suffix, tmp_path):
    samples = (np.random.randint(-32768, 32768, size=(1000, 2)) / 32768).astype(np.float32)
    soundfile.write(tmp_path / f"a{suffix}", samples, 22_050, subtype="PCM_16")
    waveform, rate = read_audio(tmp_path / f"a{suffix}")
    assert rate == 22_050 and waveform.dtype == torch.float32
    assert np.array_equal(waveform.numpy(), samples.T)
    part, _ = read_audio(tmp_path / f"a{suffix}", start_sec=100 / 22_050, duration_sec=50 / 22_050)
    assert torch.equal(part, waveform[:, 100:150])
    rest, _ = read_audio(tmp_path / f"a{suffix}", start_sec=990 / 22_050, duration_sec=1.0)
    assert torch.equal(rest, waveform[:, 990:])
    assert audio_length(tmp_path / f"a{suffix}") == (1000, 22_050)


@pytest.mark.parametrize("suffix", [".mp3", ".ogg"])
def test_compressed_files_keep_time(suffix, tmp_path):
    soundfile.write(tmp_path / f"a{suffix}", clicks([0.5], 1.0, 44_100).T, 44_100)
    waveform, rate = read_audio(tmp_path / f"a{suffix}")
    assert click_time(waveform, rate) == pytest.approx(0.5, abs=0.001)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".mov"])
@pytest.mark.parametrize("channels", [1, 2])
def test_sound_of_a_video_is_aligned_with_its_pictures(suffix, channels, tmp_path):
    sound = clicks([2.0], 3.0, 44_100, channels)
    seconds = np.arange(sound.shape[1]) / 44_100
    sound += 0.3 * np.sin(2 * np.pi * (200 + 300 * seconds) * seconds)
    path = make_video(tmp_path / f"v{suffix}", 3.0, sound=sound, rate=44_100)
    whole, rate = read_audio(path)
    assert whole.shape[0] == channels and rate == 44_100
    assert click_time(whole, rate) == pytest.approx(2.0, abs=0.002)
    for start in (0.5, 1.75):
        part, _ = read_audio(path, start)
        count = min(part.shape[1], whole.shape[1] - round(start * rate))
        assert count > 1.1 * rate
        if suffix == ".mkv":  # its time stamps are rounded to milliseconds
            assert click_time(part, rate) == pytest.approx(2.0 - start, abs=0.002)
        else:  # decoding begins a little earlier, so the cut itself leaves no trace; AAC fills in random noise
            expected = whole[:, round(start * rate) :][:, :count]
            torch.testing.assert_close(part[:, :count], expected, atol=0.01, rtol=0)
    assert read_audio(path, 0.5, 1.25)[0].shape == (channels, round(1.25 * rate))


def video_with_sound_at(path, pieces, rate=16_000):
    """Write 2 s of video; ``pieces`` are (seconds, (1, samples)) of sound."""
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=25)
        video.width, video.height, video.pix_fmt = 64, 64, "yuv420p"
        audio = container.add_stream("pcm_s16le", rate=rate, layout="mono")
        for seconds, sound in pieces:
            pcm = np.ascontiguousarray(np.round(sound * 32768).astype(np.int16))
            frame = av.AudioFrame.from_ndarray(pcm, format="s16", layout="mono")
            frame.sample_rate, frame.pts, frame.time_base = rate, round(seconds * rate), Fraction(1, rate)
            container.mux(audio.encode(frame))
        container.mux(audio.encode(None))
        for index in range(50):
            container.mux(video.encode(av.VideoFrame.from_ndarray(picture_of(index), format="rgb24")))
        container.mux(video.encode(None))


@pytest.mark.parametrize("late_sec", [0.01, 0.5])
def test_sound_that_begins_late_is_preceded_by_silence(late_sec, tmp_path):
    video_with_sound_at(tmp_path / "late.mkv", [(late_sec, clicks([0.25], 1.0))])
    waveform, rate = read_audio(tmp_path / "late.mkv")
    assert click_time(waveform, rate) == pytest.approx(late_sec + 0.25, abs=1e-6)
    assert waveform.shape == (1, round((1 + late_sec) * rate))
    assert click_time(read_audio(tmp_path / "late.mkv", late_sec + 0.2)[0], rate) == pytest.approx(0.05, abs=1e-6)


def test_sound_alone_begins_with_its_first_sample(tmp_path):
    with av.open(str(tmp_path / "late.mka"), "w") as container:
        audio = container.add_stream("pcm_s16le", rate=16_000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.full((1, 8000), 1000, dtype=np.int16), format="s16", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = 16_000, 8000, Fraction(1, 16_000)
        container.mux([*audio.encode(frame), *audio.encode(None)])
    waveform, _ = read_audio(tmp_path / "late.mka")
    assert waveform.shape == (1, 8000) and waveform.min() > 0


def test_a_gap_in_the_sound_is_silence(tmp_path):
    video_with_sound_at(tmp_path / "gap.mkv", [(0.0, clicks([], 0.5) + 0.5), (1.0, clicks([0.25], 0.5))])
    waveform, rate = read_audio(tmp_path / "gap.mkv")
    assert waveform.shape == (1, round(1.5 * rate))
    assert click_time(waveform, rate) == pytest.approx(1.25, abs=1e-6)
    assert waveform[0, : rate // 2].min() == 0.5 and waveform[0, rate // 2 : rate].abs().max() == 0


def test_unusable_sound_is_named(tmp_path):
    video = make_video(tmp_path / "silent.mp4", 1.0)
    with pytest.raises(ValueError, match=r"silent\.mp4: has no audio stream \(found: video\)"):
        read_audio(video)
    for content in (b"", b"RIFF and then nothing"):
        (tmp_path / "bad.wav").write_bytes(content)
        with pytest.raises(ValueError, match=r"bad\.wav: cannot be read"):
            read_audio(tmp_path / "bad.wav")
    soundfile.write(tmp_path / "a.flac", np.random.randn(40_000) * 0.1, 16_000)
    whole = (tmp_path / "a.flac").read_bytes()
    (tmp_path / "a.flac").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"a\.flac: (damaged|ends after)"):
        read_audio(tmp_path / "a.flac")
    soundfile.write(tmp_path / "a.mp3", np.random.randn(40_000) * 0.1, 16_000)
    whole = (tmp_path / "a.mp3").read_bytes()
    (tmp_path / "a.mp3").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"a\.mp3: ends after 1\.\d\d s of 2\.50 s"):
        read_audio(tmp_path / "a.mp3")
    soundfile.write(tmp_path / "b.wav", np.zeros(16_000), 16_000)
    with pytest.raises(ValueError, match=r"b\.wav: has no sound after 2\.0 s"):
        read_audio(tmp_path / "b.wav", start_sec=2.0)
    with pytest.raises(FileNotFoundError, match=r"none\.wav"):
        read_audio(tmp_path / "none.wav")


# -- prepare_audio ----------------------------------------------------------------------------------------------------


def test_prepared_sound_is_mono_with_peak_095_over_the_whole():
    """Pitfall A4: the level is that of the base models."""
    left, right = torch.zeros(1000), torch.zeros(1000)
    left[100], right[900] = 0.4, -0.8
    prepared = prepare_audio(torch.stack([left, right]), 16_000, 16_000, num_samples=500)
    assert prepared.shape == (500,) and prepared.dtype == torch.float32
    assert prepared[100].item() == pytest.approx(0.95 / 2)  # the peak lies behind the cut, and counts
    assert torch.equal(prepare_audio(left, 16_000, 16_000, normalize="none"), left)


@pytest.mark.parametrize(("rate", "target"), [(48_000, 16_000), (44_100, 16_000), (48_000, 44_100), (22_050, 44_100)])
def test_resampling_keeps_a_tone(rate, target):
    seconds, frequency = 0.5, 1000.0
    tone = torch.sin(2 * math.pi * frequency * torch.arange(int(seconds * rate)) / rate)
    expected = torch.sin(2 * math.pi * frequency * torch.arange(int(seconds * target)) / target)
    prepared = prepare_audio(tone, rate, target, normalize="none")
    middle = slice(target // 10, 4 * target // 10)
    torch.testing.assert_close(prepared[middle], expected[middle], atol=5e-4, rtol=0)  # the ripple of the filter


def test_resampling_rejects_aliases_like_kaiser_best():
    """Pitfall A5: the default filter of torchaudio lets aliases through."""
    # torchaudio's default filter gives -1.5, -3.4 and -9.7 dB; the last tone lies above half of 44100 Hz
    for frequency, expected_db in ((19_000, 0.0), (20_500, -1.5), (23_500, -52)):
        tone = torch.sin(2 * math.pi * frequency * torch.arange(48_000) / 48_000)
        level = prepare_audio(tone, 48_000, 44_100, normalize="none")[4410:-4410].std().item() * 2**0.5
        assert 20 * math.log10(level) == pytest.approx(expected_db, abs=0.1 if expected_db > -50 else 1)


def test_short_silent_and_broken_sound_is_refused():
    """Pitfall A6: silence and short sound are no targets."""
    tone = torch.sin(torch.arange(1000) * 0.1)
    with pytest.raises(ValueError, match=r"has 1000 samples \(0\.062 s at 16000 Hz\), expected at least 2000"):
        prepare_audio(tone, 16_000, 16_000, num_samples=2000)
    padded = prepare_audio(tone, 16_000, 16_000, num_samples=2000, pad=True)
    assert padded.shape == (2000,) and padded[1000:].abs().max() == 0 and padded[:1000].abs().max() > 0.9
    with pytest.raises(ValueError, match="silent"):
        prepare_audio(torch.full((1000,), 1e-6), 16_000, 16_000)
    assert prepare_audio(torch.full((1000,), 1.1e-6), 16_000, 16_000).max().item() == pytest.approx(0.95)
    with pytest.raises(ValueError, match="not finite"):
        prepare_audio(torch.tensor([0.0, math.nan]), 16_000, 16_000)
    with pytest.raises(ValueError, match="'peak' or 'none'"):
        prepare_audio(tone, 16_000, 16_000, normalize="lufs")
    with pytest.raises(ValueError, match=r"\(1, 1, 1000\), expected \(channels, samples\)"):
        prepare_audio(tone[None, None], 16_000, 16_000)


@pytest.mark.parametrize(("leak", "refused"), [(0.0, True), (0.05, True), (0.25, False), (2.0, False)])
def test_channels_that_cancel_each_other_are_named(leak, refused, tmp_path, caplog):
    """One microphone with its poles swapped: the mean is what is left of the room."""
    noise = torch.randn(2, 8000) * 0.1
    stereo = torch.stack([noise[0] + leak * noise[1], leak * noise[1] - noise[0]])
    soundfile.write(tmp_path / "a.wav", stereo.T.numpy(), 16_000, subtype="FLOAT")
    extract_audio(tmp_path / "a.wav", tmp_path / "b.flac")
    if refused:
        with pytest.raises(ValueError, match=r"its channels cancel each other: their mean, .* is (silence|2[0-9] dB)"):
            prepare_audio(stereo, 16_000, 16_000)
        assert "a.wav: its channels cancel each other" in caplog.text
    else:
        assert prepare_audio(stereo, 16_000, 16_000).abs().max().item() == pytest.approx(0.95)
        assert "cancel each other" not in caplog.text
    prepare_audio(stereo[:1], 16_000, 16_000)
    prepare_audio(torch.randn(8, 8000), 16_000, 16_000)  # channels of nothing in common
    one_of_six = torch.zeros(6, 8000)
    one_of_six[2] = noise[0]
    prepare_audio(one_of_six, 16_000, 16_000)


# -- writing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".wav", ".flac"])
def test_written_sound_has_every_sample(suffix, tmp_path, caplog):
    waveform = torch.rand(2, 12_345) * 2 - 1
    write_audio(tmp_path / f"a{suffix}", waveform, 44_100)
    again, rate = read_audio(tmp_path / f"a{suffix}")
    assert rate == 44_100 and again.shape == (2, 12_345)
    torch.testing.assert_close(again, waveform, atol=2**-23, rtol=0)  # 24 bits
    assert not caplog.records
    write_audio(tmp_path / f"a{suffix}", waveform[0] * 2, 44_100)
    assert read_audio(tmp_path / f"a{suffix}")[0].abs().max() <= 1
    assert "clipped at full scale" in caplog.text
    assert [path.name for path in tmp_path.iterdir()] == [f"a{suffix}"]


def test_sound_that_cannot_be_written_leaves_the_old_file(tmp_path):
    write_audio(tmp_path / "a.wav", torch.rand(100), 16_000)
    before = (tmp_path / "a.wav").read_bytes()
    for waveform in (torch.tensor([0.0, math.inf]), torch.zeros(1, 0)):
        with pytest.raises(ValueError, match=r"a\.wav: .*empty or has values"):
            write_audio(tmp_path / "a.wav", waveform, 16_000)
    assert (tmp_path / "a.wav").read_bytes() == before
    with pytest.raises(ValueError, match=r"cannot write \.mp3"):
        write_audio(tmp_path / "a.mp3", torch.rand(100), 16_000)


@pytest.mark.parametrize("channels, rate, reason", [
    (9, 16_000, "has 9 channels, but .flac holds 8"),
    (1, 655_360, "has a rate of 655360 Hz, but .flac holds up to 655350"),
    (1, 65_536, "has a rate of 65536 Hz, but above 65535 .flac holds multiples of 10"),
])
def test_sound_that_flac_cannot_hold_is_no_full_disk(channels, rate, reason, tmp_path):
    sound = torch.rand(channels, 9_000)
    with pytest.raises(UserError, match=rf"a\.flac: the sound to write {re.escape(reason)}; convert it, or write .wav"):
        write_audio(tmp_path / "a.flac", sound, rate)
    write_audio(tmp_path / "a.wav", sound, rate)
    with pytest.raises(UserError, match=rf"a\.wav: its sound {re.escape(reason)}; convert it$"):
        extract_audio(tmp_path / "a.wav", tmp_path / "b.flac")
    assert extract_audio(tmp_path / "a.wav", tmp_path / "b.wav") == 9_000 / rate
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.wav", "b.wav"]


@pytest.mark.parametrize("channels, rate", [(8, 16_000), (1, 655_350), (1, 65_535)])
def test_sound_that_flac_can_just_hold(channels, rate, tmp_path):
    write_audio(tmp_path / "a.flac", torch.rand(channels, 9_000), rate)
    assert audio_length(tmp_path / "a.flac") == (9_000, rate)


def test_extracted_sound_is_that_of_the_clip(tmp_path):
    path = make_video(tmp_path / "v.mp4", 3.0, sound=clicks([2.0], 3.0))
    assert extract_audio(path, tmp_path / "v.flac", start_sec=0.5, duration_sec=2.0) == 2.0
    extracted, rate = read_audio(tmp_path / "v.flac")
    assert extracted.shape == (1, 32_000)
    torch.testing.assert_close(extracted, read_audio(path, 0.5, 2.0)[0], atol=2**-23, rtol=0)
    assert click_time(extracted, rate) == pytest.approx(1.5, abs=0.002)
    with pytest.raises(ValueError, match="no audio stream"):
        extract_audio(make_video(tmp_path / "mute.mp4", 1.0), tmp_path / "mute.flac")
    assert not (tmp_path / "mute.flac").exists()


def test_overshooting_sound_is_scaled_not_clipped(tmp_path):
    soundfile.write(tmp_path / "loud.wav", np.array([0.5, -2.0, 1.5] * 10), 16_000, subtype="FLOAT")
    extract_audio(tmp_path / "loud.wav", tmp_path / "out.flac")
    extracted = read_audio(tmp_path / "out.flac")[0][0, :3]
    torch.testing.assert_close(extracted, torch.tensor([0.25, -1.0, 0.75]), atol=2**-22, rtol=0)


@pytest.mark.parametrize("suffix", [".flac", ".mp3", ".ogg", ".m4a", ".mkv"])
def test_blocks_together_are_the_whole_sound(tmp_path, suffix):
    rate = 16_000
    sound = np.stack([np.sin(np.arange(3 * rate) / (7 + c)) for c in range(2)]).astype(np.float32) / 2
    path = tmp_path / f"a{suffix}"
    if suffix in (".flac", ".mp3", ".ogg"):
        soundfile.write(path, sound.T, rate)
    else:
        make_video(path.with_suffix(".mp4" if suffix == ".m4a" else suffix), 3.0, sound=sound, rate=rate)
        if suffix == ".m4a":
            path.with_suffix(".mp4").rename(path)
    whole, _ = read_audio(path)
    blocks = list(audio_blocks(path, 0.7))
    assert {r for _, r in blocks} == {rate}
    assert [b.shape[1] for b, _ in blocks[:-1]] == [11_200] * (len(blocks) - 1)
    assert 0 < blocks[-1][0].shape[1] <= 11_200
    joined = torch.cat([b for b, _ in blocks], dim=1)
    torch.testing.assert_close(joined, whole, rtol=0, atol=1e-6)


def test_part_of_an_mp3_is_the_same_as_in_the_whole(tmp_path):
    soundfile.write(tmp_path / "a.mp3", np.sin(np.arange(48_000) / 7) / 2, 16_000)
    whole, _ = read_audio(tmp_path / "a.mp3")
    part, _ = read_audio(tmp_path / "a.mp3", 1.5, 0.5)
    torch.testing.assert_close(part, whole[:, 24_000:32_000], rtol=0, atol=1e-4)


def test_blocks_of_a_file_that_was_cut_short_end_in_an_error(tmp_path):
    soundfile.write(tmp_path / "a.flac", np.random.default_rng(0).standard_normal(48_000) / 9, 16_000)
    data = (tmp_path / "a.flac").read_bytes()
    (tmp_path / "a.flac").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"a\.flac: .*damaged"):
        list(audio_blocks(tmp_path / "a.flac", 0.5))
