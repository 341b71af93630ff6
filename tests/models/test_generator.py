"""The generator against golden data of the reference, and against identities."""

from __future__ import annotations

import pytest
import torch

from selva import flow
from selva.models.blocks import nearest_index, rotary_table, time_frequencies
from selva.models.config import GeneratorConfig
from selva.models.generator import Generator
from selva.sampling import guided_velocity

TINY = GeneratorConfig(
    latent_dim=6, hidden_dim=32, depth=3, fused_depth=1, num_heads=2, clip_dim=10, sync_dim=12, text_dim=14,
    latent_seq_len=20, clip_seq_len=5, sync_seq_len=16, text_seq_len=7,
)
CONFIG_FIELDS = set(GeneratorConfig.__dataclass_fields__)


def randomise_(model: Generator) -> Generator:
    """Replace the silent published initialisation by one whose output depends on everything."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1)
        model.latent_std.fill_(2.0)
    return model.eval()


def record_inner(model: Generator, seen: dict[str, torch.Tensor]) -> None:
    """Store what flows between the blocks under the names of the golden files."""

    def keep(name):
        return lambda _module, _args, output: seen.__setitem__(name, output)

    model.audio_input_proj.register_forward_hook(keep("inner_latent_after_audio_input_proj"))
    for i, block in enumerate(model.joint_blocks):

        def streams(_module, _args, output, i=i):
            for name, value in zip(("latent", "clip", "text"), output, strict=True):
                seen[f"inner_joint_{i}_{name}"] = value

        block.register_forward_hook(streams)
    for i, block in enumerate(model.fused_blocks):
        block.register_forward_hook(keep(f"inner_fused_{i}_latent"))

    def conditions(_module, args):
        seen["inner_global_condition"], seen["inner_extended_condition"] = args[3], args[4]

    model.joint_blocks[0].register_forward_pre_hook(conditions)

    def projections(_module, _args, output):
        for name, value in zip("qkv", output, strict=True):
            seen[f"inner_joint_0_{name}"] = value

    model.joint_blocks[0].latent_block.attn.register_forward_hook(projections)


@pytest.mark.parametrize(
    "name", ["generator_tiny_v1", "generator_tiny_v2", "generator_tiny_44k", "generator_small_16k"]
)
def test_every_golden_output(golden, name):
    case = golden(name)
    model = Generator(GeneratorConfig(**{k: v for k, v in case.config.items() if k in CONFIG_FIELDS}))
    model.load_published(case.weights()).eval()
    inputs = case.inputs()
    latent, x0, t = inputs["latent"], inputs["x0"], torch.tensor(case.config["t"])
    batch = latent.shape[0]
    found: dict[str, torch.Tensor] = {}
    with torch.no_grad():
        conditions = model.preprocess_conditions(inputs["clip_f"], inputs["sync_f"], inputs["text_f"])
        empty = model.empty_conditions(batch)
        negative = model.empty_conditions(batch, inputs["negative_text_f"])
        for prefix, source in (("cond", conditions), ("empty", empty)):
            for field in ("clip_f", "sync_f", "text_f", "clip_f_c", "text_f_c"):
                found[f"{prefix}_{field}"] = getattr(source, field)
        found["negative_text_f_projected"], found["negative_text_f_c"] = negative.text_f, negative.text_f_c

        times = torch.tensor([0.0, 0.25, 0.5, 0.999])
        embed = model.t_embed
        angle = times[:, None] * time_frequencies(embed.frequency_dim // 2, embed.scale, times.device)
        found["time_embedding_raw"] = torch.cat((angle.cos(), angle.sin()), -1)
        found["time_embedding"] = embed(times)
        head_dim = model.config.hidden_dim // model.config.num_heads
        for key, length, step in (
            ("latent_rope", model.latent_seq_len, 1.0),
            ("clip_rope", model.clip_seq_len, model.latent_seq_len / model.clip_seq_len),
        ):
            cos, sin = rotary_table(length, head_dim, step, latent.device)
            found[key] = torch.stack((cos, -sin, sin, cos), -1).unflatten(-1, (2, 2))[None]

        found["normalized_latent"] = model.normalize(latent)
        record_inner(model, found)
        found["flow"] = model.predict_flow(latent, t, conditions)
        inner = dict(found)  # later calls of the hooks must not replace what belongs to this call
        for w in (4.5, 1.0, 0.0):
            found[f"ode_cfg_{w}"] = guided_velocity(model, conditions, empty, w)(torch.tensor(0.4375), latent)
        found["ode_cfg_4.5_negative"] = guided_velocity(model, conditions, negative, 4.5)(torch.tensor(0.4375), latent)
        for steps in (2, 4, 16, 25):
            for suffix, other, w in (("", empty, 4.5), ("_negative", negative, 4.5), ("_no_guidance", empty, 0.0)):
                if f"sample_{steps}{suffix}" not in case.stored:
                    continue
                states = []
                velocity = guided_velocity(model, conditions, other, w)
                result = flow.euler(lambda t, x, fn=velocity, s=states: (s.append(x), fn(t, x))[1], x0, steps)
                found[f"sample_{steps}{suffix}"] = result
                if not suffix:
                    found[f"sample_{steps}_after_first_step"] = states[1]
                    found[f"sample_{steps}_after_half"] = states[steps // 2]
                    found[f"unnormalized_sample_{steps}"] = model.unnormalize(result)
    found.update({k: v for k, v in inner.items() if k.startswith("inner_")})
    missing = [k for k in case.info["outputs"] if k not in found]
    assert not missing
    for key in case.info["outputs"]:
        case.check(key, found[key])


def test_sync_tokens_are_repeated_as_in_the_reference(golden):
    case = golden("sync_upsampling")
    for name, expected in case.stored.items():
        source, target = map(int, name.split("_to_"))
        assert nearest_index(source, target, torch.device("cpu")).tolist() == expected.tolist(), name


def test_norm_layers_where_the_epsilon_decides(golden):
    case = golden("norm_layers")
    weights = case.weights("manifests/generator_tiny_v1.json")
    inputs = case.inputs()
    model = Generator(golden_config(golden)).load_published(weights)
    stream = model.joint_blocks[0].latent_block
    for size in ("small", "tiny"):
        case.check(f"generator.q_norm/{size}", stream.attn.q_norm(inputs[f"x32_{size}"]))
        case.check(f"generator.norm1/{size}", stream.norm1(inputs[f"x128_{size}"]))
        case.check(f"generator.final_norm/{size}", model.final_layer.norm(inputs[f"x128_{size}"]))


def golden_config(golden) -> GeneratorConfig:
    config = golden("generator_tiny_v1").config
    return GeneratorConfig(**{k: v for k, v in config.items() if k in CONFIG_FIELDS})


def features(batch: int = 2) -> tuple[torch.Tensor, ...]:
    return torch.randn(batch, 5, 10), torch.randn(batch, 16, 12), torch.randn(batch, 7, 14)


def test_fresh_model_predicts_zero_velocity():
    model = Generator(TINY)
    latent = torch.randn(2, 20, 6)
    assert torch.equal(model(latent, *features(), torch.rand(2)), torch.zeros_like(latent))


def test_normalisation_returns_new_tensors_and_inverts():
    """Pitfall K: the reference changes its argument in place."""
    model = randomise_(Generator(TINY))
    x = torch.randn(2, 20, 6)
    kept = x.clone()
    torch.testing.assert_close(model.unnormalize(model.normalize(x)), x)
    assert torch.equal(x, kept)


def test_batched_guidance_equals_two_passes():
    model = randomise_(Generator(TINY))
    conditions, empty = model.preprocess_conditions(*features()), model.empty_conditions(2)
    x, t = torch.randn(2, 20, 6), torch.tensor(0.3)
    with torch.no_grad():
        one = guided_velocity(model, conditions, empty, 4.5)(t, x)
        v_cond, v_uncond = (model.predict_flow(x, t.expand(2), c) for c in (conditions, empty))
    torch.testing.assert_close(one, 4.5 * v_cond - 3.5 * v_uncond, rtol=1e-4, atol=1e-5)


def test_gradient_checkpointing_changes_no_gradient():
    model = randomise_(Generator(TINY))
    inputs = (torch.randn(2, 20, 6), *features(), torch.rand(2))

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        model(*inputs).square().sum().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    plain = gradients()
    for blocks in (True, 1):
        model.gradient_checkpointing = blocks
        assert plain and all(torch.equal(a, b) for a, b in zip(plain, gradients(), strict=True))


@pytest.mark.parametrize(("setting", "twice"), [(False, 0), (1, 1), (2, 2), (True, 3)])
def test_as_many_blocks_are_recomputed_as_asked_for(setting, twice):
    model = randomise_(Generator(TINY))
    blocks = [*model.joint_blocks, *model.fused_blocks]
    runs = [0] * len(blocks)

    def count(index: int):
        def hook(*_args) -> None:
            runs[index] += 1
        return hook

    for i, block in enumerate(blocks):
        block.register_forward_pre_hook(count(i))
    model.gradient_checkpointing = setting
    model(torch.randn(2, 20, 6), *features(), torch.rand(2)).square().sum().backward()
    assert runs == [2] * twice + [1] * (len(blocks) - twice)


def test_half_precision_module_keeps_exact_time():
    """Pitfall C5: casting the module must not round the time frequencies, which v2 multiplies by up to 10000."""
    model = randomise_(Generator(GeneratorConfig(**{**TINY.__dict__, "v2": True})))
    seen = []
    model.t_embed.mlp.register_forward_pre_hook(lambda _module, args: seen.append(args[0].float()))
    t = torch.tensor([0.123, 0.777])
    model.t_embed(t)
    model.to(torch.bfloat16).t_embed(t)
    torch.testing.assert_close(seen[0], seen[1], atol=4e-3, rtol=0)  # one bf16 rounding of values up to 1


def test_tables_made_while_sampling_serve_training():
    model = randomise_(Generator(TINY))
    inputs = (torch.randn(2, 20, 6), *features(), torch.rand(2))
    rotary_table.cache_clear()
    time_frequencies.cache_clear()
    with torch.inference_mode():
        model(*inputs)
    model(*inputs).sum().backward()
    assert model.t_embed.mlp[0].weight.grad is not None


@pytest.mark.parametrize("change", ["missing", "unexpected", "shape"])
def test_loading_is_strict(change):
    model = Generator(TINY)
    weights = dict(model.state_dict(), latent_rot=torch.zeros(1))  # the computed table is dropped
    if change == "missing":
        del weights["fused_blocks.0.ffn.w1.weight"]
    elif change == "unexpected":
        weights["fused_blocks.0.ffn.w9.weight"] = torch.zeros(1)
    else:
        weights["fused_blocks.0.ffn.w1.weight"] = torch.zeros(3, 3)
    with pytest.raises(ValueError, match=rf"{change}.*fused_blocks\.0\.ffn\.w[19]\.weight"):
        model.load_published(weights)
    model.load_published(dict(model.state_dict(), **{"t_embed.freqs": torch.zeros(3)}))


@pytest.mark.parametrize("index, what", [(0, "clip"), (1, "sync"), (2, "text")])
def test_wrong_token_counts_are_named(index, what):
    inputs = list(features())
    inputs[index] = inputs[index][:, :-1]
    with pytest.raises(ValueError, match=what):
        Generator(TINY).preprocess_conditions(*inputs)
