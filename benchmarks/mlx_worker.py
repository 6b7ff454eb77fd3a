"""A model of mlx-lm's interface, measured in mlx-lm's own generation loop."""

from __future__ import annotations

import copy
import time
from pathlib import Path

from .models import build
from .protocol import WARM_UP, resident_bytes, serve

import mlx.core as mx  # isort: skip
from mlx.utils import tree_flatten, tree_map
from mlx_lm.generate import generate_step, generation_stream, wired_limit
from mlx_lm.models.cache import KVCache, make_prompt_cache

from mlx_ttt.backends.cpu.prepare import prepare
from mlx_ttt.checkpoint.convert import convert
from mlx_ttt.loading import load_model
from mlx_ttt.text.state import PREFILL_STEP_SIZE


class Model:
    """Reads random prompts and writes after them. Keeps the state after each prompt length, to write from it again."""

    def __init__(self, config: dict, dtype: str):
        mx.random.seed(0)
        self.model = build(config, dtype)
        if config["model_type"] == "ttt" and mx.default_device() == mx.cpu:
            prepare(self.model)  # as `load` does
        mx.eval(self.model.parameters())
        self.vocabulary = config["vocab_size"]
        self.options = {"prefill_step_size": PREFILL_STEP_SIZE} if config["model_type"] == "ttt" else {}
        self.states: dict[int, list] = {}
        self.prefill(20)  # whatever is compiled or allocated once, in all phases of a mini-batch
        self.decode(20, 8)
        self.states.clear()

    def prefill(self, tokens: int) -> dict:
        """Read a prompt as a user does, up to the first new token.

        Returns:
            seconds; the largest memory of MLX's arrays meanwhile (weights, this state, intermediates), in bytes; the
            size of the state after it; the largest resident memory of the process so far.
        """
        prompt = mx.random.randint(0, self.vocabulary, (tokens,))
        mx.eval(prompt)
        self.states.pop(tokens, None)
        others = sum(_bytes(state) for state in self.states.values())
        mx.clear_cache()
        mx.reset_peak_memory()
        cache = make_prompt_cache(self.model)
        start = time.perf_counter()
        self._write(prompt, cache, 1)
        seconds = self.times[0] - start
        self.states[tokens] = cache
        return self._costs(seconds, cache, others)

    def decode(self, context: int, tokens: int) -> dict:
        """Write `tokens` tokens after a prompt that has been read. Returns what `prefill` does."""
        if context not in self.states:
            self.states[context] = self._invented(context)
        kept = self.states[context]
        mx.clear_cache()
        mx.reset_peak_memory()
        others = sum(_bytes(state) for n, state in self.states.items() if n != context)
        # A growing cache would be copied as a whole if it were kept: it is cut back instead.
        trimmable = all(c.is_trimmable() for c in kept)
        cache = kept if trimmable else [_fork(c) for c in kept]
        before = [c.offset for c in kept] if trimmable else None
        self._write(mx.zeros((1,), mx.int32), cache, WARM_UP + tokens + 1)
        if trimmable:
            for c, offset in zip(kept, before, strict=True):
                c.trim(c.offset - offset)
        return self._costs(self.times[WARM_UP + tokens] - self.times[WARM_UP], cache, others)

    def _invented(self, tokens: int) -> list:
        """Random keys and values, as many as after a prompt: how long writing takes does not depend on them."""
        cache = make_prompt_cache(self.model)
        if not all(isinstance(c, KVCache) for c in cache):
            raise ValueError(f"no prompt of {tokens} tokens has been read")
        self._write(mx.zeros((2,), mx.int32), cache, 1)
        for c in cache:
            B, H, _, D = c.keys.shape
            allocated = -(-tokens // c.step) * c.step
            keys, values = (mx.random.normal((B, H, allocated, D), c.keys.dtype) for _ in range(2))
            c.state = keys, values, tokens
        return cache

    def check(self, folder: str, prompt: list[int], tokens: int) -> dict:
        """Convert a checkpoint in the official layout and continue a prompt greedily: tokens and log-probabilities."""
        convert(Path(folder), Path(folder, "mlx"))
        model, _ = load_model(Path(folder, "mlx"))
        steps = list(generate_step(mx.array(prompt), model, max_tokens=tokens))
        return {"tokens": [token for token, _ in steps], "logprobs": [logprobs.tolist() for _, logprobs in steps]}

    @staticmethod
    def _costs(seconds: float, state: list, others: int) -> dict:
        peak = mx.get_peak_memory() - others
        mx.clear_cache()
        return {
            "seconds": seconds,
            "peak_bytes": peak,
            "state_bytes": _bytes(state),
            "resident_bytes": resident_bytes(),
        }

    def _write(self, prompt: mx.array, cache: list, tokens: int) -> None:
        self.times = []
        with wired_limit(self.model, [generation_stream]):
            for _ in generate_step(prompt, self.model, max_tokens=tokens, prompt_cache=cache, **self.options):
                self.times.append(time.perf_counter())
            mx.eval([c.state for c in cache])  # the loop has begun one token more


def _fork(cache):
    """The same state, to be continued on its own."""
    fork = copy.copy(cache)
    fork.state = tree_map(lambda x: x, cache.state)
    return fork


def _bytes(state: list) -> int:
    return sum(x.nbytes for _, x in tree_flatten([c.state for c in state]) if isinstance(x, mx.array))


if __name__ == "__main__":
    serve(Model)
