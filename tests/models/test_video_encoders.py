"""Synchformer and TextSynch: segments, attention and loading on a small network; golden outputs at full size."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import pytest
import recipe
import torch
import torch.nn.functional as F
from torch import nn

from selva.models.config import VideoEncoderConfig
from selva.models.synchformer import DividedAttention, SpatialAggregation, Synchformer, iterate_segments
from selva.models.textsynch import TextSynch
from selva.sequence import num_sync_segments, sequence_config

GOLDEN = Path(recipe.__file__).parent
SMALL = VideoEncoderConfig(embed_dim=32, depth=2, num_heads=4, mlp_dim=48, image_size=32, text_dim=12, num_sup_tokens=3)
TINY_16K = VideoEncoderConfig(embed_dim=128, depth=2, num_heads=4, mlp_dim=256, image_size=112, text_dim=64)


def randomize_(module: nn.Module) -> nn.Module:
    """Draw every parameter, so that no zero of the fresh network hides a mistake."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0, 0.2)
    return module.eval()


@pytest.fixture(scope="module")
def published(golden):
    """The weights of the full-size TextSynch; Synchformer's are a subset of the same names."""
    return golden("textsynch_32frames").weights()


# ---------------------------------------------------------------------------------------------------------------
# full size, against the reference
# ---------------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def test_golden_textsynch(golden, published):
    case = golden("textsynch_32frames")
    encoder = TextSynch().eval().load_published(published)
    inputs, inner = case.inputs(), defaultdict(list)
    trunk = encoder.vfeat_extractor
    trunk.blocks[0].register_forward_pre_hook(
        lambda _module, args: inner["inner_tokens_after_patch_and_position"].append(args[0])
    )
    places = {
        "inner_block_0_time_attention": trunk.blocks[0].timeattn,
        "inner_block_0_space_attention": trunk.blocks[0].attn,
        "inner_tokens_after_block_0": trunk.blocks[0],
        "inner_tokens_after_block_11": trunk.blocks[11],
        "inner_tokens_after_trunk_norm": trunk.norm,
        "inner_text_projected": encoder.text_proj,
        "inner_tokens_after_text_cross_attention": encoder.synch_text_cross_blocks[0],
    }
    for name, module in places.items():
        module.register_forward_hook(lambda _module, _args, output, name=name: inner[name].append(output))
    features = encoder.encode(inputs["frames"], inputs["text_f"], inputs["text_mask"], segment_batch=2)
    text, mask = encoder.prepend_supplementary(inputs["text_f"], inputs["text_mask"])

    values = {name: torch.cat(chunks) for name, chunks in inner.items()}
    values["inner_text_projected"] = values["inner_text_projected"].repeat_interleave(3, dim=0)  # one row per segment
    for name, value in values.items():
        case.check(name, value)
    case.check("sync_f", features)
    case.check("text_f_with_supplementary", text)
    case.check("text_mask_with_supplementary", mask)


@torch.inference_mode()
def test_golden_synchformer(golden, published):
    case = golden("synchformer_24frames")
    audio_branch = {"afeat_extractor.cls_token": torch.zeros(1), "vproj.weight": torch.zeros(1)}
    visual = {k: v for k, v in published.items() if k.startswith("vfeat_extractor.")}
    encoder = Synchformer().eval().load_published({**audio_branch, **visual})
    case.check("sync_f", encoder.encode(case.inputs()["frames"], segment_batch=1))


@pytest.mark.parametrize("scale", ["small", "tiny"])
def test_golden_norms(golden, published, scale):
    case = golden("norm_layers")
    inputs = case.inputs()
    with torch.device("meta"):
        encoder = TextSynch()
    for name, width in {
        "textsynch.trunk_block_norm1": 768,
        "textsynch.trunk_norm": 768,
        "textsynch.aggregation_norm1": 768,
        "textsynch.cross_norm2": 768,
        "textsynch.cross_q_norm": 64,
    }.items():
        prefix = case.config[name]["affine_parameters"]
        norm = encoder.get_submodule(prefix).to_empty(device="cpu")
        norm.load_state_dict({k.rpartition(".")[2]: v for k, v in published.items() if k.startswith(prefix + ".")})
        case.check(f"{name}/{scale}", norm(inputs[f"x{width}_{scale}"]))


@pytest.mark.parametrize(("encoder", "manifest"), [(TextSynch, "textsynch_depth1"), (Synchformer, "synchformer_video")])
def test_keys_and_shapes_are_the_published_ones(encoder, manifest):
    with torch.device("meta"):
        module = encoder()
    expected = {key: shape for key, shape, *_ in recipe.load_manifest(GOLDEN / f"manifests/{manifest}.json")}
    assert {key: list(value.shape) for key, value in module.state_dict().items()} == expected
    frozen = {name for name, p in module.named_parameters() if not p.requires_grad}
    unused = {"vfeat_extractor.patch_embed.proj.weight", "vfeat_extractor.patch_embed.proj.bias", "empty_string_feat"}
    assert frozen == unused & expected.keys()


# ---------------------------------------------------------------------------------------------------------------
# segments
# ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("segment_batch", [None, 1, 2, 4, 100])
def test_segments_are_sixteen_frames_every_eight(segment_batch):
    frames = torch.arange(2 * 37).reshape(2, 37, 1, 1, 1)
    chunks = list(iterate_segments(frames, segment_batch))
    assert all(len(segments) <= (segment_batch or 6) for segments, _ in chunks)
    segments, items = (torch.cat(parts) for parts in zip(*chunks, strict=True))
    assert items.tolist() == [0, 0, 0, 1, 1, 1]
    expected = [list(range(start, start + 16)) for start in (0, 8, 16, 37, 45, 53)]  # the last 5 frames are left out
    assert segments.flatten(1).tolist() == expected


@torch.inference_mode()
def test_eight_seconds_give_the_tokens_of_the_sequence_table():
    encoder = Synchformer(SMALL)
    length = sequence_config("16k", 8.0)
    features = encoder.encode(torch.zeros(1, length.num_sync_frames, 3, 32, 32), segment_batch=8)
    assert features.shape == (1, length.sync_seq_len, 32) == (1, 192, 32)


@pytest.mark.parametrize("encoder", [Synchformer, TextSynch])
@torch.inference_mode()
def test_chunking_and_batching_have_no_numerical_meaning(encoder):
    module = randomize_(encoder(SMALL))
    frames = torch.randn(2, 34, 3, 32, 32)
    text = (torch.randn(2, 5, 12), torch.arange(5) < torch.tensor([[5], [3]])) if encoder is TextSynch else ()
    whole = module.encode(frames, *text)
    assert whole.shape == (2, 24, 32)
    for segment_batch in (1, 2, 4, 50):
        torch.testing.assert_close(module.encode(frames, *text, segment_batch=segment_batch), whole, rtol=0, atol=1e-5)
    second = module.encode(frames[1:], *(t[1:] for t in text))
    torch.testing.assert_close(second, whole[1:], rtol=0, atol=1e-5)
    # Segments do not see one another: the third one is what its own 16 frames give.
    third = module.encode(frames[:, 16:32], *text)
    torch.testing.assert_close(third, whole[:, 16:], rtol=0, atol=1e-5)
    assert (whole[:, 16:] - whole[:, :8]).abs().max() > 0.01


@torch.inference_mode()
def test_time_and_place_matter():
    encoder = Synchformer(SMALL)
    for embedding in (encoder.vfeat_extractor.pos_embed, encoder.vfeat_extractor.temp_embed):
        embedding.normal_()
    frames = torch.randn(1, 16, 3, 32, 32)
    features = encoder.encode(frames)
    one_step_later, one_patch_aside = frames.roll(2, dims=1), frames.roll(16, dims=-1)
    assert (encoder.encode(one_step_later).roll(-1, dims=1) - features).abs().max() > 0.01
    assert (encoder.encode(one_patch_aside) - features).abs().max() > 0.01
    for embedding in (encoder.vfeat_extractor.pos_embed, encoder.vfeat_extractor.temp_embed):
        embedding.zero_()  # without positions neither can be told
    features = encoder.encode(frames)
    torch.testing.assert_close(encoder.encode(one_step_later).roll(-1, dims=1), features, rtol=0, atol=1e-5)
    torch.testing.assert_close(encoder.encode(one_patch_aside), features, rtol=0, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------
# attention
# ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axis", ["time", "space"])
@torch.inference_mode()
def test_divided_attention_is_full_attention_with_a_mask(axis):
    num_slots, num_patches, dim, heads = 3, 4, 8, 2
    attention = randomize_(DividedAttention(dim, heads, axis))
    x = torch.randn(2, 1 + num_slots * num_patches, dim)

    token = torch.arange(num_slots * num_patches)
    group = token % num_patches if axis == "time" else token // num_patches
    allowed = torch.ones(1 + len(token), 1 + len(token), dtype=torch.bool)
    allowed[1:, 1:] = group[:, None] == group[None, :]  # the class token sees all and is seen by all
    q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in attention.qkv(x).chunk(3, dim=-1))
    scores = (q @ k.mT / (dim // heads) ** 0.5).masked_fill(~allowed, -torch.inf)
    expected = attention.proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))

    torch.testing.assert_close(attention(x, num_slots), expected, rtol=0, atol=1e-5)


@torch.inference_mode()
def test_aggregation_is_the_class_row_of_an_encoder_layer():
    aggregation = randomize_(SpatialAggregation(SMALL))
    layer = nn.TransformerEncoderLayer(
        32, 4, 48, activation=F.gelu, layer_norm_eps=1e-6, batch_first=True, norm_first=True
    ).eval()
    weights = aggregation.state_dict()
    class_token = weights.pop("cls_token")
    layer.load_state_dict(weights)
    patches = torch.randn(5, 7, 32)
    expected = layer(torch.cat((class_token.expand(5, -1, -1), patches), dim=1))[:, 0]
    torch.testing.assert_close(aggregation(patches), expected, rtol=0, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------
# text
# ---------------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def test_masked_text_is_not_seen_and_kept_text_is():
    encoder = randomize_(TextSynch(SMALL))
    frames, text = torch.randn(1, 16, 3, 32, 32), torch.randn(1, 6, 12)
    mask = torch.tensor([[True, True, True, False, False, False]])
    features = encoder.encode(frames, text, mask)

    other = text.clone()
    other[:, 3:] = 100.0
    assert torch.equal(encoder.encode(frames, other, mask), features)
    torch.testing.assert_close(encoder.encode(frames, text[:, :3], mask[:, :3]), features, rtol=0, atol=1e-5)
    assert (encoder.encode(frames, text, torch.ones_like(mask)) - features).abs().max() > 1e-3
    nothing = encoder.encode(frames, text, torch.zeros_like(mask))  # the supplementary tokens remain
    assert nothing.isfinite().all()


@torch.inference_mode()
def test_every_item_reads_its_own_text():
    encoder = randomize_(TextSynch(SMALL))
    frames = torch.randn(1, 24, 3, 32, 32).expand(2, -1, -1, -1, -1)
    text, mask = torch.randn(2, 4, 12), torch.ones(2, 4, dtype=torch.bool)
    features = encoder.encode(frames, text, mask, segment_batch=3)
    torch.testing.assert_close(encoder.encode(frames, text.flip(0), mask), features.flip(0), rtol=0, atol=1e-5)
    assert (features[0] - features[1]).abs().max() > 1e-3


@torch.inference_mode()
def test_a_fresh_textsynch_is_its_synchformer():
    encoder, plain = TextSynch(SMALL).eval(), Synchformer(SMALL).eval()
    plain.load_published(encoder.state_dict())
    frames = torch.randn(1, 16, 3, 32, 32)
    features = encoder.encode(frames, torch.randn(1, 2, 12), torch.ones(1, 2, dtype=torch.bool))
    assert torch.equal(features, plain.encode(frames))


# ---------------------------------------------------------------------------------------------------------------
# loading, precision, gradients, bad input
# ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoder", [Synchformer, TextSynch])
def test_loading_is_strict_inside_its_prefixes(encoder):
    weights = randomize_(encoder(SMALL)).state_dict()
    foreign = {"afeat_extractor.norm.weight": torch.zeros(3), "transformer.head.bias": torch.zeros(1)}
    loaded = encoder(SMALL).load_published({**weights, **foreign}).state_dict()
    assert all(torch.equal(loaded[k], weights[k]) for k in weights)
    assert loaded["vfeat_extractor.norm.weight"].data_ptr() != weights["vfeat_extractor.norm.weight"].data_ptr()

    missing = {k: v for k, v in weights.items() if k != "vfeat_extractor.temp_embed"}
    with pytest.raises(ValueError, match=r"1 missing: vfeat_extractor\.temp_embed$"):
        encoder(SMALL).load_published(missing)
    with pytest.raises(ValueError, match=r"1 unexpected: vfeat_extractor\.head\.bias$"):
        encoder(SMALL).load_published({**weights, "vfeat_extractor.head.bias": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"vfeat_extractor\.cls_token \(1, 1, 32\), expected \(1, 1, 128\)"):
        encoder(TINY_16K).load_published(weights)


@torch.inference_mode()
def test_tiny_sizes_and_half_precision():
    encoder = randomize_(TextSynch(TINY_16K))
    inputs = torch.randn(1, 24, 3, 112, 112), torch.randn(1, 4, 64), torch.ones(1, 4, dtype=torch.bool)
    features = encoder.encode(*inputs)
    assert features.shape == (1, num_sync_segments(24) * 8, 128)
    scale = features.std().item()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        auto = encoder.encode(*inputs)
    half = encoder.to(torch.bfloat16).encode(*inputs)  # float32 in, as the readers give it
    assert half.dtype == torch.bfloat16
    for other in (auto.float(), half.float()):
        assert (other - features).square().mean().sqrt() < 0.05 * scale


def test_every_used_parameter_gets_a_gradient():
    encoder = randomize_(TextSynch(SMALL)).train()
    features = encoder.encode(torch.randn(1, 16, 3, 32, 32), torch.randn(1, 2, 12), torch.ones(1, 2, dtype=torch.bool))
    features.square().mean().backward()
    without = [n for n, p in encoder.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert without == []


@pytest.mark.parametrize("shape", [(1, 15, 3, 32, 32), (1, 16, 3, 32, 48), (1, 16, 1, 32, 32), (16, 3, 32, 32)])
def test_frames_of_a_wrong_shape_are_refused(shape):
    with pytest.raises(ValueError, match=r"expected \(batch, at least 16 frames, 3, 32, 32\)"):
        Synchformer(SMALL).encode(torch.zeros(shape))
    with pytest.raises(ValueError, match=r"expected \(batch, at least 16 frames, 3, 32, 32\)"):
        TextSynch(SMALL).encode(torch.zeros(shape), torch.zeros(1, 2, 12), torch.ones(1, 2, dtype=torch.bool))


def test_bad_text_and_chunks_are_refused():
    encoder, frames = TextSynch(SMALL), torch.zeros(1, 16, 3, 32, 32)
    mask = torch.ones(1, 2, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"text is \(1, 2, 13\), expected \(1, tokens, 12\)"):
        encoder.encode(frames, torch.zeros(1, 2, 13), mask)
    with pytest.raises(ValueError, match=r"text is \(2, 2, 12\), expected \(1, tokens, 12\)"):
        encoder.encode(frames, torch.zeros(2, 2, 12), mask)
    with pytest.raises(ValueError, match=r"mask is \(1, 3\) torch.bool, expected \(1, 2\) torch.bool"):
        encoder.encode(frames, torch.zeros(1, 2, 12), torch.ones(1, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"mask is \(1, 2\) torch.int64, expected"):
        encoder.encode(frames, torch.zeros(1, 2, 12), mask.long())
    with pytest.raises(ValueError, match="segment_batch is 0, expected at least 1"):
        encoder.encode(frames, torch.zeros(1, 2, 12), mask, segment_batch=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_heads": 7}, r"embed_dim is 768, expected a multiple of num_heads \(7\)"),
        ({"image_size": 220}, r"image_size is 220, expected a multiple of patch_size \(16\)"),
        ({"temporal_patch": 3}, "temporal_patch is 3, expected a divisor of 16"),
        ({"num_sup_tokens": 0}, "num_sup_tokens is 0"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        VideoEncoderConfig(**settings)
