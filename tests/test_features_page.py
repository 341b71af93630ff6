"""docs/features.md: everything that the toolkit promises is there, and every command does what its line says.

The lines run in their order in one folder, on the built-in model. One that is chosen alone (-k) runs those before it.
"""

from __future__ import annotations

import contextlib
import glob
import io
import json
import os
import re
import shlex
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import safetensors.torch
import torch
import yaml
from documents import ROOT, blocks_of, commands_of, fresh_folder, parser_of, script_module, shell_text
from listening_models import put_clap, put_whisper
from PIL import Image

from selva.checkpoint import load_adapter
from selva.features import load_features
from selva.media import read_audio, video_length
from selva.weights.load import read_checkpoint

PAGE = "docs/features.md"
TEXT = (ROOT / PAGE).read_text(encoding="utf-8")
# Scripts that are parts of others, or for those who work on the toolkit itself.
OWN_SCRIPTS = {"fuzz_worker.py", "update_docs.py", "setup_env.sh", "setup_env.ps1", "quickstart.py", "test.ps1"}
# Flags that say where or how to compute, and that every script has.
PLAIN = {"config", "debug", "version", "help", "device", "seed", "precision", "variant", "selva_dir", "overwrite",
         "no_settings_file"}
OWN_FLAGS = {  # of single scripts, too small for a line of their own
    "adapter.py": {"fold"}, "download_weights.py": {"list", "layout"}, "make_test_weights.py": {"layout"},
    "fuzz.py": {"keep", "limit_sec"}, "kill_test.py": {"processes", "steps", "save_every"},
    "make_report.py": {"title", "commands"},
    "sweep.py": {"list"}, "inspect_dataset.py": {"recursive"}, "make_ema.py": {"step"},
    "evaluate.py": {"videos"}, "quickstart.py": {"sound", "out"},
    "train_tiny.py": {"stages", "restart", "steps", "batch_size", "scale", "threads", "export"},
    "train_base.py": {"timestep_mode", "logit_normal_sigma", "curriculum_switch", "null_prob", "latent",
                      "clip_features", "lr", "lr_milestones", "lr_factor", "lr_cycles", "weight_decay", "adam_eps",
                      "tensorboard", "grad_checkpointing", "compile", "prefetch", "readers", "clap", "ast"},
    "extract_features.py": {"video_dir"},
    "infer.py": {"recursive", "cuda_graph"},
    "train_lora.py": {"preserve_near", "lr_probe"},
}


@dataclass(frozen=True)
class Line:
    """A line of the page: its command, the files and the texts that it promises, and its exit code."""

    number: int
    what: str
    command: str
    files: tuple[str, ...]
    texts: tuple[str, ...]
    code: int

    def __str__(self) -> str:
        return f"{self.number:02d} {self.what[:50]}"


def lines_of(text: str) -> list[Line]:
    """Return the lines of the tables that have a column of what is written."""
    found: list[Line] = []
    for row in text.splitlines():
        cells = [cell.strip() for cell in row.strip().strip("|").split(" | ")]
        if not row.startswith("| ") or len(cells) != 4 or cells[1] == "command":
            continue
        what, command, writes, _ = cells
        code = re.search(r"\(exit code (\d+)\)", writes)
        found.append(Line(len(found) + 1, what, command.strip("`"), tuple(re.findall(r"`([^`]+)`", writes)),
                          tuple(re.findall(r'"([^"]+)"', writes)), int(code[1]) if code else 0))
    return found


LINES = lines_of(TEXT)


# -- nothing is left out -----------------------------------------------------------------------------------------------


def test_the_page_has_its_lines():
    assert len(LINES) > 60
    assert [str(line) for line in LINES if not line.files and not line.texts] == []
    assert len({line.command for line in LINES}) == len(LINES)


def test_every_script_and_every_page_is_there():
    scripts = {path.name for path in [*ROOT.glob("*.py"), *(ROOT / "scripts").iterdir()] if path.is_file()}
    scripts -= OWN_SCRIPTS | {"setup.py", "selva_lora.py", "__init__.py"}
    assert [name for name in sorted(scripts) if name not in TEXT] == []
    (commands,) = [a.choices for a in parser_of("scripts/adapter.py")._actions if a.dest == "command"]
    assert [name for name in commands or () if f"adapter.py {name} " not in TEXT] == []
    pages = {path.name for path in (ROOT / "docs").glob("*.md")} - {"features.md", "tiny_model_card.md", "guide.md"}
    assert [name for name in sorted(pages) if f"({name}" not in TEXT] == []
    assert f"({PAGE})" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_setting_is_used_on_the_page():
    """One that is new belongs on a line, or into PLAIN or OWN_FLAGS above if it promises nothing of its own."""
    used: dict[str, set[str]] = {}
    for command in commands_of(PAGE):
        names = {word[2:].partition("=")[0] for word in command.arguments if word.startswith("--")}
        used.setdefault(Path(command.script).name, set()).update(names)
    missing = []
    for script in used:
        path = script if (ROOT / script).exists() else f"scripts/{script}"
        if not path.endswith(".py") or path.startswith("scripts/benchmarks") or not (ROOT / path).exists():
            continue
        for action in parser_of(path)._actions:
            names = {option[2:] for option in action.option_strings if option.startswith("--")}
            if names and not names & (used[script] | PLAIN | OWN_FLAGS.get(script, set())):
                missing.append(f"{script} {min(action.option_strings)}")
    assert missing == []


# -- every line does what it says --------------------------------------------------------------------------------------


class Folder:
    """A fresh folder in which the lines run, each once and in their order."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.environment = fresh_folder(path) | {"SELVA_VARIANT": "tiny_16k", "OMP_NUM_THREADS": "1"}
        self.outcomes: list[str] = []  # of the lines that have run: what was wrong, "" if nothing
        put_whisper(path / "models" / "whisper-small")
        put_clap(path / "models" / "clap-htsat-unfused")
        for block in blocks_of(PAGE):
            subprocess.run(shell_text(block, path), cwd=path, env=self.environment, check=True)

    def outcome(self, line: Line) -> str:
        while len(self.outcomes) < line.number:
            self.outcomes.append(self._do(LINES[len(self.outcomes)]))
        return self.outcomes[line.number - 1]

    def _do(self, line: Line) -> str:
        started = time.time_ns() - 20_000_000  # file systems count in steps of some milliseconds
        code, output = self._run(line.command)
        if code != line.code:
            return f"exit code {code}, expected {line.code}\n{output[-3000:]}"
        problems = [f"{text!r} was not printed:\n{output[-2000:]}" for text in line.texts if text not in output]
        for pattern in line.files:
            paths = sorted(Path(name) for name in glob.glob(str(self.path / escaped(pattern))))
            problems += [] if paths else [f"{pattern} is not there"]
            for path in paths:
                problems += [f"{path.name}: {reason}" for reason in wrong_about(path, started)]
        return "\n".join(problems)

    def _run(self, command: str) -> tuple[int, str]:
        """Return exit code and output; our scripts run in this process, which spares seconds of imports each."""
        words = shlex.split(command)
        if words[0] != "python" or not words[1].endswith(".py"):
            done = subprocess.run(["bash", "-c", command], cwd=self.path, env=self.environment, capture_output=True,
                                  text=True, timeout=300, check=False)
            return done.returncode, done.stdout + done.stderr
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as output:
            patch.chdir(self.path)
            patch.setenv("SELVA_VARIANT", "tiny_16k")
            patch.setenv("CUDA_VISIBLE_DEVICES", "")
            with contextlib.redirect_stderr(output):
                torch.manual_seed(0)
                code = script_module(words[1]).main(words[2:])
        return code, output.getvalue()


def escaped(pattern: str) -> str:
    """Return a pattern in which only ? and * are signs."""
    return pattern.replace("[", "[[]")


def wrong_about(path: Path, started: int) -> list[str]:
    """Return what is wrong about a file or folder that a command has written."""
    files = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]
    if not files:
        return ["is an empty folder"]
    problems = []
    if max(file.stat().st_mtime_ns for file in files) < started:
        problems.append("was not written by this command")
    for file in files:
        try:
            content = content_of(file)
        except Exception as error:  # whatever the reader of its kind says
            problems.append(f"{file.name} cannot be read: {error!r}")
        else:
            problems += [] if content else [f"{file.name} holds nothing"]
    return problems


def content_of(path: Path) -> object:
    """Return something that is false only if a file of its kind holds nothing, read as its readers do."""
    suffix = path.suffix
    if suffix == ".npz":
        return load_features(path).clip_features.isfinite().all().item()
    if suffix in (".flac", ".wav"):
        waveform, rate = read_audio(path)
        return rate and waveform.numel() and waveform.isfinite().all().item()
    if suffix == ".mp4":
        return video_length(path)
    if suffix in (".png", ".jpg"):
        with Image.open(path) as picture:
            picture.load()
            return picture.width
    if suffix == ".safetensors":
        return all(t.isfinite().all() for t in safetensors.torch.load_file(path).values())
    if suffix == ".pth":
        return read_checkpoint(path)
    if suffix == ".pt":
        return load_adapter(path).tensors if path.name.startswith("adapter") else path.stat().st_size
    text = path.read_bytes()
    if suffix == ".html":
        return text.startswith(b"<!doctype html") and text.rstrip().endswith(b"</html>")
    if suffix in (".tsv", ".csv"):
        return len(text.decode().splitlines()) > (0 if path.stem.startswith("left_out") else 1)
    if suffix == ".json":
        return json.loads(text)
    if suffix == ".jsonl":
        return [json.loads(line) for line in text.decode().splitlines()]
    if suffix == ".yaml":
        return yaml.safe_load(text)
    return len(text)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Folder:
    return Folder(tmp_path_factory.mktemp("features"))


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="some lines need bash")
@pytest.mark.parametrize("line", LINES, ids=str)
def test_the_line_does_what_it_says(line, folder):
    problem = folder.outcome(line)
    assert not problem, f"{line.command}\n{problem}"
