"""What a model learned from each token it wrote, in a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import OutputError, TTTError
from ..files import output_file, written_whole

if TYPE_CHECKING:
    from ..text.generation import ObservedResponse


class Notes:
    """The tokens of a text as they are written, to be saved when it ends.

    NAME.npz has an array for each: token and surprisal [T]; loss, lr and write_norm [layers, H, T]. NAME.jsonl has a
    line for each token: its id, its text and the same values.

    Raises:
        TTTError: the file has another suffix.
        OutputError: it cannot be written to.
    """

    def __init__(self, file: str):
        if Path(file).suffix not in (".npz", ".jsonl"):
            raise TTTError(f"--observe {file}: the name must end in .npz or .jsonl")
        self._file = output_file(file)
        self._tokens: list[dict] = []

    def add(self, response: ObservedResponse) -> None:
        self._see_last()  # the signals of this response are computed meanwhile
        token = {"token": response.token, "text": response.text, "surprisal": response.surprisal}
        self._tokens.append(token | response.signals._asdict())

    def _see_last(self) -> None:
        """Have the signals of the last token as numbers."""
        for token in self._tokens[-1:]:
            token |= {name: token[name].tolist() for name in ("loss", "lr", "write_norm")}

    def save(self) -> None:
        """Whole or not at all.

        Raises:
            OutputError: the file cannot be written.
        """
        self._see_last()
        try:
            with written_whole(self._file) as complete:
                if self._file.suffix == ".npz":
                    self._write_arrays(complete)
                else:
                    lines = (json.dumps(token, ensure_ascii=False) for token in self._tokens)
                    complete.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        except OSError as error:
            raise OutputError(f"{self._file}: cannot be written: {error.strerror}") from error

    def _write_arrays(self, file: Path) -> None:
        import numpy as np

        values = {
            name: np.array([token[name] for token in self._tokens], np.int64 if name == "token" else np.float32)
            for name in ("token", "surprisal", "loss", "lr", "write_norm")
        }
        np.savez(file, **{name: np.moveaxis(x, 0, -1) for name, x in values.items()})  # type: ignore[arg-type]
