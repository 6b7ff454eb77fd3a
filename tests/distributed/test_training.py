"""Two processes with half of a batch each train as one with all of it."""

from __future__ import annotations

import json

import mlx.core as mx
import pytest

from mlx_ttt.training.distributed import reduce, rows

from .jobs import training
from .processes import run


@pytest.mark.slow
def test_losses_are_those_of_one_process(tmp_path, capsys):
    training(None)
    alone = json.loads(capsys.readouterr().out)
    for size in (2, 4):
        for losses in map(json.loads, run(tmp_path, size, "training")):
            assert losses == pytest.approx(alone, abs=1e-4)
    assert alone[-1] < alone[0] / 2


@pytest.mark.slow
def test_many_sums(tmp_path):
    run(tmp_path, 2, "many_sums")


def test_one_machine_reads_and_keeps_all():
    gradients = {"a": mx.array([1.0]), "b": [mx.array([2.0])]}
    loss, tree, count = reduce(mx.array(3.0), gradients, 5, None)
    assert (loss.item(), tree is gradients, count.item()) == (3.0, True, 5.0)
    assert list(range(7))[rows(7, None)] == list(range(7))


def test_a_batch_that_is_too_small():
    class Group:
        size, rank = (lambda self: 3), (lambda self: 1)

    assert list(range(7))[rows(7, Group())] == [1, 4]
    with pytest.raises(ValueError, match="a batch of 2 does not reach for 3 machines"):
        rows(2, Group())
