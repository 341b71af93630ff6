"""benchmarks/soundbench.py at its smallest: two short trainings, their rows, and what becomes of a stopped suite."""

from __future__ import annotations

import functools
import json
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import sound_data
import sound_judge
import sound_train
import soundbench
import torch
import yaml
from sound_plan import Cell, Method, Run, cells_of, read_plan, runs_of

from selva.checkpoint import load_adapter
from selva.features import load_features
from selva.flow import SamplingConfig
from selva.training.config import TrainConfig
from selva.training.train import TrainingResult
from selva.utils.lock import FolderLock
from toyworld import measure
from toyworld.judging import fit_classifier

PLAN = {
    "preserve_from": "configs/tiny_new_sound.yaml",
    "bases": {"small": {"variant": "tiny_16k", "rank": 2, "lr": 1e-3, "steps": 4, "warmup_steps": 1, "batch_size": 2,
                        "precision": "fp32", "rslora": False}},
    "suites": {"small": {"sounds": ["gong"], "seeds": [1], "highest_rank": 0}},
    "questions": {"one": {
        "base": "small", "title": "T", "claim": "C", "source": "S", "reference": "plain",
        "methods": {"plain": {"preserve": []}, "faster": {"preserve": [], "lr": 1e-2},
                    "kept": {"preserve": ["a bell rings"], "rank_of_worth": 1}},
    }},
}


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """Short clips, few scenes, two solver steps; ``run(...)`` is the command, in a work folder of its own."""
    monkeypatch.setattr(soundbench, "make_trainer", lambda args: small_trainer(args))
    monkeypatch.setattr(measure, "CLASSES", {name: measure.CLASSES[name] for name in ("bell", "rain")})
    monkeypatch.setattr(sound_data, "CLASSES", measure.CLASSES)
    plan = tmp_path / "plan.yaml"
    plan.write_text(yaml.safe_dump(PLAN, sort_keys=False))

    def run(*options: str) -> int:
        return soundbench.main(["--work", str(tmp_path / "work"), "--results", str(tmp_path / "rows.jsonl"), "--plan",
                                str(plan), "--clips", "3", "--device", "cpu", *options])

    run.rows = lambda: [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    run.work = tmp_path / "work"
    return run


@functools.cache
def networks():
    maker = measure.ToyGenerator("tiny_16k", soundbench.resolve_device("cpu"))
    return maker, fit_classifier(count=3, names=("bell", "rain", "gong"))


def small_trainer(args):
    maker, classifier = networks()
    inputs = sound_data.Inputs(args.work, maker, 2.0, new_scenes=2, known_scenes=1, held_out_clips=2)
    return sound_train.Trainer(args.work, sound_judge.Judge(inputs, classifier, SamplingConfig(num_steps=2)), "cpu")


def test_a_suite_leaves_a_row_for_every_run_and_does_none_twice(bench, capsys):
    assert bench("--methods", "plain", "kept") == 0
    plain, kept = rows = bench.rows()
    assert [row["method"] for row in rows] == ["plain", "kept"] and len(capsys.readouterr().out.splitlines()) == 2
    assert plain["steps"] == 4 and plain["train_cpu_sec"] > 0 and 0 < plain["adapter_mb"] < 1
    assert plain["preserve_cpu_sec"] == 0 < kept["preserve_cpu_sec"]
    assert [one["step"] for one in plain["checkpoints"]] == [2, 4]
    last = plain["checkpoints"][-1]
    assert last["new"]["scenes"] == 2 and last["known"]["scenes"] == 2 and len(last["new"]["hits"]) == 2
    assert len(last["new"]["margins"]) == len(last["new"]["distances_db"]) == 2
    assert last["val_loss"] > 0 and 0 <= last["member_auc"] <= 1 and last["new"]["distance_db"] > 0
    assert [one["strength"] for one in plain["response"]] == list(sound_judge.STRENGTHS)
    ceiling = plain["ceiling"]
    assert ceiling == kept["ceiling"] and ceiling["hits"] == "11"
    assert ceiling["distance_db"] < 0.7 * plain["base"]["new"]["distance_db"]
    assert plain["base"] == kept["base"] and plain["settings"]["lr"] == 1e-3
    assert len(list((bench.work / "adapters").iterdir())) == 2 and not list((bench.work / "runs").iterdir())
    assert bench("--methods", "plain", "faster") == 0
    assert [row["method"] for row in bench.rows()] == ["plain", "kept", "faster"]
    assert bench.rows()[-1]["checkpoints"][-1]["val_loss"] != last["val_loss"]
    assert bench("--methods", "plain", "--seeds", "2") == 0  # only the first seed is judged on the way
    assert [one["step"] for one in bench.rows()[-1]["checkpoints"]] == [4] and bench.rows()[-1]["response"] == []


def test_soups_are_averages_at_the_rank_and_cost_what_their_trainings_cost(bench, monkeypatch):
    plan = bench.work.parent / "plan.yaml"
    content = yaml.safe_load(plan.read_text())
    content["questions"]["one"]["methods"] |= {
        "seeds": {"preserve": [], "soup": {"seeds": 2}}, "last": {"preserve": [], "soup": {"last": 2, "every": 1}}}
    plan.write_text(yaml.safe_dump(content, sort_keys=False))
    seen, whole = [], sound_train.train
    monkeypatch.setattr(
        sound_train, "train", lambda config, shared: (seen.append(config), whole(config, shared=shared))[1])
    eaten, average = [], sound_train.average
    monkeypatch.setattr(sound_train, "average", lambda parts, rank: (eaten.append(parts), average(parts, rank))[1])
    assert bench("--methods", "seeds", "last") == 0
    seeds, last = bench.rows()
    assert [config.training.seed for config in seen] == [1, 1 + sound_train.SOUP_SEED, 1]
    assert len({tuple(config.data_dir) for config in seen}) == 1 and seen[2].training.save_every == 1
    assert [Path(part.source).name for part in eaten[1]] == ["adapter_step00003.pt", "adapter_step00004.pt"]
    assert len(eaten[0]) == 2 and len({part.tensors[f"{part.layer_names()[0]}.lora_A"].sum() for part in eaten[0]}) == 2
    for row in (seeds, last):
        assert [one["step"] for one in row["checkpoints"]] == [4] and row["settings"]["soup"]
    assert seeds["key"] != last["key"] and not list((bench.work / "runs").iterdir())
    for row, parts in zip((seeds, last), eaten, strict=True):
        found = load_adapter(bench.work / "adapters" / f"{row['key']}.pt")
        assert found.meta["rank"] == 2 and found.meta["variant"] == "tiny_16k"
        name = found.layer_names()[0]
        mean = sum(part.factors(name)[1] @ part.factors(name)[0] for part in parts) / len(parts)
        u, s, vh = torch.linalg.svd(mean)
        b, a = found.factors(name)[::-1]
        torch.testing.assert_close(b @ a, u[:, :2] @ torch.diag(s[:2]) @ vh[:2], rtol=1e-3, atol=1e-6)
    content["questions"]["one"]["methods"]["last"]["soup"] = {"first": 2}
    plan.write_text(yaml.safe_dump(content, sort_keys=False))
    assert bench("--methods", "last") == 1


def test_a_run_of_another_process_is_left_to_it(bench):
    run = Run(read_plan(bench.work.parent / "plan.yaml").methods["plain"], Cell("select", "gong", 3, 1))
    with FolderLock(bench.work / "locks" / f"{run.key}.lock", "measures"):
        assert bench("--methods", "plain") == 0
    assert not (bench.work.parent / "rows.jsonl").exists()


def test_a_training_that_is_stopped_has_no_row_and_begins_anew(bench, monkeypatch):
    whole = sound_train.train

    def stopped(config, shared):
        (config.output_dir / "left").mkdir(parents=True)
        return TrainingResult(signal=signal.SIGTERM)

    monkeypatch.setattr(sound_train, "train", stopped)
    assert bench("--methods", "plain") == 143
    monkeypatch.setattr(sound_train, "train", whole)
    assert bench("--methods", "plain") == 0
    (row,) = bench.rows()
    assert row["steps"] == 4


def test_what_was_trained_is_not_trained_again_when_only_its_judgement_was_cut_short(bench, monkeypatch):
    def cut_short(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(sound_judge.Judge, "response", cut_short)
        assert bench("--methods", "plain") == 130
    monkeypatch.setattr(sound_train, "train", cut_short)
    assert bench("--methods", "plain") == 0
    assert bench.rows()[0]["train_cpu_sec"] > 0


def test_the_cost_of_a_training_is_the_same_whoever_has_made_what_is_shared(tmp_path, monkeypatch):
    def work(seconds: float) -> None:
        end = time.process_time() + seconds
        while time.process_time() < end:
            pass

    def training(config, shared):
        shared.clips("clips", lambda: work(0.4))
        shared.preserved("sounds", lambda: work(0.6))
        work(0.2)
        config.output_dir.mkdir(parents=True)
        (config.output_dir / "adapter_final.pt").write_bytes(bytes(2**20))
        return TrainingResult(config.output_dir / "adapter_final.pt", steps=4)

    monkeypatch.setattr(sound_train, "train", training)
    inputs = SimpleNamespace(clips=lambda cell, wordings, pictures: tmp_path)
    judge = SimpleNamespace(inputs=inputs, maker=SimpleNamespace(device=torch.device("cpu")))
    trainer = sound_train.Trainer(tmp_path / "work", judge, "cpu")
    method = Method("plain", {}, {"steps": 4, "variant": "tiny_16k"}, 0)
    for seed in (1, 2):
        found = trainer._trained(Run(method, Cell("select", "gong", 3, seed)), tmp_path / str(seed))
        assert found["train_cpu_sec"] == pytest.approx(0.2, abs=0.15)
        assert found["preserve_cpu_sec"] == pytest.approx(0.6, abs=0.15)
        assert found["adapter_mb"] == 1 and found["checkpoints"] == [2, 4]


def test_a_run_that_cannot_be_done_is_named_and_the_others_are_done(bench, monkeypatch, capsys):
    whole = sound_train.train

    def failing(config, shared):
        if config.training.lr > 5e-3:
            raise soundbench.UserError("no finite gradient")
        return whole(config, shared=shared)

    monkeypatch.setattr(sound_train, "train", failing)
    assert bench("--methods", "faster", "plain") == 1
    assert [row["method"] for row in bench.rows()] == ["plain"]
    assert "(faster) failed: no finite gradient" in capsys.readouterr().err


def test_mistakes_on_the_command_line_and_in_the_plan(bench, capsys):
    assert bench("--methods", "plane") == 2
    assert "--methods: unknown plane" in capsys.readouterr().err
    assert bench("--suite", "large") == 2
    plan = bench.work.parent / "plan.yaml"
    plan.write_text(plan.read_text().replace("lr: 0.01", "lrr: 0.01"))
    assert bench() == 1
    assert "method faster: unknown setting lrr" in capsys.readouterr().err
    plan.write_text(plan.read_text().replace("lrr: 0.01", "seed: 3"))
    assert bench() == 1
    assert "faster: seed cannot be changed" in capsys.readouterr().err
    plan.write_text(plan.read_text().replace("base: small", "base: smal"))
    assert bench() == 1
    assert "question one: base is 'smal', expected one of small" in capsys.readouterr().err


def test_methods_of_earlier_versions_are_left_out_of_a_suite_and_refused_by_name(bench, capsys):
    name, gone = next(iter(TrainConfig.REMOVED.items()))
    plan = bench.work.parent / "plan.yaml"
    plan.write_text(plan.read_text().replace("lr: 0.01", f"{name}: 0.05"))
    assert bench("--list") == 0
    listed = capsys.readouterr().out
    assert "plain" in listed and "faster" not in listed
    assert bench("--methods", "faster") == 1
    assert (f"method faster: {name} is 0.05, and this version no longer has it: {gone.reason}. Its rows name the commit"
            in capsys.readouterr().err)


def test_the_scenes_that_choose_and_those_that_judge_have_nothing_in_common(tmp_path):
    def seeds(scenes: str) -> set[int]:
        names = [sound_data.KNOWN, *sound_data.UNSEEN]
        return {sound_data._first_seed(scenes, name) + i for name in names for i in range(10_000)}

    select, judge = seeds("select"), seeds("judge")
    assert not select & judge and max(select | judge) < 9_000_000 and min(select | judge) >= measure.MEASURE_SEED
    assert len(select) == 10_000 * (1 + len(sound_data.UNSEEN))


def test_clips_can_have_several_prompts(bench):
    plan = bench.work.parent / "plan.yaml"
    content = yaml.safe_load(plan.read_text())
    content["questions"]["one"]["methods"]["worded"] = {"preserve": [], "wordings": 3}
    plan.write_text(yaml.safe_dump(content, sort_keys=False))
    assert bench("--methods", "worded") == 0
    (row,) = bench.rows()
    assert row["settings"]["wordings"] == 3
    (folder,) = (bench.work / "clips_2").glob("gong-1-3-3_wordings")
    lines = [line.split(": ") for line in (folder / "prompts.txt").read_text().splitlines()]
    assert [name for name, _ in lines] == [f"gong_{number:03d}.npz" for number in range(3) for _ in range(3)]
    assert len({tuple(line) for line in lines}) == 9
    for name, prompt in lines[2::3]:  # the last one is what the features were made with
        assert load_features(folder / name).prompt == prompt


def test_clips_can_be_sound_alone(bench):
    plan = bench.work.parent / "plan.yaml"
    content = yaml.safe_load(plan.read_text())
    content["questions"]["one"]["methods"]["heard"] = {"preserve": [], "pictures": False}
    plan.write_text(yaml.safe_dump(content, sort_keys=False))
    assert bench("--methods", "heard") == 0
    assert bench.rows()[0]["settings"]["pictures"] is False
    (folder,) = (bench.work / "clips_2").glob("gong-1-3-sound_only")
    found = [load_features(path).has_video for path in sorted(folder.glob("*.npz"))]
    assert found == [False] * 3 and len(list(folder.glob("*.flac"))) == 3


def test_the_held_out_loss_is_that_which_the_training_would_show(bench, monkeypatch):
    """Of the mode of the latents where that is trained on: the loss of draws rises meanwhile."""
    plan = bench.work.parent / "plan.yaml"
    content = yaml.safe_load(plan.read_text())
    content["questions"]["one"]["methods"]["mode"] = {"preserve": [], "latent": "mode"}
    plan.write_text(yaml.safe_dump(content, sort_keys=False))
    whole, asked = sound_judge.clip_losses, []
    monkeypatch.setattr(sound_judge, "clip_losses", lambda generator, clips, objective, *rest: (
        asked.append(objective.latent), whole(generator, clips, objective, *rest))[1])
    for method, expected in (("plain", {"sample"}), ("mode", {"mode"})):
        asked.clear()
        assert bench("--methods", method) == 0
        assert set(asked) <= expected and asked


def test_a_method_can_have_more_checkpoints(bench):
    plan = bench.work.parent / "plan.yaml"
    content = yaml.safe_load(plan.read_text())
    content["questions"]["one"]["methods"]["watched"] = {"preserve": [], "checkpoints": 4}
    plan.write_text(yaml.safe_dump(content, sort_keys=False))
    assert bench("--methods", "watched", "plain", "--seeds", "1") == 0
    watched, plain = sorted(bench.rows(), key=lambda row: row["method"], reverse=True)
    assert [one["step"] for one in watched["checkpoints"]] == [1, 2, 3, 4] and watched["settings"]["checkpoints"] == 4
    assert [one["step"] for one in plain["checkpoints"]] == [2, 4] and "checkpoints" not in plain["settings"]


def test_wordings_that_a_clip_has_are_told_from_others_whatever_the_colour():
    cell = Cell("select", "gong", 5, 1)
    one, several, every = (sound_data.trained_wordings(cell, count) for count in (1, 3, 99))
    assert len(one) == 24 and sum(one) < sum(several) <= sum(every) == 24
    assert all(later for first, later in zip(one, several, strict=True) if first)
    assert sound_data._wording("a golden gong", {"golden": ()}) == "a {colour} gong"


def test_the_most_valuable_runs_come_first():
    first, second, late = (Method(name, {}, {"name": name}, rank) for name, rank in
                           (("first", 0), ("second", 0), ("late", 1)))
    runs = runs_of([first, second, late], cells_of("select", ["bird", "gong"], 20, [1]))
    assert [(run.method.name, run.cell.sound) for run in runs] == [
        ("first", "bird"), ("second", "bird"), ("first", "gong"), ("second", "gong"), ("late", "bird"),
        ("late", "gong"),
    ]


def test_methods_of_the_same_settings_share_their_runs():
    one, other = (Method(name, {}, {"lr": 1.0}, 0) for name in ("one", "other"))
    assert len(runs_of([one, other], cells_of("select", ["bird"], 20, [1, 2]))) == 2


def test_rows_of_before_are_found_by_settings_that_were_not_written_out_then():
    def identity(**settings) -> str:
        return Method("m", {}, settings, 0).identity

    assert identity(lr=1.0, timestep_mode="logit_normal", preserve_near=0.0) == identity(lr=1.0)
    assert identity(lr=1.0, keep_unconditional=0.0) == identity(lr=1.0) != identity(lr=1.0, keep_unconditional=0.25)
    assert len({identity(lr=1.0), identity(lr=1.0, timestep_mode="uniform"), identity(lr=1.0, preserve_near=0.5)}) == 3


def test_every_method_of_the_plan_can_be_trained_unless_its_verdict_says_that_it_is_gone():
    plan = read_plan()
    here = [one for one in plan.methods.values() if not soundbench.lost_settings(one)]
    soundbench.check_settings([Run(one, Cell("select", "gong", 20, 1)) for one in here])
    assert len(here) >= 12
    gone = plan.methods.keys() - {one.name for one in here}
    assert all("gone" in question.verdict for question in plan.questions if gone.intersection(question.methods))
    for question in plan.questions:
        assert question.reference in question.methods and len(question.methods) > 1
