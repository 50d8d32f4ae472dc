"""What the Numba kernels share: compiling with an on-disk cache, floats as integers of the same bits, and threads.

Numba has no bfloat16, so kernels get arrays of integers that hold the floats' bits; the integer's type says which float
it is: `uint16` for bf16, `int16` for fp16, `uint32` for fp32.
"""

import logging
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.core.caching import FunctionCache
from numba.extending import intrinsic
from torch import Tensor

logger = logging.getLogger(__name__)

_WORTH_A_THREAD = 1 << 16
"""Number of multiplications from which on more than one thread is used."""


@cache
def _announce_compiling() -> None:
    logger.warning(
        "compiling the kernels for this CPU, once for each dtype: some ten seconds, more where other processes take "
        "its time; then they are in Numba's cache, if that can be written"
    )


@cache
def _stamp() -> tuple:
    """What tells this version of all kernels from others: the time and size of their files."""
    files = [*sorted(Path(__file__).parent.glob("*_numba.py")), Path(__file__)]
    return tuple((file.name, file.stat().st_mtime, file.stat().st_size) for file in files)


class _CompileCache(FunctionCache):
    """Numba's on-disk compile cache; any failure to read or write it means compiling again."""

    def __init__(self, function: Callable) -> None:
        super().__init__(function)
        # A kernel has others compiled into it, so that a change of any of these files is one of its own.
        self._cache_file._source_stamp = _stamp()

    def load_overload(self, sig: tuple, target_context: object) -> object:
        found = super().load_overload(sig, target_context)
        # Two processes that compile for two dtypes at the same time may write files of the same name.
        if found is None or found.signature.args != tuple(sig):
            _announce_compiling()
            return None
        return found

    @contextmanager
    def _guard_against_spurious_io_errors(self) -> Iterator[None]:
        with suppress(Exception):  # a full disk, a truncated file, and whatever unpickling such a file raises
            yield


def kernel(**options) -> Callable[[Callable], Callable]:
    """Compile a function with Numba, once for all processes that share its on-disk compile cache."""

    def compiled(function: Callable) -> Callable:
        kernel = njit(nogil=True, error_model="numpy", **options)(function)
        try:
            kernel._cache = _CompileCache(function)
        except RuntimeError:  # neither this folder nor the user's cache folder is writable
            _announce_compiling()
        return kernel

    return compiled


@intrinsic
def read(context, bits):
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
def write(context, x, array):
    """The bits of an fp32 number rounded to nearest even in the array's float type."""
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
def prefetch(context, array, at):
    """Prefetch the cache line of an element of a contiguous array."""

    def generate(context, builder, signature, arguments):
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        byte, number = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [byte, number, number, number])
        prefetch = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        address = builder.bitcast(builder.gep(data, [arguments[1]]), byte)
        builder.call(prefetch, [address, number(0), number(3), number(1)])  # to read, into all caches, as data
        return context.get_dummy_value()

    return types.void(array, types.intp), generate


KINDS = {
    torch.bfloat16: (torch.uint16, 0x7F80),
    torch.float16: (torch.int16, 0x7C00),
    torch.float32: (torch.uint32, 0x7F800000),
}
"""For each dtype: the integer type that holds its bits, and the bits of infinity."""


class Threads:
    """Numba's threads, as many as PyTorch uses; one caller at a time, as some of its thread pools crash with two."""

    def __init__(self) -> None:
        self.started = self.lost = False
        self.lock = threading.Lock()

    def fork(self) -> None:
        """In a child process after a fork: the lock may have been held, and threads of the parent do not exist."""
        self.lost = self.started
        self.lock = threading.Lock()

    @contextmanager
    def __call__(self, steps: int) -> Iterator[None]:
        """Threads for about `steps` multiplications: one for few, which are done before a second thread has woken."""
        threads = torch.get_num_threads()
        with self.lock:
            self.started = True
            numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS) if steps >= _WORTH_A_THREAD else 1)
            yield
        if torch.get_num_threads() != threads:  # Numba's first call sets OpenMP's number, which is PyTorch's too
            torch.set_num_threads(threads)


threads_for = Threads()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=threads_for.fork)


def refuses(tensors: Sequence[Tensor], asked: bool) -> str | None:
    """Why these kernels do not run on these, or None."""
    if numba.config.DISABLE_JIT:
        return "NUMBA_DISABLE_JIT is set"
    if threads_for.lost:
        return "its threads do not survive a fork, and this process was forked from one that had them"
    if torch.compiler.is_exporting():
        return "what is exported is to run where they are not"
    for each in tensors:
        if each.dtype not in KINDS:
            return f"its kernels take bf16, fp16 and fp32, and got {each.dtype}"
        if each.device.type != "cpu":
            return f"its kernels are for CPUs, and the input is on {each.device.type}"
    return None


def refuses_compiling(tensors: Sequence[Tensor], asked: bool) -> str | None:
    """As `refuses`, for kernels that are no PyTorch operators: being one would double their time for few tokens."""
    if torch.compiler.is_compiling():
        return "torch.compile cannot trace its kernels"
    return refuses(tensors, asked)


def bits_of(x: Tensor) -> np.ndarray:
    """`x` as an array of integers with the same bits and shape; shares memory where `x` is contiguous."""
    return x.contiguous().view(KINDS[x.dtype][0]).numpy()


@cache
def nothing(integer: torch.dtype, ndim: int) -> np.ndarray:
    """An array without elements: how a kernel is told that there is no bias or residual."""
    return torch.empty((0,) * ndim, dtype=integer, device="cpu").numpy()


def scales_of(scale: Tensor | None) -> np.ndarray:
    """What each token's values are multiplied by, fp32 `[T]`; an array without elements where that is nothing."""
    return nothing(torch.float32, 1) if scale is None else scale.contiguous().numpy().reshape(-1)
