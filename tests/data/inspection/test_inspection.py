"""Inspecting data sets: every odd thing is found and named, and nothing is said about good clips."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from make_data import TINY, noise, put_clip, put_memmap, put_sound
from make_media import make_video

from selva.data.inspection import duplicates, report
from selva.data.inspection.measures import inspect
from selva.data.inspection.report import sentences, summary, table, to_json
from selva.data.summary import measure_sound
from selva.features import FeatureBundle, load_features, save_features
from selva.models.variants import get_variant


def put_good(folder, stem, seed, sound=None, seconds=2.0, prompt="a knock", variant="tiny_16k"):
    """Write a clip as extraction makes it: CLIP features of norm 1."""
    put_clip(folder, stem, seconds, prompt, sound, seed=seed)
    bundle, rng = load_features(folder / f"{stem}.npz"), torch.Generator().manual_seed(seed)
    clip_f, sync_f = (torch.randn(f.shape, generator=rng) for f in (bundle.clip_features, bundle.sync_features))
    rewrite(folder / f"{stem}.npz", clip_features=torch.nn.functional.normalize(clip_f, dim=-1), sync_features=sync_f,
            variant=variant)


def rewrite(path, **changes):
    bundle, names = load_features(path), ("clip_features", "sync_features", "duration", "prompt", "variant")
    values = {name: getattr(bundle, name) for name in names}
    save_features(path, FeatureBundle(**{**values, **changes}))


def said(inspection):
    return "\n".join(sentences(inspection))


def test_nothing_is_said_about_good_clips(tmp_path):
    """Rain, hum and one knock are good clips (pitfall J1: the steady ones were once removed)."""
    rng = np.random.default_rng(0)
    t = np.arange(33_600) / 16_000
    knock = np.exp(-40 * np.clip(t - 0.7, 0, None)) * np.sin(3000 * t) * (t >= 0.7) * 0.9
    for seed, sound in enumerate((
        rng.standard_normal(33_600) * 0.05, rng.standard_normal(33_600) * 0.05, 0.2 * np.sin(300 * t),
        0.2 * np.sin(300 * t + 1), knock + 2e-3 * rng.standard_normal(33_600),
    )):
        put_good(tmp_path / "data", f"clip_{seed}", seed, sound.astype(np.float32))
    inspection = inspect(tmp_path / "data")
    assert sentences(inspection) == [] and inspection.usable and inspection.kind == "pairs"
    assert all(line.startswith("  ") for line in table(inspection))
    assert summary(inspection) == "5 pairs of features and sound, 10 s in all; cannot be used: 0; worth a look: 0"
    report = inspection.clips[0]
    assert report.sound == measure_sound(tmp_path / "data" / "clip_0.wav")
    assert report.clip_norm == pytest.approx((1, 1), abs=1e-5)
    assert report.sound is not None and report.sound.peak_db is not None and report.true_peak_db is not None
    assert report.true_peak_db >= report.sound.peak_db


def test_what_cannot_be_used_is_named(tmp_path):
    data = tmp_path / "data"
    put_good(data, "good", 0)
    put_good(data, "silent", 1, np.zeros(40_000, np.float32))
    put_good(data, "nan", 3, np.full(40_000, np.nan, np.float32))
    put_good(data, "alone", 4)
    (data / "alone.wav").unlink()
    put_sound(data / "lonely.wav", noise(1))
    put_good(data, "broken", 5)
    (data / "broken.wav").write_bytes(b"rubbish")
    put_good(data, "cancels", 6, np.stack([noise(2.1), -noise(2.1)], axis=1))
    put_good(data, "other", 7, variant="mmaudio_small_16k")
    put_good(data, "torn", 8)
    (data / "torn.npz").write_bytes((data / "torn.npz").read_bytes()[:300])
    inspection = inspect(data)
    text = said(inspection)
    for line in (
        "silent: its sound is silent",
        "nan: its sound has values that are not finite", "alone.npz: no sound beside it", "lonely.wav: no features",
        "broken: its sound cannot be read: cannot be read as video or audio", "cancels: its channels cancel",
        "other: clip_features are 64 wide", "torn.npz: cannot be read as a feature file",
    ):
        assert f"! {line}" in text or f"/{line}" in text, line
    assert text.count("!") == 8 and "?" not in text
    assert not inspection.usable and "cannot be used: 8" in summary(inspection)
    marks = {row.split()[1]: row[0] for row in table(inspection)[1:] if row[0] == "!"}
    assert sorted(marks) == ["broken", "cancels", "nan", "other", "silent"]


def test_what_is_odd_is_named(tmp_path):
    data = tmp_path / "knocks"
    put_good(data, "gaps", 0, np.concatenate([noise(0.5), np.zeros(27_000, np.float32)]))
    put_good(data, "loud", 1, np.clip(noise(2.1, seed=1) * 100, -1, 1))
    put_good(data, "faint", 2, noise(2.1, seed=2) * 0.01)
    put_good(data, "long", 3, noise(9, seed=3))
    put_good(data, "phase", 4, np.stack([noise(2.1, seed=4), -noise(2.1, seed=4) * 0.7], axis=1))
    put_good(data, "offset", 5, noise(2.1, seed=5) + 0.05)
    put_good(data, "click", 6, np.concatenate([noise(2.1, seed=6) * 0.3, [0.0, 0.9, -0.9]]).astype(np.float32))
    put_good(data, "unnamed", 7, prompt="")
    put_good(data, "padded", 8)
    put_good(data, "scaled", 9)
    for stem in ("padded", "scaled"):
        features = load_features(data / f"{stem}.npz").clip_features.clone()
        features[0, 10:] *= 0 if stem == "padded" else 1.5
        rewrite(data / f"{stem}.npz", clip_features=features)
    put_good(data, "short", 11, noise(1.2, seed=11))
    put_good(data, "low", 10)
    put_sound(data / "low.wav", noise(2.1, 8_000, seed=10), 8_000)
    inspection = inspect(data)
    text = said(inspection)
    for line in (
        "faint, gaps: more than half of it is silent (below -60 dB)", "loud: it is clipped: ",
        "faint: it is very quiet (-6",
        "long: its sound lasts 9.00 s, but its features cover only the first 2.00 s",
        "short: its sound lasts 1.20 s, but its features cover 2.00 s: it is padded with silence",
        "phase: its channels are out of phase", "offset: it has a constant offset of +0.0",
        "click: it has a click at its end",
        "unnamed: it has no prompt of its own; the name of the folder is used",
        "padded: rows of zeros in its CLIP features: 6 of 16", "low: it was recorded at 8000 Hz, below the 16000 Hz",
        "scaled: its CLIP features have norms from 1.000 to 1.500, expected 1",
    ):
        assert f"? {line}" in text, line
    assert len(sentences(inspection)) == 12 and inspection.usable
    assert [clip.id for clip in inspection.clips if len(clip.notes) != 1] == ["faint"]


def test_copies_are_found(tmp_path):
    data = tmp_path / "data"
    for seed, stem in enumerate("abcd"):
        put_good(data, stem, seed)
    shutil.copy(data / "a.wav", data / "b.wav")
    put_sound(data / "c.wav", noise(2.1, seed=3)[800:] * 0.1)
    features = load_features(data / "a.npz")
    rewrite(data / "d.npz", clip_features=features.clip_features, sync_features=features.sync_features * 1.05)
    found = {(group.what, group.ids) for group in inspect(data).alike}
    assert found == {("sound", ("a", "b")), ("sound", ("c", "d")), ("video", ("a", "d"))}
    text = said(inspect(data))
    assert "? a, b: the same sound; they count twice" in text and "? a, d: the same video; validation" in text
    assert "? c, d: nearly the same (0.9" in text
    assert summary(inspect(data)).endswith("; groups of copies: 3")


def test_of_very_many_clips_only_equal_content_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(duplicates, "MOST_COMPARED", 2)
    data = tmp_path / "data"
    for seed, stem in enumerate("abcd"):
        put_good(data, stem, seed)
    shutil.copy(data / "c.wav", data / "d.wav")
    put_sound(data / "b.wav", noise(2.1) * 0.1)
    inspection = inspect(data)
    assert [(group.what, group.ids) for group in inspection.alike] == [("sound", ("c", "d"))]
    assert not inspection.compared and "too many clips to compare" in said(inspection)


def test_sounds_and_videos_without_features(tmp_path):
    put_sound(tmp_path / "a.wav", noise(3, 48_000), 48_000)
    (tmp_path / "a.txt").write_text("rain")
    make_video(tmp_path / "b.mp4", 2.0, sound=noise(2)[None])
    make_video(tmp_path / "a.mp4", 2.0, sound=noise(2)[None])
    make_video(tmp_path / "mute.mp4", 2.0)
    inspection = inspect(tmp_path)
    assert inspection.kind == "sounds" and [clip.id for clip in inspection.clips] == ["a", "b", "mute"]
    assert [clip.prompt for clip in inspection.clips] == ["rain", "", ""]
    assert inspection.clips[0].duration_sec == 3 and inspection.clips[0].path.endswith("a.wav")
    assert "mute: its sound cannot be read: has no audio stream" in said(inspection) and not inspection.usable
    assert "recorded at" in said(inspect(tmp_path, get_variant("large_44k")))


def put_rows(folder, rows=5, video=True):
    """Write a memmap with CLIP features of norm 1; return {key: writable map}."""
    tensors = put_memmap(folder, rows, video)
    maps = {key: np.memmap(folder / f"{key}.memmap", np.float32, "r+", shape=tuple(value.shape))
            for key, value in tensors.items()}
    maps["std"] += 0.01
    if video:
        maps["clip_features"] /= np.linalg.norm(maps["clip_features"], axis=-1, keepdims=True)
    return maps


def test_memmaps_are_inspected_row_by_row(tmp_path):
    maps = put_rows(tmp_path / "train")
    good = inspect(tmp_path / "train")
    assert sentences(good) == [] and good.usable and good.kind == "memmap"
    assert [clip.id for clip in good.clips] == [f"id_{i}" for i in range(5)]
    assert good.clips[2].latent_rms == pytest.approx(np.sqrt((maps["mean"][2] ** 2).mean()), rel=1e-5)
    maps["mean"][0] = maps["mean"][1]
    maps["mean"][2] = 0
    maps["std"][3, 7, 1] = 0
    maps["clip_features"][4, 60:] = 0
    maps["sync_features"][1, 5, 5] = np.nan
    for values in maps.values():
        values.flush()
    text = said(inspect(tmp_path / "train"))
    assert text.splitlines()[:3] == [
        "! id_1: sync_features have values that are not finite (NaN or infinite)",
        "! id_2: its latents never change: never written, or digital silence",
        "! id_3: its std has values of 0 or below, which the VAE never gives; extract or convert it again",
    ]
    assert "? id_4: rows of zeros in its CLIP features: 4 of 64" in text
    maps["sync_features"][1, 5, 5] = 0
    maps["sync_features"].flush()
    assert "? id_0, id_1: the same sound; they count twice" in said(inspect(tmp_path / "train"))


def test_memmaps_of_sound_alone_and_of_another_variant(tmp_path):
    put_rows(tmp_path / "sound", video=False)
    inspection = inspect(tmp_path / "sound", TINY)
    assert sentences(inspection) == [] and "norm" not in table(inspection)[0] and "latent" in table(inspection)[0]
    with pytest.raises(ValueError, match=r"expected .* for large_44k"):
        inspect(tmp_path / "sound", get_variant("large_44k"))


def test_other_folders_are_refused(tmp_path):
    with pytest.raises(ValueError, match="holds neither features"):
        inspect(tmp_path)
    with pytest.raises(FileNotFoundError):
        inspect(tmp_path / "none")


def test_the_table_fits_and_long_ones_begin_with_what_matters(tmp_path, monkeypatch):
    data = tmp_path / "data"
    name = "a_very_long_name_of_a_clip_that_goes_on_and_on"
    for index in range(8):
        put_good(data, f"{name}_{index}", index, prompt="a " + "very " * 20 + "long prompt")
    put_good(data, "z", 9, np.zeros(40_000, np.float32))
    assert all(len(line) <= 100 for line in table(inspect(data)))
    monkeypatch.setattr(report, "MOST_ROWS", 3)
    lines = table(inspect(data))
    assert len(lines) == 5 and lines[1].startswith("! z") and lines[-1] == "... and 6 more; --json has all"


def test_json_has_everything_and_no_nan(tmp_path):
    put_good(tmp_path / "data", "a", 0)
    put_good(tmp_path / "data", "b", 1, np.zeros(40_000, np.float32))
    stored = json.loads(to_json(inspect(tmp_path / "data")), parse_constant=lambda name: pytest.fail(name))
    assert not stored["usable"] and [clip["id"] for clip in stored["clips"]] == ["a", "b"]
    assert stored["clips"][1]["problems"] == ["its sound is silent"] and stored["clips"][1]["true_peak_db"] is None
    assert stored["clips"][0]["sound"]["rate"] == 16_000
