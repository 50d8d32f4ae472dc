"""How weights of a prepared model are stored: input-major, so that a product reads surviving features' rows alone.

A format is a small object with the weights of linears that read one input, side by side, and the table of products that
read it; callers know no format.

Shapes: D features in, N features out.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from ..modeling.bitnet import CODES_IN_A_BYTE


class Weights(Protocol):
    """Weights `[D, N]` in some format."""

    products: ClassVar[dict]
    """Implementations of the product by name, the preferred first; kernels add themselves with `backend.prefer`."""

    @property
    def shape(self) -> tuple[int, int]:
        """D and N."""

    @property
    def nbytes(self) -> int:
        """Bytes of all rows, with what is needed to read them."""

    def tensors(self) -> tuple[Tensor, ...]:
        """What it is stored in, the rows first."""

    def rows(self, indices: Tensor) -> Tensor:
        """The weights of some features, `[..., N]` for `indices [...]`, in at least fp32."""


@dataclass(frozen=True)
class FloatWeights:
    """Weights as they are: `values [D, N]`, contiguous; bf16, fp16, fp32 or fp64."""

    values: Tensor
    products: ClassVar[dict] = {}

    @property
    def shape(self) -> tuple[int, int]:
        return self.values.shape[0], self.values.shape[1]

    @property
    def nbytes(self) -> int:
        return self.values.nbytes

    def tensors(self) -> tuple[Tensor, ...]:
        return (self.values,)

    def rows(self, indices: Tensor) -> Tensor:
        return self.values[indices.long()].to(torch.promote_types(self.values.dtype, torch.float32))


@dataclass(frozen=True)
class TernaryWeights:
    """Ternary weights, four in a byte.

    A linear's packed weight `[N / 4, D]` (see `bitnet.pack`) need only be transposed: in a feature's row its byte `r`
    holds the codes of the outputs `r`, `N / 4 + r`, `N / 2 + r` and `3 N / 4 + r`.

    Attributes:
        codes: uint8 `[D, N / 4]`, contiguous.
        scale: fp32 (or fp64) `[N / 4]`: what the codes of a byte are multiplied by.
        first: int32 `[N / 4]`: the output of a byte's lowest code.
        step: int32 `[N / 4]`: how far the outputs of its codes are apart.
    """

    codes: Tensor
    scale: Tensor
    first: Tensor
    step: Tensor
    products: ClassVar[dict] = {}

    @classmethod
    def of(cls, packed: Sequence[Tensor], scales: Sequence[Tensor]) -> "TernaryWeights":
        """Of linears' packed weights `[N / 4, D]` and their scales, one number each, side by side."""
        quarters = [weight.shape[0] for weight in packed]
        device = packed[0].device
        starts = [CODES_IN_A_BYTE * sum(quarters[:number]) for number in range(len(quarters))]

        def columns(each: Callable[[int], Tensor]) -> Tensor:
            return torch.cat([each(number) for number in range(len(quarters))])

        return cls(
            torch.cat([weight.t() for weight in packed], dim=1).contiguous(),
            columns(lambda number: scales[number].reshape(1).expand(quarters[number])),
            columns(lambda n: starts[n] + torch.arange(quarters[n], dtype=torch.int32, device=device)),
            columns(lambda n: torch.full((quarters[n],), quarters[n], dtype=torch.int32, device=device)),
        )

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], CODES_IN_A_BYTE * self.codes.shape[1]

    @property
    def nbytes(self) -> int:
        return sum(each.nbytes for each in self.tensors())

    def tensors(self) -> tuple[Tensor, ...]:
        return self.codes, self.scale, self.first, self.step

    def rows(self, indices: Tensor) -> Tensor:
        codes = self.codes[indices.long()]
        found = torch.empty(*codes.shape[:-1], self.shape[1], dtype=self.scale.dtype, device=codes.device)
        for number in range(CODES_IN_A_BYTE):
            found[..., self.first + number * self.step] = (
                (codes >> 2 * number & 3).to(self.scale.dtype) - 1
            ) * self.scale
        return found
