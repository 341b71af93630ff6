"""The benchmark of several sounds in one adapter: which commands it runs; what it measures is not judged here."""

from __future__ import annotations

import pytest

from benchmarks import several_sounds


@pytest.fixture
def commands(monkeypatch):
    """The commands that would have been run."""
    found: list[list[str]] = []
    monkeypatch.setattr(several_sounds, "run_script", lambda *words: found.append([str(word) for word in words]) or 1.5)
    return found


def test_every_sound_is_a_set_of_its_own_and_clips_are_made_once(tmp_path, commands):
    args = several_sounds.build_parser().parse_args(
        ["--work_dir", str(tmp_path), "--steps", "7", "--no_preserve", "--device", "cpu"])
    (tmp_path / "laser_clips").mkdir()
    (tmp_path / "laser_clips" / "prompts.txt").touch()
    assert several_sounds.teach([("gong", 20), ("laser", 8)], args) == 1.5
    assert [words[0] for words in commands] == [
        "scripts/make_demo_clips.py", "extract_features.py", "extract_features.py", "train_lora.py"]
    training = commands[-1]
    begin = training.index("--data_dir")
    assert training[begin : begin + 5] == [
        "--data_dir", str(tmp_path / "gong"), str(tmp_path / "laser"), "--balance", "sets"]
    assert training[training.index("--steps") + 1] == "7" and training[training.index("--preserve") + 1] == "--data_dir"


def test_only_new_sounds_can_be_taught(tmp_path, commands, capsys):
    assert several_sounds.main(["--work_dir", str(tmp_path), "--sounds", "gong:2", "bell:3"]) == 2
    assert "--sounds bell: expected some of gong" in capsys.readouterr().err and not commands
