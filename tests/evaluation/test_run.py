"""selva.evaluation.run and scripts/evaluate.py: whole evaluations, with and without networks, stopped and continued."""

from __future__ import annotations

import csv
import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from listening_models import put_ast, put_clap
from make_media import make_video
from struck_sounds import RATE, strikes

from selva.evaluation import encoders, outputs, run
from selva.evaluation.config import EvaluationConfig
from selva.models.config import VideoEncoderConfig
from selva.models.synchformer_av import SynchformerAV
from selva.utils.errors import UserError

ROOT = Path(__file__).parents[2]
SMALL = VideoEncoderConfig(embed_dim=32, depth=1, num_heads=4, mlp_dim=48, image_size=32)


def script(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(ROOT / "scripts/evaluate.py"), *map(str, arguments)],
                          capture_output=True, text=True, cwd=ROOT, check=False)


def settings(folders, tmp_path, **more) -> EvaluationConfig:
    generated, reference = folders
    return EvaluationConfig(generated, reference, output_dir=tmp_path / "out", device="cpu", **more)


def test_the_script_writes_table_page_and_figures_of_every_pair(folders, tmp_path):
    done = script("--generated", folders[0], "--reference", folders[1], "--output_dir", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "onset F1" in done.stdout and max(map(len, done.stdout.splitlines())) <= 100
    content = json.loads((tmp_path / "out/evaluation.json").read_text())
    figures = content["figures"]
    assert figures["onset_f1"]["value"] == pytest.approx(2 / 3) and figures["onset_f1"]["items"] == 3
    assert figures["onset_offset_sec"]["value"] == pytest.approx(0.02, abs=0.005)  # 0 and 40 ms; 200 ms do not match
    with open(tmp_path / "out/evaluation.csv", newline="") as file:
        rows = {row["name"]: row for row in csv.DictReader(file)}
    assert float(rows["a"]["log_spectral_distance_db"]) < float(rows["c"]["log_spectral_distance_db"])
    page = (tmp_path / "out/evaluation.html").read_text()
    assert page.count("<audio") == 6 and "Furthest from their recordings" in page


def test_a_stopped_evaluation_goes_on_and_changed_sounds_are_measured_again(folders, tmp_path, monkeypatch):
    config = settings(folders, tmp_path)
    measured = []
    original = run.pair_figures
    monkeypatch.setattr(run, "pair_figures", lambda *args: measured.append(1) or original(*args))
    first = run.evaluate(config)
    assert len(measured) == 3
    lines = (tmp_path / "out/pairs.jsonl").read_bytes()
    (tmp_path / "out/pairs.jsonl").write_bytes(lines[: -len(lines) // 4])  # killed while it wrote the last line
    again = run.evaluate(config)
    assert len(measured) == 4 and again.figures == first.figures
    soundfile.write(folders[0] / "b.flac", strikes([1.0], 900), RATE)
    changed = run.evaluate(config)
    assert len(measured) == 5 and changed.figures["onset_f1"].value != first.figures["onset_f1"].value


def test_results_of_other_folders_are_moved_aside_and_those_of_the_same_replaced(folders, tmp_path, caplog):
    other = tmp_path / "other"
    shutil.copytree(folders[0], other)
    soundfile.write(other / "a.flac", strikes([3.0], 900), RATE)
    caplog.set_level("INFO")

    def write(generated: Path) -> None:
        config = EvaluationConfig(generated, folders[1], output_dir=tmp_path / "out", device="cpu")
        outputs.write_outputs(run.evaluate(config), config.output_dir)

    write(folders[0])
    first = {name: (tmp_path / "out" / name).read_bytes() for name in ("evaluation.html", "evaluation.json",
                                                                       "evaluation.csv")}
    write(folders[0])
    assert "the results of an earlier evaluation of these folders are replaced" in caplog.text
    assert not (tmp_path / "out/previous_001").exists()
    write(other)
    aside = tmp_path / "out/previous_001"
    assert {path.name: path.read_bytes() for path in aside.iterdir()} == first
    assert f"out: held the results of {folders[0]} and {folders[1]}; now in {aside}: evaluation.html" in caplog.text
    (tmp_path / "out/evaluation.json").write_text("my notes")
    write(other)
    assert (tmp_path / "out/previous_002/evaluation.json").read_text() == "my notes"
    assert "held the results of something else" in caplog.text


def test_a_loud_recording_with_little_in_common_is_not_called_silent(folders, tmp_path):
    soundfile.write(folders[0] / "a.flac", strikes([0.0], 600, seconds=5.0)[: RATE // 100], RATE)
    quiet_first = np.concatenate([np.zeros(2 * RATE), strikes([1.0], 600, seconds=3.0)])
    soundfile.write(folders[1] / "b.wav", quiet_first, RATE)
    soundfile.write(folders[0] / "b.flac", strikes([0.5], 600, seconds=2.0), RATE)
    remarks = run.evaluate(settings(folders, tmp_path)).remarks
    assert ("1 of 3 pairs: the sounds have less than 0.4 s in common, too little for loudness and spectral distances: a"
            in remarks)
    assert ("1 of 3 pairs: one of the sounds is silent in their common beginning, and there are no distances: b"
            in remarks)
    assert not any("recording is silent" in remark for remark in remarks)


def test_one_bad_sound_ends_nothing_and_silent_ones_are_named(folders, tmp_path):
    soundfile.write(folders[0] / "d.wav", np.array([0.0, np.nan] * RATE, np.float32), RATE, subtype="FLOAT")
    soundfile.write(folders[1] / "d.wav", strikes([1.0], 600), RATE)
    soundfile.write(folders[0] / "e.wav", np.zeros(2 * RATE), RATE)
    soundfile.write(folders[1] / "e.wav", strikes([1.0], 600, seconds=4.0), RATE)
    done = script("--generated", folders[0], "--reference", folders[1], "--output_dir", tmp_path / "out")
    assert done.returncode == 1
    assert "d: left out" in done.stderr and "not finite" in done.stderr and "Traceback" not in done.stderr
    assert "digital silence, and has no distances: e" in done.stderr and "lengths differ" in done.stderr
    content = json.loads((tmp_path / "out/evaluation.json").read_text())
    assert [item["name"] for item in content["failed"]] == ["d"] and content["figures"]["onset_f1"]["items"] == 4


def test_mistakes_end_in_one_line(folders, tmp_path):
    for arguments, text in (
        (("--generated", tmp_path / "no"), "no such folder"),
        (("--export_av_benchmark", tmp_path / "x"), "--synchformer"),
        (("--clap", tmp_path / "no"), "laion/clap"),
        (("--clap", folders[0]), "cannot be read as a ClapModel"),
    ):
        common = ("--generated", folders[0], "--reference", folders[1], "--output_dir", tmp_path / "out")
        done = script(*common, *arguments)
        assert done.returncode == 1 and text in done.stderr and "Traceback" not in done.stderr, done.stderr
    torch.save({"vfeat_extractor.x": torch.zeros(1)}, tmp_path / "visual.pth")
    with pytest.raises(UserError, match="holds no audio branch"):
        run.evaluate(settings(folders, tmp_path, synchformer=tmp_path / "visual.pth"))


def one_line(done: subprocess.CompletedProcess[str]) -> str:
    """Return the only line of an error; everything else that was said is a warning or less."""
    assert done.returncode == 1 and "Traceback" not in done.stderr and not done.stdout, done.stderr
    (line,) = (line for line in done.stderr.splitlines() if "error" in line.lower())
    return line


def write_tone(path: Path, samples: np.ndarray | None = None) -> None:
    soundfile.write(path, strikes([1.0], 600, seconds=2.0) if samples is None else samples, RATE, subtype="FLOAT")


@pytest.mark.parametrize(("generated", "recorded", "words"), [
    ({}, {"a.wav": None}, ["generated: no sounds and no videos", "subfolders were not searched", ".wav"]),
    ({"a.wav": None}, {}, ["recorded: no sounds and no videos"]),
    ({"a.wav": None, "b.wav": None}, {"x.wav": None}, ["no sound in", "has the name of one", "a, b", "x"]),
    ({"a.wav": np.full(RATE, np.nan)}, {"a.wav": None}, ["no pair of 1 could be compared", "generated/a.wav",
                                                         "not finite"]),
    ({"a.wav": None}, {"a.wav": np.full(RATE, np.inf)}, ["no pair of 1", "recorded/a.wav", "not finite"]),
])
def test_folders_that_give_no_figures_end_in_one_clear_line(tmp_path, generated, recorded, words):
    for folder, files in (("generated", generated), ("recorded", recorded)):
        (tmp_path / folder).mkdir()
        for name, samples in files.items():
            write_tone(tmp_path / folder / name, samples)
    done = script("--generated", tmp_path / "generated", "--reference", tmp_path / "recorded", "--output_dir",
                  tmp_path / "out")
    line = one_line(done)
    assert all(word in line for word in words), line
    assert not (tmp_path / "out/evaluation.json").exists()


def test_names_without_a_partner_are_left_out_by_name(folders, tmp_path):
    write_tone(folders[0] / "only_made.wav")
    write_tone(folders[1] / "only_recorded.wav")
    done = script("--generated", folders[0], "--reference", folders[1], "--output_dir", tmp_path / "out")
    assert done.returncode == 0 and "onset F1" in done.stdout
    for name in ("only_made", "only_recorded"):
        (line,) = (line for line in done.stderr.splitlines() if name in line)
        assert "left out, without a partner in " in line and ": 1 of 4 sounds: " in line


def test_a_sound_that_is_nearly_silent_is_named_too(folders, tmp_path):
    soundfile.write(folders[0] / "a.flac", strikes([1.0], 600, level=0) * 0.01, RATE, subtype="PCM_24")
    evaluation = run.evaluate(settings(folders, tmp_path))
    assert evaluation.figures["log_spectral_distance_db"].items == 2
    assert "1 of 3 pairs: generated sound is below -90 dB of full scale, and has no distances: a" in evaluation.remarks


@pytest.mark.parametrize("side", [0, 1])
def test_a_single_silent_pair_is_said_and_has_no_distances(folders, tmp_path, side):
    for folder in folders:
        for name in ("b", "c"):
            next(folder.glob(f"{name}.*")).unlink()
    path = next(folders[side].glob("a.*"))
    soundfile.write(path, np.zeros(5 * RATE), RATE)
    done = script("--generated", folders[0], "--reference", folders[1], "--output_dir", tmp_path / "out")
    assert done.returncode == 0 and "Traceback" not in done.stderr
    assert ("sound is digital silence, and has no distances: a", "recording is silent: a")[side] in done.stderr
    assert "LSD" not in done.stdout and "silence" in done.stdout and "nan" not in done.stdout.lower()
    assert "silent: a" in (tmp_path / "out/evaluation.html").read_text() or side == 0


@pytest.fixture(scope="module")
def networks(tmp_path_factory) -> dict[str, Path]:
    """Small random networks in the files that users have."""
    folder = tmp_path_factory.mktemp("networks")
    torch.manual_seed(0)
    torch.save(SynchformerAV(SMALL).state_dict(), folder / "synchformer.pth")
    return {"clap": put_clap(folder / "clap"), "ast": put_ast(folder / "ast"),
            "synchformer": folder / "synchformer.pth"}


def test_networks_add_their_figures_and_their_features_are_kept(folders, tmp_path, networks, monkeypatch):
    load = encoders.load_synchformer
    monkeypatch.setattr(encoders, "load_synchformer", lambda path, device: load(path, device, SMALL))
    videos = tmp_path / "videos"
    videos.mkdir()
    for name in ("a", "b", "c"):
        make_video(videos / f"{name}.mp4", seconds=5.2)
    (tmp_path / "captions.tsv").write_text("id\tcaption\na\ta bell\nb\ta bell\nc\ta gong\n")
    config = settings(folders, tmp_path, videos=videos, captions=tmp_path / "captions.tsv", **networks,
                      export_av_benchmark=tmp_path / "cache")
    evaluation = run.evaluate(config)
    assert evaluation.failed == []
    keys = {"desync_sec", "clap_score", "ast_kl", "clap_kd", "ast_kd"}
    assert keys <= set(evaluation.figures) and all(evaluation.figures[key].items == 3 for key in keys)
    assert "KD" in evaluation.reasons["clap_fd"] and "ast_is" in evaluation.reasons  # 3 items are too few
    assert -1 <= evaluation.figures["clap_score"].value <= 1 and 0 <= evaluation.figures["desync_sec"].value <= 2

    from selva.evaluation import av_benchmark

    network = encoders.load_synchformer(networks["synchformer"], torch.device("cpu"))
    again = av_benchmark.evaluate_caches(tmp_path / "cache/generated", tmp_path / "cache/reference", network)
    assert again["DeSync"] == pytest.approx(evaluation.figures["desync_sec"].value, rel=1e-6)

    shutil.rmtree(tmp_path / "cache")
    with monkeypatch.context() as patch:
        patch.setattr(run, "read_mono", None)  # nothing is read or computed again
        kept = run.evaluate(config)  # from what is stored; the export is made anew
    assert kept.figures == evaluation.figures and (tmp_path / "cache/generated/synchformer_audio.pth").is_file()
    assert outputs.table(kept) == outputs.table(evaluation)
    written = {path.name: torch.load(path) for path in (tmp_path / "cache").rglob("*.pth")}
    assert {name: tuple(rows["a"].shape) for name, rows in written.items()} == {
        "synchformer_audio.pth": (14, 6, 32), "synchformer_video.pth": (14, 8, 32)}

    (tmp_path / "later").mkdir()  # an evaluation without an export has kept no features for one
    plain = dataclasses.replace(config, export_av_benchmark=None, output_dir=tmp_path / "later")
    assert run.evaluate(plain).figures == evaluation.figures and not list((tmp_path / "later").rglob("sync_*"))
    asked = dataclasses.replace(plain, export_av_benchmark=tmp_path / "cache_later")
    assert run.evaluate(asked).figures == evaluation.figures
    for name in ("generated/synchformer_audio.pth", "reference/synchformer_video.pth"):
        late, first = (torch.load(tmp_path / folder / name) for folder in ("cache_later", "cache"))
        assert late.keys() == first.keys() and all(torch.equal(late[key], first[key]) for key in first)
