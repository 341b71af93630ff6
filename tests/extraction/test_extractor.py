"""Settings that decide whether features are current, and the generators that they serve."""

from __future__ import annotations

import pytest
import torch

from selva.data.folder import scan_folder
from selva.data.plan import plan_windows
from selva.extraction import extractor
from selva.extraction.extractor import FeatureExtractor, FramePasses, TextCache, clip_settings
from selva.features import FeatureBundle, save_features
from selva.models.variants import get_variant
from selva.sequence import sequence_config
from selva.utils.files import source_hash

CPU = torch.device("cpu")


def settings_of(path, variant: str = "small_16k", **changes):
    given = {"sha256": source_hash(path), "prompt": "rain", "start_sec": 0.0, "duration_sec": 8.0,
             "encoders": get_variant(variant).encoders, "precision": "float32"}
    return clip_settings(path, **{**given, **changes})


@pytest.mark.parametrize("position", [0, 1_234_567, 2_999_999])
def test_every_byte_of_a_video_counts(tmp_path, position):
    """Pitfall B7: sampled chunks of a file would miss a change between them."""
    content = bytearray(3_000_000)
    path = tmp_path / "v.mp4"
    path.write_bytes(content)
    before = source_hash(path)
    content[position] = 1
    path.write_bytes(content)
    assert source_hash(path) != before


def test_every_setting_counts(tmp_path):
    """Pitfall B7: prompt, range, precision, encoders and the version of the code."""
    path = tmp_path / "v.mp4"
    path.write_bytes(b"x")
    ours = settings_of(path)
    assert ours == settings_of(path) and "extraction_version" in ours and "mask" not in ours
    others = [
        settings_of(path, prompt="snow"),
        settings_of(path, duration_sec=4.0),
        settings_of(path, start_sec=1.0),
        settings_of(path, precision="bfloat16"),
        settings_of(path, "mmaudio_small_16k"),
        settings_of(path, "tiny_16k"),
        settings_of(path, mask={"sha256": "1", "strength": 1.0}),
        settings_of(path, mask={"sha256": "1", "strength": 0.5}),
    ]
    assert all(other != ours for other in others) and others[-1] != others[-2]


@pytest.mark.parametrize("variant", ["small_44k", "medium_44k", "large_44k"])
def test_all_sizes_of_a_family_share_their_features(tmp_path, variant):
    """Pitfall B9: their encoders are the same."""
    path = tmp_path / "a.mp4"
    path.write_bytes(b"x")
    assert settings_of(path, variant) == settings_of(path)
    lengths, config = sequence_config("16k", 2.0), get_variant("small_16k").generator
    save_features(tmp_path / "a.npz", FeatureBundle(
        clip_features=torch.ones(1, lengths.clip_seq_len, config.clip_dim),
        sync_features=torch.ones(1, lengths.sync_seq_len, config.sync_dim),
        duration=2.0, prompt="rain", variant="small_16k",
    ))
    (tmp_path / "a.wav").write_bytes(b"sound")
    (clip,) = scan_folder(tmp_path).clips
    assert plan_windows(clip, get_variant(variant), 8.0) == (sequence_config("44k", 2.0), (0,))


def frames(number: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (number, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def test_passes_have_one_size_and_keep_the_clips_apart():
    shapes = []

    def encode(pictures):
        shapes.append(tuple(pictures.shape))
        return pictures.flatten(1).float()[:, :1]

    passes: FramePasses[str] = FramePasses(encode, 4)
    clips = {"a": frames(3, 1), "b": frames(6, 2), "c": frames(2, 3)}
    found = [item for key, pictures in clips.items() for item in passes.add(key, pictures)]
    assert [key for key, _ in found] == ["a"]  # 11 frames are two passes and three that wait
    found += passes.flush()
    assert [key for key, _ in found] == ["a", "b", "c"] and shapes == [(4, 3, 64, 64)] * 3
    for key, features in found:
        assert torch.equal(features, clips[key].flatten(1).float()[:, :1])


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_the_features_of_a_frame_depend_on_nothing_but_the_frame(precision):
    """Bit by bit: otherwise a run that was interrupted would end with other files than one that was not."""
    extractor = FeatureExtractor(get_variant("tiny_16k"), None, CPU, precision)
    clip = frames(21, 1)
    alone = extractor.clip_features(clip)[0]
    for before in (1, 5, 15):
        passes = extractor.clip_passes()
        found = dict([*passes.add("before", frames(before, 2)), *passes.add("clip", clip),
                      *passes.add("after", frames(20, 3)), *passes.flush()])
        assert torch.equal(found["clip"], alone)


def test_encoded_texts_do_not_pile_up(monkeypatch):
    monkeypatch.setattr(extractor, "CACHED_TEXTS", 2)
    loaded, encoded = [], []
    cache = TextCache(lambda: loaded.append(1) or "encoder", lambda _, prompt: encoded.append(prompt) or prompt.upper())
    assert [cache[prompt] for prompt in "abacaba"] == list("ABACABA")
    assert encoded == list("abcb") and len(cache._known) == 2
    cache.free()
    assert cache["a"] == "A" and len(loaded) == 1
    assert cache["x"] == "X" and len(loaded) == 2


def test_few_texts_are_encoded_at_once_and_many_when_they_are_needed(monkeypatch):
    monkeypatch.setattr(extractor, "CACHED_TEXTS", 2)
    loads = []
    original = extractor.load_clip_text
    monkeypatch.setattr(extractor, "load_clip_text", lambda *args: loads.append(1) or original(*args))
    few = FeatureExtractor(get_variant("tiny_16k"), None, CPU)
    few.prepare_texts(["a", "b"])
    one, _ = few.text_features("a"), few.text_features("b")
    assert len(loads) == 1
    many = FeatureExtractor(get_variant("tiny_16k"), None, CPU)
    many.prepare_texts(["a", "b", "c"])
    assert len(loads) == 1  # nothing yet: they would not fit
    features = [many.text_features(prompt) for prompt in "abca"]
    assert len(loads) == 2 and torch.equal(features[0], features[3]) and torch.equal(features[0], one)
