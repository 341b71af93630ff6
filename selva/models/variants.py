"""Variants of the base model: their networks, sizes and published files; needs no PyTorch.

``tiny_16k`` has the classes of the published models in small sizes and needs no files. Sizes and files: SelVA
(arXiv:2512.02650), MMAudio (arXiv:2412.15322), BigVGAN (arXiv:2206.04658), DFN CLIP (arXiv:2309.17425) and FLAN-T5
(arXiv:2210.11416), with the configurations published beside their weights.
"""

from __future__ import annotations

from dataclasses import dataclass

from selva.models.config import (
    ClipConfig,
    GeneratorConfig,
    MelInversionConfig,
    T5Config,
    VAEConfig,
    VideoEncoderConfig,
    VocoderConfig,
)
from selva.utils.errors import UserError

# -- published files ---------------------------------------------------------------------------------------------------

SELVA_REPO = "jnwnlee/SelVA"
MMAUDIO_REPO = "hkchengrex/MMAudio"
BIGVGAN_REPO = "nvidia/bigvgan_v2_44khz_128band_512x"
CLIP_REPO = "apple/DFN5B-CLIP-ViT-H-14-384"
T5_REPO = "google/flan-t5-base"


@dataclass(frozen=True)
class WeightFile:
    """One published file.

    Attributes:
        name: the local file name.
        purpose: its use, in words.
        repo: repository on the Hugging Face Hub.
        remote: path inside the repository.
        md5: checksum, where one was published.
        md5_verified: False where the publisher says that the checksum was never compared with the file.
        external: lies in ``ext/`` or ``ext_weights/`` rather than beside the generators.
        hub_folder: lies in a folder named like its repository, or in the Hugging Face cache.
        alternatives: other names, local and remote, under which the same content may be found.
    """

    name: str
    purpose: str
    repo: str
    remote: str
    md5: str | None = None
    md5_verified: bool = True
    external: bool = False
    hub_folder: bool = False
    alternatives: tuple[str, ...] = ()

    @property
    def folder_name(self) -> str:
        """The last part of the repository name, which names the local folder of a ``hub_folder`` file."""
        return self.repo.rsplit("/", 1)[-1]


def _selva(name: str, purpose: str, md5: str, *, remote: str | None = None, verified: bool = True) -> WeightFile:
    return WeightFile(name, purpose, SELVA_REPO, f"weights/{remote or name}", md5, md5_verified=verified)


def _mmaudio(name: str, md5: str) -> WeightFile:
    return WeightFile(name, "generator", MMAUDIO_REPO, f"weights/{name}", md5)


def _external(name: str, purpose: str, md5: str) -> WeightFile:
    return WeightFile(name, purpose, SELVA_REPO, f"ext_weights/{name}", md5, external=True)


def _hub(name: str, purpose: str, repo: str, alternatives: tuple[str, ...] = ()) -> WeightFile:
    return WeightFile(name, purpose, repo, name, external=True, hub_folder=True, alternatives=alternatives)


SYNCHFORMER = "synchformer_state_dict.pth"
WEIGHT_FILES = {
    file.name: file
    for file in (
        # The 44 kHz SelVA generators are "44khz" in the repository and "44k" everywhere else.
        _selva("generator_small_16k_sup_5.pth", "generator", "1cb0f0deec52de37f67b1fd9965337d0"),
        _selva(
            "generator_small_44k_sup_5.pth", "generator", "d4df8569624093ac80af99b8b7434525",
            remote="generator_small_44khz_sup_5.pth", verified=False,
        ),
        _selva(
            "generator_medium_44k_sup_5.pth", "generator", "e9157e62b4863ad306e89e8f3a587748",
            remote="generator_medium_44khz_sup_5.pth", verified=False,
        ),
        _selva(
            "generator_large_44k_sup_5.pth", "generator", "ab3db08b124d3aaa53eb7a1f52f1fb3f",
            remote="generator_large_44khz_sup_5.pth", verified=False,
        ),
        _mmaudio("mmaudio_small_16k.pth", "af93cde404179f58e3919ac085b8033b"),
        _mmaudio("mmaudio_small_44k.pth", "babd74c884783d13701ea2820a5f5b6d"),
        _mmaudio("mmaudio_medium_44k.pth", "5a56b6665e45a1e65ada534defa903d0"),
        _mmaudio("mmaudio_large_44k.pth", "fed96c325a6785b85ce75ae1aafd2673"),
        _mmaudio("mmaudio_large_44k_v2.pth", "01ad4464f049b2d7efdaa4c1a59b8dfe"),
        _selva("video_enc_sup_5.pth", "TextSynch video encoder", "ff09a6dc36148536ee4db97eba081d05"),
        _external(SYNCHFORMER, "Synchformer video encoder", "5b2f5594b0730f70e41e549b7c94390c"),
        _external("v1-16.pth", "16 kHz VAE", "69f56803f59a549a1a507c93859fd4d7"),
        _external("v1-44.pth", "44.1 kHz VAE", "fab020275fa44c6589820ce025191600"),
        _external("best_netG.pt", "16 kHz vocoder (BigVGAN)", "eeaf372a38a9c31c362120aba2dde292"),
    )
}

BIGVGAN_V2 = _hub("bigvgan_generator.pt", "44.1 kHz vocoder (BigVGAN v2)", BIGVGAN_REPO)
CLIP_WEIGHTS = _hub(
    "open_clip_model.safetensors", "CLIP text and image encoder", CLIP_REPO, ("open_clip_pytorch_model.bin",)
)
T5_WEIGHTS = _hub("model.safetensors", "FLAN-T5 text encoder", T5_REPO, ("pytorch_model.bin",))
T5_TOKENIZER = _hub("tokenizer.json", "FLAN-T5 tokenizer", T5_REPO)

# -- variants ----------------------------------------------------------------------------------------------------------

PARTS = ("generator", "video_encoder", "vae", "vocoder", "clip_text", "clip_image", "t5")


@dataclass(frozen=True)
class Variant:
    """All networks that belong together under one name.

    Attributes:
        name: as given to ``--variant``.
        mode: "16k" or "44k"; decides the mel front-end, the VAE and the vocoder.
        family: "selva" (TextSynch features, conditioned on the prompt) or "mmaudio" (Synchformer features).
        generator_file: name of the published generator, None if the variant is packaged.
        t5: None in the mmaudio family, whose video encoder reads no text.
        clip_image_size, sync_image_size: side of the square frames that the two picture encoders are given.
        sync_crop: True scales the shorter side of a sync frame and cuts out the centre (MMAudio); False squashes the
            whole frame into the square (SelVA).
        packaged: needs no files.
    """

    name: str
    mode: str
    family: str
    generator: GeneratorConfig
    generator_file: str | None
    video_encoder: VideoEncoderConfig
    vae: VAEConfig
    vocoder: VocoderConfig | MelInversionConfig
    clip: ClipConfig
    t5: T5Config | None
    clip_image_size: int = 384
    sync_image_size: int = 224
    sync_crop: bool = False
    packaged: bool = False

    @property
    def encoders(self) -> str:
        """Name of the encoders; variants of one family share them, and so their features."""
        return self.name if self.packaged else self.family

    @property
    def parts(self) -> tuple[str, ...]:
        """The entries of PARTS that this variant has."""
        return tuple(part for part in PARTS if part != "t5" or self.t5 is not None)

    def weight_files(self, part: str) -> tuple[WeightFile, ...]:
        """Return the published files behind one part; none for a packaged variant or a part that it does not have."""
        assert part in PARTS, part
        if self.packaged or part not in self.parts:
            return ()
        if part == "generator":
            assert self.generator_file is not None  # only a packaged variant has none
            return (WEIGHT_FILES[self.generator_file],)
        if part == "video_encoder":
            selva = self.family == "selva"
            return (WEIGHT_FILES["video_enc_sup_5.pth" if selva else SYNCHFORMER],)
        if part == "vae":
            return (WEIGHT_FILES["v1-16.pth" if self.mode == "16k" else "v1-44.pth"],)
        if part == "vocoder":
            return (WEIGHT_FILES["best_netG.pt"] if self.mode == "16k" else BIGVGAN_V2,)
        return (T5_WEIGHTS, T5_TOKENIZER) if part == "t5" else (CLIP_WEIGHTS,)


VAE_CONFIGS = {
    "16k": VAEConfig(mode="16k", hidden_dim=384, latent_dim=20),
    "44k": VAEConfig(mode="44k", hidden_dim=512, latent_dim=40),
}
VOCODER_CONFIGS = {
    "16k": VocoderConfig(
        num_mels=80, upsample_rates=(4, 4, 2, 2, 2, 2), upsample_kernels=(8, 8, 4, 4, 4, 4),
        final_bias=True, final_tanh=True,
    ),
    "44k": VocoderConfig(
        num_mels=128, upsample_rates=(8, 4, 2, 2, 2, 2), upsample_kernels=(16, 8, 4, 4, 4, 4),
        final_bias=False, final_tanh=False,
    ),
}

_GENERATOR_CONFIGS = {
    "small_16k": GeneratorConfig(latent_dim=20, hidden_dim=448, depth=12, fused_depth=8, num_heads=7),
    "small_44k": GeneratorConfig(
        latent_dim=40, hidden_dim=448, depth=12, fused_depth=8, num_heads=7, latent_seq_len=345
    ),
    "medium_44k": GeneratorConfig(
        latent_dim=40, hidden_dim=896, depth=12, fused_depth=8, num_heads=14, latent_seq_len=345
    ),
    "large_44k": GeneratorConfig(
        latent_dim=40, hidden_dim=896, depth=21, fused_depth=14, num_heads=14, latent_seq_len=345
    ),
    "large_44k_v2": GeneratorConfig(
        latent_dim=40, hidden_dim=896, depth=21, fused_depth=14, num_heads=14, latent_seq_len=345, v2=True
    ),
}


def _published(family: str, size: str) -> Variant:
    mode = "16k" if "16k" in size else "44k"
    selva = family == "selva"
    return Variant(
        name=size if selva else f"mmaudio_{size}",
        mode=mode,
        family=family,
        generator=_GENERATOR_CONFIGS[size],
        generator_file=f"generator_{size}_sup_5.pth" if selva else f"mmaudio_{size}.pth",
        video_encoder=VideoEncoderConfig(),
        vae=VAE_CONFIGS[mode],
        vocoder=VOCODER_CONFIGS[mode],
        clip=ClipConfig(),
        t5=T5Config() if selva else None,
        sync_crop=not selva,
    )


# About 5.5 million parameters in all. Lengths are those of small_16k, so a clip of 8 s has the same shapes in time.
TINY_16K = Variant(
    name="tiny_16k",
    mode="16k",
    family="selva",
    # 96 is the widest for which the gated MLPs stay at their smallest width of 256.
    generator=GeneratorConfig(
        latent_dim=20, hidden_dim=96, depth=4, fused_depth=2, num_heads=3, clip_dim=64, sync_dim=64, text_dim=64
    ),
    generator_file=None,
    video_encoder=VideoEncoderConfig(
        embed_dim=64, depth=2, num_heads=2, mlp_dim=256, image_size=80, text_dim=64, num_sup_tokens=5
    ),
    vae=VAEConfig(mode="16k", hidden_dim=32, latent_dim=20),
    vocoder=MelInversionConfig(mode="16k"),
    clip=ClipConfig(
        embed_dim=64, image_size=64, patch_size=8, vision_layers=3, vision_width=64, vision_head_width=32,
        text_width=64, text_heads=2, text_layers=2, vocab_size=259, byte_tokens=True,
    ),
    t5=T5Config(
        vocab_size=259, d_model=64, d_kv=32, d_ff=128, num_layers=2, num_heads=2, byte_tokens=True
    ),
    clip_image_size=64,
    sync_image_size=80,
    packaged=True,
)

VARIANTS: dict[str, Variant] = {
    variant.name: variant
    for variant in (
        *(_published("selva", size) for size in _GENERATOR_CONFIGS if size != "large_44k_v2"),
        *(_published("mmaudio", size) for size in _GENERATOR_CONFIGS),
        TINY_16K,
    )
}


def get_variant(name: str) -> Variant:
    """Return the variant of that name.

    Raises:
        ValueError: no such variant; the message lists all names.
    """
    if name not in VARIANTS:
        raise UserError(f"unknown variant {name!r}, expected one of {', '.join(VARIANTS)}")
    return VARIANTS[name]


def features_problem(made_for: str, variant: Variant) -> str | None:
    """Return the reason against using features of the variant ``made_for`` with ``variant``; None if there is none.

    SelVA's and MMAudio's features have the same shapes, so only the name can tell them apart.
    """
    source = VARIANTS.get(made_for)
    if source is None or source.encoders == variant.encoders:
        return None
    return f"made with the encoders of {made_for}, which are not those of {variant.name}; extract again"

