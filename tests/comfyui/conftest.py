"""ComfyUI around the nodes: its folders, memory management, progress bars and server, as far as the nodes use them."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch


class Interrupted(Exception):
    """As ComfyUI's InterruptProcessingException."""


@dataclass
class Host:
    """A made-up ComfyUI.

    Attributes:
        root: with the folders output, input, models and temp. asked: times that a node has asked for an interrupt.
        stop_at: the number of such a question from which the answer is yes; 0 is never. bars: (done, total) of every
        update. said: texts sent to nodes. freed: times that all models were sent away.
    """

    root: Path
    asked: int = 0
    stop_at: int = 0
    bars: list[tuple[int, int]] = field(default_factory=list)
    said: list[tuple[str, str]] = field(default_factory=list)
    freed: int = 0

    def interrupted(self) -> bool:
        self.asked += 1
        return 0 < self.stop_at <= self.asked

    def throw(self) -> None:
        if self.interrupted():
            self.stop_at = 0
            raise Interrupted

    def unload(self) -> None:
        self.freed += 1


@pytest.fixture
def comfyui(tmp_path, monkeypatch) -> Host:
    host = Host(tmp_path / "ComfyUI")
    for name in ("output", "input", "models", "temp"):
        (host.root / name).mkdir(parents=True)

    class ProgressBar:
        def __init__(self, total):
            self.total = total

        def update_absolute(self, value, total=None):
            host.bars.append((value, total))

    modules = {
        "folder_paths": {
            "get_output_directory": lambda: str(host.root / "output"),
            "get_input_directory": lambda: str(host.root / "input"),
            "get_temp_directory": lambda: str(host.root / "temp"),
            "models_dir": str(host.root / "models"), "folder_names_and_paths": {}},
        "comfy": {},
        "comfy.model_management": {
            "processing_interrupted": host.interrupted, "throw_exception_if_processing_interrupted": host.throw,
            "unload_all_models": host.unload, "soft_empty_cache": lambda: None,
            "get_torch_device": lambda: torch.device("cpu")},
        "comfy.model_patcher": {},
        "comfy.utils": {"ProgressBar": ProgressBar},
        "server": {"PromptServer": SimpleNamespace(instance=SimpleNamespace(
            send_progress_text=lambda text, node_id: host.said.append((node_id, text))))},
    }
    for name, content in modules.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    return host
