"""CUDA tensors without a GPU: they have a device, a shape and a type, and no numbers (PyTorch's ``FakeTensorMode``).

Most operations check that their tensors are on one device, and nothing can be read back, as there is nothing to read.
:class:`HostWaits` refuses the rest: convolutions of two devices, and what makes the host wait for the device.
"""

from __future__ import annotations

import itertools
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, contextmanager

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CUDA = torch.device("cuda", 0)
needs_cuda_build = pytest.mark.skipif(
    torch.version.cuda is None, reason="CUDA tensors, even fake ones, need a PyTorch that was built for CUDA")


class HostWaited(AssertionError):
    """The host would have waited for the device."""


class HostWaits(TorchDispatchMode):
    """Raises :class:`HostWaited` for copies to the host and for two devices in one operation.

    Where ``strict`` is set, also for copies to the device that wait.

    Those are copies from memory that is not pinned, and indices on the host. They are fine while something is set up.
    Numbers that are read from tensors of the host, which costs nothing, are 0.1 and 0.5 in turn.
    """

    def __init__(self) -> None:
        super().__init__()
        self.strict = False
        self.numbers = itertools.cycle((0.1, 0.5))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default and not args[0].is_cuda:
            return next(self.numbers)
        if func is torch.ops.aten._fused_adamw_.tensor_lr:  # fake tensors know it with a number only
            assert kwargs["lr"].is_cuda and kwargs["lr"].dtype == torch.float32, kwargs["lr"]
            func, kwargs = torch.ops.aten._fused_adamw_.default, {**kwargs, "lr": 0.1}
        result = func(*args, **kwargs)
        name = str(func)
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        made = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        from_device = any(x.is_cuda for x in given)
        if from_device and not all(x.is_cuda for x in made):
            raise HostWaited(f"{name} brings numbers back to the host")
        on_host = [x for x in given if not x.is_cuda and x.dim()]  # a number without an axis travels with the kernel
        if from_device and on_host and (self.strict or not any(word in name for word in ("copy", "index"))):
            raise HostWaited(f"{name} takes {tuple(on_host[0].shape)} of the host to numbers of the device")
        to_device = "_to_copy" in name and any(x.is_cuda for x in made) and not from_device
        if self.strict and to_device and not kwargs.get("non_blocking"):
            raise HostWaited(f"{name} to the device waits; see to_device")
        return result


def on_device(build: Callable[[], nn.Module]) -> nn.Module:
    """Return a network, made without memory and then given fake one on the device."""
    with fake_tensor.unset_fake_temporarily(), torch.device("meta"):
        module = build()
    for part in module.modules():
        for name, x in part.named_parameters(recurse=False):
            value = torch.empty(x.shape, dtype=x.dtype, device=CUDA)
            part.register_parameter(name, nn.Parameter(value, requires_grad=x.requires_grad))
        for name, x in part.named_buffers(recurse=False):
            setattr(part, name, torch.empty(x.shape, dtype=x.dtype, device=CUDA))
    return module


@torch.no_grad()
def backward(loss: Tensor) -> None:
    """Do what ``loss.backward()`` does, node by node: PyTorch's own engine wants the device to be there."""
    waiting, seen, to_visit = Counter(), {loss.grad_fn}, [loss.grad_fn]
    while to_visit:
        for node, _ in to_visit.pop().next_functions:
            if node is None:
                continue
            waiting[node] += 1
            if node not in seen:
                seen.add(node)
                to_visit.append(node)
    grads, ready = {loss.grad_fn: {0: torch.ones_like(loss)}}, [loss.grad_fn]
    while ready:
        node = ready.pop()
        given = grads.pop(node, {})
        if hasattr(node, "variable"):
            for grad in given.values():
                leaf = node.variable
                assert grad.device == leaf.device and grad.shape == leaf.shape, (grad.device, leaf.device)
                leaf.grad = grad if leaf.grad is None else leaf.grad + grad
            continue
        inputs = [given.get(i) for i in range(len(node._input_metadata))]
        call = node.apply if isinstance(node, torch.autograd.function.BackwardCFunction) else node
        results = call(*inputs) if given else [None] * len(node.next_functions)
        results = results if isinstance(results, tuple | list) else (results,)
        count = len(node.next_functions)  # inputs that are no tensors come last in all our functions
        assert not any(x is not None for x in results[count:]), node
        for (following, place), grad in zip(node.next_functions, results[:count], strict=True):
            if following is None:
                continue
            if grad is not None:
                expected = following._input_metadata[place]
                if grad.shape != expected.shape:  # of what was broadcast
                    grad = grad.sum_to_size(expected.shape)
                grad = grad.to(expected.dtype)
                known = grads.setdefault(following, {})
                known[place] = known[place] + grad if place in known else grad
            waiting[following] -= 1
            if not waiting[following]:
                ready.append(following)


@contextmanager
def fake_cuda():
    """Yield the :class:`HostWaits` of a block in which there seems to be a GPU."""
    forget_cached()
    with ExitStack() as stack, pytest.MonkeyPatch.context() as patch:
        # Autocast and loss scaling ask for a device that they would then not use.
        patch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
        patch.setattr(torch.cuda, "is_bf16_supported", lambda *_args, **_kw: True)
        # Without numbers there is nothing for cuDNN to choose by.
        patch.setattr(torch._C, "_select_conv_backend", lambda *_args, **_kw: None)
        patch.setattr(torch._C, "_conv_determine_backend_memory_format", lambda *_args: torch.contiguous_format)
        patch.setattr(Tensor, "pin_memory", lambda self: self.clone())  # whoever pins may copy without waiting
        patch.setattr(Tensor, "backward", lambda self: backward(self))
        stack.enter_context(torch.random.fork_rng(devices=[]))
        stack.enter_context(FakeTensorMode())
        yield stack.enter_context(HostWaits())
    forget_cached()


def forget_cached() -> None:
    """Empty the caches of all functions of the product: a table without numbers must not get into another test."""
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "selva":
            for value in vars(module).values():
                if hasattr(value, "cache_clear"):
                    value.cache_clear()
