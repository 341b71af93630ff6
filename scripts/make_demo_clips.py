"""Make a small set of videos with sound to try the toolkit on: a ball that bounces, with a tone at every impact.

    python scripts/make_demo_clips.py --out demo_clips --count 6

Writes ball_001.mp4 ... (H.264 and AAC) and prompts.txt, a line for every clip. The same seed makes the same clips.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from selva import cli
from selva.files import atomic_path, atomic_write_text
from selva.report import Progress

SIZE, FPS, RATE = 160, 25, 16_000  # pixels, pictures per second, samples per second
GRAVITY = 2.5  # picture heights per second squared
COLOURS = {"red": (220, 60, 50), "green": (60, 190, 90), "blue": (70, 110, 230), "yellow": (235, 205, 70)}


@dataclass(frozen=True)
class Bounces:
    """One ball: where it is at every picture, and when and how fast it hits the floor.

    Attributes:
        heights: (pictures,) centre above the floor, in picture heights.
        hits: (time in seconds, speed in picture heights per second) of every impact.
    """

    colour: str
    radius: float
    heights: np.ndarray
    hits: list[tuple[float, float]]


def drop_ball(rng: np.random.Generator, duration_sec: float) -> Bounces:
    """Let a ball of random size fall, bounce and be dropped again whenever it has come to rest."""
    radius, restitution = rng.uniform(0.06, 0.14), rng.uniform(0.75, 0.9)
    hits, heights, start, speed, height = [], [], 0.0, 0.0, rng.uniform(0.45, 0.75)
    for picture in range(round(duration_sec * FPS)):
        time = picture / FPS
        while (flight := _time_to_floor(height, speed)) <= time - start:
            start += flight
            impact = GRAVITY * flight - speed
            hits.append((start, impact))
            height, speed = 0.0, restitution * impact
            if speed < 0.25:
                height, speed = rng.uniform(0.45, 0.75), 0.0
        since = time - start
        heights.append(max(0.0, height + speed * since - GRAVITY * since**2 / 2))
    return Bounces(str(rng.choice(list(COLOURS))), radius, np.array(heights), hits)


def _time_to_floor(height: float, speed: float) -> float:
    return (speed + np.sqrt(speed**2 + 2 * GRAVITY * height)) / GRAVITY


def draw_pictures(ball: Bounces) -> np.ndarray:
    """Return (pictures, SIZE, SIZE, 3) uint8 RGB: the ball over a floor, before a plain wall."""
    rows, columns = np.mgrid[0:SIZE, 0:SIZE] / SIZE
    floor = 0.9
    background = np.where((rows > floor)[..., None], (70, 60, 55), (175, 180, 185)).astype(np.uint8)
    pictures = np.repeat(background[None], len(ball.heights), axis=0)
    for picture, height in zip(pictures, ball.heights, strict=True):
        distance = np.hypot(rows - (floor - ball.radius - height), columns - 0.5)
        picture[distance < ball.radius] = COLOURS[ball.colour]
    return pictures


def ring(ball: Bounces, num_samples: int) -> np.ndarray:
    """Return (num_samples,) float32 sound: at every hit three decaying partials, lower for a larger ball."""
    sound = np.zeros(num_samples)
    pitch = 60 / ball.radius  # Hz
    for time, speed in ball.hits:
        begin = round(time * RATE)
        t = np.arange(max(0, min(num_samples - begin, RATE))) / RATE
        partials = sum(np.sin(2 * np.pi * pitch * k * t) * np.exp(-9 * k * t) / k for k in (1, 2.76, 5.4))
        sound[begin : begin + len(t)] += speed * partials
    return (0.5 * sound / np.abs(sound).max()).astype(np.float32)


def write_clip(path: Path, pictures: np.ndarray, sound: np.ndarray) -> None:
    """Write an .mp4 of H.264 pictures and AAC sound."""
    import av

    with atomic_path(path) as temporary, av.open(str(temporary), "w") as container:
        video = container.add_stream("libx264", rate=FPS)
        video.width = video.height = SIZE
        video.pix_fmt = "yuv420p"
        audio = container.add_stream("aac", rate=RATE)
        audio.layout = "mono"
        for picture in pictures:
            container.mux(video.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(video.encode())
        frame = av.AudioFrame.from_ndarray(sound[None], format="fltp", layout="mono")
        frame.sample_rate = RATE
        container.mux(audio.encode(frame))
        container.mux(audio.encode())


def build_parser() -> cli.ArgumentParser:
    parser = cli.ArgumentParser(__doc__)
    group = parser.add_argument_group("clips")
    group.add_argument("--out", type=Path, required=True, help="folder for the clips")
    group.add_argument("--count", type=cli.positive_int, default=6, help="how many")
    group.add_argument("--duration", type=float, default=8.0, help="seconds each")
    parser.add_common(device=False)
    return parser


@cli.entry_point
def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    if not 1 <= args.duration <= 60:
        raise cli.UsageError(f"--duration is {args.duration}, expected 1 to 60 seconds")
    prompts = []
    with Progress(args.count, "making clips", "clips") as progress:
        for number in range(1, args.count + 1):
            ball = drop_ball(np.random.default_rng([args.seed, number]), args.duration)
            path = args.out / f"ball_{number:03d}.mp4"
            write_clip(path, draw_pictures(ball), ring(ball, round(args.duration * RATE)))
            prompts.append(f"{path.stem}.npz: a {ball.colour} ball bouncing")
            print(path)
            progress.update(number)
    atomic_write_text(args.out / "prompts.txt", "\n".join(prompts) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
