"""Segments from tables and from whisper: what is read, and that everything wrong is said at once."""

from __future__ import annotations

import json

import pytest

from selva.partition.segments import Segment, read_segments


def whisper(path, segments):
    path.write_text(json.dumps({"text": "...", "language": "en", "segments": segments}), encoding="utf-8")
    return path


@pytest.mark.parametrize("mark", ["\t", ",", ";"])
def test_tables(tmp_path, mark):
    rows = ["name,start,end,id,text", "talk,0.5,4.25,hello,a man  says", "rain.wav,0,8,,", "talk,5,6,,"]
    path = tmp_path / "segments.csv"
    path.write_text("\ufeff" + "\n".join(rows).replace(",", mark), encoding="utf-8")
    assert read_segments([path], {"talk", "rain"}) == {
        "talk": [Segment("talk", 0.5, 4.25, "hello", "a man says"), Segment("talk", 5, 6, "talk_1")],
        "rain": [Segment("rain", 0, 8, "rain_0")],
    }


def test_a_recording_whose_name_ends_like_a_file_is_found(tmp_path):
    path = tmp_path / "s.tsv"
    path.write_text("name\tstart\tend\ntake.1\t0\t1\n")
    assert list(read_segments([path], {"take.1", "take"})) == ["take.1"]


def test_what_whisper_writes(tmp_path):
    segments = [{"id": 0, "seek": 0, "start": 0.0, "end": 2.5, "text": " Hello,\n there.", "tokens": [1]},
                {"start": 2.5, "end": 2.5, "text": ""}]
    path = whisper(tmp_path / "talk.json", segments)
    expected = [Segment("talk", 0, 2.5, "talk_0", "Hello, there."), Segment("talk", 2.5, 2.5, "talk_1")]
    assert read_segments([path], {"talk", "rain"}) == {"talk": expected}
    alone = read_segments([whisper(tmp_path / "whisper.json", segments)], {"rain"})
    assert [segment.id for segment in alone["rain"]] == ["rain_0", "rain_1"]
    with pytest.raises(ValueError, match=r"whisper\.json: there is no recording called 'whisper'; give the file"):
        read_segments([tmp_path / "whisper.json"], {"talk", "rain"})


def test_all_problems_are_named_together(tmp_path):
    path = tmp_path / "s.csv"
    path.write_text(
        "name,start,end,id,text\ndog,0,1,,\ntalk,3,2,,\ntalk,x,2,,\ntalk,nan,2,,\ntalk,-1,2,,\ntalk,0,inf,,\n"
        "talk,0,1,../up,\ntalk,0,1,twice,\ntalk,1,2,twice,\ntalk,1,2,a,b,c\n"
    )
    with pytest.raises(ValueError) as caught:
        read_segments([path, whisper(tmp_path / "talk.json", [7, {"start": 1}])], {"talk", "rain"})
    for text in (
        "line 2: there is no recording called 'dog'", "line 3: 3 ... 2 s, expected 0 <= start <= end", "line 4: nan",
        "line 5: nan", "line 6: -1", "line 7: 0 ... inf", "line 8: id '../up': an id is a file name",
        "2 segments are called 'twice'", "line 11: more cells", "segment 0: is no object", "segment 1: 1 ... nan s",
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
        read_segments([tmp_path / name], {"a"})
    with pytest.raises(FileNotFoundError):
        read_segments([tmp_path / "none.csv"], {"a"})
