"""The contact sheet shows the frames of a clip."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from selva.extraction.contact_sheet import check_place, sheet_digest, write_contact_sheet
from selva.media import VideoFrames
from selva.utils.errors import UserError


def frames_of(num_clip=64, num_sync=200, clip_color=(255, 0, 0), sync_color=(0, 0, 255)):
    def plain(count, size, color):
        return torch.tensor(color, dtype=torch.uint8)[None, :, None, None].repeat(count, 1, size, size)

    return VideoFrames(
        clip_frames=plain(num_clip, 64, clip_color), sync_frames=plain(num_sync, 32, sync_color), duration_sec=8.0,
        requested_sec=8.0, start_sec=2.0, source_fps=25.0, source_size=(360, 640), num_filled=1,
    )


def count(path, color):
    return (np.asarray(Image.open(path).convert("RGB")) == color).all(axis=2)


def test_a_sheet_shows_what_both_encoders_saw(tmp_path):
    path = tmp_path / "new" / "sheet.png"
    write_contact_sheet(path, frames_of(), title=r"dog_01: a $\notmath dog$, barking " + "very long " * 60)
    red, blue = count(path, (255, 0, 0)), count(path, (0, 0, 255))
    assert red.mean() > 0.15 and blue.mean() > 0.15
    assert red.nonzero()[0].max() < blue.nonzero()[0].min()  # CLIP above
    starts = np.flatnonzero(np.diff(red.any(axis=0).astype(int)) == 1)
    assert len(starts) == 8


def test_the_frames_are_spread_over_the_clip(tmp_path):
    frames = frames_of()
    frames.sync_frames[100:] = torch.tensor([0, 255, 0], dtype=torch.uint8)[:, None, None]
    write_contact_sheet(tmp_path / "sheet.png", frames)
    early, late = count(tmp_path / "sheet.png", (0, 0, 255)).sum(), count(tmp_path / "sheet.png", (0, 255, 0)).sum()
    assert early > 0 and late == pytest.approx(early, rel=0.05)


def test_short_clips_and_bad_requests(tmp_path):
    write_contact_sheet(tmp_path / "short.png", frames_of(5, 16))
    assert count(tmp_path / "short.png", (255, 0, 0)).any()
    with pytest.raises(ValueError, match=r"sheet\.jpg: cannot write \.jpg, expected \.png"):
        write_contact_sheet(tmp_path / "sheet.jpg", frames_of())
    with pytest.raises(ValueError, match="columns is 0"):
        write_contact_sheet(tmp_path / "sheet.png", frames_of(), columns=0)


def test_only_sheets_are_known_as_such(tmp_path):
    digest = "0123456789abcdef" * 4
    write_contact_sheet(tmp_path / "sheet.png", frames_of(), digest=digest)
    assert sheet_digest(tmp_path / "sheet.png") == digest and sheet_digest(tmp_path / "none.png") == ""
    check_place(tmp_path / "sheet.png", overwrite=False)
    check_place(tmp_path / "none.png", overwrite=False)
    Image.new("L", (8, 8)).save(tmp_path / "own.png")
    assert sheet_digest(tmp_path / "own.png") == ""
    with pytest.raises(UserError, match=r"own\.png: is in the way of the preview"):
        check_place(tmp_path / "own.png", overwrite=False)
    check_place(tmp_path / "own.png", overwrite=True)
