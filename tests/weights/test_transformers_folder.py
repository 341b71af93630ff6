"""selva.weights.transformers_folder: models of transformers are found, and those of another kind are refused."""

from __future__ import annotations

import json

import pytest
import safetensors.torch
from listening_models import put_clap

from selva.utils.errors import UserError
from selva.weights.transformers_folder import load_from_folder, model_folder

CLAP = ("ClapModel", "ClapProcessor", "laion/clap-htsat-unfused")


@pytest.fixture
def clap(tmp_path):
    return put_clap(tmp_path / "clap")


def test_a_model_is_loaded_to_be_used_only(clap):
    model, processor = load_from_folder(clap, *CLAP)
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert type(processor).__name__ == "ClapProcessor"


def test_a_model_of_another_kind_is_refused(clap):
    """transformers would fill a network of the wrong kind with random numbers."""
    with pytest.raises(UserError, match=r"clap: holds a model of the kind clap, expected whisper, such as x/y"):
        load_from_folder(clap, "WhisperForConditionalGeneration", "WhisperProcessor", "x/y")


def test_missing_weights_are_named(clap):
    path = clap / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    del tensors["text_projection.linear1.weight"]
    safetensors.torch.save_file(tensors, path, {"format": "pt"})
    with pytest.raises(UserError, match=r"lacks weights of a ClapModel: text_projection\.linear1\.weight"):
        load_from_folder(clap, *CLAP)


def test_folders_that_hold_no_model_are_named(tmp_path, clap):
    with pytest.raises(FileNotFoundError, match="download laion/clap-htsat-unfused"):
        load_from_folder(tmp_path / "no", *CLAP)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="cannot be read as a ClapModel"):
        load_from_folder(tmp_path / "empty", *CLAP)
    (clap / "config.json").write_text("[")
    with pytest.raises(UserError, match="cannot be read as a ClapModel"):
        load_from_folder(clap, *CLAP)


def test_a_name_is_looked_up_in_the_cache_and_else_said_to_be_downloaded(tmp_path, clap, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    assert model_folder(str(clap), "x/y") == clap
    with pytest.raises(FileNotFoundError, match=r"hf download laion/small --local-dir small$"):
        model_folder("laion/small", "x/y")
    with pytest.raises(FileNotFoundError, match=r"hf download x/y --local-dir y$"):
        model_folder("./nowhere", "x/y")
    repository = tmp_path / "hub" / "models--laion--small"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text(json.dumps({"model_type": "clap"}))
    assert model_folder("laion/small", "x/y") == snapshot
