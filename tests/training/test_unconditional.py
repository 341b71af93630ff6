"""The unconditional branch of guidance, which a training holds in place."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from small_run import CONFIG, make_base, make_generator, make_run

from selva.lora.config import LoRAConfig
from selva.lora.layers import base_only
from selva.lora.state import lora_parameters
from selva.sequence import sequence_config
from selva.training.unconditional import chosen_rows, drift

KINDS = [LoRAConfig(rank=2), LoRAConfig(rank=2, init="pissa"), LoRAConfig(rank=2, dora=True),
         LoRAConfig(rank=2, targets=("all",), dropout=0.5)]


def points(generator, count: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    lengths = sequence_config("16k", 1.0)
    generator.set_sequence(lengths.latent_seq_len, lengths.clip_seq_len, lengths.sync_seq_len)
    rng = torch.Generator().manual_seed(1)
    shape = count, generator.latent_seq_len, generator.config.latent_dim
    return torch.randn(shape, generator=rng), torch.rand(count, generator=rng)


def moved(generator):
    rng = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in lora_parameters(generator):
            parameter += 0.5 * torch.randn(parameter.shape, generator=rng)
    return generator


@pytest.mark.parametrize("config", KINDS)
@torch.no_grad()
def test_an_adapted_model_computes_as_its_base_where_that_is_asked_for(config):
    base, generator = make_base(), moved(make_generator(config)).eval()
    x, t = points(base)
    points(generator)
    expected = base.predict_flow(x, t, base.empty_conditions(3))
    with base_only(generator):
        assert torch.equal(generator.predict_flow(x, t, generator.empty_conditions(3)), expected)
    assert not torch.allclose(generator.predict_flow(x, t, generator.empty_conditions(3)), expected, atol=1e-3)


def test_the_adapter_is_back_after_an_error():
    generator = moved(make_generator(KINDS[0]))
    x, t = points(generator)
    before = drift(generator, x, t, torch.float32)
    with pytest.raises(RuntimeError, match="meanwhile"), base_only(generator):
        raise RuntimeError("meanwhile")
    assert torch.equal(drift(generator, x, t, torch.float32), before) and (before > 1e-4).all()


@pytest.mark.parametrize("config", KINDS[:3])
def test_a_fresh_adapter_has_not_drifted_and_is_taught_nothing(config):
    generator = make_generator(config)
    found = drift(generator, *points(generator), torch.float32)
    found.sum().backward()
    assert found.max() < 1e-10
    assert all(p.grad is None or p.grad.abs().max() < 1e-4 for p in lora_parameters(generator))


@pytest.mark.parametrize("share", [0.0, 0.1, 0.25, 1 / 3, 0.5, 0.7, 1.0])
def test_the_rows_are_spread_over_a_run_however_it_is_divided(share):
    whole = chosen_rows(0, 240, share)
    assert len(whole) == round(240 * share)
    for size in (1, 3, 8):
        parts = [first + row for first in range(0, 240, size) for row in chosen_rows(first, size, share)]
        assert parts == whole


def test_training_moves_the_unconditional_branch_less_and_learns_the_clips():
    """Without it, 60 steps move what the model makes of nothing by several times as much."""
    away, losses = [], []
    for share in (0.0, 1.0):
        run = make_run(dataclasses.replace(CONFIG, keep_unconditional=share, steps=60, lr=5e-3, null_prob=0.1))
        losses.append([run.train_step()[0].item() for _ in range(60)])
        x, t = points(run.generator)
        away.append(drift(run.generator.eval(), x, t, torch.float32).mean().item())
    assert away[1] < away[0] / 2
    first, last = (sum(part) / 10 for part in (losses[1][:10], losses[1][-10:]))
    assert last < first
