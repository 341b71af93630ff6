"""Measuring a model: cases, floors, and the way from scenes to sounds."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from selva.flow import SamplingConfig
from selva.weights.load import load_generator
from toyworld import CLASSES, UNSEEN
from toyworld.judging import Classifier, fit_classifier
from toyworld.measure import Case, ToyGenerator, pair_cases, recognised, shuffled_events, single_cases, timing_f1

SECONDS = 2.0


def test_single_cases_take_all_classes_in_turn():
    cases = single_cases(["bell", "rain"], 3, 50, SECONDS)
    assert [case.name for case in cases] == ["bell", "rain"] * 3
    assert len({case.scene.seed for case in cases}) == 6
    assert all(case.prompt.format() for case in cases)


def test_pair_cases_name_either_object():
    cases = pair_cases(2, 10, SECONDS)
    assert [case.index for case in cases] == [0, 1, 0, 1]
    assert cases[0].scene == cases[1].scene and cases[0].name != cases[1].name
    assert cases[0].other_events() == cases[1].events()


def test_true_sound_reaches_the_top_and_falls_when_shuffled():
    cases = single_cases(["wood", "bell", "glass"], 3, 70)
    sounds = [case.scene.sound() for case in cases]
    assert np.mean(timing_f1(sounds, [case.events() for case in cases])) > 0.97
    shuffled = shuffled_events(cases)
    assert all(times != case.events() for times, case in zip(shuffled, cases, strict=True))
    assert np.mean(timing_f1(sounds, shuffled)) < 0.5


def test_one_scene_cannot_be_shuffled():
    with pytest.raises(ValueError, match="one scene"):
        shuffled_events(single_cases(["bell"], 1, 0, SECONDS))


@pytest.fixture(scope="module")
def maker():
    return ToyGenerator("tiny_16k", torch.device("cpu"), SamplingConfig(num_steps=2), clip_features=True)


def test_sounds_depend_on_their_own_seed_only(maker):
    cases = single_cases(["bell", "rain"], 1, 5, SECONDS)
    seen = []
    encoded = maker.encode(cases, seen.append)
    assert seen == [1, 2] and encoded[0].clip_f.shape[1] == 16 and encoded[0].text_f.shape[1] == 77
    generator = load_generator("tiny_16k")
    both = maker.latents(generator, encoded, SECONDS)
    second = maker.latents(generator, encoded[1:], SECONDS, first_seed=1)
    torch.testing.assert_close(both[1:], second, atol=1e-4, rtol=1e-4)  # batches of another size round differently
    assert not torch.allclose(both[:1], second, atol=1e-2)
    sounds = maker.sounds(generator, encoded, SECONDS)
    assert [sound.shape for sound in sounds] == [(32_000,)] * 2
    np.testing.assert_allclose(sounds[1], maker.decode(both[1:], SECONDS)[0], atol=1e-3)


def test_pictures_words_and_negative_words_matter(maker):
    encoded = maker.encode(single_cases(["bell"], 1, 5, SECONDS))
    generator = load_generator("tiny_16k")
    plain = maker.latents(generator, encoded, SECONDS)
    negative = maker.latents(generator, encoded, SECONDS, negatives=["rain"])
    assert not torch.equal(plain, negative)
    blind = ToyGenerator("tiny_16k", torch.device("cpu"), SamplingConfig(num_steps=2), clip_features=False)
    assert not torch.equal(plain, blind.latents(generator, encoded, SECONDS))


def test_the_codec_keeps_length(maker):
    sound = single_cases(["bell"], 1, 5, SECONDS)[0].scene.sound()
    assert maker.through_codec(sound).shape == sound.shape


@pytest.fixture(scope="module")
def classifier():
    return fit_classifier(count=10)


@pytest.mark.parametrize("name", UNSEEN)
def test_what_is_to_be_taught_can_be_heard_behind_the_codec(maker, classifier, name):
    cases = single_cases([name], 6, 20_000_000)
    restored = [maker.through_codec(case.scene.sound()) for case in cases]
    assert sum(recognised(restored, [name] * 6, classifier)) >= 5


def test_recognised_compares_with_the_class_of_each_sound():
    class Deaf(Classifier):
        def classify(self, sound):
            return "bell"

    deaf = Deaf(("bell", "rain"), np.zeros((2, 80)), np.eye(80))
    assert recognised([np.zeros(1)] * 2, ["bell", "rain"], deaf) == [True, False]


def test_a_case_knows_its_object():
    scene = pair_cases(1, 3, SECONDS)[0].scene
    assert Case(scene, 1, "").name == scene.objects[1].name in CLASSES
