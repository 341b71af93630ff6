"""The nodes of comfyui/: what the command line does, bit for bit, and what ComfyUI expects of a node."""

from __future__ import annotations

import copy
import functools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from make_media import decode, make_video
from node_executor import Executor, Invalid, core_nodes
from script_args import TINY
from tiny_adapter import make_adapter

import extract_features
import infer
import train_lora
from comfyui import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS
from comfyui.host import NodeError
from comfyui.nodes import FeatureExtractor, LoRALoader, LoRATrainer, ModelLoader, Sampler
from selva.checkpoint import load_adapter, save_adapter
from selva.features import load_features
from selva.media import write_audio

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "comfyui" / "examples"
PREFIX = "SelvaLoraToolkit"


def tone(seed: int, seconds: float) -> np.ndarray:
    time = np.arange(round(seconds * 16_000)) / 16_000
    return (0.3 * np.sin((900 + 200 * seed) * time) * np.exp(-6 * (time % 0.5))).astype(np.float32)[None]


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> Path:
    """Five videos of a second, with sound."""
    folder = tmp_path_factory.mktemp("videos")
    for number in range(5):
        make_video(folder / f"gong_{number + 1:03d}.mp4", 1.0, size=(96, 64 + 2 * number), sound=tone(number, 1.0))
    return folder


@pytest.fixture(scope="module")
def features(tmp_path_factory, videos) -> Path:
    folder = tmp_path_factory.mktemp("set") / "features"
    assert extract_features.main([str(videos), "--output_dir", str(folder), "--prompt", "a gong", *TINY]) == 0
    return folder


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("adapter") / "adapter_final.pt"
    made = make_adapter()
    save_adapter(path, made.tensors, {**made.meta, "rank": 2, "alpha": 2.0, "target": ["attn.qkv"]})
    return path


def defaults(node: type) -> dict:
    types = node.INPUT_TYPES()
    declared = {**types["required"], **types.get("optional", {})}
    return {name: spec[1]["default"] for name, spec in declared.items() if len(spec) > 1 and "default" in spec[1]}


def call(node: type, **inputs):
    """Return the results of a node with its defaults and these inputs."""
    with torch.inference_mode():  # as ComfyUI does
        returned = getattr(node(), node.FUNCTION)(**{**defaults(node), **inputs})
    return returned["result"] if isinstance(returned, dict) else returned


@functools.cache
def model():
    """Return one model for all tests: its networks are loaded once."""
    return call(ModelLoader, variant="tiny_16k")[0]


@torch.inference_mode()
def pictures_of(video: Path):
    frames, sound, rate = decode(video)
    pictures = torch.from_numpy(np.stack([picture for _, picture in frames])).float() / 255
    return pictures, {"waveform": torch.from_numpy(sound)[None], "sample_rate": rate}


# -- the same as the command line --------------------------------------------------------------------------------------


def test_features_are_those_of_extract_features(comfyui, videos, features):
    pictures, audio = pictures_of(videos / "gong_002.mp4")
    bundle, fps, prompt, folder = call(
        FeatureExtractor, model=model(), video=pictures, prompt="a gong", cache_dir="set", name="gong", audio=audio)
    assert folder == str(comfyui.root / "output" / "set") and (fps, prompt) == (25.0, "a gong")
    with np.load(Path(folder) / "gong_001.npz") as ours, np.load(features / "gong_002.npz") as theirs:
        for key in ("clip_features", "sync_features", "text_features", "duration", "prompt", "variant"):
            np.testing.assert_array_equal(ours[key], theirs[key])
    for written, expected in zip(soundfile.read(Path(folder) / "gong_001.flac"),
                                 soundfile.read(features / "gong_002.flac"), strict=True):
        np.testing.assert_array_equal(written, expected)
    assert torch.equal(bundle.sync_features, load_features(features / "gong_002.npz").sync_features)


def test_the_rate_of_video_helper_suite_goes_first(comfyui, videos):
    pictures, _ = pictures_of(videos / "gong_001.mp4")
    bundle, fps, *_ = call(FeatureExtractor, model=model(), video=pictures, video_info={"loaded_fps": 12.5}, fps=25.0)
    assert fps == 12.5 and bundle.duration == 2.0


@pytest.mark.parametrize("strength", [None, 1.0, 0.6])
@pytest.mark.parametrize("normalize", [True, False])
def test_the_sound_is_that_of_infer(comfyui, tmp_path, features, adapter, strength, normalize):
    path, chosen = features / "gong_001.npz", model()
    if strength is not None:
        (chosen,) = call(LoRALoader, model=chosen, adapter_path=str(adapter), strength=strength)
    (audio,) = call(Sampler, model=chosen, features=load_features(path), negative_prompt="a bell", steps=3, seed=7,
                    normalize=normalize)
    more = [] if strength is None else ["--adapter", str(adapter), "--strength", str(strength)]
    assert infer.main(["--features", str(path), "--negative_prompt", "a bell", "--num_steps", "3", "--seed", "7",
                       "--normalize", "rms" if normalize else "none", "--output", str(tmp_path / "infer.flac"), *more,
                       *TINY]) == 0
    assert audio["waveform"].shape == (1, 1, 16_000) and audio["sample_rate"] == 16_000
    write_audio(tmp_path / "node.flac", audio["waveform"][0], 16_000)
    assert (tmp_path / "node.flac").read_bytes() == (tmp_path / "infer.flac").read_bytes()


QUICK = {"steps": 4, "batch_size": 2, "warmup_steps": 1, "save_every": 2, "val_every": 2, "rank": 2,
         "val_fraction": 0.2}


def trained(run, data: Path, output: Path, **more):
    return call(LoRATrainer, model=run, data_dir=str(data), output_dir=str(output), **{**QUICK, **more})


def flags(values: dict) -> list[str]:
    return [part for name, value in values.items() for part in (f"--{name}", str(value))]


def same_adapter(first: Path, second: Path) -> bool:
    one, other = load_adapter(first), load_adapter(second)
    assert one.meta == other.meta
    return one.tensors.keys() == other.tensors.keys() and all(
        torch.equal(one.tensors[key], other.tensors[key]) for key in one.tensors)


def test_the_adapter_is_that_of_train_lora(comfyui, tmp_path, features):
    made, path, curves, summary = trained(model(), features, tmp_path / "node", preview=False)
    assert train_lora.main(["--data_dir", str(features), "--output_dir", str(tmp_path / "cli"), "--no_preview",
                            *flags(QUICK), *TINY]) == 0
    assert path == str(tmp_path / "node" / "adapter_final.pt")
    assert same_adapter(Path(path), tmp_path / "cli" / "adapter_final.pt")
    assert made.adapters == ((Path(path), 1.0),)
    assert curves.ndim == 4 and curves.shape[3] == 3 and 0 <= curves.min() < curves.max() <= 1
    assert summary.startswith(f"{path}: trained to step 4; the loss of the held-out clips ")
    assert comfyui.said[-1][1] == summary and comfyui.freed == 1
    assert (4, 4) in comfyui.bars


def test_defaults_are_those_of_the_command_line():
    parsers = {LoRATrainer: train_lora.build_parser(), Sampler: infer.build_parser(),
               FeatureExtractor: extract_features.build_parser()}
    renamed, differ = {"steps": {Sampler: "num_steps"}}, {"duration", "normalize", "prompt", "name"}
    seen = set()
    for node, parser in parsers.items():
        for name, value in defaults(node).items():
            flag = renamed.get(name, {}).get(node, name)
            if name in differ or not any(flag == action.dest for action in parser._actions):
                continue
            expected = parser.get_default(flag)
            expected = " ".join(expected) if isinstance(expected, list | tuple) else expected
            assert value == (expected or type(value)()) or str(expected) == value, name
            seen.add(name)
    assert len(seen) > 25


# -- what ComfyUI expects ----------------------------------------------------------------------------------------------


@pytest.fixture
def executor(comfyui, videos) -> Executor:
    for video in videos.iterdir():
        (comfyui.root / "input" / video.name).write_bytes(video.read_bytes())
    return Executor({**NODE_CLASS_MAPPINGS, **core_nodes(comfyui.root / "input")})


def example(name: str) -> dict:
    """Return an example, with fewer steps."""
    graph = json.loads((EXAMPLES / f"{name}_api.json").read_text(encoding="utf-8"))
    for one in graph.values():
        if one["class_type"] == f"{PREFIX}LoRATrainer":
            one["inputs"] |= {"steps": 2, "save_every": 2, "preview": False}
        elif one["class_type"] == f"{PREFIX}Sampler":
            one["inputs"] |= {"steps": 2}
    return graph


def ran(run) -> set[str]:
    return {name.removeprefix(PREFIX) for name in run.executed}


def test_the_examples_run_and_only_what_changed_runs_again(comfyui, executor):
    graph = example("training")
    first = executor.run(graph)
    assert ran(first) == {"ModelLoader", "LoadVideo", "GetVideoComponents", "FeatureExtractor", "LoRATrainer",
                          "LoRALoader", "Sampler", "SaveAudio"}
    output = comfyui.root / "output" / "selva"
    assert sorted(path.name for path in (output / "gong").glob("gong*")) == ["gong_001.flac", "gong_001.npz"]
    assert (output / "gong_lora" / "adapter_final.pt").is_file()
    assert first.ui["8"]["audio"] == [{"samples": 16_000}]
    (picture,) = first.ui["5"]["images"]
    assert (comfyui.root / picture["type"] / picture["subfolder"] / picture["filename"]).is_file()
    assert first.ui["4"]["text"] == [f"gong_001.npz: 1 s with sound, in {output / 'gong'}"]
    assert executor.run(graph).executed == []

    seed = copy.deepcopy(graph)
    seed["7"]["inputs"]["seed"] = 1
    assert ran(executor.run(seed)) == {"Sampler", "SaveAudio"}

    other = copy.deepcopy(graph)
    other["2"]["inputs"]["file"] = "gong_002.mp4"
    assert "LoRATrainer" in ran(executor.run(other))
    assert (output / "gong" / "gong_002.npz").is_file() and (output / "gong_lora" / "previous_001").is_dir()

    graph = example("generation")
    second = Executor(executor.classes)
    assert "Sampler" in ran(second.run(graph))
    assert second.run(graph).executed == []
    path = output / "gong_lora" / "adapter_final.pt"
    os.utime(path, ns=(time.time_ns(), time.time_ns()))
    assert ran(second.run(graph)) == {"LoRALoader", "Sampler", "SaveAudio"}


def test_a_changed_data_set_trains_again(comfyui, tmp_path, features):
    before = LoRATrainer.IS_CHANGED(data_dir=str(features))
    (features / ".selva_cache").mkdir(exist_ok=True)
    assert LoRATrainer.IS_CHANGED(data_dir=str(features)) == before
    (features / "prompts.txt").write_text("gong_001: a bell\n")
    assert LoRATrainer.IS_CHANGED(data_dir=str(features)) != before
    (features / "prompts.txt").unlink()
    assert LoRATrainer.IS_CHANGED(data_dir=str(features)) == before == LoRATrainer.IS_CHANGED(str(features), steps=1)
    assert LoRATrainer.IS_CHANGED() == LoRATrainer.IS_CHANGED(data_dir=str(tmp_path / "none")) == ""


def test_an_interrupted_training_is_saved_and_goes_on(comfyui, tmp_path, features):
    chosen = model()
    trained(chosen, features, tmp_path / "whole", preview=False)
    asked = comfyui.asked
    comfyui.asked, comfyui.stop_at = 0, asked - 1  # at one of the last steps
    with pytest.raises(Exception) as raised:
        trained(chosen, features, tmp_path / "parts", preview=False)
    assert type(raised.value).__name__ == "Interrupted" and comfyui.said[-1][1].startswith("stopped and saved at step")
    assert not (tmp_path / "parts" / "adapter_final.pt").exists() and list((tmp_path / "parts").glob("adapter_step*"))
    _, path, *_ = trained(chosen, features, tmp_path / "parts", preview=False, resume_path="auto")
    assert same_adapter(Path(path), tmp_path / "whole" / "adapter_final.pt")


def test_an_interrupt_ends_the_sampler(comfyui, features):
    comfyui.stop_at = 2
    with pytest.raises(Exception) as raised:
        call(Sampler, model=model(), features=load_features(features / "gong_001.npz"), steps=5)
    assert type(raised.value).__name__ == "Interrupted"
    assert [done for done, _ in comfyui.bars] == [1]


@pytest.mark.parametrize("node, inputs, message", [
    (ModelLoader, {"variant": "small_16k"}, r"variant small_16k lacks generator_small_16k_sup_5.pth .* fetch with: "),
    (LoRALoader, {"adapter_path": "none.pt"}, r"none.pt"),
    (LoRATrainer, {"data_dir": ""}, "data_dir is empty, expected the folder"),
    (LoRATrainer, {"data_dir": "none"}, r"--data_dir .*output/none: no such folder"),
    (LoRATrainer, {"data_dir": ".", "rank": 0, "steps": 0}, "rank must be at least 1, got 0; steps is 0, expected"),
    (LoRATrainer, {"data_dir": ".", "resume_path": "none.pt"}, "--resume .*none.pt: no such file"),
    (FeatureExtractor, {"video": torch.zeros(3, 64, 64, 3)}, "has 0.12 s of pictures"),
])
def test_errors_are_one_line(comfyui, node, inputs, message):
    if node is not ModelLoader:
        inputs = {"model": model(), **inputs}
    with pytest.raises(NodeError, match=message) as raised:
        call(node, **inputs)
    assert "\n" not in str(raised.value) and raised.value.__suppress_context__


def test_a_sound_longer_than_its_features_is_refused(comfyui, features):
    with pytest.raises(NodeError, match="duration is 2 s, but the features cover 1 s; 0 takes all"):
        call(Sampler, model=model(), features=load_features(features / "gong_001.npz"), duration=2.0)


def test_a_model_with_an_adapter_is_not_trained(comfyui, features, adapter):
    (chosen,) = call(LoRALoader, model=model(), adapter_path=str(adapter))
    with pytest.raises(NodeError, match="the model has an adapter, and a training starts without"):
        trained(chosen, features, comfyui.root / "out")


@pytest.mark.parametrize("change, message", [
    ({"4": {"duration": -1.0}}, "4: duration: -1.0 is outside of 0.0 to 86400.0"),
    ({"1": {"variant": "large"}}, "1: variant: 'large' is not in"),
    ({"5": {"model": ["4", 0]}}, "5: model: is linked to SELVA_LORA_FEATURES, expected SELVA_LORA_MODEL"),
    ({"6": {"adapter_path": "none.pt"}}, "6: none.pt: no such file; a relative path is looked for"),
    ({"7": {"seed": 1.5}}, "7: seed: 1.5 is no INT"),
])
def test_a_wrong_graph_is_refused_before_it_runs(executor, change, message):
    graph = example("training")
    for node, inputs in change.items():
        graph[node]["inputs"] |= inputs
    with pytest.raises(Invalid) as raised:
        executor.run(graph)
    assert str(raised.value).startswith(message) and "\n" not in str(raised.value)


def test_comfyui_frees_the_networks_on_a_gpu(comfyui, monkeypatch):
    """With a stand-in for a GPU: ComfyUI calls ``to("cpu")`` of a model that it sends away."""
    from types import SimpleNamespace

    from comfyui import host

    freed, loaded = [], []
    engine = SimpleNamespace(device=torch.device("cuda"), free=lambda: freed.append(1))
    monkeypatch.setattr(sys.modules["comfy.model_patcher"], "ModelPatcher", lambda model, load, offload, size: (
        SimpleNamespace(model=model, load=load, offload=offload, size=size)), raising=False)
    monkeypatch.setattr(sys.modules["comfy.model_management"], "load_models_gpu", loaded.extend, raising=False)
    lent = host.lend_memory(engine, 5)
    host.make_room(lent)
    assert loaded == [lent] and lent.size == 5 and lent.load.type == "cuda"
    assert lent.model.to(torch.device("cuda")) is lent.model and not freed
    lent.model.to("cpu")
    assert freed == [1] and host.lend_memory(SimpleNamespace(device=torch.device("cpu")), 5) is None


def test_selva_weights_are_looked_for_where_comfyui_keeps_models(comfyui, tmp_path):
    from comfyui import host

    assert host.weights_dir() == comfyui.root / "models" / "selva"
    paths = sys.modules["folder_paths"]
    paths.folder_names_and_paths["selva"] = ([], set())
    paths.get_folder_paths = lambda name: [str(tmp_path / "none"), str(tmp_path)]
    assert host.weights_dir() == tmp_path


# -- the pack ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["training", "generation"])
def test_both_formats_of_an_example_are_the_same_graph(name):
    page = json.loads((EXAMPLES / f"{name}.json").read_text(encoding="utf-8"))
    graph = json.loads((EXAMPLES / f"{name}_api.json").read_text(encoding="utf-8"))
    sources = {link[0]: [str(link[1]), link[2]] for link in page["links"]}
    converted = {}
    for node in page["nodes"]:
        values, inputs = list(node["widgets_values"]), {}
        for one in node["inputs"]:
            value = values.pop(0) if "widget" in one else None
            if one["name"] == "seed":
                assert values.pop(0) == "fixed"  # what happens to the seed after a run
            if one["link"] is not None:
                inputs[one["name"]] = sources[one["link"]]
            elif "widget" in one:
                inputs[one["name"]] = value
        assert values == (["image"] if node["type"] == "LoadVideo" else [])  # its button to upload
        converted[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    assert converted == {key: {"class_type": one["class_type"], "inputs": one["inputs"]} for key, one in graph.items()}


def test_the_pack_stands_beside_comfyui_selva():
    theirs = {"SelvaModelLoader", "SelvaFeatureExtractor", "SelvaLoraTrainer", "SelvaLoraLoader", "SelvaSampler"}
    assert len(NODE_CLASS_MAPPINGS) == 5 and not theirs & set(NODE_CLASS_MAPPINGS)
    assert NODE_CLASS_MAPPINGS.keys() == NODE_DISPLAY_NAME_MAPPINGS.keys()
    assert all(name.endswith("(selva-lora)") for name in NODE_DISPLAY_NAME_MAPPINGS.values())
    used = {spec[0] for node in NODE_CLASS_MAPPINGS.values() for group in ("required", "optional")
            for spec in node.INPUT_TYPES().get(group, {}).values() if isinstance(spec[0], str)}
    assert not used & {"SELVA_MODEL", "SELVA_FEATURES", "SELVA_LORA"}


def test_it_is_small():
    assert sum(len(path.read_text(encoding="utf-8").splitlines()) for path in (ROOT / "comfyui").glob("*.py")) <= 500


LOADER = """
import importlib.util, sys
place = sys.argv[1]
name = place.replace(".", "_x_")  # as ComfyUI names its custom nodes
spec = importlib.util.spec_from_file_location(name, place + "/__init__.py",
                                              submodule_search_locations=[place])
module = importlib.util.module_from_spec(spec)
sys.modules[name] = module
spec.loader.exec_module(module)
print(len(module.NODE_CLASS_MAPPINGS), "torch" in sys.modules, "matplotlib" in sys.modules)
"""


@pytest.mark.parametrize("place", [ROOT, ROOT / "comfyui"])
def test_comfyui_can_import_it_at_once(place, tmp_path):
    """As a clone of the repository, and as a link to its folder; PyTorch comes with ComfyUI, but nothing else does."""
    run = subprocess.run([sys.executable, "-c", LOADER, str(place)], capture_output=True, text=True, cwd=tmp_path,
                         env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert run.stdout.split() == ["5", "False", "False"], run.stderr


def test_without_the_library_it_says_how_to_install_it(tmp_path):
    blocked = "import sys\nsys.modules['selva'] = None\n" + LOADER
    run = subprocess.run([sys.executable, "-c", blocked, str(ROOT / "comfyui")], capture_output=True, text=True,
                         cwd=tmp_path)
    last = run.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: selva-lora lacks selva") and "pip install -e PATH" in last
