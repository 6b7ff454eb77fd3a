"""What an app developer needs beside a package: tokenizer, configuration, expected outputs, Swift code, a README."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from string import Template
from typing import Any

import mlx.core as mx
import numpy as np

from ...checkpoint.tokenizer import write_json
from ...checkpoint.untrusted import read_json
from ...loading import load_model
from ...network.args import ModelArgs
from ...network.model import Model
from ...text.generation import stream_generate
from ...text.state import fingerprint
from ...text.tokenizer import encode, load_tokenizer
from ...version import __version__
from .tokenizer import Json, write_tokenizer

SOURCE_FORMAT = 1  # of source.safetensors
_ROOM = Path(__file__).parent

_FILES = {
    "tokenizer.json": "the tokenizer",
    "tokenizer_config.json": "its settings",
    "source.safetensors": "the model's fingerprint and its inner models before the first token, for saved states",
    "config.json": "the model's configuration",
    "generation_config.json": "how to sample",
    "expected.json": "token ids, logits and greedy continuations to check an app against",
    "TTTKit": "the Swift package for the app",
}

# The second prompt is longer than a mini-batch, and holds characters that many vocabularies only have as bytes.
_PROMPTS = ("ROMEO:\n", "Once upon a time there was a naïve café owner 🙂 who")
_NEW_TOKENS = 24
_TEXTS = (
    *("a", " leading", "two  spaces ", "line\n\nbreak\r\n", "tab\tand nbsp\u00a0", "0123 4.5", "don't; she's"),
    *("naïve café", "e\u0301", "Ελλάδα", "日本語", "한국어", "עברית", "🙂👩\u200d👧"),
    *("<s> </s> <unk>", "<0x41>"),
)

_SAMPLING = {"do_sample": True, "temperature": 0.8, "top_p": 0.95, "max_new_tokens": 256}


def write_companions(
    out: Path, model: Path, packages: Sequence[str], args: ModelArgs, layout: Json, stateful: bool = True
) -> None:
    """Write the companions of a package, or of the two of a separate pair.

    Args:
        out: an existing folder.
        model: the model directory that the package was made from.
        packages: the packages' names without .mlpackage; of a pair, decode first.
        args: the model's configuration.
        layout: of the state, as the package's metadata has it; only its `shape` is used.
        stateful: whether Core ML keeps the state.

    Raises:
        CheckpointError: `model` is no model directory.
        TokenizerError: it has no tokenizer, or one that the Swift package does not know.
    """
    network, config = load_model(model)
    network.set_dtype(mx.float32)
    tokenizer = load_tokenizer(model, config)

    write_tokenizer(out, model)
    write_source(out / "source.safetensors", network, tokenizer)
    own_config = read_json(model / "config.json")
    mlx_only = ("quantization", "quantization_config", "model_file")
    write_json(out / "config.json", {k: v for k, v in own_config.items() if k not in mlx_only})
    write_json(out / "generation_config.json", _generation_config(model, tokenizer))
    write_json(out / "expected.json", _expected(network, tokenizer))
    write_swift_package(out / "TTTKit")
    _write_readme(out, packages, args, layout, stateful)


def swift_package() -> Path:
    """The folder of Package.swift and swift/: the checkout's top, or inside the package in a wheel."""
    package = Path(__file__).resolve().parents[2]
    for folder in (package / "swift_package", package.parent):
        if (folder / "Package.swift").is_file():
            return folder
    raise FileNotFoundError(f"the Swift files are missing from {package}: reinstall mlx-ttt")


def write_swift_package(out: Path) -> None:
    """Copy the Swift package without its tests to the new folder `out`."""
    source = swift_package()
    for folder in ("Sources", "StandIns"):
        shutil.copytree(source / "swift" / folder, out / "swift" / folder, copy_function=shutil.copyfile)
    shutil.copyfile(source / "Package.swift", out / "Package.swift")


def special_ids(tokenizer: Any) -> Json:
    """The ids of the tokens that begin and end a text; `tokenizer` is an mlx-lm TokenizerWrapper."""
    eos = sorted(id for id in tokenizer.eos_token_ids if id is not None)
    return {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": eos}


def write_source(file: Path, model: Model, tokenizer: Any) -> None:
    """What turns the package's states into those that `mlx_ttt.save_state` writes, and back."""
    weights = {
        f"{i}.{name}": layer.seq_modeling_block[name][None].astype(mx.float32)
        for i, layer in enumerate(model.layers)
        for name in model.args.inner_model.weight_names
    }
    metadata = {"format": str(SOURCE_FORMAT), "fingerprint": fingerprint(model, tokenizer), "model": fingerprint(model)}
    mx.save_safetensors(str(file), weights, metadata)


def _generation_config(model: Path, tokenizer: Any) -> Json:
    file = model / "generation_config.json"
    own = read_json(file) if file.is_file() else _SAMPLING
    return own | {name: ids for name, ids in special_ids(tokenizer).items() if ids not in (None, [])}


def _expected(model: Model, tokenizer: Any) -> Json:
    """What MLX gives in float32. A prompt that the tokenizer makes no ids of is left out."""
    prompts = {prompt: encode(tokenizer, prompt, continues=False) for prompt in _PROMPTS}
    return {
        "made_by": f"mlx-ttt {__version__}, MLX, float32",
        "prompts": [_continuation(model, tokenizer, prompt, ids) for prompt, ids in prompts.items() if ids],
        "tokenization": [{"text": text, "ids": encode(tokenizer, text, continues=False)} for text in _TEXTS],
    }


def _continuation(model: Model, tokenizer: Any, prompt: str, ids: list[int]) -> Json:
    logits = np.array(model(mx.array([ids]))[0, -1])  # [V]
    best = np.argsort(-logits, kind="stable")[:5].tolist()
    greedy = list(stream_generate(model, tokenizer, ids, max_tokens=_NEW_TOKENS))
    return {
        "prompt": prompt,
        "prompt_ids": ids,
        "top_logits": [{"id": id, "logit": round(float(logits[id]), 5)} for id in best],
        "greedy_ids": [response.token for response in greedy],
        "greedy_text": "".join(response.text for response in greedy),
    }


def _write_readme(out: Path, packages: Sequence[str], args: ModelArgs, layout: Json, stateful: bool) -> None:
    pair = len(packages) == 2
    variables = ("decode", "prefill") if pair else ("model",)
    urls = [
        f'let {variable} = Bundle.main.url(forResource: "{name}", withExtension: "mlmodelc")'
        for variable, name in zip(variables, packages, strict=True)
    ]
    rows = [f"| `{name}` | {_size(out / name)} | {what} |" for name, what in _FILES.items()]
    text = Template((_ROOM / "companions.md").read_text(encoding="utf-8")).substitute(
        name=packages[0].removesuffix("-decode") if pair else packages[0],
        form=("two " if pair else "a ") + "stateful " * stateful + "Core ML package" + "s" * pair,
        packages=" and ".join(f"`{name}.mlpackage`" for name in packages),
        compiled=" and ".join(f"`{name}.mlmodelc`" for name in packages),
        urls=",\n            ".join(urls),
        load="decode, source: source, prefill: prefill" if pair else "model, source: source",
        kind=args.kind,
        layers=args.num_hidden_layers,
        hidden_size=f"{args.hidden_size:,}",
        vocab_size=f"{args.vocab_size:,}",
        state_size=_human(2 * math.prod(layout["shape"])),
        files="\n".join(["| file | size | what it is |", "|---|---|---|", *rows]),
    )
    (out / "README.md").write_text(text, encoding="utf-8")


def _size(path: Path) -> str:
    return _human(sum(file.stat().st_size for file in (path, *path.rglob("*")) if file.is_file()))


def _human(nbytes: int) -> str:
    return f"{nbytes / 1e6:.1f} MB" if nbytes >= 1e6 else f"{nbytes / 1e3:.1f} kB"
