"""The options of all commands that write text."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    import mlx.core as mx

F = TypeVar("F", bound=Callable[..., Any])
MOST_LEARNING = 100  # as on the server
LEAST_TEMPERATURE = 1e-5  # below it, logits divided by the temperature overflow; the best token always wins there


def _finite(ctx: click.Context, param: click.Parameter, value: float | None) -> float | None:
    if value is not None and not math.isfinite(value):
        raise click.BadParameter("must be a number", ctx, param)
    return value


_SAMPLING = (
    click.option(
        "--temp", default=0.0, type=click.FloatRange(0), callback=_finite, help="Sampling temperature; 0: greedy."
    ),
    click.option(
        "--top-p",
        default=1.0,
        type=click.FloatRange(0, 1, min_open=True),
        callback=_finite,
        help="Sample from the fewest tokens that have this probability together.",
    ),
    click.option("--top-k", default=0, type=click.IntRange(0), help="Sample from the K most likely tokens; 0: all."),
    click.option(
        "--min-p",
        default=0.0,
        type=click.FloatRange(0, 1),
        callback=_finite,
        help="Drop tokens whose probability is less than this share of the most likely one's.",
    ),
    click.option("--seed", type=click.IntRange(0, 2**64 - 1), help="Makes sampling repeatable."),
)

learning_option = click.option(
    "--learning",
    type=click.FloatRange(0, MOST_LEARNING),
    callback=_finite,
    help="How much the model learns from what it reads and writes; 0: nothing, 2: twice as much. By default 1, or what"
    " the loaded state says.",
)


def sampling_options(command: F) -> F:
    """--temp, --top-p, --top-k, --min-p and --seed."""
    for option in reversed(_SAMPLING):
        command = option(command)
    return command


def make_sampler(
    vocab_size: int, temp: float, top_p: float, top_k: int, min_p: float
) -> Callable[[mx.array], mx.array]:
    """mlx-lm's sampler: log-probabilities [n, V] -> n tokens. A tiny `temp` and a huge `top_k` are allowed, too."""
    from mlx_lm import sample_utils

    return sample_utils.make_sampler(
        temp=temp if temp >= LEAST_TEMPERATURE else 0.0,
        top_p=top_p,
        top_k=top_k if top_k < vocab_size else 0,
        min_p=min_p,
    )
