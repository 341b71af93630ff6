"""Teach the built-in model a sound that it does not know, and hear the difference, on any system.

    python scripts/quickstart.py              # writes quickstart_out/report.html
    python scripts/quickstart.py --fast       # a look at all the steps in about a minute; too short to learn the sound

Makes clips of a gong, extracts, trains, generates before and after for new videos, and writes one page about it. Needs
the installed package and nothing else; quickstart.sh and quickstart.ps1 install it first and then call this.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import selva_lora  # noqa: F401 -- ends here if another selva would be imported
from selva import cli
from selva.utils.errors import UserError
from selva.utils.text import counted

ROOT = Path(__file__).resolve().parents[1]


def build_parser() -> cli.ArgumentParser:
    parser = cli.ArgumentParser(__doc__)
    parser.add_argument("--fast", action="store_true", help="six clips and 30 steps")
    parser.add_argument("--sound", default=os.environ.get("SOUND", "gong"), metavar="NAME",
                        help="sound to teach (scripts/make_demo_clips.py --list shows them; also: the environment "
                             "variable SOUND)")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "quickstart_out")), metavar="DIR",
                        help="where everything goes (also: the environment variable OUT)")
    parser.add_common(seed=False, device=False)
    return parser


class Steps:
    """Runs scripts one after the other, shows each as it is typed, and notes it for the page.

    Args:
        notes: file that gets the commands.
    """

    def __init__(self, notes: Path) -> None:
        self.notes, self.started = notes, time.monotonic()
        notes.parent.mkdir(parents=True, exist_ok=True)
        notes.write_text("", encoding="utf-8")

    def say(self, text: str) -> None:
        print(f"\n== {text}   [{time.monotonic() - self.started:.0f} s]", flush=True)

    def run(self, script: str, *arguments: object, note: bool = True) -> None:
        """Run a script of this folder.

        Raises:
            ValueError: it failed; what it said is on the terminal.
        """
        words = [script, *map(str, arguments)]
        line = "python " + " ".join(f'"{word}"' if " " in word else word for word in words)
        print(line, flush=True)
        if note:
            with open(self.notes, "a", encoding="utf-8") as file:
                file.write(line + "\n")
        if subprocess.run([sys.executable, *words], cwd=ROOT, check=False).returncode:
            raise UserError(f"this step failed, see above: {line}")


@cli.entry_point
def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    out = args.out if args.out.is_absolute() else ROOT / args.out
    # Of its own, so that another sound or another number of clips does not mix with it.
    work = out / f"{args.sound}{'_fast' if args.fast else ''}"
    steps = Steps(work / "commands.txt")
    clips, new, options = 16, 3, ["--config", "configs/tiny_new_sound.yaml"]
    if args.fast:
        clips, new = 6, 1
        options += ["--steps", "30", "--batch_size", "4", "--save_every", "30", "--val_every", "15", "--log_every", "5",
                    "--preserve", "a bell rings"]

    steps.say(f"1 of 5: {counted(clips, 'short video')} of something the model does not know: {args.sound}")
    steps.run("scripts/make_demo_clips.py", "--sound", args.sound, "--count", clips, "--prompts_per_clip", 4, "--out",
              work / "clips")
    steps.say("2 of 5: extract what the model sees and hears")
    steps.run("extract_features.py", work / "clips", "--output_dir", work / "features", "--prompts",
              work / "clips" / "prompts.txt", "--variant", "tiny_16k")
    steps.say("3 of 5: train an adapter")
    steps.run("train_lora.py", *options, "--data_dir", work / "features", "--output_dir", work / "run")
    steps.say(f"4 of 5: sound for {'a new video' if new == 1 else f'{new} new videos'}, before and after")
    steps.run("scripts/make_demo_clips.py", "--sound", args.sound, "--count", new, "--seed", 7, "--out", work / "new")
    for name, adapter in (("before", []), ("after", ["--adapter", work / "run" / "adapter_final.pt"])):
        steps.run("infer.py", work / "new", "--prompts", work / "new" / "prompts.txt", "--variant", "tiny_16k",
                  "--clip_features", "use", *adapter, "--output", work / name)
    steps.say("5 of 5: one page about it")
    steps.run("scripts/make_report.py", "--run", work / "run", "--before", work / "before", "--after", work / "after",
              "--true", work / "new", "--title", f"tiny_16k learns a new sound: {args.sound}", "--commands",
              steps.notes, "--output", out / "report.html", note=False)
    steps.say("done")
    print(f"Open {out / 'report.html'} in a browser; {work / 'run' / 'report.html'} is about the training alone.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
