"""A writer of the official JAX implementation's streams, and a plain reader, without JAX: for tests and benchmarks."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import msgpack
import numpy as np

# Official PyTorch name; JAX key, its parts separated by spaces; how the axes are reordered.
_NAMES = {
    name: (key, axes)
    for name, key, axes in (
        ("model.embed_tokens.weight", "model wte embedding", "vc->vc"),
        ("model.norm.weight", "model ln_f kernel", "c->c"),
        ("lm_head.weight", "lm_head kernel", "vc->cv"),
        ("seq_norm.weight", "seq_norm kernel", "c->c"),
        ("ffn_norm.weight", "ffn_norm kernel", "c->c"),
        ("mlp.gate_proj.weight", "feed_forward w1 kernel", "ic->ci"),
        ("mlp.down_proj.weight", "feed_forward w2 kernel", "ci->ic"),
        ("mlp.up_proj.weight", "feed_forward w3 kernel", "ic->ci"),
        ("conv.norm.weight", "conv conv_norm kernel", "c->c"),
        ("conv.conv.weight", "conv conv1 kernel", "cok->koc"),
        ("conv.conv.bias", "conv conv1 bias", "c->c"),
        ("q_proj.weight", "seq_modeling_block wq kernel", "yx->xy"),
        ("k_proj.weight", "seq_modeling_block wk kernel", "yx->xy"),
        ("v_proj.weight", "seq_modeling_block wv kernel", "yx->xy"),
        ("o_proj.weight", "seq_modeling_block wo kernel", "yx->xy"),
        ("g_proj.weight", "seq_modeling_block wg kernel", "yx->xy"),
        ("conv_q.weight", "seq_modeling_block conv_q kernel", "cok->koc"),
        ("conv_k.weight", "seq_modeling_block conv_k kernel", "cok->koc"),
        ("conv_q.bias", "seq_modeling_block conv_q bias", "c->c"),
        ("conv_k.bias", "seq_modeling_block conv_k bias", "c->c"),
        ("learnable_ttt_lr_weight", "seq_modeling_block learnable_ttt_lr/kernel", "hoc->hco"),
        ("learnable_ttt_lr_bias", "seq_modeling_block learnable_ttt_lr/bias", "ho->ho"),
        ("learnable_token_idx", "seq_modeling_block learnable_token_idx", "k->k"),
        ("ttt_norm_weight", "seq_modeling_block ttt_norm/scale", "hd->hd"),
        ("ttt_norm_bias", "seq_modeling_block ttt_norm/bias", "hd->hd"),
        ("post_norm.weight", "seq_modeling_block post_norm scale", "c->c"),
        ("post_norm.bias", "seq_modeling_block post_norm bias", "c->c"),
        ("W1", "seq_modeling_block ttt_dense_0", "hde->hde"),
        ("b1", "seq_modeling_block ttt_bias_0", "hoe->hoe"),
        ("W2", "seq_modeling_block ttt_dense_1", "hed->hed"),
        ("b2", "seq_modeling_block ttt_bias_1", "hod->hod"),
    )
}
Key = tuple[str, ...]


def jax_key(name: str) -> tuple[Key, str]:
    """The JAX key of an official parameter, and the order of its axes for numpy.einsum."""
    layer = re.fullmatch(r"model\.layers\.(\d+)\.(?:seq_modeling_block\.)?(.+)", name)
    key, axes = _NAMES[layer[2] if layer else name]
    return (("model", "h", layer[1]) if layer else ()) + tuple(key.split()), axes


def jax_arrays(weights: Mapping[str, np.ndarray]) -> dict[Key, np.ndarray]:
    """Official PyTorch weights with the JAX implementation's keys and order of axes."""
    return {key: np.einsum(axes, array) for name, array in weights.items() for key, axes in (jax_key(name),)}


def train_state(parameters: Mapping[Key, object]) -> dict[Key, object]:
    """A training state: the parameters, and a step count and Adam's moments, which must not be mistaken for them."""
    moments = {
        ("opt_state", "1", "0", moment, "params", *key): np.full(3, 7.0, np.float32)
        for moment in ("mu", "nu")
        for key in parameters
    }
    count = {("opt_state", "1", "0", "count"): np.array(5, np.int32)}
    own = {("params", "params", *key): value for key, value in parameters.items()}
    return {("step",): np.array(5, np.int32)} | own | count | moments


def ndarray(array: np.ndarray, dtype: str | None = None) -> msgpack.ExtType:
    """An array as Flax packs it; `dtype` gives it another name."""
    content = (array.shape, dtype or array.dtype.name, array.tobytes())
    return msgpack.ExtType(1, msgpack.packb(content, use_bin_type=True))


def bfloat16(array: np.ndarray) -> msgpack.ExtType:
    """A float32 array in bfloat16, rounded towards zero."""
    return ndarray((array.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16), "bfloat16")


def chunked(array: np.ndarray, size: int) -> dict:
    """An array as Flax packs one that is too large: in pieces of `size` elements."""
    flat = array.reshape(-1)
    pieces = [flat[i : i + size] for i in range(0, flat.size, size)]
    return {
        "__msgpack_chunked_array__": True,
        "shape": {str(axis): n for axis, n in enumerate(array.shape)},
        "chunks": {str(i): ndarray(piece) for i, piece in enumerate(pieces)},
    }


def record(key: Iterable[object], value: object) -> bytes:
    """One pair of a stream. Arrays are packed by `ndarray`, other values as they are."""
    value = ndarray(value) if isinstance(value, np.ndarray) else value
    return msgpack.packb((tuple(key), msgpack.packb(value)))


def write_stream(path: Path, values: Mapping[Key, object]) -> Path:
    with path.open("wb") as file:
        for key, value in values.items():
            file.write(record(key, value))
    return path


def read_stream(data: bytes) -> dict[str, np.ndarray]:
    """The parameters of a train state by path, as the msgpack package and NumPy read them."""
    records = ((key, value) for key, value in msgpack.Unpacker(io.BytesIO(data)) if key[:2] == ["params", "params"])
    return {"/".join(key[2:]): _array(msgpack.unpackb(value, ext_hook=_unpack)) for key, value in records}


def _unpack(code: int, data: bytes) -> np.ndarray:
    shape, dtype, buffer = msgpack.unpackb(data)
    return np.frombuffer(buffer, dtype).reshape(shape)


def _array(value: np.ndarray | dict) -> np.ndarray:
    if isinstance(value, dict):
        return np.concatenate(list(value["chunks"].values())).reshape(list(value["shape"].values()))
    return value


def official_arrays(arrays: Mapping[str, np.ndarray], names: Iterable[str]) -> dict[str, np.ndarray]:
    """The inverse of `jax_arrays`, for parameters of these official names."""
    reverse = {name: (key, "->".join(reversed(axes.split("->")))) for name in names for key, axes in (jax_key(name),)}
    return {name: np.einsum(axes, arrays["/".join(key)]) for name, (key, axes) in reverse.items()}
