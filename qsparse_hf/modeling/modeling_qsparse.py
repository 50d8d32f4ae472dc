"""What all Q-Sparse families share: attention and feed-forward whose projections read sparsified inputs.

A dense family's modules are built by its own code and then given a Q-Sparse class, which adds no parameters: state
dicts stay those of the dense model. The sparsification stands before the projections, which remain plain `nn.Linear`s,
so adapters, quantizers and engines that replace a Linear all see the sparsified input: in the norm where that feeds
nothing else, in the parent's forward otherwise.

B batch, T tokens, D hidden size, H heads, d head size.
"""

import os

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, eager_attention_forward

from .configuration_qsparse import QSparseConfigMixin
from .sparsify import GLUSparsify, RMSNormSparsify, Sparsify


def sparsify_settings(config: QSparseConfigMixin, group: str, layer: int) -> tuple[float, int | None, str, bool]:
    """What a `Sparsify` is made with, for the input of one projection group in one layer."""
    return (
        config.projection_sparsity(group, layer),
        config.sparsity_block_size,
        config.sparsity_rescale,
        config.sparsity_ste,
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


class QSparseAttention:
    """Attention whose q, k, v read what the norm before them sparsified, and whose o reads another sparsified input.

    Mixed into a family's own.
    """

    sliding_window: int | None = None

    def add_sparsify(self, config: QSparseConfigMixin, layer: int) -> None:
        self.o_sparsify = Sparsify(*sparsify_settings(config, "o", layer))

    def forward(
        self,
        hidden_states: Tensor,  # [B, T, D], sparse
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values=None,
        **kwargs,
    ) -> tuple[Tensor, Tensor | None]:
        token_shape = hidden_states.shape[:-1]
        head_shape = (*token_shape, -1, self.head_dim)

        query = self.q_proj(hidden_states).view(head_shape).transpose(1, 2)  # [B, H, T, d]
        key = self.k_proj(hidden_states).view(head_shape).transpose(1, 2)
        value = self.v_proj(hidden_states).view(head_shape).transpose(1, 2)

        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)

        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        output, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            **kwargs,
        )
        output = output.reshape(*token_shape, -1).contiguous()
        return self.o_proj(self.o_sparsify(output)), weights


class QSparseMLP:
    """Gated feed-forward: gate and up read what the norm before them sparsified, down another sparsified input."""

    def add_sparsify(self, config: QSparseConfigMixin, layer: int) -> None:
        self.down_sparsify = GLUSparsify(*sparsify_settings(config, "down", layer))

    def forward(self, x: Tensor) -> Tensor:  # [B, T, D], sparse
        return self.down_proj(self.down_sparsify(self.gate_proj(x), self.up_proj(x), self.act_fn))


class QSparsePreTrainedModel:
    """What a family's base model and its causal LM both have; mixed in before the dense class."""

    def scale_sparsity(self, factor: float) -> None:
        """Run at `factor` times the configured sparsities: 0 is dense, 1 as configured. The config stays as it is.

        Under `torch.compile` each new factor recompiles.
        """
        if not 0 <= factor <= 1:
            raise ValueError(f"factor must be between 0 and 1, got {factor!r}")
        for module in self.modules():
            if isinstance(module, Sparsify):
                module.factor = factor

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
    """A decoder without its LM head. A family names the classes its attention and feed-forward take on."""

    attention_class: type
    mlp_class: type

    def __init__(self, config: QSparseConfigMixin) -> None:
        config.validate()  # fields may have been set since the config was made
        super().__init__(config)
        for index, layer in enumerate(self.layers):
            layer.self_attn.__class__ = self.attention_class
            layer.mlp.__class__ = self.mlp_class
            layer.self_attn.add_sparsify(config, index)
            layer.mlp.add_sparsify(config, index)
            # A norm feeds nothing but the projections behind it: it may as well select.
            for norm, group in ((layer.input_layernorm, "qkv"), (layer.post_attention_layernorm, "gate_up")):
                norm.__class__ = RMSNormSparsify
                norm.configure(*sparsify_settings(config, group, index))


class QSparseForCausalLM(QSparsePreTrainedModel):
    """A decoder with its LM head. A family names its base model's class."""

    base_class: type

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
