"""A decode step's selection and product on a CPU, compiled by Numba.

The product reads the kept rows as fast as memory gives them; the selection finds the K-th magnitude digit by digit from
histograms, without sorting. PyTorch's own operators do both too, with some fifty microseconds of their own each time.

Floats of 16 bits come as `uint16`, of 32 bits as `uint32`, as Numba knows no bfloat16. T tokens, D features in, K of
them kept, N features out.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

try:
    import numba
    import numpy as np
    from llvmlite import ir
    from numba import njit, prange, types
    from numba.extending import intrinsic
except ImportError as error:
    raise ImportError("these kernels need the package numba") from error

_PIECE = 64
"""Columns that a thread's part of a row is a multiple of: of no cache line do two threads write halves."""
_SMALL = 64
"""Up to how many features a block's ranks are counted one against all."""


@intrinsic
def _from_bfloat16(context, bits):
    def generate(context, builder, signature, arguments):
        wide = builder.shl(builder.zext(arguments[0], ir.IntType(32)), ir.Constant(ir.IntType(32), 16))
        return builder.bitcast(wide, ir.FloatType())

    return types.float32(types.uint16), generate


@intrinsic
def _from_float16(context, bits):
    def generate(context, builder, signature, arguments):
        return builder.fpext(builder.bitcast(arguments[0], ir.HalfType()), ir.FloatType())

    return types.float32(types.uint16), generate


@intrinsic
def _from_float32(context, bits):
    def generate(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.uint32), generate


def _make_product(read: Callable) -> Callable:
    @njit(parallel=True, fastmath={"contract", "nsz"}, nogil=True)
    def sum_rows(values, indices, weight, y, parts):
        """`y [T, N] = values @ weight[indices]`, in fp32; each of the parts of N sees its sums through."""
        tokens, kept = values.shape
        features = weight.shape[1]
        piece = ((features + parts - 1) // parts + _PIECE - 1) // _PIECE * _PIECE
        for part in prange(parts):
            start = part * piece
            size = min(start + piece, features) - start
            for token in range(tokens if size > 0 else 0):
                sums = np.zeros(size, np.float32)
                for k in range(0, kept - 1, 2):  # two rows at a time: their sums are loaded and stored once
                    first, second = read(values[token, k]), read(values[token, k + 1])
                    first_row = weight[indices[token, k], start : start + size]
                    second_row = weight[indices[token, k + 1], start : start + size]
                    for n in range(size):
                        sums[n] += first * read(first_row[n]) + second * read(second_row[n])
                if kept % 2:
                    first = read(values[token, kept - 1])
                    first_row = weight[indices[token, kept - 1], start : start + size]
                    for n in range(size):
                        sums[n] += first * read(first_row[n])
                y[token, start : start + size] = sums

    return sum_rows


@njit(nogil=True)
def _select(bits, magnitude_bits, infinity, block, keep, values, indices):
    """The `keep` largest of each block, lowest index first among equals: their bits and places, by index."""
    tokens, features = bits.shape
    mask = (1 << magnitude_bits) - 1
    magnitudes = np.empty(block, np.int64)
    histogram = np.empty(256, np.int64)
    for token in range(tokens):
        place = 0
        for start in range(0, features, block):
            for i in range(block):
                magnitudes[i] = min(np.int64(bits[token, start + i]) & mask, infinity + 1)  # NaN is largest
            if block <= _SMALL:
                for i in range(block):
                    before = 0
                    for j in range(block):
                        before += (magnitudes[j] > magnitudes[i]) | ((magnitudes[j] == magnitudes[i]) & (j < i))
                    if before < keep:
                        values[token, place], indices[token, place] = bits[token, start + i], start + i
                        place += 1
                continue
            threshold, wanted, shift = np.int64(0), keep, (magnitude_bits - 1) // 8 * 8
            above = np.int64(0)  # the digits that are decided
            while shift >= 0:
                histogram[:] = 0
                for i in range(block):
                    if magnitudes[i] >> (shift + 8) == above:
                        histogram[(magnitudes[i] >> shift) & 255] += 1
                digit = 255
                while histogram[digit] < wanted:
                    wanted -= histogram[digit]
                    digit -= 1
                above = (above << 8) | digit
                shift -= 8
            threshold = above
            for i in range(block):
                equal = magnitudes[i] == threshold
                if magnitudes[i] > threshold or (equal and wanted > 0):
                    wanted -= equal
                    values[token, place], indices[token, place] = bits[token, start + i], start + i
                    place += 1


_KINDS = {
    torch.bfloat16: (torch.uint16, 15, 0x7F80, _make_product(_from_bfloat16)),
    torch.float16: (torch.uint16, 15, 0x7C00, _make_product(_from_float16)),
    torch.float32: (torch.uint32, 31, 0x7F800000, _make_product(_from_float32)),
}
"""By dtype: the integer of the same bits, how many are the magnitude, infinity, and the product."""


def refuses_numba(tensors: Sequence[Tensor], asked: bool) -> str | None:
    """Why these kernels do not run on these, or None."""
    for each in tensors:
        if each.dtype not in _KINDS:
            return f"its kernels take bf16, fp16 and fp32, and got {each.dtype}"
        if each.device.type != "cpu":
            return f"its kernels are for CPUs, and the input is on {each.device.type}"
    if torch.compiler.is_compiling():
        return "torch.compile cannot trace its kernels"
    return None


def survivors_by_digits(x: Tensor, kept: int, block_size: int | None) -> tuple[Tensor, Tensor]:
    """Values and indices `[..., K]` of the top-K of `x [..., D]`."""
    integer, magnitude_bits, infinity, _ = _KINDS[x.dtype]
    block = block_size or x.shape[-1]
    shape = *x.shape[:-1], kept * (x.shape[-1] // block)
    values, indices = x.new_empty(shape), x.new_empty(shape, dtype=torch.int32)
    if x.numel():
        _select(
            x.contiguous().view(integer).numpy().reshape(-1, x.shape[-1]),
            magnitude_bits,
            infinity,
            block,
            kept,
            values.view(integer).numpy().reshape(-1, shape[-1]),
            indices.numpy().reshape(-1, shape[-1]),
        )
    return values, indices


def sum_of_rows(values: Tensor, indices: Tensor, weight: Tensor) -> Tensor:
    """`[T, N]`, fp32, of values and indices `[T, K]` and a weight `[D, N]`, contiguous."""
    integer, _, _, product = _KINDS[weight.dtype]
    y = values.new_empty(values.shape[0], weight.shape[1], dtype=torch.float32)
    threads = torch.get_num_threads()
    numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))
    product(
        values.contiguous().view(integer).numpy(),
        indices.contiguous().numpy(),
        weight.detach().view(integer).numpy(),
        y.numpy(),
        threads,
    )
    return y
