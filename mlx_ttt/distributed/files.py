"""Files that only the first machine has, for all."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import numpy as np

from .exchange import all_sum

Group = mx.distributed.Group

_CHUNK = 32 << 20  # bytes sent at a time


@contextlib.contextmanager
def copy_of_first(folder: Path, group: Group | None) -> Iterator[Path]:
    """The first machine's folder: there the folder itself, elsewhere a temporary copy, which is deleted afterwards.

    All machines must call it at the same place. Links are followed, and empty folders are copied, too.

    Raises:
        OSError: it cannot be read, or its copy not be written.
    """
    if group is None:
        yield folder
    elif group.rank() == 0:
        paths = sorted(path for path in folder.rglob("*") if path.is_file() or path.is_dir())
        entries = [(str(p.relative_to(folder)), p.stat().st_size if p.is_file() else None) for p in paths]
        _from_first(json.dumps(entries).encode(), group)
        for path in paths:
            if path.is_file():
                with path.open("rb") as file:
                    while data := file.read(_CHUNK):
                        _sum(np.frombuffer(data, np.uint8), group)
        yield folder
    else:
        with tempfile.TemporaryDirectory() as temporary:
            place = Path(temporary) / (folder.name or "folder")
            place.mkdir()
            for name, nbytes in json.loads(_from_first(b"", group)):
                if nbytes is None:
                    (place / name).mkdir(parents=True)
                    continue
                with (place / name).open("wb") as file:
                    for start in range(0, nbytes, _CHUNK):
                        file.write(_sum(np.zeros(min(_CHUNK, nbytes - start), np.uint8), group))
            yield place


def _from_first(data: bytes, group: Group) -> bytes:
    """The first machine's bytes. What the others give must be empty."""
    size = int(all_sum(mx.array(len(data), mx.int64), group).item())  # type: ignore[arg-type]
    own = np.frombuffer(data, np.uint8) if data else np.zeros(size, np.uint8)
    return _sum(own, group)


def _sum(data: np.ndarray, group: Group) -> bytes:
    """Bytes of one machine, to which the others add zeros."""
    return bytes(memoryview(all_sum(mx.array(data), group)))  # type: ignore[arg-type]
