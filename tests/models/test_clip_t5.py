import json
from dataclasses import asdict

import pytest
import torch
import torch.nn.functional as F

from selva.models.clip_t5 import ClipImage, ClipText, InPlaceQuickGELU, T5Text, meta_clip, meta_t5
from selva.models.config import ClipConfig, T5Config
from selva.models.random_weights import random_state_dict
from selva.models.variants import get_variant

TINY = get_variant("tiny_16k")


@pytest.fixture(scope="module")
def clip_small(golden):
    case = golden("clip_small")
    vision, text = case.config["vision_cfg"], case.config["text_cfg"]
    config = ClipConfig(
        embed_dim=case.config["embed_dim"],
        quick_gelu=case.config["quick_gelu"],
        image_size=vision["image_size"],
        patch_size=vision["patch_size"],
        vision_layers=vision["layers"],
        vision_width=vision["width"],
        vision_head_width=vision["head_width"],
        text_width=text["width"],
        text_heads=text["heads"],
        text_layers=text["layers"],
        context_length=text["context_length"],
        vocab_size=text["vocab_size"],
    )
    return case, config


def tiny_clip(tower):
    return tower(TINY.clip).load_published(random_state_dict(meta_clip(TINY.clip)))


def tiny_t5():
    return T5Text(TINY.t5).load_published(random_state_dict(meta_t5(TINY.t5)))


# -- CLIP against the golden data -------------------------------------------------------------------------------------


def test_text_states_equal_the_reference(clip_small):
    case, config = clip_small
    clip = ClipText(config).load_published(case.weights())
    tokens = case.inputs()["tokens"]
    with torch.no_grad():
        case.check("text_states", clip.token_states(tokens))
    clip.tokenize = lambda texts: tokens  # the golden vocabulary of 512 words has no tokenizer
    case.check("text_states_normalized", clip.encode(["", ""]))


def test_image_features_equal_the_reference(clip_small):
    case, config = clip_small
    clip = ClipImage(config, batch_size=2).load_published(case.weights())
    frames = case.inputs()["frames"]  # (1, 3, 3, 384, 384), a little outside [0, 1]
    with torch.no_grad():
        states = clip.frame_states(clip.normalize(frames[0]))
    case.check("image_features_unnormalized", states)
    case.check("clip_features", F.normalize(states, dim=-1)[None])


# -- CLIP -------------------------------------------------------------------------------------------------------------


def test_the_default_clip_is_the_one_that_open_clip_describes():
    from open_clip import get_model_config

    theirs = get_model_config("ViT-H-14-378-quickgelu")
    ours = ClipConfig()
    vision, text = theirs["vision_cfg"], theirs["text_cfg"]
    assert asdict(ours) == {
        "embed_dim": theirs["embed_dim"],
        "quick_gelu": theirs["quick_gelu"],
        "image_size": vision["image_size"],
        "patch_size": vision["patch_size"],
        "vision_layers": vision["layers"],
        "vision_width": vision["width"],
        "vision_head_width": vision["head_width"],
        "text_width": text["width"],
        "text_heads": text["heads"],
        "text_layers": text["layers"],
        "context_length": text["context_length"],
        "vocab_size": text["vocab_size"],
        "byte_tokens": False,
    }


def test_clip_tokens_are_those_of_open_clip():
    tokens = ClipText(ClipConfig(text_layers=1, vision_layers=1)).tokenize(["", "A  dog\nbarks", "dog " * 100])
    assert tokens.shape == (3, 77)
    assert tokens[0, :2].tolist() == [49406, 49407] and not tokens[0, 2:].any()
    assert tokens[1, :7].tolist() == [49406, 320, 1929, 1040, 662, 49407, 0]  # a, dog, bar, ks
    assert tokens[2, -1] == 49407 and tokens[2, -2] not in (0, 49407)


def test_byte_tokens_are_cleaned_cut_and_framed():
    tokens = tiny_clip(ClipText).tokenize(["", "A  b\n", "é", "x" * 200])
    assert tokens.shape == (4, 77)
    assert tokens[:3, :5].tolist() == [[2, 1, 0, 0, 0], [2, 100, 35, 101, 1], [2, 198, 172, 1, 0]]
    assert tokens[3].tolist() == [2] + [ord("x") + 3] * 75 + [1]


def test_every_text_token_has_length_one_and_later_tokens_do_not_reach_earlier_ones():
    features = tiny_clip(ClipText).encode(["a dog", "a door"])
    torch.testing.assert_close(features.norm(dim=-1), torch.ones(2, 77))
    same = len("a do") + 1  # the start token and the common letters
    torch.testing.assert_close(features[0, :same], features[1, :same])
    assert (features[0, same] - features[1, same]).abs().max() > 1e-3


def test_frames_may_be_bytes_or_fractions_and_batches_do_not_matter():
    clip = tiny_clip(ClipImage)
    frames = torch.randint(0, 256, (5, 3, 64, 64), dtype=torch.uint8)
    features = clip.encode(frames)
    torch.testing.assert_close(features.norm(dim=-1), torch.ones(5))
    torch.testing.assert_close(clip.encode(frames.float() / 255), features)
    clip.batch_size = 2
    torch.testing.assert_close(clip.encode(frames), features)


@torch.no_grad()
def test_the_activation_in_place_is_that_of_open_clip():
    from open_clip.transformer import QuickGELU

    clip = meta_clip(ClipConfig(text_layers=1, vision_layers=1))
    x = torch.randn(1000)
    expected = [QuickGELU()(x), QuickGELU()(x.bfloat16())]
    in_place = InPlaceQuickGELU()
    assert sum(type(layer) is InPlaceQuickGELU for layer in clip.modules()) == 2
    assert torch.equal(in_place(x.bfloat16()), expected[1]) and torch.equal(in_place(x), expected[0])


def test_pixels_beyond_the_last_whole_patch_are_ignored():
    clip = tiny_clip(ClipImage)
    frames = torch.rand(2, 3, 71, 71)
    torch.testing.assert_close(clip.encode(frames), clip.encode(frames[..., :64, :64].contiguous()))


@pytest.mark.parametrize(
    "frames, message",
    [
        (torch.rand(2, 3, 72, 72), r"\(2, 3, 72, 72\), expected .* from 64 to 71"),
        (torch.rand(2, 64, 64, 3), "expected .frames, 3"),
        (torch.rand(3, 64, 64), "expected .frames, 3"),
        (torch.rand(2, 3, 64, 64) * 255, "expected 0 to 1"),
        (torch.full((1, 3, 64, 64), torch.nan), "expected 0 to 1"),
    ],
)
def test_unsuitable_frames_are_refused(frames, message):
    with pytest.raises(ValueError, match=message):
        tiny_clip(ClipImage).encode(frames)


def test_each_tower_reads_its_own_tensors_and_half_precision_is_widened():
    """Pitfall H3: the text tower is read without the image tower."""
    weights = {name: w.half() for name, w in random_state_dict(meta_clip(TINY.clip)).items()}
    text, image = ClipText(TINY.clip).load_published(weights), ClipImage(TINY.clip).load_published(weights)
    for tower in (text, image):
        tensors = [*tower.parameters(), *tower.buffers()]
        assert all(t.dtype == torch.float32 and not t.is_meta and not t.requires_grad for t in tensors)
    own = [sum(p.numel() for p in tower.parameters()) for tower in (text, image)]
    left_out = weights["text_projection"].numel() + weights["logit_scale"].numel()
    assert sum(own) + left_out == sum(w.numel() for w in weights.values())


@pytest.mark.parametrize("tower, name", [(ClipText, "ln_final.weight"), (ClipImage, "visual.proj")])
def test_a_missing_clip_tensor_is_named(tower, name):
    weights = random_state_dict(meta_clip(TINY.clip))
    del weights[name]
    with pytest.raises(ValueError, match=f"missing: {name.removeprefix('visual.')}"):
        tower(TINY.clip).load_published(weights)


# -- T5 ---------------------------------------------------------------------------------------------------------------


def test_the_default_t5_equals_the_published_encoder_in_size():
    """FLAN-T5-base: 109.6 million parameters in the encoder, its 24.7 million of word vectors included."""
    assert sum(p.numel() for p in meta_t5(T5Config()).parameters()) == 109_628_544


def test_padding_does_not_change_a_text():
    t5 = tiny_t5()
    features, mask = t5.encode(["", "a dog barks"])
    assert features.shape == (2, 12, 64) and features.dtype == torch.float32
    assert mask.dtype == torch.bool and mask.sum(1).tolist() == [1, 12]
    alone, alone_mask = t5.encode([""])
    assert alone.shape == (1, 1, 64) and alone_mask.all()
    torch.testing.assert_close(features[:1, :1], alone, atol=1e-5, rtol=1e-5)


def test_long_texts_are_cut_and_keep_their_end(caplog):
    tokens, mask = tiny_t5().tokenize(["y" * 511])
    assert tokens.shape == (1, 512) and tokens[0, -1] == 1 and mask.all() and not caplog.text
    tokens, mask = tiny_t5().tokenize(["a dog", "x" * 510 + "yz"])
    assert tokens.shape == (2, 512) and tokens[1, -1] == 1 and mask[1].all()
    assert len(caplog.messages) == 1 and "longer than the 512 tokens" in caplog.text
    assert f"what follows {'x' * 39 + 'y'!r} is not read" in caplog.text


def test_t5_equals_transformers_with_the_same_weights(tmp_path):
    """The file stores the shared word table once, as the published one does."""
    import transformers
    from safetensors.torch import save_file

    reference = transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=259, d_model=64, d_kv=32, d_ff=128, num_layers=2, num_heads=2, num_decoder_layers=1,
            feed_forward_proj="gated-gelu", tie_word_embeddings=False, decoder_start_token_id=0,
        )
    ).eval()
    weights = {
        name: w.clone() for name, w in reference.state_dict().items() if not name.endswith("embed_tokens.weight")
    }
    assert any(name.startswith("decoder.") for name in weights)
    save_file(weights, tmp_path / "model.safetensors")
    t5 = T5Text(TINY.t5).load_published(weights)
    texts = ["a dog barks", "rain"]
    tokens, mask = t5.tokenize(texts)
    with torch.no_grad():
        expected = reference.encoder(input_ids=tokens, attention_mask=mask.long()).last_hidden_state
    features, _ = t5.encode(texts)
    torch.testing.assert_close(features[mask], expected[mask])


def test_a_cast_keeps_one_word_table():
    t5 = tiny_t5().to(torch.bfloat16)
    assert t5.t5.encoder.embed_tokens.weight is t5.t5.shared.weight
    features, _ = t5.encode(["a dog"])
    assert features.dtype == torch.float32
    torch.testing.assert_close(features, tiny_t5().encode(["a dog"])[0], atol=0.2, rtol=0.2)


def test_a_tokenizer_file_is_used_and_a_broken_one_is_named(tmp_path, caplog):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = {"<pad>": 0, "</s>": 1, "<unk>": 2, "a": 3, "dog": 4}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.enable_padding(length=9)  # settings stored in a file must not decide ours
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    tokens, mask = T5Text(T5Config(num_layers=1), tmp_path / "tokenizer.json").tokenize(["a dog", "", "a cat a"])
    assert tokens.tolist() == [[3, 4, 1, 0], [1, 0, 0, 0], [3, 2, 3, 1]]
    assert mask.tolist() == [[True] * 3 + [False], [True] + [False] * 3, [True] * 4]
    assert not caplog.text
    T5Text(T5Config(num_layers=1), tmp_path / "tokenizer.json").tokenize(["a dog " * 256])
    assert "longer than the 512 tokens" in caplog.text and "dog a' is not read" in caplog.text
    for content in ("", "<html>", json.dumps({"version": "1.0"})):
        (tmp_path / "tokenizer.json").write_text(content)
        with pytest.raises(ValueError, match=r"tokenizer\.json: not a tokenizer file"):
            T5Text(T5Config(num_layers=1), tmp_path / "tokenizer.json")
