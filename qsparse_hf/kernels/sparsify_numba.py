"""The top-K operator and its survivors on a CPU, compiled by Numba.

The selection finds the K-th largest magnitude bit by bit, counting as many values at once as a vector register holds.
Made of PyTorch operators, the same takes some fifty microseconds more for the calls alone.

Arrays hold the bits of floats as integers, see `numba_base.py`. T tokens, D features, M features of a block, K of them
kept.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numba import prange
from torch import Tensor

from ..modeling.bitnet import LEAST_SCALE
from ..modeling.sparsify import FORMS, Survivors, TorchSparsify, finish
from ..modeling.sparsity import Selection
from .numba_base import KINDS, bits_of, kernel, read, refuses, refuses_compiling, scales_of, threads_for, write

_TOGETHER = 8
"""Blocks that a thread masks one after the other."""
_SMALL = 16
"""Largest block whose features are ranked by comparing each with all others."""
_COUNTED = 1 << 14
"""Magnitudes that are counted in one go: their number fits into 15 bits."""


@kernel(fastmath={"contract", "nsz", "reassoc"})
def normalise(x, gain, eps, unit_offset, y):
    """`rms_norm` of each row of `x [T, D]`."""
    tokens, features = x.shape
    for token in range(tokens):
        squares = np.float32(0)
        for i in range(features):
            squares += read(x[token, i]) ** 2
        scale = np.float32(1) / np.sqrt(squares / np.float32(features) + eps)
        for i in range(features):
            normed = read(x[token, i]) * scale
            if unit_offset:
                y[token, i] = write((np.float32(1) + read(gain[i])) * normed, y)
            else:
                y[token, i] = write(read(gain[i]) * read(write(normed, y)), y)


@kernel()
def _count_from(magnitudes, least):
    """How many are at least `least`. Counters as wide as the magnitudes vectorise; each counts too few to overflow."""
    integer, count = magnitudes.dtype.type, 0
    for start in range(0, magnitudes.size, _COUNTED):
        part, few = magnitudes[start : start + _COUNTED], integer(0)
        for i in range(part.size):
            few = integer(few + integer(part[i] >= least))
        count += np.int64(few)
    return count


@kernel()
def _find_least(magnitudes, keep):
    """The `keep`-th largest magnitude, and how many are at least that large (more than `keep` where some are equal)."""
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


@kernel()
def _mark(bits, infinity, keep, magnitudes):
    """Fill in the magnitudes of a block, and return the threshold: those of at least that survive, exactly `keep`.

    Magnitudes are increased by one, so that 0 is free to mark the last of those that equal the threshold, which do not
    survive.
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


@kernel()
def fill_lists(bits, infinity, block, keep, values, indices):
    """Fill in the survivors' bits and indices, both `[T, K]`, in the order of the indices."""
    tokens, features = bits.shape
    magnitudes = np.empty(block, bits.dtype)
    for token in range(tokens):
        place = 0
        for start in range(0, features, block):
            least = _mark(bits[token, start : start + block], infinity, keep, magnitudes)
            end, i = place + keep, 0
            while place < end:  # each is written, and overwritten by the next unless it survives: no branch to predict
                values[token, place], indices[token, place] = bits[token, start + i], start + i
                place += np.int64(magnitudes[i] >= least)
                i += 1


@kernel()
def round_list(values, least, rescales, scale):
    """`finish_list` of rounded survivors: `values [T, K]` become levels; `scale [T]`, fp32, is what is left."""
    magnitude = values.dtype.type((1 << (8 * values.itemsize - 1)) - 1)
    for token in range(values.shape[0]):
        row, top = values[token], values.dtype.type(0)
        for k in range(row.size):
            top = max(top, values.dtype.type(row[k] & magnitude))  # as bits, of which NaN's are the largest
        largest = read(top)
        largest = least if largest < least else largest
        inverse, squares = np.float32(127) / largest, np.float32(0)
        for k in range(row.size):
            level = np.rint(read(row[k]) * inverse)
            squares += level * level
            row[k] = write(level, values)
        if largest == np.inf:  # of which no part is left
            largest = np.float32(np.nan)
        scale[token] = np.float32(1) / np.sqrt(squares) if rescales and squares > 0 else largest / np.float32(127)


@kernel(parallel=True)
def _fill_mask(bits, infinity, keep, mask):
    """Fill in `mask [blocks, M]`: which features of each block survive."""
    blocks, block = bits.shape
    for chunk in prange((blocks + _TOGETHER - 1) // _TOGETHER):
        magnitudes = np.empty(block, bits.dtype)
        for i in range(chunk * _TOGETHER, min((chunk + 1) * _TOGETHER, blocks)):
            least = _mark(bits[i], infinity, keep, magnitudes)
            for k in range(block):
                mask[i, k] = magnitudes[k] >= least


@torch.library.custom_op("qsparse::mask_by_counts", mutates_args=())
def mask_by_counts(x: Tensor, kept: int) -> Tensor:
    """Which entries of the last dimension survive a top-`kept`, bool, of the shape of `x [..., M]`."""
    mask = x.new_empty(x.shape, dtype=torch.bool)
    if x.numel():
        with threads_for(8 * x.numel()):
            bits = bits_of(x).reshape(-1, x.shape[-1])
            _fill_mask(bits, KINDS[x.dtype][1], kept, mask.numpy().reshape(bits.shape))
    return mask


@mask_by_counts.register_fake
def _(x, kept):
    return x.new_empty(x.shape, dtype=torch.bool)


@mask_by_counts.register_vmap
def _(info, in_dims, x, kept):
    return mask_by_counts(x.movedim(in_dims[0], 0), kept), 0


class NumbaSparsify(TorchSparsify):
    """The operator with this selection; under `torch.compile` too."""

    def __init__(self) -> None:
        super().__init__(mask_by_counts)

    def refuses(self, tensors: Sequence[Tensor], asked: bool) -> str | None:
        return refuses(tensors, asked)


class NumbaSurvivors:
    """Survivors in the order of their indices; an RMSNorm before the selection is computed by a kernel as well."""

    def refuses(self, tensors: Sequence[Tensor], asked: bool) -> str | None:
        return refuses_compiling(tensors, asked)

    def survivors(self, form: str, inputs: tuple, selection: Selection) -> Survivors:
        own_norm = form == "rms_norm_topk" and inputs[0].dtype == inputs[1].dtype
        x = _rms_norm(*inputs) if own_norm else FORMS[form](*inputs)
        features = x.shape[-1]
        shape = *x.shape[:-1], selection.kept(features)
        values, indices = x.new_empty(shape), x.new_empty(shape, dtype=torch.int32)
        if x.numel():
            rows, lists = bits_of(x).reshape(-1, features), (-1, shape[-1])
            kept = bits_of(values).reshape(lists), indices.numpy().reshape(lists)
            block = selection.block_size or features
            fill_lists(rows, KINDS[x.dtype][1], block, selection.kept_of_block(features), *kept)
        if selection.quantization == "none":
            return Survivors(finish(values, selection), indices)
        scale = x.new_empty(*shape[:-1], 1, dtype=torch.float32)
        if x.numel():
            round_list(kept[0], np.float32(LEAST_SCALE), selection.rescale == "l2", scales_of(scale))
        return Survivors(values, indices, scale)


def _rms_norm(x: Tensor, weight: Tensor, eps: float, unit_offset: bool) -> Tensor:
    """As `FORMS` has it, for a few tokens `[..., D]` and a `weight [D]` of their dtype."""
    y = x.new_empty(x.shape)
    rows = -1, x.shape[-1]
    normalise(bits_of(x).reshape(rows), bits_of(weight), np.float32(eps), unit_offset, bits_of(y).reshape(rows))
    return y
