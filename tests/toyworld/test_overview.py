"""The picture of the world shows everything in it, at a moment when something happens."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from matplotlib.image import imread

from scripts import make_demo_clips
from toyworld import CLASSES, UNSEEN, make_scene, overview


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(overview, "PIXELS", 32)
    monkeypatch.setattr(overview, "SECONDS", 2.0)


def test_everything_is_shown_and_what_the_model_does_not_know_is_marked():
    shown = list(overview._shown())
    kinds = {**CLASSES, **UNSEEN}
    assert [title for title, *_ in shown] == [*(kind.description for kind in kinds.values()), "two things at once"]
    assert sum(colour == overview.RED for _, colour, _ in shown) == len(UNSEEN)
    assert all(picture.shape == (32, 32, 3) and picture.std() > 1 for *_, picture in shown)


def test_the_moment_is_that_of_the_first_event():
    scene = make_scene(3, ["drum"], 1, 2.0)
    frames = dataclasses.replace(scene, noise_sigma=0.0).frames(overview.FPS, 32)
    (index,) = (i for i, frame in enumerate(frames) if np.array_equal(frame, overview._moment(scene)))
    assert 0 < index / overview.FPS - scene.events()[0] < 0.1


def test_the_script_writes_it(tmp_path, capsys):
    assert make_demo_clips.main(["--overview", str(tmp_path / "world.png")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'world.png'}\n"
    height, width, _ = imread(tmp_path / "world.png").shape
    assert width == 1600 and height < width / 2
