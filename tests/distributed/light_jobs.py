"""What processes do in tests without a model: `python -m tests.distributed.light_jobs JOB ARGUMENTS`, on each rank.

They start in a moment, also on a busy machine.
"""

from __future__ import annotations

import itertools
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx_ttt  # noqa: F401  before MLX

import mlx.core as mx  # isort: skip

from mlx_ttt.distributed import files, peers
from mlx_ttt.distributed import group as groups
from mlx_ttt.distributed.exchange import all_sum
from mlx_ttt.distributed.files import copy_of_first
from mlx_ttt.distributed.group import any_of, as_first, joined
from mlx_ttt.errors import DistributedError


def pending(group) -> None:
    """A question to all machines while a computation on another stream still exchanges, as when a text ends early."""
    other = mx.new_stream(mx.cpu)
    for i in range(200):
        with mx.stream(other):
            x = mx.full((64,), group.rank() + 1.0)
            for _ in range(8):
                x = all_sum(x / 2, group)
            mx.async_eval(x)
        time.sleep(i % 7 * 3e-5 * (group.rank() + 1))
        assert any_of(group.rank() == 1 and i % 2 == 1, group) == (i % 2 == 1)
        assert x.tolist() == [1.5] * 64


def only_the_token(group) -> None:
    """Sampling where nobody looks at the log-probabilities, as mlx-lm's loops with a draft model do it."""
    sampler = as_first(lambda logprobs: mx.argmax(logprobs, axis=-1), group)
    for i in range(50):
        logprobs = all_sum(mx.arange(64)[None] == i + group.rank(), group)
        (token,) = sampler(logprobs).tolist()
        assert token == i
        assert all_sum(mx.ones(3), group).tolist() == [group.size()] * 3
        mx.eval(logprobs)


def copied(group, folder: str) -> None:
    """A folder that only the first process has. (Here all could see it.)"""
    files._CHUNK = 1000
    with copy_of_first(Path(folder), group) as place:
        assert (place == Path(folder)) == (group.rank() == 0)
        found = {str(path.relative_to(place)): path for path in place.rglob("*")}
        assert sorted(found) == ["a", "a/empty", "a/large", "b", "b/none"]
        assert found["a/large"].read_bytes() == Path(folder, "a", "large").read_bytes()
        assert found["a/empty"].read_bytes() == b""
    assert place.exists() == (group.rank() == 0)


def forever(group, lost_after: str = "30", fails: str = "no") -> None:
    """Sums until somebody ends it; rank 1 may fail by itself."""
    for i in itertools.count():
        mx.eval(all_sum(mx.ones(100), group))
        if i == 10:
            peers.SILENCE_LIMIT = float(lost_after)
            print("running", flush=True)
        if i == 20 and fails == "yes" and group.rank() == 1:
            raise ValueError("this one fails")
        time.sleep(0.01)


def uneven_ends(group) -> None:
    """One process has more to do at the end than the other."""
    mx.eval(all_sum(mx.ones(100), group))
    if group.rank() == 0:
        time.sleep(2.5)


def unread(group) -> None:
    """One process ends although sums that it has asked for are not there yet."""
    x = mx.ones((1000,))
    for _ in range(200):
        x = all_sum(x / 2, group)
    mx.async_eval(x)
    if group.rank() == 1:
        mx.eval(x)


def alone(group) -> None:
    """The others do not come."""


def one_dies_in_between(group) -> None:
    """When all have come, but before MLX has connected them."""


def before_joining(job: str) -> None:
    if job == "alone":
        peers.JOIN_LIMIT = 2.0
    if job == "one_dies_in_between":
        groups.INIT_LIMIT = 2.0
        if os.environ["MLX_RANK"] == "1":
            mx.distributed.init = lambda: os._exit(1)


def main(jobs: Mapping[str, Any]) -> None:
    job, *arguments = sys.argv[1:]
    before_joining(job)
    try:
        with joined() as group:
            jobs[job](group, *arguments)
    except DistributedError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main(globals())
