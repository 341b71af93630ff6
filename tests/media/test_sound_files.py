"""Sound files as they come: how long they are, whether they were cut short, and that reading gives just that length."""

from __future__ import annotations

import io
import struct
from fractions import Fraction

import av
import numpy as np
import pytest
import soundfile
import torch

from selva.media import audio_blocks, audio_length, read_audio

RATE = 48_000


def noise(seconds, level=0.3, channels=1, seed=0):
    """Return (channels, samples) float32 of noise without high frequencies."""
    walk = np.cumsum(np.random.default_rng(seed).standard_normal((channels, round(seconds * RATE) + 50)), axis=1)
    band = walk[:, 50:] - walk[:, :-50]
    return (band / np.abs(band).max() * level).astype(np.float32)


def loud_then_quiet(seconds):
    """Return sound whose encoded size per second changes, so that a guess by the bit rate is wrong."""
    half = seconds / 2
    rng = np.random.default_rng(0)
    return np.concatenate([rng.standard_normal((1, round(half * RATE))).astype(np.float32) * 0.2,
                           noise(half, 0.001)], axis=1)


def encode(path, codec, sound, container_format=None, start=0, bit_rate=None, rate=RATE):
    """Write (channels, samples) as a file without pictures; the first sample has the time stamp ``start``."""
    layout = "mono" if len(sound) == 1 else "stereo"
    with av.open(str(path), "w", format=container_format) as file:
        stream = file.add_stream(codec, rate=rate, layout=layout)
        if bit_rate:
            stream.bit_rate = bit_rate
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(sound), format="fltp", layout=layout)
        frame.sample_rate, frame.pts, frame.time_base = rate, start, Fraction(1, rate)
        file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    return path


def mp3(sound, **options):
    buffer = io.BytesIO()
    soundfile.write(buffer, sound.T, RATE, format="MP3", **options)
    return buffer.getvalue()


def vbr_without_xing(sound):
    data = mp3(sound, bitrate_mode="VARIABLE", compression_level=0.5)
    assert data.find(b"Xing") == 21
    return data[data.find(data[:2], 100) :]


def ogg(sound, subtype):
    buffer = io.BytesIO()
    soundfile.write(buffer, sound.T, RATE, format="OGG", subtype=subtype)
    return buffer.getvalue()


def flac_with_total(sound, total):
    """Return a FLAC whose header claims ``total`` samples; 0 stands for unknown, as in a file from a pipe."""
    buffer = io.BytesIO()
    soundfile.write(buffer, sound.T, RATE, format="FLAC")
    data = bytearray(buffer.getvalue())
    data[21] = data[21] & 0xF0 | total >> 32
    data[22:26] = struct.pack(">I", total & 0xFFFFFFFF)
    return bytes(data)


def check_length(path, seconds, abs=0.06):
    """Check that everything that knows the length of a file says the same, and that parts are parts of the whole."""
    whole, rate = read_audio(path)
    assert whole.shape[1] / rate == pytest.approx(seconds, abs=abs)
    assert audio_length(path) == (whole.shape[1], rate)
    assert sum(block.shape[1] for block, _ in audio_blocks(path, 0.7)) == whole.shape[1]
    for start in (0.25, seconds - 1.7):
        assert read_audio(path, start)[0].shape[1] == whole.shape[1] - round(start * rate)
        part = read_audio(path, start, 0.5)[0]
        torch.testing.assert_close(part, whole[:, round(start * rate) :][:, : part.shape[1]], atol=1e-3, rtol=0)
    return whole, rate


# -- length -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["xing", "no xing", "joined", "joined without xing"])
def test_an_mp3_is_as_long_as_its_frames(kind, tmp_path):
    sound = loud_then_quiet(6.0)
    data = vbr_without_xing(sound) if "no xing" in kind or "without" in kind else mp3(sound)
    (tmp_path / "a.mp3").write_bytes(data * 2 if "joined" in kind else data)
    check_length(tmp_path / "a.mp3", 12.0 if "joined" in kind else 6.0, 0.12)


@pytest.mark.parametrize("count", [1, 2])
def test_an_adts_file_is_as_long_as_its_frames(count, tmp_path):
    data = encode(tmp_path / "one.aac", "aac", loud_then_quiet(4.0), "adts").read_bytes()
    (tmp_path / "a.aac").write_bytes(data * count)
    whole, rate = read_audio(tmp_path / "a.aac")
    assert whole.shape[1] / rate == pytest.approx(4.0 * count, abs=0.1)
    assert audio_length(tmp_path / "a.aac") == (whole.shape[1], rate)
    assert read_audio(tmp_path / "a.aac", 3.0)[0].shape[1] == whole.shape[1] - 3 * rate


def test_a_flac_without_a_count_of_samples(tmp_path):
    sound = noise(3.0)
    (tmp_path / "a.flac").write_bytes(flac_with_total(sound, 0))
    whole, _ = check_length(tmp_path / "a.flac", 3.0, 0)
    torch.testing.assert_close(whole, torch.from_numpy(sound), atol=2**-15, rtol=0)


@pytest.mark.parametrize("total", [200_000, (1 << 36) - 1])
def test_a_flac_that_promises_too_many_samples_is_refused_without_memory_for_them(total, tmp_path):
    (tmp_path / "a.flac").write_bytes(flac_with_total(noise(3.0), total))
    for read in (read_audio, audio_length, lambda path: list(audio_blocks(path))):
        with pytest.raises(ValueError, match=r"a\.flac: (ends after 3\.00 s|damaged)"):
            read(tmp_path / "a.flac")


@pytest.mark.parametrize("at_share", [0.1, 0.5, 0.9])
def test_a_damaged_frame_of_a_flac_becomes_silence(at_share, tmp_path, caplog):
    sound = noise(4.0)
    soundfile.write(tmp_path / "a.flac", sound.T, RATE)
    data = bytearray((tmp_path / "a.flac").read_bytes())
    at = int(len(data) * at_share)
    data[at : at + 500] = np.random.default_rng(0).bytes(500)
    (tmp_path / "a.flac").write_bytes(data)
    whole, _ = read_audio(tmp_path / "a.flac")
    assert "a.flac: damaged after" in caplog.text and "silence" in caplog.text
    assert whole.shape == sound.shape and audio_length(tmp_path / "a.flac") == (4 * RATE, RATE)
    wrong = np.flatnonzero((whole.numpy() != np.round(sound * 32768) / 32768)[0])
    assert 0 < len(wrong) <= 4 * 4096 and np.ptp(wrong) < 4 * 4096
    assert (whole[0, wrong] == 0).all()
    torch.testing.assert_close(torch.cat([b for b, _ in audio_blocks(tmp_path / "a.flac", 0.7)], dim=1), whole)
    assert read_audio(tmp_path / "a.flac", 0.5, 3.2)[0].shape == (1, round(3.2 * RATE))


@pytest.mark.parametrize("subtype", ["VORBIS", "OPUS"])
def test_chained_ogg_is_read_to_its_end(subtype, tmp_path):
    """Each of the streams counts from 0."""
    (tmp_path / "a.ogg").write_bytes(ogg(noise(3.0), subtype) + ogg(noise(2.0, seed=1), subtype))
    check_length(tmp_path / "a.ogg", 5.0)


@pytest.mark.parametrize(
    ("name", "codec", "late"),
    [("a.m4a", "aac", 0), ("a.m4a", "alac", 0), ("late.m4a", "alac", 20_000), ("late.m4a", "aac", 20_000),
     ("a.mka", "flac", 0), ("late.mka", "flac", 20_000), ("a.ts", "mp2", 0), ("a.ac3", "ac3", 0),
     ("a.wma", "wmav2", 0)],
)
def test_the_length_is_what_reading_gives(name, codec, late, tmp_path):
    """Also of sound that starts late: without pictures it begins with its first sample."""
    path = encode(tmp_path / name, codec, noise(4.0, channels=2), start=late, bit_rate=128_000)
    whole, rate = read_audio(path)
    assert whole.shape[1] / rate == pytest.approx(4.0, abs=0.1)
    assert whole[:, : rate // 4].abs().max() > 0.01
    assert audio_length(path) == (whole.shape[1], rate)
    assert sum(block.shape[1] for block, _ in audio_blocks(path, 0.7)) == whole.shape[1]
    for start in (0.3, 2.6):
        assert read_audio(path, start)[0].shape[1] == whole.shape[1] - round(start * rate)


def test_the_length_of_a_file_that_was_replaced_is_counted_anew(tmp_path):
    path = encode(tmp_path / "a.m4a", "alac", noise(1.0))
    assert audio_length(path) == (RATE, RATE)
    encode(tmp_path / "a.m4a", "alac", noise(2.0))
    assert audio_length(path) == (2 * RATE, RATE)


# -- cut short --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.5, 0.93])
@pytest.mark.parametrize(
    ("kind", "subtype"),
    [("WAV", "PCM_16"), ("WAV", "PCM_24"), ("WAV", "FLOAT"), ("WAV", "ULAW"), ("WAV", "IMA_ADPCM"), ("WAVEX", "PCM_16"),
     ("AIFF", "PCM_16"), ("AIFF", "FLOAT"), ("RF64", "PCM_16"), ("W64", "PCM_16"), ("AU", "PCM_16"),
     ("FLAC", "PCM_16")],
)
def test_a_file_that_was_cut_short_is_refused(kind, subtype, share, tmp_path):
    path = tmp_path / ("a.aiff" if kind == "AIFF" else "a.wav")
    soundfile.write(path, noise(4.0, channels=2).T, RATE, format=kind, subtype=subtype)
    check_length(path, 4.0)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    for read in (read_audio, audio_length, lambda path: list(audio_blocks(path))):
        with pytest.raises(ValueError, match=r"(ends after \d\.\d\d s of 4\.0\d s: cut short|damaged)"):
            read(path)
    if kind != "FLAC":
        assert read_audio(path, 0.5, 1.0)[0].shape == (2, RATE)  # what is there can be used
        with pytest.raises(ValueError, match="cut short"):
            read_audio(path, 3.8, 0.1)


@pytest.mark.parametrize("size", [0, 0xFFFFFFFF, 0xFFFFFFFF - 36, 0x7FFFF000, 0x7FFFFFFF - 36, 0x80000000])
def test_a_wav_from_a_pipe_promises_nothing(size, tmp_path):
    sound = noise(2.0)
    soundfile.write(tmp_path / "a.wav", sound.T, RATE, subtype="PCM_16")
    data = bytearray((tmp_path / "a.wav").read_bytes())
    at = data.index(b"data") + 4
    data[4:8], data[at : at + 4] = struct.pack("<I", min(size + 36, 0xFFFFFFFF)), struct.pack("<I", size)
    (tmp_path / "a.wav").write_bytes(data)
    check_length(tmp_path / "a.wav", 2.0, 0)


@pytest.mark.parametrize("kind", ["RF64", "BW64"])
def test_an_rf64_whose_size_was_never_filled_in_is_read_to_its_end(kind, tmp_path):
    """So FFmpeg writes it into a pipe, and a recorder that loses power leaves it."""
    samples = np.frombuffer((noise(1.0).T * 32767).astype("<i2").tobytes(), dtype=np.uint8).tobytes()
    fmt = b"fmt " + (16).to_bytes(4, "little") + np.array([1, 1, RATE & 0xFFFF, RATE >> 16, (2 * RATE) & 0xFFFF,
                                                          (2 * RATE) >> 16, 2, 16], dtype="<u2").tobytes()
    head = kind.encode() + b"\xff" * 4 + b"WAVEds64" + (28).to_bytes(4, "little") + bytes(28) + fmt
    (tmp_path / "long.wav").write_bytes(head + b"data" + b"\xff" * 4 + samples)
    waveform, rate = read_audio(tmp_path / "long.wav")
    assert (waveform.shape[1], rate) == (len(samples) // 2, RATE)
    assert audio_length(tmp_path / "long.wav") == (len(samples) // 2, RATE)


@pytest.mark.parametrize("kind", ["half counted", "joined", "joined aiff"])
def test_sound_that_a_header_does_not_count_is_said(kind, tmp_path, caplog):
    path = tmp_path / ("a.aiff" if "aiff" in kind else "a.wav")
    soundfile.write(path, noise(2.0).T, RATE, subtype="PCM_16")
    content = bytearray(path.read_bytes())
    if kind == "half counted":
        at = content.find(b"data") + 4
        content[at : at + 4] = (int.from_bytes(content[at : at + 4], "little") // 2).to_bytes(4, "little")
    else:
        content = content * 2
    path.write_bytes(content)
    read_audio(path)
    assert f"{path}: goes on after the sound that its header counts, by 100 % of it, which is not read" in caplog.text


@pytest.mark.parametrize("rest", [b"LIST" + (20_000).to_bytes(4, "little") + bytes(20_000), bytes(100_000),
                                  b"\xff" * 5000])
def test_remarks_and_padding_after_a_sound_are_no_sound(rest, tmp_path, caplog):
    soundfile.write(tmp_path / "a.wav", noise(2.0).T, RATE, subtype="PCM_16")
    with open(tmp_path / "a.wav", "ab") as file:
        file.write(rest)
    read_audio(tmp_path / "a.wav")
    assert not caplog.text


@pytest.mark.parametrize("subtype", ["VORBIS", "OPUS"])
def test_an_ogg_that_ends_within_a_page_was_cut_short(subtype, tmp_path, caplog):
    data = ogg(noise(4.0), subtype)
    (tmp_path / "a.ogg").write_bytes(data)
    check_length(tmp_path / "a.ogg", 4.0)
    (tmp_path / "a.ogg").write_bytes(data[: len(data) // 2])
    for read in (read_audio, audio_length, lambda path: list(audio_blocks(path))):
        with pytest.raises(ValueError, match=r"a\.ogg: ends after \d\.\d\d s: cut short"):
            read(tmp_path / "a.ogg")
    assert read_audio(tmp_path / "a.ogg", 0.0, 0.5)[0].shape == (1, RATE // 2)
    assert not caplog.records
    (tmp_path / "a.ogg").write_bytes(data[: data.rindex(b"OggS")])  # whole pages, but without the last
    read_audio(tmp_path / "a.ogg")
    assert "a.ogg: its last page is not marked as the end; it may have been cut short after" in caplog.text


def test_an_adts_file_that_ends_within_a_frame_was_cut_short(tmp_path):
    data = encode(tmp_path / "a.aac", "aac", noise(4.0), "adts").read_bytes()
    (tmp_path / "a.aac").write_bytes(data[: len(data) // 2])
    for read in (read_audio, audio_length, lambda path: list(audio_blocks(path))):
        with pytest.raises(ValueError, match=r"a\.aac: ends after [12]\.\d\d s: cut short"):
            read(tmp_path / "a.aac")


# -- refused by name --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.raw", "a.RAW", "a.vox"])
def test_samples_without_a_header_are_refused_by_name(name, tmp_path):
    (tmp_path / name).write_bytes(np.random.default_rng(0).bytes(10_000))
    for read in (read_audio, audio_length, lambda path: list(audio_blocks(path))):
        with pytest.raises(ValueError, match=rf"{name}: "):
            read(tmp_path / name)
