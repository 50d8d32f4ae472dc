"""Selections and what a decode step needs on a CPU, compiled by Numba.

The product reads the kept rows as fast as memory gives them; the selection finds the K-th magnitude bit by bit,
counting as many at once as a register holds; norm and attention read what they need once. PyTorch's own operators do
all that too, with some fifty microseconds of their own each time.

Floats come as integers of the same bits, which tell the dtype too, as Numba knows no bfloat16: `uint16` for bf16,
`int16` for fp16, `uint32` for fp32. T tokens, D features in, K of them kept, N features out.
"""

import math
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
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
    from numba.core.caching import FunctionCache
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
_SMALL = 16
"""Up to how many features a block's are ranked one against all."""
_COUNTED = 1 << 14
"""Magnitudes whose number 15 bits can hold."""


class _Kept(FunctionCache):
    """Files with what was compiled, for later processes. What they do not take or give is compiled again."""

    def load_overload(self, sig: tuple, target_context: object) -> object:
        found = super().load_overload(sig, target_context)
        # Processes that compile for two dtypes at once may give their files one name.
        return found if found is None or found.signature.args == tuple(sig) else None

    @contextmanager
    def _guard_against_spurious_io_errors(self) -> Iterator[None]:
        with suppress(Exception):  # a full disk, a file that was cut off, and what unpickling such a file raises
            yield


def _kernel(**options) -> Callable[[Callable], Callable]:
    def compiled(function: Callable) -> Callable:
        kernel = njit(nogil=True, error_model="numpy", **options)(function)
        with suppress(RuntimeError):  # no place to write to, beside this file or with the user's caches
            kernel._cache = _Kept(function)
        return kernel

    return compiled


@intrinsic
def _read(context, bits):
    """The float of these bits, as fp32."""

    def generate(context, builder, signature, arguments):
        (x,) = arguments
        if bits == types.int16:
            return builder.fpext(builder.bitcast(x, ir.HalfType()), ir.FloatType())
        if bits == types.uint16:
            x = builder.shl(builder.zext(x, ir.IntType(32)), ir.Constant(ir.IntType(32), 16))
        return builder.bitcast(x, ir.FloatType())

    return types.float32(bits), generate


@intrinsic
def _write(context, x, array):
    """The bits of an fp32 number rounded, to nearest even, to what the array holds."""
    target = array.dtype

    def generate(context, builder, signature, arguments):
        x, word = arguments[0], ir.IntType(32)
        if target == types.int16:
            return builder.bitcast(builder.fptrunc(x, ir.HalfType()), ir.IntType(16))
        bits = builder.bitcast(x, word)
        if target == types.uint32:
            return bits
        upper = builder.lshr(bits, word(16))
        odd = builder.and_(upper, word(1))
        rounded = builder.lshr(builder.add(bits, builder.add(odd, word(0x7FFF))), word(16))
        is_nan = builder.fcmp_unordered("uno", x, x)
        return builder.trunc(builder.select(is_nan, builder.or_(upper, word(0x40)), rounded), ir.IntType(16))

    return target(types.float32, array), generate


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


@_kernel(parallel=True, fastmath={"contract", "nsz"})
def _multiply(values, indices, weight, bias, residual, y):
    """`y [T, N] = values @ weight[indices] + bias + residual`; an empty one of these is none.

    Parts of the kept rows are summed beside each other, in fp32, and then their sums, as many for any number of
    threads. Four rows at a time are four streams from memory, and their sums are loaded and stored once. Where the
    next four begin is asked for early; from there on the processor sees the streams by itself.
    """
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
            v0, v1, v2, v3 = _read(value[k]), _read(value[k + 1]), _read(value[k + 2]), _read(value[k + 3])
            row_0, row_1, row_2, row_3 = weight[row[k]], weight[row[k + 1]], weight[row[k + 2]], weight[row[k + 3]]
            for following in range(k + 4, min(k + 8, end)):
                next_row = weight[row[following]]
                for n in range(0, min(features, 4 * _LINE), _LINE):
                    _prefetch(next_row, n)
            for n in range(features):
                sums[n] += (v0 * _read(row_0[n]) + v1 * _read(row_1[n])) + (v2 * _read(row_2[n]) + v3 * _read(row_3[n]))
        for k in range(fours, end):
            v0, row_0 = _read(value[k]), weight[row[k]]
            for n in range(features):
                sums[n] += v0 * _read(row_0[n])
    for piece in prange((features + _PIECE - 1) // _PIECE):
        start, end = piece * _PIECE, min((piece + 1) * _PIECE, features)
        for token in range(tokens):
            sums = partial_sums[token, 0]
            for part in range(1, _PARTS):
                for n in range(start, end):
                    sums[n] += partial_sums[token, part, n]
            if bias.size:
                for n in range(start, end):
                    sums[n] += _read(bias[n])
            if residual.size:
                for n in range(start, end):
                    y[token, n] = _write(_read(residual[token, n]) + _read(_write(sums[n], y)), y)
            else:
                for n in range(start, end):
                    y[token, n] = _write(sums[n], y)


@_kernel(parallel=True, fastmath={"contract", "nsz", "reassoc"})
def _attend(query, keys, values, bias, scaling, y):
    """One token's `y [B, H, d]`, as `query`; `keys` and `values [B, H, L, d]`; `bias [B, L]`, or an empty one.

    A thread has a head, whose entries it reads once.
    """
    sequences, heads, entries, d = keys.shape
    for work in prange(sequences * heads):
        sequence, head = work // heads, work % heads
        scaled, weights = np.empty(d, np.float32), np.empty(entries, np.float32)
        for i in range(d):
            scaled[i] = _read(query[sequence, head, i]) * scaling
        for entry in range(entries):
            key = keys[sequence, head, entry]
            score = np.float32(0)
            for i in range(d):
                score += scaled[i] * _read(key[i])
            weights[entry] = score + bias[sequence, entry] if bias.size else score
        largest, total = weights.max(), np.float32(0)
        if largest == -np.inf:  # no entry counts: zeros, as PyTorch's has it
            largest, total = np.float32(0), np.float32(1)
        for entry in range(entries):
            weights[entry] = np.exp(weights[entry] - largest)
            total += weights[entry]
        sums = np.zeros(d, np.float32)
        for entry in range(entries):
            value = values[sequence, head, entry]
            for i in range(d):
                sums[i] += weights[entry] * _read(value[i])
        for i in range(d):
            y[sequence, head, i] = _write(sums[i] / total, y)


@_kernel(fastmath={"contract", "nsz", "reassoc"})
def _normalise(x, gain, eps, y):
    """The root-mean-square norm of each row of `x [T, D]`, rounded where Transformers' Llama rounds."""
    tokens, features = x.shape
    for token in range(tokens):
        squares = np.float32(0)
        for i in range(features):
            squares += _read(x[token, i]) ** 2
        scale = np.float32(1) / np.sqrt(squares / np.float32(features) + eps)
        for i in range(features):
            y[token, i] = _write(_read(gain[i]) * _read(_write(_read(x[token, i]) * scale, y)), y)


@_kernel()
def _count_from(magnitudes, least):
    """How many are that large. Counts as wide as the magnitudes fill a vector register, and are added in time."""
    integer, count = magnitudes.dtype.type, 0
    for start in range(0, magnitudes.size, _COUNTED):
        part, few = magnitudes[start : start + _COUNTED], integer(0)
        for i in range(part.size):
            few = integer(few + integer(part[i] >= least))
        count += np.int64(few)
    return count


@_kernel()
def _find_least(magnitudes, keep):
    """From which on there are `keep`, or more if some are equal, and how many: bit by bit, or by ranks if few."""
    integer = magnitudes.dtype.type
    least, found = integer(0), magnitudes.size
    if magnitudes.size <= _SMALL:
        for i in range(magnitudes.size):
            before = 0
            for j in range(magnitudes.size):
                before += (magnitudes[j] > magnitudes[i]) | ((magnitudes[j] == magnitudes[i]) & (j < i))
            if before == keep - 1:
                least = magnitudes[i]
        return least, _count_from(magnitudes, least)
    for bit in range(8 * magnitudes.itemsize - 2, -1, -1):
        higher = integer(least | integer(1 << bit))
        count = _count_from(magnitudes, higher)
        if count >= keep:
            least, found = higher, count
            if count == keep:
                break
    return least, found


@_kernel()
def _mark(bits, infinity, keep, magnitudes):
    """Fill in the magnitudes of a block, and return from which on they are those of its `keep` largest.

    One is added to each, so that 0 says of those that equal the last to be kept, and come after it, that they go.
    """
    integer = bits.dtype.type
    mask, nan = integer((1 << (8 * bits.itemsize - 1)) - 1), integer(infinity + 1)  # NaN is largest
    for i in range(bits.size):
        magnitudes[i] = integer(min(integer(bits[i] & mask), nan) + 1)
    least, found = _find_least(magnitudes, keep)
    i = bits.size
    while found > keep:
        i -= 1
        if magnitudes[i] == least:
            magnitudes[i] = 0
            found -= 1
    return least


@_kernel()
def _fill_lists(bits, infinity, block, keep, values, indices):
    """The survivors' bits and places `[T, K]`, by index."""
    tokens, features = bits.shape
    magnitudes = np.empty(block, bits.dtype)
    for token in range(tokens):
        place = 0
        for start in range(0, features, block):
            least = _mark(bits[token, start : start + block], infinity, keep, magnitudes)
            end, i = place + keep, 0
            while place < end:  # each is written, and the next one over it if it does not survive: nothing to predict
                values[token, place], indices[token, place] = bits[token, start + i], start + i
                place += np.int64(magnitudes[i] >= least)
                i += 1


@_kernel(parallel=True)
def _fill_mask(bits, infinity, keep, mask):
    """Which survive of each block, `[blocks, M]`."""
    blocks, block = bits.shape
    for chunk in prange((blocks + _TOGETHER - 1) // _TOGETHER):
        magnitudes = np.empty(block, bits.dtype)
        for i in range(chunk * _TOGETHER, min((chunk + 1) * _TOGETHER, blocks)):
            least = _mark(bits[i], infinity, keep, magnitudes)
            for k in range(block):
                mask[i, k] = magnitudes[k] >= least


_KINDS = {
    torch.bfloat16: (torch.uint16, 0x7F80),
    torch.float16: (torch.int16, 0x7C00),
    torch.float32: (torch.uint32, 0x7F800000),
}
"""By dtype: the integer that stands for it, and infinity's bits."""


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
    if numba.config.DISABLE_JIT:
        return "NUMBA_DISABLE_JIT is set"
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
    return x.contiguous().view(_KINDS[x.dtype][0]).numpy()


@cache
def _nothing(integer: torch.dtype, ndim: int) -> np.ndarray:
    return torch.empty((0,) * ndim, dtype=integer, device="cpu").numpy()


@torch.library.custom_op(f"{NAMESPACE}::mask_by_counts", mutates_args=())
def mask_by_counts(x: Tensor, kept: int) -> Tensor:
    """Which of the last dimension survive the top-K, of the shape of `x [..., M]`."""
    mask = x.new_empty(x.shape, dtype=torch.bool)
    if x.numel():
        with _threads(8 * x.numel()):
            bits = _bits_of(x).reshape(-1, x.shape[-1])
            _fill_mask(bits, _KINDS[x.dtype][1], kept, mask.numpy().reshape(bits.shape))
    return mask


@mask_by_counts.register_fake
def _(x, kept):
    return x.new_empty(x.shape, dtype=torch.bool)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As that of `sparsify.py`, for a few tokens `[..., D]` and a `weight [D]` of their dtype."""
    y = x.new_empty(x.shape)
    rows = -1, x.shape[-1]
    _normalise(_bits_of(x).reshape(rows), _bits_of(weight), np.float32(eps), _bits_of(y).reshape(rows))
    return y


def survivors_by_counts(x: Tensor, kept: int, block_size: int | None) -> tuple[Tensor, Tensor]:
    """Values and indices `[..., K]` of the top-K of `x [..., D]`."""
    block = block_size or x.shape[-1]
    shape = *x.shape[:-1], kept * (x.shape[-1] // block)
    values, indices = x.new_empty(shape), x.new_empty(shape, dtype=torch.int32)
    if x.numel():
        lists = _bits_of(values).reshape(-1, shape[-1]), indices.numpy().reshape(-1, shape[-1])
        _fill_lists(_bits_of(x).reshape(-1, x.shape[-1]), _KINDS[x.dtype][1], block, kept, *lists)
    return values, indices


class Product:
    """The decode product on these kernels."""

    def refuses(self, tensors: Sequence[Tensor], asked: bool) -> str | None:
        return refuses_compiling(tensors, asked)

    def product(
        self, values: Tensor, indices: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None
    ) -> Tensor:
        integer, _ = _KINDS[weight.dtype]
        tokens, kept, features = math.prod(values.shape[:-1]), values.shape[-1], weight.shape[1]
        y = values.new_empty(*values.shape[:-1], features)

        def bits(each: Tensor | None, *shape: int) -> np.ndarray:
            return _nothing(integer, len(shape)) if each is None else _bits_of(each).reshape(shape)

        lists = bits(values, tokens, kept), indices.contiguous().numpy().reshape(tokens, kept)
        added = bits(bias, features), bits(residual, tokens, features)
        with _threads(tokens * kept * features):
            _multiply(*lists, bits(weight, *weight.shape), *added, bits(y, tokens, features))
        return y


def attend_by_heads(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    """`attend` of `decode_attention.py`, for as many key-value heads as there are heads."""
    sequences, heads, _, d = query.shape
    y = query.new_empty(sequences, 1, heads, d)
    bias = np.empty((0, 0), np.float32)
    if mask is not None:
        if mask.dtype == torch.bool:
            mask = mask.new_zeros(mask.shape, dtype=torch.float32).masked_fill_(~mask, -math.inf)
        bias = mask.float().expand(sequences, 1, 1, keys.shape[2])[:, 0, 0].contiguous().numpy()
    with _threads(2 * keys.numel()):
        _attend(
            _bits_of(query).reshape(sequences, heads, d),
            _bits_of(keys),
            _bits_of(values),
            bias,
            np.float32(scaling),
            _bits_of(y).reshape(sequences, heads, d),
        )
    return y
