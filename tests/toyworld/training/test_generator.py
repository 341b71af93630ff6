import numpy as np
import pytest
import torch

from selva.models.blocks import JointBlock, rotary_table
from selva.models.random_weights import fill_random_
from selva.models.zoo import build_generator
from toyworld.training.generator import (
    LEAK,
    EncodedScenes,
    GeneratorTask,
    imperfect,
    quieten_frames_,
    start_with_a_sense_of_place_,
)
from toyworld.training.scenes import PoolConfig

PLACES = [(0, 0), (1, 0), (1, 1)]  # one thing, then two


def encoded(clip_tokens: int = 64) -> EncodedScenes:
    """Return items whose every row says which item it is, and how far in."""

    def rows(length: int, width: int) -> torch.Tensor:
        return (1000 * torch.arange(3)[:, None] + torch.arange(length)).half()[..., None].repeat(1, 1, width)

    tensors = {"mean": rows(250, 20), "std": torch.full((3, 250, 20), 0.1).half(), "sync": rows(192, 64),
               "clip": rows(clip_tokens, 64), "text": torch.zeros(3, 4, 77, 64).half()}
    return EncodedScenes(tensors, PLACES, PoolConfig(1, 2, 8.0, 80))


def test_windows_of_sound_and_picture_begin_together():
    batch = encoded().batch([0, 1], [0, 6], 4.0, [0, 1])
    assert batch.mean.shape == (2, 125, 20) and batch.sync_f.shape == (2, 88, 64) and batch.clip_f.shape == (2, 32, 64)
    assert batch.mean[:, 0, 0].tolist() == [0, 1060]  # 6 segments of 0.32 s are 60 latent frames of 32 ms,
    assert batch.sync_f[:, 0, 0].tolist() == [0, 1048]  # 48 tokens,
    assert batch.clip_f[:, 0, 0].tolist() == [0, 1015]  # and 15.36 frames at 8 per second


def test_the_other_thing_is_that_of_the_same_scene():
    other = encoded().other_sync([0, 1, 2], [0, 0, 1], 16)
    assert other[:, 0, 0].tolist() == [0, 2000, 1008]
    assert (other[0] == 0).all()  # alone in its scene


def test_imperfect_features_keep_to_their_bounds():
    ideal, other = torch.full((64, 8, 64), 3.0), torch.zeros(64, 8, 64)
    other[..., 0] = 3.0
    found = imperfect(ideal, other, np.random.default_rng(0))
    mean = found.mean(1)  # noise averages out
    assert mean[:, 1:].min() > 0.9 and mean[:, 1:].max() < 3.6
    assert (mean[:, 0] / mean[:, 1:].mean(1)).max() < 1 + LEAK + 0.3 and found.std() > 0.3


def test_the_first_head_measures_the_place():
    torch.manual_seed(0)
    generator = build_generator("tiny_16k")
    start_with_a_sense_of_place_(generator)
    block = generator.joint_blocks[0]
    assert isinstance(block, JointBlock)
    rotary = rotary_table(250, 32, 1.0, torch.device("cpu"))
    q, k, _ = block.latent_block.attn(torch.randn(1, 250, 96), rotary)
    nowhere = rotary_table(77, 32, 0.0, torch.device("cpu"))
    _, text_k, _ = block.text_block.attn(torch.randn(1, 77, 96), nowhere)
    attention = (q @ torch.cat((k, text_k), dim=2).mT / 32**0.5).softmax(-1)[0, 0]  # of the first head
    share = attention[:, 250:].sum(-1).detach().reshape(10, 25).mean(1)
    assert share[0] > 0.6 and share[-1] < 0.05 and (share.diff() < 0).all()


@torch.no_grad()
def test_quiet_frames_count_nearly_as_none():
    generator = build_generator("tiny_16k")
    fill_random_(generator)
    latent, sync, text, t = (
        torch.randn(1, 250, 20), torch.randn(1, 192, 64), torch.randn(1, 77, 64), torch.tensor([0.3])
    )
    empty, frames = generator.empty_features(1)[0], torch.randn(1, 64, 64)
    before, seen = (generator(latent, clip, sync, text, t) for clip in (empty, frames))
    quieten_frames_(generator)
    # The same sum in another order: float32 rounding (6e-8) of a dozen layers, relative to the whole output.
    assert (generator(latent, empty, sync, text, t) - before).norm() < 1e-5 * before.norm()
    quiet = (generator(latent, frames, sync, text, t) - before).norm()
    assert 0 < quiet < 0.5 * (seen - before).norm()


@pytest.mark.parametrize("clip_tokens", [0, 64])
def test_a_step_reaches_the_blocks(clip_tokens):
    """Without pictures the clip tokens are the empty ones, and features are made imperfect."""
    generator = build_generator("tiny_16k")
    fill_random_(generator)
    scenes = encoded(clip_tokens)
    for tensor in (scenes.mean, scenes.sync, scenes.clip):
        tensor.copy_(torch.randn(tensor.shape))
    task = GeneratorTask(generator, scenes, scenes, "fp32")
    loss, _ = task.loss(np.random.default_rng(0), 1)
    loss.backward()
    gradient = generator.get_parameter("joint_blocks.0.latent_block.attn.qkv.weight").grad
    assert gradient is not None and gradient.norm() > 0
    assert task.validate()["val_loss"] == pytest.approx(task.validate()["val_loss"])
