import numpy as np
import pytest
import torch

from selva.models.variants import TINY_16K
from toyworld import make_scene
from toyworld.training.encoders import (
    FEATURE_SCALE,
    OFFSETS,
    SyncNetwork,
    SyncTask,
    View,
    ideal_features,
    read_events,
    start_from_components_,
)
from toyworld.training.prompts import made_up_word, prompts_for, sentence
from toyworld.training.scenes import PoolConfig, ScenePool

SIZE = TINY_16K.sync_image_size


@pytest.fixture(scope="module")
def pool(tmp_path_factory) -> ScenePool:
    return ScenePool(PoolConfig(5, 4, 1.5, SIZE), tmp_path_factory.mktemp("pool"))


@pytest.mark.parametrize("seed", range(4))
def test_ideal_features_say_when_things_happen(seed):
    scene = make_scene(seed, num_objects=2)
    for index in (0, 1):
        features = ideal_features(scene, [index])
        assert features.shape == (192, TINY_16K.video_encoder.embed_dim)
        found = read_events(features, scene.duration_sec)
        np.testing.assert_allclose(found, scene.events(index), atol=0.021)  # they are read on a grid of 20 ms


def test_a_feature_speaks_of_its_own_segment_only():
    features = ideal_features(make_scene(3, ["wood"]), [0]).reshape(-1, 8, 64)[..., :-1] / FEATURE_SCALE
    curves = features.reshape(*features.shape[:2], 3, len(OFFSETS))
    first, last = curves[:, 0], curves[:, -1]
    assert (first[..., OFFSETS < -0.05] == 0).all() and (last[..., OFFSETS > 0.07] == 0).all()
    assert curves.max() > 0.9


@pytest.mark.parametrize("seed", range(6))
def test_a_varied_picture_has_its_thing_where_the_answers_say(seed):
    """A white box in the place of a thing ends up in the patches that are said to be covered."""
    rng = np.random.default_rng(seed)
    thing, view = make_scene(seed).objects[0], View.random(rng)
    y, x = np.mgrid[:SIZE, :SIZE] / SIZE
    inside = (abs(x - thing.x) < 1.1 * thing.reach) & (y > thing.ground - 2.2 * thing.reach) & (y < thing.ground + 0.05)
    picture = np.where(inside, 255, 0).astype(np.uint8)[None, ..., None].repeat(3, axis=-1)
    seen = view.apply(picture)[0].mean(axis=-1).reshape(5, 16, 5, 16).mean(axis=(1, 3)).ravel()
    covered = np.isin(np.arange(25), view.covered(thing, 5, SIZE))
    assert covered.any() and seen[covered].min() > 60 and seen[~covered].max() < 160


def test_pools_are_rendered_once_and_again_when_they_change(tmp_path):
    config = PoolConfig(1, 2, 1.5, 16)
    first = ScenePool(config, tmp_path)
    stamp = (tmp_path / "frames.npy").stat().st_mtime_ns
    np.testing.assert_array_equal(first.frames[1], config.scene(1).frames(25, 16))
    ScenePool(config, tmp_path)
    assert (tmp_path / "frames.npy").stat().st_mtime_ns == stamp
    assert ScenePool(PoolConfig(2, 2, 1.5, 16), tmp_path).frames.shape == (2, 37, 16, 16, 3)
    assert (tmp_path / "frames.npy").stat().st_mtime_ns != stamp


def test_the_patch_embedding_starts_at_unit_scale(pool):
    encoder = SyncNetwork(TINY_16K).encoder
    start_from_components_(encoder, pool, samples=500)
    pixels = torch.tensor(pool.frames[:, :16]).permute(0, 4, 1, 2, 3).float() / 127.5 - 1
    out = encoder.vfeat_extractor.patch_embed_3d["proj"](pixels)
    assert 0.3 < out[:, :32].std() < 3  # what stands still
    assert 0.1 < out[:, 32:].std() < 3  # what changes


def test_one_batch_can_be_learned(pool):
    torch.manual_seed(0)
    network = SyncNetwork(TINY_16K)
    task = SyncTask(network, pool, pool)
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
    losses = []
    for _ in range(12):
        loss, numbers = task.loss(np.random.default_rng(0), 2)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0] and set(numbers) == {"feature", "place", "kinds", "named", "named_map"}
    assert all(p.grad is not None for name, p in network.named_parameters() if p.requires_grad)


def test_prompts_ask_for_what_they_name():
    scene, rng = make_scene(11, num_objects=2), np.random.default_rng(0)
    pairs = [prompts_for(scene, rng) for _ in range(40)]
    assert all(len(first) + len(second) != 2 or first != second for (_, first), (_, second) in pairs)
    assert sum(sorted(first + second) == [0, 1] for (_, first), (_, second) in pairs) > 30
    for prompt, asked in (prompt for pair in pairs for prompt in pair):
        named = [i for i, thing in enumerate(scene.objects) if any(
            wording.format(colour=thing.colour).lower() in prompt.lower() for wording in thing.kind.prompts
        )]
        assert asked == named or (asked == [0, 1] and not named)


def test_made_up_words_differ_and_fit_into_sentences():
    rng = np.random.default_rng(0)
    words = {made_up_word(rng) for _ in range(200)}
    assert len(words) > 180 and all(word in sentence(rng, word) for word in words)
