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


@kernel(parallel=True)
def _sum_levels(levels, indices, codes, sums):
    """Whole numbers `sums [T, P, 4, N / 4]` of P parts of the kept rows: `levels [T, K]` times codes 0 to 2.

    Sums of whole numbers are exact, so that their order does not matter.
    """
    tokens, parts, _, width = sums.shape
    share = (levels.shape[1] + parts - 1) // parts
    for work in prange(tokens * parts):
        token, part = work // parts, work % parts
        begin, end = min(part * share, levels.shape[1]), min((part + 1) * share, levels.shape[1])
        narrow = np.empty(_BYTES, np.int16)
        for first in range(begin, end, _ROWS):
            last = min(first + _ROWS, end)
            value, row = levels[token, first:last], indices[token, first:last]
            for start in range(0, width, _BYTES):
                piece = narrow[: min(_BYTES, width - start)]
                for quarter in range(4):
                    piece[:] = 0
                    if quarter == 0:
                        _add_first(value, row, codes, start, piece)
                    elif quarter == 1:
                        _add_second(value, row, codes, start, piece)
                    elif quarter == 2:
                        _add_third(value, row, codes, start, piece)
                    else:
                        _add_fourth(value, row, codes, start, piece)
                    wide = sums[token, part, quarter, start:]
                    for n in range(piece.size):
                        wide[n] += piece[n]


@kernel(parallel=True, fastmath={"contract", "nsz"})
def _sum_values(values, indices, codes, sums):
    """As `_sum_levels`, for values that are no whole numbers: sums in fp32, the parts' number decides their order."""
    tokens, parts, _, width = sums.shape
    share = (values.shape[1] + parts - 1) // parts
    for work in prange(tokens * parts):
        token, part = work // parts, work % parts
        begin, end = min(part * share, values.shape[1]), min((part + 1) * share, values.shape[1])
        for k in range(begin, end):
            value, row = read(values[token, k]), codes[indices[token, k]]
            for quarter in range(4):
                shift, wide = np.uint8(2 * quarter), sums[token, part, quarter]
                for n in range(width):
                    wide[n] += value * np.float32(row[n] >> shift & 3)


@kernel(parallel=True, fastmath={"contract", "nsz"})
def _finish(sums, totals, scale, alpha, first, step, bias, residual, y):
    """`y [T, N]` of the parts' sums, less a token's sum of values, as a weight is a code minus one."""
    tokens, parts, _, width = sums.shape
    for work in prange(tokens * 4):
        token, quarter = work // 4, work % 4
        factor = scale[token] if scale.size else np.float32(1)
        for n in range(width):
            total = sums[token, 0, quarter, n]
            for part in range(1, parts):
                total += sums[token, part, quarter, n]
            out = first[n] + quarter * step[n]
            value = np.float32(total - totals[token]) * alpha[n] * factor
            if bias.size:
                value += read(bias[out])
            if residual.size:
                value = read(residual[token, out]) + read(write(value, y))
            y[token, out] = write(value, y)


_PARTS = 8
"""Number of parts in which values that are no whole numbers are summed, whatever the number of threads."""


class NumbaTernaryLinear:
    """The decode product on these kernels."""

    def refuses(self, tensors: Sequence[Tensor], asked: bool) -> str | None:
        return refuses_compiling(tensors, asked)

    def product(self, kept: Survivors, weights: TernaryWeights, bias: Tensor | None, residual: Tensor | None) -> Tensor:
        values, indices, scale = kept
        integer, _ = KINDS[values.dtype]
        tokens, count = math.prod(values.shape[:-1]), values.shape[-1]
        features, width = weights.shape[1], weights.codes.shape[1]
        y = values.new_empty(*values.shape[:-1], features)

        def bits(each: Tensor | None, *shape: int) -> np.ndarray:
            return nothing(integer, len(shape)) if each is None else bits_of(each).reshape(shape)

        rows = indices.contiguous().numpy().reshape(tokens, count)
        values = values.reshape(tokens, count)
        codes, alpha, first, step = (each.numpy() for each in weights.tensors())
        with threads_for(tokens * count * features):
            if scale is None:
                sums = np.zeros((tokens, _PARTS, 4, width), np.float32)
                totals = values.sum(-1, dtype=torch.float32).numpy()
                _sum_values(bits(values, tokens, count), rows, codes, sums)
            else:
                levels = values.to(torch.int16)
                sums = np.zeros((tokens, torch.get_num_threads(), 4, width), np.int32)
                totals = levels.sum(-1, dtype=torch.int32).numpy()
                _sum_levels(levels.numpy(), rows, codes, sums)
            added = bits(bias, features), bits(residual, tokens, features)
            _finish(sums, totals, scales_of(scale), alpha, first, step, *added, bits(y, tokens, features))
        return y
