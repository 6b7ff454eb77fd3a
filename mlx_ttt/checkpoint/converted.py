"""The cache of converted models: a repository on the Hub is converted once, and found here from then on.

    CACHE/models-1/org--name/COMMIT               a model directory, or a link to one in the Hub's own cache
    CACHE/models-1/org--name/COMMIT-TOKENIZER     the same with a tokenizer that the user gave, by its hash
    CACHE/models-1/org--name/revisions/main       which of them a branch or tag means: it stays that one

CACHE is MLX_TTT_CACHE, or mlx_ttt in XDG_CACHE_HOME or ~/.cache.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import tempfile
import urllib.parse
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from ..files import written_whole
from .directory import CONFIG, WEIGHTS, WEIGHTS_INDEX
from .folder import is_workshop

_FORMAT = "models-1"  # another number when model directories of before cannot be used any more
_REVISIONS = "revisions"
_COMMIT = 40  # characters
_NAME = re.compile(r"[0-9a-f]{40}(-[0-9a-f]+)?")


def cache_root() -> Path:
    """The folder of all converted models."""
    given = os.environ.get("MLX_TTT_CACHE")
    cache = Path(given) if given else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "mlx_ttt")
    return cache / _FORMAT


@dataclass(frozen=True)
class Entry:
    """A converted model.

    Attributes:
        name: the commit, and the tokenizer's hash if one was given.
        revisions: the branches and tags that mean it.
        nbytes: its size; 0 if it is a link into the Hub's cache.
    """

    repo: str
    name: str
    path: Path
    revisions: tuple[str, ...]
    nbytes: int

    @property
    def commit(self) -> str:
        return self.name[:_COMMIT]


@dataclass(frozen=True)
class Home:
    """What the cache holds of one repository."""

    repo: str

    @property
    def folder(self) -> Path:
        return cache_root() / self.repo.replace("/", "--")  # no name on the Hub has two dashes in a row

    def find(self, revision: str, suffix: str = "") -> Path | None:
        """The model directory of a revision, if it is here.

        Args:
            suffix: of the name, if a tokenizer was given; else the one that was used last is meant.
        """
        pinned = self._pinned(revision)
        if pinned is None:
            return None
        name = pinned[:_COMMIT] + suffix if suffix else pinned
        path = self.folder / name
        if not _is_complete(path):
            return None
        if name != pinned:
            self.pin(revision, name)
        return path

    def commit(self, revision: str) -> str | None:
        """The commit that a revision has been since it was first asked for."""
        pinned = self._pinned(revision)
        return None if pinned is None else pinned[:_COMMIT]

    def pin(self, revision: str, name: str) -> None:
        """Remember which model directory a revision means."""
        file = self._file(revision)
        file.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(file) as complete:
            complete.write_text(name, encoding="ascii")

    def link(self, name: str, target: Path) -> Path:
        """Enter a model directory that lies elsewhere."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with written_whole(self.folder / name) as complete:
            complete.symlink_to(target, target_is_directory=True)
        return self.folder / name

    def entries(self) -> list[Entry]:
        """All that is here and complete."""
        revisions = self.folder / _REVISIONS
        meant = {urllib.parse.unquote(file.name): _read(file) for file in sorted(revisions.glob("[!.]*"))}
        return [
            Entry(self.repo, path.name, path, tuple(r for r, name in meant.items() if name == path.name), _size(path))
            for path in sorted(self.folder.glob("[!.]*"))
            if path != revisions and _is_complete(path)
        ]

    @contextmanager
    def locked(self, waiting: Callable[[], None]) -> Iterator[None]:
        """A context manager in which no other process changes what is here.

        Args:
            waiting: called if another process is at it, before waiting for it.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with self.folder.with_name(f".{self.folder.name}.lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                waiting()
                fcntl.flock(file, fcntl.LOCK_EX)
            except OSError:  # a file system without locks: two may convert, and one of the copies stays
                yield
                return
            self.folder.mkdir(parents=True, exist_ok=True)  # the other process may have removed it
            graves = self.folder.parent.glob(".removed-*")
            for left in [*filter(is_workshop, self.folder.iterdir()), *graves]:  # of a process that was killed
                shutil.rmtree(left, ignore_errors=True)
            try:
                yield
            finally:
                with suppress(OSError):  # nothing came of it
                    self.folder.rmdir()

    def remove(self) -> int:
        """Delete all that is here, at once for those who look; returns its size in bytes."""
        with self.locked(lambda: None):
            nbytes = sum(entry.nbytes for entry in self.entries())
            grave = Path(tempfile.mkdtemp(prefix=".removed-", dir=self.folder.parent))
            self.folder.rename(grave / "folder")
            shutil.rmtree(grave)
        return nbytes

    def clear(self, name: str) -> None:
        """Delete what is left of a model directory that is not complete."""
        path = self.folder / name
        if path.is_symlink() or path.is_file():
            path.unlink()
        elif path.is_dir() and not _is_complete(path):
            shutil.rmtree(path)

    def unlink(self) -> None:
        """Delete the links into the Hub's cache."""
        for entry in self.entries():
            if entry.path.is_symlink():
                entry.path.unlink()

    def _pinned(self, revision: str) -> str | None:
        name = (_read(self._file(revision)) or "").strip()
        return name if _NAME.fullmatch(name) else None  # or a file that was damaged

    def _file(self, revision: str) -> Path:
        return self.folder / _REVISIONS / urllib.parse.quote(revision, safe="")


def homes() -> list[Home]:
    """The repositories of which the cache holds something."""
    folders = sorted(folder for folder in cache_root().glob("[!.]*--*") if folder.is_dir())
    return [home for folder in folders if (home := Home(folder.name.replace("--", "/", 1))).entries()]


def _is_complete(path: Path) -> bool:
    """Whether a model directory is there: a link into the Hub's cache may lead to files that were deleted."""
    has_all = (path / CONFIG).is_file() and any((path / name).is_file() for name in (WEIGHTS, WEIGHTS_INDEX))
    return has_all and (not path.is_symlink() or all(file.exists() for file in path.iterdir()))


def _size(path: Path) -> int:
    return 0 if path.is_symlink() else sum(file.stat().st_size for file in path.iterdir())


def _read(file: Path) -> str | None:
    with suppress(OSError, UnicodeDecodeError):
        return file.read_text(encoding="ascii")
    return None
