"""Progress without a terminal, and seconds per stage."""

from __future__ import annotations

import logging
import threading

import pytest

from selva.utils.progress import Progress, StageTimes, watched


def test_progress_writes_plain_lines_when_nobody_watches(caplog):
    caplog.set_level(logging.INFO, "selva")
    with Progress(10, "work", "clips", interval_sec=0) as progress:
        progress.update(4, "now a.mp4")
    assert "work 4/10 clips" in caplog.text and "a.mp4" in caplog.text


def test_a_program_around_it_is_told_and_can_end_the_work():
    told = []

    def watch(*progress):
        told.append(progress)
        if progress[1] == 2:
            raise KeyError("enough")

    with pytest.raises(KeyError, match="enough"), watched(watch), Progress(3, "work") as progress:
        for done in (1, 2, 3):
            progress.update(done)
    assert told == [("work", 1, 3), ("work", 2, 3)]
    with Progress(3, "later") as progress:
        progress.update(1)
    assert len(told) == 2


def test_another_thread_is_not_watched():
    told = []
    with watched(lambda *progress: told.append(progress)):
        thread = threading.Thread(target=lambda: Progress(1, "elsewhere").update(1))
        thread.start()
        thread.join()
    assert told == []


def test_stage_times_add_up_by_name_and_keep_their_order():
    times = StageTimes()
    for name in ("reading", "sampling", "reading"):
        with times.stage(name):
            pass
    times.seconds.update(reading=1.25, sampling=61.0)
    assert str(times) == "reading 1.2 s, sampling 1:01 min"
