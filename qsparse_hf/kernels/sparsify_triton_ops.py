"""The kernels of `sparsify_triton` as custom operators of PyTorch, with fake implementations and gradients."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..modeling.sparsify import Survivors
from ..modeling.sparsity import Selection
from .sparsify_triton import (
    INTERPRETED,
    NORMS,
    glu_backward_kernel,
    launch_sparsify,
    new_lists,
    rescale_backward_kernel,
    rms_norm_backward_kernel,
    whole_row,
)


@torch.library.custom_op("qsparse::topk", mutates_args=())
def _topk(x: Tensor, keep: int, block_size: int | None, quantize: bool, rescale: bool) -> tuple[Tensor, Tensor]:
    x = x.contiguous()
    y = torch.empty_like(x)
    _, norm = launch_sparsify(x, None, y, keep, block_size, "none", quantize, "l2" if rescale else "none")
    return y, norm


@torch.library.custom_op("qsparse::topk_mask", mutates_args=())
def _topk_mask(x: Tensor, keep: int, block_size: int | None) -> Tensor:
    x = x.contiguous()
    mask = torch.empty_like(x, dtype=torch.bool)
    launch_sparsify(x, None, mask, keep, block_size, "none", False, "mask")
    return mask


@torch.library.custom_op("qsparse::rms_norm_topk", mutates_args=())
def _rms_norm_topk(
    x: Tensor,
    weight: Tensor,
    eps: float,
    unit_offset: bool,
    keep: int,
    block_size: int | None,
    quantize: bool,
    rescale: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    x = x.contiguous()
    y = torch.empty_like(x, dtype=_dtype_of(NORMS[unit_offset], x, weight))
    rstd, norm = launch_sparsify(
        x, weight.contiguous(), y, keep, block_size, NORMS[unit_offset], quantize, "l2" if rescale else "none", eps
    )
    return y, rstd, norm


def _dtype_of(producer: str, x: Tensor, other: Tensor | None) -> torch.dtype:
    """Of what a producer makes of `x`."""
    return torch.promote_types(x.dtype, other.dtype) if other is not None and producer == NORMS[False] else x.dtype


@torch.library.custom_op("qsparse::glu_topk", mutates_args=())
def _glu_topk(
    gate: Tensor, up: Tensor, activation: str, keep: int, block_size: int | None, quantize: bool, rescale: bool
) -> tuple[Tensor, Tensor]:
    gate = gate.contiguous()
    y = torch.empty_like(gate)
    _, norm = launch_sparsify(
        gate, up.contiguous(), y, keep, block_size, activation, quantize, "l2" if rescale else "none"
    )
    return y, norm


@torch.library.custom_op("qsparse::survivors", mutates_args=())
def _survivors(
    x: Tensor,
    other: Tensor | None,
    producer: str,
    eps: float,
    keep: int,
    block_size: int | None,
    quantize: bool,
    rescale: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    x = x.contiguous()
    dtype = _dtype_of(producer, x, other)
    y = torch.empty_like(x, dtype=dtype)
    lists = new_lists(x, _lists_shape(x, keep, block_size), dtype)
    other = None if other is None else other.contiguous()
    epilogue = "l2" if rescale else "none"
    _, scale = launch_sparsify(x, other, y, keep, block_size, producer, quantize, epilogue, eps, lists)
    return *lists, scale


def _lists_shape(x: Tensor, keep: int, block_size: int | None) -> tuple[int, ...]:
    return *x.shape[:-1], keep * (x.shape[-1] // (block_size or x.shape[-1]))


@torch.library.custom_op("qsparse::rescale_backward", mutates_args=())
def _rescale_backward(grad: Tensor, y: Tensor, norm: Tensor) -> Tensor:
    grad_x = torch.empty_like(y)
    features = y.shape[-1]
    if y.numel():
        with torch.cuda.device_of(y):
            rescale_backward_kernel[(y.numel() // features,)](grad.contiguous(), y, norm, grad_x, **whole_row(features))
    return grad_x


@torch.library.custom_op("qsparse::rms_norm_backward", mutates_args=())
def _rms_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, unit_offset: bool
) -> tuple[Tensor, Tensor]:
    x = x.contiguous()
    features = x.shape[-1]
    tokens = x.numel() // features
    # A few programs for each multiprocessor loop over the tokens: few partial sums, and enough loads outstanding.
    programs = 4 * torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 2
    programs = min(programs, tokens)
    grad_x = torch.empty_like(x)
    grad_weight = x.new_empty(programs, features, dtype=torch.float32)
    if programs:
        with torch.cuda.device_of(x):
            rms_norm_backward_kernel[(programs,)](
                grad.contiguous(),
                x,
                weight.contiguous(),
                rstd,
                grad_x,
                grad_weight,
                tokens,
                UNIT_OFFSET=unit_offset,
                **whole_row(features),
            )
    return grad_x, grad_weight.sum(0).to(weight.dtype)


@torch.library.custom_op("qsparse::glu_backward", mutates_args=())
def _glu_backward(grad: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    gate, up = gate.contiguous(), up.contiguous()
    grad_gate, grad_up = torch.empty_like(gate), torch.empty_like(up)
    block = 1024
    if gate.numel():
        with torch.cuda.device_of(gate):
            glu_backward_kernel[((gate.numel() + block - 1) // block,)](
                grad.contiguous(), gate, up, grad_gate, grad_up, gate.numel(), ACTIVATION=activation, BLOCK=block
            )
    return grad_gate, grad_up


def _row_values(x: Tensor, wanted: bool) -> Tensor:
    return x.new_empty(x.shape[:-1] if wanted else 0, dtype=torch.float32)


@_topk.register_fake
def _(x, keep, block_size, quantize, rescale):
    return torch.empty_like(x, memory_format=torch.contiguous_format), _row_values(x, rescale)


@_topk_mask.register_fake
def _(x, keep, block_size):
    return torch.empty_like(x, dtype=torch.bool, memory_format=torch.contiguous_format)


@_rms_norm_topk.register_fake
def _(x, weight, eps, unit_offset, keep, block_size, quantize, rescale):
    dtype = _dtype_of(NORMS[unit_offset], x, weight)
    y = torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)
    return y, _row_values(x, True), _row_values(x, rescale)


@_glu_topk.register_fake
def _(gate, up, activation, keep, block_size, quantize, rescale):
    return torch.empty_like(gate, memory_format=torch.contiguous_format), _row_values(gate, rescale)


@_survivors.register_fake
def _(x, other, producer, eps, keep, block_size, quantize, rescale):
    lists = new_lists(x, _lists_shape(x, keep, block_size), _dtype_of(producer, x, other))
    return *lists, _row_values(x, quantize or rescale)


@_rescale_backward.register_fake
def _(grad, y, norm):
    return torch.empty_like(y)


@_rms_norm_backward.register_fake
def _(grad, x, weight, rstd, unit_offset):
    contiguous = torch.contiguous_format
    return torch.empty_like(x, memory_format=contiguous), torch.empty_like(weight, memory_format=contiguous)


@_glu_backward.register_fake
def _(grad, gate, up, activation):
    contiguous = torch.contiguous_format
    return torch.empty_like(gate, memory_format=contiguous), torch.empty_like(up, memory_format=contiguous)


# The straight-through estimator passes gradients on as if nothing had been selected, so backward needs nothing of the
# selection. A rescale needs its output, which the projection behind it saves anyway.


def _save_topk(ctx, inputs, output):
    y, norm = output
    ctx.rescale = inputs[-1]
    ctx.save_for_backward(*((y, norm) if ctx.rescale else ()))


def _topk_backward(ctx, grad, _):
    return _rescale_backward(grad, *ctx.saved_tensors) if ctx.rescale else grad, None, None, None, None


def _save_rms_norm_topk(ctx, inputs, output):
    x, weight, _, ctx.unit_offset, *_, ctx.rescale = inputs
    y, rstd, norm = output
    ctx.save_for_backward(x, weight, rstd, *((y, norm) if ctx.rescale else ()))


def _rms_norm_topk_backward(ctx, grad, *_):
    x, weight, rstd, *rescaled = ctx.saved_tensors
    if ctx.rescale:
        grad = _rescale_backward(grad, *rescaled)
    return *_rms_norm_backward(grad, x, weight, rstd, ctx.unit_offset), *6 * [None]


def _save_glu_topk(ctx, inputs, output):
    gate, up, ctx.activation, *_, ctx.rescale = inputs
    ctx.save_for_backward(gate, up, *(output if ctx.rescale else ()))


def _glu_topk_backward(ctx, grad, _):
    gate, up, *rescaled = ctx.saved_tensors
    if ctx.rescale:
        grad = _rescale_backward(grad, *rescaled)
    return *_glu_backward(grad, gate, up, ctx.activation), *5 * [None]


_topk.register_autograd(_topk_backward, setup_context=_save_topk)
_rms_norm_topk.register_autograd(_rms_norm_topk_backward, setup_context=_save_rms_norm_topk)
_glu_topk.register_autograd(_glu_topk_backward, setup_context=_save_glu_topk)


def refuses(tensors: Sequence[Tensor], asked: bool) -> str | None:
    """Why this package's Triton kernels do not run on these, or None if they do; `asked` if the caller named them."""
    for each in tensors:
        if each.dtype not in (torch.bfloat16, torch.float16, torch.float32):
            return f"its kernels take bf16, fp16 and fp32, and got {each.dtype}"
    device = tensors[0].device.type
    if device != "cuda" and not asked:
        return f"its kernels are for GPUs, and the input is on {device}"
    if device != "cuda" and not INTERPRETED:
        return (
            "its kernels need a GPU (or, to test them, TRITON_INTERPRET=1 in the environment before they are "
            f"imported), and the input is on {device}"
        )
    return None


class TritonSparsify:
    """The operator on these kernels."""

    def refuses(self, tensors: Sequence[Tensor], asked: bool) -> str | None:
        features = tensors[0].shape[-1]
        if features > 65536:
            return f"its kernels take up to 65536 features, and the input has {features}"
        if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
            return "transforms of torch.func do not reach the gradients of its kernels"
        return refuses(tensors, asked)

    def survivors(self, form: str, inputs: tuple, selection: Selection) -> Survivors:
        x, *others = inputs
        if form == "topk":
            other, producer, eps = None, "none", 0.0
        elif form == "rms_norm_topk":
            other, eps, unit_offset = others
            producer = NORMS[unit_offset]
        else:
            other, producer = others
            eps = 0.0
        values, indices, scale = _survivors(x, other, producer, eps, *_unpacked(x, selection))
        return Survivors(values, indices, scale[..., None] if selection.quantization == "int8" else None)

    def mask(self, x: Tensor, selection: Selection) -> Tensor:
        return _topk_mask(x, selection.kept_of_block(x.shape[-1]), selection.block_size)

    def topk(self, x: Tensor, selection: Selection) -> Tensor:
        arguments = x, *_unpacked(x, selection)
        if torch.compiler.is_compiling() and torch.is_grad_enabled() and not _is_exporting():
            # Attention saves its output for its own backward. Selecting from it again there costs less than a second
            # tensor; an uncompiled model cannot be told so from here.
            return checkpoint(_topk, *arguments, use_reentrant=False, preserve_rng_state=False)[0]
        return _topk(*arguments)[0]

    def rms_norm_topk(self, x: Tensor, weight: Tensor, eps: float, unit_offset: bool, selection: Selection) -> Tensor:
        return _rms_norm_topk(x, weight, eps, unit_offset, *_unpacked(x, selection))[0]

    def glu_topk(self, gate: Tensor, up: Tensor, activation: str, selection: Selection) -> Tensor:
        return _glu_topk(gate, up, activation, *_unpacked(gate, selection))[0]


def _is_exporting() -> bool:
    """Whether `torch.export` traces; PyTorch 2.11's public function says so of all that `torch.compile` traces."""
    return torch.compiler._is_exporting_flag


def _unpacked(x: Tensor, selection: Selection) -> tuple[int, int | None, bool, bool]:
    """A selection from `x [..., D]` as the custom operators take it: K of a block, M, whether to round and rescale."""
    rounds, rescales = selection.quantization == "int8", selection.rescale == "l2"
    return selection.kept_of_block(x.shape[-1]), selection.block_size, rounds, rescales
