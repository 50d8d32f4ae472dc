"""The decode product on a CPU, compiled by Numba: reads the kept rows of the weight at the speed of memory.

Arrays hold the bits of floats as integers, see `numba_base.py`. T tokens, D features in, K of them kept, N features
out.
"""

import math
from collections.abc import Sequence

import numpy as np
from numba import prange
from torch import Tensor

from ..decode.weights import FloatWeights
from ..modeling.sparsify import Survivors
from .numba_base import (
    KINDS,
    bits_of,
    kernel,
    nothing,
    prefetch,
    read,
    refuses_compiling,
    scales_of,
    threads_for,
    write,
)

_LINE = 32
"""Values of 16 bits in a cache line."""
_PARTS = 8
"""Number of parts in which the kept rows are summed, whatever the number of threads."""
_PIECE = 1024
"""Output features that one thread finishes together."""


@kernel(parallel=True, fastmath={"contract", "nsz"})
def multiply_rows(values, indices, scale, weights, bias, residual, y):
    """`y [T, N] = (values @ weights[indices]) * scale + bias + residual`; an empty scale, bias or residual is none.

    `_PARTS` parts of the kept rows are summed in parallel, in fp32, and then added up, in the same order for any number
    of threads. Four rows are read at a time: four streams from memory for one load and store of the sums. The
    beginnings of the next four rows are prefetched; the rest of a row the processor prefetches by itself.
    """
    (weight,) = weights
    tokens, kept = values.shape
    features = weight.shape[1]
    share = ((kept + _PARTS - 1) // _PARTS + 3) // 4 * 4
    partial_sums = np.zeros((tokens, _PARTS, features), np.float32)
    for work in prange(tokens * _PARTS):
        token, part = work // _PARTS, work % _PARTS
        value, row, sums = values[token], indices[token], partial_sums[token, part]
        first, end = min(part * share, kept), min((part + 1) * share, kept)
        fours = first + (end - first) // 4 * 4
        for k in range(first, fours, 4):
            v0, v1, v2, v3 = read(value[k]), read(value[k + 1]), read(value[k + 2]), read(value[k + 3])
            row_0, row_1, row_2, row_3 = weight[row[k]], weight[row[k + 1]], weight[row[k + 2]], weight[row[k + 3]]
            for following in range(k + 4, min(k + 8, end)):
                next_row = weight[row[following]]
                for n in range(0, min(features, 4 * _LINE), _LINE):
                    prefetch(next_row, n)
            for n in range(features):
                sums[n] += (v0 * read(row_0[n]) + v1 * read(row_1[n])) + (v2 * read(row_2[n]) + v3 * read(row_3[n]))
        for k in range(fours, end):
            v0, row_0 = read(value[k]), weight[row[k]]
            for n in range(features):
                sums[n] += v0 * read(row_0[n])
    for piece in prange((features + _PIECE - 1) // _PIECE):
        start, end = piece * _PIECE, min((piece + 1) * _PIECE, features)
        for token in range(tokens):
            sums = partial_sums[token, 0]
            for part in range(1, _PARTS):
                for n in range(start, end):
                    sums[n] += partial_sums[token, part, n]
            if scale.size:
                for n in range(start, end):
                    sums[n] *= scale[token]
            if bias.size:
                for n in range(start, end):
                    sums[n] += read(bias[n])
            if residual.size:
                for n in range(start, end):
                    y[token, n] = write(read(residual[token, n]) + read(write(sums[n], y)), y)
            else:
                for n in range(start, end):
                    y[token, n] = write(sums[n], y)


class NumbaSparseLinear:
    """The decode product on these kernels."""

    def refuses(self, tensors: Sequence[Tensor], asked: bool) -> str | None:
        return refuses_compiling(tensors, asked)

    def product(self, kept: Survivors, weights: FloatWeights, bias: Tensor | None, residual: Tensor | None) -> Tensor:
        values, indices, scale = kept
        weight = weights.values
        integer, _ = KINDS[weight.dtype]
        tokens, count, features = math.prod(values.shape[:-1]), values.shape[-1], weight.shape[1]
        y = values.new_empty(*values.shape[:-1], features)

        def bits(each: Tensor | None, *shape: int) -> np.ndarray:
            return nothing(integer, len(shape)) if each is None else bits_of(each).reshape(shape)

        lists = bits(values, tokens, count), indices.contiguous().numpy().reshape(tokens, count), scales_of(scale)
        added = bits(bias, features), bits(residual, tokens, features)
        with threads_for(tokens * count * features):
            multiply_rows(*lists, (bits(weight, *weight.shape),), *added, bits(y, tokens, features))
        return y
