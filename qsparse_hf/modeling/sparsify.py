"""Top-K sparsification of activations, trained through with a straight-through estimator (Q-Sparse, arXiv 2407.10969).

One selection rule holds for every implementation, bit for bit: of each token's `D` features exactly
`kept_features(D, S)` survive, largest magnitude first, lowest index first among equals, and NaN counts as largest.

The operator also comes behind what produces its input in a decoder, an RMSNorm or a gated activation, so that a kernel
can do both in one pass.

Shapes: D features of a token, M features of a block, K features kept.
"""

import logging
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.activations import GELUActivation, GELUTanh, ReLUSquaredActivation, SiLUActivation
from transformers.utils import is_triton_available

from .backend import Missing, choose, is_numba_available, say_once
from .sparsity import check_block_size, check_rescale, check_sparsity, kept_features

if is_numba_available():
    from .decode_numba import mask_by_counts, refuses_compiling, refuses_numba, survivors_by_counts
    from .decode_numba import rms_norm as rms_norm_of_few
if is_triton_available():
    from .sparsify_ops import Kernels

# Floats of one width order like the integers with the same bits once the sign is dropped: that integer type, and the
# bits of infinity.
_BITS = {
    torch.float16: (torch.int16, 0x7C00),
    torch.bfloat16: (torch.int16, 0x7F80),
    torch.float32: (torch.int32, 0x7F800000),
    torch.float64: (torch.int64, 0x7FF0000000000000),
}

ACTIVATIONS = {
    "silu": F.silu,
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),  # eq. 11
    "gelu": F.gelu,
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
}
"""Activations of a gated feed-forward that `glu_sparsify` takes, by Transformers' names."""

_NAME_OF = {
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


class _StraightThrough(torch.autograd.Function):
    """`x * mask` whose gradient ignores the mask: `dL/dx = dL/dy` (eq. 13). Saves nothing for backward."""

    @staticmethod
    def forward(x: Tensor, mask: Tensor) -> Tensor:
        if x.device.type == "cpu" and not torch.compiler.is_compiling():  # `where` branches there: ten times slower
            return (mask * x.view(_BITS[x.dtype][0])).view(x.dtype)  # contiguous, as the mask is
        return torch.where(mask, x, 0)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        pass

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def _divide_by_l2_norm(x: Tensor) -> Tensor:
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


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square normalisation over the last dimension, rounded where Transformers' Llama rounds."""
    wide = x.to(torch.float32)
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


def gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """`activation(gate) * up`."""
    return ACTIVATIONS[activation](gate) * up


class Composed:
    """The operator from PyTorch's parts around a way to select."""

    def __init__(self, select: Callable[[Tensor, int], Tensor], refuses: Callable | None = None) -> None:
        self.select = select
        self.refuses = refuses or (lambda tensors, asked: None)

    def mask(self, x: Tensor, kept: int, block_size: int | None) -> Tensor:
        blocks = x if block_size is None else x.unflatten(-1, (-1, block_size))
        with torch.no_grad():
            return self.select(blocks, kept).reshape(x.shape)

    def topk(self, x: Tensor, kept: int, block_size: int | None, rescale: bool) -> Tensor:
        y = _StraightThrough.apply(x, self.mask(x, kept, block_size))
        return _divide_by_l2_norm(y) if rescale else y

    def rms_norm_topk(self, x: Tensor, weight: Tensor, eps: float, *settings) -> Tensor:
        return self.topk(rms_norm(x, weight, eps), *settings)

    def glu_topk(self, gate: Tensor, up: Tensor, activation: str, *settings) -> Tensor:
        return self.topk(gated(gate, up, activation), *settings)


class Selected:
    """Survivors alone, around a way to select them, `select(x, kept, block_size)`, values and indices; and perhaps
    around a `norm` of its own, for inputs of one dtype.
    """

    def __init__(
        self,
        select: Callable[..., tuple[Tensor, Tensor]],
        refuses: Callable | None = None,
        norm: Callable[[Tensor, Tensor, float], Tensor] = rms_norm,
    ) -> None:
        self.select = select
        self.refuses = refuses or (lambda tensors, asked: None)
        self.norm = norm

    def survivors(self, form: str, inputs: tuple, kept: int, block_size: int | None, rescale: bool) -> tuple:
        if form == "rms_norm_topk":
            x, weight, _ = inputs
            x = (self.norm if x.dtype == weight.dtype else rms_norm)(*inputs)
        else:
            x = gated(*inputs) if form == "glu_topk" else inputs[0]
        values, indices = self.select(x, kept, block_size)
        return _divide_by_l2_norm(values) if rescale else values, indices


def _survivors_of(composed: Composed, x: Tensor, kept: int, block_size: int | None) -> tuple[Tensor, Tensor]:
    shape = *x.shape[:-1], kept * (x.shape[-1] // (block_size or x.shape[-1]))
    indices = composed.mask(x, kept, block_size).nonzero()[:, -1].view(shape)
    return x.gather(-1, indices), indices.int()


_NO_NUMBA = Missing("the package numba is not installed")

IMPLS = {
    "triton": Kernels() if is_triton_available() else Missing("the package triton is not installed"),
    "numba": Composed(mask_by_counts, refuses_numba) if is_numba_available() else _NO_NUMBA,
    "torch": Composed(_mask_by_threshold),
    "reference": Composed(_mask_by_sort),
}
"""Implementations by name, the preferred first. Each says what it `refuses`, and has `mask(x, kept, block_size)`, the
bool mask of what survives, and with the straight-through estimator `topk(x, kept, block_size, rescale)`,
`rms_norm_topk(x, weight, eps, ...)` and `glu_topk(gate, up, activation, ...)`."""

SURVIVORS = {
    "triton": IMPLS["triton"],
    "numba": Selected(survivors_by_counts, refuses_compiling, rms_norm_of_few) if is_numba_available() else _NO_NUMBA,
    "torch": Selected(partial(_survivors_of, IMPLS["torch"])),
    "reference": Selected(partial(_survivors_of, IMPLS["reference"])),
}
"""As `IMPLS`, for what goes to a decode product: `survivors(form, inputs, kept, block_size, rescale)`, the values and
indices that one of the three forms keeps."""


def _check_floats(x: Tensor, name: str) -> None:
    if not isinstance(x, Tensor) or x.dtype not in _BITS:
        allowed = ", ".join(map(str, _BITS))
        raise TypeError(f"{name} must be a tensor of {allowed}, got {getattr(x, 'dtype', type(x).__name__)}")


def _sparsify(
    form: str,
    dense: Callable[..., Tensor],
    inputs: tuple,
    sparsity: float,
    block_size: int | None,
    rescale: str,
    ste: bool,
    backend: str | None,
    compact: bool,
) -> Tensor | Survivors:
    """The top-K of `dense(*inputs)`, which the method `form` of an implementation computes in one go."""
    x = inputs[0]
    tensors = [each for each in inputs if isinstance(each, Tensor)]
    check_sparsity(sparsity)
    check_rescale(rescale)
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(f"x must have a last dimension of at least one feature, got shape {tuple(x.shape)}")
    check_block_size(block_size, x.shape[-1])
    implementation = choose(SURVIVORS if compact else IMPLS, tensors, backend)
    if sparsity == 0 and not compact:
        return dense(*inputs)
    kept = kept_features(block_size or x.shape[-1], sparsity)
    if block_size == 1:  # all survive
        kept, block_size = x.shape[-1], None
    if compact:
        with torch.no_grad():
            return Survivors(*implementation.survivors(form, inputs, kept, block_size, rescale == "l2"))
    if ste:
        return getattr(implementation, form)(*inputs, kept, block_size, rescale == "l2")
    x = dense(*inputs)
    y = torch.where(implementation.mask(x, kept, block_size), x, 0)
    return _divide_by_l2_norm(y) if rescale == "l2" else y


def topk_sparsify(
    x: Tensor,
    sparsity: float,
    block_size: int | None = None,
    rescale: str = "none",
    ste: bool = True,
    backend: str | None = None,
    compact: bool = False,
) -> Tensor | Survivors:
    """Keep the `K` largest magnitudes of each token and zero the others (eq. 2-3).

    Args:
        x: activations `[..., D]`; fp32, bf16, fp16 or fp64; any leading shape, any strides.
        sparsity: fraction of zeros, 0 <= sparsity < 1. At 0 the operator is off and `x` itself is returned.
        block_size: None, or `M`: the top-K is taken inside each `M` consecutive features (Block Q-Sparse, N:M).
        rescale: `"l2"` divides each token by the L2 norm of what survived; its gradient is exact.
        ste: the mask is the identity in the backward pass (eq. 13). False masks the gradient too (eq. 12).
        backend: None for the first in `IMPLS` (or `SURVIVORS`) that takes `x`, or a name there.
        compact: return the survivors alone, for `sparse_linear`; without a gradient, and at sparsity 0 all features.

    Returns:
        A tensor of `x`'s shape and dtype (`x` itself at sparsity 0), or `Survivors`.

    Raises:
        ValueError: an argument outside these ranges, `x` without a feature dimension, a named backend that cannot run.
        TypeError: `x` is not of one of these dtypes.
    """
    _check_floats(x, "x")
    return _sparsify("topk", lambda x: x, (x,), sparsity, block_size, rescale, ste, backend, compact)


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
) -> Tensor | Survivors:
    """`topk_sparsify` of the root-mean-square norm of `x`: `x / sqrt(mean(x^2) + eps) * weight`, computed in fp32.

    Args:
        x: `[..., D]`, as `topk_sparsify` takes it.
        weight: `[D]`, the norm's gain.
        eps: added to the mean square.

    Returns:
        `[..., D]` of the dtype that `x` and `weight` promote to; at sparsity 0 the dense norm.

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
    return _sparsify("rms_norm_topk", rms_norm, (x, weight, eps), sparsity, block_size, rescale, ste, backend, compact)


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
    return _sparsify("glu_topk", gated, (gate, up, activation), sparsity, block_size, rescale, ste, backend, compact)


class Sparsify(nn.Module):
    """`topk_sparsify` with its settings, as a child without parameters: it shows in `print(model)` and takes hooks."""

    def __init__(self, *settings) -> None:
        super().__init__()
        self.configure(*settings)

    def configure(self, sparsity: float, block_size: int | None, rescale: str, ste: bool) -> None:
        self.sparsity = sparsity
        self.block_size = block_size
        self.rescale = rescale
        self.ste = ste
        self.factor = 1.0  # below 1 while training ramps the sparsity up
        self.few = 0  # for how many tokens at most the survivors alone go on, to a decode product

    @property
    def settings(self) -> tuple[float, int | None, str, bool]:
        return self.sparsity * self.factor, self.block_size, self.rescale, self.ste

    def compacts(self, x: Tensor) -> bool:
        """Whether a decode product comes next, which wants the survivors alone."""
        if self.few == 0 or torch.is_grad_enabled() or self.settings[0] == 0:
            return False
        if torch.is_autocast_enabled(x.device.type):  # it casts what linears read
            return False
        tokens = x.numel() // x.shape[-1]
        if tokens > self.few and x.ndim == 3 and x.shape[1] == 1:
            say_once(
                logging.WARNING,
                f"decoding {tokens} sequences at once with dense products: at sparsity {self.settings[0]:g} those that "
                f"skip zeros are no faster beyond {self.few}",
            )
        return tokens <= self.few

    def forward(self, x: Tensor) -> Tensor | Survivors:
        if torch.compiler.is_compiling() and torch.is_grad_enabled():
            # Attention saves its output for its own backward. Selecting from it again there costs less than a second
            # tensor; an uncompiled model cannot be told so from here.
            return checkpoint(topk_sparsify, x, *self.settings, use_reentrant=False, preserve_rng_state=False)
        return topk_sparsify(x, *self.settings, compact=self.compacts(x))

    def extra_repr(self) -> str:
        sparsity, block_size, rescale, ste = self.settings
        return f"sparsity={sparsity:g}, block_size={block_size}, rescale={rescale!r}, ste={ste}"


class RMSNormSparsify(Sparsify):
    """An RMSNorm and the sparsification of its output, in one pass: the class that a decoder's norms take on.

    Not called an RMSNorm, and none by inheritance: serving engines and kernel hubs replace what they take for one. Who
    puts a plain norm in its place makes the projections behind it dense.
    """

    weight: nn.Parameter
    variance_epsilon: float

    def forward(self, x: Tensor) -> Tensor | Survivors:
        return rms_norm_sparsify(x, self.weight, self.variance_epsilon, *self.settings, compact=self.compacts(x))

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.variance_epsilon}, {super().extra_repr()}"


class GLUSparsify(Sparsify):
    """A gated activation and the sparsification of its output, in one pass for the activations in `ACTIVATIONS`."""

    def forward(self, gate: Tensor, up: Tensor, activation: nn.Module) -> Tensor | Survivors:
        watched = activation._forward_hooks or activation._forward_pre_hooks or "forward" in vars(activation)
        name = _NAME_OF.get(type(activation))
        compact = self.compacts(gate)
        if name is None or watched or self.settings[0] == 0:
            return topk_sparsify(activation(gate) * up, *self.settings, compact=compact)
        return glu_sparsify(gate, up, name, *self.settings, compact=compact)
