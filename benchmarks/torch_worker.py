"""A PyTorch implementation with the official interface, TTTConfig and TTTForCausalLM in one file, measured alike.

Needs torch and what that file needs, and nothing of this project, so it may run in another environment.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import sys
import time
from pathlib import Path

import torch

from .protocol import WARM_UP, resident_bytes, serve


class Model:
    """What mlx_worker.Model is, with the implementation's own cache, called as its `generate` calls it."""

    def __init__(self, file: str, config: dict, threads: int):
        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        self.config = config
        self.code = _load(Path(file))
        self.model = self._build(config)
        self.states: dict[int, object] = {}
        self.prefill(16)  # whatever is allocated once
        self.decode(16, 16)

    def _build(self, config: dict):
        torch.manual_seed(0)
        return self.code.TTTForCausalLM(self.code.TTTConfig(**config)).eval()

    def describe(self) -> dict:
        tied = {w.data_ptr(): w.numel() for w in self.model.parameters()}
        return {"parameters": sum(tied.values()), "torch": torch.__version__, "threads": torch.get_num_threads()}

    def prefill(self, tokens: int) -> dict:
        """Read a prompt up to the first new token.

        Returns:
            seconds with the logits of the last position only; seconds with those of all positions, which is what the
            official `forward` computes; bytes of the state; the largest resident memory so far, in a first call, before
            and after the logits of all positions.
        """
        prompt = torch.randint(0, self.config["vocab_size"], (1, tokens))
        start = time.perf_counter()
        hidden, cache = self._backbone(self.model, prompt, None)
        read = time.perf_counter()
        self._next(self.model, hidden)
        seconds = time.perf_counter() - start
        resident = resident_bytes()
        before = time.perf_counter()
        self.model.lm_head(hidden)
        logits = time.perf_counter() - before
        self.states[tokens] = cache
        return {
            "seconds": seconds,
            "seconds_all_logits": read - start + logits,
            "state_bytes": _bytes(vars(cache)),
            "resident_bytes": resident,
            "resident_bytes_all_logits": resident_bytes(),
        }

    def decode(self, context: int, tokens: int) -> dict:
        """Write `tokens` tokens after a prompt that has been read. Returns seconds and bytes, as `prefill` does."""
        cache = copy.deepcopy(self.states[context])
        token = torch.zeros((1, 1), dtype=torch.long)
        for n in range(WARM_UP + tokens):
            if n == WARM_UP:
                start = time.perf_counter()
            hidden, cache = self._backbone(self.model, token, cache)
            token = self._next(self.model, hidden).argmax(-1, keepdim=True)
            token.item()
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "state_bytes": _bytes(vars(cache)), "resident_bytes": resident_bytes()}

    def check(self, folder: str, config: dict, prompt: list[int], tokens: int) -> dict:
        """Continue a prompt greedily with a small random model, whose checkpoint is left in the folder."""
        model = self._build(config)
        for w in model.parameters():
            w.add_(0.1 * torch.randn(w.shape))
        torch.save(model.state_dict(), Path(folder, "pytorch_model.bin"))
        Path(folder, "config.json").write_text(json.dumps(config))
        token, cache, steps = torch.tensor([prompt]), None, []
        for _ in range(tokens):
            hidden, cache = self._backbone(model, token, cache)
            steps.append(self._next(model, hidden).log_softmax(-1)[0])
            token = steps[-1].argmax().reshape(1, 1)
        return {"tokens": [int(s.argmax()) for s in steps], "logprobs": [s.tolist() for s in steps]}

    def step(self, tokens: int) -> dict:
        """One training step: the gradients of the mean cross entropy of a random text.

        Returns:
            seconds of it, and of the processor; the loss; the largest resident memory of the process so far, in bytes.
        """
        ids = torch.randint(0, self.config["vocab_size"], (1, tokens + 1))
        self.model.zero_grad(set_to_none=True)
        start, busy = time.perf_counter(), time.process_time()
        with torch.enable_grad():
            logits = self.model(input_ids=ids[:, :-1], use_cache=False).logits
            loss = torch.nn.functional.cross_entropy(logits[0], ids[0, 1:])
            loss.backward()
        return {
            "seconds": time.perf_counter() - start,
            "busy_seconds": time.process_time() - busy,
            "loss": loss.item(),
            "resident_bytes": resident_bytes(),
        }

    @staticmethod
    def _backbone(model, ids: torch.Tensor, cache) -> tuple[torch.Tensor, object]:
        """Hidden states [1, T, C] of tokens [1, T] after those that the cache has read, and the cache."""
        output = model.model(input_ids=ids, cache_params=cache, use_cache=True)
        return output.last_hidden_state, output.cache_params

    @staticmethod
    def _next(model, hidden: torch.Tensor) -> torch.Tensor:
        """Logits of the last position, [1, V]."""
        return model.lm_head(hidden[:, -1]).float()


def _load(file: Path):
    """The file as a module."""
    spec = importlib.util.spec_from_file_location("torch_reference", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def _bytes(tree) -> int:
    if isinstance(tree, torch.Tensor):
        return tree.numel() * tree.element_size()
    return sum(map(_bytes, tree.values())) if isinstance(tree, dict) else 0


if __name__ == "__main__":
    serve(Model)
