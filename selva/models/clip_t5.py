"""The frozen encoders of other projects: CLIP for texts and frames, T5 for texts.

    ClipText   texts   -> (B, 77, D)   every token, for the generator
    ClipImage  frames  -> (T, D)       one vector per frame, for the generator
    T5Text     texts   -> (B, L, D) and a mask, for the text-conditioned video encoder

open_clip and transformers define the networks and are imported when one is built. Only the tower in use is kept: the
CLIP image tower has 630 of the model's 990 million parameters, and prompts need none of them.
Source: CLIP (arXiv:2103.00020) with DFN weights (arXiv:2309.17425), FLAN-T5 (arXiv:2210.11416); how the features are
taken follows MMAudio (arXiv:2412.15322) and SelVA (arXiv:2512.02650).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selva.models.blocks import load_strict_
from selva.models.config import ClipConfig, T5Config
from selva.models.onednn import use_onednn_
from selva.utils.errors import UserError
from selva.utils.text import counted

log = logging.getLogger(__name__)

if TYPE_CHECKING:
    from open_clip.model import CLIP
    from transformers import T5EncoderModel

IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)  # CLIP, per RGB channel of values in [0, 1]
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)
CLIP_TEXT_PREFIXES = ("token_embedding.", "positional_embedding", "transformer.", "ln_final.")
CLIP_IMAGE_PREFIX = "visual."
T5_PREFIXES = ("shared.", "encoder.")
T5_EMBEDDING, T5_EMBEDDING_COPY = "shared.weight", "encoder.embed_tokens.weight"

BYTE_PAD, BYTE_END, BYTE_START = 0, 1, 2
FIRST_BYTE = 3  # byte b of a text becomes token b + 3


def bytes_to_tokens(text: str) -> list[int]:
    """Return the UTF-8 bytes of ``text`` as token ids 3..258; 0, 1 and 2 are padding, end and start."""
    return [byte + FIRST_BYTE for byte in text.encode("utf-8")]


# -- CLIP -------------------------------------------------------------------------------------------------------------


class ClipText(nn.Module):
    """The text tower of CLIP. Built without weights; :meth:`load_published` brings them.

    Args:
        config: sizes of the whole model.
    """

    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        self.config = config
        self.clip = meta_clip(config)
        # All token states are wanted: without pooling and projection, open_clip's own forward pass ends right there.
        self.clip.text_pool_type = "none"
        for part in ("visual", "text_projection", "logit_scale"):
            setattr(self.clip, part, None)
        self.tokenize = _clip_tokenizer(config)

    def load_published(self, state_dict: Mapping[str, Tensor]) -> ClipText:
        """Load the text tensors of an open_clip state dict, strictly, and return ``self``.

        Raises:
            ValueError: a key is missing, unexpected or of another shape.
        """
        tensors = {k: v for k, v in state_dict.items() if k.startswith(CLIP_TEXT_PREFIXES)}
        _load_(self.clip, tensors, "CLIP text tower")
        length = self.config.context_length
        self.clip.attn_mask = torch.full((length, length), -torch.inf).triu_(1)  # computed, in no file
        return self

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> Tensor:
        """Return (B, 77, D) float32 token features, each of length 1, padding included.

        Neither pooled nor projected: the states of all positions after the last norm.
        """
        tokens = self.tokenize(texts).to(self.clip.get_parameter("positional_embedding").device)  # (B, 77)
        return F.normalize(self.token_states(tokens).float(), dim=-1)

    def token_states(self, tokens: Tensor) -> Tensor:
        """Return the (B, 77, D) states of int64 token ids (B, 77), before normalisation."""
        return self.clip.encode_text(tokens)


class ClipImage(nn.Module):
    """The image tower of CLIP. Built without weights; :meth:`load_published` brings them.

    Args:
        config: sizes of the whole model.
        batch_size: frames that go through the network at once.
    """

    def __init__(self, config: ClipConfig, batch_size: int = 16) -> None:
        super().__init__()
        self.config = config
        self.batch_size = batch_size
        self.visual = meta_clip(config).visual

    def load_published(self, state_dict: Mapping[str, Tensor]) -> ClipImage:
        """Load the image tensors of an open_clip state dict, strictly, and return ``self``.

        Raises:
            ValueError: a key is missing, unexpected or of another shape.
        """
        prefix = CLIP_IMAGE_PREFIX
        tensors = {k.removeprefix(prefix): v for k, v in state_dict.items() if k.startswith(prefix)}
        _load_(self.visual, tensors, "CLIP image tower")
        return self

    @torch.no_grad()
    def encode(self, frames: Tensor) -> Tensor:
        """Return (T, D) float32 frame features of length 1.

        Args:
            frames: (T, 3, H, W) RGB, uint8 or floating point in [0, 1], H = W. Pixels beyond the last whole patch are
                ignored, so the 384-pixel frames of the published features fit the 378-pixel tower.

        Raises:
            ValueError: another shape, another number of patches than the tower has positions, or values outside [0, 1].
        """
        self._check_frames(frames)
        chunks = [self.frame_states(self.normalize(chunk)) for chunk in frames.split(self.batch_size)]
        return F.normalize(torch.cat(chunks).float(), dim=-1)

    def frame_states(self, frames: Tensor) -> Tensor:
        """Return the (T, D) projected features of frames (T, 3, H, W) with CLIP's mean and deviation taken out."""
        return self.visual(frames)

    def normalize(self, frames: Tensor) -> Tensor:
        """Return frames (T, 3, H, W) with mean and deviation taken out; uint8 0..255, or floating point 0..1."""
        weight = self.visual.get_parameter("conv1.weight")
        scaled = frames.to(weight.device).float() / (255 if frames.dtype == torch.uint8 else 1)
        mean, std = (torch.tensor(x, device=weight.device)[:, None, None] for x in (IMAGE_MEAN, IMAGE_STD))
        return ((scaled - mean) / std).to(weight.dtype)

    def _check_frames(self, frames: Tensor) -> None:
        patch, size = self.config.patch_size, self.config.image_size
        shape = tuple(frames.shape)
        if frames.ndim != 4 or shape[0] < 1 or shape[1] != 3 or any(n // patch != size // patch for n in shape[2:]):
            smallest = size // patch * patch
            raise UserError(
                f"frames are {shape}, expected (frames, 3, height, width), height and width from {smallest} to "
                f"{smallest + patch - 1}"
            )
        if frames.dtype != torch.uint8:
            low, high = frames.aminmax()
            if not (low >= 0 and high <= 1):  # also refuses NaN
                raise UserError(f"frames have values from {low:.3g} to {high:.3g}, expected 0 to 1 (or uint8)")


def meta_clip(config: ClipConfig) -> CLIP:
    """Return open_clip's whole CLIP model on the meta device: names and shapes, no memory. Not for training."""
    from open_clip.transformer import QuickGELU

    with torch.device("meta"):
        clip = build_clip(config)
    faster: dict[type[nn.Module], type[nn.Module]] = {QuickGELU: InPlaceQuickGELU}
    for layer in clip.modules():
        layer.__class__ = faster.get(type(layer), type(layer))
    return clip


class InPlaceQuickGELU(nn.Module):
    """open_clip's activation bit for bit, making one tensor and not three: 5 to 12 % of a block's time on CPUs."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mul_((1.702 * x).sigmoid_())


def build_clip(config: ClipConfig) -> CLIP:
    """Return open_clip's whole CLIP model with the weights that its training starts from."""
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

    vision = CLIPVisionCfg(
        layers=config.vision_layers,
        width=config.vision_width,
        head_width=config.vision_head_width,
        patch_size=config.patch_size,
        image_size=config.image_size,
    )
    text = CLIPTextCfg(
        context_length=config.context_length,
        vocab_size=config.vocab_size,
        width=config.text_width,
        heads=config.text_heads,
        layers=config.text_layers,
    )
    return CLIP(config.embed_dim, vision, text, quick_gelu=config.quick_gelu)


def _clip_tokenizer(config: ClipConfig) -> Callable[[Sequence[str]], Tensor]:
    if config.byte_tokens:
        return lambda texts: _clip_byte_tokens(texts, config.context_length)
    from open_clip.tokenizer import SimpleTokenizer

    tokenizer = SimpleTokenizer(context_length=config.context_length)
    return lambda texts: tokenizer(list(texts))


def _clip_byte_tokens(texts: Sequence[str], length: int) -> Tensor:
    """Return (B, length) token ids: start, bytes, end, padding; cleaned and cut as CLIP does it."""
    tokens = torch.full((len(texts), length), BYTE_PAD)
    for row, text in zip(tokens, texts, strict=True):
        inner = bytes_to_tokens(" ".join(text.lower().split()))[: length - 2]
        row[: len(inner) + 2] = torch.tensor([BYTE_START, *inner, BYTE_END])
    return tokens


# -- T5 ---------------------------------------------------------------------------------------------------------------


class T5Text(nn.Module):
    """The encoder half of FLAN-T5. Built without weights; :meth:`load_published` brings them.

    Args:
        config: sizes of the encoder.
        tokenizer_file: the published ``tokenizer.json``; not needed for byte tokens.
    """

    def __init__(self, config: T5Config, tokenizer_file: Path | None = None) -> None:
        super().__init__()
        self.config = config
        self.t5 = meta_t5(config)
        self.tokenize = _t5_tokenizer(config, tokenizer_file)

    def load_published(self, state_dict: Mapping[str, Tensor]) -> T5Text:
        """Load the encoder tensors of a T5 state dict, strictly, and return ``self``; the decoder's are left out.

        Raises:
            ValueError: a key is missing, unexpected or of another shape.
        """
        tensors = {k: v for k, v in state_dict.items() if k.startswith(T5_PREFIXES)}
        tensors.pop(T5_EMBEDDING_COPY, None)  # some files store the shared table twice, some once
        if T5_EMBEDDING in tensors:
            tensors[T5_EMBEDDING_COPY] = tensors[T5_EMBEDDING]
        _load_(self.t5, tensors, "T5 encoder")
        self.t5.encoder.embed_tokens = self.t5.shared  # one table again, so that a cast does not make two
        return self

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return float32 features (B, L, D) and a bool mask (B, L), True on the tokens of each text.

        L is the length of the longest text of the batch, its end token included: "" has one token.
        """
        device = self.t5.shared.weight.device
        tokens, mask = (x.to(device) for x in self.tokenize(texts))  # each (B, L)
        return self.t5(input_ids=tokens, attention_mask=mask.long()).last_hidden_state.float(), mask


def meta_t5(config: T5Config) -> T5EncoderModel:
    """Return transformers' T5 encoder on the meta device: names and shapes, no memory."""
    import transformers

    sizes = transformers.T5Config(
        vocab_size=config.vocab_size,
        d_model=config.d_model,
        d_kv=config.d_kv,
        d_ff=config.d_ff,
        num_layers=config.num_layers,
        num_heads=config.num_heads,
        relative_attention_num_buckets=config.relative_buckets,
        relative_attention_max_distance=config.relative_max_distance,
        feed_forward_proj="gated-gelu",
        layer_norm_epsilon=1e-6,
        tie_word_embeddings=False,  # pyright: ignore[reportCallIssue]  -- a setting of all models, not listed for T5
        dropout_rate=0.0,
    )
    with torch.device("meta"):
        return transformers.T5EncoderModel(sizes)


def _t5_tokenizer(
    config: T5Config, tokenizer_file: Path | None
) -> Callable[[Sequence[str]], tuple[Tensor, Tensor]]:
    """Return a function from texts to int64 token ids (B, L) and a bool mask (B, L)."""
    if config.byte_tokens:
        def encode(texts: Sequence[str]) -> tuple[Tensor, Tensor]:
            rows = [bytes_to_tokens(text)[: config.max_length - 1] for text in texts]
            for text, row in zip(texts, rows, strict=True):
                if len(row) < len(content := text.encode("utf-8", errors="replace")):
                    _say_cut(text, content[: len(row)].decode("utf-8", errors="ignore"), config.max_length)
            return _pad([[*row, BYTE_END] for row in rows])

        return encode
    from tokenizers import Tokenizer

    assert tokenizer_file is not None, "a T5 encoder without byte tokens needs a tokenizer file"
    try:
        tokenizer = Tokenizer.from_file(str(tokenizer_file))
    except Exception as error:  # the Rust library raises nothing narrower
        raise UserError(f"{tokenizer_file}: not a tokenizer file ({error}); download it again") from error
    tokenizer.no_padding()
    tokenizer.enable_truncation(config.max_length)

    def encode_words(texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        encodings = tokenizer.encode_batch(list(texts))
        for text, encoding in zip(texts, encodings, strict=True):
            if encoding.overflowing:
                _say_cut(text, tokenizer.decode(encoding.ids[:-1]), config.max_length)
        return _pad([encoding.ids for encoding in encodings])

    return encode_words


def _say_cut(prompt: str, read: str, max_length: int) -> None:
    """Name a prompt that is too long for T5, which tells the video encoder what to look for."""
    log.warning("the prompt that begins %r is longer than the %s that the video encoder's T5 reads; what "
                "follows %r is not read", prompt[:40], counted(max_length, "token"), read[-40:])


def _pad(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Return rows of ids as (B, L) padded with 0 to the longest, and the (B, L) mask of what is no padding."""
    lengths = torch.tensor([len(row) for row in rows])
    tokens = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    for target, row in zip(tokens, rows, strict=True):
        target[: len(row)] = torch.tensor(row)
    return tokens, torch.arange(tokens.shape[1]) < lengths[:, None]


# -- loading ----------------------------------------------------------------------------------------------------------


def _load_(module: nn.Module, tensors: Mapping[str, Tensor], what: str) -> None:
    """Give a module on the meta device its memory and its float32 weights; it ends frozen and in eval mode.

    Raises:
        ValueError: a key is missing, unexpected or of another shape.
    """
    module.to_empty(device="cpu")
    load_strict_(module, tensors, what)  # also widens half-precision files
    module.eval().requires_grad_(False)
    use_onednn_(module)
