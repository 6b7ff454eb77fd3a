"""A folder appears whole or not at all."""

from __future__ import annotations

import errno
import itertools
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from mlx_ttt.checkpoint.directory import MODEL_FILE_TEXT
from mlx_ttt.checkpoint.folder import complete_folder
from mlx_ttt.errors import OutputError

OLD = '{"model_type": "ttt"}'


def contents(folder: Path) -> dict[str, str]:
    return {str(file.relative_to(folder)): file.read_text() for file in sorted(folder.rglob("*")) if file.is_file()}


@pytest.fixture
def out(tmp_path) -> Path:
    return tmp_path / "out"


@pytest.fixture
def old(out) -> Path:
    out.mkdir()
    (out / "config.json").write_text(OLD)
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
    assert contents(old.parent) == {"out/config.json": OLD}


def test_overwrite(old):
    with complete_folder(old, 10, overwrite=True) as folder:
        (folder / "a").write_text("1")
        assert contents(old) == {"config.json": OLD}
    assert contents(old.parent) == {"out/a": "1"}


def test_overwrite_keeps_the_old_on_failure(old):
    with pytest.raises(KeyboardInterrupt), complete_folder(old, 10, overwrite=True) as folder:
        (folder / "a").write_text("1")
        raise KeyboardInterrupt
    assert contents(old.parent) == {"out/config.json": OLD}


@pytest.fixture
def renaming(monkeypatch) -> Callable[..., None]:
    """A function that makes the n-th renaming and all after it raise an exception, before or after they are done."""

    def fail(*numbers: int, error: BaseException, done: bool = False) -> None:
        rename, calls = Path.rename, itertools.count(1)

        def failing(self, target):
            failed = next(calls) in numbers
            if done or not failed:
                rename(self, target)
            if failed:
                raise error

        monkeypatch.setattr(Path, "rename", failing)

    return fail


def replace(out: Path) -> None:
    with complete_folder(out, 10, overwrite=True) as folder:
        (folder / "a").write_text("1")


def test_overwrite_keeps_the_old_when_the_last_step_fails(old, renaming):
    renaming(2, error=OSError(errno.EIO, "Input/output error"))
    with pytest.raises(OutputError, match="Input/output error"):
        replace(old)
    assert contents(old.parent) == {"out/config.json": OLD}


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(), MemoryError()])
@pytest.mark.parametrize("number, done", [(1, False), (1, True), (2, False)])
def test_overwrite_interrupted_before_the_new_is_in_place(old, renaming, error, number, done):
    renaming(number, error=error, done=done)
    with pytest.raises(type(error)):
        replace(old)
    assert contents(old.parent) == {"out/config.json": OLD}


def test_overwrite_interrupted_when_the_new_is_in_place(old, renaming):
    renaming(2, error=KeyboardInterrupt(), done=True)
    with pytest.raises(KeyboardInterrupt):
        replace(old)
    assert contents(old.parent) == {"out/a": "1"}


def test_overwrite_interrupted_again_and_again(old, renaming):
    """What was there may be left under another name, but is never deleted."""
    renaming(2, 3, error=KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        replace(old)
    assert OLD in contents(old.parent).values()


def test_overwrite_says_where_the_old_is(old, renaming):
    renaming(2, 3, error=OSError(errno.EIO, "Input/output error"))
    with pytest.raises(OutputError, match=r"out: cannot be put back \(Input/output error\); it is now (.*)$") as error:
        replace(old)
    kept = Path(str(error.value).rsplit("it is now ")[1])
    assert contents(kept) == {"config.json": OLD}


def test_what_comes_into_being_meanwhile_is_kept(out):
    with pytest.raises(OutputError, match="exists already"), complete_folder(out, 10):
        out.write_text("another program's")
    assert contents(out.parent) == {"out": "another program's"}


def test_what_comes_into_the_old_meanwhile_is_kept(old):
    with pytest.raises(OutputError, match=r"holds 'thesis\.tex'"), complete_folder(old, 10, overwrite=True):
        (old / "thesis.tex").write_text("years of work")
    assert contents(old.parent) == {"out/config.json": OLD, "out/thesis.tex": "years of work"}


def refused(out: Path, why: str) -> None:
    before = contents(out.parent)
    with pytest.raises(OutputError, match=f"^{out}: {why}, so --overwrite leaves it alone; choose another place$"):
        replace(out)
    assert contents(out.parent) == before


def test_overwrite_of_an_empty_folder(out):
    out.mkdir()
    replace(out)
    assert contents(out) == {"a": "1"}


def test_overwrite_of_all_that_a_model_directory_has(old):
    for name in (
        *("generation_config.json", "model.safetensors", "model.safetensors.index.json", "README.md"),
        *("model-00001-of-00012.safetensors", "tokenizer.json", "tokenizer.model", "tokenizer_config.json"),
        *("special_tokens_map.json", "added_tokens.json", "chat_template.jinja"),
    ):
        (old / name).touch()
    (old / "README.md").write_text("---\nlibrary_name: mlx\n")
    (old / "ttt.py").write_text(MODEL_FILE_TEXT)
    replace(old)
    assert contents(old) == {"a": "1"}


@pytest.mark.parametrize("name", ["README.md", "ttt.py"])
def test_what_a_person_wrote_is_not_overwritten(old, name):
    (old / name).write_text("my notes")
    with pytest.raises(OutputError, match=f"holds a {name} that somebody has written"):
        replace(old)
    assert (old / name).read_text() == "my notes"


FOREIGN = ["thesis.tex", ".git", "pytorch_model.bin", "model.safetensors.bak", "model-best.safetensors", "tokenizer.py"]


@pytest.mark.parametrize("name", FOREIGN)
def test_overwrite_of_a_folder_with_other_files(old, name):
    (old / name).write_text("years of work")
    refused(old, f"holds '{re.escape(name)}', which is no part of a model directory")


def test_the_first_foreign_entry_is_named(old):
    for name in FOREIGN:
        (old / name).touch()
    refused(old, r"holds '\.git', which is no part of a model directory")


def test_names_in_messages_are_harmless(old):
    (old / "a\n\x1b[2J").touch()
    refused(old, r"holds 'a\\n\\x1b\[2J', which is no part of a model directory")


@pytest.mark.parametrize("make", [Path.mkdir, lambda path: path.symlink_to("config.json"), os.mkfifo])
def test_overwrite_of_what_only_has_the_name_of_a_file(old, make):
    make(old / "tokenizer.json")
    refused(old, r"holds 'tokenizer\.json', which is not a plain file")


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"model_type": "llama"}', '{"model_type": ["ttt"]}', None])
def test_overwrite_of_another_model(old, text):
    (old / "model.safetensors").write_text("a model")
    (old / "config.json").unlink()
    if text is not None:
        (old / "config.json").write_text(text)
    refused(old, r"has no config\.json of a TTT model")


def test_overwrite_of_a_file(out):
    out.write_text("a file")
    refused(out, "is not a folder")


def test_overwrite_of_a_link(old):
    link = old.with_name("link")
    link.symlink_to(old)
    refused(link, "is a link")
    assert link.is_symlink()


def test_an_error_about_another_file_names_it(out, tmp_path):
    with pytest.raises(OutputError, match=f"^{tmp_path}/absent: No such file or directory$"), complete_folder(out, 10):
        (tmp_path / "absent").read_text()


@pytest.mark.parametrize("name", ["absent/a", "x" * 300])
def test_an_error_about_a_new_file_names_the_folder(out, name):
    with pytest.raises(OutputError, match=f"^{out}: cannot write there: "), complete_folder(out, 10) as folder:
        (folder / name).write_text("1")


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
