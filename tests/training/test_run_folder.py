"""selva.training.run_folder: going back to an older step, kills near the end, and a disk that is really full."""

from __future__ import annotations

import dataclasses
import errno
import json
import logging
import math
from pathlib import Path

import pytest
import torch
from small_run import CONFIG, make_run

import selva.training.run_folder
from selva.checkpoint import load_adapter, load_checkpoint
from selva.training.loop import fit
from selva.training.run_folder import NotSaved, RunFolder
from selva.utils.metrics_log import MetricsFile

resource = pytest.importorskip("resource", reason="limits of file sizes")
META = {"variant": "small"}


@pytest.fixture(autouse=True)
def no_curves(request, monkeypatch):
    """Curves take most of the time of such short runs."""
    if "full_disk" not in request.fixturenames:
        monkeypatch.setattr("selva.training.run_folder.plot_losses", lambda *args: None)


LONG = dataclasses.replace(CONFIG, steps=12)  # saves and validates every 3 steps


def go_on(path, config=LONG, resume=None, until=None, keep_last=0, adapter_format="pt"):
    """Train in a folder as train() does, from a step file if one is named; return the run and its folder."""
    saved = load_checkpoint(path / f"adapter_step{resume:05d}.pt") if resume else None
    run, folder = make_run(config), RunFolder(path, META, keep_last, adapter_format=adapter_format)
    if saved is not None:
        run.restore(saved)
    metrics = folder.open(saved)
    if saved is not None:
        folder.restore_best(run, saved)
    if fit(run, metrics, on_checkpoint=lambda r: folder.save_step(r, metrics), on_best=folder.save_best,
           should_stop=lambda: run.step == until, on_step=folder.save_averages):
        folder.save_final(run, metrics)
    return run, folder


def steps(path):
    return sorted(int(p.stem[-5:]) for p in path.glob("adapter_step*.pt"))


def rows(path):
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def equal(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


# -- going back -------------------------------------------------------------------------------------------------------


def test_what_is_later_than_the_step_resumed_from_is_set_aside(tmp_path, caplog):
    go_on(tmp_path)
    (tmp_path / "sample_step00009.wav").write_bytes(b"later")
    (tmp_path / "sample_step00003.wav").write_bytes(b"earlier")
    before = rows(tmp_path)
    go_on(tmp_path, dataclasses.replace(LONG, lr=1e-3, save_every=100), resume=3, until=4, keep_last=1)
    assert steps(tmp_path) == [4]  # the newest save is there, the abandoned branch is not
    aside = tmp_path / "previous_001"
    assert steps(aside) == [6, 9, 12] and rows(aside) == before
    assert (aside / "sample_step00009.wav").exists() and (tmp_path / "sample_step00003.wav").exists()
    assert max(row["step"] for row in rows(tmp_path)) == 4
    assert "going on from step 3" in caplog.text and "previous_001" in caplog.text
    assert (tmp_path / "adapter_final.pt").exists()  # nothing overwrites it


def test_the_newest_save_is_never_pruned(tmp_path):
    run, folder = make_run(LONG), RunFolder(tmp_path, META, keep_last=1)
    metrics = folder.open(None)
    (tmp_path / "adapter_step00099.pt").write_bytes(b"a later one, however it came here")
    run.step = 7
    assert folder.save_step(run, metrics) is not None and 7 in steps(tmp_path)


def being_read(monkeypatch, *names):
    """Keep files from being deleted, as Windows does while another program reads them; return their names, a set."""
    kept, unlink = set(names), Path.unlink

    def refuse(path, *args, **kwargs):
        if path.name in kept:
            raise PermissionError(errno.EACCES, "used by another process", str(path))
        unlink(path, *args, **kwargs)

    monkeypatch.setattr(Path, "unlink", refuse)
    return kept


def test_an_old_step_file_that_is_being_read_is_deleted_later(tmp_path, monkeypatch, caplog):
    read = being_read(monkeypatch, "adapter_step00003.pt")
    go_on(tmp_path, until=9, keep_last=1)
    assert steps(tmp_path) == [3, 9] and "adapter_step00003.pt: not deleted, used by another process" in caplog.text
    read.clear()
    go_on(tmp_path, resume=9, keep_last=1)
    assert steps(tmp_path) == [12]


def test_an_older_best_adapter_that_is_being_read_is_named(tmp_path, monkeypatch, caplog):
    go_on(tmp_path, until=9)
    being_read(monkeypatch, "adapter_best.pt")
    go_on(tmp_path, resume=9, adapter_format="safetensors")
    assert (tmp_path / "adapter_final.safetensors").exists() and "adapter_best.pt: not deleted" in caplog.text


def test_the_best_adapter_goes_back_too(tmp_path, monkeypatch):
    """The best of step 3 was overwritten by that of step 9, and is the best again after going back to step 6."""
    values = iter([5.0, 3.0, 4.0, 2.0, 2.5])
    monkeypatch.setattr("selva.training.run.validate", lambda *args: [next(values)])
    go_on(tmp_path)
    third = load_adapter(tmp_path / "adapter_step00003.pt").tensors
    assert load_adapter(tmp_path / "adapter_best.pt").meta["step"] == 9
    (tmp_path / "adapter_step00003.pt").unlink()
    values = iter([4.5, 4.5])
    go_on(tmp_path, resume=6)
    best = load_adapter(tmp_path / "adapter_best.pt")
    assert best.meta["step"] == 3 and best.meta["val_loss"] == 3.0 and equal(best.tensors, third)
    assert load_adapter(tmp_path / "previous_001" / "adapter_best.pt").meta["step"] == 9


def test_going_back_gives_the_bits_of_before(tmp_path):
    go_on(tmp_path)
    expected = load_adapter(tmp_path / "adapter_final.pt").tensors
    go_on(tmp_path, resume=6)
    assert equal(load_adapter(tmp_path / "adapter_final_001.pt").tensors, expected)


# -- averages ----------------------------------------------------------------------------------------------------------

POWER = dataclasses.replace(LONG, ema="power")


def averages(folder):
    return {path.name: load_adapter(path) for path in folder.glob("ema_ckpts/*.pt")}


def test_snapshots_of_the_averages_are_adapters_and_survive_a_resume(tmp_path):
    go_on(tmp_path / "whole", POWER)
    whole = averages(tmp_path / "whole")
    assert set(whole) == {f"{track}.{step}.pt" for track in (0, 1) for step in range(1, 13)}
    assert whole["1.5.pt"].meta["sigma_rel"] == 0.1 and whole["1.5.pt"].meta["step"] == 5
    step_file = load_adapter(tmp_path / "whole" / "adapter_step00012.pt")
    assert equal(whole["0.12.pt"].tensors, step_file.tensors)  # the first width is what is saved
    go_on(tmp_path / "killed", POWER, until=5)
    (tmp_path / "killed" / "adapter_step00005.pt").unlink()  # as if it had been killed before it was written
    go_on(tmp_path / "killed", POWER, resume=3)
    assert not (tmp_path / "killed" / "previous_001").exists()
    killed = averages(tmp_path / "killed")
    assert whole.keys() == killed.keys()
    assert all(equal(one.tensors, killed[name].tensors) for name, one in whole.items())


def test_snapshots_of_an_abandoned_branch_are_set_aside(tmp_path):
    go_on(tmp_path, POWER)
    go_on(tmp_path, dataclasses.replace(POWER, lr=1e-3), resume=6, until=8)
    assert max(adapter.meta["step"] for adapter in averages(tmp_path).values()) == 8
    assert sorted({adapter.meta["step"] for adapter in averages(tmp_path / "previous_001").values()}) == [
        *range(7, 13)]


def test_an_old_run_is_moved_with_its_snapshots(tmp_path):
    go_on(tmp_path, POWER, until=3)
    go_on(tmp_path, LONG, until=3)
    assert averages(tmp_path) == {} and len(averages(tmp_path / "previous_001")) == 6


def test_a_run_of_another_folder_is_not_mixed_with_the_one_that_is_there(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    go_on(one)
    go_on(two)
    saved = load_checkpoint(one / "adapter_step00003.pt")
    folder = RunFolder(two, META)
    assert folder.open(saved).rows == [] and steps(two) == [] and steps(two / "previous_001") == [3, 6, 9, 12]


def test_killed_while_setting_aside_the_old_branch_goes_on(tmp_path, monkeypatch):
    go_on(tmp_path)
    rename, moved = Path.rename, []

    def killed(self, target):
        if len(moved) == 2:
            raise KeyboardInterrupt
        moved.append(self.name)
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        RunFolder(tmp_path, META).open(load_checkpoint(tmp_path / "adapter_step00003.pt"))
    assert 12 in steps(tmp_path) and max(row["step"] for row in rows(tmp_path)) == 12


# -- a full disk ------------------------------------------------------------------------------------------------------


@pytest.fixture
def full_disk():
    """``full_disk(bytes)`` limits the size of every file that this process writes; None lifts the limit again."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(size):
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft if size is None else size, hard))

    yield limit
    limit(None)


def test_every_file_survives_a_full_disk_and_is_written_when_there_is_room(tmp_path, full_disk, caplog):
    run, folder = make_run(LONG), RunFolder(tmp_path, META)
    metrics = folder.open(None)

    def on_checkpoint(run):
        full_disk(None if run.step >= 9 else 100)
        folder.save_step(run, metrics)

    full_disk(100)
    folder.write_settings("steps: 12\n" * 20)
    assert fit(run, metrics, on_checkpoint=on_checkpoint, on_best=folder.save_best)
    folder.save_final(run, metrics)
    names = {p.name for p in tmp_path.iterdir()}
    assert names == {"adapter_step00009.pt", "adapter_step00012.pt", "adapter_best.pt", "adapter_final.pt", "meta.json",
                     "metrics.jsonl", "loss_raw.png", "loss_smoothed.png"}
    for name in ("adapter_step00003.pt", "adapter_best.pt", "metrics.jsonl", "loss_raw.png", "config.yaml"):
        assert f"{name}: not" in caplog.text, name
    assert "the disk is full" in caplog.text
    assert [row["step"] for row in rows(tmp_path) if "loss" in row] == list(range(1, 13))
    assert load_adapter(tmp_path / "adapter_best.pt").meta["step"] == run.best_step
    undisturbed = tmp_path / "undisturbed"
    go_on(undisturbed)
    assert equal(*(load_adapter(f / "adapter_final.pt").tensors for f in (tmp_path, undisturbed)))


def test_a_disk_that_stays_full_says_what_is_missing(tmp_path, full_disk):
    run, folder = make_run(LONG), RunFolder(tmp_path, META)
    metrics = folder.open(None)
    fit(run, metrics, on_checkpoint=lambda r: folder.save_step(r, metrics), on_best=folder.save_best,
        should_stop=lambda: bool(full_disk(100 if run.step >= 6 else None)))
    with pytest.raises(NotSaved, match=r"final\.pt.*metrics\.jsonl could not.*adapter_step00003\.pt"):
        folder.save_final(run, metrics)
    full_disk(None)
    assert steps(tmp_path) == [3] and not list(tmp_path.glob(".partial*"))
    assert MetricsFile(tmp_path / "metrics.jsonl").last_step == 4


@pytest.mark.parametrize("saved_before", [True, False])
def test_a_stop_on_a_full_disk_says_what_was_not_saved(tmp_path, full_disk, saved_before):
    run, folder = make_run(LONG), RunFolder(tmp_path, META)
    metrics = folder.open(None)
    full_disk(None if saved_before else 100)

    def stop():
        if run.step == 5:
            full_disk(100)
        return run.step == 5

    assert not fit(run, metrics, on_checkpoint=lambda r: folder.save_step(r, metrics), on_best=folder.save_best,
                   should_stop=stop)
    with pytest.raises(NotSaved) as told:
        folder.stopped(run, 12)
    assert "step 5 of 12, which was not saved there. Make room" in str(told.value)
    assert ("goes on from adapter_step00003.pt" if saved_before else "has to start again") in str(told.value)


def test_a_final_adapter_without_room_is_put_elsewhere(tmp_path, monkeypatch):
    go_on(tmp_path / "room")
    run, folder = make_run(LONG), RunFolder(tmp_path / "run", META)
    metrics = folder.open(None)
    fit(run, metrics, on_checkpoint=lambda r: folder.save_step(r, metrics), on_best=folder.save_best)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "elsewhere"))
    (tmp_path / "elsewhere").mkdir()
    real = selva.training.run_folder.save_adapter

    def save(path, *args, **kwargs):
        if path.parent == folder.path:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(path, *args, **kwargs)

    monkeypatch.setattr("selva.training.run_folder.save_adapter", save)
    with pytest.raises(NotSaved, match="holds it; move it there"):
        folder.save_final(run, metrics)
    (rescued,) = (tmp_path / "elsewhere").glob("*/adapter_final.pt")
    assert equal(*(load_adapter(p).tensors for p in (rescued, tmp_path / "room" / "adapter_final.pt")))


def test_metrics_are_json_without_nan(tmp_path):
    path = tmp_path / "metrics.jsonl"
    metrics = MetricsFile(path)
    metrics.append([{"step": 1, "loss": math.nan, "grad_norm": math.inf, "val_loss_bins": [math.nan, 1.0]}])
    assert path.read_text() == '{"step": 1, "loss": null, "grad_norm": null, "val_loss_bins": [null, 1.0]}\n'
    path.write_text(path.read_text() + '{"step": 2, "loss": NaN}\n{"step": 3, "loss": 0.5}\n')
    assert MetricsFile(path).series("loss") == ([3], [0.5])


def test_an_open_log_of_metrics_is_not_cut_in_the_middle_of_a_row(tmp_path, full_disk):
    """A row of which a part fitted is not left behind as half a line."""
    path = tmp_path / "metrics.jsonl"
    metrics = MetricsFile(path)
    full_disk(60)
    for step in range(1, 5):
        metrics.append([{"step": step, "loss": 0.123456789}])
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1]
    full_disk(None)
    metrics.append([{"step": 5, "loss": 1.0}])
    assert [row["step"] for row in MetricsFile(path).rows] == [1, 2, 3, 4, 5]


logging.getLogger("matplotlib").setLevel("ERROR")


@pytest.mark.parametrize("adapter_format, suffixes", [("pt", [".pt"]), ("safetensors", [".safetensors"]),
                                                     ("both", [".pt", ".safetensors"])])
def test_adapters_are_written_in_the_format_that_is_asked_for(tmp_path, adapter_format, suffixes):
    go_on(tmp_path, adapter_format=adapter_format)
    for name in ("adapter_best", "adapter_final"):
        found = sorted(tmp_path.glob(f"{name}*"))
        assert [path.suffix for path in found] == suffixes
        adapters = [load_adapter(path) for path in found]
        assert all(equal(adapters[0].tensors, one.tensors) and one.meta == adapters[0].meta for one in adapters)
    assert steps(tmp_path) == [3, 6, 9, 12]
    written = load_adapter(tmp_path / f"adapter_final{suffixes[0]}").meta
    assert json.loads((tmp_path / "meta.json").read_text()) == written
    go_on(tmp_path, dataclasses.replace(LONG, steps=15), resume=12, adapter_format=adapter_format)
    assert sorted(p.name for p in tmp_path.glob("adapter_final_*")) == [f"adapter_final_001{s}" for s in suffixes]
    if adapter_format == "both":  # killed between the two, before meta.json
        kept = load_adapter(tmp_path / "adapter_final_001.pt")
        (tmp_path / "adapter_final_001.safetensors").unlink()
        go_on(tmp_path, dataclasses.replace(LONG, steps=15), resume=15, adapter_format=adapter_format)
        assert equal(load_adapter(tmp_path / "adapter_final_001.safetensors").tensors, kept.tensors)
        assert not list(tmp_path.glob("adapter_final_002*"))


def test_another_format_leaves_no_older_best_adapter_behind(tmp_path):
    go_on(tmp_path, until=3)
    run, _ = go_on(tmp_path, resume=3, adapter_format="safetensors")
    assert [path.name for path in tmp_path.glob("adapter_best*")] == ["adapter_best.safetensors"]
    assert load_adapter(tmp_path / "adapter_best.safetensors").meta["step"] == run.best_step
    run, _ = go_on(tmp_path, resume=12, config=dataclasses.replace(LONG, steps=15), adapter_format="both")
    assert sorted(path.suffix for path in tmp_path.glob("adapter_best*")) == [".pt", ".safetensors"]
    assert {load_adapter(path).meta["step"] for path in tmp_path.glob("adapter_best*")} == {run.best_step}
