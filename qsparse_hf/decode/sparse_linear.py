"""The decode product: for a few tokens, reads the weights of the features that survived a selection, and no others.

The weight is input-major, so that the weights of one feature are a contiguous row: see `layout.py`.

Shapes: T tokens, D features in, K of them kept, N features out.
"""

import math
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ..modeling.backend import choose
from ..modeling.sparsify import Survivors

_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


class SparseLinearImplementation(Protocol):
    """One way to compute the product."""

    def refuses(self, tensors: Sequence[Tensor], asked: bool) -> str | None:
        """Why it does not run on these, or None if it does; `asked` if the caller named it."""

    def product(
        self, values: Tensor, indices: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None
    ) -> Tensor:
        """`[..., N]` of `values` and `indices [..., K]`, `weight [D, N]`, `bias [N]` and `residual [..., N]`."""


class TorchSparseLinear:
    """The product from PyTorch's operators, given how to sum weighted rows: `sum_rows(values, indices, weight)`."""

    def __init__(self, sum_rows: Callable[..., Tensor]) -> None:
        self.sum_rows = sum_rows

    def refuses(self, tensors: Sequence[Tensor], asked: bool) -> str | None:
        return None

    def product(
        self, values: Tensor, indices: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None
    ) -> Tensor:
        lists = math.prod(values.shape[:-1]), values.shape[-1]
        y = self.sum_rows(values.reshape(lists), indices.reshape(lists), weight)
        if bias is not None:
            y = y + bias
        y = y.to(values.dtype).reshape(*values.shape[:-1], weight.shape[1])
        return y if residual is None else residual + y


def _sum_of_bags(values: Tensor, indices: Tensor, weight: Tensor) -> Tensor:
    """By `embedding_bag`, which sums indexed rows with weights, in fp32, and rounds to their dtype.

    PyTorch gives a bag to one thread, so a row is cut into as many bags as there are threads for a token.
    """
    tokens, kept = values.shape
    alone = weight.device.type != "cpu" or torch.compiler.is_compiling()
    threads = 1 if alone else torch.get_num_threads()
    pieces = math.gcd(max(threads // max(tokens, 1), 1), weight.shape[1])
    piece = torch.arange(pieces, dtype=indices.dtype, device=indices.device)
    indices = (indices[:, None, :] * pieces + piece[:, None]).flatten()
    offsets = torch.arange(tokens * pieces, dtype=indices.dtype, device=indices.device) * kept
    values = values[:, None, :].expand(-1, pieces, -1).flatten()
    bags = F.embedding_bag(
        indices,
        weight.view(weight.shape[0] * pieces, weight.shape[1] // pieces),
        offsets,
        mode="sum",
        per_sample_weights=values,
    )
    return bags.view(tokens, weight.shape[1])


def _sum_as_written(values: Tensor, indices: Tensor, weight: Tensor) -> Tensor:
    """By gathering the rows, `[T, K, N]`, and one product: the reference that tests compare others with."""
    wide = torch.promote_types(values.dtype, torch.float32)
    return torch.einsum("tk,tkn->tn", values.to(wide), weight[indices.long()].to(wide))


LINEAR_IMPLS: dict[str, SparseLinearImplementation] = {
    "torch": TorchSparseLinear(_sum_of_bags),
    "reference": TorchSparseLinear(_sum_as_written),
}
"""Implementations by name, the preferred first; kernels add themselves with `backend.prefer`."""


def sparse_linear(
    kept: Survivors,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """`x @ weight + bias`, then `+ residual`, for an `x` given as its survivors. No gradient.

    Sums in fp32 or wider, in an order that depends on shapes alone. Rounds where a linear and a sum behind it would,
    and the backend "torch" also before it adds a bias.

    Args:
        kept: values and indices `[..., K]`, as `topk_sparsify(..., compact=True)` returns them. The indices must be
            below D: kernels read what they name.
        weight: `[D, N]`, contiguous; bf16, fp16, fp32 or fp64 as the values.
        bias: `[N]`.
        residual: `[..., N]`.
        backend: None for the first in `LINEAR_IMPLS` that takes them, or a name there.

    Returns:
        `[..., N]` of their dtype.

    Raises:
        ValueError: shapes or devices that do not go together, a weight that is not contiguous, a named backend that
            cannot run.
        TypeError: dtypes that differ or are not of these.
    """
    values, indices = kept
    given = [each for each in (values, weight, bias, residual) if each is not None]
    if values.dtype not in _DTYPES or any(each.dtype != values.dtype for each in given):
        allowed = ", ".join(map(str, _DTYPES))
        raise TypeError(f"all must be of one dtype of {allowed}, got {', '.join(str(each.dtype) for each in given)}")
    if weight.ndim != 2 or not weight.is_contiguous():
        raise ValueError(
            f"weight must be [features in, features out] and contiguous, got shape {tuple(weight.shape)} with strides "
            f"{weight.stride()}"
        )
    shape = *values.shape[:-1], weight.shape[1]
    if indices.shape != values.shape or values.shape[-1] > weight.shape[0]:
        raise ValueError(
            f"values and indices must be alike and have at most {weight.shape[0]} features, got {tuple(values.shape)} "
            f"and {tuple(indices.shape)}"
        )
    for name, each, wanted in (("bias", bias, shape[-1:]), ("residual", residual, shape)):
        if each is not None and each.shape != wanted:
            raise ValueError(f"{name} must have shape {tuple(wanted)}, got {tuple(each.shape)}")
    if any(each.device != weight.device for each in (*given, indices)):
        places = ", ".join(sorted({str(each.device) for each in (*given, indices)}))
        raise ValueError(f"values, indices, weight, bias and residual must be on one device, got {places}")
    with torch.no_grad():
        return choose(LINEAR_IMPLS, given, backend).product(values, indices, weight, bias, residual)
