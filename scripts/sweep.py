#!/usr/bin/env python3
"""Train with several settings, one run after the other, and rank what came out.

    python scripts/sweep.py configs/sweeps/example.yaml
    python scripts/sweep.py sweep.yaml --output_dir sweeps/dog --best_to best.pt
    torchrun --nproc_per_node 4 scripts/sweep.py sweep.yaml        # one run on each GPU

Writes a folder per run, sweep.tsv and sweep.html. What is done is not done again, so a sweep that was stopped goes on.
"""

from __future__ import annotations

import logging
import shutil
import signal
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import selva_lora  # noqa: F401 -- ends here if another selva would be imported
from selva import cli
from selva.training.config import RunConfig
from selva.utils.errors import UserError
from selva.utils.files import atomic_path
from selva.utils.settings import settings_text
from selva.utils.torchrun import work_alone

if TYPE_CHECKING:
    from selva.training.sweep import RunResult

log = logging.getLogger("selva.sweep")


def build_parser() -> cli.ArgumentParser:
    parser = cli.ArgumentParser(__doc__)
    group = parser.add_argument_group("sweep")
    group.add_argument("sweep", type=Path, metavar="SWEEP.yaml", help="output_dir, base, seeds, and grid, vary or runs")
    group.add_argument("--output_dir", type=Path, metavar="DIR",
                       help="folder of the runs, of sweep.tsv and sweep.html (default: output_dir in the file)")
    group.add_argument("--best_to", type=Path, metavar="FILE", help="copy the adapter of the best run to this file")
    group.add_argument("--list", action="store_true", help="check all settings and list the runs, and train nothing")
    parser.add_common(seed=False, device=False)
    return parser


class _RunParser(cli.ArgumentParser):
    """Parser of the settings of a run, whose mistakes are those of a file."""

    def error(self, message: str) -> Any:
        raise UserError(message)


def configure(settings: Mapping[str, Any], folder: Path) -> tuple[RunConfig, Mapping[str, Any]]:
    """Return the configuration of a run through the parser of ``train_lora.py``, so that nothing else is allowed."""
    parser = _RunParser(None)
    parser.add_settings(RunConfig)
    parser.add_common()
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "settings.yaml"
        path.write_text(settings_text({**settings, "output_dir": folder, "resume": "auto"}), encoding="utf-8")
        try:
            args = parser.parse_args(["--config", str(path)])
            return cli.config_from(RunConfig, args), cli.saved_settings(args)
        except ValueError as error:
            raise UserError(f"{folder.name}: {str(error).removeprefix(f'--config {path}: ')}") from error


def copy_best(results: Sequence[RunResult], target: Path) -> None:
    """Copy the adapter of the best run, if any is done."""
    from selva.training.sweep import ranked

    best = ranked(results)[0].best
    if best.problem or best.adapter is None:
        raise UserError(f"--best_to {target}: no run is done")
    if best.adapter.suffix != target.suffix:
        raise UserError(f"--best_to {target}: the adapter is a {best.adapter.suffix}, expected the same ending")
    target.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(target) as temporary:
        shutil.copyfile(best.adapter, temporary)
    print(target)


@cli.entry_point
def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    rank, size = work_alone()
    from selva.training.sweep import NOT_YET, ranked, read_sweep, remarks, run_sweep, table_rows, write_results

    output_dir, runs = read_sweep(args.sweep, args.output_dir)
    for run in runs:  # before hours of training
        configure(run.settings, output_dir / run.name)
    if args.list:
        for run in runs:
            print(run.name)
        return 0
    results, stopped = run_sweep(output_dir, runs, configure, first=rank * len(runs) // size)
    paths = write_results(output_dir, results)
    if stopped is not None:
        return cli.EXIT_INTERRUPTED if stopped == signal.SIGINT else cli.EXIT_TERMINATED
    if size == 1 or not any(result.problem == NOT_YET for result in results):  # of several processes, the last one
        for row in table_rows(ranked(results)):
            print("\t".join(row))
        for remark in remarks(ranked(results)):
            log.info("%s", remark)
        for path in paths:
            print(path)
        if args.best_to is not None:
            copy_best(results, args.best_to)
    failed = [result for result in results if result.problem not in ("", NOT_YET)]
    return cli.EXIT_FAILED if failed else 0


if __name__ == "__main__":
    cli.leave(main())
