"""How a backend takes over a part of the network: what it may replace, and how it is asked whether it can.

The network is plain MLX. Functions of it that are worth computing in another way on some device are marked
`replaceable`: the update rule, a call of the whole network, and single operations. A backend registers its own
versions of them:

    @update.register
    def update_in_metal(tokens, learner, state):
        if not supported(tokens, learner):
            return NotImplemented
        ...

Such a version takes the same arguments and returns the same values, or `NotImplemented` where it cannot. Then the next
one is asked, and in the end MLX operations compute it. The network does not know which backends there are.
"""

from __future__ import annotations

import contextlib
import functools
import operator
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, Generic, ParamSpec, TypeVar

import mlx.core as mx
import mlx.nn as nn

P = ParamSpec("P")
R = TypeVar("R")


class Replaceable(Generic[P, R]):
    """A function of the network, and what backends have registered in its place.

    Attributes:
        in_mlx: the function itself, in MLX operations. Every version must agree with it.
    """

    def __init__(self, function: Callable[P, R]):
        functools.update_wrapper(self, function)
        self.in_mlx = function
        self._versions: list[Callable[P, R]] = []

    def register(self, version: Callable[P, R]) -> Callable[P, R]:
        """Ask this version from now on, after those that are registered already."""
        self._versions.append(version)
        return version

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        for version in self._versions:
            if (result := version(*args, **kwargs)) is not NotImplemented:
                return result
        return self.in_mlx(*args, **kwargs)


def replaceable(function: Callable[P, R]) -> Replaceable[P, R]:
    """Mark a function of the network as one that backends may compute in their own way."""
    return Replaceable(function)


_differentiated_once = ContextVar("_differentiated_once", default=False)


@contextlib.contextmanager
def differentiated_once() -> Iterator[None]:
    """Gradients taken in this block are not differentiated again: no backend keeps what that would need."""
    token = _differentiated_once.set(True)
    try:
        yield
    finally:
        _differentiated_once.reset(token)


def is_differentiated_once() -> bool:
    return _differentiated_once.get()


class Watch:
    """Tells whether a model is still what it was, for a backend that keeps something it has made of the model.

    It notices modules, parameters and settings that were replaced, added or removed, modules of another class, and a
    `__call__` that was patched. It does not notice an array that was changed in place: that stays the same object.

    Args:
        arrays: whether the parameters themselves matter, or only their names.
    """

    def __init__(self, model: nn.Module, arrays: bool = True):
        self._containers: list = [model]
        for container in self._containers:  # the list grows while it is walked
            if isinstance(container, nn.Module):
                self._containers.append(vars(container))  # its settings
            self._containers += [x for _, x in _items(container) if isinstance(x, dict | list | tuple)]
        places = [(c, key, part) for c in self._containers for key, part in _items(c)]
        self._names: list[tuple] = []
        if not arrays:
            self._names = [(c, key) for c, key, part in places if isinstance(part, mx.array) and isinstance(c, dict)]
            places = [place for place in places if not isinstance(place[2], mx.array)]
        self._places, self._keys, self._parts = map(list, zip(*places, strict=True))
        self._kinds = list(map(type, self._containers))
        self._sizes = list(map(len, self._containers))
        self._classes = list({kind for kind in self._kinds if issubclass(kind, nn.Module)})
        self._calls = [kind.__call__ for kind in self._classes]

    def same(self) -> bool:
        """Whether nothing has changed. Takes some 0.1 microseconds for each parameter, module and setting."""
        try:
            return (
                list(map(len, self._containers)) == self._sizes
                and list(map(type, self._containers)) == self._kinds
                and all(map(operator.is_, map(operator.getitem, self._places, self._keys), self._parts))
                and all(key in container for container, key in self._names)
                and [kind.__call__ for kind in self._classes] == self._calls
            )
        except LookupError:  # a key is gone
            return False


class Kept:
    """What a backend keeps of a model, as an attribute of the model. A copy of the model makes its own.

    A subclass names its attributes, with the values that they have at first.
    """

    @classmethod
    def of(cls, model: nn.Module) -> Any:
        """What is kept of this model; a new one if there is none yet."""
        return vars(model).setdefault(f"_{cls.__module__}", cls())

    def forget(self) -> None:
        """Give all attributes their first values."""
        vars(self).clear()

    def __reduce__(self) -> tuple:
        return type(self), ()


def _items(container: dict | list | tuple) -> list[tuple]:
    return list(container.items() if isinstance(container, dict) else enumerate(container))
