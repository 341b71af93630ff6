"""Pictures as the encoders see them through a mask."""

from __future__ import annotations

import logging
from fractions import Fraction

import numpy as np
import pytest
import torch
from make_media import TURNS, make_video, numbers_in, turn, white_corner
from PIL import Image

from selva.media import SELVA_FILL_SEC, MaskSettings, read_video

GREY = 128


def white(_):
    return np.full((64, 64, 3), 255, np.uint8)


def left_half(height=64, width=64):
    keep = np.zeros((height, width), np.float32)
    keep[:, : width // 2] = 1
    return keep


def save_image(path, keep):
    Image.fromarray((keep * 255).astype(np.uint8)).save(path)
    return path


def save_array(path, array):
    np.save(path, array)
    return path


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    """Two seconds of white."""
    return make_video(tmp_path_factory.mktemp("masks") / "v.mp4", 2.0, pictures=white)


@pytest.fixture(scope="module")
def counting(tmp_path_factory):
    """Three seconds at 29.97 fps whose frame i shows i."""
    return make_video(tmp_path_factory.mktemp("masks") / "n.mp4", 3.0, fps=Fraction(30_000, 1001), options={"g": "20"})


def read(path, mask=None, duration=0.8, start=0.0):
    return read_video(path, duration, start, clip_size=64, sync_size=64, mask=mask)


def test_outside_of_the_mask_there_is_grey(video, tmp_path):
    plain, masked = read(video), read(video, MaskSettings(save_image(tmp_path / "m.png", left_half())))
    for name in ("clip_frames", "sync_frames"):
        seen, all_ = getattr(masked, name), getattr(plain, name)
        assert torch.equal(seen[..., :32], all_[..., :32]) and all_.min() > 250
        assert (seen[..., 32:] == GREY).all()  # 0.5, not 0 as one tooltip says
    assert masked.sync_frames.dtype == torch.uint8 and masked.duration_sec == plain.duration_sec


def test_each_encoder_can_be_left_out(video, tmp_path):
    path, plain = save_image(tmp_path / "m.png", left_half()), read(video)
    for clip, sync in ((True, False), (False, True)):
        seen = read(video, MaskSettings(path, clip=clip, sync=sync))
        assert torch.equal(seen.clip_frames, plain.clip_frames) != clip
        assert torch.equal(seen.sync_frames, plain.sync_frames) != sync
    with pytest.raises(ValueError, match="neither"):
        MaskSettings(path, clip=False, sync=False)


@pytest.mark.parametrize(("strength", "level"), [(0.0, 255), (0.25, 223), (0.5, 191), (1.0, GREY)])
def test_strength_blends_towards_grey(strength, level, video, tmp_path):
    path = save_array(tmp_path / "m.npy", left_half())
    seen, plain = read(video, MaskSettings(path, strength)), read(video)
    assert torch.equal(seen.sync_frames[..., :32], plain.sync_frames[..., :32])
    assert (seen.sync_frames[..., 32:].float() - level).abs().max() <= 1
    if strength == 0:
        assert torch.equal(seen.sync_frames, plain.sync_frames)


def test_strengths_that_mean_nothing(tmp_path):
    for strength in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="expected 0 to 1"):
            MaskSettings(tmp_path / "m.png", strength)


ARRAYS = {
    "float": lambda keep: keep,
    "half": lambda keep: keep.astype(np.float16),
    "bool": lambda keep: keep > 0,
    "0 and 1": lambda keep: keep.astype(np.uint8),
    "0 and 255": lambda keep: (keep * 255).astype(np.uint8),
    "int64": lambda keep: keep.astype(np.int64),
    "one frame": lambda keep: keep[None],
    "every frame": lambda keep: np.repeat(keep[None] > 0, 50, axis=0),
}


@pytest.mark.parametrize("kind", ARRAYS)
def test_arrays_of_every_kind(kind, video, tmp_path):
    expected = read(video, MaskSettings(save_image(tmp_path / "m.png", left_half())))
    seen = read(video, MaskSettings(save_array(tmp_path / "m.npy", ARRAYS[kind](left_half()))))
    assert torch.equal(seen.sync_frames, expected.sync_frames)


def test_transparent_removes_and_levels_blend(video, tmp_path):
    rgba = np.full((64, 64, 4), 255, np.uint8)
    rgba[:, 32:, 3] = 0
    Image.fromarray(rgba).save(tmp_path / "alpha.png")
    assert (read(video, MaskSettings(tmp_path / "alpha.png")).sync_frames[..., 32:] == GREY).all()
    path = save_array(tmp_path / "soft.npy", np.full((64, 64), 0.5, np.float32))
    assert (read(video, MaskSettings(path)).sync_frames.float() - 191).abs().max() <= 1


def test_a_mask_is_resized_to_the_picture(video, tmp_path, caplog):
    large = read(video, MaskSettings(save_array(tmp_path / "m.npy", left_half(640, 640))))
    assert (large.sync_frames[..., :31] > 250).all() and (large.sync_frames[..., 33:] == GREY).all()
    assert "stretched" not in caplog.text
    read(video, MaskSettings(save_array(tmp_path / "wide.npy", left_half(36, 64))))
    assert caplog.text.count("is 64 x 36, but the picture of") == 1


@pytest.mark.parametrize("corner", TURNS)
def test_a_mask_lies_on_the_picture_as_it_is_shown(corner, tmp_path):
    path = make_video(tmp_path / "v.mp4", 1.0, size=(96, 64), pictures=lambda _: np.full((64, 96, 3), 255, np.uint8))
    turn(path, TURNS[corner])
    size = read(path).source_size
    keep = np.zeros(size, np.uint8)
    keep[:20, :20] = 1
    seen = read(path, MaskSettings(save_array(tmp_path / "m.npy", keep))).sync_frames[0]
    assert white_corner(seen) == "top left" and (seen == GREY).float().mean() > 0.8


# -- over time --------------------------------------------------------------------------------------------------------


def every_other(count, size=(64, 64)):
    return np.array([np.full(size, i % 2 == 0) for i in range(count)])


def even(frames):
    return [number % 2 == 0 for number in numbers_in(frames)]


def shown(frames):
    return [not (frame == GREY).all() for frame in frames]


@pytest.mark.parametrize("start", [0.0, 0.5, 1.3])
def test_frames_of_an_array_belong_to_the_frames_of_the_file(start, counting, tmp_path):
    mask = MaskSettings(save_array(tmp_path / "m.npy", every_other(90)))
    plain, seen = (read(counting, m, 1.5, start) for m in (None, mask))
    for name in ("clip_frames", "sync_frames"):
        expected = even(getattr(plain, name))
        assert shown(getattr(seen, name)) == expected and len(set(expected)) == 2


@pytest.mark.parametrize("start", [0.0, 0.5, 1.3])
@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])  # Matroska rounds the time stamps to milliseconds
def test_a_mask_video_is_sampled_as_the_frames_are(suffix, start, counting, tmp_path):
    pictures = [np.full((64, 64, 3), 255 * (i % 2 == 0), np.uint8) for i in range(90)]
    path = make_video(tmp_path / f"m{suffix}", 3.0, Fraction(30_000, 1001), pictures=pictures.__getitem__)
    plain, seen = (read(counting, mask, 1.5, start) for mask in (None, MaskSettings(path)))
    for name in ("clip_frames", "sync_frames"):
        assert shown(getattr(seen, name)) == even(getattr(plain, name))


def test_a_slower_mask_video_stays_in_time(counting, tmp_path):
    pictures = [np.full((64, 64, 3), 255 * (i % 2 == 0), np.uint8) for i in range(15)]
    path = make_video(tmp_path / "m.mp4", 3.0, 5, pictures=pictures.__getitem__)
    plain, seen = (read(counting, mask, 2.5) for mask in (None, MaskSettings(path)))
    nearest = [round(number * 1001 / 30_000 * 5) % 2 == 0 for number in numbers_in(plain.sync_frames)]
    assert shown(seen.sync_frames) == nearest


def test_masks_that_end_early(counting, tmp_path):
    short = make_video(tmp_path / "m.mp4", 1.0, 30, pictures=white)
    assert read(counting, MaskSettings(short), 1.0).duration_sec == 1.0
    with pytest.raises(ValueError, match=r"m\.mp4: the mask ends after 1\.00 s, but there are pictures at 1\.1"):
        read(counting, MaskSettings(short), 2.0)
    with pytest.raises(ValueError, match="the mask ends after 1"):
        read(counting, MaskSettings(short), 1.0, start=1.5)
    for count in (60, 91):
        path = save_array(tmp_path / "m.npy", every_other(count))
        with pytest.raises(ValueError, match=rf"m\.npy: the mask is \({count}, 64, 64\).*n\.mp4 has 90"):
            read(counting, MaskSettings(path))


def test_the_end_can_be_filled_under_a_mask(video, tmp_path):
    mask = MaskSettings(save_array(tmp_path / "m.npy", every_other(50)))
    assert read_video(video, 2.0, 0.0, 64, 64, fill_sec=SELVA_FILL_SEC, mask=mask).duration_sec == 2.0


def test_a_mask_without_anything_in_it_warns(video, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        read(video, MaskSettings(save_array(tmp_path / "m.npy", every_other(50))))
        assert not caplog.text
        read(video, MaskSettings(save_array(tmp_path / "m.npy", np.zeros((64, 64), np.uint8))))
    assert "the mask is black in the whole clip" in caplog.text


BAD_ARRAYS = {
    "expected \\(H, W\\)": np.zeros(64),
    "the mask is \\(2, 4, 4, 1\\)": np.zeros((2, 4, 4, 1)),
    "the mask is \\(0, 4\\)": np.zeros((0, 4)),
    "not finite": np.array([[0.0, np.nan], [1.0, 1.0]]),
    "values from 0 to 2, expected 0 to 1$": np.array([[0.0, 2.0]]),
    "values from -1 to 1, expected 0 to 1": np.array([[-1.0, 1.0]]),
    "values from 0 to 256, expected 0 to 1, or 0 to 255": np.array([[0, 256]]),
    "the mask is complex128": np.zeros((4, 4), complex),
    "pickles are never loaded": np.array([[{}]]),
}


@pytest.mark.parametrize("message", BAD_ARRAYS)
def test_bad_arrays_are_named(message, video, tmp_path):
    path = tmp_path / "bad.npy"
    np.save(path, BAD_ARRAYS[message], allow_pickle=True)
    with pytest.raises(ValueError, match=rf"bad\.npy: .*{message}"):
        read(video, MaskSettings(path))


def test_files_that_are_no_masks(video, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.png"):
        read(video, MaskSettings(tmp_path / "none.png"))
    for name in ("m.png", "m.npy", "m.mp4"):
        (tmp_path / name).write_bytes(b"not a mask")
        with pytest.raises(ValueError, match=rf"{name}: .*cannot be (read|decoded)"):
            read(video, MaskSettings(tmp_path / name))


@pytest.mark.parametrize("damage", [(b"}", b"("), (b"'descr'", b"'des\x00r'"), (b"<f4", b"<f["), (b", }", b"(((")])
def test_a_damaged_header_of_an_array_is_named(video, tmp_path, damage):
    path = save_array(tmp_path / "m.npy", left_half())
    data = path.read_bytes()
    assert damage[0] in data
    path.write_bytes(data.replace(*damage, 1))
    with pytest.raises(ValueError, match=r"m\.npy: cannot be read as a mask \(.+\)"):
        read(video, MaskSettings(path))
