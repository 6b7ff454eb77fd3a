"""Files that are written whole or not at all, and the paths that may be written to."""

from __future__ import annotations

import os

import pytest

from mlx_ttt.errors import OutputError
from mlx_ttt.files import output_file, written_whole


def test_replaced_when_it_is_whole(tmp_path):
    file = tmp_path / "a"
    file.write_text("old")
    with written_whole(file, suffix=".txt") as complete:
        assert complete.name == "a.txt"
        complete.write_text("new")
        assert file.read_text() == "old"
    assert file.read_text() == "new" and os.listdir(tmp_path) == ["a"]


def test_as_it_was_after_an_error(tmp_path):
    file = tmp_path / "a"
    file.write_text("old")
    with pytest.raises(ZeroDivisionError), written_whole(file) as complete:
        complete.write_text("half")
        raise ZeroDivisionError
    assert file.read_text() == "old" and os.listdir(tmp_path) == ["a"]


def test_a_path_that_may_be_written_to(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "folder" / "a")
    assert output_file(tmp_path / "link") == tmp_path / "folder" / "a"
    with pytest.raises(OutputError, match=r"folder: exists and is not a file"):
        output_file(tmp_path / "folder")
    with pytest.raises(OutputError, match=r"nowhere/a: there is no such folder"):
        output_file(tmp_path / "nowhere" / "a")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written_to(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(OutputError, match="the folder is not writable"):
        output_file(tmp_path / "a")
