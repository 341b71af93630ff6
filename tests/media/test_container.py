"""Headers of media files."""

from __future__ import annotations

from fractions import Fraction

import av
import numpy as np
import soundfile
from make_media import clicks, make_video, number_in, picture_of

from selva.media import probe, read_video
from selva.media.container import decode_frames, open_media, video_stream


def test_probe_reads_headers(tmp_path):
    video = probe(make_video(tmp_path / "v.mp4", 2.0, size=(96, 64), sound=clicks([], 2.0)))
    assert (video.width, video.height, video.fps, video.duration_sec) == (96, 64, 25.0, 2.0)
    assert (video.audio_rate, video.audio_channels) == (16_000, 1)
    soundfile.write(tmp_path / "a.flac", np.zeros((8000, 2)), 16_000)
    sound = probe(tmp_path / "a.flac")
    assert (sound.width, sound.fps, sound.duration_sec, sound.audio_channels) == (None, None, 0.5, 2)
    assert sound.streams == ("audio",)


def test_a_packet_without_content_shows_the_picture_before_it_again(tmp_path):
    """So Theora writes pictures that stand still; a decoder that gets such a packet reports damage."""
    with av.open(str(tmp_path / "still.nut"), "w") as target:
        stream = target.add_stream("mpeg4", rate=25)
        stream.width = stream.height = 64
        for index in range(50):
            if index % 5 in (3, 4):
                packet = av.Packet(b"")
                packet.stream, packet.pts, packet.dts, packet.time_base = stream, index, index, Fraction(1, 25)
                target.mux(packet)
                continue
            frame = av.VideoFrame.from_ndarray(picture_of(index), format="rgb24")
            frame.pts, frame.time_base = index, Fraction(1, 25)
            target.mux(stream.encode(frame))
    with open_media(tmp_path / "still.nut") as container:
        stream = video_stream(container, "still.nut")
        shown = [(round(float(time) * 25), number_in(frame.to_ndarray(format="rgb24").transpose(2, 0, 1)))
                 for time, frame in decode_frames("still.nut", container, stream, Fraction(0))]
    assert shown == [(index, index - max(0, index % 5 - 2)) for index in range(50)]
    assert read_video(tmp_path / "still.nut", 2.0, fill_sec=0.125).duration_sec == 2.0
