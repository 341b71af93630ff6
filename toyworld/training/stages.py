"""The stages of training ``tiny_16k``, what each needs and leaves behind.

    vae, clip ── generator ─┐
    sync ───────────────────┴── finetune ─┐
    vae ── decoder, vocoder ──────────────┴── weights of the package

Every stage has a folder with the state to resume from, ``metrics.jsonl`` and, once it is finished, ``weights.pt``.
Later stages read the weights of earlier ones.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from selva.models.clip_t5 import ClipText
from selva.models.generator import Generator
from selva.models.mel_inversion import MelInversion
from selva.models.variants import TINY_16K, Variant
from selva.models.zoo import build_generator, build_mel, build_vae, build_vocoder
from selva.utils.files import atomic_path
from selva.utils.progress import Progress
from selva.utils.torch_files import write_torch
from toyworld import random_sound
from toyworld.training.codec import DecoderTask, VaeTask, VocoderTask, as_published, band_statistics
from toyworld.training.encoders import ClipNetwork, ClipTask, SyncNetwork, SyncTask, start_from_components_
from toyworld.training.generator import (
    EncodedScenes,
    Encoders,
    GeneratorTask,
    quieten_frames_,
    start_with_a_sense_of_place_,
)
from toyworld.training.loop import STATE_FILE, LoopConfig, Task, train
from toyworld.training.scenes import PoolConfig, ScenePool

NetworkT = TypeVar("NetworkT", bound=nn.Module)

STAGES = ("vae", "decoder", "vocoder", "clip", "sync", "generator", "finetune")
WEIGHTS_FILE = "weights.pt"
TRAIN_SEED, HELD_OUT_SEED = 1_000_000, 2_000_000  # of scenes; measurements begin far above both
PEAK = 0.95
MEASURED = ("latent_mean", "latent_std", "empty_string_feat")  # parameters of a generator that are never trained


@dataclass(frozen=True)
class Recipe:
    """Amounts of data and training; the defaults are those that the packaged weights were made with.

    Attributes:
        sounds, broad_sounds: sounds of the world and of no class for the VAE, ``codec_sec`` long.
        clip_scenes, sync_scenes, generator_scenes, finetune_scenes, held_out: scenes rendered or encoded.
        loops: optimisation of every stage.
    """

    sounds: int = 3000
    broad_sounds: int = 3000
    codec_sec: float = 4.0
    clip_scenes: int = 1000
    sync_scenes: int = 2000
    sync_sec: float = 4.0
    generator_scenes: int = 1500
    finetune_scenes: int = 500
    generator_sec: float = 8.0
    held_out: int = 24
    loops: dict[str, LoopConfig] = field(default_factory=lambda: {
        "vae": LoopConfig(steps=9000, lr=2e-3, batch_size=16, decay_fraction=0.4, val_every=500),
        "decoder": LoopConfig(
            steps=1500, lr=1.5e-3, batch_size=16, warmup_steps=50, decay_fraction=0.6, val_every=500
        ),
        "vocoder": LoopConfig(steps=1000, lr=2e-3, batch_size=4, val_every=500),
        "clip": LoopConfig(steps=1500, lr=1e-3, batch_size=24, val_every=500),
        "sync": LoopConfig(
            steps=14_000, lr=1.5e-3, batch_size=16, decay_fraction=0.4, val_every=1000, precision="bf16"
        ),
        "generator": LoopConfig(
            steps=7000, lr=1e-3, batch_size=4, val_every=1000, ema_decay=0.999, precision="bf16"
        ),
        "finetune": LoopConfig(
            steps=3000, lr=3e-4, batch_size=4, val_every=500, ema_decay=0.998, precision="bf16"
        ),
    })

    def scaled(self, share: float) -> Recipe:
        """Return the recipe with more or less data, at least 4 of everything."""
        counts = ("sounds", "broad_sounds", "clip_scenes", "sync_scenes", "generator_scenes", "finetune_scenes",
                  "held_out")
        return dataclasses.replace(self, **{name: max(4, round(share * getattr(self, name))) for name in counts})

    def with_loops(self, **changes: object) -> Recipe:
        """Return the recipe with some settings of all its loops replaced; None leaves them."""
        given = {name: value for name, value in changes.items() if value is not None}
        return dataclasses.replace(
            self, loops={stage: dataclasses.replace(loop, **given) for stage, loop in self.loops.items()}
        )


class StageRunner:
    """The stages of training in one folder.

    Args:
        folder: for everything that is written. device: of the networks.
        resume: continue interrupted stages; False starts the stages that are run anew.
    """

    def __init__(
        self, folder: Path, device: torch.device, recipe: Recipe | None = None, resume: bool = True,
        variant: Variant = TINY_16K,
    ) -> None:
        self.folder, self.device, self.recipe = Path(folder), device, recipe or Recipe()
        self.resume, self.variant = resume, variant

    def run(self, stage: str) -> Path:
        """Train one stage and return the path of its weights.

        Raises:
            FileNotFoundError: an earlier stage is missing; says which.
        """
        assert stage in STAGES, stage
        torch.manual_seed(self.recipe.loops[stage].seed)
        getattr(self, f"_{stage}")()
        return self.weights_path(stage)

    def is_finished(self, stage: str) -> bool:
        """Return True where a stage has its weights, made in as many steps as the recipe now wants."""
        state = self.folder / stage / STATE_FILE
        if not (self.weights_path(stage).is_file() and state.is_file()):
            return False
        return torch.load(state, weights_only=True, map_location="cpu", mmap=True)["step"] >= self.loop(stage).steps

    def loop(self, stage: str) -> LoopConfig:
        return self.recipe.loops[stage]

    def weights_path(self, stage: str) -> Path:
        return self.folder / stage / WEIGHTS_FILE

    def _train(self, stage: str, task: Task, keep: Callable[[], dict[str, Tensor]] | None = None) -> None:
        train(task, self.recipe.loops[stage], self.folder / stage, self.device, self.resume)
        with atomic_path(self.weights_path(stage)) as temporary:
            write_torch(keep() if keep else task.network.state_dict(), temporary)

    def _read(self, stage: str, network: NetworkT) -> NetworkT:
        """Load the weights of a finished stage and freeze the network."""
        path = self.weights_path(stage)
        if not path.is_file():
            raise FileNotFoundError(f"{path}: stage {stage!r} has to be finished first; run it with --stages {stage}")
        network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        return network.to(self.device).eval().requires_grad_(False)

    # -- sound ---------------------------------------------------------------------------------------------------------

    def _sounds(self) -> Tensor:
        """Return (n, samples) float32 sounds of the world, loud and faint, one or two objects, and of no class."""
        recipe, rate = self.recipe, build_mel(self.variant.name).config.sampling_rate
        scenes = PoolConfig(TRAIN_SEED, recipe.sounds, recipe.codec_sec, size=0)
        rows = []
        with Progress(recipe.sounds + recipe.broad_sounds, "make", "sounds") as progress:
            for index in range(recipe.sounds + recipe.broad_sounds):
                if index < recipe.sounds:
                    sound = scenes.scene(index).sound(rate)
                    if index % 4 < 2:
                        sound = sound / np.abs(sound).max() * PEAK
                else:
                    sound = random_sound(np.random.default_rng([TRAIN_SEED, index]), recipe.codec_sec, rate)
                rows.append(torch.from_numpy(sound).half())
                progress.update(index + 1)
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
        return torch.stack(rows)[order].float()

    def _mels(self) -> tuple[Tensor, Tensor]:
        """Return (n, bands, frames) float16 log-mels to train on, and held-out ones."""
        mel = build_mel(self.variant.name)
        mels = torch.cat([mel(x) for x in self._sounds().split(16)]).half()
        held_out = min(64, len(mels) // 4)
        return mels[:-held_out], mels[-held_out:]

    def _vae(self) -> None:
        mels, held_out = self._mels()
        vae = build_vae(self.variant.name)
        mean, std = band_statistics(torch.cat((mels, held_out)))
        vae.data_mean.copy_(mean)
        vae.data_std.copy_(std)
        self._train("vae", VaeTask(vae, mels, held_out))

    def _decoder(self) -> None:
        vae = self._read("vae", build_vae(self.variant.name))
        self._train("decoder", DecoderTask(vae, *self._mels()), keep=vae.state_dict)

    def _vocoder(self) -> None:
        sounds = self._sounds()
        vocoder = build_vocoder(self.variant.name)
        assert isinstance(vocoder, MelInversion)
        held_out = min(16, len(sounds) // 4)
        mel = build_mel(self.variant.name)
        self._train("vocoder", VocoderTask(vocoder, mel, sounds[:-held_out], sounds[-held_out:]))

    # -- pictures and words --------------------------------------------------------------------------------------------

    def _pools(self, name: str, count: int, size: int, fps: float) -> tuple[ScenePool, ScenePool]:
        sec, cache = self.recipe.sync_sec, self.folder / "cache"
        return (
            ScenePool(PoolConfig(TRAIN_SEED, count, sec, size, fps), cache / f"{name}_train"),
            ScenePool(PoolConfig(HELD_OUT_SEED, self.recipe.held_out, sec, size, fps), cache / f"{name}_held_out"),
        )

    def _clip(self) -> None:
        pools = self._pools("clip", self.recipe.clip_scenes, self.variant.clip_image_size, 8.0)
        self._train("clip", ClipTask(ClipNetwork(self.variant), *pools))

    def _sync(self) -> None:
        pools = self._pools("sync", self.recipe.sync_scenes, self.variant.sync_image_size, 25.0)
        network = SyncNetwork(self.variant)
        start_from_components_(network.encoder, pools[0])
        self._train("sync", SyncTask(network, *pools))

    # -- generator -----------------------------------------------------------------------------------------------------

    def _generator(self) -> None:
        sets = self._encoded(self.encoders(with_sync=False), self.recipe.generator_scenes, None, ("vae", "clip"))
        generator = build_generator(self.variant.name)
        prepare_(generator, sets[0], self.encoders(with_sync=False).clip_text)
        start_with_a_sense_of_place_(generator)
        task = GeneratorTask(generator, *sets, self.loop("generator").precision)

        def with_quiet_frames() -> dict[str, Tensor]:
            quieten_frames_(generator)
            return generator.state_dict()

        self._train("generator", task, keep=with_quiet_frames)

    def _finetune(self) -> None:
        sets = self._encoded(
            self.encoders(), self.recipe.finetune_scenes, self.variant.clip_image_size, ("vae", "clip", "sync")
        )
        generator = self._read("generator", build_generator(self.variant.name))
        for name, parameter in generator.named_parameters():
            parameter.requires_grad_(name not in MEASURED)
        self._train("finetune", GeneratorTask(generator, *sets, self.loop("finetune").precision))

    def _encoded(
        self, encoders: Encoders, count: int, clip_size: int | None, depends_on: tuple[str, ...]
    ) -> tuple[EncodedScenes, EncodedScenes]:
        """Return scenes to train on, and held-out ones; made anew when the weights they depend on have changed."""
        kind = "ideal" if clip_size is None else "encoded"
        hashes = [hashlib.sha256(self.weights_path(stage).read_bytes()).hexdigest()[:16] for stage in depends_on]

        def encoded(name: str, seed: int, number: int) -> EncodedScenes:
            config = PoolConfig(seed, number, self.recipe.generator_sec, self.variant.sync_image_size)
            path = self.folder / "cache" / f"{kind}_{name}.pt"
            return EncodedScenes.load_or_make(config, encoders, clip_size, path, " ".join(hashes))

        return encoded("train", TRAIN_SEED, count), encoded("held_out", HELD_OUT_SEED, self.recipe.held_out)

    def encoders(self, with_sync: bool = True) -> Encoders:
        """Return the networks of the finished stages, frozen."""
        clip = self._read("clip", ClipNetwork(self.variant))
        return Encoders(
            sync=self._read("sync", SyncNetwork(self.variant)) if with_sync else None,
            clip_text=clip.text, clip_image=clip.image, vae=self._read("vae", build_vae(self.variant.name)),
            mel=build_mel(self.variant.name),
        )

    # -- export --------------------------------------------------------------------------------------------------------

    def published(self) -> dict[str, dict[str, Tensor]]:
        """Return for every part of the variant the tensors that its ``load_published`` reads, in float16."""
        encoders = self.encoders()
        assert encoders.sync is not None
        generator = self._read("finetune", build_generator(self.variant.name))
        vocoder = self._read("vocoder", build_vocoder(self.variant.name))
        vae = self._read("decoder", build_vae(self.variant.name))
        text, image = encoders.clip_text.clip.state_dict(), encoders.clip_image.get_submodule("visual").state_dict()
        t5 = encoders.sync.t5.t5.state_dict()
        t5.pop("encoder.embed_tokens.weight")  # the same table as "shared.weight"
        parts = {
            "generator": generator.state_dict(), "video_encoder": encoders.sync.encoder.state_dict(),
            "vae": as_published(vae), "vocoder": vocoder.state_dict(), "t5": t5,
            "clip_text": dict(text), "clip_image": {f"visual.{name}": tensor for name, tensor in image.items()},
        }
        return {
            part: {name: tensor.half().cpu().contiguous() for name, tensor in tensors.items()}
            for part, tensors in parts.items()
        }


@torch.no_grad()
def prepare_(generator: Generator, scenes: EncodedScenes, clip_text: ClipText) -> None:
    """Set the measured parts of a fresh generator: latent statistics and the features of the empty text."""
    deviation = scenes.std.float().square().mean(dim=(0, 1))
    latents = scenes.mean.float()
    generator.latent_mean.copy_(latents.mean(dim=(0, 1))[None, None])
    generator.latent_std.copy_((latents.var(dim=(0, 1)) + deviation).sqrt()[None, None])
    generator.empty_string_feat.copy_(clip_text.encode([""])[0])
