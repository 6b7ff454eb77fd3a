"""Converts the tokenizer files of a checkpoint into those of a model directory.

A SentencePiece model becomes a `tokenizer.json` that gives SentencePiece's own ids on any text, and a
`tokenizer_config.json` with which transformers, and so mlx-lm, loads it unchanged. Both tokenizers are compared before
anything is written, on every piece of the vocabulary and several hundred awkward texts. A difference is an error.
"""

from __future__ import annotations

import os
import random
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from ..errors import TokenizerError
from .directory import TOKENIZER_COMPANIONS, TOKENIZER_CONFIG, TOKENIZER_FILES, write_json
from .sentencepiece_model import LARGEST_FILE, SPACE, Json, SentencePieceModel
from .untrusted import quoted, read_bytes, read_json

_TOLERATED = 0.05  # share of test texts that may get other ids from a model that can only be approximated
_JSON, _SENTENCEPIECE = TOKENIZER_FILES
_CARRIED = ("chat_template", "model_max_length", "padding_side")


@dataclass
class TokenizerReport:
    """What `write_tokenizer` did: the files it wrote, and what the user should know."""

    files: list[str]
    warnings: list[str]


def write_tokenizer(source: Path, out: Path, config: Json) -> TokenizerReport | None:
    """Write the tokenizer files of `source` into the model directory `out`.

    Control symbols in a text are text, as in SentencePiece: `<s>` is three characters. A tokenizer with a chat template
    is the exception, because templates write control symbols as text. Python code beside a tokenizer is neither run nor
    copied.

    Args:
        source: a SentencePiece file (`*.model`), a `tokenizer.json`, or a folder with either or both. If there are
            both, `tokenizer.model` is converted, unless `tokenizer.json` has tokens that it lacks: then
            `tokenizer.json` is kept, and differences from SentencePiece become a warning.
        out: an existing folder. It is untouched if there is an error.
        config: the model's config, for vocab_size and the bos, eos and pad ids.

    Returns:
        What was written; None if `source` has no tokenizer.

    Raises:
        TokenizerError: a file is damaged or cannot be read.
        OSError: `out` cannot be written to.
    """
    spm_file, json_file = _find(Path(source))
    file = spm_file or json_file
    if file is None:
        return None
    given = _Given.beside(file)
    spm, warnings = None, []
    if spm_file is not None:
        try:
            spm = SentencePieceModel(spm_file)
        except TokenizerError as error:
            if json_file is None:
                raise
            warnings.append(f"{error}; {json_file.name} was used")
    if given.settings.pop("auto_map", None):
        warnings.append(f"{file.parent}: its tokenizer comes with Python code, which is neither run nor copied")
    with tempfile.TemporaryDirectory(prefix=".tokenizer-", dir=out) as staging:
        stage = Path(staging)
        if spm is not None and (json_file is None or not _has_more_tokens(json_file, spm)):
            warnings += _stage_sentencepiece(spm, given, config, stage)
        else:
            assert json_file is not None  # without it, spm is there
            warnings += _stage_json(json_file, spm, given, config, stage)
        files = sorted(os.listdir(stage))
        for name in files:
            (stage / name).replace(Path(out) / name)
    return TokenizerReport(files, warnings)


@dataclass
class _Given:
    """The files beside a tokenizer: its settings, and other files to copy, by name."""

    settings: Json
    companions: dict[str, Path]

    @classmethod
    def beside(cls, file: Path) -> _Given:
        folder = file.parent
        companions = {name: folder / name for name in TOKENIZER_COMPANIONS if os.path.lexists(folder / name)}
        config = folder / TOKENIZER_CONFIG
        settings = _load_json(config) if os.path.lexists(config) else {}
        return cls(settings, companions)


def _find(source: Path) -> tuple[Path | None, Path | None]:
    """The SentencePiece file and the tokenizer.json that `source` is or holds; None for what is not there."""
    try:
        names = os.listdir(source)
    except NotADirectoryError:
        return (None, source) if source.suffix == ".json" else (source, None)
    except OSError as error:
        raise TokenizerError(f"{source}: {error.strerror}") from None
    spm_file, json_file = (source / name if name in names else None for name in (_SENTENCEPIECE, _JSON))
    return spm_file, json_file


def _stage_sentencepiece(spm: SentencePieceModel, given: _Given, config: Json, stage: Path) -> list[str]:
    """Write the files for a SentencePiece model into `stage`, and compare them with it; returns warnings."""
    _check_vocab_size(spm.file, len(spm.names), config)
    warnings = []
    template = given.companions.get("chat_template.jinja")
    carried = {key: given.settings[key] for key in _CARRIED if given.settings.get(key) is not None}
    if template or "chat_template" in carried:
        carried["split_special_tokens"] = False
        warnings.append(
            f"{spm.file}: it has a chat template, so control symbols typed in a text count as control symbols; "
            "pass split_special_tokens=True for text that you do not trust"
        )
    add_bos = given.settings.get("add_bos_token") is not False
    write_json(stage / _JSON, spm.tokenizer_json(add_bos))
    write_json(stage / TOKENIZER_CONFIG, spm.tokenizer_config(add_bos) | carried)
    _copy(spm.file, stage / _SENTENCEPIECE)
    if template:
        _copy(template, stage / template.name)
    tokenizer = _load(stage, spm.file)
    return warnings + _compare(spm, tokenizer) + _id_warnings(spm.file, tokenizer, config)


def _compare(spm: SentencePieceModel, tokenizer: Any) -> list[str]:
    """Warnings about texts that get other ids than from SentencePiece. Raises TokenizerError if too many do."""
    warnings = []
    if exceptions := spm.texts_without_prefix():
        warnings.append(f"{spm.file}: a text that is just one user-defined symbol gets no leading space piece")
    texts = [text for text in _probe_texts(spm) if text not in exceptions]
    differing = _differences(spm, tokenizer, texts)
    reason = spm.why_approximate()
    first = f", first {_shorten(differing[0])}" if differing else ""
    count = f"{len(differing)} of {len(texts)} test texts differ{first}"
    if differing and not (reason and len(differing) <= len(texts) * _TOLERATED):
        raise TokenizerError(
            f"{spm.file}: tokenizer.json cannot represent this SentencePiece model ({count}); "
            "pass a tokenizer.json made by other means"
        )
    if reason:
        warnings.append(f"{spm.file}: {reason}: rare texts may get other ids than SentencePiece gives ({count})")
    return warnings


def _stage_json(file: Path, spm: SentencePieceModel | None, given: _Given, config: Json, stage: Path) -> list[str]:
    """Write the files for a tokenizer.json into `stage`, and compare it with the SentencePiece model, if any.

    Returns:
        Warnings.
    """
    tokenizer = _parse_tokenizer(file)
    for name, companion in {_JSON: file, **given.companions}.items():
        if companion.suffix == ".json":
            _load_json(companion)
        _copy(companion, stage / name)
    settings = given.settings or _guess_settings(tokenizer, given.companions, config)
    # Other classes may rebuild the tokenizer by rules of their own instead of loading tokenizer.json unchanged.
    write_json(stage / TOKENIZER_CONFIG, settings | {"tokenizer_class": "PreTrainedTokenizerFast"})

    tokenizer = _load(stage, file)
    _check_vocab_size(file, 1 + max(tokenizer.get_vocab().values(), default=-1), config)
    warnings = _id_warnings(file, tokenizer, config)
    texts = list(_probe_texts(spm)) if spm else []
    if spm and (differing := _differences(spm, tokenizer, texts)):
        warnings.append(
            f"{file}: has tokens that {spm.file.name} lacks, so it was kept, but {len(differing)} of {len(texts)} "
            f"test texts get other ids than {spm.file.name} gives, first {_shorten(differing[0])}"
        )
    return warnings


def _has_more_tokens(json_file: Path, spm: SentencePieceModel) -> bool:
    """Whether a tokenizer.json has tokens that the SentencePiece model lacks."""
    return not set(_parse_tokenizer(json_file).get_vocab()) <= set(spm.names)


def _guess_settings(tokenizer: Tokenizer, companions: dict[str, Path], config: Json) -> Json:
    """A tokenizer_config.json where there is none: special tokens by their map or the model's config."""
    settings: Json = {"clean_up_tokenization_spaces": False}
    for name in ("bos", "eos", "pad"):
        ids = _ids(config.get(f"{name}_token_id"))
        if ids and (token := tokenizer.id_to_token(ids[0])) is not None:
            settings[f"{name}_token"] = token
    if "special_tokens_map.json" in companions:
        settings |= _load_json(companions["special_tokens_map.json"])
    return settings


def _parse_tokenizer(file: Path) -> Tokenizer:
    _load_json(file)
    try:
        return Tokenizer.from_file(str(file))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic of the library is not an Exception
        raise TokenizerError(f"{file}: not a tokenizer that can be loaded ({quoted(error)}); copy it again") from None


# ------------------------------------------------------------------------------------------------- comparison


_AWKWARD = (
    *("", " ", "  ", "\n", "\t", "\r\n", "\0", "\x7f", "\ufeff", "\ufffd", SPACE, f"a{SPACE} {SPACE}b"),
    *(" leading", "trailing ", "  two  spaces  ", "a\n\n\nb", "\n a", "tab\tand\x0bmore", "a \n b", "\u00a0\u3000"),
    *("0123456789", "1 22 333", "3.14159, -2e10", "2024-01-01T00:00:00Z", "x=1;y[2]+=3", "I'm; they've: don't!"),
    *("ROMEO:\nBut, soft!", "def f(x):\n    return  x\n", "\\frac{a}{b} $x^2$", "https://example.org/?q=a%20b"),
    *("naïve café", "e\u0301a\u0308\u0323o\u0302", "Grüße, Ελλάδα", "日本語の文章", "한국어", "עברית \u200fعربى"),
    *("🙂👩\u200d👩\u200d👧🏽", "\U0010ffff\ue000", "½ ﬁ Å ①", "a\u200db\u00ad", "\ud7ff\uffff", "\x01\x02\x1b[0m"),
    *("<s>", "</s>", "<unk>", "<s></s>", " <s> x </s>", "<0x0A>", "<0x41>b", "[INST] hi [/INST]"),
    *("x" * 300, " " * 300, "\n" * 300, "ab" * 200, "=-" * 99, "é" * 77, "🙂" * 33),
)


def _probe_texts(spm: SentencePieceModel) -> Iterator[str]:
    """Texts to compare tokenizers on: awkward ones, runs, every piece, and random sequences of pieces."""
    yield from _AWKWARD
    for mark in " \n\t=-0a.":
        for count in range(2, 66):
            yield mark * count
            yield f"x{mark * count}y"
    pieces = [name.replace(SPACE, " ") for name in spm.names]
    yield from pieces
    choice = random.Random(0)
    ordinary = [piece for i, piece in enumerate(pieces) if not spm.processor.is_byte(i)]
    for _ in range(400):
        yield "".join(choice.choices(ordinary, k=choice.randint(2, 12)))


def _differences(spm: SentencePieceModel, tokenizer: Any, texts: list[str]) -> list[str]:
    """The texts that are not encoded, or not decoded, as SentencePiece does."""
    expected = spm.processor.encode(texts)
    got = tokenizer(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    decoded = tokenizer.batch_decode(expected, skip_special_tokens=True)
    rows = zip(texts, expected, got, decoded, spm.processor.decode(expected), strict=True)
    return [text for text, ids, other, back, reference in rows if ids != other or back != reference]


def _load(folder: Path, source: Path) -> Any:
    """The tokenizer in `folder`, as AutoTokenizer would load it; `source` is the file to name in an error."""
    from transformers import PreTrainedTokenizerFast  # a second to import, and only conversion needs it

    try:
        return PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic of the library is not an Exception
        raise TokenizerError(f"{source}: transformers cannot load it ({quoted(error)}); copy it again") from None


def _check_vocab_size(file: Path, size: int, config: Json) -> None:
    limit = config.get("vocab_size")
    if limit is not None and size > limit:
        raise TokenizerError(
            f"{file}: has {size} tokens, but the model's vocab_size is {limit}; "
            "use the tokenizer that the model was trained with"
        )


def _id_warnings(file: Path, tokenizer: Any, config: Json) -> list[str]:
    """Warnings about special tokens whose ids differ from those in the model's config."""
    warnings = []
    for name in ("bos", "eos", "pad"):
        wanted, own = _ids(config.get(f"{name}_token_id")), getattr(tokenizer, f"{name}_token_id")
        if wanted and own is not None and own not in wanted:
            shown = wanted[0] if len(wanted) == 1 else wanted
            warnings.append(f"{file}: its {name} id is {own}, the model's config says {shown}")
    return warnings


def _ids(value: object) -> list[int]:
    """The token ids in a field of a config, which may be one, a list, or missing."""
    ids = value if isinstance(value, list) else [value]
    return [id for id in ids if isinstance(id, int) and id >= 0]


def _load_json(file: Path) -> Json:
    return read_json(file, LARGEST_FILE, TokenizerError)


def _copy(file: Path, target: Path) -> None:
    """Copy a file. If it cannot be read, that is a TokenizerError; if it cannot be written, an OSError."""
    target.write_bytes(read_bytes(file, LARGEST_FILE, TokenizerError))


def _shorten(text: str) -> str:
    return ascii(text if len(text) <= 40 else text[:40] + "…")
