"""The two forms of a bundle's state."""

from __future__ import annotations

import numpy as np
import pytest

from mlx_ttt.export.coreai.state import apart, apart_shapes, grouped_shapes, groups, packed, together, unpacked
from mlx_ttt.export.layout import StateLayout

from ...models import FLAGS, configuration


@pytest.mark.parametrize("flags", FLAGS)
@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_forms(kind, flags):
    layout = StateLayout.of(configuration(kind, flags))
    rng = np.random.default_rng(0)
    state = rng.standard_normal(layout.shape).astype(np.float32)
    state[..., layout.args.head_dim :] = 0
    parts = unpacked(layout, state)
    assert {name: x.shape for name, x in parts.items()} == apart_shapes(layout)
    assert np.array_equal(packed(layout, parts), state)
    grouped = together(layout, parts)
    assert {name: x.shape for name, x in grouped.items()} == grouped_shapes(layout)
    assert all(np.array_equal(x, parts[name]) for name, x in apart(layout, grouped).items())
    assert sorted(part for names in groups(layout).values() for part in names) == sorted(layout.parts)


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_three_groups_whatever_the_flags(kind):
    """With two, Apple's runner takes them for the keys and values of attention; names with "cache" or "kv", too."""
    for flags in FLAGS:
        names = groups(StateLayout.of(configuration(kind, flags)))
        assert len(names) == 3
        assert all(names.values())
        assert not [name for name in names if "cache" in name.lower() or "kv" in name.lower()]
