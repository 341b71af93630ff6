"""Small weight files under the published names, for all tests in here."""

from __future__ import annotations

import dataclasses
import shutil

import pytest

from scripts.make_test_weights import main as make_test_weights
from selva.models.config import VocoderConfig
from selva.models.variants import VARIANTS, get_variant


@pytest.fixture(autouse=True)
def small_published_variants(monkeypatch, tmp_path):
    """Published names and files in the sizes of the tiny model, and a Hugging Face cache of our own."""
    tiny = get_variant("tiny_16k")
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
        monkeypatch.setitem(VARIANTS, variant.name, variant)
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
