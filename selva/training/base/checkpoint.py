"""Checkpoints of a base training: folders of `torch.distributed.checkpoint`, written while the training goes on.

    checkpoints/step_00010000/run.json     step, place in the data, settings, data sets: all that is no tensor
                              .metadata    names, shapes and places of the tensors; written when all of them are
                              *.distcp     the tensors, some in every process

A folder has its final name when everything in it is on the disk, so a process that is killed leaves the one before. The
tensors hold the whole state whatever the number of processes was, so another number goes on from them.
"""

from __future__ import annotations

import json
import logging
import pickle
import re
import shutil
import threading
import warnings
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save

from selva.training.base.run import BaseRun
from selva.utils.distributed import World
from selva.utils.errors import UserError
from selva.utils.files import PARTIAL_PREFIX, atomic_write_text, flush_folder, why_not_written

log = logging.getLogger(__name__)

FOLDER, NUMBERS_FILE, METADATA_FILE = "checkpoints", "run.json", ".metadata"
NAME = re.compile(r"step_(\d{8,})")
FORMAT = 1
WRITE_ERRORS = (Exception, CheckpointException)  # the second one is no Exception


def checkpoint_name(step: int) -> str:
    """Return the name of the folder of a step."""
    return f"step_{step:08d}"


def step_of(path: Path) -> int | None:
    """Return the step of a checkpoint's folder; None for other files."""
    match = NAME.fullmatch(path.name)
    return int(match[1]) if match else None


class Checkpoints:
    """Writer of the checkpoints of a run; a process that is not the main one only takes part.

    Args:
        folder: of the run. keep_last: how many to keep, 0 for all. about: plain values to be stored with every one.
    """

    def __init__(self, folder: Path, world: World, keep_last: int, about: Mapping[str, Any]) -> None:
        self.folder, self.world, self.keep_last, self.about = folder / FOLDER, world, keep_last, dict(about)
        self.newest: int | None = None  # step of the newest one that is complete
        self._writing: Future[Any] | None = None
        self._step = 0  # of that
        self._moved = threading.Event()
        # Messages about files travel beside those of the training, from a thread of their own.
        self._group: Any = dist.new_group(backend="gloo") if world.size > 1 else None

    def clean(self) -> None:
        """Remove what a killed run has left unfinished."""
        for remains in self.folder.glob(f"{PARTIAL_PREFIX}*"):
            shutil.rmtree(remains, ignore_errors=True)

    def save(self, run: BaseRun) -> None:
        """Begin to write the state; the training may go on meanwhile. All processes have to come here together.

        The state is copied before this returns. What cannot be written, on a full disk for example, is reported and
        survived.
        """
        self.wait()
        if self.newest == run.step:
            return
        self._step = run.step
        partial = self.folder / f"{PARTIAL_PREFIX}{checkpoint_name(run.step)}"
        tensors, numbers = run.tensors(), run.numbers()
        if self.world.is_main:
            shutil.rmtree(partial, ignore_errors=True)
            try:
                partial.mkdir(parents=True)
                text = json.dumps({"format": FORMAT, "processes": self.world.size, **self.about, **numbers}, indent=1)
                atomic_write_text(partial / NUMBERS_FILE, text + "\n")
            except OSError as error:  # the others write tensors, or fail too
                log.error("%s: %s", partial, why_not_written(error))
        self.world.wait()
        _one_process_is_meant()
        writing = async_save(tensors, checkpoint_id=partial, process_group=self._group)
        assert isinstance(writing, Future)
        self._writing = writing
        if self.world.is_main:
            self._moved.clear()
            writing.add_done_callback(lambda done: self._finish(done, partial))

    def wait(self) -> None:
        """Wait until what is being written is there, in all processes."""
        if self._writing is None:
            return
        try:
            self._writing.result()
            if self.world.is_main:
                self._moved.wait()
            self.newest = self._step
        except WRITE_ERRORS as error:  # a full disk in one of the processes, as its writer passes it on
            log.debug("checkpoint of step %d: %s", self._step, error)
        self._writing = None

    def _finish(self, done: Future[Any], partial: Path) -> None:
        """Give a written checkpoint its name, and delete old ones; in the writer's thread."""
        try:
            done.result()
            if not (partial / NUMBERS_FILE).is_file():
                raise OSError(f"{partial / NUMBERS_FILE} is missing")
            flush_folder(partial)
            final = self.folder / checkpoint_name(self._step)
            replaced = self.folder / f"{PARTIAL_PREFIX}replaced-{final.name}"
            if final.exists():  # of another run into the same folder
                final.rename(replaced)
            partial.rename(final)
            flush_folder(self.folder)
            shutil.rmtree(replaced, ignore_errors=True)
            log.info("saved %s", final)
            if self.keep_last:
                self._prune()
        except WRITE_ERRORS as error:
            reason = str(error).strip().splitlines()
            log.error("checkpoint of step %d: not saved (%s); older ones are intact and the training goes on",
                      self._step, reason[-1] if reason else type(error).__name__)
        finally:
            self._moved.set()

    def _prune(self) -> None:
        """Delete what is beyond ``keep_last``, under another name, so that nothing half-deleted passes for whole."""
        for path in all_checkpoints(self.folder)[: -self.keep_last]:
            old = self.folder / f"{PARTIAL_PREFIX}old-{path.name}"
            try:
                path.rename(old)
            except OSError as error:  # on Windows, while another program reads it
                log.warning("%s: not deleted, %s; it is tried again at the next checkpoint", path,
                            why_not_written(error))
            else:
                shutil.rmtree(old, ignore_errors=True)


# -- reading -----------------------------------------------------------------------------------------------------------


def all_checkpoints(folder: Path) -> list[Path]:
    """Return the complete checkpoints in a folder, the newest last."""
    found = [path for path in folder.glob("step_*") if step_of(path) is not None]
    return sorted(found, key=lambda path: step_of(path) or 0)


def find_checkpoint(resume: str | None, output_dir: Path) -> Path | None:
    """Return the checkpoint that ``--resume`` names; None for a fresh start.

    Of several, "auto" takes the newest whose files can be read, and says which it has passed over.
    """
    if resume is None:
        return None
    if resume != "auto":
        return Path(resume)
    for path in reversed(all_checkpoints(output_dir / FOLDER)):
        try:
            read_numbers(path)
            _read_metadata(path)
        except (UserError, OSError) as error:
            log.warning("%s; the one before it is taken", error)
        else:
            log.info("resuming from %s", path)
            return path
    log.info("nothing to resume in %s: it has no saved step, so the run starts anew", output_dir)
    return None


def read_numbers(path: Path) -> dict[str, Any]:
    """Return the content of ``run.json`` of a checkpoint.

    Raises:
        UserError: it is missing or damaged, or of a later version.
    """
    file = path / NUMBERS_FILE
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path}: is no checkpoint of a base training, {NUMBERS_FILE} is missing") from error
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file}: cannot be read ({error})") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"{file}: expected a checkpoint of format {FORMAT}; it is damaged, or of another version")
    return content


def load_(run: BaseRun, path: Path) -> None:
    """Continue a run from a checkpoint, which any number of processes may have written.

    Raises:
        UserError: it cannot be read, or is of another model or other settings.
    """
    numbers = read_numbers(path)
    metadata = _read_metadata(path)
    tensors = run.tensors()
    stored = metadata.state_dict_metadata
    if stored.keys() != tensors.keys():
        different = sorted(stored.keys() ^ tensors.keys())
        raise UserError(f"{path}: holds other tensors than this run: {different[0]} and {len(different) - 1} more; "
                        "continue with the same --variant, --trainable and --ema_sigma_rel")
    _one_process_is_meant()
    try:
        load(tensors, storage_reader=_SafeReader(path))
    except WRITE_ERRORS as error:
        reason = str(error).strip().splitlines()
        raise UserError(f"{path}: cannot be read ({reason[-1] if reason else type(error).__name__}); its files may be "
                        "incomplete, use the checkpoint before it") from error
    run.restore(numbers)


def _one_process_is_meant() -> None:
    """Keep PyTorch from warning of a process that is alone; for good, as it warns in threads too."""
    warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)


_ALLOWED = {
    ("collections", "OrderedDict"), ("torch", "Size"), ("torch.serialization", "_get_layout"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    *(("torch.distributed.checkpoint.metadata", name) for name in (
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
        "TensorStorageMetadata", "_MEM_FORMAT_ENCODING")),
}


# The path of a checkpoint stands in it; one of another system cannot be made here, nor is it asked for.
_PATHS = {"PosixPath": PurePosixPath, "WindowsPath": PureWindowsPath}


class _Unpickler(pickle.Unpickler):
    """Reader of ``.metadata`` that makes descriptions of tensors and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if module in ("pathlib", "pathlib._local") and name in _PATHS:
            return _PATHS[name]
        if (module, name) in _ALLOWED:
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise pickle.UnpicklingError(f"it holds {module}.{name}, which is never loaded")


class _SafeReader(FileSystemReader):
    """Reader of a checkpoint that executes nothing in its files: all of the state are tensors."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Any:
        metadata = _read_metadata(Path(self.path))
        for name, entry in metadata.state_dict_metadata.items():
            if not isinstance(entry, TensorStorageMetadata):
                raise UserError(f"{self.path}: {name} is no tensor, and would be unpickled; it is never loaded")
        if getattr(metadata, "storage_meta", None) is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


def _read_metadata(path: Path) -> Any:
    """Return the description of the tensors of a checkpoint.

    Raises:
        UserError: it is missing, damaged, or holds something else.
    """
    file = path / METADATA_FILE
    try:
        with open(file, "rb") as content:
            metadata = _Unpickler(content).load()
        if not isinstance(metadata, Metadata):
            raise pickle.UnpicklingError(f"it holds a {type(metadata).__name__}")
    except FileNotFoundError as error:
        raise UserError(f"{file}: no such file, the checkpoint is incomplete") from error
    except (pickle.UnpicklingError, EOFError, ValueError, LookupError, AttributeError, TypeError, ImportError) as error:
        raise UserError(f"{file}: damaged, or no description of tensors ({error})") from error
    return metadata
