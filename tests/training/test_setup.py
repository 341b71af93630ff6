"""selva.training.setup: runs that are continued, with which settings."""

from __future__ import annotations

import dataclasses
import logging

import pytest
from device_behind import DeviceBehind
from recorded_graph import RecordedGraphs
from small_run import make_run

from selva.checkpoint import TrainingState
from selva.lora.config import LoRAConfig
from selva.training import setup
from selva.training.config import RunConfig, TrainConfig
from selva.training.setup import adapter_meta, check_resumable, estimate, find_resume
from selva.utils.errors import UserError
from selva.utils.graph import GraphedCalls
from selva.utils.settings import removed_of
from selva.weights.config import GeneratorModelConfig


@pytest.mark.parametrize("before, now, told", [
    ((4, 1, 2), (4, 1, 1), "an update was made of 8 clips and is now made of 4 (number of processes was 2 and"),
    ((4, 1, 2), (4, 1, 1), "as it would have; --grad_accum 2 keeps it"),
    ((4, 1, 1), (4, 1, 2), "as it would have\n"),  # one process too many
    ((4, 1, 2), (8, 1, 1), ""),
    ((4, 2, 1), (4, 1, 1), "--grad_accum was 2 and is 1"),
    ((4, 1, 1), (4, 1, 1), ""),
])
def test_a_run_that_goes_on_with_other_updates_says_so(tmp_path, caplog, before, now, told):
    def config(sizes):
        return RunConfig(data_dir=[str(tmp_path)], output_dir=tmp_path / "out",
                         model=GeneratorModelConfig(variant="tiny_16k"),
                         training=TrainConfig(batch_size=sizes[0], grad_accum=sizes[1]))

    was = config(before)
    meta = {**adapter_meta(was, 10, before[2]), "rank": 16, "alpha": 16.0, "target": ["attn.qkv"]}
    saved = TrainingState(tmp_path / "adapter_step00001.pt", 1, {}, {}, None, meta)
    check_resumable(saved, config(now), now[2])
    assert told in caplog.text and bool(told) == ("an update was made of" in caplog.text)


@pytest.mark.parametrize("name", sorted(removed_of(RunConfig)))
def test_a_run_that_used_what_is_gone_is_not_continued(tmp_path, name):
    saved, gone = saved_with(tmp_path), removed_of(RunConfig)[name]
    settings = saved.meta["train_config"] if name in TrainConfig.REMOVED else saved.meta
    settings[name] = gone.off
    check_resumable(saved, sets_config(tmp_path))
    settings[name] = 0.05
    with pytest.raises(UserError) as caught:
        check_resumable(saved, sets_config(tmp_path))
    assert f"{name} is 0.05, and this version no longer has it: {gone.reason}" in str(caught.value)


def saved_with(tmp_path, **options) -> TrainingState:
    meta = {**adapter_meta(sets_config(tmp_path, **options), 10), "rank": 16, "alpha": 16.0, "target": ["attn.qkv"]}
    return TrainingState(tmp_path / "adapter_step00001.pt", 1, {}, {}, None, meta)


def sets_config(tmp_path, weights=("", ":2"), **options) -> RunConfig:
    for name in "ab":
        (tmp_path / name).mkdir(exist_ok=True)
    folders = [f"{tmp_path / name}{weight}" for name, weight in zip("ab", weights, strict=False)]
    return RunConfig(data_dir=folders, output_dir=tmp_path / "out", model=GeneratorModelConfig(variant="tiny_16k"),
                     **options)


@pytest.mark.parametrize("now, told", [
    ({"prompt_prefix": ("cat:",)}, "prompt_prefix was ['dog:', 'dog:'] and is ['cat:', 'cat:'] now"),
    ({}, "prompt_prefix was ['dog:', 'dog:'] and is [] now"),
    ({"prompt_prefix": ("dog:", "")}, "prompt_prefix was ['dog:', 'dog:'] and is ['dog:', ''] now"),
    ({"prompt_prefix": ("dog:",), "weights": ("", ":3")}, "data_weights was [1.0, 2.0] and is [1.0, 3.0] now"),
    ({"prompt_prefix": ("dog:",), "balance": "sets"}, "balance was 'clips' and is 'sets' now"),
])
def test_prefixes_and_weights_of_a_run_stay(tmp_path, now, told):
    saved = saved_with(tmp_path, prompt_prefix=("dog:",))
    check_resumable(saved, sets_config(tmp_path, prompt_prefix=("dog: ",)))
    with pytest.raises(UserError) as caught:
        check_resumable(saved, sets_config(tmp_path, **now))
    assert told in str(caught.value)


def test_a_run_of_before_knew_no_prefixes_and_did_not_store_its_weights(tmp_path):
    saved = saved_with(tmp_path)
    for key in ("data_weights", "balance"):
        del saved.meta[key]
    assert "prompt_prefix" not in saved.meta
    check_resumable(saved, sets_config(tmp_path, weights=("", ":3")))
    with pytest.raises(UserError, match="prompt_prefix was"):
        check_resumable(saved, sets_config(tmp_path, prompt_prefix=("dog:",)))


def test_a_run_without_a_saved_step_starts_anew_and_says_so(tmp_path, caplog):
    config = RunConfig(data_dir=[str(tmp_path)], output_dir=tmp_path / "out", resume="auto",
                       model=GeneratorModelConfig(variant="tiny_16k"))
    with caplog.at_level("INFO"):
        assert find_resume(config) is None
    assert "nothing to resume" in caplog.text and "has no saved step, so the run starts anew" in caplog.text


@pytest.mark.parametrize("graphs", [False, True])
def test_a_dry_run_times_a_step_as_most_will_be(monkeypatch, caplog, graphs):
    """With the wait for the device; and started as a graph where there are any, not recorded or before that."""
    run = make_run()
    if graphs:
        run.graphs = GraphedCalls(RecordedGraphs(), "training", required=True)
    device = DeviceBehind(monkeypatch, run)
    monkeypatch.setattr(setup, "time", device)
    with caplog.at_level(logging.INFO, "selva"):
        estimate(run)
    assert "dry run: 1.00 s/step, about 6 s for 6 steps" in caplog.text
    assert run.graphs is None or (run.graphs.num_graphs == 1 and run.graphs.backend.replays == 2)
    assert device.steps == (4 if graphs else 2)


def test_a_run_that_goes_on_with_another_recipe_says_so_once(tmp_path, caplog):
    """Rate, schedule, decay and dropout may change; the step file knows what they were."""
    recipe = TrainConfig(lr=0.01, lr_schedule="cosine", lora_plus_ratio=16.0, weight_decay=0.3,
                         lr_milestones=(0.5, 0.7))
    saved = saved_with(tmp_path, training=recipe)
    saved.meta["lora_config"] = LoRAConfig(dropout=0.3).to_dict()
    told = ("goes on with other settings than before: --lora_dropout was 0.3 and is 0.0, --lr was 0.01 and is 0.0001, "
            "--lr_schedule was cosine and is constant, --lr_milestones was 0.5 0.7 and is 0.8 0.9, --lora_plus_ratio "
            "was 16.0 and is 1.0, --weight_decay was 0.3 and is 1e-06. To keep what was before, give --lora_dropout "
            "0.3 --lr 0.01 --lr_schedule cosine --lr_milestones 0.5 0.7 --lora_plus_ratio 16.0 --weight_decay 0.3 with")
    check_resumable(saved, sets_config(tmp_path, training=TrainConfig(steps=5000, save_every=7, val_every=9)))
    assert told in caplog.text and caplog.text.count("goes on with") == 1


def test_a_run_that_goes_on_as_it_was_says_nothing(tmp_path, caplog):
    recipe = TrainConfig(lr=0.01, lr_schedule="cosine")
    saved = saved_with(tmp_path, training=recipe)
    saved.meta["lora_config"] = LoRAConfig(dropout=0.3).to_dict()
    now = {"steps": 5000, "save_every": 7, "val_every": 9, "log_every": 1}
    for training in (dataclasses.replace(recipe, **now), dataclasses.replace(recipe, lr=1e-4, lr_probe=True)):
        check_resumable(saved, sets_config(tmp_path, training=training, lora=LoRAConfig(dropout=0.3)))
    assert not caplog.text
