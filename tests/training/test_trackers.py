"""Trackers, by recorders of their calls; none of the packages is needed."""

from __future__ import annotations

import sys
from types import ModuleType

import numpy as np
import pytest

from selva.training.trackers import Trackers, check_trackers
from selva.utils.errors import UserError
from selva.utils.metrics_log import MetricsFile


class Recorder(ModuleType):
    """A module that notes every call of its functions."""

    def __init__(self, name):
        super().__init__(name)
        self.calls = []

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)

        def call(*args, **kwargs):
            self.calls.append((name, args, kwargs))
            return (name, args, kwargs)

        return call


@pytest.fixture
def recorders(monkeypatch):
    made = {name: Recorder(name) for name in ("wandb", "trackio")}
    for name, module in made.items():
        monkeypatch.setitem(sys.modules, name, module)
    tensorboard = Recorder("torch.utils.tensorboard")

    def open_writer(*args, **kwargs):
        tensorboard.calls.append(("open", args, kwargs))
        return tensorboard

    tensorboard.SummaryWriter = open_writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", tensorboard)
    return {**made, "tensorboard": tensorboard}


def test_every_tracker_gets_numbers_sounds_and_pictures(recorders, tmp_path):
    from PIL import Image

    Image.new("RGB", (4, 2)).save(tmp_path / "a.png")
    trackers = Trackers(("tensorboard", "wandb", "trackio"), tmp_path, {"lr": 1e-4, "data_dir": tmp_path}, 7)
    metrics = MetricsFile()
    metrics.listener = trackers.rows
    metrics.append([{"step": 5, "val_loss": 2.0, "val_loss_bins": [1.0, 3.0], "none": None}])
    trackers.sound("dog", np.array([0, 0.5, -1.5], np.float32), 16_000, 5)
    trackers.picture("sample", tmp_path / "a.png", 5)
    trackers.close()
    numbers = {"val_loss": 2.0, "val_loss_bins/0": 1.0, "val_loss_bins/1": 3.0}
    for name in ("wandb", "trackio"):
        calls = recorders[name].calls
        assert calls[0][0] == "init" and calls[0][2]["project"] == "selva-lora"
        assert calls[0][2]["config"] == {"lr": 1e-4, "data_dir": str(tmp_path)}
        logged = (({**numbers, "step": 5},), {}) if name == "wandb" else ((numbers,), {"step": 5})
        assert ("log", *logged) in calls and calls[-1][0] == "finish"
        audio, image = (next(call for call in calls if call[0] == kind) for kind in ("Audio", "Image"))
        assert audio[1][0].dtype == np.int16 and audio[1][0].tolist() == [0, 16384, -32767]
        assert audio[2] == {"sample_rate": 16_000} and image[1] == (str(tmp_path / "a.png"),)
    assert ("define_metric", ("*",), {"step_metric": "step"}) in recorders["wandb"].calls
    calls = recorders["tensorboard"].calls
    assert calls[0] == ("open", (str(tmp_path / "tensorboard"),), {"purge_step": 7})
    assert [call[1] for call in calls if call[0] == "add_scalar"] == [(key, value, 5) for key, value in numbers.items()]
    audio, image = (next(call for call in calls if call[0] == name) for name in ("add_audio", "add_image"))
    assert audio[1][1].shape == (1, 3) and audio[2] == {"sample_rate": 16_000} and image[1][1].shape == (2, 4, 3)


def test_one_that_fails_is_left_out_and_the_others_go_on(recorders, tmp_path, caplog):
    trackers = Trackers(("wandb", "trackio"), tmp_path, {})

    def broken(*args, **kwargs):
        raise ConnectionError("no network")

    recorders["wandb"].log = broken
    for step in (1, 2):
        trackers.rows([{"step": step, "loss": 1.0}])
    assert [call[0] for call in recorders["trackio"].calls] == ["init", "log", "log"]
    assert caplog.text.count("--report_to wandb gets no more values after an error: no network") == 1


def test_one_that_does_not_begin_is_a_mistake_with_advice(recorders, tmp_path):
    def not_logged_in(*args, **kwargs):
        raise RuntimeError("api_key not configured (no-tty)\nmore")

    recorders["wandb"].init = not_logged_in
    with pytest.raises(UserError, match=r"wandb: api_key not configured \(no-tty\); `wandb login`.*offline"):
        Trackers(("wandb",), tmp_path, {})


def test_what_they_print_does_not_mix_with_the_results(recorders, tmp_path, capsys):
    def talkative(*args, **kwargs):
        print("* Trackio project initialized")

    recorders["trackio"].init = recorders["trackio"].finish = talkative
    Trackers(("trackio",), tmp_path, {}).close()
    told = capsys.readouterr()
    assert told.out == "" and told.err.count("initialized") == 2


def test_a_package_that_is_missing_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="pip install wandb"):
        Trackers(("wandb",), tmp_path, {})
    with pytest.raises(UserError, match="pip install wandb"):
        check_trackers(("wandb",))
