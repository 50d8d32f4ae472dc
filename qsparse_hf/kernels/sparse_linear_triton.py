"""Triton kernel of the decode product: reads the weight's rows of the features that survived, and no others.

Shapes: T tokens, D features in, K of them kept, N features out. The weight is input-major, `[D, N]`: the weights of a
feature are one contiguous row.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..decode.weights import FloatWeights
from ..modeling.sparsify import Survivors
from .sparsify_triton import LIST_UNIT, launch_options, padded_length, padded_lists
from .sparsify_triton_ops import refuses

try:
    import triton
    import triton.language as tl
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
except ImportError as error:
    raise ImportError("the decode product's kernel needs the package triton") from error


@triton.jit
def _listed(values_ptr, indices_ptr, places, padded):
    """Values and rows at these places of a list. Padding is loaded too: a mask inside a vector would split its load."""
    inside = places < padded
    return tl.load(values_ptr + places, mask=inside, other=0.0), tl.load(indices_ptr + places, mask=inside, other=0)


@triton.jit(do_not_specialize=["K"])  # one kernel for all sparsities that share a tile
def sparse_linear_kernel(
    values_ptr,
    indices_ptr,
    scale_ptr,
    weight_ptr,
    bias_ptr,
    residual_ptr,
    y_ptr,
    K,
    list_stride,
    N,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    LANES: tl.constexpr,
    STAGES: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """COLUMNS output features of one token, summed over all kept features, ROWS of them at a time.

    A sum is computed by one program from beginning to end, so that its order and result are always the same.
    """
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    token = tl.program_id(1)
    inside = columns < N
    if DEPENDENT:
        gdc_wait()
        gdc_launch_dependents()
    values_ptr += token * list_stride
    indices_ptr += token * list_stride
    padded = tl.cdiv(K, LIST_UNIT) * LIST_UNIT
    # A thread reads 16 bytes of every LANES-th row, and sums these as they arrive.
    sums = tl.zeros([LANES, COLUMNS], tl.float32)
    places = tl.arange(0, ROWS)
    if STAGES == 1:
        value, row = _listed(values_ptr, indices_ptr, places, padded)
    for first in tl.range(0, K, ROWS, num_stages=STAGES):
        if STAGES > 1:  # the compiler loads lists as many stages ahead as rows
            value, row = _listed(values_ptr, indices_ptr, first + places, padded)
        kept = first + places < K
        weight = tl.load(
            weight_ptr + row[:, None].to(tl.int64) * N + columns[None, :],
            mask=kept[:, None] & inside[None, :],
            other=0.0,
            eviction_policy="evict_first",
        )
        if STAGES == 1:  # load the list's next part while these rows are loading
            next_value, next_row = _listed(values_ptr, indices_ptr, first + ROWS + places, padded)
        weighted = tl.where(kept, value, 0.0).to(tl.float32)[:, None] * weight.to(tl.float32)
        sums += tl.sum(tl.reshape(weighted, [ROWS // LANES, LANES, COLUMNS]), axis=0)
        if STAGES == 1:
            value, row = next_value, next_row
    y = tl.sum(sums, axis=0)
    if scale_ptr is not None:
        y *= tl.load(scale_ptr + token)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + token * N + columns, mask=inside, other=0.0)
        y = residual.to(tl.float32) + y.to(y_ptr.dtype.element_ty).to(tl.float32)
    tl.store(y_ptr + token * N + columns, y.to(y_ptr.dtype.element_ty), mask=inside)


@dataclass(frozen=True)
class ProductTile:
    """What one program works on: ROWS, COLUMNS and STAGES of the kernel."""

    rows: int
    columns: int
    warps: int
    stages: int

    @classmethod
    def of(cls, kept: int, features: int, element_size: int) -> "ProductTile":
        """The tile for that many kept and output features: at least about one program for each multiprocessor.

        All programs' outstanding loads together have to fill the memory pipeline, so where there are few programs with
        long lists, each loads three stages ahead.
        """
        rows = 1024 // element_size
        if features <= 2048:
            return cls(2 * rows, 16, 8, 1)
        if features <= 4096 and kept >= 4 * rows:
            return cls(rows, 32, 8, 3)
        return cls(2 * rows, 32, 8, 1) if features <= 5120 else cls(rows, 64, 8, 1)


def launch_sparse_linear(
    values: Tensor,
    indices: Tensor,
    scale: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    tile: ProductTile | None = None,
) -> Tensor:
    """Run the kernel: `values`, `indices [..., K]`, `scale [..., 1]`, `weight [D, N]`, `bias [N]`, `residual [..., N]`.

    Returns `[..., N]`. Values and indices are laid out as by `new_lists`: their padding is read.
    """
    kept, features = values.shape[-1], weight.shape[1]
    y = values.new_empty(*values.shape[:-1], features)
    tokens = math.prod(values.shape[:-1])
    if y.numel() == 0:
        return y
    tile = tile or ProductTile.of(kept, features, weight.element_size())
    options = launch_options(values)
    with torch.cuda.device_of(values):
        sparse_linear_kernel[(triton.cdiv(features, tile.columns), tokens)](
            values,
            indices,
            scale,
            weight,
            bias,
            residual,
            y,
            kept,
            padded_length(kept),
            features,
            ROWS=tile.rows,
            COLUMNS=tile.columns,
            LANES=min(32 * tile.warps * (16 // weight.element_size()) // tile.columns, tile.rows),
            STAGES=tile.stages,
            DEPENDENT=bool(options),
            num_warps=tile.warps,
            **options,
        )
    return y


@torch.library.custom_op("qsparse::sparse_linear", mutates_args=())
def _sparse_linear(
    values: Tensor,
    indices: Tensor,
    scale: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
) -> Tensor:
    residual = None if residual is None else residual.contiguous()
    return launch_sparse_linear(*padded_lists(values, indices), scale, weight, bias, residual)


@_sparse_linear.register_fake
def _(values, indices, scale, weight, bias, residual):
    return values.new_empty(*values.shape[:-1], weight.shape[1])


class TritonSparseLinear:
    """The product on this kernel."""

    def refuses(self, tensors: Sequence[Tensor], asked: bool) -> str | None:
        return refuses(tensors, asked)

    def product(self, kept: Survivors, weights: FloatWeights, bias: Tensor | None, residual: Tensor | None) -> Tensor:
        return _sparse_linear(*kept, weights.values, bias, residual)
