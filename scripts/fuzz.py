"""Damage files of every kind that is read, read them with the product's own readers, and count what happens.

    python scripts/fuzz.py --media 2000 --small 8000 --seed 1 --keep fuzz_found

Every file should be read or refused in one line. Counted are, besides these two: tracebacks, hangs, crashes, code that
a file made run, and more than 1.5 GB of memory. What fails is kept with its error as `KEEP/<seed>_<number>_<name>`; the
same seed makes the same files. Exit code 1 if anything failed.
"""

from __future__ import annotations

import io
import json
import logging
import os
import pickle
import queue
import random
import shutil
import struct
import subprocess
import sys
import tempfile
import threading
import zipfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import selva_lora  # noqa: F401 -- ends here if another selva would be imported
from selva import cli
from selva.utils.progress import Progress
from selva.utils.text import counted

log = logging.getLogger("selva.fuzz")

ROOT = Path(__file__).resolve().parents[1]
WORKER = Path(__file__).with_name("fuzz_worker.py")
FAIR_BYTES = 1_500_000_000
OUTCOMES = ("ok", "refused", "traceback", "hang", "crash", "code run", "over 1.5 GB")


# -- damage ------------------------------------------------------------------------------------------------------------

WORDS = [
    b"", b'"', b"'", b"\t", b"\n", b"\r", b"\0", b",", b":", b"[", b"]", b"{", b"}", b"-", b"~", b"*a", b"&a ",
    b"!!int ",
    b"!!python/object/apply:os.getcwd []", b"\xff", b"\xe2\x80\xa8", b"nan", b"-inf", b"1e999", b"9" * 400, b"null",
    b"true", b"2024-13-45", b"[" * 2000, b'{"a":' * 2000, b"../../x", b"/etc/passwd", b"\xef\xbb\xbf", b"<4", b"|O",
    b"(1,)", b"x" * 5000,
]
NUMBERS = [0, 1, -1, 127, 128, 255, 32767, 65535, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1]


class Payload:
    """An object whose pickle makes a file when it is loaded without care."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), "w")


def damage(rng: random.Random, path: Path, others: list[Path], marker: Path) -> None:
    """Damage a file in place, in one to three ways."""
    if zipfile.is_zipfile(path) and rng.random() < 0.6:
        _damage_member(rng, path, marker)
        if rng.random() < 0.7:
            return
    content = bytearray(path.read_bytes())
    ways: list[Callable] = [_cut, _flip, _zero, _number, _repeat, _remove, _word, _noise]
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        if rng.random() < 0.04:
            content = bytearray(rng.choice(others).read_bytes())  # another kind under this name
        elif rng.random() < 0.03:
            content = bytearray(pickle.dumps(Payload(marker)))
        else:
            rng.choice(ways)(rng, content)
    path.write_bytes(content)


def _place(rng: random.Random, content: bytearray) -> int:
    """Return a place in the file, often in its first bytes, where the headers are."""
    return rng.randrange(max(1, min(len(content), rng.choice((64, 512, len(content))))))


def _cut(rng, content):
    del content[rng.randrange(len(content) + 1):]


def _flip(rng, content):
    for _ in range(rng.choice((1, 3, 30))):
        if content:
            content[_place(rng, content)] ^= 1 << rng.randrange(8)


def _zero(rng, content):
    start, size = _place(rng, content), rng.choice((1, 16, 500))
    content[start : start + size] = bytes(len(content[start : start + size]))


def _number(rng, content):
    start, kind = _place(rng, content), rng.choice("<>") + rng.choice("IHQ")
    value = rng.choice(NUMBERS) % (1 << 8 * struct.calcsize(kind))
    content[start : start + struct.calcsize(kind)] = struct.pack(kind, value)


def _repeat(rng, content):
    start, size = _place(rng, content), rng.choice((3, 50, 5000))
    content[start:start] = content[start : start + size] * rng.choice((1, 5))


def _remove(rng, content):
    start = _place(rng, content)
    del content[start : start + rng.choice((1, 7, 400))]


def _word(rng, content):
    start = _place(rng, content)
    content[start : start + rng.choice((0, 0, 1, 4))] = rng.choice(WORDS)


def _noise(rng, content):
    start = _place(rng, content)
    content[start : start + rng.choice((4, 100))] = rng.randbytes(rng.choice((4, 100)))


def _damage_member(rng: random.Random, path: Path, marker: Path) -> None:
    """Damage a file inside an archive and pack it again, so that its checksum is right and its reader meets it."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    name = rng.choice([n for n in members if n.endswith(".pkl")] or list(members))
    content = bytearray(members[name])
    if rng.random() < 0.2:
        plain = pickle.dumps(Payload(marker))
        if name.endswith(".npy"):
            buffer = io.BytesIO()
            np.save(buffer, np.array([Payload(marker)], dtype=object), allow_pickle=True)
            plain = buffer.getvalue()
        content = bytearray(plain)
    else:
        rng.choice([_cut, _flip, _zero, _number, _remove, _word, _noise])(rng, content)
    members[name] = bytes(content)
    kind = rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA))
    with zipfile.ZipFile(path, "w", kind) as archive:
        for member, data in members.items():
            archive.writestr(zipfile.ZipInfo(member), data, kind)  # with one date, for the same bytes


# -- the campaign ------------------------------------------------------------------------------------------------------


def build_parser() -> cli.ArgumentParser:
    parser = cli.ArgumentParser(__doc__)
    group = parser.add_argument_group("the campaign")
    group.add_argument("--media", type=int, default=100, metavar="N", help="damaged videos and sounds")
    group.add_argument("--small", type=int, default=400, metavar="N", help="damaged features, adapters, tables ...")
    group.add_argument("--keep", type=Path, default=Path("fuzz_found"), metavar="DIR", help="where what fails is kept")
    group.add_argument("--limit_sec", type=float, default=30.0, help="seconds after which a file counts as a hang")
    group.add_argument("--workers", type=cli.positive_int, default=2, help="processes that read")
    parser.add_common(device=False)
    return parser


@dataclass(frozen=True)
class Case:
    """One damaged file: the name of its kind, its number, and the folder that it lies in."""

    name: str
    number: int
    path: Path


def environment() -> dict[str, str]:
    """Return the environment of the workers: one thread each, and this checkout before any other."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}


class Worker:
    """A process that reads many files; started anew after a hang or a crash."""

    def __init__(self, limit_sec: float) -> None:
        self.limit_sec = limit_sec
        self.process: subprocess.Popen[str] | None = None
        self.answers: queue.Queue[str] = queue.Queue()

    def start(self) -> None:
        self.process = subprocess.Popen([sys.executable, str(WORKER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        stderr=subprocess.DEVNULL, text=True, env=environment())
        self.answers = queue.Queue()
        threading.Thread(target=_pass_on, args=(self.process.stdout, self.answers), daemon=True).start()
        if not self.answers.get(timeout=300):
            raise RuntimeError(f"{WORKER.name} does not start; run it by hand to see why")

    def read(self, case: Case) -> tuple[str, str]:
        """Return the outcome of one file, and the error."""
        if self.process is None:
            self.start()
        assert self.process is not None and self.process.stdin is not None
        self.process.stdin.write(json.dumps({"name": case.name, "path": str(case.path)}) + "\n")
        self.process.stdin.flush()
        try:
            answer = self.answers.get(timeout=self.limit_sec)
        except queue.Empty:
            self.stop()
            return "hang", f"no answer within {self.limit_sec:g} s"
        if not answer:
            code = self.process.wait()
            self.process = None
            return "crash", f"the process ended with {code}"
        told = json.loads(answer)
        if told["memory"] > FAIR_BYTES:
            self.stop()
            return "over 1.5 GB", f"{told['memory'] / 1e9:.2f} GB; {told['error']}"
        return told["status"], told["error"]

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


def _pass_on(stream, answers: queue.Queue[str]) -> None:
    for line in stream:
        answers.put(line)
    answers.put("")


def make_case(good: Path, name: str, number: int, seed: int, folder: Path, marker: Path) -> Case:
    """Copy a good file, or a folder of them, and damage it: always in the same way for a seed and a number."""
    rng = random.Random(f"{seed}/{number}/{name}")
    target = folder / name
    folder.mkdir(parents=True)
    if (good / name).is_dir():
        shutil.copytree(good / name, target)
        files = sorted(path for path in target.rglob("*") if path.is_file())
    else:
        files = [Path(shutil.copy(good / name, target))]
    others = sorted(path for path in good.iterdir() if path.is_file())
    damage(rng, rng.choice(files), others, marker)
    return Case(name, number, target)


def run(
    names: Sequence[str], good: Path, work: Path, seed: int, keep: Path, workers: int, limit_sec: float
) -> Counter[str]:
    """Damage and read a file for each of ``names``; return how often each outcome occurred."""
    counts: Counter[str] = Counter()
    todo: queue.SimpleQueue[int] = queue.SimpleQueue()
    for number in range(len(names)):
        todo.put(number)
    lock = threading.Lock()

    def work_off(progress: Progress) -> None:
        worker = Worker(limit_sec)
        while True:
            try:
                number = todo.get_nowait()
            except queue.Empty:
                worker.stop()
                return
            folder = work / str(number)
            marker = work / "markers" / f"{number:07d}"  # of one length, as the damage depends on the content
            case = make_case(good, names[number], number, seed, folder, marker)
            before = shutil.copytree(folder, work / f"{number}_before")
            status, error = worker.read(case)
            if marker.exists():
                status, error = "code run", f"the file made {marker.name}"
            with lock:
                counts[status] += 1
                progress.update(sum(counts.values()))
                if status not in ("ok", "refused"):
                    kept = keep / f"{seed}_{number}_{case.name}"
                    shutil.copytree(before, kept, dirs_exist_ok=True)
                    (kept / "error.txt").write_text(f"{status}\n{error}\n", encoding="utf-8")
                    log.warning("%s: %s: %s", kept, status, error.strip().split("\n")[-1])
            shutil.rmtree(folder)
            shutil.rmtree(before)

    (work / "markers").mkdir()
    with Progress(len(names), "reading", "files") as progress:
        threads = [threading.Thread(target=work_off, args=(progress,)) for _ in range(workers)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return counts


@cli.entry_point
def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    failed = 0
    with tempfile.TemporaryDirectory(prefix="selva_fuzz_") as folder:
        good = Path(folder) / "good"
        made = subprocess.run([sys.executable, str(WORKER), "--make", str(good)], env=environment(), check=True,
                              stdout=subprocess.PIPE, text=True)
        names = json.loads(made.stdout.splitlines()[-1])
        for kind, count in (("media", args.media), ("small", args.small)):
            chosen = [name for name in names if name.startswith(("video.", "sound.")) == (kind == "media")]
            work = Path(folder) / kind
            work.mkdir()
            counts = run([chosen[n % len(chosen)] for n in range(count)], good, work, args.seed, args.keep / kind,
                         args.workers, args.limit_sec)
            print(f"{kind}: {counted(count, 'file')}, " + ", ".join(f"{counts[outcome]} "
                                                                    f"{outcome}" for outcome in OUTCOMES))
            failed += count - counts["ok"] - counts["refused"]
    return cli.EXIT_FAILED if failed else 0


if __name__ == "__main__":
    sys.exit(main())
