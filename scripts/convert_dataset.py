"""Convert a data set: a folder of features and sounds -> MMAudio's memmap, or a memmap -> a folder of features.

    python scripts/convert_dataset.py features/dog data/dog --variant small_16k --selva_dir weights/
    python scripts/convert_dataset.py data/vgg-train features/vgg --variant small_16k

The direction follows from SOURCE. A memmap TARGET comes with its table TARGET.tsv; its clips are 8 s long, others are
left out and named. A memmap holds latents instead of sound: the feature files that are made of it hold them too, but
the sound itself cannot be had back. --decode_audio writes what the VAE and the vocoder make of the latents.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import selva_lora  # noqa: F401 -- ends here if another selva would be imported
from selva import cli
from selva.data.memmap.reader import MemmapDataset, is_memmap
from selva.extraction.convert import Conversion, LatentDecoder, folder_to_memmap, memmap_to_folder, plan_folder
from selva.extraction.extractor import FeatureExtractor
from selva.models.variants import get_variant
from selva.utils.device import resolve_device
from selva.utils.files import real_path
from selva.utils.progress import Progress
from selva.weights.find import check_weights

log = logging.getLogger("selva.convert_dataset")


def build_parser() -> cli.ArgumentParser:
    parser = cli.ArgumentParser(__doc__)
    group = parser.add_argument_group("input and output")
    group.add_argument("source", type=Path, metavar="SOURCE", help="folder of .npz files and sounds, or a memmap")
    group.add_argument("target", type=Path, metavar="TARGET",
                       help="folder to write; clips that are already there are kept")
    group = parser.add_argument_group("sound")
    group.add_argument("--normalize_audio", choices=("peak", "none"), default="peak",
                       help="folder to memmap: level before the sound is encoded; peak as the base was trained")
    group.add_argument("--decode_audio", action="store_true",
                       help="memmap to folder: also write <id>.flac, decoded from the latents; an approximation of the "
                            "sound that was encoded")
    parser.add_model()
    parser.add_common(seed=False)
    return parser


class Tally:
    """Counts what became of the clips, names those that could not be converted, and moves the bar."""

    def __init__(self, progress: Progress) -> None:
        self.progress, self.seen, self.made, self.failed = progress, 0, 0, 0

    def __call__(self, item: Conversion) -> None:
        self.made += bool(item.made)
        if item.problem:
            self.failed += 1
            log.error("left out %s", item.problem)
        self.seen += 1
        self.progress.update(min(self.seen, self.progress.total), item.name)

    def exit_code(self) -> int:
        """Say what was done; return 1 if anything could not be."""
        current = self.seen - self.made - self.failed
        log.info("%d converted, %d already current, %d left out", self.made, current, self.failed)
        return cli.EXIT_FAILED if self.failed else 0


def to_memmap(args: argparse.Namespace) -> int:
    clips, problems = plan_folder(args.source)
    needs = {"vae": any(clip.sound_path for clip in clips), "clip_text": not all(clip.has_text for clip in clips)}
    check_weights(args.variant, args.selva_dir, [part for part, needed in needs.items() if needed])
    extractor = FeatureExtractor(get_variant(args.variant), args.selva_dir, resolve_device(args.device))
    with Progress(len(clips) + len(problems), "converting", "clips") as progress:
        tally = Tally(progress)
        for problem in problems:
            tally(problem)
        folder_to_memmap(clips, args.target, extractor, args.normalize_audio, tally)
    print(args.target)
    return tally.exit_code()


def to_folder(args: argparse.Namespace) -> int:
    variant = get_variant(args.variant)
    rows = MemmapDataset(args.source, variant)
    decoder = None
    if args.decode_audio:
        check_weights(args.variant, args.selva_dir, ("vae", "vocoder"))
        decoder = LatentDecoder(variant, args.selva_dir, resolve_device(args.device))
        log.warning("the sounds are decoded from latents: they are approximations of those that were encoded")
    else:
        log.warning("a memmap holds no sound: train_lora.py wants it beside the features. Put it there, or give "
                    "--decode_audio for an approximation")
    with Progress(len(rows), "converting", "clips") as progress:
        tally = Tally(progress)

        def report(item: Conversion) -> None:
            tally(item)
            for path in item.made:
                print(path, flush=True)

        memmap_to_folder(rows, args.target, variant, decoder, report)
    return tally.exit_code()


@cli.entry_point
def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    if real_path(args.source) == real_path(args.target):
        raise cli.UsageError(f"{args.source}: is source and target at once; choose another target")
    if is_memmap(args.source):
        return to_folder(args)
    if args.decode_audio:
        raise cli.UsageError(f"--decode_audio: {args.source} is a folder of features, its sound lies beside them")
    return to_memmap(args)


if __name__ == "__main__":
    sys.exit(main())
