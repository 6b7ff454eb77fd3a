"""A tiny training in a folder, with all that a large one has."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest

from mlx_ttt.training import presets
from mlx_ttt.training.run import Options, begin

WORDS = "the of and to in that was his he it with is for as had you not be her on at by which have or from"


@pytest.fixture(scope="session")
def texts(tmp_path_factory) -> Path:
    """A folder with a few texts of different lengths."""
    folder, rng = tmp_path_factory.mktemp("texts"), random.Random(0)
    for i, words in enumerate([400, 90, 1200, 300, 700]):
        (folder / f"{i}.txt").write_text(" ".join(rng.choices(WORDS.split(), k=words)) + "\n")
    return folder


@pytest.fixture
def tiny(monkeypatch):
    """Makes the smallest preset a very small one."""
    small = presets.Preset(2, 32, 2, 48, replace(presets.PRESETS["tiny"].defaults, steps=8))
    monkeypatch.setitem(presets.PRESETS, "tiny", small)


@pytest.fixture
def options(texts) -> Options:
    """Of a training that takes a few seconds."""
    return Options(
        source=None,
        preset="tiny",
        layer="linear",
        tokenizer=None,
        vocab_size=300,
        data=[str(texts)],
        held_out=[],
        all_tokens=False,
        length=24,
        batch_size=3,
        micro_batch=2,
        segment=16,
        carry=True,
        steps=8,
        lr=3e-3,
        end_lr=1e-5,
        warmup=3,
        decay="cosine",
        optimizer="adamw",
        weight_decay=0.1,
        clip=1.0,
        dtype="float32",
        seed=1,
        evaluate_every=4,
        save_every=1,
    )


@pytest.fixture
def started(tiny, options, tmp_path) -> Path:
    """The folder of a training that has just begun."""
    begin(tmp_path / "started", options)
    return tmp_path / "started"
