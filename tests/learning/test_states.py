"""States as things to compute with: what each operation leaves, to the number, and that all go on like any state."""

from __future__ import annotations

import numpy as np
import pytest

import mlx_ttt

import mlx.core as mx  # isort: skip

from mlx_ttt.backends.cpu import library
from mlx_ttt.backends.metal import decode_step
from mlx_ttt.errors import StateError
from mlx_ttt.learning import states
from mlx_ttt.network import reference
from mlx_ttt.network.cache import TTTCache
from mlx_ttt.network.rewind import RewindableTTTCache
from mlx_ttt.network.rule import Learner, State, Tokens
from mlx_ttt.text.state import TextState

from ..models import KINDS, VOCABULARY, build, largest_error
from ..network.cases import relative_error

H, D, K = 2, 16, 6
BOUND = 1e-5  # relative L2, of float32 against float64


@pytest.fixture(scope="module", params=KINDS)
def model(request):
    """Of sizes that C takes, with convolutions. No token factor is 1 / (i + 1), and layers differ."""
    model = build(request.param, "111", hidden_size=H * D)
    for i, layer in enumerate(model.layers):
        layer.seq_modeling_block.learnable_token_idx = mx.array([0.1, -0.2, 0.05, 0.3, -0.1, 0.2 + 0.1 * i])
    return model


def read(model, n, seed=0, rewind=False, batch=1):
    cache = model.make_cache(rewind=rewind)
    model(mx.random.randint(0, VOCABULARY, (batch, n), key=mx.random.key(seed)), cache=cache)
    return cache


def factors(model, layer) -> np.ndarray:
    """t [K] in float64."""
    token_idx = np.array(model.layers[layer].seq_modeling_block.learnable_token_idx, np.float64)
    return np.maximum(1 / np.arange(1, K + 1) + token_idx, 0)


def gradient(model, cache, b=0) -> list[np.ndarray]:
    """What a sequence's open rows stand for, in float64: x^T e for a matrix, the sum of e for its bias."""
    rows, found = np.array(cache.rows, np.float64)[b, :, : cache.phase[b]], []
    for W in cache.weights[::2]:
        n, m = W.shape[-2:]
        x, e, rows = rows[..., :n], rows[..., n : n + m], rows[..., n + m :]
        found += [np.einsum("hji,hjo->hio", x, e), e.sum(1, keepdims=True)]
    return found


def learned(model, cache, layer, slot, b=0) -> list[np.ndarray]:
    """W - t G of a sequence, in float64."""
    t = factors(model, layer)[slot]
    return [np.array(w, np.float64)[b] - t * g for w, g in zip(cache.weights, gradient(model, cache, b), strict=True)]


def norm(arrays) -> np.ndarray:
    """Of each head, all arrays [H, ., .] together."""
    return np.sqrt(sum((a**2).sum((1, 2)) for a in arrays))


def agree(found, expected) -> None:
    for x, y in zip(found, expected, strict=True):
        assert relative_error(mx.array(np.array(x)), mx.array(y.astype(np.float32))) <= BOUND


def arrays(cache) -> list[mx.array]:
    """All arrays of a state."""
    found = []
    for c in cache:
        found += [*c.weights, c.rows, *(c.history[name] for name in sorted(c.history))]
    return found


def same(a, b) -> bool:
    """Bit for bit, positions too."""
    return [c.offset for c in a] == [c.offset for c in b] and all(
        mx.array_equal(x, y).item() for x, y in zip(arrays(a), arrays(b), strict=True)
    )


def copies(cache):
    return [c.copy() for c in cache]


@pytest.fixture
def stop_learning(model, monkeypatch):
    """Makes all inner learning rates 0, on every backend."""

    def stop():
        for layer in model.layers:
            monkeypatch.setattr(layer.seq_modeling_block, "base_lr", 0.0)

    return stop


class TestWeights:
    @pytest.mark.parametrize("n", [6, 7, 11])
    def test_as_the_next_token_sees_them(self, model, n):
        """The definition's output for a token that adds nothing is that of these weights."""
        cache = read(model, n)
        for i, (layer, c) in enumerate(zip(model.layers, cache, strict=True)):
            found = states.weights(model, cache, i)
            agree([w[0] for w in found], learned(model, c, i, n % K))
            tokens = Tokens(*mx.random.normal((3, 1, 1, H, D)), lr=mx.zeros((1, 1, H)))
            learner = layer.seq_modeling_block.learner()
            y, _ = reference.update(tokens, learner, State(c.weights, c.rows, c.phase))
            with mx.stream(mx.cpu):
                q = tokens.q[0, 0][:, None].astype(mx.float64)
                z, _ = reference._inner_model([w[0].astype(mx.float64) for w in found], q)
                expected = q + reference._layer_norm(z, Learner(learner.inner, *in_float64(learner)))
            assert relative_error(y[0, 0], expected[:, 0]) <= BOUND

    def test_of_a_text_state(self, model):
        cache = read(model, 8)
        for x, y in zip(states.weights(model, TextState(cache), 1), states.weights(model, cache, 1), strict=True):
            assert mx.array_equal(x, y)

    def test_sequences_at_different_phases(self, model):
        texts = [read(model, n, seed=n) for n in (3, 6, 11)]
        batch = [c[0].merge(c) for c in zip(*texts, strict=True)]
        found = states.weights(model, batch, 0)
        for b, alone in enumerate(texts):
            agree([w[b] for w in found], learned(model, alone[0], 0, alone[0].phase[0]))

    def test_what_lies_behind_the_open_rows_means_nothing(self, model):
        cache = read(model, 9)
        expected = states.weights(model, cache, 0), states.freeze(model, cache), states.scale(model, cache, 0.5)
        for c in cache:
            c.arrays = {**c.arrays, "rows": mx.where(mx.arange(K)[:, None] < c.phase[0], c.rows, 7.0)}
        found = states.weights(model, cache, 0), states.freeze(model, cache), states.scale(model, cache, 0.5)
        assert all(mx.array_equal(x, y) for x, y in zip(found[0], expected[0], strict=True))
        assert all(same(x, y) for x, y in zip(found[1:], expected[1:], strict=True))

    @pytest.mark.parametrize("layer", [-1, 2])
    def test_no_such_layer(self, model, layer):
        with pytest.raises(StateError, match=f"there is no layer {layer}: the model has layers 0 to 1"):
            states.weights(model, model.make_cache(), layer)


def in_float64(learner):
    return [x.astype(mx.float64) for x in (learner.t, learner.gamma, learner.beta)]


class TestDrift:
    @pytest.mark.parametrize("n", [0, 3, 6, 10])
    def test_by_its_definition(self, model, n):
        """Of the weights as they will be written; the same whether they are written yet or not."""
        cache = read(model, n) if n else model.make_cache()
        found = states.drift(model, cache)
        for i, (c, start) in enumerate(zip(cache, model.make_cache(), strict=True)):
            begin = [np.array(w, np.float64)[0] for w in start.weights]
            expected = norm([w - s for w, s in zip(learned(model, c, i, K - 1), begin, strict=True)])
            assert np.allclose(found.frobenius[i, 0], expected, rtol=BOUND)
            assert np.allclose(found.relative[i, 0], expected / norm(begin), rtol=BOUND)
            whole = found.of_layers()
            assert np.allclose(whole.frobenius[i, 0], np.sqrt((expected**2).sum()), rtol=BOUND)
            assert np.allclose(whole.relative[i, 0], np.linalg.norm(expected) / np.linalg.norm(norm(begin)), rtol=BOUND)
        frozen = states.drift(model, states.freeze(model, cache))
        assert np.allclose(found.frobenius, frozen.frobenius, rtol=BOUND)

    def test_at_most_the_sum_of_the_write_norms(self, model):
        """Token by token: no sawtooth within a mini-batch."""
        cache, bound = model.make_cache(), np.zeros((2, H))
        for slot in range(K - 1):
            model(mx.random.randint(0, VOCABULARY, (1, 1), key=mx.random.key(slot)), cache=cache)
            bound += write_norms(model, cache, slot)
            found = np.array(states.drift(model, cache).frobenius[:, 0])
            assert (found > 0).all()
            assert (found <= bound * (1 + BOUND)).all()

    def test_distance(self, model):
        a, b = read(model, 9, seed=1), read(model, 16, seed=2)
        for x, y in ((a, b), (b, a)):
            found = states.distance(model, x, y)
            for i in range(2):
                pair = (learned(model, c[i], i, K - 1) for c in (x, y))
                expected = norm([p - q for p, q in zip(*pair, strict=True)])
                assert np.allclose(found.frobenius[i, 0], expected, rtol=BOUND)
        assert not states.distance(model, a, a).frobenius.any()
        start = states.distance(model, a, model.make_cache())
        assert mx.allclose(start.frobenius, states.drift(model, a).frobenius, rtol=BOUND)

    def test_nothing_is_written_where_the_last_factor_is_zero(self, model, monkeypatch):
        for layer in model.layers:
            monkeypatch.setitem(layer.seq_modeling_block, "learnable_token_idx", mx.array([0.0] * (K - 1) + [-1.0]))
        cache = read(model, 10)
        assert not states.drift(model, cache).frobenius.any()
        assert not mx.array_equal(states.weights(model, cache, 0)[0], cache[0].weights[0])


def write_norms(model, cache, slot) -> np.ndarray:
    """DESIGN: t_{K-1} sqrt((|k|^2 + 1) |e1|^2 [+ (|x2|^2 + 1) |e2|^2]) of the row at a slot, [layers, H]."""
    found = []
    for i, c in enumerate(cache):
        row, total = np.array(c.rows, np.float64)[0, :, slot], 0
        for W in c.weights[::2]:
            n, m = W.shape[-2:]
            x, e, row = row[:, :n], row[:, n : n + m], row[:, n + m :]
            total = total + ((x**2).sum(-1) + 1) * (e**2).sum(-1)
        found.append(factors(model, i)[K - 1] * np.sqrt(total))
    return np.array(found)


class TestFreeze:
    @pytest.mark.parametrize("n", [6, 7, 9, 11])
    def test_open_rows_are_written_at_once(self, model, n):
        """As the definition writes them when tokens that add nothing complete the mini-batch."""
        cache = read(model, n)
        frozen = states.freeze(model, cache)
        for i, (before, after) in enumerate(zip(cache, frozen, strict=True)):
            agree([w[0] for w in after.weights], learned(model, before, i, K - 1))
            left = K - n % K
            tokens = Tokens(*mx.random.normal((3, 1, left, H, D)), lr=mx.zeros((1, left, H)))
            learner = model.layers[i].seq_modeling_block.learner()
            _, expected = reference.update(tokens, learner, State(before.weights, before.rows, before.phase))
            for w, w_expected in zip(after.weights, expected.weights, strict=True):
                assert relative_error(w, w_expected) <= BOUND
            assert not after.rows.any()
            assert (after.offset, after.phase) == (before.offset, before.phase)
            assert all(mx.array_equal(after.history[name], x) for name, x in before.history.items())

    @pytest.mark.parametrize("way", ["operations", "rule in C", "decode step in C", "compiled step", "rewindable"])
    def test_weights_stay_bit_for_bit(self, model, stop_learning, way, monkeypatch):
        """While tokens are read through the ends of mini-batches."""
        texts = [states.freeze(model, read(model, n)) for n in (6, 8, 11)]
        ids = mx.random.randint(0, VOCABULARY, (1, 40))
        stop_learning()
        with monkeypatch.context() as patch:
            patch.setattr(library, "c_code", lambda: None)
            expected = [model(ids, cache=copies(frozen)) for frozen in texts]
            mx.eval(expected)
        if way in ("operations", "compiled step"):
            monkeypatch.setattr(library, "c_code", lambda: None)
        if way == "compiled step":
            monkeypatch.setattr(decode_step, "wanted", lambda: True)
            monkeypatch.setattr(decode_step.mx, "compile", lambda function, inputs: function)
        calls = {"operations": [4, 9, 1], "rule in C": [40]}.get(way, [1] * (2 * K + 1))
        for frozen, logits in zip(texts, expected, strict=True):
            cache = [RewindableTTTCache(c) for c in frozen] if way == "rewindable" else copies(frozen)
            start = 0
            for n in calls:
                found = model(ids[:, start : start + n], cache=cache)
                assert largest_error(found, logits[:, start : start + n]) <= 1e-4
                start += n
            for before, after in zip(frozen, cache, strict=True):
                assert after.offset == [before.offset[0] + start]
                assert all(mx.array_equal(w, v) for w, v in zip(before.weights, after.weights, strict=True))

    def test_it_may_learn_again(self, model):
        """From within the mini-batch: the rows that were cleared add nothing, in any way of reading on."""
        ids = mx.random.randint(0, VOCABULARY, (1, 2 * K + 5))
        for n in (6, 7, 11):
            frozen = states.freeze(model, read(model, n))
            at_once, step_by_step = copies(frozen), copies(frozen)
            expected = model(ids, cache=at_once)
            found = mx.concatenate([model(ids[:, i : i + 1], cache=step_by_step) for i in range(ids.shape[1])], axis=1)
            assert largest_error(found, expected) <= 1e-4
            for a, b in zip(at_once, step_by_step, strict=True):
                agree([w[0] for w in a.weights], [np.array(w[0]) for w in b.weights])

    def test_a_text_state_stops_learning(self, model):
        state = TextState(read(model, 8), [3, 4])
        frozen = states.freeze(model, state)
        assert (frozen.learning, state.learning) == (0, 1)
        assert frozen.tokens == state.tokens
        assert frozen.copy().learning == 0


# Every operation, of a state and of another one.
OPERATIONS = {
    "freeze": lambda model, a, b: states.freeze(model, a),
    "blend 0": lambda model, a, b: states.blend(model, a, b, 0),
    "blend 0.3": lambda model, a, b: states.blend(model, a, b, 0.3),
    "blend 1": lambda model, a, b: states.blend(model, a, b, 1),
    "blend 1.5": lambda model, a, b: states.blend(model, a, b, 1.5, extrapolate=True),
    "swap": lambda model, a, b: states.swap(model, a, b, layers=[1], heads=[0]),
    "reset": lambda model, a, b: states.reset(model, a),
    "reset a layer": lambda model, a, b: states.reset(model, a, layers=[0]),
    "reset a head": lambda model, a, b: states.reset(model, a, heads=[1]),
    "scale": lambda model, a, b: states.scale(model, a, 0.5),
    "scale up": lambda model, a, b: states.scale(model, a, 2),
}


IN_SHORT = ("freeze", "blend 0", "blend 0.3", "swap", "reset", "scale")  # the others differ in numbers only
EACH = [name if name in IN_SHORT else pytest.param(name, marks=pytest.mark.slow) for name in OPERATIONS]


@pytest.fixture(params=EACH)
def operation(request):
    return OPERATIONS[request.param]


def assert_mixed(model, new, a, share, other) -> None:
    """(1 - share) of a and `share` [layers, H] of the other weights, as the next token sees them and when written."""
    for i, (x, y) in enumerate(zip(new, a, strict=True)):
        part = np.array(share[i])[:, None, None]
        for slot in (y.phase[0], K - 1):
            before = learned(model, y, i, slot)
            expected = [(1 - part) * w + part * o for w, o in zip(before, other[i], strict=True)]
            agree(learned(model, x, i, slot), expected)
        assert x.offset == y.offset
        assert all(mx.array_equal(x.history[name], h) for name, h in y.history.items())


class TestBlend:
    @pytest.mark.parametrize("weight", [0.3, 0.5, 1, -0.5, 2])
    def test_by_its_definition(self, model, weight):
        """b's open rows count as they would be written; a's go on open, and weigh less."""
        a, b = read(model, 9, seed=1), read(model, 22, seed=2)
        new = states.blend(model, a, b, weight, extrapolate=True)
        assert_mixed(model, new, a, np.full((2, H), weight), [learned(model, c, i, K - 1) for i, c in enumerate(b)])

    def test_weight_0_is_a_and_weight_1_has_no_trace_of_it(self, model):
        a, b = read(model, 9, seed=1), read(model, 22, seed=2)
        assert same(states.blend(model, a, b, 0), a)
        new = states.blend(model, a, b, 1)
        for x, y in zip(new, states.freeze(model, b), strict=True):
            assert all(mx.array_equal(v, w) for v, w in zip(x.weights, y.weights, strict=True))
            assert not x.rows.any()

    def test_what_will_be_written(self, model, stop_learning):
        """When the open mini-batch is complete, it is the blend of what a and b would have been."""
        a, b = read(model, 9, seed=1), read(model, 22, seed=2)
        new = states.blend(model, a, b, 0.3)
        expected = states.blend(model, states.freeze(model, a), b, 0.3)
        stop_learning()
        model(mx.zeros((1, 3), mx.int32), cache=new)
        for x, y in zip(new, expected, strict=True):
            assert x.phase == [0]
            agree([w[0] for w in x.weights], [np.array(w[0]) for w in y.weights])

    def test_a_text_goes_on_with_its_own_words(self, model):
        a = TextState(read(model, 9), [5, 6], learning=0.5)
        new = states.blend(model, a, TextState(read(model, 22), [7]), 0.7)
        assert (new.tokens, new.learning, len(new)) == ([5, 6], 0.5, 10)
        assert new.tokens is not a.tokens

    @pytest.mark.parametrize("weight", [-0.1, 1.001, float("nan"), float("inf")])
    def test_weights_out_of_range(self, model, weight):
        a = read(model, 3)
        with pytest.raises(StateError, match="weight is"):
            states.blend(model, a, a, weight)
        if not np.isfinite(weight):
            with pytest.raises(StateError, match="expected a number"):
                states.blend(model, a, a, weight, extrapolate=True)

    def test_batches_of_different_sizes(self, model):
        a, b = read(model, 3, batch=2), read(model, 3)
        for function in (states.distance, states.swap, lambda *pair: states.blend(*pair, 0.5)):
            with pytest.raises(StateError, match="the states have 2 and 1 sequences"):
                function(model, a, b)


class TestPartsOfAState:
    @pytest.mark.parametrize(
        ("layers", "heads", "share"),
        [
            (None, None, [[1, 1], [1, 1]]),
            ([1], None, [[0, 0], [1, 1]]),
            (None, [0], [[1, 0], [1, 0]]),
            ([0], [1], [[0, 1], [0, 0]]),
            (range(2), (1, 1), [[0, 1], [0, 1]]),
            ([], None, [[0, 0], [0, 0]]),
        ],
    )
    def test_reset_and_swap(self, model, layers, heads, share):
        a, b = read(model, 10, seed=1), read(model, 21, seed=2)
        start = [[np.array(w, np.float64)[0] for w in c.weights] for c in model.make_cache()]
        assert_mixed(model, states.reset(model, a, layers=layers, heads=heads), a, share, start)
        other = [learned(model, c, i, K - 1) for i, c in enumerate(b)]
        new = states.swap(model, a, b, layers=layers, heads=heads)
        assert_mixed(model, new, a, share, other)
        for x, y, part in zip(new, a, share, strict=True):  # heads that are not chosen stay bit for bit
            for h in np.flatnonzero(np.array(part) == 0).tolist():
                assert all(mx.array_equal(v[:, h], w[:, h]) for v, w in zip(x.weights, y.weights, strict=True))
                assert mx.array_equal(x.rows[:, h], y.rows[:, h])
            if not any(part):
                assert x.rows is y.rows

    def test_what_has_no_share_leaves_no_trace_even_if_it_is_no_number(self, model):
        a, b = read(model, 10, seed=1), read(model, 21, seed=2)
        broken = b[0].copy()
        broken.arrays = broken.arrays | {"weights": tuple(w.at[:, 1].add(mx.nan) for w in broken.weights)}
        new = states.swap(model, a, [broken, *b[1:]], layers=[0], heads=[0])
        assert same(new, states.swap(model, a, b, layers=[0], heads=[0]))

    def test_a_state_that_is_reset_has_learned_nothing(self, model):
        a = read(model, 10)
        assert not states.drift(model, states.reset(model, a)).frobenius.any()
        found = states.drift(model, states.reset(model, a, layers=[1], heads=[0])).frobenius[:, 0]
        assert (found == 0).tolist() == [[False, False], [True, False]]

    @pytest.mark.parametrize("factor", [0, 0.5, 1, 3, -1])
    def test_scale(self, model, factor):
        a = read(model, 10)
        new = states.scale(model, a, factor)
        start = [[np.array(w, np.float64)[0] for w in c.weights] for c in model.make_cache()]
        assert_mixed(model, new, a, np.full((2, H), 1 - factor), start)
        expected = abs(factor) * states.drift(model, a).frobenius
        assert mx.allclose(states.drift(model, new).frobenius, expected, rtol=1e-4)
        if factor == 1:
            assert same(new, a)

    @pytest.mark.parametrize("factor", [float("nan"), float("inf")])
    def test_no_factor(self, model, factor):
        with pytest.raises(StateError, match=r"factor is (nan|inf), expected a number"):
            states.scale(model, read(model, 3), factor)

    @pytest.mark.parametrize(
        ("chosen", "message"),
        [
            ({"layers": [2]}, "there is no layer 2: the model has layers 0 to 1"),
            ({"layers": [-1]}, "there is no layer -1"),
            ({"heads": [0, 5]}, "there is no head 5: the model has heads 0 to 1"),
        ],
    )
    def test_out_of_range(self, model, chosen, message):
        a = read(model, 3)
        with pytest.raises(StateError, match=message):
            states.reset(model, a, **chosen)
        with pytest.raises(StateError, match=message):
            states.swap(model, a, a, **chosen)

    def test_a_damaged_layer_can_be_reset(self, model):
        a = read(model, 10)
        broken = tuple(w * float("nan") for w in a[1].weights)
        a[1].arrays = {**a[1].arrays, "weights": broken, "rows": a[1].rows * float("nan")}
        new = states.reset(model, a, layers=[1])
        assert all(mx.isfinite(x).all() for x in arrays(new))


class TestStates:
    """What holds for every operation."""

    def test_it_goes_on_like_any_state(self, model, operation):
        """Token by token, in C where it is there, and in one call, from a copy and from mlx-lm's leaves."""
        new = operation(model, read(model, 9, seed=1), read(model, 22, seed=2))
        ids = mx.random.randint(0, VOCABULARY, (1, 2 * K + 3))
        expected = model(ids, cache=copies(new))
        reloaded = [TTTCache.from_state(c.state) for c in new]
        found = mx.concatenate([model(ids[:, i : i + 1], cache=reloaded) for i in range(ids.shape[1])], axis=1)
        assert largest_error(found, expected) <= 1e-4
        assert {x.dtype for x in arrays(new)} == {mx.float32}

    def test_nothing_is_written_in_place(self, model, operation):
        """Not in the states that were given, nor in one that comes of them, however each is read on."""
        a, b = read(model, 9, seed=1), read(model, 22, seed=2)
        new = operation(model, a, b)
        known = [[np.array(x) for x in arrays(state)] for state in (a, b, new)]
        positions = [[list(c.offset) for c in state] for state in (a, b, new)]
        for state in (a, b, new):
            ways = copies(state), copies(state)
            for _ in range(2 * K):
                mx.eval(model(mx.array([[7]]), cache=ways[0]))
            mx.eval(model(mx.zeros((1, 40), mx.int32), cache=ways[1]))
        for state, values, offsets in zip((a, b, new), known, positions, strict=True):
            assert all(np.array_equal(x, y) for x, y in zip(arrays(state), values, strict=True))
            assert [c.offset for c in state] == offsets

    def test_while_a_backend_has_the_state(self, model, operation):
        """A state that was decoded token by token is with the backend. It is the same, and goes on there."""
        a, b = read(model, 7, seed=1), read(model, 22, seed=2)
        lent = copies(a)
        for c in (lent, a):
            for token in (3, 4):
                mx.eval(model(mx.array([[token]]), cache=c))
        a = [TTTCache.from_state(c.state) for c in a]
        assert same(operation(model, lent, b), operation(model, a, b))
        assert mx.array_equal(model(mx.array([[5]]), cache=lent), model(mx.array([[5]]), cache=a))

    def test_batches(self, model, operation):
        """Each sequence as if it were alone, whatever its phase."""
        a, b = ([read(model, n, seed=n) for n in lengths] for lengths in ((3, 6, 11), (14, 5, 18)))
        merged = [[c[0].merge(c) for c in zip(*texts, strict=True)] for texts in (a, b)]
        new = operation(model, *merged)
        for i, pair in enumerate(zip(a, b, strict=True)):
            alone = operation(model, *pair)
            one = [c.extract(i) for c in new]
            assert [c.offset for c in one] == [c.offset for c in alone]
            for x, y in zip(arrays(one), arrays(alone), strict=True):
                assert mx.allclose(x, y, rtol=1e-5, atol=1e-6)

    def test_a_rewindable_state(self, model, operation):
        """As of plain caches. What was read before is out of reach; what is read afterwards can be taken back."""
        plain = operation(model, read(model, 9, seed=1), read(model, 22, seed=2))
        a = read(model, 9, seed=1, rewind=True)
        new = operation(model, a, read(model, 22, seed=2, rewind=True))
        ids = mx.random.randint(0, VOCABULARY, (1, 12))
        assert largest_error(model(ids, cache=copies(new)), model(ids, cache=copies(plain))) <= 1e-4
        if operation is OPERATIONS["blend 0"]:
            assert [c.reach for c in new] == [c.reach for c in a]
            return
        assert [c.reach for c in new] == [[0], [0]]
        model(ids[:, :5], cache=new)
        for c in new:
            assert c.trim(4) == 4
        model(ids[:, :1], cache=plain)
        assert largest_error(model(ids[:, 1:], cache=new), model(ids[:, 1:], cache=plain)) <= 1e-4

    def test_a_state_of_another_model(self, model, operation):
        for other in (
            build(model.args.ttt_layer_type, "111"),
            build("linear", "111", hidden_size=32, num_hidden_layers=1),
        ):
            with pytest.raises(StateError, match="the state is that of another model"):
                operation(model, other.make_cache(), other.make_cache())
        with pytest.raises(StateError, match="the state is that of another model"):
            states.drift(model, [None, None])


@pytest.fixture(scope="module")
def bundled():
    return mlx_ttt.load()


@pytest.fixture(scope="module")
def texts(bundled):
    return [
        mlx_ttt.read(*bundled, text) for text in ("ROMEO:\nBut soft, what light", "KING LEAR:\nBlow, winds, and crack")
    ]


def test_saved_loaded_and_continued(bundled, texts, operation, tmp_path):
    """The same text as without the file."""
    model, tokenizer = bundled
    new = operation(model, *texts)
    mlx_ttt.save_state(tmp_path / "state", new, model, tokenizer)
    loaded = mlx_ttt.load_state(tmp_path / "state", model, tokenizer)
    assert same(loaded.cache, new.cache)
    assert (loaded.tokens, loaded.learning) == (new.tokens, 0 if operation is OPERATIONS["freeze"] else 1)
    new.learning = loaded.learning = 1
    expected = mlx_ttt.generate(model, tokenizer, state=new, max_tokens=24)
    assert mlx_ttt.generate(model, tokenizer, state=loaded, max_tokens=24) == expected
