"""train_lora.py to the end of a run: the verdict, the page, the model card, and what is heard meanwhile."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import soundfile
import yaml
from script_args import TINY

import train_lora
from selva import cli
from selva.extraction.extractor import FeatureExtractor
from selva.training import outcome, verdict
from selva.training import train as train_module
from selva.training.config import RunConfig
from selva.training.run import TrainingRun
from selva.training.sample_prompts import read_sample_prompts
from selva.utils.errors import UserError

QUICK = [*TINY, "--steps", "4", "--batch_size", "2", "--warmup_steps", "1", "--save_every", "4", "--val_every", "2",
         "--rank", "2", "--log_every", "1", "--precision", "fp32", "--no_preview"]


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    monkeypatch.setattr(verdict, "PLANS", ((1, 8),))  # after fewer steps the sound is silent
    monkeypatch.setattr(verdict, "NUM_FOREIGN", 2)


def train(data: Path, out: Path, *more: str) -> int:
    return train_lora.main(["--data_dir", str(data), "--output_dir", str(out), *QUICK, *more])


def test_a_run_ends_with_a_verdict_a_page_and_a_card(feature_dir, tmp_path, capsys):
    out = tmp_path / "run"
    assert train(feature_dir, out, "--verdict_share", "1000", "--lr", "1e-2") == 0
    stdout, stderr = capsys.readouterr()
    assert stdout.strip() == str(out / "adapter_final.pt")
    assert "at the end a verdict from 1 clip and 5 foreign" in stderr
    line = next(line for line in stderr.splitlines() if "verdict: " in line)
    assert "1 held-out clip moved" in line and "foreign prompts moved" in line
    content = json.loads((out / "verdict.json").read_text())
    assert content["verdict"] in line and content["step"] == 4 and content["moved_db"] > 0
    page = (out / "report.html").read_text(encoding="utf-8")
    assert page.count("<audio") == 3 + 2 * 2 and page.count("data:audio/mpeg") == 7
    for words in ("a knock", content["verdict"], "Held-out loss by noise level", "by heart", "batch_size: 2",
                  "6 clips, ", "PyTorch", "python infer.py", "held out for validation, not trained on: knock_"):
        assert words in page
    assert len(page) < 5_000_000 and "http" not in re.sub(r"base64,[^\"]+", "", page)
    card = (out / "README.md").read_text(encoding="utf-8")
    assert yaml.safe_load(card.split("---")[1])["tags"][0] == "lora" and "verdict: " in card
    rows = [json.loads(row) for row in (out / "metrics.jsonl").read_text().splitlines()]
    watched = [row for row in rows if "val_loss" in row]
    assert [row["step"] for row in watched] == [0, 2, 4] and all("member_auc" in row for row in watched)
    assert watched[0]["velocity_change"] == 0 < watched[2]["velocity_change"]


def test_a_short_run_has_no_verdict_and_says_so(feature_dir, tmp_path, capsys):
    assert train(feature_dir, tmp_path / "short") == 0
    assert "no verdict at the end" in capsys.readouterr().err
    assert not (tmp_path / "short" / "verdict.json").exists() and (tmp_path / "short" / "report.html").exists()
    assert train(feature_dir, tmp_path / "off", "--no_verdict", "--verdict_share", "1000") == 0
    assert "verdict" not in capsys.readouterr().err


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize("gone", [
    ("verdict.json", "README.md", "report.html"), ("report.html",), ("README.md", "report.html"), ("verdict.json",)])
def test_a_run_that_was_killed_at_its_end_gets_what_is_missing_and_nothing_is_trained(
        feature_dir, tmp_path, capsys, monkeypatch, gone):
    out, more = tmp_path / "run", ("--verdict_share", "1000", "--resume", "auto")
    assert train(feature_dir, out, *more) == 0
    before = files_of(out)
    capsys.readouterr()
    for name in gone:
        (out / name).unlink()
    monkeypatch.setattr(TrainingRun, "train_step", None)  # a step would be an error
    assert train(feature_dir, out, *more) == 0
    told = capsys.readouterr()
    assert told.out.strip() == str(out / "adapter_final.pt")
    assert "made now: " in told.err and all(name in told.err for name in gone)
    after = files_of(out)
    assert after.keys() == before.keys() and "previous_001" not in {path.name for path in out.iterdir()}
    assert all(after[name] == before[name] for name in ("verdict.json", "README.md", "adapter_final.pt"))
    assert before["verdict.json"].decode().split('"verdict": "')[1].split('"')[0] in after["report.html"].decode()
    assert train(feature_dir, out, *more) == 1  # now all of it is there
    assert "give a larger --steps" in capsys.readouterr().err and files_of(out) == after


def test_what_is_left_of_a_shorter_run_is_not_taken_for_the_end_of_this_one(feature_dir, tmp_path, capsys, monkeypatch):
    out = tmp_path / "run"
    assert train(feature_dir, out, "--verdict_share", "1000", "--resume", "auto") == 0
    longer = ("--verdict_share", "1000", "--resume", "auto", "--steps", "6", "--save_every", "6")
    with monkeypatch.context() as patch:
        patch.setattr(train_module, "write_outcome", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train_module.train(config_of(feature_dir, out, *longer))
    assert json.loads((out / "verdict.json").read_text())["step"] == 4 and (out / "adapter_final_001.pt").exists()
    assert train(feature_dir, out, *longer) == 0
    assert json.loads((out / "verdict.json").read_text())["step"] == 6
    page, card = (out / "report.html").read_text(encoding="utf-8"), (out / "README.md").read_text(encoding="utf-8")
    assert "adapter_final_001.pt" in page and "| steps | 6 |" in card


def interrupted(*_):
    raise KeyboardInterrupt


def config_of(data: Path, out: Path, *more: str) -> RunConfig:
    arguments = ["--data_dir", str(data), "--output_dir", str(out), *QUICK, *more]
    return cli.config_from(RunConfig, train_lora.build_parser().parse_args(arguments))


def test_without_a_verdict_a_finished_run_stays_finished(feature_dir, tmp_path, capsys):
    out = tmp_path / "run"
    assert train(feature_dir, out) == 0  # too short for a verdict
    before = files_of(out)
    assert train(feature_dir, out, "--resume", "auto") == 1
    assert "give a larger --steps" in capsys.readouterr().err and files_of(out) == before


def test_a_verdict_that_fails_spoils_nothing(feature_dir, tmp_path, capsys, monkeypatch):
    def broken(*args):
        raise RuntimeError("out of everything")

    monkeypatch.setattr(outcome, "reach_verdict", broken)
    assert train(feature_dir, tmp_path / "run", "--verdict_share", "1000") == 0
    assert "no verdict: out of everything" in capsys.readouterr().err
    assert {"adapter_final.pt", "report.html", "README.md"} <= {path.name for path in (tmp_path / "run").iterdir()}


def test_sounds_of_a_table_at_every_checkpoint_and_figures_between(feature_dir, tmp_path, capsys):
    features = sorted(feature_dir.glob("*.npz"))[0]
    table = tmp_path / "sounds.csv"
    table.write_text(f"name,prompt,features,seed,strength,guidance\nfull,a knock,{features},7,,\n"
                     f"off,a knock,{features},7,0,\nhalf,rain,,7,0.5,0\n")
    out = tmp_path / "run"
    assert train(feature_dir, out, "--sample_prompts", str(table), "--eval_every", "2", "--lr", "1e-1",
                 "--duration", "2") == 0
    written = {path.name for path in (out / "sample_prompts").iterdir()}
    assert written == {f"{name}_step0000{step}.wav" for name in ("full", "off", "half") for step in (0, 4)}

    def sound(name):
        return soundfile.read(out / "sample_prompts" / name)[0]

    assert (sound("full_step00000.wav") == sound("off_step00000.wav")).all()  # the base model
    assert (sound("off_step00000.wav") == sound("off_step00004.wav")).all()
    assert (sound("full_step00004.wav") != sound("off_step00004.wav")).any()
    rows = [json.loads(row) for row in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "eval_lsd_db" in row] == [2, 4]


def test_a_video_of_the_table_is_encoded_once_and_sounds_as_its_features_do(
        feature_dir, clip_dir, tmp_path, capsys, monkeypatch):
    table = tmp_path / "sounds.csv"
    (tmp_path / "new").mkdir()
    shutil.copy(clip_dir / "knock_0.mp4", tmp_path / "new" / "a.mp4")
    rows = ["name,prompt,video,features,seed", "seen,a knock,new/a.mp4,,7", "blind,a knock,,,7",
            f"stored,,,{feature_dir / 'knock_0.npz'},7"]
    table.write_text("\n".join(rows) + "\n")
    read, original = [], FeatureExtractor.read
    monkeypatch.setattr(FeatureExtractor, "read", lambda *args: read.append(args) or original(*args))
    for out in (tmp_path / "one", tmp_path / "two"):
        assert train(feature_dir, out, "--sample_prompts", str(table), "--lr", "1e-1", "--duration", "2") == 0
        for step in (0, 4):
            seen, blind, stored = (soundfile.read(out / "sample_prompts" / f"{name}_step0000{step}.wav")[0]
                                   for name in ("seen", "blind", "stored"))
            assert (seen == stored).all() and (seen != blind).any()
    assert len(read) == 1
    assert "features of 1 video, made now: 0" in capsys.readouterr().err
    table.write_text(table.read_text().replace("seen,a knock", "seen,a bell"))  # SelVA's encoder looks for the words
    assert train(feature_dir, tmp_path / "one", "--sample_prompts", str(table), "--resume", "auto", "--steps", "8",
                 "--duration", "2") == 0
    assert len(read) == 2


def test_a_video_that_cannot_be_read_ends_the_run_before_anything_is_written(feature_dir, tmp_path, capsys):
    (tmp_path / "a.mp4").write_bytes(b"no video")
    (tmp_path / "sounds.csv").write_text("prompt,video\na knock,a.mp4\n")
    assert train(feature_dir, tmp_path / "run", "--sample_prompts", str(tmp_path / "sounds.csv")) == 1
    told = capsys.readouterr().err
    assert "a.mp4" in told and "sounds.csv" in told and "Traceback" not in told and not (tmp_path / "run").exists()


@pytest.mark.parametrize(("text", "words"), [
    ("prompt,video\na,gone.mp4\n", "line 2: gone.mp4: no such file"),
    ("prompt,video\na,a.npz\n", "line 2: a.npz: expected a video"),
    ("prompt,volume\na,1\n", "has the columns prompt, volume"),
    ("prompt,seed\na,x\n", "line 2: seed is 'x', expected a whole number"),
    ("prompt,strength\na,\"0,8\"\n", "line 2: strength is '0,8', expected a number, with a point"),
    ("prompt,features\n,missing.npz\n", "line 2: missing.npz: no such file"),
    ("prompt,seed\n,1\n", "line 2: neither a prompt nor a video nor features"),
    ("name,prompt\na,x\na,y\n", "line 3: the name 'a' is used twice"),
    ("name,prompt\n../a,x\n", "line 2: the name '../a' cannot name a file"),
    ("prompt\n", "it has no rows"),
])
def test_a_table_that_cannot_be_meant_is_refused_before_anything_is_read(feature_dir, tmp_path, capsys, text, words):
    (tmp_path / "sounds.csv").write_text(text)
    assert train(feature_dir, tmp_path / "run", "--sample_prompts", str(tmp_path / "sounds.csv")) == 1
    assert words in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_sounds_that_would_be_one_file_are_refused_where_they_would(tmp_path, monkeypatch):
    """On most disks of Windows and macOS, the sounds of two rows would lie in one file."""
    (table := tmp_path / "sounds.csv").write_text("name,prompt\ndog,a\nDog,b\ncat,c\n")
    apart = [True, False]
    monkeypatch.setattr("selva.inputs.file_names.tells_case_apart", lambda folder: apart.pop(0))
    assert [one.name for one in read_sample_prompts(table, 1, tmp_path / "run")] == ["dog", "Dog", "cat"]
    with pytest.raises(UserError, match=r"sounds\.csv: .*in .*run, so the sound 'Dog' would replace 'dog'; rename one"):
        read_sample_prompts(table, 1, tmp_path / "run")
