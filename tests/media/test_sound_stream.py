"""Sound in containers as they come: tracks, codecs, time stamps that jump or are missing, packets that are damaged."""

from __future__ import annotations

import re
import struct
from fractions import Fraction

import av
import numpy as np
import pytest
from make_media import click_time, clicks, make_video, picture_of

from selva.media import audio_blocks, audio_length, copied_audio_suffix, extract_audio, probe, read_audio, read_video

RATE = 16_000
READERS = {
    "read_audio": read_audio, "audio_length": audio_length, "audio_blocks": lambda path: list(audio_blocks(path)),
}


def pcm(level, seconds):
    """Return (1, samples) int16 of a constant."""
    return np.full((1, round(seconds * RATE)), round(level * 32768), dtype=np.int16)


def write(path, pieces, pictures=True, tracks=1, default=None, codec="pcm_s16le", container_format=None):
    """Write 2 s of pictures and ``pieces``, (track, seconds, (1, samples) int16), in the order given."""
    with av.open(str(path), "w", format=container_format) as file:
        video = None
        if pictures:
            video = file.add_stream("libx264", rate=25)
            video.width, video.height, video.pix_fmt = 64, 64, "yuv420p"
        sounds = [file.add_stream(codec, rate=RATE, layout="mono") for _ in range(tracks)]
        if default is not None:
            for index, sound in enumerate(sounds):
                sound.disposition = av.stream.Disposition.default if index == default else av.stream.Disposition(0)
        for track, seconds, samples in pieces:
            frame = av.AudioFrame.from_ndarray(samples, format="s16", layout="mono")
            frame.sample_rate, frame.pts, frame.time_base = RATE, round(seconds * RATE), Fraction(1, RATE)
            file.mux(sounds[track].encode(frame))
        for sound in sounds:
            file.mux(sound.encode(None))
        if video is not None:
            for index in range(50):
                file.mux(video.encode(av.VideoFrame.from_ndarray(picture_of(index), format="rgb24")))
            file.mux(video.encode(None))
    return path


def rewrite(source, target, change, container_format=None):
    """Copy the packets of the sound; ``change(index, data)`` gives the bytes of each."""
    with av.open(str(source)) as old, av.open(str(target), "w", format=container_format) as new:
        stream = old.streams.audio[0]
        copy = new.add_stream_from_template(stream)
        packets = [packet for packet in old.demux(stream) if packet.size]
        for index, packet in enumerate(packets):
            changed = av.Packet(change(index, bytes(packet)))
            changed.pts, changed.dts, changed.duration = packet.pts, packet.dts, packet.duration
            changed.time_base, changed.stream = packet.time_base, copy
            new.mux(changed)
    return len(packets)


# -- tracks and codecs ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".mkv", ".mov"])
def test_the_default_track_is_taken_and_said_once(suffix, tmp_path, caplog):
    pieces = [(0, 0, pcm(0.01, 2)), (1, 0, pcm(0.5, 2)), (2, 0, pcm(0.25, 2))]
    path = write(tmp_path / f"v{suffix}", pieces, tracks=3, default=1)
    assert read_audio(path)[0].max().item() == 0.5
    assert read_audio(path, 1.5)[0].max().item() == 0.5
    extract_audio(path, tmp_path / "v.flac")
    assert read_audio(tmp_path / "v.flac")[0].max().item() == 0.5
    assert caplog.text.count("has 3 sound tracks; number 2") == 1


def test_one_track_is_no_remark(tmp_path, caplog):
    read_audio(make_video(tmp_path / "v.mp4", 1.0, sound=clicks([0.5], 1.0)))
    assert not caplog.records


def test_a_codec_without_a_decoder_is_refused_by_name(tmp_path):
    path = write(tmp_path / "v.mov", [(0, 0, pcm(0.5, 2))])
    data = path.read_bytes()
    assert data.count(b"sowt") == 1
    path.write_bytes(data.replace(b"sowt", b"ac-4"))
    assert probe(path).streams.count("audio") == 1 and probe(path).audio_rate is None
    for read in (*READERS.values(), copied_audio_suffix, lambda path: extract_audio(path, tmp_path / "v.flac")):
        with pytest.raises(ValueError, match=r"v\.mov: its audio codec is not supported"):
            read(path)


def test_a_track_that_can_be_decoded_goes_before_one_that_cannot(tmp_path):
    path = write(tmp_path / "v.mov", [(0, 0, pcm(0.25, 2)), (1, 0, pcm(0.5, 2))], tracks=2, default=0)
    data = path.read_bytes()
    first = data.rindex(b"sowt", 0, data.rindex(b"sowt"))
    path.write_bytes(data[:first] + b"ac-4" + data[first + 4 :])
    assert read_audio(path)[0].max().item() == 0.5


def test_sound_that_leads_the_pictures_is_left_out_by_name(tmp_path, caplog):
    path = write_late_pictures(tmp_path / "v.ts", 0.5)
    sound, rate = read_audio(path)
    assert sound.shape[1] / rate == pytest.approx(1.5, abs=0.1)
    said = r"v\.ts: its sound begins 0\.[45]\d s before its pictures; that part is left out"
    assert re.search(said, caplog.text)
    caplog.clear()
    read_audio(path, 0.5)
    read_audio(write_late_pictures(tmp_path / "w.ts", 0.04))
    assert "before its pictures" not in caplog.text


def write_late_pictures(path, late_sec):
    """Write 2 s of sound and, from ``late_sec`` on, of pictures."""
    with av.open(str(path), "w") as file:
        video, sound = file.add_stream("mpeg4", rate=25), file.add_stream("mp2", rate=RATE, layout="mono")
        video.width, video.height, video.pix_fmt = 64, 64, "yuv420p"
        frame = av.AudioFrame.from_ndarray(pcm(0.5, 2), format="s16", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = RATE, 0, Fraction(1, RATE)
        packets = [*sound.encode(frame), *sound.encode(None)]
        for index in range(50):
            picture = av.VideoFrame.from_ndarray(picture_of(index), format="rgb24")
            picture.pts, picture.time_base = index + round(late_sec * 25), Fraction(1, 25)
            packets += video.encode(picture)
        packets += video.encode(None)
        for packet in sorted(packets, key=lambda packet: packet.dts * packet.time_base):
            file.mux(packet)
    return path


# -- time stamps ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pictures", [True, False])
@pytest.mark.parametrize("reader", READERS)
def test_a_jump_in_the_time_stamps_is_an_error_by_name(reader, pictures, tmp_path):
    path = write(tmp_path / "v.mkv", [(0, 0, pcm(0.5, 1)), (0, 90_000, pcm(0.5, 1))], pictures)
    with pytest.raises(ValueError, match=r"v\.mkv: the time stamps of its sound jump from 1\.00 s to 90000\.00 s"):
        READERS[reader](path)
    assert read_audio(path, 0.25, 0.5)[0].shape == (1, RATE // 2)  # before it, all is well


def test_joined_videos_are_an_error_by_name(tmp_path):
    """What belongs to which pictures cannot be known where the time stamps start again."""
    one = write(tmp_path / "a.ts", [(0, 0.5, pcm(0.5, 3))], codec="mp2", container_format="mpegts").read_bytes()
    (tmp_path / "b.ts").write_bytes(one * 2)
    read_audio(tmp_path / "a.ts")
    with pytest.raises(ValueError, match=r"b\.ts: the time stamps of its sound jump from 3\.\d\d s to "):
        read_audio(tmp_path / "b.ts")


def test_joined_sound_goes_on(tmp_path):
    """Without pictures nothing depends on the time stamps; the samples are in order."""
    one = write(tmp_path / "a.ts", [(0, 0, pcm(0.5, 3))], False, codec="mp2", container_format="mpegts").read_bytes()
    (tmp_path / "b.ts").write_bytes(one * 2)
    single, both = read_audio(tmp_path / "a.ts")[0], read_audio(tmp_path / "b.ts")[0]
    assert both.shape[1] == 2 * single.shape[1]
    assert read_audio(tmp_path / "b.ts", 4.0, 1.0)[0].mean().item() == pytest.approx(0.5, abs=0.05)


def test_no_more_silence_than_was_asked_for(tmp_path, caplog):
    path = write(tmp_path / "v.mkv", [(0, 1.5, pcm(0.5, 1))])
    waveform, _ = read_audio(path, 0.0, 0.75)
    assert waveform.shape == (1, RATE * 3 // 4) and waveform.abs().max() == 0
    path = write(tmp_path / "w.mkv", [(0, 0, pcm(0.5, 1)), (0, 9, pcm(0.5, 1))])
    assert read_audio(path, 0.0, 2.0)[0].shape == (1, 2 * RATE)
    assert read_audio(path)[0].shape == (1, 10 * RATE)
    assert "w.mkv: its time stamps leave gaps of 8.00 s, which are filled with silence" in caplog.text


def test_sound_alone_in_a_transport_stream_keeps_its_beginning(tmp_path):
    path = write(tmp_path / "a.ts", [(0, 1.5, pcm(0.5, 3))], False, codec="mp2", container_format="mpegts")
    with av.open(str(path)) as file:
        assert file.streams[0].start_time * file.streams[0].time_base > 1
    waveform, _ = read_audio(path)
    assert waveform.shape[1] / RATE == pytest.approx(3.0, abs=0.08)
    assert audio_length(path)[0] == waveform.shape[1] == sum(b.shape[1] for b, _ in audio_blocks(path))


@pytest.mark.parametrize("pictures", [True, False])
def test_packets_of_several_frames_without_time_stamps(pictures, tmp_path):
    """Only the first frame of a WMA packet has a time stamp."""
    seconds = np.arange(4 * 44_100) / 44_100
    sound = np.stack([0.5 * np.sin(2 * np.pi * (200 + 100 * seconds) * seconds)] * 2).astype(np.float32)
    with av.open(str(tmp_path / "a.wma"), "w", format="asf") as file:
        video = None
        if pictures:
            video = file.add_stream("wmv2", rate=25)
            video.width, video.height, video.pix_fmt = 64, 64, "yuv420p"
        stream = file.add_stream("wmav2", rate=44_100, layout="stereo")
        stream.bit_rate = 64_000
        frame = av.AudioFrame.from_ndarray(sound, format="fltp", layout="stereo")
        frame.sample_rate, frame.pts, frame.time_base = 44_100, 0, Fraction(1, 44_100)
        file.mux([*stream.encode(frame), *stream.encode(None)])
        for index in range(100) if video is not None else ():
            file.mux(video.encode(av.VideoFrame.from_ndarray(picture_of(index), format="rgb24")))
        if video is not None:
            file.mux(video.encode(None))
    with av.open(str(tmp_path / "a.wma")) as file:
        assert None in [frame.pts for frame in file.decode(audio=0)]
    waveform, rate = read_audio(tmp_path / "a.wma")
    assert waveform.shape[1] / rate == pytest.approx(4.0, abs=0.15)
    level = waveform[0].reshape(-1)[: waveform.shape[1] // 4410 * 4410].reshape(-1, 4410).abs().amax(dim=1)
    assert level[2:-3].min() > 0.3  # no hole
    assert audio_length(tmp_path / "a.wma")[0] == waveform.shape[1]


def test_a_seek_that_fails_starts_again(tmp_path):
    """An AVI whose index calls no packet of the sound a key frame cannot be sought."""
    sound = clicks([2.5], 4.0, 48_000)
    path = make_video(tmp_path / "v.avi", 4.0, sound=sound, rate=48_000, codec="mpeg4", audio_codec="libmp3lame")
    data = bytearray(path.read_bytes())
    at = data.rindex(b"idx1")
    for entry in range(at + 8, at + 8 + struct.unpack_from("<I", data, at + 4)[0], 16):
        if data[entry : entry + 4] == b"01wb":
            data[entry + 4 : entry + 8] = bytes(4)
    path.write_bytes(data)
    whole, rate = read_audio(path)
    part, _ = read_audio(path, 2.0, 1.0)
    assert part.shape == (1, rate)
    assert (part - whole[:, 2 * rate : 3 * rate]).abs().max() < 1e-3


# -- damaged packets --------------------------------------------------------------------------------------------------


def noise(tmp_path, codec="alac", seconds=5.0):
    """Write noise in packets that do not depend on one another (4096 samples of ALAC); return the file."""
    sound = np.random.default_rng(0).standard_normal((1, round(seconds * 48_000))).astype(np.float32) * 0.1
    with av.open(str(tmp_path / "good.mka"), "w") as file:
        stream = file.add_stream(codec, rate=48_000, layout="mono")
        resampler = av.AudioResampler(format=stream.codec_context.format, layout="mono", rate=48_000)
        frame = av.AudioFrame.from_ndarray(sound, format="fltp", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = 48_000, 0, Fraction(1, 48_000)
        for converted in resampler.resample(frame):
            file.mux(stream.encode(converted))
        file.mux(stream.encode(None))
    return tmp_path / "good.mka"


@pytest.mark.parametrize(
    ("bad", "byte"),  # 0xFF makes an ALAC packet without sound, but no error
    [({30}, b"U"), ({30}, b"\xff"), ({0}, b"U"), ({0, 1, 20, 21, 22, 40}, b"U"), ({20, 21, 22, 40}, b"\xff"),
     ({57, 58}, b"U"), ({57, 58}, b"\xff")],
)
def test_packets_that_cannot_be_decoded_become_silence(bad, byte, tmp_path, caplog):
    good = noise(tmp_path)
    count = rewrite(good, tmp_path / "bad.mka", lambda index, data: byte * len(data) if index in bad else data)
    expected, _ = read_audio(good)
    assert not caplog.records
    waveform, _ = read_audio(tmp_path / "bad.mka")
    assert f"({len(bad)} of {count} packets" in caplog.text and "cannot be decoded" in caplog.text
    shift = 24 if 0 in bad else 0  # of the first time stamp, rounded to milliseconds
    assert waveform.shape[1] == pytest.approx(expected.shape[1], abs=shift + (2500 if 58 in bad else 0))
    silent = (waveform[0] == 0).reshape(-1)
    assert silent.sum().item() == pytest.approx(len(bad) * 4096, abs=shift + (2500 if 58 in bad else 50))
    start = 6 * 4096  # what follows is where it was
    end = min(waveform.shape[1], expected.shape[1]) - 100
    offset = min(range(-shift, shift + 1), key=lambda n: same(waveform, expected, start, end, n))
    assert same(waveform, expected, start, end, offset) < 1e-4
    assert audio_length(tmp_path / "bad.mka")[0] == waveform.shape[1]


def same(waveform, expected, start, end, offset):
    """Return the largest difference of the samples that are not silent."""
    found = waveform[0, start + offset : end + offset]
    return ((found - expected[0, start:end]).abs() * (found != 0)).max().item()


def test_gaps_that_damage_leaves_are_said(tmp_path, caplog):
    """FFmpeg takes zeros out of a stream of MP3 before anything is decoded."""
    good = noise(tmp_path, "libmp3lame")
    rewrite(good, tmp_path / "bad.mka", lambda index, data: bytes(len(data)) if index in (70, 90, 91) else data)
    read_audio(tmp_path / "bad.mka")
    assert "bad.mka: its time stamps leave gaps of 0.07 s, which are filled with silence" in caplog.text


def test_damage_outside_of_the_range_does_not_matter(tmp_path, caplog):
    good = noise(tmp_path)
    rewrite(good, tmp_path / "bad.mka", lambda index, data: b"U" * len(data) if index in (2, 50) else data)
    assert audio_length(tmp_path / "bad.mka") == audio_length(good)
    caplog.clear()
    waveform, _ = read_audio(tmp_path / "bad.mka", 2.0, 1.0)
    assert (waveform != 0).all() and not caplog.records


@pytest.mark.parametrize("byte", [b"U", b"\xff"])
@pytest.mark.parametrize("reader", READERS)
def test_too_much_damage_is_refused(reader, byte, tmp_path):
    good = noise(tmp_path)
    rewrite(good, tmp_path / "bad.mka", lambda index, data: byte * len(data) if index % 3 == 1 else data)
    with pytest.raises(ValueError, match=r"bad\.mka: damaged, .* \(3\d%\) of its sound cannot be .* at most 20%"):
        READERS[reader](tmp_path / "bad.mka")
    rewrite(good, tmp_path / "none.mka", lambda index, data: byte * len(data))
    with pytest.raises(ValueError, match=r"none\.mka: has an audio stream, but no sound could be decoded"):
        READERS[reader](tmp_path / "none.mka")


@pytest.mark.parametrize("codec", ["vorbis", "libopus"])
@pytest.mark.parametrize("page", [-1, -2])
def test_empty_packets_are_skipped(codec, page, tmp_path):
    """Ogg can hold packets of no bytes, which FFmpeg's decoders, or its demuxer, take for an error."""
    if not {codec, "libvpx"} <= av.codecs_available:
        pytest.skip(f"this PyAV has no {codec} or libvpx")
    path = tmp_path / "a.ogv"
    with av.open(str(path), "w", options={"page_duration": "200000"}) as file:
        video = file.add_stream("libvpx", rate=25)
        video.width, video.height, video.pix_fmt = 64, 64, "yuv420p"
        stream = file.add_stream(codec, rate=48_000, layout="stereo", options={"strict": "-2"})
        frame = av.AudioFrame.from_ndarray(np.full((2, 96_000), 0.3, np.float32), format="fltp", layout="stereo")
        frame.sample_rate, frame.pts, frame.time_base = 48_000, 0, Fraction(1, 48_000)
        picture = av.VideoFrame.from_ndarray(picture_of(0), format="rgb24")
        file.mux([*video.encode(picture), *video.encode(None)])
        resampler = av.AudioResampler(format=stream.codec_context.format, layout="stereo", rate=48_000)
        for converted in resampler.resample(frame):
            file.mux(stream.encode(converted))
        file.mux(stream.encode(None))
    whole, _ = read_audio(path)
    path.write_bytes(with_empty_packet(path.read_bytes(), page))
    waveform, rate = read_audio(path)
    assert waveform.shape[1] / rate == pytest.approx(2.0, abs=0.03) and abs(waveform.shape[1] - whole.shape[1]) <= 256
    assert audio_length(path) == (waveform.shape[1], rate)


@pytest.mark.parametrize("codec", ["vorbis", "libopus"])
@pytest.mark.parametrize("first", ["pictures", "sound"])
def test_the_order_of_the_streams_of_an_ogg_video_moves_no_sound(codec, first, tmp_path):
    if not {codec, "libvpx"} <= av.codecs_available:
        pytest.skip(f"this PyAV has no {codec} or libvpx")
    path = tmp_path / "a.ogv"
    with av.open(str(path), "w") as file:
        streams = {}
        for kind in ("pictures", "sound") if first == "pictures" else ("sound", "pictures"):
            streams[kind] = (file.add_stream("libvpx", rate=25) if kind == "pictures" else file.add_stream(
                codec, rate=48_000, layout="stereo", options={"strict": "-2"}))
        video, stream = streams["pictures"], streams["sound"]
        video.width, video.height, video.pix_fmt = 64, 64, "yuv420p"
        for number in range(50):
            file.mux(video.encode(av.VideoFrame.from_ndarray(picture_of(number), format="rgb24")))
        frame = av.AudioFrame.from_ndarray(clicks([0.5], 1.25, 48_000, 2), format="fltp", layout="stereo")
        frame.sample_rate, frame.pts, frame.time_base = 48_000, 36_000, Fraction(1, 48_000)  # begins at 0.75 s
        resampler = av.AudioResampler(format=stream.codec_context.format, layout="stereo", rate=48_000)
        for converted in resampler.resample(frame):
            file.mux(stream.encode(converted))
        file.mux([*stream.encode(None), *video.encode(None)])
    waveform, rate = read_audio(path)
    assert click_time(waveform, rate) == pytest.approx(1.25, abs=0.01)
    assert click_time(read_audio(path, 1.0)[0], rate) == pytest.approx(0.25, abs=0.01)
    assert audio_length(path) == (waveform.shape[1], rate)


def with_empty_packet(data, index):
    """Return an Ogg file with one more packet, of no bytes, at the end of one of its pages."""
    starts = [at for at in range(len(data)) if data.startswith(b"OggS", at)] + [len(data)]
    start, end = starts[index - 1], starts[index]
    page = bytearray(data[start:end])
    page[26] += 1
    page[27 + page[26] - 1 : 27 + page[26] - 1] = b"\0"  # the last entry of its table of sizes
    page[22:26] = bytes(4)
    checksum = 0
    for byte in page:
        checksum ^= byte << 24
        for _ in range(8):
            checksum = (checksum << 1 ^ (0x04C11DB7 if checksum & 0x80000000 else 0)) & 0xFFFFFFFF
    page[22:26] = struct.pack("<I", checksum)
    return data[:start] + bytes(page) + data[end:]


@pytest.mark.parametrize("name, codec, sound_codec", [("a.wmv", "wmv2", "mp3"), ("a.avi", "mpeg4", "mp2"),
                                                      ("a.flv", "flv1", "mp3")])
def test_a_video_whose_header_alone_knows_its_end_was_cut_short(name, codec, sound_codec, tmp_path, caplog):
    """FFmpeg drops what the headers of such files promise, once they are shorter than they say."""
    path = make_video(tmp_path / name, 6.0, sound=clicks([1.0], 6.0, 44_100), rate=44_100, codec=codec,
                      audio_codec=sound_codec)
    read_audio(path)
    read_video(path, 6.0)
    assert not caplog.text
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * 0.6)])
    if name == "a.flv":  # of which nobody knows how true it is
        read_audio(path)
        assert "its header says 6.0" in caplog.text and "it may have been cut short" in caplog.text
        return
    with pytest.raises(ValueError, match=r"ends after \d\.\d\d s of [56]\.\d\d s: cut short or damaged"):
        read_audio(path)
    with pytest.raises(ValueError, match=r"cut short or damaged|damaged after"):
        read_video(path, 6.0)
