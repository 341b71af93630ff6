"""selva.inference.plan: from settings to requests, and what is said about them before anything is made."""

from __future__ import annotations

import dataclasses

import pytest
from make_media import make_video

from selva.inference.config import InferenceConfig
from selva.inference.plan import collect_requests
from selva.weights.config import GeneratorModelConfig


@pytest.mark.parametrize("in_table, settings, said", [
    ("", {"duration": 4.0}, "a (2 instead of 4 s), b (1.6 instead of 4 s)"),
    ("1", {"duration": 4.0}, "b (1.6 instead of 4 s)"),
    ("3", {}, "a (2 instead of 3 s)"),
    ("3", {"long": True}, "a (2 instead of 3 s)"),
    ("", {"duration": 8.0, "long": True}, "a (2 instead of 8 s), b (1.6 instead of 8 s)"),
    ("1", {}, None), ("", {}, None), ("", {"long": True}, None), ("", {"duration": 1.6}, None),
])
def test_a_video_that_ends_before_the_length_that_was_asked_for_is_named(tmp_path, caplog, in_table, settings, said):
    """Where nobody asked for a length, nothing is missing."""
    table, video = tmp_path / "clips.tsv", make_video(tmp_path / "v.mp4", 2.0, size=(96, 64))
    table.write_text(f"id\tpath\tprompt\tstart\tduration\na\t{video}\tx\t0\t{in_table}\nb\t{video}\tx\t0.4\t\n")
    config = InferenceConfig(inputs=[table], model=GeneratorModelConfig(variant="tiny_16k"))
    assert list(collect_requests(dataclasses.replace(config, **settings))) == ["a", "b"]
    lines = [line for line in caplog.messages if "the length that was asked for" in line]
    assert [line.partition("the sound with them: ")[2] for line in lines] == ([said] if said else [])
