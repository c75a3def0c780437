"""A file is whole or not there."""

import os
import stat

import pytest

from geomkd.common.files import atomic_write


def test_file_is_written(tmp_path):
    path = tmp_path / "a.bin"
    for data in (b"first", b"second"):
        with atomic_write(path) as file:
            file.write(data)
        assert path.read_bytes() == data
        assert list(tmp_path.iterdir()) == [path]


def test_old_file_stays_until_the_end(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"old")
    with atomic_write(str(path)) as file:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"


@pytest.mark.parametrize("error", [OSError, ValueError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("before", [b"old", None])
def test_interrupted_write_leaves_what_was_there(tmp_path, error, before):
    path = tmp_path / "a"
    if before is not None:
        path.write_bytes(before)
    with pytest.raises(error), atomic_write(path) as file:
        file.write(b"half")
        raise error
    assert [p.read_bytes() for p in tmp_path.iterdir()] == ([before] if before else [])


def test_it_is_on_the_disk_before_it_takes_its_place(tmp_path, monkeypatch):
    done, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (done.append("fsync"), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (done.append("replace"), replace(a, b)))
    with atomic_write(tmp_path / "a") as file:
        file.write(b"x")
        assert done == []
    assert done == ["fsync", "replace"]


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_permissions_follow_the_umask(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        with atomic_write(tmp_path / "a") as file:
            file.write(b"x")
    finally:
        assert os.umask(before) == umask
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == mode


def test_folder_must_exist(tmp_path):
    with pytest.raises(FileNotFoundError), atomic_write(tmp_path / "none" / "a"):
        pass
