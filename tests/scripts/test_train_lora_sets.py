"""train_lora.py on several sounds at once: sets with weights, prefixes and several prompts, stopped and shared."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from make_data import put_clip, put_memmap
from script_args import TINY

import train_lora
from selva.checkpoint import load_adapter
from selva.data.cache import CACHE_FOLDER

ROOT = Path(__file__).parents[2]
QUICK = [*TINY, "--steps", "4", "--batch_size", "4", "--warmup_steps", "0", "--save_every", "2", "--val_every", "2",
         "--rank", "2", "--log_every", "1", "--lr", "1e-2", "--precision", "fp32", "--no_preview", "--no_verdict"]
SETS = ["--balance", "sets", "--prompt_prefix", "gong:", "laser:", "--val_fraction", "0.25"]


@pytest.fixture
def sets(tmp_path):
    """Five gongs, of which each has two or three prompts, and eight lasers."""
    for folder, count in (("gong", 5), ("laser", 8)):
        for number in range(count):
            put_clip(tmp_path / folder, f"{folder}_{number}", seed=number + 50 * (folder == "laser"), text=True)
    lines = [f"gong_{number}: {text}" for number in range(5) for text in ("struck", "a gong", f"gong {number % 2}")]
    (tmp_path / "gong" / "prompts.txt").write_text("\n".join(lines))
    return [str(tmp_path / "gong"), str(tmp_path / "laser:2")]


def train(data: list[str], out: Path, *more: str) -> int:
    return train_lora.main(["--data_dir", *data, "--output_dir", str(out), *QUICK, *more])


def rows_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def tensors(path: Path) -> dict[str, torch.Tensor]:
    return dict(load_adapter(path).tensors)


def test_what_each_set_gives_is_said_and_stored(sets, tmp_path, capsys):
    out = tmp_path / "run"
    assert train(sets, out, *SETS) == 0
    err = capsys.readouterr().err
    assert f"{sets[0]}: 4 clips to train on, 1 held out; weight 1: each 3 times in an epoch, 33 % of it" in err
    assert "prompts begin with 'gong:'; 5 clips have several prompts (up to 3), of which each use draws one" in err
    assert "6 clips to train on, 2 held out; weight 2: each 4 times in an epoch, 67 % of it" in err
    validations = [row for row in rows_of(out) if "val_loss" in row]
    assert [row["step"] for row in validations] == [0, 2, 4]
    for row in validations:
        assert row["val_loss"] == pytest.approx((row["val_loss/gong"] + 2 * row["val_loss/laser"]) / 3, rel=1e-4)
    last = validations[-1]
    assert f"gong {last['val_loss/gong']:.4f}, laser {last['val_loss/laser']:.4f}" in err
    meta = json.loads((out / "meta.json").read_text())
    assert meta["prompt_prefix"] == ["gong:", "laser:"] and meta["data_weights"] == [1, 2] and meta["balance"] == "sets"
    assert "gong: gong 0" in (out / "README.md").read_text() and "use of the sets" in (out / "report.html").read_text()
    settings = yaml.safe_load((out / "config.yaml").read_text())
    assert settings["prompt_prefix"] == ["gong:", "laser:"] and settings["val_dir"] == []
    assert train_lora.main(["--config", str(out / "config.yaml"), "--output_dir", str(tmp_path / "again")]) == 0
    assert all(torch.equal(x, tensors(tmp_path / "again" / "adapter_final.pt")[key])
               for key, x in tensors(out / "adapter_final.pt").items())


@pytest.mark.parametrize("more", [(), ("--preserve", "rain", "--target", "attn.qkv", "text_input_proj.0")],
                         ids=["cached conditions", "preserved sounds, features"])
def test_a_run_with_prompts_is_continued_exactly(sets, tmp_path, more, capsys):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train(sets, whole, *SETS, *more) == 0
    assert train(sets, parts, *SETS, *more, "--resume", str(whole / "adapter_step00002.pt")) == 0
    found = tensors(parts / "adapter_final.pt")
    assert all(torch.equal(x, found[key]) for key, x in tensors(whole / "adapter_final.pt").items())
    capsys.readouterr()
    folder = Path(sets[0])
    text = (folder / "prompts.txt").read_text()
    (folder / "prompts.txt").write_text(text.replace("gong_2: struck", "gong_2: beaten"))
    assert train(sets, tmp_path / "no", *SETS, *more, "--resume", str(whole / "adapter_step00002.pt")) == 1
    assert "another prompt: gong/gong_2" in capsys.readouterr().err
    (folder / "prompts.txt").write_text(text)
    assert train(sets, tmp_path / "no", *SETS[:2], *more, "--resume", str(whole / "adapter_step00002.pt")) == 1
    assert "prompt_prefix was ['gong:', 'laser:'] and is [] now" in capsys.readouterr().err


def test_prompts_and_prefixes_are_learned_from(sets, tmp_path):
    """Each of them changes what is trained."""
    plain = [sets[0], sets[1]]
    finals = []
    for number, options in enumerate((SETS, SETS[:2] + SETS[5:], [*SETS[2:]])):
        assert train(plain, tmp_path / f"run{number}", *options) == 0
        finals.append(tensors(tmp_path / f"run{number}" / "adapter_final.pt"))
    (Path(sets[0]) / "prompts.txt").unlink()
    assert train(plain, tmp_path / "last", *SETS) == 0
    finals.append(tensors(tmp_path / "last" / "adapter_final.pt"))
    for first in range(4):
        for second in range(first):
            assert any(not torch.equal(x, finals[second][key]) for key, x in finals[first].items()), (first, second)


def test_two_processes_draw_the_prompts_that_one_draws(sets, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    assert train(sets, one, *SETS, "--preserve", "rain") == 0
    for folder in sets:  # the second run encodes all texts itself
        for path in Path(folder.removesuffix(":2"), CACHE_FOLDER, "texts").glob("*"):
            path.unlink()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
               str(ROOT / "train_lora.py"), "--data_dir", *sets, "--output_dir", str(two), *QUICK, *SETS, "--preserve",
               "rain", "--batch_size", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, text=True, capture_output=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("each 3 times in an epoch") == 1
    for first, second in zip(rows_of(one), rows_of(two), strict=True):
        keys = [key for key in first if "loss" in key and "bins" not in key]
        assert keys and [first[key] for key in keys] == pytest.approx([second[key] for key in keys], rel=1e-4)


def test_memmaps_and_folders_are_trained_on_together(sets, tmp_path, capsys):
    put_memmap(tmp_path / "rows", 6)
    (tmp_path / "rows.prompts.txt").write_text("\n".join(f"id_{i}: {text}" for i in range(6) for text in ("x", "y")))
    data = [str(tmp_path / "rows"), sets[0]]
    options = ("--prompt_prefix", "sks", "--balance", "sets")
    assert train(data, tmp_path / "whole", *options) == 0
    assert "rows: 5 clips to train on, 1 held out" in capsys.readouterr().err
    assert train(data, tmp_path / "parts", *options, "--resume", str(tmp_path / "whole" / "adapter_step00002.pt")) == 0
    found = tensors(tmp_path / "parts" / "adapter_final.pt")
    assert all(torch.equal(x, found[key]) for key, x in tensors(tmp_path / "whole" / "adapter_final.pt").items())
    keys = {key for row in rows_of(tmp_path / "parts") for key in row if "/" in key}
    assert keys == {"val_loss/rows", "val_loss/gong"}


def test_a_dry_run_says_all_of_it_and_writes_nothing(sets, tmp_path, capsys):
    put_memmap(tmp_path / "rows", 6)
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    assert train([str(tmp_path / "rows"), *sets], tmp_path / "run", "--prompt_prefix", "sks", "--dry_run") == 0
    err = capsys.readouterr().err
    assert err.count("prompts begin with 'sks'") == 3 and "nothing was written" in err
    assert sorted(str(path) for path in tmp_path.rglob("*")) == before


def test_what_cannot_be_meant_is_refused(sets, tmp_path, capsys):
    for options, message in (
        (("--prompt_prefix", "a", "b", "c"), "prompt_prefix has 3 texts and data_dir 2 sets"),
        (("--balance", "all"), "'all'"),
        (("--caption_dropout_rate", "0.1"), "--null_prob"),
        (("--trigger_word", "sks"), "--prompt_prefix"),
    ):
        assert train(sets, tmp_path / "run", *options) in (1, 2)
        assert message in capsys.readouterr().err
