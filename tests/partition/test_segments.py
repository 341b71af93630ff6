"""Segments from tables and from whisper: what is read, and that everything wrong is said at once."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import soundfile

from selva.partition.segments import Segment, read_segments

NAMES = {"talk": Path("talk.wav"), "rain": Path("rain.wav")}


def whisper(path, segments):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"text": "...", "language": "en", "segments": segments}), encoding="utf-8")
    return path


@pytest.mark.parametrize("mark", ["\t", ",", ";"])
def test_tables(tmp_path, mark):
    rows = ["name,start,end,id,text", "talk,0.5,4.25,hello,a man  says", "rain.wav,0,8,,", "talk,5,6,,"]
    path = tmp_path / "segments.csv"
    path.write_text("\ufeff" + "\n".join(rows).replace(",", mark), encoding="utf-8")
    assert read_segments([path], NAMES) == {
        "talk": [Segment("talk", 0.5, 4.25, "hello", "a man says"), Segment("talk", 5, 6, "talk_1")],
        "rain": [Segment("rain", 0, 8, "rain_0")],
    }


def test_a_recording_whose_name_ends_like_a_file_is_found(tmp_path):
    path = tmp_path / "s.tsv"
    path.write_text("name\tstart\tend\ntake.1\t0\t1\n")
    assert list(read_segments([path], {"take.1": Path("take.1.wav"), "take": Path("take.wav")})) == ["take.1"]


def test_what_whisper_writes(tmp_path):
    segments = [{"id": 0, "seek": 0, "start": 0.0, "end": 2.5, "text": " Hello,\n there.", "tokens": [1]},
                {"start": 2.5, "end": 2.5, "text": ""}]
    path = whisper(tmp_path / "talk.json", segments)
    expected = [Segment("talk", 0, 2.5, "talk_0", "Hello, there."), Segment("talk", 2.5, 2.5, "talk_1")]
    assert read_segments([path], NAMES) == {"talk": expected}
    alone = read_segments([whisper(tmp_path / "whisper.json", segments)], {"rain": Path("rain.wav")})
    assert [segment.id for segment in alone["rain"]] == ["rain_0", "rain_1"]
    with pytest.raises(ValueError, match=r"whisper\.json: there is no recording called 'whisper'; give the file"):
        read_segments([tmp_path / "whisper.json"], NAMES)


def test_all_problems_are_named_together(tmp_path):
    path = tmp_path / "s.csv"
    path.write_text(
        "name,start,end,id,text\ndog,0,1,,\ntalk,3,2,,\ntalk,x,2,,\ntalk,nan,2,,\ntalk,-1,2,,\ntalk,0,inf,,\n"
        "talk,0,1,../up,\ntalk,0,1,twice,\ntalk,1,2,twice,\ntalk,1,2,a,b,c\n"
    )
    with pytest.raises(ValueError) as caught:
        read_segments([path, whisper(tmp_path / "talk.json", [7, {"start": 1}])], NAMES)
    for text in (
        "line 2: there is no recording called 'dog'", "line 3: 3 ... 2 s, expected 0 <= start <= end",
        "line 4: start is 'x', expected seconds", "line 5: start is 'nan'", "line 6: -1", "line 7: end is 'inf'",
        "line 8: id '../up': an id is a file name",
        "2 segments are called 'twice'", "line 11: more cells", "segment 0: is no object",
        "segment 1: start is 1 and end None, expected seconds",
    ):
        assert text in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.csv", "start,end,text\n0,1,x\n", "column name missing"),
        ("a.csv", "", "column name, start, end missing"),
        ("a.csv", "name,start,end\n", "no segments in it"),
        ("a.json", "{", "is not JSON"),
        ("a.json", "[]", 'has no list "segments"'),
        ("a.json", '{"segments": []}', "no segments in it"),
        ("a.json", "[" * 100_000, "is not JSON"),
    ],
)
def test_other_files_are_refused(tmp_path, name, content, words):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=words):
        read_segments([tmp_path / name], {"a": Path("a.wav")})
    with pytest.raises(FileNotFoundError):
        read_segments([tmp_path / "none.csv"], {"a": Path("a.wav")})


# -- several whisper files, and lists as LJSpeech has them -------------------------------------------------------------


@pytest.mark.parametrize("file, owner", [
    ("a/talk.json", "a_talk"), ("b/talk.json", "b_talk"), ("b_talk.json", "b_talk"), ("b/talk.en.json", "b_talk"),
    ("b/talk.wav.json", "b_talk"), ("a/whisper.json", "a_talk"), ("c/rain.part.2.json", "c_rain"),
])
def test_a_whisper_file_is_of_the_recording_that_it_is_called_like_or_lies_beside(tmp_path, file, owner):
    recordings = {"a_talk": tmp_path / "a" / "talk.wav", "b_talk": tmp_path / "b" / "talk.wav",
                  "b_rain": tmp_path / "b" / "rain.wav", "c_rain": tmp_path / "c" / "rain.wav"}
    path = whisper(tmp_path / file, [{"start": 0, "end": 1, "text": "x"}])
    assert list(read_segments([path], recordings)) == [owner]


def test_of_several_recordings_in_a_folder_none_is_guessed(tmp_path):
    recordings = {"talk": tmp_path / "talk.wav", "rain": tmp_path / "rain.wav"}
    with pytest.raises(ValueError, match=r"whisper\.json: there is no recording called 'whisper'"):
        read_segments([whisper(tmp_path / "whisper.json", [{"start": 0, "end": 1}])], recordings)


def test_all_whisper_files_of_a_folder_are_taken_and_one_recording_may_have_several(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    recordings = {"talk": tmp_path / "talk.wav", "day_rain": tmp_path / "day" / "rain.wav"}
    whisper(tmp_path / "talk.1.json", [{"start": 0, "end": 1, "text": "one"}])
    whisper(tmp_path / "talk.2.json", [{"start": 2, "end": 3, "text": "two"}])
    whisper(tmp_path / "day" / "whisper.json", [{"start": 4, "end": 5, "text": "rain"}])
    found = read_segments([tmp_path], recordings)
    assert [(s.id, s.text) for s in found["talk"]] == [("talk_0", "one"), ("talk_1", "two")]
    assert [s.id for s in found["day_rain"]] == ["day_rain_0"]
    assert "whisper.json: taken as that of day_rain, the only recording in its folder" in caplog.text
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no \.json files in this folder"):
        read_segments([tmp_path / "empty"], recordings)


def test_a_list_of_spoken_sentences_gives_whole_recordings(tmp_path, caplog):
    for name, seconds in (("LJ001-0001", 2), ("LJ001-0002", 1)):
        soundfile.write(tmp_path / f"{name}.wav", np.zeros(seconds * 8000), 8000)
    (tmp_path / "metadata.csv").write_text(
        'LJ001-0001|He said "1, or 2|He said "one, or two\nLJ001-0002|plain|\nLJ001-0003|not here|not here\n')
    recordings = {name: tmp_path / f"{name}.wav" for name in ("LJ001-0001", "LJ001-0002")}
    assert read_segments([tmp_path / "metadata.csv"], recordings) == {
        "LJ001-0001": [Segment("LJ001-0001", 0, 2, "LJ001-0001", 'He said "one, or two')],
        "LJ001-0002": [Segment("LJ001-0002", 0, 1, "LJ001-0002", "plain")],
    }
    assert "1 line is of no recording: LJ001-0003" in caplog.text
