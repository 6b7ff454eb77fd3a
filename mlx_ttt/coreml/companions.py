"""What an app developer needs beside a package: tokenizer, configuration, expected outputs, Swift code, a README."""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from string import Template
from typing import Any

import mlx.core as mx

from .. import __version__
from ..checkpoint.sentencepiece_model import LARGEST_FILE
from ..checkpoint.tokenizer import write_json
from ..checkpoint.untrusted import read_json
from ..detokenizer import SentencePieceDetokenizer
from ..errors import TokenizerError
from ..generation import encode, stream_generate
from ..loading import load_model, load_tokenizer
from ..model import Model, ModelArgs

Json = dict[str, Any]

_ROOM = Path(__file__).parent
_SWIFT = _ROOM / "swift"

_FILES = {
    "tokenizer.json": "the tokenizer, as swift-transformers reads it",
    "tokenizer_config.json": "its settings",
    "pieces.json": "the text or bytes that each token stands for, for streaming",
    "config.json": "the model's configuration",
    "generation_config.json": "how to sample",
    "expected.json": "token ids, logits and greedy continuations to check an app against",
    "TTTKit": "the Swift code: `Sources` for the app, `Tests`, and `Package.swift` to run them",
}

# The second one has bytes that are no pieces in many vocabularies, and is longer than a mini-batch.
_PROMPTS = ("ROMEO:\n", "Once upon a time there was a naïve café owner 🙂 who")
_NEW_TOKENS = 24
_TEXTS = (
    *("a", " leading", "two  spaces ", "line\n\nbreak\r\n", "tab\tand nbsp\u00a0", "0123 4.5", "don't; she's"),
    *("naïve café", "e\u0301", "Ελλάδα", "日本語", "한국어", "עברית", "🙂👩\u200d👧"),
    *("<s> </s> <unk>", "<0x41>"),
)

_SAMPLING = {"do_sample": True, "temperature": 0.8, "top_p": 0.95, "max_new_tokens": 256}

# What swift-transformers 1.3.3 knows; it ends the app when it meets anything else.
_TOKENIZER_CLASSES = {"BPE": "PreTrainedTokenizerFast", "Unigram": "T5TokenizerFast"}
_COMPONENTS = {
    "normalizer": "Sequence Prepend Replace Lowercase NFD NFC NFKD NFKC Bert BertNormalizer Precompiled"
    " StripAccents Strip",
    "pre_tokenizer": "Sequence ByteLevel Punctuation Digits Split Whitespace WhitespaceSplit Metaspace"
    " BertPreTokenizer",
    "post_processor": "Sequence TemplateProcessing ByteLevel RobertaProcessing BertProcessing",
    "decoder": "Sequence WordPiece ByteLevel Replace ByteFallback Fuse Strip Metaspace",
}


def write_companions(
    out: Path, model: Path, packages: Sequence[str], args: ModelArgs, layout: Json, stateful: bool = True
) -> None:
    """Write the companions of a package, or of the two of a separate pair.

    Args:
        out: an existing folder.
        model: the model directory that the package was made from.
        packages: the packages' names without .mlpackage; of a pair, decode first.
        args: the model's configuration.
        layout: the state's, as the package's metadata says it; its `shape` is used.
        stateful: whether Core ML keeps the state.

    Raises:
        CheckpointError: `model` is no model directory.
        TokenizerError: it has no tokenizer, or one that swift-transformers does not know.
    """
    network, config = load_model(model)
    network.set_dtype(mx.float32)
    tokenizer = load_tokenizer(model, config)

    tokenizer_json = _write_tokenizer(out, model)
    write_json(out / "pieces.json", _pieces(tokenizer._tokenizer, tokenizer_json))
    own_config = read_json(model / "config.json")
    mlx_only = ("quantization", "quantization_config", "model_file")
    write_json(out / "config.json", {k: v for k, v in own_config.items() if k not in mlx_only})
    write_json(out / "generation_config.json", _generation_config(model, tokenizer))
    write_json(out / "expected.json", _expected(network, tokenizer))
    for source in (_SWIFT / "Package.swift", *_SWIFT.glob("Sources/**/*.swift"), *_SWIFT.glob("Tests/**/*.swift")):
        target = out / "TTTKit" / source.relative_to(_SWIFT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
    _write_readme(out, packages, args, layout, stateful, tokenizer_json)


# ------------------------------------------------------------------------------------------------- tokenizer


def _write_tokenizer(out: Path, model: Path) -> Json:
    """tokenizer.json and tokenizer_config.json for swift-transformers: the same ids, said in words that it knows."""
    file, config = model / "tokenizer.json", model / "tokenizer_config.json"
    content = read_json(file, LARGEST_FILE, TokenizerError)
    settings = read_json(config, LARGEST_FILE, TokenizerError) if config.is_file() else {}
    _refuse_unknown(content, file)

    kind = content["model"]["type"]
    settings["tokenizer_class"] = _TOKENIZER_CLASSES[kind]
    if kind == "BPE" and content["model"].get("unk_token"):
        # It looks for the unknown token here, and cannot encode unknown characters without one.
        settings["unk_token"] = content["model"]["unk_token"]
        settings["fuse_unk"] = content["model"].get("fuse_unk", False)
    if settings.get("split_special_tokens"):
        # It has no such setting: it finds all that is listed here in any text.
        known = _vocabulary(content)
        content["added_tokens"] = [
            token for token in content.get("added_tokens", []) if not (token["special"] and token["content"] in known)
        ]
    write_json(out / "tokenizer.json", content)
    write_json(out / "tokenizer_config.json", settings)
    if (model / "chat_template.jinja").is_file():
        shutil.copyfile(model / "chat_template.jinja", out / "chat_template.jinja")
    return content


def _vocabulary(content: Json) -> set[str]:
    vocabulary = content["model"]["vocab"]  # BPE: piece to id; Unigram: pieces with scores
    return set(vocabulary) if isinstance(vocabulary, dict) else {piece for piece, _ in vocabulary}


def _refuse_unknown(content: Json, file: Path) -> None:
    kind = content["model"].get("type")
    if kind not in _TOKENIZER_CLASSES:
        raise TokenizerError(f"{file}: swift-transformers has no {kind} model; export with --no-companions")
    for part, known in _COMPONENTS.items():
        for component in _components(content.get(part)):
            if component["type"] not in known.split():
                kind = component["type"]
                raise TokenizerError(f"{file}: swift-transformers has no {part} {kind}; export with --no-companions")


def _components(part: Json | None) -> Iterator[Json]:
    """A part of a tokenizer and, where it is a sequence, what that is made of."""
    if part:
        yield part
        for name in ("normalizers", "pretokenizers", "processors", "decoders"):
            for inner in part.get(name, ()):
                yield from _components(inner)


def _pieces(tokenizer: Any, tokenizer_json: Json) -> list[str | list[int]]:
    """What each token adds to a text: text, or bytes that are no text by themselves."""
    names = tokenizer.convert_ids_to_tokens(list(range(max(tokenizer.get_vocab().values()) + 1)))
    if any(component["type"] == "ByteLevel" for component in _components(tokenizer_json.get("decoder"))):
        special = {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
        return ["" if id in special else _text_or_bytes(_byte_level(name)) for id, name in enumerate(names)]
    detokenizer = SentencePieceDetokenizer(tokenizer, continues=True)
    pieces: list[str | list[int]] = []
    for id, name in enumerate(names):
        byte = re.fullmatch("<0x([0-9A-F]{2})>", name or "")
        detokenizer.reset()
        if not byte:
            detokenizer.add_token(id)
        pieces.append(_text_or_bytes(bytes([int(byte[1], 16)])) if byte else detokenizer.text)
    return pieces


def _byte_level(name: str | None) -> bytes:
    """Byte-level tokenizers write each byte as a character: printable Latin-1 as itself, the others from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    byte_of = {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
    characters = name or ""
    # Added tokens are written as they are.
    return bytes(map(byte_of.get, characters)) if byte_of.keys() >= set(characters) else characters.encode()


def _text_or_bytes(data: bytes) -> str | list[int]:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return list(data)


# ------------------------------------------------------------------------------------------------- other files


def special_ids(tokenizer: Any) -> Json:
    """The ids that begin and end a text, as an mlx-lm TokenizerWrapper has them."""
    eos = sorted(id for id in tokenizer.eos_token_ids if id is not None)
    return {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": eos}


def _generation_config(model: Path, tokenizer: Any) -> Json:
    file = model / "generation_config.json"
    own = read_json(file) if file.is_file() else _SAMPLING
    return own | {name: ids for name, ids in special_ids(tokenizer).items() if ids not in (None, [])}


def _expected(model: Model, tokenizer: Any) -> Json:
    """What MLX gives in float32; of no prompt in which the tokenizer knows nothing."""
    prompts = {prompt: encode(tokenizer, prompt, continues=False) for prompt in _PROMPTS}
    return {
        "made_by": f"mlx-ttt {__version__}, MLX, float32",
        "prompts": [_continuation(model, tokenizer, prompt, ids) for prompt, ids in prompts.items() if ids],
        "tokenization": [{"text": text, "ids": encode(tokenizer, text, continues=False)} for text in _TEXTS],
    }


def _continuation(model: Model, tokenizer: Any, prompt: str, ids: list[int]) -> Json:
    logits = model(mx.array([ids]))[0, -1]  # [V]
    best = mx.argsort(-logits)[:5].tolist()
    greedy = list(stream_generate(model, tokenizer, ids, max_tokens=_NEW_TOKENS))
    return {
        "prompt": prompt,
        "prompt_ids": ids,
        "top_logits": [{"id": id, "logit": round(logits[id].item(), 5)} for id in best],
        "greedy_ids": [response.token for response in greedy],
        "greedy_text": "".join(response.text for response in greedy),
    }


def _write_readme(
    out: Path, packages: Sequence[str], args: ModelArgs, layout: Json, stateful: bool, tokenizer_json: Json
) -> None:
    pair = len(packages) == 2
    variables = ("decode", "prefill") if pair else ("model",)
    urls = [
        f'let {variable} = Bundle.main.url(forResource: "{name}", withExtension: "mlmodelc")'
        for variable, name in zip(variables, packages, strict=True)
    ]
    rows = [f"| `{name}` | {_size(out / name)} | {what} |" for name, what in _FILES.items()]
    unigram = tokenizer_json["model"]["type"] == "Unigram"
    text = Template((_ROOM / "companions.md").read_text(encoding="utf-8")).substitute(
        name=packages[0].removesuffix("-decode") if pair else packages[0],
        form=("two " if pair else "a ") + "stateful " * stateful + "Core ML package" + "s" * pair,
        packages=" and ".join(f"`{name}.mlpackage`" for name in packages),
        compiled=" and ".join(f"`{name}.mlmodelc`" for name in packages),
        urls=",\n            ".join(urls),
        load="decode, prefill: prefill" if pair else "model",
        kind=args.kind,
        layers=args.num_hidden_layers,
        hidden_size=f"{args.hidden_size:,}",
        vocab_size=f"{args.vocab_size:,}",
        state_size=_human(2 * math.prod(layout["shape"])),
        files="\n".join(["| file | size | what it is |", "|---|---|---|", *rows]),
        tokenizer_note=" This tokenizer is a Unigram model, which it\n  implements only in part." if unigram else "",
    )
    (out / "README.md").write_text(text, encoding="utf-8")


def _size(path: Path) -> str:
    files = path.rglob("*") if path.is_dir() else [path]
    return _human(sum(file.stat().st_size for file in files if file.is_file()))


def _human(nbytes: int) -> str:
    return f"{nbytes / 1e6:.1f} MB" if nbytes >= 1e6 else f"{nbytes / 1e3:.1f} kB"
