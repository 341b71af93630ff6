"""On a GPU: networks, training steps, graphs, sampling and resuming compute what they do on the CPU or without graphs.

The CPU runs the same code with stand-ins in the tests of each module; these show that a GPU keeps to it.
"""

from __future__ import annotations

import dataclasses

import pytest
import small_run
import torch
from small_run import make_clips, make_generator
from torch import Tensor

from selva.checkpoint import load_checkpoint, save_checkpoint
from selva.data.dataset import ListDataset
from selva.flow import SamplingConfig
from selva.lora.config import LoRAConfig
from selva.lora.state import lora_state_dict
from selva.models.generator import Generator
from selva.models.random_weights import fill_random_
from selva.models.variants import get_variant
from selva.models.zoo import build_generator, build_mel, build_vae, build_video_encoder, build_vocoder
from selva.sampling import NO_GRAPHS, sample_latents, sampling_graphs
from selva.sequence import sequence_config
from selva.training.run import TrainingRun
from selva.utils.graph import WARM_UPS, GraphedCalls, graphed_calls

pytestmark = pytest.mark.gpu

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
STEPS = 9  # two lengths, each warmed up twice, then recorded and replayed
CONFIG = dataclasses.replace(small_run.CONFIG, steps=STEPS, warmup_steps=3, ema_decay=0.9)
PLAIN, DROPOUT = LoRAConfig(rank=2), LoRAConfig(rank=2, dropout=0.3)
# Float32 products are added up in another order; 1e-4 of the size leaves a factor of ten.
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture(autouse=True)
def _exact_and_repeatable(monkeypatch):
    """Convolutions in float32, not TF32; and sums in a fixed order, without which no two steps are alike."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def make_run(config, lora, dtype, device, graphs: GraphedCalls | None = None, checkpointing=False) -> TrainingRun:
    torch.manual_seed(config.seed)
    clips = ListDataset(make_clips(4, 0.64) + make_clips(4, 0.96))
    generator = make_generator(lora, dtype).to(device).train()
    generator.gradient_checkpointing = checkpointing
    return TrainingRun(generator, clips, clips.subset([]), config, dtype, graphs=graphs)


def graphs() -> GraphedCalls:
    made = graphed_calls("on", GPU, "training")
    assert made is not None
    return made


def train(run: TrainingRun, steps: int = STEPS) -> Tensor:
    return torch.stack([torch.stack(run.train_step()) for _ in range(steps)]).cpu()


def assert_same(found: TrainingRun, expected: TrainingRun) -> None:
    wanted = lora_state_dict(expected.generator)
    for key, value in lora_state_dict(found.generator).items():
        assert torch.equal(value, wanted[key]), key
    assert found.ema is not None and expected.ema is not None
    assert all(torch.equal(value, expected.ema.average[key]) for key, value in found.ema.average.items())
    assert found.scaler.state_dict() == expected.scaler.state_dict()


@pytest.mark.parametrize("part", ["mel", "VAE", "vocoder", "video encoder", "generator"])
@torch.no_grad()
def test_networks_compute_what_they_do_on_the_cpu(part):
    variant = get_variant("tiny_16k")
    rng = torch.Generator().manual_seed(0)
    build, use = {
        "mel": (lambda: build_mel("16k"), lambda net, x: net(x(1, 16_000))),
        "VAE": (lambda: build_vae(variant.vae), lambda net, x: net.decode(net.encode(x(1, 80, 64))[0])),
        "vocoder": (lambda: build_vocoder(get_variant("small_16k").vocoder), lambda net, x: net(x(1, 80, 32))),
        "video encoder": (lambda: build_video_encoder("tiny_16k"), lambda net, x: net.encode(
            x(1, 24, 3, *2 * [variant.sync_image_size]).clamp(-1, 1), x(1, 6, variant.video_encoder.text_dim),
            x(1, 6) < 9)),
        "generator": (lambda: build_generator("tiny_16k"), lambda net, x: net(
            x(2, net.latent_seq_len, 20), x(2, net.clip_seq_len, 64), x(2, net.sync_seq_len, 64), x(2, 77, 64),
            x(2).sigmoid())),
    }[part]
    network = fill_random_(build()).eval().requires_grad_(False)
    given: list[Tensor] = []

    def draw(*shape: int) -> Tensor:
        given.append(torch.randn(*shape, generator=rng))
        return given[-1]

    expected = use(network, draw)
    again = iter(given)
    found = use(network.to(GPU), lambda *shape: next(again).to(GPU)).cpu()
    assert (found - expected).norm() <= 1e-4 * expected.norm()


def test_training_steps_learn_what_they_do_on_the_cpu():
    """The first step compares gradients; later ones would compare what Adam makes of their rounding."""
    on_gpu, on_cpu = (make_run(CONFIG, PLAIN, torch.float32, device) for device in (GPU, CPU))
    torch.testing.assert_close(train(on_gpu, 1), train(on_cpu, 1), **CLOSE)
    torch.testing.assert_close(train(on_gpu, 4), train(on_cpu, 4), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("grad_accum", [1, 2])
@pytest.mark.parametrize("lora", [PLAIN, DROPOUT], ids=["plain", "dropout"])
def test_steps_by_graphs_equal_eager_ones_bit_for_bit(dtype, grad_accum, lora):
    if dtype == torch.bfloat16 and torch.cuda.get_device_capability(GPU) < (8, 0):
        pytest.skip("this GPU has no bf16")
    config = dataclasses.replace(CONFIG, grad_accum=grad_accum)
    recorded, eager = (make_run(config, lora, dtype, GPU, own) for own in (graphs(), None))
    assert torch.equal(train(recorded), train(eager))
    assert_same(recorded, eager)
    assert recorded.graphs is not None and recorded.graphs.problem is None and recorded.graphs.num_graphs >= 2


def test_checkpointed_steps_can_be_recorded():
    recorded, eager = (make_run(CONFIG, PLAIN, torch.float32, GPU, own, True) for own in (graphs(), None))
    assert torch.equal(train(recorded), train(eager))
    assert_same(recorded, eager)


def test_a_bad_gradient_changes_nothing_and_lowers_the_scale_of_fp16():
    for dtype in (torch.float32, torch.float16):
        run = make_run(CONFIG, PLAIN, dtype, GPU, graphs())
        train(run)
        before, scale = lora_state_dict(run.generator), run.scaler.get_scale()
        small_run.spoil_latents(run)
        (_, norm), = train(run, 1)
        assert not torch.isfinite(norm)
        assert all(torch.equal(value, before[key]) for key, value in lora_state_dict(run.generator).items())
        assert run.scaler.get_scale() == (scale / 2 if dtype == torch.float16 else 1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_resumed_run_goes_on_exactly(tmp_path, dtype):
    whole = make_run(CONFIG, DROPOUT, dtype, GPU, graphs())
    train(whole)
    first = make_run(CONFIG, DROPOUT, dtype, GPU, graphs())
    train(first, 7)
    path = tmp_path / "step.pt"
    save_checkpoint(path, first.generator, {"rank": 2}, step=first.step, optimizer=first.optimizer_state(),
                    extra=first.extra_state())
    for own in (graphs(), None):
        run = make_run(CONFIG, DROPOUT, dtype, GPU, own)
        run.restore(load_checkpoint(path))
        train(run, STEPS - 7)
        assert_same(run, whole)


def test_a_step_reads_nothing_back():
    run = make_run(CONFIG, PLAIN, torch.float32, GPU)
    train(run, 3)
    torch.cuda.set_sync_debug_mode("error")
    try:
        values = [run.train_step() for _ in range(4)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.isfinite(loss) for loss, _ in values)


def test_a_step_that_cannot_be_recorded_is_done_without():
    own = graphed_calls("auto", GPU, "training")
    assert own is not None
    run, eager = make_run(CONFIG, PLAIN, torch.float16, GPU, own), make_run(CONFIG, PLAIN, torch.float16, GPU)
    step = run.optimizer.step

    def reads_back(*args, **kwargs):
        assert all(p.grad.isfinite().all() for p in run.parameters)
        return step(*args, **kwargs)

    run.optimizer.step = reads_back
    assert torch.equal(train(run), train(eager)) and own.problem is not None
    assert_same(run, eager)


@pytest.mark.parametrize("config", [
    SamplingConfig(num_steps=5), SamplingConfig(num_steps=3, solver="heun"),
    SamplingConfig(num_steps=4, cfg_strength=0), SamplingConfig(num_steps=5, solver="ab2"),
], ids=["euler", "heun", "no guidance", "ab2"])
def test_sounds_by_graphs_equal_eager_ones_and_those_of_the_cpu(config):
    model = fill_random_(Generator(get_variant("tiny_16k").generator)).eval().requires_grad_(False)
    lengths = sequence_config("16k", 1.0)
    model.set_sequence(lengths.latent_seq_len, lengths.clip_seq_len, lengths.sync_seq_len)
    rng = torch.Generator().manual_seed(0)
    shapes = ((lengths.clip_seq_len, 64), (lengths.sync_seq_len, 64), (77, 64))
    features = [torch.randn(2, *shape, generator=rng) / 8 for shape in shapes]
    expected = sample_latents(model, *features, [0, 1], config)
    model.to(GPU)
    features = [x.to(GPU) for x in features]
    eager = sample_latents(model, *features, [0, 1], config, graphs=NO_GRAPHS)
    assert (eager.cpu() - expected).norm() <= 1e-3 * expected.norm()  # guidance multiplies rounding
    recorder = sampling_graphs("on", GPU)
    for _ in range(WARM_UPS + 1):
        assert torch.equal(sample_latents(model, *features, [0, 1], config, graphs=recorder), eager)
    assert recorder.calls is not None and recorder.calls.num_graphs == 1
