import dataclasses
import json

import pytest
import torch
from golden_case import GOLDEN

from scripts.make_test_weights import generator_tensors, main, vocoder_tensors, write_part
from selva.models import zoo
from selva.models.vocoder import FILTER_SUFFIXES
from selva.weights import load as weights
from selva.weights.find import check_weights


@pytest.fixture(autouse=True)
def small_variant(monkeypatch):
    """``small_16k`` with its published file names, the sizes of the tiny model and a narrow vocoder."""
    tiny = zoo.get_variant("tiny_16k")
    assert tiny.t5 is not None
    variant = dataclasses.replace(
        tiny, name="small_16k", generator_file="generator_small_16k_sup_5.pth", packaged=False,
        t5=dataclasses.replace(tiny.t5, byte_tokens=False),
        vocoder=dataclasses.replace(zoo.get_variant("small_16k").vocoder, initial_channels=128),
    )
    monkeypatch.setitem(zoo.VARIANTS, "small_16k", variant)
    return variant


def run(folder, *arguments):
    return main(["--variant", "small_16k", "--selva_dir", str(folder), *arguments])


@pytest.mark.parametrize(
    "layout, expected",
    [
        (
            "comfyui",
            "generator_small_16k_sup_5.pth video_enc_sup_5.pth ext/v1-16.pth ext/best_netG.pt "
            "ext/DFN5B-CLIP-ViT-H-14-384/open_clip_model.safetensors ext/flan-t5-base/model.safetensors "
            "synchformer_state_dict.pth ext/flan-t5-base/tokenizer.json",
        ),
        (
            "selva",
            "weights/generator_small_16k_sup_5.pth weights/video_enc_sup_5.pth ext_weights/v1-16.pth "
            "ext_weights/best_netG.pt ext_weights/DFN5B-CLIP-ViT-H-14-384/open_clip_model.safetensors "
            "ext_weights/flan-t5-base/model.safetensors "
            "ext_weights/synchformer_state_dict.pth ext_weights/flan-t5-base/tokenizer.json",
        ),
    ],
)
def test_a_layout_is_complete_and_says_that_it_is_random(tmp_path, capsys, layout, expected):
    assert run(tmp_path, "--layout", layout) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed == [str(tmp_path / name) for name in expected.split()]
    files = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert files == {"README.txt", *expected.split()}
    assert "RANDOM WEIGHTS" in (tmp_path / "README.txt").read_text()
    check_weights("small_16k", tmp_path)


def test_comfyui_selva_finds_its_synchformer(tmp_path, small_variant):
    """Its loader wants that file with every variant; here it is read for MMAudio only."""
    run(tmp_path)
    tensors = weights.read_checkpoint(tmp_path / "synchformer_state_dict.pth")
    zoo.build_synchformer(small_variant.video_encoder).load_published(tensors)
    assert any(name.startswith("afeat_extractor.") for name in tensors)


def test_the_same_seed_writes_the_same_weights(tmp_path, small_variant):
    first, again, other = (generator_tensors(small_variant, seed) for seed in (3, 3, 4))
    assert all(torch.equal(tensor, again[name]) for name, tensor in first.items())
    assert not any(torch.equal(tensor, other[name]) for name, tensor in first.items())


def test_the_full_vocoder_would_have_exactly_the_published_tensors(monkeypatch, small_variant):
    """In the older of the two spellings; the shapes alone are looked at, so no gigabyte is drawn."""
    monkeypatch.setattr("selva.models.random_weights.random_tensor", lambda name, shape, *_: torch.empty(shape))
    variant = dataclasses.replace(small_variant, vocoder=zoo.VOCODER_CONFIGS["16k"])
    tensors = vocoder_tensors(variant, seed=0)["generator"]
    manifest = json.loads((GOLDEN / "manifests" / "bigvgan_16k.json").read_text())
    renamed = dict(json.loads((GOLDEN / "manifests" / "bigvgan_16k_names.json").read_text())["renamed"])
    assert {name: list(tensor.shape) for name, tensor in tensors.items()} == {
        renamed.get(name, name): shape for name, shape, _dtype, _is_buffer in manifest
    }


def test_the_vocoder_sounds_the_same_through_weight_norm(small_variant):
    from selva.models.random_weights import fill_random_

    stored = vocoder_tensors(small_variant, seed=0)["generator"]
    assert any(name.endswith(FILTER_SUFFIXES) for name in stored)
    mel = torch.randn(1, 80, 4)
    with torch.no_grad():
        through_file = zoo.build_vocoder(small_variant.vocoder).load_published(stored)(mel)
        directly = fill_random_(zoo.build_vocoder(small_variant.vocoder))(mel)
    torch.testing.assert_close(through_file, directly)


def test_the_stand_in_tokenizer_splits_into_bytes_and_ends_with_one(tmp_path):
    assert run(tmp_path) == 0
    tokens, mask = weights.load_t5("small_16k", tmp_path).tokenize(["", "dog", "é!"])
    assert tokens.shape == (3, 4) and mask.sum(1).tolist() == [1, 4, 4]
    assert [row[-1] for row in (tokens[0][:1], tokens[1], tokens[2])] == [1, 1, 1]
    assert tokens[mask].min() == 1 and tokens.max() < 259


def test_the_built_in_variant_is_refused_as_wrong_usage(tmp_path, capsys):
    assert main(["--variant", "tiny_16k", "--selva_dir", str(tmp_path)]) == 2
    assert "tiny_16k is built in and needs no weight files" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_a_folder_with_other_files_is_left_alone(tmp_path, capsys):
    (tmp_path / "generator_small_16k_sup_5.pth").write_bytes(b"trained")
    assert run(tmp_path) == 1
    assert "holds other files" in capsys.readouterr().err
    assert (tmp_path / "generator_small_16k_sup_5.pth").read_bytes() == b"trained"


@pytest.mark.parametrize("part, ending", [("generator", ".pth"), ("clip_text", ".safetensors")])
def test_a_full_disk_ends_in_one_line(tmp_path, capsys, monkeypatch, part, ending):
    resource = pytest.importorskip("resource")
    monkeypatch.setattr("scripts.make_test_weights.write_weights", lambda variant, folder, layout, seed: write_part(
        variant, part, folder / f"x{ending}", seed))
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    assert run(tmp_path) == 1
    said = capsys.readouterr().err
    assert "Traceback" not in said and f"x{ending}" in said and "File too large" in said
    assert not (tmp_path / f"x{ending}").exists()


def test_a_second_run_may_overwrite_its_own_files(tmp_path):
    assert run(tmp_path, "--layout", "selva") == 0
    assert run(tmp_path, "--seed", "1") == 0  # the layout is seen from the folder
    assert "seed 1" in (tmp_path / "README.txt").read_text()
    assert not (tmp_path / "ext").exists()
