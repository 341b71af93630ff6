"""scripts/sweep.py: runs share what they load, stopped sweeps go on, failed runs do not end one."""

from __future__ import annotations

import gc
import json
import weakref
from pathlib import Path

import pytest
import torch
import yaml
from recorded_graph import RecordedGraphs
from script_args import TINY

import train_lora
from scripts import sweep as script
from selva import cli
from selva.checkpoint import load_adapter
from selva.training import setup, sweep
from selva.training.run import TrainingRun
from selva.utils.graph import GraphedCalls

BASE = {"variant": "tiny_16k", "device": "cpu", "steps": 4, "batch_size": 2, "warmup_steps": 1, "save_every": 2,
        "val_every": 2, "rank": 2, "precision": "fp32", "preview": False, "preserve": ["a bell rings"]}
FLAGS = [*TINY, "--steps", "4", "--batch_size", "2", "--warmup_steps", "1", "--save_every", "2", "--val_every", "2",
         "--rank", "2", "--precision", "fp32", "--no_preview", "--preserve", "a bell rings", "--val_fraction", "0.2"]


def put_sweep(folder: Path, data: Path, name: str = "out", **more) -> Path:
    content = {"output_dir": str(folder / name), "base": {**BASE, "data_dir": str(data), "val_fraction": 0.2}, **more}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return path


class Killed(BaseException):
    """Ends a sweep like a signal that nothing can catch."""


def test_a_sweep_is_the_same_as_single_runs_and_goes_on_where_it_was_killed(feature_dir, tmp_path, monkeypatch, capsys):
    grid = {"lr": [0.001, 0.01], "dora": [False, True]}
    loads, made = [], []
    monkeypatch.setattr(setup, "load_generator", counted(setup.load_generator, loads))
    monkeypatch.setattr(setup, "with_preserved", counted(setup.with_preserved, made))
    best = tmp_path / "best.pt"
    assert script.main([str(put_sweep(tmp_path, feature_dir, grid=grid)), "--best_to", str(best)]) == 0
    assert len(loads) == len(made) == 1  # one base model, one set of sounds to preserve
    table = (tmp_path / "out" / "sweep.tsv").read_text(encoding="utf-8")
    assert table.count("\n") == 5 and "not yet" not in table
    assert "lr=0.01,dora=True" in (tmp_path / "out" / "sweep.html").read_text(encoding="utf-8")

    # The last run of the process is, bit for bit, a run by itself.
    alone = tmp_path / "alone"
    assert train_lora.main(["--data_dir", str(feature_dir), "--output_dir", str(alone), *FLAGS, "--lr", "0.01",
                            "--dora"]) == 0
    shared, single = (load_adapter(folder / "adapter_final.pt").tensors
                      for folder in (tmp_path / "out" / "lr=0.01,dora=True,seed=42", alone))
    assert all(torch.equal(shared[key], value) for key, value in single.items())

    # Killed in the middle of the second run, and then between its end and the note of it.
    real, calls = sweep.train, []

    def train(*arguments, **more):
        calls.append(arguments)
        if len(calls) == 2:
            monkeypatch.setattr(TrainingRun, "train_step", raising_at(2))
        return real(*arguments, **more)

    again = put_sweep(tmp_path, feature_dir, "again", grid=grid)
    monkeypatch.setattr(sweep, "train", train)
    with pytest.raises(Killed):
        script.main([str(again)])
    monkeypatch.undo()
    with monkeypatch.context() as context, pytest.raises(Killed):
        context.setattr(sweep, "_finish", raising_at(0))
        script.main([str(again)])
    capsys.readouterr()
    assert script.main([str(again)]) == 0
    assert (tmp_path / "again" / "sweep.tsv").read_text(encoding="utf-8") == table
    assert best.is_file()
    adapters = [load_adapter(tmp_path / name / "lr=0.001,dora=True,seed=42" / "adapter_final.pt").tensors
                for name in ("out", "again")]
    assert all(torch.equal(adapters[0][key], value) for key, value in adapters[1].items())


def counted(function, calls: list):
    def call(*arguments, **more):
        calls.append(arguments)
        return function(*arguments, **more)

    return call


def raising_at(step: int):
    real = TrainingRun.train_step

    def train_step(run, *_):
        if getattr(run, "step", step) == step:
            raise Killed
        return real(run)

    return train_step


def test_a_failed_run_does_not_end_a_sweep_and_is_tried_again(feature_dir, tmp_path, monkeypatch, caplog):
    path = put_sweep(tmp_path, feature_dir, runs=[{"lr": 0.001}, {"lr": 0.002}])
    real = sweep.train

    def train(config, *arguments, **more):
        if config.training.lr == 0.001:
            raise RuntimeError("the device is gone")
        return real(config, *arguments, **more)

    monkeypatch.setattr(sweep, "train", train)
    assert script.main([str(path)]) == cli.EXIT_FAILED
    table = (tmp_path / "out" / "sweep.tsv").read_text(encoding="utf-8").splitlines()
    assert table[1].startswith("1\tlr=0.002") and table[2].endswith("seed 42: the device is gone")
    monkeypatch.setattr(sweep, "train", real)
    assert script.main([str(path)]) == 0
    assert "device is gone" not in (tmp_path / "out" / "sweep.tsv").read_text(encoding="utf-8")


def test_a_run_is_gone_with_its_graphs_when_the_next_one_begins(feature_dir, tmp_path, monkeypatch):
    """Also one that failed. Python looks for cycles seldom, and does not know how much of a device they hold."""
    grid = {"lr": [0.001, 0.002, 0.003, 0.004, 0.005]}
    path = put_sweep(tmp_path, feature_dir, grid=grid)
    made, alive = [], []

    class Run(TrainingRun):
        def __init__(self, *arguments, **more):
            alive.append(sum(run() is not None for run in made))
            super().__init__(*arguments, **more)
            made.append(weakref.ref(self))

        def train_step(self):
            if self.step == 3 and len(made) == 3:
                raise RuntimeError("the device is gone")
            return super().train_step()

    monkeypatch.setattr(setup, "TrainingRun", Run)
    monkeypatch.setattr(setup, "graphed_calls", lambda *_: GraphedCalls(RecordedGraphs(), "training", required=True))
    gc.collect()
    gc.disable()
    try:
        assert script.main([str(path)]) == cli.EXIT_FAILED
    finally:
        gc.enable()
    assert alive == [0] * 5


def test_mistakes_are_told_before_anything_is_trained(feature_dir, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(sweep, "train", lambda *_, **more: pytest.fail("trained"))
    path = put_sweep(tmp_path, feature_dir, runs=[{"lr": 0.001}, {"lrr": 1}])
    assert script.main([str(path)]) == cli.EXIT_FAILED
    assert "lrr=1,seed=42: unknown settings lrr; did you mean lr?" in caplog.text
    path = put_sweep(tmp_path, feature_dir, runs=[{"rank": 0}])
    assert script.main([str(path)]) != 0
    assert "rank must be at least 1" in caplog.text
    assert script.main([str(tmp_path / "no.yaml")]) == cli.EXIT_FAILED


def test_a_run_of_other_settings_is_not_taken_for_this_one(feature_dir, tmp_path, monkeypatch, caplog):
    path = put_sweep(tmp_path, feature_dir, runs=[{"lr": 0.001}])
    folder = tmp_path / "out" / "lr=0.001,seed=42"
    folder.mkdir(parents=True)
    (folder / "sweep_run.json").write_text(json.dumps({"settings": {"lr": 0.001, "rank": 64}, "figures": {}}))
    assert script.main([str(path)]) == cli.EXIT_FAILED
    assert "was begun with other settings" in caplog.text


def test_the_example_lists_its_runs(capsys, tmp_path, feature_dir):
    example = yaml.safe_load((Path(__file__).parents[2] / "configs" / "sweeps" / "example.yaml").read_text())
    example["base"]["data_dir"] = str(feature_dir)
    (tmp_path / "example.yaml").write_text(yaml.safe_dump(example), encoding="utf-8")
    assert script.main([str(tmp_path / "example.yaml"), "--list"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 8


def test_runs_share_the_latents_of_a_folder_that_cannot_be_written(feature_dir, tmp_path, monkeypatch):
    """They are in a temporary folder until the last run is done, and gone then."""
    monkeypatch.setattr("selva.data.folder_dataset.RECENT_WINDOWS", 2)  # stands for a set of more than 256 windows
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "elsewhere"))
    (feature_dir / ".selva_cache").write_text("in the way of a folder")
    base = {**BASE, "data_dir": str(feature_dir), "preserve": [], "verdict": False, "steps": 2}
    assert script.main([str(put_sweep(tmp_path, feature_dir, base=base, seeds=2))]) == 0
    assert not list((tmp_path / "elsewhere").glob("selva_cache_*"))
