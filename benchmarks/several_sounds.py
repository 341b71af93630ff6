"""Teach the built-in model several new sounds with one adapter, from unequal numbers of clips, and say which it makes.

    python benchmarks/several_sounds.py --sounds gong:20 laser:8 --work_dir work

Makes the clips that are not in the work folder, extracts them, trains one adapter with train_lora.py --balance sets,
each sound a data set of its own, and judges sounds of scenes that it was not trained on: the share that a classifier
fitted on true sound recognises, before and after, for each new sound and for those that the model knows. Prints a table
and the seconds of CPU time.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from user_scripts import ROOT, run_script

import selva_lora  # noqa: F401 -- ends here if another selva would be imported
from selva import cli
from selva.checkpoint import load_adapter
from selva.data.source import DataSource
from selva.lora.merge import merge_adapter
from selva.utils.device import resolve_device
from selva.utils.metrics_log import MetricsFile
from selva.weights.load import load_generator
from toyworld import CLASSES, UNSEEN
from toyworld.judging import fit_classifier
from toyworld.measure import MEASURE_SEED, ToyGenerator, mean, recognised, single_cases

log = logging.getLogger("selva.several_sounds")

VARIANT, DURATION_SEC = "tiny_16k", 8.0
JUDGED_FROM = MEASURE_SEED + 700_000  # seeds of scenes that no training and no other measurement uses


def build_parser() -> cli.ArgumentParser:
    parser = cli.ArgumentParser(__doc__)
    group = parser.add_argument_group("measurement")
    group.add_argument("--sounds", nargs="+", metavar="NAME:CLIPS", default=["gong:20", "laser:8"],
                       help=f"new sounds ({', '.join(UNSEEN)}) and how many clips teach each")
    group.add_argument("--balance", choices=("sets", "clips"), default="sets", help="as of train_lora.py")
    group.add_argument("--count", type=cli.positive_int, default=12, help="scenes per new sound that are judged")
    group.add_argument("--known", type=int, default=2, help="scenes per known sound that are judged; 0: none")
    group.add_argument("--preset", type=Path, default=ROOT / "configs" / "tiny_new_sound.yaml",
                       help="settings of train_lora.py")
    group.add_argument("--steps", type=cli.positive_int, help="updates, if not those of the preset")
    group.add_argument("--no_preserve", action="store_true",
                       help="leave out the sounds to preserve of the preset: quicker, and known sounds suffer")
    group.add_argument("--work_dir", type=Path, required=True, help="folder for clips, features and the run")
    parser.add_common()
    return parser


def teach(sounds: Sequence[tuple[str, int]], args) -> float:
    """Make the clips and train the adapter; return the seconds of CPU time of the training."""
    folders = []
    for number, (name, clips) in enumerate(sounds):
        made, features = args.work_dir / f"{name}_clips", args.work_dir / name
        if not (made / "prompts.txt").is_file():  # else they are there from an earlier call
            run_script("scripts/make_demo_clips.py", "--sound", name, "--count", clips, "--out", made,
                       "--seed", args.seed + 1000 * number)
        run_script("extract_features.py", made, "--output_dir", features, "--prompts", made / "prompts.txt",
                   "--variant", VARIANT, "--device", args.device)
        folders.append(features)
    more = [*(["--steps", args.steps] if args.steps else []), *(["--preserve"] if args.no_preserve else [])]
    return run_script(
        "train_lora.py", "--config", args.preset, *more, "--data_dir", *folders, "--balance", args.balance,
        "--output_dir", args.work_dir / "run", "--variant", VARIANT, "--device", args.device, "--seed", args.seed,
        "--no_verdict")


@cli.entry_point
def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    sources = [DataSource.parse(text) for text in args.sounds]
    sounds = [(str(source.path), round(source.weight)) for source in sources]
    if unknown := [name for name, _ in sounds if name not in UNSEEN]:
        raise cli.UsageError(f"--sounds {' '.join(unknown)}: expected some of {', '.join(UNSEEN)}, each as NAME:CLIPS")
    seconds = teach(sounds, args)
    adapter = load_adapter(args.work_dir / "run" / "adapter_final.pt")
    device, classifier = resolve_device(args.device), fit_classifier()
    maker = ToyGenerator(VARIANT, device, clip_features=adapter.meta["clip_features"] == "use")
    base, taught = (load_generator(VARIANT, None, device) for _ in range(2))
    merge_adapter(taught, adapter, 1.0)
    print("| sound | clips | recognised before | after | held-out loss before | after |\n|---|---|---|---|---|---|")
    losses = MetricsFile(args.work_dir / "run" / "metrics.jsonl").set_losses()
    groups = [(name, clips, [name], args.count) for name, clips in sounds]
    groups += [("the known ones", 0, list(CLASSES), args.known)] if args.known > 0 else []
    for number, (name, clips, names, count) in enumerate(groups):
        cases = single_cases(names, count, JUDGED_FROM + 10_000 * number, DURATION_SEC)
        encoded, shares = maker.encode(cases), []
        for generator in (base, taught):
            made = maker.sounds(generator, encoded, DURATION_SEC, first_seed=args.seed)
            shares.append(f"{100 * mean(recognised(made, [case.name for case in cases], classifier)):.0f} %")
        _, curve = losses.get(name, ([], []))
        loss = [f"{curve[0]:.3f}", f"{curve[-1]:.3f}"] if curve else ["", ""]
        print(f"| {' | '.join([name, str(clips or ''), *shares, *loss])} |")
    print(f"training: {seconds:.0f} s of CPU time")
    return 0


if __name__ == "__main__":
    sys.exit(main())
