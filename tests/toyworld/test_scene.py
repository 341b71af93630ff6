"""Scenes: the same from the same seed, and pictures, sound and events that agree."""

from __future__ import annotations

import numpy as np
import pytest

from selva.media import probe, read_audio, read_video
from toyworld import CLASSES, UNSEEN, make_scene

EVERY = [*CLASSES, *UNSEEN]
RATE = 16_000


def test_the_issue_of_the_world_is_large_enough():
    assert len(CLASSES) >= 8 and len(UNSEEN) >= 5 and not set(CLASSES) & set(UNSEEN)
    for kind in (*CLASSES.values(), *UNSEEN.values()):
        assert len(set(kind.prompts)) >= 4
    prompts = [prompt for kind in (*CLASSES.values(), *UNSEEN.values()) for prompt in kind.prompts]
    assert len(prompts) == len(set(prompts))  # no wording names two classes


def test_a_scene_follows_from_its_seed():
    first, again, other = (make_scene(seed, num_objects=2, duration_sec=2.0) for seed in (5, 5, 6))
    assert first == again and first != other
    np.testing.assert_array_equal(first.frames(8, 32), again.frames(8, 32))
    np.testing.assert_array_equal(first.sound(), again.sound())


@pytest.mark.parametrize(("name", "colour", "size", "first_sec", "rms"), [
    ("wood", "brown", 1.007576076, 0.529975985, 0.0619036),
    ("bell", "golden", 0.828950811, 0.582074296, 0.1365651),
    ("drum", "red", 1.007576076, 0.529975985, 0.1052294),
    ("ball", "red", 1.007576076, 0.477877674, 0.0796880),
    ("glass", "clear", 1.007576076, 0.529975985, 0.1413004),
    ("water", "white", 0.828950811, 0.577338086, 0.0747503),
    ("shaker", "red", 1.007576076, 0.529975985, 0.0506811),
    ("rain", "white", 1.108853657, 0.603154736, 0.1397901),
    ("motor", "blue", 1.108853657, 0.603154736, 0.1655370),
    ("siren", "red", 1.108853657, 0.603154736, 0.1630563),
    ("gong", "bronze", 0.828950811, 0.515767355, 0.1644144),
    ("bird", "red", 0.828950811, 0.572601876, 0.1895300),
    ("laser", "red", 0.828950811, 0.558393246, 0.1083722),
])
def test_scenes_stay_what_they_were(name, colour, size, first_sec, rms):
    """The built-in model was trained on the first ten; figures in the documents are of all of them."""
    scene = make_scene(3, [name], duration_sec=2.0)
    (thing,) = scene.objects
    assert thing.colour == colour
    assert (thing.size, thing.events[0].time_sec) == pytest.approx((size, first_sec), abs=1e-9)
    assert np.sqrt(np.square(scene.sound().astype(float)).mean()) == pytest.approx(rms, rel=1e-4)


@pytest.mark.parametrize("name", EVERY)
def test_every_class_is_seen_and_heard_when_it_happens(name):
    scene = make_scene(3, [name], cluttered=False)
    fps, size = 25, 64
    frames = scene.frames(fps, size).astype(np.float32)
    sound = scene.sound(RATE)
    assert frames.shape == (200, size, size, 3) and sound.shape == (8 * RATE,)
    assert np.abs(sound).max() == pytest.approx(0.9, abs=1e-4)
    # without the camera's noise: the brightest change of a patch of 8 x 8 pixels
    patches = frames.reshape(200, 8, 8, 8, 8, 3).mean(axis=(2, 4))
    change = np.abs(np.diff(patches, axis=0)).max(axis=(1, 2, 3))
    quiet = np.median(np.abs(np.diff(frames[:5].reshape(5, 8, 8, 8, 8, 3).mean(axis=(2, 4)), axis=0)))
    for time in scene.events():
        begin = round(time * RATE)
        before, after = sound[begin - 640 : begin], sound[begin : begin + 640]  # 40 ms each
        assert np.square(after).mean() > 1.5 * np.square(before).mean()
        first = int(np.ceil(time * fps - 1e-6))  # the first picture that shows it
        assert change[first - 1 : first + 2].max() > max(4.0, 3 * quiet)


def test_nothing_is_heard_before_the_first_event():
    for seed in range(10):
        scene = make_scene(seed)
        assert not scene.sound(RATE)[: int(scene.events()[0] * RATE) - 1].any()


@pytest.mark.parametrize("name", EVERY)
def test_events_are_as_frequent_as_promised(name):
    kind = {**CLASSES, **UNSEEN}[name]
    for seed in range(20):
        times = make_scene(seed, [name]).events()
        fewest, most, gap = (2, 4, 0.9) if kind.running else (3, kind.most_events, kind.min_gap_sec)
        assert fewest <= len(times) <= most
        assert times[0] > 0.3 and times[-1] < 7.7 and np.diff(times).min() > gap - 1e-6


def test_two_objects_differ_and_their_sounds_add_up():
    for seed in range(5):
        scene = make_scene(seed, num_objects=2)
        left, right = scene.objects
        assert left.name != right.name and left.x < 0.4 < 0.6 < right.x
        parts = [scene.sound(RATE, only=i) for i in (0, 1)]
        np.testing.assert_allclose(parts[0] + parts[1], scene.sound(RATE), atol=1e-6)
        assert min(np.abs(part).max() for part in parts) > 0.1  # both are heard
        assert sorted([*scene.events(0), *scene.events(1)]) == list(scene.events())


def test_events_of_two_objects_keep_apart_mostly():
    close = total = 0
    for seed in range(20):
        scene = make_scene(seed, num_objects=2)
        gaps = np.abs(scene.events(0)[:, None] - scene.events(1)[None]).min(axis=1)
        close, total = close + int((gaps < 0.2).sum()), total + len(gaps)
    assert close < 0.15 * total


def test_pictures_show_the_same_moments_at_every_rate_and_size():
    scene = make_scene(1, ["ball"], cluttered=False)
    slow, fast = scene.frames(8, 64), scene.frames(24, 64)
    np.testing.assert_allclose(slow.mean(axis=(2, 3)), fast[::3].mean(axis=(2, 3)), atol=1.0)
    large = scene.frames(8, 128).reshape(64, 64, 2, 64, 2, 3).mean(axis=(2, 4))
    assert np.abs(large - slow).mean() < 3  # noise is at most 4


def test_larger_things_sound_lower():
    pitches, sizes = [], []
    for seed in range(12):
        scene = make_scene(seed, ["wood"])
        spectrum = np.abs(np.fft.rfft(scene.sound(RATE)))
        pitches.append(spectrum[: 8 * 1500].argmax() / 8)  # Hz
        sizes.append(scene.objects[0].size)
    assert np.corrcoef(np.log(sizes), np.log(pitches))[0, 1] < -0.95


def test_stronger_impacts_are_louder_and_balls_fall_from_higher():
    scene = make_scene(2, ["ball"])
    sound, events = scene.sound(RATE), scene.objects[0].events
    peaks = [np.abs(sound[round(e.time_sec * RATE) :][:800]).max() for e in events]
    assert np.corrcoef(peaks, [e.strength for e in events])[0, 1] > 0.95
    gaps = np.diff([e.time_sec for e in events])
    assert np.corrcoef(np.minimum(gaps, 0.9), [e.strength for e in events[1:]])[0, 1] > 0.99


def test_prompts_are_of_the_class_and_vary():
    scene, rng = make_scene(0, ["bell", "drum"], num_objects=2), np.random.default_rng(0)
    for index, thing in enumerate(scene.objects):
        prompts = {scene.prompt(rng, index) for _ in range(60)}
        assert len(prompts) == len(thing.kind.prompts)
        assert prompts == {prompt.format(colour=thing.colour) for prompt in thing.kind.prompts}


def test_several_prompts_differ_and_end_with_the_one_that_would_be_drawn_alone():
    scene = make_scene(0, ["bell"])
    for count in (1, 3, 99):
        prompts = scene.prompts(np.random.default_rng(5), count)
        assert len(set(prompts)) == len(prompts) == min(count, len(scene.objects[0].kind.prompts))
        assert prompts[-1] == scene.prompt(np.random.default_rng(5))


def test_a_written_clip_holds_the_same_pictures_and_sound(tmp_path):
    scene = make_scene(4, ["glass"], duration_sec=2.0)
    scene.write(tmp_path / "clip.mp4", size=64, lossless=True)
    info = probe(tmp_path / "clip.mp4")
    assert (info.width, info.height, info.fps, info.audio_rate) == (64, 64, 25, RATE)
    waveform, _ = read_audio(tmp_path / "clip.mp4")
    np.testing.assert_allclose(waveform[0].numpy(), scene.sound(RATE), atol=1e-4)
    video = read_video(tmp_path / "clip.mp4", 2.0, clip_size=64, sync_size=64)
    truth = scene.frames(25, 64).transpose(0, 3, 1, 2)[:6]  # later ones may be sampled a frame apart
    assert np.abs(video.sync_frames[:6].numpy().astype(float) - truth).mean() < 6


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"classes": ["cow"]}, "unknown sound 'cow'"),
        ({"num_objects": 3}, "expected 1 or 2"),
        ({"classes": ["bell", "bell"], "num_objects": 2}, "different classes"),
        ({"duration_sec": 0.5}, "0.5 s"),
    ],
)
def test_impossible_scenes_are_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        make_scene(0, **arguments)
