"""Make an average of another width, after the training, from the snapshots that the run has left.

    python scripts/make_ema.py runs/dog --sigma_rel 0.08 --output dog_ema.pt
    python scripts/make_ema.py base_output --sigma_rel 0.15 --step 200000 --output generator.safetensors

RUN_DIR is the output folder of train_lora.py --ema power, of the training of a base model, or of MMAudio's own trainer.
Writes an adapter or a generator, as the run trained one. A width is the deviation of the average in relation to the
length of the training: 0.05 is MMAudio's; wider averages are calmer and further behind. Prints the path, and on stderr
how far the result is from an average that would have been kept all along.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import selva_lora  # noqa: F401 -- ends here if another selva would be imported
from selva import cli
from selva.utils.text import counted

log = logging.getLogger("selva.make_ema")

TOO_FAR = 0.1  # of the noise of single steps, above which a result is called an approximation


def build_parser() -> cli.ArgumentParser:
    parser = cli.ArgumentParser(__doc__)
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="output folder of the run")
    parser.add_argument("--sigma_rel", type=float, required=True, metavar="X",
                        help="width of the average, more than 0 and at most 0.288")
    parser.add_argument("--step", type=cli.positive_int, metavar="N",
                        help="step of the training at which it is taken; by default that of the newest snapshot")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE",
                        help="file to write: .pt or .safetensors for an adapter, .pth or .safetensors for a generator")
    parser.add_common(seed=False, device=False)
    return parser


@cli.entry_point
def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    from selva.training.synthesis import make_average  # PyTorch takes seconds to import; mistakes were told before

    made = make_average(args.run_dir, args.sigma_rel, args.output, args.step)
    log.info("%s: %s of width %g at step %d, from %d of %s, %.1e away from one that was tracked", made.path,
             "adapter" if made.adapter else "generator", args.sigma_rel, made.step, made.used,
             counted(made.found, "snapshot"), made.error)
    if made.error > TOO_FAR:
        log.warning("this width and step are far from the snapshots: %.0f %% of the noise of single steps differ from "
                    "a tracked average; take a width between those of the tracks, or a step near a snapshot",
                    100 * made.error)
    print(made.path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
