# SPDX-License-Identifier: Apache-2.0
"""Top-K sparsification of activations, trained through with a straight-through estimator (Q-Sparse, arXiv 2407.10969).

One selection rule holds for every implementation, bit for bit: of each token's `D` features exactly
`kept_features(D, S)` survive, largest magnitude first, lowest index first among equals, and NaN counts as largest.

The operator also comes behind what produces its input in a decoder, an RMSNorm or a gated activation, so that a kernel
can do both in one pass. The implementations here are PyTorch's; the tables that hold them are open to kernels.

Shapes: D features of a token, M features of a block, K features kept.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import ClassVar, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import GELUActivation, GELUTanh, ReLUSquaredActivation, SiLUActivation

from .backend import choose
from .bitnet import int8_levels, quantize_activations
from .sparsity import Selection

# Floats of one width order like the integers with the same bits once the sign is dropped: that integer type, and the
# bits of infinity.
_BITS = {
    torch.float16: (torch.int16, 0x7C00),
    torch.bfloat16: (torch.int16, 0x7F80),
    torch.float32: (torch.int32, 0x7F800000),
    torch.float64: (torch.int64, 0x7FF0000000000000),
}

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),  # eq. 11
    "gelu": F.gelu,
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
}
"""Activations of a gated feed-forward that `glu_sparsify` takes, by Transformers' names."""

ACTIVATION_NAMES: dict[type, str] = {
    SiLUActivation: "silu",
    nn.SiLU: "silu",
    nn.ReLU: "relu",
    ReLUSquaredActivation: "relu2",
    GELUActivation: "gelu",
    GELUTanh: "gelu_pytorch_tanh",
}


class Survivors(NamedTuple):
    """What a selection kept, without the zeros: for products that skip them."""

    values: Tensor
    """`[..., K]`, of all blocks of a token together."""
    indices: Tensor
    """`[..., K]`, int32: which feature each was; in an order that depends on the implementation alone."""
    scale: Tensor | None = None
    """`[..., 1]`, at least fp32, which the values are still to be multiplied by; None for 1. Rounded values are whole
    numbers, which a product sums up exactly."""


class _Reinterpret(torch.autograd.Function):
    """`x.view(dtype)` between dtypes of one width; under `torch.vmap` too, which has no rule for it in PyTorch 2.11."""

    @staticmethod
    def forward(x: Tensor, dtype: torch.dtype) -> Tensor:
        return x.view(dtype)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        pass

    @staticmethod
    def vmap(info, in_dims: tuple, x: Tensor, dtype: torch.dtype) -> tuple[Tensor, int]:
        return _Reinterpret.apply(x, dtype), in_dims[0]


def magnitude(x: Tensor) -> Tensor:
    """`|x|` as integers with the same order; every NaN maps to one value above infinity. Same shape as `x`."""
    dtype, infinity = _BITS[x.dtype]
    return (_Reinterpret.apply(x, dtype) & torch.iinfo(dtype).max).clamp_max(infinity + 1)


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


class _StraightThrough(torch.autograd.Function):
    """`x * mask` whose gradient ignores the mask: `dL/dx = dL/dy` (eq. 13). Saves nothing for backward."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, mask: Tensor) -> Tensor:
        if x.device.type == "cpu" and not torch.compiler.is_compiling():  # `where` branches there: ten times slower
            kept = mask * _Reinterpret.apply(x, _BITS[x.dtype][0])
            return _Reinterpret.apply(kept, x.dtype)  # contiguous, as the mask is
        return torch.where(mask, x, 0)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        pass

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def divide_by_l2_norm(x: Tensor) -> Tensor:
    """`x / ||x||_2` over the last dimension, computed in at least fp32; a row without a norm above 0 stays as it is."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    # Neither value nor gradient depends on a constant factor; with 1 the largest entry, no square over- or underflows.
    with torch.no_grad():
        largest = wide.abs().amax(dim=-1, keepdim=True)
        norm = torch.linalg.vector_norm(wide / torch.where(largest > 0, largest, 1), dim=-1, keepdim=True)
        known = norm > 0  # neither 0 nor NaN, which an infinity makes of it
    scaled = wide / torch.where(known, largest, 1)
    norm = torch.linalg.vector_norm(torch.where(known, scaled, 0), dim=-1, keepdim=True)
    return torch.where(known, scaled / torch.where(known, norm, 1), wide).to(x.dtype)


def finish(x: Tensor, selection: Selection) -> Tensor:
    """What a selection does to those that survived: rounding, then the rescale."""
    if selection.quantization == "int8":
        x = quantize_activations(x)
    return divide_by_l2_norm(x) if selection.rescale == "l2" else x


def finish_list(values: Tensor, selection: Selection) -> tuple[Tensor, Tensor | None]:
    """`finish` for survivors alone: values, and what they are still to be multiplied by."""
    if selection.quantization == "none":
        return finish(values, selection), None
    levels, scale = int8_levels(values)
    if selection.rescale == "l2":  # the step is part of the norm, too
        norm = torch.linalg.vector_norm(levels, dim=-1, keepdim=True)
        scale = torch.where(norm > 0, 1 / norm, scale)
    return levels.to(values.dtype), scale


def rms_norm(x: Tensor, weight: Tensor, eps: float, unit_offset: bool = False) -> Tensor:
    """Root-mean-square normalisation over the last dimension, rounded where Transformers' Llama rounds.

    With `unit_offset` the gain is `1 + weight`, and the product alone is rounded, to `x`'s dtype, as in Gemma.
    """
    wide = x.to(torch.float32)
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if unit_offset:
        return (wide * (1 + weight.to(torch.float32))).to(x.dtype)
    return weight * wide.to(x.dtype)


def gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """`activation(gate) * up`."""
    return ACTIVATIONS[activation](gate) * up


class SparsifyImplementation(Protocol):
    """One way to run the operator, with the straight-through estimator; each tensor `[..., D]`."""

    def refuses(self, tensors: Sequence[Tensor], asked: bool) -> str | None:
        """Why it does not run on these, or None if it does; `asked` if somebody named it."""

    def mask(self, x: Tensor, selection: Selection) -> Tensor:
        """Which features survive, bool."""

    def topk(self, x: Tensor, selection: Selection) -> Tensor:
        """`x` where it survives, rounded and rescaled where the selection says so."""

    def rms_norm_topk(self, x: Tensor, weight: Tensor, eps: float, unit_offset: bool, selection: Selection) -> Tensor:
        """The top-K of `rms_norm`."""

    def glu_topk(self, gate: Tensor, up: Tensor, activation: str, selection: Selection) -> Tensor:
        """The top-K of the gated activation."""


class SurvivorsImplementation(Protocol):
    """One way to keep the survivors alone."""

    def refuses(self, tensors: Sequence[Tensor], asked: bool) -> str | None:
        """As above."""

    def survivors(self, form: str, inputs: tuple, selection: Selection) -> Survivors:
        """What one of the three forms of the operator keeps."""


class TorchSparsify:
    """The operator from PyTorch's parts around a way to mask blocks, `mask_blocks(x, kept)`."""

    def __init__(self, mask_blocks: Callable[[Tensor, int], Tensor]) -> None:
        self.mask_blocks = mask_blocks

    def refuses(self, tensors: Sequence[Tensor], asked: bool) -> str | None:
        return None

    def mask(self, x: Tensor, selection: Selection) -> Tensor:
        blocks = x if selection.block_size is None else x.unflatten(-1, (-1, selection.block_size))
        with torch.no_grad():
            return self.mask_blocks(blocks, selection.kept_of_block(x.shape[-1])).reshape(x.shape)

    def topk(self, x: Tensor, selection: Selection) -> Tensor:
        return finish(_StraightThrough.apply(x, self.mask(x, selection)), selection)

    def rms_norm_topk(self, x: Tensor, weight: Tensor, eps: float, unit_offset: bool, selection: Selection) -> Tensor:
        return self.topk(rms_norm(x, weight, eps, unit_offset), selection)

    def glu_topk(self, gate: Tensor, up: Tensor, activation: str, selection: Selection) -> Tensor:
        return self.topk(gated(gate, up, activation), selection)

    def survivors(self, form: str, inputs: tuple, selection: Selection) -> Survivors:
        x = FORMS[form](*inputs)
        indices = self.mask(x, selection).nonzero()[:, -1].view(*x.shape[:-1], selection.kept(x.shape[-1]))
        values = x.gather(-1, indices)
        values, scale = finish_list(values, selection)
        return Survivors(values, indices.int(), scale)


FORMS: dict[str, Callable[..., Tensor]] = {"topk": lambda x: x, "rms_norm_topk": rms_norm, "glu_topk": gated}
"""What is selected from, by the name of the method of an implementation that computes it and selects."""

_TORCH, _REFERENCE = TorchSparsify(_mask_by_threshold), TorchSparsify(_mask_by_sort)

IMPLS: dict[str, SparsifyImplementation] = {"torch": _TORCH, "reference": _REFERENCE}
"""Implementations by name, the preferred first; kernels add themselves with `backend.prefer`."""

SURVIVORS: dict[str, SurvivorsImplementation] = {"torch": _TORCH, "reference": _REFERENCE}
"""As `IMPLS`, for what goes to a product that skips zeros."""


def _check_floats(x: Tensor, name: str) -> None:
    if not isinstance(x, Tensor) or x.dtype not in _BITS:
        allowed = ", ".join(map(str, _BITS))
        raise TypeError(f"{name} must be a tensor of {allowed}, got {getattr(x, 'dtype', type(x).__name__)}")


def select(
    form: str, inputs: tuple, selection: Selection, backend: str | None = None, compact: bool = False
) -> Tensor | Survivors:
    """The top-K of what `FORMS[form]` makes of `inputs`; see `topk_sparsify`."""
    x = inputs[0]
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(f"x must have a last dimension of at least one feature, got shape {tuple(x.shape)}")
    selection.check(x.shape[-1])
    tensors = [each for each in inputs if isinstance(each, Tensor)]
    implementation: SparsifyImplementation | None = None
    if not compact:
        implementation = choose(IMPLS, tensors, backend)
        if selection.sparsity == 0:
            x = FORMS[form](*inputs)
            return quantize_activations(x) if selection.quantization == "int8" else x
    if selection.sparsity == 0:  # nothing is selected, and so nothing is rescaled
        selection = replace(selection, rescale="none")
    elif selection.block_size == 1:  # all survive
        selection = replace(selection, sparsity=0, block_size=None)
    if implementation is None:
        with torch.no_grad():
            return choose(SURVIVORS, tensors, backend).survivors(form, inputs, selection)
    if selection.ste:
        return getattr(implementation, form)(*inputs, selection)
    x = FORMS[form](*inputs)
    return finish(torch.where(implementation.mask(x, selection), x, 0), selection)


def topk_sparsify(
    x: Tensor,
    sparsity: float,
    block_size: int | None = None,
    rescale: str = "none",
    ste: bool = True,
    backend: str | None = None,
    compact: bool = False,
    quantization: str = "none",
) -> Tensor | Survivors:
    """Keep the `K` largest magnitudes of each token and zero the others (eq. 2-3).

    Args:
        x: activations `[..., D]`; fp32, bf16, fp16 or fp64; any leading shape, any strides.
        sparsity: fraction of zeros, 0 <= sparsity < 1. At 0 nothing is selected or rescaled.
        block_size: None, or `M`: the top-K is taken inside each `M` consecutive features (Block Q-Sparse, N:M).
        rescale: `"l2"` divides each token by the L2 norm of what survived; its gradient is exact.
        ste: the mask is the identity in the backward pass (eq. 13). False masks the gradient too (eq. 12).
        backend: None for the first in `IMPLS` (or `SURVIVORS`) that takes `x`, or a name there.
        compact: return the survivors alone, for `sparse_linear`; without a gradient, and at sparsity 0 all features.
        quantization: `"int8"` rounds what survived to 255 levels of each token, `max|x| / 127` apart, before the
            rescale (eq. 4-7); the gradient passes as it is. At sparsity 0 too.

    Returns:
        A tensor of `x`'s shape and dtype (`x` itself at sparsity 0 without rounding), or `Survivors`.

    Raises:
        ValueError: an argument outside these ranges, `x` without a feature dimension, a named backend that cannot run.
        TypeError: `x` is not of one of these dtypes.
    """
    _check_floats(x, "x")
    return select("topk", (x,), Selection(sparsity, block_size, rescale, ste, quantization), backend, compact)


def rms_norm_sparsify(
    x: Tensor,
    weight: Tensor,
    eps: float,
    sparsity: float,
    block_size: int | None = None,
    rescale: str = "none",
    ste: bool = True,
    backend: str | None = None,
    compact: bool = False,
    unit_offset: bool = False,
    quantization: str = "none",
) -> Tensor | Survivors:
    """`topk_sparsify` of the root-mean-square norm of `x`: `x / sqrt(mean(x^2) + eps) * weight`, computed in fp32.

    Args:
        x: `[..., D]`, as `topk_sparsify` takes it.
        weight: `[D]`, the norm's gain.
        eps: added to the mean square.
        unit_offset: the gain is `1 + weight`, and the product alone is rounded, as in Gemma.

    Returns:
        `[..., D]` of the dtype that `x` and `weight` promote to, or with `unit_offset` of `x`'s; at sparsity 0 the
        dense norm.

    Raises:
        ValueError: also for a weight of another shape or device than `x`'s features, an `eps` that is no number >= 0.

    The others: see `topk_sparsify`.
    """
    _check_floats(x, "x")
    _check_floats(weight, "weight")
    if weight.shape != x.shape[-1:] or weight.device != x.device:
        raise ValueError(
            f"weight must have shape {tuple(x.shape[-1:])} on {x.device}, got {tuple(weight.shape)} on {weight.device}"
        )
    if not isinstance(eps, int | float) or not eps >= 0:
        raise ValueError(f"eps must be a number >= 0, got {eps!r}")
    selection = Selection(sparsity, block_size, rescale, ste, quantization)
    return select("rms_norm_topk", (x, weight, eps, unit_offset), selection, backend, compact)


def glu_sparsify(
    gate: Tensor,
    up: Tensor,
    activation: str,
    sparsity: float,
    block_size: int | None = None,
    rescale: str = "none",
    ste: bool = True,
    backend: str | None = None,
    compact: bool = False,
    quantization: str = "none",
) -> Tensor | Survivors:
    """`topk_sparsify` of `activation(gate) * up` (eq. 11 with `"relu2"`), both `[..., D]` of one dtype.

    Args:
        activation: a name in `ACTIVATIONS`.

    Returns:
        `[..., D]` of their dtype; at sparsity 0 the dense product.

    Raises:
        ValueError: also for an unknown activation, or for two shapes, dtypes or devices.

    The others: see `topk_sparsify`.
    """
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        allowed = ", ".join(map(repr, ACTIVATIONS))
        raise ValueError(f"activation must be the name of one of {allowed}, got {activation!r}")
    _check_floats(gate, "gate")
    _check_floats(up, "up")
    if (gate.shape, gate.dtype, gate.device) != (up.shape, up.dtype, up.device):
        raise ValueError(
            f"gate and up must be alike, got {gate.dtype} {tuple(gate.shape)} on {gate.device} "
            f"and {up.dtype} {tuple(up.shape)} on {up.device}"
        )
    selection = Selection(sparsity, block_size, rescale, ste, quantization)
    return select("glu_topk", (gate, up, activation), selection, backend, compact)


class Sparsify(nn.Module):
    """`topk_sparsify` with its selection, as a child without parameters: it shows in `print(model)` and takes hooks.

    Attributes:
        configured: the selection of the model's configuration.
        selection: the one at work; below the configured sparsity while training ramps it up.
    """

    configured: Selection
    selection: Selection

    def __init__(self, selection: Selection) -> None:
        super().__init__()
        self.configure(selection)

    def configure(self, selection: Selection) -> None:
        """Set what is selected."""
        self.configured = self.selection = selection

    def scale(self, factor: float) -> None:
        """Run at `factor` times the configured sparsity."""
        self.selection = self.configured.scaled(factor)

    def select(self, form: str, *inputs: object) -> Tensor | Survivors:
        """The top-K of what `FORMS[form]` makes of the inputs; what prepares a model for decoding overrides it."""
        return select(form, inputs, self.selection)

    def forward(self, x: Tensor) -> Tensor | Survivors:
        return self.select("topk", x)

    def extra_repr(self) -> str:
        sparsity, block_size, rescale, ste, quantization = vars(self.selection).values()
        fields = f"sparsity={sparsity:g}, block_size={block_size}, rescale={rescale!r}, ste={ste}"
        return f"{fields}, quantization={quantization!r}"


class RMSNormSparsify(Sparsify):
    """An RMSNorm and the sparsification of its output, in one pass: the class that a decoder's norms take on.

    Not called an RMSNorm, and none by inheritance: serving engines and kernel hubs replace what they take for one. Who
    puts a plain norm in its place makes the projections behind it dense. An engine that tells RMSNorms by tracing
    modules of one input passes it over for its second one.
    """

    weight: nn.Parameter
    variance_epsilon: float
    unit_offset: ClassVar[bool] = False
    """Whether the gain is `1 + weight`: see `rms_norm`."""

    def epsilon(self) -> float:
        """What is added to the mean square."""
        return self.variance_epsilon

    def forward(self, x: Tensor, selection: Selection | None = None) -> Tensor | Survivors:
        """The norm's survivors of `x [..., D]`, by another `selection` than the configured one if that is given."""
        inputs = x, self.weight, self.epsilon(), self.unit_offset
        if selection is not None:
            return select("rms_norm_topk", inputs, selection)
        return self.select("rms_norm_topk", *inputs)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.epsilon()}, {super().extra_repr()}"


class GLUSparsify(Sparsify):
    """A gated activation and the sparsification of its output, in one pass for the activations in `ACTIVATIONS`."""

    def forward(self, gate: Tensor, up: Tensor, activation: nn.Module) -> Tensor | Survivors:  # type: ignore[override]
        watched = activation._forward_hooks or activation._forward_pre_hooks or "forward" in vars(activation)
        name = ACTIVATION_NAMES.get(type(activation))
        if name is None or watched or self.selection.sparsity == 0:
            return self.select("topk", activation(gate) * up)
        return self.select("glu_topk", gate, up, name)
