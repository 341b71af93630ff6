"""benchmarks/run.py at its smallest: both ways agree, and the figures are stored. No figure is judged."""

from __future__ import annotations

import importlib
import json

import pytest
import torch

from selva.utils.document import END_MARK

SMALL = ["--variant", "tiny_16k", "--device", "cpu", "--precision", "fp32", "--repeats", "1", "--batches", "1", "2",
         "--durations", "1", "--clips", "2", "--rows", "4", "8"]


@pytest.fixture
def benchmark(monkeypatch):
    """``benchmark("run")`` imports a module of the folder as a script there would."""
    measure = importlib.import_module("measure")
    monkeypatch.setattr(measure, "CEILING_SIZE", {"cpu": 64})
    return importlib.import_module


def test_a_small_run_of_every_stage_but_the_slow_ones(benchmark, tmp_path, capsys, monkeypatch):
    data_stages, run = benchmark("data_stages"), benchmark("run")
    monkeypatch.setattr(data_stages, "SCENE_SIZE", 32)
    monkeypatch.setattr(data_stages, "DURATION_SEC", 1.5)
    monkeypatch.setattr(benchmark("stages"), "STEPS", 2)
    document = tmp_path / "page.md"
    document.write_text(f"before\n\n{run.BEGIN_MARK}\nold\n{END_MARK}\n\nafter\n", encoding="utf-8")
    stages = ["train", "checkpoint", "extract", "sample", "memmap"]
    given = [*SMALL, "--only", ",".join(stages), "--out", str(tmp_path / "out"), "--docs", str(document)]
    assert run.main(given) == 0  # 1 if the two ways differ
    where = "cpu" if run.kind_of(torch.device("cpu")) == "AVX512" else f"cpu_{run.kind_of(torch.device('cpu')).lower()}"
    name = f"tiny_16k_fp32_{where}_{'_'.join(stages)}"
    figures = json.loads((tmp_path / "out" / f"{name}.json").read_text(encoding="utf-8"))
    rows = figures["results"]
    compared = {row["stage"]: row for row in rows if row["plain_sec"] is not None}
    assert set(compared) == {
        "training step", "step, checkpointed", "extraction: reading", "extraction: text", "extraction: CLIP",
        "extraction: video encoder", "extraction: VAE", "sampling, 2 steps, one sound",
        "sampling, 2 steps, 1 s each",
    }
    for row in compared.values():
        assert row["error"] <= row["tolerance"] <= 5e-4 and row["ours_sec"] > 0
        assert row["ratio"] == pytest.approx(row["ours_sec"] / row["plain_sec"])
        assert row["plain_mib"] >= 0 and row["ours_mib"] >= 0
    plain, ours = (compared["step, checkpointed"][f"{way}_tensors_mib"] for way in ("plain", "ours"))
    assert 0 < ours < 0.7 * plain
    assert [row["amount"] for row in rows if row["stage"] == "memmap row"] == [4, 8]

    table = (tmp_path / "out" / f"{name}.md").read_text(encoding="utf-8")
    lines = [line for line in table.splitlines() if line.startswith("|")]
    stages_end = next(i for i, line in enumerate(lines) if line.startswith("| stage | from, to"))
    assert len(lines[:stages_end]) == 2 + len(rows)
    assert len({line.count("|") for line in lines[:stages_end]}) == 1
    assert [line.split(" | ")[1] for line in lines[stages_end + 2 :]] == [
        "4, 8 rows", "1, 2 sounds", "1, 2 clips", "1, 2 clips"
    ]
    text = document.read_text(encoding="utf-8")
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text and table in text
    assert run.main([*SMALL, "--only", "memmap", *given[-4:]]) == 0
    text = document.read_text(encoding="utf-8")
    assert text.count("### tiny_16k_fp32_cpu") == 2 and text.count(run.BEGIN_MARK) == 1
    capsys.readouterr()


def test_the_memory_of_a_step_as_a_table(benchmark, tmp_path, capsys):
    script, document = benchmark("step_memory"), tmp_path / "page.md"
    document.write_text(f"before\n\n{script.BEGIN}\nold\n{END_MARK}\n\nafter\n", encoding="utf-8")
    assert script.main(["--variants", "tiny_16k", "--docs", str(document)]) == 0
    text = document.read_text(encoding="utf-8")
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    table = [line.split(" | ") for line in capsys.readouterr().out.splitlines()]
    assert all(" | ".join(row) in text for row in table) and {len(row) for row in table[2:]} == {8}
    plain, recomputed = ([float(cell.split()[0]) for cell in row[1:4]] for row in table[2:])
    assert plain == sorted(plain) and recomputed[-1] < plain[-1] and table[2][-1] == "256 |"


def test_a_start_prepares_and_computes_the_same_either_way(benchmark, tmp_path):
    data_stages, startup = benchmark("data_stages"), benchmark("startup")
    data_stages.write_data(tmp_path / "data", startup.get_variant("tiny_16k"), 2)
    common = ["--variant", "tiny_16k", "--data_dir", str(tmp_path / "data"), "--device", "cpu", "--precision", "fp32"]
    for way in ("plain", "ours", "ours"):
        assert startup.main([way, *common, "--out", str(tmp_path / f"{way}.json")]) == 0
    plain, ours = (torch.load(tmp_path / f"{way}.pt", weights_only=True) for way in ("plain", "ours"))
    assert set(plain) == set(ours) == {"latents", "text", "velocity"}
    for key, expected in plain.items():
        torch.testing.assert_close(ours[key], expected, rtol=1e-4, atol=1e-4)
    figures = {way: json.loads((tmp_path / f"{way}.json").read_text()) for way in ("plain", "ours")}
    assert list(figures["ours"]["stages"]) == ["data", "model", "first step"]
    for row in figures.values():
        assert row["total"] == pytest.approx(sum(row["stages"].values())) and row["mib"] > 0


def test_a_difference_fails_the_run(benchmark, tmp_path, monkeypatch, capsys):
    run = benchmark("run")
    wrong = benchmark("measure").Result("stage", "size", 2.0, 1.0, 0.5, error=0.1, tolerance=0.01)
    monkeypatch.setitem(run.STAGES, "train", lambda bench, sizes: [wrong])
    assert run.main([*SMALL, "--only", "train", "--out", str(tmp_path)]) == 1
    assert "**0.50**" in capsys.readouterr().out  # the figures are shown all the same


@pytest.mark.parametrize("given, said", [
    (["--only", "nothing"], "expected some of"),
    (["--variant", "small_16k", "--only", "start"], "make_test_weights.py"),
])
def test_mistakes_are_named(benchmark, given, said, caplog):
    assert benchmark("run").main(given) == 2
    assert said in caplog.text


def test_kinds_of_processors_stand_side_by_side(benchmark):
    run = benchmark("run")

    def figures(kind: str, precision: str, **ratios: float | None) -> dict:
        rows = [{"stage": stage, "size": "batch 4", "ratio": ratio} for stage, ratio in ratios.items()]
        return {"name": kind, "variant": "tiny_16k", "kind": kind, "precision": precision, "results": rows}

    new, old = figures("AVX512", "bf16", train=0.73, memmap=None), figures("AVX2", "fp32", train=0.8512, sample=0.5)
    without_kind = {"name": "x", "results": [{"stage": "train", "size": "batch 1", "ratio": 1.0}]}  # an older file
    assert run.kinds_table([new]) == run.kinds_table([new, without_kind]) == ""
    assert run.kinds_table([new, without_kind, old]).splitlines()[2:] == [
        "| variant | stage | size | AVX512, bf16 | AVX2, fp32 |",
        "|---|---|---|---|---|",
        "| tiny_16k | train | batch 4 | 0.73 | 0.85 |",
        "| tiny_16k | sample | batch 4 |  | 0.50 |",
    ]
