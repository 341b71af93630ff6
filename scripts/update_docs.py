"""Write the tables of flags in docs/ from the settings themselves.

    python scripts/update_docs.py            # rewrites the tables
    python scripts/update_docs.py --check    # changes nothing; exit code 1 if a table is stale

A setting is declared once, in its dataclass; --help and these tables are made from it. Prints the changed documents.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from selva import cli
from selva.extraction.config import ExtractionConfig
from selva.inference.config import InferenceConfig
from selva.partition.config import PartitionConfig
from selva.training.config import RunConfig
from selva.utils.document import marked_block, with_block
from selva.utils.files import atomic_write_text
from selva.utils.settings import Setting, settings_of
from selva.weights.config import GENERAL

DOCS = Path(__file__).resolve().parents[1] / "docs"
TABLES: dict[str, type] = {
    "training.md": RunConfig,
    "data.md": ExtractionConfig,
    "partition.md": PartitionConfig,
    "inference.md": InferenceConfig,
}
COMMON = ("`--config FILE.yaml` reads settings from a file, over which the command line wins; `--debug` shows debug "
          "messages and the traceback of an error; `--help` and `--version` speak for themselves.")
BEGIN, END = "<!-- flags: scripts/update_docs.py -->", "<!-- end of flags -->"


def build_parser() -> cli.ArgumentParser:
    parser = cli.ArgumentParser(__doc__)
    group = parser.add_argument_group("documents")
    group.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a table is stale")
    group.add_argument("--docs", type=Path, default=DOCS, help="folder of the documents")
    parser.add_common(seed=False, device=False)
    return parser


def flags_block(config: type) -> str:
    """Return the Markdown tables of all settings of a script, one for each group, between their marks."""
    groups: dict[str, list[Setting]] = {}
    for setting in settings_of(config):
        groups.setdefault(setting.info.group, []).append(setting)
    groups[GENERAL] = groups.pop(GENERAL)  # last, as in --help
    return marked_block(BEGIN, [*table_lines(groups), COMMON, ""], END)


def table_lines(groups: dict[str, list[Setting]]) -> Iterator[str]:
    """Yield the lines of the tables."""
    for title, settings in groups.items():
        yield f"**{title[:1].upper()}{title[1:]}**"
        yield ""
        yield "| flag | default | |"
        yield "|---|---|---|"
        for setting in settings:
            cells = (flag_cell(setting), default_cell(setting), escaped(setting.info.help))
            yield f"| {' | '.join(cells)} |"
        yield ""


def flag_cell(setting: Setting) -> str:
    """Return a flag as it is typed, with its choices or what stands for its value."""
    info = setting.info
    if info.positional:
        return f"`{info.metavar} ...`"
    if setting.kind is bool:
        return f"`--{setting.name}/--no_{setting.name}`" if setting.default else f"`--{setting.name}`"
    if info.choices and info.metavar is None:
        value = "|".join(info.choices)
    else:
        metavar = info.metavar or {int: "N", float: "X", Path: "PATH"}.get(setting.kind, "TEXT")
        value = metavar if isinstance(metavar, str) else " ".join(metavar)
    more = " ..." if info.nargs in ("+", "*") else ""
    return escaped(f"`--{setting.name} {value}{more}`")


def default_cell(setting: Setting) -> str:
    """Return the default of a flag; empty where there is none."""
    if setting.info.required:
        return "required"
    if setting.info.default_text is not None:
        return setting.info.default_text
    if setting.kind is bool:
        return "on" if setting.default else "off"
    if setting.default is None or setting.default in ("", [], ()):
        return ""
    return f"{setting.default:g}" if isinstance(setting.default, int | float) else f"`{setting.default}`"


def escaped(text: str) -> str:
    """Return text for a cell of a Markdown table."""
    return text.replace("|", "\\|")


@cli.entry_point
def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    stale = []
    for name, config in TABLES.items():
        path = args.docs / name
        text = path.read_text(encoding="utf-8")
        if BEGIN not in text or END not in text:
            raise ValueError(f"{path}: has no place for its flags; put the lines {BEGIN} and {END} where they go")
        new = with_block(text, BEGIN, flags_block(config), END)
        if new != text:
            stale.append(path)
            if not args.check:
                atomic_write_text(path, new)
    for path in stale:
        print(path)
    return cli.EXIT_FAILED if args.check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
