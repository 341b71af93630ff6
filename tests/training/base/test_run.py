"""Steps of a base training: the reference's numbers, the same for any number of processes, and exact resume."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pathlib
from pathlib import Path

import pytest
import small_run
import torch
from base_run import CONFIG, make_run, make_sets
from golden_case import GOLDEN
from make_data import TINY, put_memmap
from small_run import SMALL, make_base

from selva.data.dataset import Batch
from selva.models.config import GeneratorConfig
from selva.models.generator import Generator
from selva.training.base import run as run_module
from selva.training.base.checkpoint import Checkpoints, all_checkpoints, find_checkpoint, load_, read_numbers
from selva.training.base.mmaudio_files import MMAudioSchedule, MMAudioState, write_checkpoint
from selva.training.base.run import MOMENTS, BaseRun, choose_trainable_
from selva.training.base.setup import go_on_from_mmaudio_, open_memmap
from selva.training.base.stream import BatchStream, Part, Step, own_parts
from selva.training.objective import ALONE, NoiseSample
from selva.utils.distributed import World
from selva.utils.errors import UserError


def losses(run: BaseRun, steps: int) -> list[float]:
    return [run.train_step()[0].item() for _ in range(steps)]


# -- the reference -----------------------------------------------------------------------------------------------------


DRAWS = ("latent", "t", "x0", "null_video", "null_text")


def golden_step(case, noise_of_step: int) -> Step:
    """Return the batch of the reference's five steps, with the draws of one of them."""
    inputs, stored = case.inputs(), case.stored
    draws = {name: torch.from_numpy(stored[f"draw_{name}"][noise_of_step]) for name in DRAWS}
    video, text = inputs["video_exist"].bool(), inputs["text_exist"].bool()
    batch = Batch(inputs["a_mean"], inputs["a_std_raw"].abs() + 0.1, inputs["clip_f"], inputs["sync_f"],
                  inputs["text_f"], video, tuple("abcd"))
    noise = NoiseSample(draws["latent"], torch.sigmoid(draws["t"]), draws["x0"], draws["null_video"] < 0.1,
                        (draws["null_text"] < 0.1) | ~text)
    return Step([Part(batch, noise)], [4, 0])


@pytest.mark.parametrize("eps", [1e-6, 1e-8])
def test_five_steps_of_the_reference(golden, monkeypatch, eps):
    case = golden("base_training")
    settings = case.config["training"]
    generator = Generator(GeneratorConfig(**case.config["generator"]))
    start = case.weights()
    generator.load_published(start)
    config = dataclasses.replace(CONFIG, batch_size=4, adam_eps=eps, weight_decay=settings["weight_decay"])
    clips, val_clips = make_sets()
    run = BaseRun(generator, clips, val_clips, config, torch.float32)
    monkeypatch.setattr(run_module, "learning_rate", lambda step, config: settings["learning_rates"][step])
    steps = iter([golden_step(case, number) for number in range(5)])
    monkeypatch.setattr(run.stream, "draw", lambda: next(steps))
    results, weights = [], []
    for _ in range(5):
        results.append(run.train_step())
        weights.append({name: p.detach().clone() for name, p in run.parameters.items()})
    prefix = "steps" if eps == 1e-6 else "steps_eps_1e-8"
    case.check(f"{prefix}/loss", torch.stack([loss for loss, _ in results]))
    names = [name.removeprefix(f"{prefix}/change/") for name in case.info["outputs"] if name.startswith(f"{prefix}/ch")]
    assert len(names) >= 3
    for name in names:
        case.check(f"{prefix}/change/{name}", weights[-1][name] - start[name])
    if eps == 1e-6:
        case.check("steps/grad_norm", torch.stack([norm for _, norm in results]))
        for output in case.info["outputs"]:
            kind, _, name = output.removeprefix("steps/").partition("/")
            if output.startswith("steps/weight/"):
                case.check(output, torch.stack([one[name] for one in weights]))
            elif output.startswith("steps/ema_"):
                case.check(output, run.average.values([0.05, 0.1].index(float(kind[4:])))[name])


# -- one process, several ----------------------------------------------------------------------------------------------


def test_processes_compute_the_parts_of_one_batch():
    whole = [own_parts(10, None, World(rank, 3)) for rank in range(3)]
    assert [s for parts in whole for s in parts] == [slice(0, 3), slice(3, 6), slice(6, 10)]
    parts = [own_parts(10, 2, World(rank, 3)) for rank in range(3)]
    assert [len(p) for p in parts] == [2, 2, 2]  # as many in each, as they have to meet
    assert [i for p in parts for s in p for i in range(s.start, s.stop)] == list(range(10))
    with pytest.raises(UserError, match="at least one row for each"):
        own_parts(2, None, World(0, 3))


@pytest.mark.parametrize("size", [2, 3])
def test_several_processes_read_the_batch_and_the_noise_of_one(size):
    clips, _ = make_sets()

    def read(world: World) -> Step:
        stream = BatchStream(clips, CONFIG, batch_size=6, steps=6, world=world)
        try:
            return stream.read(2, 12)
        finally:
            stream.close()

    (one,) = read(ALONE).parts
    several = [read(World(rank, size)).parts[0] for rank in range(size)]
    assert one.batch.ids == tuple(name for part in several for name in part.batch.ids)
    for name in ("posterior", "t", "noise", "drop_video", "drop_text"):
        assert torch.equal(getattr(one.noise, name), torch.cat([getattr(part.noise, name) for part in several])), name


def test_the_noise_of_a_visit_differs_between_epochs_and_copies():
    clips, _ = make_sets()
    stream = BatchStream(clips, CONFIG, batch_size=clips.mixture.size, steps=9, world=ALONE)
    first, second = (stream.read(0, epoch * clips.mixture.size).parts[0] for epoch in range(2))
    stream.close()
    draws = torch.cat([first.noise.noise, second.noise.noise])[:, 0, 0]
    assert len(set(draws.tolist())) == 2 * clips.mixture.size


def test_micro_batches_add_up():
    torch.testing.assert_close(losses(make_run(dataclasses.replace(CONFIG, micro_batch_size=2)), 3),
                               losses(make_run(), 3), rtol=1e-6, atol=0)


def test_batches_are_read_ahead_and_their_waiting_is_counted():
    clips, _ = make_sets()
    stream = BatchStream(clips, CONFIG, batch_size=4, steps=9, world=ALONE, prefetch=3)
    stream.start_at(5, 20)
    drawn = [stream.draw() for _ in range(4)]
    stream.close()
    again = BatchStream(clips, CONFIG, batch_size=4, steps=9, world=ALONE, prefetch=1)
    assert [step.parts[0].batch.ids for step in drawn] == [again.read(5 + i, 20 + 4 * i).parts[0].batch.ids
                                                           for i in range(4)]
    again.close()
    assert stream.waited_sec > 0


# -- what is trained ---------------------------------------------------------------------------------------------------


def test_patterns_choose_what_is_trained():
    run = make_run(dataclasses.replace(CONFIG, trainable=("fused_blocks.*", "empty_*")))
    before = {name: p.detach().clone() for name, p in run.parameters.items()}
    run.train_step()
    changed = {name for name, p in run.parameters.items() if not torch.equal(p, before[name])}
    assert changed and changed <= set(run.trained) and "empty_string_feat" not in run.trained
    assert all(name.startswith(("fused_blocks.", "empty_")) for name in run.trained)
    assert all(torch.equal(run.average.values(0)[name], before[name]) for name in run.parameters if name not in changed)


def test_the_second_version_can_be_trained(monkeypatch):
    """MMAudio's own trainer cannot."""
    monkeypatch.setattr(small_run, "SMALL", dataclasses.replace(SMALL, v2=True))
    run = make_run()
    before = run.parameters["t_embed.mlp.0.weight"].detach().clone()
    assert all(map(math.isfinite, losses(run, 2))) and len(run.trained) == len(run.parameters) - 3
    assert not torch.equal(before, run.parameters["t_embed.mlp.0.weight"])


def test_blocks_that_are_computed_again_change_nothing():
    again = make_run(dataclasses.replace(CONFIG, grad_checkpointing=True))
    assert losses(again, 2) == losses(make_run(), 2)


def test_a_pattern_that_matches_nothing_is_refused():
    with pytest.raises(UserError, match="--trainable fussed"):
        choose_trainable_(make_base(), ["*", "fussed_blocks.*"])


def test_epsilon_follows_the_precision():
    config = dataclasses.replace(CONFIG, adam_eps=None)
    assert config.eps("fp32") == 1e-8 and config.eps("bf16") == 1e-6
    assert make_run(config).optimizer.param_groups[0]["eps"] == 1e-8
    assert make_run(config, dtype=torch.bfloat16).optimizer.param_groups[0]["eps"] == 1e-6
    assert dataclasses.replace(CONFIG, adam_eps=1e-7).eps("bf16") == 1e-7


def test_weights_and_their_updates_are_float32_in_bf16():
    run = make_run(dtype=torch.bfloat16)
    run.train_step()
    assert {x.dtype for x in run.tensors().values()} == {torch.float32}


def test_an_update_that_is_not_finite_is_left_out():
    run = make_run()
    run.train_step()
    before = {name: p.detach().clone() for name, p in run.parameters.items()}
    draw = run.stream.draw

    def spoilt() -> Step:
        step = draw()
        step.parts[0].batch.mean.fill_(float("nan"))
        return step

    run.stream.draw = spoilt
    run.train_step()
    assert all(torch.equal(p, before[name]) for name, p in run.parameters.items())


# -- resuming ----------------------------------------------------------------------------------------------------------


def save(run: BaseRun, folder: Path, **about) -> Path:
    checkpoints = Checkpoints(folder, run.world, 0, about)
    checkpoints.save(run)
    checkpoints.wait()
    return all_checkpoints(folder / "checkpoints")[-1]


@pytest.mark.parametrize("steps", [0, 2, 5])
def test_a_continued_run_ends_with_the_same_bits(tmp_path, steps):
    whole = make_run()
    losses(whole, 5)
    first = make_run()
    losses(first, steps)
    path = save(first, tmp_path)
    second = make_run()
    losses(second, 1)  # whatever it was before
    load_(second, path)
    assert (second.step, second.place, second.seen) == (first.step, first.place, first.seen)
    losses(second, 5 - steps)
    for name, value in whole.tensors().items():
        assert torch.equal(value, second.tensors()[name]), name
    assert whole.numbers() == second.numbers()
    assert whole.validate() == second.validate()


def test_the_state_is_that_of_the_moment_although_the_training_goes_on(tmp_path):
    run = make_run()
    losses(run, 2)
    before = {name: value.clone() for name, value in run.tensors().items()}
    checkpoints = Checkpoints(tmp_path, ALONE, 0, {})
    checkpoints.save(run)
    losses(run, 2)
    checkpoints.wait()
    other = make_run()
    load_(other, tmp_path / "checkpoints" / "step_00000002")
    assert all(torch.equal(value, before[name]) for name, value in other.tensors().items())


def test_only_the_newest_are_kept_and_nothing_unfinished_has_a_final_name(tmp_path):
    run = make_run()
    checkpoints = Checkpoints(tmp_path, ALONE, 2, {})
    for _ in range(3):
        run.train_step()
        checkpoints.save(run)
    checkpoints.wait()
    assert [path.name for path in all_checkpoints(tmp_path / "checkpoints")] == ["step_00000002", "step_00000003"]
    assert not list((tmp_path / "checkpoints").glob(".partial*"))
    (tmp_path / "checkpoints" / ".partial-step_00000009").mkdir()
    checkpoints.clean()
    assert not list((tmp_path / "checkpoints").glob(".partial*"))


def test_an_old_checkpoint_that_cannot_be_deleted_is_named_and_the_new_one_is_saved(tmp_path, monkeypatch, caplog):
    """Windows keeps what another program is reading."""
    run = make_run()
    checkpoints = Checkpoints(tmp_path, ALONE, 1, {})
    run.train_step()
    checkpoints.save(run)
    checkpoints.wait()
    rename = Path.rename

    def busy(path: Path, target: Path) -> Path:
        if path.name == "step_00000001":
            raise PermissionError(13, "is being used by another process", str(path))
        return rename(path, target)

    def rmtree(path, ignore_errors=False):
        if not ignore_errors:
            raise PermissionError(13, "is being used by another process", str(path))

    monkeypatch.setattr(Path, "rename", busy)
    monkeypatch.setattr("shutil.rmtree", rmtree)
    run.train_step()
    checkpoints.save(run)
    checkpoints.wait()
    assert checkpoints.newest == 2 and len(all_checkpoints(tmp_path / "checkpoints")) == 2
    assert "step_00000001: not deleted" in caplog.text and "not saved" not in caplog.text


def test_auto_takes_the_newest_that_can_be_read(tmp_path, caplog):
    run = make_run()
    assert find_checkpoint("auto", tmp_path) is None
    for _ in range(2):
        run.train_step()
        save(run, tmp_path)
    older, newest = all_checkpoints(tmp_path / "checkpoints")
    assert find_checkpoint("auto", tmp_path) == newest and read_numbers(newest)["step"] == 2
    (newest / ".metadata").unlink()
    assert find_checkpoint("auto", tmp_path) == older
    assert "incomplete" in caplog.text


def test_nothing_in_a_checkpoint_is_executed(tmp_path):
    import pickle

    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "executed",))

    path = save(make_run(), tmp_path)
    (path / ".metadata").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(UserError, match="never loaded"):
        load_(make_run(), path)
    assert not (tmp_path / "executed").exists()


def test_a_checkpoint_of_another_system_goes_on(tmp_path):
    import pickle

    class Elsewhere:
        def __reduce__(self):
            return (pathlib.WindowsPath if os.name == "posix" else pathlib.PosixPath, ("runs", "step_00000001"))

    run = make_run()
    losses(run, 1)
    path = save(run, tmp_path)
    metadata = pickle.loads((path / ".metadata").read_bytes())
    metadata.storage_meta.checkpoint_id = Elsewhere()
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    other = make_run()
    load_(other, path)
    assert other.step == 1 and all(torch.equal(value, other.tensors()[name]) for name, value in run.tensors().items())


def test_a_checkpoint_of_another_choice_of_weights_is_refused(tmp_path):
    path = save(make_run(), tmp_path)
    with pytest.raises(UserError, match="holds other tensors"):
        load_(make_run(dataclasses.replace(CONFIG, trainable=("fused_blocks.*",))), path)


def test_a_damaged_checkpoint_is_refused(tmp_path):
    path = save(make_run(), tmp_path)
    for file in path.glob("*.distcp"):
        file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(UserError, match="cannot be read"):
        load_(make_run(), path)


# -- MMAudio's own checkpoints -----------------------------------------------------------------------------------------


def test_a_training_of_mmaudio_goes_on(tmp_path):
    """Its state is read back into a run, which then makes the step that the run before would have made."""
    first = make_run()
    losses(first, 3)
    moments = {moment: {name: first.tensors()[f"{moment}.{name}"] for name in first.trained} for moment in MOMENTS}
    tracks = tuple(first.average.values(number) for number in range(2))
    path = tmp_path / "run_ckpt_last.pth"
    write_checkpoint(path, MMAudioState(3, first.weights(), moments, tracks), MMAudioSchedule())
    second = make_run()
    go_on_from_mmaudio_(second, path)
    assert (second.step, second.place, second.average.step) == (3, 18, 3)
    assert losses(second, 2) == losses(first, 2)
    for name, value in first.tensors().items():
        assert torch.equal(value, second.tensors()[name]), name


def test_a_training_of_mmaudio_of_another_model_is_refused():
    with pytest.raises(UserError, match="expected"):
        go_on_from_mmaudio_(make_run(), GOLDEN / "base_checkpoint" / "tiny_ckpt_last.pth")


def test_labels_that_were_edited_after_the_extraction_are_said(tmp_path, caplog):
    """A base training reads the text features of the rows, whatever their labels are by now."""
    put_memmap(tmp_path / "rows", rows=2)
    record = {"plan": {"rows": [["id_0", 'says "0"'], ["id_1", "a gong"]]}, "digests": ["x", "x"]}
    (tmp_path / "rows.rows.json").write_text(json.dumps(record))
    open_memmap(tmp_path / "rows", TINY)
    assert "rows: 1 label was edited after the extraction, and text features are still those of before" in caplog.text
    assert caplog.text.rstrip().endswith("extract again with the new prompts: id_1")
