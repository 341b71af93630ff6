"""selva.training.teacher: lessons are steps of the base model's own sampling, and the adapter is held to them."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from recorded_graph import RecordedGraphs
from small_run import CONFIG, make_base, make_clips, make_generator

from selva.data.dataset import ListDataset
from selva.lora.config import LoRAConfig
from selva.lora.layers import base_only
from selva.training.objective import flow_loss
from selva.training.run import TrainingRun
from selva.training.teacher import PHASES, Lesson, Teacher, lesson_loss, num_lessons
from selva.training.ways import dropout_seed
from selva.utils.distributed import World
from selva.utils.graph import GraphedCalls

FP32 = torch.float32
TEXT = torch.randn(3, 7, 14, generator=torch.Generator().manual_seed(5))
KEEP = dataclasses.replace(CONFIG, null_prob=0.0, batch_size=4)


def make_teacher(rows: int = 2, config=KEEP, world: World | None = None, lora: LoRAConfig | None = None) -> Teacher:
    generator = make_generator(lora or LoRAConfig(rank=2)).train()
    return Teacher(generator, ListDataset(make_clips(5) + make_clips(3, 1.5)), TEXT, rows, config, FP32,
                   world or World())


def learn(teacher: Teacher) -> None:
    """Let the adapter change something."""
    with torch.no_grad():
        for parameter in teacher.generator.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.2)


def equal(one: Lesson, other: Lesson) -> bool:
    return all(torch.equal(getattr(one, name), getattr(other, name)) for name in
               ("latent", "t", "velocity", "clip_f", "sync_f", "text_f"))


@pytest.mark.parametrize(("batch", "share", "expected"), [(8, 0.4, 3), (8, 0.5, 4), (2, 0.9, 1), (4, 0.01, 1)])
def test_lessons_are_the_share_but_neither_none_nor_all(batch, share, expected):
    assert num_lessons(batch, share) == expected


def test_lessons_follow_the_base_model_from_noise_to_its_sound():
    """One row from its noise on is an Euler sampling of the base model at the lesson's times, whatever was learned."""
    teacher, base = make_teacher(1), make_base()
    learn(teacher)
    lessons = [teacher.lesson(number) for number in range(PHASES)]
    times = [lesson.t.item() for lesson in lessons]
    assert times[0] == 0 and 0.9 < times[-1] < 1 and all(a < b for a, b in itertools.pairwise(times))
    base.set_sequence(*lessons[0].lengths)
    x = lessons[0].latent
    with torch.no_grad():
        conditions = base.preprocess_conditions(lessons[0].clip_f, lessons[0].sync_f, lessons[0].text_f)
        for lesson, following in itertools.pairwise(lessons):
            torch.testing.assert_close(lesson.latent, x)
            v = base.predict_flow(x, lesson.t, conditions)
            torch.testing.assert_close(lesson.velocity, v)
            x = x + (following.t - lesson.t) * v
    again = teacher.lesson(PHASES)
    assert again.t.item() == 0 and not torch.equal(again.latent, lessons[0].latent)
    assert torch.equal(again.text_f[0], TEXT[1])  # the next prompt


@pytest.mark.parametrize("lora", [
    LoRAConfig(rank=2), LoRAConfig(rank=2, dora=True), LoRAConfig(rank=2, init="pissa"),
    LoRAConfig(rank=2, targets=("all",), dropout=0.3)], ids=["plain", "DoRA", "PiSSA", "all, dropout"])
def test_a_fresh_adapter_has_nothing_to_unlearn_and_a_trained_one_has(lora):
    teacher = make_teacher(lora=lora)
    lesson = teacher.lesson(0)
    factors = [p for p in teacher.generator.parameters() if p.requires_grad]
    loss = lesson_loss(teacher.generator, lesson, FP32)
    assert loss.shape == (2,) and loss.max() < 1e-9
    gradient = torch.autograd.grad(loss.sum(), factors, allow_unused=True)
    assert max(g.abs().max().item() for g in gradient if g is not None) < 1e-3
    learn(teacher)
    with base_only(teacher.generator):
        assert lesson_loss(teacher.generator, lesson, FP32).max() < 1e-9
    assert lesson_loss(teacher.generator, lesson, FP32).min() > 1e-6


@pytest.mark.parametrize("number", [1, PHASES - 1, PHASES, 2 * PHASES + 5])
def test_a_lesson_after_a_restart_is_the_same_bit_for_bit(number):
    straight = make_teacher(3)
    for earlier in range(number):
        straight.lesson(earlier)
    assert equal(straight.lesson(number), make_teacher(3).lesson(number))


def test_rows_are_at_different_times_and_processes_have_different_sounds():
    alone = make_teacher(4).lesson(40)
    assert alone.t.unique().numel() == 4
    first, second = (make_teacher(2, world=World(rank, 2)).lesson(40) for rank in (0, 1))
    assert torch.equal(torch.cat((first.t, second.t)), alone.t)  # as one process would have them all
    torch.testing.assert_close(torch.cat((first.velocity, second.velocity)), alone.velocity, rtol=1e-4, atol=1e-5)


def test_conditions_are_dropped_and_lent_as_in_training():
    def seen(**changes) -> list[tuple[bool, bool, bool]]:
        teacher = make_teacher(1, dataclasses.replace(KEEP, **changes))
        found = []
        for number in range(0, 40 * PHASES, PHASES):
            lesson = teacher.lesson(number)  # each is the first of a sound, so nothing is repeated for long
            empty = teacher.generator.empty_features(1)
            found.append(tuple(torch.equal(own, nothing) for own, nothing in zip(
                (lesson.clip_f, lesson.sync_f, lesson.text_f), empty, strict=True)))
        return found

    looks, motion, text = zip(*seen(), strict=True)
    assert 0.4 < sum(looks) / 40 < 0.6 and not any(motion) and not any(text)
    assert all(clip for clip, _, _ in seen(clip_features="empty"))
    _, motion, text = zip(*seen(null_prob=0.5), strict=True)
    assert 8 < sum(motion) < 32 and 8 < sum(text) < 32 and motion != text


def test_prompts_near_those_of_the_clips_are_asked_for_more_often():
    clips = make_clips()
    text = torch.stack([clips[0].text_f, *TEXT, TEXT[0] - 1])
    teacher = Teacher(make_generator(), ListDataset(clips), text, 1, KEEP, FP32, World(), near=0.7)
    found = []
    for number in range(0, 40 * PHASES, PHASES):
        lesson = teacher.lesson(number)
        nothing = teacher.generator.empty_features(1)[0]
        which = next(i for i in range(len(text)) if torch.equal(lesson.text_f[0], text[i]))
        found.append((which, torch.equal(lesson.clip_f, nothing)))
    near = [unseen for which, unseen in found if which == 0]
    assert 29 <= len(near) <= 33 and abs(sum(near) - len(near) / 2) < 2
    assert {which for which, _ in found} == {0, 1, 2, 3, 4}


def make_run(
    number: int = 2, graphs: GraphedCalls | None = None, checkpointing: bool = False, **changes
) -> TrainingRun:
    config = dataclasses.replace(KEEP, **changes)
    torch.manual_seed(config.seed)
    generator, clips = make_generator(), ListDataset(make_clips())
    generator.gradient_checkpointing = checkpointing
    teacher = Teacher(generator, clips, TEXT, number, config, FP32, World())
    return TrainingRun(generator, clips, ListDataset([]), config, FP32, graphs=graphs, teacher=teacher)


def factors_of(run: TrainingRun) -> list[torch.Tensor]:
    return [p.detach().clone() for p in run.parameters]


@pytest.mark.parametrize("grad_accum", [1, 3])
def test_an_update_is_by_the_mean_over_clips_and_lessons(grad_accum):
    run = make_run(1, grad_accum=grad_accum, steps=6, keep_unconditional=0.0)
    assert run.num_clips == 3 and len(run.batches.draw()) == 3
    run = make_run(1, grad_accum=grad_accum, steps=6, keep_unconditional=0.0)
    assert run.teacher is not None
    learn(run.teacher)
    other = make_run(1, grad_accum=grad_accum, steps=6, keep_unconditional=0.0)
    for own, parameter in zip(run.parameters, other.parameters, strict=True):
        parameter.data.copy_(own)
    parts = [other._draw(part) for part in range(grad_accum)]
    loss, _ = run.train_step()
    other.generator.train()
    torch.manual_seed(dropout_seed(KEEP.seed, 0, 0))
    expected = 0.0
    for batch, noise, lesson in parts:
        expected += flow_loss(other.generator, batch, noise, other.config, FP32).sum().item()
        expected += lesson_loss(other.generator, lesson, FP32).sum().item()
    assert loss.item() == pytest.approx(expected / (4 * grad_accum), rel=1e-5)


def test_lessons_hold_the_adapter_back():
    """Trained on clips beside lessons, the model stays nearer to the base model where the lessons are."""
    plain = TrainingRun(make_generator(), ListDataset(make_clips()), ListDataset([]),
                        dataclasses.replace(KEEP, batch_size=2, steps=60), FP32)
    taught = make_run(2, steps=60)
    for _ in range(60):
        plain.train_step()
        taught.train_step()
    lessons = [make_teacher(3).lesson(number) for number in range(1000, 1000 + PHASES, 3)]
    left, kept = (sum(lesson_loss(run.generator.eval(), lesson, FP32).mean().item() for lesson in lessons)
                  for run in (plain, taught))
    assert kept < 0.5 * left


@pytest.mark.parametrize("changes", [{}, {"grad_accum": 2}, {"checkpointing": True}], ids=str)
def test_graphs_and_recomputed_blocks_change_nothing(changes):
    runs = [make_run(**changes, steps=5)]
    checkpointing = changes.pop("checkpointing", False)
    if checkpointing:
        runs.append(make_run(steps=5))
    else:
        runs.append(make_run(**changes, steps=5, graphs=GraphedCalls(RecordedGraphs(), "training", required=True)))
    found = [[run.train_step()[0].item() for _ in range(5)] for run in runs]
    assert found[0] == found[1]
    for one, other in zip(*map(factors_of, runs), strict=True):
        assert torch.equal(one, other)
