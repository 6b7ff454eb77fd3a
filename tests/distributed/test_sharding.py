"""A model that is split over several processes computes what the whole model does."""

from __future__ import annotations

import pytest

from mlx_ttt.network.args import ModelArgs
from mlx_ttt.network.backend import replaceable
from mlx_ttt.network.model import shard

from ..models import FLAGS, KINDS, build
from .processes import run


@pytest.mark.slow
def test_logits_on_two_processes(tmp_path):
    run(tmp_path, 2, "logits", "linear,mlp", "000,111")


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.long)])
def test_logits_of_all_models(tmp_path, size):
    run(tmp_path, size, "logits", ",".join(KINDS), ",".join(FLAGS))


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.long)])
def test_gradients_of_all_models(tmp_path, size):
    run(tmp_path, size, "gradient", ",".join(KINDS), ",".join(FLAGS))


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
def test_training(tmp_path, size):
    run(tmp_path, size, "split_training")


@pytest.mark.slow
def test_quantized_models(tmp_path):
    run(tmp_path, 2, "quantized")


@pytest.mark.slow
def test_the_compiled_decode_step(tmp_path):
    run(tmp_path, 2, "compiled")


@pytest.mark.slow
def test_mlx_lm_splits_our_models(tmp_path):
    run(tmp_path, 2, "with_mlx_lm")


@pytest.mark.slow
def test_what_cannot_be_split(tmp_path):
    run(tmp_path, 2, "refusals")


@pytest.mark.slow
def test_machines_sample_the_same_text(tmp_path):
    first, second = run(tmp_path, 2, "sampled")
    assert first == second
    assert len(first) > 30


def test_one_machine_changes_nothing():
    model = build("linear", "111")
    before = type(model.layers[0].seq_modeling_block)
    model.shard()
    assert type(model.layers[0].seq_modeling_block) is before


def test_the_network_alone_cannot_be_split():
    with pytest.raises(NotImplementedError, match=r"mlx_ttt\.model"):
        replaceable(shard.in_mlx)(ModelArgs(), None)
