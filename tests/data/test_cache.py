"""The cache of a data folder: what is found again, what is made again, and where nothing can be written."""

from __future__ import annotations

import json
import logging
import os
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest
import torch

import selva.data.cache
from selva.data.cache import CACHE_FOLDER, FILES_FILE, DataCache

SETTINGS = {"audio": "abc", "start_sec": 0.32, "vae": ["v1-16.pth", 5]}
TENSORS = {"mean": torch.arange(6.0).view(2, 3), "std": torch.ones(3, 2).mT}


def entries(folder):
    return sorted((folder / CACHE_FOLDER).rglob("*.safetensors"))


def old_file(path, content=b"sound"):
    path.write_bytes(content)
    os.utime(path, ns=(10**18, 10**18))
    return path


def test_an_entry_is_found_by_its_settings_only(tmp_path):
    DataCache(tmp_path).save("latents", SETTINGS, TENSORS)
    cache = DataCache(tmp_path)
    found = cache.load("latents", dict(reversed(SETTINGS.items())))
    assert found is not None
    assert found.keys() == TENSORS.keys() and all(torch.equal(found[k], v) for k, v in TENSORS.items())
    assert cache.load("texts", SETTINGS) is None
    for key in SETTINGS:
        assert cache.load("latents", {**SETTINGS, key: "other"}) is None
    assert {p.name for p in tmp_path.iterdir()} == {CACHE_FOLDER} and len(entries(tmp_path)) == 1


def test_a_folder_whose_name_is_not_utf8_has_a_cache_like_any_other(latin1_folder, caplog):
    DataCache(latin1_folder).save("latents", SETTINGS, TENSORS)
    found = DataCache(latin1_folder).load("latents", SETTINGS)
    assert found is not None and found.keys() == TENSORS.keys() and not caplog.text


@pytest.mark.parametrize("spoil", ["cut", "rubbish", "empty", "other settings", "not finite"])
def test_an_entry_that_is_not_right_is_made_again(tmp_path, caplog, spoil):
    cache = DataCache(tmp_path)
    cache.save("latents", SETTINGS, TENSORS)
    (path,) = entries(tmp_path)
    content = path.read_bytes()
    if spoil == "other settings":
        path.write_bytes(content.replace(b"0.32", b"0.64"))
    elif spoil == "not finite":
        path.write_bytes(content[:-4] + b"\x00\x00\xc0\x7f")
    else:
        path.write_bytes({"cut": content[:-7], "rubbish": b"x" * 100, "empty": b""}[spoil])
    assert cache.load("latents", SETTINGS) is None and path.name in caplog.text
    cache.save("latents", SETTINGS, TENSORS)
    assert cache.load("latents", SETTINGS) is not None


def test_files_are_hashed_once(tmp_path, monkeypatch):
    hashed = []
    original = selva.data.cache.source_hash
    monkeypatch.setattr("selva.data.cache.source_hash", lambda path: hashed.append(path.name) or original(path))
    paths = [old_file(tmp_path / f"{name}.wav", name.encode()) for name in "abc"]
    first = DataCache(tmp_path)
    digests = [first.content_hash(path) for path in paths]
    first.flush()
    second = DataCache(tmp_path)
    assert [second.content_hash(path) for path in paths] == digests and hashed == ["a.wav", "b.wav", "c.wav"]
    assert len(set(digests)) == 3

    paths[1].write_bytes(b"B")  # same size, later
    third = DataCache(tmp_path)
    changed = [third.content_hash(path) for path in paths]
    assert hashed[3:] == ["b.wav"] and changed[1] != digests[1] and changed[::2] == digests[::2]


def test_a_file_younger_than_its_time_stamp_can_tell_is_not_remembered(tmp_path):
    path = tmp_path / "a.wav"
    path.write_bytes(b"one")
    stamp = path.stat().st_mtime_ns
    cache = DataCache(tmp_path)
    first = cache.content_hash(path)
    path.write_bytes(b"two")
    os.utime(path, ns=(stamp, stamp))
    assert cache.content_hash(path) != first


@pytest.mark.parametrize("content", ["", "{", "[]", '{"a.wav": 1}', '{"a.wav": {"stamp": [], "notes": {}}}', "\x00"])
def test_a_damaged_list_of_files_is_started_afresh(tmp_path, content):
    path = old_file(tmp_path / "a.wav")
    (tmp_path / CACHE_FOLDER).mkdir()
    (tmp_path / CACHE_FOLDER / FILES_FILE).write_text(content)
    cache = DataCache(tmp_path)
    assert cache.note(path, "answer", lambda: 42) == 42
    cache.flush()
    assert json.loads((tmp_path / CACHE_FOLDER / FILES_FILE).read_text())["a.wav"]["notes"] == {"answer": 42}


def test_where_the_folder_cannot_be_written_a_temporary_one_serves(tmp_path, caplog):
    (tmp_path / CACHE_FOLDER).write_text("a file where the folder should be")
    cache = DataCache(tmp_path)
    for start in range(3):
        cache.save("latents", {**SETTINGS, "start_sec": start}, TENSORS)
    assert all(cache.load("latents", {**SETTINGS, "start_sec": start}) for start in range(3))
    assert caplog.text.count("cannot be written") == 1
    assert {p.name for p in tmp_path.iterdir()} == {CACHE_FOLDER}
    assert DataCache(tmp_path).load("latents", {**SETTINGS, "start_sec": 0}) is None


def test_what_is_there_is_read_although_nothing_can_be_added(tmp_path, monkeypatch):
    DataCache(tmp_path).save("latents", SETTINGS, TENSORS)
    cache = DataCache(tmp_path)
    original = selva.data.cache.atomic_path

    def read_only(path):
        if path.is_relative_to(tmp_path):
            raise PermissionError(13, "Permission denied", str(path))
        return original(path)

    monkeypatch.setattr("selva.data.cache.atomic_path", read_only)
    cache.save("latents", {**SETTINGS, "start_sec": 1}, TENSORS)
    assert cache.load("latents", SETTINGS) and cache.load("latents", {**SETTINGS, "start_sec": 1})
    assert len(entries(tmp_path)) == 1


def test_switched_off_it_leaves_the_folder_alone(tmp_path, caplog):
    DataCache(tmp_path).save("latents", SETTINGS, TENSORS)
    cache = DataCache(tmp_path, enabled=False)
    assert cache.load("latents", SETTINGS) is None
    cache.save("latents", {**SETTINGS, "start_sec": 1}, TENSORS)
    cache.content_hash(old_file(tmp_path / "a.wav"))
    cache.flush()
    assert cache.load("latents", {**SETTINGS, "start_sec": 1}) and caplog.text == ""
    assert len(entries(tmp_path)) == 1 and not (tmp_path / CACHE_FOLDER / FILES_FILE).exists()


def test_a_list_of_files_nested_too_deeply_is_started_afresh(tmp_path):
    (tmp_path / CACHE_FOLDER).mkdir()
    (tmp_path / CACHE_FOLDER / FILES_FILE).write_text('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}")
    assert DataCache(tmp_path).note(old_file(tmp_path / "a.wav"), "answer", lambda: 42) == 42


def test_two_sounds_that_swapped_their_names_swap_their_hashes(tmp_path):
    one, two = (old_file(tmp_path / name, content) for name, content in (("a.wav", b"one"), ("b.wav", b"two")))
    first = DataCache(tmp_path)
    hashes = [first.content_hash(path) for path in (one, two)]
    first.flush()
    one.rename(tmp_path / "c")
    two.rename(one)
    (tmp_path / "c").rename(two)
    assert [DataCache(tmp_path).content_hash(path) for path in (one, two)] == hashes[::-1]


def test_a_sound_with_its_old_time_put_back_is_read_again(tmp_path):
    path = old_file(tmp_path / "a.wav", b"one")
    first = DataCache(tmp_path)
    before = first.content_hash(path)
    first.flush()
    while path.stat().st_ctime_ns == json.loads(
        (tmp_path / CACHE_FOLDER / FILES_FILE).read_text()
    )["a.wav"]["stamp"]["ctime_ns"]:  # until the clock of the disk ticks
        old_file(path, b"two")
    assert DataCache(tmp_path).content_hash(path) != before


def test_notes_of_an_earlier_version_are_believed_until_something_new_is_noted(tmp_path):
    path = old_file(tmp_path / "a.wav")
    record = {"a.wav": {"stamp": {"size": 5, "mtime_ns": 10**18}, "notes": {"answer": 42}}}
    (tmp_path / CACHE_FOLDER).mkdir()
    (tmp_path / CACHE_FOLDER / FILES_FILE).write_text(json.dumps(record))
    cache = DataCache(tmp_path)
    assert cache.note(path, "answer", lambda: 43) == 42
    cache.flush()
    assert json.loads((tmp_path / CACHE_FOLDER / FILES_FILE).read_text()) == record
    cache.note(path, "more", lambda: 1)
    cache.flush()
    stamp = json.loads((tmp_path / CACHE_FOLDER / FILES_FILE).read_text())["a.wav"]["stamp"]
    assert stamp["inode"] == path.stat().st_ino and stamp["size"] == 5
    os.utime(path, ns=(10**18, 10**18 + 1))
    assert DataCache(tmp_path).note(path, "answer", lambda: 43) == 43


# -- several processes, and no room -----------------------------------------------------------------------------------


def test_a_second_process_waits_and_says_for_whom(tmp_path, caplog):
    first, second, order = DataCache(tmp_path), DataCache(tmp_path), []

    def build():
        with second.building():
            order.append("second" if second.load("latents", SETTINGS) else "second found nothing")

    with first.building():
        thread = threading.Thread(target=build)
        thread.start()
        while "waiting until it has finished" not in caplog.text and thread.is_alive():
            thread.join(0.01)
        first.save("latents", SETTINGS, TENSORS)
        order.append("first")
    thread.join(30)
    assert order == ["first", "second"] and f"process {os.getpid()} on {socket.gethostname()}" in caplog.text
    assert [p.name for p in (tmp_path / CACHE_FOLDER).iterdir()] == ["latents"]


def test_notes_of_two_processes_are_kept(tmp_path):
    paths = [old_file(tmp_path / f"{name}.wav", name.encode()) for name in "ab"]
    caches = [DataCache(tmp_path), DataCache(tmp_path)]
    for cache, path in zip(caches, paths, strict=True):
        cache.content_hash(path)
    for cache in caches:
        cache.flush()
    assert json.loads((tmp_path / CACHE_FOLDER / FILES_FILE).read_text()).keys() == {"a.wav", "b.wav"}


def test_a_full_disk_is_survived_in_memory(tmp_path, caplog):
    """A limit on the size of files stands for the full disk, on which the temporary folder lies too."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    cache = DataCache(tmp_path)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        cache.save("latents", SETTINGS, TENSORS)
        cache.save("latents", {**SETTINGS, "start_sec": 1}, TENSORS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    found = cache.load("latents", SETTINGS)
    assert found is not None and all(torch.equal(found[k], v) for k, v in TENSORS.items())
    assert cache.load("latents", {**SETTINGS, "start_sec": 1}) and "the disk is full" in caplog.text
    assert "kept in memory" in caplog.text and not entries(tmp_path)


def test_temporary_folders_are_deleted_on_request(tmp_path, monkeypatch):
    """torchrun's processes end without Python's own clean-up."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    cache = DataCache(tmp_path / "data", enabled=False)
    cache.save("latents", SETTINGS, TENSORS)
    assert list(tmp_path.glob("selva_cache_*"))
    selva.data.cache.remove_temporary_caches()
    assert not list(tmp_path.glob("selva_cache_*"))


def test_temporary_folders_of_killed_processes_are_deleted_at_the_next_start(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    code = ("import sys, time, pathlib, selva.data.cache as c, torch\n"
            "cache = c.DataCache(pathlib.Path('x'), enabled=False)\n"
            "cache.save('latents', {}, {'a': torch.ones(3)})\nprint('saved', flush=True)\ntime.sleep(600)")
    processes = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env={
        **os.environ, "TMPDIR": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[2])}) for _ in range(2)]
    try:
        for process in processes:
            assert process.stdout is not None and process.stdout.readline() == b"saved\n"
        (tmp_path / "selva_cache_earlier").mkdir()  # of a version without locks: nobody knows
        processes[0].kill()
        processes[0].wait()
        folders = set(tmp_path.glob("selva_cache_*"))
        assert len(folders) == 3
        DataCache(tmp_path, enabled=False)
        assert set(tmp_path.glob("selva_cache_*")) == folders  # all of them are young
        for folder in folders:
            os.utime(folder, (0, 0))
        caplog.set_level(logging.INFO)
        DataCache(tmp_path, enabled=False)
        assert len(list(tmp_path.glob("selva_cache_*"))) == 2 and caplog.text.count("left behind by a killed run") == 1
        processes[1].kill()
        processes[1].wait()
        DataCache(tmp_path, enabled=False)
        assert [path.name for path in tmp_path.glob("selva_cache_*")] == ["selva_cache_earlier"]
    finally:
        for process in processes:
            process.kill()
            process.wait()
