"""Engine that makes sound for videos, features or words; behind ``infer.py`` and ``from selva import SoundGenerator``.

    request --encoders--> SoundConditions --generator--> latents --VAE decoder, vocoder--> waveform --level--> Sound

:meth:`SoundGenerator.generate` makes one sound. Batches call the three stages themselves, each for many clips at once,
so that only one network needs to be loaded at a time: :meth:`~SoundGenerator.encode`, :meth:`~SoundGenerator.sample`,
:meth:`~SoundGenerator.decode`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from selva.audio.loudness import normalize_loudness
from selva.extraction.extractor import FeatureExtractor
from selva.extraction.reader import CLIP_ERRORS
from selva.features import FeatureBundle, load_features
from selva.flow import WHOLE_INTERVAL, SamplingConfig, check_interval
from selva.inference.adapter_switch import (
    AdapterSpec,
    AdapterSwitch,
    PathLike,
    TimedAdapters,
    load_adapters,
    uses_clip_features,
    warn_of_missing_prefixes,
    warn_of_other_generators,
)
from selva.inference.config import CLIP_FEATURE_CHOICES, DEFAULT_BATCH_SIZE, OFFLOAD_CHOICES, WHOLE_VIDEO_SEC
from selva.inference.long_sampling import sample_long
from selva.inference.request import Sound, SoundConditions, SoundRequest, check_widths, warn_of_shorter
from selva.lora.merge import Adapter
from selva.media import MaskSettings, VideoFrames
from selva.models.generator import Generator
from selva.models.mel_inversion import MelInversion
from selva.models.prompt_length import warn_of_cut_prompts
from selva.models.vae import VAE
from selva.models.variants import features_problem, get_variant
from selva.models.vocoder import Vocoder
from selva.sampling import decode_latents, sample_latents, sampling_graphs
from selva.sequence import DEFAULT_DURATION_SEC, SequenceConfig, sequence_config
from selva.utils.device import (
    BASE_DTYPE_CHOICES,
    GRAPH_CHOICES,
    PRECISION_CHOICES,
    dtype_of,
    resolve_device,
    resolve_precision,
    stored_dtype,
)
from selva.utils.errors import UserError
from selva.utils.progress import StageTimes
from selva.weights.find import check_weights
from selva.weights.load import load_generator, load_vae, load_vocoder

log = logging.getLogger(__name__)

ENCODERS, GENERATOR, DECODERS = "encoders", "generator", "decoders"  # what is loaded together
COMPUTE_ERRORS = (RuntimeError, MemoryError)  # what can go wrong with one item in PyTorch
DECODER_CHUNK_SEC = 8.0  # of longer sounds the vocoder makes this much at once


OnError = Callable[[int, Exception], None]


# ---------------------------------------------------------------------------------------------------------------
# the engine
# ---------------------------------------------------------------------------------------------------------------


class SoundGenerator:
    """Makes sounds with one base model, with or without adapters.

    Args:
        variant: a name from :data:`selva.models.variants.VARIANTS`. selva_dir: where its weights are; not for tiny_16k.
        adapters: files or adapters, or pairs of one and a strength; :meth:`set_adapters` exchanges them.
        adapter_times: they act from the first to the second of these times only; 0 is noise, 1 is sound.
        adapter_layers: they act in these of their layers only, see :func:`selva.lora.tools.restricted`.
        clip_features: "use" or "empty" CLIP features of the pictures; "auto" as adapters, baked ones too, were trained.
        sampling: steps, solver, guidance. long: go through more than 8 s in overlapping windows.
        normalize, target: the level of the sounds, see :func:`selva.audio.loudness.normalize_loudness`.
        precision: to compute in. base_dtype: "bf16" stores the generator's matrices in half the memory of float32.
        batch_size: sounds that go through the generator at once.
        offload: "none" keeps every network once it is loaded; "auto" frees each before the next one is loaded.
        generator: file of a generator of your own, in place of that of the variant.
        cuda_graph: "auto", "on" or "off": start a pass of the generator as a whole on CUDA, see selva.utils.graph.

    Raises:
        ValueError: an unknown name or choice, or adapters that do not suit the variant or each other.
        FileNotFoundError: an adapter is missing.
    """

    def __init__(
        self,
        variant: str = "large_44k",
        selva_dir: PathLike | None = None,
        adapters: Iterable[AdapterSpec] = (),
        *,
        adapter_times: tuple[float, float] = WHOLE_INTERVAL,
        adapter_layers: Sequence[str] = (),
        clip_features: str = "auto",
        sampling: SamplingConfig | None = None,
        long: bool = False,
        normalize: str = "none",
        target: float | None = None,
        device: str = "auto",
        precision: str = "auto",
        base_dtype: str = "auto",
        batch_size: int = DEFAULT_BATCH_SIZE,
        offload: str = "none",
        generator: PathLike | None = None,
        cuda_graph: str = "auto",
    ) -> None:
        for what, value, choices in (("clip_features", clip_features, CLIP_FEATURE_CHOICES),
                                     ("precision", precision, PRECISION_CHOICES),
                                     ("base_dtype", base_dtype, BASE_DTYPE_CHOICES),
                                     ("offload", offload, OFFLOAD_CHOICES), ("cuda_graph", cuda_graph, GRAPH_CHOICES)):
            if value not in choices:
                raise UserError(f"{what} is {value!r}, expected one of {', '.join(choices)}")
        self.variant, self.selva_dir = get_variant(variant), None if selva_dir is None else Path(selva_dir)
        self.device = resolve_device(device)
        self.precision_name = resolve_precision(precision, self.device)
        self.precision = dtype_of(self.precision_name)
        self.stored = stored_dtype(base_dtype, self.precision_name)
        self.sampling, self.long, self.batch_size = sampling or SamplingConfig(), long, batch_size
        self.own_generator = None if generator is None else Path(generator)
        self.normalize, self.target, self.clip_features, self.offload = normalize, target, clip_features, offload
        # Features are float32 as those that the base models and adapters were trained on.
        self.extractor = FeatureExtractor(self.variant, self.selva_dir, self.device)
        graphs = sampling_graphs(cuda_graph, self.device)
        self._switch = AdapterSwitch(self._load_generator, self.stored, self.device, graphs)
        self._decoders: tuple[VAE, Vocoder | MelInversion] | None = None
        self._stage, self.times = "", StageTimes()
        self.set_adapters(adapters, adapter_times, adapter_layers)

    def set_adapters(
        self, adapters: Iterable[AdapterSpec], times: tuple[float, float] = WHOLE_INTERVAL, layers: Sequence[str] = ()
    ) -> None:
        """Use these adapters from now on, and no others; the weights change when the next sound is sampled.

        Args:
            times, layers: where they act, see ``adapter_times`` and ``adapter_layers``.
        """
        times = check_interval("times", times)
        pairs = load_adapters(adapters, self.variant, layers)
        warn_of_other_generators(pairs, self.own_generator)
        self.uses_clip = uses_clip_features(self.clip_features, self.variant, pairs, self.own_generator)
        self.adapters, self.adapter_times = pairs, times
        self._told_prompts: set[str] = set()  # whose words have been compared with those of the adapters' training

    def expect_adapters(self, adapters: Iterable[Adapter]) -> None:
        """Announce the adapters of later calls of :meth:`set_adapters`, which saves reading the weights again."""
        self._switch.expect(adapters)

    def check_weights(self, video: bool, use_clip_features: bool | None = None) -> None:
        """Check that the files for making sound are there; with ``video``, those of the picture encoders too.

        Raises:
            FileNotFoundError: names every missing file, and how to get it.
        """
        use_clip_features = self.uses_clip if use_clip_features is None else use_clip_features
        pictures = ["video_encoder", "t5", *(["clip_image"] if use_clip_features else [])]
        needs = ["vae", "vocoder", "clip_text", *(pictures if video else [])]
        check_weights(self.variant.name, self.selva_dir, needs + ["generator"] * (self.own_generator is None))

    def generate(
        self,
        video: PathLike | None = None,
        prompt: str | None = None,
        *,
        features: PathLike | FeatureBundle | None = None,
        seed: int = 42,
        negative_prompt: str = "",
        start_sec: float = 0.0,
        duration_sec: float | None = None,
        mask: PathLike | MaskSettings | None = None,
        on_step: Callable[[int], None] | None = None,
    ) -> Sound:
        """Return the sound for a video, for stored features, or for words alone; see :class:`SoundRequest`.

        Raises:
            ValueError, FileNotFoundError: what was given cannot be used; says why.
        """
        request = SoundRequest(
            None if video is None else Path(video), Path(features) if isinstance(features, str) else features, prompt,
            negative_prompt, start_sec, duration_sec,
            MaskSettings(Path(mask)) if isinstance(mask, str | Path) else mask,
        )
        conditions = [one for one in self.encode([request]) if one is not None]  # an error is raised, not left out
        if video is not None:
            warn_of_shorter([(str(video), duration_sec, conditions[0].sequence.duration_sec)])
        return self.decode(conditions, self.sample(conditions, [seed], on_step))[0]

    # -- stage 1: encoders ---------------------------------------------------------------------------------------------

    def encode(
        self, requests: Sequence[SoundRequest], *, use_clip_features: bool | None = None,
        on_error: OnError | None = None,
    ) -> list[SoundConditions | None]:
        """Return the conditions of every request.

        Args:
            use_clip_features: make CLIP features of videos; None as the current adapters want it.
            on_error: called with the index and the error of a request that cannot be used, which becomes None; without
                it the error is raised.
        """
        self.enter(ENCODERS)
        use_clip_features = self.uses_clip if use_clip_features is None else use_clip_features

        def attempt(index: int, function: Callable, *args: Any) -> Any:
            try:
                return function(*args)
            except CLIP_ERRORS as error:
                log.debug("request %d", index, exc_info=True)
                if on_error is None:
                    raise
                on_error(index, error)
                return None

        drafts = [attempt(index, self._opened, request) for index, request in enumerate(requests)]
        usable = [draft for draft in drafts if draft is not None]
        warn_of_shorter((draft.request.source, draft.request.duration_sec, draft.duration_sec) for draft in usable
                        if draft.request.features is not None)
        self._encode_texts(usable)
        watched = {index: draft for index, draft in enumerate(drafts) if draft is not None and draft.frames is not None}
        self._encode_pictures(watched, use_clip_features, attempt)
        return [None if draft is None or draft.failed else attempt(index, self._conditions, draft)
                for index, draft in enumerate(drafts)]

    def _opened(self, request: SoundRequest) -> _Draft:
        with self.times.stage("reading"):
            if request.video is not None:
                default = WHOLE_VIDEO_SEC if self.long else DEFAULT_DURATION_SEC
                duration = default if request.duration_sec is None else request.duration_sec
                frames = self.extractor.read(request.video, duration, request.start_sec, request.mask)
                return _Draft(request, request.prompt or "", frames.duration_sec, frames)
            if request.features is None:
                return _Draft(request, request.prompt or "", request.duration_sec or DEFAULT_DURATION_SEC)
            bundle = request.features
            if not isinstance(bundle, FeatureBundle):
                bundle = load_features(bundle)
        if problem := features_problem(bundle.variant, self.variant):
            raise UserError(f"{request.source}: {problem}")
        draft = _Draft(request, bundle.prompt if request.prompt is None else request.prompt,
                       min(bundle.duration, request.duration_sec or bundle.duration),
                       clip_f=bundle.clip_features if bundle.has_video else None,
                       sync_f=bundle.sync_features if bundle.has_video else None)
        if draft.prompt == bundle.prompt:
            draft.text_f = bundle.text_features
        elif self.variant.family == "selva" and bundle.has_video:
            log.warning("%s: the sync features were extracted with prompt %r and keep it", request.source,
                        bundle.prompt)
        return draft

    def _encode_texts(self, drafts: Sequence[_Draft]) -> None:
        extractor = self.extractor
        warn_of_cut_prompts(_named_prompts(drafts), self.variant.clip)
        texts = {draft.prompt for draft in drafts if draft.text_f is None}
        texts |= {draft.request.negative_prompt for draft in drafts if draft.request.negative_prompt}
        with self.times.stage("text encoders"):
            if self.offload == "none":
                for text in sorted(texts):
                    extractor.text_features(text)  # loads the encoder, and keeps it
            else:
                extractor.prepare_texts(texts, sync=False)
                extractor.prepare_texts({draft.prompt for draft in drafts if draft.frames is not None})

    def _encode_pictures(
        self, drafts: Mapping[int, _Draft], use_clip_features: bool, attempt: Callable[..., Tensor | None]
    ) -> None:
        # No error is kept: its traceback would hold what the clip had on the device, which the next ones may need.
        if use_clip_features and drafts:
            with self.times.stage("CLIP"):
                for index, draft in drafts.items():
                    assert draft.frames is not None
                    draft.clip_f = attempt(index, self.extractor.clip_features, draft.frames.clip_frames)
                    draft.failed = draft.clip_f is None
            if self.offload == "auto":
                self.extractor.free()
        with self.times.stage("video encoder"):
            for index, draft in drafts.items():
                assert draft.frames is not None
                if not draft.failed:
                    draft.sync_f = attempt(index, self.extractor.sync_features, draft.frames.sync_frames, draft.prompt)
                    draft.failed = draft.sync_f is None
                draft.frames = None

    def _conditions(self, draft: _Draft) -> SoundConditions:
        request, sequence = draft.request, sequence_config(self.variant.mode, draft.duration_sec)
        conditions = SoundConditions(
            request=request,
            sequence=sequence,
            prompt=draft.prompt,
            clip_f=None if draft.clip_f is None else draft.clip_f[:, : sequence.clip_seq_len],
            sync_f=None if draft.sync_f is None else draft.sync_f[:, : sequence.sync_seq_len],
            text_f=self.extractor.text_features(draft.prompt) if draft.text_f is None else draft.text_f,
            negative=self.extractor.text_features(request.negative_prompt) if request.negative_prompt else None,
        )
        check_widths(conditions, self.variant)
        return conditions

    # -- stage 2: generator --------------------------------------------------------------------------------------------

    def sample(
        self, conditions: Sequence[SoundConditions], seeds: Sequence[int], on_step: Callable[[int], None] | None = None
    ) -> list[Tensor]:
        """Return (N, C) float32 latents on the CPU for each item; what fits together is sampled together.

        Args:
            conditions: may name the same clip several times. seeds: one for each of them.
            on_step: called with the number of solver steps done, of ``num_steps * len(self.batches(conditions))``.
        """
        self.enter(GENERATOR)
        with self.times.stage("loading the generator"):
            generator, timed = self._switch.set_for(self.adapters, self.adapter_times)
        warn_of_missing_prefixes(self.adapters, (one.prompt for one in conditions), self._told_prompts)
        latents: dict[int, Tensor] = {}
        with self.times.stage("sampling"):
            for number, batch in enumerate(self.batches(conditions)):
                before = number * self.sampling.num_steps
                step = None if on_step is None else lambda done, before=before: on_step(before + done)
                rows = self._sample_batch(generator, [conditions[i] for i in batch], [seeds[i] for i in batch], step,
                                          timed)
                latents.update(zip(batch, rows, strict=True))
        return [latents[index] for index in range(len(conditions))]

    def batches(self, conditions: Sequence[SoundConditions]) -> list[list[int]]:
        """Return the indices that are sampled together: clips of one length, at most ``batch_size`` at once."""
        groups: dict[SequenceConfig, list[int]] = {}
        for index, item in enumerate(conditions):
            groups.setdefault(item.sequence, []).append(index)
        size = self.batch_size
        return [group[i : i + size] for group in groups.values() for i in range(0, len(group), size)]

    def _sample_batch(
        self, generator: Generator, items: Sequence[SoundConditions], seeds: Sequence[int],
        on_step: Callable[[int], None] | None, timed: TimedAdapters | None,
    ) -> list[Tensor]:
        sequence = items[0].sequence
        generator.set_sequence(sequence.latent_seq_len, sequence.clip_seq_len, sequence.sync_seq_len)
        empty_clip, empty_sync, empty_text = generator.empty_features(1)
        watched = [item for item in items if item.request.video is not None]
        missing = [item.request.source for item in watched if self.uses_clip and item.clip_f is None]
        if missing:
            raise UserError(f"{missing[0]}: was encoded without the CLIP features that are asked for; encode it again")

        def stacked(features: Iterable[Tensor | None], empty: Tensor) -> Tensor:
            return torch.cat([empty if x is None else x.to(empty.device) for x in features])  # (B, tokens, channels)

        arguments = (
            generator,
            stacked([item.clip_f if self.uses_clip else None for item in items], empty_clip),
            stacked([item.sync_f for item in items], empty_sync),
            stacked([item.text_f for item in items], empty_text),
            seeds, self.sampling,
        )
        negative = None
        if any(item.negative is not None for item in items):
            negative = stacked([item.negative for item in items], empty_text)
        more = {"negative_text": negative, "precision": self.precision, "on_step": on_step, "timed": timed}
        if self.long:
            more |= {"mode": self.variant.mode, "duration_sec": sequence.duration_sec}
        latents = (sample_long if self.long else sample_latents)(*arguments, **more, graphs=self._switch.graphs)
        return list(latents.cpu())

    def _load_generator(self) -> Generator:
        return load_generator(self.variant.name, self.selva_dir, file=self.own_generator)

    # -- stage 3: decoders ---------------------------------------------------------------------------------------------

    def decode(self, conditions: Sequence[SoundConditions], latents: Sequence[Tensor]) -> list[Sound]:
        """Return the sounds of latents, one after the other, exactly as long as their clips."""
        self.enter(DECODERS)
        with self.times.stage("decoding"):
            if self._decoders is None:
                vae = load_vae(self.variant.name, self.selva_dir, self.device, decoder_only=True)
                self._decoders = vae, load_vocoder(self.variant.name, self.selva_dir, self.device)
            return [self._sound(c, x, *self._decoders) for c, x in zip(conditions, latents, strict=True)]

    def _sound(
        self, conditions: SoundConditions, latents: Tensor, vae: VAE, vocoder: Vocoder | MelInversion
    ) -> Sound:
        sequence, request = conditions.sequence, conditions.request
        chunk_sec = DECODER_CHUNK_SEC if sequence.duration_sec > DECODER_CHUNK_SEC else None
        waveform = decode_latents(latents[None].to(self.device), vae, vocoder, chunk_sec=chunk_sec)[0].cpu()
        # The last latent frame may reach beyond the clip; the sound ends exactly with it.
        waveform = waveform[: round(sequence.duration_sec * sequence.sampling_rate)]
        waveform, level = normalize_loudness(waveform, sequence.sampling_rate, self.normalize, self.target)
        return Sound(waveform, sequence.sampling_rate, level, request.video, request.start_sec)

    # -- memory --------------------------------------------------------------------------------------------------------

    def enter(self, stage: str) -> None:
        """Free the networks that the stage does not need, unless they are to stay."""
        if self.offload == "none" or stage == self._stage:
            return
        self._stage = stage
        if stage != ENCODERS:
            self.extractor.free()
        if stage != GENERATOR:
            self._switch.free()
        if stage != DECODERS:
            self._decoders = None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def free(self) -> None:
        """Let go of all networks; they are loaded again when needed."""
        self.extractor.free()
        self._switch.free()
        self._decoders = None


@dataclass
class _Draft:
    """A request on its way to :class:`SoundConditions`."""

    request: SoundRequest
    prompt: str
    duration_sec: float
    frames: VideoFrames | None = None
    clip_f: Tensor | None = None
    sync_f: Tensor | None = None
    text_f: Tensor | None = None
    failed: bool = False  # its pictures could not be encoded


def _named_prompts(drafts: Iterable[_Draft]) -> Iterator[tuple[str, str]]:
    """Yield (name, prompt) of all texts that the text encoder will be given."""
    for draft in drafts:
        request = draft.request
        name = "prompt" if request.video is None and request.features is None else request.source
        yield name, draft.prompt
        yield f"{name}, negative prompt", request.negative_prompt
