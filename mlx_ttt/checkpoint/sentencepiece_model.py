"""A SentencePiece model, and the `tokenizer.json` that gives the same ids on any text."""

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

LARGEST_FILE = 128 << 20  # bytes; a tokenizer.json with 256 000 tokens has 35 MB
SPACE = "\u2581"  # stands for a space in pieces
Json = dict[str, Any]

_Piece = ModelProto.SentencePiece
_RESERVED = (_Piece.CONTROL, _Piece.UNKNOWN, _Piece.BYTE)  # pieces that no characters of a text are encoded to


class SentencePieceModel:
    """A `tokenizer.model` file: its protocol buffer, and SentencePiece's own processor made from it."""

    def __init__(self, file: Path):
        """Raises TokenizerError if `file` is no SentencePiece model, or one that tokenizer.json cannot represent."""
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
        """The pieces of these types, by id."""
        return {i: p.piece for i, p in enumerate(self.proto.pieces) if p.type in types}

    @cached_property
    def _symbols(self) -> dict[int, str]:
        """User-defined symbols that must be found in the text before merging, by id.

        Symbols of one character need not: merging starts from characters, and no merge uses these. In a UNIGRAM model
        symbols are pieces with a good score.
        """
        if self.is_unigram:
            return {}
        return {i: name for i, name in self.of_type(_Piece.USER_DEFINED).items() if len(name) > 1}

    # ------------------------------------------------------------------------------ what tokenizer.json can represent

    def _refuse_unrepresentable(self) -> None:
        kind = TrainerSpec.ModelType.Name(self.proto.trainer_spec.model_type)
        unused = self.of_type(_Piece.UNUSED)
        refused = {
            f"a {kind} model; only BPE and UNIGRAM models are supported": kind not in ("BPE", "UNIGRAM"),
            "treat_whitespace_as_suffix is not supported": self.proto.trainer_spec.treat_whitespace_as_suffix,
            "escape_whitespaces=false is not supported": not self.proto.normalizer_spec.escape_whitespaces,
            "a denormalizer is not supported": self.proto.denormalizer_spec.precompiled_charsmap,
            f"UNUSED pieces are not supported (the first has id {min(unused, default=None)})": unused,
        }
        for why, applies in refused.items():
            if applies:
                raise TokenizerError(f"{self.file}: {why}; pass an equivalent tokenizer.json instead")

    def why_approximate(self) -> str | None:
        """Why tokenizer.json may give other ids on some texts; None if it gives the same on all."""
        if self.is_unigram:
            return "a UNIGRAM model, whose scores SentencePiece adds in float32 and tokenizer.json in float64"
        if not _ties_are_runs({p.piece: p.score for p in self.proto.pieces if p.type == _Piece.NORMAL}):
            return "different pieces have the same score"
        if self.proto.normalizer_spec.precompiled_charsmap:
            name = self.proto.normalizer_spec.name or "by a character map"
            return f"normalization {name!r} is applied to other groups of characters"
        return None

    def texts_without_prefix(self) -> set[str]:
        """Texts that get no dummy prefix from tokenizer.json: those that are just one symbol (see `_normalizer`)."""
        if not self.proto.normalizer_spec.add_dummy_prefix:
            return set()
        return {name.replace(SPACE, mark) for name in self._symbols.values() for mark in (" ", SPACE)}

    # ------------------------------------------------------------------------------ the files

    def tokenizer_config(self, add_bos: bool) -> Json:
        """The content of tokenizer_config.json.

        With it transformers loads tokenizer.json unchanged, and takes control symbols in a text for text.

        Args:
            add_bos: put the model's BOS, if it has one, in front of each text.
        """
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
        """The content of tokenizer.json.

        Args:
            add_bos: put the model's BOS, if it has one, in front of each text.
        """
        special = self.of_type(_Piece.CONTROL, *([_Piece.UNKNOWN] if self.byte_fallback else []))
        # Special tokens are matched before normalization, if at all; symbols after it, as in SentencePiece.
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
        """In SentencePiece's order: characters, leading and double spaces, dummy prefix, spaces, trailing spaces."""
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
            # `tokenizers` normalizes the symbols that it searches for, too: they must stay as they are.
            symbols = "|".join(re.escape(symbol) for symbol in self._symbols.values())
            steps.append(_replace({"Regex": rf"\A(?!\z|(?:{symbols})\z)"}, SPACE))
        steps.append(_replace({"String": " "}, SPACE))
        if spec.remove_extra_whitespaces:
            steps.append(_replace({"Regex": rf"{SPACE}+\z"}, ""))
        return {"type": "Sequence", "normalizers": steps}

    def _decoder(self) -> Json:
        """With byte fallback, exactly the steps by which mlx-lm recognizes SentencePiece and streams in linear time."""
        spec = self.proto.normalizer_spec
        if self.byte_fallback:
            steps = [_replace({"String": SPACE}, " "), {"type": "ByteFallback"}, {"type": "Fuse"}]
        else:  # unknown characters occur in ordinary text, and decode to SentencePiece's mark for them
            unknown = {"Regex": rf"\A{re.escape(self.names[self.processor.unk_id()])}\z"}
            surface = self.proto.trainer_spec.unk_surface
            steps = [_replace(unknown, surface), _replace({"String": SPACE}, " "), {"type": "Fuse"}]
        if spec.add_dummy_prefix or spec.remove_extra_whitespaces:
            steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
        return {"type": "Sequence", "decoders": steps}

    def _bos_in_front(self) -> Json:
        """A post-processor that puts BOS in front of each text."""
        id = self.processor.bos_id()
        bos = self.names[id]
        first = [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
        second = [{"SpecialToken": {"id": bos, "type_id": 1}}, {"Sequence": {"id": "B", "type_id": 1}}]
        return {
            "type": "TemplateProcessing",
            "single": first,
            "pair": first + second,
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
            # One string for each merge: older libraries know no other form, and no piece contains a space.
            "merges": [f"{left} {right}" for left, right in _merges(scores)],
        }

    # ------------------------------------------------------------------------------ UNIGRAM

    def _unigram(self) -> Json:
        """The pieces, with scores such that the best segmentation is SentencePiece's."""
        normal = [p.score for p in self.proto.pieces if p.type == _Piece.NORMAL]
        if not normal:
            raise TokenizerError(f"{self.file}: the model has no ordinary pieces; copy it again")
        # So bad that any other segmentation is better. (User-defined symbols have 0, the best score.)
        never = min(normal) - 10
        return {
            "type": "Unigram",
            "unk_id": self.processor.unk_id(),
            "vocab": [
                [p.piece, never * (len(p.piece) + 1) if p.type in _RESERVED else p.score] for p in self.proto.pieces
            ],
            "byte_fallback": self.byte_fallback,
        }

    def _cuts_in_reserved_names(self) -> Json | None:
        """A pre-tokenizer that cuts reserved names such as `</s>` in a text, where no piece is cut by it.

        `tokenizers` matches reserved names like any other piece. Their score is below that of all pieces, but not
        below that of an unknown character. So a name with an unknown character must be cut, between two characters
        that are not neighbours in any piece (nor both unknown, if unknown characters are fused).
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
    """All pairs of pieces that make a third one, in the order in which SentencePiece prefers them.

    SentencePiece merges the two neighbours whose union has the best score, and the leftmost of equals; `tokenizers`
    ranks pairs. If all scores differ, ranking pairs by the score of their union is the same. In the Llama vocabularies
    all runs of spaces have one score. There the leftmost run grows as far as it can before the next one starts: the
    same as ranking longer left parts first, then longer right parts.
    """
    merges = []
    for piece in scores:
        splits = ((piece[:i], piece[i:]) for i in range(1, len(piece)))
        merges += [(left, right) for left, right in splits if left in scores and right in scores]
    return sorted(merges, key=lambda pair: (-scores["".join(pair)], -len(pair[0]), -len(pair[1])))


def _ties_are_runs(scores: dict[str, float]) -> bool:
    """Whether the only pieces with one score are the runs of one character, and all of its runs: see `_merges`."""
    unions = {piece: score for piece, score in scores.items() if len(piece) > 1}
    count = Counter(unions.values())
    characters = {character for piece, score in unions.items() if count[score] > 1 for character in piece}
    runs = {score for piece, score in unions.items() if set(piece) == characters}
    return len(characters) <= 1 and len(runs) <= 1


def _replace(pattern: Json, content: str) -> Json:
    """A step of a normalizer or decoder that replaces all matches of a pattern."""
    return {"type": "Replace", "pattern": pattern, "content": content}
