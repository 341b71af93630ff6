"""partition_clips.py: its table, its messages about files that it cannot use, its exit codes."""

from __future__ import annotations

import errno
import json

import numpy as np
import pytest
import soundfile
from make_media import make_video

from partition_clips import main
from selva.extraction.audio_set import plan_audio_set
from selva.partition import cut
from selva.partition.windows import Window, read_captions, read_clips


def record(folder, name, seconds, rate=8_000):
    folder.mkdir(exist_ok=True)
    soundfile.write(folder / name, np.zeros(round(seconds * rate)), rate)


@pytest.fixture
def recordings(tmp_path):
    for name, seconds in (("b.flac", 20), ("a.wav", 9), ("c.ogg", 8.0), ("d.flac", 17)):
        record(tmp_path / "in", name, seconds)
    return tmp_path / "in"


def test_the_table(recordings, tmp_path, capsys):
    assert main(["--data_dir", str(recordings), "--output_dir", str(tmp_path / "out")]) == 0
    captured = capsys.readouterr()
    assert captured.out == f"{tmp_path / 'out' / 'clips.tsv'}\n"
    windows = read_clips(tmp_path / "out" / "clips.tsv")
    assert [(window.id, window.start_sample, window.end_sample) for window in windows] == [
        ("a_0", 0, 64_800),
        ("b_0", 0, 64_800),
        ("b_1", 95_200, 160_000),
        ("d_0", 0, 64_800),
        ("d_1", 71_200, 136_000),
    ]
    assert "c.ogg: 8.00 s long, a clip takes 8.1 s" in captured.err
    assert "5 clips from 3 of 4 recordings, 0 unreadable" in captured.err
    assert (tmp_path / "out" / "clips_config.yaml").exists()


def test_a_range_of_the_sorted_files(recordings, tmp_path, capsys):
    arguments = ["--data-dir", str(recordings), "--output-dir", str(tmp_path / "out")]
    assert main([*arguments, "--start", "1", "--end", "3"]) == 0
    assert capsys.readouterr().out.strip().endswith("clips_1_3.tsv")
    assert {window.name for window in read_clips(tmp_path / "out" / "clips_1_3.tsv")} == {"b"}
    assert main([*arguments, "--start", "3"]) == 0
    assert {window.name for window in read_clips(tmp_path / "out" / "clips_3_4.tsv")} == {"d"}
    for wrong in (["--start", "4"], ["--start", "-1"], ["--start", "2", "--end", "2"], ["--start", "x"], ["--unknown"]):
        assert main([*arguments, *wrong]) == 2
    assert "0 ... 3" in capsys.readouterr().err


def test_unreadable_files_are_named_and_the_rest_is_done(recordings, tmp_path, capsys):
    (recordings / "e.wav").write_bytes(b"rubbish")
    (recordings / "notes.txt").write_text("ignored")
    assert main(["--data_dir", str(recordings), "--output_dir", str(tmp_path / "out")]) == 1
    captured = capsys.readouterr()
    assert "e.wav: cannot be read" in captured.err and "1 unreadable" in captured.err
    assert "notes" not in captured.err
    assert len(read_clips(tmp_path / "out" / "clips.tsv")) == 5


def test_equal_names_are_taken_once(recordings, tmp_path, capsys):
    record(recordings, "a.flac", 30)
    record(recordings, "d.mp3", 60)
    assert main(["--data_dir", str(recordings), "--output_dir", str(tmp_path / "out")]) == 0
    windows = read_clips(tmp_path / "out" / "clips.tsv")
    assert [window.id for window in windows if window.name in "ad"] == ["a_0", "a_1", "a_2", "d_0", "d_1"]
    error = capsys.readouterr().err
    assert "a.wav: a.flac has the same name" in error and "d.mp3: d.flac has the same name" in error


def test_sound_that_only_pyav_reads(tmp_path):
    (tmp_path / "in").mkdir()
    make_video(tmp_path / "in" / "talk.mp4", 9.0, fps=5, sound=np.zeros((1, 72_000), np.float32), rate=8_000)
    (tmp_path / "in" / "talk.mp4").rename(tmp_path / "in" / "talk.m4a")
    assert main(["--data_dir", str(tmp_path / "in"), "--output_dir", str(tmp_path / "out")]) == 0
    (window,) = read_clips(tmp_path / "out" / "clips.tsv")
    assert (window.id, window.start_sample, window.end_sample) == ("talk_0", 0, 64_800)


def test_nothing_to_do_is_an_error_and_writes_nothing(tmp_path, capsys):
    output = ["--output_dir", str(tmp_path / "out")]
    assert main(["--data_dir", str(tmp_path / "nowhere"), *output]) == 2
    assert "nowhere: no such folder" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert main(["--data_dir", str(tmp_path / "empty"), *output]) == 1
    assert "no recordings in this folder (its subfolders were not searched; --recur" in capsys.readouterr().err
    (tmp_path / "empty" / "a.MP4").touch()
    assert main(["--data_dir", str(tmp_path / "empty"), *output]) == 1
    assert "a.MP4: a video; extract_features.py --windows cuts videos" in capsys.readouterr().err
    record(tmp_path / "short", "a.wav", 3)
    assert main(["--data_dir", str(tmp_path / "short"), *output]) == 1
    assert "none of 1 recording gives a clip of 8.1 s; --min_length_sec takes shorter" in capsys.readouterr().err
    assert main(["--data_dir", str(tmp_path / "short"), "--output_dir", str(tmp_path / "made"), "--min_length_sec",
                 "2"]) == 0
    assert not (tmp_path / "out").exists()
    assert main(["--help"]) == 0


def test_a_shorter_minimum_and_another_number_of_windows(recordings, tmp_path):
    arguments = ["--data_dir", str(recordings), "--output_dir", str(tmp_path / "out")]
    assert main([*arguments, "--min_length_sec", "8", "--max_segments", "1"]) == 0
    windows = read_clips(tmp_path / "out" / "clips.tsv")
    assert [(w.id, w.end_sample) for w in windows] == [
        ("a_0", 64_800), ("b_0", 64_800), ("c_0", 64_000), ("d_0", 64_800)
    ]
    assert main([*arguments, "--min_length_sec", "10"]) == 0
    assert {w.name for w in read_clips(tmp_path / "out" / "clips.tsv")} == {"b", "d"}


def test_what_is_left_out_is_listed_with_the_reason(recordings, tmp_path, capsys):
    (recordings / "e.wav").write_bytes(b"rubbish")
    (recordings / "film.mp4").write_bytes(b"rubbish")
    (recordings / "b.mp4").write_bytes(b"the pictures of b.flac")
    record(recordings, "a.ogg", 30)
    arguments = ["--data_dir", str(recordings), "--output_dir", str(tmp_path / "out"), "--skip_silence"]
    soundfile.write(recordings / "b.flac", np.random.default_rng(0).standard_normal(160_000) / 9, 8_000)
    assert main(arguments) == 1
    lines = (tmp_path / "out" / "left_out.tsv").read_text().splitlines()
    assert lines[0] == "file\tid\tstart_sec\tend_sec\treason"
    rows = {tuple(line.split("\t")[:4]): line.split("\t")[4] for line in lines[1:]}
    silent = "more than half of it is silent, below -60 dB"
    assert rows.pop(("e.wav", "", "", "")).startswith("cannot be read")
    assert rows == {
        ("a.wav", "", "0.000", "8.100"): silent,
        ("c.ogg", "", "", ""): "8.00 s long, a clip takes 8.1 s; --min_length_sec 8 takes it as it is",
        ("d.flac", "", "0.000", "8.100"): silent, ("d.flac", "", "8.900", "17.000"): silent,
        ("film.mp4", "", "", ""): "a video; extract_features.py --windows cuts videos",
        ("a.ogg", "", "", ""): "a.wav has the same name and is used instead",
    }
    assert capsys.readouterr().err.count("skipped") == 7
    assert {w.name for w in read_clips(tmp_path / "out" / "clips.tsv")} == {"b"}


def test_long_lists_are_cut_on_the_terminal(tmp_path, capsys):
    for index in range(30):
        record(tmp_path / "in", f"short_{index:02d}.wav", 1)
    record(tmp_path / "in", "z.wav", 9)
    (tmp_path / "in" / "zz.wav").write_bytes(b"rubbish")
    assert main(["--data_dir", str(tmp_path / "in"), "--output_dir", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert error.count("skipped") == 20 and "zz.wav" in error and "and 11 more, see" in error
    assert len((tmp_path / "out" / "left_out.tsv").read_text().splitlines()) == 32


def test_no_recording_is_in_both_parts_of_a_split(tmp_path, capsys):
    for index in range(10):
        record(tmp_path / "in", f"take_{index}.flac", 20 + index / 100)
    arguments = ["--data_dir", str(tmp_path / "in"), "--output_dir", str(tmp_path / "out"), "--val_fraction", "0.3"]
    assert main(arguments) == 0
    assert capsys.readouterr().out.splitlines() == [
        str(tmp_path / "out" / name) for name in ("clips.tsv", "clips_val.tsv")
    ]

    def both():
        tables = [read_clips(tmp_path / "out" / name) for name in ("clips.tsv", "clips_val.tsv")]
        assert [len(table) for table in tables] == [14, 6]
        train, val = ({w.name for w in table} for table in tables)
        assert len(train) == 7 and len(val) == 3 and not train & val
        return val

    val = both()
    assert main(arguments) == 0 and both() == val
    assert main([*arguments, "--seed", "7"]) == 0 and both() != val
    capsys.readouterr()
    assert main(arguments[:4]) == 0  # without a split nothing may stay in a table of held-out clips
    assert not (tmp_path / "out" / "clips_val.tsv").exists()
    assert "clips_val.tsv is now called clips_val.tsv.bak" in capsys.readouterr().err
    assert len(read_clips(tmp_path / "out" / "clips_val.tsv.bak")) == 6
    assert len(read_clips(tmp_path / "out" / "clips.tsv")) == 20


@pytest.mark.parametrize("table", ["clips.tsv", "captions.tsv", "left_out.tsv"])
def test_a_table_that_was_edited_is_never_written_anew(recordings, tmp_path, capsys, table):
    (recordings / "a.txt").write_text("a siren\n")
    record(recordings, "short.wav", 3)
    arguments = ["--data_dir", str(recordings), "--output_dir", str(tmp_path / "out"), "--seed", "3"]
    assert main(arguments) == 0 == main(arguments)
    path = tmp_path / "out" / table
    path.write_text(path.read_text() + "\n")
    before = {file: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    assert main(arguments) == 1
    assert f"{path}: has been edited since" in capsys.readouterr().err
    assert before == {file: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    assert main(["--config", str(tmp_path / "out" / "clips_config.yaml"), "--output_dir", str(tmp_path / "new")]) == 0


def test_a_recording_of_eight_seconds_gets_a_hint(tmp_path, capsys):
    record(tmp_path / "in", "a.wav", 8)
    arguments = ["--data_dir", str(tmp_path / "in"), "--output_dir", str(tmp_path / "out")]
    assert main(arguments) == 1
    err = capsys.readouterr().err
    assert "8.00 s long, a clip takes 8.1 s; --min_length_sec 8 takes it as it is" in err
    assert "none of 1 recording gives" in err
    assert main([*arguments, "--min_length_sec", "8"]) == 0
    assert "1 clip from 1 of 1 recording," in capsys.readouterr().err


def test_captions_of_a_table_go_before_text_files_and_are_keyed_by_recording(recordings, tmp_path, capsys):
    (recordings / "a.txt").write_text("from the text file")
    (recordings / "b.txt").write_text("not this one")
    (tmp_path / "words.csv").write_text("id,caption\nb,a siren\nx,nothing\n")
    arguments = ["--data_dir", str(recordings), "--output_dir", str(tmp_path / "out")]
    assert main([*arguments, "--captions", str(tmp_path / "words.csv")]) == 0
    captured = capsys.readouterr()
    assert captured.out.splitlines()[1:] == [str(tmp_path / "out" / "captions.tsv")]
    assert "no recording and no clip for x" in captured.err
    assert read_captions(tmp_path / "out" / "captions.tsv") == {"a": "from the text file", "b": "a siren"}


def test_of_several_captions_in_a_text_the_last_counts(recordings, tmp_path, caplog):
    (recordings / "a.txt").write_text("rain\nheavy rain\n")
    assert main(["--data_dir", str(recordings), "--output_dir", str(tmp_path / "out")]) == 0
    assert read_captions(tmp_path / "out" / "captions.tsv") == {"a": "heavy rain"}
    assert "of which the last counts: a.txt" in caplog.text


def test_segments_of_whisper_become_clips_with_captions_and_sound(tmp_path, capsys):
    sound = np.random.default_rng(0).standard_normal(80_000) / 9
    (tmp_path / "in").mkdir()
    soundfile.write(tmp_path / "in" / "talk.wav", sound, 8_000)
    record(tmp_path / "in", "rain.wav", 9)
    segments = [{"start": 0.5, "end": 4.0, "text": " Good morning. "}, {"start": 4.0, "end": 4.2, "text": "Oh."}]
    (tmp_path / "talk.json").write_text(json.dumps({"segments": segments}))
    (tmp_path / "more.tsv").write_text("name\tstart\tend\nrain\t1\t3\n")
    (tmp_path / "in" / "rain.txt").write_text("heavy rain")
    arguments = ["--data_dir", str(tmp_path / "in"), "--output_dir", str(tmp_path / "out"),
                 "--segments", str(tmp_path / "talk.json"), str(tmp_path / "more.tsv"),
                 "--write_audio", str(tmp_path / "out" / "sound")]
    assert main(arguments) == 0
    assert read_clips(tmp_path / "out" / "clips.tsv") == [
        Window("rain_0", "rain", 8_000, 24_000), Window("talk_0", "talk", 4_000, 32_000)
    ]
    captions = read_captions(tmp_path / "out" / "captions.tsv")
    assert captions == {"rain_0": "heavy rain", "talk_0": "Good morning."}
    assert sorted(p.name for p in (tmp_path / "out" / "sound").iterdir()) == [
        "rain_0.flac", "rain_0.txt", "talk_0.flac", "talk_0.txt"
    ]
    assert soundfile.info(tmp_path / "out" / "sound" / "talk_0.flac").frames == 28_000
    assert "talk_1 (4.00 to 4.20 s): 0.20 s long" in capsys.readouterr().err
    table = (tmp_path / "out" / "clips.tsv").read_text()
    (tmp_path / "out" / "clips.tsv").unlink()
    assert main(["--config", str(tmp_path / "out" / "clips_config.yaml")]) == 0
    assert (tmp_path / "out" / "clips.tsv").read_text() == table
    (tmp_path / "more.tsv").write_text("name\tstart\tend\nrian\t1\t3\n")
    assert main(arguments) == 1
    assert "no recording called 'rian'" in capsys.readouterr().err


def put_talk(folder):
    """Write 40 s of noise with silence from 10 to 12 s, and four segments of it, the first two 0.2 s apart."""
    folder.mkdir()
    sound = np.random.default_rng(0).standard_normal(320_000) / 9
    sound[80_000:96_000] = 0
    soundfile.write(folder / "talk.wav", sound, 8_000)
    rows = ("1\t4\ta long sentence", "4.2\t10.5\tand more of it", "20\t20.9\tshort sound but much text", "30\t34\tOh")
    table = folder.parent / "talk.tsv"
    table.write_text("name\tstart\tend\ttext\n" + "".join(f"talk\t{row}\n" for row in rows))
    return ["--data_dir", str(folder), "--segments", str(table)]


def test_merged_moved_and_trimmed_segments_are_what_is_written(tmp_path, capsys):
    arguments = put_talk(tmp_path / "in")
    out = tmp_path / "out"
    assert main([*arguments, "--output_dir", str(out), "--write_audio", str(out / "sound"), "--merge_gap_sec", "0.3",
                 "--slice_start_offset", "-0.5", "--slice_end_offset", "0.5", "--trim_silence"]) == 0
    assert [(w.id, w.start_sample / 8_000, w.end_sample / 8_000) for w in read_clips(out / "clips.tsv")] == [
        ("talk_0", 0.5, 10), ("talk_2", 19.5, 21.4), ("talk_3", 29.5, 34.5)]
    assert read_captions(out / "captions.tsv")["talk_0"] == "a long sentence and more of it"
    assert soundfile.info(out / "sound" / "talk_0.flac").frames == 76_000
    assert (out / "sound" / "talk_0.txt").read_text() == "a long sentence and more of it\n"
    err = capsys.readouterr().err
    assert "4 segments became 3" in err
    assert "1 clip is longer than the 8.1 s of a clip: talk_0 (9.50 s)" in err
    assert "2 of 3 clips are shorter than 8 s" in err


def test_short_clips_are_held_out(tmp_path, capsys):
    arguments = put_talk(tmp_path / "in")

    def parts(*flags):
        assert main([*arguments, "--output_dir", str(tmp_path / "out"), *flags]) == 0
        names = ("clips.tsv", "clips_val.tsv")
        return [[w.id[-1] for w in read_clips(path)] if path.exists() else None
                for path in (tmp_path / "out" / name for name in names)]

    assert parts() == [["0", "1", "2", "3"], None]
    assert parts("--val_below_sec", "3") == [["0", "1", "3"], ["2"]]  # 3 s is not below 3 s
    assert parts("--val_below_text", "3") == [["0", "1", "2"], ["3"]]
    assert parts("--val_below_text", "2") == [["0", "1", "2", "3"], None]
    capsys.readouterr()
    assert parts("--val_below_text", "3", "--val_below_sec", "2") == [["0", "1"], ["2", "3"]]
    assert "2 clips are held out because they or their captions are short" in capsys.readouterr().err
    assert main([*arguments, "--output_dir", str(tmp_path / "out"), "--val_below_sec", "10"]) == 1
    assert "no clip would be left to train on: 4 clips held out for validation" in capsys.readouterr().err


def test_pieces_that_cannot_be_read_leave_the_table(recordings, tmp_path, capsys):
    (recordings / "b.flac").write_bytes((recordings / "b.flac").read_bytes()[:200])
    arguments = ["--data_dir", str(recordings), "--output_dir", str(tmp_path / "out"),
                 "--write_audio", str(tmp_path / "sound")]
    assert main(arguments) == 1
    kept = {w.id for w in read_clips(tmp_path / "out" / "clips.tsv")}
    assert kept == {"a_0", "d_0", "d_1"} == {p.stem for p in (tmp_path / "sound").glob("*.flac")}
    assert "b.flac" in (tmp_path / "out" / "left_out.tsv").read_text() and "1 unreadable" in capsys.readouterr().err
    assert main([*arguments, "--max_segments", "1"]) == 1
    assert "sounds that are no clip of this run: d_1.flac" in capsys.readouterr().err


def test_everything_wrong_with_the_arguments_is_said_at_once(recordings, tmp_path, capsys):
    assert main([
        "--data_dir", str(recordings), "--output_dir", str(tmp_path), "--val_fraction", "1", "--start", "-1",
        "--segments", "a.csv", "--max_segments", "3", "--write_audio", str(recordings), "--silence_db", "6",
    ]) == 2
    error = capsys.readouterr().err
    for flag in ("--val_fraction 1", "--start -1", "--max_segments:", "--write_audio", "--silence_db is 6"):
        assert flag in error
    assert main(["--data_dir", str(recordings), "--output_dir", str(tmp_path), "--merge_gap_sec", "0",
                 "--slice_end_offset", "-1", "--val_below_text", "-1"]) == 2
    error = capsys.readouterr().err
    assert "--merge_gap_sec and --slice_end_offset: of segments, which --segments gives" in error
    assert "--val_below_text -1: expected 0 or more characters" in error
    for flag, value in (("--merge_gap_sec", "-1"), ("--slice_start_offset", "nan")):
        assert main(["--data_dir", str(recordings), "--output_dir", str(tmp_path), flag, value]) == 2
        assert f"{flag} is {float(value)}" in capsys.readouterr().err


def test_subfolders_give_clips_whose_names_say_where_they_are_from(tmp_path, capsys):
    for name in ("rain.flac", "monday/rain.flac", "monday/late/dog.wav", ".hidden/x.flac", "short/s.wav"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        record(tmp_path / "in", name, 1 if name.startswith("short") else 9)
    (tmp_path / "in" / "monday" / "rain.txt").write_text("rain on Monday\n")
    (tmp_path / "in" / "rain.txt").write_text("rain\n")
    (tmp_path / "in" / "monday" / "late" / "dog.txt").write_text("a dog\n")
    arguments = ["--data_dir", str(tmp_path / "in"), "--output_dir", str(tmp_path / "out"), "--recursive"]
    assert main([*arguments, "--write_audio", str(tmp_path / "pieces")]) == 0
    windows = read_clips(tmp_path / "out" / "clips.tsv")
    assert [(w.id, w.name) for w in windows] == [
        ("monday_late_dog_0", "monday_late_dog"), ("monday_rain_0", "monday_rain"), ("rain_0", "rain")]
    assert "short/s.wav\t" in (tmp_path / "out" / "left_out.tsv").read_text()
    assert (tmp_path / "pieces" / "monday_rain_0.txt").read_text() == "rain on Monday\n"
    tables = tmp_path / "out" / "clips.tsv", tmp_path / "out" / "captions.tsv", tmp_path / "in"
    jobs = plan_audio_set(*tables, recursive=True)
    assert [(job.path, job.caption) for job in jobs] == [
        (tmp_path / "in" / "monday" / "late" / "dog.wav", "a dog"),
        (tmp_path / "in" / "monday" / "rain.flac", "rain on Monday"), (tmp_path / "in" / "rain.flac", "rain")]
    assert [bool(job.problem) for job in plan_audio_set(*tables)] == [True, True, False]
    capsys.readouterr()
    assert main([*arguments, "--write_audio", str(tmp_path / "in" / "pieces")]) == 2
    assert "lies in the folder of the recordings" in capsys.readouterr().err


def test_two_recordings_that_would_have_one_name_are_refused(tmp_path, capsys):
    for name in ("monday_rain.flac", "monday/rain.wav"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        record(tmp_path / "in", name, 9)
    assert main(["--data_dir", str(tmp_path / "in"), "--output_dir", str(tmp_path / "out"), "--recursive"]) == 1
    assert "would both be called monday_rain; rename one of them" in capsys.readouterr().err


def test_a_list_of_spoken_sentences_gives_segments_or_captions(tmp_path, capsys):
    for name in ("LJ-1.wav", "LJ-2.wav"):
        record(tmp_path / "in", name, 3)
    (tmp_path / "in" / "metadata.csv").write_text("LJ-1|in 1455|in fourteen fifty-five\nLJ-2|two|two\n")
    arguments = ["--data_dir", str(tmp_path / "in"), "--output_dir", str(tmp_path / "out")]
    for given in (["--segments"], ["--min_length_sec", "2", "--captions"]):
        assert main([*arguments, *given, str(tmp_path / "in" / "metadata.csv")]) == 0
        windows, texts = read_clips(tmp_path / "out" / "clips.tsv"), read_captions(tmp_path / "out" / "captions.tsv")
        assert [(w.name, w.start_sample, w.end_sample) for w in windows] == [("LJ-1", 0, 24_000), ("LJ-2", 0, 24_000)]
        assert texts == {"LJ-1": "in fourteen fifty-five", "LJ-2": "two"}


def test_edited_captions_can_be_given_back(tmp_path, capsys):
    arguments, out = put_talk(tmp_path / "in"), tmp_path / "out"
    assert main([*arguments, "--output_dir", str(out)]) == 0
    table = out / "captions.tsv"
    table.write_text(table.read_text().replace("a long sentence", "a man speaks"))
    assert main([*arguments, "--output_dir", str(out)]) == 1
    assert "give it back with --captions" in capsys.readouterr().err
    table.rename(tmp_path / "mine.tsv")
    assert main([*arguments, "--output_dir", str(out), "--captions", str(tmp_path / "mine.tsv")]) == 0
    assert read_captions(table) == read_captions(tmp_path / "mine.tsv") and "a man speaks" in table.read_text()
    assert "no recording" not in capsys.readouterr().err


def test_clips_without_a_caption_and_those_held_out_are_named(recordings, tmp_path, capsys):
    (tmp_path / "words.csv").write_text("id,caption\nb,a siren\n")
    assert main(["--data_dir", str(recordings), "--output_dir", str(tmp_path / "out"), "--val_fraction", "0.3",
                 "--captions", str(tmp_path / "words.csv")]) == 0
    err = capsys.readouterr().err
    assert "without a caption, which a set of sound cannot hold; of the recordings a" in err
    (held_out,) = {window.name for window in read_clips(tmp_path / "out" / "clips_val.tsv")}
    number = len(read_clips(tmp_path / "out" / "clips_val.tsv"))
    assert f"held out for validation: 1 recording with {number} of the clips: {held_out}" in err


def test_the_sound_of_held_out_clips_lies_apart(tmp_path, capsys):
    """The folder of the others goes on to training."""
    for name in "abcd":
        (tmp_path / "in").mkdir(exist_ok=True)
        soundfile.write(tmp_path / "in" / f"{name}.wav", np.random.default_rng(ord(name)).standard_normal(72_000) / 9,
                        8_000)
        (tmp_path / "in" / f"{name}.txt").write_text(name)
    pieces = tmp_path / "pieces"
    arguments = ["--data_dir", str(tmp_path / "in"), "--output_dir", str(tmp_path / "out"), "--write_audio",
                 str(pieces)]
    assert main([*arguments, "--val_fraction", "0.3"]) == 0
    tables = [{window.id for window in read_clips(tmp_path / "out" / name)} for name in ("clips.tsv", "clips_val.tsv")]
    assert [len(ids) for ids in tables] == [3, 1]
    for folder, ids in zip((pieces, pieces / "val"), tables, strict=True):
        assert {path.stem for path in folder.glob("*.flac")} == ids == {path.stem for path in folder.glob("*.txt")}
    assert f"{pieces / 'val'}: the sound of 1 clip to validate on, apart from" in capsys.readouterr().err
    assert main(arguments) == 0  # of an earlier run, and now trained on too
    assert f"{pieces / 'val'}: sounds of an earlier run that are now trained on: " in capsys.readouterr().err
    arguments[1] = str(pieces / "val")
    assert main(arguments) == 2


def test_two_copies_of_a_recording_are_not_on_both_sides(tmp_path, capsys):
    for name, seed in (("a", 0), ("b", 0), ("c", 1), ("d", 2)):
        (tmp_path / "in").mkdir(exist_ok=True)
        soundfile.write(tmp_path / "in" / f"{name}.wav", np.random.default_rng(seed).standard_normal(72_000) / 9, 8_000)
    for seed in range(8):
        assert main(["--data_dir", str(tmp_path / "in"), "--output_dir", str(tmp_path / "out"), "--val_fraction", "0.5",
                     "--seed", str(seed)]) == 0
        held_out = {window.name for window in read_clips(tmp_path / "out" / "clips_val.tsv")}
        assert ("a" in held_out) == ("b" in held_out)
        assert "recordings of the same content, which stay together in training or validation: a = b" in (
            capsys.readouterr().err)


def test_a_full_disk_is_no_matter_of_lengths(recordings, tmp_path, capsys, monkeypatch):
    def full(path, *_):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr("selva.partition.cut.write_audio", full)
    arguments = ["--data_dir", str(recordings), "--output_dir", str(tmp_path / "out"), "--write_audio",
                 str(tmp_path / "pieces")]
    assert main(arguments) == 1
    said = capsys.readouterr().err
    assert "none of 5 clips could be written; the first reason: " in said and "the disk is full (No space left" in said
    assert "min_length_sec" not in said.splitlines()[-1]
    monkeypatch.undo()
    real = cut.write_audio
    monkeypatch.setattr("selva.partition.cut.write_audio",
                        lambda path, *rest: full(path) if path.stem == "b_1" else real(path, *rest))
    assert main(arguments) == 1
    assert "4 clips from 3 of 4 recordings, 0 unreadable; 1 clip not written" in capsys.readouterr().err
