"""Measurement of two ways of doing one thing: interleaved, medians, peak memory, and the machine's own ceiling."""

from __future__ import annotations

import ctypes
import functools
import gc
import json
import math
import mmap
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import accumulate, groupby
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from selva.models import onednn
from selva.utils.device import peak_memory_bytes

MEMORY_POLL_SEC = 0.002
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's mallopt
ROW_SEC = 20.0  # a row of the table is not repeated beyond this, but always LEAST_REPEATS times
LEAST_REPEATS = 3
CEILING_SIZE = {"cpu": 2048, "cuda": 8192, "mps": 4096}  # rows and columns of the matrices whose product is timed


@dataclass(frozen=True)
class Result:
    """One line of the table.

    Attributes:
        plain_sec, ours_sec: medians; plain_sec is None where there is nothing to compare with.
        ratio: ours over plain, from the medians.
        plain_mib, ours_mib: how far memory rose above its level before the call.
        plain_tensors_mib, ours_tensors_mib: the same of PyTorch's tensors alone, where that was asked for.
        error: relative difference of the two results. tolerance: what it may be.
        tflops: arithmetic of our way, and share: the part of the machine's measured rate that it reaches.
        amount, unit: of what the stage works on, where there are rows of several sizes: 4 clips, 8 s of sound.
    """

    stage: str
    size: str
    plain_sec: float | None
    ours_sec: float
    ratio: float | None = None
    plain_mib: float | None = None
    ours_mib: float | None = None
    plain_tensors_mib: float | None = None
    ours_tensors_mib: float | None = None
    error: float | None = None
    tolerance: float | None = None
    tflops: float | None = None
    share: float | None = None
    note: str = ""
    amount: float | None = None
    unit: str = ""

    def row(self) -> dict[str, Any]:
        return asdict(self)


class Bench:
    """Times calls on one device.

    Args:
        repeats: of each way, interleaved, fewer where a call takes long; the median counts.
        ceilings: dtype -> matrix-multiply rate in TFLOP/s.
    """

    def __init__(self, device: torch.device, repeats: int, dtype: torch.dtype) -> None:
        self.device, self.repeats, self.dtype = device, repeats, dtype
        self.ceilings = {d: matmul_rate(device, d) for d in {dtype, torch.float32}}

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def seconds(self, call: Callable[[], Any]) -> float:
        self.synchronize()
        start = time.perf_counter()
        call()
        self.synchronize()
        return time.perf_counter() - start

    def compare(
        self,
        stage: str,
        size: str,
        plain: Callable[[], Any],
        ours: Callable[[], Any],
        *,
        tolerance: float,
        error: float | None = None,
        dtype: torch.dtype | None = None,
        note: str = "",
        amount: float | None = None,
        unit: str = "",
        tensors: bool = False,
    ) -> Result:
        """Time both ways in turn, after one warm-up each; measure the rise of memory apart.

        Args:
            error: how far the two ways differ; None to compare the tensors that they return.
            dtype: of the arithmetic, where it is not that of the whole run.
            tensors: also measure the memory of tensors alone.
        """
        flops, found = count_flops(ours)
        expected = plain()
        if error is None:
            error = relative_error(found, expected)
        del found, expected
        pairs: list[tuple[float, float]] = []
        while len(pairs) < self.repeats and (len(pairs) < LEAST_REPEATS or sum(map(sum, pairs)) < ROW_SEC):
            pairs.append((self.seconds(plain), self.seconds(ours)))
        plain_sec, ours_sec = (statistics.median(times) for times in zip(*pairs, strict=True))
        tflops = flops / ours_sec / 1e12
        return Result(
            stage, size, plain_sec, ours_sec, ours_sec / plain_sec,
            plain_mib=self.memory_rise(plain), ours_mib=self.memory_rise(ours),
            plain_tensors_mib=self.tensor_rise(plain) if tensors else None,
            ours_tensors_mib=self.tensor_rise(ours) if tensors else None,
            error=error, tolerance=tolerance, tflops=tflops,
            share=tflops / self.ceilings[dtype or self.dtype] if flops else None, note=note, amount=amount, unit=unit,
        )

    def memory_rise(self, call: Callable[[], Any]) -> float:
        """Return the rise of memory in MiB during a call: the allocator's peak on CUDA, resident memory else."""
        gc.collect()
        if self.device.type == "cuda":
            return self.tensor_rise(call)
        return resident_rise(call)

    def tensor_rise(self, call: Callable[[], Any]) -> float:
        """Return the rise of the memory of tensors in MiB during a call: those it keeps and works on.

        Resident memory also holds what the C library keeps of freed tensors, and the scratch memory of libraries.
        """
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            before = torch.cuda.memory_allocated(self.device)
            call()
            self.synchronize()
            return (torch.cuda.max_memory_allocated(self.device) - before) / 2**20
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            call()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trace.json"
            profiled.export_chrome_trace(str(path))
            events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
        changes = sorted((e["ts"], e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]")
        return max(accumulate(size for _, size in changes), default=0) / 2**20


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Return the best rate in TFLOP/s of a few large matrix products, the most that this machine can do.

    By the fastest of the ways that the stages take: PyTorch's own linear layer, and oneDNN's.
    """
    size = CEILING_SIZE[device.type]
    # Through a linear layer, which on CPUs takes a faster path than a bare product for some types.
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    for multiply in 5 * (torch.nn.functional.linear, functools.partial(onednn.linear, bias=None)):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        with torch.no_grad():
            multiply(a, b)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best / 1e12


def count_flops(call: Callable[[], Any]) -> tuple[int, Any]:
    """Return the operations of the matrix products, convolutions and attention in a call, and what it returned."""
    known = {torch.ops.mkldnn._linear_pointwise: _linear_flops} if onednn.onednn_dtypes() else {}
    with FlopCounterMode(display=False, custom_mapping=known) as counter:
        result = call()
    return counter.get_total_flops(), result


def _linear_flops(x_shape: tuple[int, ...], weight_shape: tuple[int, ...], *args: Any, **kwargs: Any) -> int:
    return 2 * math.prod(x_shape) * weight_shape[0]


def resident_rise(call: Callable[[], Any]) -> float:
    """Return the largest rise in MiB of the resident memory of this process while ``call`` runs (Linux)."""
    if sys.platform != "linux":
        before = peak_memory_bytes("cpu")
        call()
        return (peak_memory_bytes("cpu") - before) / 2**20
    return_memory_at_once(True)
    peak, done = [resident_bytes()], threading.Event()
    before = peak[0]

    def watch() -> None:
        while not done.wait(MEMORY_POLL_SEC):
            peak[0] = max(peak[0], resident_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        call()
        peak[0] = max(peak[0], resident_bytes())
    finally:
        done.set()
        watcher.join()
        return_memory_at_once(False)
    return (peak[0] - before) / 2**20


def return_memory_at_once(wanted: bool) -> None:
    """Let the C library give freed tensors back to the system at once, so that resident is what is in use; or not.

    Otherwise it keeps what earlier calls freed, in pieces that fit the next call more or less. Returning costs time, so
    it is done only while memory is measured; the alternative is what the library itself comes to (mallopt(3)).
    """
    libc, threshold = ctypes.CDLL(None), 2**16 if wanted else 2**25
    if not hasattr(libc, "mallopt"):  # not glibc
        return
    libc.mallopt(M_MMAP_THRESHOLD, threshold)
    libc.mallopt(M_TRIM_THRESHOLD, 2 * threshold)
    libc.malloc_trim(0)


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * mmap.PAGESIZE


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    found, expected = found.float(), expected.float()
    return float((found - expected).norm() / expected.norm())


def markdown(results: list[Result]) -> str:
    """Return the results as a table."""
    header = ("stage", "size", "plain", "ours", "ratio", "memory plain / ours", "of it tensors", "difference",
              "of the ceiling", "")
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    for r in results:
        memory = "" if r.ours_mib is None else f"{r.ours_mib:.0f} MiB"
        memory = memory if r.plain_mib is None else f"{r.plain_mib:.0f} / {memory}"
        tensors = "" if r.ours_tensors_mib is None else f"{r.plain_tensors_mib:.0f} / {r.ours_tensors_mib:.0f} MiB"
        cells = (
            r.stage, r.size, clock(r.plain_sec), clock(r.ours_sec), f"**{r.ratio:.2f}**" if r.ratio else "", memory,
            tensors, f"{r.error:.1e}" if r.error is not None else "",
            f"{r.share:.0%}" if r.share is not None else "", r.note,
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def growth_table(results: list[Result]) -> str:
    """Return a table of how time and memory grow between the smallest and the largest amount of a stage."""
    lines = ["| stage | from, to | work | time plain | time ours | memory plain | memory ours |", "|---" * 7 + "|"]
    sized = [r for r in results if r.amount is not None]
    for (stage, unit), group in groupby(sorted(sized, key=_family), key=_family):
        rows = sorted(group, key=_amount)
        first, last = rows[0], rows[-1]
        low, high = _amount(first), _amount(last)
        if low == high:
            continue
        pairs = ((first.plain_sec, last.plain_sec), (first.ours_sec, last.ours_sec),
                 (first.plain_mib, last.plain_mib), (first.ours_mib, last.ours_mib))
        factors = [f"× {b / a:.2f}" if a and b else "" for a, b in pairs]
        sizes = f"{low:g}, {high:g} {unit}"
        lines.append("| " + " | ".join((stage, sizes, f"× {high / low:g}", *factors)) + " |")
    return "\n".join(lines) if len(lines) > 2 else ""


def _family(result: Result) -> tuple[str, str]:
    return result.stage, result.unit


def _amount(result: Result) -> float:
    assert result.amount is not None
    return result.amount


def clock(seconds: float | None) -> str:
    if seconds is None:
        return ""
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"
