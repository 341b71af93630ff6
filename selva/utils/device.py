"""Devices, number formats and the memory that a run has used."""

from __future__ import annotations

import logging
import platform
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any

from selva.utils import torchrun
from selva.utils.errors import UsageError, UserError

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

# Where a fused AdamW leaves an update out by a flag on the device; that of MPS ignores the flag (pytorch 186360).
FUSED_DEVICES = ("cpu", "cuda")
PRECISIONS = ("bf16", "fp16", "fp32")
PRECISION_CHOICES = ("auto", *PRECISIONS)
PRECISION_HELP = ("number format of the networks; auto: bf16 where the device multiplies it natively, fp16 on older "
                  "NVIDIA GPUs, fp32 elsewhere")
BASE_DTYPE_CHOICES = ("auto", "bf16")
BASE_DTYPE_HELP = ("how the base model's matrices lie in memory; bf16: half the memory where the precision is fp32, "
                   "each matrix is made float32 only while it multiplies; auto: in the precision")
GRAPH_CHOICES = ("auto", "on", "off")

# Of MPS and drivers, Linux, Windows, which raise a plain RuntimeError.
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")
ROOMY_BYTES = 15.5e9  # a GPU sold with 16 GB, of which a part is taken
_BF16_CAPABILITY = (8, 0)  # CUDA compute capability from which bf16 is native
_PROBE_SIZE, _PROBE_SEC = 128, 0.01  # matrices that are multiplied, and for how long, to see what a format costs
_STANDS_FOR_GPU: ContextVar[bool] = ContextVar("stands_for_gpu", default=False)


def computes_on_cpu(tensor: torch.Tensor) -> bool:
    """Return True where a way of computing that is made for CPUs should be taken for a tensor."""
    return tensor.device.type == "cpu" and not _STANDS_FOR_GPU.get()


@contextmanager
def standing_for_gpu() -> Iterator[None]:
    """Have everything within the block computed in the ways that a GPU takes, also on the CPU: to measure memory."""
    token = _STANDS_FOR_GPU.set(True)
    try:
        yield
    finally:
        _STANDS_FOR_GPU.reset(token)


def peak_memory_bytes(device: Any) -> int:
    """Return the highest memory use so far: the allocator's on CUDA, else the resident set of this process."""
    if getattr(device, "type", device) == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device)
    try:  # of the program that runs now; what getrusage tells was handed on by the process that started it
        lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        pass
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def begin_peak_memory(device: torch.device) -> None:
    """Let the highest use of memory begin anew, as for another run of this process; on CUDA only."""
    import torch

    if device.type == "cuda" and torch.cuda.is_initialized():  # before that nothing was used, and the call would fail
        torch.cuda.reset_peak_memory_stats(device)


def holds_all_networks(device: torch.device) -> bool:
    """Return True for a device with room for all networks of the largest model at once: a CPU, a GPU of 16 GB."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory >= ROOMY_BYTES
    return device.type == "cpu"


def is_out_of_memory(error: BaseException) -> bool:
    """Return True if an error says that a device, or the machine, has no memory left."""
    torch = sys.modules.get("torch")  # an error of PyTorch can only come from a PyTorch that was imported
    if isinstance(error, MemoryError) or (torch is not None and isinstance(error, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in OUT_OF_MEMORY)


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a tensor of the CPU on a device; the host does not wait for the copy where that is safe.

    That is from pinned memory to CUDA, whose allocator keeps a buffer until its copy is done. On MPS a copy that nobody
    waits for reads memory that may be somebody else's by then (pytorch 189690).
    """
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def dtype_of(precision: str) -> torch.dtype:
    """Return the PyTorch type of one of ``PRECISIONS``.

    Raises:
        ValueError: another name.
    """
    import torch

    if precision not in PRECISIONS:
        raise UserError(f"precision is {precision!r}, expected one of {', '.join(PRECISIONS)}")
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[precision]


def stored_dtype(base_dtype: str, precision: str) -> torch.dtype:
    """Return the type to store frozen matrices in, of one of ``BASE_DTYPE_CHOICES`` and a resolved precision."""
    return dtype_of(precision if base_dtype == "auto" else base_dtype)


def resolve_precision(name: str, device: torch.device) -> str:
    """Return the precision to compute in; a line in the log says which and why, a warning that it is slow here.

    Args:
        name: one of ``PRECISION_CHOICES``; "auto" chooses what is fast on ``device``.

    Raises:
        ValueError: another name.
    """
    if name not in PRECISION_CHOICES:
        raise UserError(f"precision is {name!r}, expected one of {', '.join(PRECISION_CHOICES)}")
    best, reason = native_precision(device)
    if name == "auto":
        log.info("precision %s: %s", best, reason)
        return best
    if device.type == "cpu" and name != "fp32" and best == "fp32":
        log.warning("--precision %s: %s; a product of matrices takes %.1f times as long in it (measured). "
                    "--precision auto computes in fp32 here; %s needs less memory", name, reason, _slowdown(name), name)
    return name


def native_precision(device: torch.device) -> tuple[str, str]:
    """Return the shortest number format that a device multiplies at full speed, and the reason in words."""
    import torch

    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        which = f"compute capability {'.'.join(map(str, capability))}"
        if capability >= _BF16_CAPABILITY:
            return "bf16", f"native on this GPU ({which})"
        return "fp16", f"this GPU ({which}) has no bf16"
    if device.type == "cpu":
        if _cpu_has_bf16():
            return "bf16", "native on this CPU"
        return "fp32", "this CPU has no instructions for half precision"
    return "fp32", f"nothing is known of half precision on {device.type}"


def _cpu_has_bf16() -> bool:
    """Return True where the CPU has AVX512-BF16 or AMX, or their Arm equivalent, and PyTorch uses it."""
    import torch

    if platform.machine().lower() in ("arm64", "aarch64"):
        supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
        return torch.backends.mkldnn.is_available() and supported is not None and bool(supported())
    # PyTorch's own choice, so that ATEN_CPU_CAPABILITY counts; the question itself has no public name.
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    return torch.backends.cpu.get_cpu_capability().startswith("AVX512") and bool(supported())


def _slowdown(precision: str) -> float:
    """Return the time that a product of matrices takes on the CPU relative to float32, measured for a moment."""
    import torch

    def seconds(dtype: torch.dtype) -> float:
        matrix, taken = torch.ones(_PROBE_SIZE, _PROBE_SIZE, dtype=dtype), []
        while len(taken) < 3 or sum(taken) < _PROBE_SEC:  # the first one loads what it needs
            start = time.perf_counter()
            torch.mm(matrix, matrix)
            taken.append(time.perf_counter() - start)
        return min(taken)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # several threads wait for each other where other programs run
    try:
        return seconds(dtype_of(precision)) / seconds(torch.float32)
    finally:
        torch.set_num_threads(threads)


def resolve_device(name: str) -> torch.device:
    """Return the device of that name; "auto" prefers CUDA, then MPS, then the CPU.

    Under torchrun "cuda" is the device of this process. On CUDA, float32 convolutions are computed in float32 from then
    on: PyTorch would round their inputs to TF32's 10 bits, and features would not be those that models were trained on.

    Raises:
        UsageError: the name is unknown, or this machine has no such device.
    """
    import torch

    if torch.cuda.is_available():
        torch.backends.cudnn.allow_tf32 = False
    if name in ("auto", "cuda") and torch.cuda.is_available():
        return torch.device("cuda", torchrun.local_rank())
    if name == "auto":
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"--device {name}: unknown, expected auto, cpu, cuda, cuda:N or mps") from error
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not available.get(device.type, False):
        raise UsageError(f"--device {name}: there is no such device here; try --device auto")
    return device
