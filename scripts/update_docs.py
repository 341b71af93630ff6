"""Write what docs/ says about flags and files from the code itself.

    python scripts/update_docs.py            # rewrites the tables
    python scripts/update_docs.py --check    # changes nothing; exit code 1 if a table is stale

A setting is declared once, in its dataclass; --help and the tables of flags are made from it. The tree of docs/code.md
is made from the first lines of the modules. Prints the changed documents.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import selva_lora  # noqa: F401 -- ends here if another selva would be imported
from selva import cli
from selva.extraction.config import ExtractionConfig
from selva.inference.config import InferenceConfig
from selva.partition.captioning.config import CaptionConfig
from selva.partition.config import PartitionConfig
from selva.training.base.config import BaseTrainConfig
from selva.training.config import RunConfig
from selva.utils.document import marked_block, with_block
from selva.utils.errors import UserError
from selva.utils.files import atomic_write_text
from selva.utils.settings import Setting, settings_of
from selva.weights.config import GENERAL

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
TABLES: dict[str, type] = {
    "training.md": RunConfig,
    "base_training.md": BaseTrainConfig,
    "data.md": ExtractionConfig,
    "partition.md": PartitionConfig,
    "captions.md": CaptionConfig,
    "inference.md": InferenceConfig,
}
TREE_PAGE, TREE_BEGIN, TREE_END = "code.md", "<!-- tree: scripts/update_docs.py -->", "<!-- end of tree -->"
TREES = ("selva", "toyworld", "comfyui", "scripts", "benchmarks")
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
            cells = (flag_cell(setting), default_cell(setting), escaped(setting.info.described))
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


def tree_block(root: Path = ROOT) -> str:
    """Return the annotated tree of the code: a list for each folder, a line for each file, between their marks."""
    lines: list[str] = []
    scripts = sorted(path for path in root.glob("*.py") if path.name not in ("setup.py", "__init__.py"))
    lines += ["**The command line**", "", *(file_line(path, path.name) for path in scripts), ""]
    for tree in TREES:
        folders = sorted({path.parent for path in (root / tree).rglob("*.py")})
        for folder in folders:
            heading = f"**`{folder.relative_to(root).as_posix()}/`**"
            package = folder / "__init__.py"
            lines += [f"{heading} {summary(package)}" if package.exists() else heading, ""]
            files = [path for path in sorted(folder.glob("*.py")) if path.name != "__init__.py"]
            lines += [*(file_line(path, path.name) for path in files), ""]
    return marked_block(TREE_BEGIN, lines, TREE_END)


def file_line(path: Path, name: str) -> str:
    return f"- `{name}` {summary(path)}"


def summary(path: Path) -> str:
    """Return the first sentence of a module's docstring, without its full stop.

    Raises:
        ValueError: it has no docstring.
    """
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    if not text:
        raise UserError(f"{path}: has no docstring; its first line goes into docs/{TREE_PAGE}")
    sentence = re.split(r"(?<!\.)\. ", text.split("\n\n")[0].replace("\n", " "))[0]
    return re.sub(r":\w+:`~?", "`", sentence).replace("``", "`").rstrip(".")


def blocks() -> Iterator[tuple[str, str, str, str]]:
    """Yield (document, begin, end, block) of everything that is written."""
    for name, config in TABLES.items():
        yield name, BEGIN, END, flags_block(config)
    yield TREE_PAGE, TREE_BEGIN, TREE_END, tree_block()


@cli.entry_point
def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    stale = []
    for name, begin, end, block in blocks():
        path = args.docs / name
        text = path.read_text(encoding="utf-8")
        if begin not in text or end not in text:
            raise UserError(f"{path}: has no place for its tables; put the lines {begin} and {end} where they go")
        new = with_block(text, begin, block, end)
        if new != text:
            stale.append(path)
            if not args.check:
                atomic_write_text(path, new)
    for path in stale:
        print(path)
    return cli.EXIT_FAILED if args.check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
