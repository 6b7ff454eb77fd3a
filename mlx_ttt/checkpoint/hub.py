"""Downloads repositories from the Hugging Face Hub into its cache on this machine, and uploads folders to it."""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import re
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from huggingface_hub import (
    HfApi,
    HFCacheInfo,
    constants,
    get_cached_repo_tree,
    get_token,
    hf_hub_download,
    scan_cache_dir,
    snapshot_download,
)
from huggingface_hub.errors import (
    CachedRepoTreeNotFoundError,
    CacheNotFound,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import disable_progress_bars, validate_repo_id

from ..errors import HubError, TTTError
from .directory import CONFIG, GENERATION_CONFIG, TOKENIZER_COMPANIONS, TOKENIZER_CONFIG, TOKENIZER_FILES
from .source import weight_map, weights_among
from .untrusted import quoted

_REPO = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*/[A-Za-z0-9_][A-Za-z0-9._-]*")
_TOKENIZER = (*TOKENIZER_FILES, TOKENIZER_CONFIG, *TOKENIZER_COMPANIONS)
_BESIDE = (CONFIG, GENERATION_CONFIG, *_TOKENIZER, "*.index.json")
_ADVICE = {  # by HTTP status
    401: "; log in with `hf auth login`",
    403: "; log in with `hf auth login` as somebody who may",
    429: "; that was too often: wait, or log in with `hf auth login`",
}
_READ_AT_ONCE = 1 << 22  # bytes
MAIN = "main"  # the branch of a repository that is meant if nothing is said


@dataclass(frozen=True)
class Repository:
    """A repository on the Hub at a branch, tag or commit."""

    name: str
    revision: str = MAIN

    def __str__(self) -> str:
        return self.name if self.revision == MAIN else f"{self.name}@{self.revision}"


@dataclass(frozen=True)
class Located:
    """Where a checkpoint is on this machine, and the repository and commit that it is a copy of, if it is one."""

    path: Path
    repo: str | None = None
    commit: str | None = None


@dataclass(frozen=True)
class Offer:
    """What a repository has, known before its weights are downloaded.

    Attributes:
        folder: on this machine, with its config and its tokenizer, if it has them.
        nbytes: of the weights that are still to be downloaded.
    """

    folder: Path
    nbytes: int


def named(source: Path | str, revision: str | None = None) -> Repository | None:
    """The repository that a name means; None if it means a file or folder on this machine.

    What is on this machine comes first. Else `org/name` is a repository, and `org/name@revision` one of its branches,
    tags or commits.

    Raises:
        HubError: a revision is given twice, or of something that is no repository.
    """
    name, at, told = str(source).partition("@")
    if os.path.lexists(source) or not _REPO.fullmatch(name) or (at and not told):
        if revision is not None:
            raise HubError(f"{source}: only a repository on the Hub has revisions")
        return None
    if at and revision is not None:
        raise HubError(f"{source}: names a revision already; leave out --revision")
    meant = told or revision or MAIN
    if any(part == "" or part.startswith(".") for part in meant.split("/")):
        raise HubError(f"{source}: no branch, tag or commit can be called {quoted(meant)}")
    return Repository(name, meant)


def locate(
    source: Path | str, revision: str | None = None, consider: Callable[[Offer], None] = lambda offer: None
) -> Located:
    """Find a checkpoint: a file or folder if there is one, else the repository `org/name`, which is downloaded.

    Only the weights, the config and the tokenizer of a repository are downloaded, and only what is not in the Hub's
    cache. If it has weights in several formats, `weights_among` chooses one. The weights are compared with the hashes
    that the Hub has of them.

    Args:
        source: a path, or the name of a repository; see `named`.
        revision: branch, tag or commit of a repository.
        consider: called before the weights are downloaded; what it raises is raised.

    Raises:
        HubError: there is no such repository or revision, access is denied, it has no weights, they are damaged, the
            disk is full, or the Hub cannot be reached and the cache lacks some files.
    """
    repository = named(source, revision)
    if repository is None:
        return Located(Path(source))
    repo = repository.name
    with _conversation(repo, repository.revision):
        folder = Path(snapshot_download(repo, revision=repository.revision, allow_patterns=[*_BESIDE]))
        _check_hashes(repo, folder, *_BESIDE)
        weights = _weights(repo, folder)
        missing = sum(file.size for file in weights if not (folder / file.path).exists())
        consider(Offer(folder, missing))
        if weights:
            _check_space(repo, missing)
            for file in weights:  # one by one: threads of the library's would go on after Ctrl-C
                hf_hub_download(repo, file.path, revision=folder.name)
                _check_hash(repo, folder / file.path)
    return Located(folder, repo, folder.name)


def tokenizer_files(source: Path | str) -> Path:
    """A tokenizer's file or folder: on this machine if there is one, else that of the repository `org/name`.

    Raises:
        HubError: as for `locate`, or the repository has no tokenizer.
    """
    repository = named(source)
    if repository is None:
        return Path(source)
    repo = repository.name
    fetch = partial(snapshot_download, repo, revision=repository.revision, allow_patterns=[*_TOKENIZER])
    with _conversation(repo, repository.revision):
        try:  # what is in the cache is taken as it is: no start waits for the Hub twice
            folder = Path(fetch(local_files_only=True))
        except LocalEntryNotFoundError:
            folder = Path(fetch())
        _check_hashes(repo, folder, *_TOKENIZER)
        if not any((folder / name).exists() for name in TOKENIZER_FILES):
            raise HubError(f"{repository}: has no tokenizer ({' or '.join(TOKENIZER_FILES)})")
    return folder


def downloads() -> dict[str, int]:
    """The bytes that the Hub's cache on this machine holds of each repository."""
    try:
        return {repo.repo_id: repo.size_on_disk for repo in _cached().repos if repo.repo_type == "model"}
    except CacheNotFound:
        return {}


def forget(repo: str) -> int:
    """Delete what the Hub's cache holds of a repository; returns its size in bytes."""
    try:
        cache = _cached()
    except CacheNotFound:
        return 0
    # A data set may have the same name.
    ours = [one for one in cache.repos if one.repo_id == repo and one.repo_type == "model"]
    found = [revision for one in ours for revision in one.revisions]
    strategy = cache.delete_revisions(*(revision.commit_hash for revision in found))
    strategy.execute()
    return strategy.expected_freed_size


def _cached() -> HFCacheInfo:
    try:
        return scan_cache_dir(cache_folder())
    except ValueError as error:  # it is a file
        raise HubError(quoted(str(error))) from None


def cache_folder() -> Path:
    """Where the Hub's library keeps what it has downloaded."""
    return Path(constants.HF_HUB_CACHE)


def _weights(repo: str, folder: Path) -> list[RepoFile]:
    """The weights files to download into a snapshot's folder; none if the cache has no list of its files."""
    try:
        files = {file.path: file for file in get_cached_repo_tree(repo, revision=folder.name)}
    except CachedRepoTreeNotFoundError:  # an older version of the Hub's library made the snapshot, with all files
        return []
    found = weights_among(name for name in files if "/" not in name)
    if len(found) != 1:
        shown = f" ({', '.join(map(quoted, found[:4]))})" if found else ""
        raise HubError(f"{repo}: has {len(found)} weights files{shown} in its top folder, not one model")
    if not found[0].endswith(".index.json"):
        return [files[found[0]]]
    shards = sorted(set(weight_map(folder / found[0]).values()))
    if missing := [name for name in shards if name not in files]:
        raise HubError(f"{repo}: has no file {quoted(missing[0])}, but its {found[0]} lists it")
    return [files[name] for name in shards]


def _check_space(repo: str, nbytes: int) -> None:
    """Find out before an hour of downloading that there is no room for it."""
    place = cache_folder()
    existing = next(folder for folder in (place, *place.parents) if folder.is_dir())
    free = shutil.disk_usage(existing).free
    if free < nbytes:
        raise HubError(
            f"{repo}: the disk is full: {nbytes / 1e9:.2f} GB are to be downloaded to {place}, {free / 1e9:.2f} GB are"
            " free; make room, or set HF_HOME to another disk"
        )


def _check_hashes(repo: str, folder: Path, *patterns: str) -> None:
    """Compare small files, which may have been damaged in the cache."""
    for file in (file for pattern in patterns for file in folder.glob(pattern)):
        _check_hash(repo, file)


def _check_hash(repo: str, path: Path) -> None:
    """Compare a file with the hash that the Hub has of it. A wrong one is deleted, so that it is downloaded again.

    The Hub's library names what it stores by that hash: SHA-256, or of a small file that of git's blob.
    """
    stored = Path(os.path.realpath(path))
    if not re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", stored.name):
        return
    is_blob = len(stored.name) == 40
    digest = hashlib.sha1(b"blob %d\0" % stored.stat().st_size) if is_blob else hashlib.sha256()
    with stored.open("rb") as content:
        while part := content.read(_READ_AT_ONCE):
            digest.update(part)
    if digest.hexdigest() != stored.name:
        stored.unlink(missing_ok=True)
        path.unlink(missing_ok=True)
        raise HubError(
            f"{repo}: {path.name} was damaged on its way or in the cache (its hash is not the Hub's): start again"
        )


def check_upload(repo: str) -> None:
    """Check before a long conversion what an `upload` after it will need.

    Raises:
        HubError: `repo` cannot be the name of a repository, nobody is logged in, or HF_HUB_OFFLINE is set.
    """
    if not _REPO.fullmatch(repo):
        raise HubError(f"{quoted(repo)}: not the name of a repository to upload to, which is like org/name")
    with _conversation(repo):
        validate_repo_id(repo)
    if constants.HF_HUB_OFFLINE:
        raise HubError(f"{repo}: cannot upload there: HF_HUB_OFFLINE is set")
    if get_token() is None:
        raise HubError(f"{repo}: to upload there, log in with `hf auth login` or set HF_TOKEN")


def upload(folder: Path, repo: str) -> str:
    """Upload the files of a folder in one commit; the repository is created if there is none.

    Returns:
        The repository's address.

    Raises:
        HubError: the Hub refuses it, or cannot be reached.
    """
    with _conversation(repo):
        api = HfApi()
        api.create_repo(repo, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Upload a model converted with mlx_ttt")
    return address(repo)


def address(repo: str, commit: str | None = None) -> str:
    """The web address of a repository, or of one of its commits."""
    return f"{constants.ENDPOINT}/{repo}" + (f"/tree/{commit}" if commit else "")


@contextmanager
def _conversation(repo: str, revision: str | None = None) -> Iterator[None]:
    """What all exchanges with the Hub need: one-line errors, progress bars only on a terminal, no log of warnings."""
    log = logging.getLogger("huggingface_hub")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), nullcontext() if sys.stderr.isatty() else disable_progress_bars():
            warnings.simplefilter("ignore")  # that the disk will be full is said in one line
            yield
    except TTTError:
        raise
    except GatedRepoError:
        raise HubError(f"{repo}: gated: ask for access at {address(repo)}, then log in with `hf auth login`") from None
    except RepositoryNotFoundError:
        raise HubError(
            f"{repo}: no such file or folder here, and no such repository on the Hub; a private one needs a login"
            " (`hf auth login`)"
        ) from None
    except RevisionNotFoundError:
        raise HubError(f"{repo}: the repository has no revision {quoted(revision)}") from None
    except HFValidationError as error:
        raise HubError(f"{repo}: {quoted(error)}") from None
    except LocalEntryNotFoundError as error:
        if isinstance(error.__cause__, HfHubHTTPError):
            raise _answered(repo, error.__cause__) from None
        cause = f"the Hub cannot be reached ({quoted(error.__cause__ or error)})"
        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else cause
        raise HubError(
            f"{repo}: no such file or folder; as a repository it is not in the Hub's cache, and {why}"
        ) from None
    except HfHubHTTPError as error:
        raise _answered(repo, error) from None
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise HubError(f"{repo}: {quoted(error)}") from error
        raise HubError(f"{repo}: the disk is full: {cache_folder()}; make room and start again") from None
    except Exception as error:  # the libraries below raise many classes when the network fails
        raise HubError(f"{repo}: {quoted(error.__cause__ or error)}") from error
    finally:
        log.setLevel(level)


def _answered(repo: str, error: HfHubHTTPError) -> HubError:
    status, said = error.response.status_code, error.server_message or error.response.reason_phrase
    return HubError(f"{repo}: the Hub answers {status}: {quoted(said)}{_ADVICE.get(status, '')}")
