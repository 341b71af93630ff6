"""A generator that several processes train together: whole in each of them (DDP), or shared among them (FSDP2)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from selva.data.dataset import Batch
from selva.models.generator import Generator
from selva.training.config import ObjectiveConfig
from selva.training.objective import NoiseSample, flow_loss
from selva.utils.distributed import World

BUCKET_MB = 100  # of gradients that DDP sends at once, while the backward pass goes on


class FlowObjective(nn.Module):
    """The objective as a module, for the wrappers that several processes need around whatever computes a loss."""

    def __init__(self, generator: Generator, config: ObjectiveConfig, precision: torch.dtype) -> None:
        super().__init__()
        self.generator, self.config, self.precision = generator, config, precision

    def forward(self, batch: Batch, noise: NoiseSample) -> Tensor:
        """Return the (B,) losses of a batch, see :func:`selva.training.objective.flow_loss`."""
        return flow_loss(self.generator, batch, noise, self.config, self.precision)


class ParallelObjective:
    """The objective of one process among many.

    Args:
        shard: "none" or "fsdp2". With one process there is nothing to share.
    """

    def __init__(
        self, generator: Generator, config: ObjectiveConfig, precision: torch.dtype, world: World, shard: str = "none"
    ) -> None:
        self.generator, self.is_sharded = generator, shard == "fsdp2" and world.size > 1
        self.module: nn.Module = FlowObjective(generator, config, precision)
        if self.is_sharded:
            _shard_(self.module, generator, precision)
        elif world.size > 1:
            from torch.nn.parallel import DistributedDataParallel

            self.module = DistributedDataParallel(
                self.module, broadcast_buffers=False, gradient_as_bucket_view=True, bucket_cap_mb=BUCKET_MB)

    def __call__(self, batch: Batch, noise: NoiseSample) -> Tensor:
        """Return the (B,) losses of a part of a batch."""
        return self.module(batch, noise)

    @contextmanager
    def gradients_stay(self, here: bool) -> Iterator[None]:
        """Leave the gradients of the block in this process, if ``here``, as more are to be added to them."""
        if self.is_sharded:
            self.module.set_requires_gradient_sync(not here)  # pyright: ignore[reportCallIssue]  -- of FSDPModule
            yield
        elif here and isinstance(self.module, nn.parallel.DistributedDataParallel):
            with self.module.no_sync():
                yield
        else:
            yield


def _shard_(objective: nn.Module, generator: Generator, precision: torch.dtype) -> None:
    """Share the parameters of a generator among all processes, in place: float32 where they lie and are updated.

    Blocks and projections are gathered and computed in ``precision``; gradients are summed in float32. What is small
    and sensitive (latent statistics, empty features, position and time embeddings) is gathered in float32.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    device = generator.latent_mean.device
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    # Inputs keep their types, as under autocast alone: rotations are float32.
    half = MixedPrecisionPolicy(
        param_dtype=None if precision == torch.float32 else precision, reduce_dtype=torch.float32,
        cast_forward_inputs=False)
    whole = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    parts = [
        *generator.joint_blocks, *generator.fused_blocks, generator.audio_input_proj, generator.clip_input_proj,
        generator.sync_input_proj, generator.text_input_proj, generator.global_cond_mlp, generator.final_layer,
    ]
    for part in parts:
        fully_shard(part, mesh=mesh, mp_policy=half)
    # Without it, what is gathered at the root stays so after a validation: the averages, for the next step of training.
    fully_shard(objective, mesh=mesh, mp_policy=whole, reshard_after_forward=True)


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor that may be shared, gathered from all processes, which have to ask together."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # pyright: ignore[reportAttributeAccessIssue]


def fill_(tensor: Tensor, value: Tensor) -> None:
    """Fill a tensor that may be shared with a whole one, which is the same in every process."""
    if hasattr(tensor, "to_local"):
        from torch.distributed.tensor import distribute_tensor

        mesh, placements = tensor.device_mesh, tensor.placements  # pyright: ignore[reportAttributeAccessIssue]
        value = distribute_tensor(value.to(tensor.device), mesh, placements)
    tensor.copy_(value)
