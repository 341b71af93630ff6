"""Judge of `soundbench.py`: what an adapter makes of new and of known scenes, and what it has learned by heart."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sound_data import KNOWN, Inputs
from sound_plan import Cell

from selva.audio.metrics import log_spectral_distance
from selva.data.dataset import ClipDataset
from selva.data.folder_dataset import load_clip_dataset
from selva.flow import SamplingConfig
from selva.inference.adapter_switch import AdapterPairs, AdapterSwitch
from selva.lora.merge import Adapter
from selva.models.variants import Variant
from selva.training.config import ObjectiveConfig
from selva.training.memorisation import area_under_curve
from selva.training.objective import clip_losses
from selva.utils.errors import UserError
from selva.weights.load import load_generator
from toyworld.judging import RATE, Classifier
from toyworld.measure import Case, EncodedCases, ToyGenerator, mean, timing_f1

STRENGTHS = (0.2, 0.4, 0.6, 0.8, 1.2, 1.4)  # beside 0, the base model, and 1, the last checkpoint
PART = {"new": 8, "known": 10}  # scenes that judge a checkpoint on the way, the first ones of all
STRENGTH_SCENES = 8
DETAILED_SEED = 1  # the only one whose checkpoints on the way and strengths are judged: half of all judging
LOSS_SEED = 0  # of the noise and the times of the losses, the same for every method

Figures = dict[str, Any]


class Judge:
    """The base model with the adapters that are asked for, and the scenes of the cell in hand.

    Args:
        classifier: of true sounds. sampling: as ``infer.py`` samples by default.
    """

    def __init__(self, inputs: Inputs, classifier: Classifier, sampling: SamplingConfig | None = None) -> None:
        self.inputs, self.maker, self.classifier = inputs, inputs.maker, classifier
        self.sampling = sampling or SamplingConfig()
        name, device = self.maker.variant.name, self.maker.device
        self.switch = AdapterSwitch(lambda: load_generator(name, None), torch.float32, device)
        self._base: dict[tuple[str, str, bool], Figures] = {}
        self._scenes: dict[tuple[str, str], tuple[list[Case], list[EncodedCases]]] = {}
        self._ceilings: dict[tuple[str, str], Figures] = {}
        self._losses: dict[tuple[Path, bool, str], np.ndarray] = {}
        self._clips: dict[Path, ClipDataset] = {}

    def base(self, cell: Cell, uses_clip: bool) -> Figures:
        """Return the figures of the base model on the new and the known scenes of a cell."""
        return {part: self._base_part(cell.scenes, name, uses_clip)
                for part, name in (("new", cell.sound), ("known", KNOWN))}

    def _base_part(self, scenes: str, name: str, uses_clip: bool) -> Figures:
        key = scenes, name, uses_clip
        if key not in self._base:
            self._base[key] = self._heard((), scenes, name, uses_clip)
        return self._base[key]

    def ceiling(self, cell: Cell) -> Figures:
        """Return the figures of the true new sounds as autoencoder and vocoder give them back: the best possible."""
        key = cell.scenes, cell.sound
        if key not in self._ceilings:
            cases, _ = self._cases(cell.scenes, cell.sound)
            restored = [self.maker.through_codec(case.scene.sound(RATE)) for case in cases]
            self._ceilings[key] = heard_figures(restored, cases, self.classifier)
        return self._ceilings[key]

    def checkpoint(self, adapter: Adapter, cell: Cell, whole: bool, latent: str = "sample") -> Figures:
        """Return the figures of an adapter: of all scenes, or of the first ones; ``latent`` as it was trained."""
        uses_clip = uses_clip_features(adapter)
        pairs = ((adapter, 1.0),)
        return {
            part: self._heard(pairs, cell.scenes, name, uses_clip, None if whole else PART[part])
            for part, name in (("new", cell.sound), ("known", KNOWN))
        } | self.by_heart(adapter, cell, latent)

    def response(self, adapter: Adapter, cell: Cell) -> list[Figures]:
        """Return the figures of new scenes at every strength of :data:`STRENGTHS`."""
        uses_clip = uses_clip_features(adapter)
        return [
            {"strength": strength,
             **self._heard(((adapter, strength),), cell.scenes, cell.sound, uses_clip, STRENGTH_SCENES)}
            for strength in STRENGTHS
        ]

    def by_heart(self, adapter: Adapter, cell: Cell, latent: str) -> Figures:
        """Return the loss of held-out clips, and how well its fall tells the training clips from them.

        With latents as in the training, ``--latent``, so that it is the loss that a validation would have shown.
        ``val_loss``; ``val_drop`` and ``train_drop``, the share by which the losses fell; ``member_auc``, see
        :func:`selva.training.memorisation.area_under_curve`.
        """
        uses_clip = uses_clip_features(adapter)
        folders = self.inputs.clips(cell), self.inputs.held_out(cell)
        before = [self._base_losses(folder, uses_clip, latent) for folder in folders]
        self.switch.set(((adapter, 1.0),))
        now = [self._clip_losses(folder, uses_clip, latent) for folder in folders]
        drops = [old - new for old, new in zip(before, now, strict=True)]
        return {
            "val_loss": float(now[1].mean()),
            "train_drop": float(drops[0].mean() / before[0].mean()),
            "val_drop": float(drops[1].mean() / before[1].mean()),
            "member_auc": area_under_curve(drops[0].tolist(), drops[1].tolist()),
        }

    def _base_losses(self, folder: Path, uses_clip: bool, latent: str) -> np.ndarray:
        key = folder, uses_clip, latent
        if key not in self._losses:
            self.switch.set(())
            self._losses[key] = self._clip_losses(folder, uses_clip, latent)
        return self._losses[key]

    def _clip_losses(self, folder: Path, uses_clip: bool, latent: str) -> np.ndarray:
        """Return (clips,) losses of the model as it stands, at the same times and noise for every method."""
        if folder not in self._clips:
            self._clips[folder] = _loaded(folder, self.maker)
        objective = ObjectiveConfig(clip_features="use" if uses_clip else "empty", latent=latent, seed=LOSS_SEED)
        assert self.switch.generator is not None
        losses = clip_losses(self.switch.generator, self._clips[folder], objective, torch.float32)
        return losses.mean(dim=1).cpu().numpy()

    def _heard(
        self, adapters: AdapterPairs, scenes: str, name: str, uses_clip: bool, count: int | None = None
    ) -> Figures:
        """Return the figures of the sounds that a model makes for the first ``count`` scenes of a set, all if None.

        ``hits``: "1" for every scene whose class is recognised, else "0"; ``margins``: of every scene, by how much the
        log probability of its class is above that of the best other one; ``distances_db``: of every scene, the
        log-spectral distance to its true sound. ``recognised``, ``margin``, ``distance_db`` and ``timing_f1`` are means
        over the scenes. ``taken_for``: what the others were taken for.
        """
        cases, encoded = self._cases(scenes, name)
        cases, encoded = cases[:count], encoded[:count]
        self.maker.clip_features = uses_clip
        generator = self.switch.set(adapters)
        sounds = self.maker.sounds(generator, encoded, self.inputs.duration_sec, sampling=self.sampling)
        return heard_figures(sounds, cases, self.classifier)

    def _cases(self, scenes: str, name: str) -> tuple[list[Case], list[EncodedCases]]:
        if (scenes, name) not in self._scenes:
            self._scenes[scenes, name] = self.inputs.scenes(scenes, name)
        return self._scenes[scenes, name]


def heard_figures(sounds: Sequence[np.ndarray], cases: Sequence[Case], classifier: Classifier) -> Figures:
    """Return the figures of sounds that were made for scenes, see :meth:`Judge._heard`."""
    names = [classifier.classify(sound) for sound in sounds]
    found = [name == case.name for name, case in zip(names, cases, strict=True)]
    distances = [
        log_spectral_distance(torch.from_numpy(sound), torch.from_numpy(case.scene.sound(RATE))[: len(sound)], RATE)
        for sound, case in zip(sounds, cases, strict=True)
    ]
    margins = [_margin(sound, case.name, classifier) for sound, case in zip(sounds, cases, strict=True)]
    return {
        "scenes": len(cases),
        "hits": "".join("1" if one else "0" for one in found),
        "recognised": round(mean(found), 4),
        "timing_f1": round(mean(timing_f1(sounds, [case.events() for case in cases])), 4),
        "margin": round(mean(margins), 2),
        "distance_db": round(mean(distances), 3),
        "margins": [round(one, 1) for one in margins],
        "distances_db": [round(one, 2) for one in distances],
        "taken_for": _counted([name for name, one in zip(names, found, strict=True) if not one]),
    }


def _margin(sound: np.ndarray, name: str, classifier: Classifier) -> float:
    scores, own = classifier.scores(sound), classifier.names.index(name)
    return float(scores[own] - np.delete(scores, own).max())


def _counted(names: Sequence[str]) -> dict[str, int]:
    return {name: names.count(name) for name in sorted(set(names))}


def uses_clip_features(adapter: Adapter) -> bool:
    """Return True if an adapter was trained with CLIP features, and so has to be judged with them."""
    return adapter.meta.get("clip_features", "use") == "use"


def _loaded(folder: Path, maker: ToyGenerator) -> ClipDataset:
    variant: Variant = maker.variant
    clips, problems = load_clip_dataset(folder, variant, None, maker.device)
    if problems:
        raise UserError("; ".join(f"{path}: {reason}" for path, reason in problems))
    return clips
