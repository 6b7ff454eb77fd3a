"""Who waits for whom: what a device is given to compute, and when the host waits for it.

A device computes in the order in which it is given things. So whoever waits for an array waits for all that was given
with it and before, and for nothing that came after. An array that the device was never given is given to it now. If the
host waits for the last call of the model that the device was given, nothing is left to do when it goes on: a stall.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_ttt.network.model import Model

_LOOKS = ("item", "tolist", "__float__", "__int__", "__bool__", "__index__", "__array__")


@dataclass
class Device:
    """What it was given, and who waited for it.

    Attributes:
        waits: at each wait that is not over already, how many calls of the model the device was given after what is
            waited for.
    """

    waits: list[int] = field(default_factory=list)
    _calls: int = 0
    _calls_given: int = 0
    _seen: int = 0
    _when: dict[int, tuple[int, int]] = field(default_factory=dict)  # by id: a number that grows, and calls by then
    _arrays: list[mx.array] = field(default_factory=list)  # so that no other array gets the id of one

    @property
    def stalls(self) -> int:
        """How many waits are for the last call that the device has."""
        return self.waits.count(0)

    def call(self) -> None:
        """The model is called: what is given next is of this call."""
        self._calls += 1

    def give(self, *arrays: Any) -> None:
        new = [x for x in _leaves(arrays) if id(x) not in self._when]
        self._arrays += new
        self._when |= {id(x): (len(self._arrays), self._calls) for x in new}
        if new:
            self._calls_given = self._calls

    def wait(self, *arrays: Any) -> None:
        self.give(*arrays)
        number, calls = max((self._when[id(x)] for x in _leaves(arrays)), default=(0, 0))
        if number > self._seen:
            self._seen = number
            self.waits.append(self._calls_given - calls)


def _leaves(arrays: Any) -> list[mx.array]:
    return [x for _, x in tree_flatten(list(arrays)) if isinstance(x, mx.array)]


@contextmanager
def watched_device() -> Iterator[Device]:
    """Count what the host gives and waits for. Memory views of arrays are the only thing that this does not see."""
    device = Device()
    with pytest.MonkeyPatch.context() as patch:

        def before(owner: Any, name: str, note: Any) -> None:
            original = getattr(owner, name)

            def noted(*args: Any, **kwargs: Any) -> Any:
                note(*args)
                return original(*args, **kwargs)

            patch.setattr(owner, name, noted)

        before(Model, "__call__", lambda *_: device.call())
        before(mx, "eval", device.wait)
        before(mx, "async_eval", device.give)
        for name in _LOOKS:
            before(mx.array, name, lambda x, *_: device.wait(x))
        for name in ("array", "asarray", "ascontiguousarray"):
            before(np, name, lambda x, *_: device.wait(x) if isinstance(x, mx.array) else None)
        yield device
