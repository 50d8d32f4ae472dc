"""Top-K sparsification of activations, trained through with a straight-through estimator (Q-Sparse, arXiv 2407.10969).

One selection rule holds for every implementation, bit for bit: of each token's `D` features exactly
`kept_features(D, S)` survive, largest magnitude first, lowest index first among equals, and NaN counts as largest.

Shapes: D features of a token, M features of a block, K features kept.
"""

import torch
from torch import Tensor, nn

from .sparsity import check_block_size, check_rescale, check_sparsity, kept_features

# Floats of one width order like the integers with the same bits once the sign is dropped: that integer type, and the
# bits of infinity.
_BITS = {
    torch.float16: (torch.int16, 0x7C00),
    torch.bfloat16: (torch.int16, 0x7F80),
    torch.float32: (torch.int32, 0x7F800000),
    torch.float64: (torch.int64, 0x7FF0000000000000),
}


def magnitude(x: Tensor) -> Tensor:
    """`|x|` as integers with the same order; every NaN maps to one value above infinity. Same shape as `x`."""
    dtype, infinity = _BITS[x.dtype]
    return (x.view(dtype) & torch.iinfo(dtype).max).clamp_max(infinity + 1)


def _mask_by_sort(x: Tensor, kept: int) -> Tensor:
    """The selection rule as it is written: a stable descending sort. Slow; every other way is held against it."""
    indices = magnitude(x).sort(dim=-1, descending=True, stable=True).indices[..., :kept]
    return torch.zeros_like(x, dtype=torch.bool).scatter(-1, indices, True)


def _mask_by_threshold(x: Tensor, kept: int) -> Tensor:
    """All above the K-th magnitude, then the first of those equal to it."""
    magnitudes = magnitude(x)
    threshold = magnitudes.topk(kept, dim=-1, sorted=False).values.amin(dim=-1, keepdim=True)
    above, equal = magnitudes > threshold, magnitudes == threshold
    wanted = kept - above.sum(dim=-1, keepdim=True, dtype=torch.int32)
    return above | (equal & (equal.cumsum(dim=-1, dtype=torch.int32) <= wanted))


IMPLS = {"torch": _mask_by_threshold, "reference": _mask_by_sort}
"""Implementations by name, the default first: `impl(x [..., D], kept)` is the bool mask [..., D] of what survives."""


class _StraightThrough(torch.autograd.Function):
    """`x * mask` whose gradient ignores the mask: `dL/dx = dL/dy` (eq. 13). Saves nothing for backward."""

    @staticmethod
    def forward(x: Tensor, mask: Tensor) -> Tensor:
        return torch.where(mask, x, 0)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        pass

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def _divide_by_l2_norm(x: Tensor) -> Tensor:
    """`x / ||x||_2` over the last dimension, computed in at least fp32; a row of zeros stays zero."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    # Neither value nor gradient depends on a constant factor; with 1 the largest entry, no square over- or underflows.
    largest = wide.detach().abs().amax(dim=-1, keepdim=True)
    wide = wide / torch.where(largest > 0, largest, 1)
    norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    return (wide / torch.where(norm > 0, norm, 1)).to(x.dtype)


def topk_sparsify(
    x: Tensor,
    sparsity: float,
    block_size: int | None = None,
    rescale: str = "none",
    ste: bool = True,
    backend: str | None = None,
) -> Tensor:
    """Keep the `K` largest magnitudes of each token and zero the others (eq. 2-3).

    Args:
        x: activations `[..., D]`; fp32, bf16, fp16 or fp64; any leading shape, any strides.
        sparsity: fraction of zeros, 0 <= sparsity < 1. At 0 the operator is off and `x` itself is returned.
        block_size: None, or `M`: the top-K is taken inside each `M` consecutive features (Block Q-Sparse, N:M).
        rescale: `"l2"` divides each token by the L2 norm of what survived; its gradient is exact.
        ste: the mask is the identity in the backward pass (eq. 13). False masks the gradient too (eq. 12).
        backend: None for the default, or a name in `IMPLS`.

    Returns:
        A tensor of `x`'s shape and dtype (`x` itself at sparsity 0).

    Raises:
        ValueError: an argument outside these ranges, or `x` without a feature dimension.
        TypeError: `x` is not of one of these dtypes.
    """
    check_sparsity(sparsity)
    check_rescale(rescale)
    if backend is not None and backend not in IMPLS:
        raise ValueError(f"backend must be None or one of {', '.join(map(repr, IMPLS))}, got {backend!r}")
    if x.dtype not in _BITS:
        raise TypeError(f"x must be one of {', '.join(map(str, _BITS))}, got {x.dtype}")
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(f"x must have a last dimension of at least one feature, got shape {tuple(x.shape)}")
    check_block_size(block_size, x.shape[-1])
    if sparsity == 0:
        return x

    blocks = x if block_size is None else x.unflatten(-1, (-1, block_size))
    with torch.no_grad():
        mask = IMPLS[backend or next(iter(IMPLS))](blocks, kept_features(blocks.shape[-1], sparsity)).reshape(x.shape)
    y = _StraightThrough.apply(x, mask) if ste else torch.where(mask, x, 0)
    return _divide_by_l2_norm(y) if rescale == "l2" else y


class Sparsify(nn.Module):
    """`topk_sparsify` with its settings, as a child without parameters: it shows in `print(model)` and takes hooks."""

    def __init__(self, sparsity: float, block_size: int | None, rescale: str, ste: bool) -> None:
        super().__init__()
        self.sparsity = sparsity
        self.block_size = block_size
        self.rescale = rescale
        self.ste = ste
        self.factor = 1.0  # below 1 while training ramps the sparsity up

    def forward(self, x: Tensor) -> Tensor:
        return topk_sparsify(x, self.sparsity * self.factor, self.block_size, self.rescale, self.ste)

    def extra_repr(self) -> str:
        sparsity = self.sparsity * self.factor
        return f"sparsity={sparsity:g}, block_size={self.block_size}, rescale={self.rescale!r}, ste={self.ste}"
