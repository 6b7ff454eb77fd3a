"""One byte a value, so that a page can hold a book."""

from __future__ import annotations

import numpy as np

MU = 1000.0  # how much finer the steps near zero are than those near the largest value
LARGEST = 254
NOTHING = 255  # the code of NaN: there is no value


def encode(values: np.ndarray) -> tuple[np.ndarray, float]:
    """Values >= 0 as bytes, and the largest of them, which is needed to decode.

    The code is the mu-law of telephony (ITU-T G.711) with another mu:

        code = 254 log(1 + mu v / high) / log(1 + mu)

    So an error is at most 1.4 % of a value that is not far below the largest, whatever its size, and is never more than
    that of the value plus 1.4e-5 of the largest.

    Args:
        values: any shape; NaN where there is none. Infinity counts as the largest finite one.
    """
    values = np.asarray(values, np.float32)
    finite = values[np.isfinite(values)]
    high = float(finite.max(initial=0)) or 1.0
    known = np.clip(np.nan_to_num(values, nan=0, posinf=high), 0, high)
    codes = np.rint(LARGEST * np.log1p(known * (MU / high)) / np.log1p(MU)).astype(np.uint8)
    codes[np.isnan(values)] = NOTHING
    return codes, high


def decode(codes: np.ndarray, high: float) -> np.ndarray:
    """The values that `encode` made bytes of, float32."""
    table = high * np.expm1(np.arange(256) * (np.log1p(MU) / LARGEST)) / MU
    table[NOTHING] = np.nan
    return table.astype(np.float32)[codes]
