"""The five nodes: model, features, training, adapter, sound.

    Model Loader --model--> Feature Extractor --features--> Sampler --> AUDIO
                 --model--> LoRA Trainer --adapter_path--> LoRA Loader --model--> Sampler

Inputs have the names of ComfyUI-SelVA and the defaults of the command line, whose settings they are made from. Types
have names of their own: what the nodes of the two packs hand on to each other is not the same.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from selva.audio.config import DEFAULT_TARGETS
from selva.flow import SamplingConfig
from selva.media.mask_settings import MaskOptions
from selva.models.variants import PARTS, get_variant
from selva.training.config import RunConfig
from selva.utils.device import PRECISION_CHOICES, PRECISION_HELP, holds_all_networks
from selva.utils.errors import UserError
from selva.utils.files import status_hash
from selva.utils.progress import Progress
from selva.utils.settings import Setting, build, settings_of
from selva.weights.config import ModelConfig
from selva.weights.find import check_weights, find_weights, packaged_identity, weights_identity

from . import host

if TYPE_CHECKING:
    from selva import SoundGenerator

MODEL, FEATURES, CATEGORY = "SELVA_LORA_MODEL", "SELVA_LORA_FEATURES", "selva-lora"
PLACES = "a relative path is looked for in ComfyUI's output, input and models folders"
SEED = {"min": 0, "max": 0xFFFFFFFF, "control_after_generate": True}
SHARE = {"min": 0.0, "max": 1.0, "step": 0.05, "round": 0.001}
# Limits of the widgets; what makes sense is checked by the settings themselves.
LIMITS: dict[str, dict[str, Any]] = {
    "seed": SEED, "num_steps": {"min": 1, "max": 1000}, "cfg_strength": {"min": 0.0, "max": 20.0, "step": 0.1},
    "lr": {"min": 1e-7, "max": 1.0, "step": 1e-5, "round": 1e-7}, "alpha": {"min": 0.0, "max": 4096.0},
    "logit_normal_sigma": {"min": 0.01, "max": 10.0, "step": 0.1}, "lora_plus_ratio": {"min": 0.1, "max": 64.0},
    "warmup_steps": {"min": 0, "max": 1 << 24}, "patience": {"min": 0, "max": 1 << 24}, "curriculum_switch": SHARE,
    "lora_dropout": SHARE, "val_fraction": SHARE, "mask_strength": SHARE, "preserve_share": SHARE,
}


def widget(setting: Setting) -> tuple[Any, dict[str, Any]]:
    """Return the input of a node that stands for a setting: its choices or type, and its default, limits and help."""
    options: dict[str, Any] = {"default": setting.default, "tooltip": setting.info.help}
    if setting.info.nargs is not None:
        return "STRING", {**options, "default": " ".join(setting.default)}
    if setting.info.choices:
        return list(setting.info.choices), options
    if setting.kind is Path:
        return "STRING", {**options, "default": str(setting.default)}
    if setting.kind in (int, float):
        options |= LIMITS.get(setting.name, {"min": 1, "max": 1 << 24})
        options["default"] = setting.default or 0  # 0 stands for none
    return {int: "INT", float: "FLOAT", bool: "BOOLEAN", str: "STRING"}[setting.kind], options


def widgets(config: type, *names: str) -> dict[str, tuple[Any, dict[str, Any]]]:
    """Return the inputs for some settings of a dataclass, in this order."""
    found = {setting.name: setting for setting in settings_of(config)}
    return {name: widget(found[name]) for name in names}


def text(tooltip: str, default: str = "", **more: Any) -> tuple[str, dict[str, Any]]:
    return "STRING", {"default": default, "tooltip": tooltip, **more}


def seconds(tooltip: str) -> tuple[str, dict[str, Any]]:
    return "FLOAT", {"default": 0.0, "min": 0.0, "max": 86400.0, "step": 0.1, "round": 0.001, "tooltip": tooltip}


@dataclass(frozen=True)
class Model:
    """A base model with adapters, files and strengths; its engine is shared by all models of one loader."""

    engine: SoundGenerator
    precision: str
    adapters: tuple[tuple[Path, float], ...] = ()
    lent: Any = None

    def ready(self) -> SoundGenerator:
        """Return the engine with room for its networks, and with these adapters."""
        host.make_room(self.lent)
        self.engine.set_adapters(self.adapters)
        return self.engine


class ModelLoader:
    """Finds a base model and checks that its weights are there."""

    CATEGORY, FUNCTION, RETURN_TYPES, RETURN_NAMES = CATEGORY, "load", (MODEL,), ("model",)
    DESCRIPTION = "A base model. Its weights lie in ComfyUI's models/selva; tiny_16k is built in."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {
            **widgets(ModelConfig, "variant"),
            "precision": (list(PRECISION_CHOICES), {"default": "auto", "tooltip": PRECISION_HELP}),
            "offload_strategy": (["auto", "keep_in_vram", "offload_to_cpu"], {"default": "auto", "tooltip": (
                "keep all networks, or free each before the next; auto keeps them on a CPU or a GPU of 16 GB")}),
        }}

    @classmethod
    def IS_CHANGED(cls, variant: str, **_inputs: Any) -> str:
        try:
            return packaged_identity(variant) + weights_identity(get_variant(variant), host.weights_dir(), PARTS)
        except OSError:
            return "missing"

    @host.node_function
    def load(self, variant: str, precision: str, offload_strategy: str) -> tuple[Model]:
        where = host.weights_dir()
        check_weights(variant, where)
        from selva import SoundGenerator  # PyTorch takes a second to import; ComfyUI has it, others may not

        engine = SoundGenerator(variant, where, device=host.device_name(), precision=precision)
        keep = offload_strategy == "keep_in_vram" or (offload_strategy == "auto" and holds_all_networks(engine.device))
        engine.offload = "none" if keep else "auto"
        files = [path for paths in find_weights(engine.variant, where, PARTS).values() for path in paths]
        num_bytes = sum(path.stat().st_size for path in files)
        return (Model(engine, precision, lent=host.lend_memory(engine, num_bytes)),)


class FeatureExtractor:
    """Makes the features of pictures and a prompt, and keeps them as a file; with the sound, a clip to train on."""

    CATEGORY, FUNCTION, OUTPUT_NODE = CATEGORY, "extract", True
    DESCRIPTION = "What the model sees of a clip. With a name and the sound: a clip of a training set in cache_dir."
    RETURN_TYPES, RETURN_NAMES = (FEATURES, "FLOAT", "STRING", "STRING"), ("features", "fps", "prompt", "data_dir")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model": (MODEL,),
                "video": ("IMAGE",),
                "prompt": text("what is to be heard", multiline=True),
                "fps": ("FLOAT", {"default": 25.0, "min": 0.1, "max": 1000.0, "step": 0.01, "round": 0.00001}),
                "duration": seconds("seconds to use; 0: 8, or what the video has if that is less"),
                "cache_dir": text("folder of the files, relative to ComfyUI's output folder; empty: its temporary one"),
                "name": text("files are called name_001 ...; the same pictures keep their number. Empty: by content"),
            },
            "optional": {
                "video_info": ("VHS_VIDEOINFO",),
                "mask": ("MASK", {"tooltip": "one for all pictures, or one for each; white is kept"}),
                **widgets(MaskOptions, "mask_strength", "mask_clip", "mask_sync"),
                "audio": ("AUDIO", {"tooltip": "the sound of the clip, to train on; written beside the features"}),
            },
        }

    @host.node_function
    def extract(
        self, model: Model, video: Any, prompt: str, fps: float, duration: float, cache_dir: str, name: str,
        video_info: dict[str, Any] | None = None, audio: dict[str, Any] | None = None, **masking: Any,
    ) -> dict[str, Any]:
        from selva.extraction.pictures import PictureClip, extract_pictures

        fps = float((video_info or {}).get("loaded_fps", fps))
        sound = {} if audio is None else {"sound": audio["waveform"][0], "rate": int(audio["sample_rate"])}
        clip = PictureClip(video, fps, prompt.strip(), duration or None, **masking, **sound)
        folder, engine = host.written_to(cache_dir) if cache_dir.strip() else host.temp_dir(), model.ready()
        engine.enter("encoders")
        bundle, path = extract_pictures(engine.extractor, clip, folder, name.strip())
        text = f"{path.name}: {bundle.duration:g} s{'' if audio is None else ' with sound'}, in {folder}"
        return {"ui": {"text": [text]}, "result": (bundle, fps, bundle.prompt, str(folder))}


class LoRATrainer:
    """Trains an adapter on a folder of features and sounds, as train_lora.py does."""

    CATEGORY, FUNCTION, OUTPUT_NODE = CATEGORY, "train", True
    DESCRIPTION = "Teaches the model a new sound. To interrupt saves; resume_path auto goes on from there."
    RETURN_TYPES = (MODEL, "STRING", "IMAGE", "STRING")
    RETURN_NAMES = ("model", "adapter_path", "loss_curves", "summary")
    NAMES = ("output_dir", "rank", "alpha", "target", "steps", "lr", "warmup_steps", "batch_size", "grad_accum",
             "save_every", "seed", "timestep_mode", "logit_normal_sigma", "curriculum_switch", "lora_dropout",
             "lora_plus_ratio")
    OURS = ("val_fraction", "val_every", "patience", "clip_features", "init", "rslora", "lr_schedule",
            "preserve_share", "grad_checkpointing", "skip_invalid", "preview")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model": (MODEL,),
                "data_dir": text(f"folder of features and sounds; {PLACES}"),
                **widgets(RunConfig, *cls.NAMES),
                "resume_path": text("empty: a new run, an older one in output_dir is moved aside; auto: go on from the "
                                    "newest step there; or a step file"),
            },
            "optional": {
                **widgets(RunConfig, *cls.OURS),
                "preserve": text("prompts of sounds that the model shall keep, one in a line", multiline=True),
            },
            "hidden": {"node_id": "UNIQUE_ID"},
        }

    @classmethod
    def IS_CHANGED(cls, data_dir: str | None = None, **_inputs: Any) -> str:
        folder = host.read_from(data_dir) if data_dir else None  # None where another node gives it
        return status_hash(folder.iterdir()) if folder and folder.is_dir() else ""

    @host.node_function
    def train(
        self, model: Model, data_dir: str, output_dir: str, resume_path: str = "", preserve: str = "",
        node_id: str | None = None, **values: Any,
    ) -> dict[str, Any]:
        if model.adapters:
            raise UserError("the model has an adapter, and a training starts without; connect the Model Loader")
        resume = resume_path.strip()
        if not data_dir.strip():
            raise UserError("data_dir is empty, expected the folder of features and sounds")
        config = build(RunConfig, {
            **values, "data_dir": host.read_from(data_dir), "output_dir": host.written_to(output_dir),
            "resume": (resume if resume == "auto" else str(host.read_from(resume))) if resume else None,
            "alpha": values["alpha"] or None, "target": values["target"].split(), "precision": model.precision,
            "preserve": tuple(line.strip() for line in preserve.splitlines() if line.strip()),
            "variant": model.engine.variant.name, "selva_dir": model.engine.selva_dir,
            "device": model.engine.device.type,
        })
        import torch
        from matplotlib.image import imread

        from selva.training.train import train

        model.engine.free()
        host.free_all_memory()
        with host.progress(saving="training"):
            result = train(config, should_stop=host.interrupted)
        if result.adapter is None:
            stopped = f"stopped and saved at step {result.steps}; set resume_path to auto to go on"
            host.say(stopped, node_id)
            host.end_if_interrupted()
            raise UserError(stopped)
        summary = f"{result.adapter}: {result.verdict}"
        host.say(summary, node_id)
        trained = dataclasses.replace(model, adapters=((result.adapter, 1.0),))
        curves = config.output_dir / "loss_smoothed.png"
        picture = torch.from_numpy(imread(curves)[None, :, :, :3].astype("float32"))  # (1, H, W, 3)
        return {"ui": {"images": [host.picture_in_node(curves)], "text": [summary]},
                "result": (trained, str(result.adapter), picture, summary)}


class LoRALoader:
    """Adds an adapter to a model; several can follow each other."""

    CATEGORY, FUNCTION, RETURN_TYPES, RETURN_NAMES = CATEGORY, "load", (MODEL,), ("model",)
    DESCRIPTION = "Adds an adapter, ours or one of ComfyUI-SelVA; several may follow each other."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {
            "model": (MODEL,),
            "adapter_path": text(f"adapter_final.pt or another adapter; {PLACES}"),
            "strength": ("FLOAT", {"default": 1.0, "min": -10.0, "max": 10.0, "step": 0.05,
                                   "tooltip": "0: the base model; 1: as trained"}),
        }}

    @classmethod
    def VALIDATE_INPUTS(cls, adapter_path: str | None = None) -> bool | str:
        if adapter_path is None or host.read_from(adapter_path).is_file():  # None where another node gives it
            return True
        return f"{adapter_path or 'adapter_path'}: no such file; {PLACES}"

    @classmethod
    def IS_CHANGED(cls, adapter_path: str | None = None, **_inputs: Any) -> str:
        return status_hash([host.read_from(adapter_path)]) if adapter_path else ""

    @host.node_function
    def load(self, model: Model, adapter_path: str, strength: float) -> tuple[Model]:
        model = dataclasses.replace(model, adapters=(*model.adapters, (host.read_from(adapter_path), strength)))
        model.engine.set_adapters(model.adapters)  # says what is wrong with them here, not in the Sampler
        return (model,)


class Sampler:
    """Makes the sound."""

    CATEGORY, FUNCTION, RETURN_TYPES, RETURN_NAMES = CATEGORY, "sample", ("AUDIO",), ("audio",)
    DESCRIPTION = "The sound for features and a prompt. The same seed gives the same sound."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        sampling = widgets(SamplingConfig, "num_steps", "cfg_strength")
        return {
            "required": {
                "model": (MODEL,),
                "features": (FEATURES,),
                "prompt": text("what is to be heard; empty: the prompt of the features", multiline=True),
                "negative_prompt": text("what is not to be heard", multiline=True),
                "duration": seconds("seconds; 0: as long as the features"),
                "steps": sampling["num_steps"],
                "cfg_strength": sampling["cfg_strength"],
                "seed": ("INT", {"default": 42, **SEED}),
                "normalize": ("BOOLEAN", {"default": True, "tooltip": "to target_lufs; off: as the model makes it"}),
            },
            "optional": {"target_lufs": ("FLOAT", {"default": DEFAULT_TARGETS["rms"], "min": -70.0, "max": 0.0,
                                                   "step": 0.5, "tooltip": "RMS in dB of full scale"})},
        }

    @host.node_function
    def sample(
        self, model: Model, features: Any, prompt: str, negative_prompt: str, duration: float, steps: int,
        cfg_strength: float, seed: int, normalize: bool, target_lufs: float = DEFAULT_TARGETS["rms"],
    ) -> tuple[dict[str, Any]]:
        if duration > features.duration + 1e-3:
            raise UserError(f"duration is {duration:g} s, but the features cover {features.duration:g} s; 0 takes all")
        engine = model.ready()
        engine.sampling = SamplingConfig(num_steps=steps, cfg_strength=cfg_strength)
        engine.normalize, engine.target = ("rms", target_lufs) if normalize else ("none", None)
        with host.progress(), Progress(steps, "sampling", "steps") as bar:
            sound = engine.generate(
                features=features, prompt=prompt.strip() or None, negative_prompt=negative_prompt.strip(), seed=seed,
                duration_sec=duration or None, on_step=bar.update)
        return ({"waveform": sound.waveform[None, None], "sample_rate": sound.rate},)


NODES = {"Model Loader": ModelLoader, "Feature Extractor": FeatureExtractor, "LoRA Trainer": LoRATrainer,
         "LoRA Loader": LoRALoader, "Sampler": Sampler}
NODE_CLASS_MAPPINGS = {f"SelvaLoraToolkit{name.replace(' ', '')}": node for name, node in NODES.items()}
NODE_DISPLAY_NAME_MAPPINGS = {f"SelvaLoraToolkit{name.replace(' ', '')}": f"{name} (selva-lora)" for name in NODES}
