"""Adapters on the generator against golden data of the reference."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from recipe import make_value
from torch import Tensor, nn

from selva import flow
from selva.checkpoint import load_adapter, load_checkpoint
from selva.lora.config import LoRAConfig
from selva.lora.inject import inject_lora
from selva.lora.layers import lora_layers
from selva.lora.merge import Adapter, merge_adapter, merged_adapters
from selva.lora.published import continued_state
from selva.lora.state import adapter_tensors, load_lora_state_, lora_parameters, lora_plus_groups, lora_state_dict
from selva.models.config import GeneratorConfig
from selva.models.generator import Generator
from selva.models.variants import VARIANTS

GOLDEN = Path(__file__).parents[1] / "golden"
ADAPTERS = GOLDEN / "adapters"
# The reference's "linear1" reaches only the linear ones, which this ending selects here.
LINEAR_ONLY = {"linear1": "text_block.linear1"}
PISSA_LAYERS = [
    "joint_blocks.0.latent_block.attn.qkv", "joint_blocks.1.latent_block.attn.qkv", "fused_blocks.1.attn.qkv",
]


class Case:
    """A golden file with its generator; ``run`` evaluates a model on the file's inputs."""

    def __init__(self, golden, name: str) -> None:
        self.golden = golden(name)
        self.check, self.config = self.golden.check, self.golden.config
        self.inputs = self.golden.inputs()
        self.model = Generator(GeneratorConfig(**self.config["generator"]))
        self.model.load_published(self.golden.weights()).eval()

    @torch.no_grad()
    def run(self, model: nn.Module) -> Tensor:
        features = (self.inputs[key] for key in ("latent", "clip_f", "sync_f", "text_f"))
        return model(*features, torch.tensor(self.config["t"]))


def recipe_factors_(model: nn.Module) -> None:
    """Give every factor the value that the recipe draws for its name."""
    values = {key: torch.from_numpy(make_value(key, value.shape)) for key, value in lora_state_dict(model).items()}
    load_lora_state_(model, values)


# -- targets ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tiny_v1", "small_16k", "medium_44k", "large_44k", "large_44k_v2"])
def test_targets_reach_the_layers_of_the_reference_and_its_convolutions_too(golden, name):
    """Pitfall E1: the reference wraps 3 of 18 modules that are called linear1."""
    models = json.loads((GOLDEN / "lora_targets.json").read_text(encoding="utf-8"))["models"]
    if name == "tiny_v1":
        config = GeneratorConfig(**golden("lora_tiny").config["generator"])
    else:
        config = VARIANTS[name if name in VARIANTS else f"mmaudio_{name}"].generator
    for targets, expected in models[name].items():
        with torch.device("meta"):  # names and shapes are enough
            model = Generator(config)
        report = inject_lora(model, LoRAConfig(rank=2, targets=tuple(targets.split())))
        linear = [[x.name, [x.out_features, x.in_features]] for x in report.layers if x.kind == "linear"]
        assert linear == expected["wrapped"] and len(linear) == expected["wrapped_count"]
        convolutions = {x.name for x in report.layers if x.kind == "conv1d"}
        assert convolutions == {name for name, _ in expected["matched_suffix_but_not_wrapped"]}
        assert not report.skipped


# -- forward results --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(golden) -> Case:
    return Case(golden, "lora_tiny")


def test_tiny_base(tiny):
    tiny.check("base", tiny.run(tiny.model))


@pytest.mark.parametrize(
    "name",
    [
        "qkv_rank4_alpha4", "qkv_rank4_alpha8", "qkv_rank4_alpha8_rslora", "qkv_linear1_rank4_alpha4",
        "qkv_linear1_rank16_alpha32_rslora",
    ],
)
def test_tiny_adapters_injected_and_merged(tiny, name):
    case = tiny.config["cases"][name]
    cfg = LoRAConfig(
        rank=case["rank"],
        alpha=case["alpha"],
        targets=tuple(LINEAR_ONLY.get(target, target) for target in case["target"]),
        rslora=case["use_rslora"],
    )
    assert cfg.scale() == case["scale"]
    model = copy.deepcopy(tiny.model)
    assert len(inject_lora(model, cfg).wrapped) == case["wrapped"]
    recipe_factors_(model)
    tiny.check(f"{name}/strength_1.0", tiny.run(model))

    unscaled = Adapter(lora_state_dict(model), {"alpha": case["alpha"], "use_rslora": case["use_rslora"]})
    folded = Adapter(adapter_tensors(model))
    strengths = [output.split("/strength_")[1] for output in tiny.golden.stored if output.startswith(f"{name}/")]
    for strength in strengths:
        for adapter in (unscaled, folded):
            with merged_adapters(tiny.model, [(adapter, float(strength))]):
                tiny.check(f"{name}/strength_{strength}", tiny.run(tiny.model))


@pytest.fixture(scope="module")
def tiny_files(golden) -> Case:
    return Case(golden, "lora_tiny_files")


@pytest.mark.parametrize(
    ("name", "strength"), [("tiny_rank4_qkv_linear1", 1.0), ("tiny_rank4_qkv_linear1", 0.5), ("tiny_rank16_raw", 1.0)]
)
def test_tiny_adapter_files(tiny_files, name, strength):
    model = copy.deepcopy(tiny_files.model)
    merge_adapter(model, load_adapter(ADAPTERS / f"{name}.pt"), strength)
    tiny_files.check(f"{name}/strength_{strength}", tiny_files.run(model))


def test_small_16k_adapter_files(golden):
    case = Case(golden, "lora_small_16k")
    case.check("base", case.run(case.model))
    for name, output, strength in (
        ("small_16k_rank4", "adapter/strength_1.0", 1.0),
        ("small_16k_rank4", "adapter/strength_0.5", 0.5),
        ("small_16k_rank4_raw", "raw/strength_1.0", 1.0),
    ):
        with merged_adapters(case.model, [(load_adapter(ADAPTERS / f"{name}.pt"), strength)]):
            case.check(output, case.run(case.model))


# -- PiSSA ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pissa(golden) -> Case:
    return Case(golden, "lora_tiny_pissa")


def test_pissa_initialisation(pissa):
    model = copy.deepcopy(pissa.model)
    inject_lora(model, LoRAConfig(rank=pissa.config["rank"], targets=tuple(pissa.config["target"]), init="pissa"))
    pissa.check("forward_after_initialisation", pissa.run(model))
    layers = dict(lora_layers(model))
    for name in PISSA_LAYERS:
        layer = layers[name]
        pissa.check(f"product_B_A/{name}", layer.lora_B @ layer.lora_A)
        # A = sqrt(S) V^T, so the squared lengths of its rows are the singular values.
        squared = layer.lora_A.detach().square().sum(1)
        torch.testing.assert_close(squared, torch.from_numpy(pissa.golden.stored[f"singular_values/{name}"])[:4])


@pytest.mark.parametrize(
    ("output", "strength"), [("strength_1.0", 1.0), ("blend_0.5", 0.5), ("blend_0.0", 0.0)]
)
def test_pissa_adapter_file(pissa, output, strength):
    """Pitfall E7: strength 0 of a published PiSSA file is the base model."""
    model = copy.deepcopy(pissa.model)
    merge_adapter(model, load_adapter(ADAPTERS / "tiny_pissa_rank4_rslora.pt"), strength)
    pissa.check(f"adapter_file/{output}", pissa.run(model))
    if strength == 0:
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), pissa.model.parameters(), strict=True))


def test_a_published_pissa_training_is_continued_from_its_golden_state(pissa):
    adapter, model = load_adapter(ADAPTERS / "tiny_pissa_rank4_rslora.pt"), copy.deepcopy(pissa.model)
    inject_lora(model, LoRAConfig(4, 8.0, rslora=True, init="pissa"))
    load_lora_state_(model, continued_state(model, adapter.tensors, adapter.source))
    pissa.check("adapter_file/strength_1.0", pissa.run(model))


# -- training ---------------------------------------------------------------------------------------------------------


class TrainingCase(Case):
    def loss_per_item(self, model: Generator, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return the loss (B,), xt and the velocity (B, N, C) of the given step (from 1)."""
        x = self.inputs
        x0, t = x[f"x0_step_{step}"], x["t"][step - 1]
        x1 = model.normalize(x["x1"])
        xt = flow.interpolate(x0, x1, t)
        v = model(xt, x["clip_f"], x["sync_f"], x["text_f"], t)
        return flow.loss(v, x0, x1), xt, v

    def optimizer(self, model: Generator, weight_decay: float) -> torch.optim.Optimizer:
        return torch.optim.AdamW(lora_plus_groups(model, self.config["lr"]), weight_decay=weight_decay)

    def train(self, model: Generator, optimizer: torch.optim.Optimizer, steps: range) -> tuple[Tensor, Tensor]:
        """Return loss and gradient norm of every step."""
        losses, norms = [], []
        for step in steps:
            for group in optimizer.param_groups:
                group["lr"] = float(self.golden.stored["learning_rate"][step - 1])
            loss = self.loss_per_item(model, step)[0].mean()
            optimizer.zero_grad()
            loss.backward()
            norms.append(torch.nn.utils.clip_grad_norm_(lora_parameters(model), self.config["max_grad_norm"]))
            optimizer.step()
            losses.append(loss.detach())
        return torch.stack(losses), torch.stack(norms)


@pytest.fixture(scope="module")
def training(golden) -> TrainingCase:
    return TrainingCase(golden, "lora_tiny_training")


@pytest.fixture
def trainable(training) -> Generator:
    model = copy.deepcopy(training.model).train()
    cfg = LoRAConfig(training.config["rank"], training.config["alpha"], tuple(training.config["target"]))
    assert cfg.scale() == training.config["scale"]
    inject_lora(model, cfg)
    recipe_factors_(model)
    return model


def test_first_step(training, trainable):
    losses, xt, v = training.loss_per_item(trainable, 1)
    training.check("step_1/loss_per_item", losses)
    training.check("step_1/xt", xt)
    training.check("step_1/velocity", v)
    losses.mean().backward()
    gradients = {name: p.grad for name, p in trainable.named_parameters() if p.requires_grad}
    for output in training.golden.stored:
        kind, _, name = output.partition("/")
        if kind == "grad_norm":
            training.check(output, gradients[name].norm()[None])
        elif kind == "grad":
            training.check(output, gradients[name])


@pytest.mark.parametrize(("weight_decay", "ending"), [(0.01, ""), (0.0, "_no_weight_decay")])
def test_six_steps(training, trainable, weight_decay, ending):
    losses, norms = training.train(trainable, training.optimizer(trainable, weight_decay), range(1, 7))
    training.check(f"losses{ending}", losses)
    if not ending:
        training.check("grad_norm_before_clipping", norms)
    state = lora_state_dict(trainable)
    for name in ("joint_blocks.0.latent_block.attn.qkv.lora_A", "fused_blocks.1.attn.qkv.lora_B"):
        training.check(f"final/{name}{ending}", state[name])


def test_resuming_from_a_published_step_file(training, trainable):
    saved = load_checkpoint(ADAPTERS / "tiny_step_checkpoint.pt")
    assert saved.step == 3
    assert LoRAConfig.from_meta(saved.meta).scale() == training.config["scale"]
    load_lora_state_(trainable, saved.lora)
    optimizer = training.optimizer(trainable, 0.01)
    optimizer.load_state_dict(saved.optimizer)
    losses, _ = training.train(trainable, optimizer, range(4, 7))
    expected = torch.from_numpy(training.golden.stored["losses"])[3:]
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=5e-5)
    state = lora_state_dict(trainable)
    for name in ("joint_blocks.0.latent_block.attn.qkv.lora_A", "fused_blocks.1.attn.qkv.lora_B"):
        training.check(f"final/{name}", state[name])
