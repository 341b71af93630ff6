"""Make videos with sound to try the toolkit on: things of a small world that are struck, bounce, turn or flow.

    python scripts/make_demo_clips.py --out demo_clips --count 6                     # a sound the built-in model lacks
    python scripts/make_demo_clips.py --out demo_clips --sound bell --objects 2      # with something else beside it
    python scripts/make_demo_clips.py --list

Writes gong_001.mp4 ... (H.264 and AAC), gong_001.flac ... (the clean sound of the thing alone), prompts.txt (a line for
every clip) and events.tsv (what happens when). The same seed makes the same clips. Prints the videos, one per line.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

import selva_lora  # noqa: F401 -- ends here if another selva would be imported
from selva import cli
from selva.media import write_audio
from selva.utils.files import atomic_write_text
from selva.utils.progress import Progress
from toyworld import CLASSES, UNSEEN, Scene, get_class, make_scene

RATE = 16_000  # samples per second
EVENT_COLUMNS = ("id", "object", "sound", "colour", "time_sec", "end_sec", "strength")
DEFAULT_SOUND = next(iter(UNSEEN))


def build_parser() -> cli.ArgumentParser:
    parser = cli.ArgumentParser(__doc__)
    group = parser.add_argument_group("clips")
    group.add_argument("--out", type=Path, help="folder for the clips")
    group.add_argument("--sound", metavar="NAME", default=DEFAULT_SOUND, help="what is seen and heard; see --list")
    group.add_argument("--list", action="store_true", help="print the sounds there are, and end")
    group.add_argument("--overview", type=Path, metavar="FILE.png",
                       help="draw everything that there is to see into one picture, and end")
    group.add_argument("--count", type=cli.positive_int, default=6, help="how many")
    group.add_argument("--duration", type=float, default=8.0, help="seconds each")
    group.add_argument("--objects", type=int, choices=(1, 2), default=1,
                       help="2 puts another thing beside it, which is heard in the video but not in the .flac")
    group.add_argument("--prompts_per_clip", type=cli.positive_int, default=1, metavar="N",
                       help="lines of a clip in prompts.txt, each in other words; training draws one at every use")
    group.add_argument("--size", type=cli.positive_int, default=224, help="pixels per side, even")
    group.add_argument("--lossless", action="store_true", help="sound of the videos as FLAC instead of AAC")
    parser.add_common(device=False)
    return parser


def list_sounds() -> str:
    """Return a line for every sound: its name, whether the built-in model knows it, what it is."""
    return "\n".join(
        f"{name:8}  {'new to tiny_16k  ' if name in UNSEEN else 'known to tiny_16k'}  {kind.description}"
        for name, kind in {**UNSEEN, **CLASSES}.items()
    )


def draw_scene(args: argparse.Namespace, sound: str, number: int) -> tuple[Scene, int, list[str]]:
    """Return the scene of clip ``number``, which of its objects is ``sound``, and prompts for it, its own one last."""
    rng = np.random.default_rng([args.seed, number])
    others = [name for name in CLASSES if name != sound]
    classes = [sound, str(rng.choice(others))][: args.objects]
    scene = make_scene(int(rng.integers(2**32, 2**40)), classes, args.objects, args.duration)
    index = next(i for i, thing in enumerate(scene.objects) if thing.name == sound)
    return scene, index, scene.prompts(rng, args.prompts_per_clip, index)


def event_rows(stem: str, scene: Scene) -> list[str]:
    """Return a line of events.tsv for everything that happens."""
    return [
        "\t".join((stem, str(index), thing.name, thing.colour, f"{event.time_sec:.4f}",
                   "" if event.end_sec is None else f"{event.end_sec:.4f}", f"{event.strength:.3f}"))
        for index, thing in enumerate(scene.objects)
        for event in thing.events
    ]


def check_arguments(args: argparse.Namespace) -> None:
    """Raise UsageError with everything that is wrong on the command line."""
    problems = []
    if args.out is None:
        problems.append("--out is missing: the folder for the clips")
    elif (args.out / "prompts.txt").exists() and not (args.out / "events.tsv").exists():
        problems.append(f"--out {args.out}: holds a prompts.txt that was not made with demo clips, and would be "
                        "replaced; name another folder")
    if args.sound not in {**CLASSES, **UNSEEN}:
        problems.append(f"--sound {args.sound}: expected one of {', '.join([*UNSEEN, *CLASSES])}")
    if not 1.5 <= args.duration <= 60:
        problems.append(f"--duration is {args.duration}, expected 1.5 to 60 seconds")
    if args.size % 2 or not 32 <= args.size <= 1024:
        problems.append(f"--size is {args.size}, expected an even number from 32 to 1024")
    if args.seed < 0:
        problems.append(f"--seed is {args.seed}, expected 0 or more")
    if problems:
        raise cli.UsageError("; ".join(problems))


@cli.entry_point
def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    if args.list:
        print(list_sounds())
        return 0
    if args.overview is not None:
        from toyworld.overview import write_overview

        write_overview(args.overview)
        print(args.overview)
        return 0
    check_arguments(args)
    sound, prompts, events = get_class(args.sound).name, [], []
    with Progress(args.count, "making clips", "clips") as progress:
        for number in range(1, args.count + 1):
            scene, index, wordings = draw_scene(args, sound, number)
            path = args.out / f"{sound}_{number:03d}.mp4"
            scene.write(path, args.size, rate=RATE, lossless=args.lossless)
            write_audio(path.with_suffix(".flac"), torch.from_numpy(scene.sound(RATE, only=index)), RATE)
            prompts += [f"{path.stem}.npz: {prompt}" for prompt in wordings]
            events += event_rows(path.stem, scene)
            print(path)
            progress.update(number)
    atomic_write_text(args.out / "prompts.txt", "\n".join(prompts) + "\n")
    atomic_write_text(args.out / "events.tsv", "\n".join(["\t".join(EVENT_COLUMNS), *events]) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
