"""Files of tensors: read without executing anything in them, and checked so that they can be read back in that way.

What cannot be written is an OSError here, with its number: PyTorch raises a RuntimeError on a full disk, safetensors an
error of its own.
"""

from __future__ import annotations

import json
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor, nn

from selva.utils.errors import UserError
from selva.utils.files import native_path

# torch.load on a file that is no checkpoint: an unpickler that meets arbitrary bytes may stumble in all these ways.
READ_ERRORS = (
    pickle.UnpicklingError, RuntimeError, EOFError, zipfile.BadZipFile, struct.error,
    ValueError, TypeError, LookupError, AttributeError, AssertionError, OverflowError, MemoryError, SyntaxError,
)


def read_torch(path: Path, mmap: bool = False) -> Mapping[str, Any]:
    """Return the dictionary in a file of ``torch.save``, without executing anything.

    Args:
        mmap: read the values of tensors only where they are used; the file must stay as it is meanwhile.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no such file, damaged, or it holds objects or something else than a dictionary.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    if not _is_zip(path):
        with open(path, "rb") as file:
            start = file.read(16)
        what = "it is empty" if not start else "its download or copy may be incomplete" if start[:2] == b"PK" else (
            "it looks like a web page" if start.lstrip()[:1] == b"<" else f"it starts with {start!r}"
        )
        raise UserError(f"{path}: not a readable PyTorch file; {what}")
    try:
        with native_path(path) as readable:
            content = torch.load(readable, map_location="cpu", weights_only=True, mmap=mmap)
    except READ_ERRORS as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"{path}: damaged, or it holds more than tensors and plain values; nothing in it was executed ({reason})"
        ) from error
    if not isinstance(content, Mapping):
        raise UserError(f"{path}: holds a {type(content).__name__}, expected a dictionary of tensors")
    return content


def _is_zip(path: Path) -> bool:
    try:
        return zipfile.is_zipfile(path)
    except (zipfile.BadZipFile, struct.error, ValueError):  # it has the beginnings of one
        return False


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], Any]:
    """Return the tensors of a ``.safetensors`` file, and the JSON under its metadata key "meta" ({} without one).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no such file, or damaged.
    """
    import safetensors

    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with native_path(path) as readable, safetensors.safe_open(readable, framework="pt", device="cpu") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (it is not a dictionary)
            header = file.metadata() or {}
        return tensors, json.loads(header.get("meta", "{}"))
    except (safetensors.SafetensorError, *READ_ERRORS) as error:
        raise UserError(f"{path}: not a readable safetensors file ({error})") from error


class _FirstError:
    """File that keeps the first error of writing for later, as PyTorch's writer would hide it."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.error = file, None

    def write(self, content: Any) -> int:
        if self.error is None:
            try:
                self.file.write(content)
            except OSError as error:
                self.error = error
        return memoryview(content).nbytes

    def flush(self) -> None:
        """Do nothing; the file is flushed when it is closed."""


def write_torch(content: Any, path: Path) -> None:
    """Write ``content`` with ``torch.save``.

    Raises:
        OSError: it cannot be written, for example because the disk is full.
    """
    try:
        torch.save(content, path)
    except RuntimeError:  # does not say why; once more through a file of Python's, which does
        with open(path, "wb") as file:
            first = _FirstError(file)
            torch.save(content, first)  # pyright: ignore[reportArgumentType]  -- all that it needs of a file
            if first.error is not None:
                raise first.error from None


def write_safetensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """Write contiguous tensors as a ``.safetensors`` file.

    Raises:
        OSError: it cannot be written, for example because the disk is full.
    """
    import safetensors.torch

    path.write_bytes(safetensors.torch.save(dict(tensors), dict(metadata)))


def is_whole_tensor(value: Any) -> bool:
    """Return True for a tensor in memory whose storage holds all of its values.

    Sparse and quantised tensors are not, nor those that repeat a few values and would need terabytes later.
    """
    if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_quantized or value.is_meta:
        return False
    return value.untyped_storage().nbytes() >= value.numel() * value.element_size()


def check_plain(value: Any, where: str, allow_tensors: bool = True) -> None:
    """Make sure that ``value`` can be read back without unpickling objects.

    Exact types: a NumPy float is a float, yet its pickle needs code to be read.
    """
    if value is None or type(value) in (bool, int, float, str):
        return
    if allow_tensors and type(value) in (Tensor, nn.Parameter):
        return
    if type(value) in (dict, OrderedDict):
        for key, item in value.items():
            if type(key) not in (str, int):
                raise UserError(f"{where}: the key {key!r} is a {type(key).__name__}, expected text or an integer")
            check_plain(item, f"{where}[{key!r}]", allow_tensors)
    elif type(value) in (list, tuple):
        for index, item in enumerate(value):
            check_plain(item, f"{where}[{index}]", allow_tensors)
    else:
        raise UserError(f"{where} is a {type(value).__name__}, which cannot be stored; expected plain values or lists")
