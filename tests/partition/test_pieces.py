"""Files of clips and tables: what others have written is never replaced; and whose caption a clip gets."""

from __future__ import annotations

import numpy as np
import pytest
import soundfile

from partition_clips import main
from selva.extraction.audio_set import plan_audio_set
from selva.partition.windows import Window, clip_captions, write_captions, write_clips

RATE = 8_000


@pytest.fixture
def arguments(tmp_path):
    (tmp_path / "in").mkdir()
    for seed, name in enumerate(("rain", "siren")):
        sound = np.random.default_rng(seed).uniform(-0.5, 0.5, 9 * RATE)
        soundfile.write(tmp_path / "in" / f"{name}.wav", sound, RATE, subtype="PCM_16")
        (tmp_path / "in" / f"{name}.txt").write_text(f"a {name}")
    return ["--data_dir", str(tmp_path / "in"), "--output_dir", str(tmp_path / "out"),
            "--write_audio", str(tmp_path / "sound")]


@pytest.mark.parametrize("name", ["rain_0.flac", "rain_0.txt"])
def test_a_file_of_the_user_is_not_replaced(arguments, tmp_path, capsys, name):
    (tmp_path / "sound").mkdir()
    soundfile.write(tmp_path / "sound" / "own.flac", np.zeros(RATE), RATE)
    own = (tmp_path / "sound" / "own.flac").rename(tmp_path / "sound" / name)
    before = own.read_bytes()
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert own.read_bytes() == before and "Move it away" in error
    assert f"sound/{name}: partition_clips.py did not write it" in error
    assert {path.name for path in (tmp_path / "sound").iterdir()} == {name, "siren_0.flac", "siren_0.txt"}
    assert "siren_0" in (tmp_path / "out" / "clips.tsv").read_text()
    assert "rain_0" not in (tmp_path / "out" / "clips.tsv").read_text()
    own.unlink()
    assert main(arguments) == 0


def test_own_pieces_are_replaced_unless_somebody_changed_them(arguments, tmp_path, capsys):
    assert main(arguments) == 0
    (tmp_path / "in" / "rain.txt").write_text("heavy rain")
    assert main(arguments) == 0 and (tmp_path / "sound" / "rain_0.txt").read_text() == "heavy rain\n"
    (tmp_path / "sound" / "rain_0.txt").write_text("my own words\n")
    assert main(arguments) == 1 and (tmp_path / "sound" / "rain_0.txt").read_text() == "my own words\n"
    assert "rain_0.txt: partition_clips.py did not write it" in capsys.readouterr().err


def test_the_same_sound_is_taken_as_it_is(arguments, tmp_path):
    assert main(arguments) == 0
    (tmp_path / ".sound.pieces.jsonl").unlink()  # as after an earlier version
    assert main(arguments) == 0


@pytest.mark.parametrize("name", ["captions.tsv", "clips.tsv", "clips_val.tsv"])
def test_tables_of_others_are_neither_replaced_nor_removed(arguments, tmp_path, capsys, name):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text("id\tcaption\nrain\tmy words\n")
    assert main(arguments) == 1 and f"{name}: would be overwritten" in capsys.readouterr().err
    assert (tmp_path / "out" / name).read_text() == "id\tcaption\nrain\tmy words\n"


def test_a_table_that_is_read_is_never_written(arguments, tmp_path, capsys):
    assert main(arguments) == 0
    before = (tmp_path / "out" / "captions.tsv").read_text()
    (tmp_path / "in" / "rain.txt").write_text("other")
    assert main([*arguments, "--captions", str(tmp_path / "out" / "captions.tsv")]) == 1
    assert (tmp_path / "out" / "captions.tsv").read_text() == before and "is an input" in capsys.readouterr().err


# -- captions ----------------------------------------------------------------------------------------------------------

WINDOWS = [Window("rain_0", "rain", 0, 9), Window("rain_1", "rain", 9, 18), Window("rain_1_0", "rain_1", 0, 9)]


def test_the_other_ids_tell_whose_caption_it_is():
    assert clip_captions(WINDOWS, {"rain": "heavy rain", "rain_1": "a dog"}) == {
        "rain_0": "heavy rain", "rain_1": "heavy rain", "rain_1_0": "a dog"}
    assert clip_captions(WINDOWS, {"rain_0": "a", "rain_1": "b"}) == {"rain_0": "a", "rain_1": "b"}
    assert clip_captions(WINDOWS, {"rain_0": "a", "rain_1": "b", "rain_1_0": "c"})["rain_1_0"] == "c"
    assert clip_captions(WINDOWS[:2], {"rain": "a", "rain_1": "b"}) == {"rain_0": "a", "rain_1": "b"}


@pytest.mark.parametrize("captions", [{"rain_1": "?"}, {"rain": "a", "rain_0": "b", "rain_1": "?"}])
def test_where_they_do_not_it_is_refused(captions):
    with pytest.raises(ValueError, match="rain_1: the name of a clip and of another recording"):
        clip_captions(WINDOWS, captions)


def test_a_recording_without_clips_keeps_its_caption_too(tmp_path):
    """It may be too short, or held out for validation."""
    (tmp_path / "r").mkdir()
    for name in ("rain", "rain_1"):
        (tmp_path / "r" / f"{name}.wav").touch()
    write_clips(tmp_path / "clips.tsv", WINDOWS[:2])
    write_captions(tmp_path / "captions.tsv", {"rain": "heavy rain", "rain_1": "a dog"})
    jobs = plan_audio_set(tmp_path / "clips.tsv", tmp_path / "captions.tsv", tmp_path / "r")
    assert [job.caption for job in jobs] == ["heavy rain", "heavy rain"]
    write_captions(tmp_path / "captions.tsv", {"rain_1": "a dog"})
    with pytest.raises(ValueError, match=r"captions\.tsv: rain_1: the name of a clip"):
        plan_audio_set(tmp_path / "clips.tsv", tmp_path / "captions.tsv", tmp_path / "r")


def test_the_note_of_a_clip_is_not_that_of_another(tmp_path):
    """Segment rain_1 has words; the recording rain_1 has none, and so has its segment."""
    (tmp_path / "in").mkdir()
    for name in ("rain", "rain_1"):
        soundfile.write(tmp_path / "in" / f"{name}.wav", np.full(2 * RATE, 0.1), RATE)
    (tmp_path / "s.tsv").write_text("name\tstart\tend\tid\ttext\nrain\t0\t1\train_1\theavy\nrain_1\t0\t1\tx\t\n")
    assert main(["--data_dir", str(tmp_path / "in"), "--output_dir", str(tmp_path / "out"), "--segments",
                 str(tmp_path / "s.tsv"), "--write_audio", str(tmp_path / "sound")]) == 0
    assert {p.name for p in (tmp_path / "sound").iterdir()} == {"rain_1.flac", "rain_1.txt", "x.flac"}
