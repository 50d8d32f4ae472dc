"""The decode product: for a few tokens, reads the weights of the features that survived a selection, and no others.

Weights are input-major, so that those of one feature are a contiguous row: see `weights.py` for their formats.

Shapes: T tokens, D features in, K of them kept, N features out.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ..modeling.backend import choose
from ..modeling.bitnet import CODES_IN_A_BYTE
from ..modeling.sparsify import Survivors
from .weights import FloatWeights, TernaryWeights, Weights

_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


class SparseLinearImplementation(Protocol):
    """One way to compute the product for a format of weights."""

    def refuses(self, tensors: Sequence[Tensor], asked: bool) -> str | None:
        """Why it does not run on these, or None if it does; `asked` if the caller named it."""

    def product(self, kept: Survivors, weights: Any, bias: Tensor | None, residual: Tensor | None) -> Tensor:
        """`[..., N]` of survivors `[..., K]`, weights `[D, N]`, `bias [N]` and `residual [..., N]`."""


class TorchSparseLinear:
    """The product from PyTorch's operators, given how to sum weighted rows: `sum_rows(values, indices, weights)`."""

    def __init__(self, sum_rows: Callable[..., Tensor]) -> None:
        self.sum_rows = sum_rows

    def refuses(self, tensors: Sequence[Tensor], asked: bool) -> str | None:
        return None

    def product(self, kept: Survivors, weights: Any, bias: Tensor | None, residual: Tensor | None) -> Tensor:
        values, indices, scale = kept
        lists = math.prod(values.shape[:-1]), values.shape[-1]
        y = self.sum_rows(values.reshape(lists), indices.reshape(lists), weights)
        if scale is not None:
            y = y * scale.reshape(-1, 1)
        if bias is not None:
            y = y + bias
        y = y.to(values.dtype).reshape(*values.shape[:-1], weights.shape[1])
        return y if residual is None else residual + y


def _sum_of_bags(values: Tensor, indices: Tensor, weights: FloatWeights) -> Tensor:
    """By `embedding_bag`, which sums indexed rows with weights, in fp32, and rounds to their dtype.

    PyTorch gives a bag to one thread, so a row is cut into as many bags as there are threads for a token.
    """
    weight = weights.values
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


def _sum_of_codes(values: Tensor, indices: Tensor, weights: TernaryWeights) -> Tensor:
    """By a product for each of the four codes in a byte, token by token."""
    wide = values.to(torch.promote_types(values.dtype, torch.float32))
    y = wide.new_zeros(values.shape[0], weights.shape[1])
    for token, (value, row) in enumerate(zip(wide, indices.long(), strict=True)):
        codes = weights.codes[row]
        for number in range(CODES_IN_A_BYTE):
            sums = value @ (codes >> 2 * number & 3).to(value.dtype) - value.sum()
            y[token, weights.first + number * weights.step] = sums * weights.scale
    return y


def _sum_as_written(values: Tensor, indices: Tensor, weights: Weights) -> Tensor:
    """By gathering the rows, `[T, K, N]`, and one product: the reference that tests compare others with."""
    rows = weights.rows(indices)
    return torch.einsum("tk,tkn->tn", values.to(rows.dtype), rows)


FloatWeights.products |= {"torch": TorchSparseLinear(_sum_of_bags), "reference": TorchSparseLinear(_sum_as_written)}
TernaryWeights.products |= {"torch": TorchSparseLinear(_sum_of_codes), "reference": TorchSparseLinear(_sum_as_written)}


def sparse_linear(
    kept: Survivors,
    weights: Tensor | Weights,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """`x @ weights + bias`, then `+ residual`, for an `x` given as its survivors. No gradient.

    Sums in fp32 or wider, in an order that depends on shapes alone. Rounds where a linear and a sum behind it would,
    and the backend "torch" also before it scales or adds a bias.

    Args:
        kept: values and indices `[..., K]`, as `topk_sparsify(..., compact=True)` returns them. The indices must be
            below D: kernels read what they name.
        weights: `[D, N]`, contiguous; bf16, fp16, fp32 or fp64 as the values; or in another format.
        bias: `[N]`.
        residual: `[..., N]`.
        backend: None for the first in the format's `products` that takes them, or a name there.

    Returns:
        `[..., N]` of the values' dtype.

    Raises:
        ValueError: shapes or devices that do not go together, a weight that is not contiguous, a named backend that
            cannot run.
        TypeError: dtypes that differ or are not of these.
    """
    values, indices, scale = kept
    if isinstance(weights, Tensor):
        if weights.ndim != 2 or not weights.is_contiguous():
            raise ValueError(
                f"weights must be [features in, features out] and contiguous, got shape {tuple(weights.shape)} with "
                f"strides {weights.stride()}"
            )
        weights = FloatWeights(weights)
    stored = weights.tensors()
    of_one_dtype = [
        each for each in (values, stored[0], bias, residual) if each is not None and each.dtype != torch.uint8
    ]
    if values.dtype not in _DTYPES or any(each.dtype != values.dtype for each in of_one_dtype):
        allowed = ", ".join(map(str, _DTYPES))
        got = ", ".join(str(each.dtype) for each in of_one_dtype)
        raise TypeError(f"all must be of one dtype of {allowed}, got {got}")
    features, out = weights.shape
    shape = *values.shape[:-1], out
    if indices.shape != values.shape or values.shape[-1] > features:
        raise ValueError(
            f"values and indices must be alike and have at most {features} features, got {tuple(values.shape)} "
            f"and {tuple(indices.shape)}"
        )
    for name, each, wanted in (
        ("bias", bias, shape[-1:]),
        ("residual", residual, shape),
        ("scale", scale, (*shape[:-1], 1)),
    ):
        if each is not None and each.shape != wanted:
            raise ValueError(f"{name} must have shape {tuple(wanted)}, got {tuple(each.shape)}")
    given = [each for each in (values, bias, residual) if each is not None]
    if len(places := {str(each.device) for each in (*given, indices, *stored)}) > 1:
        raise ValueError(
            f"values, indices, weights, bias and residual must be on one device, got {', '.join(sorted(places))}"
        )
    with torch.no_grad():
        return choose(weights.products, given, backend).product(kept, weights, bias, residual)
