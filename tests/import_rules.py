"""Rules about imports, sizes and names of files, checked on the source without running it.

Every check takes a :class:`Tree` and returns one sentence for each breach: file, line, and the rule that it breaks.
Imports count wherever they stand: at the top of a module, inside a function, or under ``TYPE_CHECKING``.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

# From the bottom to the top; a file may import from its own layer and from those before it.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("utils", "sequence", "flow", "lora"),
    ("models", "media", "features"),
    ("audio", "inputs", "weights", "sampling", "checkpoint", "cli"),
    ("data", "partition", "evaluation"),
    ("extraction", "training"),
    ("inference",),
)
SCRIPTS = ("partition_clips", "extract_features", "train_lora", "infer")
SCRIPT_FOLDERS = ("scripts", "benchmarks")
NODES = "comfyui"  # of ComfyUI, above the library like the scripts
ABOVE_THE_LIBRARY = (*SCRIPTS, *SCRIPT_FOLDERS, "toyworld", NODES)
TORCHRUN_NAMES = frozenset((
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID",
))
TORCHRUN_FILE = "selva/utils/torchrun.py"
MOST_ENTRIES, MOST_LINES, MOST_SCRIPT_LINES = 21, 450, 250


@dataclass(frozen=True)
class Import:
    """One imported module: ``target`` in ``line`` of the file ``path``, which is the module ``source``."""

    path: str
    line: int
    source: str
    target: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.source} imports {self.target}"


class Tree:
    """Python files of a checkout and what they import from each other.

    Attributes:
        files: module -> path relative to the root; a package goes by its own name.
        imports: those of modules of this tree. foreign: those of all others, ``argparse`` among them.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        paths = [root / f"{name}.py" for name in SCRIPTS]
        for folder in ("selva", "toyworld", NODES, *SCRIPT_FOLDERS):
            paths += sorted((root / folder).rglob("*.py"))
        self.files = {module_name(path.relative_to(root)): path.relative_to(root) for path in paths if path.is_file()}
        self.syntax = {name: ast.parse((root / path).read_text(encoding="utf-8")) for name, path in self.files.items()}
        self.imports: list[Import] = []
        self.foreign: list[Import] = []
        for source, path in self.files.items():
            for node in ast.walk(self.syntax[source]):
                if not isinstance(node, ast.Import | ast.ImportFrom | ast.Call):
                    continue
                for name in self._imported(source, node):
                    known = name in self.files
                    (self.imports if known else self.foreign).append(Import(str(path), node.lineno, source, name))

    def lines(self, path: Path) -> int:
        return len((self.root / path).read_text(encoding="utf-8").splitlines())

    def _imported(self, source: str, node: ast.Import | ast.ImportFrom | ast.Call) -> Iterable[str]:
        if isinstance(node, ast.Import):
            return dict.fromkeys(self._module(source, alias.name) for alias in node.names)
        if isinstance(node, ast.Call):
            named = getattr(node.func, "attr", getattr(node.func, "id", "")) == "import_module"
            arguments = [arg.value for arg in node.args[:1] if named and isinstance(arg, ast.Constant)]
            return [value for value in arguments if isinstance(value, str)]
        base = self._module(source, node.module or "")
        if node.level:
            package = self.files[source].name == "__init__.py"
            parts = source.split(".")[: (1 if package else 0) - node.level or None]
            base = ".".join([*parts, *filter(None, [node.module])])
        inner = [f"{base}.{alias.name}" for alias in node.names]  # a module, or a name that the base defines
        return dict.fromkeys(name if name in self.files else base for name in inner)

    def _module(self, source: str, name: str) -> str:
        """Return the module that a name means; scripts find those of their own folder without its name."""
        folder = source.partition(".")[0]
        beside = f"{folder}.{name}"
        return beside if folder in SCRIPT_FOLDERS and beside in self.files else name


def module_name(path: Path) -> str:
    """Return the name by which a file is imported."""
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_script(module: str) -> bool:
    """Return True for the scripts at the top and the modules of scripts/ and benchmarks/."""
    return module.partition(".")[0] in (*SCRIPTS, *SCRIPT_FOLDERS)


def entry(module: str) -> str | None:
    """Return the name of the file or folder at the top of selva/ that holds a module; None outside."""
    top, _, rest = module.partition(".")
    return rest.partition(".")[0] or None if top == "selva" else None


def layer(module: str) -> int | None:
    """Return the number of a module's layer from the bottom; None for the package itself and for unknown ones."""
    if module.partition(".")[0] in ABOVE_THE_LIBRARY:
        return len(LAYERS)
    name = entry(module)
    return next((number for number, names in enumerate(LAYERS) if name in names), None)


# -- rules -------------------------------------------------------------------------------------------------------------


def upward_imports(tree: Tree) -> list[str]:
    """Return imports from a higher layer, and files that belong to none."""
    breaches = [
        f"{path}:1: selva/{entry(module)} belongs to no layer; name it in LAYERS"
        for module, path in tree.files.items() if entry(module) and layer(module) is None
    ]
    for found in tree.imports:
        source, target = layer(found.source), layer(found.target)
        if source is not None and target is not None and target > source:
            breaches.append(f"{found}, upwards from layer {source} to layer {target}; imports go downwards only")
    return breaches


def cycles(edges: Iterable[tuple[str, str]]) -> list[list[str]]:
    """Return a shortest cycle through every node that is on none of those before it, without its repeated end."""
    following: dict[str, list[str]] = {}
    for start, end in edges:
        following.setdefault(start, []).append(end)
    found: list[list[str]] = []
    for start in sorted(following):
        if any(start in cycle for cycle in found):
            continue
        paths, seen = [[start]], set[str]()
        for path in paths:  # grows on the way: first all paths of one step, then those of two
            after = following.get(path[-1], [])
            if start in after:
                found.append(path)
                break
            paths += [[*path, node] for node in after if node not in seen]
            seen.update(after)
    return found


def file_cycles(tree: Tree) -> list[str]:
    """Return cycles of files, with the line of every import in them."""
    at = {(found.source, found.target): found for found in tree.imports}
    return [
        "; ".join(str(at[pair]) for pair in closed(cycle)) + "; files import each other in a circle"
        for cycle in cycles(at)
    ]


def folder_cycles(tree: Tree) -> list[str]:
    """Return cycles of the folders and files at the top of selva/."""
    at: dict[tuple[str, str], Import] = {}
    for found in tree.imports:
        start, end = entry(found.source), entry(found.target)
        if start and end and start != end:
            at.setdefault((start, end), found)
    return [
        "; ".join(str(at[pair]) for pair in closed(cycle)) + f"; a circle of {', '.join(cycle)} in selva/"
        for cycle in cycles(at)
    ]


def closed(cycle: list[str]) -> list[tuple[str, str]]:
    """Return the edges of a cycle."""
    return list(zip(cycle, [*cycle[1:], cycle[0]], strict=True))


def imported_scripts(tree: Tree) -> list[str]:
    """Return imports of scripts; only a benchmark may import another one."""
    return [
        f"{found}; nothing imports a script"
        for found in tree.imports
        if is_script(found.target) and not (found.source.startswith("benchmarks.")
                                            and found.target.startswith("benchmarks."))
    ]


PARSERS = ("selva.cli", "selva.utils.settings_file")


def command_lines(tree: Tree) -> list[str]:
    """Return uses of ``argparse`` outside scripts and what parses command lines, and of selva.cli outside scripts."""
    argparse = [
        f"{found}; only scripts, selva/cli.py and its settings_file.py know argparse"
        for found in tree.foreign
        if found.target == "argparse" and found.source not in PARSERS and not is_script(found.source)
    ]
    return argparse + [
        f"{found}; only scripts know selva.cli"
        for found in tree.imports if found.target == "selva.cli" and not is_script(found.source)
    ]


def torchrun_variables(tree: Tree) -> list[str]:
    """Return environment variables of torchrun that are named elsewhere than in selva/utils/torchrun.py."""
    return [
        f"{tree.files[module]}:{node.lineno}: names {node.value}, which only {TORCHRUN_FILE} reads"
        for module, syntax in tree.syntax.items() if tree.files[module] != Path(TORCHRUN_FILE)
        for node in ast.walk(syntax)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in TORCHRUN_NAMES
    ]


def too_large(tree: Tree) -> list[str]:
    """Return files with too many lines, and a package with too many entries at its top."""
    limits = {
        path: MOST_SCRIPT_LINES if module in SCRIPTS else MOST_LINES
        for module, path in tree.files.items() if module in SCRIPTS or path.parts[0] == "selva"
    }
    breaches = [
        f"{path}: has {tree.lines(path)} lines, expected at most {most}"
        for path, most in limits.items() if tree.lines(path) > most
    ]
    entries = [path.name for path in (tree.root / "selva").iterdir() if path.name != "__pycache__"]
    if len(entries) > MOST_ENTRIES:
        breaches.append(f"selva: has {len(entries)} entries at its top, expected at most {MOST_ENTRIES}")
    return breaches
