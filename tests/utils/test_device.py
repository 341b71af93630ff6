"""The number format that a device computes in and the reason that is given; copies that nobody waits for."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from selva.utils import device as module
from selva.utils.device import native_precision, resolve_device, resolve_precision, to_device

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]


def make_cpu(monkeypatch, *, capability: str, bf16: bool, machine: str = "x86_64") -> None:
    monkeypatch.setattr(module.platform, "machine", lambda: machine)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bf16, raising=False)


@pytest.mark.parametrize("capability, bf16, expected", [
    ("AVX512", True, "bf16"), ("AVX512", False, "fp32"), ("AVX2", True, "fp32"), ("DEFAULT", False, "fp32")])
def test_a_cpu_computes_in_bf16_only_where_it_is_native(monkeypatch, caplog, capability, bf16, expected):
    make_cpu(monkeypatch, capability=capability, bf16=bf16)
    with caplog.at_level(logging.INFO):
        assert resolve_precision("auto", CPU) == expected
    assert f"precision {expected}: " in caplog.text and caplog.text.count("\n") == 1


def test_nothing_is_known_of_an_older_torch(monkeypatch):
    make_cpu(monkeypatch, capability="AVX512", bf16=True)
    monkeypatch.delattr(torch.cpu, "_is_avx512_bf16_supported")
    assert native_precision(CPU)[0] == "fp32"


@pytest.mark.parametrize("capability, expected", [
    ((7, 0), "fp16"), ((7, 5), "fp16"), ((8, 0), "bf16"), ((9, 0), "bf16")])
def test_older_gpus_compute_in_fp16(monkeypatch, caplog, capability, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    with caplog.at_level(logging.INFO):
        assert resolve_precision("auto", torch.device("cuda", 0)) == expected
    assert f"compute capability {capability[0]}.{capability[1]}" in caplog.text


def test_where_nothing_is_known_it_is_fp32():
    assert native_precision(torch.device("mps"))[0] == "fp32"


def test_half_precision_that_was_asked_for_works_and_warns_with_its_measured_cost(monkeypatch, caplog):
    make_cpu(monkeypatch, capability="AVX2", bf16=False)
    assert resolve_precision("bf16", CPU) == "bf16"
    assert "times as long in it (measured)" in caplog.text and "--precision auto computes in fp32" in caplog.text
    caplog.clear()
    assert resolve_precision("fp32", CPU) == "fp32" and caplog.text == ""
    make_cpu(monkeypatch, capability="AVX512", bf16=True)
    assert resolve_precision("bf16", CPU) == "bf16" and caplog.text == ""


def test_another_name_is_refused():
    with pytest.raises(ValueError, match="precision is 'fp8', expected one of auto, bf16, fp16, fp32"):
        resolve_precision("fp8", CPU)


class Recorded(torch.Tensor):
    """A tensor that notes how it is copied, and stays where it is."""

    def pin_memory(self):
        self.log.append("pinned")
        return self

    def to(self, *args, **kwargs):
        self.log.append(bool(kwargs.get("non_blocking", False)))
        return self


def copies(device: str) -> list:
    tensor = torch.zeros(2).as_subclass(Recorded)
    tensor.log = []
    to_device(tensor, torch.device(device))
    return tensor.log


def test_only_pinned_memory_is_copied_to_cuda_without_waiting():
    """On MPS the copy may read memory that is somebody else's by then (pytorch 189690)."""
    assert copies("cuda") == ["pinned", True]
    assert copies("mps") == copies("cpu") == [False]


def test_float32_convolutions_are_float32_on_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    assert resolve_device("cuda") == torch.device("cuda", 0)
    assert not torch.backends.cudnn.allow_tf32


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="this system hands the peak on to what is started")
def test_the_peak_of_memory_is_that_of_this_program_not_of_the_one_that_started_it():
    held = bytearray(400_000_000)
    held[::4096] = b"x" * len(held[::4096])
    code = "from selva.utils.device import peak_memory_bytes; print(peak_memory_bytes('cpu'))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert 1e6 < int(done.stdout) < 2e8 < len(held) < module.peak_memory_bytes("cpu")
