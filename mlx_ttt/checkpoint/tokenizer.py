"""Tokenizer files of a checkpoint → tokenizer files of a model directory.

A SentencePiece model becomes a `tokenizer.json` that gives SentencePiece's own ids on any text, and the
`tokenizer_config.json` that makes transformers (and so mlx-lm) load it as it is. SentencePiece stays the
judge: before anything is written, both tokenize every piece of the vocabulary and several hundred awkward
texts, and a difference is an error.
"""

from __future__ import annotations

import json
import os
import random
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from ..errors import TokenizerError
from .directory import TOKENIZER_COMPANIONS, TOKENIZER_CONFIG
from .sentencepiece_model import LARGEST_FILE, SPACE, Json, SentencePieceModel
from .untrusted import quoted, read_bytes, read_json

_TOLERATED = 0.05  # share of differing test texts, for models that can only be approximated
_CARRIED = ("chat_template", "model_max_length", "padding_side")


@dataclass
class TokenizerReport:
    """What `write_tokenizer` did: the files it wrote, and what the user should know."""

    files: list[str]
    warnings: list[str]


def write_tokenizer(source: Path, out: Path, config: Json) -> TokenizerReport | None:
    """Write the tokenizer files of `source` into the model directory `out`; None if `source` has none.

    source: a SentencePiece file (`*.model`), a `tokenizer.json`, or a directory with either or both. With both,
    what `tokenizer.model` gives is written, since that is known to equal SentencePiece; only a `tokenizer.json`
    with tokens that `tokenizer.model` lacks is kept, and its differences from SentencePiece become a warning.
    config: the model's config, for vocab_size and the bos, eos and pad ids.

    Text is only text: `<s>` typed by a user is three characters, as in SentencePiece. A tokenizer with a chat
    template is the exception, because templates write their control symbols as text.

    Python code beside a tokenizer is neither run nor copied. Raises TokenizerError, which names the file that is
    damaged or cannot be read, and OSError when `out` cannot be written to; `out` is then untouched.
    """
    spm_file, json_file = _find(Path(source))
    if spm_file is None and json_file is None:
        return None
    given = _Given.beside(spm_file or json_file)
    spm, warnings = None, []
    if spm_file is not None:
        try:
            spm = SentencePieceModel(spm_file)
        except TokenizerError as error:
            if json_file is None:
                raise
            warnings.append(f"{error}; {json_file.name} was used")
    with tempfile.TemporaryDirectory(prefix=".tokenizer-", dir=out) as staging:
        stage = Path(staging)
        if json_file is not None and (spm is None or _has_more_tokens(json_file, spm)):
            report = _stage_json(json_file, spm, given, config, stage)
        else:
            report = _stage_sentencepiece(spm, given, config, stage)
        for name in report.files:
            (stage / name).replace(Path(out) / name)
    report.warnings[:0] = warnings + given.warnings
    return report


@dataclass
class _Given:
    """What comes with a tokenizer: its settings, files to copy, and warnings about them."""

    settings: Json
    companions: dict[str, Path]
    warnings: list[str]

    @classmethod
    def beside(cls, file: Path) -> _Given:
        folder = file.parent
        companions = {name: folder / name for name in TOKENIZER_COMPANIONS if os.path.lexists(folder / name)}
        file = folder / TOKENIZER_CONFIG
        settings = _read_json(file) if os.path.lexists(file) else {}
        warnings = []
        if settings.pop("auto_map", None):
            warnings.append(f"{folder}: its tokenizer comes with Python code, which is neither run nor copied")
        return cls(settings, companions, warnings)


def _find(source: Path) -> tuple[Path | None, Path | None]:
    """The SentencePiece file and the tokenizer.json that `source` names or holds."""
    try:
        names = os.listdir(source)
    except NotADirectoryError:
        return (None, source) if source.suffix == ".json" else (source, None)
    except OSError as error:
        raise TokenizerError(f"{source}: {error.strerror}") from None
    spm_file, json_file = (source / name if name in names else None for name in ("tokenizer.model", "tokenizer.json"))
    return spm_file, json_file


def _stage_sentencepiece(spm: SentencePieceModel, given: _Given, config: Json, stage: Path) -> TokenizerReport:
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
    write_json(stage / "tokenizer.json", spm.tokenizer_json(add_bos))
    write_json(stage / TOKENIZER_CONFIG, spm.tokenizer_config(add_bos) | carried)
    _copy(spm.file, stage / "tokenizer.model")
    files = ["tokenizer.json", TOKENIZER_CONFIG, "tokenizer.model"]
    if template:
        _copy(template, stage / template.name)
        files.append(template.name)
    tokenizer = _load(stage, spm.file)
    warnings += _compare(spm, tokenizer) + _id_warnings(spm.file, tokenizer, config)
    return TokenizerReport(files, warnings)


def _compare(spm: SentencePieceModel, tokenizer: Any) -> list[str]:
    """Warnings about texts that get other ids. Raises TokenizerError when too many do."""
    warnings = []
    exceptions = spm.texts_without_prefix()
    if exceptions:
        warnings.append(f"{spm.file}: a text that is just one user-defined symbol gets no leading space piece")
    texts = [text for text in _probe_texts(spm) if text not in exceptions]
    differing = _differences(spm, tokenizer, texts)
    reason = spm.why_approximate()
    count = f"{len(differing)} of {len(texts)} test texts differ"
    if differing:
        count += f", first {_shorten(differing[0])}"
    if differing and not (reason and len(differing) <= len(texts) * _TOLERATED):
        raise TokenizerError(
            f"{spm.file}: tokenizer.json cannot represent this SentencePiece model ({count}); "
            "pass a tokenizer.json made by other means"
        )
    if reason:
        warnings.append(f"{spm.file}: {reason}: rare texts may get other ids than SentencePiece gives ({count})")
    return warnings


def _stage_json(
    file: Path, spm: SentencePieceModel | None, given: _Given, config: Json, stage: Path
) -> TokenizerReport:
    tokenizer = _parse_tokenizer(file)
    for name, companion in {"tokenizer.json": file, **given.companions}.items():
        if companion.suffix == ".json":
            _read_json(companion)
        _copy(companion, stage / name)
    settings = given.settings or _guess_settings(tokenizer, given.companions, config)
    # Any other class may rebuild the tokenizer by its own rules instead of loading tokenizer.json as it is.
    write_json(stage / TOKENIZER_CONFIG, settings | {"tokenizer_class": "PreTrainedTokenizerFast"})

    tokenizer = _load(stage, file)
    size = 1 + max(tokenizer.get_vocab().values(), default=-1)
    _check_vocab_size(file, size, config)
    warnings = _id_warnings(file, tokenizer, config)
    texts = list(_probe_texts(spm)) if spm else []
    if spm and (differing := _differences(spm, tokenizer, texts)):
        warnings.append(
            f"{file}: has tokens that {spm.file.name} lacks, so it was kept, but {len(differing)} of {len(texts)} "
            f"test texts get other ids than {spm.file.name} gives, first {_shorten(differing[0])}"
        )
    return TokenizerReport(["tokenizer.json", TOKENIZER_CONFIG, *given.companions], warnings)


def _has_more_tokens(json_file: Path, spm: SentencePieceModel) -> bool:
    return not set(_parse_tokenizer(json_file).get_vocab()) <= set(spm.names)


def _guess_settings(tokenizer: Tokenizer, companions: dict[str, Path], config: Json) -> Json:
    """tokenizer_config.json for a lone tokenizer.json: special tokens from their map or the model's config."""
    settings: Json = {"clean_up_tokenization_spaces": False}
    for name in ("bos", "eos", "pad"):
        ids = _ids(config.get(f"{name}_token_id"))
        if ids and (token := tokenizer.id_to_token(ids[0])) is not None:
            settings[f"{name}_token"] = token
    if "special_tokens_map.json" in companions:
        settings |= _read_json(companions["special_tokens_map.json"])
    return settings


def _parse_tokenizer(file: Path) -> Tokenizer:
    _read_json(file)
    try:
        return Tokenizer.from_file(str(file))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the library's panics are no Exceptions
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
    """Awkward texts, runs, every piece by itself, and random sequences of pieces."""
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
    """The texts whose ids, or whose decoded ids, differ from SentencePiece's."""
    expected = spm.processor.encode(texts)
    got = tokenizer(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    decoded = tokenizer.batch_decode(expected, skip_special_tokens=True)
    rows = zip(texts, expected, got, decoded, spm.processor.decode(expected), strict=True)
    return [text for text, ids, other, back, reference in rows if ids != other or back != reference]


def _load(folder: Path, source: Path) -> Any:
    """The tokenizer in `folder` as AutoTokenizer would load it; `source` is whom to blame."""
    from transformers import PreTrainedTokenizerFast  # a second to import, and only conversion needs it

    try:
        return PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the library's panics are no Exceptions
        raise TokenizerError(f"{source}: transformers cannot load it ({quoted(error)}); copy it again") from None


def _check_vocab_size(file: Path, size: int, config: Json) -> None:
    limit = config.get("vocab_size")
    if limit is not None and size > limit:
        raise TokenizerError(
            f"{file}: has {size} tokens, but the model's vocab_size is {limit}; "
            "use the tokenizer that the model was trained with"
        )


def _id_warnings(file: Path, tokenizer: Any, config: Json) -> list[str]:
    warnings = []
    for name in ("bos", "eos", "pad"):
        wanted, own = _ids(config.get(f"{name}_token_id")), getattr(tokenizer, f"{name}_token_id")
        if wanted and own is not None and own not in wanted:
            shown = wanted[0] if len(wanted) == 1 else wanted
            warnings.append(f"{file}: its {name} id is {own}, the model's config says {shown}")
    return warnings


def _ids(value: int | list[int] | None) -> list[int]:
    ids = value if isinstance(value, list) else [value]
    return [id for id in ids if isinstance(id, int) and id >= 0]


def _read_json(file: Path) -> Json:
    return read_json(file, LARGEST_FILE, TokenizerError)


def _copy(file: Path, target: Path) -> None:
    """Not shutil's: what cannot be read is the tokenizer's fault, what cannot be written is not."""
    target.write_bytes(read_bytes(file, LARGEST_FILE, TokenizerError))


def write_json(file: Path, content: Json) -> None:
    file.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def _shorten(text: str) -> str:
    return ascii(text if len(text) <= 40 else text[:40] + "…")
