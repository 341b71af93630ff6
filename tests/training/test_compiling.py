"""selva.training.compiling: the results of compiled blocks, and the message of a machine that cannot compile."""

from __future__ import annotations

import os

import pytest
import torch
from small_run import make_generator

from selva.lora.config import LoRAConfig
from selva.training.compiling import (
    CACHE_VARIABLE,
    compile_blocks_,
    default_cache_dir,
    missing_compiler,
    prepare_to_compile,
)

CPU = torch.device("cpu")


def velocity_and_gradients(model: torch.nn.Module) -> list[torch.Tensor]:
    rng = torch.Generator().manual_seed(1)
    sizes = ((2, model.latent_seq_len, model.config.latent_dim), (2, model.clip_seq_len, model.config.clip_dim),
             (2, model.sync_seq_len, model.config.sync_dim), (2, model.config.text_seq_len, model.config.text_dim))
    latent, *features = (torch.randn(size, generator=rng) for size in sizes)
    velocity = model(latent, *features, torch.tensor([0.2, 0.7]))
    factors = [p for name, p in model.named_parameters() if "lora_B" in name]
    return [velocity, *torch.autograd.grad(velocity.square().mean(), factors)]


@pytest.mark.slow
@pytest.mark.skipif(missing_compiler(CPU) is not None, reason="no C++ compiler")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_blocks_give_the_same_velocity_and_gradients(checkpointing):
    plain, compiled = (make_generator(LoRAConfig(rank=2)).train() for _ in range(2))
    compiled.load_state_dict(plain.state_dict())
    compiled.gradient_checkpointing = checkpointing
    names = list(compiled.state_dict())
    compile_blocks_(compiled)
    assert list(compiled.state_dict()) == names
    for found, expected in zip(velocity_and_gradients(compiled), velocity_and_gradients(plain), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_what_is_missing_is_named(monkeypatch):
    monkeypatch.setenv("CXX", "no_such_compiler")
    with pytest.raises(ValueError, match=r"--compile needs a C\+\+ compiler \(no_such_compiler\)"):
        prepare_to_compile(CPU)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="the package triton"):
        prepare_to_compile(torch.device("cuda"))


def test_compiled_code_is_kept_unless_the_user_has_a_place_for_it(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("selva.training.compiling.missing_compiler", lambda device: None)
    for given, expected in ((None, str(tmp_path / "selva" / "compiled")), ("elsewhere", "elsewhere")):
        monkeypatch.setenv(CACHE_VARIABLE, given or "")
        if not given:
            monkeypatch.delenv(CACHE_VARIABLE)
        prepare_to_compile(CPU)
        assert os.environ[CACHE_VARIABLE] == expected
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_cache_dir().parts[-3:] == (".cache", "selva", "compiled")
