"""A folder appears whole or not at all."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from mlx_ttt.checkpoint.folder import complete_folder
from mlx_ttt.errors import OutputError


def contents(folder: Path) -> dict[str, str]:
    return {str(file.relative_to(folder)): file.read_text() for file in sorted(folder.rglob("*")) if file.is_file()}


@pytest.fixture
def out(tmp_path) -> Path:
    return tmp_path / "out"


@pytest.fixture
def old(out) -> Path:
    out.mkdir()
    (out / "config.json").write_text("old")
    return out


def test_appears_at_the_end(out):
    with complete_folder(out, 10) as folder:
        (folder / "a").write_text("1")
        assert not out.exists()
    assert contents(out.parent) == {"out/a": "1"}
    assert out.stat().st_mode & 0o777 == 0o777 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_nothing_remains_of_a_failure(out, error):
    with pytest.raises(error), complete_folder(out, 10) as folder:
        (folder / "a").write_text("1")
        raise error
    assert list(out.parent.iterdir()) == []


def test_exists(old):
    with pytest.raises(OutputError, match=r"exists already; --overwrite"), complete_folder(old, 10):
        pass
    assert contents(old.parent) == {"out/config.json": "old"}


def test_overwrite(old):
    with complete_folder(old, 10, overwrite=True) as folder:
        (folder / "a").write_text("1")
        assert contents(old) == {"config.json": "old"}
    assert contents(old.parent) == {"out/a": "1"}


def test_overwrite_keeps_the_old_on_failure(old):
    with pytest.raises(KeyboardInterrupt), complete_folder(old, 10, overwrite=True) as folder:
        (folder / "a").write_text("1")
        raise KeyboardInterrupt
    assert contents(old.parent) == {"out/config.json": "old"}


def test_overwrite_keeps_the_old_when_the_last_step_fails(old, monkeypatch):
    rename = Path.rename

    def fails_once(self, target):
        if self.name == "new":
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fails_once)
    with pytest.raises(OutputError, match="Input/output error"), complete_folder(old, 10, overwrite=True):
        pass
    assert contents(old.parent) == {"out/config.json": "old"}


def test_overwrite_only_replaces_model_directories(out):
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    with pytest.raises(OutputError, match="not a model directory"), complete_folder(out, 10, overwrite=True):
        pass
    assert contents(out.parent) == {"out/thesis.tex": "years of work"}


def test_overwrite_of_a_file(out):
    out.write_text("a file")
    with pytest.raises(OutputError, match="not a model directory"), complete_folder(out, 10, overwrite=True):
        pass
    assert out.read_text() == "a file"


def test_no_parent(tmp_path):
    with (
        pytest.raises(OutputError, match=r"absent does not exist; create it"),
        complete_folder(tmp_path / "absent/out", 1),
    ):
        pass


def test_name_too_long(tmp_path):
    with pytest.raises(OutputError, match="File name too long"), complete_folder(tmp_path / ("x" * 300), 1):
        pass


def test_disk_too_small(out):
    message = r"disk is full: 1000000000\.00 GB are needed, .* GB are free"
    with pytest.raises(OutputError, match=message), complete_folder(out, 10**18):
        pass
    assert list(out.parent.iterdir()) == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_disk_full_on_the_way(out, code):
    with pytest.raises(OutputError, match="disk is full"), complete_folder(out, 10) as folder:
        (folder / "a").write_text("1")
        raise OSError(code, os.strerror(code))
    assert list(out.parent.iterdir()) == []


def test_really_full_disk(out):
    """/dev/full refuses every byte, as a full disk does."""
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    with pytest.raises(OutputError, match="disk is full"), complete_folder(out, 10) as folder:
        (folder / "a").symlink_to("/dev/full")
        (folder / "a").write_text("1")
    assert list(out.parent.iterdir()) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_no_permission(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(OutputError, match="Permission denied"), complete_folder(tmp_path / "out", 10):
        pass
