"""The reader of all tables: what quotation marks leave unclear is an error, never a longer cell."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from selva.inputs.delimited import Numbers
from selva.inputs.jobs import collect_jobs
from selva.partition.segments import read_segments
from selva.partition.windows import read_captions, read_clips

NAMES = {name: Path(f"{name}.wav") for name in ("siren", "bell", "dog", "rain")}


def captions(path):
    return read_captions(path)


def segments(path):
    return read_segments([path], NAMES)


def clips(path):
    return read_clips(path)


def jobs(path):
    for name in NAMES:
        (path.parent / f"{name}.mp4").touch()
    return collect_jobs([path])


READERS = {
    captions: ("id\tcaption", "{}\t{}"),
    segments: ("name\tstart\tend\ttext", "{}\t0\t4\t{}"),
    clips: ("id\tname\tstart_sample\tend_sample\tnote", "{0}\t{0}\t0\t4\t{1}"),
    jobs: ("id\tlabel", "{}\t{}"),
}


def write(path, read, texts):
    header, row = READERS[read]
    path.write_text("\n".join([header, *(row.format(n, t) for n, t in zip(NAMES, texts, strict=True))]) + "\n")
    return path


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize(("texts", "message"), [
    (['"loud siren', "a bell", "a dog", "rain"], "after line 1 no row can be read"),
    (["a siren", '"loud" bell', "a dog", "rain"], "after line 2 no row can be read"),
    (["a siren", "a bell", '"a dog', "rain"], "after line 3 no row can be read"),
    (['"loud siren', 'a bell"', "a dog", "rain"], "lines 2 to 3 would be one row"),
    (['"loud siren', "a bell", "a dog", 'rain"'], "lines 2 to 5 would be one row"),
])
def test_a_quotation_mark_swallows_no_row(read, texts, message, tmp_path):
    with pytest.raises(ValueError, match=rf"t\.tsv: {message}.*quotation mark"):
        read(write(tmp_path / "t.tsv", read, texts))


def test_marks_that_are_right_are_read_and_a_cell_of_two_lines_is_said(tmp_path, caplog):
    path = write(tmp_path / "t.tsv", captions, ['"loud ""siren"""', "5\" bell", '"a dog\nbarks"', "'rain'"])
    with caplog.at_level(logging.WARNING):
        assert captions(path) == {"siren": 'loud "siren"', "bell": '5" bell', "dog": "a dog\nbarks", "rain": "'rain'"}
    assert "goes over several lines: 4 to 5" in caplog.text


@pytest.mark.parametrize("read", [captions, clips])
def test_a_comma_in_a_text_cuts_nothing_off(read, tmp_path):
    path = write(tmp_path / "t.tsv", read, ["a siren", "a bell,\tfar away", "a dog", "rain"])
    with pytest.raises(ValueError, match=r"t\.tsv, line 3: more cells than columns"):
        read(path)


def test_a_caption_given_twice_is_said(tmp_path, caplog):
    (tmp_path / "t.tsv").write_text("id\tcaption\na\tone\na\ttwo\nb\tx\nb\tx\n")
    with caplog.at_level(logging.WARNING):
        assert captions(tmp_path / "t.tsv") == {"a": "two", "b": "x"}
    assert "t.tsv: several captions, of which the last counts: a" in caplog.text and "a, b" not in caplog.text


@pytest.mark.parametrize("delimiter", [";", "\t"])
def test_a_decimal_comma_is_read_where_commas_separate_no_columns(delimiter, tmp_path):
    (tmp_path / "siren.mp4").touch()
    table = tmp_path / "t.tsv"
    rows = ("id|path|start|duration", "a|siren.mp4|1,5|4", "b|siren.mp4|12,345|0,750", "c|siren.mp4|2|4.5")
    table.write_text("\n".join(rows).replace("|", delimiter) + "\n", encoding="utf-16")
    assert [(job.start_sec, job.duration_sec) for job in collect_jobs([table])] == [(1.5, 4), (12.345, 0.75), (2, 4.5)]
    table.write_text("name|start|end\nsiren|0,5|12,345\n".replace("|", delimiter))
    (segment,) = segments(table)["siren"]
    assert (segment.start_sec, segment.end_sec) == (0.5, 12.345)


def test_with_commas_between_columns_a_decimal_comma_is_an_error(tmp_path):
    (tmp_path / "t.csv").write_text('name,start,end\nsiren,"0,5",4\n')
    with pytest.raises(ValueError, match=r"t\.csv, line 2: start is '0,5', expected seconds, with a point, as commas "
                                         r"separate the columns here: 0\.5"):
        segments(tmp_path / "t.csv")


@pytest.mark.parametrize(("cells", "text", "message"), [
    (["1,500", "12,000"], "1,500", "1.500 or 1500; write the one that is meant"),
    (["1,5", "2.500"], "2.500", "2,500 or 2500, as other numbers here have a comma"),
    (["1,5", "1.234,5"], "1.234,5", "a number"),
    (["1,234,500"], "1,234,500", "a number"),
    (["1,5"], "-0,5", "a number"),
    (["1.5"], "0_8", "a number"),
])
def test_a_number_that_may_be_two_is_an_error(cells, text, message):
    with pytest.raises(ValueError, match=message):
        Numbers(cells, ";").read(text, least=0)
