"""Triton kernel of the decode product with packed ternary weights: reads surviving features' rows, two bits a weight.

A word of 32 bits has sixteen codes 0, 1, 2 of a feature's row, a weight being its code minus one. Two of them at a time
are multiplied by a whole number, an int8 level, in one instruction: a word that is masked to one code in each half is
the number `low + 2^16 high`, and so is each sum of such products, as long as the lower half stays below 2^15.

Shapes: T tokens, D features in, K of them kept, N features out; see `TernaryWeights` for the layout.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..decode.weights import TernaryWeights
from ..modeling.sparsify import Survivors
from .sparsify_triton import LIST_UNIT, join, launch_options, padded_length, padded_lists
from .sparsify_triton_ops import refuses

try:
    import triton
    import triton.language as tl
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
except ImportError as error:
    raise ImportError("the decode product's kernel needs the package triton") from error


@triton.jit
def _sums(weighted, LANES: tl.constexpr):
    """`[ROWS, COLUMNS]` summed over every LANES-th row, which one thread has: `[LANES, COLUMNS]`."""
    ROWS: tl.constexpr = weighted.shape[0]
    return tl.sum(tl.reshape(weighted, [ROWS // LANES, LANES, weighted.shape[1]]), axis=0)


@triton.jit(do_not_specialize=["K"])  # one kernel for all sparsities that share a tile
def ternary_linear_kernel(
    values_ptr,
    indices_ptr,
    scale_ptr,
    codes_ptr,
    alpha_ptr,
    first_ptr,
    step_ptr,
    bias_ptr,
    residual_ptr,
    y_ptr,
    K,
    list_stride,
    N,
    BYTES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    LANES: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """The outputs of COLUMNS words of BYTES bytes for one token, summed over all kept features, ROWS of them at a time.

    Values are int8 levels where there is a scale. A sum is computed by one program from beginning to end, so that its
    order and result are always the same.
    """
    LEVELS: tl.constexpr = scale_ptr is not None
    CODES: tl.constexpr = 4 * BYTES
    width = N // CODES
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    token = tl.program_id(1)
    inside = columns < width
    if DEPENDENT:
        gdc_wait()
        gdc_launch_dependents()
    values_ptr += token * list_stride
    indices_ptr += token * list_stride
    padded = tl.cdiv(K, LIST_UNIT) * LIST_UNIT
    places = tl.arange(0, ROWS)
    value = tl.load(values_ptr + places, mask=places < padded, other=0.0)
    row = tl.load(indices_ptr + places, mask=places < padded, other=0)
    KIND: tl.constexpr = tl.int32 if LEVELS else tl.float32
    sums = ()
    for _ in tl.static_range(CODES):
        sums = sums + (tl.zeros([LANES, COLUMNS], KIND),)
    total = tl.zeros([ROWS], KIND)
    for start in tl.range(0, K, ROWS):
        kept = start + places < K
        word = tl.load(
            codes_ptr + row[:, None].to(tl.int64) * width + columns[None, :],
            mask=kept[:, None] & inside[None, :],
            other=0,
            eviction_policy="evict_first",
        ).to(tl.int32)
        following = start + ROWS + places  # the list's next part is loading while these rows are
        next_value = tl.load(values_ptr + following, mask=following < padded, other=0.0)
        next_row = tl.load(indices_ptr + following, mask=following < padded, other=0)
        value = tl.where(kept, value, 0.0).to(KIND)
        total += value
        added = ()
        if LEVELS and BYTES == 4:
            lower = ()
            upper = ()
            for code in tl.static_range(8):  # of bytes 0 and 2, then of 1 and 3
                pair = _sums(value[:, None] * ((word >> (2 * code)) & 0x00030003), LANES)
                low = (pair << 16) >> 16
                lower = lower + (low,)
                upper = upper + ((pair - low) >> 16,)
            added = lower + upper
        else:
            for code in tl.static_range(CODES):
                added = added + (_sums(value[:, None] * ((word >> (2 * code)) & 3).to(KIND), LANES),)
        summed = ()
        for code in tl.static_range(CODES):
            summed = summed + (sums[code] + added[code],)
        sums = summed
        value, row = next_value, next_row

    # All in one reduction: [LANES, COLUMNS] a code, which stands in the bits of new axes, the lowest bit first.
    y = tl.reshape(tl.sum(join(sums, 0, CODES), axis=0), [COLUMNS * CODES]) - tl.sum(total)
    place = tl.arange(0, COLUMNS * CODES)
    code = place % CODES
    column = (tl.program_id(0) * COLUMNS + place // CODES) * BYTES
    # The axes of `join` put the last bit of a code's number first.
    if BYTES == 4:
        code = (code & 1) << 3 | (code & 2) << 1 | (code & 4) >> 1 | (code & 8) >> 3
    else:
        code = (code & 1) << 1 | (code & 2) >> 1
    column += code // 4
    inside = column < width * BYTES
    alpha = tl.load(alpha_ptr + column, mask=inside, other=0.0)
    out = tl.load(first_ptr + column, mask=inside, other=0)
    out += (code % 4) * tl.load(step_ptr + column, mask=inside, other=0)
    y = y.to(tl.float32) * alpha
    if LEVELS:
        y *= tl.load(scale_ptr + token)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + out, mask=inside, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + token * N + out, mask=inside, other=0.0)
        y = residual.to(tl.float32) + y.to(y_ptr.dtype.element_ty).to(tl.float32)
    tl.store(y_ptr + token * N + out, y.to(y_ptr.dtype.element_ty), mask=inside)


@dataclass(frozen=True)
class TernaryTile:
    """What one program works on: ROWS and COLUMNS of the kernel, columns in words of so many bytes."""

    rows: int
    columns: int
    bytes: int
    warps: int

    @classmethod
    def of(cls, features: int, whole_words: bool) -> "TernaryTile":
        """The tile for that many output features: at least about half a program for each multiprocessor."""
        if not whole_words:
            return cls(256, 16, 1, 8)
        return cls(512, 8 if features <= 8192 else 16, 4, 8)

    @property
    def lanes(self) -> int:
        """How many rows the program's threads read at a time, each thread four neighbouring words of one."""
        return min(32 * self.warps * min(4, self.columns) // self.columns, self.rows)


def launch_ternary_linear(
    kept: Survivors,
    weights: TernaryWeights,
    bias: Tensor | None,
    residual: Tensor | None,
    tile: TernaryTile | None = None,
) -> Tensor:
    """Run the kernel: survivors `[..., K]`, whose lists are laid out as by `new_lists`, to `[..., N]`."""
    values, indices, scale = kept
    features, count = weights.shape[1], values.shape[-1]
    y = values.new_empty(*values.shape[:-1], features)
    if y.numel() == 0:
        return y
    words = weights.codes.shape[1] % 4 == 0 and weights.codes.data_ptr() % 16 == 0
    tile = tile or TernaryTile.of(features, words)
    options = launch_options(values)
    with torch.cuda.device_of(values):
        ternary_linear_kernel[(triton.cdiv(features, 4 * tile.bytes * tile.columns), math.prod(values.shape[:-1]))](
            values,
            indices,
            scale,
            weights.codes.view(torch.int32) if tile.bytes == 4 else weights.codes,
            weights.scale,
            weights.first,
            weights.step,
            bias,
            residual,
            y,
            count,
            padded_length(count),
            features,
            BYTES=tile.bytes,
            ROWS=tile.rows,
            COLUMNS=tile.columns,
            LANES=tile.lanes,
            DEPENDENT=bool(options),
            num_warps=tile.warps,
            **options,
        )
    return y


@torch.library.custom_op("qsparse::ternary_linear", mutates_args=())
def _ternary_linear(
    values: Tensor,
    indices: Tensor,
    scale: Tensor | None,
    codes: Tensor,
    alpha: Tensor,
    first: Tensor,
    step: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
) -> Tensor:
    residual = None if residual is None else residual.contiguous()
    kept = Survivors(*padded_lists(values, indices), scale)
    return launch_ternary_linear(kept, TernaryWeights(codes, alpha, first, step), bias, residual)


@_ternary_linear.register_fake
def _(values, indices, scale, codes, alpha, first, step, bias, residual):
    return values.new_empty(*values.shape[:-1], 4 * codes.shape[1])


class TritonTernaryLinear:
    """The product on this kernel."""

    def refuses(self, tensors: Sequence[Tensor], asked: bool) -> str | None:
        return refuses(tensors, asked)

    def product(self, kept: Survivors, weights: TernaryWeights, bias: Tensor | None, residual: Tensor | None) -> Tensor:
        return _ternary_linear(*kept, *weights.tensors(), bias, residual)
