"""train_lora.py when something comes in between: other runs, signals, kills near the end, samples that fail."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from script_args import TINY

import train_lora
from selva.checkpoint import load_adapter
from selva.training import sample as preview
from selva.utils.lock import FolderLock

ROOT = Path(__file__).parents[2]
QUICK = [*TINY, "--steps", "4", "--batch_size", "2", "--warmup_steps", "1", "--save_every", "2", "--val_every", "2",
         "--rank", "2", "--log_every", "1"]


def train(data: Path, out: Path, *more: str, preview: bool = False) -> int:
    return train_lora.main(["--data_dir", str(data), "--output_dir", str(out), *QUICK,
                            *([] if preview else ["--no_preview"]), *more])


def test_a_second_run_in_the_same_folder_is_refused(feature_dir, tmp_path, capsys):
    out = tmp_path / "run"
    with FolderLock(out / "run.lock", "trains"):
        assert train(feature_dir, out) == 1
        err = capsys.readouterr().err
        assert f"in use by process {os.getpid()} on {socket.gethostname()}" in err and "encoding" not in err
        assert train(feature_dir, out, "--dry_run") == 0  # writes nothing
    assert train(feature_dir, out) == 0 and not (out / "run.lock").exists()


@pytest.mark.parametrize("dry", [(), ("--dry_run",)])
def test_a_folder_that_cannot_be_written_is_found_first(feature_dir, tmp_path, capsys, dry):
    (tmp_path / "file").write_bytes(b"in the way")
    assert train(feature_dir, tmp_path / "file" / "run", *dry) == 1
    err = capsys.readouterr().err
    assert "cannot be written to" in err and "encoding" not in err and "clips to train on" not in err


def test_a_dry_run_leaves_no_temporary_cache(feature_dir, tmp_path, monkeypatch):
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    assert train(feature_dir, tmp_path / "run", "--dry_run") == 0
    assert not list((tmp_path / "temporary").glob("selva_cache_*"))


def test_the_missing_final_of_a_continued_run_is_written(feature_dir, tmp_path, capsys):
    """Killed between the last step file and the final adapter, with the final of the first part in the folder."""
    out = tmp_path / "run"
    assert train(feature_dir, out, "--steps", "2") == 0
    assert train(feature_dir, out, "--resume", "auto") == 0
    expected = load_adapter(out / "adapter_final_001.pt").tensors
    (out / "adapter_final_001.pt").unlink()
    assert train(feature_dir, out, "--resume", "auto") == 0
    found = load_adapter(out / "adapter_final_001.pt").tensors
    assert all(torch.equal(found[key], value) for key, value in expected.items())
    (out / "meta.json").unlink()  # killed one file later
    assert train(feature_dir, out, "--resume", "auto") == 0
    assert (out / "meta.json").exists() and not (out / "adapter_final_002.pt").exists()
    names = sorted(path.name for path in out.iterdir())
    (out / "report.html").write_text("<!doctype html>")  # killed before this page, and that of the first part is there
    (out / "README.md").unlink()
    assert train(feature_dir, out, "--resume", "auto") == 0
    assert sorted(path.name for path in out.iterdir()) == names
    assert "all steps are done; made now: " in capsys.readouterr().err
    assert train(feature_dir, out, "--resume", "auto") == 1
    assert "give a larger --steps" in capsys.readouterr().err


def test_after_a_patience_stop_nothing_more_is_trained_unless_asked_for(feature_dir, tmp_path, capsys, monkeypatch):
    values = iter([1.0, 2.0, 3.0])
    monkeypatch.setattr("selva.training.run.validate", lambda *args: [next(values)])
    out, patient = tmp_path / "run", ("--steps", "8", "--patience", "2")
    assert train(feature_dir, out, *patient) == 0
    before = sorted(p.name for p in out.iterdir())
    capsys.readouterr()
    assert train(feature_dir, out, *patient, "--resume", "auto") == 0
    told = capsys.readouterr()
    assert "--patience 0" in told.err and told.out.strip() == str(out / "adapter_final.pt")
    (out / "adapter_final.pt").unlink()
    assert train(feature_dir, out, *patient, "--resume", "auto") == 0
    assert sorted(p.name for p in out.iterdir()) == before
    values = iter([4.0] * 9)
    assert train(feature_dir, out, *patient, "--resume", "auto", "--patience", "0") == 0
    assert (out / "adapter_step00008.pt").exists() and (out / "adapter_final_001.pt").exists()


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory. Tried"),
                                   RuntimeError("MPS backend out of memory"), RuntimeError("cuDNN error")])
def test_a_sample_that_fails_does_not_end_the_run_and_changes_nothing(feature_dir, tmp_path, capsys, monkeypatch,
                                                                      error):
    """The model is back in training afterwards: with dropout, evaluation would give other bits."""
    calls = []

    def fail(generator, *args, **kwargs):
        calls.append(generator.training)
        raise error

    monkeypatch.setattr(preview, "sample_latents", fail)
    assert train(feature_dir, tmp_path / "plain", "--lora_dropout", "0.5") == 0
    assert train(feature_dir, tmp_path / "run", "--lora_dropout", "0.5", preview=True) == 0
    err = capsys.readouterr().err
    one, two = (load_adapter(tmp_path / f / "adapter_final.pt").tensors for f in ("plain", "run"))
    assert all(torch.equal(one[key], value) for key, value in two.items())
    memory = "memory" in str(error)
    assert ("left out from now on" in err) is memory and calls == [False] * (1 if memory else 2)


def test_after_a_lack_of_memory_a_sample_is_decoded_on_the_cpu():
    class Run:
        """As much of a run on a GPU as a sample that fails needs."""

        step, device, generator = 1, torch.device("meta"), torch.nn.Identity()

        @staticmethod
        def evaluated():
            from contextlib import nullcontext
            return nullcontext()

    tried = []
    sample = preview.TrainingSample.__new__(preview.TrainingSample)
    sample._decode_on_cpu = sample._given_up = False

    def fail(run, folder):
        tried.append(sample._decode_on_cpu)
        raise torch.OutOfMemoryError("out of memory")

    sample.write = fail
    for _ in range(4):
        assert sample.try_write(Run(), Path()) is False
    assert tried == [False, True]


@pytest.mark.skipif(os.name == "nt", reason="needs a POSIX shell")
def test_a_log_that_cannot_be_written_is_no_reason_to_stop(feature_dir, tmp_path):
    command = " ".join([sys.executable, str(ROOT / "train_lora.py"), "--data_dir", str(feature_dir), *QUICK,
                        "--no_preview", "--output_dir"])
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for number, shell in enumerate(("{} 2>&-", "{} 2>&1 >&3 3>&- | true", "{} 2>&- >&-")):
        out = tmp_path / f"run{number}"
        script = "set -o pipefail; exec 3>/dev/null; " + shell.format(f"{command} {out}")
        assert subprocess.run(["bash", "-c", script], env=environment).returncode == 0, shell
        assert (out / "adapter_final.pt").exists()
