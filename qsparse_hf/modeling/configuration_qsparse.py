# SPDX-License-Identifier: Apache-2.0
"""Configurations of the Q-Sparse families: a dense family's own fields, and how sparse each projection's input is."""

from dataclasses import dataclass, fields
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from huggingface_hub.dataclasses import strict, validated_field
from transformers import (
    BitNetConfig,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from .bitnet import WEIGHT_QUANTIZATIONS
from .sparsity import QUANTIZATIONS, RESCALES, Selection, check_block_size, check_choice, check_sparsity

if TYPE_CHECKING:

    class _Config(PreTrainedConfig):  # what the mixin is mixed into
        hidden_size: int
        intermediate_size: int
        num_attention_heads: int
        num_hidden_layers: int
        vocab_size: int
else:
    _Config = object


class ProjectionGroup(NamedTuple):
    """Linear projections that read one sparsified input; paths within a decoder layer."""

    selector: str
    """The module whose output they read: a norm that sparsifies, or a sparsifier in the block around them."""
    linears: tuple[str, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """The linears' own names."""
        return tuple(path.rpartition(".")[-1] for path in self.linears)


GROUPS = ("qkv", "o", "gate_up", "down")
"""Names of the projection groups of every family."""

_LLAMA_GROUPS = {
    "qkv": ProjectionGroup("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    "o": ProjectionGroup("self_attn.o_sparsify", ("self_attn.o_proj",)),
    "gate_up": ProjectionGroup("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
    "down": ProjectionGroup("mlp.down_sparsify", ("mlp.down_proj",)),
}
_PHI3_GROUPS = _LLAMA_GROUPS | {
    "qkv": ProjectionGroup("input_layernorm", ("self_attn.qkv_proj",)),
    "gate_up": ProjectionGroup("post_attention_layernorm", ("mlp.gate_up_proj",)),
}
_GEMMA3_GROUPS = _LLAMA_GROUPS | {
    "gate_up": _LLAMA_GROUPS["gate_up"]._replace(selector="pre_feedforward_layernorm"),
}
_BITNET_GROUPS = {
    "qkv": _LLAMA_GROUPS["qkv"],
    "o": _LLAMA_GROUPS["o"]._replace(selector="self_attn.attn_sub_norm"),
    "gate_up": _LLAMA_GROUPS["gate_up"],
    "down": _LLAMA_GROUPS["down"]._replace(selector="mlp.ffn_sub_norm"),
}


def _tensor_parallel_plan(groups: dict[str, ProjectionGroup]) -> dict[str, str]:
    """A top-K ranks whole rows, so every projection's output is gathered, and no input is sharded: each rank selects
    what a single device would. Llama's own `rowwise` o_proj and down_proj would rank their shard alone.
    """
    return {f"layers.*.{linear}": "colwise_gather_output" for group in groups.values() for linear in group.linears}


PACKED_AS = ("bitlinear", "autobitlinear")
"""Transformers' BitNet layers by the names that a `quantization_config` has for them."""


def is_bitnet(quantization: Any) -> bool:
    return isinstance(quantization, dict) and quantization.get("quant_method") == "bitnet"


def packed_layout(quantization: dict[str, Any]) -> str | None:
    """What a `quantization_config` of the method `bitnet` says of the weights: how they are packed, None if not.

    Raises:
        ValueError: it asks for what is not done here.
    """
    known = {"quant_method", "linear_class", "quantization_mode", "modules_to_not_convert", "use_rms_norm"}
    if unknown := sorted(set(quantization) - known - {"rms_norm_eps"}):
        raise ValueError(f"quantization_config has the unknown field {unknown[0]!r}")
    if quantization.get("use_rms_norm"):
        raise ValueError("quantization_config.use_rms_norm must be False: these projections have no norm of their own")
    others = quantization.get("modules_to_not_convert")
    if others is not None and not {"lm_head"} <= set(others) <= {"lm_head", "embed_tokens", "norm"}:
        raise ValueError(f"quantization_config.modules_to_not_convert must be None or ['lm_head'], got {others!r}")
    linear_class = quantization.get("linear_class", PACKED_AS[0])
    check_choice(linear_class, PACKED_AS, "quantization_config.linear_class")
    mode = quantization.get("quantization_mode", "offline")
    check_choice(mode, ("offline", "online"), "quantization_config.quantization_mode")
    return None if mode == "online" and linear_class == "autobitlinear" else linear_class


def _choice(name: str, allowed: tuple[str, ...]) -> Any:
    """A field that holds one of the words `allowed`, the first where nothing is said."""
    return validated_field(lambda value: check_choice(value, allowed, name), default=allowed[0])


@dataclass(kw_only=True, repr=False)
class QSparseConfigMixin(_Config):
    """The fields a Q-Sparse configuration adds to its dense family's.

    Args:
        sparsity: fraction of every projection's input that is set to zero, 0 <= sparsity < 1; 0 is the dense model.
        sparsity_per_projection: other ratios for some of the groups `qkv`, `o`, `gate_up`, `down`; each value is one
            ratio, or a list with one per layer.
        sparsity_block_size: None for a top-K over all features, or `M` for a top-K inside every `M` of them.
        sparsity_rescale: `"none"`, or `"l2"` to divide what survived by its L2 norm (not for converted models, whose
            weights expect the input's own scale).
        sparsity_ste: train with the straight-through estimator (eq. 13); False is the paper's ablation (eq. 12).
        weight_quantization: `"ternary"` for projections that compute with weights -1, 0 and 1 times one scale each
            (eq. 8-10); what is trained and saved has full precision.
        activation_quantization: `"int8"` to round every projection's input to 255 levels a token (eq. 4-7).

    Raises:
        huggingface_hub.errors.StrictDataclassError: a value outside these; the message names the field, the value
            and what is allowed.
        ValueError: a name that begins like one of these fields, or like one that a later version may have, and is
            none; where a dense configuration would keep it and ignore it.
    """

    sparsity: float | int = validated_field(lambda value: check_sparsity(value), default=0.5)
    sparsity_per_projection: dict | None = None
    sparsity_block_size: int | None = None
    sparsity_rescale: str = _choice("sparsity_rescale", RESCALES)
    sparsity_ste: bool = True
    weight_quantization: str = _choice("weight_quantization", WEIGHT_QUANTIZATIONS)
    activation_quantization: str = _choice("activation_quantization", QUANTIZATIONS)

    projection_groups: ClassVar[dict[str, ProjectionGroup]] = _LLAMA_GROUPS
    """Which selection feeds which linears of a decoder layer: the one place that says so."""
    packed_as: ClassVar[str | None] = None
    """The layer of Transformers' whose layout the checkpoint's packed weights have, one of `PACKED_AS`; None for plain
    weights. In `config.json` it is a `quantization_config`, which makes others' tools read the weights; here it is
    none, so that Transformers' quantizer leaves these models' own layers alone."""

    def __setattr__(self, name: str, value: Any) -> None:
        _check_name(name)
        if name == "quantization_config" and is_bitnet(value):
            name, value = "packed_as", packed_layout(value)
            super().__setattr__("weight_quantization", "ternary")
        super().__setattr__(name, value)

    def to_dict(self) -> dict[str, Any]:
        described = super().to_dict()
        if linear_class := described.pop("packed_as", None):
            described["quantization_config"] = {
                "quant_method": "bitnet",
                "linear_class": linear_class,
                "quantization_mode": "offline",
            }
        return described

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        for name in kwargs:  # Transformers hands back those that are no field
            _check_name(name)
        return super().from_dict(config_dict, **kwargs)

    def validate_sparsity_per_projection(self) -> None:
        for group, value in (self.sparsity_per_projection or {}).items():
            name = f"sparsity_per_projection[{group!r}]"
            if group not in GROUPS:
                allowed = ", ".join(GROUPS)
                raise ValueError(f"sparsity_per_projection has an unknown group {group!r}; allowed are {allowed}")
            if not isinstance(value, list | tuple):
                check_sparsity(value, name)
                continue
            if len(value) != self.num_hidden_layers:
                raise ValueError(
                    f"{name} must be one number or one per layer ({self.num_hidden_layers}), got {len(value)} numbers"
                )
            for layer, ratio in enumerate(value):
                check_sparsity(ratio, f"{name}[{layer}]")

    def validate_sparsity_block_size(self) -> None:
        for features_name, features in {
            "hidden_size": self.hidden_size,
            "num_attention_heads * head_dim": self.attention_size,
            "intermediate_size": self.intermediate_size,
        }.items():
            check_block_size(self.sparsity_block_size, features, "sparsity_block_size", features_name)

    @property
    def attention_size(self) -> int:
        """Features of the attention output that `o_proj` reads."""
        head_dim = getattr(self, "head_dim", None) or self.hidden_size // self.num_attention_heads
        return self.num_attention_heads * head_dim

    def projection_sparsity(self, group: str, layer: int) -> float:
        """The ratio of one projection group (one of `GROUPS`) in one layer."""
        value = (self.sparsity_per_projection or {}).get(group, self.sparsity)
        return value[layer] if isinstance(value, list | tuple) else value

    def selection(self, group: str, layer: int) -> Selection:
        """What survives of the input of one projection group in one layer."""
        return Selection(
            self.projection_sparsity(group, layer),
            self.sparsity_block_size,
            self.sparsity_rescale,
            self.sparsity_ste,
            self.activation_quantization,
        )


QSPARSE_FIELDS = tuple(field.name for field in fields(QSparseConfigMixin))
"""Names of the fields of `QSparseConfigMixin`."""

_RESERVED = ("spars", "weight_quant", "activation_quant")


def _check_name(name: str) -> None:
    if name.casefold().startswith(_RESERVED) and name not in QSPARSE_FIELDS:
        nearest = get_close_matches(name, QSPARSE_FIELDS, n=1)
        hint = f"; did you mean {nearest[0]}?" if nearest else ""
        raise ValueError(f"this version has no field {name!r}, it has {', '.join(QSPARSE_FIELDS)}{hint}")


@strict
class QSparseLlamaConfig(QSparseConfigMixin, LlamaConfig):
    model_type = "qsparse_llama"
    base_model_tp_plan = _tensor_parallel_plan(_LLAMA_GROUPS)


@strict
class QSparseMistralConfig(QSparseConfigMixin, MistralConfig):
    model_type = "qsparse_mistral"
    base_model_tp_plan = _tensor_parallel_plan(_LLAMA_GROUPS)


@strict
class QSparseQwen2Config(QSparseConfigMixin, Qwen2Config):
    model_type = "qsparse_qwen2"
    base_model_tp_plan = _tensor_parallel_plan(_LLAMA_GROUPS)


@strict
class QSparseQwen3Config(QSparseConfigMixin, Qwen3Config):
    model_type = "qsparse_qwen3"
    base_model_tp_plan = _tensor_parallel_plan(_LLAMA_GROUPS)


@strict
class QSparsePhi3Config(QSparseConfigMixin, Phi3Config):
    model_type = "qsparse_phi3"
    projection_groups = _PHI3_GROUPS
    base_model_tp_plan = _tensor_parallel_plan(_PHI3_GROUPS)


@strict
class QSparseGemma3Config(QSparseConfigMixin, Gemma3TextConfig):
    model_type = "qsparse_gemma3_text"
    projection_groups = _GEMMA3_GROUPS
    base_model_tp_plan = _tensor_parallel_plan(_GEMMA3_GROUPS)

    def validate_use_bidirectional_attention(self) -> None:
        if self.use_bidirectional_attention:
            raise ValueError("use_bidirectional_attention must be False: Q-Sparse models are causal, got True")


@strict
class QSparseBitNetConfig(QSparseConfigMixin, BitNetConfig):
    model_type = "qsparse_bitnet"
    projection_groups = _BITNET_GROUPS
    base_model_tp_plan = _tensor_parallel_plan(_BITNET_GROUPS)
