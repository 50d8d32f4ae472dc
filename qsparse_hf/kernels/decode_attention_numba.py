"""Attention for one token on a CPU, compiled by Numba.

Arrays hold the bits of floats as integers, see `numba_base.py`. B sequences, H heads, L entries of the KV cache, d head
size.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from numba import prange
from torch import Tensor

from .numba_base import bits_of, kernel, nothing, read, refuses_compiling, threads_for, write


@kernel(parallel=True, fastmath={"contract", "nsz", "reassoc"})
def attend_kernel(query, keys, values, bias, scaling, y):
    """Fill `y [B, H, d]` for `query` alike, `keys` and `values [B, H / G, L, d]`, and `bias [B, L]` or an empty one.

    Each head is computed by one thread, which reads the head's keys and values once.
    """
    sequences, heads, d = query.shape
    entries, group = keys.shape[2], heads // keys.shape[1]
    for work in prange(sequences * heads):
        sequence, head = work // heads, work % heads
        scaled, weights = np.empty(d, np.float32), np.empty(entries, np.float32)
        for i in range(d):
            scaled[i] = read(query[sequence, head, i]) * scaling
        for entry in range(entries):
            key = keys[sequence, head // group, entry]
            score = np.float32(0)
            for i in range(d):
                score += scaled[i] * read(key[i])
            weights[entry] = score + bias[sequence, entry] if bias.size else score
        largest, total = weights.max(), np.float32(0)
        if largest == -np.inf:  # all entries are masked: zeros, as from PyTorch's attention
            largest, total = np.float32(0), np.float32(1)
        for entry in range(entries):
            weights[entry] = np.exp(weights[entry] - largest)
            total += weights[entry]
        sums = np.zeros(d, np.float32)
        for entry in range(entries):
            value = values[sequence, head // group, entry]
            for i in range(d):
                sums[i] += weights[entry] * read(value[i])
        for i in range(d):
            y[sequence, head, i] = write(sums[i] / total, y)


def scores_of(mask: Tensor | None, sequences: int, entries: int) -> np.ndarray:
    """What a mask (see `decode.attention.attend`) adds to the scores, fp32 `[B, L]`; no elements where it is None."""
    if mask is None:
        return nothing(torch.float32, 2)
    if mask.dtype == torch.bool:
        mask = mask.new_zeros(mask.shape, dtype=torch.float32).masked_fill_(~mask, -math.inf)
    return mask.float().expand(sequences, 1, 1, entries)[:, 0, 0].contiguous().numpy()


class NumbaAttend:
    """`attend` of `decode/attention.py` without grouped heads: for these PyTorch's attention is faster."""

    def refuses(self, tensors: Sequence[Tensor], asked: bool) -> str | None:
        query, keys = tensors[0], tensors[1]
        if query.shape[1] != keys.shape[1]:
            return f"its kernel takes as many key-value heads as heads, and got {keys.shape[1]} and {query.shape[1]}"
        return refuses_compiling(tensors, asked)

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
        sequences, heads, _, d = query.shape
        y = query.new_empty(sequences, 1, heads, d)
        bias = scores_of(mask, sequences, keys.shape[2])
        with threads_for(2 * keys.numel()):
            attend_kernel(
                bits_of(query).reshape(sequences, heads, d),
                bits_of(keys),
                bits_of(values),
                bias,
                np.float32(scaling),
                bits_of(y).reshape(sequences, heads, d),
            )
        return y
