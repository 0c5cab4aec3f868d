"""Rows, columns and parts of weights, which a GGUF file has in another order than Hugging Face.

llama.cpp pairs the two numbers that RoPE rotates side by side, Hugging Face half a head apart. The
converters of Llama's relatives reorder the rows of q and k for that; the others rotate halves.

A delta net has R value heads for each of its G key heads. Hugging Face has those of a key head side
by side; Qwen3.5's files have the first ones of all key heads, then the second ones, and so on.

Two weights lie in two tensors each, n queries, keys or values of each head:

    in_proj_qkvz   (G·(k + k + R·v + R·v), in)   attn_qkv (G·k + G·k + G·R·v, in), attn_gate
    kv_b_proj      (N·(n + v), rank)             attn_k_b (N, rank, n), attn_v_b (N, v, rank)

Source: llama.cpp's `conversion/qwen.py` and `conversion/deepseek.py`.
"""

import numpy as np
from jaxtyping import Int, Shaped

from lora_jax.hf.gguf.architectures import GGUF_ARCHITECTURES
from lora_jax.hf.gguf.fields import DeltaHeads

# Modules whose rows some architectures reorder.
_REORDERED = ("q_proj", "k_proj")
# Modules of a delta net whose last rows are those of its value heads: whole heads, or one each.
_OF_VALUES = {
    **dict.fromkeys(("in_proj_qkv", "in_proj_z", "conv1d"), True),
    **dict.fromkeys(("in_proj_b", "in_proj_a", "A_log", "dt_bias"), False),
}


def row_order(
    architecture: str,
    module: str,
    rows: int,
    *,
    heads: int,
    kv_heads: int,
    delta: DeltaHeads | None = None,
) -> Int[np.ndarray, " rows"] | None:
    """Which of Hugging Face's rows each row of a file is; None where they are the same.

    Raises:
      ValueError: the rows are not whole heads.
    """
    row, last = GGUF_ARCHITECTURES[architecture], module.rpartition(".")[2]
    numbers = np.arange(rows)
    if row.permuted and last in _REORDERED:
        count = heads if last == "q_proj" else kv_heads
        if rows % (2 * count):
            raise ValueError(f"{rows} rows, not whole pairs for each of {count} heads")
        return numbers.reshape(count, 2, -1).swapaxes(1, 2).reshape(-1)
    if row.by_head and last == "query_key_value":
        if rows % (3 * heads):
            raise ValueError(f"{rows} rows, not three for each of {heads} heads")
        return numbers.reshape(heads, 3, -1).swapaxes(0, 1).reshape(-1)
    if row.in_turns and last in _OF_VALUES:
        return _in_turns(numbers, delta, whole=_OF_VALUES[last])
    return None


def column_order(
    architecture: str, module: str, columns: int, *, delta: DeltaHeads | None
) -> Int[np.ndarray, " columns"] | None:
    """As `row_order`, of a matrix's columns."""
    if GGUF_ARCHITECTURES[architecture].in_turns and module.endswith("linear_attn.out_proj"):
        return _in_turns(np.arange(columns), delta, whole=True)
    return None


def _in_turns(
    numbers: np.ndarray, delta: DeltaHeads | None, *, whole: bool
) -> Int[np.ndarray, " n"] | None:
    if delta is None:
        raise ValueError("heads of a delta net, of which no numbers are stated")
    if delta.keys == delta.values:
        return None
    size = delta.value_dim if whole else 1
    first = len(numbers) - delta.values * size
    if first < 0:
        raise ValueError(f"{len(numbers)} rows, not {size} for each of {delta.values} value heads")
    last = numbers[first:].reshape(delta.keys, -1, size).swapaxes(0, 1)
    return np.concatenate((numbers[:first], last.reshape(-1)))


def split_qkvz(
    w: Shaped[np.ndarray, "rows n"], delta: DeltaHeads
) -> tuple[Shaped[np.ndarray, "a n"], Shaped[np.ndarray, "b n"]]:
    """The rows of `in_proj_qkvz` as those of its two tensors.

    Raises:
      ValueError: the rows are not whole heads.
    """
    parts = _widths(delta)
    if len(w) != delta.keys * sum(parts):
        raise ValueError(f"{len(w)} rows, not {sum(parts)} for each of {delta.keys} key heads")
    each = np.split(w.reshape(delta.keys, -1, w.shape[1]), np.cumsum(parts)[:-1], axis=1)
    *qkv, gate = (x.reshape(-1, w.shape[1]) for x in each)
    return np.concatenate(qkv), gate


def join_qkvz(
    qkv: Shaped[np.ndarray, "a n"], gate: Shaped[np.ndarray, "b n"], delta: DeltaHeads
) -> Shaped[np.ndarray, "rows n"]:
    """The inverse of `split_qkvz`."""
    widths = _widths(delta)
    if (len(qkv), len(gate)) != (delta.keys * sum(widths[:3]), delta.keys * widths[3]):
        raise ValueError(f"{len(qkv)} and {len(gate)} rows, not those of its heads: {delta}")
    *parts, _ = np.split(np.concatenate((qkv, gate)), np.cumsum(widths) * delta.keys)
    return np.concatenate([x.reshape(delta.keys, -1, qkv.shape[1]) for x in parts], axis=1).reshape(
        -1, qkv.shape[1]
    )


def _widths(delta: DeltaHeads) -> tuple[int, ...]:
    values = delta.values // delta.keys * delta.value_dim
    return delta.key_dim, delta.key_dim, values, values


def split_kv(
    w: Shaped[np.ndarray, "rows rank"], heads: int, keys: int
) -> tuple[Shaped[np.ndarray, "h rank k"], Shaped[np.ndarray, "h v rank"]]:
    """The rows of `kv_b_proj` as its two tensors; `keys` rows of each head are a key's."""
    each = w.reshape(heads, -1, w.shape[1])
    return np.ascontiguousarray(each[:, :keys].swapaxes(1, 2)), each[:, keys:]


def join_kv(
    k: Shaped[np.ndarray, "h rank k"], v: Shaped[np.ndarray, "h v rank"]
) -> Shaped[np.ndarray, "rows rank"]:
    """The inverse of `split_kv`."""
    return np.concatenate((k.swapaxes(1, 2), v), axis=1).reshape(-1, v.shape[2])
