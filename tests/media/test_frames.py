"""Pictures of a video, and the errors for videos that are not right."""

from __future__ import annotations

import json
import math
from fractions import Fraction

import av
import numpy as np
import pytest
import soundfile
import torch
from golden_case import GOLDEN
from make_media import TURNS, clicks, corner_picture, make_video, numbers_in, turn, white_corner
from recipe import select

from selva.media import SELVA_FILL_SEC, mux_video, read_video, resize_frame, select_frames, shortened_duration

FRAME_CASES = json.loads((GOLDEN / "frame_selection.json").read_text())["cases"]


# -- frame selection --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FRAME_CASES)
def test_select_frames_equals_the_reference(name):
    """Pitfall B3: frames by their time stamps, not by their numbers, also at a variable frame rate."""
    case = FRAME_CASES[name]
    compared = 0
    for run in case["selected"]:
        for key, fps in (("8fps", 8.0), ("25fps", 25.0)):
            if key in run:
                assert select_frames(case["frame_times"], fps, run["start_sec"], run["end_sec"]) == run[key]
                compared += 1
    assert compared >= 4


def test_select_frames_uses_a_running_sum():
    """Pitfall B3: sample times are added up in float64, as in the reference."""
    times = [k / 25 for k in range(201)]
    selected = select_frames(times, 25.0, end_sec=8.0)
    late = sum(index == k + 1 for k, index in enumerate(selected[:200]))
    assert late == 183  # exact arithmetic would give 0; the figure is that of the reference


def test_select_frames_end_is_inclusive_and_inputs_are_checked():
    assert select_frames([0.0, 0.125, 0.25], 8.0, end_sec=0.25) == [0, 1, 2]
    assert select_frames([0.0, 0.125, 0.25], 8.0, end_sec=0.2499) == [0, 1]
    assert select_frames([], 8.0) == []
    with pytest.raises(ValueError, match="frame rate is 0"):
        select_frames([0.0], 0)
    with pytest.raises(ValueError, match="time of frame 1 is inf"):
        select_frames([0.0, math.inf], 8.0)


# -- read_video -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FRAME_CASES)
def test_read_video_returns_the_reference_frames(name):
    case = FRAME_CASES[name]
    for expected in case["load_video"]:
        video = read_video(GOLDEN / case["file"], expected["requested_sec"], clip_size=32, sync_size=32)
        run = next(
            run for run in case["selected"] if (run["start_sec"], run["end_sec"]) == (0, expected["requested_sec"])
        )
        assert video.duration_sec == expected["duration_sec"]
        assert numbers_in(video.clip_frames) == run["8fps"][: expected["clip_frames"]]
        assert numbers_in(video.sync_frames) == run["25fps"][: expected["sync_frames"]]
        assert len(video.sync_frames) == expected["sync_frames"]
        assert video.clip_frames.dtype == video.sync_frames.dtype == torch.uint8
        assert video.source_fps == pytest.approx(float(Fraction(case["stream"]["average_rate"])))


@pytest.mark.parametrize("name", FRAME_CASES)
@pytest.mark.parametrize("start_sec", [0.04, 1.3, 3.56])
def test_a_later_start_is_the_rule_with_times_relative_to_it(name, start_sec):
    case = FRAME_CASES[name]
    with av.open(str(GOLDEN / case["file"])) as container:
        stamps = [frame.pts * frame.time_base for frame in container.decode(video=0)]
    relative = [float(stamp - Fraction(str(start_sec))) for stamp in stamps]
    clip, sync = (select_frames(relative, fps, 0.0, 1.5) for fps in (8.0, 25.0))
    video = read_video(GOLDEN / case["file"], 1.5, start_sec, clip_size=32, sync_size=32)
    assert video.duration_sec == shortened_duration(1.5, len(clip), len(sync)) >= 1.4
    assert numbers_in(video.clip_frames) == clip[: int(video.duration_sec * 8)]
    assert numbers_in(video.sync_frames) == sync[: int(video.duration_sec * 25)]


def test_seeking_gives_the_frames_that_decoding_from_the_start_gives(tmp_path):
    path = make_video(tmp_path / "v.mp4", seconds=6.0, options={"g": "20"}, bframes=2)
    whole = numbers_in(read_video(path, 5.9, 0.0, 32, 32).clip_frames)
    for start in (0.5, 1.0, 2.5, 4.0):  # multiples of 1/8, where the two grids of samples coincide
        part = numbers_in(read_video(path, 1.5, start, 32, 32).clip_frames)
        assert len(part) >= 11 and part == whole[int(start * 8) :][: len(part)]


def test_transport_streams_begin_at_time_0(tmp_path):
    path = make_video(
        tmp_path / "v.ts", 2.0, sound=clicks([1.0], 2.0), container_options={"output_ts_offset": "1.4"}, codec="mpeg4"
    )
    with av.open(str(path)) as container:
        assert container.start_time > 1_000_000
    assert numbers_in(read_video(path, 1.0, 0.0, 32, 32).sync_frames)[0] == 0
    assert numbers_in(read_video(path, 1.0, 0.6, 32, 32).sync_frames)[:2] == [
        15,
        16,
    ]  # a container that cannot seek exactly


@pytest.mark.parametrize("corner", TURNS)
def test_pictures_are_turned_upright(corner, tmp_path):
    path = make_video(tmp_path / "v.mp4", 1.0, size=(96, 64), pictures=corner_picture)
    assert white_corner(read_video(path, 0.8, 0.0, 32, 32).sync_frames[0]) == "top left"
    turn(path, TURNS[corner])
    video = read_video(path, 0.8, 0.0, 32, 32)
    assert white_corner(video.sync_frames[0]) == white_corner(video.clip_frames[0]) == corner
    assert video.source_size == ((64, 96) if corner == "bottom right" else (96, 64))
    # copied and newly encoded alike show the same
    for start in (0.0, 0.2):
        mux_video(path, torch.rand(1, 16_000), 16_000, tmp_path / "out.mp4", start_sec=start)
        assert white_corner(read_video(tmp_path / "out.mp4", 0.7, 0.0, 32, 32).sync_frames[0]) == corner


def test_short_video_shortens_the_clip_and_can_be_filled(tmp_path):
    """Pitfall B1: what a video lacks is its last frame, held for a moment, or a shorter clip; never zeros."""
    path = make_video(tmp_path / "v.mp4", seconds=2.0, fps=25)  # last frame at 1.96 s: one sync sample short of 2 s
    video = read_video(path, 2.0, 0.0, 32, 32)
    assert (video.duration_sec, len(video.clip_frames), len(video.sync_frames)) == (49 / 25, 15, 49)
    assert video.num_filled == 0
    filled = read_video(path, 2.0, 0.0, 32, 32, fill_sec=SELVA_FILL_SEC)
    assert (filled.duration_sec, len(filled.clip_frames), len(filled.sync_frames)) == (2.0, 16, 50)
    assert filled.num_filled == 1
    assert torch.equal(filled.sync_frames[49], filled.sync_frames[48])
    longer = read_video(path, 8.0, 0.0, 32, 32, fill_sec=SELVA_FILL_SEC)  # the video itself ends after 2 s
    assert longer.duration_sec == 2.0 and longer.num_filled == 1
    slow = make_video(
        tmp_path / "slow.mp4", seconds=2.0, fps=4
    )  # last frame at 1.75 s: 6 samples are missing, 3 may be
    unfilled = read_video(slow, 2.0, 0.0, 32, 32, fill_sec=SELVA_FILL_SEC)
    assert unfilled.duration_sec < 1.8 and unfilled.num_filled == 0


@pytest.mark.parametrize("name", ["12fps", "24fps", "25fps", "29.97fps", "30fps", "60fps"])
def test_filling_changes_nothing_where_nothing_is_missing(name):
    path = GOLDEN / FRAME_CASES[name]["file"]  # 9 s
    plain, filled = (read_video(path, 8.0, 0.0, 32, 32, fill_sec=fill_sec) for fill_sec in (0.0, SELVA_FILL_SEC))
    assert filled.duration_sec == plain.duration_sec == 8.0 and filled.num_filled == 0
    assert torch.equal(filled.sync_frames, plain.sync_frames) and torch.equal(filled.clip_frames, plain.clip_frames)


def test_unusable_videos_are_named(tmp_path):
    good = make_video(tmp_path / "good.mp4", seconds=3.0, container_options={"movflags": "+faststart"})
    content = good.read_bytes()
    bad = tmp_path / "bad.mp4"

    bad.write_bytes(content[: len(content) * 2 // 3])
    with pytest.raises(ValueError, match=r"bad\.mp4: ends after [12]\.\d\d s of 3\.00 s"):
        read_video(bad, 3.0, 0.0, 32, 32)
    assert read_video(bad, 0.8, 0.0, 32, 32).duration_sec == 0.8  # what is wanted is still there

    for rubbish in (b"", b"not a video", content[:40], content[:1000]):
        bad.write_bytes(rubbish)
        with pytest.raises(ValueError, match=r"bad\.mp4: (cannot be read as video or audio|has no video stream)"):
            read_video(bad)

    soundfile.write(tmp_path / "sound.wav", np.zeros(16_000), 16_000)
    with pytest.raises(ValueError, match=r"sound\.wav: has no video stream \(found: audio\)"):
        read_video(tmp_path / "sound.wav")
    with pytest.raises(FileNotFoundError, match=r"none\.mp4"):
        read_video(tmp_path / "none.mp4")
    with pytest.raises(ValueError, match="is a folder"):
        read_video(tmp_path)
    with pytest.raises(ValueError, match=r"0\.00 s of pictures from 5\.00 s"):
        read_video(good, 2.0, start_sec=5.0, fill_sec=SELVA_FILL_SEC)
    with pytest.raises(ValueError, match=r"0\.4\d s of pictures.*at least 0\.64 s"):
        read_video(good, 2.0, start_sec=2.5)
    with pytest.raises(ValueError, match="duration is 0"):
        read_video(good, 0)
    with pytest.raises(ValueError, match="start is -1"):
        read_video(good, 2.0, -1)


def test_damaged_packets_are_found(tmp_path):
    path = make_video(tmp_path / "v.mp4", seconds=2.0, codec="mpeg4", size=(96, 64))
    with av.open(str(path)) as container:
        packets = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
    content = bytearray(path.read_bytes())
    for position, size in packets[10:]:
        content[position : position + size] = bytes(size)
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"v\.mp4: (damaged after|ends after)"):
        read_video(path, 1.8, 0.0, 32, 32)


# -- resize -----------------------------------------------------------------------------------------------------------


def test_resize_equals_the_reference(golden):
    """Pitfall B4: antialiased and rounded to uint8."""
    case = golden("resize")
    pictures = case.inputs()
    paths = {"clip_384": (384, False), "sync_224": (224, False), "sync_224_center_crop": (224, True)}
    worst = {"level": 0, "fraction": 0.0}
    for name, spec in case.info["outputs"].items():
        if name.startswith("float_check"):
            continue
        picture, path, _ = name.split("/")
        found = select(resize_frame(pictures[picture], *paths[path]).numpy(), spec["index"]).astype(int)
        difference = np.abs(found - case.stored[name].astype(int))
        worst["level"] = max(worst["level"], difference.max())
        worst["fraction"] = max(worst["fraction"], (difference > 0).mean())
        assert difference.max() <= spec["tolerance"]["max_abs"], name
        assert (difference > 0).mean() <= spec["tolerance"]["fraction_different"], name
    print(worst)


def test_read_video_crops_for_mmaudio(tmp_path):
    path = make_video(tmp_path / "v.mp4", 1.0, size=(96, 64), pictures=corner_picture)
    squashed = read_video(path, 0.8, 0.0, 32, 32).sync_frames[0].float().mean(dim=0)
    cropped = read_video(path, 0.8, 0.0, 32, 32, sync_crop=True).sync_frames[0].float().mean(dim=0)
    assert (squashed[2] > 127).sum() == 8  # 24 of 96 columns on 32
    assert (cropped[2] > 127).sum() == 4  # 24 of 64 on 32, of which the crop takes 8
    assert (cropped[:, 0] > 127).sum() == 12  # 24 of 64 rows on 32
