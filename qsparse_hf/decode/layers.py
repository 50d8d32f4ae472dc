"""The classes that the modules of a prepared model take on: each derives from the class that the module had before.

For a few tokens, a selection returns its survivors as lists instead of a tensor with zeros, and the projections behind
it read the weights of these features alone. The products also add the residual, which saves a kernel launch.
"""

import logging
from collections.abc import Callable, Sequence
from functools import cache
from operator import attrgetter
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward

from ..modeling.backend import runs, say_once
from ..modeling.configuration_qsparse import ProjectionGroup
from ..modeling.modeling_qsparse import Block, QSparseAttention, QSparseMLP, take_cache
from ..modeling.sparsify import SURVIVORS, Sparsify, Survivors, select
from .attention import attend, is_slow
from .graph import DecodeGraph
from .layout import InputMajor, Rows, project, rows_of
from .prepared import Prepared
from .transformers_names import CACHE


class PreparedSparsify(Prepared, Sparsify):
    """A selection that returns `Survivors` for a few tokens, where their product is faster than the dense one."""

    few: int = 0
    """The largest number of tokens for which it does; 0 where the projections behind are not laid out."""
    always: bool = False
    """Whether it does at a sparsity of 0 too, as packed weights are read faster than they are unpacked."""

    def select(self, form: str, *inputs: object) -> Tensor | Survivors:
        return select(form, inputs, self.selection, compact=self._compacts(cast("Tensor", inputs[0])))

    @property
    def skips(self) -> bool:
        """Whether the product of survivors is faster for one token."""
        return self.few > 0 and (self.selection.sparsity > 0 or self.always)

    def _compacts(self, x: Tensor) -> bool:
        if not self.skips or torch.is_grad_enabled():
            return False
        if torch.is_autocast_enabled(x.device.type):  # autocast casts the inputs of linears, and not lists
            return False
        tokens = x.numel() // x.shape[-1]
        if tokens > self.few and x.ndim == 3 and x.shape[1] == 1:
            say_once(
                logging.WARNING,
                f"decoding {tokens} sequences at once with dense products: at sparsity {self.selection.sparsity:g} "
                f"those that skip zeros are no faster beyond {self.few}",
            )
        return tokens <= self.few


class PreparedBlock(Prepared, Block):
    """A block whose projections read tensors or survivors."""

    def project(self, x: Tensor | Survivors, *linears: nn.Linear, residual: Tensor | None = None) -> tuple[Tensor, ...]:
        return project(x, *linears, residual=residual)


class PreparedAttention(PreparedBlock, QSparseAttention):
    """Attention of a prepared model; in a step that runs as a CUDA graph, one kernel between the projections."""

    def forward(
        self,
        hidden_states: Tensor | Survivors,  # [B, T, D], sparse
        position_embeddings: Any = None,  # cosines and sines
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        residual: Tensor | None = None,  # [B, T, D], added to the output
        decode_step: DecodeGraph | None = None,
        **kwargs: Any,
    ) -> Any:  # [B, T, D], and the attention's weights or None
        cache = take_cache(past_key_values, kwargs)
        query, key, value = self.read(hidden_states)
        token_shape = query.shape[:-1]
        weights = None
        if decode_step is not None:
            heads = self.split_heads(query, key, value)
            query, key, value = (each.transpose(1, 2).flatten(2) for each in heads)
            layer = cache.layers[self.layer_idx]
            output = decode_step.attend(query, key, value, position_embeddings, layer, attention_mask, self.scaling)
        else:
            query, key, value = self.split_heads(query, key, value)
            query, key = self.rotate(query, key, *position_embeddings)
            if cache is not None:
                key, value = cache.update(key, value, self.layer_idx, kwargs=kwargs)
            output, weights = self.attend(query, key, value, attention_mask, **kwargs)
            output = output.reshape(*token_shape, -1).contiguous()
        return self.project(self.o_sparsify(output), self.o_proj, residual=residual)[0], weights

    def head_norms(self) -> list[nn.Module]:
        """Norms of each head's query and key."""
        return [self.q_norm, self.k_norm] if self.qk_norm else []

    def attend(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any) -> tuple:
        """What the configured attention function, or a faster one, returns: `[B, T, H, d]`, and the weights or None."""
        implementation = self.config._attn_implementation
        if not self.training and is_slow(query, key, attention_mask, implementation, kwargs):
            return attend(query, key, value, attention_mask, self.scaling), None
        function = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        options = self.attention_options() | kwargs
        return function(self, query, key, value, attention_mask, scaling=self.scaling, **options)


class PreparedMLP(PreparedBlock, QSparseMLP):
    """Feed-forward of a prepared model."""

    def forward(self, x: Tensor | Survivors, residual: Tensor | None = None) -> Tensor:
        return self.project(self.hidden(x), self.down_proj, residual=residual)[0]


Groups = Sequence[tuple[PreparedSparsify, Rows]]
"""A layer's selections, each with the weights that read from it."""


class LayerImplementation(Protocol):
    """One way to run a whole decoder layer for one token."""

    def refuses(self, tensors: Sequence[Tensor], asked: bool) -> str | None:
        """Why it does not run on the layer's input, or None if it does."""

    def refuses_layer(self, layer: Any, groups: Groups) -> str | None:
        """Why it does not run this layer, or None if it does."""

    def compile(self, layer: Any, groups: Groups) -> Callable[..., Tensor]:
        """A function of the input `[1, 1, D]`, cosines and sines, a mask or None, and a cache or None."""


LAYER_IMPLS: dict[str, LayerImplementation] = {}
"""Implementations by name; where none takes a layer, it runs as the modules that it is made of."""


class PreparedDecoderLayer(Prepared, nn.Module):
    """A decoder layer whose residuals are added by the products of `o_proj` and `down_proj`.

    On a CPU one token at a time runs as a whole where a `LayerImplementation` takes it.
    """

    input_layernorm: PreparedSparsify
    post_attention_layernorm: PreparedSparsify
    self_attn: PreparedAttention
    mlp: PreparedMLP
    compiled: tuple[object, Callable[..., Tensor] | None] | None = None
    """What it was compiled for, and the function, or None where no implementation takes the layer."""

    def __getstate__(self) -> dict:
        return {name: value for name, value in vars(self).items() if name != "compiled"}

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        if self.training:  # some families have dropout between product and sum
            return super().forward(hidden_states, **kwargs)
        if (function := self._function(hidden_states, kwargs)) is not None:
            cache = kwargs.get(CACHE)
            return function(hidden_states, kwargs["position_embeddings"], kwargs.get("attention_mask"), cache)
        x = self.input_layernorm(hidden_states)
        hidden_states, _ = self.self_attn(hidden_states=x, residual=hidden_states, **kwargs)
        return self.mlp(self.post_attention_layernorm(hidden_states), residual=hidden_states)

    def _function(self, x: Tensor, kwargs: dict[str, Any]) -> Callable[..., Tensor] | None:
        """The compiled layer, if it takes this input and nothing watches the layer's modules."""
        if x.device.type != "cpu" or x.numel() != x.shape[-1] or torch.is_grad_enabled():
            return None
        implementation = next((each for each in LAYER_IMPLS.values() if each.refuses([x], asked=False) is None), None)
        mask, attention = kwargs.get("attention_mask"), self.self_attn
        if implementation is None or not (
            set(kwargs) <= _LAYER_ARGUMENTS
            and (mask is None or (isinstance(mask, Tensor) and mask.shape[1] == 1))
            and not torch.is_autocast_enabled("cpu")
            and ALL_ATTENTION_FUNCTIONS.get(attention.config._attn_implementation) is sdpa_attention_forward
            and runs("numba", SURVIVORS, [x])
        ):
            return None
        parts = [getter(self) for getter in _getters(tuple(attention.config.projection_groups.values()))]
        activation, head_norms = self.mlp.activation(), attention.head_norms()
        inside = (attention, self.mlp, activation, *head_norms, *(each for part in parts for each in part))
        if any(map(_is_watched, inside)):
            return None
        if not all(selector.skips and all(map(_is_laid_out, linears)) for selector, *linears in parts):
            return None
        groups = [(selector, rows_of(linears)) for selector, *linears in parts]
        norms = [each for each in (*(part[0] for part in parts), *head_norms) if hasattr(each, "weight")]
        if any(norm.weight.dtype != x.dtype for norm in norms):
            return None
        state = [type(activation), *((selector.selection, rows) for selector, rows in groups)]
        state += [norm.weight.data_ptr() for norm in norms]
        if self.compiled is None or self.compiled[0] != state:
            reason = implementation.refuses_layer(self, groups)
            if reason:
                say_once(logging.INFO, f"a layer is decoded operator by operator: {reason}")
            self.compiled = state, None if reason else implementation.compile(self, groups)
        return self.compiled[1]


def _is_laid_out(linear: nn.Module) -> bool:
    return isinstance(linear, InputMajor)


def _is_watched(module: nn.Module) -> bool:
    """Whether something sees or replaces the module's forward."""
    return bool(module._forward_hooks or module._forward_pre_hooks) or "forward" in vars(module)


@cache
def _getters(groups: tuple[ProjectionGroup, ...]) -> list[Callable[[Any], tuple]]:
    """For each projection group, a function of a layer: its selector, and the linears that read from it."""
    return [attrgetter(group.selector, *group.linears) for group in groups]


_LAYER_ARGUMENTS = {"attention_mask", "position_ids", CACHE, "use_cache", "position_embeddings", "cache_position"}
