"""selva.training.prior_preservation: the model's own sounds among the clips, in the share that was asked for."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from small_run import CONFIG, make_clips, make_generator

from selva.data.dataset import ConcatDataset, ListDataset, TrainingClip, collate
from selva.data.padding import Padding
from selva.flow import SamplingConfig
from selva.lora.config import LoRAConfig
from selva.sampling import sample_latents
from selva.training.objective import flow_loss, sample_noise
from selva.training.prior_preservation import mixture, prompt_shares, turns, with_preserved
from selva.training.run import TrainingRun

FP32 = torch.float32
PROMPTS = ["a dog barks", "rain"]
TEXT = torch.randn(2, 7, 14, generator=torch.Generator().manual_seed(5))


def make(count: int = 3, share: float = 0.5, **changes):
    model, clips = make_generator(LoRAConfig(rank=2)).train(), make_clips(count)
    if changes:
        clips = [dataclasses.replace(clip, **changes) for clip in clips]
    return model, clips, with_preserved(model, ListDataset(clips), PROMPTS, TEXT, share, seed=7, precision=FP32)


def assert_same_sounds(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    """Assert that sounds differ by float32 rounding at most, which the steps of the solver carry along.

    Seen are 1e-6 of the largest value in one batch or another; sounds of other seeds differ by more than its whole.
    """
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-4 * other.abs().max().item())


def test_the_clips_come_first_and_the_models_own_sounds_after_them():
    model, clips, joined = make()
    assert len(joined) == 12 and joined.ids[:6] == 2 * [clip.id for clip in clips] and model.training
    for index in range(6):
        clip, made, which = clips[index % 3], joined.clip(index + 6), index % 2
        assert joined.clip(index) is clip and joined.lengths(index) == joined.lengths(index + 6)
        assert made.prompt == PROMPTS[which] and torch.equal(made.text_f, TEXT[which])
        # Every other sound has the looks of its clip, not always those of the same prompt.
        looks = clip.clip_f if index in (1, 2, 5) else model.empty_features(1)[0][0].detach()
        assert torch.equal(made.clip_f, looks) and torch.equal(made.sync_f, clip.sync_f)
        expected = sample_latents(
            model.eval(), looks[None], clip.sync_f[None], TEXT[which][None], [7 + index],
            SamplingConfig(12, 0.0, "ab2"),
        )[0]
        assert_same_sounds([made.mean], [expected])
        assert made.std.eq(0).all()


@pytest.mark.parametrize(
    ("clips", "prompts", "share", "expected"),
    [(10, 1, 0.5, (1, 10)), (10, 5, 0.5, (1, 10)), (10, 1, 0.75, (1, 30)), (10, 6, 0.5, (2, 20)),
     (10, 1, 0.2, (1, 2)), (20, 20, 0.4, (3, 40)), (1000, 20, 0.1, (1, 111))],
)
def test_the_share_is_of_all_sounds_and_every_prompt_has_two(clips, prompts, share, expected):
    assert mixture(clips, prompts, share) == expected


def test_a_prompt_does_not_always_borrow_the_same_moments():
    _, clips, joined = make(2)
    made = [joined.clip(i) for i in range(len(joined) // 2, len(joined))]
    rain = [clip for clip in made if clip.prompt == "rain"]
    borrowed = {i for clip in rain for i in (0, 1) if torch.equal(clip.sync_f, clips[i].sync_f)}
    assert borrowed == {0, 1}


@pytest.mark.parametrize("prompts", [1, 2, 3, 40])
def test_every_prompt_is_made_with_looks_and_without(prompts):
    order = turns([1 / prompts] * prompts, 2 * prompts)
    looks = [turn.has_looks for turn in order]
    assert [turn.prompt for turn in order] == 2 * list(range(prompts))
    assert sum(looks) == prompts and all(looks[i] != looks[i + prompts] for i in range(prompts))


def test_turns_follow_the_shares_and_leave_no_prompt_out():
    order = turns([0.5, 0.5, 0.0, 0.0], 24)
    assert [sum(turn.prompt == which for turn in order) for which in range(4)] == [11, 11, 1, 1]
    for which in range(2):
        assert [turn.time for turn in order if turn.prompt == which] == list(range(11))
    assert [turn.prompt for turn in turns([0.7, 0.1, 0.1, 0.1], 3)] == [0, 1, 2]


def test_the_prompts_most_like_those_of_the_clips_get_the_share_of_the_nearest():
    text = torch.zeros(8, 7, 14)
    text[:, :, 0] = torch.arange(8.0)[:, None]  # of prompt i, the mean over the tokens is i
    text[:, 0] += 5
    text[:, 1] -= 5
    clips = [dataclasses.replace(clip, text_f=torch.full((7, 14), 0.0)) for clip in make_clips(2)]
    clips[1] = dataclasses.replace(clips[1], text_f=torch.zeros(7, 14).index_fill(1, torch.tensor([0]), 6.4))
    assert prompt_shares(text, ListDataset(clips), 0.5) == pytest.approx([0.3125, *[0.0625] * 5, 0.3125, 0.0625])
    assert prompt_shares(text, ListDataset(clips), 0.0) == [0.125] * 8

    class WithTwoPrompts(ListDataset):
        def num_prompts(self, index: int) -> int:
            return 2

        def prompt(self, index: int, number: int):
            return ("another", clips[1].text_f) if number else super().prompt(index, number)

    assert prompt_shares(text, WithTwoPrompts(clips[:1]), 0.5) == prompt_shares(text, ListDataset(clips), 0.5)


def test_sounds_near_the_clips_are_made_more_often_with_and_without_looks(caplog):
    model, clips = make_generator(LoRAConfig(rank=2)), make_clips(3)
    near = torch.stack([TEXT[0], clips[0].text_f, TEXT[1], TEXT[1] + 1])
    prompts = ["a dog barks", "a gong", "rain", "a storm"]
    with caplog.at_level("INFO"):
        joined = with_preserved(model, ListDataset(clips), prompts, near, 0.8, seed=7, precision=FP32, near=0.6)
    made = [joined.clip(i) for i in range(len(joined)) if "preserved" in joined.ids[i]]
    counts = {prompt: sum(clip.prompt == prompt for clip in made) for prompt in prompts}
    assert len(made) == 12 and counts["a gong"] == 9 and min(counts.values()) >= 1
    nothing = model.empty_features(1)[0][0]
    assert sum(torch.equal(clip.clip_f, nothing) for clip in made if clip.prompt == "a gong") in (4, 5)
    assert "(--preserve_near 0.6): 'a gong' x 9" in caplog.text and "'rain'" not in caplog.text


@pytest.mark.parametrize("share", [0, 1, -0.5, 1.5, float("nan")])
def test_a_share_must_leave_room_for_both(share):
    with pytest.raises(ValueError, match="preserve_share is"):
        mixture(10, 2, share)


def test_a_large_share_repeats_a_limited_number_of_sounds(monkeypatch):
    monkeypatch.setattr("selva.training.prior_preservation.MOST_SOUNDS", 2)
    _, _, joined = make(share=0.6)
    assert len(joined) == 3 + round(3 * 1.5)
    assert joined.clip(3) is joined.clip(5) and joined.clip(4) is not joined.clip(5)


@pytest.mark.parametrize("frames", [1, 100, 10_000], ids=["singly", "a few at once", "all at once"])
def test_sounds_do_not_depend_on_how_many_are_made_at_once(monkeypatch, frames):
    """Of three lengths, with and without pictures, in an order that batches have to leave and return to."""
    nan = {"clip_f": torch.full((8, 10), torch.nan), "sync_f": torch.full((24, 12), torch.nan), "has_video": False}
    clips = make_clips(2, 1.0) + make_clips(3, 1.5) + make_clips(1, 0.8) + make_clips(2, 1.0)
    clips[1] = dataclasses.replace(clips[1], **nan)
    model, batches = make_generator(LoRAConfig(rank=2)), []

    def counted(*args, **options):
        batches.append(len(args[1]))
        return sample_latents(*args, **options)

    def sounds() -> list[TrainingClip]:
        joined = with_preserved(model, ListDataset(clips), PROMPTS, TEXT, 0.6, seed=7, precision=FP32)
        return [joined.clip(i) for i in range(len(clips), len(joined))]

    monkeypatch.setattr("selva.training.prior_preservation.sample_latents", counted)
    expected = sounds()
    by_default, batches[:] = list(batches), []
    monkeypatch.setattr("selva.training.prior_preservation.FRAMES_AT_ONCE", frames)
    found = sounds()
    assert [made.id for made in found] == [made.id for made in expected] and len(found) == sum(batches) == 12
    assert [made.id.split(",")[0] for made in found[:8]] == [clip.id for clip in clips]
    assert [made.lengths for made in found[:8]] == [clip.lengths for clip in clips]
    assert_same_sounds([made.mean for made in found], [made.mean for made in expected])
    most = {1: 1, 100: 3, 10_000: 6}[frames]  # frames are 31 a second
    assert max(batches) == most and max(by_default) == 6


def test_looks_that_the_training_ignores_are_left_out():
    model, clips = make_generator(LoRAConfig(rank=2)), ListDataset(make_clips(3))
    joined = with_preserved(model, clips, PROMPTS, TEXT, 0.5, seed=7, precision=FP32, use_clip_features=False)
    nothing = model.empty_features(1)[0][0]
    assert all(torch.equal(joined.clip(i).clip_f, nothing) for i in range(6, 12))


def test_sounds_without_pictures_are_preserved_without_pictures():
    nan = {"clip_f": torch.full((8, 10), torch.nan), "sync_f": torch.full((24, 12), torch.nan)}
    _, _, joined = make(has_video=False, **nan)
    made = joined.clip(len(joined) - 1)
    assert not made.has_video and torch.isfinite(made.mean).all()


def test_sounds_made_for_padded_clips_are_whole():
    """The model makes sound all along, and none of it is padding."""
    _, clips, joined = make(padding=Padding(torch.arange(32) >= 10, torch.zeros(4)))
    assert clips[0].padding is not None and joined.clip(0).padding is not None
    assert all(joined.clip(i).padding is None for i in range(6, 12))


def test_on_its_own_sounds_there_is_little_to_learn():
    """Unguided samples are distributed as the model predicts, so the gradients of many of them cancel out."""
    model, clips, joined = make(1, share=0.98)
    model.eval()
    made = collate([joined.clip(i) for i in range(len(joined)) if "preserved" in joined.ids[i]])
    other = dataclasses.replace(made, mean=clips[0].mean.expand_as(made.mean))
    config = dataclasses.replace(CONFIG, null_prob=0.0, latent="mode")
    draws = sample_noise(made.mean.shape, config, torch.Generator().manual_seed(0), 0.0)
    factors = [p for p in model.parameters() if p.requires_grad]

    def gradient(batch) -> float:
        found = torch.autograd.grad(flow_loss(model, batch, draws, config, FP32).mean(), factors)
        return sum(g.square().sum() for g in found).sqrt().item()

    assert gradient(made) < 0.4 * gradient(other)


def test_training_visits_both_and_continues_exactly():
    def run() -> TrainingRun:
        torch.manual_seed(0)
        model, _, joined = make()
        return TrainingRun(model, joined, ListDataset([]), CONFIG, FP32)

    first, second = run(), run()
    losses = [first.train_step()[0].item() for _ in range(3)]
    assert losses == [second.train_step()[0].item() for _ in range(3)]
    used = {window.index for _ in range(12) for window in first.batches.draw()}
    assert used == set(range(12))


def test_joined_sets_keep_their_numbers():
    short, long = make_clips(2, 1.0), make_clips(2, 1.5)
    joined = ConcatDataset(ListDataset(short), ListDataset(long))
    assert [joined.clip(i) for i in range(4)] == [*short, *long]
    assert [joined.lengths(i) for i in (0, 3)] == [short[0].lengths, long[1].lengths]
    assert joined.num_windows(3) == 1 and len(joined.subset([3, 0])) == 2
