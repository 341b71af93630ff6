"""Rows of a file: the values of numpy's own map, in memory that does not grow with the file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from make_data import put_memmap

from selva.data.memmap.reader import MemmapDataset, row_shapes
from selva.data.memmap.rows import RowFile
from selva.models.variants import TINY_16K
from selva.utils.errors import UserError

SHAPE = (7, 5, 3)
ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def values(tmp_path) -> np.ndarray:
    values = np.random.default_rng(0).standard_normal(SHAPE).astype("<f4")
    values.tofile(tmp_path / "a.memmap")
    return values


@pytest.fixture(params=["at a place", "by seeking"])
def rows(request, values, tmp_path, monkeypatch) -> RowFile:
    if request.param == "by seeking":
        monkeypatch.delattr(os, "preadv", raising=False)
    return RowFile(tmp_path / "a.memmap", SHAPE)


def test_rows_and_parts_of_rows_are_those_of_the_file(rows, values):
    for chosen in (0, 6, -1, np.int64(3), slice(2, 5), slice(0, 99), slice(4, 4), (3, slice(1, 3)), (-2, slice(None))):
        assert np.array_equal(rows[chosen], values[chosen]), chosen
    assert np.array_equal(np.stack(list(rows)), values) and len(rows) == 7
    with pytest.raises(IndexError):
        rows[7]


def test_what_was_read_is_the_callers_own(rows, values):
    first = rows[1]
    first += 1
    assert np.array_equal(rows[1], values[1])


def test_threads_may_read_at_the_same_time(rows, values):
    wrong = []

    def read(number: int) -> None:
        for place in range(300):
            index = (place * (number + 1)) % len(values)
            if not np.array_equal(rows[index], values[index]):
                wrong.append(index)

    threads = [threading.Thread(target=read, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_file_of_another_size_is_refused_and_one_that_shrinks_is_named(rows, tmp_path):
    with pytest.raises(UserError, match=r"a\.memmap: has 420 bytes, expected 480"):
        RowFile(tmp_path / "a.memmap", (8, 5, 3))
    os.truncate(tmp_path / "a.memmap", 400)
    with pytest.raises(UserError, match=r"a\.memmap: ends at byte 400"):
        rows[6]


# -- a large set -------------------------------------------------------------------------------------------------------

READ = """
import json, resource, sys
from pathlib import Path
from selva.data.memmap.reader import MemmapDataset
from selva.models.variants import TINY_16K

def megabytes(name):
    lines = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return int(lines[name].split()[0]) / 1024

before = megabytes("VmRSS")
resource.setrlimit(resource.RLIMIT_AS, (int(megabytes("VmSize") * 2**20) + 2**30,) * 2)
clips = MemmapDataset(Path(sys.argv[1]), TINY_16K)
for number in range(2000):
    clips.clip(number * 7919 % len(clips))
print(json.dumps([before, megabytes("VmHWM"), len(clips)]))
"""


def put_hollow_set(folder: Path, rows: int) -> None:
    """Write a set of zeros that takes no room on the disk."""
    folder.mkdir()
    shapes = row_shapes(TINY_16K, True)
    meta = {key: {"shape": [rows, *shape], "dtype": "torch.float32"} for key, shape in shapes.items()}
    (folder / "meta.json").write_text(json.dumps(meta))
    for key, entry in meta.items():
        with open(folder / f"{key}.memmap", "wb") as file:
            file.truncate(int(np.prod(entry["shape"])) * 4)
    lines = [f"clip_{number:08d}\ta bell rings in the distance, number {number}" for number in range(rows)]
    folder.with_name(f"{folder.name}.tsv").write_text("\n".join(["id\tlabel", *lines]) + "\n")


@pytest.mark.skipif(sys.platform != "linux", reason="limits and sizes of a process as Linux has them")
def test_memory_does_not_grow_with_the_set_and_a_limit_below_its_size_is_enough(tmp_path):
    """2000 rows of 10,000 and of 100,000, of 1.3 and 13 GB, by a process that may have 1 GiB more than at its start."""
    grown = []
    for rows in (10_000, 100_000):
        put_hollow_set(tmp_path / str(rows), rows)
        done = subprocess.run([sys.executable, "-c", READ, str(tmp_path / str(rows))], cwd=ROOT, text=True, check=True,
                              capture_output=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
        before, most, found = json.loads(done.stdout)
        assert found == rows
        grown.append(most - before)
    per_row = (grown[1] - grown[0]) / 90_000 * 2**20
    assert per_row < 1000, f"{per_row:.0f} bytes more for every row"  # id and prompt; the row itself has 127,000


def test_a_set_of_tensordict_is_read_as_it_was_written(tmp_path):
    tensors = put_memmap(tmp_path / "set", 4)
    clips = MemmapDataset(tmp_path / "set", TINY_16K)
    assert torch.equal(clips.clip(2).mean, tensors["mean"][2]) and torch.equal(clips.clip(3).sync_f,
                                                                              tensors["sync_features"][3])
