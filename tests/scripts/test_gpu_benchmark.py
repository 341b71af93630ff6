"""benchmarks/gpu.py at its smallest, on the CPU: every part runs, failures stay on their own, all is written."""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import re
import time
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from recorded_graph import RecordedGraphs
from stages import random_clips

from selva.data.dataset import ListDataset
from selva.models.clip_t5 import build_clip
from selva.models.variants import get_variant
from selva.training.compiling import missing_compiler
from selva.utils.document import END_MARK
from selva.utils.graph import GraphedCalls

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["--device", "cpu", "--small", "--precision", "fp32"]


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(importlib.import_module("measure"), "CEILING_SIZE", {"cpu": 64})
    return importlib.import_module("gpu")


def figures_in(folder) -> dict:
    (path,) = folder.glob("gpu_*.json")
    return json.loads(path.read_text(encoding="utf-8"))


def test_everything_but_the_scripts_at_the_smallest_sizes(gpu, tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text(f"before\n\n{gpu.BEGIN_MARK}\nnot measured\n{END_MARK}\n\nafter\n", encoding="utf-8")
    names = ["right", "learns", "steps", "sampling"]
    given = [*SMALL, "--only", ",".join(names), "--out", str(tmp_path / "out"), "--docs", str(page)]
    assert gpu.main(given) == 0
    parts = figures_in(tmp_path / "out")["parts"]
    assert list(parts) == names
    assert all(not part["failed"] and not part["left_out"] and part["rows"] for part in parts.values())
    found = {(row["what"], row["size"]) for part in parts.values() for row in part["rows"]}
    for what in ("generator", "VAE decoder", "T5", "CLIP, frames", "video encoder"):
        assert (f"{what}, fp32 against the CPU", "tiny_16k") in found
    assert ("generator, float16 against fp32", "tiny_16k") in found
    for way in ("step, eager", "memory, eager"):
        assert {(f"tiny_16k, {way}", f"batch {batch}") for batch in (1, 2)} <= found
    # The same device twice: exactly the same.
    assert all(row["value"] == 0 for row in (*parts["learns"]["rows"], *parts["right"]["rows"][3:]))
    assert all(row["value"] > 0 for name in ("steps", "sampling") for row in parts[name]["rows"])
    memory = {row["what"].split(", ")[-1]: row["value"] for row in parts["steps"]["rows"]
              if "memory" in row["what"] and row["size"] == "batch 2"}
    assert memory["checkpointed"] < 0.8 * memory["eager"]
    assert all("counted without a GPU" in row["note"] for row in parts["steps"]["rows"]
               if row["what"].endswith(("memory, eager", "memory, checkpointed")))
    text, printed = page.read_text(encoding="utf-8"), capsys.readouterr().out
    assert text.startswith("before\n") and text.endswith("after\n") and "not measured" not in text
    for part in parts.values():
        for row in part["rows"]:
            assert row["what"] in text and row["what"] in printed


@pytest.mark.slow
def test_the_scripts_and_the_tests_of_a_gpu(gpu, tmp_path):
    assert gpu.main([*SMALL, "--only", "scripts,tests", "--out", str(tmp_path)]) == 0
    parts = figures_in(tmp_path)["parts"]
    assert [row["what"] for row in parts["scripts"]["rows"]] == [
        f"{name}, whole" for name in ("make_demo_clips", "extract_features", "train_lora", "infer")]
    assert [row["value"] for row in parts["tests"]["rows"]] == [0, 0]
    assert "skipped" in parts["tests"]["rows"][1]["note"]


@pytest.mark.slow  # compiling takes minutes
@pytest.mark.skipif(missing_compiler(torch.device("cpu")) is not None, reason="no C++ compiler")
def test_compiled_steps(gpu, tmp_path):
    assert gpu.main([*SMALL, "--only", "compiled", "--out", str(tmp_path), "--limit", "2000"]) == 0
    (row,) = figures_in(tmp_path)["parts"]["compiled"]["rows"]
    assert row["what"] == "tiny_16k, step, compiled" and "the first one" in row["note"]


def test_all_tests_that_need_a_gpu_are_in_the_file_that_is_run(gpu):
    product = importlib.import_module("gpu_product")
    marked = {path.relative_to(ROOT).as_posix() for path in (ROOT / "tests").rglob("*.py")
              if re.search(r"mark\.gpu\b", path.read_text(encoding="utf-8"))}
    assert marked == {product.GPU_TESTS}


LAST_TEST = {"time": "Path(__file__).with_suffix('.begun').touch(); time.sleep(600)", "crash": "os._exit(7)"}


@pytest.mark.parametrize("ends_by", list(LAST_TEST))
def test_tests_that_are_done_count_when_one_comes_to_no_end(gpu, tmp_path, monkeypatch, ends_by):
    product = importlib.import_module("gpu_product")
    path = tmp_path / "test_some.py"
    path.write_text("import os, time, pytest\nfrom pathlib import Path\n"
                    "@pytest.mark.parametrize('x', ['a b', 'c'])\ndef test_good(x): print('much' * 9999)\n"
                    "def test_bad(): assert False\n"
                    "@pytest.fixture\ndef broken(): yield; assert False\ndef test_at_its_end(broken): pass\n"
                    f"def test_skipped(): pytest.skip('no')\ndef test_last(): {LAST_TEST[ends_by]}\n"
                    "def test_never(): pass\n", encoding="utf-8")
    monkeypatch.setattr(product, "GPU_TESTS", str(path))

    class Setup(gpu.Setup):
        def seconds_left(self) -> float:
            """The time is over when the last test has begun."""
            given_up = time.monotonic() + 60
            while ends_by == "time" and not path.with_suffix(".begun").exists() and time.monotonic() < given_up:
                time.sleep(0.05)
            return 0.0 if ends_by == "time" else 600.0

    failed, passed, gap = product.tests(Setup(SimpleNamespace(device=torch.device("cpu")), False, 0))
    assert failed.value == 2 and failed.wrong and failed.note == "test_bad, test_at_its_end"
    assert passed.value == 2 and passed.note == "1 skipped"
    assert gap.what == "2 of 7 tests, from test_last on" and gap.fault == (ends_by == "crash")
    assert gap.reason.startswith({"time": "pytest was not done", "crash": "pytest ended with exit code 7"}[ends_by])


def use_parts(gpu, monkeypatch, **parts) -> None:
    monkeypatch.setattr(gpu, "PARTS", {name: (name, part, 0.5) for name, part in parts.items()})


def row(gpu, value: float, **more):
    return gpu.Row("what", "size", value, "", **more)


def test_a_part_that_fails_does_not_end_the_others(gpu, tmp_path, monkeypatch, caplog):
    def broken(setup):
        yield row(gpu, 1.0)
        raise KeyError("lost")

    def too_large(setup):
        raise RuntimeError("CUDA out of memory")
        yield

    def good(setup):
        yield row(gpu, 3.0, limit=2.0)
        yield row(gpu, 1.0, limit=2.0)
        yield row(gpu, float("nan"), limit=2.0)
        yield row(gpu, 9.0, aim=2.0)

    use_parts(gpu, monkeypatch, broken=broken, too_large=too_large, good=good)
    page = tmp_path / "page.md"
    assert gpu.main([*SMALL, "--out", str(tmp_path), "--docs", str(page)]) == 1
    parts = figures_in(tmp_path)["parts"]
    assert "KeyError: 'lost' (test_gpu_benchmark.py:" in parts["broken"]["failed"][0]
    assert len(parts["broken"]["rows"]) == 1 and not parts["broken"]["left_out"]
    assert "out of memory" in parts["too_large"]["left_out"][0] and not parts["too_large"]["failed"]
    assert [one["wrong"] for one in parts["good"]["rows"]] == [True, False, True, False]
    text = page.read_text(encoding="utf-8")
    assert text.count("**wrong**") == 2 and "| 9 | 2 (aim) | missed |" in text and "KeyError" in text
    (error,) = [record.message for record in caplog.records if record.levelname == "ERROR"]
    assert "what, size: 3, expected at most 2" in error and "KeyError" in error and "memory" not in error


def test_what_pytorch_sets_is_measured_with_tf32_though_it_is_switched_off_here(gpu, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # as resolve_device does
    setup, seen = gpu.Setup(SimpleNamespace(device=torch.device("cuda")), False, 0), []

    def run(network, device):
        seen.append((device.type, torch.backends.cudnn.allow_tf32))
        return torch.ones(1)

    rows = list(importlib.import_module("gpu_right")._network_rows(setup, "b", torch.nn.Identity, {"a": run}))
    assert [row.what for row in rows] == ["a, fp32 against the CPU", "a, fp32 as PyTorch sets it"]
    assert seen[1:] == [("cuda", False), ("cuda", True)] and torch.backends.cudnn.allow_tf32 is False


def test_a_recorded_step_has_the_operations_of_an_eager_one(gpu, monkeypatch):
    """A step that meets a clip for the first time also projects its conditions, and would flatter the rate."""
    speed, counts = importlib.import_module("gpu_speed"), []

    def count_flops(call):
        found = importlib.import_module("measure").count_flops(call)
        counts.append(found[0])
        return found

    monkeypatch.setattr(speed, "count_flops", count_flops)
    monkeypatch.setattr(speed, "graphed_calls", lambda choice, *_: GraphedCalls(
        RecordedGraphs(), "training", required=True) if choice == "on" else None)
    setup = gpu.Setup(gpu.Bench(torch.device("cpu"), repeats=1, dtype=torch.float32), True, 0)
    variant = get_variant("tiny_16k")
    generator, clips = speed.adapted_generator(setup, variant), ListDataset(random_clips(variant, 4, 1.0))
    for rows in (speed._eager_rows, speed._graph_rows):
        assert all(row.value > 0 for row in rows(setup, variant, generator, clips, 2))
    assert len(counts) == 2 and counts[0] == counts[1]


def test_what_a_part_leaves_in_cycles_is_freed(gpu):
    def rows(setup):
        cycle: list = [torch.ones(1)]
        cycle.append(cycle)
        left.append(weakref.ref(cycle[0]))
        yield row(gpu, 1.0)

    left, setup = [], gpu.Setup(SimpleNamespace(device=torch.device("cpu")), True, 0)
    gc.disable()
    try:
        assert list(gpu.guarded(setup, "", rows(setup))) and left[0]() is None
    finally:
        gc.enable()


@pytest.mark.parametrize(("builder", "uses"), [
    ("build_vae", ["VAE encoder", "VAE decoder"]), ("build_video_encoder", ["video encoder"]),
    ("filled_clip", ["CLIP, frames", "CLIP, texts"]), ("meta_t5", ["T5"]),
])
def test_a_network_that_cannot_be_built_leaves_the_others(gpu, monkeypatch, builder, uses):
    def missing(*_):
        raise ImportError("No module named 'open_clip'")

    right = importlib.import_module("gpu_right")
    monkeypatch.setattr(right, builder, missing)
    found = list(right.networks(gpu.Setup(SimpleNamespace(device=torch.device("cpu")), True, 0)))
    (gap,) = [one for one in found if not isinstance(one, gpu.Row)]
    assert gap.what == f"{' and '.join(uses)}, tiny_16k" and gap.fault and "open_clip" in gap.reason
    whole = ("generator", "mel front end", "VAE encoder", "VAE decoder", "video encoder", "CLIP, frames", "CLIP, texts",
             "T5")
    assert [row.what for row in found if row is not gap and "CPU" in row.what] == [
        f"{name}, fp32 against the CPU" for name in whole if name not in uses]


@torch.no_grad()
def test_clip_that_is_not_drawn_first_is_that_of_open_clip(gpu):
    rows, variant = importlib.import_module("gpu_rows"), get_variant("tiny_16k")
    found = rows.filled_clip(variant, torch.device("cpu"))
    expected = rows.filled(build_clip(variant.clip), torch.device("cpu"))
    tokens = torch.randint(1, variant.clip.vocab_size, (2, variant.clip.context_length))
    pixels = torch.rand(2, 3, *2 * [variant.clip_image_size])
    torch.testing.assert_close(found.encode_text(tokens), expected.encode_text(tokens))
    torch.testing.assert_close(found.encode_image(pixels), expected.encode_image(pixels))


def test_figures_are_written_as_they_come_and_the_time_is_kept(gpu, tmp_path, monkeypatch):
    stored = []

    def endless(setup):
        while True:
            yield row(gpu, 1.0)
            stored.append(len(figures_in(tmp_path)["parts"]["endless"]["rows"]))
            time.sleep(0.05)

    def sleeping(setup):
        time.sleep(60)
        yield row(gpu, 1.0)

    def last(setup):
        yield row(gpu, 1.0)

    use_parts(gpu, monkeypatch, endless=endless, sleeping=sleeping, last=last)
    assert gpu.main([*SMALL, "--out", str(tmp_path), "--limit", "2"]) == 0
    parts = figures_in(tmp_path)["parts"]
    assert stored == list(range(1, len(stored) + 1)) and stored
    assert "were over" in parts["endless"]["left_out"][0] and "were over" in parts["sleeping"]["left_out"][0]
    assert not parts["sleeping"]["rows"]


@pytest.mark.parametrize("swallowed", [Exception, BaseException])
def test_the_end_of_the_time_is_not_taken_for_an_error_of_what_runs(gpu, tmp_path, monkeypatch, swallowed):
    """Graphs, compilers and logging go on after any Exception; whatever a destructor raises is dropped."""
    monkeypatch.setattr(importlib.import_module("gpu_rows"), "RING_AGAIN_SEC", 0.5)
    ended = []

    def going_on(setup):
        try:
            with contextlib.suppress(swallowed):
                time.sleep(20)
            time.sleep(20)
            yield row(gpu, 1.0)
        finally:
            ended.append(True)

    use_parts(gpu, monkeypatch, going_on=going_on)
    assert gpu.main([*SMALL, "--out", str(tmp_path), "--limit", "1"]) == 0
    (part,) = figures_in(tmp_path)["parts"].values()
    assert ended and not part["rows"] and "were over" in part["left_out"][0]


def test_the_end_of_the_time_waits_for_a_file_that_is_being_written(gpu, tmp_path, monkeypatch):
    whole = []

    def slowly(path, text):
        whole.append(False)
        time.sleep(0 if whole[:-1] else 2.5)  # the time is over within the first one
        whole[-1] = True

    def one(setup):
        yield row(gpu, 1.0)
        time.sleep(60)

    monkeypatch.setattr(gpu, "atomic_write_text", slowly)
    use_parts(gpu, monkeypatch, one=one)
    assert gpu.main([*SMALL, "--out", str(tmp_path), "--limit", "4"]) == 0
    assert whole == [True, True]


def test_wrong_usage(gpu, tmp_path, capsys):
    assert gpu.main(["--device", "cpu", "--out", str(tmp_path)]) == 2
    assert gpu.main([*SMALL, "--only", "right,wrong", "--out", str(tmp_path)]) == 2
    printed = capsys.readouterr().err
    assert "add --small" in printed and "--only wrong: expected some of right, learns" in printed
