"""selva.weights.load: strict and safe loading, parts of networks, the packaged weights."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from make_data import put_clip
from weight_files import COMFYUI_FILES, LOADERS, assert_loads_everything

import train_lora
from selva.models.synchformer import Synchformer
from selva.models.textsynch import TextSynch
from selva.models.variants import get_variant
from selva.weights import find, load

# -- reading -----------------------------------------------------------------------------------------------------------


class Harmful:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("part", COMFYUI_FILES)
@pytest.mark.parametrize("damage", ["truncated", "empty", "web page", "noise"])
def test_a_damaged_file_is_named(write, tmp_path, part, damage):
    root = write(tmp_path)
    file = root / COMFYUI_FILES[part]
    content = file.read_bytes()
    file.write_bytes(
        {
            "truncated": content[: len(content) // 2],
            "empty": b"",
            "web page": b"<!doctype html><html>502</html>",
            "noise": torch.randint(0, 256, (999,), dtype=torch.uint8).numpy().tobytes(),
        }[damage]
    )
    with pytest.raises(ValueError, match=rf"{file.name}: not a readable .* download it again") as caught:
        LOADERS[part]("small_16k", root)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("how", ["pickle", "torch", "torch legacy"])
def test_code_in_a_file_is_never_executed(write, tmp_path, how):
    """Pitfall H1."""
    root, trap = write(tmp_path / "w"), tmp_path / "executed"
    file = root / COMFYUI_FILES["generator"]
    if how == "pickle":
        file.write_bytes(pickle.dumps({"latent_mean": Harmful(str(trap))}, protocol=2))
    else:
        torch.save({"latent_mean": Harmful(str(trap))}, file, _use_new_zipfile_serialization=how == "torch")
    with pytest.raises(ValueError, match=r"generator_small_16k_sup_5\.pth: not a readable weight file"):
        load.load_generator("small_16k", root)
    assert not trap.exists()


@pytest.mark.parametrize("content", [[1, 2], {"step": 3}, {1: torch.zeros(2)}, {"model": {"w": torch.zeros(2)}}])
def test_a_file_of_anything_but_tensors_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "file.pth")
    with pytest.raises(ValueError, match=r"file\.pth: expected named tensors, found something else"):
        load.read_checkpoint(tmp_path / "file.pth")


def test_old_torch_files_load_too(write, tmp_path):
    root = write(tmp_path)
    expected = load.load_vocoder("small_16k", root).state_dict()
    file = root / COMFYUI_FILES["vocoder"]
    torch.save(torch.load(file, weights_only=True), file, _use_new_zipfile_serialization=False)
    found = load.load_vocoder("small_16k", root).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_a_vocoder_file_without_its_key_is_refused(write, tmp_path):
    root = write(tmp_path)
    torch.save({"discriminator": {}}, root / COMFYUI_FILES["vocoder"])
    with pytest.raises(ValueError, match=r"best_netG\.pt: expected named tensors under the key 'generator'"):
        load.load_vocoder("small_16k", root)


def test_the_16_khz_model_is_trained_without_a_vocoder(write, tmp_path):
    """Pitfall G1: from published files; a sample would need the vocoder, encoding sound does not."""
    root = write(tmp_path / "w")
    (root / COMFYUI_FILES["vocoder"]).unlink()
    put_clip(tmp_path / "data", "a")
    run = ["--data_dir", str(tmp_path / "data"), "--output_dir", str(tmp_path / "run"), "--selva_dir", str(root),
           "--variant", "small_16k", "--steps", "1", "--rank", "2", "--device", "cpu"]
    assert train_lora.main([*run, "--no_preview"]) == 0
    assert (tmp_path / "run" / "adapter_final.pt").exists()
    assert train_lora.main(run) == 1


def test_a_vae_file_without_band_statistics_is_refused(write, tmp_path):
    root = write(tmp_path)
    file = root / COMFYUI_FILES["vae"]
    content = torch.load(file, weights_only=True)
    del content["data_std"]
    torch.save(content, file)
    with pytest.raises(ValueError, match=r"v1-16\.pth: data_std are missing"):
        load.load_vae("small_16k", root)


@pytest.mark.parametrize("part", COMFYUI_FILES)
def test_a_file_of_another_network_is_refused_with_both_names(write, tmp_path, part):
    """Pitfall H4: loading is strict."""
    root = write(tmp_path)
    other = "vae" if part != "vae" else "generator"
    words = "data_mean and data_std are missing" if part == "vae" else "these weights do not fit"
    content = load.read_checkpoint(root / COMFYUI_FILES[other])
    file = root / COMFYUI_FILES[part]
    if file.suffix == ".safetensors":
        from safetensors.torch import save_file

        save_file({name: tensor.contiguous() for name, tensor in content.items()}, file)
    else:
        torch.save({"generator": content} if part == "vocoder" else content, file)
    with pytest.raises(ValueError, match=rf"{file.name}: {words}.* of variant small_16k"):
        LOADERS[part]("small_16k", root)


# -- loading -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["comfyui", "selva"])
def test_the_mmaudio_family_loads_too(write, tmp_path, layout):
    write(tmp_path / "w", "mmaudio_small_44k", layout)
    assert_loads_everything("mmaudio_small_44k", tmp_path / "w")
    assert type(load.load_video_encoder("mmaudio_small_44k", tmp_path / "w")) is Synchformer


def test_clip_may_come_as_a_torch_file(write, tmp_path):
    root = write(tmp_path)
    expected = load.load_clip_text("small_16k", root).encode(["rain"])
    safetensors = root / COMFYUI_FILES["clip_text"]
    torch.save(load.read_checkpoint(safetensors), safetensors.with_name("open_clip_pytorch_model.bin"))
    safetensors.unlink()
    assert torch.equal(load.load_clip_text("small_16k", root).encode(["rain"]), expected)


def test_loaded_networks_hold_the_tensors_of_the_files(write, tmp_path):
    root = write(tmp_path)
    file = load.read_checkpoint(root / COMFYUI_FILES["generator"])
    generator = load.load_generator("small_16k", root)
    assert all(torch.equal(tensor, file[name]) for name, tensor in generator.state_dict().items())
    file = load.read_checkpoint(root / COMFYUI_FILES["video_encoder"])
    encoder = load.load_video_encoder("small_16k", root)
    assert type(encoder) is TextSynch
    assert all(torch.equal(tensor, file[name]) for name, tensor in encoder.state_dict().items())


def test_one_clip_tower_is_read_without_the_other(write, tmp_path, monkeypatch):
    """Pitfall H3: training wants the text tower only."""
    root, read = write(tmp_path), load.read_checkpoint
    names = {}

    def record(path, *options):
        found = read(path, *options)
        names[part] = [name.startswith("visual.") for name in found]
        return found

    monkeypatch.setattr(load, "read_checkpoint", record)
    for part in ("clip_text", "clip_image"):
        LOADERS[part]("small_16k", root)
    assert names["clip_text"] and not any(names["clip_text"])
    assert names["clip_image"] and all(names["clip_image"])


def test_a_vae_for_decoding_never_has_an_encoder():
    half, whole = load.load_vae("tiny_16k", decoder_only=True), load.load_vae("tiny_16k")
    assert half.encoder is None and whole.encoder is not None
    latents = torch.randn(1, 20, 8)
    assert torch.equal(half.decode(latents), whole.decode(latents))


def test_a_vae_for_encoding_never_has_a_decoder():
    half, whole = load.load_vae("tiny_16k", encoder_only=True), load.load_vae("tiny_16k")
    assert half.decoder is None and whole.decoder is not None
    mel = torch.randn(1, 80, 16)
    assert all(torch.equal(a, b) for a, b in zip(half.encode(mel), whole.encode(mel), strict=True))


def test_weights_are_read_in_float32_and_cast_afterwards(write, tmp_path):
    root = write(tmp_path)
    exact = load.load_vae("small_16k", root).state_dict()
    half = load.load_vae("small_16k", root, dtype=torch.bfloat16).state_dict()
    assert all(torch.equal(tensor, exact[name].bfloat16()) for name, tensor in half.items())


def test_the_packaged_variant_needs_no_folder():
    find.check_weights("tiny_16k", None)
    for part, loader in LOADERS.items():
        first, second = loader("tiny_16k"), loader("tiny_16k", Path("does/not/exist"))
        assert first.state_dict().keys() == second.state_dict().keys()
        for name, tensor in first.state_dict().items():
            assert torch.equal(tensor, second.state_dict()[name]), (part, name)


def test_the_packaged_weights_stay_below_15_mb_in_half_precision():
    networks = [loader("tiny_16k") for loader in LOADERS.values()]
    assert sum(p.numel() for network in networks for p in network.parameters()) * 2 < 15e6


@torch.no_grad()
def test_the_packaged_networks_work_together():
    texts = ["a dog barks"]
    variant = get_variant("tiny_16k")
    text = load.load_clip_text("tiny_16k").encode(texts)
    side = variant.clip_image_size
    clip = load.load_clip_image("tiny_16k").encode(torch.rand(64, 3, side, side))[None]
    side = variant.sync_image_size
    frames = torch.rand(1, 200, 3, side, side) * 2 - 1
    sync = load.load_video_encoder("tiny_16k").encode(frames, *load.load_t5("tiny_16k").encode(texts))
    generator = load.load_generator("tiny_16k")
    flow = generator(torch.randn(1, 250, 20), clip, sync, text, torch.tensor([0.1]))
    assert flow.shape == (1, 250, 20) and 0.1 < flow.std() < 10
    mel = load.load_vae("tiny_16k").decode(generator.unnormalize(flow[:, :50]).mT)
    waveform = load.load_vocoder("tiny_16k")(mel)
    assert waveform.shape == (1, 1, 25_600) and waveform.isfinite().all()


def test_t5_is_refused_where_it_does_not_work(tmp_path):
    with pytest.raises(ValueError, match="overflows in float16"):
        load.load_t5("tiny_16k", dtype=torch.float16)
    with pytest.raises(ValueError, match="mmaudio_small_44k has no T5"):
        load.load_t5("mmaudio_small_44k", tmp_path)


def test_an_unknown_variant_is_refused():
    with pytest.raises(ValueError, match="unknown variant 'huge'"):
        load.load_generator("huge")


def test_importing_the_module_loads_no_encoder_library():
    code = "import sys, selva.weights.load; print([m for m in ('open_clip', 'transformers', 'av') if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_a_package_without_its_weights_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(load, "ASSETS", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"tiny_16k_vae.safetensors: the weights of tiny_16k are part of the"):
        load.load_vae("tiny_16k")
