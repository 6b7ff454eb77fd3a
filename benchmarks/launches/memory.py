"""How much memory a prompt takes on a Mac's GPU, counted from the arrays of its graph, on any machine.

    python -m benchmarks.launches.memory [--preset 1.3b] [--tokens 512 ...] [--layer mlp] [--backbone mamba] [--bits 16]

A prompt is read in calls of so many tokens, after each of which the host waits, as in mlx-lm's loop. So its memory is
that of one call, however long it is: the weights, the state before and after, and what the call computes in between.
How much of the latter is there at the same time depends on the device. Two bounds are counted:

- kept up: the GPU has run each operation before the host encodes the next one.
- not begun: the host has encoded the whole call before the GPU begins. Nothing is given back until a command buffer has
  run (metal/eval.cpp:29), so all results of a call exist at once. No device can need more.

What MLX keeps of freed buffers for later (mx.set_cache_limit) is not counted: it is given back when memory is short.

    python -m benchmarks.launches.memory --measure 16384 --layers 2 [--preset 1.3b] [--layer mlp]

reads a prompt of that length here, as `read` does, and says how much memory the process took at most, besides what it
had with the weights. For a CPU: its operations are others, so the figure is no estimate of a GPU's.
"""

from __future__ import annotations

import argparse
import resource
from collections.abc import Callable
from typing import Any
from unittest import mock

import mlx_ttt  # noqa: F401  before MLX, which multiplies slowly otherwise

import mlx.core as mx  # isort: skip
from mlx.utils import tree_flatten

from benchmarks.models import SIZES, build, configuration
from mlx_ttt.text.state import PREFILL_STEP_SIZE

from . import arrays
from .decoding import Case, Token, token
from .evaluation import Device, drop
from .gpus import GPUS
from .graph import Operation

MODELS = {"linear": "TTT-Linear", "mlp": "TTT-MLP"}
CALLS = 3  # the states of the last ones have all dtypes that they keep


class _Memory(Device):
    """A device that counts the bytes of all buffers in use, after every operation."""

    def __init__(self, buffers: list[arrays.Buffer], keeps_up: bool):
        super().__init__(GPUS[1])
        self._buffers, self._keeps_up, self.peak = buffers, keeps_up, 0

    def encoded(self, operation: Operation) -> None:
        self.peak = max(self.peak, self.in_use())
        if self._keeps_up:
            self.wait()

    def in_use(self) -> int:
        self._buffers[:] = [x for x in self._buffers if x.users]
        return sum(x.nbytes for x in self._buffers)


def peak(call: Token, keeps_up: bool) -> tuple[int, int]:
    """Bytes of a call of the model that reads a part of a prompt: the most in use at a time, and those of weights."""
    buffers: list[arrays.Buffer] = []
    made: Callable[[int], arrays.Buffer] = arrays.Buffer

    def recorded(nbytes: int) -> arrays.Buffer:
        buffers.append(made(nbytes))
        return buffers[-1]

    with mock.patch.object(arrays, "Buffer", recorded):
        device = _Memory(buffers, keeps_up)
        parameters = [device.array(x.shape, x.dtype) for x in call.parameters]
        weights = device.in_use()
        state = [device.array(x.shape, x.dtype) for x in call.state]
        for _ in range(CALLS):
            device.peak = 0
            logits, *after = device.call(call.graph, [*parameters, *state])
            drop(logits)  # of a prompt's parts but the last nobody asks for them
            for x in state:
                drop(x)
            state = after
            device.eval(state)
            device.wait()
    return device.peak, weights


def measured(config: dict[str, Any], tokens: int) -> tuple[int, int]:
    """Bytes of the weights, and by how much the most that the process held exceeds what it held with them."""
    model = build(config, "float32")
    mx.eval(model.parameters())
    before = _resident()
    cache: Any = model.make_cache()
    for start in range(0, tokens, PREFILL_STEP_SIZE):
        n = min(PREFILL_STEP_SIZE, tokens - start)
        model(mx.random.randint(0, config["vocab_size"], (1, n)), cache=cache)
        mx.eval([c.state for c in cache])
        mx.clear_cache()
    return sum(x.nbytes for _, x in tree_flatten(model.parameters())), _resident() - before


def _resident() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="1.3b", choices=[name.lower() for name in SIZES])
    parser.add_argument("--layer", choices=list(MODELS), help="the inner model; both if not given")
    parser.add_argument("--backbone", choices=("mamba", "transformer"), default="mamba")
    parser.add_argument("--bits", type=int, default=16, choices=(4, 8, 16))
    parser.add_argument("--tokens", type=int, nargs="+", default=[512], help="of a call")
    parser.add_argument("--measure", type=int, metavar="TOKENS", help="read a prompt of so many on this machine")
    parser.add_argument("--layers", type=int, help="of the model, instead of the preset's")
    options = parser.parse_args()
    size = next(size for name, size in SIZES.items() if name.lower() == options.preset)
    mamba, bits = options.backbone == "mamba", None if options.bits == 16 else options.bits
    if options.measure:
        config = configuration(MODELS[options.layer or "linear"], size) | {"num_hidden_layers": options.layers or 2}
        weights, more = measured(config, options.measure)
        print(f"{options.measure} tokens: weights {weights / 1e9:.2f} GB, besides at most {more / 1e9:.2f} GB")
        return
    print("| | tokens of a call | weights | besides, if the GPU keeps up | besides, if it has not begun |")
    print("| --- | --: | --: | --: | --: |")
    for layer in [options.layer] if options.layer else MODELS:
        flags = {"pre_conv": mamba, "share_qk": mamba, "use_gate": mamba}
        config: dict[str, Any] = configuration(MODELS[layer], size) | flags
        config["num_hidden_layers"] = options.layers or config["num_hidden_layers"]
        for tokens in options.tokens:
            call = token(Case(config, bits=bits, tokens=tokens, offset=0))
            (kept_up, weights), (not_begun, _) = (peak(call, keeps_up) for keeps_up in (True, False))
            cells = [f"{x / 1e9:.2f} GB" for x in (weights, kept_up - weights, not_begun - weights)]
            print(f"| {MODELS[layer]} {options.preset} | {tokens} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
