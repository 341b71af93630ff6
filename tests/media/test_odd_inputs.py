"""Videos as they come: containers, codecs, pixel formats, sizes, time stamps, missing streams."""

from __future__ import annotations

from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from make_media import click_time, clicks, make_video, numbers_in, picture_of

from selva.media import (
    SELVA_FILL_SEC,
    audio_blocks,
    audio_length,
    extract_audio,
    probe,
    read_audio,
    read_video,
    select_frames,
    video_length,
)
from selva.media import container as container_module


def write(
    path, codec, pictures, pix_fmt="yuv420p", stamps=None, time_base=None, full_range=False, options=None
):
    """Write RGB pictures, 25 per second or at ``stamps`` in units of ``time_base``, with full control of the format."""
    with av.open(str(path), "w") as file:
        stream = file.add_stream(codec, rate=25, options=options or {})
        stream.height, stream.width, stream.pix_fmt = *pictures[0].shape[:2], pix_fmt
        if full_range and pix_fmt != "rgb24":
            stream.codec_context.color_range = av.video.reformatter.ColorRange.JPEG
        if time_base is not None:
            stream.codec_context.time_base = time_base
        for index, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            if full_range:
                frame = frame.reformat(format=pix_fmt, dst_color_range=av.video.reformatter.ColorRange.JPEG)
            if stamps is not None:
                frame.pts, frame.time_base = stamps[index], time_base
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    return path


def counted(count, width=64, height=64):
    return [picture_of(index, width, height) for index in range(count)]


def shown_times(path):
    with av.open(str(path)) as file:
        return [float(frame.pts * frame.time_base) for frame in file.decode(video=0)]


# -- containers and codecs --------------------------------------------------------------------------------------------

KINDS = {
    "mp4 h264 aac": ("v.mp4", "libx264", "aac", {}),
    "mp4 h265 mp3": ("v.mp4", "libx265", "libmp3lame", {"x265-params": "log-level=none"}),
    "mp4 mpeg4 aac": ("v.m4v", "mpeg4", "aac", {}),
    "mov mjpeg pcm": ("v.mov", "mjpeg", "pcm_s16le", {"strict": "-2"}),
    "mkv h264 flac": ("v.mkv", "libx264", "flac", {}),
    "webm vp8 opus": ("v.webm", "libvpx", "libopus", {"b": "2M"}),
    "webm vp9 opus": ("v.webm", "libvpx-vp9", "libopus", {"b": "2M", "cpu-used": "8"}),
    "avi mpeg4 mp3": ("v.avi", "mpeg4", "libmp3lame", {}),
    "mpg mpeg2 mp2": ("v.mpg", "mpeg2video", "mp2", {"b": "4M"}),
    "ts h264 aac": ("v.ts", "libx264", "aac", {}),
    "flv h264 aac": ("v.flv", "libx264", "aac", {}),
    "wmv wmv2 mp3": ("v.wmv", "wmv2", "libmp3lame", {"b": "4M"}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_containers_and_codecs(kind, tmp_path):
    """Pictures and sound of a part in the middle come out in time, and the header tells how long the video is."""
    name, codec, audio_codec, options = KINDS[kind]
    if codec not in av.codecs_available or audio_codec not in av.codecs_available:
        pytest.skip(f"this PyAV has no {codec} or {audio_codec}")
    rate = 48_000
    path = make_video(tmp_path / name, 4.0, sound=clicks([2.5], 4.0, rate, channels=2), rate=rate, codec=codec,
                      audio_codec=audio_codec, options={"g": "10", **options})
    # Formats for broadcast begin at any stamp, which then is time 0; elsewhere the first picture is where it is.
    origin = 0.0 if path.suffix in (".ts", ".mpg") else shown_times(path)[0]
    video = read_video(path, 1.6, 1.6, clip_size=64, sync_size=64)
    assert video.duration_sec == 1.6 and video.source_fps == pytest.approx(25, rel=0.01)
    relative = [index / 25 + origin - 1.6 for index in range(100)]
    assert numbers_in(video.clip_frames) == pytest.approx(select_frames(relative, 8.0, 0.0, 1.6)[:12], abs=1)
    sound, rate = read_audio(path, 1.6, 1.6)
    assert click_time(sound, rate) == pytest.approx(0.9 + origin, abs=0.05)
    assert video_length(path) == pytest.approx(4.0, abs=0.15)
    assert probe(path).streams.count("video") == probe(path).streams.count("audio") == 1


STREAMED = {
    "mp4 in fragments": ("v.mp4", "libx264", "aac", {"movflags": "frag_keyframe+empty_moov+default_base_moof"}),
    "webm of a browser": ("v.webm", "libvpx", "libopus", {"live": "1"}),
}


@pytest.mark.parametrize("kind", STREAMED)
def test_streams_whose_header_was_written_before_they_ended(kind, tmp_path):
    name, codec, audio_codec, container_options = STREAMED[kind]
    if codec not in av.codecs_available or audio_codec not in av.codecs_available:
        pytest.skip(f"this PyAV has no {codec} or {audio_codec}")
    path = make_video(tmp_path / name, 4.0, sound=clicks([2.5], 4.0, 48_000), rate=48_000, codec=codec,
                      audio_codec=audio_codec, options={"g": "10"}, container_options=container_options)
    relative = [time - 1.6 for time in shown_times(path)]
    assert numbers_in(read_video(path, 1.6, 1.6, 64, 64).clip_frames) == select_frames(relative, 8.0, 0.0, 1.6)[:12]
    sound, rate = read_audio(path, 1.6, 1.6)
    assert click_time(sound, rate) == pytest.approx(0.9 + shown_times(path)[0], abs=0.03)
    assert video_length(path) == pytest.approx(4.0, abs=0.1)


def test_animations_are_videos(tmp_path):
    path = write(tmp_path / "v.gif", "gif", counted(75), "rgb8")
    assert numbers_in(read_video(path, 1.6, 0.8, 64, 64).clip_frames)[:3] == [20, 24, 27]


# -- pictures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(33, 47), (47, 33), (17, 301)])
def test_odd_sizes(size, tmp_path):
    width, height = size
    wide = np.zeros((height, width, 3), np.uint8)
    wide[:, width // 2 :] = 255
    path = write(tmp_path / "v.mp4", "libx264", [wide] * 25, "yuv444p")
    video = read_video(path, 0.8, clip_size=64, sync_size=32)
    assert video.source_size == (height, width)
    for frames in (video.clip_frames, video.sync_frames):
        edge = frames.shape[-1]
        assert frames[..., : edge // 2 - 3].max() < 30 and frames[..., edge // 2 + 3 :].min() > 225


RANGES = {
    "8 bits": ("libx264", "yuv420p", False),
    "8 bits, full range": ("libx264", "yuv420p", True),
    "8 bits, full range by its format": ("mjpeg", "yuvj420p", True),
    "10 bits": ("libx264", "yuv420p10le", False),
    "10 bits, full range": ("libx264", "yuv420p10le", True),
    "10 bits, 4:2:2": ("libx264", "yuv422p10le", False),
    "12 bits": ("libx265", "yuv420p12le", False),
    "RGB": ("libx264rgb", "rgb24", True),
    "lossless": ("ffv1", "yuv420p", False),
}


@pytest.mark.parametrize("kind", RANGES)
def test_levels_survive_every_pixel_format(kind, tmp_path):
    codec, pix_fmt, full_range = RANGES[kind]
    if codec not in av.codecs_available:
        pytest.skip(f"this PyAV has no {codec}")
    levels = [0, 16, 64, 128, 200, 235, 255, 255]
    picture = np.repeat(np.repeat(np.uint8(levels), 8)[None, :, None], 64, axis=0).repeat(3, axis=2)  # (64, 64, 3)
    options = {"crf": "4", "x265-params": "log-level=none"} if "libx26" in codec else {"qmin": "1", "qmax": "1"}
    try:
        path = write(tmp_path / "v.mkv", codec, [picture] * 25, pix_fmt, full_range=full_range, options=options)
    except (av.error.FFmpegError, ValueError) as error:
        pytest.skip(f"this PyAV cannot write it: {error}")
    with av.open(str(path)) as file:
        frame = next(file.decode(video=0))
        assert (frame.color_range == av.video.reformatter.ColorRange.JPEG) == full_range
    seen = read_video(path, 0.8, clip_size=64, sync_size=64).sync_frames[10].float()
    found = [seen[:, 8:-8, 8 * i + 2 : 8 * i + 6].mean().item() for i in range(8)]
    assert found == pytest.approx(levels, abs=6)


# -- time stamps ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_variable_frame_rate(suffix, tmp_path):
    """A phone: 30 fps, then a pause, then 12 fps with jitter."""
    steps = [33] * 30 + [400] + [83, 79, 90, 71] * 8
    stamps = np.concatenate([[0], np.cumsum(steps)]).tolist()
    path = write(tmp_path / f"v{suffix}", "libx264", counted(len(stamps)), stamps=stamps, time_base=Fraction(1, 1000))
    for start in (0.0, 0.9, 1.5):
        relative = [stamp / 1000 - start for stamp in stamps]
        video = read_video(path, 1.6, start, 64, 64)
        assert numbers_in(video.clip_frames) == select_frames(relative, 8.0, 0.0, 1.6)[: len(video.clip_frames)]
        assert numbers_in(video.sync_frames) == select_frames(relative, 25.0, 0.0, 1.6)[: len(video.sync_frames)]
        assert video.duration_sec >= 1.5  # the next frame may come after the end
        assert read_video(path, 1.6, start, 64, 64, fill_sec=SELVA_FILL_SEC).duration_sec == 1.6
    assert video_length(path) == pytest.approx(stamps[-1] / 1000, abs=0.1)


@pytest.mark.parametrize("more", [0, 1])
def test_a_pause_at_the_end_shortens_the_clip_with_a_warning(more, tmp_path, caplog):
    """A screen recording has no frames while nothing moves; the rule takes the first frame after each sample."""
    stamps = [40 * index for index in range(40)] + [4000, 4040][: 1 + more]
    path = write(tmp_path / "v.mkv", "libx264", counted(len(stamps)), stamps=stamps, time_base=Fraction(1, 1000))
    assert read_video(path, 1.2, 0.0, 64, 64).duration_sec == 1.2
    assert not caplog.text
    assert read_video(path, 3.0, 0.0, 64, 64).duration_sec == pytest.approx(1.6, abs=0.05)
    assert "no frame begins in the 1.44 s before 3.00 s" in caplog.text


def test_pictures_that_begin_late_and_earlier_than_0(tmp_path):
    """Time 0 is that of the file, so that the sound stays where it is."""
    stamps = [500 + 40 * index for index in range(75)]
    late = write(tmp_path / "late.mkv", "libx264", counted(75), stamps=stamps, time_base=Fraction(1, 1000))
    times = shown_times(late)
    assert times[0] == 0.5
    video = read_video(late, 1.6, 0.0, 64, 64)
    assert numbers_in(video.clip_frames) == select_frames(times, 8.0, 0.0, 1.6)[:12]  # the first one stands in
    assert numbers_in(read_video(late, 1.6, 0.8, 64, 64).clip_frames)[0] == 8
    assert video_length(late) == pytest.approx(3.5, abs=0.05)


def moved(source, path, late_sec, options=None):
    """Write the packets of a video into another file, all their time stamps moved by ``late_sec``."""
    options = {"avoid_negative_ts": "disabled", **(options or {})}
    with av.open(str(source)) as old, av.open(str(path), "w", options=options) as new:
        copies = {stream.index: new.add_stream_from_template(stream) for stream in old.streams}
        for packet in old.demux():
            if packet.size:
                late = round(Fraction(str(late_sec)) / packet.time_base)
                packet.pts, packet.dts = packet.pts + late, packet.dts + late
                packet.stream = copies[packet.stream.index]
                new.mux(packet)
    return path


def fragmented(source, path, late_sec):
    """As :func:`moved`, in fragments as streaming services send them."""
    flags = "dash+frag_keyframe+empty_moov+default_base_moof+delay_moov"
    return moved(source, path, late_sec, {"movflags": flags})


MOVED = {
    "wmv": ("wmv2", "libmp3lame"), "3gp": ("libx264", "aac"),
    "mp4": ("libx264", "aac"), "mov": ("libx264", "pcm_s16le"), "mkv": ("libx264", "flac"), "flv": ("libx264", "aac"),
    "webm": ("libvpx", "libopus"), "ts": ("libx264", "aac"),
}


@pytest.mark.parametrize("late_sec", [0.667, 60])
@pytest.mark.parametrize("kind", MOVED)
def test_a_file_whose_time_stamps_begin_late_is_the_same_clip(kind, late_sec, tmp_path):
    """Time 0 is the start of the container, for pictures and for sound; nothing is made up before it."""
    codec, audio_codec = MOVED[kind]
    if codec not in av.codecs_available or audio_codec not in av.codecs_available:
        pytest.skip(f"this PyAV has no {codec} or {audio_codec}")
    source = make_video(tmp_path / f"whole.{kind}", 3.0, sound=clicks([1.5], 3.0, 48_000), rate=48_000, codec=codec,
                        audio_codec=audio_codec, options={"g": "10", "b": "2M"})
    path = moved(source, tmp_path / f"late.{kind}", late_sec)
    with av.open(str(path)) as file:
        assert file.start_time / 1e6 > late_sec - 0.1
    priming_sec = 1024 / 48_000 + 0.001  # what a decoder may need before the first sample
    assert video_length(path) == pytest.approx(3.0, abs=0.05)
    assert audio_length(path)[0] / 48_000 == pytest.approx(3.0, abs=0.05) if kind in ("mp4", "mov", "mkv") else True
    for start in (0.0, 1.0):
        old, new = (read_video(one, 8.0, start, 64, 64, fill_sec=SELVA_FILL_SEC) for one in (source, path))
        assert new.duration_sec == pytest.approx(old.duration_sec, abs=priming_sec)
        assert numbers_in(new.clip_frames) == pytest.approx(numbers_in(old.clip_frames), abs=1)
        sound, rate = read_audio(path, start)
        assert click_time(sound, rate) == pytest.approx(1.5 - start, abs=0.03)
        assert sound.shape[1] / rate == pytest.approx(3.0 - start, abs=0.05)
    assert sum(len(block[0]) for block, _ in audio_blocks(path)) == read_audio(path)[0].shape[1]


@pytest.mark.parametrize("late_sec", [0, 0.667, 60])
def test_fragments_of_a_longer_stream(late_sec, tmp_path):
    source = make_video(tmp_path / "whole.mp4", 3.0, sound=clicks([1.5], 3.0, 48_000), rate=48_000, options={"g": "10"})
    path = fragmented(source, tmp_path / "late.mp4", late_sec)
    assert video_length(path) == pytest.approx(3.0, abs=0.03)
    sound, rate = read_audio(path, 1.0)
    assert click_time(sound, rate) == pytest.approx(0.5, abs=0.03)
    old, new = (read_video(one, 8.0, 1.0, 64, 64, fill_sec=SELVA_FILL_SEC) for one in (source, path))
    assert new.duration_sec == pytest.approx(2.0, abs=0.03)
    assert numbers_in(new.clip_frames) == pytest.approx(numbers_in(old.clip_frames), abs=1)


def test_a_frame_without_a_time_stamp_follows_the_one_before(tmp_path):
    """After a seek, B-frames in this container have none."""
    path = make_video(tmp_path / "v.wmv", 2.0, bframes=2, options={"g": "10"})
    video = read_video(path, 0.8, 1.0, 64, 64)
    assert video.duration_sec >= 0.72 and numbers_in(video.sync_frames)[0] in (23, 24, 25)


def test_late_pictures_without_sound(tmp_path):
    """Up to one sync segment they keep their stamps, as in the published extraction; beyond, time 0 is their start."""
    source = make_video(tmp_path / "whole.mkv", 3.0)
    late = moved(source, tmp_path / "late.mkv", 20)
    assert video_length(late) == pytest.approx(3.0)
    old, new = (read_video(path, 1.6, 0.8, 64, 64) for path in (source, late))
    assert numbers_in(new.sync_frames) == numbers_in(old.sync_frames) and numbers_in(new.sync_frames)[0] == 20


def test_the_length_that_mkvtoolnix_writes_counts_from_the_start(tmp_path):
    source = make_video(tmp_path / "whole.mkv", 3.0)
    with av.open(str(source)) as old, av.open(str(tmp_path / "late.mkv"), "w") as new:
        copy = new.add_stream_from_template(old.streams.video[0])
        copy.metadata["_STATISTICS_WRITING_APP"] = "mkvmerge v41.0.0"
        for packet in old.demux(video=0):
            if packet.size:
                packet.pts, packet.dts, packet.stream = packet.pts + 5000, packet.dts + 5000, copy
                new.mux(packet)
    content = (tmp_path / "late.mkv").read_bytes()
    assert content.count(b"00:00:08.0") == 1
    (tmp_path / "late.mkv").write_bytes(content.replace(b"00:00:08.0", b"00:00:03.0"))
    assert video_length(tmp_path / "late.mkv") == pytest.approx(3.0)


# -- streams ----------------------------------------------------------------------------------------------------------


def test_a_video_without_sound(tmp_path):
    path = make_video(tmp_path / "silent.mp4", 1.0)
    assert read_video(path, 0.8, 0.0, 32, 32).duration_sec == 0.8
    assert "audio" not in probe(path).streams
    with pytest.raises(ValueError, match=r"silent\.mp4: has no audio stream \(found: video\)"):
        extract_audio(path, tmp_path / "out.flac")
    assert not (tmp_path / "out.flac").exists()


def test_sound_without_pictures(tmp_path):
    path = tmp_path / "sound.m4a"
    with av.open(str(path), "w", format="mp4") as file:
        stream = file.add_stream("aac", rate=16_000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 16_000), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16_000
        file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    for reader in (read_video, video_length):
        with pytest.raises(ValueError, match=r"sound\.m4a: has no video stream \(found: audio\)"):
            reader(path)


# -- only what is needed ----------------------------------------------------------------------------------------------


def test_a_window_decodes_only_what_it_needs(tmp_path, monkeypatch):
    """Of 40 s with a key frame per second, 2 s are at most 3 s of frames; nothing before, nothing after."""
    path = make_video(tmp_path / "long.mp4", 40.0, 10, options={"g": "10"})
    decoded = []
    original = container_module.decode_frames

    def count(*args, **kwargs):
        for time, frame in original(*args, **kwargs):
            decoded.append(float(time))
            yield time, frame

    monkeypatch.setattr("selva.media.frames.decode_frames", count)
    video = read_video(path, 2.0, 30.5, 32, 32)
    assert len(video.sync_frames) == 50
    assert len(decoded) <= 31 and min(decoded) >= -1.0 and max(decoded) <= 2.0


def test_pictures_that_are_not_sampled_are_not_converted(tmp_path, monkeypatch):
    path = make_video(tmp_path / "fast.mp4", 2.0, 100)
    converted = []
    original = torch.from_numpy
    monkeypatch.setattr("selva.media.frames.torch.from_numpy", lambda x: converted.append(1) or original(x))
    assert len(read_video(path, 1.6, 0.0, 32, 32).sync_frames) == 40
    assert len(converted) <= 40 + 13
