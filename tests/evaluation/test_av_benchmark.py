"""selva.evaluation.av_benchmark: its cache folders are read as it reads them, and written as it would."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from golden_case import GOLDEN, GoldenCase

from selva.evaluation import av_benchmark
from selva.models.synchformer_av import SynchformerAV
from selva.utils.errors import UserError

FOLDERS = GOLDEN / "eval_cache"


@pytest.fixture(scope="module")
def synchformer() -> SynchformerAV:
    """The comparison with golden weights; both branches, which cached features do not need, stay without."""
    import recipe

    entries = recipe.load_manifest(GOLDEN / "manifests/synchformer_av.json")
    kept = [entry for entry in entries if not entry[0].startswith(("vfeat_extractor.", "afeat_extractor."))]
    with torch.device("meta"):
        network = SynchformerAV()
    weights = {name: torch.from_numpy(value) for name, value in recipe.make_state_dict(kept).items()}
    network.load_state_dict(weights, strict=False, assign=True)
    return network.eval()


def test_published_cache_folders_give_the_published_metrics(synchformer):
    case = GoldenCase("eval_cache")
    results = av_benchmark.evaluate_caches(FOLDERS / "pred", FOLDERS / "gt", synchformer)
    assert tuple(results) == av_benchmark.RESULT_KEYS
    for key, value in results.items():
        assert value == pytest.approx(case.stored[key][0], rel=1e-6, abs=1e-8), key


def test_without_pairs_only_what_needs_none_is_left(caplog):
    caplog.set_level("INFO")
    results = av_benchmark.evaluate_caches(FOLDERS / "pred", FOLDERS / "gt", paired=False)
    assert list(results) == ["FD-VGG", "FD-PANN", "FD-PASST", "ISC-PANNS-mean", "ISC-PANNS-std", "ISC-PASST-mean",
                             "ISC-PASST-std"]
    assert "KL-PANNS-softmax" in caplog.text and "DeSync" in caplog.text


def test_written_folders_hold_what_was_read_and_no_shared_storages(tmp_path):
    for name in (av_benchmark.VGGISH, av_benchmark.PASST):
        rows = av_benchmark.read_cache(FOLDERS / "pred", name)
        assert rows is not None
        av_benchmark.write_cache(tmp_path, name, {key: torch.from_numpy(value) for key, value in rows.items()})
        again = av_benchmark.read_cache(tmp_path, name)
        assert again is not None and list(again) == list(rows)
        assert all(np.array_equal(again[key], rows[key]) for key in rows)
        stored = torch.load(tmp_path / f"{name}.pth", weights_only=True)
        assert all(value.untyped_storage().nbytes() == value.nbytes for value in stored.values())
    path = av_benchmark.write_results(tmp_path, {"DeSync": 0.5, "FD-VGG": 1.0})
    assert list(json.loads(path.read_text())) == ["FD-VGG", "DeSync"]


def test_a_full_disk_is_named(tmp_path):
    resource = pytest.importorskip("resource")
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    with pytest.raises(OSError, match=r"too large.*sync\.pth"):
        av_benchmark.write_cache(tmp_path, "sync", {"a": torch.zeros(10_000)})
    assert not (tmp_path / "sync.pth").exists()


def test_names_are_paired_as_published_and_whole_names_first():
    case = GoldenCase("metrics").config["pairing"]
    assert [av_benchmark.plain_name(name) for name in case["generated_names"]] == case["cleaned_generated_names"]
    twenty = "a name of twenty .."  # would be cut by its length alone
    assert len(twenty + "x") == 20
    assert av_benchmark.pairs([twenty + "x"], [twenty + "x"]) == [(twenty + "x", twenty + "x")]


def test_damaged_folders_are_refused_by_name(tmp_path):
    torch.save({"a": torch.tensor([1.0, float("nan")])}, tmp_path / "vggish_features.pth")
    with pytest.raises(UserError, match=r"vggish_features\.pth: the features of 'a'"):
        av_benchmark.read_cache(tmp_path, "vggish_features")
    torch.save({"a": torch.zeros(3), "b": torch.zeros(4)}, tmp_path / "passt_logits.pth")
    with pytest.raises(UserError, match="unequal shapes"):
        av_benchmark.read_cache(tmp_path, "passt_logits")
    torch.save({"nobody": torch.zeros(768)}, tmp_path / "passt_features_embed.pth")
    for name in ("vggish_features.pth", "passt_logits.pth"):
        (tmp_path / name).unlink()
    with pytest.raises(UserError, match="no clip of"):
        av_benchmark.evaluate_caches(tmp_path, FOLDERS / "gt")
