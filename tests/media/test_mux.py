"""Videos with new sound: picture and sound stay together, and a copy is a copy."""

from __future__ import annotations

import av
import numpy as np
import pytest
import torch
from make_media import click_time, clicks, decode, make_video, number_in, numbers_in

from selva.media import mux_video, probe, read_video


def flash(index):
    """White at frames 50 and 51 (2.0 s at 25 fps), else black."""
    return np.full((64, 64, 3), 255 if index in (50, 51) else 0, dtype=np.uint8)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
@pytest.mark.parametrize(
    ("start_sec", "duration_sec", "sound_sec", "expected_sec"),
    [
        (0.0, None, 4.0, 4.0),  # all of it: copied
        (0.0, None, 3.98, 3.98),  # sound within one frame of the pictures: still copied
        (0.0, None, 4.02, 4.02),  # sound the same, longer: kept
        (0.0, None, 3.0, 3.0),  # sound shorter
        (0.0, None, 5.0, 4.0),  # sound longer
        (1.0, 2.5, 3.0, 2.5),
        (1.01, None, 2.0, 2.0),  # between two frames
    ],
)
def test_click_and_flash_stay_together(start_sec, duration_sec, sound_sec, expected_sec, suffix, tmp_path):
    path = make_video(tmp_path / "v.mp4", 4.0, pictures=flash, bframes=2)
    sound = torch.from_numpy(clicks([2.0 - start_sec], sound_sec))
    written = mux_video(path, sound, 16_000, tmp_path / f"out{suffix}", start_sec, duration_sec)
    assert written == pytest.approx(expected_sec, abs=1e-4)

    frames, played, rate = decode(tmp_path / f"out{suffix}")
    flashes = [time for time, picture in frames if picture.mean() > 127]
    packet_sec = 1024 / rate
    assert flashes[0] == pytest.approx(2.0 - start_sec, abs=0.001)
    assert click_time(played, rate) == pytest.approx(flashes[0], abs=0.002)
    assert frames[0][0] == 0
    assert expected_sec - 0.065 <= frames[-1][0] < expected_sec  # the last frame is the one shown before the end
    assert expected_sec <= played.shape[1] / rate <= expected_sec + packet_sec
    tolerance = packet_sec + 0.001 if suffix == ".mkv" else 0.001  # .mp4 tells the player where to stop
    assert probe(tmp_path / f"out{suffix}").duration_sec == pytest.approx(expected_sec, abs=tolerance)


def test_a_whole_video_is_copied_bit_by_bit(tmp_path):
    path = make_video(tmp_path / "v.mp4", 2.0, bframes=2, sound=clicks([0.5], 2.0))
    mux_video(path, torch.rand(2, 88_200) * 0.1, 44_100, tmp_path / "out.mp4")

    def packets(file):
        with av.open(str(file)) as container:
            return [bytes(packet) for packet in container.demux(video=0) if packet.size]

    assert packets(path) == packets(tmp_path / "out.mp4")
    info = probe(tmp_path / "out.mp4")
    assert (info.streams, info.audio_rate, info.audio_channels) == (("video", "audio"), 44_100, 2)
    mux_video(path, torch.rand(1, 16_000), 16_000, tmp_path / "part.mp4")
    assert packets(path) != packets(tmp_path / "part.mp4")


def test_cut_pictures_are_the_right_ones(tmp_path):
    path = make_video(tmp_path / "v.mp4", 3.0, options={"g": "20"}, bframes=2)
    mux_video(path, torch.rand(1, 16_000), 16_000, tmp_path / "out.mp4", start_sec=1.3)
    frames, _, _ = decode(tmp_path / "out.mp4")
    found = [number_in(picture.transpose(2, 0, 1)) for _, picture in frames]
    assert found == list(range(32, 58))  # 1.28 s is on screen at 1.3 s; 2.28 s is the last before 2.3 s
    assert [time for time, _ in frames][:3] == pytest.approx([0.0, 0.02, 0.06])


def test_the_encoder_places_its_own_key_frames(tmp_path):
    path = make_video(tmp_path / "v.mp4", 2.0, options={"g": "1"})
    mux_video(path, torch.rand(1, 16_000), 16_000, tmp_path / "out.mp4")
    with av.open(str(tmp_path / "out.mp4")) as container:
        assert sum(packet.is_keyframe for packet in container.demux(video=0) if packet.size) == 1


def test_a_video_with_hidden_frames_is_encoded(tmp_path):
    whole, path = make_video(tmp_path / "whole.mp4", 3.0), tmp_path / "v.mp4"
    with av.open(str(whole)) as source, av.open(str(path), "w", options={"avoid_negative_ts": "disabled"}) as target:
        stream = source.streams.video[0]
        copy = target.add_stream_from_template(stream)
        for packet in source.demux(stream):
            if packet.size:
                shift = round(1 / stream.time_base)  # the first second is only there to decode the rest
                packet.pts, packet.dts, packet.stream = packet.pts - shift, packet.dts - shift, copy
                target.mux(packet)
    with av.open(str(path)) as container:
        assert any(packet.is_discard for packet in container.demux(video=0))
    assert numbers_in(read_video(path, 1.0, 0.0, 32, 32).sync_frames)[:2] == [25, 26]
    mux_video(path, torch.rand(1, 32_000), 16_000, tmp_path / "out.mp4")
    frames, _, _ = decode(tmp_path / "out.mp4")
    assert [number_in(picture.transpose(2, 0, 1)) for _, picture in frames] == list(range(25, 75))


@pytest.mark.parametrize("suffix", [".mp4", ".m4v", ".mov", ".mkv"])
@pytest.mark.parametrize("codec", ["libvpx-vp9", "libx265", "mpeg4"])
def test_pictures_that_another_container_cannot_hold_are_encoded(codec, suffix, tmp_path):
    if codec not in av.codecs_available:
        pytest.skip(f"this PyAV has no {codec}")
    options = {"b": "2M", "cpu-used": "8"} if "vpx" in codec else {"x265-params": "log-level=none"}
    path = make_video(tmp_path / "v.mkv", 1.0, codec=codec, options=options if codec != "mpeg4" else {})
    assert mux_video(path, torch.rand(1, 16_000), 16_000, tmp_path / f"out{suffix}") == pytest.approx(1.0)
    frames, played, rate = decode(tmp_path / f"out{suffix}")
    assert [number_in(picture.transpose(2, 0, 1)) for _, picture in frames] == list(range(25))
    assert played.shape[1] / rate == pytest.approx(1.0, abs=1024 / rate)


def test_pictures_that_cannot_be_copied_after_all_are_encoded(tmp_path, monkeypatch, caplog):
    """A header may lack what the other container needs; only FFmpeg knows."""
    monkeypatch.setattr("selva.media.mux._COPYABLE_CODECS", {".mov": ("vp9",), ".m4v": ("vp9",)})
    path = make_video(tmp_path / "v.mkv", 1.0, codec="libvpx-vp9", options={"b": "2M", "cpu-used": "8"})
    for suffix in (".mov", ".m4v"):
        with caplog.at_level("INFO"):
            mux_video(path, torch.rand(1, 16_000), 16_000, tmp_path / f"out{suffix}")
        assert "v.mkv: its pictures cannot be copied, they are encoded again" in caplog.text
        assert len(decode(tmp_path / f"out{suffix}")[0]) == 25


def test_odd_sizes_and_mpeg4_are_encoded_when_h264_is_missing(tmp_path, monkeypatch):
    path = tmp_path / "v.avi"
    with av.open(str(path), "w") as container:
        video = container.add_stream("mjpeg", rate=25)
        video.width, video.height, video.pix_fmt = 65, 67, "yuvj420p"
        for _ in range(25):
            container.mux(video.encode(av.VideoFrame.from_ndarray(np.full((67, 65, 3), 99, np.uint8), format="rgb24")))
        container.mux(video.encode(None))
    monkeypatch.setattr(av, "codecs_available", {"mpeg4", "aac"})
    mux_video(path, torch.rand(1, 16_000), 16_000, tmp_path / "out.mp4")
    info = probe(tmp_path / "out.mp4")
    assert (info.width, info.height) == (64, 66)
    assert info.duration_sec == pytest.approx(1.0, abs=0.001)
    frames, _, _ = decode(tmp_path / "out.mp4")
    assert len(frames) == 25 and abs(frames[0][1].mean() - 99) < 4


def test_colours_survive_encoding(tmp_path):
    path, bt709 = tmp_path / "v.mp4", 1
    red = av.VideoFrame.from_ndarray(np.full((64, 64, 3), (200, 50, 99), np.uint8), format="rgb24")
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=25)
        video.width, video.height, video.pix_fmt = 64, 64, "yuv420p"
        video.codec_context.colorspace = bt709
        for _ in range(25):
            container.mux(video.encode(red.reformat(format="yuv420p", dst_colorspace=bt709)))
        container.mux(video.encode(None))
    mux_video(path, torch.rand(1, 8000), 16_000, tmp_path / "out.mp4")
    before, after = decode(path)[0][0][1], decode(tmp_path / "out.mp4")[0][0][1]
    assert np.abs(before.astype(int) - after.astype(int)).max() <= 2
    assert np.abs(after[32, 32].astype(int) - (200, 50, 99)).max() <= 3


def test_unusable_input_of_mux_video_is_named_and_leaves_nothing(tmp_path):
    path, sound = make_video(tmp_path / "v.mp4", 1.0), torch.rand(1, 16_000)
    with pytest.raises(ValueError, match=r"cannot write '\.avi'"):
        mux_video(path, sound, 16_000, tmp_path / "out.avi")
    with pytest.raises(ValueError, match="is the video itself"):
        mux_video(path, sound, 16_000, path)
    with pytest.raises(ValueError, match=r"\(3, 16000\), expected 1 or 2 channels"):
        mux_video(path, sound.expand(3, -1), 16_000, tmp_path / "out.mp4")
    with pytest.raises(ValueError, match="no picture at 2"):
        mux_video(path, sound, 16_000, tmp_path / "out.mp4", start_sec=2.0)
    with pytest.raises(OSError, match=r"out\.mp4: cannot be written"):
        mux_video(path, sound, 12_345, tmp_path / "out.mp4")  # no rate of AAC
    assert [file.name for file in tmp_path.iterdir()] == ["v.mp4"]
