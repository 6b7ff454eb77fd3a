"""Downloads repositories from the Hugging Face Hub into its cache on this machine, and uploads folders to it."""

from __future__ import annotations

import glob
import logging
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, constants, get_cached_repo_tree, get_token, snapshot_download
from huggingface_hub.errors import (
    CachedRepoTreeNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import disable_progress_bars, validate_repo_id

from ..errors import HubError, TTTError
from .directory import CONFIG, GENERATION_CONFIG, TOKENIZER_COMPANIONS, TOKENIZER_CONFIG, TOKENIZER_FILES
from .source import weight_map, weights_among
from .untrusted import quoted

_REPO = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*/[A-Za-z0-9_][A-Za-z0-9._-]*")
_BESIDE = (CONFIG, GENERATION_CONFIG, *TOKENIZER_FILES, TOKENIZER_CONFIG, *TOKENIZER_COMPANIONS, "*.index.json")


@dataclass(frozen=True)
class Located:
    """Where a checkpoint is on this machine, and the repository and commit that it is a copy of, if it is one."""

    path: Path
    repo: str | None = None
    commit: str | None = None


def locate(source: Path | str, revision: str | None = None) -> Located:
    """Find a checkpoint: a file or folder if there is one, else the repository `org/name`, which is downloaded.

    Only the weights, the config and the tokenizer of a repository are downloaded, and only what is not in the Hub's
    cache. If it has weights in several formats, `weights_among` chooses one.

    Args:
        source: a path, or the name of a repository.
        revision: branch, tag or commit of a repository.

    Raises:
        HubError: there is no such repository or revision, access is denied, it has no weights, or the Hub cannot be
            reached and the cache lacks some files.
    """
    path, repo = Path(source), str(source)
    if os.path.lexists(path) or not _REPO.fullmatch(repo):
        if revision is not None:
            raise HubError(f"{path}: only a repository on the Hub has revisions")
        return Located(path)
    with _conversation(repo, revision):
        folder = Path(snapshot_download(repo, revision=revision, allow_patterns=[*_BESIDE]))
        if weights := _weights(repo, folder):
            snapshot_download(repo, revision=folder.name, allow_patterns=[*_BESIDE, *map(glob.escape, weights)])
    return Located(folder, repo, folder.name)


def _weights(repo: str, folder: Path) -> list[str]:
    """The weights files to download into a snapshot's folder; none if the cache has no list of its files."""
    try:
        names = [file.path for file in get_cached_repo_tree(repo, revision=folder.name)]
    except CachedRepoTreeNotFoundError:  # an older version of the Hub's library made the snapshot, with all files
        return []
    found = weights_among(name for name in names if "/" not in name)
    if len(found) != 1:
        shown = f" ({', '.join(map(quoted, found[:4]))})" if found else ""
        raise HubError(f"{repo}: has {len(found)} weights files{shown} in its top folder, not one model")
    return sorted(set(weight_map(folder / found[0]).values())) if found[0].endswith(".index.json") else found


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
        with nullcontext() if sys.stderr.isatty() else disable_progress_bars():
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
        cause = f"the Hub cannot be reached ({quoted(error.__cause__ or error)})"
        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else cause
        raise HubError(
            f"{repo}: no such file or folder; as a repository it is not in the Hub's cache, and {why}"
        ) from None
    except HfHubHTTPError as error:
        said = error.server_message or error.response.reason_phrase
        raise HubError(f"{repo}: the Hub answers {error.response.status_code}: {quoted(said)}") from None
    except Exception as error:  # the libraries below raise many classes when the network fails
        raise HubError(f"{repo}: {quoted(error.__cause__ or error)}") from error
    finally:
        log.setLevel(level)
