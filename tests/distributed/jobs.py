"""What processes do in tests with a model: `python -m tests.distributed.jobs JOB ARGUMENTS`, on each rank."""

from __future__ import annotations

import itertools
import json

import mlx_ttt  # before MLX

import mlx.core as mx  # isort: skip
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_map

from mlx_ttt.distributed import sharding
from mlx_ttt.distributed.group import any_of, as_first
from mlx_ttt.errors import DistributedError
from mlx_ttt.training import gradients
from mlx_ttt.training.checkpoint import State
from mlx_ttt.training.data import Batch
from mlx_ttt.training.distributed import nothing, reduce, rows
from mlx_ttt.training.loop import Recipe, Step, Trainer
from mlx_ttt.training.optimizer import Schedule

from ..models import BOUND, VOCABULARY, build, in_calls, largest_error
from .light_jobs import main

SIZES = {"hidden_size": 32, "num_attention_heads": 4}
QUANTIZABLE = {"hidden_size": 128, "num_attention_heads": 4, "intermediate_size": 256}
CUTS = [1, 2, 9, 20, 21, 22, 23, 24, 25, 26, 27, 28]  # a prompt in odd parts, then tokens one by one


def ids(batch: int, length: int) -> mx.array:
    return mx.array(np.random.RandomState(1).randint(0, VOCABULARY, (batch, length)))


def logits(group, kinds: str, flags: str) -> None:
    """A split model's logits are the whole one's, however the text is cut, and its state is a part of the whole."""
    for kind, flag in itertools.product(kinds.split(","), flags.split(",")):
        whole, split = build(kind, flag, **SIZES), build(kind, flag, **SIZES)
        split.shard(group)
        text = ids(2, 29)
        expected = whole(text)
        for found in (split(text), in_calls(split, text, CUTS)):
            error = largest_error(found, expected)
            assert error <= BOUND, (kind, flag, error)
        for c in split.make_cache():
            assert all(w.shape[1] * group.size() == SIZES["num_attention_heads"] for w in (*c.weights, c.rows))
        assert_no_c(split)


def assert_no_c(model) -> None:
    """The decode step in C is for whole models."""
    kept = vars(model.model).get("_c_decode_step")
    assert kept is None or kept._parameters is None


def gradient(group, kinds: str, flags: str) -> None:
    """A split model's gradients are the parts of the whole model's, and the same everywhere for what is not split."""
    for kind, flag in itertools.product(kinds.split(","), flags.split(",")):
        whole, split = build(kind, flag, **SIZES), build(kind, flag, **SIZES)
        split.shard(group)
        text = ids(2, 27)
        weights = mx.array(np.random.RandomState(2).rand(2, 26) > 0.3)
        loss, tree = gradients(split, text, 11, weights=weights)
        expected_loss, expected = gradients(whole, text, 26, weights=weights)
        assert abs(loss.item() - expected_loss.item()) < 1e-5
        largest = max(mx.abs(g).max().item() for _, g in tree_flatten(expected))
        found, whole_parts = dict(tree_flatten(tree)), dict(tree_flatten(expected))
        assert found.keys() == whole_parts.keys()
        for name, g in whole_parts.items():
            error = mx.abs(found[name] - part(name, g, group)).max().item() / largest
            assert error < 1e-5, (kind, flag, name, error)


def part(name: str, array: mx.array, group) -> mx.array:
    """This machine's part of a parameter."""
    axis = sharding.split_axis(name)
    return array if axis is None else mx.split(array, group.size(), axis)[group.rank()]


class Fixed:
    """The same batch at each step."""

    def batch(self, step: int) -> Batch:
        count = np.arange(30)[None] < np.array([30, 7, 1])[:, None]
        return Batch(np.array(ids(3, 31)), count.astype(np.float32), np.ones(3, bool))


def split_training(group) -> None:
    """Steps of a split model are those of the whole one, clipped by the norm of all gradients."""
    recipe = Recipe(Schedule(1e-2, 1e-3, 1, 4), micro_batch=2, segment=13, clip=0.5)
    for kind in ("linear", "mlp"):
        whole, split = build(kind, "111", **SIZES), build(kind, "111", **SIZES)
        split.shard(group)
        found, expected = (list(trainer(model, recipe).run()) for model in (split, whole))
        for a, b in zip(found, expected, strict=True):
            assert abs(a.loss - b.loss) < 1e-4, (kind, a, b)
            if isinstance(b, Step):
                assert b.norm > recipe.clip and abs(a.norm - b.norm) < 1e-4 * b.norm, (kind, a, b)
        weights = dict(tree_flatten(split.parameters()))
        for name, w in tree_flatten(whole.parameters()):
            assert mx.abs(weights[name] - part(name, w, group)).max().item() < 1e-4, (kind, name)


def trainer(model, recipe: Recipe) -> Trainer:
    weights = {name: mx.array(w) for name, w in tree_flatten(model.parameters())}
    return Trainer(model, recipe, Fixed(), State(0, weights, {}, {}, 0))


def quantized(group) -> None:
    """Quantized models, loaded as on a CPU and as mlx-lm loads them, split as well."""
    from mlx_ttt.network.model import prepare

    for bits, prepared in ((4, False), (8, True)):
        whole, split = (build("linear", "111", **QUANTIZABLE) for _ in range(2))
        for model in (whole, split):
            nn.quantize(model, 32, bits, class_predicate=model.quant_predicate)
            if prepared:
                prepare(model)
        split.shard(group)
        text = ids(2, 29)
        assert largest_error(in_calls(split, text, CUTS), whole(text)) <= BOUND


def compiled(group) -> None:
    """The decode step that is traced once, as on a GPU."""
    from mlx_ttt.backends.metal import decode_step

    decode_step.wanted = lambda: True
    whole, split = (build("mlp", "111", **SIZES) for _ in range(2))
    split.shard(group)
    text = ids(2, 29)
    assert largest_error(in_calls(split, text, CUTS), whole(text)) <= BOUND
    assert decode_step.DecodeStep.of(split.model)._function is not None


def with_mlx_lm(group) -> None:
    """mlx-lm loads and splits our model directories."""
    from mlx_lm.utils import sharded_load

    split, tokenizer = sharded_load(str(mlx_ttt.bundled_model()), tensor_group=group)
    split.set_dtype(mx.float32)
    whole, _ = mlx_ttt.load()
    text = mx.array(tokenizer.encode("ROMEO:\nBut soft, what light through yonder window breaks?"))[None]
    assert largest_error(split(text), whole(text)) <= BOUND
    assert split.layers[0].seq_modeling_block.num_heads * group.size() == whole.args.num_attention_heads


def many_sums(group) -> None:
    """MLX's ring has been seen to stop in sums of gradients. Here it does not."""
    model = build("linear", "111", **SIZES)
    tree = model.trainable_parameters()
    for i in range(300):
        loss, found, count = reduce(mx.array(float(group.rank())), tree, i + 1.0, group)
        assert count.item() == (i + 1) * group.size()
        name, array = tree_flatten(found)[-1]
        assert mx.allclose(array, dict(tree_flatten(tree))[name]).item()
        assert loss.item() == (group.size() - 1) / 2
    flat = {name: array * (group.rank() + 1) for name, array in tree_flatten(tree)}  # the names have dots
    _, found, _ = reduce(mx.array(0.0), flat, 1.0, group)
    assert all(mx.allclose(found[name], array * 1.5, atol=1e-6).item() for name, array in tree_flatten(tree))
    loss, found, count = reduce(mx.array(0.0), tree_map(mx.zeros_like, tree), 0.0, group)
    assert loss.item() == count.item() == 0
    assert not any(mx.any(array).item() for _, array in tree_flatten(found))


def refusals(group) -> None:
    """What cannot be split is one line that says why, and leaves the model whole."""
    three = build("linear", "000", num_attention_heads=3)
    uneven = build("linear", "000", intermediate_size=41)
    coarse = build("linear", "000", **QUANTIZABLE)
    nn.quantize(coarse, 128, 4, class_predicate=coarse.quant_predicate)
    adapted = build("linear", "000")
    from mlx_lm.tuner.utils import linear_to_lora_layers

    linear_to_lora_layers(adapted, 2, {"rank": 2, "scale": 1.0, "dropout": 0.0})
    twice = build("linear", "000")
    twice.shard(group)
    for model, words in (
        (three, "3 heads do not divide over 2 machines"),
        (uneven, "intermediate_size 41 does not divide"),
        (coarse, "layer 0, o_proj: 1 quantization groups of 128 do not divide"),
        (adapted, "a LoRALinear cannot be split"),
        (twice, "split over machines already"),
    ):
        before = {name: id(p) for name, p in tree_flatten(model.parameters())}
        try:
            model.shard(group)
        except DistributedError as error:
            assert words in str(error), error
            assert "\n" not in str(error)
        else:
            raise AssertionError(words)
        assert {name: id(p) for name, p in tree_flatten(model.parameters())} == before


def training(group) -> None:
    """Data parallel training with batches of uneven lengths. Prints the losses."""
    text = ids(4, 25)
    weights = mx.arange(24)[None] < mx.array([24, 5, 17, 1])[:, None]
    model = build("linear", "111", **SIZES)
    print(json.dumps(train(model, text, weights, group)))


def train(model, text: mx.array, weights: mx.array, group) -> list[float]:
    optimizer, losses = optim.AdamW(3e-3), []
    own = rows(len(text), group)
    for step in range(6):
        # In one step the second machine's rows count nothing.
        counts = weights if step != 3 else weights * mx.array([1, 0, 1, 0])[:, None]
        count = counts[own].sum().item()
        own_part = (*gradients(model, text[own], 10, weights=counts[own]), count) if count else nothing(model)
        loss, tree, _ = reduce(*own_part, group)
        tree, _ = optim.clip_grad_norm(tree, 1.0)
        optimizer.update(model, tree)
        mx.eval(model.parameters(), optimizer.state)
        losses.append(loss.item())
    return losses


def sampled(group) -> None:
    """Machines with random numbers of their own write the same text."""
    mx.random.seed(group.rank())
    model, tokenizer = mlx_ttt.load(group=group)
    sampler = as_first(lambda logprobs: mx.random.categorical(logprobs), group)
    print(mlx_ttt.generate(model, tokenizer, "ROMEO:\n", max_tokens=30, sampler=sampler))
    assert any_of(group.rank() == 1, group) and not any_of(False, group)


if __name__ == "__main__":
    main(globals())
