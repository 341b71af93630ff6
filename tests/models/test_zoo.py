import json
import re

import pytest
import torch
from golden_case import GOLDEN

from selva.models.config import GeneratorConfig, VideoEncoderConfig
from selva.models.random_weights import fill_random_, random_state_dict, random_tensor
from selva.models.synchformer import Synchformer
from selva.models.textsynch import TextSynch
from selva.models.variants import PARTS, VARIANTS, WEIGHT_FILES, features_problem, get_variant
from selva.models.vocoder import FILTER_SUFFIXES, WEIGHT_NORM_SUFFIXES
from selva.models.zoo import (
    build_generator,
    build_mel,
    build_synchformer,
    build_vae,
    build_video_encoder,
    build_vocoder,
)
from selva.sequence import sequence_config

SUMMARY = json.loads((GOLDEN / "manifests" / "summary.json").read_text())["models"]
SIZES = ["small_16k", "small_44k", "medium_44k", "large_44k", "large_44k_v2"]


def manifest(name):
    """{name: shape} of the parameters and buffers of a published network."""
    entries = json.loads((GOLDEN / "manifests" / f"{name}.json").read_text())
    return {key: tuple(shape) for key, shape, _dtype, _is_buffer in entries}


def shapes(module):
    return {key: tuple(value.shape) for key, value in module.state_dict().items()}


def on_meta(build, which):
    with torch.device("meta"):
        return build(which)


def num_parameters(module):
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("size", SIZES)
def test_generators_have_the_published_tensors(size):
    name = size if size != "large_44k_v2" else "mmaudio_large_44k_v2"
    generator = on_meta(build_generator, name)
    assert shapes(generator) == manifest(f"generator_{size}")
    expected = SUMMARY[f"generator_{size}"]
    assert num_parameters(generator) == expected["parameters"]
    assert sum(p.numel() for p in generator.parameters() if p.requires_grad) == expected["parameters_requiring_grad"]
    config = vars(get_variant(name).generator)
    assert {key: config[key] for key in expected["config"]} == expected["config"]


@pytest.mark.parametrize("size", SIZES[:-1])
def test_both_families_have_the_same_generator_sizes(size):
    assert get_variant(size).generator == get_variant(f"mmaudio_{size}").generator


@pytest.mark.parametrize("mode", ["16k", "44k"])
def test_vaes_have_the_published_tensors(mode):
    assert shapes(on_meta(build_vae, mode)) == manifest(f"vae_{mode}")


@pytest.mark.parametrize("mode, name", [("16k", "bigvgan_16k"), ("44k", "bigvgan_v2_44k")])
def test_vocoders_have_the_published_tensors_with_weight_norm_folded(mode, name):
    g_suffix, v_suffix = WEIGHT_NORM_SUFFIXES[1]
    folded = {
        key.replace(v_suffix, ".weight"): shape
        for key, shape in manifest(name).items()
        if not key.endswith((g_suffix, *FILTER_SUFFIXES))
    }
    assert shapes(on_meta(build_vocoder, mode)) == folded


def test_video_encoders_have_the_published_tensors():
    assert shapes(on_meta(build_video_encoder, "small_16k")) == manifest("textsynch_depth1")
    assert shapes(on_meta(build_synchformer, "large_44k")) == manifest("synchformer_video")


@pytest.mark.parametrize("name", VARIANTS)
def test_the_parts_of_a_variant_fit_together(name):
    variant = get_variant(name)
    lengths = sequence_config(variant.mode, 8.0)
    generator = variant.generator
    assert (generator.latent_seq_len, generator.clip_seq_len, generator.sync_seq_len) == (
        lengths.latent_seq_len, lengths.clip_seq_len, lengths.sync_seq_len,
    )
    assert generator.latent_dim == variant.vae.latent_dim
    assert generator.clip_dim == variant.clip.embed_dim
    assert generator.text_dim == variant.clip.text_width
    assert generator.text_seq_len == variant.clip.context_length
    assert generator.sync_dim == variant.video_encoder.embed_dim
    assert variant.sync_image_size == variant.video_encoder.image_size
    assert variant.vae.mode == variant.mode
    assert variant.vae.num_mels == variant.vocoder.num_mels
    assert variant.vocoder.hop_length == lengths.hop_length
    if variant.t5 is not None:
        assert variant.t5.d_model == variant.video_encoder.text_dim


@pytest.mark.parametrize("name", VARIANTS)
def test_every_part_names_its_files(name):
    variant = get_variant(name)
    files = {part: [file.name for file in variant.weight_files(part)] for part in PARTS}
    if variant.packaged:
        assert not any(files.values())
        return
    selva = variant.family == "selva"
    assert files == {
        "generator": [f"generator_{name}_sup_5.pth" if selva else f"{name}.pth"],
        "video_encoder": ["video_enc_sup_5.pth" if selva else "synchformer_state_dict.pth"],
        "vae": ["v1-16.pth" if "16k" in name else "v1-44.pth"],
        "vocoder": ["best_netG.pt" if "16k" in name else "bigvgan_generator.pt"],
        "clip_text": ["open_clip_model.safetensors"],
        "clip_image": ["open_clip_model.safetensors"],
        "t5": ["model.safetensors", "tokenizer.json"] if selva else [],
    }
    assert variant.sync_crop is not selva


def test_remote_names_differ_only_where_the_repository_says_44khz():
    renamed = {f.name: f.remote for f in WEIGHT_FILES.values() if not f.remote.endswith("/" + f.name)}
    assert renamed == {
        f"generator_{size}_44k_sup_5.pth": f"weights/generator_{size}_44khz_sup_5.pth"
        for size in ("small", "medium", "large")
    }
    assert {f.name for f in WEIGHT_FILES.values() if not f.md5_verified} == set(renamed)


def test_every_file_of_selva_and_mmaudio_has_a_checksum():
    """Pitfall H2: the SelVA generators of 44.1 kHz too."""
    checksums = [file.md5 for file in WEIGHT_FILES.values()]
    assert all(checksum and re.fullmatch("[0-9a-f]{32}", checksum) for checksum in checksums)
    assert len(set(checksums)) == len(checksums)


def test_an_unknown_variant_is_answered_with_the_list():
    with pytest.raises(ValueError, match=r"'large_48k'.*small_16k.*mmaudio_large_44k_v2.*tiny_16k"):
        get_variant("large_48k")


def test_builders_take_names_modes_and_configurations():
    tiny = get_variant("tiny_16k")
    assert shapes(build_vae("tiny_16k")) == shapes(build_vae(tiny.vae))
    assert shapes(build_vocoder("tiny_16k")) == shapes(build_vocoder(tiny.vocoder))
    assert shapes(build_generator("tiny_16k")) == shapes(build_generator(tiny.generator))
    assert type(build_video_encoder(tiny.video_encoder)) is TextSynch
    assert type(on_meta(build_video_encoder, "mmaudio_small_16k")) is Synchformer
    assert type(build_synchformer(VideoEncoderConfig(embed_dim=8, depth=1, num_heads=2, mlp_dim=8))) is Synchformer
    assert build_mel("medium_44k").mode == build_mel("44k").mode == "44k"


# -- random weights ---------------------------------------------------------------------------------------------------


def test_random_weights_are_the_same_everywhere():
    """Stored numbers: they must survive another machine, another library version, and other layers beside this one."""
    expected = torch.tensor([[1.052945256, -0.109139159], [-0.816208899, -0.15240714]])
    assert torch.equal(random_tensor("joint_blocks.0.weight", (2, 2)), expected)


def test_seed_and_name_decide_the_values():
    values = {
        (name, seed): random_tensor(name, (4, 4), seed) for name in ("a.weight", "b.weight") for seed in (0, 1)
    }
    assert len({tuple(v.flatten().tolist()) for v in values.values()}) == 4


def test_random_weights_keep_magnitudes():
    x = torch.randn(256, 512)
    assert (x @ random_tensor("layer.weight", (512, 512)).T).std() == pytest.approx(1, rel=0.05)
    text = torch.nn.functional.normalize(x, dim=-1)  # CLIP features have length 1, and must not drown in the bias
    assert (text @ random_tensor("text_input_proj.0.weight", (512, 512)).T).std() == pytest.approx(1, rel=0.05)
    assert random_tensor("norm.weight", (4096,)).mean() == pytest.approx(1, abs=0.01)
    deviation = random_tensor("latent_std", (1, 1, 20))
    assert deviation.min() >= 1 and deviation.max() < 1.2


def test_buffers_keep_their_values_and_nothing_else_is_constant():
    vae = build_vae("tiny_16k")
    weights = random_state_dict(vae)
    assert torch.equal(weights.pop("data_mean"), vae.data_mean)
    assert torch.equal(weights.pop("data_std"), vae.data_std)
    assert all(torch.isfinite(w).all() and w.count_nonzero() == w.numel() for w in weights.values())


@pytest.mark.parametrize("v2", [False, True])
def test_a_randomly_filled_generator_answers_to_every_input_and_learns_in_every_layer(v2):
    config = GeneratorConfig(
        latent_dim=4, hidden_dim=32, depth=3, fused_depth=1, num_heads=2, clip_dim=8, sync_dim=8, text_dim=8,
        latent_seq_len=10, clip_seq_len=4, sync_seq_len=8, v2=v2,
    )
    generator = fill_random_(build_generator(config))
    inputs = [torch.randn(1, 10, 4), torch.randn(1, 4, 8), torch.randn(1, 8, 8), torch.randn(1, 77, 8)]
    t = torch.tensor([0.3])
    flow = generator(*inputs, t)
    assert 0.1 < flow.std() < 10
    for i in range(4):
        changed = [x + (j == i) for j, x in enumerate(inputs)]
        assert (generator(*changed, t) - flow).abs().max() > 1e-3, f"input {i} has no effect"
    flow.square().mean().backward()
    # The empty features stand in for absent inputs; the queries of the last clip and text streams are never used.
    last = "joint_blocks.1."
    out_of_reach = ("empty_", f"{last}clip_block.attn.q_norm", f"{last}text_block.attn.q_norm")
    silent = [
        name for name, p in generator.named_parameters()
        if p.requires_grad and not name.startswith(out_of_reach) and (p.grad is None or not p.grad.any())
    ]
    assert not silent


@torch.no_grad()
def test_the_tiny_networks_make_sound_of_a_sensible_level():
    vae, vocoder = fill_random_(build_vae("tiny_16k")), fill_random_(build_vocoder("tiny_16k"))
    mel = vae.decode(torch.randn(1, 20, 250))
    waveform = vocoder(mel)
    assert waveform.shape == (1, 1, 128_000)
    assert 0.02 < waveform.std() < 0.8 and waveform.abs().max() <= 1  # no sound is behind this mel, so it may clip
    assert waveform.mean().abs() < 0.2 * waveform.std()
    mean, std = vae.encode(build_mel("tiny_16k")(waveform[0]))
    assert 0.1 < mean.std() < 10 and std.min() > 0 and std.max() < 100


@torch.no_grad()
def test_the_tiny_video_encoder_sees_motion_and_reads_text():
    encoder = fill_random_(build_video_encoder("tiny_16k")).eval()
    side = get_variant("tiny_16k").sync_image_size
    still = torch.rand(1, 1, 3, side, side).expand(1, 16, -1, -1, -1) * 2 - 1
    moving = torch.rand(1, 16, 3, side, side) * 2 - 1
    texts, mask = torch.randn(2, 1, 4, 64), torch.ones(1, 4, dtype=torch.bool)
    features = encoder.encode(still, texts[0], mask)
    assert features.shape == (1, 8, 64) and 0.1 < features.std() < 10
    for other in (encoder.encode(moving, texts[0], mask), encoder.encode(still, texts[1], mask)):
        assert (other - features).square().mean().sqrt() > 0.01


def test_features_suit_the_variants_whose_encoders_made_them():
    """Pitfall B9: the size of the generator is no matter; SelVA's and MMAudio's look alike and are not."""
    large, tiny = get_variant("large_44k"), get_variant("tiny_16k")
    assert features_problem("small_16k", large) is None and features_problem("", large) is None
    assert features_problem("from_elsewhere", large) is None
    assert "mmaudio_small_16k" in features_problem("mmaudio_small_16k", large)
    assert features_problem("small_16k", tiny) is not None and features_problem("tiny_16k", tiny) is None
