"""Reading and writing media: which frames and samples come out, and what is said about files that are not right."""

from __future__ import annotations

import json
import math
import struct
from fractions import Fraction

import av
import numpy as np
import pytest
import soundfile
import torch
from golden_case import GOLDEN
from make_media import decode, make_video, number_in, picture_of
from recipe import select

from selva.media import (
    SELVA_FILL_SEC,
    audio_length,
    extract_audio,
    mux_video,
    prepare_audio,
    probe,
    read_audio,
    read_video,
    resize_frame,
    select_frames,
    shortened_duration,
    write_audio,
)

FRAME_CASES = json.loads((GOLDEN / "frame_selection.json").read_text())["cases"]


def numbers(frames):
    return [number_in(frame.numpy()) for frame in frames]


def clicks(times, seconds, rate=16_000, channels=1):
    """Return (channels, samples) with a short click at each time."""
    sound = np.zeros((channels, round(seconds * rate)), dtype=np.float32)
    for time in times:
        sound[:, round(time * rate) : round(time * rate) + 8] = 0.9
    return sound


def click_time(sound, rate):
    return np.abs(np.asarray(sound)[0]).argmax() / rate


# --- frame selection ------------------------------------------------------------------------------------------------


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


# --- read_video -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FRAME_CASES)
def test_read_video_returns_the_reference_frames(name):
    case = FRAME_CASES[name]
    for expected in case["load_video"]:
        video = read_video(GOLDEN / case["file"], expected["requested_sec"], clip_size=32, sync_size=32)
        run = next(
            run for run in case["selected"] if (run["start_sec"], run["end_sec"]) == (0, expected["requested_sec"])
        )
        assert video.duration_sec == expected["duration_sec"]
        assert numbers(video.clip_frames) == run["8fps"][: expected["clip_frames"]]
        assert numbers(video.sync_frames) == run["25fps"][: expected["sync_frames"]]
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
    assert numbers(video.clip_frames) == clip[: int(video.duration_sec * 8)]
    assert numbers(video.sync_frames) == sync[: int(video.duration_sec * 25)]


def test_seeking_gives_the_frames_that_decoding_from_the_start_gives(tmp_path):
    path = make_video(tmp_path / "v.mp4", seconds=6.0, options={"g": "20"}, bframes=2)
    whole = numbers(read_video(path, 5.9, 0.0, 32, 32).clip_frames)
    for start in (0.5, 1.0, 2.5, 4.0):  # multiples of 1/8, where the two grids of samples coincide
        part = numbers(read_video(path, 1.5, start, 32, 32).clip_frames)
        assert len(part) >= 11 and part == whole[int(start * 8) :][: len(part)]


def test_transport_streams_begin_at_time_0(tmp_path):
    path = make_video(
        tmp_path / "v.ts", 2.0, sound=clicks([1.0], 2.0), container_options={"output_ts_offset": "1.4"}, codec="mpeg4"
    )
    with av.open(str(path)) as container:
        assert container.start_time > 1_000_000
    assert numbers(read_video(path, 1.0, 0.0, 32, 32).sync_frames)[0] == 0
    assert numbers(read_video(path, 1.0, 0.6, 32, 32).sync_frames)[:2] == [
        15,
        16,
    ]  # a container that cannot seek exactly


def turn(path, matrix):
    """Write a display matrix (a, b, c, d) into the only video track of an .mp4."""
    content = bytearray(path.read_bytes())
    at = content.find(b"tkhd") + 4 + 4 + 20 + 16
    one, a, b, c, d = 1 << 16, *(value << 16 for value in matrix)
    assert struct.unpack_from(">9i", content, at) == (one, 0, 0, 0, one, 0, 0, 0, 1 << 30)
    struct.pack_into(">9i", content, at, a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(content)


def corner_picture(_):
    """Landscape picture with a white patch at the top left."""
    picture = np.zeros((64, 96, 3), dtype=np.uint8)
    picture[:24, :24] = 255
    return picture


def white_corner(picture):
    grey = picture.float().mean(dim=0)
    corners = {
        "top left": grey[4, 4],
        "top right": grey[4, -5],
        "bottom left": grey[-5, 4],
        "bottom right": grey[-5, -5],
    }
    return max(corners, key=corners.get)


# (a, b, c, d) of ISO 14496-12: x' = a x + c y, y' = b x + d y with y downwards
TURNS = {"top right": (0, 1, -1, 0), "bottom left": (0, -1, 1, 0), "bottom right": (-1, 0, 0, -1)}


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


# --- resize ---------------------------------------------------------------------------------------------------------


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


# --- read_audio -----------------------------------------------------------------------------------------------------


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


# --- prepare_audio --------------------------------------------------------------------------------------------------


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


# --- writing --------------------------------------------------------------------------------------------------------


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
    assert "beyond full scale" in caplog.text
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


# --- mux_video ------------------------------------------------------------------------------------------------------


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
    assert numbers(read_video(path, 1.0, 0.0, 32, 32).sync_frames)[:2] == [25, 26]
    mux_video(path, torch.rand(1, 32_000), 16_000, tmp_path / "out.mp4")
    frames, _, _ = decode(tmp_path / "out.mp4")
    assert [number_in(picture.transpose(2, 0, 1)) for _, picture in frames] == list(range(25, 75))


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


def test_probe_reads_headers(tmp_path):
    video = probe(make_video(tmp_path / "v.mp4", 2.0, size=(96, 64), sound=clicks([], 2.0)))
    assert (video.width, video.height, video.fps, video.duration_sec) == (96, 64, 25.0, 2.0)
    assert (video.audio_rate, video.audio_channels) == (16_000, 1)
    soundfile.write(tmp_path / "a.flac", np.zeros((8000, 2)), 16_000)
    sound = probe(tmp_path / "a.flac")
    assert (sound.width, sound.fps, sound.duration_sec, sound.audio_channels) == (None, None, 0.5, 2)
    assert sound.streams == ("audio",)
