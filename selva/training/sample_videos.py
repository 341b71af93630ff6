"""Features of the videos that `--sample_prompts` names: made once, before the base model is read, and kept.

They lie in the cache beside the table (``.selva_cache``, see :mod:`selva.data.cache`), so that a run that is continued,
and other runs with the same table, read them. For another content of a video, another prompt or other encoders they are
made again.
"""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from selva.data.cache import DataCache
from selva.extraction.extractor import FeatureExtractor, clip_settings
from selva.features import FeatureBundle
from selva.models.variants import get_variant
from selva.utils.errors import UserError
from selva.utils.files import source_hash
from selva.utils.text import counted
from selva.weights.config import ModelConfig
from selva.weights.find import check_weights, encoders_identity, weights_identity

log = logging.getLogger(__name__)

KIND, PARTS = "pictures", ("clip_image", "video_encoder", "t5")
KEYS = ("clip_features", "sync_features", "duration")


def video_features(
    videos: dict[str, tuple[Path, str]], model: ModelConfig, duration_sec: float, table: Path, device: torch.device
) -> dict[str, FeatureBundle]:
    """Return {name: features} of the videos of a table; the encoders are in memory for this call only.

    Args:
        videos: {name: (file, prompt)}; the encoder of SelVA looks for what the prompt names.
        duration_sec: most of a video that is used, from its beginning. table: beside which they are kept.

    Raises:
        UserError: a video cannot be read; names all of them.
        FileNotFoundError: weights of the encoders are missing.
    """
    if not videos:
        return {}
    check_weights(model.variant, model.selva_dir, PARTS)
    variant = get_variant(model.variant)
    extractor, cache = FeatureExtractor(variant, model.selva_dir, device), DataCache(table.parent)
    identity = weights_identity(variant, model.selva_dir, PARTS)
    found, problems, made = {}, [], 0
    for name, (path, prompt) in videos.items():
        settings = {**clip_settings(path, source_hash(path), prompt, 0.0, duration_sec, encoders_identity(variant),
                                    "float32"), "weights": identity}
        kept = cache.load(KIND, settings)
        if kept is None:
            try:
                frames = extractor.read(path, duration_sec)
                kept = {"clip_features": extractor.clip_features(frames.clip_frames),
                        "sync_features": extractor.sync_features(frames.sync_frames, prompt),
                        "duration": torch.tensor(frames.duration_sec, dtype=torch.float64)}
            except (UserError, OSError) as error:
                problems.append(str(error) if str(path) in str(error) else f"{path}: {error}")
                continue
            cache.save(KIND, settings, kept)
            made += 1
        clip_f, sync_f, seconds = (kept[key] for key in KEYS)
        found[name] = FeatureBundle(clip_f, sync_f, float(seconds), prompt=prompt, variant=variant.name)
    if problems:
        raise UserError(f"{table}: {'; '.join(problems)}")
    log.info("--sample_prompts: features of %s, made now: %d", counted(len(found), "video"), made)
    return found
