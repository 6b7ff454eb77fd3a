"""What an exported package says of itself, so that an app needs to know no number of the model in advance."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import CheckpointError
from ..files import check_format
from ..network.model import Model
from ..text.state import fingerprint
from .functions import SIGNALS, Options
from .layout import StateLayout

FORMAT = 1
PREFIX = "com.mlx-ttt."
NAME = "co.huggingface.exporters.name"
TEXTS = ("format", "model", "state_mode", "weights", "compute")  # their values are text; those of the others are JSON


def facts(model: Model, options: Options, ids: Mapping[str, Any], how: Mapping[str, Any]) -> dict[str, str]:
    """The metadata of a package, as text by key.

    Args:
        model: the model, for its sizes and its fingerprint.
        options: of the functions.
        ids: of the tokens that begin and end a text.
        how: it was lowered and stored: what only this kind of package has.
    """
    args = model.args
    entries = {
        "format": str(FORMAT),
        "model": fingerprint(model),
        "mini_batch_size": args.mini_batch_size,
        "prefill_tokens": options.prefill_tokens or args.mini_batch_size,
        "vocab_size": args.vocab_size,
        **ids,
        "state": StateLayout.of(args).description(),
        "compute": options.compute,
        **({"learning": StateLayout.of(args).shape[:2]} if options.learning else {}),
        **({"signals": list(SIGNALS)} if options.signals else {}),
        **how,
    }
    return {PREFIX + key: value if key in TEXTS else json.dumps(value) for key, value in entries.items()}


def read_facts(given: Mapping[str, str], package: Path) -> dict[str, Any]:
    """What `facts` wrote into a package, by key without the prefix.

    Raises:
        CheckpointError: its format is newer.
        ValueError: this is not ours.
    """
    if PREFIX + "format" not in given:
        raise ValueError("not ours")
    check_format(package, given[PREFIX + "format"], FORMAT, CheckpointError)
    found = {key.removeprefix(PREFIX): value for key, value in given.items() if key.startswith(PREFIX)}
    return {key: value if key in TEXTS else json.loads(value) for key, value in found.items()}


def learning_of(facts: Mapping[str, Any]) -> np.ndarray | None:
    """A learning scale that changes nothing, [layers, H]; None if the functions take none."""
    return np.ones(facts["learning"], np.float32) if "learning" in facts else None


def model_name(model_dir: Path, config: Mapping[str, Any]) -> str:
    """The model's name without the folders in which it lay."""
    return Path(str(config.get("_name_or_path") or "")).name or model_dir.resolve().name


def own_ids(model_dir: Path, config: Mapping[str, Any]) -> dict[str, int | list[int] | None]:
    """The ids of the tokens that begin and end a text, as the configuration has them.

    Raises:
        CheckpointError: they are no token ids.
    """
    eos = config.get("eos_token_id")
    eos = eos if isinstance(eos, list) else [] if eos is None else [eos]
    if not all(type(id) is int for id in eos):
        raise CheckpointError(f"{model_dir}: eos_token_id must be a token id or a list of them")
    return {"bos_token_id": config.get("bos_token_id"), "eos_token_id": eos}
