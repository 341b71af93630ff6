"""Sampling on tiny_16k: seeds, batches, guidance in an interval, golden samples with adapters, decoding in chunks."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math

import pytest
import torch
from golden_case import GOLDEN
from recorded_graph import RecordedGraphs
from torch import Tensor

from selva import flow
from selva.checkpoint import load_adapter
from selva.flow import SamplingConfig
from selva.lora.merge import merge_adapter
from selva.models.config import GeneratorConfig
from selva.models.generator import Generator
from selva.models.random_weights import random_state_dict
from selva.models.variants import get_variant
from selva.models.zoo import build_vocoder
from selva.sampling import (
    NO_GRAPHS,
    SamplingGraphs,
    decode_latents,
    draw_noise,
    guided_velocity,
    sample_latents,
    sampling_graphs,
)
from selva.sequence import sequence_config
from selva.utils.errors import UserError
from selva.utils.graph import WARM_UPS, GraphedCalls
from selva.weights.load import load_generator, load_vae, load_vocoder

SECONDS = 1.0
LENGTHS = sequence_config("16k", SECONDS)


@pytest.fixture(scope="module")
def generator() -> Generator:
    model = load_generator("tiny_16k").eval()
    model.set_sequence(LENGTHS.latent_seq_len, LENGTHS.clip_seq_len, LENGTHS.sync_seq_len)
    return model


@pytest.fixture(scope="module")
def decoder():
    return load_vae("tiny_16k").drop_encoder(), load_vocoder("tiny_16k")


def features(batch: int) -> tuple[Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(3)
    shapes = ((LENGTHS.clip_seq_len, 64), (LENGTHS.sync_seq_len, 64), (77, 64))
    clip, sync, text = (torch.randn(4, *shape, generator=rng) for shape in shapes)
    return clip[:batch] / 8, sync[:batch], text[:batch] / 8


def decibels(difference: Tensor, of: Tensor) -> float:
    return 10 * math.log10(max(difference.double().square().mean() / of.double().square().mean(), 1e-30))


# ---------------------------------------------------------------------------------------------------------------
# settings
# ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_steps": 0}, "num_steps is 0"),
        ({"cfg_strength": math.nan}, "cfg_strength is nan"),
        ({"solver": "rk4"}, "unknown solver 'rk4', expected one of euler, midpoint, heun, ab2"),
        ({"cfg_interval": (0.5, 0.5)}, "cfg_interval is"),
        ({"cfg_interval": (-0.1, 0.5)}, "cfg_interval is"),
        ({"cfg_interval": (0.0, 1.5)}, "cfg_interval is"),
        ({"cfg_interval": (0.0,)}, "cfg_interval is"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        SamplingConfig(**settings)


def test_settings_read_from_a_file_are_lists():
    assert SamplingConfig(cfg_interval=[0.2, 0.8]) == SamplingConfig(cfg_interval=(0.2, 0.8))
    assert [SamplingConfig(10, solver=solver).num_evaluations for solver in flow.SOLVERS] == [10, 20, 20, 10]


# ---------------------------------------------------------------------------------------------------------------
# seeds and batches
# ---------------------------------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_bytes(generator, decoder):
    config = SamplingConfig(6)
    first, second, other = (
        decode_latents(sample_latents(generator, *features(2), seeds, config), *decoder)
        for seeds in ([1, 2], [1, 2], [1, 3])
    )
    assert torch.equal(first, second)
    assert decibels(other[1] - first[1], first[1]) > -20


@pytest.mark.parametrize("solver", flow.SOLVERS)
def test_a_batch_of_four_is_four_batches_of_one(generator, solver):
    """Other prompts and features per item; only the rounding of batched matrix products may differ."""
    clip, sync, text = features(4)
    config = SamplingConfig(4, solver=solver)
    together = sample_latents(generator, clip, sync, text, [7, 8, 9, 10], config)
    for i, seed in enumerate([7, 8, 9, 10]):
        part = slice(i, i + 1)
        alone = sample_latents(generator, clip[part], sync[part], text[part], [seed], config)
        assert decibels(alone[0] - together[i], together[i]) < -80
    assert decibels(together[0] - together[1], together[0]) > -20  # and the items are not all the same


def test_a_batch_of_four_sounds_like_four_batches_of_one(generator, decoder):
    """Through a vocoder of the published kind; finding phases, as tiny_16k does, multiplies rounding."""
    vocoder = build_vocoder(dataclasses.replace(get_variant("small_16k").vocoder, initial_channels=128)).eval()
    vocoder.load_published(random_state_dict(vocoder))
    clip, sync, text = features(4)
    together = decode_latents(
        sample_latents(generator, clip, sync, text, [7, 8, 9, 10], SamplingConfig(4)), decoder[0], vocoder
    )
    for i, seed in enumerate([7, 8, 9, 10]):
        part = slice(i, i + 1)
        alone = sample_latents(generator, clip[part], sync[part], text[part], [seed], SamplingConfig(4))
        assert decibels(decode_latents(alone, decoder[0], vocoder)[0] - together[i], together[i]) < -80
    assert decibels(together[0] - together[1], together[0]) > -40  # and they are not all the same


def test_negative_text_per_item_and_for_all(generator):
    clip, sync, text = features(2)
    negative = text.flip(0)
    both = sample_latents(generator, clip, sync, text, [1, 2], SamplingConfig(3), negative_text=negative)
    for i in range(2):
        part = slice(i, i + 1)
        alone = sample_latents(generator, clip[part], sync[part], text[part], [i + 1], SamplingConfig(3),
                               negative_text=negative[part])
        torch.testing.assert_close(alone[0], both[i], rtol=1e-4, atol=1e-4)
    shared = sample_latents(generator, clip, sync, text, [1, 2], SamplingConfig(3), negative_text=negative[:1])
    torch.testing.assert_close(shared[0], both[0], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(shared[1], both[1], rtol=1e-2, atol=1e-2)


# ---------------------------------------------------------------------------------------------------------------
# guidance in an interval
# ---------------------------------------------------------------------------------------------------------------


def rows_per_call(generator, monkeypatch, **settings) -> list[tuple[float, int]]:
    """Return (time, rows) of every network pass while one item is sampled."""
    calls, predict = [], generator.predict_flow
    monkeypatch.setattr(
        generator, "predict_flow", lambda x, t, c: (calls.append((round(t[0].item(), 4), len(x))), predict(x, t, c))[1]
    )
    sample_latents(generator, *features(1), [1], SamplingConfig(**settings))
    monkeypatch.undo()
    return calls


def test_guidance_is_computed_inside_the_interval_only(generator, monkeypatch):
    """Bounds are included, though the float32 grid has 0.7 a little below and 0.8 a little above."""
    calls = rows_per_call(generator, monkeypatch, num_steps=10, cfg_interval=(0.7, 0.8))
    assert calls == [(i / 10, 2 if i in (7, 8) else 1) for i in range(10)]
    calls = rows_per_call(generator, monkeypatch, num_steps=2, solver="heun", cfg_interval=(0.5, 1.0))
    assert calls == [(0.0, 1), (0.5, 2), (0.5, 2), (1.0, 2)]
    assert rows_per_call(generator, monkeypatch, num_steps=2, cfg_strength=0.5, cfg_interval=(0.0, 0.5)) == [
        (0.0, 1), (0.5, 1)
    ]


def test_ab2_does_not_look_back_across_the_switch_of_guidance(generator):
    """Steps written out: of Euler at first and after the switch at 0.5, of the last two velocities otherwise."""
    conditions, empty = generator.preprocess_conditions(*features(1)), generator.empty_conditions(1)
    with torch.no_grad():
        guided, plain = (guided_velocity(generator, conditions, empty, w) for w in (4.5, 0.0))
        x, grid, before = draw_noise(generator, [1]), torch.linspace(0, 1, 7), torch.zeros(())
        for step, fn in enumerate([guided] * 4 + [plain] * 2):
            v = fn(grid[step], x)
            x = x + (grid[step + 1] - grid[step]) * (v if step in (0, 4) else 1.5 * v - 0.5 * before)
            before = v
    found = sample_latents(generator, *features(1), [1], SamplingConfig(6, solver="ab2", cfg_interval=(0.0, 0.5)))
    torch.testing.assert_close(found, generator.unnormalize(x), rtol=1e-4, atol=1e-4)


def test_the_interval_switches_between_guided_and_conditional(generator):
    conditions, empty = generator.preprocess_conditions(*features(1)), generator.empty_conditions(1)
    x = draw_noise(generator, [1])
    whole, part = (guided_velocity(generator, conditions, empty, 4.5, c) for c in ((0.0, 1.0), (0.0, 0.5)))
    conditional = guided_velocity(generator, conditions, empty, 0.0)
    early, late = torch.tensor(0.25), torch.tensor(0.75)
    with torch.no_grad():
        assert torch.equal(part(early, x), whole(early, x)) and torch.equal(part(late, x), conditional(late, x))
        assert not torch.allclose(whole(late, x), conditional(late, x), atol=1e-2)


# ---------------------------------------------------------------------------------------------------------------
# golden samples
# ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def golden_model(golden):
    case = golden("generator_tiny_v1")
    names = {field.name for field in dataclasses.fields(GeneratorConfig)}
    model = Generator(GeneratorConfig(**{k: v for k, v in case.config.items() if k in names}))
    return case, model.load_published(case.weights()).eval()


def sample_from(model: Generator, inputs: dict[str, Tensor], x0: Tensor, monkeypatch, **settings) -> Tensor:
    """Sample with :func:`sample_latents` from given noise."""
    monkeypatch.setattr("selva.sampling.draw_noise", lambda *_: x0)
    return sample_latents(model, inputs["clip_f"], inputs["sync_f"], inputs["text_f"], [0] * len(x0),
                          SamplingConfig(**settings))


@pytest.mark.parametrize("num_steps", [4, 25])
def test_golden_samples_with_guidance(golden_model, monkeypatch, num_steps):
    case, model = golden_model
    inputs = case.inputs()
    found = sample_from(model, inputs, inputs["x0"], monkeypatch, num_steps=num_steps)
    case.check(f"unnormalized_sample_{num_steps}", found)
    case.check(f"sample_{num_steps}", model.normalize(found))


def test_euler_is_bit_for_bit_the_loop_of_the_reference(generator):
    """x <- x + (t[i + 1] - t[i]) v(t[i], x) on a float32 grid, cond and uncond blended as w a + (1 - w) b."""
    clip, sync, text = features(1)
    conditions, empty = generator.preprocess_conditions(clip, sync, text), generator.empty_conditions(1)
    grid, x = torch.linspace(0, 1, 6), draw_noise(generator, [5])
    with torch.no_grad():
        for t, t_next in itertools.pairwise(grid):
            a, b = generator.predict_flow(torch.cat((x, x)), t.expand(2), conditions.cat(empty)).chunk(2)
            x = x + (t_next - t) * (4.5 * a + (1 - 4.5) * b)
        expected = generator.unnormalize(x)
    assert torch.equal(sample_latents(generator, clip, sync, text, [5], SamplingConfig(5)), expected)


ADAPTER = GOLDEN / "adapters" / "tiny_rank4_qkv_linear1.pt"  # its velocities at 0, 0.5 and 1: test_lora_golden.py


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
def test_samples_with_an_adapter(golden_model, monkeypatch, strength):
    """A merged adapter samples as one whose factors act on the unchanged weights; at 0 it is the golden sample."""
    case, model = golden_model
    inputs, merged, adapter = case.inputs(), copy.deepcopy(model), load_adapter(ADAPTER)
    merge_adapter(merged, adapter, strength)
    found = sample_from(merged, inputs, inputs["x0"], monkeypatch, num_steps=4)
    base = sample_from(model, inputs, inputs["x0"], monkeypatch, num_steps=4)
    if strength == 0:
        assert torch.equal(found, base)
        case.check("unnormalized_sample_4", found)
        return
    scale, hooks = strength * adapter.meta["alpha"] / adapter.meta["rank"], []
    for name, module in model.named_modules():
        if f"{name}.lora_A" in adapter.tensors:
            a, b = (adapter.tensors[f"{name}.{factor}"].float() for factor in ("lora_A", "lora_B"))
            hooks.append(module.register_forward_hook(lambda _, x, y, a=a, b=b: y + scale * x[0] @ a.T @ b.T))
    assert hooks
    beside = sample_from(model, inputs, inputs["x0"], monkeypatch, num_steps=4)
    for hook in hooks:
        hook.remove()
    torch.testing.assert_close(found, beside, rtol=1e-4, atol=1e-4)
    assert decibels(found - base, base) > -40


# ---------------------------------------------------------------------------------------------------------------
# decoding in chunks
# ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk_sec", [0.3, 0.9, 1.0, 100.0])
def test_chunks_decode_to_the_whole(decoder, chunk_sec):
    latents = torch.randn(2, LENGTHS.latent_seq_len, 20)
    whole = decode_latents(latents, *decoder)
    found = decode_latents(latents, *decoder, chunk_sec=chunk_sec)
    assert whole.shape == (2, LENGTHS.num_audio_frames) and whole.abs().max() > 1e-3
    assert decibels(found - whole, whole) < -100


def test_the_vae_cannot_be_cut():
    """Its attention reaches over the whole length, so the first frame depends on the last."""
    vae, latents = load_vae("tiny_16k").drop_encoder(), torch.randn(1, 250, 20)
    changed = latents.clone()
    changed[:, -1] += 5
    with torch.no_grad():
        assert not torch.equal(vae.decode(latents.mT)[..., 0], vae.decode(changed.mT)[..., 0])


@pytest.mark.parametrize("chunk_sec", [0.0, -1.0, math.nan])
def test_chunks_need_a_length(decoder, chunk_sec):
    with pytest.raises(ValueError, match="expected more than 0"):
        decode_latents(torch.zeros(1, 4, 20), *decoder, chunk_sec=chunk_sec)


# ---------------------------------------------------------------------------------------------------------------
# passes that are recorded, by the stand-in for CUDA graphs
# ---------------------------------------------------------------------------------------------------------------


def recorded() -> SamplingGraphs:
    return SamplingGraphs(GraphedCalls(RecordedGraphs(), "sampling", required=True))


@pytest.mark.parametrize("config", [
    SamplingConfig(num_steps=4), SamplingConfig(num_steps=2, solver="heun"),
    SamplingConfig(num_steps=2, solver="midpoint"), SamplingConfig(num_steps=4, cfg_strength=0.0),
    SamplingConfig(num_steps=7, cfg_interval=(0.3, 1.0)),
    SamplingConfig(num_steps=7, solver="ab2", cfg_interval=(0.3, 1.0)),
], ids=["euler", "heun", "midpoint", "no guidance", "guidance in an interval", "ab2, guidance in an interval"])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_recorded_passes_make_the_same_sounds(generator, config, precision):
    graphs = recorded()
    for batch, seed in ((2, 0), (2, 5), (1, 3)):  # the second sound finds the graphs of the first
        given, seeds = [x + 0.1 * seed for x in features(batch)], list(range(seed, seed + batch))
        found = sample_latents(generator, *given, seeds, config, precision=precision, graphs=graphs)
        assert torch.equal(found, sample_latents(generator, *given, seeds, config, precision=precision))
    kinds = 2 if config.cfg_interval != (0.0, 1.0) else 1
    assert graphs.calls.num_graphs == 2 * kinds
    assert graphs.calls.backend.replays == 3 * config.num_evaluations - 2 * kinds * WARM_UPS


def test_recorded_passes_follow_the_weights(generator):
    """Weights that change at their place are read there; weights that have moved make new graphs."""
    model, graphs, config = copy.deepcopy(generator), recorded(), SamplingConfig(num_steps=4)

    def check() -> int:
        before = graphs.calls.backend.replays
        found = sample_latents(model, *features(1), [1], config, graphs=graphs)
        assert torch.equal(found, sample_latents(model, *features(1), [1], config))
        return graphs.calls.backend.replays - before

    weight = model.get_parameter("joint_blocks.0.latent_block.attn.qkv.weight")
    assert check() == 4 - WARM_UPS and check() == 4
    with torch.no_grad():
        weight.mul_(1.5)
    assert check() == 4
    weight.data = 0.5 * weight.data
    assert check() == 4 - WARM_UPS


def test_without_a_gpu_nothing_is_recorded():
    assert sampling_graphs("auto", torch.device("cpu")).calls is None and NO_GRAPHS.calls is None
    with pytest.raises(UserError, match="--cuda_graph on"):
        sampling_graphs("on", torch.device("cpu"))
