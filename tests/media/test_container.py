"""Headers of media files."""

from __future__ import annotations

import numpy as np
import soundfile
from make_media import clicks, make_video

from selva.media import probe


def test_probe_reads_headers(tmp_path):
    video = probe(make_video(tmp_path / "v.mp4", 2.0, size=(96, 64), sound=clicks([], 2.0)))
    assert (video.width, video.height, video.fps, video.duration_sec) == (96, 64, 25.0, 2.0)
    assert (video.audio_rate, video.audio_channels) == (16_000, 1)
    soundfile.write(tmp_path / "a.flac", np.zeros((8000, 2)), 16_000)
    sound = probe(tmp_path / "a.flac")
    assert (sound.width, sound.fps, sound.duration_sec, sound.audio_channels) == (None, None, 0.5, 2)
    assert sound.streams == ("audio",)
