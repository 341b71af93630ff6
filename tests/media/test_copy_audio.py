"""Sound that is taken out of a video without decoding it."""

from __future__ import annotations

from fractions import Fraction

import av
import numpy as np
import pytest
import soundfile
from make_media import clicks, make_video

from selva.media import audio_length, copied_audio_suffix, copy_audio, read_audio

RATE = 48_000


def noise(seconds=2.0):
    walk = np.cumsum(np.random.default_rng(0).standard_normal((2, int(seconds * RATE) + 100)), axis=1)
    band = walk[:, 100:] - walk[:, :-100]
    return (band / np.abs(band).max() * 0.8).astype(np.float32)


def pcm_video(path, codec, late_sec=0.0):
    """Write a video with uncompressed or FLAC sound, which begins ``late_sec`` after the pictures."""
    samples = np.round(noise() * 32_767).astype(np.int16)
    with av.open(str(path), "w") as file:
        pictures = file.add_stream("libx264", rate=25)
        pictures.width, pictures.height, pictures.pix_fmt = 64, 64, "yuv420p"
        sound = file.add_stream(codec, rate=RATE, layout="stereo")
        block = 4096
        for start in range(0, samples.shape[1], block):
            packed = np.ascontiguousarray(samples[:, start : start + block].T).reshape(1, -1)
            frame = av.AudioFrame.from_ndarray(packed, format="s16", layout="stereo")
            frame.sample_rate, frame.time_base = RATE, Fraction(1, RATE)
            frame.pts = start + round(late_sec * RATE)
            file.mux(sound.encode(frame))
        file.mux(sound.encode(None))
        for _ in range(50):
            file.mux(pictures.encode(av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8), format="rgb24")))
        file.mux(pictures.encode(None))
    return path


@pytest.mark.parametrize(
    ("name", "codec", "suffix"),
    [("v.mkv", "flac", ".flac"), ("v.mp4", "flac", ".flac"), ("v.mov", "pcm_s16le", ".wav"),
     ("v.avi", "pcm_s16le", ".wav"), ("v.mov", "pcm_s16be", ".aiff")],
)
def test_lossless_sound_is_the_same(name, codec, suffix, tmp_path):
    video = pcm_video(tmp_path / name, codec)
    target = tmp_path / f"out{suffix}"
    assert copied_audio_suffix(video) == suffix
    seconds = copy_audio(video, target)
    copied, rate = soundfile.read(target, dtype="int16", always_2d=True)
    assert rate == RATE and seconds == len(copied) / RATE == pytest.approx(2.0)
    assert np.array_equal(copied.T, np.round(noise() * 32_767).astype(np.int16))


@pytest.mark.parametrize(
    ("name", "codec", "suffix"),
    [("v.mp4", "libmp3lame", ".mp3"), ("v.mkv", "libmp3lame", ".mp3"), ("v.webm", "libopus", ".ogg")],
)
def test_compressed_sound_begins_at_the_same_sample(name, codec, suffix, tmp_path):
    if codec not in av.codecs_available:
        pytest.skip(f"this PyAV has no {codec}")
    pictures = "libvpx" if name.endswith("webm") else "libx264"
    video = make_video(tmp_path / name, 2.0, sound=noise(), rate=RATE, codec=pictures, audio_codec=codec)
    assert copied_audio_suffix(video) == suffix
    copy_audio(video, tmp_path / f"out{suffix}")
    expected, copied = read_audio(video, 0.0, 1.9)[0], read_audio(tmp_path / f"out{suffix}", 0.0, 1.9)[0]
    assert (copied - expected).norm() < 1e-3 * expected.norm()


def test_what_cannot_be_copied_is_refused(tmp_path):
    aac = make_video(tmp_path / "aac.mp4", 1.0, sound=clicks([0.5], 1.0))
    for call in (lambda: copied_audio_suffix(aac), lambda: copy_audio(aac, tmp_path / "out.wav")):
        with pytest.raises(ValueError, match=r"aac\.mp4: its sound is aac, which cannot be copied.*extract it"):
            call()
    flac = pcm_video(tmp_path / "flac.mkv", "flac")
    with pytest.raises(ValueError, match=r"begins at 1\.5 s, and copied sound cannot be cut exactly"):
        copy_audio(flac, tmp_path / "out.flac", start_sec=1.5)
    with pytest.raises(ValueError, match=r"out\.wav: the sound of .* can only be copied into \.flac"):
        copy_audio(flac, tmp_path / "out.wav")
    with pytest.raises(ValueError, match="has no audio stream"):
        copy_audio(make_video(tmp_path / "silent.mp4", 1.0), tmp_path / "out.flac")
    late = pcm_video(tmp_path / "late.mkv", "flac", late_sec=0.3)
    with pytest.raises(ValueError, match="would not begin where the pictures do"):
        copy_audio(late, tmp_path / "out.flac")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["aac.mp4", "flac.mkv", "late.mkv", "silent.mp4"]


def test_a_header_that_promises_a_few_samples_too_many_is_no_damage(tmp_path):
    """FFmpeg writes such Ogg files when it copies Vorbis."""
    video = make_video(tmp_path / "v.mkv", 2.0, sound=noise(), rate=RATE, audio_codec="vorbis")
    with av.open(str(video)) as source, av.open(str(tmp_path / "out.ogg"), "w") as target:
        copy = target.add_stream_from_template(source.streams.audio[0])
        for packet in source.demux(source.streams.audio[0]):
            if packet.size:
                packet.stream = copy
                target.mux(packet)
    promised = soundfile.info(tmp_path / "out.ogg").frames
    found = read_audio(tmp_path / "out.ogg")[0].shape[1]
    assert promised - 0.05 * RATE < found <= promised and audio_length(tmp_path / "out.ogg") == (found, RATE)
