"""Decoded pictures: mirrored as players do, at time stamps that make sense, of a codec that is known."""

from __future__ import annotations

import resource
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from make_media import clicks, corner_picture, make_video, picture_of, turn, white_corner

from selva.media import MaskSettings, mux_video, probe, read_video, video_length
from selva.media.pictures import Orientation

# (a, b, c, d) of the display matrix, and where a patch at the top left is shown
MIRRORS = {
    "mirrored": ((-1, 0, 0, 1), "top right"),
    "flipped": ((1, 0, 0, -1), "bottom left"),
    "transposed": ((0, 1, 1, 0), "top left"),
    "transposed the other way": ((0, -1, -1, 0), "bottom right"),
}


def mirrored_video(path, kind):
    make_video(path, 1.0, size=(96, 64), pictures=corner_picture)
    turn(path, MIRRORS[kind][0])
    return path


@pytest.mark.parametrize("kind", MIRRORS)
def test_mirrored_pictures_are_shown_as_players_show_them(kind, tmp_path):
    path, corner = mirrored_video(tmp_path / "v.mp4", kind), MIRRORS[kind][1]
    video = read_video(path, 0.8, 0.0, 32, 32)
    assert white_corner(video.sync_frames[0]) == white_corner(video.clip_frames[0]) == corner
    assert video.source_size == ((96, 64) if "transposed" in kind else (64, 96))


@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv"])
@pytest.mark.parametrize("kind", MIRRORS)
def test_written_videos_are_mirrored_alike(kind, suffix, tmp_path):
    """Copied (all of it) and newly encoded (a part)."""
    path = mirrored_video(tmp_path / "v.mp4", kind)
    for start in (0.0, 0.2):
        mux_video(path, torch.rand(1, 16_000), 16_000, tmp_path / f"out{suffix}", start_sec=start)
        shown = read_video(tmp_path / f"out{suffix}", 0.7, 0.0, 32, 32)
        assert white_corner(shown.sync_frames[0]) == MIRRORS[kind][1]
        assert shown.source_size == ((96, 64) if "transposed" in kind else (64, 96))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("flipped", [False, True])
def test_filters_do_what_arrays_do(transposed, mirrored, flipped):
    way = Orientation(transposed, mirrored, flipped)
    picture = np.random.default_rng(0).integers(0, 256, (16, 32, 3), dtype=np.uint8)
    graph = av.filter.Graph()
    nodes = [graph.add_buffer(width=32, height=16, format="rgb24", time_base=Fraction(1, 25))]
    graph.link_nodes(*nodes, *(graph.add(*step) for step in way.filters), graph.add("buffersink")).configure()
    graph.push(av.VideoFrame.from_ndarray(picture, format="rgb24"))
    assert np.array_equal(graph.pull().to_ndarray(format="rgb24"), way.applied(picture))


def test_a_matrix_of_zeros_changes_nothing(tmp_path):
    path = make_video(tmp_path / "v.mp4", 1.0, size=(96, 64), pictures=corner_picture)
    turn(path, (0, 0, 0, 0))
    assert white_corner(read_video(path, 0.8, 0.0, 32, 32).sync_frames[0]) == "top left"


# -- time stamps ------------------------------------------------------------------------------------------------------


def video_with_stamps(path, stamps):
    """Write a picture at each of the stamps, in milliseconds."""
    with av.open(str(path), "w") as file:
        stream = file.add_stream("mpeg4", rate=25, options={"g": "1"})
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        for index, stamp in enumerate(stamps):
            frame = av.VideoFrame.from_ndarray(picture_of(index), format="rgb24")
            frame.pts, frame.time_base = stamp, Fraction(1, 1000)
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    return path


def joined_stream(path, first_sec, second_sec):
    """Write two transport streams of a second, one after the other, that begin at these time stamps."""
    content = b""
    for index, start in enumerate((first_sec, second_sec)):
        part = make_video(path.with_name(f"{index}.ts"), 1.0, codec="mpeg4", sound=clicks([0.5], 1.0),
                          container_options={"output_ts_offset": str(start)})
        content += part.read_bytes()
        part.unlink()
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("suffix", [".mkv", ".mp4", ".avi"])
def test_a_jump_is_an_error_that_names_the_place(suffix, tmp_path):
    """Even when a whole day is asked for, no pictures are made up for the gap."""
    late = 20_000_000 if suffix != ".avi" else 60_000  # .avi stores a frame for every moment of the gap
    stamps = [40 * index for index in range(50)] + [late + 40 * index for index in range(25)]
    path = video_with_stamps(tmp_path / f"v{suffix}", stamps)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=rf"v\{suffix}: its time stamps jump from 1\.96 s to {late / 1000:.2f} s"):
        read_video(path, 86_400.0, 0.0, 32, 32)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # KiB
    assert read_video(path, 1.6, 0.0, 32, 32).duration_sec == 1.6  # before it, everything is in order
    with pytest.raises(ValueError, match="time stamps jump"):
        mux_video(path, torch.rand(1, 16_000 * 40), 16_000, tmp_path / "out.mp4", duration_sec=40.0, start_sec=0.5)


@pytest.mark.parametrize("second_sec", [0, 1770, 3600, 80_000])
def test_joined_transport_streams(second_sec, tmp_path):
    path = joined_stream(tmp_path / "v.ts", 1800, second_sec)
    with pytest.raises(ValueError, match=r"v\.ts: its time stamps jump from 0\.9. s to "):
        read_video(path, 1.9, 0.0, 32, 32)
    assert read_video(path, 0.8, 0.0, 32, 32).duration_sec == 0.8
    try:
        assert video_length(path) < 3000
    except ValueError as error:
        assert "time stamps jump" in str(error)


def test_a_pause_of_a_screen_recording_is_none(tmp_path):
    path = video_with_stamps(tmp_path / "v.mkv", [0, 40, 80, *range(25_000, 26_000, 40)])
    assert read_video(path, 25.6, 0.0, 32, 32).duration_sec == pytest.approx(25.6)


def test_a_mask_whose_time_stamps_jump(tmp_path):
    video = make_video(tmp_path / "v.mp4", 4.0)
    mask = video_with_stamps(tmp_path / "m.mkv", [0, 40, 80, 120_000, 120_040])
    with pytest.raises(ValueError, match=r"m\.mkv: its time stamps jump from 0\.08 s to 120\.00 s"):
        read_video(video, 2.0, 0.0, 32, 32, mask=MaskSettings(mask))


# -- codecs -----------------------------------------------------------------------------------------------------------


def unknown_pictures(path):
    """Write a video whose codec nobody knows."""
    make_video(path, 1.0, sound=clicks([0.5], 1.0))
    path.write_bytes(path.read_bytes().replace(b"avc1", b"zzz9").replace(b"avcC", b"zzzC"))
    return path


def test_pictures_of_an_unknown_codec_are_named(tmp_path):
    path = unknown_pictures(tmp_path / "v.mp4")
    for function in (lambda: read_video(path, 0.8), lambda: video_length(path), lambda: probe(path),
                     lambda: mux_video(path, torch.rand(1, 16_000), 16_000, tmp_path / "out.mp4"),
                     lambda: read_video(make_video(tmp_path / "w.mp4", 1.0), 0.8, mask=MaskSettings(path))):
        with pytest.raises(ValueError, match=r"v\.mp4: its video codec is not supported"):
            function()


def test_sound_of_an_unknown_codec_does_not_hinder_the_pictures(tmp_path):
    path = make_video(tmp_path / "v.mp4", 1.0, sound=clicks([0.5], 1.0))
    path.write_bytes(path.read_bytes().replace(b"mp4a", b"zzz9").replace(b"esds", b"zzzC"))
    info = probe(path)
    assert (info.streams, info.audio_rate, info.fps) == (("video", "audio"), None, 25.0)
    assert read_video(path, 0.8, 0.0, 32, 32).duration_sec == 0.8
