"""Small videos and sounds for tests, made on the spot."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from torch import Tensor

# (a, b, c, d) of ISO 14496-12: x' = a x + c y, y' = b x + d y with y downwards
TURNS = {"top right": (0, 1, -1, 0), "bottom left": (0, -1, 1, 0), "bottom right": (-1, 0, 0, -1)}


def picture_of(number: int, width: int = 64, height: int = 64) -> np.ndarray:
    """Return (H, W, 3) uint8 that shows the lower 16 bits of ``number`` as 4 x 4 black and white squares."""
    bits = np.array([(number >> bit) & 1 for bit in range(16)], dtype=np.uint8).reshape(4, 4) * 255
    grey = np.kron(bits, np.ones((height // 4, width // 4), dtype=np.uint8))
    return np.repeat(grey[:, :, None], 3, axis=2)


def number_in(picture: np.ndarray) -> int:
    """Return the number that a (3, H, W) picture shows."""
    height, width = picture.shape[1:]
    centres = picture.mean(axis=0)[height // 8 :: height // 4, width // 8 :: width // 4]
    return int(((centres > 127).reshape(-1) * 2 ** np.arange(16)).sum())


def numbers_in(frames: Tensor) -> list[int]:
    """Return the numbers that (T, 3, H, W) frames show."""
    return [number_in(frame.numpy()) for frame in frames]


def clicks(times: Sequence[float], seconds: float, rate: int = 16_000, channels: int = 1) -> np.ndarray:
    """Return (channels, samples) float32 with a short click at each time."""
    sound = np.zeros((channels, round(seconds * rate)), dtype=np.float32)
    for time in times:
        sound[:, round(time * rate) : round(time * rate) + 8] = 0.9
    return sound


def click_time(sound: np.ndarray | Tensor, rate: int) -> float:
    """Return the seconds at which (channels, samples) is loudest."""
    return np.abs(np.asarray(sound)[0]).argmax() / rate


def make_video(
    path: Path,
    seconds: float = 2.0,
    fps: int = 25,
    size: tuple[int, int] = (64, 64),
    pictures=None,
    sound: np.ndarray | None = None,
    rate: int = 16_000,
    codec: str = "libx264",
    options: dict[str, str] | None = None,
    audio_codec: str = "aac",
    container_options: dict[str, str] | None = None,
    bframes: int = 0,
) -> Path:
    """Write a video of ``seconds`` at ``fps`` whose frame i is ``pictures(i)``, or shows i; with ``sound`` if given.

    ``size`` is (width, height), ``sound`` (channels, samples) float32.
    """
    width, height = size
    pictures = pictures or (lambda i: picture_of(i, width, height))
    with av.open(str(path), "w", options=container_options or {}) as container:
        video = container.add_stream(codec, rate=fps, options={"crf": "10", "bf": str(bframes), **(options or {})})
        video.width, video.height, video.pix_fmt = width, height, "yuv420p"
        audio = None
        if sound is not None:
            layout = "mono" if len(sound) == 1 else "stereo"
            audio = container.add_stream(audio_codec, rate=rate, layout=layout, options={"strict": "-2"})
            frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(sound), format="fltp", layout=layout)
            frame.sample_rate, frame.pts, frame.time_base = rate, 0, Fraction(1, rate)
            container.mux(audio.encode(frame))
            container.mux(audio.encode(None))
        for index in range(round(seconds * fps)):
            container.mux(video.encode(av.VideoFrame.from_ndarray(pictures(index), format="rgb24")))
        container.mux(video.encode(None))
    return path


def decode(path: Path):
    """Return ([(seconds, (H, W, 3) uint8)], (channels, samples), rate) as a player would show and play it."""
    frames, sounds, rate = [], [], 0
    with av.open(str(path)) as container:
        if container.streams.video:
            frames = [(frame.time, frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]
    with av.open(str(path)) as container:
        if container.streams.audio:
            for frame in container.decode(audio=0):
                sounds.append(frame.to_ndarray())
                rate = frame.sample_rate
    return frames, (np.concatenate(sounds, axis=1) if sounds else None), rate


def turn(path, matrix):
    """Write a display matrix (a, b, c, d) into the only video track of an .mp4."""
    content = bytearray(path.read_bytes())
    at = content.find(b"tkhd") + 4 + 4 + 20 + 16
    one, a, b, c, d = 1 << 16, *(value << 16 for value in matrix)
    assert struct.unpack_from(">9i", content, at) == (one, 0, 0, 0, one, 0, 0, 0, 1 << 30)
    struct.pack_into(">9i", content, at, a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(content)


def corner_picture(_):
    """Landscape picture with a white patch at the top left."""
    picture = np.zeros((64, 96, 3), dtype=np.uint8)
    picture[:24, :24] = 255
    return picture


def white_corner(picture):
    """Return at which corner a (3, H, W) picture is brightest."""
    grey = picture.float().mean(dim=0)
    corners = {
        "top left": grey[4, 4],
        "top right": grey[4, -5],
        "bottom left": grey[-5, 4],
        "bottom right": grey[-5, -5],
    }
    return max(corners, key=corners.get)
