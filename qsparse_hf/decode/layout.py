"""The weights of a prepared model: input-major, so that the row of a feature that did not survive is not read.

`lay_out` puts the weights of linears that read one input side by side into one input-major tensor and makes their
parameters views of it; `put_back` gives them the usual strides. Names, shapes and values stay, nothing is kept twice.

Shapes: D features in, N features out.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..modeling.bitnet import PackedLinear, TernaryLinear, pack, ternary
from ..modeling.sparsify import Survivors
from .prepared import Prepared, prepared_class
from .sparse_linear import sparse_linear
from .weights import FloatWeights, TernaryWeights, Weights


def copied_from(linear: nn.Module) -> Tensor | None:
    """The tensor of a linear's that its rows hold a copy of, and no view; None where there is none."""
    if isinstance(linear, TernaryLinear):
        return linear.weight
    return linear.weight_scale if isinstance(linear, PackedLinear) else None


class Rows:
    """Input-major weights, side by side, of linears that read one input.

    Plain and packed weights become views of these. Master weights of ternary linears stay where they are.
    """

    def __init__(self, linears: Sequence[Any]) -> None:
        self.sizes = [linear.out_features for linear in linears]
        kept = [linear.weight.detach() for linear in linears]
        if isinstance(linears[0], TernaryLinear):
            codes, scales = zip(*map(ternary, kept), strict=True)
            self.weights: Weights = TernaryWeights.of([pack(each) for each in codes], scales)
        elif isinstance(linears[0], PackedLinear):
            self.weights = TernaryWeights.of(kept, [linear.scale() for linear in linears])
        else:
            self.weights = FloatWeights(torch.cat([weight.t() for weight in kept], dim=1))
        if not isinstance(linears[0], TernaryLinear):
            rows = self.weights.tensors()[0].split([weight.shape[0] for weight in kept], dim=1)
            for linear, view in zip(linears, rows, strict=True):
                linear.weight.data = view.t()
        self.bias = None
        if any(linear.bias is not None for linear in linears):
            zeros = next(linear.bias for linear in linears if linear.bias is not None).new_zeros
            self.bias = torch.cat(
                [zeros(linear.out_features) if linear.bias is None else linear.bias.detach() for linear in linears]
            )
            for linear, part in zip(linears, self.bias.split(self.sizes), strict=True):
                if linear.bias is not None:
                    linear.bias.data = part
        self.places = self._places(linears)

    @staticmethod
    def _places(linears: Sequence[Any]) -> list[tuple[int, int] | None]:
        """Where weights and biases lie, and how often those have changed of which this holds something else."""
        shared = [each for linear in linears for each in (linear.weight, linear.bias)]
        places = [None if each is None else (each.data_ptr(), 0) for each in shared]
        return [*places, *((each.data_ptr(), each._version) for each in map(copied_from, linears) if each is not None)]

    def are_those_of(self, linears: Sequence[Any]) -> bool:
        """Whether the parameters still are those of this. Copying a model or assigning a state dict replaces them."""
        return self.places == self._places(linears)


def _is_fast(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether PyTorch's dense product is fast on this device for a weight of any strides.

    On a CPU without instructions for bf16 or fp16, a product with an input-major weight in that dtype takes 30 times as
    long.
    """
    asks = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}.get(dtype)
    if device.type != "cpu" or asks is None:
        return True
    return torch.backends.mkldnn.is_available() and getattr(torch.ops.mkldnn, asks)()


class InputMajor(Prepared, nn.Module):
    """A linear whose weight is laid out. Its forward is the dense product, for prompts and larger batches."""

    weight: Tensor
    bias: Tensor | None
    rows: Any  # `Rows`, or None
    """None after a parameter was replaced; the next product lays the weights out again."""

    def register_parameter(self, name: str, parameter: nn.Parameter | None) -> None:  # `linear.weight = ...` calls it
        super().register_parameter(name, parameter)
        self.rows = None

    def __getstate__(self) -> dict:
        return vars(self) | {"rows": None}  # the parameters of a copy are no views of a common tensor

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not keep_vars:
            for name in ("weight", "bias"):
                if (view := destination.get(prefix + name)) is not None:
                    destination[prefix + name] = view.clone(memory_format=torch.contiguous_format)

    def forward(self, x: Tensor) -> Tensor:
        if self.unprepared is not nn.Linear or _is_fast(x.device, x.dtype):
            return super().forward(x)
        wide = x.float()
        y = torch.cat([F.linear(wide, part.float()) for part in self.weight.split(_PART)], dim=-1)
        return (y if self.bias is None else y + self.bias).to(x.dtype)


_PART = 1024
"""Output features whose weights are cast to fp32 at a time: a bound on the memory that takes."""


def few_tokens(sparsity: float, linear: Any) -> int:
    """The largest number of tokens for which the product of survivors is faster than the dense one.

    Each token reads rows of its own, so `1 / (1 - sparsity)` tokens read as much as the dense product. On a CPU twice
    as many: there the dense product over an input-major weight takes one and a half times as long as over the usual.
    Ternary weights are unpacked, or quantized, as a whole in every dense product: that takes as long as reading the
    packed ones many times.
    """
    weight = linear.weight
    if isinstance(linear, _TERNARY):
        return 32 if weight.device.type == "cpu" else 16
    if not _is_fast(weight.device, weight.dtype):
        return 16
    return max(int((2 if weight.device.type == "cpu" else 1) / (1 - sparsity) + 1e-9), 1)


_TERNARY = (TernaryLinear, PackedLinear)
LINEARS = (nn.Linear, *_TERNARY)
"""Classes of linears that are laid out."""


def is_ternary(linear: nn.Module) -> bool:
    """Whether it has ternary weights, which are worth laying out at a sparsity of 0 too."""
    return isinstance(linear, _TERNARY)


@contextmanager
def _to_train_on() -> Iterator[None]:
    """Leave inference mode for a while: parameters made in it could not be trained afterwards."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def lay_out(*linears: nn.Module) -> None:
    """Give linears that read one input one input-major weight; needs memory for a second copy of it meanwhile."""
    with _to_train_on():
        rows = Rows(linears)
    for linear in linears:
        if not isinstance(linear, InputMajor):
            unprepared: Any = type(linear)
            linear.__class__ = prepared_class(InputMajor, unprepared)
        cast("InputMajor", linear).rows = rows


def put_back(*linears: InputMajor) -> None:
    """Undo `lay_out`."""
    for linear in linears:
        with _to_train_on():
            linear.weight.data = linear.weight.data.contiguous()
            if linear.bias is not None:
                linear.bias.data = linear.bias.data.clone()
        linear.__class__ = linear.unprepared
        del linear.rows


def rows_of(linears: Sequence[Any]) -> Rows:
    """The linears' common weight; laid out again where parameters were replaced, which breaks a compiled graph."""
    rows = linears[0].rows
    known = all(linear.rows is rows is not None for linear in linears)
    if known and (torch.compiler.is_compiling() or rows.are_those_of(linears)):
        return rows
    _lay_out_again(*linears)
    return linears[0].rows


@torch.compiler.disable
def _lay_out_again(*linears: nn.Module) -> None:
    lay_out(*linears)


def project(x: Tensor | Survivors, *linears: nn.Linear, residual: Tensor | None = None) -> tuple[Tensor, ...]:
    """Each linear's output for `x`, with `residual [..., N]` added where it is given; for survivors in one product.

    Survivors need linears that `lay_out` was given together.

    Raises:
        RuntimeError: one of them was replaced since, for example wrapped by a PEFT adapter.
    """
    if isinstance(x, Survivors):
        for linear in linears:
            if not isinstance(linear, InputMajor):
                kind = f"{type(linear).__module__}.{type(linear).__name__}"
                raise RuntimeError(
                    f"a linear of a model that is prepared for decoding was replaced by a {kind}; call the model's "
                    "restore() first, and prepare_for_decode() again once adapters are merged"
                )
        rows = rows_of(linears)
        y = sparse_linear(x, rows.weights, rows.bias, residual)
        return (y,) if len(linears) == 1 else y.split(rows.sizes, dim=-1)
    outputs = tuple(linear(x) for linear in linears)
    return outputs if residual is None else tuple(residual + output for output in outputs)
