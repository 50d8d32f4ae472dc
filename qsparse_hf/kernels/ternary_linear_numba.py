"""The decode product with packed ternary weights on a CPU, compiled by Numba: reads two bits a kept weight.

Values become whole numbers of 16 bits, so that a vector register holds sums of as many outputs as it has 16 bits. Those
of several features are added before the sums are widened: `_ROWS` features, whose products are at most 254 each, stay
below 2^15.

T tokens, D features in, K of them kept, N features out; see `TernaryWeights` for the layout.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numba import prange
from torch import Tensor

from ..decode.weights import TernaryWeights
from ..modeling.sparsify import Survivors
from .numba_base import KINDS, bits_of, kernel, nothing, read, refuses_compiling, scales_of, threads_for, write

_BYTES = 1024
"""Bytes of a row that a thread works on at a time: its sums of four outputs a byte stay in the first cache."""
_ROWS = 64
"""Features whose products are added in 16 bits."""
_PARTS = 8
"""Parts in which values that are no whole numbers are summed."""


def _adder(shift: int) -> Callable[..., None]:
    """A kernel for one of the four codes in a byte: with its place known, sixteen bits of a register are one output."""

    @kernel()
    def add(levels, rows, codes, start, sums):
        """Add to `sums [B]`, int16, what bytes from `start` on contribute, for some features."""
        fours = levels.size // 4 * 4
        for k in range(0, fours, 4):
            v0, v1, v2, v3 = levels[k], levels[k + 1], levels[k + 2], levels[k + 3]
            row_0, row_1 = codes[rows[k], start:], codes[rows[k + 1], start:]
            row_2, row_3 = codes[rows[k + 2], start:], codes[rows[k + 3], start:]
            for n in range(sums.size):
                first = v0 * np.int16((row_0[n] >> shift) & 3) + v1 * np.int16((row_1[n] >> shift) & 3)
                second = v2 * np.int16((row_2[n] >> shift) & 3) + v3 * np.int16((row_3[n] >> shift) & 3)
                sums[n] = np.int16(sums[n] + first + second)
        for k in range(fours, levels.size):
            v0, row_0 = levels[k], codes[rows[k], start:]
            for n in range(sums.size):
                sums[n] = np.int16(sums[n] + v0 * np.int16((row_0[n] >> shift) & 3))

    return add


_add_first, _add_second, _add_third, _add_fourth = map(_adder, (0, 2, 4, 6))


@kernel()
def _add_levels(values, rows, codes, sums):
    """Add to `sums [4, N / 4]`, int32, levels `values [K]` times the codes 0 to 2 of these rows; return their sum."""
    total, width = np.int32(0), codes.shape[1]
    levels, narrow = np.empty(_ROWS, np.int16), np.empty(_BYTES, np.int16)
    for first in range(0, values.size, _ROWS):
        row = rows[first : first + _ROWS]
        level = levels[: row.size]
        for k in range(row.size):
            level[k] = np.int16(read(values[first + k]))
            total += level[k]
        for start in range(0, width, _BYTES):
            piece = narrow[: min(_BYTES, width - start)]
            for quarter in range(4):
                piece[:] = 0
                if quarter == 0:
                    _add_first(level, row, codes, start, piece)
                elif quarter == 1:
                    _add_second(level, row, codes, start, piece)
                elif quarter == 2:
                    _add_third(level, row, codes, start, piece)
                else:
                    _add_fourth(level, row, codes, start, piece)
                wide = sums[quarter, start:]
                for n in range(piece.size):
                    wide[n] += piece[n]
    return total


@kernel(fastmath={"contract", "nsz"})
def _add_values(values, rows, codes, sums):
    """As `_add_levels`, for values that are no whole numbers, in fp32."""
    total, width = np.float32(0), codes.shape[1]
    for k in range(values.size):
        value, row = read(values[k]), codes[rows[k]]
        total += value
        for quarter in range(4):
            shift, wide = np.uint8(2 * quarter), sums[quarter]
            for n in range(width):
                wide[n] += value * np.float32(row[n] >> shift & 3)
    return total


@kernel(parallel=True)
def _sum_levels(values, indices, codes, parts):
    """Sums `[T, P, 4, N / 4]` of parts of the kept rows, and of their values `[T, P]`: int32, exact in any order."""
    tokens, share = values.shape[0], (values.shape[1] + parts - 1) // parts
    sums, totals = np.zeros((tokens, parts, 4, codes.shape[1]), np.int32), np.empty((tokens, parts), np.int32)
    for work in prange(tokens * parts):
        token, part = work // parts, work % parts
        begin, end = part * share, (part + 1) * share
        totals[token, part] = _add_levels(values[token, begin:end], indices[token, begin:end], codes, sums[token, part])
    return sums, totals


@kernel(parallel=True)
def _sum_values(values, indices, codes):
    """As `_sum_levels` in fp32, in `_PARTS` parts: their number decides on rounding, that of threads does not."""
    tokens, share = values.shape[0], (values.shape[1] + _PARTS - 1) // _PARTS
    sums, totals = np.zeros((tokens, _PARTS, 4, codes.shape[1]), np.float32), np.empty((tokens, _PARTS), np.float32)
    for work in prange(tokens * _PARTS):
        token, part = work // _PARTS, work % _PARTS
        begin, end = part * share, (part + 1) * share
        totals[token, part] = _add_values(values[token, begin:end], indices[token, begin:end], codes, sums[token, part])
    return sums, totals


@kernel(parallel=True, fastmath={"contract", "nsz"})
def _finish(sums, totals, scale, weights, bias, residual, y):
    """`y [T, N]` of the parts' sums, less that of a token's values, as a weight is a code less one."""
    _, alpha, first, step = weights
    tokens, parts, _, width = sums.shape
    for work in prange(tokens * 4):
        token, quarter = work // 4, work % 4
        factor = scale[token] if scale.size else np.float32(1)
        total = totals[token, 0]
        for part in range(1, parts):
            total += totals[token, part]
        for n in range(width):
            summed = sums[token, 0, quarter, n]
            for part in range(1, parts):
                summed += sums[token, part, quarter, n]
            out = first[n] + quarter * step[n]
            value = np.float32(summed - total) * alpha[n] * factor
            if bias.size:
                value += read(bias[out])
            if residual.size:
                value = read(residual[token, out]) + read(write(value, y))
            y[token, out] = write(value, y)


@kernel()
def multiply_codes(values, indices, scale, weights, bias, residual, threads, y):
    """`y [T, N]` from values and indices `[T, K]`, and weights as `TernaryWeights.arrays` has them.

    Values are levels where there is a scale. An empty scale, bias or residual is none.
    """
    if scale.size:
        levels, their_total = _sum_levels(values, indices, weights[0], max(1, threads // values.shape[0]))
        _finish(levels, their_total, scale, weights, bias, residual, y)
    else:
        sums, total = _sum_values(values, indices, weights[0])
        _finish(sums, total, scale, weights, bias, residual, y)


class NumbaTernaryLinear:
    """The decode product on these kernels."""

    def refuses(self, tensors: Sequence[Tensor], asked: bool) -> str | None:
        return refuses_compiling(tensors, asked)

    def product(self, kept: Survivors, weights: TernaryWeights, bias: Tensor | None, residual: Tensor | None) -> Tensor:
        values, indices, scale = kept
        integer, _ = KINDS[values.dtype]
        tokens, count = math.prod(values.shape[:-1]), values.shape[-1]
        features = weights.shape[1]
        y = values.new_empty(*values.shape[:-1], features)

        def bits(each: Tensor | None, *shape: int) -> np.ndarray:
            return nothing(integer, len(shape)) if each is None else bits_of(each).reshape(shape)

        lists = bits(values, tokens, count), indices.contiguous().numpy().reshape(tokens, count), scales_of(scale)
        added = bits(bias, features), bits(residual, tokens, features)
        with threads_for(tokens * count * features):
            multiply_codes(*lists, weights.arrays, *added, torch.get_num_threads(), bits(y, tokens, features))
        return y
