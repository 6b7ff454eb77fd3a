"""Texts as tokens and bytes, and models that read them from any state."""

from __future__ import annotations

import itertools
import math
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import mlx_ttt  # before MLX, so that OpenBLAS is found

import mlx.core as mx  # isort: skip
import numpy as np
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_ttt.checkpoint.convert import convert
from mlx_ttt.learning.observation import Observation, observe
from mlx_ttt.loading import bundled_model
from mlx_ttt.network.cache import TTTCache
from mlx_ttt.network.learning_scale import Scale
from mlx_ttt.network.model import Model
from mlx_ttt.text.tokenizer import encode_long
from mlx_ttt.training.evaluate import Band, by_position

BUNDLED = "bundled"
SMALL_WORDS = {"a", "and", "in", "of", "the"}


@dataclass(frozen=True)
class Text:
    """A text as a model's tokenizer has it.

    Attributes:
        ids: a BOS token, then the text, [T + 1].
        pieces: the bytes of each token of the text; side by side they are the text. T of them.
    """

    name: str
    ids: np.ndarray
    pieces: list[bytes]

    def __len__(self) -> int:
        """Tokens of the text, without BOS."""
        return len(self.pieces)

    @property
    def sizes(self) -> np.ndarray:
        """Bytes of each token of the text, [T]."""
        return np.array([len(piece) for piece in self.pieces])

    def part(self, start: int, stop: int | None = None) -> Text:
        """Some of the tokens. What stands in the place of BOS is the token before them."""
        stop = len(self) if stop is None else min(stop, len(self))
        return Text(self.name, self.ids[start : stop + 1], self.pieces[start:stop])

    def bits_per_byte(self, nats: np.ndarray, size: int | None = None) -> list[Band]:
        """Means of one value a token over all of the text, or over bands of `size` tokens.

        A value that is a loss, or a difference of two, becomes bits per byte of text.
        """
        T = len(self)
        bands = (
            [(0, T)] if size is None else list(itertools.pairwise(np.linspace(0, T, max(T // size, 1) + 1, dtype=int)))
        )
        sizes = self.sizes
        found = []
        for band in by_position(nats, [(int(a), int(b)) for a, b in bands]):
            scale = (band.stop - band.start) / sizes[band.start : band.stop].sum() / math.log(2)
            found.append(Band(band.start, band.stop, band.mean * scale, band.half_width * scale))
        return found


@dataclass
class Place:
    """Where a model stands in a text: its state, and what it expects next. At the beginning it expects nothing."""

    cache: list[TTTCache]
    expected: mx.array | None = field(default=None)

    def copy(self) -> Place:
        return Place([c.copy() for c in self.cache], self.expected)

    @classmethod
    def merge(cls, places: Sequence[Place]) -> Place:
        """Of texts that are read side by side."""
        cache = [TTTCache.merge(layers) for layers in zip(*(p.cache for p in places), strict=True)]
        return cls(cache, mx.concatenate([p.expected for p in places]))


class Reader:
    """A model that reads."""

    def __init__(self, path: str):
        """path: a model directory, or a checkpoint to convert; or "bundled"."""
        folder = bundled_model() if path == BUNDLED else Path(path)
        self.name = "bundled model" if path == BUNDLED else path
        with tempfile.TemporaryDirectory() as converted:
            if not list(folder.glob("*.safetensors")):
                convert(folder, f"{converted}/model", dtype=mx.float16)
                folder = Path(converted) / "model"
            self.model, self.tokenizer = mlx_ttt.load(folder)
            mx.eval(self.model.parameters())
        self.model: Model
        self.tokenizer: TokenizerWrapper

    def text(self, file: str) -> Text:
        content = Path(file).read_text(encoding="utf-8")
        ids = np.array(encode_long(self.tokenizer, content))
        pieces = [_bytes(piece) for piece in self.tokenizer.convert_ids_to_tokens(ids.tolist())[1:]]
        if ids[0] != self.tokenizer.bos_token_id or b"".join(pieces) != content.encode():
            raise SystemExit(f"{file}: the tokens of {self.name} are not the text with a BOS in front")
        return Text(title(file), ids, pieces)

    def start(self) -> Place:
        """Before a text: only BOS has been read."""
        place = Place(self.model.make_cache())
        self.observe(np.array([self.tokenizer.bos_token_id]), place)
        return place

    def observe(self, ids: np.ndarray, place: Place, learning: Scale = 1.0) -> Observation:
        """Read tokens [n] after each of the B texts of a place, which moves on. Signals are for each layer."""
        B = len(place.cache[0].offset)
        tokens = mx.broadcast_to(mx.array(ids), (B, len(ids)))
        seen = observe(self.model, tokens, place.cache, place.expected, per="layer", learning=learning)
        place.expected = seen.last_logits
        mx.eval(seen.surprisal, place.expected, [c.arrays for c in place.cache])
        return seen

    def nats(self, text: Text, place: Place, learning: Scale = 1.0) -> np.ndarray:
        """What each token of the text costs after a place, which moves on: [T], or [B, T] for B places."""
        cost = np.array(self.observe(text.ids[1:], place, learning).surprisal)
        return cost[0] if len(cost) == 1 else cost


def title(file: str) -> str:
    """author_a-book-s-name_translator.txt -> A Book S Name"""
    parts = Path(file).stem.split("_")
    words = parts[min(1, len(parts) - 1)].split("-")
    return " ".join(w if i and w in SMALL_WORDS else w.capitalize() for i, w in enumerate(words))


def _bytes(piece: str) -> bytes:
    """What a SentencePiece token stands for."""
    if byte := re.fullmatch(r"<0x([0-9A-F]{2})>", piece):
        return bytes.fromhex(byte[1])
    return piece.replace("▁", " ").encode()
