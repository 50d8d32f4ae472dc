# SPDX-License-Identifier: Apache-2.0
"""What all Q-Sparse families share: attention and feed-forward whose projections read sparsified inputs.

A dense family's modules are built by its own code and then given a Q-Sparse class, which adds no parameters: state
dicts stay those of the dense model. The sparsification stands before the projections, which remain plain `nn.Linear`s,
so adapters, quantizers and engines that replace a Linear all see the sparsified input: in the norm where that feeds
nothing else, in the parent's forward otherwise.

B batch, T tokens, D hidden size, H heads, d head size.
"""

import os
from collections.abc import Callable
from inspect import signature
from typing import Any, ClassVar, NamedTuple, Self, cast

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import GenerationMixin, PreTrainedModel, __version__
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.models.llama.modeling_llama import LlamaAttention, apply_rotary_pos_emb, eager_attention_forward
from transformers.utils import logging

from .bitnet import CODES_IN_A_BYTE, PackedLinear, TernaryLinear
from .configuration_qsparse import QSparseConfigMixin
from .sparsify import GLUSparsify, RMSNormSparsify, Sparsify, Survivors

NEWEST_TESTED = (5, 24)
"""Of Transformers, as `pyproject.toml` has it."""

if tuple(int(part) for part in __version__.split(".")[:2]) > NEWEST_TESTED:
    newest, beyond = (f"{NEWEST_TESTED[0]}.{minor}" for minor in (NEWEST_TESTED[1], NEWEST_TESTED[1] + 1))
    logging.get_logger("transformers").warning_once(  # one logger for all copies of this file
        f"Q-Sparse models were tested with transformers up to {newest}, and this is {__version__}: they may compute "
        f"something else. Install `transformers<{beyond}`, or a newer qsparse-hf."
    )


def declare_auto_model(model: PreTrainedModel) -> None:
    """Name `model`'s base class in its config's `auto_map`, where saving adds only the class that is saved.

    vLLM and feature extraction ask for `AutoModel`.
    """
    base = _unsharded(type(model.base_model))
    entry = {"AutoModel": f"{base.__module__.split('.')[-1]}.{base.__name__}"}
    model.config.auto_map = (getattr(model.config, "auto_map", None) or {}) | entry


def _unsharded(model_class: type) -> type:
    """The class that `fully_shard` derived its own, of torch's making, from."""
    return next(base for base in model_class.__mro__ if not issubclass(base, FSDPModule))


_CACHE_IS_CALLED_CACHE = "cache" in signature(LlamaAttention.forward).parameters
"""Since Transformers 5.24; before it, `cache` was a paged one beside `past_key_values`, for attention functions."""


def take_cache(past_key_values: Any, kwargs: dict[str, Any]) -> Any:
    """The KV cache, or None, that a decoder layer passes to its attention by either name; `kwargs` loses it."""
    return kwargs.pop("cache", past_key_values) if _CACHE_IS_CALLED_CACHE else past_key_values


class Block(nn.Module):
    """A part of a decoder layer with projections."""

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, TernaryLinear) and getattr(self._modules.get(name), "merged", False):  # an adapter's layer
            raise ValueError(
                f"adapters were merged into {name}, whose ternary weight would lose them when it is quantized: load "
                "the model again, and make it plain first (qsparse_hf.weights.make_plain)"
            )
        super().__setattr__(name, value)

    def project(self, x: Tensor | Survivors, *linears: nn.Linear) -> tuple[Tensor, ...]:
        """What each linear makes of `x [B, T, D]`; what prepares a model for decoding overrides it."""
        return tuple(linear(x) for linear in linears)


class QSparseAttention(Block):
    """Attention whose q, k, v read what the norm before them sparsified, and whose o reads another sparsified input.

    Mixed into a family's own, which has built the projections.
    """

    config: Any
    layer_idx: Any
    head_dim: int
    scaling: float
    attention_dropout: Any
    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear
    o_proj: nn.Linear
    q_norm: Any
    k_norm: Any
    o_sparsify: Sparsify
    qk_norm: ClassVar[bool] = False
    """Whether the family normalises each head's query and key, by its `q_norm` and `k_norm`."""
    rotate: ClassVar[Callable[..., tuple[Tensor, Tensor]]] = staticmethod(apply_rotary_pos_emb)
    """The family's rotary embedding of query and key."""

    def read(self, x: Tensor | Survivors) -> tuple[Tensor, ...]:
        """Query, key and value `[B, T, H * d]` of a sparse `x`."""
        return self.project(x, self.q_proj, self.k_proj, self.v_proj)

    def split_heads(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """Each as `[B, H, T, d]`, normalised where the family does so before the rotary embedding."""
        query, key, value = (
            each.view(*each.shape[:-1], -1, self.head_dim).transpose(1, 2) for each in (query, key, value)
        )
        return (self.q_norm(query), self.k_norm(key), value) if self.qk_norm else (query, key, value)

    def window(self) -> int | None:
        """How many entries a token attends to; None for all."""
        return getattr(self, "sliding_window", None)

    def attention_options(self) -> dict[str, Any]:
        """What an attention function is told besides its scaling."""
        dropout = self.attention_dropout if self.training else 0.0
        return {"dropout": dropout, "sliding_window": self.window()}

    def forward(
        self,
        hidden_states: Tensor,  # [B, T, D], sparse
        position_embeddings: Any = None,  # cosines and sines
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> Any:  # [B, T, D], and the attention's weights or None
        cache = take_cache(past_key_values, kwargs)
        token_shape = hidden_states.shape[:-1]
        query, key, value = self.split_heads(*self.read(hidden_states))
        query, key = self.rotate(query, key, *position_embeddings)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx, kwargs=kwargs)
        # vLLM finds attention, and its scaling, by reading these lines in a forward.
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        options = self.attention_options() | kwargs
        output, weights = attend(self, query, key, value, attention_mask, scaling=self.scaling, **options)
        output = output.reshape(*token_shape, -1).contiguous()
        if output.shape[-1] != self.config.attention_size:
            raise ValueError(
                f"a top-K needs all {self.config.attention_size} features of a token's attention, and this process has "
                f"{output.shape[-1]}: tensor parallelism in vLLM needs the package, `pip install qsparse-hf`"
            )
        return self.o_proj(self.o_sparsify(output)), weights


class QSparseMLP(Block):
    """Gated feed-forward: gate and up read what the norm before them sparsified, down another sparsified input.

    Mixed into a family's own, which has built the projections.
    """

    act_fn: nn.Module
    gate_proj: nn.Linear
    up_proj: nn.Linear
    down_proj: nn.Linear
    down_sparsify: GLUSparsify

    def read(self, x: Tensor | Survivors) -> tuple[Tensor, ...]:
        """Gate and up of a sparse `x`."""
        return self.project(x, self.gate_proj, self.up_proj)

    def activation(self) -> nn.Module:
        """That of the gate."""
        return self.act_fn

    def hidden(self, x: Tensor | Survivors) -> Tensor | Survivors:
        """What down reads."""
        return self.down_sparsify(*self.read(x), self.activation())

    def forward(self, x: Tensor | Survivors) -> Tensor:  # [B, T, D], sparse
        return self.down_proj(self.hidden(x))


class Preparation(NamedTuple):
    """What prepares models for decoding, and undoes it: functions of the package that do not ship with a checkpoint."""

    prepare: Callable[[Any], None]
    restore: Callable[[Any], None]


class QSparsePreTrainedModel(PreTrainedModel):
    """What a family's base model and its causal LM both have; mixed in before the dense class."""

    _keep_in_fp32_modules_strict = {"weight_scale"}  # noqa: RUF012 (Transformers' own is no class variable)
    preparation: ClassVar[Preparation | None] = None
    """Set by the package when it is imported."""
    is_prepared = False
    """Whether `prepare_for_decode` was called, and `restore` not since."""

    def scale_sparsity(self, factor: float) -> None:
        """Run at `factor` times the configured sparsities: 0 is dense, 1 as configured. The config stays as it is.

        Under `torch.compile` each new factor recompiles.
        """
        if not 0 <= factor <= 1:
            raise ValueError(f"factor must be between 0 and 1, got {factor!r}")
        for module in self.modules():
            if isinstance(module, Sparsify):
                module.scale(factor)

    def scale_quantization(self, strength: float) -> None:
        """Quantize weights by that share: 0 leaves them as they are, 1 is as configured. The config stays as it is.

        For a ramp in training (see `bitnet.quantize_weight`). Packed weights are ternary and stay so.
        """
        if not 0 <= strength <= 1:
            raise ValueError(f"strength must be between 0 and 1, got {strength!r}")
        for module in self.modules():
            if isinstance(module, TernaryLinear):
                module.strength = float(strength)  # compiled code tells 1 from 1.0

    def prepare_for_decode(self) -> Self:
        """Make `generate` fast: decoding then reads the weights of the surviving features alone.

        The projections' weights change their strides in place; names, shapes and values stay, and `restore` undoes it.
        On a GPU `generate` also takes a static cache, unless another is asked for, and replays each step as a CUDA
        graph. Training, prompts and batches too large to gain use dense products. Hooks on the projections do not see
        tokens decoded by the other products.

        Sums are added in another order, and a top-K is discontinuous: a real model gives other tokens after a while,
        with the same mean loss. Small random models and short outputs agree within rounding.

        Calls that return their cache (`return_dict_in_generate`) or search beams run without a graph, and so do others
        for which the log, at info level, says why. A graph is captured again when weights or sparsities change, but not
        when hooks, modules or buffers do: call `restore` before changing those. The KV cache of a call is offered to
        the next call of `generate`.

        Returns:
            the model itself.

        Raises:
            ImportError: the model runs the code that was saved with its checkpoint; the kernels are in the package.
            ValueError: a projection is no plain linear with its weight in memory, but an adapter's, a quantizer's, an
                offloaded one or one made in inference mode.
        """
        if self.preparation is None:
            raise ImportError(
                "prepare_for_decode needs the package: `pip install qsparse-hf`, and `import qsparse_hf` before "
                "from_pretrained"
            )
        self.preparation.prepare(self)
        return self

    def restore(self) -> Self:
        """Undo `prepare_for_decode`; returns the model itself."""
        if self.preparation is not None:
            self.preparation.restore(self)
        return self

    @classmethod
    def from_pretrained(cls, *args, output_loading_info: bool = False, **kwargs) -> Any:
        """As in Transformers, which would make packed weights up where they are missing, and take any bits for codes.

        Raises:
            ValueError: packed weights are missing, or there are illegal ones.
        """
        loaded: Any = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        model, info = loaded
        packed = {path: module for path, module in model.named_modules() if isinstance(module, PackedLinear)}
        for path, module in packed.items():
            if missing := info["missing_keys"] & {f"{path}.{name}" for name, _ in module.named_buffers()}:
                raise ValueError(f"{model.name_or_path} lacks {min(missing)}, which packed weights have")
            if not module.weight.is_meta:  # as it is where it is offloaded
                module.check(f"{model.name_or_path}: {path}.")
        return loaded if output_loading_info else model

    def save_pretrained(self, save_directory: str | os.PathLike, *args, **kwargs) -> None:
        """As in Transformers; the folder also loads without this package through `trust_remote_code=True`."""
        declare_auto_model(self)
        actual_class = type(self)
        self.__class__ = _unsharded(actual_class)  # saving names the class and copies the file that defines it
        try:
            super().save_pretrained(save_directory, *args, **kwargs)
        finally:
            self.__class__ = actual_class


class QSparseModel(QSparsePreTrainedModel):
    """A decoder without its LM head. A family names the classes its attention, feed-forward and norms take on."""

    attention_class: type
    mlp_class: type
    norm_class: type = RMSNormSparsify
    layers: Any  # a list of the family's decoder layers

    def __init__(self, config: QSparseConfigMixin) -> None:
        config.validate()  # fields may have been set since the config was made
        super().__init__(config)
        for index, layer in enumerate(self.layers):
            layer.self_attn.__class__ = self.attention_class
            layer.mlp.__class__ = self.mlp_class
            norms = dict(layer.named_modules())
            for group, (selector, _) in config.projection_groups.items():
                selection = config.selection(group, index)
                if norm := norms.get(selector):  # it feeds nothing but these projections, so it may as well select
                    norm.__class__ = self.norm_class
                    norm.configure(selection)
                else:
                    layer.set_submodule(selector, (GLUSparsify if group == "down" else Sparsify)(selection))
            if config.weight_quantization == "ternary":
                _quantize(layer, config)


def _quantize(layer: nn.Module, config: QSparseConfigMixin) -> None:
    """Give the projections of a decoder layer ternary weights, packed ones where the checkpoint has such."""
    if config._attn_implementation == "vllm":
        raise ValueError(
            "vLLM puts layers of its own in the place of projections, which would not quantize their weights: give it "
            "a checkpoint whose weights are quantized already, `qsparse convert --weights plain`"
        )
    for group in config.projection_groups.values():
        for path in group.linears:
            linear = cast("nn.Linear", layer.get_submodule(path))
            if config.packed_as is None:
                linear.__class__ = TernaryLinear
                continue
            sizes = linear.in_features, linear.out_features, linear.bias is not None
            if linear.out_features % CODES_IN_A_BYTE:
                raise ValueError(f"{path} has {linear.out_features} rows, and packed weights need a multiple of four")
            layer.set_submodule(path, PackedLinear(*sizes, divides=config.packed_as == "bitlinear"))


class QSparseForCausalLM(QSparsePreTrainedModel, GenerationMixin):
    """A decoder with its LM head. A family names its base model's class."""

    base_class: type
    config_class: type[QSparseConfigMixin]

    def __init_subclass__(cls, **kwargs) -> None:
        super().__init_subclass__(**kwargs)
        if "base_class" in vars(cls):  # a family's class, not one that somebody or `fully_shard` derived from it
            # Label smoothing and the text-generation pipeline know causal LMs by this table.
            MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[cls.config_class.model_type] = cls.__name__

    def __init__(self, config: QSparseConfigMixin) -> None:
        # The dense __init__ would build the dense base model, so it is said again here.
        PreTrainedModel.__init__(self, config)
        self.model = self.base_class(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
