"""The code blocks and commands of README and docs, as a reader would copy them."""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import shlex
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from selva import cli

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "CONTRIBUTING.md", *sorted(f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md")))
# Why a block is not run; its commands are still parsed, its Python compiled, its imports and settings looked up.
REASONS = ("published weights", "installs packages", "network", "takes long", "files of other programs")

LINKED = ("comfyui", "configs", "benchmarks", "scripts", "selva", "toyworld", "tests")

_FENCE = re.compile(r"^(?P<indent> *)```(?P<language>\w*)\n(?P<text>.*?)^ *```", re.MULTILINE | re.DOTALL)
_MARK = re.compile(r"<!-- not run: (.*?) -->\s*\Z")
_INLINE = re.compile(r"(?<!`)`((?:python|torchrun|bash) [^`]+)`(?!`)")
_LOOP = re.compile(r"\bfor (\w+) in (\S+)")
_HEREDOC = re.compile(r"<<-?'?(\w+)'?.*?^\1$", re.MULTILINE | re.DOTALL)
_PLACEHOLDER = re.compile(r"<\w+>")
_LINK = re.compile(r"\]\((?!https?:|mailto:)([^)#\s]*)(?:#([^)\s]+))?\)")
_ASSIGNMENT = re.compile(r"\w+=")


@dataclass(frozen=True)
class Block:
    """One fenced block: where it is, its language, its text, and why it is not run (empty: it is)."""

    page: str
    line: int
    language: str
    text: str
    reason: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


@dataclass(frozen=True)
class Command:
    """A call of one of our scripts: where it is written, the script's path, its arguments as a shell passes them."""

    place: str
    script: str
    arguments: tuple[str, ...]


def blocks_of(page: str) -> list[Block]:
    """Return the fenced blocks of a page in their order; those without a language show files or output."""
    text = (ROOT / page).read_text(encoding="utf-8")
    found = []
    for fence in _FENCE.finditer(text):
        mark = _MARK.search(text[: fence.start()])
        line = text.count("\n", 0, fence.start()) + 1
        found.append(Block(page, line, fence["language"], fence["text"], mark[1] if mark else ""))
    return found


def commands_of(page: str) -> list[Command]:
    """Return every call of a script in a page: in its shell blocks, in comments of its YAML, and between backticks."""
    found: list[Command] = []
    for block in blocks_of(page):
        if block.language in ("bash", "sh"):
            found += _commands(str(block), block.text)
        elif block.language == "powershell":
            found += _commands(str(block), block.text.replace("\\", "/"))
        elif block.language == "yaml":
            found += _commands(str(block), settings_command(block))
    text = _FENCE.sub("", (ROOT / page).read_text(encoding="utf-8"))
    for span in _INLINE.finditer(text):
        found += _commands(page, _PLACEHOLDER.sub("NAME", " ".join(span[1].split())))
    return found


def settings_command(block: Block) -> str:
    """Return the command in the first line of a YAML block: ``# NAME.yaml, used with: python infer.py ...``."""
    first = block.text.partition("\n")[0]
    assert "used with: " in first, f"{block}: the first line says no command: {first}"
    return first.partition("used with: ")[2]


def _commands(place: str, text: str) -> list[Command]:
    """Return the calls of our scripts in shell text; a loop's variable stands for its first value."""
    text = _HEREDOC.sub("", text)
    for name, value in _LOOP.findall(text):
        text = re.sub(rf"\$\{{?{name}\b\}}?", value, text)
    text = re.sub(r"[\\`]\n", " ", text)
    found = []
    for line in text.splitlines():
        words = shlex.shlex(line, posix=True, punctuation_chars=True)
        words.whitespace_split, words.commenters = True, "#"
        for call in _split(list(words)):
            script = next((word for word in call if word.endswith((".py", ".sh")) and not word.startswith("-")), None)
            if script and (call[0] in ("python", "torchrun", "bash") or call[0] == script):
                found.append(Command(place, script, tuple(call[call.index(script) + 1 :])))
    return found


def _split(words: list[str]) -> list[list[str]]:
    """Return the simple commands of a line, without redirections and without variables set before them."""
    calls: list[list[str]] = [[]]
    skip = False
    for word in words:
        if skip:
            skip = False
        elif set(word) <= set("<>&") and set(word) & set("<>"):
            skip = True  # the file of a redirection
            if calls[-1] and calls[-1][-1] in ("1", "2"):
                calls[-1].pop()
        elif set(word) <= set(";|&()"):
            calls.append([])
        elif calls[-1] or not (_ASSIGNMENT.match(word) or word in ("do", "then", "export")):
            calls[-1].append(word)
    return [call for call in calls if call]


def broken_links(page: str) -> list[str]:
    """Return the links of a page to files or headings that do not exist."""
    text = _FENCE.sub("", (ROOT / page).read_text(encoding="utf-8"))
    broken = []
    for target, heading in _LINK.findall(text):
        path = (ROOT / page).parent / target if target else ROOT / page
        if not path.exists() or (heading and heading not in anchors_of(path)):
            broken.append(target + (f"#{heading}" if heading else ""))
    return broken


def anchors_of(path: Path) -> set[str]:
    """Return the names by which the headings of a Markdown file are linked, as GitHub makes them."""
    text = _FENCE.sub("", path.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


# -- running them ------------------------------------------------------------------------------------------------------


@functools.cache
def script_module(script: str) -> ModuleType:
    """Return the module of a script, by its path in the repository."""
    spec = importlib.util.spec_from_file_location(f"documented_{Path(script).stem}", ROOT / script)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@functools.cache
def parser_of(script: str) -> cli.ArgumentParser:
    """Return the parser of a script."""
    return script_module(script).build_parser()


def fresh_folder(path: Path) -> dict[str, str]:
    """Fill a folder with links to the scripts and packages; return an environment in which a page's commands run."""
    for name in (*LINKED, *(script.name for script in ROOT.glob("*.py"))):
        (path / name).symlink_to(ROOT / name)
    shutil.copytree(ROOT / "docs", path / "docs")  # some commands write into it
    programs = path / ".bin"
    programs.mkdir()
    for name, start in (("python", ""), ("torchrun", "-m torch.distributed.run")):
        (programs / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {start} "$@"\n')
        (programs / name).chmod(0o755)
    return os.environ | {"PATH": f"{programs}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT),
                         "CUDA_VISIBLE_DEVICES": ""}


def shell_text(block: Block, folder: Path) -> list[str]:
    """Return what runs a block: a shell line for each language."""
    if block.language == "bash":
        return ["bash", "-euo", "pipefail", "-c", block.text]
    if block.language == "python":
        return [sys.executable, "-c", block.text]
    name = block.text.removeprefix("# ").partition(",")[0]
    (folder / name).write_text(block.text, encoding="utf-8")
    return ["bash", "-euo", "pipefail", "-c", settings_command(block)]
