"""inspect_dataset.py: the table, the files that it writes, its exit codes."""

from __future__ import annotations

import importlib.util
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from make_data import put_memmap
from make_media import number_in
from PIL import Image

from selva.data.inspection import overview
from selva.data.inspection.measures import inspect
from selva.data.inspection.overview import choose_clips, find_videos, frame_strip

SCRIPT = Path(__file__).parents[2] / "scripts" / "inspect_dataset.py"


@pytest.fixture(scope="module")
def main():
    spec = importlib.util.spec_from_file_location("inspect_dataset", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def test_a_folder_as_extraction_wrote_it(main, feature_dir, clip_dir, tmp_path, capsys):
    before = sorted(path.name for path in feature_dir.iterdir())
    assert main([str(feature_dir), "--videos", str(clip_dir), "--json", str(tmp_path / "a.json"),
                 "--png", str(tmp_path / "a.png")]) == 0
    captured = capsys.readouterr()
    rows = captured.out.splitlines()
    assert [row.split()[:2][-1 if row[0] != " " else 0] for row in rows[1:7]] == [f"knock_{i}" for i in range(6)]
    assert all(len(row) <= 100 for row in rows[:7]) and "cannot be used: 0" in rows[-1]
    assert rows[0].split() == ["clip", "sec", "LUFS", "peak", "dBTP", "silent", "clipped", "norm", "prompt"]
    assert len(json.loads((tmp_path / "a.json").read_text())["clips"]) == 6
    picture = np.asarray(Image.open(tmp_path / "a.png").convert("RGB"))
    assert picture.shape[1] > 1000 and len(np.unique(picture.reshape(-1, 3), axis=0)) > 100
    assert sorted(path.name for path in feature_dir.iterdir()) == before


def test_something_unusable_is_exit_code_1(main, feature_dir, tmp_path, capsys):
    (feature_dir / "knock_2.flac").unlink()
    assert main([str(feature_dir), "--png", str(tmp_path / "a.png")]) == 1
    captured = capsys.readouterr()
    assert "knock_2.npz: no sound beside it" in captured.out and (tmp_path / "a.png").exists()
    (feature_dir / "knock_3.flac").write_bytes(b"rubbish")
    assert main([str(feature_dir), "--png", str(tmp_path / "a.png"), "--png_clips", "2"]) == 1


def test_videos_before_extraction_show_their_own_frames(main, clip_dir, tmp_path, capsys):
    assert main([str(clip_dir), "--png", str(tmp_path / "a.png")]) == 0
    assert "6 sounds without features" in capsys.readouterr().out


def test_subfolders_are_taken_if_asked_for(main, clip_dir, tmp_path, capsys):
    for day in ("monday", "tuesday"):
        (tmp_path / "in" / day).mkdir(parents=True)
        shutil.copy(clip_dir / "knock_0.mp4", tmp_path / "in" / day / "knock.mp4")
    assert main([str(tmp_path / "in")]) == 1 and "--recursive looks into" in capsys.readouterr().err
    assert main([str(tmp_path / "in"), "--recursive", "--png", str(tmp_path / "a.png")]) == 0
    out = capsys.readouterr().out
    assert "monday_knock" in out and "tuesday_knock" in out and "2 sounds without features" in out


def test_a_memmap(main, tmp_path, capsys):
    put_memmap(tmp_path / "train")
    assert main([str(tmp_path / "train"), "--png", str(tmp_path / "a.png"), "--variant", "tiny_16k"]) == 0
    assert "5 rows of a memmap" in capsys.readouterr().out and (tmp_path / "a.png").exists()


def test_wrong_usage(main, tmp_path, capsys):
    assert main([]) == 2 and main([str(tmp_path), str(tmp_path)]) == 2
    assert main([str(tmp_path), "--videos", str(tmp_path / "none")]) == 2
    assert main([str(tmp_path / "none")]) == 1
    assert main([str(tmp_path)]) == 1
    assert "holds neither features" in capsys.readouterr().err
    assert main(["--help"]) == 0


def test_a_settings_file(main, feature_dir, tmp_path, capsys):
    (tmp_path / "settings.yaml").write_text(f"data_dir: {feature_dir}\njson: {tmp_path / 'a.json'}\n")
    assert main(["--config", str(tmp_path / "settings.yaml")]) == 0
    assert (tmp_path / "a.json").exists() and "6 pairs" in capsys.readouterr().out


def test_only_png_and_json_are_written(main, feature_dir, tmp_path, capsys):
    assert main([str(feature_dir), "--png", str(tmp_path / "a.jpg")]) == 2
    assert "a.jpg: ends in .jpg, expected a name that ends in .png" in capsys.readouterr().err
    assert main([str(feature_dir), "--json", str(tmp_path / "prompts.txt")]) == 2
    assert "expected a name that ends in .json" in capsys.readouterr().err


def test_nothing_in_the_folder_and_no_other_file_is_replaced(main, feature_dir, tmp_path, capsys):
    (feature_dir / "prompts.txt").write_text("knock_0: a knock")
    for flag, name in (("--json", "prompts.txt"), ("--json", "new.json"), ("--png", "sub/new.png")):
        assert main([str(feature_dir), flag, str(feature_dir / name)]) == 2
        assert "in which nothing is changed; name a file outside" in capsys.readouterr().err
    assert (feature_dir / "prompts.txt").read_text() == "knock_0: a knock"
    for flag, name in (("--json", "mine.json"), ("--png", "mine.png")):
        (tmp_path / name).write_text("{}")
        assert main([str(feature_dir), flag, str(tmp_path / name)]) == 2
        assert f"{name}: is there already, and was not written by this program" in capsys.readouterr().err
        assert (tmp_path / name).read_text() == "{}"
    for _ in range(2):  # its own files are made anew
        assert main([str(feature_dir), "--json", str(tmp_path / "a.json"), "--png", str(tmp_path / "a.png")]) == 0


def test_the_clips_that_deserve_a_look_are_drawn_first(feature_dir):
    for index in (4, 5):
        (feature_dir / f"knock_{index}.flac").write_bytes(b"rubbish")
    inspection = inspect(feature_dir)
    for clip in inspection.clips[:4]:
        clip.notes.clear()
    inspection.clips[3].notes.append("odd")
    assert choose_clips(inspection, 1) == [4] and choose_clips(inspection, 3) == [3, 4, 5]
    assert choose_clips(inspection, 5) == [0, 1, 3, 4, 5] and choose_clips(inspection, 99) == list(range(6))


def test_videos_are_found_by_what_the_features_were_made_from(feature_dir, clip_dir, tmp_path):
    inspection = inspect(feature_dir)
    (feature_dir / "knock_1.npz").rename(feature_dir / "renamed.npz")
    (feature_dir / "knock_1.flac").rename(feature_dir / "renamed.flac")
    videos = find_videos(inspect(feature_dir), clip_dir)
    assert videos["renamed"] == (clip_dir / "knock_1.mp4", 0.0) and len(videos) == 6
    # Extraction's own manifest names the videos.
    assert len(find_videos(inspection, None)) == 5
    (feature_dir / "manifest.jsonl").unlink()
    assert find_videos(inspection, tmp_path / "features") == {} == find_videos(inspection, None)


def test_frames_are_never_those_of_another_video_of_the_same_name(feature_dir, clip_dir, tmp_path):
    for day, name in (("monday", "knock_1.mp4"), ("tuesday", "knock_0.mp4")):
        (tmp_path / day).mkdir()
        shutil.copy(clip_dir / name, tmp_path / day / "knock_0.mp4")
    (feature_dir / "manifest.jsonl").unlink()
    videos = find_videos(inspect(feature_dir), tmp_path)
    assert videos["knock_0"] == (tmp_path / "tuesday" / "knock_0.mp4", 0.0)
    assert videos["knock_1"] == (tmp_path / "monday" / "knock_0.mp4", 0.0) and len(videos) == 2


def test_frames_stand_above_their_time(tmp_path, clip_dir):
    strip = frame_strip(clip_dir / "knock_0.mp4", 0.0, 2.0, shape=6.0)  # the video is 96 x 64: four frames
    assert strip is not None
    assert strip.shape == (overview.TILE_PIXELS, 4 * 144, 3) and strip.dtype == np.uint8
    for index, time in enumerate((0.25, 0.75, 1.25, 1.75)):
        tile = strip[:, index * 144 : (index + 1) * 144]
        assert number_in(tile.transpose(2, 0, 1)) == math.ceil(time * 25)
    assert frame_strip(tmp_path / "none.mp4", 0.0, 2.0, 6.0) is None
