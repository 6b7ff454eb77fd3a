"""What a model shows of its learning: the official implementation's signals, and the definition's."""

from __future__ import annotations

import itertools

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten, tree_map_with_path

import mlx_ttt
from mlx_ttt.errors import PromptError
from mlx_ttt.learning import observation
from mlx_ttt.network import cache as network_cache
from mlx_ttt.network import reference

from ..models import FLAGS, KINDS, VOCABULARY, build, shared

SIGNALS = ("loss", "lr", "write_norm")
BOUND = 1e-4  # of the largest


def random_ids(B: int, T: int) -> mx.array:
    return mx.random.randint(0, VOCABULARY, (B, T), key=mx.random.key(B + T))


def observed(model, ids, cuts=(), cache=None, **options) -> list[mlx_ttt.Observation]:
    """A text in calls that are split at `cuts`."""
    cache, seen, previous = cache or model.make_cache(), [], None
    for a, b in itertools.pairwise([0, *sorted(cuts), ids.shape[1]]):
        seen.append(mlx_ttt.observe(model, ids[:, a:b], cache, previous, **options))
        previous = seen[-1].last_logits
    return seen


def joined(seen, name: str) -> mx.array:
    return mx.concatenate([getattr(x, name) for x in seen], axis=-1)


def surprisal(logits: mx.array, ids: mx.array) -> mx.array:
    """Of all tokens but the first."""
    return -mx.take_along_axis(nn.log_softmax(logits[:, :-1]), ids[:, 1:, None], axis=-1)[..., 0]


def assert_close(found: mx.array, expected: mx.array, name: str = "") -> None:
    found, expected = (np.array(x.astype(mx.float64, stream=mx.cpu)) for x in (found, expected))
    assert found.shape == expected.shape, name
    assert np.abs(found - expected).max() <= BOUND * np.abs(expected).max(), name


def same_state(cache, expected) -> bool:
    pairs = zip(tree_flatten([c.state for c in cache]), tree_flatten([c.state for c in expected]), strict=True)
    return all(mx.array_equal(mx.array(x), mx.array(y)).item() for (_, x), (_, y) in pairs)


# ---- Values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["linear-mamba", "mlp-transformer"])
class TestGolden:
    @pytest.fixture
    def golden(self, name, golden_model, golden_dir):
        model, expected = golden_model(name)
        signals = mx.load(str(golden_dir / name / "expected_signals.safetensors"))
        n = signals["loss"].shape[-1]
        ids, logits = expected["input_ids"][:, :n], expected["logits"][:, :n]
        return model, ids, {**signals, "surprisal": surprisal(logits, ids)}

    def check(self, golden, cuts, **options):
        model, ids, expected = golden
        seen = observed(model, ids, cuts, **options)
        for name in SIGNALS:
            assert_close(joined(seen, name), expected[name], name)
        found = joined(seen, "surprisal")
        assert mx.isnan(found[:, 0]).all().item()
        assert_close(found[:, 1:], expected["surprisal"], "surprisal")

    @pytest.mark.parametrize("cuts", [[], range(1, 80), [1, 16, 17, 31, 32, 79]])
    def test_signals_and_surprisal(self, golden, cuts):
        self.check(golden, cuts)

    @settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(cuts=st.sets(st.integers(1, 79)))
    def test_in_random_splits(self, golden, cuts):
        self.check(golden, cuts)

    def test_without_logits(self, golden, monkeypatch):
        monkeypatch.setattr(observation, "PIECE", 24)
        monkeypatch.setattr(observation, "HEAD_PIECE", 7)
        self.check(golden, [5, 6], logits=False)


def assert_is_the_definition(monkeypatch, model, ids, cache=None) -> None:
    """All layers, given the very views and rates that their learners get."""
    expected, rule = [], network_cache.observe

    def noted(tokens, learner, state):
        expected.append(reference.observe(tokens, learner, state)[2])
        return rule(tokens, learner, state)

    monkeypatch.setattr(network_cache, "observe", noted)
    seen = mlx_ttt.observe(model, ids, cache)
    for i, name in enumerate(SIGNALS):
        with mx.stream(mx.cpu):
            of_layers = mx.stack([signals[i].swapaxes(1, 2) for signals in expected])
        assert_close(getattr(seen, name), of_layers, name)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("flags", FLAGS)
def test_all_flags(kind, flags, monkeypatch):
    assert_is_the_definition(monkeypatch, shared(kind, flags), random_ids(2, 20))


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16(kind, monkeypatch):
    model = build(kind, "111")
    follows = model.cast_predicate
    model.update(tree_map_with_path(lambda name, w: w.astype(mx.bfloat16) if follows(name) else w, model.parameters()))
    assert_is_the_definition(monkeypatch, model, random_ids(2, 20))


@pytest.mark.parametrize("kind", KINDS)
def test_quantized(kind, monkeypatch):
    model = build(kind, "111", hidden_size=64, intermediate_size=64)
    nn.quantize(model, 32, 4, class_predicate=model.quant_predicate)
    assert_is_the_definition(monkeypatch, model, random_ids(2, 20))


# ---- Nothing else changes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rewind", [False, True])
def test_logits_and_state_are_those_of_plain_calls_bit_for_bit(kind, rewind):
    model, ids = shared(kind, "111"), random_ids(2, 50)
    seen_cache, cache = (model.make_cache(rewind=rewind) for _ in range(2))
    for a, b in itertools.pairwise([0, 1, 2, 5, 6, 7, 30, 49, 50]):
        seen = mlx_ttt.observe(model, ids[:, a:b], seen_cache)
        assert mx.array_equal(seen.logits, model(ids[:, a:b], cache)).item()
        assert mx.array_equal(seen.last_logits, seen.logits[:, -1]).item()
        assert same_state(seen_cache, cache)


@pytest.mark.parametrize(("T", "per"), [(1025, "mini_batch"), (1029, "layer")])
def test_a_text_in_pieces_leaves_the_state_of_one_call(T, per, monkeypatch):
    monkeypatch.setattr(observation, "PIECE", 512)
    model, ids = shared("linear", "111"), random_ids(1, T)
    seen_cache, cache = model.make_cache(), model.make_cache()
    seen = mlx_ttt.observe(model, ids, seen_cache, per=per)
    logits = model(ids, cache)
    assert seen.logits is None
    assert_close(seen.last_logits, logits[:, -1])
    assert_close(seen.surprisal[:, 1:], surprisal(logits, ids))
    assert same_state(seen_cache, cache)


def test_afterwards_nobody_looks():
    model, cache = shared("linear", "000"), shared("linear", "000").make_cache()
    with pytest.raises(ValueError, match="learning"):
        mlx_ttt.observe(model, random_ids(1, 4), cache, learning=-1)
    mlx_ttt.observe(model, random_ids(1, 4), cache)
    assert all(c.seen is None for c in cache)


# ---- Padding ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cuts", [[], [3], [9, 10, 11], range(1, 23)])
def test_padded_sequences_show_what_they_show_alone(kind, cuts):
    """Padding in front and behind, in calls that may be all padding for some sequence."""
    model, T = shared(kind, "111"), 23
    left, counts = [4, 0, 12], [13, 23, 9]
    ids = random_ids(3, T)
    cache = model.make_cache()
    for c in cache:
        c.prepare(left_padding=left, lengths=[a + n for a, n in zip(left, counts, strict=True)])
    seen = observed(model, ids, cuts, cache)
    for b, (start, n) in enumerate(zip(left, counts, strict=True)):
        alone = mlx_ttt.observe(model, ids[b : b + 1, start : start + n])
        for name in (*SIGNALS, "surprisal"):
            found, expected = joined(seen, name), getattr(alone, name)
            found = found[b] if name == "surprisal" else found[:, b]
            expected = expected[0] if name == "surprisal" else expected[:, 0]
            first = name == "surprisal"  # which is NaN
            assert_close(found[..., start + first : start + n], expected[..., int(first) :], name)
            outside = mx.concatenate([found[..., :start], found[..., start + n :]], axis=-1)
            assert (mx.isnan(outside) if first else outside == 0).all().item(), name
        assert mx.isnan(joined(seen, "surprisal")[b, start]).item()
        assert_close(seen[-1].last_logits[b], alone.last_logits[0], "last_logits")


def test_a_text_that_goes_on_behind_padding():
    """What came before is known, and the next token is not the call's first."""
    model, ids, more = shared("linear", "111"), random_ids(2, 7), random_ids(2, 12)
    cache = model.make_cache()
    previous = mlx_ttt.observe(model, ids, cache).last_logits
    for c in cache:
        c.prepare(left_padding=[5, 0], lengths=[12, 9])
    seen = mlx_ttt.observe(model, more, cache, previous)
    for b, (start, stop) in enumerate([(5, 12), (0, 9)]):
        alone = observed(model, mx.concatenate([ids[b : b + 1], more[b : b + 1, start:stop]], axis=1), [7])[1]
        assert_close(seen.surprisal[b, start:stop], alone.surprisal[0])


def test_a_text_goes_on_in_several_ways():
    """What came before is that of one sequence, and may come in another precision."""
    model, ids, more = shared("linear", "111"), random_ids(1, 7), random_ids(3, 12)
    cache = model.make_cache()
    previous = mlx_ttt.observe(model, ids, cache).last_logits.astype(mx.bfloat16)
    seen = mlx_ttt.observe(model, more, cache, mx.broadcast_to(previous, (3, VOCABULARY)), per="mini_batch")
    for b in range(3):
        cache = model.make_cache()
        model(ids, cache)
        alone = mlx_ttt.observe(model, more[b : b + 1], cache, previous.astype(mx.float32), per="mini_batch")
        assert_close(seen.surprisal[b], alone.surprisal[0])
        assert_close(seen.write_norm[:, b], alone.write_norm[:, 0])


def test_a_learning_scale_without_logits():
    model, ids = shared("linear", "111"), random_ids(2, 12)
    seen = mlx_ttt.observe(model, ids, learning=[0.5, 0.0], per="layer")
    expected = mlx_ttt.observe(model, ids, learning=[0.5, 0.0])
    assert_close(seen.lr, expected.lr.mean(2))
    assert not seen.write_norm[:, 1].any() and seen.write_norm[:, 0].any()


def test_no_piece_is_of_one_token():
    """Which a backend might read in another way."""
    for T, expected in [(1, [(0, 1)]), (8, [(0, 4), (4, 8)]), (9, [(0, 4), (4, 9)]), (10, [(0, 4), (4, 8), (8, 10)])]:
        assert list(observation._pieces(T, 4)) == expected


# ---- Coarser ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("piece", [5, 13, 64])
def test_per_mini_batch_and_per_layer_are_sums_of_the_tokens(piece, monkeypatch):
    """Two padded sequences that stand at different phases (K = 6), in pieces that cut mini-batches."""
    monkeypatch.setattr(observation, "PIECE", piece)
    model, ids = shared("mlp", "111"), random_ids(2, 40)

    def started():
        cache = model.make_cache()
        for c in cache:
            c.prepare(lengths=[4, 1])
        model(ids[:, :4], cache)
        for c in cache:
            c.prepare(left_padding=[0, 8], lengths=[40, 31])
        return cache

    tokens, layers, batches = (
        mlx_ttt.observe(model, ids, started(), per=per) for per in ("token", "layer", "mini_batch")
    )
    loss, lr, write_norm = (np.array(getattr(tokens, name)) for name in SIGNALS)  # [layers, 2, H, 40]
    assert_close(layers.loss, mx.array(loss.mean(2)))
    assert_close(layers.lr, mx.array(lr.mean(2)))
    assert_close(layers.write_norm, mx.array(np.sqrt((write_norm**2).sum(2))))
    assert batches.loss.shape[-1] == 8  # ceil((4 + 40) / 6)
    for b, (phase, start, stop) in enumerate([(4, 0, 40), (1, 8, 31)]):
        for m in range(8):
            first, last = (max(m * 6 - phase, 0) + start, min((m + 1) * 6 - phase + start, stop))
            inside = slice(first, max(last, first))
            n = max(last - first, 1)
            assert np.allclose(batches.loss[:, b, :, m], loss[:, b, :, inside].sum(-1) / n, rtol=1e-4), (b, m)
            assert np.allclose(batches.lr[:, b, :, m], lr[:, b, :, inside].sum(-1) / n, rtol=1e-4)
            assert np.allclose(batches.write_norm[:, b, :, m], write_norm[:, b, :, inside].sum(-1), rtol=1e-4)
    for seen in (layers, batches):
        assert np.allclose(seen.surprisal, tokens.surprisal, rtol=1e-3, equal_nan=True)


# ---- What bad input gets ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ids": mx.zeros((1, 0), mx.int32)}, r"ids has shape \(1, 0\)"),
        ({"ids": mx.zeros((3,), mx.int32)}, r"ids has shape \(3,\)"),
        ({"per": "head"}, "per is 'head', expected one of token, mini_batch, layer"),
        ({"previous": mx.zeros((2, VOCABULARY))}, r"previous has shape \(2, 61\), expected \(1, 61\)"),
    ],
)
def test_arguments_that_do_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        mlx_ttt.observe(shared("linear", "000"), **({"ids": random_ids(1, 4)} | options))


@pytest.mark.parametrize("token", [-1, VOCABULARY])
def test_tokens_outside_the_vocabulary(token):
    with pytest.raises(PromptError, match=f"token id {token} is outside the model's vocabulary of 61"):
        mlx_ttt.observe(shared("linear", "000"), mx.array([[3, token]]))
