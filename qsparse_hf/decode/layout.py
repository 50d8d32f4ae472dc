"""The weights of a prepared model: input-major, so that the row of a feature that did not survive is not read.

That is a matter of strides: `lay_out` gives the parameters of linears such strides, those that read one input side by
side in one tensor, and `put_back` the usual ones. Names, shapes and values stay, and nothing is kept twice.

Shapes: D features in, N features out.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..modeling.sparsify import Survivors
from .sparse_linear import sparse_linear


class Rows:
    """The weights of linears that read one input, input-major and side by side: their parameters are views of this."""

    def __init__(self, linears: Sequence[nn.Linear]) -> None:
        self.sizes = [linear.out_features for linear in linears]
        self.weight = torch.cat([linear.weight.detach().t() for linear in linears], dim=1)  # [D, N], contiguous
        self.bias = None
        if any(linear.bias is not None for linear in linears):
            zeros = self.weight.new_zeros
            self.bias = torch.cat(
                [zeros(linear.out_features) if linear.bias is None else linear.bias.detach() for linear in linears]
            )
        start = 0
        for linear in linears:
            end = start + linear.out_features
            linear.weight.data = self.weight[:, start:end].t()
            if linear.bias is not None:
                linear.bias.data = self.bias[start:end]
            start = end
        self.places = self._places(linears)

    @staticmethod
    def _places(linears: Sequence[nn.Linear]) -> list[int | None]:
        parameters = [each for linear in linears for each in (linear.weight, linear.bias)]
        return [None if each is None else each.data_ptr() for each in parameters]

    def are_those_of(self, linears: Sequence[nn.Linear]) -> bool:
        """Whether the parameters still are views of this: copying a model or assigning a state dict gives it others."""
        return self.places == self._places(linears)


def _is_fast(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether PyTorch has a fast dense product there for a weight of any strides.

    On CPUs without instructions for it, low precision falls off the fast path: 30 times slower.
    """
    asks = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}.get(dtype)
    if device.type != "cpu" or asks is None:
        return True
    return torch.backends.mkldnn.is_available() and getattr(torch.ops.mkldnn, asks)()


class InputMajorLinear(nn.Linear):
    """A linear whose weight lies input-major; for more tokens than a few, the dense product it always was."""

    rows: Rows | None
    """None once it has a weight or bias of its own, until the next product."""

    def register_parameter(self, name: str, parameter: nn.Parameter | None) -> None:  # assigning one calls it, too
        super().register_parameter(name, parameter)
        self.rows = None

    def __getstate__(self) -> dict:
        return vars(self) | {"rows": None}  # a copy's parameters are no views

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not keep_vars:
            for name in ("weight", "bias"):
                if (view := destination.get(prefix + name)) is not None:
                    destination[prefix + name] = view.clone(memory_format=torch.contiguous_format)

    def forward(self, x: Tensor) -> Tensor:
        if _is_fast(x.device, x.dtype):
            return super().forward(x)
        wide = x.float()
        y = torch.cat([F.linear(wide, part.float()) for part in self.weight.split(_PART)], dim=-1)
        return (y if self.bias is None else y + self.bias).to(x.dtype)


_PART = 1024
"""Features out that are widened to fp32 at a time."""


def few_tokens(sparsity: float, weight: Tensor) -> int:
    """For how many tokens at most the product of survivors is faster than the dense one: their rows add up.

    On a CPU that one has a product over an input-major weight to beat, which takes half as long again as usual.
    """
    if not _is_fast(weight.device, weight.dtype):
        return 16
    return max(int((2 if weight.device.type == "cpu" else 1) / (1 - sparsity) + 1e-9), 1)


@contextmanager
def _to_train_on() -> Iterator[None]:
    """Tensors that are made in inference mode could not be trained on afterwards."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def lay_out(*linears: nn.Linear) -> None:
    """Give linears that read one input an input-major weight, in one tensor; takes the memory of that for a moment."""
    with _to_train_on():
        rows = Rows(linears)
    for linear in linears:
        linear.__class__ = InputMajorLinear
        linear.rows = rows


def put_back(*linears: nn.Linear) -> None:
    """Undo `lay_out`."""
    for linear in linears:
        with _to_train_on():
            linear.weight.data = linear.weight.data.contiguous()
            if linear.bias is not None:
                linear.bias.data = linear.bias.data.clone()
        linear.__class__ = nn.Linear
        del linear.rows


def _rows_of(linears: Sequence[InputMajorLinear]) -> Rows:
    """Their common rows; laid out again if they have others now, for which compiled code stops."""
    rows = linears[0].rows
    known = all(linear.rows is rows is not None for linear in linears)
    if known and (torch.compiler.is_compiling() or rows.are_those_of(linears)):
        return rows
    _lay_out_again(*linears)
    return linears[0].rows


@torch.compiler.disable
def _lay_out_again(*linears: InputMajorLinear) -> None:
    lay_out(*linears)


def project(x: Tensor | Survivors, *linears: nn.Linear, residual: Tensor | None = None) -> tuple[Tensor, ...]:
    """What each linear makes of `x`, plus the residual where there is one; of survivors in one product.

    Survivors ask for linears that were laid out together.

    Raises:
        RuntimeError: one of them was replaced since, as by an adapter around it.
    """
    if isinstance(x, Survivors):
        for linear in linears:
            if type(linear) is not InputMajorLinear:
                kind = f"{type(linear).__module__}.{type(linear).__name__}"
                raise RuntimeError(
                    f"a linear of a model that is prepared for decoding was replaced by a {kind}; call the model's "
                    "restore() first, and prepare_for_decode() again once adapters are merged"
                )
        rows = _rows_of(linears)
        y = sparse_linear(x, rows.weight, rows.bias, residual)
        return (y,) if len(linears) == 1 else y.split(rows.sizes, dim=-1)
    outputs = tuple(linear(x) for linear in linears)
    return outputs if residual is None else tuple(residual + output for output in outputs)
