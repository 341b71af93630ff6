"""The window rule, against its definition and the published examples, and the table."""

from __future__ import annotations

import itertools

import pytest

from selva.partition.windows import (
    Window,
    caption_of,
    partition,
    read_captions,
    read_clips,
    table_captions,
    window_length,
    window_starts,
    write_captions,
    write_clips,
)


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (8.0, []),
        (10, [(0, 357210)]),
        (16.2, [(0, 357210), (357210, 714420)]),
        (20, [(0, 357210), (524790, 882000)]),
        (60, [(s, s + 357210) for s in (0, 572197, 1144394, 1716591, 2288788)]),
    ],
)
def test_published_examples_at_44100_hz(seconds, expected):
    windows = partition("rain", round(44_100 * seconds), 44_100)
    assert [(window.start_sample, window.end_sample) for window in windows] == expected
    assert [window.id for window in windows] == [f"rain_{index}" for index in range(len(expected))]
    assert all(window.name == "rain" for window in windows)


@pytest.mark.parametrize("rate", [8_000, 16_000, 22_050, 44_100, 48_000, 96_000, 11_025])
def test_windows_lie_inside_do_not_overlap_and_reach_the_end(rate):
    length = window_length(rate)
    assert length == int(rate * 8.1)
    for num_samples in [length, length + 1, 2 * length - 1, 2 * length, 3 * length + 17, 5 * length, 600 * rate]:
        starts = window_starts(num_samples, rate)
        if num_samples < rate * 8.1:  # int() cut a fraction of a sample off the window
            assert starts == []
            continue
        assert len(starts) == min(5, num_samples // length)
        assert all(later - earlier >= length for earlier, later in itertools.pairwise(starts))
        end = starts[-1] + length
        assert end <= num_samples
        if len(starts) > 1:
            assert num_samples - end < len(starts) - 1  # only what the division leaves over


def test_a_fraction_of_a_sample_too_short_is_too_short():
    assert 11_025 * 8.1 == 89_302.5
    assert window_starts(89_302, 11_025) == []
    assert window_starts(89_303, 11_025) == [0]


def test_table_round_trip(tmp_path):
    windows = partition("a", 900_000, 44_100) + partition('with "quotes" and ünïcode', 400_000, 44_100)
    write_clips(tmp_path / "out" / "clips.tsv", windows)
    assert read_clips(tmp_path / "out" / "clips.tsv") == windows
    lines = (tmp_path / "out" / "clips.tsv").read_text(encoding="utf-8").splitlines()
    assert lines[:2] == ["id\tname\tstart_sample\tend_sample", "a_0\ta\t0\t357210"]


def test_tables_of_others_are_read_and_wrong_ones_named(tmp_path):
    path = tmp_path / "clips.tsv"
    path.write_bytes(b"\xef\xbb\xbfname\tid\tend_sample\tstart_sample\tmore\r\nrain\train_0\t9\t2\tx\r\n")
    assert read_clips(path) == [Window("rain_0", "rain", 2, 9)]
    path.write_text("id;name;start_sample;end_sample\nrain_0;rain;2;9\n")  # as Excel saves it again
    assert read_clips(path) == [Window("rain_0", "rain", 2, 9)]
    header = "id\tname\tstart_sample\tend_sample\n"
    for text, words in [
        ("", r"clips\.tsv: column id, name, start_sample, end_sample missing \(found: nothing\)"),
        ("id name start_sample end_sample\n", r"column id, name.*found: id name"),
        (header + "a\ta\t0\t5\nb\tb\tx\t5\n", r"clips\.tsv, line 3: .*'x'"),
        (header + "a\ta\t0\n", r"clips\.tsv, line 2"),
        (header + "a\ta\t5\t5\n", r"line 2: clip 'a' is 5 \.\.\. 5"),
    ]:
        path.write_text(text)
        with pytest.raises(ValueError, match=words):
            read_clips(path)
    path.write_bytes(b"id\tname\xff\n")
    with pytest.raises(ValueError, match="UTF-8"):
        read_clips(path)
    with pytest.raises(FileNotFoundError, match=r"none\.tsv"):
        read_clips(tmp_path / "none.tsv")


def test_shorter_recordings_and_other_numbers_of_windows_on_request():
    assert partition("a", 40_000, 16_000) == []
    assert partition("a", 40_000, 16_000, min_length_sec=2.5) == [Window("a_0", "a", 0, 40_000)]
    assert partition("a", 39_999, 16_000, min_length_sec=2.5) == []
    assert partition("a", 0, 16_000, min_length_sec=0) == []
    assert partition("a", 200_000, 16_000, min_length_sec=2.5) == partition("a", 200_000, 16_000)
    assert partition("a", 200_000, 16_000, min_length_sec=20) == []
    assert [w.start_sample for w in partition("a", 3_600_000, 16_000, max_windows=2)] == [0, 3_600_000 - 129_600]
    assert len(partition("a", 3_600_000, 16_000, max_windows=100)) == 27


def test_captions_of_recordings_are_as_published(tmp_path):
    windows = partition("rain", 900_000, 44_100) + partition("dog", 400_000, 44_100)
    captions = table_captions(windows, {}, {"rain": "heavy rain", "cat": "not in the table", "dog": ""})
    assert captions == {"rain": "heavy rain"}
    write_captions(tmp_path / "captions.tsv", captions)
    assert (tmp_path / "captions.tsv").read_text() == "id\tcaption\nrain\theavy rain\n"
    read = read_captions(tmp_path / "captions.tsv")
    assert [caption_of(window, read) for window in windows] == ["heavy rain", "heavy rain", ""]


def test_captions_of_clips_count_before_those_of_recordings():
    windows = [Window("x", "talk", 0, 5), Window("y", "talk", 5, 9), Window("z", "rain", 0, 9)]
    captions = table_captions(windows, {"x": "a man speaks"}, {"talk": "people talk"})
    assert captions == {"x": "a man speaks", "y": "people talk"}
    assert [caption_of(window, captions) for window in windows] == ["a man speaks", "people talk", ""]


def test_a_clip_that_is_called_like_another_recording_keeps_its_own_caption():
    windows = partition("a", 400_000, 44_100) + partition("a_0", 400_000, 44_100)
    captions = table_captions(windows, {}, {"a": "rain", "a_0": "a dog"})
    assert [caption_of(window, captions) for window in windows] == ["rain", "a dog"]
