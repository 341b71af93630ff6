"""selva.weights.find: layouts, the Hugging Face cache, missing files, identities of packaged weights."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from weight_files import COMFYUI_FILES, assert_loads_everything

from selva.models.variants import T5_WEIGHTS, get_variant
from selva.weights import find, load


@pytest.mark.parametrize(
    "layout, given",
    [
        ("comfyui", ""),
        ("comfyui", "ext"),
        ("comfyui", ".."),
        ("comfyui", "../.."),
        ("selva", ""),
        ("selva", "weights"),
        ("selva", "ext_weights"),
    ],
)
def test_layouts_are_found_from_their_root_or_a_subfolder(write, tmp_path, layout, given):
    root = write(tmp_path / "comfy" / "models" / "selva", layout=layout)
    find.check_weights("small_16k", root / given)
    if not given:
        assert_loads_everything("small_16k", root)


def test_a_relative_subfolder_is_enough(write, tmp_path, monkeypatch):
    write(tmp_path, layout="selva")
    monkeypatch.chdir(tmp_path / "weights")
    find.check_weights("small_16k", Path("."))


def test_the_synchformer_of_a_neighbouring_extension_is_used(write, tmp_path):
    root = write(tmp_path / "models" / "selva", "mmaudio_small_44k")
    (tmp_path / "models" / "prismaudio").mkdir()
    (root / "synchformer_state_dict.pth").rename(tmp_path / "models" / "prismaudio" / "synchformer_state_dict.pth")
    load.load_video_encoder("mmaudio_small_44k", root)


def test_the_hugging_face_cache_is_the_last_resort(write, tmp_path):
    root = write(tmp_path / "selva")
    snapshot = tmp_path / "hub_cache" / "models--google--flan-t5-base" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    refs = snapshot.parents[1] / "refs"
    refs.mkdir()
    (refs / "main").write_text("0" * 40)
    for name in ("model.safetensors", "tokenizer.json"):
        (root / "ext" / "flan-t5-base" / name).rename(snapshot / name)
    features, _ = load.load_t5("small_16k", root).encode(["a dog"])
    assert features.shape == (1, 6, 64)
    assert find.find_file(T5_WEIGHTS, None) == snapshot / "model.safetensors"


def test_every_missing_file_is_named_with_purpose_and_command(write, tmp_path):
    root = write(tmp_path / "my weights")
    (root / "ext" / "v1-16.pth").unlink()
    (root / "ext" / "flan-t5-base" / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError) as caught:
        find.check_weights("small_16k", root)
    assert str(caught.value) == (
        f"variant small_16k lacks v1-16.pth (16 kHz VAE), tokenizer.json (FLAN-T5 tokenizer); looked in {root}; "
        f"fetch with: {find.download_command('small_16k', root)}"
    )
    find.check_weights("small_16k", root, needs=("generator", "clip_text"))  # asks for nothing else
    with pytest.raises(FileNotFoundError, match=r"lacks v1-16\.pth"):
        load.load_vae("small_16k", root)


def test_the_command_works_where_it_is_typed(tmp_path, monkeypatch):
    checkout, installed = tmp_path / "my checkout", tmp_path / "site-packages"
    (checkout / "scripts").mkdir(parents=True)
    (checkout / "scripts" / "download_weights.py").write_text("")
    monkeypatch.setattr(find, "CHECKOUT", checkout)
    monkeypatch.chdir(checkout)
    flags = "--variant small_16k --selva_dir DIR"
    assert find.download_command("small_16k", None) == f"python scripts/download_weights.py {flags}"
    monkeypatch.chdir(tmp_path)
    script = f"'{checkout}/scripts/download_weights.py'"
    assert find.download_command("small_16k", None) == f"python {script} {flags}"
    monkeypatch.setattr(find, "CHECKOUT", installed)  # pip has put it on the PATH
    assert find.download_command("small_16k", Path("my weights")) == (
        "download_weights.py --variant small_16k --selva_dir 'my weights'")


@pytest.mark.parametrize("selva_dir, words", [(None, "no --selva_dir was given"), ("nowhere", "not a folder")])
def test_without_a_folder_everything_is_missing(selva_dir, words):
    with pytest.raises(FileNotFoundError, match=words) as caught:
        find.check_weights("small_16k", selva_dir and Path(selva_dir))
    assert all(Path(name).name in str(caught.value) for name in COMFYUI_FILES.values())


def test_features_are_known_by_the_packaged_weights_that_made_them(tmp_path, monkeypatch):
    monkeypatch.setattr(find, "ASSETS", tmp_path)
    tiny, seen = get_variant("tiny_16k"), []
    for content in (b"1", b"2", b"1"):
        (tmp_path / find.asset_name("tiny_16k", "vae")).write_bytes(content)
        find.packaged_identity.cache_clear()
        seen.append(find.encoders_identity(tiny))
    find.packaged_identity.cache_clear()
    assert seen[0] == seen[2] != seen[1] and all(name.startswith("tiny_16k ") for name in seen)
    assert find.encoders_identity(get_variant("small_44k")) == "selva"


def test_weights_are_known_by_their_content(tmp_path):
    """Random ones for a test and the real ones have the same names and sizes."""
    path, marks = tmp_path / "w.pt", set()
    content = bytearray(os.urandom(40 << 16))
    for part in (slice(0, 0), slice(0, 1), slice(-1, None), slice(1 << 16, -1 << 16)):
        content[part] = bytes(byte ^ 1 for byte in content[part])
        path.write_bytes(content)
        os.utime(path, ns=(1, 1))  # not by its time
        marks.add(find.content_mark(path))
    assert len(marks) == 4
    path.write_bytes(b"short")
    assert find.content_mark(path) not in marks
    assert find.weights_identity(get_variant("tiny_16k"), None, ("vae",)) == ""
