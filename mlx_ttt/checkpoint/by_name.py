"""What the name of a model means: a directory on this machine, or a repository on the Hub, which is fetched once."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..errors import CheckpointError, TokenizerError
from .config import refuse_other_architectures
from .convert import convert
from .converted import Home
from .directory import (
    CONFIG,
    MODEL_FILE,
    TOKENIZER_COMPANIONS,
    TOKENIZER_CONFIG,
    TOKENIZER_FILES,
    WEIGHTS,
    WEIGHTS_INDEX,
)
from .hub import Located, Offer, Repository, cache_folder, locate, named, tokenizer_files
from .public import where_tokenizers_are
from .sentencepiece_model import LARGEST_FILE
from .untrusted import read_bytes, read_json

_HASHED = 12  # characters of a tokenizer's hash


@dataclass(frozen=True)
class Listener:
    """Who hears how it goes: by default nobody."""

    tell: Callable[[str], None] = lambda line: None
    progress: Callable[[int, int], None] = lambda done, total: None  # of the conversion


def model_directory(
    model: Path | str,
    revision: str | None = None,
    *,
    tokenizer: Path | str | None = None,
    needs_tokenizer: bool = True,
    listener: Listener | None = None,
) -> Path:
    """The model directory that a name means. This is the only place that decides it.

    A path on this machine comes first. Else `org/name` or `org/name@revision` is a repository on the Hub. It is
    downloaded and converted when it is first asked for, and taken from the cache of `converted.py` from then on, with
    no word to the Hub: a branch stays at the commit of the first time until it is removed there.

    Args:
        model: a path or the name of a repository.
        revision: branch, tag or commit, if it is not in the name.
        tokenizer: for a repository: a tokenizer's file or folder, or a repository that has one.
        needs_tokenizer: whether a repository without a tokenizer is an error; it is one before the download.

    Raises:
        HubError, CheckpointError, OutputError: it cannot be downloaded, read or converted.
        TokenizerError: it has no tokenizer, or one is given for a directory.
    """
    repository = named(model, revision)
    if repository is None:
        if tokenizer is not None:
            raise TokenizerError(
                f"{model}: a tokenizer is given to a repository on the Hub; to a checkpoint on this machine"
                " `convert.py mlx --tokenizer` gives one"
            )
        return Path(model)
    listener = listener or Listener()
    given = None if tokenizer is None else tokenizer_files(tokenizer)
    home, suffix = Home(repository.name), "" if given is None else f"-{_tokenizer_hash(given)}"
    found = home.find(repository.revision, suffix)
    if found is None:
        with home.locked(lambda: listener.tell(f"{repository}: another process is at it; waiting")):
            found = home.find(repository.revision, suffix)
            if found is None:
                found = _fetched(repository, home, (given, suffix), needs_tokenizer, listener)
    if needs_tokenizer and not (found / TOKENIZER_FILES[0]).is_file():
        raise TokenizerError(_no_tokenizer(repository))
    return found


def _fetched(
    repository: Repository, home: Home, given: tuple[Path | None, str], needs_tokenizer: bool, listener: Listener
) -> Path:
    """Download a repository and convert it. What is not complete in the end is not there."""
    tokenizer, suffix = given

    def consider(offer: Offer) -> None:
        """Find out before a long download whether it will be of use."""
        if (offer.folder / CONFIG).exists():
            refuse_other_architectures(read_json(offer.folder / CONFIG), f"{repository}: {CONFIG}")
        has_one = tokenizer is not None or any((offer.folder / name).exists() for name in TOKENIZER_FILES)
        if needs_tokenizer and not has_one:
            raise TokenizerError(_no_tokenizer(repository))
        if offer.nbytes:
            listener.tell(f"{repository}: downloading {human(offer.nbytes)} to {cache_folder()}")

    commit = home.commit(repository.revision)
    located = locate(repository.name, commit or repository.revision, consider)
    assert located.commit is not None
    name = located.commit + suffix
    if tokenizer is None and _is_model_directory(located.path):
        found = home.link(name, located.path)
        listener.tell(f"{repository}: a model directory, in {located.path}")
    else:
        found = home.folder / name
        home.clear(name)
        if not found.is_dir():
            _convert(repository, located, found, tokenizer, listener)
    home.pin(repository.revision, name)
    return found


def _convert(repository: Repository, located: Located, out: Path, tokenizer: Path | None, listener: Listener) -> None:
    listener.tell(f"{repository}: converting")
    report = convert(located, out, name=repository.name, tokenizer=tokenizer, progress=listener.progress)
    for warning in report.warnings:
        listener.tell(f"warning: {warning}")
    listener.tell(f"{repository}: {human(report.nbytes)} in {out}; the next start takes it from there")


def _is_model_directory(folder: Path) -> bool:
    """Whether a repository holds what our conversion writes, so that it is used as it is."""
    has_weights = any((folder / name).exists() for name in (WEIGHTS, WEIGHTS_INDEX))
    try:
        return has_weights and read_json(folder / CONFIG).get("model_file") == MODEL_FILE
    except CheckpointError:
        return False


def _no_tokenizer(repository: Repository) -> str:
    return f"{repository}: has no tokenizer: add --tokenizer FILE, or --tokenizer ORG/NAME; {where_tokenizers_are()}"


def _tokenizer_hash(source: Path) -> str:
    """A hash of all files that a tokenizer's conversion reads; `source` is its folder or file."""
    names = (TOKENIZER_CONFIG, *TOKENIZER_COMPANIONS)
    files = [source, *(source.parent / name for name in names)]
    if source.is_dir():
        files = [source / name for name in (*TOKENIZER_FILES, *names)]
    digest = hashlib.sha256()
    for file in files:
        if file.exists() or file == source:
            data = read_bytes(file, LARGEST_FILE, TokenizerError)
            digest.update(f"{file.name} {len(data)} ".encode() + data)
    return digest.hexdigest()[:_HASHED]


def human(nbytes: int) -> str:
    """A size as people read it."""
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.1f} MB"
