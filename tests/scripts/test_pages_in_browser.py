"""The pages that the scripts write, in a real browser: every player has a source that decodes, no text overflows."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import yaml
from browser import BROWSER, look_at
from script_args import TINY

import infer
from scripts import evaluate, make_report, sweep
from selva.training import verdict

pytestmark = pytest.mark.skipif(BROWSER is None, reason="needs Chromium")

TRAINING = {"variant": "tiny_16k", "device": "cpu", "steps": 2, "batch_size": 2, "warmup_steps": 1, "save_every": 2,
            "val_every": 1, "rank": 2, "precision": "fp32", "verdict_share": 1000.0}


@pytest.fixture(scope="module")
def made(_features, clip_dir, tmp_path_factory) -> Path:
    """A folder with the pages of a run, a sweep, a comparison, an evaluation and a quickstart, all of one run."""
    root = tmp_path_factory.mktemp("pages_with_a_name_that_goes_on_and_on_without_a_space_in_it")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verdict, "PLANS", ((1, 2),))
        patch.setattr(verdict, "NUM_FOREIGN", 1)
        features = shutil.copytree(_features, root / "features")
        (root / "sweep.yaml").write_text(yaml.safe_dump({
            "output_dir": str(root / "sweep"), "base": {**TRAINING, "data_dir": str(features), "val_fraction": 0.2},
            "grid": {"lr": [0.001, 0.01]}}))
        assert sweep.main([str(root / "sweep.yaml")]) == 0
    run = root / "sweep" / "lr=0.01,seed=42"
    (root / "list.txt").write_text(f'base\n{run / "adapter_final.pt"} 1\n')
    (root / "new").mkdir()
    for path in (*_features.glob("knock_0.*"), *_features.glob("knock_5.*")):
        shutil.copy(path, root / "new")
    assert infer.main([*TINY, "--features", str(root / "new"), "--num_steps", "1", "--compare", str(root / "list.txt"),
                       "--output", str(root / "compare")]) == 0
    assert evaluate.main(["--generated", str(root / "new"), "--reference", str(clip_dir), "--output_dir",
                          str(root / "evaluation")]) == 0
    assert make_report.main(["--run", str(run), "--before", str(clip_dir), "--after", str(clip_dir), "--output",
                             str(root / "quickstart.html")]) == 0
    return root


@pytest.mark.parametrize(("name", "players"), [
    ("sweep/lr=0.01,seed=42/report.html", 3 + 2 + 1), ("sweep/sweep.html", 2), ("compare/comparison.html", 6),
    ("evaluation/evaluation.html", 4), ("quickstart.html", 12)])
def test_every_page_plays_and_nothing_overflows(made, tmp_path, name, players):
    for width in (420, 1280):
        assert look_at(made / name, tmp_path, width) == {"players": players, "broken": [], "overflowing": []}
    assert (made / name).stat().st_size < 5_000_000
