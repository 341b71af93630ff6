"""Features of pictures in memory are those of the video file that holds the same pictures."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import soundfile
import torch
from make_media import decode, make_video

from selva.extraction.extractor import FeatureExtractor
from selva.extraction.pictures import PictureClip, extract_pictures
from selva.features import load_features, save_features
from selva.media import MaskSettings
from selva.media.frames import exact_rate
from selva.models.variants import get_variant
from selva.utils.errors import UserError


@pytest.fixture(scope="module")
def extractor() -> FeatureExtractor:
    return FeatureExtractor(get_variant("tiny_16k"), None, torch.device("cpu"))


def clip_of(video, fps: float = 25.0, **more) -> PictureClip:
    """Return the pictures of a video as ComfyUI holds them, floats from 0 to 1."""
    frames, sound, rate = decode(video)
    pictures = torch.from_numpy(np.stack([picture for _, picture in frames])).float() / 255
    return PictureClip(pictures, fps, sound=torch.from_numpy(sound) if sound is not None else None, rate=rate, **more)


@pytest.mark.parametrize("seconds, fps", [(2.0, 25), (1.2, 30), (1.5, 12)])
def test_frames_are_those_of_the_file(tmp_path, extractor, seconds, fps):
    video = make_video(tmp_path / "a.mp4", seconds, fps=fps, size=(96, 64))
    clip = clip_of(video, fps)
    read, sampled = extractor.read(video), extractor.sample(clip.picture, len(clip.pictures), fps)
    assert sampled.duration_sec == read.duration_sec and sampled.num_filled == read.num_filled
    assert torch.equal(sampled.clip_frames, read.clip_frames) and torch.equal(sampled.sync_frames, read.sync_frames)


@pytest.mark.parametrize("mask_clip, mask_sync", [(True, True), (False, True), (True, False)])
@pytest.mark.parametrize("per_frame", [False, True])
def test_masks_are_those_of_a_file(tmp_path, extractor, mask_clip, mask_sync, per_frame):
    video = make_video(tmp_path / "a.mp4", 1.0, size=(64, 64))
    keep = np.random.default_rng(0).random((25 if per_frame else 1, 64, 64), dtype=np.float32)
    np.save(tmp_path / "mask.npy", keep)
    settings = MaskSettings(tmp_path / "mask.npy", 0.7, mask_clip, mask_sync)
    clip = clip_of(video)
    read = extractor.read(video, mask=settings)
    sampled = extractor.sample(clip.picture, 25, 25.0, mask=settings, keep=keep)
    assert torch.equal(sampled.clip_frames, read.clip_frames) and torch.equal(sampled.sync_frames, read.sync_frames)
    plain = extractor.read(video)
    assert torch.equal(sampled.clip_frames, plain.clip_frames) is not mask_clip
    assert torch.equal(sampled.sync_frames, plain.sync_frames) is not mask_sync


def test_the_same_pictures_keep_their_file_and_others_get_the_next(tmp_path, extractor, monkeypatch):
    sound = np.random.default_rng(0).uniform(-0.5, 0.5, (1, 16_000)).astype(np.float32)
    one = clip_of(make_video(tmp_path / "a.mp4", 1.0, sound=sound), prompt="a knock")
    other = clip_of(make_video(tmp_path / "b.mp4", 1.0, size=(96, 64)), prompt="a knock")
    first, path = extract_pictures(extractor, one, tmp_path / "set", "dog/x")
    assert path.name == "dog_x_001.npz" and path.with_suffix(".flac").is_file()
    assert extract_pictures(extractor, other, tmp_path / "set", "dog/x")[1].name == "dog_x_002.npz"
    monkeypatch.setattr(extractor, "extract", None)  # is not needed again
    again, same = extract_pictures(extractor, one, tmp_path / "set", "dog/x")
    assert same == path and torch.equal(again.sync_features, first.sync_features)


def test_every_setting_makes_its_own_file_without_a_name(tmp_path, extractor):
    video = make_video(tmp_path / "a.mp4", 1.0)
    keep = torch.zeros(1, 64, 64)
    clips = [clip_of(video), clip_of(video, prompt="a bell"), clip_of(video, 24.0), clip_of(video, mask=keep),
             clip_of(video, mask=keep, mask_strength=0.5), clip_of(video, duration_sec=0.8)]
    paths = [extract_pictures(extractor, clip, tmp_path / "set")[1] for clip in clips]
    assert len(set(paths)) == len(clips) and all(len(path.stem) == 32 for path in paths)
    assert load_features(paths[1]).prompt == "a bell" and load_features(paths[5]).duration == 0.8


@pytest.mark.parametrize("more, message", [
    ({"fps": 0.0}, "frame rate of the pictures is 0.0, expected a positive number"),
    ({"pictures": torch.zeros(5, 64, 64, 3)}, "has 0.20 s of pictures from 0.00 s"),
    ({"pictures": torch.zeros(64, 64, 3)}, r"the pictures are \(64, 64, 3\), expected \(pictures, height, width, 3\)"),
    ({"mask": torch.zeros(3, 64, 64)}, r"mask: the mask is \(3, 64, 64\), 3 frames, but pictures has 25"),
    ({"mask": torch.full((1, 64, 64), 2.0)}, "the mask has values from 0 to 2, expected 0 to 1"),
])
def test_what_cannot_be_used_is_said(tmp_path, extractor, more, message):
    clip = {"pictures": torch.zeros(25, 64, 64, 3), "fps": 25.0, **more}
    with pytest.raises(UserError, match=message):
        extract_pictures(extractor, PictureClip(**clip), tmp_path)
    assert not list(tmp_path.iterdir())


def test_rates_of_video_standards():
    assert exact_rate(29.97) == exact_rate(29.97002997002997) == Fraction(30000, 1001)
    assert exact_rate(23.976) == Fraction(24000, 1001)
    assert exact_rate(25.0) == 25 and exact_rate(12.5) == Fraction(25, 2)


def test_another_sound_to_the_same_pictures_is_another_clip(tmp_path, extractor):
    one, other = (PictureClip(torch.zeros(25, 64, 64, 3), 25.0, sound=torch.full((1, 16_000), level), rate=16_000)
                  for level in (0.1, 0.2))
    paths = [extract_pictures(extractor, clip, tmp_path, "dog")[1].name for clip in (one, other, one)]
    assert paths == ["dog_001.npz", "dog_002.npz", "dog_001.npz"]


def loud(level: float, **more) -> PictureClip:
    return PictureClip(torch.zeros(25, 64, 64, 3), 25.0, sound=torch.full((1, 16_000), level), rate=16_000, **more)


def test_a_recording_of_the_users_own_is_never_replaced(tmp_path, extractor):
    _, path = extract_pictures(extractor, loud(0.1, prompt="a dog"), tmp_path, "dog")
    own = path.with_suffix(".flac")
    soundfile.write(own, np.full(16_000, 0.3), 16_000)
    content, features = own.read_bytes(), path.read_bytes()
    assert extract_pictures(extractor, loud(0.1, prompt="a dog"), tmp_path, "dog")[1] == path  # nothing to be written
    with pytest.raises(UserError, match=r"dog_001\.flac: is in the way, .*; move it, to put it back afterwards"):
        extract_pictures(extractor, loud(0.1, prompt="a bark"), tmp_path, "dog")
    assert own.read_bytes() == content and path.read_bytes() == features
    own.unlink()
    assert extract_pictures(extractor, loud(0.1, prompt="a bark"), tmp_path, "dog")[0].prompt == "a bark"


def test_a_sound_that_lies_there_keeps_its_number(tmp_path, extractor):
    for name in ("cat_001.flac", "cat_003.WAV"):
        (tmp_path / name).write_bytes(b"a recording")
    paths = [extract_pictures(extractor, loud(level), tmp_path, "cat")[1].name for level in (0.1, 0.2, 0.1)]
    assert paths == ["cat_002.npz", "cat_004.npz", "cat_002.npz"]
    assert (tmp_path / "cat_001.flac").read_bytes() == b"a recording"


@pytest.mark.parametrize("noted", [True, False])
def test_the_sound_of_other_settings_follows_them(tmp_path, extractor, noted):
    """Earlier versions noted no hash; their sounds are known by their samples."""
    for seconds, prompt in ((1.0, "a dog"), (0.8, "a dog"), (0.8, "a bark")):
        bundle, path = extract_pictures(extractor, loud(0.1, duration_sec=seconds, prompt=prompt), tmp_path, "dog")
        assert path.name == "dog_001.npz" and (bundle.duration, bundle.prompt) == (seconds, prompt)
        assert soundfile.info(path.with_suffix(".flac")).frames == seconds * 16_000
        if not noted:
            save_features(path, replace(load_features(path), origin=None))
