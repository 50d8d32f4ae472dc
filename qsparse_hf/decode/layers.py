"""The classes that the modules of a prepared model take on: each derives from the class that the module had before.

For a few tokens, a selection returns its survivors as lists instead of a tensor with zeros, and the projections behind
it read the weights of these features alone. The products also add the residual, which saves a kernel launch.
"""

import logging
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward

from ..modeling.backend import say_once
from ..modeling.modeling_qsparse import Block, QSparseAttention, QSparseMLP, take_cache
from ..modeling.sparsify import Sparsify, Survivors, select
from .attention import attend, is_slow
from .graph import DecodeGraph
from .layout import project
from .prepared import Prepared


class PreparedSparsify(Prepared, Sparsify):
    """A selection that returns `Survivors` for a few tokens, where their product is faster than the dense one."""

    few: int = 0
    """The largest number of tokens for which it does; 0 where the projections behind are not laid out."""
    always: bool = False
    """Whether it does at a sparsity of 0 too, as packed weights are read faster than they are unpacked."""

    def select(self, form: str, *inputs: object) -> Tensor | Survivors:
        return select(form, inputs, self.selection, compact=self._compacts(cast("Tensor", inputs[0])))

    def _compacts(self, x: Tensor) -> bool:
        if self.few == 0 or torch.is_grad_enabled() or (self.selection.sparsity == 0 and not self.always):
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


class PreparedDecoderLayer(Prepared, nn.Module):
    """A decoder layer whose residuals are added by the products of `o_proj` and `down_proj`."""

    input_layernorm: PreparedSparsify
    post_attention_layernorm: PreparedSparsify
    self_attn: PreparedAttention
    mlp: PreparedMLP

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        if self.training:  # some families have dropout between product and sum
            return super().forward(hidden_states, **kwargs)
        x = self.input_layernorm(hidden_states)
        hidden_states, _ = self.self_attn(hidden_states=x, residual=hidden_states, **kwargs)
        return self.mlp(self.post_attention_layernorm(hidden_states), residual=hidden_states)
