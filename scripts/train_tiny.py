"""Train the built-in model tiny_16k from scratch, on scenes of its procedural world.

    python scripts/train_tiny.py --output_dir runs/tiny                     # everything, stage after stage
    python scripts/train_tiny.py --output_dir runs/tiny --stages sync finetune --device cuda
    python scripts/train_tiny.py --output_dir runs/tiny --stages --export selva/weights/assets

vae         log-mel spectrograms <-> latents, on sounds of the world and of no class
decoder     latents -> spectrograms once more, with weight on what is loud
vocoder     the magnitudes that a mel spectrogram stands for
clip        which picture goes with which sentence
sync        when the thing that the prompt names is struck, or runs: T5 and the video encoder together
generator   flow matching, on features computed from the ground truth
finetune    flow matching, on the features that the encoders really give

A stage that was interrupted continues where it stopped, and ends with the same weights. A finished stage is not run
again unless --restart is given. Prints the path of every finished stage's weights.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

import selva_lora  # noqa: F401 -- ends here if another selva would be imported
from selva import cli
from selva.utils.device import resolve_device
from selva.utils.errors import UserError
from selva.utils.files import atomic_path
from selva.utils.text import counted
from selva.weights.find import asset_name
from toyworld.training.stages import STAGES, Recipe, StageRunner

log = logging.getLogger("selva.train_tiny")

LARGEST_PACKAGE = 15_000_000  # bytes of all weights together


def build_parser() -> cli.ArgumentParser:
    parser = cli.ArgumentParser(__doc__)
    group = parser.add_argument_group("training")
    group.add_argument("--output_dir", type=Path, required=True, help="folder for states, caches, metrics and weights")
    group.add_argument("--stages", nargs="*", choices=STAGES, default=list(STAGES), metavar="STAGE",
                       help=f"stages to train, of {', '.join(STAGES)}; none with --export alone")
    group.add_argument("--restart", action="store_true", help="forget what the given stages have done so far")
    group.add_argument("--steps", type=cli.positive_int, help="steps of every given stage instead of its own number")
    group.add_argument("--batch_size", type=cli.positive_int, help="likewise; more than the default suits a GPU")
    group.add_argument("--scale", type=float, default=1.0,
                       help="share of the data: fewer scenes and sounds for a quick look, more for a long run")
    group.add_argument("--threads", type=cli.positive_int, help="CPU threads; all that PyTorch likes by default")
    group.add_argument("--export", type=Path, metavar="DIR",
                       help="afterwards write the weights of all parts there, in float16, as the package holds them")
    parser.add_common()
    parser.set_defaults(seed=0)
    return parser


def export(runner: StageRunner, folder: Path) -> list[Path]:
    """Write one file for every part and return their paths.

    Raises:
        ValueError: together they are larger than the package allows.
    """
    from safetensors.torch import save_file

    parts = runner.published()
    size = sum(tensor.nbytes for tensors in parts.values() for tensor in tensors.values())
    if size > LARGEST_PACKAGE:
        raise UserError(f"the weights take {counted(size, 'byte', grouped=True)}, expected at most {LARGEST_PACKAGE:,}")
    paths = [folder / asset_name(runner.variant.name, part) for part in parts]
    for path, tensors in zip(paths, parts.values(), strict=True):
        with atomic_path(path) as temporary:
            save_file(tensors, temporary)
    log.info("%.1f MB in %s", size / 1e6, counted(len(paths), "file"))
    return paths


def chosen_recipe(args: argparse.Namespace) -> Recipe:
    """Return the recipe with the changes of the command line."""
    if not args.scale > 0:
        raise cli.UsageError(f"--scale is {args.scale}, expected more than 0")
    return Recipe().scaled(args.scale).with_loops(steps=args.steps, batch_size=args.batch_size, seed=args.seed)


@cli.entry_point
def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    device = resolve_device(args.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    runner = StageRunner(args.output_dir, device, chosen_recipe(args), resume=not args.restart)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    cli.write_settings(args.output_dir / "config.yaml", args)
    for stage in (stage for stage in STAGES if stage in args.stages):
        if runner.is_finished(stage) and not args.restart:
            log.info("%s: finished before; train it anew with --restart", stage)
        else:
            runner.run(stage)
        print(runner.weights_path(stage))
    if args.export:
        for path in export(runner, args.export):
            print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
