"""Tests of selva.utils.files."""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat

import pytest

from selva.utils.files import as_utf8, atomic_path, atomic_write_text


def test_a_path_that_is_not_utf_8_is_written_so_that_json_reads_it_back(tmp_path):
    path = "caf\udce9/a\\udce9.mp4"
    assert json.loads(as_utf8(json.dumps(path, ensure_ascii=False))) == path
    atomic_write_text(tmp_path / "a.json", json.dumps([path, "caf\u00e9"], ensure_ascii=False))
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == [path, "caf\u00e9"]
    assert "caf\u00e9" in (tmp_path / "a.json").read_text(encoding="utf-8")


def test_the_file_appears_only_when_the_block_ends(tmp_path):
    path = tmp_path / "new" / "a.bin"
    with atomic_path(path) as temporary:
        temporary.write_bytes(b"12345")
        assert not path.exists()
        assert temporary.name == "a.bin"
    assert path.read_bytes() == b"12345"
    assert [p.name for p in path.parent.iterdir()] == ["a.bin"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_keeps_the_old_file_and_leaves_nothing_behind(tmp_path, error):
    path = tmp_path / "a.pt"
    path.write_bytes(b"old")
    with pytest.raises(error), atomic_path(path) as temporary:
        temporary.write_bytes(b"half of the ne")
        raise error("stop")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.pt"]


def test_an_interruption_stays_one_when_its_clean_up_fails(tmp_path, monkeypatch):
    def closed_twice(folder):
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", closed_twice)
        with pytest.raises(KeyboardInterrupt), atomic_path(tmp_path / "adapter.pt") as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt
        with atomic_path(tmp_path / "other.pt") as temporary:  # needs no more than to remove an empty folder
            temporary.write_text("whole")
    assert (tmp_path / "other.pt").read_text() == "whole" and not (tmp_path / "adapter.pt").exists()


def test_a_listing_does_not_meet_the_unfinished_file(tmp_path):
    with atomic_path(tmp_path / "clip_001.npz") as temporary:
        temporary.write_bytes(b"x")
        assert not list(tmp_path.glob("*.npz"))
    assert len(list(tmp_path.glob("*.npz"))) == 1


def test_a_long_name_has_room(tmp_path):
    path = tmp_path / ("a" * 251 + ".npz")
    with atomic_path(path) as temporary:
        temporary.write_bytes(b"x")
    assert path.exists()


def test_a_block_that_writes_nothing_is_an_error(tmp_path):
    path = tmp_path / "a.pt"
    path.write_bytes(b"old")
    with pytest.raises(FileNotFoundError), atomic_path(path):
        pass
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.pt"]


def test_a_folder_is_not_replaced(tmp_path):
    with pytest.raises(IsADirectoryError, match="is a folder"), atomic_path(tmp_path):
        pass


def test_text_is_utf8_and_keeps_its_line_ends(tmp_path):
    atomic_write_text(tmp_path / "a.tsv", "id\tlabel\nä\tb\r\n")
    assert (tmp_path / "a.tsv").read_bytes() == "id\tlabel\nä\tb\r\n".encode()


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EOPNOTSUPP, errno.EIO, errno.ENOSPC])
@pytest.mark.parametrize("of_folder", [True, False])
def test_a_folder_that_cannot_be_flushed_stops_nothing(tmp_path, monkeypatch, code, of_folder):
    def fail(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode) is of_folder:
            raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fail)
    path = tmp_path / "a.txt"
    if of_folder and code in (errno.EINVAL, errno.EOPNOTSUPP):  # the answer of some shares and encrypted file systems
        atomic_write_text(path, "text")
        assert path.read_text() == "text"
        return
    with pytest.raises(OSError, match=r"a\.txt") as caught:
        atomic_write_text(path, "text")
    assert caught.value.errno == code and path.exists() is of_folder  # what was not flushed itself is not put in place
