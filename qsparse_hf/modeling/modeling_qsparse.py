"""What all Q-Sparse families share: attention and feed-forward whose projections read sparsified inputs.

A dense family's modules are built by its own code and then given a Q-Sparse class, which adds no parameters: state
dicts stay those of the dense model. The sparsification stands before the projections, which remain plain `nn.Linear`s,
so adapters, quantizers and engines that replace a Linear all see the sparsified input: in the norm where that feeds
nothing else, in the parent's forward otherwise.

B batch, T tokens, D hidden size, H heads, d head size.
"""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, wraps
from typing import Self

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import Cache, GenerationMixin, PreTrainedModel
from transformers.generation import GenerationMode
from transformers.masking_utils import create_masks_for_generate
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, eager_attention_forward

from .configuration_qsparse import PROJECTION_GROUPS, QSparseConfigMixin
from .decode_attention import attend, is_slow
from .decode_graph import DecodeGraph, Decoding, fits, has_graphs
from .sparse_linear import InputMajorLinear, few_tokens, lay_out, project, put_back
from .sparsify import GLUSparsify, RMSNormSparsify, Sparsify, Survivors


class _Call(threading.local):
    """What a thread's call of `generate` works with."""

    cache: Cache | None = None
    """Is a spare afterwards."""
    decoding: Decoding | None = None


_call = _Call()


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
        hidden_states: Tensor | Survivors,  # [B, T, D], sparse
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values=None,
        residual: Tensor | None = None,  # [B, T, D], is added to the output; of a prepared layer
        decode_step: DecodeGraph | None = None,
        **kwargs,
    ) -> tuple[Tensor, Tensor | None]:
        query, key, value = project(hidden_states, self.q_proj, self.k_proj, self.v_proj)
        if decode_step is not None:
            cache = past_key_values.layers[self.layer_idx]
            output = decode_step.attend(query, key, value, *position_embeddings, cache, attention_mask, self.scaling)
            return project(self.o_sparsify(output), self.o_proj, residual=residual)[0], None

        token_shape = query.shape[:-1]
        query, key, value = (
            each.view(*token_shape, -1, self.head_dim).transpose(1, 2) for each in (query, key, value)
        )  # [B, H, T, d]
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)

        prepared = residual is not None and not self.training
        if prepared and is_slow(query, key, attention_mask, self.config._attn_implementation, kwargs):
            output, weights = attend(query, key, value, attention_mask, self.scaling), None
        else:
            function = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
            output, weights = function(
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
        return project(self.o_sparsify(output), self.o_proj, residual=residual)[0], weights


class QSparseMLP:
    """Gated feed-forward: gate and up read what the norm before them sparsified, down another sparsified input."""

    def add_sparsify(self, config: QSparseConfigMixin, layer: int) -> None:
        self.down_sparsify = GLUSparsify(*sparsify_settings(config, "down", layer))

    def forward(self, x: Tensor | Survivors, residual: Tensor | None = None) -> Tensor:  # [B, T, D], x sparse
        gate, up = project(x, self.gate_proj, self.up_proj)
        return project(self.down_sparsify(gate, up, self.act_fn), self.down_proj, residual=residual)[0]


class PreparedDecoderLayer:
    """A decoder layer whose residual sums come with the decode products; mixed into a family's own."""

    def forward(self, hidden_states: Tensor, **kwargs) -> Tensor:
        x = self.input_layernorm(hidden_states)
        hidden_states, _ = self.self_attn(hidden_states=x, residual=hidden_states, **kwargs)
        return self.mlp(self.post_attention_layernorm(hidden_states), residual=hidden_states)

    def __reduce_ex__(self, protocol: int) -> tuple:
        _, _, *rest = super().__reduce_ex__(protocol)  # would look for the class by its name
        return _new_prepared, (type(self).__bases__[1],), *rest


@cache
def _prepared(layer_class: type) -> type:
    """A layer's class in a prepared model. It keeps its name, by which some tell layers."""
    return type(layer_class.__name__, (PreparedDecoderLayer, layer_class), {})


def _new_prepared(layer_class: type) -> nn.Module:
    return _prepared(layer_class).__new__(_prepared(layer_class))


def projection_groups(layer: nn.Module) -> Iterator[tuple[Sparsify, dict[str, nn.Linear]]]:
    """What selects in a decoder layer, and the linears that read what it selected, by name."""
    attention, mlp = layer.self_attn, layer.mlp
    for block, sparsify, group in (
        (attention, layer.input_layernorm, "qkv"),
        (attention, attention.o_sparsify, "o"),
        (mlp, layer.post_attention_layernorm, "gate_up"),
        (mlp, mlp.down_sparsify, "down"),
    ):
        yield sparsify, {name: getattr(block, name) for name in PROJECTION_GROUPS[group]}


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
        if self.is_prepared:
            self._count_few_tokens()

    def _count_few_tokens(self) -> None:
        for layer in self.base_model.layers:
            for sparsify, linears in projection_groups(layer):
                first = next(iter(linears.values()))
                if isinstance(first, InputMajorLinear):
                    sparsify.few = few_tokens(sparsify.settings[0], first.weight)

    @property
    def is_prepared(self) -> bool:
        """Whether `prepare_for_decode` was called, and `restore` not since."""
        return any(isinstance(layer, PreparedDecoderLayer) for layer in self.base_model.layers)

    def prepare_for_decode(self) -> Self:
        """Make `generate` fast: from now on decoding reads the weights of the surviving features alone.

        The projections' weights change their strides, in place; their names, shapes and values stay, and `restore`
        undoes it. On a GPU `generate` then also takes a static cache, unless told which, and replays each step as a
        CUDA graph. Training, prefill and batches too large to gain go on with dense products. Hooks on the projections
        do not see the tokens that others decode.

        A graph is not used for calls that return their cache (`return_dict_in_generate`) or search beams, nor where
        the log, at info level, says why. It notices weights and sparsities that change, but not hooks, modules and
        buffers: call `restore` before changing those. The cache of the last call is kept for the next one until then.

        Returns:
            the model itself.

        Raises:
            ValueError: a projection is no plain linear with its weight in memory, but an adapter's, a quantizer's, an
                offloaded one or one made in inference mode.
        """
        if self.is_prepared:
            return self
        if obstacle := self._obstacle():
            raise ValueError(f"prepare_for_decode needs plain linears with their weights in memory, and {obstacle}")
        try:
            for layer in self.base_model.layers:
                layer.__class__ = _prepared(type(layer))
                for sparsify, linears in projection_groups(layer):
                    if sparsify.sparsity > 0:
                        lay_out(*linears.values())
            self._count_few_tokens()
        except BaseException:
            self.restore()
            raise
        return self

    def _obstacle(self) -> str | None:
        """What keeps the model from being prepared."""
        for number, layer in enumerate(self.base_model.layers):
            for _, linears in projection_groups(layer):
                for name, linear in linears.items():
                    if linear.weight.is_inference():
                        return f"{name} of layer {number} was made in inference mode, which leaves it unchangeable"
                    if type(linear) is not nn.Linear or type(linear.weight.data) is not Tensor or linear.weight.is_meta:
                        kind = f"{type(linear).__module__}.{type(linear).__name__}"
                        return (
                            f"{name} of layer {number} is a {kind} with a "
                            f"{type(linear.weight.data).__name__} on {linear.weight.device}; merge adapters before"
                        )
        return None

    def restore(self) -> Self:
        """Undo `prepare_for_decode`; returns the model itself."""
        for module in self.modules():  # adapters may have come around linears since
            if isinstance(module, InputMajorLinear):
                put_back(module)
            elif isinstance(module, Sparsify):
                module.few = 0
            elif isinstance(module, PreparedDecoderLayer):
                module.__class__ = type(module).__bases__[1]
        return self

    @contextmanager
    def as_restored(self) -> Iterator[None]:
        """Undone for a while, for what looks at the weights' strides or hooks the projections."""
        prepared = self.is_prepared
        self.restore()
        try:
            yield
        finally:
            if prepared and self._obstacle() is None:
                self.prepare_for_decode()

    def _apply(self, *args, **kwargs) -> Self:  # `.to`, `.half` and their like give each parameter a tensor of its own
        with self.as_restored():
            return super()._apply(*args, **kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike, *args, **kwargs) -> None:
        """As in Transformers; the folder also loads without this package through `trust_remote_code=True`."""
        declare_auto_model(self)
        with self.as_restored():
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

    _spare_cache: Cache | None = None
    """The cache of the last call of `generate`, with the graph that decodes over it, for the next one."""

    def restore(self) -> Self:
        self._spare_cache = None
        return super().restore()

    def __getstate__(self) -> dict:
        return vars(self) | {"_spare_cache": None}

    @property
    def _steps_as_usual(self) -> bool:
        """Whether nobody else, a subclass or a prompt of PEFT's, has a say in what a step of `generate` is given."""
        usual = {
            "prepare_inputs_for_generation": QSparseForCausalLM,
            "_update_model_kwargs_for_generation": GenerationMixin,
        }
        return all(
            name not in vars(self) and getattr(type(self), name) is getattr(where, name)
            for name, where in usual.items()
        )

    @wraps(GenerationMixin.generate)
    def generate(self, *args, **kwargs):
        outer = _call.cache, _call.decoding
        _call.cache = _call.decoding = None
        try:
            return super().generate(*args, **kwargs)
        finally:
            if _call.cache is not None and self.is_prepared:
                self._spare_cache = _call.cache
            _call.cache, _call.decoding = outer

    def _prepare_cache_for_generation(
        self, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
    ) -> None:
        """As in Transformers; a prepared model on a GPU takes a static cache where any would do, and takes it again."""
        ours = (
            self.is_prepared
            and self._steps_as_usual
            and has_graphs(self.device)
            and generation_mode in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
            and generation_config.cache_implementation in (None, "static")
            and generation_config.use_cache is not False
            and model_kwargs.get("past_key_values") is None
            # The caller may go on with a cache that is returned.
            and not generation_config.return_dict_in_generate
            and not generation_config.is_assistant
            and not generation_config.prefill_chunk_size
            and not torch.is_autocast_enabled(self.device.type)
        )
        if not ours:
            return super()._prepare_cache_for_generation(
                generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
            )
        generation_config.cache_implementation = "static"
        sequences = batch_size * generation_config.num_return_sequences
        size = sequences, torch.is_inference_mode_enabled()
        spare = vars(self).pop("_spare_cache", None)  # nobody else's then
        if spare is not None and spare.size == size and spare.asked >= max_cache_length:
            spare.reset()
            model_kwargs["past_key_values"] = spare
        else:
            super()._prepare_cache_for_generation(
                generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
            )
            spare = model_kwargs["past_key_values"]
            spare.size, spare.asked = size, max_cache_length
        _call.cache = spare

    def create_masks_for_generate(self, config, inputs_embeds, attention_mask, past_key_values, **kwargs):
        """As in Transformers, but for a step that runs as a graph, which has its mask inside."""
        if self.is_prepared and self._steps_as_usual and fits(self, past_key_values, inputs_embeds.shape[1]):
            return attention_mask
        return create_masks_for_generate(
            config=config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            **kwargs,
        )

    def get_compiled_call(self, compile_config):
        """What `generate` decodes with over a static cache: a prepared model's own graph."""
        compiled = super().get_compiled_call(compile_config)
        if not (self.is_prepared and self._steps_as_usual):
            return compiled
        _call.decoding = Decoding(self, compiled)
        return _call.decoding

    @wraps(GenerationMixin.prepare_inputs_for_generation)  # whose signature is looked into
    def prepare_inputs_for_generation(self, input_ids, next_sequence_length=None, past_key_values=None, **kwargs):
        """As in Transformers; where a graph decodes, the host has little else to do, and the device waits for it."""
        decoding = _call.decoding
        if next_sequence_length == 1 and decoding is not None and decoding.goes_on(input_ids, past_key_values):
            return {"input_ids": input_ids[:, -1:], "past_key_values": past_key_values}
        return super().prepare_inputs_for_generation(
            input_ids, next_sequence_length=next_sequence_length, past_key_values=past_key_values, **kwargs
        )
