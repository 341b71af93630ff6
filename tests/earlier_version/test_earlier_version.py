"""What version 0.1.0 has written is read, and gone on with, by the code of today.

``make_files.py`` says how ``files/`` was made. Whatever the scripts are asked to do here is in the settings files that
version 0.1.0 has left beside its results, with paths relative to ``files/``. Finished things have to stay as they are,
to the byte. What is computed anew agrees up to rounding, which is another one on every processor.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

import extract_features
import infer
import train_lora
from selva import load_adapter, load_features, merge_adapter
from selva.weights.load import load_generator

FILES = Path(__file__).parent / "files"
ROOT = Path(__file__).parents[2]
EXPECTED = json.loads((FILES / "expected.json").read_text(encoding="utf-8"))
FILES_JSON = Path("features/.selva_cache/files.json")

# Largest difference, as a part of what is compared or of the way that a run goes. Between AVX2 and AVX-512, and between
# one thread and two, sounds differ by 7e-5 and all else by 6e-6 at most.
RELATIVE = 1e-3


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch) -> Path:
    """A copy of the files as the working directory. Its cache remembers times of files, which git does not keep."""
    folder = Path(shutil.copytree(FILES, tmp_path / "files"))
    monkeypatch.chdir(folder)
    for name, record in json.loads(FILES_JSON.read_text(encoding="utf-8")).items():
        set_time(folder / "features" / name, record["stamp"]["mtime_ns"])
    return folder


@pytest.fixture
def call(capsys):
    """``call(script, *arguments)`` runs a script's ``main``, which has to succeed, and returns its log."""
    def run(script, *arguments: str) -> str:
        capsys.readouterr()
        code = script.main(list(arguments))
        log = capsys.readouterr().err
        assert code == 0, log
        return log

    return run


def set_time(path: Path, nanoseconds: int) -> None:
    os.utime(path, ns=(nanoseconds, nanoseconds))


def snapshot(*folders: str) -> dict[str, tuple[bytes, int]]:
    """Return content and time of all files in ``folders``, but for those that later versions add or add to.

    Left out are settings, which every run writes, locks, the table of clips, and what the cache notes about files (it
    gets the length of each sound); the latents in the cache are there.
    """
    found = [path for folder in folders for path in Path(folder).rglob("*") if path.is_file()]
    added_to = r"extract_config\.yaml$|lock$|clips\.csv(\.sha256)?$|files\.json$"
    kept = [path for path in found if not re.search(added_to, path.name)]
    return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in kept}


def results(*folders: str) -> dict[str, bytes]:
    """Return the content of what an extraction leaves: no settings, and no journals, which are in hidden folders."""
    return {name: content for name, (content, _) in snapshot(*folders).items() if "/." not in name}


def distance(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> float:
    assert one.keys() == two.keys()
    return math.sqrt(sum((one[key].double() - two[key].double()).square().sum().item() for key in one))


def assert_close(actual, expected) -> None:
    """Compare two arrays by the length of their difference."""
    actual, expected = (np.asarray(x, dtype=np.float64) for x in (actual, expected))
    assert actual.shape == expected.shape
    error = np.linalg.norm(actual - expected) / np.linalg.norm(expected)
    assert error <= RELATIVE, error


def assert_same_numbers(tensor, expected: dict) -> None:
    """Compare a tensor with the numbers that ``make_files.py`` took of one."""
    values = np.asarray(tensor, dtype=np.float64).flatten()
    assert np.linalg.norm(values) == pytest.approx(expected["norm"], rel=RELATIVE)
    assert_close(values[:: max(1, len(values) // 11)], expected["values"])


def metrics(folder: str) -> list[dict]:
    return [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def numbers_in(row: dict) -> dict[str, float]:
    """Return what a row of metrics says, but for how long it took."""
    bins = {f"bin {number}": value for number, value in enumerate(row.get("val_loss_bins", []))}
    return bins | {key: value for key, value in row.items() if key not in ("val_loss_bins", "sec_per_step")}


# -- features ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [f"clip_{number}" for number in range(6)])
def test_feature_files_are_read(name):
    bundle, path = load_features(f"features/{name}.npz"), Path(f"features/{name}.npz")
    with np.load(path) as stored:
        assert set(stored) == {"clip_features", "sync_features", "duration", "prompt", "variant", "text_features",
                               "fps", "source_sha256", "settings"}
        for key in ("clip_features", "sync_features", "text_features"):
            assert np.array_equal(getattr(bundle, key).numpy(), stored[key])
        for key in ("duration", "prompt", "variant", "fps", "source_sha256"):
            assert getattr(bundle, key) == stored[key].item()
        assert bundle.settings == json.loads(stored["settings"].item())


def test_features_are_current(call):
    before = results("features")
    log = call(extract_features, "--config", "features/extract_config.yaml")
    assert "0 extracted, 6 already current, 0 left out, 0 failed" in log
    assert results("features") == before and "features/manifest.jsonl" in before


def test_what_was_encoded_for_training_is_not_encoded_again(call):
    before = snapshot("features")
    log = call(train_lora, "--config", "run/config.yaml", "--output_dir", "new", "--steps", "1")
    assert "encoding" not in log and snapshot("features") == before
    assert metrics("new")[0]["val_loss"] == pytest.approx(metrics("run")[0]["val_loss"], rel=RELATIVE)


def test_what_was_noted_about_files_is_believed(call):
    """A sound whose content changes, but neither size nor time, is not looked at; with another time, it is."""
    sound = Path("features/clip_0.flac")
    time, content = sound.stat().st_mtime_ns, sound.read_bytes()
    assert content.count(b"libFLAC") == 1
    sound.write_bytes(content.replace(b"libFLAC", b"LIBFLAC"))  # the name of its encoder, which no decoder minds
    set_time(sound, time)
    before = snapshot("features")
    call(train_lora, "--config", "run/config.yaml", "--output_dir", "new", "--steps", "1")
    assert snapshot("features") == before
    set_time(sound, time + 10**9)
    call(train_lora, "--config", "run/config.yaml", "--output_dir", "new", "--steps", "1")
    after = snapshot("features")
    assert [Path(name).parent.name for name in after.keys() - before.keys()] == ["latents"]


# -- training ---------------------------------------------------------------------------------------------------------


def dropout_mask() -> str:
    torch.manual_seed(0)
    return "".join(map(str, torch.nn.functional.dropout(torch.ones(64), 0.5).bool().int().tolist()))


@pytest.mark.parametrize("dropout", ["with dropout", "without dropout"])
def test_a_run_goes_on_as_it_would_have(call, dropout):
    """``files/run`` has the step file of step 3, and what today's end at step 6 was, with and without dropout.

    PyTorch draws other numbers for dropout on processors of Intel; the run without it is the same everywhere.
    """
    more, last = ("--lora_dropout", "0"), "run/without_dropout.pt"
    if dropout == "with dropout":
        if dropout_mask() != EXPECTED["dropout_mask"]:
            pytest.skip("dropout draws other numbers on this processor")
        more, last = (), "run/adapter_final.pt"
    before, stored = metrics("run"), load_adapter(last)
    call(train_lora, "--config", "run/config.yaml", "--resume", "auto", *more)
    new, start = load_adapter("run/adapter_final_001.pt"), load_adapter("run/adapter_step00003.pt")
    way = distance(stored.tensors, start.tensors)
    assert distance(new.tensors, stored.tensors) <= RELATIVE * way
    if dropout == "with dropout":
        assert new.meta["train_config"].items() >= stored.meta["train_config"].items()  # settings have been added
        assert new.meta.items() >= (stored.meta | {"train_config": new.meta["train_config"]}).items()
        assert metrics("run")[:5] == before[:5]
        for row, expected in zip(metrics("run"), before, strict=True):
            new, old = numbers_in(row), numbers_in(expected)  # later versions note more
            assert {key: new[key] for key in old} == pytest.approx(old, rel=RELATIVE)


@pytest.mark.parametrize("kind", ["dora", "pissa"])
def test_step_files_of_every_kind_are_gone_on_from(call, kind):
    call(train_lora, "--config", f"steps/{kind}/config.yaml", "--output_dir", "new", "--resume",
         f"steps/{kind}/adapter_step00001.pt")
    new, stored, start = map(load_adapter, ("new/adapter_final.pt", f"adapters/{kind}.pt",
                                            f"steps/{kind}/adapter_step00001.pt"))
    assert distance(new.tensors, stored.tensors) <= RELATIVE * distance(stored.tensors, start.tensors)


# -- adapters ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(EXPECTED["adapters"]))
def test_adapters_change_the_model_as_they_did(name):
    expected, adapter = EXPECTED["adapters"][name], load_adapter(f"adapters/{name}")
    model = load_generator("tiny_16k")  # what the script starts from
    assert {key: adapter.meta.get(key) for key in expected["meta"]} == expected["meta"]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    merge_adapter(model, adapter)
    changes = {key: value - before[key] for key, value in model.state_dict().items()}
    changed = {key: change for key, change in changes.items() if change.any()}
    assert changed.keys() == expected["changes"].keys()
    for key, change in changed.items():
        assert_same_numbers(change, expected["changes"][key])


# -- memmaps ----------------------------------------------------------------------------------------------------------


def test_a_memmap_is_current(call):
    before = snapshot("memmap/set"), results("memmap")
    log = call(extract_features, "--config", "memmap/set.extract_config.yaml")
    assert "0 extracted, 2 already current, 0 left out, 0 failed" in log
    assert (snapshot("memmap/set"), results("memmap")) == before


def test_a_memmap_is_trained_on(call):
    call(train_lora, "--config", "run/config.yaml", "--data_dir", "memmap/set", "--val_dir", "memmap/set", "--duration",
         "8", "--output_dir", "new", "--steps", "1", "--batch_size", "1", "--grad_accum", "1", "--seed", "42")
    assert metrics("new")[0]["val_loss"] == pytest.approx(EXPECTED["memmap_val_loss"], rel=RELATIVE)


# -- interrupted extractions ------------------------------------------------------------------------------------------


def test_a_killed_extraction_is_finished(call):
    """Two of four clips were done when it was killed. Their videos are those of the finished ``features``."""
    done = {path: content for path, content in results("interrupted").items() if re.search(r"clip_[01]\.", path)}
    log = call(extract_features, "--config", "interrupted/extract_config.yaml")
    assert "2 extracted, 2 already current, 0 left out, 0 failed" in log
    after = results("interrupted")
    assert len(done) == 4 and {path: after[path] for path in done} == done
    for number in range(4):
        assert_same_clip(f"interrupted/clip_{number}", f"features/clip_{number}")
    first_four = Path("features/manifest.jsonl").read_text(encoding="utf-8").splitlines()[:4]
    assert Path("interrupted/manifest.jsonl").read_text(encoding="utf-8").splitlines() == first_four
    assert len(after) == 9


def assert_same_clip(one: str, two: str) -> None:
    bundles = [load_features(f"{stem}.npz") for stem in (one, two)]
    for key in ("clip_features", "sync_features", "text_features"):
        assert_close(*(getattr(bundle, key) for bundle in bundles))
    for key in ("duration", "prompt", "variant", "fps", "source_sha256", "settings"):
        assert getattr(bundles[0], key) == getattr(bundles[1], key)
    sounds = [soundfile.read(f"{stem}.flac", dtype="int32") for stem in (one, two)]
    assert np.array_equal(sounds[0][0], sounds[1][0]) and sounds[0][1] == sounds[1][1]


def test_the_second_part_of_a_set_of_sounds_completes_it(call):
    data = Path("interrupted_set/set.partial/0001/data")
    first_rows = {path.name: np.fromfile(path, "<f4").reshape(2, -1)[0] for path in data.iterdir()}
    log = call(extract_features, "--config", "interrupted_set/set.extract_config.yaml", "--shard", "2/2")
    assert "1 extracted, 0 already current, 0 left out, 0 failed" in log
    assert not data.exists() and not Path("interrupted_set/set.manifest.incomplete.jsonl").exists()
    rows = [json.loads(line) for line in Path("interrupted_set/set.manifest.jsonl").read_text().splitlines()]
    assert [(row["id"], row["status"]) for row in rows] == [("rain_0", "done"), ("wind_0", "done")]
    assert Path("interrupted_set/set.tsv").read_text() == (
        "id\tcaption\nrain_0\train on a roof\nwind_0\twind in trees\n")
    for name, row in first_rows.items():
        first, second = np.fromfile(Path("interrupted_set/set", name), "<f4").reshape(2, -1)
        assert np.array_equal(first, row)
        assert_same_numbers(second, EXPECTED["interrupted_set"][name.removesuffix(".memmap")][1])


# -- generated sounds -------------------------------------------------------------------------------------------------


def test_a_sound_is_there_already():
    """Only the number of the version, which is part of what decides a sound, is set to what it was."""
    before = snapshot("generated")
    code = "import sys, selva; selva.__version__ = sys.argv[1]; import infer; sys.exit(infer.main(sys.argv[2:]))"
    command = [sys.executable, "-c", code, EXPECTED["version"], "--config", "generated/clip_0.yaml"]
    result = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "0 made, 1 already there, 0 of 1 clip failed" in result.stderr
    assert snapshot("generated") == before and len(before) == 2


def test_the_settings_beside_a_sound_make_it_again(call):
    log = call(infer, "--config", "generated/clip_0.yaml", "--output", "new")
    assert "1 made, 0 already there" in log
    assert_close(*(soundfile.read(f"{folder}/clip_0.flac")[0] for folder in ("new", "generated")))
