"""Words for messages."""

from __future__ import annotations

import ast
import math
from pathlib import Path

import pytest
from plain_counts import plural_counts

from selva.utils.errors import UserError
from selva.utils.text import clock, counted, number_in, read_text, told_apart


@pytest.mark.parametrize("seconds, text", [(0.4, "0 s"), (59.6, "1:00 min"), (200, "3:20 min"), (3725, "1:02:05 h")])
def test_clock(seconds, text):
    assert clock(seconds) == text


def test_one_thing_has_no_plural():
    assert [counted(number, "clip") for number in (0, 1, 2)] == ["0 clips", "1 clip", "2 clips"]
    assert (counted(20_000, "clip"), counted(20_000, "clip", grouped=True)) == ("20000 clips", "20,000 clips")
    assert counted(2, "video or sound", "videos or sounds") == "2 videos or sounds"


def test_a_number_is_what_people_write():
    assert [number_in(text) for text in ("0.8", "-1e3", " 2 ", "inf")] == [0.8, -1000, 2, math.inf]
    assert all(math.isnan(number_in(text)) for text in ("0_8", "\u0668", "0,8", "loud", "", "nan"))


def test_paths_are_told_apart_by_their_last_folders():
    assert told_apart(["runs/dog/a.pt", "runs/cat/a.pt", "runs/cat/b.pt"]) == ["dog/a.pt", "cat/a.pt", "b.pt"]
    assert told_apart(["a.pt", "x/a.pt", "/y/x/a.pt"]) == ["a.pt", "x/a.pt", "y/x/a.pt"]
    assert told_apart(["x/a.pt", "x/a.pt"]) == ["a.pt", "a.pt"] and told_apart([]) == []  # one file twice


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_texts_with_a_byte_order_mark_are_read(encoding, tmp_path):
    (tmp_path / "prompts.txt").write_bytes("hund.npz: ein Köter\n".encode(encoding))
    assert read_text(tmp_path / "prompts.txt") == "hund.npz: ein Köter\n"


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
def test_wide_text_without_a_mark_is_no_utf_8(encoding, tmp_path):
    """It decodes, with a zero after each letter, and no name in it is ever found."""
    (tmp_path / "prompts.txt").write_bytes("dog.npz: a dog\n".encode(encoding))
    with pytest.raises(UserError, match=r"prompts\.txt: is UTF-16 or UTF-32 text without a byte order mark"):
        read_text(tmp_path / "prompts.txt")


ROOT = Path(__file__).resolve().parents[2]
PARTS = ("selva", "scripts", "benchmarks", "toyworld", "comfyui")


def test_no_text_says_a_plural_after_any_number():
    """`1 clips` is what comes of ``f"{len(clips)} clips"``; `counted` knows better."""
    files = [*ROOT.glob("*.py"), *(path for part in PARTS for path in (ROOT / part).rglob("*.py"))]
    assert len(files) > 200
    found = [f"{path.relative_to(ROOT)}:{line}: {text!r}; see selva.utils.text.counted" for path in files
             for line, text in plural_counts(ast.parse(path.read_text(encoding="utf-8")))]
    assert not found, "\n".join(["", *found])


@pytest.mark.parametrize("code", [
    'f"{len(clips)} clips"', 'f"{self.count} of {total} usable clips in {folder}"', 'log.info("%d clips", 3)',
    'f"{count:,} trainable parameters"', 'x = "all %(n)d files"', 'f"{max(1, n)} held-out clips are {name}"',
])
def test_such_texts_are_found(code):
    assert [line for line, _ in plural_counts(ast.parse(code))] == [1]


@pytest.mark.parametrize("code", [
    'f"{MAX_CLIPS} clips"', 'f"{seconds:.1f} seconds"', "f\"{counted(n, 'clip')}\"", 'f"{name} clips"', '"8 clips"',
    'f"{number} of the clips"', 'def f():\n    """%d clips."""', 'f"{path} has rows"', 'f"{text!r} clips"',
])
def test_other_texts_are_not(code):
    assert list(plural_counts(ast.parse(code))) == []
