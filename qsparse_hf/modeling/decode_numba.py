"""Selections and a decode step's product on a CPU, compiled by Numba.

The product reads the kept rows as fast as memory gives them; the selection finds the K-th magnitude digit by digit from
histograms, without sorting. PyTorch's own operators do both too, with some fifty microseconds of their own each time.

Floats of 16 bits come as `uint16`, of 32 bits as `uint32`, as Numba knows no bfloat16. T tokens, D features in, K of
them kept, N features out.
"""

import math
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor

from .backend import NAMESPACE

try:
    import numba
    import numpy as np
    from llvmlite import ir
    from numba import njit, prange, types
    from numba.core import cgutils
    from numba.extending import intrinsic
except ImportError as error:
    raise ImportError("these kernels need the package numba") from error

_LINE = 32
"""Values of 16 bits in a cache line."""
_WORTH_A_THREAD = 1 << 16
"""From how many multiplications on a second thread is woken."""
_PARTS = 8
"""In how many parts the kept rows are summed."""
_PIECE = 1024
"""Features out that are finished together."""
_TOGETHER = 8
"""Blocks that one thread masks in a row."""
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


@intrinsic
def _bits(context, x):
    def generate(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], ir.IntType(32))

    return types.uint32(types.float32), generate


@njit(inline="always")
def _to_bfloat16(x):
    bits = _bits(x)
    if bits & np.uint32(0x7FFFFFFF) > np.uint32(0x7F800000):  # NaN
        return np.uint16((bits >> np.uint32(16)) | np.uint32(0x40))
    return np.uint16((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))


@intrinsic
def _to_float16(context, x):
    def generate(context, builder, signature, arguments):
        return builder.bitcast(builder.fptrunc(arguments[0], ir.HalfType()), ir.IntType(16))

    return types.uint16(types.float32), generate


@intrinsic
def _prefetch(context, array, at):
    """Ask for the cache line of an element of a contiguous array."""

    def generate(context, builder, signature, arguments):
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        byte, number = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [byte, number, number, number])
        prefetch = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        address = builder.bitcast(builder.gep(data, [arguments[1]]), byte)
        builder.call(prefetch, [address, number(0), number(3), number(1)])  # to read, into all caches, as data
        return context.get_dummy_value()

    return types.void(array, types.intp), generate


def _make_product(read: Callable, write: Callable) -> Callable:
    @njit(parallel=True, fastmath={"contract", "nsz"}, nogil=True)
    def product(values, indices, weight, bias, residual, y):
        """`y [T, N] = values @ weight[indices] + bias + residual`; an empty one of these is none.

        Parts of the kept rows are summed beside each other, in fp32, and then their sums, as many for any number of
        threads. Four rows at a time are four streams from memory, and their sums are loaded and stored once. Where the
        next four begin is asked for early; from there on the processor sees the streams by itself.
        """
        tokens, kept = values.shape
        features = weight.shape[1]
        share = ((kept + _PARTS - 1) // _PARTS + 3) // 4 * 4
        partial = np.zeros((tokens, _PARTS, features), np.float32)
        for work in prange(tokens * _PARTS):
            token, part = work // _PARTS, work % _PARTS
            value, row, sums = values[token], indices[token], partial[token, part]
            first, end = min(part * share, kept), min((part + 1) * share, kept)
            fours = first + (end - first) // 4 * 4
            for k in range(first, fours, 4):
                v0, v1, v2, v3 = read(value[k]), read(value[k + 1]), read(value[k + 2]), read(value[k + 3])
                row_0, row_1, row_2, row_3 = weight[row[k]], weight[row[k + 1]], weight[row[k + 2]], weight[row[k + 3]]
                for following in range(k + 4, min(k + 8, end)):
                    next_row = weight[row[following]]
                    for n in range(0, min(features, 4 * _LINE), _LINE):
                        _prefetch(next_row, n)
                for n in range(features):
                    sums[n] += (v0 * read(row_0[n]) + v1 * read(row_1[n])) + (v2 * read(row_2[n]) + v3 * read(row_3[n]))
            for k in range(fours, end):
                v0, row_0 = read(value[k]), weight[row[k]]
                for n in range(features):
                    sums[n] += v0 * read(row_0[n])
        for piece in prange((features + _PIECE - 1) // _PIECE):
            start, end = piece * _PIECE, min((piece + 1) * _PIECE, features)
            for token in range(tokens):
                sums = partial[token, 0]
                for part in range(1, _PARTS):
                    for n in range(start, end):
                        sums[n] += partial[token, part, n]
                if bias.size:
                    for n in range(start, end):
                        sums[n] += read(bias[n])
                if residual.size:
                    for n in range(start, end):
                        y[token, n] = write(read(residual[token, n]) + read(write(sums[n])))
                else:
                    for n in range(start, end):
                        y[token, n] = write(sums[n])

    return product


@njit(nogil=True)
def _find(bits, magnitude_bits, infinity, keep, magnitudes, survives):
    """Mark the `keep` largest of a block, lowest index first among equals."""
    block = bits.size
    mask = (1 << magnitude_bits) - 1
    for i in range(block):
        magnitudes[i] = min(np.int64(bits[i]) & mask, infinity + 1)  # NaN is largest
    if block <= _SMALL:
        for i in range(block):
            before = 0
            for j in range(block):
                before += (magnitudes[j] > magnitudes[i]) | ((magnitudes[j] == magnitudes[i]) & (j < i))
            survives[i] = before < keep
        return
    threshold, wanted, shift = np.int64(0), keep, (magnitude_bits - 1) // 8 * 8
    histogram = np.empty(256, np.int64)
    while shift >= 0:
        histogram[:] = 0
        for i in range(block):
            if magnitudes[i] >> (shift + 8) == threshold:  # of its digits, those that are decided
                histogram[(magnitudes[i] >> shift) & 255] += 1
        digit = 255
        while histogram[digit] < wanted:
            wanted -= histogram[digit]
            digit -= 1
        threshold = (threshold << 8) | digit
        shift -= 8
    for i in range(block):
        equal = magnitudes[i] == threshold
        survives[i] = magnitudes[i] > threshold or (equal and wanted > 0)
        wanted -= equal


@njit(nogil=True)
def _list(bits, magnitude_bits, infinity, block, keep, values, indices):
    """The survivors' bits and places `[T, K]`, by index."""
    tokens, features = bits.shape
    magnitudes, survives = np.empty(block, np.int64), np.empty(block, np.bool_)
    for token in range(tokens):
        place = 0
        for start in range(0, features, block):
            _find(bits[token, start : start + block], magnitude_bits, infinity, keep, magnitudes, survives)
            for i in range(block):
                if survives[i]:
                    values[token, place], indices[token, place] = bits[token, start + i], start + i
                    place += 1


@njit(parallel=True, nogil=True)
def _mask(bits, magnitude_bits, infinity, keep, mask):
    """Which survive of each block, `[blocks, M]`."""
    blocks, block = bits.shape
    for chunk in prange((blocks + _TOGETHER - 1) // _TOGETHER):
        magnitudes = np.empty(block, np.int64)
        for i in range(chunk * _TOGETHER, min((chunk + 1) * _TOGETHER, blocks)):
            _find(bits[i], magnitude_bits, infinity, keep, magnitudes, mask[i])


_KINDS = {
    torch.bfloat16: (torch.uint16, 15, 0x7F80, _make_product(_from_bfloat16, _to_bfloat16)),
    torch.float16: (torch.uint16, 15, 0x7C00, _make_product(_from_float16, _to_float16)),
    torch.float32: (torch.uint32, 31, 0x7F800000, _make_product(_from_float32, _bits)),
}
"""By dtype: the integer of the same bits, how many are the magnitude, infinity, and the product."""


class _Threads:
    """Numba's threads, as many as PyTorch has; one caller at a time, as not all of its thread pools bear two."""

    def __init__(self) -> None:
        self.started = self.lost = False
        self.lock = threading.Lock()

    def fork(self) -> None:
        """What a child process has: the lock may have been held, and threads that had been started are not there."""
        self.lost = self.started
        self.lock = threading.Lock()

    @contextmanager
    def __call__(self, steps: int) -> Iterator[None]:
        """For that many multiplications or the like: few are done before a second thread has woken."""
        threads = torch.get_num_threads()
        with self.lock:
            self.started = True
            numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS) if steps >= _WORTH_A_THREAD else 1)
            yield
        if torch.get_num_threads() != threads:  # Numba's first call sets OpenMP's number, which is PyTorch's too
            torch.set_num_threads(threads)


_threads = _Threads()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_threads.fork)


def refuses_numba(tensors: Sequence[Tensor], asked: bool) -> str | None:
    """Why these kernels do not run on these, or None."""
    if _threads.lost:
        return "its threads do not survive a fork, and this process was forked from one that had them"
    if torch.compiler.is_exporting():
        return "what is exported is to run where they are not"
    for each in tensors:
        if each.dtype not in _KINDS:
            return f"its kernels take bf16, fp16 and fp32, and got {each.dtype}"
        if each.device.type != "cpu":
            return f"its kernels are for CPUs, and the input is on {each.device.type}"
    return None


def refuses_compiling(tensors: Sequence[Tensor], asked: bool) -> str | None:
    """As `refuses_numba`, for what is no operator of PyTorch, as that would double its time for few tokens."""
    if torch.compiler.is_compiling():
        return "torch.compile cannot trace its kernels"
    return refuses_numba(tensors, asked)


def _bits_of(x: Tensor) -> np.ndarray:
    return x.detach().contiguous().view(_KINDS[x.dtype][0]).numpy()


@cache
def _nothing(integer: torch.dtype, ndim: int) -> np.ndarray:
    return torch.empty((0,) * ndim, dtype=integer, device="cpu").numpy()


@torch.library.custom_op(f"{NAMESPACE}::mask_by_digits", mutates_args=())
def mask_by_digits(x: Tensor, kept: int) -> Tensor:
    """Which of the last dimension survive the top-K, of the shape of `x [..., M]`."""
    _, magnitude_bits, infinity, _ = _KINDS[x.dtype]
    mask = x.new_empty(x.shape, dtype=torch.bool)
    if x.numel():
        with _threads(8 * x.numel()):
            bits = _bits_of(x).reshape(-1, x.shape[-1])
            _mask(bits, magnitude_bits, infinity, kept, mask.numpy().reshape(bits.shape))
    return mask


@mask_by_digits.register_fake
def _(x, kept):
    return x.new_empty(x.shape, dtype=torch.bool)


def survivors_by_digits(x: Tensor, kept: int, block_size: int | None) -> tuple[Tensor, Tensor]:
    """Values and indices `[..., K]` of the top-K of `x [..., D]`."""
    _, magnitude_bits, infinity, _ = _KINDS[x.dtype]
    block = block_size or x.shape[-1]
    shape = *x.shape[:-1], kept * (x.shape[-1] // block)
    values, indices = x.new_empty(shape), x.new_empty(shape, dtype=torch.int32)
    if x.numel():
        lists = _bits_of(values).reshape(-1, shape[-1]), indices.numpy().reshape(-1, shape[-1])
        _list(_bits_of(x).reshape(-1, x.shape[-1]), magnitude_bits, infinity, block, kept, *lists)
    return values, indices


class Product:
    """The decode product on these kernels."""

    def refuses(self, tensors: Sequence[Tensor], asked: bool) -> str | None:
        return refuses_compiling(tensors, asked)

    def product(
        self, values: Tensor, indices: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None
    ) -> Tensor:
        integer, _, _, product = _KINDS[weight.dtype]
        tokens, kept, features = math.prod(values.shape[:-1]), values.shape[-1], weight.shape[1]
        y = values.new_empty(*values.shape[:-1], features)

        def bits(each: Tensor | None, *shape: int) -> np.ndarray:
            return _nothing(integer, len(shape)) if each is None else _bits_of(each).reshape(shape)

        lists = bits(values, tokens, kept), indices.contiguous().numpy().reshape(tokens, kept)
        added = bits(bias, features), bits(residual, tokens, features)
        with _threads(tokens * kept * features):
            product(*lists, bits(weight, *weight.shape), *added, bits(y, tokens, features))
        return y
