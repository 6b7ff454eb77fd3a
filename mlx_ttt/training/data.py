"""Training data: files become documents, and documents become batches.

A document is one text: a text file, or one line of a `.jsonl` file, or one row of a data set. It is cut into windows
only where it is longer than one, and is never joined with another.
"""

from __future__ import annotations

import codecs
import hashlib
import heapq
import io
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..checkpoint.untrusted import quoted
from ..errors import TrainingDataError
from ..text.tokenizer import encode

PIECE = 1 << 18  # characters encoded in one call: the tokenizer takes some hundred bytes for each
_POOL = 64  # batches among which windows of about the same length are put together


@dataclass(frozen=True)
class Document:
    """One text.

    Attributes:
        ids: its tokens, int32 [n].
        counts: bool [n], whether a token is to be predicted. None if all are. The first never is: nothing is before it.
    """

    ids: np.ndarray
    counts: np.ndarray | None = None

    @property
    def predicted(self) -> np.ndarray:
        """bool [n - 1]: which tokens after the first are to be predicted."""
        return np.ones(len(self.ids) - 1, bool) if self.counts is None else self.counts[1:]


# ---------------------------------------------------------------------------------------------- reading


def read_documents(
    paths: Iterable[str | Path],
    tokenizer: TokenizerWrapper,
    all_tokens: bool = False,
    vocab_size: int | None = None,
) -> list[Document]:
    """Read training data.

    Args:
        paths: each a UTF-8 text file; a `.jsonl` file, with `text`, or `prompt` and `completion`, or `messages` in each
            line; a data set that Hugging Face's `datasets` saved to disk; or a folder of all these, which is read
            recursively and in sorted order, without hidden files.
        tokenizer: turns text to ids. BOS and EOS are put around each document if the tokenizer has them. If it has a
            chat template, a prompt and its completion are written as a user's turn and an assistant's.
        all_tokens: whether prompts and the turns of others than the assistant are to be predicted, too.
        vocab_size: of the model, which may have room for more tokens than the tokenizer knows.

    Raises:
        TrainingDataError: a file is missing, empty, not UTF-8 or not what its name says; a line lacks something; a
            token is outside the model's vocabulary. The message says which file and line.
    """
    reader = _Reader(tokenizer, all_tokens, vocab_size)
    documents = [document for path in paths for document in reader.documents(Path(path))]
    if not documents:
        raise TrainingDataError("there is no training data; name a text file, a .jsonl file, or a folder of them")
    return documents


def read_texts(paths: Iterable[str | Path]) -> Iterator[str]:
    """The texts of training data in pieces, without their order or limits: what a tokenizer is trained on.

    Raises:
        TrainingDataError: as for `read_documents`, as far as it does not depend on a tokenizer.
    """
    for path in paths:
        for file in _training_files(Path(path)):
            if not _has_records(file):
                yield from _pieces(_read_text(file))
                continue
            for where, record in _records(file):
                for text in _strings(record, where):
                    yield from _pieces(_blocks(text))


def _read_text(path: Path) -> Iterator[str]:
    """The text of a UTF-8 file, in blocks of at most `PIECE` characters. Line ends of any system become "\\n"."""
    decoder: Any = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder("utf-8-sig")(), translate=True)
    line = 1
    try:
        with path.open("rb") as file:
            more = True
            while more:
                data = file.read(PIECE)
                more = bool(data)
                text = decoder.decode(data, final=not more)
                if "\0" in text:
                    raise TrainingDataError(f"{path}: not a text file: it has null characters")
                line += text.count("\n")
                if text:
                    yield text
    except UnicodeDecodeError as error:
        line += error.object[: error.start].count(b"\n")
        raise TrainingDataError(f"{path}, line {line}: not UTF-8; save it as UTF-8") from None
    except OSError as error:
        raise TrainingDataError(f"{path}: {error.strerror}") from None


def _training_files(path: Path) -> Iterator[Path]:
    """The files and data sets in `path`, which may be one itself, in sorted order."""
    if not path.is_dir() or _is_data_set(path):
        yield path
        return
    found = False
    for file in _sorted_files(path, set()):
        found = True
        yield file
    if not found:
        raise TrainingDataError(f"{path}: there are no files in this folder")


def _records(path: Path) -> Iterator[tuple[str, Any]]:
    """The records of a `.jsonl` file or a data set, each with its place for an error message."""
    yield from _rows(path) if path.is_dir() else _lines(path)


def _has_records(path: Path) -> bool:
    """Whether a path holds records. Else it is a text file."""
    return path.is_dir() or path.suffix.lower() == ".jsonl"


def _sorted_files(folder: Path, seen: set[str]) -> Iterator[Path]:
    if (real := os.path.realpath(folder)) in seen:  # a link to a folder above it
        return
    seen.add(real)
    try:
        entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    except OSError as error:
        raise TrainingDataError(f"{folder}: {error.strerror}") from None
    for entry in entries:
        if entry.is_dir() and not _is_data_set(entry):
            yield from _sorted_files(entry, seen)
        else:
            yield entry


def _is_data_set(folder: Path) -> bool:
    """Whether `datasets` saved this folder."""
    return (folder / "dataset_dict.json").exists() or (
        (folder / "dataset_info.json").exists() and (folder / "state.json").exists()
    )


def _lines(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                where = f"{path}, line {number}"
                if not line.strip():
                    continue
                try:
                    yield where, json.loads(line.decode("utf-8-sig"))
                except UnicodeDecodeError:
                    raise TrainingDataError(f"{where}: not UTF-8; save it as UTF-8") from None
                except (ValueError, RecursionError) as error:
                    raise TrainingDataError(f"{where}: not JSON: {quoted(error)}") from None
    except OSError as error:
        raise TrainingDataError(f"{path}: {error.strerror}") from None


def _rows(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        import datasets
    except ImportError:
        raise TrainingDataError(f"{path}: a Hugging Face data set; to read it, run `pip install datasets`") from None
    try:
        data = datasets.load_from_disk(str(path))
    except Exception as error:  # damaged files make it raise exceptions of any kind
        raise TrainingDataError(f"{path}: the data set cannot be read: {quoted(error)}") from None
    if isinstance(data, datasets.DatasetDict):
        splits = list(data)
        name = splits[0] if len(splits) == 1 else "train"
        if name not in splits:
            raise TrainingDataError(f"{path}: no split named train; name the folder of one of {', '.join(splits)}")
        data = data[name]
    for number, row in enumerate(data, 1):
        row = {key: value for key, value in row.items() if value is not None}
        if isinstance(text := row.get("text"), str) and not text.strip():
            continue  # many data sets have blank rows, and nobody can remove them with an editor
        yield f"{path}, row {number}", row


@dataclass
class _Reader:
    """Turns files to documents."""

    tokenizer: TokenizerWrapper
    all_tokens: bool
    vocab_size: int | None

    def documents(self, path: Path) -> Iterator[Document]:
        for file in _training_files(path):
            if _has_records(file):
                found = False
                for where, record in _records(file):
                    found = True
                    yield self._checked(self._record(record, where), where)
                if not found:
                    raise TrainingDataError(f"{file}: there is no data in it")
            else:
                yield self._checked(Document(self._text(_read_text(file), str(file))), str(file))

    def _record(self, record: Any, where: str) -> Document:
        kind = _kind(record, where)
        if kind == "messages":
            return self._chat(_messages(record, where), record.get("tools"), where)
        if kind == "text":
            return Document(self._text(_blocks(_string(record, "text", where)), where))
        prompt, completion = _string(record, "prompt", where), _string(record, "completion", where)
        if not completion:
            raise TrainingDataError(f'{where}: "completion" is empty')
        if not self.tokenizer.chat_template:
            return self._completion(prompt, completion)
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
        return self._chat(turns, record.get("tools"), where)

    def _text(self, blocks: Iterable[str], where: str) -> np.ndarray:
        """The ids of one text, from BOS to EOS."""
        parts: list[np.ndarray] = []
        blank = True
        for piece in _pieces(blocks):
            blank = blank and not piece.strip()
            parts.append(self._encoded(piece, continues=bool(parts)))
        if blank:
            raise TrainingDataError(f"{where}: the text is empty")
        return np.concatenate([*parts, self._end])

    def _completion(self, prompt: str, completion: str) -> Document:
        """A prompt and what follows it. They are encoded one by one, as when a model completes a prompt."""
        before = self._encoded(prompt, continues=False)
        after = np.concatenate([self._encoded(completion, continues=len(before) > 0), self._end])
        return self._document([(before, False), (after, True)])

    def _chat(self, messages: list[dict[str, Any]], tools: Any, where: str) -> Document:
        """A conversation, as the chat template writes it."""
        if not self.tokenizer.chat_template:
            raise TrainingDataError(f'{where}: "messages" need a tokenizer with a chat template, and this one has none')

        def written(count: int, answer: bool = False) -> str:
            """The first messages; with an answer to follow, up to where it begins."""
            try:
                return self.tokenizer.apply_chat_template(
                    messages[:count], tools=tools, tokenize=False, add_generation_prompt=answer
                )
            except Exception as error:  # templates are programs, which raise exceptions of any kind
                raise TrainingDataError(f"{where}: the chat template refuses it: {quoted(error)}") from None

        whole, parts, at = written(len(messages)), [], 0
        for i, message in enumerate(messages):
            if message["role"] != "assistant" or self.all_tokens:
                continue
            before, after = written(i, answer=True) if i else "", written(i + 1)
            if not (whole.startswith(before) and whole.startswith(after) and at <= len(before) <= len(after)):
                raise TrainingDataError(
                    f"{where}: the chat template writes a turn in another way once others follow, so that the "
                    "assistant's tokens cannot be told apart; use --all-tokens"
                )
            parts += [(whole[at : len(before)], False), (whole[len(before) : len(after)], True)]
            at = len(after)
        if not parts and not self.all_tokens:
            raise TrainingDataError(f"{where}: no message has the role assistant, so nothing would be learnt from it")
        parts.append((whole[at:], False))
        encoded: list[tuple[np.ndarray, bool]] = []
        for text, counts in parts:  # the template writes BOS and EOS itself
            for piece in _pieces(_blocks(text)):
                first = not encoded
                ids = self.tokenizer.encode(piece, add_special_tokens=False) if first else self._encoded(piece, True)
                encoded.append((np.asarray(ids, np.int32), counts))
        return self._document(encoded)

    def _document(self, parts: list[tuple[np.ndarray, bool]]) -> Document:
        ids = np.concatenate([part for part, _ in parts])
        if self.all_tokens:
            return Document(ids)
        return Document(ids, np.concatenate([np.full(len(part), counts) for part, counts in parts]))

    def _encoded(self, text: str, continues: bool) -> np.ndarray:
        """Ids, without the EOS that some tokenizers append."""
        ids = encode(self.tokenizer, text, continues)
        if not continues and ids and ids[-1] == self.tokenizer.eos_token_id:
            ids = ids[:-1]
        return np.array(ids, np.int32)

    @property
    def _end(self) -> np.ndarray:
        eos = self.tokenizer.eos_token_id
        return np.array([] if eos is None else [eos], np.int32)

    def _checked(self, document: Document, where: str) -> Document:
        if not document.predicted.any():
            raise TrainingDataError(f"{where}: too short: there is no token to predict")
        if self.vocab_size is not None and (largest := int(document.ids.max())) >= self.vocab_size:
            raise TrainingDataError(
                f"{where}: the tokenizer gives the id {largest}, which is outside the model's vocabulary of "
                f"{self.vocab_size}; use the tokenizer that belongs to the model"
            )
        return document


def _kind(record: Any, where: str) -> str:
    """What a record holds: "messages", "text" or "completion"."""
    if not isinstance(record, dict):
        raise TrainingDataError(f'{where}: not a JSON object, such as {{"text": "…"}}')
    if "messages" in record:
        return "messages"
    if "prompt" in record or "completion" in record:
        return "completion"
    if "text" in record:
        return "text"
    raise TrainingDataError(f'{where}: it has no "text", no "prompt" and "completion", and no "messages"')


def _strings(record: Any, where: str) -> list[str]:
    """The texts in a record."""
    kind = _kind(record, where)
    if kind == "messages":
        return [m["content"] for m in _messages(record, where) if isinstance(m.get("content"), str)]
    return [_string(record, key, where) for key in (("text",) if kind == "text" else ("prompt", "completion"))]


def _string(record: dict[str, Any], key: str, where: str) -> str:
    if key not in record:
        raise TrainingDataError(f'{where}: "{key}" is missing')
    if not isinstance(record[key], str):
        raise TrainingDataError(f'{where}: "{key}" is not a string')
    return record[key]


def _messages(record: dict[str, Any], where: str) -> list[dict[str, Any]]:
    messages = record["messages"]
    if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) for m in messages):
        raise TrainingDataError(f'{where}: "messages" is not a list of objects with "role" and "content"')
    for number, message in enumerate(messages, 1):
        if not isinstance(message.get("role"), str):
            raise TrainingDataError(f'{where}: message {number} has no "role"')
        if message.get("content") is None and not message.get("tool_calls"):
            raise TrainingDataError(f'{where}: message {number} has no "content"')
    return messages


def _blocks(text: str) -> Iterator[str]:
    return (text[i : i + PIECE] for i in range(0, len(text), PIECE))


def _pieces(blocks: Iterable[str]) -> Iterator[str]:
    """Text to encode piece by piece. Cut where common tokenizers have a boundary, so that the ids are the same."""
    rest = ""
    for block in blocks:
        rest += block
        if len(rest) > PIECE:
            cut = _boundary(rest)
            yield rest[:cut]
            rest = rest[cut:]
    if rest:
        yield rest


def _boundary(text: str) -> int:
    """The last place where a line begins; if there is none, where a word ends; else the end."""
    for mark, after in (("\n", 1), (" ", 0)):
        at = text.rfind(mark, 1, -1)
        while at > 0 and (text[at + 1].isspace() or (not after and text[at - 1].isspace())):
            at = text.rfind(mark, 1, at)
        if at > 0:
            return at + after
    return len(text)


# ---------------------------------------------------------------------------------------------- holding out


def hold_out(documents: Sequence[Document], fraction: float, seed: int = 0) -> tuple[list[Document], list[Document]]:
    """Split documents into those to train on and those to test on.

    Whole documents are held out, chosen by the seed, as long as they fit into the fraction of all tokens. Where they
    are too long for that, the end of the longest document is held out.

    Raises:
        TrainingDataError: there is too little data to split.
        ValueError: the fraction is not between 0 and 1.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"fraction is {fraction}: expected one between 0 and 1")
    wanted = round(fraction * sum(len(d.ids) for d in documents))
    held: set[int] = set()
    missing = wanted
    for i in np.random.default_rng(seed).permutation(len(documents)):
        if len(documents[i].ids) <= missing:
            held.add(int(i))
            missing -= len(documents[i].ids)
    train = [d for i, d in enumerate(documents) if i not in held]
    test = [d for i, d in enumerate(documents) if i in held]
    if missing > wanted // 2 and train:
        longest = max(range(len(train)), key=lambda i: len(train[i].ids))
        train[longest], end = _cut(train[longest], len(train[longest].ids) - missing)
        test.append(end)
    if not all(any(len(d.ids) > 1 and d.predicted.any() for d in part) for part in (train, test)):
        raise TrainingDataError(f"too little data to hold out {fraction:.2%} of it; name other files to test on")
    return train, test


def _cut(document: Document, at: int) -> tuple[Document, Document]:
    ids, counts = document.ids, document.counts
    return (
        Document(ids[:at], None if counts is None else counts[:at]),
        Document(ids[at:], None if counts is None else counts[at:]),
    )


# ---------------------------------------------------------------------------------------------- batches


@dataclass(frozen=True)
class Batch:
    """What one step reads.

    Attributes:
        ids: int32 [B, T + 1]. The first T are read, the last T predicted. T is that of the batch's longest window.
        weights: float32 [B, T]; 1 for tokens to predict, 0 for others, padding among them. All may be 0 in a batch
            that is read for the sake of the state only: a window of a long prompt, when states are carried.
        fresh: bool [B]. A sequence starts from the model's own initial state; else from the state after the last batch.
    """

    ids: np.ndarray
    weights: np.ndarray
    fresh: np.ndarray


class Batches:
    """The batches of all steps. Every epoch predicts every token of every document once, in a new order.

    Each row of a batch is one window of one document. Windows without any token to predict are left out; with `carry`,
    only those behind a document's last one. Rows without a window are padding.
    """

    def __init__(self, documents: Sequence[Document], length: int, batch_size: int, seed: int = 0, carry: bool = False):
        """
        Args:
            length: how many tokens a window reads, at most.
            batch_size: rows of a batch.
            carry: whether the windows of a document follow one another in the same row, from step to step.

        Raises:
            TrainingDataError: there is no token to predict.
            ValueError: length or batch size is not positive.
        """
        if length < 1 or batch_size < 1:
            raise ValueError(f"length is {length} and batch_size is {batch_size}: expected positive ones")
        self.documents, self.length, self.batch_size, self.seed, self.carry = documents, length, batch_size, seed, carry
        starts = [self._starts(document) for document in documents]
        self._windows = np.array([len(s) for s in starts])  # of each document
        if not self._windows.sum():
            raise TrainingDataError("there is no token to predict in the training data")
        self._document = np.repeat(np.arange(len(documents)), self._windows)  # of each window
        self._start = np.concatenate(starts)  # of each window in its document
        ends = np.array([len(document.ids) - 1 for document in documents])
        self._size = np.minimum(ends[self._document] - self._start, length)
        self._planned = (0, self._plan(0))

    def __len__(self) -> int:
        """Batches in an epoch."""
        return len(self._planned[1])

    @property
    def fingerprint(self) -> str:
        """A hash of all that the batches depend on. Training that is resumed with another one would not be exact."""
        digest = hashlib.sha256(repr((self.length, self.batch_size, self.seed, self.carry)).encode())
        for document in self.documents:
            digest.update(f"{len(document.ids)}".encode())
            digest.update(document.ids.data)
            digest.update(b"all" if document.counts is None else document.counts.data)
        return digest.hexdigest()

    def batch(self, step: int) -> Batch:
        """The batch of a step, counted from 0 over all epochs. It depends on nothing but the step."""
        epoch, position = divmod(step, len(self))
        if self._planned[0] != epoch:
            self._planned = (epoch, self._plan(epoch))
        windows = self._planned[1][position]
        T = max(self._size[w] for w in windows if w >= 0)
        ids = np.zeros((self.batch_size, T + 1), np.int32)
        weights = np.zeros((self.batch_size, T), np.float32)
        fresh = np.ones(self.batch_size, bool)
        for row, w in enumerate(windows):
            if w < 0:
                continue
            document, start, size = self.documents[self._document[w]], self._start[w], self._size[w]
            ids[row, : size + 1] = document.ids[start : start + size + 1]
            weights[row, :size] = 1 if document.counts is None else document.counts[start + 1 : start + size + 1]
            fresh[row] = not self.carry or start == 0
        return Batch(ids, weights, fresh)

    def _starts(self, document: Document) -> np.ndarray:
        """Where the windows of a document begin. Each reads the token that the one before it predicted last."""
        starts = np.arange(0, len(document.ids) - 1, self.length)
        if document.counts is None or not len(starts):
            return starts
        useful = np.flatnonzero(np.add.reduceat(document.predicted, starts, dtype=np.int64))
        if not self.carry:
            return starts[useful]
        return starts[: useful[-1] + 1] if len(useful) else starts[:0]

    def _plan(self, epoch: int) -> np.ndarray:
        """The windows of an epoch's batches, [batches, rows]; -1 for padding."""
        rng = np.random.default_rng([self.seed, epoch])
        return self._plan_carried(rng) if self.carry else self._plan_shuffled(rng)

    def _plan_shuffled(self, rng: np.random.Generator) -> np.ndarray:
        """All windows in random order, but those of one batch of about the same length, so that little is padded."""
        order = rng.permutation(len(self._start))
        pool = _POOL * self.batch_size
        for i in range(0, len(order), pool):
            part = order[i : i + pool]
            order[i : i + pool] = part[np.argsort(self._size[part], kind="stable")]
        padding = np.full(-len(order) % self.batch_size, -1)
        return rng.permutation(np.concatenate([order, padding]).reshape(-1, self.batch_size))

    def _plan_carried(self, rng: np.random.Generator) -> np.ndarray:
        """One document after the other in each row, the windows of each in order.

        The longest are given to rows first, always to the row with the fewest windows. So rows are about equally long,
        and an epoch always has the same number of batches. Which documents share a row, and in what order, is random.
        """
        order = rng.permutation(len(self.documents))
        order = order[np.argsort(-self._windows[order], kind="stable")]
        rows: list[list[int]] = [[] for _ in range(self.batch_size)]
        loads = [(0, row) for row in range(self.batch_size)]
        for document in order:
            load, row = loads[0]
            rows[row].append(document)
            heapq.heapreplace(loads, (load + int(self._windows[document]), row))
        first = np.cumsum(self._windows) - self._windows
        plan = np.full((max(load for load, _ in loads), self.batch_size), -1)
        for row, members in enumerate(rows):
            at = 0
            for document in rng.permutation(np.array(members, int)):
                count = self._windows[document]
                plan[at : at + count, row] = np.arange(first[document], first[document] + count)
                at += count
        return plan
