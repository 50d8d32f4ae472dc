# SPDX-License-Identifier: Apache-2.0
"""BitNet b1.58: ternary weights and int8 activations, trained through with straight-through estimators (eq. 4-10).

Quantized values are kept as floats, `code * scale`, so that every product stays PyTorch's. Packed, a weight takes two
bits, in Transformers' BitNet layout: four rows of a matrix share a byte.

Shapes: D features in, N features out.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WEIGHT_QUANTIZATIONS = ("none", "ternary")

LEAST_SCALE = 1e-5
"""The least mean or largest magnitude that a scale is made of: the epsilon of Transformers and of BitNet's authors."""


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def int8_levels(x: Tensor) -> tuple[Tensor, Tensor]:
    """`round(127 x / gamma)` clipped to int8, in at least fp32, and `gamma / 127 [..., 1]`, with `gamma = max|x|`."""
    wide = _wide(x)
    largest = wide.abs().amax(dim=-1, keepdim=True).clamp_min(LEAST_SCALE)
    return (wide * (127 / largest)).round().clamp(-128, 127), largest / 127


class _RoundActivations(torch.autograd.Function):
    """Levels times their step, whose gradient is that of the identity."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        levels, step = int8_levels(x)
        return (levels * step).to(x.dtype)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        pass

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad


def quantize_activations(x: Tensor) -> Tensor:
    """`x [..., D]` rounded to 255 levels of each token, `gamma / 127` apart, with `gamma = max|x|` (eq. 6-7).

    Computed in at least fp32 and rounded to `x`'s dtype. Zeros stay zeros, so it may follow a selection, which keeps a
    token's largest entry. The gradient is that of the identity.
    """
    return _RoundActivations.apply(x)


def ternary(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes -1, 0 and 1 of a weight of any shape, in at least fp32, and their scale `alpha = mean|W|` (eq. 8-10)."""
    wide = _wide(weight.detach())
    scale = wide.abs().mean().clamp_min(LEAST_SCALE)
    return (wide / scale).round().clamp(-1, 1), scale


class _Ternarize(torch.autograd.Function):
    """The weight on its way to `code * alpha`, whose gradient is that of the identity."""

    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor, strength: float) -> Tensor:
        codes, scale = ternary(weight)
        quantized = codes * scale
        return (quantized if strength == 1 else torch.lerp(_wide(weight), quantized, strength)).to(weight.dtype)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        pass

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def quantize_weight(weight: Tensor, strength: float = 1.0) -> Tensor:
    """The weight as codes -1, 0, 1 times their scale, of the same shape and dtype; a gradient passes as it is.

    Args:
        weight: of any shape; one scale for all of it.
        strength: 1 for ternary weights, 0 for the weight itself, between them on the line between both.
    """
    return _Ternarize.apply(weight, strength)


CODES_IN_A_BYTE = 4


def pack(codes: Tensor) -> Tensor:
    """Codes -1, 0, 1 `[N, D]` as uint8 `[N / 4, D]`: bits 2i and 2i + 1 of `[r, c]` hold `codes[i N / 4 + r, c] + 1`.

    Raises:
        ValueError: N is no multiple of four.
    """
    rows = codes.shape[0]
    if rows % CODES_IN_A_BYTE:
        raise ValueError(f"four rows share a byte, so their number must be a multiple of four, got {rows}")
    quarters = (codes + 1).to(torch.uint8).unflatten(0, (CODES_IN_A_BYTE, -1))
    return quarters[0] | quarters[1] << 2 | quarters[2] << 4 | quarters[3] << 6


def unpack(packed: Tensor, dtype: torch.dtype) -> Tensor:
    """The codes `[N, D]` that `pack` was given, of a floating dtype."""
    codes = packed.new_empty(CODES_IN_A_BYTE, *packed.shape, dtype=dtype)
    for i in range(CODES_IN_A_BYTE):
        codes[i].copy_((packed >> 2 * i).bitwise_and_(3).view(torch.int8).sub_(1))
    return codes.flatten(0, 1)


def holds_illegal_code(packed: Tensor) -> bool:
    """Whether two bits of some byte are 11, which stand for no code."""
    return bool((packed & packed >> 1 & 0b01010101).any())


class PackedLinear(nn.Module):
    """A linear with a packed ternary weight, which it unpacks in every product. It is not trained.

    State dicts hold what Transformers' BitNet layers do: `weight` uint8 `[N / 4, D]`, `weight_scale [1]`, `bias [N]`.

    Args:
        in_features: D.
        out_features: N, a multiple of four.
        bias: whether there is one.
        divides: `weight_scale` holds `1 / alpha`, as for Transformers' `bitlinear`, and not `alpha`, as for its
            `autobitlinear`.
    """

    weight: Tensor
    weight_scale: Tensor
    bias: Tensor | None

    def __init__(self, in_features: int, out_features: int, bias: bool, divides: bool) -> None:
        super().__init__()
        if out_features % CODES_IN_A_BYTE:
            raise ValueError(
                f"packed weights need a number of output features that is a multiple of four, got {out_features}"
            )
        self.in_features, self.out_features, self.divides = in_features, out_features, divides
        self.register_buffer("weight", torch.zeros(out_features // CODES_IN_A_BYTE, in_features, dtype=torch.uint8))
        self.register_buffer("weight_scale", torch.ones(1, dtype=torch.float32))
        self.register_buffer("bias", torch.zeros(out_features) if bias else None)

    def scale(self) -> Tensor:
        """`alpha`, fp32 `[1]`."""
        scale = self.weight_scale.float()
        return 1 / scale if self.divides else scale

    def forward(self, x: Tensor) -> Tensor:
        if self.weight.shape[0] * CODES_IN_A_BYTE != self.out_features:
            raise ValueError("packed weights cannot be split among processes: tensor parallelism needs plain ones")
        weight = unpack(self.weight, x.dtype).mul_(self.scale().to(x.dtype))  # after it, a sum of codes could overflow
        return F.linear(x, weight, self.bias)

    def check(self, place: str) -> None:
        """Raise a ValueError that begins with `place` and a tensor's name unless codes and scale are such."""
        if not (self.scale() > 0).logical_and(self.scale() < torch.inf).all():
            raise ValueError(f"{place}weight_scale must be positive and finite, got {self.weight_scale.tolist()}")
        if holds_illegal_code(self.weight):
            raise ValueError(f"{place}weight holds a code of bits 11; allowed are 00, 01 and 10")

    def _apply(self, fn, recurse=True):
        scale = self.weight_scale
        super()._apply(fn, recurse)
        if self.weight_scale.dtype != scale.dtype:  # `.to(torch.bfloat16)`: a rounded scale would be another model's
            self.weight_scale = scale.to(self.weight_scale.device)
        return self

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class TernaryLinear(nn.Linear):
    """A linear whose weight is ternary in every product and keeps its full precision for training.

    The class that a model's projections take on; it adds no parameter. `strength` is that of `quantize_weight`.
    """

    strength = 1.0

    def forward(self, x: Tensor) -> Tensor:
        if self.weight.shape[0] != self.out_features:
            raise ValueError(
                f"a ternary weight needs all of its {self.out_features} rows for its scale, and this process has "
                f"{self.weight.shape[0]}: tensor parallelism needs weights that are quantized already"
            )
        return F.linear(x, quantize_weight(self.weight, self.strength), self.bias)
