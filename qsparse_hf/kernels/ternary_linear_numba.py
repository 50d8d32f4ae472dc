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
def _sum_levels(values, rows, codes, narrow, sums):
    """Add to `sums [4, N / 4]`, int32, levels `values [K]` times the codes 0 to 2 of these rows; return their sum."""
    total, width = np.int32(0), codes.shape[1]
    levels = np.empty(_ROWS, np.int16)
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
def _sum_values(values, rows, codes, narrow, sums):
    """As `_sum_levels`, for values that are no whole numbers, in fp32."""
    total, width = np.float32(0), codes.shape[1]
    for k in range(values.size):
        value, row = read(values[k]), codes[rows[k]]
        total += value
        for quarter in range(4):
            shift, wide = np.uint8(2 * quarter), sums[quarter]
            for n in range(width):
                wide[n] += value * np.float32(row[n] >> shift & 3)
    return total


def _multiplier(add: Callable, kind: type, fixed: int) -> Callable[..., None]:
    """The product by one of the two ways to sum, in numbers of a kind; in a fixed number of parts unless that is 0."""

    @kernel(parallel=True, fastmath={"contract", "nsz"})
    def multiply(values, indices, scale, weights, bias, residual, threads, y):
        """`y [T, N]` from values and indices `[T, K]`, whose parts are summed in parallel.

        A weight is a code less one, so the sum of a token's values is taken off at the end. An empty scale, bias or
        residual is none.
        """
        codes, alpha, first, step = weights
        tokens, width = values.shape[0], codes.shape[1]
        count = fixed if fixed else threads
        sums, totals = np.empty((tokens, count, 4, width), kind), np.empty((tokens, count), kind)
        share = (values.shape[1] + count - 1) // count
        for work in prange(tokens * count):
            token, part = work // count, work % count
            begin, end = part * share, (part + 1) * share
            narrow = np.empty(_BYTES, np.int16)
            sums[token, part] = 0
            totals[token, part] = add(
                values[token, begin:end], indices[token, begin:end], codes, narrow, sums[token, part]
            )
        for work in prange(tokens * 4):
            token, quarter = work // 4, work % 4
            factor = scale[token] if scale.size else np.float32(1)
            total = totals[token, 0]
            for part in range(1, count):
                total += totals[token, part]
            for n in range(width):
                summed = sums[token, 0, quarter, n]
                for part in range(1, count):
                    summed += sums[token, part, quarter, n]
                out = first[n] + quarter * step[n]
                value = np.float32(summed - total) * alpha[n] * factor
                if bias.size:
                    value += read(bias[out])
                if residual.size:
                    value = read(residual[token, out]) + read(write(value, y))
                y[token, out] = write(value, y)

    return multiply


# Sums of whole numbers are exact, so that their order does not matter. That of others depends on the number of parts.
multiply_levels, multiply_values = _multiplier(_sum_levels, np.int32, 0), _multiplier(_sum_values, np.float32, 8)


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
        multiply = multiply_values if scale is None else multiply_levels
        with threads_for(tokens * count * features):
            multiply(*lists, weights.arrays, *added, torch.get_num_threads(), bits(y, tokens, features))
        return y
