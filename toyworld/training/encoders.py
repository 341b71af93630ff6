"""Stages "sync" and "clip": the encoders of pictures and prompts.

    sync   T5 and TextSynch together: when, how hard and how long does the thing that the prompt names sound?
    clip   the two CLIP towers: which picture goes with which sentence?

An ideal sync feature is known: values of three curves around its time, see :func:`ideal_features`. So features can be
computed from the ground truth too, and the generator trained on them without a picture. Everything else is learned
through linear heads that are dropped afterwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from selva.models.clip_t5 import ClipImage, ClipText, T5Text
from selva.models.textsynch import TextSynch
from selva.models.variants import Variant
from selva.models.zoo import build_video_encoder
from selva.sequence import SYNC_FPS, SYNC_SEGMENT_FRAMES, SYNC_SEGMENT_STEP, num_sync_segments
from toyworld import CLASSES, Scene, Thing
from toyworld.training.loop import Task
from toyworld.training.prompts import made_up_word, prompts_for, sentence, vary
from toyworld.training.scenes import ScenePool, onset_map

OFFSET_SEC = 0.04  # a token answers for its own time and for some steps before and after
OFFSETS = np.arange(-10, 11) * OFFSET_SEC
ONSET_WIDTH_SEC = 0.02
DECISION = 0.12  # of the onset curve, above which there is an event; a cautious encoder gives low curves
MAP_WIDTH = 3 * len(OFFSETS)  # onset, strength, level; with the size of the thing they fill a feature
FEATURE_SCALE = 3.0  # of the values in a feature, which are mostly 0 and at most 1
CLASS_NAMES = list(CLASSES)
SEGMENTS_AT_ONCE = 4  # of a whole clip; more is slower on a CPU
MOST_SHIFT = 6  # pixels that a picture is moved by in training


def initialised_t5(variant: Variant) -> T5Text:
    """Return the T5 encoder of a variant with fresh weights, ready to be trained."""
    import transformers

    assert variant.t5 is not None, variant.name
    encoder = T5Text(variant.t5)
    assert isinstance(encoder.t5, transformers.T5EncoderModel)
    encoder.load_published(transformers.T5EncoderModel(encoder.t5.config).state_dict())
    return encoder.requires_grad_(True)


def initialised_clip(variant: Variant) -> tuple[ClipText, ClipImage]:
    """Return both CLIP towers of a variant with fresh weights, ready to be trained."""
    from selva.models.clip_t5 import build_clip

    weights = build_clip(variant.clip).state_dict()
    text, image = ClipText(variant.clip).load_published(weights), ClipImage(variant.clip).load_published(weights)
    return text.requires_grad_(True), image.requires_grad_(True)


# ---------------------------------------------------------------------------------------------------------------
# sync
# ---------------------------------------------------------------------------------------------------------------


class SyncNetwork(nn.Module):
    """T5 and TextSynch with linear heads on the patch tokens, so that there is something to learn from every place.

    Before a patch token has read the text: what happens to the thing in this place, and its class. Afterwards: is it
    the named one, and if so, what happens to it?
    """

    def __init__(self, variant: Variant) -> None:
        super().__init__()
        dim = variant.video_encoder.embed_dim
        self.t5 = initialised_t5(variant)
        encoder = build_video_encoder(variant.name)
        assert isinstance(encoder, TextSynch)
        self.encoder = encoder
        assert dim == MAP_WIDTH + 1, (dim, MAP_WIDTH)
        self.place_head = nn.Linear(dim, MAP_WIDTH + len(CLASSES) + 1)
        self.named_head = nn.Linear(dim, 1 + MAP_WIDTH)

    def text(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """Return (B, L, D) features and a mask (B, L)."""
        tokens, mask = (x.to(self.place_head.weight.device) for x in self.t5.tokenize(texts))
        return self.t5.t5(input_ids=tokens, attention_mask=mask.long()).last_hidden_state.float(), mask

    def encode(self, frames: Tensor, texts: list[str]) -> Tensor:
        """Return (B, tokens, dim) features of uint8 frames (B, F, 3, H, W)."""
        with small_attention(frames.device):
            return self.encoder.encode(pixels_to_input(frames), *self.text(texts), segment_batch=SEGMENTS_AT_ONCE)

    def forward(self, segments: Tensor, texts: list[str]) -> tuple[Tensor, Tensor, Tensor]:
        """Return features and predictions of a segment for each of its texts.

        Args:
            segments: (B, 16, 3, H, W) uint8.
            texts: equally many for every segment, those of the first one first: n B.

        Returns:
            Features (n B, slots, dim), predictions of patch tokens before the text (B, slots, patches, ·) and after it
            (n B, slots, patches, ·).
        """
        encoder, trunk = self.encoder, self.encoder.vfeat_extractor
        with small_attention(segments.device):
            text, mask = encoder.prepend_supplementary(*self.text(texts))
            text = encoder.text_proj(text)
            before = trunk.patch_tokens(pixels_to_input(segments))
            after = before.repeat_interleave(len(texts) // len(segments), dim=0)
            for block in encoder.synch_text_cross_blocks:
                after = block(after, text, mask)
            features = trunk.aggregate(after)
        slots = features.shape[1]
        places, named = (
            head(tokens).float().unflatten(1, (slots, -1))
            for head, tokens in ((self.place_head, before), (self.named_head, after))
        )
        return features.float(), places, named


def pixels_to_input(frames: Tensor) -> Tensor:
    """Return uint8 frames as the input of the video encoder, float32 in [-1, 1]."""
    return frames.float().div_(127.5).sub_(1)


def small_attention(device: torch.device) -> AbstractContextManager[object]:
    """Return a context in which a CPU computes attention by plain matrix products, faster for groups of few tokens."""
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else nullcontext()


@torch.no_grad()
def start_from_components_(encoder: TextSynch, pool: ScenePool, samples: int = 4000, seed: int = 0) -> None:
    """Let the patch embedding begin with principal components of patches, half of them of changes between frames.

    All are scaled to unit variance. From random weights, what moves is buried in what stands still for thousands of
    steps, because a picture hardly changes from one to the next.
    """
    config, rng = encoder.config, np.random.default_rng(seed)
    patch, grid = config.patch_size, config.image_size // config.patch_size
    pairs = np.empty((samples, 2, patch * patch * 3), np.float32)
    for row in range(samples):
        scene, first = rng.integers(len(pool.scenes)), rng.integers(pool.frames.shape[1] - 1)
        y, x = rng.integers(grid, size=2) * patch
        pairs[row] = pool.frames[scene, first : first + 2, y : y + patch, x : x + patch].reshape(2, -1)
    pairs = (torch.from_numpy(pairs).unflatten(-1, (patch, patch, 3)).movedim(-1, 2) / 255 - 0.5) / 0.5
    half = config.embed_dim // 2
    still, change = pairs.mean(1).flatten(1), (pairs[:, 1] - pairs[:, 0]).flatten(1)  # each (samples, 3 patch patch)
    rows = []
    for x, sign in ((still - still.mean(0), 0.5), (change, 1.0)):
        _, values, components = torch.pca_lowrank(x, q=half, center=False, niter=4)
        whitened = components.T * (len(x) ** 0.5 / values[:, None])  # (half, 3 patch patch)
        first = whitened * (sign if sign == 0.5 else -1.0)
        rows.append(torch.stack((first, whitened * sign), dim=1))  # (half, 2 frames, 3 patch patch)
    weight = torch.cat(rows).unflatten(-1, (3, patch, patch)).movedim(1, 2)  # (dim, 3, 2, patch, patch)
    projection = encoder.vfeat_extractor.patch_embed_3d["proj"]
    assert isinstance(projection, nn.Conv3d) and projection.bias is not None
    projection.weight.copy_(weight)
    projection.bias.copy_(-torch.einsum("dctyx,cyx->d", weight, still.mean(0).unflatten(0, (3, patch, patch))))


class SyncTask(Task):
    """Predictions for random segments of 16 pictures of random scenes, each with two prompts.

    Most of the work is done on pictures, before any text is read, so a second prompt costs little; where there are two
    things it names the other one, so that the same pictures ask for opposite answers.
    """

    network: SyncNetwork

    def __init__(self, network: SyncNetwork, pool: ScenePool, held_out: ScenePool) -> None:
        self.network, self.pool, self.held_out = network, pool, held_out
        self.grid = pool.config.size // network.encoder.config.patch_size

    def loss(self, rng: np.random.Generator, batch_size: int) -> tuple[Tensor, dict[str, float | Tensor]]:
        drawn = [self._draw(rng) for _ in range(batch_size)]
        device = self.network.place_head.weight.device
        frames, texts = np.stack([x["frames"] for x in drawn]), [text for x in drawn for text in x["texts"]]
        wanted = {
            name: torch.from_numpy(join([x[name] for x in drawn])).to(device)
            for join, names in (
                (np.stack, ("place_map", "place_class")),
                (np.concatenate, ("features", "place_named", "place_named_map")),
            )
            for name in names
        }
        features, places, named = self.network(torch.from_numpy(frames).permute(0, 1, 4, 2, 3).to(device), texts)
        feature = F.mse_loss(features, wanted["features"])
        place = map_loss(places[..., :MAP_WIDTH], wanted["place_map"])
        kinds = F.cross_entropy(places[..., MAP_WIDTH:].flatten(0, 2), wanted["place_class"].flatten())
        chosen = F.binary_cross_entropy_with_logits(named[..., 0], wanted["place_named"])
        chosen_map = map_loss(named[..., 1:], wanted["place_named_map"])
        # What moves is hard to find and small in numbers; where things are is easy.
        total = 3 * feature + 5 * place + 2 * chosen_map + 0.3 * kinds + 0.5 * chosen
        parts = {"feature": feature, "place": place, "kinds": kinds, "named": chosen, "named_map": chosen_map}
        return total, {name: value.detach() for name, value in parts.items()}

    def _draw(self, rng: np.random.Generator) -> dict:
        """Return a segment, two prompts and the right answers; those that depend on the prompt begin with (2, …)."""
        index = int(rng.integers(len(self.pool.scenes)))
        scene = self.pool.scenes[index]
        first = int(rng.integers(self.pool.frames.shape[1] - SYNC_SEGMENT_FRAMES + 1))
        prompts = prompts_for(scene, rng)
        view = View.random(rng)
        start = first / SYNC_FPS
        slots, patches = SYNC_SEGMENT_FRAMES // 2, self.grid**2
        place_map = np.zeros((slots, patches, MAP_WIDTH), np.float32)
        named_map = np.zeros((len(prompts), *place_map.shape), np.float32)
        place_named = np.zeros(named_map.shape[:-1], np.float32)
        place_class = np.full((slots, patches), len(CLASSES))
        for i, thing in enumerate(scene.objects):
            here = view.covered(thing, self.grid, self.pool.config.size)
            place_map[:, here] = segment_map(scene, [i], start)[:, None]
            place_class[:, here] = CLASS_NAMES.index(thing.name)
            for row, (_, asked) in enumerate(prompts):
                if i in asked:
                    place_named[row, :, here], named_map[row][:, here] = 1, place_map[:, here]
        return {
            "frames": view.apply(self.pool.frames[index, first : first + SYNC_SEGMENT_FRAMES]),
            "texts": [text for text, _ in prompts],
            "features": np.stack([ideal_segment(scene, asked, start) for _, asked in prompts]),
            "place_map": place_map, "place_class": place_class, "place_named": place_named,
            "place_named_map": named_map,
        }

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        return selection_scores(self.network, self.held_out)


def map_loss(out: Tensor, wanted: Tensor) -> Tensor:
    """Return the error of onset logits, strengths and levels (..., 3 offsets)."""
    (logits, strength, level), (near, strong, running) = (x.chunk(3, dim=-1) for x in (out, wanted))
    onset = F.binary_cross_entropy_with_logits(logits, near)
    onset = onset - F.binary_cross_entropy(near.clamp(1e-6, 1 - 1e-6), near)  # the targets' entropy is no error
    return onset + F.mse_loss(strength, strong) + F.mse_loss(level, running)


# -- ideal features ----------------------------------------------------------------------------------------------------


def token_times(start_sec: float) -> np.ndarray:
    """Return (slots,) the middle of the two pictures that each token of a segment sees."""
    return start_sec + (2 * np.arange(SYNC_SEGMENT_FRAMES // 2) + 0.5) / SYNC_FPS


def seen_times(start_sec: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the times (slots, offsets) that the tokens of a segment speak of, and which of them lie inside it."""
    times = token_times(start_sec)[:, None] + OFFSETS
    return times, (times >= start_sec) & (times < start_sec + SYNC_SEGMENT_FRAMES / SYNC_FPS)


def segment_map(scene: Scene, objects: Sequence[int], start_sec: float) -> np.ndarray:
    """Return (slots, 3 offsets) float32: onset, strength and level of objects; 0 for times outside the segment."""
    times, seen = seen_times(start_sec)
    return np.concatenate([x * seen for x in onset_map(scene, objects, times, ONSET_WIDTH_SEC)], axis=1)


def ideal_segment(scene: Scene, objects: Sequence[int], start_sec: float) -> np.ndarray:
    """Return (slots, dim) float32, the right features of a segment for a prompt that asks for these objects."""
    size = np.log(np.mean([scene.objects[i].size for i in objects]))
    curves = segment_map(scene, objects, start_sec)
    return FEATURE_SCALE * np.concatenate([curves, np.full((len(curves), 1), size, np.float32)], axis=1)


def ideal_features(scene: Scene, objects: Sequence[int]) -> np.ndarray:
    """Return (tokens, dim) float32, the right sync features of a whole scene."""
    count = num_sync_segments(int(scene.duration_sec * SYNC_FPS))
    return np.concatenate([ideal_segment(scene, objects, i * SYNC_SEGMENT_STEP / SYNC_FPS) for i in range(count)])


def read_events(features: np.ndarray, duration_sec: float) -> np.ndarray:
    """Return the event times in seconds that sync features (tokens, dim) speak of."""
    near = features[:, : len(OFFSETS)].reshape(-1, SYNC_SEGMENT_FRAMES // 2, len(OFFSETS)) / FEATURE_SCALE
    grid = np.arange(0, duration_sec, 0.02)
    total, weights = np.full(len(grid), 1e-6), np.full(len(grid), 1e-6)
    for index, values in enumerate(near):
        times, seen = seen_times(index * SYNC_SEGMENT_STEP / SYNC_FPS)
        weight = np.exp(-0.5 * ((grid[:, None] - times[seen]) / 0.015) ** 2)
        total, weights = total + weight @ values[seen], weights + weight.sum(1)
    curve = total / weights
    peaks = [i for i in range(1, len(curve) - 1) if curve[i] > DECISION and curve[i - 1] <= curve[i] > curve[i + 1]]
    return grid[peaks]


# -- measures ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def selection_scores(network: SyncNetwork, pool: ScenePool, seed: int = 0) -> dict[str, float]:
    """Return onset F1 within 80 ms to the named object, with one and with two objects, and to the other one."""
    counts = {name: np.zeros(3) for name in ("one", "two", "other")}
    for index, scene in enumerate(pool.scenes):
        rng = np.random.default_rng((seed, index))
        pictures = torch.tensor(pool.frames[index]).permute(0, 3, 1, 2)[None].to(network.place_head.weight.device)
        for named in range(len(scene.objects)):
            features = network.encode(pictures, [scene.prompt(rng, named)])[0].float().cpu().numpy()
            found = read_events(features, scene.duration_sec)
            several = len(scene.objects) > 1
            counts["two" if several else "one"] += _matches(found, scene.events(named))
            if several:
                counts["other"] += _matches(found, scene.events(1 - named))
    return {f"f1_{name}": 2 * hit / max(1.0, found + true) for name, (hit, found, true) in counts.items()}


def _matches(found: np.ndarray, true: np.ndarray, tolerance_sec: float = 0.08) -> np.ndarray:
    """Return the numbers of matched, found and true events; each event can be matched once."""
    free, hits = list(true), 0
    for time in found:
        near = [t for t in free if abs(t - time) <= tolerance_sec]
        if near:
            free.remove(min(near, key=lambda t: abs(t - time)))
            hits += 1
    return np.array([hits, len(found), len(true)], dtype=float)


@dataclass(frozen=True)
class View:
    """A variation of pictures: moved by some pixels, perhaps mirrored, in other light.

    Attributes:
        shift: pixels by which rows and columns are read further down and right. light: (256, 3) new pixel values.
    """

    shift: tuple[int, int]
    mirrored: bool
    light: np.ndarray

    @classmethod
    def random(cls, rng: np.random.Generator) -> View:
        gains = rng.uniform(0.8, 1.2) * rng.uniform(0.9, 1.1, 3)
        light = np.clip(np.outer(np.arange(256), gains) + rng.uniform(-15, 15), 0, 255).astype(np.uint8)
        rows, columns = rng.integers(-MOST_SHIFT, MOST_SHIFT + 1, 2)
        return cls((int(rows), int(columns)), bool(rng.random() < 0.5), light)

    def apply(self, frames: np.ndarray) -> np.ndarray:
        """Return uint8 frames (F, H, W, 3)."""
        size = frames.shape[1]
        rows, columns = (np.clip(np.arange(size) + s, 0, size - 1) for s in self.shift)
        columns = columns[::-1] if self.mirrored else columns
        moved = frames[:, rows[:, None], columns[None]]  # (F, H, W, 3)
        return np.stack([self.light[moved[..., channel], channel] for channel in range(3)], axis=-1)

    def covered(self, thing: Thing, grid: int, size: int) -> np.ndarray:
        """Return the numbers of the patches, of ``grid`` times ``grid``, whose middle a thing covers."""
        middles = (np.arange(grid) + 0.5) / grid
        y = middles + self.shift[0] / size
        x = (1 - middles if self.mirrored else middles) + self.shift[1] / size
        rows = (y > thing.ground - 2.2 * thing.reach) & (y < thing.ground + 0.05)
        columns = np.abs(x - thing.x) < 1.1 * thing.reach
        return np.flatnonzero((rows[:, None] & columns[None]).ravel())


# ---------------------------------------------------------------------------------------------------------------
# clip
# ---------------------------------------------------------------------------------------------------------------


class ClipNetwork(nn.Module):
    """Both CLIP towers and the linear heads on their features."""

    def __init__(self, variant: Variant) -> None:
        super().__init__()
        self.text, self.image = initialised_clip(variant)
        width = variant.clip.embed_dim
        self.text_head, self.image_head = nn.Linear(width, len(CLASSES)), nn.Linear(width, len(CLASSES))
        self.image_projection = nn.Linear(width, width)
        self.log_scale = nn.Parameter(torch.tensor(2.3))

    def text_features(self, texts: list[str]) -> Tensor:
        """Return (B, D), the mean of the token features, as in the generator's global condition."""
        tokens = self.text.tokenize(texts).to(self.log_scale.device)
        return F.normalize(self.text.token_states(tokens).float(), dim=-1).mean(1)

    def image_features(self, frames: Tensor) -> Tensor:
        """Return (B, D) of uint8 frames (B, 3, H, W)."""
        return F.normalize(self.image.frame_states(self.image.normalize(frames)).float(), dim=-1)


class ClipTask(Task):
    """Classification of sentences (made-up names too) and of pictures, and matching of the two."""

    network: ClipNetwork

    def __init__(self, network: ClipNetwork, pool: ScenePool, held_out: ScenePool) -> None:
        self.network, self.pool, self.held_out = network, pool, held_out

    def loss(self, rng: np.random.Generator, batch_size: int) -> tuple[Tensor, dict[str, float | Tensor]]:
        frames, texts, labels, shown = self._draw(self.pool, rng, batch_size, augmented=True)
        text, image = self.network.text_features(texts), self.network.image_features(frames)
        text_loss = F.cross_entropy(10 * self.network.text_head(text), labels)
        image_loss = F.binary_cross_entropy_with_logits(10 * self.network.image_head(image), shown)
        matching = self._matching(text, self.network.image_projection(image), labels, shown)
        apart = self._apart(rng, batch_size)
        return text_loss + image_loss + 0.5 * matching + 0.5 * apart, {
            "text": text_loss.detach(), "image": image_loss.detach(), "matching": matching.detach(),
            "apart": apart.detach(),
        }

    def _matching(self, text: Tensor, image: Tensor, labels: Tensor, shown: Tensor) -> Tensor:
        """Return the contrastive loss; every picture that shows what a sentence names is right for it."""
        scale = self.network.log_scale.exp().clamp(max=50)
        logits = scale * F.normalize(text, dim=-1) @ F.normalize(image, dim=-1).T  # (texts, images)
        right = shown[:, labels].T  # (texts, images)
        of_texts, of_images = (
            -((r / r.sum(1, keepdim=True)) * x.log_softmax(1)).sum(1).mean()
            for x, r in ((logits, right), (logits.T, right.T))
        )
        return 0.5 * (of_texts + of_images)

    def _apart(self, rng: np.random.Generator, batch_size: int) -> Tensor:
        """Return the contrastive loss of pairs of sentences about the same made-up thing."""
        words = [made_up_word(rng) for _ in range(batch_size)]
        first, second = (
            F.normalize(self.network.text_features([sentence(rng, w) for w in words]), dim=-1) for _ in range(2)
        )
        return F.cross_entropy(15 * first @ second.T, torch.arange(batch_size, device=first.device))

    def _draw(
        self, pool: ScenePool, rng: np.random.Generator, batch_size: int, augmented: bool
    ) -> tuple[Tensor, list[str], Tensor, Tensor]:
        """Return frames, a sentence about one thing of each, its class (B,), and all shown classes (B, classes)."""
        frames, texts, labels = [], [], []
        shown = torch.zeros(batch_size, len(CLASS_NAMES))
        for row in range(batch_size):
            index = int(rng.integers(len(pool.scenes)))
            scene, picture = pool.scenes[index], int(rng.integers(pool.frames.shape[1]))
            pixels = pool.frames[index, picture : picture + 1]
            frames.append((View.random(rng).apply(pixels) if augmented else pixels)[0])
            named = int(rng.integers(len(scene.objects)))
            texts.append(vary(rng, scene.prompt(rng, named)))
            labels.append(CLASS_NAMES.index(scene.objects[named].name))
            for thing in scene.objects:
                shown[row, CLASS_NAMES.index(thing.name)] = 1
        device = self.network.log_scale.device
        pictures = torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2).to(device)
        return pictures, texts, torch.tensor(labels, device=device), shown.to(device)

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        frames, texts, labels, shown = self._draw(self.held_out, np.random.default_rng(0), 256, augmented=False)
        text = self.network.text_head(self.network.text_features(texts)).argmax(1)
        image = self.network.image_head(self.network.image_features(frames)) > 0
        return {"text_accuracy": float((text == labels).float().mean()),
                "image_accuracy": float((image == shown.bool()).all(1).float().mean())}
