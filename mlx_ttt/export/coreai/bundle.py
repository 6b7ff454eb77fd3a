"""A model directory -> a bundle for Core AI: a folder with the program, the tokenizer and what both are."""

from __future__ import annotations

import hashlib
import itertools
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
from coreai.authoring import AIProgram

from ...checkpoint.folder import complete_folder
from ...checkpoint.tokenizer import write_json
from ...checkpoint.untrusted import read_json
from ...errors import CheckpointError, OutputError, TTTError
from ...loading import load_model
from ...network.model import Model
from ...text.tokenizer import load_tokenizer
from ...version import __version__
from .. import metadata
from ..companions.folder import special_ids, write_source
from ..companions.tokenizer import write_tokenizer
from ..errors import first_line
from ..functions import Options
from ..layout import StateLayout
from ..numbers import COMPUTE
from .formats import table_format
from .kernels import FORMS, check
from .program import ALL, build, build_with_kernels, save
from .runner_main import MAIN
from .state import groups

VERSION = "0.2"  # of Apple's metadata.json
_CONTEXT = 1 << 20  # tokens; Apple's runner wants a number, the model has no limit
_BESIDE_WEIGHTS = 64 << 20  # bytes to spare for graphs, constants and the tokenizer
_BITS = {"float32": 32, "float16": 16, "int8": 9, "int4": 5, "lut4": 5}


@dataclass(frozen=True)
class Report:
    """What `export` wrote.

    Attributes:
        out: the bundle.
        nbytes: its size.
        state_nbytes: the size of the state.
    """

    out: Path
    nbytes: int
    state_nbytes: int


def export(
    model_dir: Path | str,
    out: Path | str,
    *,
    weights: str = "float16",
    options: Options | None = None,
    kernels: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Report:
    """Write the bundle `out` from a model directory; it appears only when it is complete.

    Args:
        model_dir: what `convert.py mlx` writes; quantized weights are widened first.
        out: a folder that does not exist yet.
        weights: one of formats.WEIGHTS, for the matrices of the blocks and an untied lm_head; the embedding is float32
            if the weights are, else float16; all else is in the number type that it is computed in.
        options: of the functions. States have the number type of the inner model.
        kernels: whether a second program with our Metal kernels lies beside the first, which does without any.
        progress: called with the steps done so far and in all.

    Raises:
        CheckpointError: `model_dir` is no TTT model, or a weight is not finite or does not fit float16.
        TokenizerError: there is no tokenizer, or one that swift-transformers does not know.
        OutputError: `out` exists or cannot be written to.
        TTTError: the options do not go together, or there are no kernels for the model's sizes.
    """
    model_dir, out, options = Path(model_dir), Path(out).resolve(), options or Options()
    if weights == "float32" != options.compute:
        raise TTTError(
            f"--weights float32: would be rounded in every call; with --compute {options.compute} store float16"
        )
    if out.exists() or out.is_symlink():
        raise OutputError(f"{out}: exists already; remove it or choose another name")
    model, config = load_model(model_dir)
    if kernels:
        check(model.args)
    tokenizer = load_tokenizer(model_dir, config)
    ids = special_ids(tokenizer)
    name = metadata.model_name(model_dir, config)
    total, count = (4 + len(FORMS) * kernels) * len(model.layers) + 1, itertools.count(1)

    def step() -> None:
        progress(next(count), total)

    def write(make: Callable[[], AIProgram], asset: Path) -> None:
        """One program at a time is held."""
        try:
            program = make()
        except CheckpointError as error:
            raise CheckpointError(f"{model_dir}: {error}") from None
        _save(lambda: save(program, asset), out)

    with complete_folder(out, _expected_bytes(model, weights) * (1 + kernels)) as folder:
        (folder / "tokenizer").mkdir()
        write_tokenizer(folder / "tokenizer", model_dir)
        write(lambda: build(model, weights, options, ALL, step), folder / f"{name}.aimodel")
        how: dict[str, Any] = {"weights": weights}
        if kernels:
            how["kernels"] = {"asset": f"{name}-kernels.aimodel", "functions": list(FORMS), "unit": "gpu"}
            write(lambda: build_with_kernels(model, weights, options, step), folder / how["kernels"]["asset"])
        write_json(folder / "metadata.json", bundle_metadata(name, model, options, ids, how))
        write_source(folder / "source.safetensors", model, tokenizer)
        _write_readme(folder, name, model, kernels)
        step()
        nbytes = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    return Report(out, nbytes, _state_nbytes(model, options.compute))


def bundle_metadata(
    name: str, model: Model, options: Options, ids: Mapping[str, Any], how: Mapping[str, Any]
) -> dict[str, Any]:
    """The content of metadata.json: what Apple's runner reads, and in `user_data` what we do.

    Args:
        name: of the model.
        model: for its sizes.
        options: of the functions.
        ids: of the tokens that begin and end a text.
        how: `weights`, and `kernels` if there is a second program.
    """
    layout = StateLayout.of(model.args)
    dtype = np.dtype(COMPUTE[options.compute][1]).name
    state = layout.description() | {"dtype": dtype, "groups": groups(layout)}
    return {
        "metadata_version": VERSION,
        "kind": "llm",
        "name": name,
        "assets": {"main": f"{name}.aimodel"},
        "language": {
            "tokenizer": name,
            "vocab_size": model.args.vocab_size,
            "max_context_length": _CONTEXT,
            "embedded_tokenizer": True,
            "function_map": {"main": [MAIN]},
            "states": dict.fromkeys(groups(layout), "fixed"),
        },
        "source": {"model_definition": f"mlx-ttt {__version__}"},
        "compression": None if how["weights"] == "float32" else how["weights"],
        "user_data": metadata.facts(model, options, ids, {**how, "state": state}),
    }


def _write_readme(folder: Path, name: str, model: Model, kernels: bool) -> None:
    template = (Path(__file__).parent / "bundle.md").read_text(encoding="utf-8")
    if kernels:
        template += (Path(__file__).parent / "kernels.md").read_text(encoding="utf-8")
    text = Template(template).substitute(
        name=name, kind=model.args.kind, sizes=model.args.sizes, K=model.args.mini_batch_size
    )
    (folder / "README.md").write_text(text, encoding="utf-8")


def _save(write: Callable[[], None], out: Path) -> None:
    """Call a function of coreai that writes, whose failures are RuntimeErrors whatever their cause."""
    try:
        write()
    except RuntimeError as error:
        if isinstance(error.__cause__, OSError):
            raise error.__cause__ from None
        free = shutil.disk_usage(out.parent).free
        cause = error.__cause__
        why = first_line(cause if isinstance(cause, Exception) else error)
        raise OutputError(f"{out}: cannot be written, {free / 1e9:.2f} GB are free: {why}") from None


def _expected_bytes(model: Model, weights: str) -> int:
    """About what the disk must hold."""
    args = model.args
    C = args.hidden_size
    blocks = (5 * C * C + 3 * C * args.intermediate_size) * args.num_hidden_layers * _BITS[weights]
    head = 0 if args.tie_word_embeddings else args.vocab_size * C * _BITS[weights]
    return (blocks + head + args.vocab_size * C * _BITS[table_format(weights)]) // 8 + _BESIDE_WEIGHTS


def _state_nbytes(model: Model, compute: str) -> int:
    layout, each = StateLayout.of(model.args), 2 if compute == "float16" else 4
    layers, H, rows, _ = layout.shape
    return each * layers * H * rows * model.args.head_dim


@dataclass(frozen=True)
class Bundle:
    """A bundle that was read from the disk.

    Attributes:
        path: its folder.
        asset: the program.
        facts: what it says of itself; see export/metadata.py.
    """

    path: Path
    asset: Path
    facts: Mapping[str, Any]


def read_bundle(path: Path) -> Bundle:
    """Read a bundle's metadata, and check that its programs are whole.

    Args:
        path: the bundle, or the .aimodel in it.

    Raises:
        CheckpointError: there is none, or it is damaged or not one of ours.
    """
    path = path.parent if path.suffix == ".aimodel" and (path / "main.mlirb").exists() else path
    if not (path / "metadata.json").is_file():
        raise CheckpointError(f"{path}: no such bundle; `convert.py coreai` makes one")
    content = read_json(path / "metadata.json")
    try:
        asset = path / Path(content["assets"]["main"]).name
        facts = metadata.read_facts(content["user_data"], path)
        assets = [asset, *([path / Path(facts["kernels"]["asset"]).name] if "kernels" in facts else [])]
    except (KeyError, TypeError, ValueError):
        raise CheckpointError(f"{path}: not a bundle that this version of `convert.py coreai` makes") from None
    for each in assets:
        _check_whole(each)
    return Bundle(path, asset, facts)


def _check_whole(asset: Path) -> None:
    """Raise a CheckpointError if a program is not what its hash says."""
    try:
        digest = hashlib.sha256()
        with (asset / "main.mlirb").open("rb") as stream:
            while chunk := stream.read(1 << 20):
                digest.update(chunk)
        whole = digest.digest() == (asset / "main.hash").read_bytes()
    except OSError as error:
        raise CheckpointError(f"{asset}: cannot be read: {error.strerror}") from None
    if not whole:
        raise CheckpointError(f"{asset}: damaged: main.mlirb is not what main.hash says; export it again")
