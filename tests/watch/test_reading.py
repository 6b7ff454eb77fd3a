"""What a page shows of a text, against one call of the model and plain loops."""

from __future__ import annotations

import mlx_ttt

import mlx.core as mx  # isort: skip
import numpy as np
import pytest

from mlx_ttt.errors import PromptError
from mlx_ttt.learning.states import drift
from mlx_ttt.training.evaluate import losses
from mlx_ttt.watch import reading
from mlx_ttt.watch.reading import NO_HEAD, STRONGEST, read_text, token_names, token_texts

from ..models import VOCABULARY, build

T = 101  # no multiple of a mini-batch


@pytest.fixture(scope="module")
def tokenizer():
    return mlx_ttt.load()[1]


@pytest.fixture(scope="module", params=["linear", "mlp"])
def model(request):
    return build(request.param, "101")


@pytest.fixture(scope="module")
def ids():
    return np.random.RandomState(1).randint(3, VOCABULARY, T).astype(np.int32)


@pytest.fixture(scope="module")
def exact(model, ids):
    """All in one call, and the cache after it."""
    cache = model.make_cache()
    return mlx_ttt.observe(model, mx.array(ids[None]), cache), cache


@pytest.fixture
def seen(model, tokenizer, ids, monkeypatch):
    monkeypatch.setattr(reading, "MOST_PIECES", 4)  # so that the text is read in several pieces
    return read_text(model, tokenizer, ids)


def test_figures_of_each_token(seen, exact):
    expected = exact[0]
    norms, loss = (np.array(x)[:, 0] for x in (expected.write_norm, expected.loss))  # [layers, H, T]
    heads = norms.reshape(-1, T)
    assert np.isnan(seen.figures.surprisal[0])
    close = {"rtol": 1e-3, "atol": 1e-5}
    np.testing.assert_allclose(seen.figures.surprisal[1:], np.array(expected.surprisal)[0, 1:], **close)
    np.testing.assert_allclose(seen.figures.loss, loss.mean((0, 1)), **close)
    for i in range(T):
        assert seen.figures.write_norm[i] == pytest.approx(np.linalg.norm(heads[:, i]), rel=1e-3)
        strongest = seen.figures.strongest[i]
        assert len(set(strongest)) == STRONGEST
        np.testing.assert_allclose(seen.figures.strongest_norm[i], np.sort(heads[:, i])[::-1][:STRONGEST], **close)
        np.testing.assert_allclose(seen.figures.strongest_norm[i], heads[strongest, i], **close)


def test_columns_are_mini_batches(seen, exact, model):
    K = model.args.mini_batch_size
    heads = np.array(exact[0].write_norm)[:, 0].reshape(-1, T)
    assert seen.width == K and seen.columns.shape == (-(-T // K), len(heads))
    for column, sums in enumerate(seen.columns):
        np.testing.assert_allclose(sums, heads[:, column * K : (column + 1) * K].sum(1), rtol=1e-3)


def test_a_long_text_has_wider_columns(seen, model, tokenizer, ids, monkeypatch):
    monkeypatch.setattr(reading, "MOST_CELLS", 20)
    wide = read_text(model, tokenizer, ids, reset=0)
    assert wide.width == 4 * seen.width and wide.columns.size <= 20
    for column, sums in enumerate(wide.columns):
        np.testing.assert_allclose(sums, seen.columns[4 * column : 4 * column + 4].sum(0), rtol=1e-3)


def test_drift(seen, exact, model):
    assert seen.drift_at[0] == 0 and not seen.drift[0].any()
    assert seen.drift_at[-1] == T and 3 < len(seen.drift_at) <= 1 + reading.MOST_PIECES
    assert all(at % model.args.mini_batch_size == 0 for at in seen.drift_at[:-1])
    expected = drift(model, exact[1]).of_layers().relative
    np.testing.assert_allclose(seen.drift[-1], np.array(expected)[:, 0], rtol=1e-3)


def test_the_second_reading(seen, exact, model, ids):
    assert seen.reset_every == T // 4 // model.args.mini_batch_size * model.args.mini_batch_size == 24
    expected = losses(model, ids, seen.reset_every)
    np.testing.assert_allclose(seen.reset[1:], expected, rtol=1e-3, atol=1e-5)
    assert seen.gain == pytest.approx(np.mean(expected - np.array(exact[0].surprisal)[0, 1:]), abs=1e-4)


def test_the_state_of_a_long_text_is_not_forgotten_less_often(model, tokenizer, ids, monkeypatch):
    monkeypatch.setattr(reading, "RESET", 12)
    assert read_text(model, tokenizer, ids).reset_every == 12


@pytest.mark.parametrize("reset", [0, T])
def test_no_second_reading(model, tokenizer, ids, reset):
    seen = read_text(model, tokenizer, ids, reset)
    assert seen.reset_every == 0 and seen.reset.size == 0


def test_one_token(model, tokenizer, ids):
    seen = read_text(model, tokenizer, ids[:1])
    assert np.isnan(seen.figures.surprisal).all() and seen.columns.shape[0] == 1


def test_a_model_of_one_head(tokenizer, ids):
    model = build("linear", "000", num_hidden_layers=1, num_attention_heads=1)
    strongest = read_text(model, tokenizer, ids).figures.strongest
    assert (strongest == [0, NO_HEAD, NO_HEAD]).all()


def test_too_few_and_too_many_tokens(model, tokenizer, ids, monkeypatch):
    monkeypatch.setattr(reading, "MOST_TOKENS", T - 1)
    for wrong in (ids[:0], ids):
        with pytest.raises(PromptError, match="a page can hold 1 to 100"):
            read_text(model, tokenizer, wrong)


def test_progress_goes_to_the_end(model, tokenizer, ids):
    told = []
    read_text(model, tokenizer, ids, progress=lambda done, total: told.append((done, total)))
    assert told[-1] == (2 * T, 2 * T) and told == sorted(told)


@pytest.mark.parametrize("block", [1, 7, 4096])
def test_the_texts_of_tokens_are_the_text(tokenizer, monkeypatch, block):
    monkeypatch.setattr(reading, "TEXT_BLOCK", block)
    text = "\tnaïve 日本語 🎉<script>alert(1)</script>\r\n\n  end"
    ids = tokenizer.encode(text)
    texts = token_texts(tokenizer, ids)
    assert len(texts) == len(ids) and "".join(texts) == text
    names = token_names(tokenizer, ids, texts)
    assert names[0] == "<s>" and names[4] == "<0xC3>" and all(not texts[i] for i in names)
    cut = 11  # within a character
    assert "".join(token_texts(tokenizer, ids[cut:], ids[cut - 8 : cut])) == text[text.index("本") :]
