"""A small executor of ComfyUI's node protocol: checks a graph in API format and runs what has changed, in a thread.

As in ComfyUI's server: widgets are checked against INPUT_TYPES (types, limits, choices), links by type, output nodes
start the run, a node whose inputs and IS_CHANGED are what they were is not run again.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Any

import torch

WIDGETS = {"INT": int, "FLOAT": (int, float), "STRING": str, "BOOLEAN": bool}


class Invalid(Exception):
    """The graph cannot be run; one line for each problem."""


def is_link(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], str) and isinstance(value[1], int)


@dataclass
class Run:
    """What one run of a graph did: nodes that were executed, in order; results and UI by node, also of cached ones."""

    executed: list[str] = field(default_factory=list)
    results: dict[str, tuple] = field(default_factory=dict)
    ui: dict[str, dict] = field(default_factory=dict)


class Executor:
    def __init__(self, classes: dict[str, type]) -> None:
        self.classes = classes
        self._cache: dict[str, tuple[Any, tuple, dict]] = {}  # node -> signature, result, ui

    def validate(self, graph: dict[str, Any]) -> list[str]:
        """Return what is wrong with a graph."""
        problems = [f"{node}: {text}" for node in graph for text in self._node_problems(graph, node)]
        if not any(getattr(self.classes.get(one["class_type"]), "OUTPUT_NODE", False) for one in graph.values()):
            problems.append("the graph has no output node")
        return problems

    def _node_problems(self, graph: dict[str, Any], node: str):
        cls, inputs = self.classes.get(graph[node]["class_type"]), graph[node]["inputs"]
        if cls is None:
            yield f"unknown node {graph[node]['class_type']}"
            return
        types = cls.INPUT_TYPES()
        declared = {**types["required"], **types.get("optional", {})}
        yield from (f"{name}: missing" for name in types["required"] if name not in inputs)
        yield from (f"{name}: unknown input" for name in inputs if name not in declared)
        for name in inputs.keys() & declared.keys():
            kind, options = declared[name][0], declared[name][1] if len(declared[name]) > 1 else {}
            value = inputs[name]
            if is_link(value):
                given = self.classes[graph[value[0]]["class_type"]].RETURN_TYPES[value[1]]
                if given != kind:
                    yield f"{name}: is linked to {given}, expected {kind}"
            elif isinstance(kind, list):
                if value not in kind:
                    yield f"{name}: {value!r} is not in {kind}"
            elif kind not in WIDGETS:
                yield f"{name}: {kind} needs a link"
            elif not isinstance(value, WIDGETS[kind]) or (isinstance(value, bool) and kind != "BOOLEAN"):
                yield f"{name}: {value!r} is no {kind}"
            elif not options.get("min", value) <= value <= options.get("max", value):
                yield f"{name}: {value} is outside of {options.get('min')} to {options.get('max')}"
        if hasattr(cls, "VALIDATE_INPUTS"):
            code = cls.VALIDATE_INPUTS.__func__.__code__
            names = code.co_varnames[1:code.co_argcount]
            said = cls.VALIDATE_INPUTS(**{k: v for k, v in inputs.items() if k in names and not is_link(v)})
            if said is not True:
                yield str(said)

    def run(self, graph: dict[str, Any]) -> Run:
        """Run a graph; what a node raises is raised."""
        if problems := self.validate(graph):
            raise Invalid("\n".join(problems))
        run, errors = Run(), []

        def work() -> None:
            try:
                with torch.inference_mode():  # as ComfyUI does for every graph
                    for node, one in graph.items():
                        if getattr(self.classes[one["class_type"]], "OUTPUT_NODE", False):
                            self._run(graph, node, run)
            except BaseException as error:
                errors.append(error)

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        if errors:
            raise errors[0]
        return run

    def _signature(self, graph: dict[str, Any], node: str) -> Any:
        cls, inputs = self.classes[graph[node]["class_type"]], graph[node]["inputs"]
        plain = {name: value for name, value in inputs.items() if not is_link(value)}
        changed = cls.IS_CHANGED(**plain) if hasattr(cls, "IS_CHANGED") else ""
        links = tuple((name, value[1], self._signature(graph, value[0])) for name, value in sorted(inputs.items())
                      if is_link(value))
        return graph[node]["class_type"], changed, tuple(sorted(plain.items())), links

    def _run(self, graph: dict[str, Any], node: str, run: Run) -> tuple:
        if node in run.results:
            return run.results[node]
        cls, signature = self.classes[graph[node]["class_type"]], self._signature(graph, node)
        if node in self._cache and self._cache[node][0] == signature:
            _, run.results[node], run.ui[node] = self._cache[node]
            return run.results[node]
        inputs = {name: self._run(graph, value[0], run)[value[1]] if is_link(value) else value
                  for name, value in graph[node]["inputs"].items()}
        inputs |= {name: node for name, kind in cls.INPUT_TYPES().get("hidden", {}).items() if kind == "UNIQUE_ID"}
        returned = getattr(cls(), cls.FUNCTION)(**inputs)
        result, ui = (returned["result"], returned["ui"]) if isinstance(returned, dict) else (returned, {})
        assert isinstance(result, tuple) and len(result) == len(cls.RETURN_TYPES)
        assert all(isinstance(entries, list) for entries in ui.values())  # as ComfyUI merges them
        run.executed.append(graph[node]["class_type"])
        self._cache[node] = signature, result, ui
        run.results[node], run.ui[node] = result, ui
        return result


# -- nodes of ComfyUI itself, as far as the examples use them ----------------------------------------------------------


def core_nodes(input_dir) -> dict[str, type]:
    """Return stand-ins for LoadVideo, GetVideoComponents and SaveAudio."""
    import numpy as np
    from make_media import decode

    class LoadVideo:
        RETURN_TYPES, FUNCTION = ("VIDEO",), "load"

        @classmethod
        def INPUT_TYPES(cls):
            return {"required": {"file": (sorted(path.name for path in input_dir.iterdir() if path.is_file()), {})}}

        def load(self, file):
            return (input_dir / file,)

    class GetVideoComponents:
        RETURN_TYPES, FUNCTION = ("IMAGE", "AUDIO", "FLOAT"), "get"

        @classmethod
        def INPUT_TYPES(cls):
            return {"required": {"video": ("VIDEO",)}}

        def get(self, video):
            frames, sound, rate = decode(video)
            pictures = torch.from_numpy(np.stack([picture for _, picture in frames])).float() / 255
            fps = 1 / (frames[1][0] - frames[0][0])
            return pictures, {"waveform": torch.from_numpy(sound)[None], "sample_rate": rate}, round(fps, 4)

    class SaveAudio:
        RETURN_TYPES, FUNCTION, OUTPUT_NODE = (), "save", True

        @classmethod
        def INPUT_TYPES(cls):
            return {"required": {"audio": ("AUDIO",), "filename_prefix": ("STRING", {"default": "audio/ComfyUI"})}}

        def save(self, audio, filename_prefix):
            assert audio["waveform"].ndim == 3 and isinstance(audio["sample_rate"], int)
            return {"ui": {"audio": [{"samples": audio["waveform"].shape[2]}]}, "result": ()}

    return {"LoadVideo": LoadVideo, "GetVideoComponents": GetVideoComponents, "SaveAudio": SaveAudio}
