"""Constructors of the networks: random weights, state-dict keys of the published files.

    name -> Variant -> build_generator, build_video_encoder, build_vae, build_vocoder, build_mel
"""

from __future__ import annotations

from selva.models.config import GeneratorConfig, MelInversionConfig, VAEConfig, VideoEncoderConfig, VocoderConfig
from selva.models.generator import Generator
from selva.models.mel import MelSpectrogram
from selva.models.mel_inversion import MelInversion
from selva.models.synchformer import Synchformer
from selva.models.textsynch import TextSynch
from selva.models.vae import VAE
from selva.models.variants import VAE_CONFIGS, VARIANTS, VOCODER_CONFIGS, get_variant
from selva.models.vocoder import Vocoder

__all__ = [
    "VARIANTS",
    "build_generator",
    "build_mel",
    "build_synchformer",
    "build_vae",
    "build_video_encoder",
    "build_vocoder",
]


def build_generator(which: str | GeneratorConfig) -> Generator:
    """Return a generator for a variant name or for a configuration."""
    return Generator(which if isinstance(which, GeneratorConfig) else get_variant(which).generator)


def build_video_encoder(which: str | VideoEncoderConfig = "small_16k") -> TextSynch | Synchformer:
    """Return the encoder behind the sync features: TextSynch, or Synchformer for the name of an mmaudio variant."""
    if isinstance(which, VideoEncoderConfig):
        return TextSynch(which)
    variant = get_variant(which)
    return (TextSynch if variant.family == "selva" else Synchformer)(variant.video_encoder)


def build_synchformer(which: str | VideoEncoderConfig = "mmaudio_small_16k") -> Synchformer:
    """Return the text-free video encoder in the sizes of a variant or of a configuration."""
    return Synchformer(which if isinstance(which, VideoEncoderConfig) else get_variant(which).video_encoder)


def build_vae(which: str | VAEConfig) -> VAE:
    """Return the VAE of a mode ("16k", "44k"), of a variant name or of a configuration."""
    if isinstance(which, VAEConfig):
        return VAE(which)
    return VAE(VAE_CONFIGS[which] if which in VAE_CONFIGS else get_variant(which).vae)


def build_vocoder(which: str | VocoderConfig | MelInversionConfig) -> Vocoder | MelInversion:
    """Return the vocoder of a mode ("16k", "44k"), of a variant name or of a configuration."""
    if isinstance(which, str):
        which = VOCODER_CONFIGS[which] if which in VOCODER_CONFIGS else get_variant(which).vocoder
    return MelInversion(which) if isinstance(which, MelInversionConfig) else Vocoder(which)


def build_mel(which: str) -> MelSpectrogram:
    """Return the mel front-end of a mode ("16k", "44k") or of a variant name."""
    return MelSpectrogram(which if which in VAE_CONFIGS else get_variant(which).mode)
