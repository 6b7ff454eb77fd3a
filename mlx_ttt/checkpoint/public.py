"""The public TTT checkpoints: what is known of each, and what it needs.

Facts are from the repositories, cards and reports that `docs/checkpoints.md` names; no weights were read. Parameters
follow from the sizes in the paper's code. A train state has six bytes of each: bfloat16 values and two moments.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

LLAMA_2 = "meta-llama/Llama-2-7b-hf"
_UNKNOWN = "not known"
_PARAMETERS = {  # with a vocabulary of 32 000
    ("TTT-Linear", "125M"): 110_424_144,
    ("TTT-MLP", "125M"): 114_589_776,
    ("TTT-Linear", "350M"): 337_684_224,
    ("TTT-MLP", "350M"): 348_792_576,
    ("TTT-Linear", "760M"): 733_608_192,
    ("TTT-MLP", "760M"): 758_528_256,
    ("TTT-Linear", "1.3B"): 1_285_639_296,
    ("TTT-MLP", "1.3B"): 1_307_856_000,
}


@dataclass(frozen=True)
class Checkpoint:
    """A public checkpoint.

    Attributes:
        context: tokens of the texts that it was trained on.
        tokenizer: "included", "included, unchecked", or whose it is, if the user has to bring it.
        licence: of the repository; what could not be read is "not known".
        checked: where these facts are from.
    """

    name: str
    inner_model: str
    size: str
    data: str
    context: int | None
    format: str
    tokenizer: str
    licence: str
    checked: str

    @property
    def parameters(self) -> int | None:
        return _PARAMETERS.get((self.inner_model, self.size))

    @property
    def download(self) -> str:
        """The size of what is downloaded."""
        if self.parameters is None:
            return _UNKNOWN
        if self.format == _JAX:
            return f"{6 * self.parameters / 1e9:.2f} GB"
        if self.format == _ONE_FILE:
            return f"{4 * self.parameters / 1e9:.2f} GB"
        return f"{2 * self.parameters / 1e9:.2f} or {4 * self.parameters / 1e9:.2f} GB"

    @property
    def options(self) -> str:
        """What a command needs beside the name."""
        return "" if self.tokenizer.startswith("included") else f" --tokenizer {LLAMA_2}"

    @property
    def command(self) -> str:
        """The line that converts it."""
        return f"mlx-ttt convert mlx {self.name} OUT{self.options}"

    @property
    def needs(self) -> str:
        """What a user must have first."""
        return "nothing" if not self.options else f"access to {LLAMA_2}"

    def facts(self) -> dict[str, Any]:
        """All of it, for JSON."""
        computed = ("parameters", "download", "command", "needs")
        return asdict(self) | {name: getattr(self, name) for name in computed}


_JAX = "JAX train state"
_SHARDED = "PyTorch safetensors"
_ONE_FILE = "PyTorch, one .safetensors"
_CONTEXTS = {"2k": 2048, "8k": 8192, "32k": 32768}
_LINEAR, _MLP = "TTT-Linear", "TTT-MLP"


def _official(inner_model: str, size: str, data: str, length: str, checked: str) -> Checkpoint:
    name = f"Test-Time-Training/{inner_model.lower()}-{size.lower()}-{data.lower()}-{length}"
    context, licence = _CONTEXTS[length], "not known (its code: MIT)"
    return Checkpoint(name, inner_model, size, data, context, _JAX, "Llama-2", licence, checked)


def _converted(inner_model: str, size: str, data: str, length: str, checked: str) -> Checkpoint:
    name = f"RetentionLabs/{inner_model}-{size}-Base-{data}-{length}"
    tokenizer = "included" if "tokenizer" in checked else "included, unchecked"
    licence = "MIT" if checked != _NOTES else "MIT, unchecked"
    return Checkpoint(name, inner_model, size, data, _CONTEXTS[length], _SHARDED, tokenizer, licence, checked)


_NOTES, _CARD, _NAMED = "notes of an earlier visit", "its card", "named by the card of its conversion"
CHECKPOINTS = (
    _official(_LINEAR, "125M", "Books", "2k", _NAMED + "; a report that names commit b1a5f81"),
    _official(_MLP, "125M", "Books", "2k", _NAMED),
    _official(_LINEAR, "350M", "Books", "2k", _NAMED),
    _official(_MLP, "350M", "Books", "2k", _NOTES),
    _official(_LINEAR, "760M", "Pile", "8k", _NOTES),
    _official(_MLP, "760M", "Pile", "8k", "named by a report on its conversion"),
    _official(_LINEAR, "1.3B", "Pile", "8k", _NOTES),
    _official(_MLP, "1.3B", "Pile", "8k", "an issue of the official PyTorch code (31)"),
    _official(_LINEAR, "1.3B", "Books", "32k", "a script that downloads its files"),
    _converted(_LINEAR, "125M", "Books", "2k", _CARD),
    _converted(_MLP, "125M", "Books", "2k", _CARD),
    _converted(_LINEAR, "350M", "Books", "2k", _CARD),
    _converted(_LINEAR, "760M", "Pile", "8k", _NOTES),
    _converted(_MLP, "760M", "Pile", "8k", "a report of its use, with its tokenizer, at commit 4a347bf"),
    _converted(_LINEAR, "1.3B", "Pile", "8k", _NOTES),
    _converted(_MLP, "1.3B", "Pile", "8k", "a report that names it"),
    _converted(_LINEAR, "1.3B", "Books", "32k", _NOTES),
    Checkpoint(
        "amy-hyunji-lee/ttt-linear-125m-books-2k",
        _LINEAR,
        "125M",
        "Books",
        2048,
        _ONE_FILE,
        "Llama-2",
        _UNKNOWN,
        _NOTES,
    ),
    Checkpoint(
        "alan918727/ttt-125M-TinyStories",
        _UNKNOWN,
        "125M",
        "TinyStories",
        None,
        _SHARDED,
        "included, unchecked",
        _UNKNOWN,
        _NOTES,
    ),
)

_COLUMNS = {
    "checkpoint": lambda c: f"`{c.name}`",
    "inner model": lambda c: c.inner_model,
    "size": lambda c: c.size,
    "parameters": lambda c: f"{c.parameters:,}" if c.parameters else _UNKNOWN,
    "context": lambda c: f"{c.context:,}" if c.context else _UNKNOWN,
    "data": lambda c: c.data,
    "format": lambda c: c.format,
    "download": lambda c: c.download,
    "tokenizer": lambda c: c.tokenizer,
    "licence": lambda c: c.licence,
    "needs": lambda c: c.needs,
    "the line that converts it": lambda c: f"`{c.command}`",
    "known from": lambda c: c.checked,
}


def markdown() -> str:
    """The table of docs/checkpoints.md."""
    rows = [_COLUMNS.keys(), ["---"] * len(_COLUMNS)]
    rows += [[column(checkpoint) for column in _COLUMNS.values()] for checkpoint in CHECKPOINTS]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def where_tokenizers_are() -> str:
    """Where people get the tokenizer that a checkpoint lacks."""
    return f"the paper's models have Llama-2's: ask for access at https://huggingface.co/{LLAMA_2}, then give that name"
