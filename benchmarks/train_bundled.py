"""How the bundled model was trained: on long streams of text, with the state carried from window to window.

    python convert.py mlx tests/data/shakespeare-ttt-linear START --dtype float16
    python -m benchmarks.train_bundled START DATA TRAINED
    python convert.py mlx TRAINED OUT --dtype float16

START is the model that came with version 0.1.0. DATA holds shakespeare.txt and books/*.txt. Each row of a batch is a
stream: parts of plays and books, 16 384 to 65 536 tokens behind each other. After that many the row's state is reset. A
step reads the next window of every row, and goes on with the state that the last window left. Gradients are exact
within a window. They also reach the start weights, through the rows whose state is new.

On one H100 with MLX's CUDA backend the 200 steps took nine minutes. On a CPU they would take days: see --rows, --steps.
"""

from __future__ import annotations

import argparse
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import mlx_ttt

import mlx.core as mx  # isort: skip
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

HELD_OUT = ("THE WINTER'S TALE", "h-g-wells_the-war-of-the-worlds", "joseph-conrad_heart-of-darkness")
EPISODES = (16384, 32768, 49152, 65536)  # tokens until a stream's state is reset


def documents(data: Path, tokenizer) -> dict[str, dict[str, np.ndarray]]:
    """Token ids by title: the plays and poems, and the books."""
    works = re.split(r"\n{3,}", (data / "shakespeare.txt").read_text(encoding="utf-8"))
    shakespeare = {work.strip("\n").split("\n")[0]: work.strip("\n") + "\n" for work in works}
    books = {path.stem: path.read_text(encoding="utf-8") for path in sorted((data / "books").glob("*.txt"))}
    return {
        kind: {title: np.array(tokenizer.encode(text), np.int32) for title, text in texts.items()}
        for kind, texts in (("shakespeare", shakespeare), ("books", books))
    }


class Stream:
    """One row: windows of W + 1 tokens, which overlap by one, and whether each begins with a new state."""

    def __init__(self, texts: dict[str, dict[str, np.ndarray]], share: float, bos: int, rng: np.random.Generator):
        self.texts = [[ids for title, ids in kind.items() if title not in HELD_OUT] for kind in texts.values()]
        self.share, self.bos, self.rng = share, bos, rng

    def windows(self, size: int) -> Iterator[tuple[np.ndarray, bool]]:
        skipped = int(self.rng.integers(0, 8))  # so that rows do not begin anew at the same time
        while True:
            ids = self._episode(int(self.rng.choice(EPISODES)))
            for i in range(min(skipped, len(ids) // size - 1), (len(ids) - 1) // size):
                yield ids[i * size : (i + 1) * size + 1], i <= skipped
            skipped = 0

    def _episode(self, length: int) -> np.ndarray:
        """So many tokens, and one more: parts of texts, three in ten of them from the text's beginning."""
        parts: list[np.ndarray] = []
        while (missing := length + 1 - sum(map(len, parts))) > 0:
            kind = self.texts[0 if self.rng.random() < self.share else 1]
            sizes = np.array([len(ids) for ids in kind], float)
            ids = kind[self.rng.choice(len(kind), p=sizes / sizes.sum())]
            start = 0 if self.rng.random() < 0.3 or len(ids) < 4096 else int(self.rng.integers(0, len(ids) - 2048))
            part = ids[start:] if start == 0 else np.concatenate([[self.bos], ids[start:]])
            parts.append(part[:missing].astype(np.int32))
        return np.concatenate(parts)


class Windows:
    """Exact gradients of a window, segment by segment, as mlx_ttt.training does it, but each row's state may be new."""

    def __init__(self, model, segment: int):
        self.model, self.segment = model, segment
        self.names = [name for name, _ in tree_flatten(model.trainable_parameters())]
        self.state_names = list(self.leaves(model.make_cache()))

    @staticmethod
    def leaves(caches) -> dict[str, mx.array]:
        return dict(tree_flatten([c.arrays for c in caches]))

    def fresh_state(self, rows: int) -> list[mx.array]:
        caches = self.model.make_cache()
        for c in caches:
            c.expand(rows)
        return list(self.leaves(caches).values())

    def caches(self, state: list[mx.array], new: mx.array):
        """Caches with this state, but the model's own in the rows that are new, [B]."""
        fresh = self.fresh_state(len(new))
        chosen = [mx.where(new.reshape(-1, *[1] * (x.ndim - 1)), y, x) for x, y in zip(state, fresh, strict=True)]
        caches = self.model.make_cache()
        for c, arrays in zip(caches, tree_unflatten(list(zip(self.state_names, chosen, strict=True))), strict=True):
            c.expand(len(new))
            c.arrays = {**arrays, "weights": tuple(arrays["weights"])}
        return caches

    def gradients(self, ids: mx.array, new: mx.array, state: list[mx.array]):
        """Mean loss of ids [B, W + 1], its gradients, and the state after them."""
        starts, places = [], range(0, ids.shape[1] - 1, self.segment)
        for a in places:
            caches = self.caches(state, new if a == 0 else mx.zeros_like(new))
            starts.append(state)
            self.model.model(ids[:, a : a + self.segment], caches)
            state = list(self.leaves(caches).values())
            mx.eval(state)
        parameters = [p for _, p in tree_flatten(self.model.trainable_parameters())]
        loss, summed, pulled = mx.array(0.0), [mx.zeros_like(p) for p in parameters], [mx.zeros_like(x) for x in state]
        for a, start in reversed(list(zip(places, starts, strict=True))):
            n = min(self.segment, ids.shape[1] - 1 - a)

            def run(*arrays, a=a, n=n):
                self.model.update(tree_unflatten(list(zip(self.names, arrays[: len(self.names)], strict=True))))
                caches = self.caches(list(arrays[len(self.names) :]), new if a == 0 else mx.zeros_like(new))
                logits = self.model(ids[:, a : a + n], caches)
                losses = nn.losses.cross_entropy(logits, ids[:, a + 1 : a + n + 1], reduction="mean")
                return [losses, *self.leaves(caches).values()]

            share = mx.array(n / (ids.shape[1] - 1))
            (part, *_), cotangents = mx.vjp(run, parameters + start, [share, *pulled])
            pulled = cotangents[len(self.names) :]
            summed = [x + y for x, y in zip(summed, cotangents[: len(self.names)], strict=True)]
            loss = loss + share * part
            mx.eval(loss, summed, pulled)
        self.model.update(tree_unflatten(list(zip(self.names, parameters, strict=True))))
        return loss, tree_unflatten(list(zip(self.names, summed, strict=True))), state


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("start", type=Path, help="the model directory to begin with")
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path, help="the model directory to write, in float32")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--window", type=int, default=4096)
    parser.add_argument("--segment", type=int, default=512)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--share", type=float, default=0.4, help="how often a part of a stream is Shakespeare")
    parser.add_argument("--lr", type=float, default=1e-3)
    options = parser.parse_args()

    rng = np.random.default_rng(0)
    model, tokenizer = mlx_ttt.load(options.start)
    model.set_dtype(mx.float32)
    texts = documents(options.data, tokenizer)
    streams = [Stream(texts, options.share, tokenizer.bos_token_id, rng) for _ in range(options.rows)]
    rows = [stream.windows(options.window) for stream in streams]
    decay_steps = round(1.035 * options.steps)  # the run ended a little before its schedule did
    warm_up = max(1, decay_steps // 20)
    schedule = optim.join_schedules(
        [
            optim.linear_schedule(0, options.lr, warm_up),
            optim.cosine_decay(options.lr, decay_steps - warm_up, 0.02 * options.lr),
        ],
        [warm_up],
    )
    optimizer = optim.AdamW(schedule, betas=[0.9, 0.95], weight_decay=0.05, bias_correction=True)
    windows = Windows(model, options.segment)
    state = windows.fresh_state(options.rows)
    average = dict(tree_flatten(model.parameters()))
    start = time.time()
    for step in range(options.steps):
        ids, new = (mx.array(np.stack(x)) for x in zip(*map(next, rows), strict=True))
        loss, gradients, state = windows.gradients(ids, new, state)
        gradients, norm = optim.clip_grad_norm(gradients, 1.0)
        optimizer.update(model, gradients)
        decay = min(0.97, (1 + step) / (10 + step))
        now = dict(tree_flatten(model.parameters()))
        average = {name: decay * x + (1 - decay) * now[name] for name, x in average.items()}
        mx.eval(model.parameters(), optimizer.state, average)
        print(f"{step}: loss {loss.item():.4f}, norm {norm.item():.3f}, {time.time() - start:.0f} s", flush=True)
    shutil.copytree(options.start, options.out, ignore=shutil.ignore_patterns("README.md", "model*.safetensors*"))
    mx.save_safetensors(str(options.out / "model.safetensors"), average)


if __name__ == "__main__":
    main()
