"""The whole of Synchformer, which hears whether a sound is in time with a video; only evaluation needs it.

    frames   -> visual branch (selva.models.synchformer)  (S, 8, 768) --+
    waveform -> segments -> log mel -> audio trunk        (S, 6, 768) --+-> comparison of 14 segments -> 21 offsets

Segments last 0.64 s and begin 0.32 s apart in both branches. The 21 classes are offsets from -2 to 2 seconds.
Source: Synchformer (arXiv:2401.16423); its audio trunk is the Audio Spectrogram Transformer (arXiv:2104.01778). Names
are those of the published ``synchformer_state_dict.pth``, which holds all 513 tensors.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selva.models.blocks import attend, load_strict_
from selva.models.config import VideoEncoderConfig
from selva.models.onednn import use_onednn_
from selva.models.synchformer import SpatialAggregation, Synchformer
from selva.utils.errors import UserError
from selva.utils.text import counted

SAMPLE_RATE = 16000
SEGMENT_SAMPLES, SEGMENT_STEP = 10240, 5120  # 0.64 s, 0.32 s apart, as the segments of the pictures
N_FFT, WINDOW, HOP, NUM_MELS = 1024, 400, 160, 128
MEL_FRAMES, PADDED_FRAMES = 65, 66
LOG_OFFSET = 1e-6
MEL_MEAN, MEL_STD = -4.2677393, 4.5689974  # of AudioSet, as the trunk was trained
PATCH, PATCH_STRIDE = 16, 10
BANDS, STEPS = 12, 6  # patches along frequency and along time

SEGMENTS_COMPARED = 14  # that one decision looks at: 4.8 s
OFFSETS = 21
TRUNK_EPS, COMPARISON_EPS = 1e-12, 1e-5
COMPARISON_HEADS, COMPARISON_DEPTH = 8, 3


# ---------------------------------------------------------------------------------------------------------------
# audio front end
# ---------------------------------------------------------------------------------------------------------------


def segment_mels(waveform: Tensor, segment_batch: int = 64) -> Tensor:
    """Return (B, S, 128, 66) normalised log-mel segments of 0.64 s, in float32.

    Args:
        waveform: (B, samples) mono at 16 kHz; S = (samples - 10240) // 5120 + 1, what is left at the end is not used.

    Raises:
        UserError: not two axes, or shorter than one segment.
    """
    if waveform.ndim != 2 or waveform.shape[1] < SEGMENT_SAMPLES:
        raise UserError(f"waveform is {tuple(waveform.shape)}, expected (batch, at least {SEGMENT_SAMPLES} samples of "
                        "16 kHz)")
    segments = waveform.float().unfold(1, SEGMENT_SAMPLES, SEGMENT_STEP)  # (B, S, 10240)
    mels = [_log_mel(chunk) for chunk in segments.flatten(0, 1).split(segment_batch)]
    return torch.cat(mels).unflatten(0, segments.shape[:2])


def _log_mel(segments: Tensor) -> Tensor:
    """Return (n, 128, 66) of (n, 10240) samples. The frame that pads it is 0 before the normalisation."""
    window, bank = _tables(segments.device)
    with torch.autocast(segments.device.type, enabled=False):
        spectrum = torch.stft(segments, N_FFT, HOP, WINDOW, window, pad_mode="reflect", return_complex=True)
        log_mel = (bank @ spectrum.abs().square() + LOG_OFFSET).log()  # (n, 128, 65)
        return (F.pad(log_mel, (0, PADDED_FRAMES - MEL_FRAMES)) - MEL_MEAN) / (2 * MEL_STD)


@functools.lru_cache(maxsize=4)
@torch.inference_mode(False)
def _tables(device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the periodic Hann window (400,) and the (128, 513) filter bank: HTK scale, triangles of height 1."""
    window = torch.hann_window(WINDOW, periodic=True, dtype=torch.float64).float()
    mels = np.linspace(0, 2595 * np.log10(1 + SAMPLE_RATE / 2 / 700), NUM_MELS + 2)
    edges = 700 * (10 ** (mels / 2595) - 1)
    bins = np.linspace(0, SAMPLE_RATE / 2, N_FFT // 2 + 1)
    low, centre, high = (edges[i : i + NUM_MELS, None] for i in range(3))
    bank = np.maximum(0, np.minimum((bins - low) / (centre - low), (high - bins) / (high - centre)))
    return window.to(device), torch.from_numpy(bank).float().to(device)


# ---------------------------------------------------------------------------------------------------------------
# audio trunk
# ---------------------------------------------------------------------------------------------------------------


class ASTAttention(nn.Module):
    """(n, tokens, dim) -> (n, tokens, dim): unmasked self-attention."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.attention = nn.ModuleDict({name: nn.Linear(dim, dim) for name in ("query", "key", "value")})
        self.output = nn.ModuleDict({"dense": nn.Linear(dim, dim)})

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (_heads(self.attention[name](x), self.num_heads) for name in ("query", "key", "value"))
        return self.output["dense"](attend(q, k, v))


class ASTLayer(nn.Module):
    """Pre-norm transformer layer under the names of the published Audio Spectrogram Transformer."""

    def __init__(self, config: VideoEncoderConfig) -> None:
        super().__init__()
        dim = config.embed_dim
        self.attention = ASTAttention(dim, config.num_heads)
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(dim, config.mlp_dim)})
        self.output = nn.ModuleDict({"dense": nn.Linear(config.mlp_dim, dim)})
        self.layernorm_before = nn.LayerNorm(dim, eps=TRUNK_EPS)
        self.layernorm_after = nn.LayerNorm(dim, eps=TRUNK_EPS)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.layernorm_before(x))
        return x + self.output["dense"](F.gelu(self.intermediate["dense"](self.layernorm_after(x))))


def _heads(x: Tensor, num_heads: int) -> Tensor:
    """Return (B, heads, tokens, head_dim) of (B, tokens, dim)."""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


class PatchEmbeddings(nn.Module):
    """Mel segments (n, 128, 66) -> (n, 2 + 72, dim) tokens: class, distillation, then the patches band by band."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.distillation_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.position_embeddings = nn.Parameter(torch.zeros(1, 2 + BANDS * STEPS, dim))
        self.patch_embeddings = nn.ModuleDict({"projection": nn.Conv2d(1, dim, PATCH, stride=PATCH_STRIDE)})

    def forward(self, mels: Tensor) -> Tensor:
        patches = self.patch_embeddings["projection"](mels[:, None]).flatten(2).mT  # (n, 12 * 6, dim)
        own = (token.expand(len(mels), -1, -1) for token in (self.cls_token, self.distillation_token))
        return torch.cat((*own, patches), dim=1) + self.position_embeddings


class AST(nn.Module):
    """Mel segments (n, 128, 66) -> (n, 2 + 72, dim) tokens after 12 layers and the last norm."""

    def __init__(self, config: VideoEncoderConfig) -> None:
        super().__init__()
        self.embeddings = PatchEmbeddings(config.embed_dim)
        self.encoder = nn.ModuleDict({"layer": nn.Sequential(*(ASTLayer(config) for _ in range(config.depth)))})
        self.layernorm = nn.LayerNorm(config.embed_dim, eps=TRUNK_EPS)

    def forward(self, mels: Tensor) -> Tensor:
        return self.layernorm(self.encoder["layer"](self.embeddings(mels)))


class AudioTrunk(nn.Module):
    """Mel segments (n, 128, 66) -> (n, 6, dim): one vector per time step, from the tokens of its 12 bands."""

    def __init__(self, config: VideoEncoderConfig) -> None:
        super().__init__()
        self.ast = AST(config)
        self.freq_attn_agg = SpatialAggregation(config)

    def forward(self, mels: Tensor) -> Tensor:
        x = self.ast(mels)[:, 2:].unflatten(1, (BANDS, STEPS))  # (n, 12, 6, dim)
        return self.freq_attn_agg(x.transpose(1, 2).flatten(0, 1)).unflatten(0, (len(mels), STEPS))


# ---------------------------------------------------------------------------------------------------------------
# comparison
# ---------------------------------------------------------------------------------------------------------------


class ComparisonBlock(nn.Module):
    """Pre-norm transformer block with 8 heads, whatever the width."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.ln1, self.ln2 = (nn.LayerNorm(dim, eps=COMPARISON_EPS) for _ in range(2))
        self.attn = nn.ModuleDict({name: nn.Linear(dim, dim) for name in ("key", "query", "value", "proj")})
        self.mlp = nn.Sequential(nn.Linear(dim, hidden_dim), nn.GELU(), nn.Linear(hidden_dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        normed = self.ln1(x)
        q, k, v = (_heads(self.attn[name](normed), COMPARISON_HEADS) for name in ("query", "key", "value"))
        x = x + self.attn["proj"](attend(q, k, v))
        return x + self.mlp(self.ln2(x))


class Comparison(nn.Module):
    """(B, 112, dim) visual and (B, 84, dim) audio tokens -> (B, 21) logits of offsets."""

    def __init__(self, config: VideoEncoderConfig) -> None:
        super().__init__()
        dim = config.embed_dim
        tokens = 2 + SEGMENTS_COMPARED * (config.num_slots + STEPS)
        self.OFF_tok, self.MOD_tok = (nn.Parameter(torch.zeros(1, 1, dim)) for _ in range(2))
        self.vis_in_lnorm, self.aud_in_lnorm, self.ln_f = (nn.LayerNorm(dim, eps=COMPARISON_EPS) for _ in range(3))
        self.pos_emb_cfg = nn.ParameterDict({"pos_emb": nn.Parameter(torch.zeros(1, tokens, dim))})
        self.blocks = nn.Sequential(*(ComparisonBlock(dim, config.mlp_dim) for _ in range(COMPARISON_DEPTH)))
        self.off_head = nn.Linear(dim, OFFSETS)

    def forward(self, visual: Tensor, audio: Tensor) -> Tensor:
        off, mod = (token.expand(len(visual), -1, -1) for token in (self.OFF_tok, self.MOD_tok))
        x = torch.cat((off, self.vis_in_lnorm(visual), mod, self.aud_in_lnorm(audio)), dim=1)
        x = self.blocks(x + self.pos_emb_cfg["pos_emb"])
        return self.off_head(self.ln_f(x)[:, 0])


class SynchformerAV(Synchformer):
    """Both branches of Synchformer and their comparison."""

    def __init__(self, config: VideoEncoderConfig | None = None) -> None:
        super().__init__(config)
        dim = self.config.embed_dim
        self.afeat_extractor = AudioTrunk(self.config)
        self.vproj, self.aproj = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.transformer = Comparison(self.config)
        use_onednn_(self)

    def encode_video(self, frames: Tensor, segment_batch: int | None = None) -> Tensor:
        """Return (B, S, 8, dim) visual features; takes and raises what :meth:`encode` does."""
        return self.encode(frames, segment_batch).unflatten(1, (-1, self.config.num_slots))

    def encode_audio(self, waveform: Tensor, segment_batch: int = 24) -> Tensor:
        """Return (B, S, 6, dim) audio features of (B, samples) mono sound at 16 kHz.

        Raises:
            UserError: another shape, or shorter than one segment of 0.64 s.
        """
        mels = segment_mels(waveform)
        features = [self.afeat_extractor(chunk) for chunk in mels.flatten(0, 1).split(segment_batch)]
        return torch.cat(features).unflatten(0, mels.shape[:2])

    def compare(self, visual: Tensor, audio: Tensor) -> Tensor:
        """Return (B, 21) logits of the offsets from -2 to 2 s.

        Args:
            visual, audio: (B, 14, 8, dim) and (B, 14, 6, dim), the same 14 segments of both.

        Raises:
            UserError: another number of segments; the positions were learned for 14.
        """
        for name, features in (("visual", visual), ("audio", audio)):
            if features.shape[1] != SEGMENTS_COMPARED:
                raise UserError(f"{name} features have {counted(features.shape[1], 'segment')}, expected "
                                f"{SEGMENTS_COMPARED} (4.8 s)")
        return self.transformer(self.vproj(visual).flatten(1, 2), self.aproj(audio).flatten(1, 2))

    def load_published(self, state_dict: Mapping[str, Tensor]) -> SynchformerAV:
        """Load all 513 tensors of the published file and return self.

        Raises:
            UserError: missing or unexpected keys, or other shapes; names them.
        """
        load_strict_(self, state_dict, "audio-visual Synchformer")
        return self
