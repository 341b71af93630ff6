import dataclasses
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from make_data import put_clip

import train_lora
from scripts.make_test_weights import main as make_test_weights
from selva.models import zoo
from selva.models.config import VocoderConfig
from selva.models.synchformer import Synchformer
from selva.models.textsynch import TextSynch
from selva.weights import load as weights

LOADERS = {
    "generator": weights.load_generator,
    "video_encoder": weights.load_video_encoder,
    "vae": weights.load_vae,
    "vocoder": weights.load_vocoder,
    "clip_text": weights.load_clip_text,
    "clip_image": weights.load_clip_image,
    "t5": weights.load_t5,
}
COMFYUI_FILES = {
    "generator": "generator_small_16k_sup_5.pth",
    "video_encoder": "video_enc_sup_5.pth",
    "vae": "ext/v1-16.pth",
    "vocoder": "ext/best_netG.pt",
    "clip_text": "ext/DFN5B-CLIP-ViT-H-14-384/open_clip_model.safetensors",
    "t5": "ext/flan-t5-base/model.safetensors",
}


@pytest.fixture(autouse=True)
def small_published_variants(monkeypatch, tmp_path):
    """Published names and files in the sizes of the tiny model, and a Hugging Face cache of our own."""
    tiny = zoo.get_variant("tiny_16k")
    vocoder = VocoderConfig(
        num_mels=80, upsample_rates=(8, 8, 4), upsample_kernels=(16, 16, 8), initial_channels=96, final_bias=True,
        final_tanh=True,
    )
    selva = dataclasses.replace(
        tiny, name="small_16k", generator_file="generator_small_16k_sup_5.pth", packaged=False, vocoder=vocoder,
        t5=dataclasses.replace(tiny.t5, byte_tokens=False),
    )
    mmaudio = dataclasses.replace(
        selva, name="mmaudio_small_44k", family="mmaudio", mode="44k", t5=None, sync_crop=True,
        generator_file="mmaudio_small_44k.pth",
        vae=dataclasses.replace(tiny.vae, mode="44k"),
        vocoder=dataclasses.replace(
            vocoder, num_mels=128, upsample_rates=(8, 8, 8), upsample_kernels=(16, 16, 16), final_bias=False,
            final_tanh=False,
        ),
    )
    for variant in (selva, mmaudio):
        monkeypatch.setitem(zoo.VARIANTS, variant.name, variant)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub_cache"))


@pytest.fixture(scope="module")
def masters(tmp_path_factory):
    """Folders of weights by variant and layout, written on first use."""
    return tmp_path_factory.mktemp("masters"), {}


@pytest.fixture
def write(masters):
    """``write(folder)`` puts a copy of complete weights there and returns the folder."""
    base, written = masters

    def copy(folder, variant="small_16k", layout="comfyui"):
        master = written.setdefault((variant, layout), base / f"{variant}_{layout}")
        if not master.exists():
            assert make_test_weights(["--variant", variant, "--selva_dir", str(master), "--layout", layout]) == 0
        shutil.copytree(master, folder, dirs_exist_ok=True)
        return folder

    return copy


def assert_loads_everything(variant, folder):
    weights.check_weights(variant, folder)
    for part in zoo.get_variant(variant).parts:
        network = LOADERS[part](variant, folder)
        tensors = [*network.parameters(), *network.buffers()]
        assert tensors and all(torch.isfinite(t).all() or part == "clip_text" for t in tensors), part
        assert not network.training and not any(t.requires_grad for t in tensors), part


# -- finding ----------------------------------------------------------------------------------------------------------


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
    weights.check_weights("small_16k", root / given)
    if not given:
        assert_loads_everything("small_16k", root)


@pytest.mark.parametrize("layout", ["comfyui", "selva"])
def test_the_mmaudio_family_loads_too(write, tmp_path, layout):
    write(tmp_path / "w", "mmaudio_small_44k", layout)
    assert_loads_everything("mmaudio_small_44k", tmp_path / "w")
    assert type(weights.load_video_encoder("mmaudio_small_44k", tmp_path / "w")) is Synchformer


def test_a_relative_subfolder_is_enough(write, tmp_path, monkeypatch):
    write(tmp_path, layout="selva")
    monkeypatch.chdir(tmp_path / "weights")
    weights.check_weights("small_16k", Path("."))


def test_the_synchformer_of_a_neighbouring_extension_is_used(write, tmp_path):
    root = write(tmp_path / "models" / "selva", "mmaudio_small_44k")
    (tmp_path / "models" / "prismaudio").mkdir()
    (root / "synchformer_state_dict.pth").rename(tmp_path / "models" / "prismaudio" / "synchformer_state_dict.pth")
    weights.load_video_encoder("mmaudio_small_44k", root)


def test_the_hugging_face_cache_is_the_last_resort(write, tmp_path):
    root = write(tmp_path / "selva")
    snapshot = tmp_path / "hub_cache" / "models--google--flan-t5-base" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    refs = snapshot.parents[1] / "refs"
    refs.mkdir()
    (refs / "main").write_text("0" * 40)
    for name in ("model.safetensors", "tokenizer.json"):
        (root / "ext" / "flan-t5-base" / name).rename(snapshot / name)
    features, _ = weights.load_t5("small_16k", root).encode(["a dog"])
    assert features.shape == (1, 6, 64)
    assert weights.find_file(zoo.T5_WEIGHTS, None) == snapshot / "model.safetensors"


def test_clip_may_come_as_a_torch_file(write, tmp_path):
    root = write(tmp_path)
    expected = weights.load_clip_text("small_16k", root).encode(["rain"])
    safetensors = root / COMFYUI_FILES["clip_text"]
    torch.save(weights.read_checkpoint(safetensors), safetensors.with_name("open_clip_pytorch_model.bin"))
    safetensors.unlink()
    assert torch.equal(weights.load_clip_text("small_16k", root).encode(["rain"]), expected)


def test_every_missing_file_is_named_with_purpose_and_command(write, tmp_path):
    root = write(tmp_path / "my weights")
    (root / "ext" / "v1-16.pth").unlink()
    (root / "ext" / "flan-t5-base" / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError) as caught:
        weights.check_weights("small_16k", root)
    assert str(caught.value) == (
        f"variant small_16k lacks v1-16.pth (16 kHz VAE), tokenizer.json (FLAN-T5 tokenizer); looked in {root}; "
        f"fetch with: python scripts/download_weights.py --variant small_16k --selva_dir '{root}'"
    )
    weights.check_weights("small_16k", root, needs=("generator", "clip_text"))  # asks for nothing else
    with pytest.raises(FileNotFoundError, match=r"lacks v1-16\.pth"):
        weights.load_vae("small_16k", root)


@pytest.mark.parametrize("selva_dir, words", [(None, "no --selva_dir was given"), ("nowhere", "not a folder")])
def test_without_a_folder_everything_is_missing(selva_dir, words):
    with pytest.raises(FileNotFoundError, match=words) as caught:
        weights.check_weights("small_16k", selva_dir and Path(selva_dir))
    assert all(Path(name).name in str(caught.value) for name in COMFYUI_FILES.values())


# -- reading ----------------------------------------------------------------------------------------------------------


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
        weights.load_generator("small_16k", root)
    assert not trap.exists()


@pytest.mark.parametrize("content", [[1, 2], {"step": 3}, {1: torch.zeros(2)}, {"model": {"w": torch.zeros(2)}}])
def test_a_file_of_anything_but_tensors_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "file.pth")
    with pytest.raises(ValueError, match=r"file\.pth: expected named tensors, found something else"):
        weights.read_checkpoint(tmp_path / "file.pth")


def test_old_torch_files_load_too(write, tmp_path):
    root = write(tmp_path)
    expected = weights.load_vocoder("small_16k", root).state_dict()
    file = root / COMFYUI_FILES["vocoder"]
    torch.save(torch.load(file, weights_only=True), file, _use_new_zipfile_serialization=False)
    found = weights.load_vocoder("small_16k", root).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_a_vocoder_file_without_its_key_is_refused(write, tmp_path):
    root = write(tmp_path)
    torch.save({"discriminator": {}}, root / COMFYUI_FILES["vocoder"])
    with pytest.raises(ValueError, match=r"best_netG\.pt: expected named tensors under the key 'generator'"):
        weights.load_vocoder("small_16k", root)


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
        weights.load_vae("small_16k", root)


@pytest.mark.parametrize("part", COMFYUI_FILES)
def test_a_file_of_another_network_is_refused_with_both_names(write, tmp_path, part):
    """Pitfall H4: loading is strict."""
    root = write(tmp_path)
    other = "vae" if part != "vae" else "generator"
    words = "data_mean and data_std are missing" if part == "vae" else "these weights do not fit"
    content = weights.read_checkpoint(root / COMFYUI_FILES[other])
    file = root / COMFYUI_FILES[part]
    if file.suffix == ".safetensors":
        from safetensors.torch import save_file

        save_file({name: tensor.contiguous() for name, tensor in content.items()}, file)
    else:
        torch.save({"generator": content} if part == "vocoder" else content, file)
    with pytest.raises(ValueError, match=rf"{file.name}: {words}.* of variant small_16k"):
        LOADERS[part]("small_16k", root)


# -- loading ----------------------------------------------------------------------------------------------------------


def test_loaded_networks_hold_the_tensors_of_the_files(write, tmp_path):
    root = write(tmp_path)
    file = weights.read_checkpoint(root / COMFYUI_FILES["generator"])
    generator = weights.load_generator("small_16k", root)
    assert all(torch.equal(tensor, file[name]) for name, tensor in generator.state_dict().items())
    file = weights.read_checkpoint(root / COMFYUI_FILES["video_encoder"])
    encoder = weights.load_video_encoder("small_16k", root)
    assert type(encoder) is TextSynch
    assert all(torch.equal(tensor, file[name]) for name, tensor in encoder.state_dict().items())


def test_one_clip_tower_is_read_without_the_other(write, tmp_path, monkeypatch):
    """Pitfall H3: training wants the text tower only."""
    root, read = write(tmp_path), weights.read_checkpoint
    names = {}

    def record(path, *options):
        found = read(path, *options)
        names[part] = [name.startswith("visual.") for name in found]
        return found

    monkeypatch.setattr(weights, "read_checkpoint", record)
    for part in ("clip_text", "clip_image"):
        LOADERS[part]("small_16k", root)
    assert names["clip_text"] and not any(names["clip_text"])
    assert names["clip_image"] and all(names["clip_image"])


def test_a_vae_for_decoding_never_has_an_encoder():
    half, whole = weights.load_vae("tiny_16k", decoder_only=True), weights.load_vae("tiny_16k")
    assert half.encoder is None and whole.encoder is not None
    latents = torch.randn(1, 20, 8)
    assert torch.equal(half.decode(latents), whole.decode(latents))


def test_a_vae_for_encoding_never_has_a_decoder():
    half, whole = weights.load_vae("tiny_16k", encoder_only=True), weights.load_vae("tiny_16k")
    assert half.decoder is None and whole.decoder is not None
    mel = torch.randn(1, 80, 16)
    assert all(torch.equal(a, b) for a, b in zip(half.encode(mel), whole.encode(mel), strict=True))


def test_weights_are_read_in_float32_and_cast_afterwards(write, tmp_path):
    root = write(tmp_path)
    exact = weights.load_vae("small_16k", root).state_dict()
    half = weights.load_vae("small_16k", root, dtype=torch.bfloat16).state_dict()
    assert all(torch.equal(tensor, exact[name].bfloat16()) for name, tensor in half.items())


def test_the_packaged_variant_needs_no_folder():
    weights.check_weights("tiny_16k", None)
    for part, load in LOADERS.items():
        first, second = load("tiny_16k"), load("tiny_16k", Path("does/not/exist"))
        assert first.state_dict().keys() == second.state_dict().keys()
        for name, tensor in first.state_dict().items():
            assert torch.equal(tensor, second.state_dict()[name]), (part, name)


def test_the_packaged_weights_stay_below_15_mb_in_half_precision():
    networks = [load("tiny_16k") for load in LOADERS.values()]
    assert sum(p.numel() for network in networks for p in network.parameters()) * 2 < 15e6


@torch.no_grad()
def test_the_packaged_networks_work_together():
    texts = ["a dog barks"]
    variant = zoo.get_variant("tiny_16k")
    text = weights.load_clip_text("tiny_16k").encode(texts)
    side = variant.clip_image_size
    clip = weights.load_clip_image("tiny_16k").encode(torch.rand(64, 3, side, side))[None]
    side = variant.sync_image_size
    frames = torch.rand(1, 200, 3, side, side) * 2 - 1
    sync = weights.load_video_encoder("tiny_16k").encode(frames, *weights.load_t5("tiny_16k").encode(texts))
    generator = weights.load_generator("tiny_16k")
    flow = generator(torch.randn(1, 250, 20), clip, sync, text, torch.tensor([0.1]))
    assert flow.shape == (1, 250, 20) and 0.1 < flow.std() < 10
    mel = weights.load_vae("tiny_16k").decode(generator.unnormalize(flow[:, :50]).mT)
    waveform = weights.load_vocoder("tiny_16k")(mel)
    assert waveform.shape == (1, 1, 25_600) and waveform.isfinite().all()


def test_t5_is_refused_where_it_does_not_work(tmp_path):
    with pytest.raises(ValueError, match="overflows in float16"):
        weights.load_t5("tiny_16k", dtype=torch.float16)
    with pytest.raises(ValueError, match="mmaudio_small_44k has no T5"):
        weights.load_t5("mmaudio_small_44k", tmp_path)


def test_an_unknown_variant_is_refused():
    with pytest.raises(ValueError, match="unknown variant 'huge'"):
        weights.load_generator("huge")


def test_importing_the_module_loads_no_encoder_library():
    code = "import sys, selva.weights.load; print([m for m in ('open_clip', 'transformers', 'av') if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_a_package_without_its_weights_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(weights, "ASSETS", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"tiny_16k_vae.safetensors: the weights of tiny_16k are part of the"):
        weights.load_vae("tiny_16k")


def test_features_are_known_by_the_packaged_weights_that_made_them(tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "ASSETS", tmp_path)
    tiny, seen = zoo.get_variant("tiny_16k"), []
    for content in (b"1", b"2", b"1"):
        (tmp_path / weights.asset_name("tiny_16k", "vae")).write_bytes(content)
        weights.packaged_identity.cache_clear()
        seen.append(weights.encoders_identity(tiny))
    weights.packaged_identity.cache_clear()
    assert seen[0] == seen[2] != seen[1] and all(name.startswith("tiny_16k ") for name in seen)
    assert weights.encoders_identity(zoo.get_variant("small_44k")) == "selva"
