"""The model card: README.md of a model directory, as the Hugging Face Hub shows it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from ..network.args import ModelArgs
from ..version import __version__
from .directory import MODEL_FILE
from .hub import Located, address
from .quantization import Quantization
from .source import Source
from .untrusted import quoted

_NO_MARKUP = str.maketrans("`|", "'/")
_HASHED_AT_ONCE = 1 << 22  # bytes


def model_card(
    name: str,
    args: ModelArgs,
    located: Located,
    source: Source,
    parameters: int,
    bytes_by_dtype: Mapping[str, int],
    quantization: Quantization | None,
) -> str:
    """The text of a card: what the model is, where it comes from and how to use it.

    It reads all weights files of the source, for their hashes.

    Args:
        name: by which the model will be loaded: a repository or a folder.
        located: where the checkpoint was found.
        source: the checkpoint.
        parameters: how many the model has.
        bytes_by_dtype: the size of the converted weights.
        quantization: of the converted weights.
    """
    nbytes = sum(bytes_by_dtype.values())
    if located.repo:
        origin = f"[{located.repo}]({address(located.repo, located.commit)})"
    else:
        origin = _code(source.path.absolute().name)
    dtypes = ", ".join(dtype for dtype in bytes_by_dtype if dtype not in ("uint32", "uint8"))
    precision = (
        f"projections and embeddings whose rows divide into groups in {quantization}; the rest in {dtypes}"
        if quantization
        else dtypes
    )
    hashes = "".join(f"| {_code(file.name)} | `{_sha256(file)}` |\n" for file in source.files)
    base_model = f"base_model: {located.repo}\n" if located.repo else ""
    title, loaded = quoted(name), json.dumps(name, ensure_ascii=not name.isprintable())
    return f"""---
library_name: mlx
pipeline_tag: text-generation
tags: [mlx, ttt, test-time-training]
{base_model}---
# {title}
A {args.kind} language model of {parameters / 1e6:.2f} M parameters for [MLX](https://github.com/ml-explore/mlx): a
recurrent network whose hidden state is itself a small model, trained on every token it reads (Sun et al. 2024,
arXiv 2407.04620).

- **Network**: {args.sizes}.
- **Converted from** {origin} ({source.format}) with `mlx_ttt` {__version__}. Its license applies.
- **Precision**: {precision}. The inner model is float32.
- **Size**: {nbytes / 1e6:.1f} MB, {8 * nbytes / parameters:.2f} bits per weight.

| file it was converted from | SHA-256 |
|---|---|
{hashes}
## Use
With `mlx_ttt`:

```python
import mlx_ttt

model, tokenizer = mlx_ttt.load({loaded})
print(mlx_ttt.generate(model, tokenizer, "Once upon a time", max_tokens=100))
```

With mlx-lm, where `mlx_ttt` is installed:

```python
from mlx_lm import generate, load

model, tokenizer = load({loaded}, trust_remote_code=True)  # runs {MODEL_FILE}, which imports mlx_ttt
print(generate(model, tokenizer, "Once upon a time", max_tokens=100))
```
"""


def _code(name: str) -> str:
    """A file's name as code in a table, without the characters that would end the code or the cell."""
    return f"`{quoted(name).translate(_NO_MARKUP)}`"


def _sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(_HASHED_AT_ONCE):
            digest.update(part)
    return digest.hexdigest()
