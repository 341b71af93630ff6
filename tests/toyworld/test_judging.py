"""The judges of generated sound, judged: they must be right about true sound, or no figure means anything."""

from __future__ import annotations

import numpy as np
import pytest

from toyworld import CLASSES, UNSEEN, make_scene
from toyworld.judging import RATE, fit_classifier, heard_events, timing

EVERY = [*CLASSES, *UNSEEN]


@pytest.fixture(scope="module")
def classifier():
    return fit_classifier(count=10)


@pytest.mark.parametrize("name", EVERY)
def test_every_event_of_true_sound_is_heard_and_no_other(name):
    scores = [timing(scene.sound(), scene.events()).f1 for scene in (make_scene(900 + i, [name]) for i in range(3))]
    assert np.mean(scores) > 0.97


def test_events_of_another_scene_do_not_fit():
    scores = [
        timing(make_scene(seed, ["wood"]).sound(), make_scene(seed + 50, ["wood"]).events()).f1 for seed in range(8)
    ]
    assert np.mean(scores) < 0.4


def test_the_inner_structure_of_a_sound_is_one_event():
    scene = make_scene(1, ["laser"])
    heard = heard_events(scene.sound())
    assert len(heard) == len(scene.events()) and np.diff(heard).min() > 0.2


def test_classes_are_told_apart(classifier):
    wrong = [
        (name, seed)
        for name in EVERY
        for seed in (700, 701, 702)
        if classifier.classify(make_scene(seed, [name]).sound()) != name
    ]
    assert len(wrong) <= 1, wrong


def test_level_and_a_little_noise_do_not_matter(classifier):
    noise = np.random.default_rng(0).standard_normal(8 * RATE).astype(np.float32)
    wrong = 0
    for name in EVERY:
        sound = make_scene(800, [name]).sound()
        wrong += classifier.classify(0.1 * sound) != name
        wrong += classifier.classify(sound + 0.004 * noise) != name
    assert wrong <= 2


def test_silence_is_no_class(classifier):
    assert classifier.classify(np.zeros(RATE, np.float32)) == "silence"
