"""One byte a value: what an error may be."""

from __future__ import annotations

import numpy as np
import pytest

from mlx_ttt.watch.codes import NOTHING, decode, encode


@pytest.mark.parametrize("high", [1e-6, 1.0, 17.3, 1e9])
def test_values_come_back_within_what_is_promised(high):
    values = np.concatenate([[0, high], high * np.random.RandomState(0).random(999) ** 4]).astype(np.float32)
    codes, largest = encode(values)
    assert codes.dtype == np.uint8 and largest == np.float32(high)
    again = decode(codes, largest)
    assert np.all(abs(again - values) <= 0.014 * values + 1.4e-5 * high)
    assert again[0] == 0 and again[1] == pytest.approx(high, rel=1e-6)


def test_what_is_no_value():
    codes, high = encode(np.array([[np.nan, 2.0], [np.inf, 0.0]]))
    assert high == 2 and codes[0, 0] == NOTHING and codes[1, 0] == codes[0, 1]
    assert np.isnan(decode(codes, high)[0, 0])


@pytest.mark.parametrize("values", [[], [0.0, 0.0], [np.nan]])
def test_nothing_to_scale_by(values):
    codes, high = encode(np.array(values, np.float32))
    assert high == 1
    np.testing.assert_array_equal(decode(codes, high), np.array(values, np.float32))
