"""The forms that the weights of the projections have in a checkpoint, read from one and written as another.

- `ternary`: in full precision, quantized in every product. What is trained.
- `packed`: codes -1, 0 and 1, two bits each, and one scale a tensor, in Transformers' BitNet layout.
- `plain`: codes times scale, as ordinary floats. What every tool reads.

A tensor is read and written by itself, so that memory holds no more than one shard and one tensor.

Shapes: D features in, N features out.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .checkpoint import HEADER_DTYPES, StoredTensor, locate_tensors
from .errors import UserError
from .modeling.bitnet import (
    CODES_IN_A_BYTE,
    LEAST_SCALE,
    PackedLinear,
    TernaryLinear,
    holds_illegal_code,
    pack,
    quantize_weight,
    ternary,
    unpack,
)
from .modeling.configuration_qsparse import PACKED_AS, QSparseConfigMixin
from .modeling.modeling_qsparse import QSparsePreTrainedModel

FORMS = ("ternary", "packed", "plain")

WRITTEN_AS = PACKED_AS[0]
"""`bitlinear`. Transformers' other layer, `autobitlinear`, unpacks the weights when it loads them, so that they take as
much memory as plain ones, and multiplies the bias with the scale too, which is wrong for q, k and v of Qwen2."""

PACKED_IS_NOT_TRAINED = (
    "packed weights are not trained; `qsparse convert SOURCE OUTPUT --weights ternary` makes weights of full precision "
    "of them"
)

_PACKED_DTYPE = "U8"


def form_of(config: QSparseConfigMixin) -> str:
    """The form, one of `FORMS`, of the weights that a configuration describes."""
    if config.weight_quantization == "none":
        return "plain"
    return "ternary" if config.packed_as is None else "packed"


def fields_of(form: str) -> dict[str, Any]:
    """What a configuration says of weights of that form."""
    quantized = {"weight_quantization": "none" if form == "plain" else "ternary"}
    return quantized | ({"packed_as": WRITTEN_AS} if form == "packed" else {})


def projection_names(config: QSparseConfigMixin) -> list[str]:
    """The projections of a causal language model, by their full names."""
    paths = [path for group in config.projection_groups.values() for path in group.linears]
    return [f"model.layers.{layer}.{path}" for layer in range(config.num_hidden_layers) for path in paths]


@dataclass(frozen=True)
class CodedTensor(StoredTensor):
    """A ternary weight that is stored as codes and their scale, seen as the floats that it stands for.

    Attributes:
        shape: `[N, D]`, of the weight.
        dtype: what other weights beside it have.
        stored: the codes, packed, or as floats `[N, D]`.
        scale: `[1]`.
        divides: the scale holds `1 / alpha`, and not `alpha`.
    """

    stored: StoredTensor
    scale: StoredTensor
    divides: bool

    def load(self) -> Tensor:
        codes, alpha = self.quantized()
        return codes * alpha

    def quantized(self) -> tuple[Tensor, Tensor]:
        """The codes, int8 `[N, D]`, and `alpha`, fp32 `[1]`.

        Raises:
            UserError: there are other codes, or the scale is no positive number.
        """
        alpha, held = self.alpha(), self.stored.load()
        if self.stored.dtype == _PACKED_DTYPE:
            if holds_illegal_code(held):
                raise UserError(f"{self.path}: {self.name} holds a code of bits 11; allowed are 00, 01 and 10")
            return unpack(held, torch.int8), alpha
        if not ((held == 0) | (held.abs() == 1)).all():
            raise UserError(f"{self.path}: {self.name} has a scale, so it must hold -1, 0 and 1 alone")
        return held.to(torch.int8), alpha

    def alpha(self) -> Tensor:
        """fp32 `[1]`.

        Raises:
            UserError: it is no positive number.
        """
        scale = self.scale.load().float()
        alpha = 1 / scale if self.divides else scale
        if not (alpha > 0).logical_and(alpha < torch.inf).all():
            raise UserError(f"{self.scale.path}: {self.scale.name} must be positive and finite, got {scale.item():g}")
        return alpha


def as_floats(
    tensors: Mapping[str, StoredTensor], config: QSparseConfigMixin, linear_class: str, folder: Path
) -> dict[str, StoredTensor]:
    """The tensors of a packed checkpoint, named like a plain one's, with `CodedTensor`s for codes and scales.

    Args:
        tensors: as the files have them.
        config: which projections there are.
        linear_class: one of `PACKED_AS`.
        folder: of the checkpoint.

    Raises:
        UserError: codes or a scale are missing, of another dtype, or the scale has another shape.
    """
    found = dict(tensors)
    coded: dict[str, tuple[StoredTensor, StoredTensor]] = {}
    for name in projection_names(config):
        weight, scale = (found.pop(f"{name}.{part}", None) for part in ("weight", "weight_scale"))
        if weight is None or scale is None:
            missing = f"{name}.weight" + ("" if weight is None else "_scale")
            raise UserError(f"{folder} lacks {missing}, which packed weights have")
        # Transformers' AutoBitLinear holds, and saves, unpacked codes.
        allowed = [_PACKED_DTYPE, *(HEADER_DTYPES if linear_class == "autobitlinear" else ())]
        _check_dtype(weight, allowed)
        _check_dtype(scale, HEADER_DTYPES)
        if scale.shape != (1,):
            raise UserError(f"{scale.path}: {scale.name} has shape {scale.shape}, but a scale is one number, (1,)")
        if len(weight.shape) != 2:
            raise UserError(f"{weight.path}: {weight.name} has shape {weight.shape}, but a weight is a matrix")
        coded[name] = weight, scale
    sizes: Counter[str] = Counter()
    for tensor in found.values():
        sizes[tensor.dtype] += torch.Size(tensor.shape).numel()
    dtype = max(HEADER_DTYPES, key=lambda name: sizes[name])
    for weight, scale in coded.values():
        rows = weight.shape[0] * (CODES_IN_A_BYTE if weight.dtype == _PACKED_DTYPE else 1)
        shape = rows, weight.shape[1]
        divides = linear_class == "bitlinear"
        found[weight.name] = CodedTensor(weight.path, weight.name, shape, dtype, weight, scale, divides)
    return found


def _check_dtype(tensor: StoredTensor, allowed: Iterable[str]) -> None:
    if tensor.dtype not in allowed:
        raise UserError(
            f"{tensor.path}: {tensor.name} is of dtype {tensor.dtype}; allowed for packed weights are "
            f"{', '.join(allowed)}"
        )


def check_rows(names: Iterable[str], model: PreTrainedModel, source: object) -> None:
    """Refuse projections that cannot be packed.

    Raises:
        UserError: four rows of a weight share a byte, and the rows of one are no multiple of four.
    """
    for name in names:
        rows = cast("nn.Linear", model.get_submodule(name)).out_features
        if rows % CODES_IN_A_BYTE:
            raise UserError(
                f"{source}: {name}.weight has {rows} rows, and packed weights need a multiple of {CODES_IN_A_BYTE}; "
                "ternary and plain ones do not"
            )


@dataclass(frozen=True)
class Rewritten:
    """A tensor that is made of a projection's weight when it is read.

    Attributes:
        weight: as it is stored.
        trained: it has full precision and is quantized in every product, whatever values it happens to hold.
        part: `"codes"` and `"scale"` of the packed form, or the name of another form.
    """

    weight: StoredTensor
    trained: bool
    part: str

    @property
    def dtype(self) -> str:
        """Of the floats, by its name in a safetensors header."""
        return self.weight.dtype

    def read(self, dtype: torch.dtype) -> Tensor:
        """The tensor; `dtype` is that of floats.

        Raises:
            UserError: the weight cannot be read or quantized, or its scale is beyond what `dtype` or the form can hold.
        """
        codes, alpha = self._quantized()
        if codes is None or alpha is None:
            return self.weight.read(dtype)
        if self.part == "codes":
            return pack(codes)
        if self.part == "scale":
            return (1 / alpha).reshape(1)
        if self.part == "ternary" and (kept := codes.count_nonzero()):
            if alpha < LEAST_SCALE:
                raise UserError(
                    f"{self.weight.path}: {self.weight.name} has the scale {alpha.item():g}, and ternary weights none "
                    f"below {LEAST_SCALE:g}; packed and plain ones may"
                )
            alpha = (alpha.double() * codes.numel() / kept).float()  # so that their mean magnitude is alpha
        rounded = alpha.to(dtype)
        if rounded == 0 or rounded.isinf():
            raise UserError(f"{self.weight.path}: {self.weight.name} has the scale {alpha.item():g}, beyond {dtype}")
        return codes.to(dtype).mul_(rounded)

    def _quantized(self) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """Codes, int8 `[N, D]`, and `alpha`, fp32 of one element; None where the weight is written as it is."""
        if isinstance(self.weight, CodedTensor):
            return self.weight.quantized()
        if self.part == "ternary" and self.trained:
            return None, None
        held = self.weight.load().float()
        magnitudes = held.abs()
        largest = magnitudes.max()
        if not largest.isfinite():
            raise UserError(f"{self.weight.path}: {self.weight.name} holds values that are not finite")
        if not self.trained and largest > 0 and ((magnitudes == largest) | (magnitudes == 0)).all():
            return held.sign().to(torch.int8), largest  # it is quantized already
        if self.part == "ternary":
            return None, None
        codes, alpha = ternary(held)
        inverse = 1 / alpha  # the packed form's scale: what is left of alpha by it is alpha in every form
        return codes.to(torch.int8), 1 / inverse


def rewritten(
    held: Mapping[str, StoredTensor], names: Iterable[str], form: str, trained: bool
) -> dict[str, StoredTensor | Rewritten]:
    """What a checkpoint of the form `form` holds, from the tensors of one whose weights are seen as floats.

    Weights that are codes times a scale keep both: stored so, or as floats of which all that are not zero have one
    magnitude. All others are quantized by their mean magnitude (eq. 8-10), and stay as they are where `form` is
    `"ternary"`.

    Args:
        held: by name; `CodedTensor`s where the source is packed.
        names: of the projections.
        form: one of `FORMS`.
        trained: the source has the form `"ternary"`.
    """
    made: dict[str, StoredTensor | Rewritten] = dict(held)
    for name in names:
        weight = held[f"{name}.weight"]
        made[f"{name}.weight"] = Rewritten(weight, trained, "codes" if form == "packed" else form)
        if form == "packed":
            made[f"{name}.weight_scale"] = Rewritten(weight, trained, "scale")
    return made


def check_packed(folder: Path, config: QSparseConfigMixin, codes: bool = False) -> None:
    """Look at the packed weights in a folder before they are loaded; of another form, at none.

    Args:
        folder: of a Q-Sparse checkpoint.
        config: its configuration.
        codes: also read all codes, and not the files' headers and the scales alone.

    Raises:
        UserError: they are not those that `config` asks for; the message names the tensor and the file.
    """
    if config.packed_as is None:
        return
    found = as_floats(locate_tensors(folder), config, config.packed_as, folder)
    for name in projection_names(config):
        tensor = found[f"{name}.weight"]
        if isinstance(tensor, CodedTensor):
            tensor.quantized() if codes else tensor.alpha()


def quantized_linears(model: nn.Module) -> Iterator[tuple[str, PackedLinear | TernaryLinear]]:
    """The projections of a model that are packed, or quantized in every product, by name."""
    for name, module in model.named_modules():
        if isinstance(module, PackedLinear | TernaryLinear):
            yield name, module


def make_plain(model: Any) -> None:
    """Turn a model's ternary weights into plain ones, in place: the same model, whose projections are `nn.Linear`s.

    To be called before adapters are merged. In the form `"ternary"` a merged weight would be quantized again, which
    would take away most of what the adapters learnt; in the packed form there is nothing to merge into.

    Args:
        model: Q-Sparse, with PEFT's adapters or without. It is not for training any more: the weights of full precision
            are gone.
    """
    for module in list(model.modules()):
        if isinstance(module, QSparsePreTrainedModel):
            module.restore()  # prepared linears are no plain ones
    for name, linear in list(quantized_linears(model)):
        if isinstance(linear, PackedLinear):
            model.set_submodule(name, _unpacked(linear, model.dtype))
        else:
            with torch.no_grad():
                linear.weight.copy_(quantize_weight(linear.weight, linear.strength))
            linear.__class__ = nn.Linear  # type: ignore[assignment]
    for module in model.modules():
        config = getattr(module, "config", None)
        if isinstance(config, QSparseConfigMixin):
            config.weight_quantization = "none"
            vars(config).pop("packed_as", None)


def _unpacked(linear: PackedLinear, dtype: torch.dtype) -> nn.Linear:
    with torch.device("meta"):
        plain = nn.Linear(linear.in_features, linear.out_features, linear.bias is not None)
    weight = unpack(linear.weight, torch.float32) * linear.scale()
    plain.weight = nn.Parameter(weight.to(dtype))
    if linear.bias is not None:
        plain.bias = nn.Parameter(linear.bias.to(dtype))
    return plain
