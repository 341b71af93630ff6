"""The plain way, to measure against: the networks and the loop as one writes them first.

After the description of the published trainer (docs/fidelity.md): the whole model and the adapter in one dtype,
conditions projected at every step, a host synchronisation per step, two passes for guidance, the adapter not merged,
attention written out with einsum in the video encoder, convolutions along the tokens between transposes, activations of
the vocoder in three separate passes. At every start all weights are read into memory, CLIP as a whole, and every prompt
and every sound is encoded again. A video is decoded as a whole before its frames are chosen.

Functions of our modules' weights, so both ways compute the same thing from the same numbers; none of our forward passes
is called. CLIP is open_clip's network either way.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from selva.media import resize_frame, select_frames
from selva.models.blocks import (
    ConvMLP,
    FusedBlock,
    GatedMLP,
    JointBlock,
    Stream,
    nearest_index,
    rotary_table,
    time_frequencies,
)
from selva.models.clip_t5 import IMAGE_MEAN, IMAGE_STD, build_clip
from selva.models.config import ClipConfig
from selva.models.generator import Generator
from selva.models.synchformer import DividedAttention, DividedBlock, VisualTrunk
from selva.models.textsynch import TextCrossBlock, TextSynch
from selva.models.vae import (
    LOG_VARIANCE_RANGE,
    VAE,
    Level,
    ResidualBlock,
    limit,
    magnitude_silu,
    magnitude_sum,
    pixel_norm,
)
from selva.models.vocoder import AMPBlock, AntiAliasedActivation, Vocoder, antialias_filter
from selva.sequence import CLIP_FPS, SYNC_FPS, SYNC_SEGMENT_FRAMES, SYNC_SEGMENT_STEP, SYNC_TOKENS_PER_SEGMENT

RMS_EPS = torch.finfo(torch.float32).eps

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def each(modules: Iterable[nn.Module], kind: type[ModuleT]) -> Iterator[ModuleT]:
    """Yield modules that are all of one class, which a list of modules does not say."""
    for module in modules:
        assert isinstance(module, kind), type(module)
        yield module


# ---------------------------------------------------------------------------------------------------------------
# generator
# ---------------------------------------------------------------------------------------------------------------


class PlainLoRALinear(nn.Module):
    """W x + b + B (A x), everything in one dtype, never merged."""

    def __init__(self, linear: nn.Linear, rank: int) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.lora_A = nn.Parameter(torch.empty(rank, linear.in_features).to(linear.weight))
        self.lora_B = nn.Parameter(torch.zeros(linear.out_features, rank).to(linear.weight))
        nn.init.kaiming_uniform_(self.lora_A, a=5**0.5)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias) + F.linear(F.linear(x, self.lora_A), self.lora_B)


def wrap_plainly_(generator: Generator, suffix: str, rank: int) -> list[nn.Parameter]:
    """Wrap all linear layers whose name ends with ``suffix``, freeze the rest and return the trainable parameters."""
    generator.requires_grad_(False)
    names = [n for n, m in generator.named_modules() if n.endswith(suffix) and isinstance(m, nn.Linear)]
    for name in names:
        parent, _, child = name.rpartition(".")
        owner = generator.get_submodule(parent)
        setattr(owner, child, PlainLoRALinear(getattr(owner, child), rank))
    return [p for p in generator.parameters() if p.requires_grad]


def conv(layer: nn.Conv1d, x: Tensor) -> Tensor:
    """Return a convolution along the tokens of (B, tokens, channels)."""
    return F.conv1d(x.transpose(1, 2), layer.weight, layer.bias, padding=layer.padding[0]).transpose(1, 2)


def linear_or_conv(layer: nn.Module, x: Tensor) -> Tensor:
    if isinstance(layer, nn.Conv1d):
        return conv(layer, x)
    if isinstance(layer, PlainLoRALinear):
        return layer(x)
    assert isinstance(layer, nn.Linear), type(layer)
    return F.linear(x, layer.weight, layer.bias)


def gated(mlp: GatedMLP | ConvMLP, x: Tensor) -> Tensor:
    return linear_or_conv(mlp.w2, F.silu(linear_or_conv(mlp.w1, x)) * linear_or_conv(mlp.w3, x))


def projected(layers: nn.Sequential, x: Tensor) -> Tensor:
    for layer in layers:
        if isinstance(layer, nn.Conv1d | nn.Linear):
            x = linear_or_conv(layer, x)
        else:  # an MLP, or an activation without weights
            x = gated(layer, x) if isinstance(layer, GatedMLP | ConvMLP) else layer(x)
    return x


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    x = x.float()
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + RMS_EPS) * weight.float()


def rotate(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    cos, sin = table
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)


def qkv_of(stream: Stream, x: Tensor, table: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor, Tensor]:
    attn = stream.attn
    q, k, v = rearrange(linear_or_conv(attn.qkv, x), "b n (h d j) -> j b h n d", h=attn.num_heads, j=3)
    q, k = rms_norm(q, attn.q_norm.weight), rms_norm(k, attn.k_norm.weight)
    if table is not None:
        q, k = rotate(q, table), rotate(k, table)
    return q.to(v.dtype), k.to(v.dtype), v


def modulation_of(stream: Stream, c: Tensor) -> tuple[Tensor, ...]:
    c = linear_or_conv(stream.adaLN_modulation[1], F.silu(c))
    return c.chunk(2 if stream.pre_only else 6, dim=-1)


def norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=1e-5)


def after_attention(stream: Stream, x: Tensor, attended: Tensor, modulation: Sequence[Tensor]) -> Tensor:
    gate_attn, shift, scale, gate_ffn = modulation
    x = x + linear_or_conv(stream.linear1, attended) * gate_attn
    return x + gated(stream.ffn, norm(x) * (1 + scale) + shift) * gate_ffn


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return rearrange(F.scaled_dot_product_attention(q, k, v), "b h n d -> b n (h d)")


def plain_conditions(model: Generator, clip_f: Tensor, sync_f: Tensor, text_f: Tensor) -> tuple[Tensor, ...]:
    """Return all that depends on the conditions only: clip, sync, text tokens and the pooled vector."""
    dtype = model.clip_cond_proj.weight.dtype
    clip_f, sync_f, text_f = clip_f.to(dtype), sync_f.to(dtype), text_f.to(dtype)
    segments = sync_f.unflatten(1, (-1, SYNC_TOKENS_PER_SEGMENT)) + model.sync_pos_emb.to(dtype)
    sync = projected(model.sync_input_proj, segments.flatten(1, 2))
    sync = sync[:, nearest_index(model.sync_seq_len, model.latent_seq_len, sync.device)]
    clip, text = projected(model.clip_input_proj, clip_f), projected(model.text_input_proj, text_f)
    pooled = linear_or_conv(model.clip_cond_proj, clip.mean(1)) + linear_or_conv(model.text_cond_proj, text.mean(1))
    return clip, sync, text, gated(model.global_cond_mlp, pooled)


def plain_velocity(model: Generator, latent: Tensor, t: Tensor, conditions: tuple[Tensor, ...]) -> Tensor:
    """Return the velocity (B, N, C)."""
    clip, sync, text, pooled = conditions
    dtype = clip.dtype
    head_dim = model.config.hidden_dim // model.config.num_heads
    table = rotary_table(model.latent_seq_len, head_dim, 1.0, latent.device)
    clip_table = rotary_table(model.clip_seq_len, head_dim, model.latent_seq_len / model.clip_seq_len, latent.device)
    angle = t.float()[:, None] * time_frequencies(model.t_embed.frequency_dim // 2, model.t_embed.scale, t.device)
    embedding = torch.cat((angle.cos(), angle.sin()), dim=-1).to(dtype)
    first, _, second = model.t_embed.mlp
    time = linear_or_conv(second, F.silu(linear_or_conv(first, embedding)))
    x = projected(model.audio_input_proj, latent.to(dtype))
    global_c = (time + pooled)[:, None]
    extended_c = global_c + sync
    for block in each(model.joint_blocks, JointBlock):
        streams = ((block.latent_block, x, extended_c, table), (block.clip_block, clip, global_c, clip_table),
                   (block.text_block, text, global_c, None))
        modulations = [modulation_of(stream, c) for stream, _, c, _ in streams]
        parts = [
            qkv_of(stream, norm(y) * (1 + m[1]) + m[0], rotary)
            for (stream, y, _, rotary), m in zip(streams, modulations, strict=True)
        ]
        q, k, v = (torch.cat(p, dim=2) for p in zip(*parts, strict=True))
        outs = attention(q, k, v).split([y.shape[1] for _, y, _, _ in streams], dim=1)
        x = after_attention(block.latent_block, x, outs[0], modulations[0][2:])
        if not block.pre_only:
            clip = after_attention(block.clip_block, clip, outs[1], modulations[1][2:])
            text = after_attention(block.text_block, text, outs[2], modulations[2][2:])
    for block in each(model.fused_blocks, FusedBlock):
        m = modulation_of(block, extended_c)
        attended = attention(*qkv_of(block, norm(x) * (1 + m[1]) + m[0], table))
        x = after_attention(block, x, attended, m[2:])
    shift, scale = linear_or_conv(model.final_layer.adaLN_modulation[1], F.silu(global_c)).chunk(2, dim=-1)
    return conv(model.final_layer.conv, norm(x) * (1 + scale) + shift)


# ---------------------------------------------------------------------------------------------------------------
# training and sampling
# ---------------------------------------------------------------------------------------------------------------


def plain_training(
    model: Generator, parameters: Sequence[nn.Parameter], clips: Sequence[dict[str, Tensor]], batch_size: int, lr: float
) -> Iterator[float]:
    """Train and yield the loss of every step; clips of equal length, drawn with replacement.

    Args:
        clips: each with x1 (N, C), clip (T, ·), sync (S, ·), text (77, ·).
    """
    optimizer = torch.optim.AdamW(parameters, lr=lr)
    device, dtype = model.latent_mean.device, parameters[0].dtype
    while True:
        chosen = [clips[i] for i in torch.randint(len(clips), (batch_size,)).tolist()]
        batch = {name: torch.stack([clip[name] for clip in chosen]).to(device, dtype) for name in chosen[0]}
        x1 = (batch["x1"] - model.latent_mean) / model.latent_std
        t = torch.rand(batch_size, device=device).to(dtype)
        x0 = torch.randn_like(x1)
        mix = t[:, None, None]
        conditions = plain_conditions(model, batch["clip"], batch["sync"], batch["text"])
        velocity = plain_velocity(model, (1 - mix) * x0 + mix * x1, t, conditions)
        loss = F.mse_loss(velocity, x1 - x0)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        yield loss.item()


@torch.no_grad()
def plain_sampling(
    model: Generator, features: tuple[Tensor, Tensor, Tensor], noise: Tensor, num_steps: int, cfg_strength: float
) -> Tensor:
    """Return latents (B, N, C) by Euler steps, two passes each."""
    conditions = plain_conditions(model, *features)
    empty = plain_conditions(model, *model.empty_features(len(noise)))
    x = noise
    times = torch.linspace(0, 1, num_steps + 1)
    for start, end in pairwise(times):
        t = start.to(noise.device).expand(len(noise))
        v_cond = plain_velocity(model, x, t, conditions).float()
        v_empty = plain_velocity(model, x, t, empty).float()
        x = x + (end - start) * (cfg_strength * v_cond + (1 - cfg_strength) * v_empty)
    return x * model.latent_std + model.latent_mean


# ---------------------------------------------------------------------------------------------------------------
# video encoder
# ---------------------------------------------------------------------------------------------------------------


def einsum_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("b i d, b j d -> b i j", q * q.shape[-1] ** -0.5, k)
    return torch.einsum("b i j, b j d -> b i d", scores.softmax(-1), v)


def divided_attention(attn: DividedAttention, x: Tensor, grouping: str, **sizes: int) -> Tensor:
    q, k, v = rearrange(linear_or_conv(attn.qkv, x), "n t (j h c) -> j (n h) t c", j=3, h=attn.num_heads)
    of_class = einsum_attention(q[:, :1], k, v)
    inner = [rearrange(y[:, 1:], f"m (f p) c -> {grouping}", **sizes) for y in (q, k, v)]
    repeats = inner[0].shape[0] // q.shape[0]
    with_class = [
        torch.cat((y[:, :1].repeat_interleave(repeats, dim=0), part), dim=1)
        for y, part in zip((k, v), inner[1:], strict=True)
    ]
    of_patches = rearrange(einsum_attention(inner[0], *with_class), f"{grouping} -> m (f p) c", **sizes)
    out = rearrange(torch.cat((of_class, of_patches), dim=1), "(n h) t c -> n t (h c)", h=attn.num_heads)
    return linear_or_conv(attn.proj, out)


def layer_norm(layer: nn.LayerNorm, x: Tensor) -> Tensor:
    return F.layer_norm(x, layer.normalized_shape, layer.weight, layer.bias, layer.eps)


def plain_patch_tokens(trunk: VisualTrunk, segments: Tensor) -> Tensor:
    config = trunk.config
    sizes = {"f": config.num_slots, "p": config.num_patches}
    patches = trunk.patch_embed_3d["proj"](segments.transpose(1, 2)).flatten(2).mT
    place = (trunk.pos_embed[:, None, 1:] + trunk.temp_embed[:, :, None]).flatten(1, 2)
    class_token = (trunk.cls_token + trunk.pos_embed[:, :1]).expand(len(patches), -1, -1)
    x = torch.cat((class_token, patches + place), dim=1)
    for block in each(trunk.blocks, DividedBlock):
        x = x + divided_attention(block.timeattn, layer_norm(block.norm3, x), "(m p) f c", **sizes)
        x = x + divided_attention(block.attn, layer_norm(block.norm1, x), "(m f) p c", **sizes)
        hidden = F.gelu(linear_or_conv(block.mlp.fc1, layer_norm(block.norm2, x)))
        x = x + linear_or_conv(block.mlp.fc2, hidden)
    return layer_norm(trunk.norm, x[:, 1:])


def plain_aggregation(trunk: VisualTrunk, tokens: Tensor) -> Tensor:
    """Return (n, f, dim) through a whole encoder layer, of which only the first row is used."""
    layer = trunk.spatial_attn_agg
    x = rearrange(tokens, "n (f p) d -> (n f) p d", f=trunk.config.num_slots)
    x = torch.cat((layer.cls_token.expand(len(x), -1, -1).to(x.dtype), x), dim=1)
    y = layer_norm(layer.norm1, x)
    x = x + layer.self_attn(y, y, y, need_weights=False)[0]
    x = x + linear_or_conv(layer.linear2, F.gelu(linear_or_conv(layer.linear1, layer_norm(layer.norm2, x))))
    return rearrange(x[:, 0], "(n f) d -> n f d", f=trunk.config.num_slots)


def plain_text_attention(block: TextCrossBlock, x: Tensor, text: Tensor, mask: Tensor) -> Tensor:
    attn = block.attn
    q = rearrange(linear_or_conv(attn.q_proj, x), "n t (h c) -> n h t c", h=attn.num_heads)
    k, v = rearrange(linear_or_conv(attn.kv_proj, text), "n l (h c j) -> j n h l c", h=attn.num_heads, j=2)
    q, k = rms_norm(q, attn.q_norm.weight).to(v.dtype), rms_norm(k, attn.k_norm.weight).to(v.dtype)
    scores = torch.einsum("n h t c, n h l c -> n h t l", q * q.shape[-1] ** -0.5, k)
    weights = scores.masked_fill(~mask[:, None, None], -torch.inf).softmax(-1)
    attended = rearrange(torch.einsum("n h t l, n h l c -> n h t c", weights, v), "n h t c -> n t (h c)")
    x = x + layer_norm(block.norm1, linear_or_conv(block.linear1, attended))
    return x + gated(block.ffn, layer_norm(block.norm2, x))


@torch.no_grad()
def plain_sync_features(encoder: TextSynch, frames: Tensor, text: Tensor, mask: Tensor) -> Tensor:
    """Return (1, segments * 8, dim): one clip (1, F, 3, H, W) in [-1, 1], all segments at once."""
    trunk = encoder.vfeat_extractor
    starts = range(0, frames.shape[1] - SYNC_SEGMENT_FRAMES + 1, SYNC_SEGMENT_STEP)
    segments = torch.stack([frames[0, s : s + SYNC_SEGMENT_FRAMES] for s in starts])
    text, mask = encoder.prepend_supplementary(text, mask)
    first, activation, mlp = encoder.text_proj
    assert isinstance(mlp, GatedMLP)
    text = gated(mlp, activation(linear_or_conv(first, text)))
    tokens = plain_patch_tokens(trunk, segments)
    for block in each(encoder.synch_text_cross_blocks, TextCrossBlock):
        tokens = plain_text_attention(block, tokens, text.expand(len(tokens), -1, -1), mask.expand(len(tokens), -1))
    return plain_aggregation(trunk, tokens).flatten(0, 1)[None]


# ---------------------------------------------------------------------------------------------------------------
# vocoder
# ---------------------------------------------------------------------------------------------------------------


def plain_activation(layer: AntiAliasedActivation, x: Tensor) -> Tensor:
    """Return the periodic activation at twice the rate: filter up, activate, filter down, each over all samples."""
    channels = x.shape[1]
    taps = antialias_filter(x.device, x.dtype).expand(channels, 1, -1)
    x = 2 * F.conv_transpose1d(F.pad(x, (5, 5), mode="replicate"), taps, stride=2, groups=channels)[..., 15:-15]
    alpha, beta = layer.act.alpha.exp()[None, :, None], layer.act.beta.exp()[None, :, None]
    x = x + 1.0 / (beta + 1e-9) * torch.sin(x * alpha).pow(2)
    return F.conv1d(F.pad(x, (5, 6), mode="replicate"), taps, stride=2, groups=channels)


@torch.no_grad()
def plain_vocoder(vocoder: Vocoder, mel: Tensor) -> Tensor:
    """Return the waveform (B, 1, samples)."""
    count = len(vocoder.config.residual_kernels)
    x = F.conv1d(mel, vocoder.conv_pre.weight, vocoder.conv_pre.bias, padding=3)
    for stage, (up,) in enumerate(each(vocoder.ups, nn.ModuleList)):
        assert isinstance(up, nn.ConvTranspose1d) and not isinstance(up.padding, str)
        x = F.conv_transpose1d(x, up.weight, up.bias, stride=up.stride, padding=up.padding)
        total = None
        for block in each(vocoder.resblocks[stage * count : (stage + 1) * count], AMPBlock):
            y = x
            activations = list(each(block.activations, AntiAliasedActivation))
            convs = (each(layers, nn.Conv1d) for layers in (block.convs1, block.convs2))
            for first, second, conv1, conv2 in zip(activations[::2], activations[1::2], *convs, strict=True):
                z = _dilated(conv1, plain_activation(first, y))
                y = y + _dilated(conv2, plain_activation(second, z))
            total = y if total is None else total + y
        assert total is not None
        x = total / count
    x = plain_activation(vocoder.activation_post, x)
    x = F.conv1d(x, vocoder.conv_post.weight, vocoder.conv_post.bias, padding=3)
    return x.tanh() if vocoder.config.final_tanh else x.clamp(-1, 1)


def _dilated(layer: nn.Conv1d, x: Tensor) -> Tensor:
    return F.conv1d(x, layer.weight, layer.bias, padding=layer.padding, dilation=layer.dilation)


# ---------------------------------------------------------------------------------------------------------------
# files, CLIP and VAE
# ---------------------------------------------------------------------------------------------------------------


def plain_weights(paths: Sequence[Path]) -> dict[str, Tensor]:
    """Return the tensors of weight files, read into memory as a whole."""
    from safetensors.torch import load_file

    weights: dict[str, Tensor] = {}
    for path in paths:
        of_file = load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)
        weights.update(of_file)
    return weights


def plain_clip(config: ClipConfig, paths: Sequence[Path]) -> nn.Module:
    """Return the whole of CLIP: drawn at random, then overwritten by what its files hold."""
    clip = build_clip(config)
    clip.load_state_dict(plain_weights(paths), strict=False)  # the files of tiny_16k lack what no feature needs
    return clip.eval().requires_grad_(False)


@torch.no_grad()
def plain_text_features(clip: nn.Module, tokens: Tensor) -> Tensor:
    """Return (B, 77, D), each of length 1, from token ids (B, 77)."""
    embed, transformer, norm_of_tokens = map(clip.get_submodule, ("token_embedding", "transformer", "ln_final"))
    x = embed(tokens) + clip.get_parameter("positional_embedding")
    return F.normalize(norm_of_tokens(transformer(x, attn_mask=clip.get_buffer("attn_mask"))), dim=-1)


@torch.no_grad()
def plain_clip_features(clip: nn.Module, frames: Tensor) -> Tensor:
    """Return (T, D), each of length 1, from all uint8 frames (T, 3, H, W) in one pass."""
    mean, std = (torch.tensor(x, device=frames.device)[:, None, None] for x in (IMAGE_MEAN, IMAGE_STD))
    return F.normalize(clip.get_submodule("visual")((frames.float() / 255 - mean) / std), dim=-1)


def plain_frames(path: Path, clip_size: int, sync_size: int) -> tuple[Tensor, Tensor]:
    """Return the frames at 8 and at 25 per second, (T, 3, H, W) and (F, 3, H, W) uint8, of a whole decoded video."""
    import av

    with av.open(str(path)) as container:
        decoded = [(frame.time, frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]
    times = [time for time, _ in decoded]
    pictures = torch.stack([torch.from_numpy(picture).permute(2, 0, 1) for _, picture in decoded])
    clip, sync = (
        torch.stack([resize_frame(pictures[index], size) for index in select_frames(times, fps)])
        for fps, size in ((CLIP_FPS, clip_size), (SYNC_FPS, sync_size))
    )
    return clip, sync


@torch.no_grad()
def plain_latents(vae: VAE, mel: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and deviation of the posterior, each (B, N, C), of a log-mel spectrogram (B, bands, T)."""
    encoder = vae.encoder
    assert encoder is not None
    x = _same(encoder.conv_in, (mel - vae.data_mean) / vae.data_std)
    for level in each(encoder.down, Level):
        for block in each(level.block, ResidualBlock):
            x = limit(_plain_residual(block, x))
        if level.downsample is not None:
            x = _same(level.downsample.conv2, F.avg_pool1d(_same(level.downsample.conv1, x), 2))
    x = _plain_residual(encoder.mid.block_1, x)
    attn = encoder.mid.attn_1
    q, k, v = pixel_norm(rearrange(_same(attn.qkv, x), "b (c j) t -> b c j t", j=3)).unbind(2)
    weights = (torch.einsum("b c i, b c j -> b i j", q, k) * q.shape[1] ** -0.5).softmax(-1)
    x = magnitude_sum(x, _same(attn.proj_out, torch.einsum("b i j, b c j -> b c i", weights, v)))
    x = limit(_plain_residual(encoder.mid.block_2, x))
    x = _same(encoder.conv_out, magnitude_silu(x)) * (1 + encoder.learnable_gain)
    mean, log_variance = x.chunk(2, dim=1)
    return mean.mT, (0.5 * log_variance.clamp(*LOG_VARIANCE_RANGE)).exp().mT


def _plain_residual(block: ResidualBlock, x: Tensor) -> Tensor:
    x = pixel_norm(x)
    branch = _same(block.conv2, magnitude_silu(_same(block.conv1, magnitude_silu(x))))
    return magnitude_sum(x if block.nin_shortcut is None else _same(block.nin_shortcut, x), branch)


def _same(layer: nn.Conv1d, x: Tensor) -> Tensor:
    return F.conv1d(x, layer.weight, padding=layer.padding)
