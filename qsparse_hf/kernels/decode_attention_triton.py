"""One Triton kernel for a decode step's attention: rotary embedding, static cache's new entry, softmax, weighted sum.

One token a sequence. PyTorch runs some twenty kernels for this, and launches are what a decode step spends its time on.

Shapes: B sequences, H query heads, G of them a key-value head, d head size, L entries of the cache. Of each head the
first ROTARY features get the rotary embedding: all d in most families.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..decode.attention import StepCache
from .sparsify_triton import launch_options
from .sparsify_triton_ops import refuses

try:
    import triton
    import triton.language as tl
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
except ImportError as error:
    raise ImportError("the decode attention needs the package triton") from error

_BLOCK = 64
"""The most cache entries that a program reads at a time: its registers hold those of heads of 128."""


@triton.jit
def _rotated(head_ptr, at, cos_ptr, sin_ptr, ROTARY: tl.constexpr):
    """These features of a head after the rotary embedding of its first ROTARY, rounded where Transformers rounds."""
    turns, first = at < ROTARY, at < ROTARY // 2
    head = tl.load(head_ptr + at)
    other = tl.load(head_ptr + tl.where(first, at + ROTARY // 2, at - ROTARY // 2), mask=turns, other=0.0)
    cos = tl.load(cos_ptr + at, mask=turns, other=1.0).to(tl.float32)
    sin = tl.load(sin_ptr + at, mask=turns, other=0.0).to(tl.float32)
    across = (other.to(tl.float32) * sin).to(head.dtype).to(tl.float32)
    along = (head.to(tl.float32) * cos).to(head.dtype).to(tl.float32)
    return (along + tl.where(first, -across, across)).to(head.dtype)


@triton.jit
def decode_attention_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    query_stride,
    key_stride,
    value_stride,
    cos_ptr,
    sin_ptr,
    keys_ptr,
    values_ptr,
    length_ptr,
    mask_ptr,
    mask_stride,
    y_ptr,
    partial_ptr,
    arrived_ptr,
    scaling,
    H: tl.constexpr,
    G: tl.constexpr,
    L: tl.constexpr,
    d: tl.constexpr,
    ROTARY: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """One query head over one of SPLITS parts of the cache; the program that finishes last adds up the parts."""
    sequence, head = tl.program_id(0) // H, tl.program_id(0) % H
    HALF: tl.constexpr = d // 2  # keys are read by halves of a head: 3 us a layer faster on an H100 than whole ones
    low, high, whole = tl.arange(0, HALF), HALF + tl.arange(0, HALF), tl.arange(0, d)
    if DEPENDENT:
        gdc_wait()
        gdc_launch_dependents()
    length = tl.minimum(tl.load(length_ptr), L).to(tl.int32)  # entries before this one; never beyond what there are
    query_ptr += sequence * query_stride + head * d
    key_ptr += sequence * key_stride + head // G * d
    value_ptr += sequence * value_stride + head // G * d
    cos_ptr += sequence * ROTARY
    sin_ptr += sequence * ROTARY
    query_low = _rotated(query_ptr, low, cos_ptr, sin_ptr, ROTARY).to(tl.float32) * scaling
    query_high = _rotated(query_ptr, high, cos_ptr, sin_ptr, ROTARY).to(tl.float32) * scaling
    new_low = _rotated(key_ptr, low, cos_ptr, sin_ptr, ROTARY)
    new_high = _rotated(key_ptr, high, cos_ptr, sin_ptr, ROTARY)
    new_value = tl.load(value_ptr + whole)

    entries = (sequence * (H // G) + head // G).to(tl.int64) * L * d
    keys_ptr += entries
    values_ptr += entries
    split = tl.program_id(1)
    largest, total, sums = -float("inf"), 0.0, tl.zeros([d], tl.float32)
    if split == 0:
        # The new entry is taken from registers: it is written by one head of the group, perhaps after others would
        # read it.
        if head % G == 0 and length < L:
            tl.store(keys_ptr + length * d + low, new_low)
            tl.store(keys_ptr + length * d + high, new_high)
            tl.store(values_ptr + length * d + whole, new_value)
        largest = tl.sum(query_low * new_low.to(tl.float32) + query_high * new_high.to(tl.float32), axis=0)
        total = 1.0
        sums = new_value.to(tl.float32)
    part = tl.cdiv(tl.cdiv(length, SPLITS), BLOCK) * BLOCK
    for start in range(split * part, tl.minimum((split + 1) * part, length), BLOCK):
        entry = start + tl.arange(0, BLOCK)
        inside = entry < length
        at = entry[:, None] * d
        key_low = tl.load(keys_ptr + at + low[None, :], mask=inside[:, None], other=0.0).to(tl.float32)
        key_high = tl.load(keys_ptr + at + high[None, :], mask=inside[:, None], other=0.0).to(tl.float32)
        value = tl.load(values_ptr + at + whole[None, :], mask=inside[:, None], other=0.0).to(tl.float32)
        if mask_ptr is not None:
            inside = inside & (tl.load(mask_ptr + sequence * mask_stride + entry, mask=inside, other=0) != 0)
        score = tl.sum(key_low * query_low[None, :] + key_high * query_high[None, :], axis=1)
        score = tl.where(inside, score, -float("inf"))
        new_largest = tl.maximum(largest, tl.max(score, axis=0))
        if new_largest > -float("inf"):
            shrink = tl.exp(largest - new_largest)
            weight = tl.exp(score - new_largest)
            total = total * shrink + tl.sum(weight, axis=0)
            sums = sums * shrink + tl.sum(value * weight[:, None], axis=0)
            largest = new_largest
    y_ptr += (sequence * H + head) * d
    if SPLITS == 1:
        tl.store(y_ptr + whole, (sums / total).to(y_ptr.dtype.element_ty))
    else:
        partial_ptr += tl.program_id(0) * SPLITS * (d + 2)
        mine = partial_ptr + split * (d + 2)
        tl.store(mine + whole, sums)
        tl.store(mine + d, largest)
        tl.store(mine + d + 1, total)
        tl.debug_barrier()  # all threads have stored before the counter says so
        if tl.atomic_add(arrived_ptr + tl.program_id(0), 1, sem="acq_rel") == SPLITS - 1:
            tl.store(arrived_ptr + tl.program_id(0), 0)  # as the next launch wants it
            parts = tl.arange(0, SPLITS) * (d + 2)
            each_largest = tl.load(partial_ptr + parts + d, cache_modifier=".cg")
            # The first part has the new entry: the largest of all is finite.
            shrinks = tl.exp(each_largest - tl.max(each_largest, axis=0))
            each_total = tl.load(partial_ptr + parts + d + 1, cache_modifier=".cg")
            each_sums = tl.load(partial_ptr + parts[:, None] + whole[None, :], cache_modifier=".cg")
            y = tl.sum(each_sums * shrinks[:, None], axis=0) / tl.sum(each_total * shrinks, axis=0)
            tl.store(y_ptr + whole, y.to(y_ptr.dtype.element_ty))


def splits_of(entries: int) -> int:
    """The number of parts in which a cache of that many entries is read, a power of two."""
    return min(triton.next_power_of_2(triton.cdiv(entries, 256)), 16)


def decode_attention(
    query: Tensor, key: Tensor, value: Tensor, rotary: tuple[Tensor, Tensor], cache: StepCache, scaling: float
) -> Tensor:
    """See `StepImplementation` in `decode/attention.py`; d is a power of two."""
    keys, values, length, mask, arrived = cache
    cos, sin = rotary
    sequences, kv_heads, entries, d = keys.shape
    heads = query.shape[-1] // d
    splits = splits_of(entries)
    y = query.new_empty(sequences, 1, heads * d)
    partial = y.new_empty(sequences * heads * splits * (d + 2) if splits > 1 else 0, dtype=torch.float32)
    options = launch_options(query)
    with torch.cuda.device_of(query):
        decode_attention_kernel[(sequences * heads, splits)](
            query,
            key,
            value,
            query.stride(0),
            key.stride(0),
            value.stride(0),
            cos,
            sin,
            keys,
            values,
            length,
            mask,
            0 if mask is None else mask.stride(0),
            y,
            partial,
            arrived,
            scaling,
            H=heads,
            G=heads // kv_heads,
            L=entries,
            d=d,
            ROTARY=cos.shape[-1],
            SPLITS=splits,
            BLOCK=min(_BLOCK, 128 * _BLOCK // d),
            DEPENDENT=bool(options),
            num_warps=4,
            **options,
        )
    return y


class TritonStep:
    """A decode step's attention on this kernel."""

    def refuses(self, tensors: Sequence[Tensor], asked: bool) -> str | None:
        return refuses(tensors, asked)

    attend = staticmethod(decode_attention)
