"""selva.inference.compare: the list of setups, recorded sounds, figures and the sheet."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from make_data import put_sound
from make_media import make_video

from selva.inference import compare
from selva.inference.batch import AdapterSetup, BatchClip, Variation, common_clip_features
from selva.inference.compare import check_reference_dir, figures_table, mean_figures, read_compare_list, reference_sound
from selva.inference.outputs import SoundFiles
from selva.inference.request import SoundRequest
from selva.lora.merge import Adapter

RATE = 16_000


def tone(hertz: float = 440.0, seconds: float = 1.0, level: float = 0.5) -> np.ndarray:
    return (level * np.sin(2 * np.pi * hertz * np.arange(round(seconds * RATE)) / RATE)).astype(np.float32)


def knocks(times: list[float], seconds: float = 1.0) -> np.ndarray:
    t = np.arange(round(seconds * RATE)) / RATE
    return sum(0.5 * np.exp(-40 * np.clip(t - s, 0, None)) * np.sin(4000 * (t - s)) * (t >= s) for s in times)


# -- the list ----------------------------------------------------------------------------------------------------------


def test_the_list_names_files_strengths_and_labels(tmp_path):
    (tmp_path / "run").mkdir()
    for name in ("dog.pt", "my dog.safetensors", "run/adapter_final.pt"):
        (tmp_path / name).touch()
    (tmp_path / "list.txt").write_text(
        f"# what to hear\nbase\n\n{tmp_path}/dog.pt 0.5\ndog.pt -1 minus  # relative to this file\n"
        "'my dog.safetensors' 1e0 \"my dog, full\"\nrun/adapter_final.pt 1\n", encoding="utf-8",
    )
    lines = read_compare_list(tmp_path / "list.txt")
    assert [line.label for line in lines] == ["base", "dog 0.5", "minus", "my dog, full", "run final 1"]
    assert [line.adapters for line in lines] == [
        (), ((tmp_path / "dog.pt", 0.5),), ((tmp_path / "dog.pt", -1.0),), ((tmp_path / "my dog.safetensors", 1.0),),
        ((tmp_path / "run" / "adapter_final.pt", 1.0),),
    ]


def test_the_list_says_where_adapters_act(tmp_path):
    (tmp_path / "dog.pt").touch()
    (tmp_path / "list.txt").write_text("dog.pt 1\ndog.pt 1 times=0-0.7\ndog.pt 1 early times=0-0.5 layers=a.*,qkv\n")
    lines = read_compare_list(tmp_path / "list.txt")
    assert [line.label for line in lines] == ["dog 1", "dog 1 0-0.7", "early"]
    assert [line.times for line in lines] == [(0.0, 1.0), (0.0, 0.7), (0.0, 0.5)]
    assert [line.layers for line in lines] == [(), (), ("a.*", "qkv")]


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "it is empty"),
        ("dog.pt 1 times=0.7", "line 1: times=0.7: expected two times"),
        ("dog.pt 1 times=0.7-0.2", "line 1: times is .0.7, 0.2., expected two times 0 <= start < end"),
        ("# nothing\n", "it is empty"),
        ("nowhere.pt 1", "line 1: nowhere.pt: no such file"),
        ("base\ndog.pt", "line 2: 'dog.pt' is not `base`"),
        ("dog.pt full", "line 1: the strength is 'full', expected a number"),
        ("dog.pt 0,8", "line 1: the strength is '0,8', expected a number, with a point"),
        ("dog.pt nan", "the strength is 'nan'"),
        ("dog.pt 0_8", "the strength is '0_8'"),
        ("dog.pt 1 a b", "quote what has spaces"),
        ("dog.pt 1 ../up", "the label '../up' cannot name a folder"),
        ("dog.pt 1\ndog.pt 1.0", "line 2: the label 'dog 1' is used twice"),
        ("dog.pt 1 'open", "line 1: No closing quotation"),
        ("nowhere.pt 1\ndog.pt x", "line 1: .*; line 2: "),
    ],
)
def test_every_wrong_line_is_named(tmp_path, text, message):
    (tmp_path / "dog.pt").touch()
    (tmp_path / "list.txt").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_compare_list(tmp_path / "list.txt")


def test_compared_settings_share_their_clip_features(caplog):
    def setup(*clip_features: str) -> AdapterSetup:
        return AdapterSetup("x", [(Adapter({}, {"clip_features": c}), 1.0) for c in clip_features])

    base = AdapterSetup("base", [])
    assert common_clip_features("auto", [base, setup("use"), setup("use")]) == "use"
    assert common_clip_features("auto", [base, setup("empty")]) == "empty"
    assert common_clip_features("empty", [base, setup("use")]) == "empty"
    assert common_clip_features("auto", [base, base]) == "auto"
    assert common_clip_features("auto", [setup("use")]) == "auto"
    assert common_clip_features("auto", [setup("use"), setup("empty")]) == "auto" and "its own" in caplog.text


# -- recorded sounds ---------------------------------------------------------------------------------------------------


def test_paths_of_the_list_may_have_backslashes_and_spaces(tmp_path):
    (tmp_path / "runs" / "my dog").mkdir(parents=True)
    (tmp_path / "runs" / "my dog" / "adapter_final.pt").touch()
    (tmp_path / "list.txt").write_bytes('"runs\\my dog\\adapter_final.pt" 0.5  # half\n'.encode("utf-16"))
    (line,) = read_compare_list(tmp_path / "list.txt")
    assert line.adapters == ((tmp_path / "runs" / "my dog" / "adapter_final.pt", 0.5),)
    assert line.label == "my dog final 0.5"


def test_only_line_ends_end_a_line_of_the_list(tmp_path):
    (tmp_path / "a.pt").touch()
    (tmp_path / "list.txt").write_text(f"{tmp_path}/a.pt 1 'one\u2028two'\r\nbase\r", encoding="utf-8", newline="")
    assert [line.label for line in read_compare_list(tmp_path / "list.txt")] == ["one\u2028two", "base"]


def test_the_recorded_sound_is_that_of_the_folder_the_video_or_the_features(tmp_path):
    loud, quiet = tone(level=0.5, seconds=2.0), tone(level=0.1, seconds=2.0)
    video = make_video(tmp_path / "a.mp4", 2.0, sound=loud[None])
    (tmp_path / "refs").mkdir()
    put_sound(tmp_path / "refs" / "a.wav", quiet, RATE)
    put_sound(tmp_path / "b.wav", quiet, RATE)  # beside b.npz
    request = SoundRequest(video=video, start_sec=0.5)

    def level(sound: torch.Tensor) -> float:
        return sound[4000:12_000].abs().max().item()

    assert level(reference_sound("a", request, None, 1.0, RATE)) == pytest.approx(0.5, abs=0.05)
    assert level(reference_sound("a", request, tmp_path / "refs", 1.0, RATE)) == pytest.approx(0.1, abs=0.01)
    assert reference_sound("other", request, tmp_path / "refs", 1.0, RATE) is None
    features = SoundRequest(features=tmp_path / "b.npz")
    assert level(reference_sound("b", features, None, 1.0, RATE)) == pytest.approx(0.1, abs=0.01)
    assert reference_sound("a", SoundRequest(video=make_video(tmp_path / "mute.mp4", 1.0)), None, 1.0, RATE) is None
    assert reference_sound("rain", SoundRequest(prompt="rain"), None, 1.0, RATE) is None


def test_the_recorded_sound_begins_with_the_clip_and_has_its_length_and_rate(tmp_path):
    video = make_video(tmp_path / "a.mp4", 2.0, sound=knocks([1.5], 2.0)[None].astype(np.float32))
    sound = reference_sound("a", SoundRequest(video=video, start_sec=1.0), None, 1.2, 8000)
    assert len(sound) == 9600 and sound.abs().argmax() / 8000 == pytest.approx(0.5, abs=0.005)
    assert sound[8200:].abs().max() == 0  # after the end of the recording


@pytest.mark.parametrize("name", ["a.ogg", "a.WAV", "a.mp3", "a.aiff"])
def test_a_recorded_sound_of_any_kind_is_found(tmp_path, name):
    soundfile.write(tmp_path / name, tone(level=0.5, seconds=1.0), RATE)
    for request, folder in ((SoundRequest(features=tmp_path / "a.npz"), None), (SoundRequest(prompt="a"), tmp_path)):
        found = reference_sound("a", request, folder, 1.0, RATE)
        assert found is not None and found.abs().max().item() == pytest.approx(0.5, abs=0.1)
    check_reference_dir(tmp_path)


def test_a_clip_without_a_recorded_sound_in_the_folder_is_said(tmp_path, caplog):
    put_sound(tmp_path / "a.wav", tone(level=0.5, seconds=1.0), RATE)
    soundfile.write(tmp_path / "a.flac", tone(level=0.5, seconds=1.0), RATE)
    assert reference_sound("b", SoundRequest(prompt="b"), tmp_path, 1.0, RATE) is None
    assert f"b: not compared with a recorded sound, as --reference {tmp_path} has none of this name" in caplog.text
    assert reference_sound("a", SoundRequest(prompt="a"), tmp_path, 1.0, RATE) is not None
    assert "taken: a.wav, not a.flac" in caplog.text


def test_a_recorded_sound_that_is_gone_ends_nothing(tmp_path, caplog):
    try:
        (tmp_path / "a.wav").symlink_to(tmp_path / "nothing.wav")
    except OSError:
        pytest.skip("this system allows no links")
    assert reference_sound("a", SoundRequest(prompt="a"), tmp_path, 1.0, RATE) is None
    assert "a: not compared with its recorded sound: " in caplog.text


def test_a_silent_recording_is_said_and_not_compared_with(tmp_path, caplog):
    put_sound(tmp_path / "a.wav", np.zeros(RATE, np.float32), RATE)
    assert reference_sound("a", SoundRequest(prompt="x"), tmp_path, 1.0, RATE) is None
    assert "a: not compared with its recorded sound: " in caplog.text


def test_a_reference_folder_without_sounds_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"expected a folder with sounds or videos \(\.wav "):
        check_reference_dir(tmp_path)


# -- figures and sheet -------------------------------------------------------------------------------------------------


def clip_of(folder: Path, name: str, sounds: dict[int, np.ndarray], seeds: tuple[int, ...] = (1,)) -> BatchClip:
    """Return a clip whose variations were made: ``sounds`` by setup, for every seed."""
    variations = []
    for index, sound in sounds.items():
        for seed in seeds:
            path = folder / str(index) / f"{name}_{seed}.flac"
            path.parent.mkdir(parents=True, exist_ok=True)
            soundfile.write(path, sound, RATE, subtype="PCM_24")
            variations.append(Variation(index, seed, SoundFiles(path, None), argparse.Namespace()))
    return BatchClip(name, SoundRequest(prompt="a knock"), variations, made=list(variations))


def test_figures_tell_the_settings_apart(tmp_path):
    true, shifted = knocks([0.2, 0.5, 0.8]), knocks([0.35, 0.65, 0.95])
    (tmp_path / "refs").mkdir()
    put_sound(tmp_path / "refs" / "a.wav", true, RATE)
    clips = [clip_of(tmp_path, "a", {0: shifted, 1: true}, seeds=(1, 2)), clip_of(tmp_path, "b", {0: shifted, 1: true})]
    setups = [AdapterSetup("base", []), AdapterSetup("dog", [], [(Path("dog.pt"), 0.5)])]
    paths = compare.write_comparison(tmp_path / "out", clips, setups, tmp_path / "refs")
    assert [path.name for path in paths] == ["comparison.json", "comparison.png", "comparison.html"]
    content = json.loads(paths[0].read_text())
    base, dog = (setting["mean"] for setting in content["settings"])
    assert base["onset_f1"] == 0 and dog["onset_f1"] == 1
    assert dog["log_spectral_distance_db"] < 0.5 < base["log_spectral_distance_db"]
    assert content["settings"][1]["adapters"] == [["dog.pt", 0.5]]
    assert [(s["clip"], s["seed"], s["setting"], s["has_reference"]) for s in content["sounds"]] == [
        ("a", 1, "base", True), ("a", 1, "dog", True), ("a", 2, "base", True), ("a", 2, "dog", True),
        ("b", 1, "base", False), ("b", 1, "dog", False),
    ]
    lines = figures_table(setups, [base, dog])
    assert len({len(line) for line in lines}) == 1 and lines[2].startswith("dog") and "1.00" in lines[2]


def test_silent_sounds_are_named_and_not_in_the_means(tmp_path, caplog):
    (tmp_path / "refs").mkdir()
    put_sound(tmp_path / "refs" / "a.wav", knocks([0.2, 0.5, 0.8]), RATE)
    clips = [clip_of(tmp_path, "a", {0: knocks([0.2, 0.5, 0.8]), 1: np.zeros(RATE, np.float32)})]
    paths = compare.write_comparison(
        tmp_path / "out", clips, [AdapterSetup("base", []), AdapterSetup("dog", [])], tmp_path / "refs")
    base, dog = (setting["mean"] for setting in json.loads(paths[0].read_text())["settings"])
    assert base["log_spectral_distance_db"] is not None and dog["log_spectral_distance_db"] is None
    assert "1 silent sound among 2: " in caplog.text and "the means leave out: a, seed 1, dog" in caplog.text


def test_means_leave_out_what_has_no_value():
    assert mean_figures([{"a": 1.0, "b": None}, {"a": 3.0, "b": None}, {"a": None}]) == {"a": 2.0, "b": None}


def test_a_sheet_has_a_row_per_clip_and_a_column_per_setting(tmp_path, monkeypatch):
    """Many rows go on several sheets, so that each can be looked at; nothing is left out."""
    monkeypatch.setattr(compare, "ROWS_PER_SHEET", 2)
    clips = [clip_of(tmp_path, name, {0: tone(500), 1: tone(2000)}) for name in "abc"]
    clips.append(BatchClip("failed", SoundRequest(prompt="x"), [], problem="broken"))
    setups = [AdapterSetup("low", []), AdapterSetup("high", [])]
    sheets = compare.write_comparison(tmp_path / "out", clips, setups, None)[1:]
    assert [path.name for path in sheets] == ["comparison.png", "comparison_2.png", "comparison.html"]
    assert sheets.pop().read_text(encoding="utf-8").count("<audio") == 6
    heights, widths = zip(*(read_png(path).shape[:2] for path in sheets), strict=True)
    assert heights[0] - heights[1] == pytest.approx(compare.CELL_HEIGHT_IN * 100, abs=1) and widths[0] == widths[1]


def read_png(path: Path) -> np.ndarray:
    from matplotlib.image import imread

    return imread(path)
