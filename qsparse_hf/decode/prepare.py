"""`prepare_for_decode` and `restore`: a model's modules take on the classes of `layers.py`, and get their own back."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Self

from torch import Tensor, nn

from ..modeling.bitnet import CODES_IN_A_BYTE
from ..modeling.modeling_qsparse import QSparseAttention, QSparseForCausalLM, QSparseMLP, QSparsePreTrainedModel
from ..modeling.sparsify import Sparsify
from .generation import PreparedGeneration
from .layers import PreparedAttention, PreparedDecoderLayer, PreparedMLP, PreparedSparsify
from .layout import LINEARS, InputMajor, few_tokens, is_ternary, lay_out, put_back
from .prepared import Prepared, prepared_class


class PreparedModel(Prepared, QSparsePreTrainedModel):
    """A model whose layers are prepared."""

    is_prepared = True

    def scale_sparsity(self, factor: float) -> None:
        super().scale_sparsity(factor)
        _count_few_tokens(self)

    def scale_quantization(self, strength: float) -> None:
        with as_restored(self):  # weights on their way to ternary ones are not packed: then it stays restored
            self.scale_quantization(strength)

    def _apply(self, *args, **kwargs) -> Self:  # `.to`, `.half` and the like give each parameter a tensor of its own
        with as_restored(self):
            return self._apply(*args, **kwargs)

    def save_pretrained(self, *args, **kwargs) -> None:
        with as_restored(self):
            self.save_pretrained(*args, **kwargs)


class PreparedForCausalLM(PreparedGeneration, PreparedModel):
    """A prepared model that generates."""


_MIXINS = {
    QSparseForCausalLM: PreparedForCausalLM,
    QSparsePreTrainedModel: PreparedModel,
    QSparseAttention: PreparedAttention,
    QSparseMLP: PreparedMLP,
    Sparsify: PreparedSparsify,
}


def _take_on(module: Any, mixin: type) -> None:
    unprepared: Any = type(module)
    _change_class(module, prepared_class(mixin, unprepared))


def _change_class(module: Any, new_class: Any) -> None:
    """Change a module's class, and forwards that were bound to the one before: accelerate's hooks keep such."""
    of_class = type(module).forward
    module.__class__ = new_class
    for name in ("forward", "_old_forward"):
        if getattr(vars(module).get(name), "__func__", None) is of_class:
            setattr(module, name, new_class.forward.__get__(module))


def prepare(model: QSparsePreTrainedModel) -> None:
    """See `QSparsePreTrainedModel.prepare_for_decode`.

    Raises:
        ValueError: a projection is no plain linear with its weight in memory.
    """
    if model.is_prepared:
        return
    restore(model)  # a part of it may be prepared
    if reason := why_not_prepared(model):
        raise ValueError(
            "prepare_for_decode needs plain linears with their weights in memory, and the forwards of their classes "
            f"around them; {reason}"
        )
    try:
        for module in list(model.modules()):
            for plain, mixin in _MIXINS.items():
                if isinstance(module, plain) and not isinstance(module, Prepared):
                    _take_on(module, mixin)
                    break
        for layer in _layers(model):
            if not hasattr(layer, "post_feedforward_layernorm"):  # else what comes of a product is no part of a sum
                _take_on(layer, PreparedDecoderLayer)
        for _, selector, linears in layer_groups(model):
            if selector.configured.sparsity > 0 or all(map(is_ternary, linears.values())):
                lay_out(*linears.values())
        _count_few_tokens(model)
    except BaseException:
        restore(model)
        raise


def restore(model: QSparsePreTrainedModel) -> None:
    """Undo `prepare`."""
    for module in model.modules():  # not by projection group: adapters may have wrapped linears since
        if isinstance(module, InputMajor):
            put_back(module)
        elif isinstance(module, Prepared):
            vars(module).pop("few", None)
            vars(module).pop("always", None)
            vars(module).pop("compiled", None)
            vars(module).pop("_spare_cache", None)
            _change_class(module, module.unprepared)


@contextmanager
def as_restored(model: QSparsePreTrainedModel) -> Iterator[None]:
    """Restore the model for a while, around code that replaces parameters or depends on their strides."""
    prepared = model.is_prepared
    restore(model)
    try:
        yield
    finally:
        if prepared and why_not_prepared(model) is None:
            prepare(model)


def _layers(model: QSparsePreTrainedModel) -> Any:
    return model.base_model.layers


def layer_groups(model: QSparsePreTrainedModel) -> Iterator[tuple[int, Any, dict[str, nn.Linear]]]:
    """Each projection group: the layer's number, the module that selects, the linears that read from it, by path."""
    for number, layer in enumerate(_layers(model)):
        for group in model.config.projection_groups.values():
            linears = {path: layer.get_submodule(path) for path in group.linears}
            yield number, layer.get_submodule(group.selector), linears


def _count_few_tokens(model: QSparsePreTrainedModel) -> None:
    for _, selector, linears in layer_groups(model):
        first = next(iter(linears.values()))
        if isinstance(first, InputMajor):
            selector.few = few_tokens(selector.selection.sparsity, first)
            selector.always = is_ternary(first)


def why_not_prepared(model: QSparsePreTrainedModel) -> str | None:
    """Why the model cannot be prepared, or None if it can."""
    for number, layer in enumerate(_layers(model)):
        for name, module in (("layer", layer), ("self_attn", layer.self_attn), ("mlp", layer.mlp)):
            own = vars(module).get("forward")
            hooked = hasattr(module, "_hf_hook") or getattr(own, "__func__", None) is type(module).forward
            if own is not None and not hooked:
                return f"the {name} of layer {number} has a forward of its own in its class's place"
    for number, _, linears in layer_groups(model):
        for name, linear in linears.items():
            where = f"{name} of layer {number}"
            if linear.weight.is_inference():
                return f"{where} was made in inference mode, which leaves it unchangeable"
            if type(linear) not in LINEARS or type(linear.weight.data) is not Tensor or linear.weight.is_meta:
                kind = f"{type(linear).__module__}.{type(linear).__name__}"
                held = f"{type(linear.weight.data).__name__} on {linear.weight.device}"
                return f"{where} is a {kind} with a {held}; merge adapters before"
            if getattr(linear, "strength", 1) != 1:
                return f"{where} is on its way to ternary weights; scale_quantization(1) ends it"
            if is_ternary(linear) and linear.out_features % CODES_IN_A_BYTE:
                return f"{where} has {linear.out_features} rows, and packed weights need a multiple of four"
    return None
