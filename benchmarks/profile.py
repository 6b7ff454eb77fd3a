"""Where the time of a model of 125M goes on this machine's CPU: each part alone, and what it takes at least.

python -m benchmarks.profile
MLX_TTT_KERNELS=0 python -m benchmarks.profile    # MLX operations only
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

from . import machine, models
from .limits_worker import Limits
from .report import table

import mlx.core as mx  # isort: skip

from mlx_ttt.backends.cpu.prepare import prepare
from mlx_ttt.network.operations import geglu, swiglu
from mlx_ttt.network.rule import Tokens
from mlx_ttt.text.state import PREFILL_STEP_SIZE

TOKENS = PREFILL_STEP_SIZE
ROUNDS = 15


def main() -> None:
    limits = Limits("float32", machine.cores())
    best = [limits.measure() for _ in range(5)]
    bandwidth, rate = (max(m[key] for m in best) for key in ("bytes_per_second", "flops_per_second"))
    print(f"{machine.describe(machine.cores())['blas']}; {bandwidth / 1e9:.1f} GB/s, {rate / 1e9:.0f} GFLOP/s\n")
    rows = {}
    for name in models.OURS:
        model = models.build(models.configuration(name, models.SIZES["125M"]))
        prepare(model)
        for tokens in (1, TOKENS):
            for part, (function, least) in parts(model, tokens, bandwidth, rate).items():
                milliseconds = 1e3 * seconds(function)
                cells = rows.setdefault(part, {})
                cells[name, tokens] = f"{milliseconds:.1f}" + (f" ({1e3 * least:.1f})" if least else "")
    columns = [(name, tokens) for name in models.OURS for tokens in (1, TOKENS)]
    head = ["milliseconds (at least), of all layers", *(f"{name}, {tokens}" for name, tokens in columns)]
    print(table(head, [[part, *(cells.get(c, "") for c in columns)] for part, cells in rows.items()]))


def seconds(function: Callable[[], object]) -> float:
    """The median of some runs after a first one."""
    times = []
    for _ in range(ROUNDS + 1):
        start = time.perf_counter()
        mx.eval(function())
        times.append(time.perf_counter() - start)
    return median(times[1:])


def parts(model, T: int, bandwidth: float, rate: float) -> dict[str, tuple[Callable, float]]:
    """What to run, for all layers, and the seconds that its matrix products or reading its weights take at least."""
    args = model.args
    C, F, H, D = args.hidden_size, args.intermediate_size, args.num_attention_heads, args.head_dim
    layers = model.layers
    x, wide, q = (mx.random.normal(shape) for shape in ((1, T, C), (1, T, F), (1, T, H, D)))
    lr = mx.full((1, T, H), 1 / D)
    caches = model.make_cache()
    mx.eval(x, wide, q, lr, [c.state for c in caches])

    def least(elements: int) -> float:
        return max(4 * elements / bandwidth, 2 * T * elements / rate)

    def each(function: Callable) -> Callable:
        return lambda: [function(layer, cache.copy()) for layer, cache in zip(layers, caches, strict=True)]

    def update(layer, cache):
        return cache.update(Tokens(q, q, q, lr), layer.seq_modeling_block.learner()), cache.state

    def convolutions(layer, cache):
        return layer.conv(x, cache), layer.seq_modeling_block.queries_and_keys(x, cache)

    def rope(layer, cache):
        return layer.seq_modeling_block.rope(q, q, cache.phase)

    def projections(layer, _):
        ttt = layer.seq_modeling_block
        return ttt.v_proj(x), ttt.g_proj(x), ttt.o_proj(x)

    def whole():
        state = [c.copy() for c in caches]
        return model.model(mx.zeros((1, T), mx.int32), state), [c.state for c in state]

    n = args.num_hidden_layers
    return {
        "projections v, g, o": (each(projections), least(3 * C * C * n)),
        "q, and the convolutions": (each(convolutions), least(C * C * n)),
        "feed-forward products": (
            each(lambda layer, _: (layer.mlp.gate_proj(x), layer.mlp.up_proj(x), layer.mlp.down_proj(wide))),
            least(3 * C * F * n),
        ),
        "silu(gate) · up": (each(lambda layer, _: swiglu(wide, wide)), 0),
        "gelu(gate) · y": (each(lambda layer, _: geglu(x, x)), 0),
        "update rule": (each(update), 0),
        "RoPE": (each(rope), 0),
        "norms": (each(lambda layer, _: (layer.ffn_norm(x), layer.seq_modeling_block.post_norm(x))), 0),
        "logits of one position": (
            lambda: model.model.embed_tokens.as_linear(x[:, -1:]),
            4 * C * args.vocab_size / bandwidth,
        ),
        "**all layers**": (whole, least((4 * C * C + 3 * C * F) * n)),
    }


if __name__ == "__main__":
    main()
