"""Damage to files, as disks, networks and strangers do it: for the campaign of `scripts/fuzz.py`."""

from __future__ import annotations

import io
import pickle
import random
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

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
