"""The feature file: byte-compatible with the published one, and strict about what it reads."""

from __future__ import annotations

import json
import zipfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from golden_case import GOLDEN
from recipe import make_input

from selva.features import FeatureBundle, load_duration, load_features, load_settings, save_features

GOLDEN_FILES = json.loads((GOLDEN / "feature_files.json").read_text())["files"]


def golden_arrays(name):
    arrays = {}
    for key, spec in GOLDEN_FILES[name].items():
        arrays[key] = make_input(spec) if "recipe" in spec else spec["value"]
    return arrays


def small_bundle(**changes):
    bundle = FeatureBundle(torch.randn(1, 16, 6), torch.randn(1, 40, 4), 2.0, "a dog: barks", "tiny_16k")
    return replace(bundle, **changes)


@pytest.mark.parametrize("name", GOLDEN_FILES)
def test_reads_published_files(name):
    bundle, expected = load_features(GOLDEN / name), golden_arrays(name)
    assert np.array_equal(bundle.clip_features.numpy(), expected["clip_features"])
    assert np.array_equal(bundle.sync_features.numpy(), expected["sync_features"])
    assert (bundle.duration, bundle.prompt, bundle.variant) == (
        expected["duration"],
        expected["prompt"],
        expected["variant"],
    )
    assert bundle.text_features is None and bundle.settings is None


@pytest.mark.parametrize("name", GOLDEN_FILES)
def test_writes_what_the_published_extractor_writes(name, tmp_path):
    save_features(tmp_path / "out.npz", FeatureBundle(**golden_arrays(name)))
    with (
        np.load(tmp_path / "out.npz", allow_pickle=False) as ours,
        np.load(GOLDEN / name, allow_pickle=False) as theirs,
    ):
        assert ours.files == theirs.files == list(GOLDEN_FILES[name])
        for key in theirs.files:
            assert ours[key].dtype == theirs[key].dtype == GOLDEN_FILES[name][key]["dtype"]
            assert np.array_equal(ours[key], theirs[key])
            assert list(ours[key].shape) == GOLDEN_FILES[name][key]["shape"]
    with zipfile.ZipFile(tmp_path / "out.npz") as archive:
        assert all(member.compress_type == zipfile.ZIP_STORED for member in archive.infolist())


def test_round_trip_with_our_extra_keys(tmp_path):
    bundle = small_bundle(text_features=torch.randn(1, 77, 5), settings={"mask": None, "größe": [1, 2.5]})
    save_features(tmp_path / "a.npz", bundle)
    again = load_features(tmp_path / "a.npz")
    for name in ("clip_features", "sync_features", "text_features"):
        assert torch.equal(getattr(again, name), getattr(bundle, name))
    assert (again.duration, again.prompt, again.variant, again.settings) == (
        2.0,
        "a dog: barks",
        "tiny_16k",
        {"mask": None, "größe": [1, 2.5]},
    )
    with np.load(tmp_path / "a.npz", allow_pickle=False) as file:
        assert file.files[:5] == ["clip_features", "sync_features", "duration", "prompt", "variant"]
    assert [path.name for path in tmp_path.iterdir()] == ["a.npz"]  # nothing temporary is left


def test_bfloat16_features_are_stored_widened(tmp_path):
    half = torch.randn(1, 16, 6).bfloat16()
    save_features(tmp_path / "a.npz", small_bundle(clip_features=half))
    assert torch.equal(load_features(tmp_path / "a.npz").clip_features, half.float())


def test_optional_keys_may_be_missing_and_unknown_ones_are_ignored(tmp_path):
    path = tmp_path / "a.npz"
    np.savez(
        path,
        clip_features=np.zeros((1, 20, 3), np.float32),
        sync_features=np.zeros((1, 56, 3), np.float32),
        something_else=np.arange(3),
    )
    bundle = load_features(path)
    assert bundle.duration == 2.5  # 20 CLIP frames at 8 per second
    assert bundle.prompt == "" and bundle.variant == ""


CLIP, SYNC = np.zeros((1, 16, 6), np.float32), np.zeros((1, 40, 4), np.float32)
NOT_A_NUMBER = SYNC.copy()
NOT_A_NUMBER[0, 3, 2] = np.nan


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"clip_features": CLIP}, "sync_features missing"),
        ({"clip_features": CLIP[0], "sync_features": SYNC}, r"clip_features is \(16, 6\), expected \(1, frames"),
        ({"clip_features": CLIP[0, 0], "sync_features": SYNC}, r"clip_features is \(6,\)"),
        ({"clip_features": CLIP[:, :0], "sync_features": SYNC}, r"clip_features is \(1, 0, 6\)"),
        ({"clip_features": CLIP, "sync_features": SYNC[:, :39]}, r"sync_features is \(1, 39, 4\).*multiple of 8"),
        ({"clip_features": CLIP, "sync_features": SYNC.astype(np.float64)}, "sync_features is float64.*float32"),
        ({"clip_features": CLIP, "sync_features": NOT_A_NUMBER}, "sync_features has 1 value"),
        ({"clip_features": CLIP, "sync_features": SYNC, "duration": -1.0}, "duration is -1.0"),
        ({"clip_features": CLIP, "sync_features": SYNC, "duration": "8"}, "duration is .*expected a single number"),
        ({"clip_features": CLIP, "sync_features": SYNC, "prompt": 5}, "prompt is int64.*expected a single text"),
        ({"clip_features": CLIP, "sync_features": SYNC, "text_features": SYNC}, r"text_features is .*\(1, 77, chan"),
        ({"clip_features": CLIP, "sync_features": SYNC, "settings": "{"}, "settings is not JSON"),
        ({"clip_features": CLIP, "sync_features": SYNC, "settings": "[1]"}, "settings is a JSON list"),
    ],
)
def test_wrong_content_names_file_and_key(arrays, words, tmp_path):
    path = tmp_path / "clip_007.npz"
    np.savez(path, **arrays)
    with pytest.raises(ValueError, match=words) as caught:
        load_features(path)
    assert str(caught.value).startswith(f"{path}: ")


class _Bomb:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was executed",))


def test_pickles_are_refused_not_executed(tmp_path):
    """Pitfall H1."""
    path = tmp_path / "a.npz"
    np.savez(path, clip_features=np.array([_Bomb()], dtype=object), sync_features=SYNC)
    with pytest.raises(ValueError, match="cannot be read") as caught:
        load_features(path)
    assert "allow_pickle" not in str(caught.value)  # no advice to load it after all
    path.write_bytes(b"\x80\x04N.")
    with pytest.raises(ValueError, match="never loaded") as caught:
        load_features(path)


def test_damaged_files_are_named(tmp_path):
    path = tmp_path / "a.npz"
    save_features(path, small_bundle())
    whole = path.read_bytes()
    damaged = bytearray(whole)
    damaged[300] ^= 255  # inside an array: found by the checksum
    for content in (b"", b"text", whole[: len(whole) // 2], bytes(damaged)):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"a\.npz: cannot be read"):
            load_features(path)
    np.save(tmp_path / "array.npy", CLIP)
    (tmp_path / "array.npy").rename(path)
    with pytest.raises(ValueError, match="single array"):
        load_features(path)
    with pytest.raises(FileNotFoundError, match=r"none\.npz"):
        load_features(tmp_path / "none.npz")


def test_only_npz_is_written(tmp_path):
    with pytest.raises(ValueError, match=r"end in \.npz"):
        save_features(tmp_path / "a.pt", small_bundle())


def damaged_archives(path):
    """Yield (what is wrong, content) of feature files that zipfile and NumPy cannot read, each in a way of its own."""
    save_features(path, small_bundle())
    whole = path.read_bytes()
    header = whole.index(b"{'descr'")
    for name, old, new in [
        ("open bracket", b"(", b"["), ("open text", b"'descr'", b"'descr("), ("a call", b"False", b"abs()"),
        ("no type", b"'<f4'", b"'<x4'"), ("a type that refers to itself", b"'<f4'", b"'<V9'"), ("bytes", b"{", b"\xff"),
    ]:
        changed = bytearray(whole)
        place = whole.index(old, header)
        changed[place : place + len(old)] = new
        yield name, bytes(changed)
    yield "no array", bytes(whole).replace(b"\x93NUMPY", b"\x93NUMPX")
    with zipfile.ZipFile(path) as archive:
        arrays = {name: archive.read(name) for name in archive.namelist()}
    for kind in (zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2, zipfile.ZIP_DEFLATED):
        with zipfile.ZipFile(path, "w", kind) as archive:
            for name, content in arrays.items():
                archive.writestr(name, content)
        content = bytearray(path.read_bytes())
        yield f"compression {kind}", bytes(content[:60] + bytes(x ^ 0x5A for x in content[60:90]) + content[90:])
    whole = bytearray(whole)
    for field, value in ((6, 1), (8, 99), (4, 200)):  # encrypted; an unknown compression; a version to come
        central = whole.index(b"PK\x01\x02")
        changed = bytearray(whole)
        changed[field] = value
        changed[central + field + 2] = value
        yield f"field {field}", bytes(changed)
    yield "several disks", bytes(whole[:-18] + b"\x01\x00\x01\x00" + whole[-14:])
    yield "offset of the directory", bytes(whole[:-6] + b"\xff\xff\xff\x7f" + whole[-2:])


def test_every_kind_of_damage_is_named(tmp_path):
    path = tmp_path / "a.npz"
    refused = set()
    for what, content in list(damaged_archives(path)):
        path.write_bytes(content)
        for load in (load_features, load_settings, load_duration):
            try:
                load(path)
            except ValueError as error:
                assert str(error).startswith(f"{path}: ") and "\n" not in str(error), what
                refused.add(what)
    assert len(refused) >= 12  # what does no harm, such as numbers of disks that nobody reads, may be read


def test_the_duration_alone_is_that_of_the_whole(tmp_path):
    path = tmp_path / "a.npz"
    save_features(path, small_bundle(duration=1.92))
    assert load_duration(path) == load_features(path).duration == 1.92
    np.savez(path, clip_features=CLIP, sync_features=SYNC)  # it follows from the frames
    assert load_duration(path) == load_features(path).duration == CLIP.shape[1] / 8
    for wrong in ({"other": CLIP}, {"duration": np.zeros(3)}):
        np.savez(path, **wrong)
        with pytest.raises(ValueError, match=r"a\.npz: "):
            load_duration(path)
    with pytest.raises(ValueError, match=r"missing\.npz: "):
        load_duration(tmp_path / "missing.npz")


def test_settings_nested_too_deeply_are_named(tmp_path):
    path = tmp_path / "a.npz"
    deep = '{"a": ' + "[" * 100_000 + "]" * 100_000 + "}"
    np.savez(path, clip_features=CLIP, sync_features=SYNC, settings=deep)
    for load in (load_features, load_settings):
        with pytest.raises(ValueError, match=r"a\.npz: settings is not JSON"):
            load(path)


def test_a_small_file_that_promises_gigabytes_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "a.npz"
    np.savez_compressed(path, clip_features=np.zeros((1, 10_000, 40), np.float32), sync_features=SYNC)
    monkeypatch.setattr("selva.features.MAX_ARRAY_BYTES", 1_000_000)
    with pytest.raises(ValueError, match=r"a\.npz: .*clip_features\.npy has 1600\d\d\d bytes, expected at most"):
        load_features(path)


def test_a_member_that_is_no_array_is_named(tmp_path):
    """NumPy returns its bytes."""
    path = tmp_path / "a.npz"
    for key in ("clip_features", "duration", "prompt"):
        save_features(path, small_bundle())
        with zipfile.ZipFile(path) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in members.items():
                archive.writestr(name, b"text" if name == f"{key}.npy" else content)
        with pytest.raises(ValueError, match=rf"a\.npz: cannot be read .*{key} does not begin as an array does"):
            load_features(path)
