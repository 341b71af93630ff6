"""Services of ComfyUI for its nodes: folders, the progress bar, the interrupt, memory; each only where it is there.

Outside of ComfyUI (in tests, in programs that run nodes one by one) the folders are those of the working directory.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from selva.utils.errors import UserError
from selva.utils.progress import watched


class NodeError(RuntimeError):
    """An error that ComfyUI shows at a node, in one line."""


def node_function(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function of a node, whose user errors are one readable line, with gradients, that ComfyUI forbids."""
    @functools.wraps(function)
    def run(*args: Any, **inputs: Any) -> Any:
        import torch
        try:
            with torch.inference_mode(False):  # also where nothing is trained: networks and caches outlive the node
                return function(*args, **inputs)
        except (UserError, OSError) as error:
            raise NodeError(" ".join(str(error).split())) from None
    return run


def part_of_comfyui(name: str) -> Any:
    """Return a module of ComfyUI; None outside of it."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name not in (name, name.partition(".")[0]):
            raise
        return None


def output_dir() -> Path:
    """Return ComfyUI's folder for results; relative paths begin there."""
    paths = part_of_comfyui("folder_paths")
    return Path(paths.get_output_directory()) if paths else Path("output").absolute()


def temp_dir() -> Path:
    """Return ComfyUI's folder for what need not stay."""
    paths = part_of_comfyui("folder_paths")
    return Path(paths.get_temp_directory()) if paths else Path(tempfile.gettempdir())


def weights_dir() -> Path:
    """Return the folder ``selva`` of ComfyUI's models: the first that exists, else where downloads would go."""
    paths = part_of_comfyui("folder_paths")
    if paths is None:
        return Path("models", "selva").absolute()
    extra = paths.get_folder_paths("selva") if "selva" in paths.folder_names_and_paths else []
    places = [*map(Path, extra), Path(paths.models_dir) / "selva"]
    return next((place for place in places if place.is_dir()), places[-1])


def written_to(text: str) -> Path:
    """Return a folder or file to write: a relative path lies in the output folder."""
    return output_dir() / Path(text.strip()).expanduser()


def read_from(text: str) -> Path:
    """Return a file or folder to read: a relative path is looked for in ComfyUI's output, input and models folders."""
    path, paths = Path(text.strip()).expanduser(), part_of_comfyui("folder_paths")
    roots = [output_dir(), *([Path(paths.get_input_directory()), Path(paths.models_dir)] if paths else [])]
    return next((root / path for root in roots if (root / path).exists()), roots[0] / path)


def picture_in_node(path: Path) -> dict[str, str]:
    """Return the entry for a picture in a node: of a copy in the temporary folder, from where ComfyUI can serve it."""
    name = f"selva_{hashlib.sha256(path.read_bytes()).hexdigest()[:16]}{path.suffix}"
    temp_dir().mkdir(parents=True, exist_ok=True)
    shutil.copyfile(path, temp_dir() / name)
    return {"filename": name, "subfolder": "", "type": "temp"}


def interrupted() -> bool:
    """Return True where the user has asked to stop."""
    management = part_of_comfyui("comfy.model_management")
    return bool(management and management.processing_interrupted())


def end_if_interrupted() -> None:
    """End the node, as ComfyUI wants it, where the user has asked to stop."""
    if management := part_of_comfyui("comfy.model_management"):
        management.throw_exception_if_processing_interrupted()


@contextmanager
def progress(saving: str = "") -> Iterator[None]:
    """Show the progress of the block, and end it if the user asks; not from stage ``saving`` on, which ends itself."""
    utils, bars = part_of_comfyui("comfy.utils"), {}

    def watch(what: str, done: int, total: int) -> None:
        if what != saving and saving in bars:
            return  # a sample in between
        if what != saving:
            end_if_interrupted()
        if what not in bars:
            bars[what] = utils.ProgressBar(total) if utils else None
        if bars[what]:
            bars[what].update_absolute(done, total)

    with watched(watch):
        yield


def device_name() -> str:
    """Return the kind of device that ComfyUI computes on; "auto" outside of it."""
    management = part_of_comfyui("comfy.model_management")
    return management.get_torch_device().type if management else "auto"


def say(text: str, node_id: str | None) -> None:
    """Show a text in the node at once, where this ComfyUI can do that."""
    server = getattr(getattr(part_of_comfyui("server"), "PromptServer", None), "instance", None)
    if send := getattr(server, "send_progress_text", None):
        send(text, node_id)


def lend_memory(engine: Any, num_bytes: int) -> Any:
    """Return a stand-in for the networks of an engine among ComfyUI's models, so that it can free them; or None.

    On a CPU there is nothing to free, and ComfyUI would find the model at its resting place already.
    """
    patcher = part_of_comfyui("comfy.model_patcher")
    if patcher is None or engine.device.type == "cpu":
        return None
    import torch

    class Networks(torch.nn.Module):
        def to(self, device: Any = None, *_args: Any, **_more: Any) -> Networks:
            if device is not None and torch.device(device).type == "cpu":
                engine.free()  # they are loaded again when they are needed
            return self

    return patcher.ModelPatcher(Networks(), engine.device, torch.device("cpu"), size=num_bytes)


def make_room(lent: Any) -> None:
    """Let ComfyUI make room for what :func:`lend_memory` returned."""
    if lent is not None:
        part_of_comfyui("comfy.model_management").load_models_gpu([lent])


def free_all_memory() -> None:
    """Let ComfyUI send away all of its models: what follows needs the whole device."""
    if management := part_of_comfyui("comfy.model_management"):
        management.unload_all_models()
        management.soft_empty_cache()
