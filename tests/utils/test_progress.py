"""Progress without a terminal, and seconds per stage."""

from __future__ import annotations

import logging

from selva.utils.progress import Progress, StageTimes


def test_progress_writes_plain_lines_when_nobody_watches(caplog):
    caplog.set_level(logging.INFO, "selva")
    with Progress(10, "work", "clips", interval_sec=0) as progress:
        progress.update(4, "now a.mp4")
    assert "work 4/10 clips" in caplog.text and "a.mp4" in caplog.text


def test_stage_times_add_up_by_name_and_keep_their_order():
    times = StageTimes()
    for name in ("reading", "sampling", "reading"):
        with times.stage(name):
            pass
    times.seconds.update(reading=1.25, sampling=61.0)
    assert str(times) == "reading 1.2 s, sampling 1:01 min"
