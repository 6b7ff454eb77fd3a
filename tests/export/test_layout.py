"""The state's layout: where everything is, and how large it is."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlx_ttt.export.layout import StateLayout, halves_first
from mlx_ttt.model import Model, ModelArgs

from ..models import build, configuration


@pytest.mark.parametrize(
    ("kind", "nbytes"),
    [("linear", 24 * 32 * (64 + 1 + 16 + 16 + 6) * 64 * 2), ("mlp", 24 * 32 * (256 + 4 + 256 + 1 + 160 + 6) * 64 * 2)],
)
def test_of_the_1b_model(kind, nbytes):
    args = ModelArgs(ttt_layer_type=kind, pre_conv=True, share_qk=True, use_gate=True)
    assert StateLayout.of(args).nbytes == nbytes


@pytest.mark.parametrize(
    ("flags", "kernel", "parts"),
    [
        ("000", 3, ["W1", "b1", "k", "e1"]),
        ("100", 3, ["W1", "b1", "k", "e1", "conv"]),
        ("011", 3, ["W1", "b1", "k", "e1", "conv_qk"]),
        ("111", 1, ["W1", "b1", "k", "e1"]),
    ],
)
def test_parts(flags, kernel, parts):
    args = configuration("linear", flags)
    args.conv_kernel = kernel
    layout = StateLayout.of(args)
    assert list(layout.parts) == parts
    rows = layout.description()["parts"]
    assert [rows[name][0] for name in parts] == list(np.cumsum([0, *(rows[name][1] for name in parts[:-1])]))
    assert layout.rows == sum(rows[name][1] for name in parts)


@pytest.mark.parametrize(("head_dim", "width"), [(2, 32), (12, 32), (32, 32), (48, 64), (96, 96)])
def test_rows_are_filled_up(head_dim, width):
    args = configuration("linear", "000")
    args.hidden_size = args.num_attention_heads * head_dim
    assert StateLayout.of(args).shape == (2, 2, head_dim + 1 + 6 + 6, width)


def test_halves_first():
    assert halves_first(8).tolist() == [0, 2, 4, 6, 1, 3, 5, 7]


def test_pack_puts_every_number_somewhere():
    """Each part holds the numbers of its array, whatever their order, and nothing before the first token."""
    model = build("mlp", "111")
    layout, start = StateLayout.of(model.args), model.make_cache()
    assert not layout.pack(start, start).any()
    cache = model.make_cache()
    model(mx.arange(1, 17)[None], cache=cache)
    packed = layout.pack(cache, start)
    for layer, (now, then) in enumerate(zip(cache, start, strict=True)):
        arrays = [(a - b)[0] for a, b in zip(now.weights, then.weights, strict=True)]
        arrays += [*mx.split(now.rows[0], [12, 60, 108], axis=-1), now.history["conv"], now.history["conv_qk"]]
        for (name, rows), array in zip(layout.parts.items(), arrays, strict=True):
            first = layout.first_row(name)
            found = packed[layer, :, first : first + rows]
            assert not found[..., 12:].any()
            assert np.array_equal(np.sort(found[..., :12].ravel()), np.sort(np.array(array).ravel())), name


def test_the_state_of_a_model_without_convolutions():
    model = Model(configuration("linear", "000"))
    cache = model.make_cache()
    model(mx.arange(1, 5)[None], cache=cache)
    packed = StateLayout.of(model.args).pack(cache, model.make_cache())
    assert not packed[:, :, :13].any()  # nothing committed yet
    assert packed[:, :, 13:17, :12].all()  # four keys
    assert not packed[:, :, 17:19].any()
