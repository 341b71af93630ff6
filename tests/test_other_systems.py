"""Systems that this one is not: what Linux has and others lack is taken away; names of files that other systems choose.

What Windows and macOS really do is not tried here; see the README.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from make_data import put_memmap
from make_media import clicks, make_video

import extract_features
import infer
import partition_clips
import train_lora
from selva.media import write_audio

ROOT = Path(__file__).resolve().parents[1]
TINY = ["--variant", "tiny_16k", "--device", "cpu"]
MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for package in ("selva", "toyworld", "comfyui") for path in (ROOT / package).rglob("*.py")
)
SCRIPTS = sorted(path for folder in (".", "scripts", "benchmarks") for path in (ROOT / folder).glob("*.py")
                 if path.name not in ("setup.py", "__init__.py"))

# Before anything of ours is imported. A module that is there already, such as fcntl, would be found without the hook.
TAKE_AWAY = """
import builtins, contextlib, importlib, io, os, pathlib, runpy, signal, sys

class Away:
    names = ("fcntl", "resource", "pwd", "grp", "termios")

    def find_spec(self, name, path=None, target=None):
        if name in self.names:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Away())
for name in Away.names:
    sys.modules.pop(name, None)
for owner, names in ((os, ("fork", "forkpty", "sched_getaffinity", "sched_setaffinity", "getuid", "geteuid", "statvfs",
                           "posix_fallocate", "killpg", "getpgid", "setsid")),
                     (signal, ("SIGHUP", "SIGALRM", "SIGUSR1", "setitimer", "pthread_sigmask"))):
    for name in names:
        if hasattr(owner, name):
            delattr(owner, name)

def without_proc(call):
    def opened(path, *args, **kwargs):
        if not isinstance(path, int) and os.fsdecode(path).startswith("/proc"):
            raise FileNotFoundError(2, "No such file or directory", os.fsdecode(path))
        return call(path, *args, **kwargs)
    return opened

builtins.open = io.open = without_proc(io.open)
os.stat = without_proc(os.stat)
assert not pathlib.Path("/proc/cpuinfo").exists()
"""
IMPORT = "for name in {modules}:\n    importlib.import_module(name)\n"
HELP = """
for script, has_help in {scripts}:
    sys.path[0], sys.argv, code = os.path.dirname(script), [script, "--help"], 0
    text = io.StringIO()
    try:
        with contextlib.redirect_stdout(text):
            runpy.run_path(script, run_name="__main__" if has_help else "imported")
    except SystemExit as stop:
        code = stop.code or 0
    assert code == 0 and text.getvalue().startswith("usage") is has_help, (script, code)
"""


def run_without(code: str, before: str = "") -> None:
    """Run code where there is only Python; ``before``, while everything is there."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "USERNAME": "someone"}  # as on Windows; PyTorch asks for it
    result = subprocess.run([sys.executable, "-c", before + TAKE_AWAY + code], cwd=ROOT, env=environment,
                            capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr[-3000:]


def test_all_modules_import_where_there_is_only_python():
    """SIGKILL is left to PyTorch, which asks sys.platform for it and not the module; we do not use it."""
    assert len(MODULES) > 100
    assert not [path for path in (ROOT / "selva").rglob("*.py") if "signal.SIGKILL" in path.read_text("utf-8")]
    run_without(IMPORT.format(modules=MODULES))


def test_every_script_explains_itself_where_there_is_only_python():
    scripts = [(str(path), "__name__ ==" in path.read_text(encoding="utf-8") and path.name != "fuzz_worker.py")
               for path in SCRIPTS]
    assert sum(has_help for _, has_help in scripts) >= 15
    run_without(HELP.format(scripts=scripts))


def test_the_hook_takes_away_what_it_names():
    with pytest.raises(AssertionError, match="No module named 'fcntl'"):
        run_without("import fcntl")
    with pytest.raises(AssertionError, match="No such file or directory: '/proc/cpuinfo'"):
        run_without("pathlib.Path('/proc/cpuinfo').read_text()")
    with pytest.raises(AssertionError, match="has no attribute 'fork'"):
        run_without("os.fork")


EVERYTHING = """
import shutil, types
shutil.disk_usage = lambda path: types.SimpleNamespace(free=1 << 40)  # Windows has one that needs no statvfs
import infer, extract_features, train_lora
from scripts import adapter, evaluate, sweep, train_base
from selva.utils.lock import FolderLock

tiny, data = ["--variant", "tiny_16k", "--device", "cpu"], ["--data_dir", "features"]
steps = ["--steps", "2", "--batch_size", "2", "--warmup_steps", "0", "--save_every", "1", "--val_every", "1"]
clips, base = ["videos", "--prompt", "a click", *tiny], [
    "--data", "set", *tiny, "--sample_every", "0", "--hold_out", "0", "--output_dir", "base", *steps]
for name, script, arguments in (
    ("features", extract_features, [*clips, "--output_dir", "features"]),
    ("adapter", train_lora, [*data, *tiny, *steps, "--output_dir", "run"]),
    ("resume", train_lora, [*data, *tiny, *steps, "--steps", "3", "--output_dir", "run", "--resume", "auto"]),
    ("sweep", sweep, ["sweep.yaml"]),
    ("check", adapter, ["check", "run/adapter_final.pt", *tiny[:2]]),
    ("convert", adapter, ["convert", "run/adapter_final.pt", "--to", "peft", "--output", "peft"]),
    ("base", train_base, base),
    ("base resume", train_base, [*base, "--steps", "3", "--resume", "auto"]),
    ("sound", infer, [*clips, "--output", "out", "--num_steps", "1", "--adapter", "run/adapter_final.pt"]),
    ("figures", evaluate, ["--generated", "out", "--reference", "features", "--output_dir", "figures", *tiny[2:]]),
):
    code = script.main(arguments)
    assert code == 0, name
"""


@pytest.mark.slow
def test_everything_runs_where_there_is_only_python(tmp_path):
    """From videos to figures, the newer parts included; not only their import."""
    (tmp_path / "videos").mkdir()
    put_memmap(tmp_path / "set", 3)
    for number in range(3):
        make_video(tmp_path / "videos" / f"{number}.mp4", 1.2, size=(96, 64), sound=clicks([0.4 + 0.1 * number], 1.3))
    (tmp_path / "sweep.yaml").write_text(
        "output_dir: sweep\nbase:\n  {data_dir: [features], variant: tiny_16k, device: cpu, steps: 1, batch_size: 2, "
        "warmup_steps: 0, preview: false}\ngrid: {lr: [1.0e-3, 1.0e-4]}\n", encoding="utf-8")
    # psutil, which transformers uses if it is there, asks for the name of the system and not for what it has.
    run_without(f"os.chdir({str(tmp_path)!r})\n{EVERYTHING}", "try: import psutil\nexcept ImportError: pass\n")
    for made in ("run/adapter_final_001.pt", "peft", "base/export/tiny_16k_last.pth", "sweep/sweep.html",
                 "figures/evaluation.json", "out/0.mp4"):
        assert (tmp_path / made).exists(), made


NAMES = [
    "a b  c", "Tür & Töne (1)", "tu\u0308r", "100 % 'dog' #2 [x] {y} $HOME ~", "犬の声", "-dog", "a.b.c", "n" * 200,
]


@pytest.mark.slow
def test_names_with_spaces_umlauts_and_more_go_all_the_way(tmp_path, monkeypatch):
    home = tmp_path / "Mein Ordner ä [1] %20 'x'"
    (home / "videos").mkdir(parents=True)
    for name in NAMES:
        make_video(home / "videos" / f"{name}.mp4", 1.2, size=(96, 64), sound=clicks([0.4], 1.3))
    (home / "videos" / "prompts.txt").write_text("".join(f"{name}: a click\n" for name in NAMES), encoding="utf-8")
    features, run, out = home / "features ü", home / "run é", home / "out ß"
    assert extract_features.main([str(home / "videos"), "--output_dir", str(features), "--prompts",
                                  str(home / "videos" / "prompts.txt"), *TINY]) == 0
    assert {path.stem for path in features.glob("*.npz")} == set(NAMES)
    assert train_lora.main(["--data_dir", str(features), "--output_dir", str(run), "--steps", "1", "--save_every", "1",
                            "--warmup_steps", "0", "--batch_size", "2", *TINY]) == 0
    monkeypatch.chdir(home)
    arguments = ["videos", "--output", out.name, "--num_steps", "1", "--adapter", f"{run.name}/adapter_final.pt", *TINY]
    assert infer.main([*arguments, "--prompt", "a click"]) == 0
    assert {path.stem for path in out.glob("*.flac")} == {path.stem for path in out.glob("*.mp4")} == set(NAMES)
    assert partition_clips.main(["--data_dir", features.name, "--output_dir", "cut ü", "--min_length_sec", "1"]) == 0


def test_one_of_two_names_that_are_one_file_is_never_replaced(tmp_path, monkeypatch, capsys):
    """On a disk where upper and lower case are the same, each script refuses before it writes."""
    for name in ("dog", "Dog"):
        make_video(tmp_path / f"{name}.mp4", 1.2, size=(96, 64), sound=clicks([0.4], 1.3))
    recordings = tmp_path / "recordings"
    for name in ("wolf", "Wolf"):
        write_audio(recordings / f"{name}.flac", torch.rand(1, 16_000) - 0.5, 16_000)
    videos, out = [str(tmp_path / "dog.mp4"), str(tmp_path / "Dog.mp4")], tmp_path / "out"
    for module in ("selva.inputs.file_names", "selva.inference.outputs"):
        monkeypatch.setattr(f"{module}.tells_case_apart", lambda folder: False)
    for main, arguments, code, message in (
        (extract_features.main, [*videos, "--output_dir", str(out), *TINY], 2, "would replace the other: dog and Dog"),
        (infer.main, [*videos, "--prompt", "x", "--output", str(out), *TINY], 2, "Dog.flac would be written twice"),
        (partition_clips.main, ["--data_dir", str(recordings), "--output_dir", str(out), "--write_audio", str(out),
                                "--min_length_sec", "1"], 1, "replace the other: Wolf_0 and wolf_0"),
    ):
        assert main(arguments) == code
        assert message in capsys.readouterr().err
        assert not list(out.glob("*"))


@pytest.mark.slow
def test_a_longest_name_is_refused_before_anything_is_computed(tmp_path, capsys):
    video = make_video(tmp_path / "a.mp4", 1.2, size=(96, 64), sound=clicks([0.4], 1.3))
    assert extract_features.main([str(video), "--output_dir", str(tmp_path / "f"), "--prompt", "x", *TINY]) == 0
    features = (tmp_path / "f" / "a.npz").rename(tmp_path / f"{'n' * 251}.npz")  # 255 bytes
    assert infer.main(["--features", str(features), "--output", str(tmp_path / "out"), *TINY]) == 2
    assert "the name has 256 bytes, expected at most 255; rename the clip" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    named = ["--features", str(features), "--output", str(tmp_path / "a.flac")]
    assert infer.main([*named, "--num_steps", "1", *TINY]) == 0
