"""The loss of each token, means by position with intervals, and the needle test."""

from __future__ import annotations

import gc
import math

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_ttt.errors import PromptError
from mlx_ttt.training import evaluate, needle
from mlx_ttt.training.evaluate import by_position, half_width, losses
from mlx_ttt.training.needle import needle_test

from ..models import KINDS, VOCABULARY, shared


@pytest.fixture
def ids():
    return np.random.RandomState(1).randint(0, VOCABULARY, 101)


def whole(model, ids) -> np.ndarray:
    """The losses of a text that is read in one call."""
    logits = model(mx.array(ids[None, :-1]))[0]
    return np.array(nn.losses.cross_entropy(logits, mx.array(ids[1:])))


class TestLosses:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("segment", [1, 7, 32, 512])
    def test_carried(self, kind, segment, ids):
        model = shared(kind, "101")
        found = losses(model, ids, segment=segment)
        assert found.dtype == np.float32
        assert found == pytest.approx(whole(model, ids), abs=1e-4)

    @pytest.mark.parametrize(("reset", "segment"), [(1, 512), (6, 4), (30, 512), (45, 32), (100, 7), (1000, 64)])
    def test_reset_is_a_text_of_its_own_each_time(self, reset, segment, ids):
        model = shared("linear", "111")
        parts = [whole(model, ids[a : a + reset + 1]) for a in range(0, 100, reset)]
        assert losses(model, ids, reset, segment) == pytest.approx(np.concatenate(parts), abs=1e-4)

    def test_ids_of_any_kind(self, ids):
        model = shared("linear", "000")
        for same in (ids.tolist(), mx.array(ids), ids.astype(np.int32)):
            assert np.array_equal(losses(model, same), losses(model, ids))

    def test_progress(self, ids):
        seen = []
        losses(shared("linear", "000"), ids, reset=60, segment=50, progress=lambda *x: seen.append(x))
        assert seen == [(50, 100), (60, 100), (100, 100)]

    @pytest.mark.parametrize(
        "bad", [{"ids": [1]}, {"ids": [[1, 2]]}, {"ids": [1, 2], "reset": 0}, {"ids": [1, 2], "segment": 0}]
    )
    def test_bad_arguments(self, bad):
        with pytest.raises(ValueError, match="expected ids"):
            losses(shared("linear", "000"), **bad)

    @pytest.mark.parametrize("token", [-1, VOCABULARY])
    def test_ids_outside_the_vocabulary(self, token):
        with pytest.raises(PromptError, match=f"token id {token} is outside"):
            losses(shared("linear", "000"), [1, 2, token])

    @pytest.mark.slow
    def test_memory_does_not_grow_with_the_text(self, trained):
        """Eight times the text. MLX's threads overlap more or less, so that peaks differ by a quarter."""
        model, _ = trained
        peaks = []
        for n in (2049, 16385):
            gc.collect()  # what earlier tests have left
            mx.clear_cache()
            mx.reset_peak_memory()
            before = mx.get_active_memory()
            losses(model, np.arange(n) % 2048)
            peaks.append(mx.get_peak_memory() - before)
        assert peaks[1] < 1.6 * peaks[0]

    @pytest.mark.slow
    def test_the_tempest(self, trained, tempest):
        """Figures that were measured by other means: of the official implementation, and with the state reset."""
        model, _ = trained
        for reset, expected in ((None, 2.2487), (2048, 2.1910), (512, 2.2051)):
            nats = losses(model, tempest[0], reset)
            assert nats.sum(dtype=np.float64) / math.log(2) / 98308 == pytest.approx(expected, abs=2e-4)


class TestByPosition:
    def test_bands_end_with_the_text(self):
        values = np.arange(10_000, dtype=np.float32)
        bands = by_position(values)
        assert [(band.start, band.stop) for band in bands] == [(0, 2048), (2048, 8192), (8192, 10_000)]
        assert [band.mean for band in bands] == pytest.approx([1023.5, 5119.5, 9095.5])

    def test_equal_losses_have_no_interval(self):
        assert by_position(np.full(5000, 3.0), [(0, None)])[0].half_width == 0

    @pytest.mark.parametrize("n", [2, 3, 20, 5000])
    def test_short_texts(self, n):
        (band,) = by_position(np.random.RandomState(0).standard_normal(n), [(0, None)])
        assert (band.start, band.stop) == (0, n)
        assert band.half_width > 0

    def test_a_single_token(self):
        (band,) = by_position(np.ones(1), [(0, None)])
        assert band.mean == 1
        assert math.isnan(band.half_width)

    @pytest.mark.parametrize("correlation", [0.0, 0.9])
    def test_intervals_hold_the_mean_as_often_as_they_say(self, correlation):
        """Also where neighbours are correlated, which intervals of single tokens would not: 95 % in 400 tries."""
        rng = np.random.RandomState(0)
        inside = 0
        for _ in range(400):
            noise = rng.standard_normal(4096)
            for i in range(1, 4096):
                noise[i] += correlation * noise[i - 1]
            (band,) = by_position(noise, [(0, None)])
            inside += abs(band.mean) <= band.half_width
        assert 0.92 <= inside / 400 <= 0.98

    @pytest.mark.parametrize(("n", "quantile"), [(5, 2.776), (8, 2.365), (11, 2.228), (31, 2.042), (1001, 1.962)])
    def test_students_t(self, n, quantile):
        samples = np.random.RandomState(0).standard_normal(n)
        assert half_width(samples) == pytest.approx(quantile * samples.std(ddof=1) / math.sqrt(n), rel=1e-3)


class TestNeedle:
    @pytest.fixture
    def text(self, trained, tempest):
        return np.array(tempest[0, :1000])

    def test_it_is_what_one_reads_by_oneself(self, trained, text):
        """Together or alone, in one call or in several: the loss of the number in a text with and without it."""
        model, tokenizer = trained
        (recall,) = needle_test(model, tokenizer, text, [70], count=1)
        (item,) = [needle._Needle.random(tokenizer, needle.random.Random(0))]
        before, after = text[:256].tolist(), text[256 : 256 + 70].tolist()
        question = [*item.beginning, *item.name, *item.middle]

        def cost(inserted, answer):
            return losses(model, [*before, *inserted, *after, *question, *answer])[-len(answer) :].sum()

        for gain, answer in ((recall.number, item.number), (recall.other, item.other)):
            assert gain.mean == pytest.approx(cost([], answer) - cost(item.sentence, answer), abs=2e-3)
            assert math.isnan(gain.half_width)
        asked = len(item.beginning)

        def name(inserted):
            nats = losses(model, [*before, *inserted, *after, *item.beginning, *item.name])
            return nats[-len(item.name) :].sum()

        assert asked > 0
        assert recall.name.mean == pytest.approx(name([]) - name(item.sentence), abs=2e-3)

    def test_a_text_that_is_too_short_for_a_distance(self, trained, text):
        recalls = needle_test(*trained, text[:100], [10, 50, 51, 1000], count=2)
        assert [recall.distance for recall in recalls] == [10, 50]
        assert all(recall.number.half_width > 0 for recall in recalls)

    def test_a_text_too_short_for_all(self, trained, text):
        assert needle_test(*trained, text[:4], count=2) == []

    def test_a_sentence_right_before_the_question_is_remembered(self, trained, text):
        (recall,) = needle_test(*trained, text, [1], count=4)
        assert recall.number.mean - recall.number.half_width > 0
        assert recall.name.mean > 0

    @pytest.mark.slow
    def test_it_is_repeatable(self, trained, text):
        seen = []
        first = needle_test(*trained, text, [5, 20], count=2, progress=lambda *x: seen.append(x))
        assert first == needle_test(*trained, text, [20, 5], count=2)
        assert seen[-1] == (20, 20)


def test_bands_are_those_of_the_documents():
    assert evaluate.BANDS == ((0, 2048), (2048, 8192), (8192, 16384), (16384, 32768), (32768, None))
