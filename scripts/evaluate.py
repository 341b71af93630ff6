"""Compare generated sounds with recordings, and say how sure each figure is.

    python scripts/evaluate.py --generated output --reference recordings
    python scripts/evaluate.py --generated output --reference recordings --videos clips \\
        --synchformer weights/synchformer_state_dict.pth --clap weights/clap --captions captions.tsv

Sounds of one name belong together. Without any weights: distances of spectrum and timbre, agreement of the moments at
which something happens, loudness, brightness, silence. With the networks that you name: DeSync, CLAP score, classes,
and distances between both sets as a whole. Prints a table with a 95 % interval for every figure, and writes it with the
figures of every pair to --output_dir: evaluation.html (with players), evaluation.json, evaluation.csv. Stopped and run
again it goes on. Exit code 1 if some pairs could not be compared. docs/evaluation.md says which figure to believe.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence

import selva_lora  # noqa: F401 -- ends here if another selva would be imported
from selva import cli
from selva.evaluation.config import EvaluationConfig

log = logging.getLogger("selva.evaluate")


def build_parser() -> cli.ArgumentParser:
    parser = cli.ArgumentParser(__doc__)
    parser.add_settings(EvaluationConfig)
    parser.add_common(seed=False)
    return parser


@cli.entry_point
def main(argv: Sequence[str] | None = None) -> int:
    config = cli.config_from(EvaluationConfig, build_parser().parse_args(argv))
    from selva.evaluation.outputs import table, write_outputs  # PyTorch takes seconds to import
    from selva.evaluation.run import evaluate

    evaluation = evaluate(config)
    paths = write_outputs(evaluation, config.output_dir)
    for line in table(evaluation):
        print(line)
    log.info("page: %s", paths[0])
    return cli.EXIT_FAILED if evaluation.failed else 0


if __name__ == "__main__":
    sys.exit(main())
