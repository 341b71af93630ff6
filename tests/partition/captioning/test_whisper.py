"""selva.partition.captioning.whisper: words with their times, of short and long recordings; joining short segments."""

from __future__ import annotations

import pytest
import torch
from listening_models import put_whisper
from make_data import noise

from selva.partition.captioning.whisper import SpokenSegment, Whisper, merge_short
from selva.utils.errors import UserError

CPU = torch.device("cpu")


def sound(seconds: float) -> torch.Tensor:
    return torch.from_numpy(noise(seconds))


def rows(segments) -> list[tuple[float, float, str]]:
    return [(s.start_sec, s.end_sec, s.text) for s in segments]


def test_words_come_with_their_times_and_the_language(whisper_dir):
    found = Whisper(whisper_dir, CPU).transcribe(sound(7.0))
    assert found.language == "en"
    assert rows(found.segments) == [(0.0, 2.0, "Hello there."), (2.0, 2.4, "Yes."), (4.0, 6.0, "Good bye.")]


def test_times_of_a_long_recording_go_on_beyond_30_s(whisper_dir):
    found = Whisper(whisper_dir, CPU).transcribe(sound(33.0))
    assert [s.start_sec for s in found.segments] == [0.0, 2.0, 4.0, 30.0, 32.0]  # the one at 34 s is beyond the end
    assert found.segments[-1].end_sec == 32.4


def test_a_segment_ends_with_the_recording(whisper_dir):
    assert rows(Whisper(whisper_dir, CPU).transcribe(sound(1.5)).segments) == [(0.0, 1.5, "Hello there.")]


def test_the_language_is_heard_or_given(tmp_path):
    folder = put_whisper(tmp_path / "german", ((0.0, 1.0, " Ja."),), language="de")
    assert Whisper(folder, CPU).transcribe(sound(2.0)).language == "de"
    assert Whisper(folder, CPU, "en").transcribe(sound(2.0)).language == "en"
    with pytest.raises(UserError, match=r"--language fr: .*german knows de, en"):
        Whisper(folder, CPU, "fr")


def test_a_model_of_english_alone_takes_no_other_language(tmp_path):
    folder = put_whisper(tmp_path / "english", ((0.0, 1.0, " Yes."),), multilingual=False)
    found = Whisper(folder, CPU, "en").transcribe(sound(2.0))
    assert (found.language, rows(found.segments)) == ("en", [(0.0, 1.0, "Yes.")])
    with pytest.raises(UserError, match=r"--language de: .*english knows en"):
        Whisper(folder, CPU, "de")


def test_silence_says_nothing(whisper_dir):
    assert Whisper(whisper_dir, CPU).transcribe(torch.zeros(16_000)).segments == ()


def test_a_model_without_tokens_for_times_is_refused(tmp_path):
    folder = put_whisper(tmp_path / "old", ((0.0, 1.0, " Ja."),))
    path = folder / "generation_config.json"
    path.write_text(path.read_text().replace("no_timestamps_token_id", "something_else"))
    with pytest.raises(UserError, match="names no tokens for times"):
        Whisper(folder, CPU)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([(0, 3, "a"), (3.2, 3.6, "b"), (5, 8, "c")], [(0, 3.6, "a b"), (5, 8, "c")]),  # to the one before
        ([(0, 0.5, "a"), (0.9, 3, "b")], [(0, 3, "a b")]),  # to the one after
        ([(0, 0.5, "a"), (1.5, 3, "b")], [(0, 0.5, "a"), (1.5, 3, "b")]),  # too far away
        ([(0, 7.5, "a"), (7.6, 8.1, "b")], [(0, 7.5, "a"), (7.6, 8.1, "b")]),  # too long together
        ([(0, 2, "a"), (2, 4, "b")], [(0, 2, "a"), (2, 4, "b")]),  # none is short
        ([(0, 0.4, "a"), (0.4, 0.8, "b"), (0.8, 1.3, "c")], [(0, 1.3, "a b c")]),
    ],
)
def test_short_segments_join_what_is_near(given, expected):
    segments = [SpokenSegment(*row) for row in given]
    assert rows(merge_short(segments, 1.0)) == expected
    assert merge_short(segments, 0.0) == segments
