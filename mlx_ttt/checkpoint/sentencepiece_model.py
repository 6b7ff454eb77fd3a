"""A SentencePiece model, and the `tokenizer.json` that gives its ids on any text."""

from __future__ import annotations

import base64
import re
from collections import Counter
from functools import cached_property
from pathlib import Path
from typing import Any

import sentencepiece
from google.protobuf.message import DecodeError
from sentencepiece.sentencepiece_model_pb2 import ModelProto, TrainerSpec

from ..errors import TokenizerError
from .untrusted import quoted, read_bytes

LARGEST_FILE = 128 << 20  # bytes, of a tokenizer; vocabularies of 256 000 tokens need 35 MB as tokenizer.json
SPACE = "\u2581"  # what SentencePiece writes for a space
Json = dict[str, Any]

_Piece = ModelProto.SentencePiece
_RESERVED = (_Piece.CONTROL, _Piece.UNKNOWN, _Piece.BYTE)  # pieces that no text is encoded to by its characters


class SentencePieceModel:
    """A `tokenizer.model` file: its protocol buffer, and SentencePiece's own processor made from it."""

    def __init__(self, file: Path):
        """Raises TokenizerError when `file` is no SentencePiece model, or one that has no equal tokenizer.json."""
        self.file = file
        data = read_bytes(file, LARGEST_FILE, TokenizerError)
        try:
            self.proto = ModelProto.FromString(data)
            self.names = [piece.piece for piece in self.proto.pieces]
            if not self.names:
                raise ValueError("it holds no pieces")
            if any(isinstance(name, bytes) for name in (*self.names, self.proto.trainer_spec.unk_surface)):
                raise ValueError("a piece is not UTF-8")
            self.processor = sentencepiece.SentencePieceProcessor(model_proto=data)
        except (DecodeError, RuntimeError, ValueError) as error:
            raise TokenizerError(
                f"{file}: not a SentencePiece model, or damaged ({quoted(error)}); copy it again"
            ) from None
        self.byte_fallback = self.proto.trainer_spec.byte_fallback
        self.is_unigram = self.proto.trainer_spec.model_type == TrainerSpec.UNIGRAM
        self._refuse_unrepresentable()

    def of_type(self, *types: int) -> dict[int, str]:
        """id → piece, for the pieces of these types."""
        return {i: p.piece for i, p in enumerate(self.proto.pieces) if p.type in types}

    @cached_property
    def _symbols(self) -> dict[int, str]:
        """User-defined symbols that must be found in the text before merging, as id → piece.

        Symbols of one character need no search: merging starts from characters, and no merge takes these. In a
        UNIGRAM model symbols are pieces with a bonus.
        """
        if self.is_unigram:
            return {}
        return {i: name for i, name in self.of_type(_Piece.USER_DEFINED).items() if len(name) > 1}

    # ------------------------------------------------------------------------------ how far equality goes

    def _refuse_unrepresentable(self) -> None:
        kind = TrainerSpec.ModelType.Name(self.proto.trainer_spec.model_type)
        why = None
        if kind not in ("BPE", "UNIGRAM"):
            why = f"a {kind} model; only BPE and UNIGRAM models are supported"
        elif self.proto.trainer_spec.treat_whitespace_as_suffix:
            why = "treat_whitespace_as_suffix is not supported"
        elif not self.proto.normalizer_spec.escape_whitespaces:
            why = "escape_whitespaces=false is not supported"
        elif self.proto.denormalizer_spec.precompiled_charsmap:
            why = "a denormalizer is not supported"
        elif unused := self.of_type(_Piece.UNUSED):
            why = f"UNUSED pieces are not supported (the first has id {next(iter(unused))})"
        if why:
            raise TokenizerError(f"{self.file}: {why}; pass an equivalent tokenizer.json instead")

    def why_approximate(self) -> str | None:
        """Why equality cannot be promised for all texts; None when it can."""
        if self.is_unigram:
            return "a UNIGRAM model, whose scores SentencePiece adds in float32 and tokenizer.json in float64"
        if not _ties_are_runs({p.piece: p.score for p in self.proto.pieces if p.type == _Piece.NORMAL}):
            return "different pieces have the same score"
        if self.proto.normalizer_spec.precompiled_charsmap:
            name = self.proto.normalizer_spec.name or "by a character map"
            return f"normalization {name!r} is applied to other groups of characters"
        return None

    def texts_without_prefix(self) -> set[str]:
        """Texts that lack the dummy prefix: a symbol and nothing else, which the normalizer takes for a symbol."""
        if not self.proto.normalizer_spec.add_dummy_prefix:
            return set()
        return {name.replace(SPACE, mark) for name in self._symbols.values() for mark in (" ", SPACE)}

    # ------------------------------------------------------------------------------ the files

    def tokenizer_config(self, add_bos: bool) -> Json:
        """Settings under which transformers takes tokenizer.json as it is, and control symbols in text as text."""
        ids = {"bos": self.processor.bos_id(), "eos": self.processor.eos_id(), "pad": self.processor.pad_id()}
        if self.byte_fallback:
            ids["unk"] = self.processor.unk_id()
        return {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "add_bos_token": add_bos and ids["bos"] >= 0,
            "add_eos_token": False,
            "clean_up_tokenization_spaces": False,
            "split_special_tokens": True,
            **{f"{name}_token": self.names[id] for name, id in ids.items() if id >= 0},
        }

    def tokenizer_json(self, add_bos: bool) -> Json:
        """The content of tokenizer.json. add_bos: put the model's BOS, if it has one, in front of each text."""
        special = self.of_type(_Piece.CONTROL, *([_Piece.UNKNOWN] if self.byte_fallback else []))
        # Special tokens are matched in raw text, if at all; symbols after normalization, as SentencePiece does.
        added = [
            {"id": id, "content": name, "special": id in special, "normalized": id not in special}
            | {"single_word": False, "lstrip": False, "rstrip": False}
            for id, name in sorted((special | self._symbols).items())
        ]
        return {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": added,
            "normalizer": self._normalizer(),
            "pre_tokenizer": self._cuts_in_reserved_names() if self.is_unigram else None,
            "post_processor": self._bos_in_front() if add_bos and self.processor.bos_id() >= 0 else None,
            "decoder": self._decoder(),
            "model": self._unigram() if self.is_unigram else self._bpe(),
        }

    def _normalizer(self) -> Json:
        """SentencePiece's order: characters, leading and double spaces, dummy prefix, spaces, trailing spaces."""
        spec = self.proto.normalizer_spec
        steps: list[Json] = []
        if spec.precompiled_charsmap:
            charsmap = base64.b64encode(spec.precompiled_charsmap).decode()
            steps.append({"type": "Precompiled", "precompiled_charsmap": charsmap})
        if spec.remove_extra_whitespaces:
            steps += [_replace({"Regex": r"\A +"}, ""), _replace({"Regex": " {2,}"}, " ")]
        if spec.add_dummy_prefix and not self._symbols:
            steps.append({"type": "Prepend", "prepend": SPACE})
        elif spec.add_dummy_prefix:
            # The symbols to search for pass the normalizer too, and must come out as they are.
            symbols = "|".join(re.escape(symbol) for symbol in self._symbols.values())
            steps.append(_replace({"Regex": rf"\A(?!\z|(?:{symbols})\z)"}, SPACE))
        steps.append(_replace({"String": " "}, SPACE))
        if spec.remove_extra_whitespaces:
            steps.append(_replace({"Regex": rf"{SPACE}+\z"}, ""))
        return {"type": "Sequence", "normalizers": steps}

    def _decoder(self) -> Json:
        """With byte fallback, the very shape that mlx-lm knows as SentencePiece's and streams in linear time."""
        spec = self.proto.normalizer_spec
        if self.byte_fallback:
            steps = [_replace({"String": SPACE}, " "), {"type": "ByteFallback"}, {"type": "Fuse"}]
        else:  # unknown characters occur in ordinary text, and decode to a mark of their own
            unknown = {"Regex": rf"\A{re.escape(self.names[self.processor.unk_id()])}\z"}
            surface = self.proto.trainer_spec.unk_surface
            steps = [_replace(unknown, surface), _replace({"String": SPACE}, " "), {"type": "Fuse"}]
        if spec.add_dummy_prefix or spec.remove_extra_whitespaces:
            steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
        return {"type": "Sequence", "decoders": steps}

    def _bos_in_front(self) -> Json:
        id = self.processor.bos_id()
        bos = self.names[id]

        def with_bos(sequence: str, type_id: int) -> list[Json]:
            parts = {"SpecialToken": bos, "Sequence": sequence}
            return [{kind: {"id": name, "type_id": type_id}} for kind, name in parts.items()]

        return {
            "type": "TemplateProcessing",
            "single": with_bos("A", 0),
            "pair": with_bos("A", 0) + with_bos("B", 1),
            "special_tokens": {bos: {"id": bos, "ids": [id], "tokens": [bos]}},
        }

    # ------------------------------------------------------------------------------ BPE

    def _bpe(self) -> Json:
        scores = {p.piece: p.score for p in self.proto.pieces if p.type == _Piece.NORMAL}
        return {
            "type": "BPE",
            "dropout": None,
            "unk_token": self.names[self.processor.unk_id()],
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": self.byte_fallback,
            "ignore_merges": False,
            "vocab": {name: id for id, name in enumerate(self.names)},
            # One string per merge: older readers know no other form, and no piece contains a space.
            "merges": [f"{left} {right}" for left, right in _merges(scores)],
        }

    # ------------------------------------------------------------------------------ UNIGRAM

    def _unigram(self) -> Json:
        """Pieces with the scores that SentencePiece's search gives them."""
        normal = [p.score for p in self.proto.pieces if p.type == _Piece.NORMAL]
        if not normal:
            raise TokenizerError(f"{self.file}: the model has no ordinary pieces; copy it again")
        # So bad that any other way to read the text is better. (User-defined symbols score 0, better than all.)
        never = min(normal) - 10

        def score(piece: Any) -> float:
            return never * (len(piece.piece) + 1) if piece.type in _RESERVED else piece.score

        return {
            "type": "Unigram",
            "unk_id": self.processor.unk_id(),
            "vocab": [[p.piece, score(p)] for p in self.proto.pieces],
            "byte_fallback": self.byte_fallback,
        }

    def _cuts_in_reserved_names(self) -> Json | None:
        """A pre-tokenizer that cuts reserved names typed in a text, such as `</s>`, where no piece reaches across.

        `tokenizers` finds them like any other piece, at a score below all others, but not below that of a
        character that is no piece. So a name with such a character is cut between two characters that no piece
        has side by side (and not between two unknown ones, where unknown characters fuse).
        """
        pieces = self.of_type(_Piece.NORMAL, _Piece.USER_DEFINED).values()
        single = {piece for piece in pieces if len(piece) == 1}
        neighbours = {piece[i : i + 2] for piece in pieces for i in range(len(piece) - 1)}

        def can_cut(pair: str) -> bool:
            return pair not in neighbours and (self.byte_fallback or not single.isdisjoint(pair))

        cuts = []
        for name in self.of_type(*_RESERVED).values():
            places = (i for i in range(1, len(name)) if can_cut(name[i - 1 : i + 1]))
            if not single.issuperset(name) and (i := next(places, None)):
                cuts.append(f"{re.escape(name[:i])}(?={re.escape(name[i:])})")
        if not cuts:
            return None
        pattern = {"Regex": "|".join(cuts)}
        return {"type": "Split", "pattern": pattern, "behavior": "MergedWithPrevious", "invert": False}


def _merges(scores: dict[str, float]) -> list[tuple[str, str]]:
    """All ways to merge two pieces into a third, in the order in which SentencePiece prefers them.

    SentencePiece merges the adjacent pair whose union has the best score, whatever its parts, and the leftmost
    among equals; `tokenizers` ranks pairs. Ranking by score is enough when scores are distinct. Runs of spaces have
    one score in the Llama vocabularies: there leftmost means that the first run grows as far as it can before the
    next one starts, and long left parts first, then long right parts, does the same.
    """
    merges = []
    for piece in scores:
        splits = ((piece[:i], piece[i:]) for i in range(1, len(piece)))
        merges += [(left, right) for left, right in splits if left in scores and right in scores]
    return sorted(merges, key=lambda pair: (-scores["".join(pair)], -len(pair[0]), -len(pair[1])))


def _ties_are_runs(scores: dict[str, float]) -> bool:
    """Whether pieces share a score only as the runs of one character, and all its runs do: see `_merges`."""
    unions = {piece: score for piece, score in scores.items() if len(piece) > 1}
    count = Counter(unions.values())
    characters = {character for piece, score in unions.items() if count[score] > 1 for character in piece}
    runs = {score for piece, score in unions.items() if set(piece) == characters}
    return len(characters) <= 1 and len(runs) <= 1


def _replace(pattern: Json, content: str) -> Json:
    return {"type": "Replace", "pattern": pattern, "content": content}
