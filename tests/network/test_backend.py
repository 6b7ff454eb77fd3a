"""What backends may replace, and how they notice that a model has changed."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import pytest

from mlx_ttt.network.backend import Watch, replaceable

# ---- Replaceable -----------------------------------------------------------------------------------------------------


@pytest.fixture
def add():
    """A function of the network, and what was asked in which order."""

    @replaceable
    def add(a: int, b: int = 1) -> int:
        """The sum."""
        return a + b

    return add


def test_without_a_version_it_is_the_function_itself(add):
    assert (add(2, 3), add(2), add(a=2, b=5)) == (5, 3, 7)
    assert (add.__name__, add.__doc__) == ("add", "The sum.")


def test_versions_are_asked_in_the_order_in_which_they_were_registered(add):
    asked = []

    @add.register
    def small(a, b=1):
        asked.append("small")
        return NotImplemented if a > 9 else 100

    @add.register
    def medium(a, b=1):
        asked.append("medium")
        return NotImplemented if a > 99 else 200

    assert (add(5), asked) == (100, ["small"])
    del asked[:]
    assert (add(50, b=7), asked) == (200, ["small", "medium"])
    del asked[:]
    assert (add(500, b=7), asked) == (507, ["small", "medium"])
    assert add.in_mlx(5) == 6  # which asks nobody
    assert small(5) == 100  # registering leaves the function as it is


def test_none_is_a_result(add):
    add.register(lambda a, b=1: None)
    assert add(1) is None


def test_errors_of_a_version_are_the_callers(add):
    @add.register
    def fails(a, b=1):
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        add(1)


# ---- Watch -----------------------------------------------------------------------------------------------------------


class Part(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.eps = 1e-5

    def __call__(self, x):
        return self.linear(x)


class Whole(nn.Module):
    def __init__(self):
        super().__init__()
        self.parts = [Part(), Part()]
        self.pair = (nn.Linear(4, 4), nn.Linear(4, 4))
        self.named = {"first": nn.Linear(4, 4)}
        self.scale = mx.ones(4)


class OtherPart(Part):
    def __call__(self, x):
        return 2 * super().__call__(x)


def replace_parameter(model):
    model.parts[1].linear.weight = mx.zeros((4, 4))


def replace_parameter_at_the_top(model):
    model.scale = mx.ones(4)


def replace_parameter_in_a_tuple(model):
    model.pair[1].bias = mx.zeros(4)


def replace_parameter_in_a_dictionary(model):
    model.named["first"].bias = mx.zeros(4)


CHANGED_ARRAYS = [
    replace_parameter,
    replace_parameter_at_the_top,
    replace_parameter_in_a_tuple,
    replace_parameter_in_a_dictionary,
]


def replace_module(model):
    model.parts[1].linear = nn.Linear(4, 4)


def replace_list(model):
    model.parts = list(model.parts)


def add_parameter(model):
    model.parts[0].linear.more = mx.zeros(4)


def take_parameter_away(model):
    del model.parts[0].linear["bias"]


def exchange_parameters(model):
    """As many as before, under another name."""
    del model.parts[0].linear["bias"]
    model.parts[0].linear.offset = mx.zeros(4)


def add_module(model):
    model.parts.append(Part())


def take_module_away(model):
    model.parts.pop()


def change_setting(model):
    model.parts[0].eps = 1e-3


def add_setting(model):
    model.parts[0].name = "first"


def take_setting_away(model):
    del model.parts[0].eps


def change_class(model):
    model.parts[1].__class__ = OtherPart


CHANGES = [
    *(replace_module, replace_list, add_parameter, take_parameter_away, exchange_parameters, add_module),
    *(take_module_away, change_setting, add_setting, take_setting_away, change_class),
]


@pytest.mark.parametrize("change", [*CHANGES, *CHANGED_ARRAYS], ids=lambda f: f.__name__)
def test_a_change_is_noticed(change):
    model = Whole()
    watch = Watch(model)
    assert watch.same() and watch.same()
    change(model)
    assert not watch.same()
    assert Watch(model).same()


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_a_change_is_noticed_where_arrays_do_not_matter(change):
    model = Whole()
    watch = Watch(model, arrays=False)
    change(model)
    assert not watch.same()


@pytest.mark.parametrize("change", CHANGED_ARRAYS, ids=lambda f: f.__name__)
def test_a_replaced_array_does_not_matter_then(change):
    model = Whole()
    watch = Watch(model, arrays=False)
    change(model)
    assert watch.same()


@pytest.mark.parametrize("kind", [Part, nn.Linear])
@pytest.mark.parametrize("arrays", [True, False])
def test_a_patched_call_is_noticed(kind, arrays, monkeypatch):
    watch = Watch(Whole(), arrays)
    with monkeypatch.context() as patch:
        patch.setattr(kind, "__call__", lambda self, x: x)
        assert not watch.same()
    assert watch.same()  # it is as it was


def test_what_is_put_back_is_the_same():
    model = Whole()
    watch, weight = Watch(model), model.scale
    model.scale = mx.zeros(4)
    assert not watch.same()
    model.scale = weight
    assert watch.same()


def test_a_change_in_place_is_not_noticed():
    """The array stays the same object. Whoever keeps addresses must compare them."""
    model = Whole()
    watch = Watch(model)
    model.scale += 1
    model.scale[0] = 5
    mx.eval(model.scale)
    assert watch.same()


def test_only_the_model_that_is_watched_matters():
    model, other = Whole(), Whole()
    watch = Watch(model)
    change_setting(other)
    replace_parameter(other)
    assert watch.same()
