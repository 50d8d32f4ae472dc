"""A decoder layer for one token on a CPU, in two compiled calls: before and after the KV cache gets its entry.

Made of the kernels of the single operators: a layer of a 1B model takes about a millisecond, and Python and PyTorch's
calls around some thirty small operators would take as long again. Rounds where these do.

Arrays hold the bits of floats as integers, see `numba_base.py`. D features in, N features out, H query heads, L entries
of the KV cache, d head size. A group is what `_group` makes of a projection group: a norm's gain or nothing, the
selection, the weights side by side.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numba.extending import overload
from torch import Tensor

from ..decode.layout import Rows
from ..decode.weights import FloatWeights, TernaryWeights
from ..modeling.bitnet import LEAST_SCALE
from ..modeling.sparsify import ACTIVATION_NAMES, RMSNormSparsify, Sparsify
from .decode_attention_numba import attend_kernel, scores_of
from .numba_base import KINDS, bits_of, kernel, nothing, read, refuses_compiling, threads_for, write
from .sparse_linear_numba import multiply_rows
from .sparsify_numba import fill_lists, normalise, round_list
from .ternary_linear_numba import multiply_codes

_ACTIVATIONS = ("silu", "relu", "relu2", "gelu", "gelu_pytorch_tanh")
_LEAST = np.float32(LEAST_SCALE)


@kernel()
def _rotate(head, cos, sin, turned):
    """The rotary embedding of the first features of `head [d]`, as many as `cos` and `sin` have, into `turned [d]`."""
    half = cos.size // 2
    for i in range(cos.size):
        other = -read(head[i + half]) if i < half else read(head[i - half])
        along = read(write(read(head[i]) * read(cos[i]), head))
        turned[i] = write(along + read(write(other * read(sin[i]), head)), head)
    for i in range(cos.size, head.size):
        turned[i] = head[i]


@kernel()
def _gated(both, activation, hidden):
    """`hidden [1, I] = activation(gate) * up` of `both [1, 2 I]`, by the activation's number in `_ACTIVATIONS`."""
    size = hidden.shape[1]
    for i in range(size):
        x = read(both[0, i])
        if activation == 0:
            y = x / (np.float32(1) + np.exp(-x))
        elif activation == 1:
            y = max(x, np.float32(0))
        elif activation == 2:
            y = max(x, np.float32(0)) ** 2
        elif activation == 3:
            y = np.float32(0.5) * x * (np.float32(1) + np.float32(math.erf(x * np.float32(0.7071067811865476))))
        else:
            inner = np.float32(0.7978845608028654) * (x + np.float32(0.044715) * x * x * x)
            y = np.float32(0.5) * x * (np.float32(1) + np.float32(math.tanh(inner)))
        hidden[0, i] = write(read(write(y, both)) * read(both[0, size + i]), both)


def _multiply(values, indices, scale, weights, bias, residual, threads, y):
    """The product of a format of weights: floats are one array, ternary ones four."""


@overload(_multiply)
def _multiply_for(values, indices, scale, weights, bias, residual, threads, y):
    if len(weights) == 1:
        return lambda values, indices, scale, weights, bias, residual, threads, y: multiply_rows(
            values, indices, scale, weights, bias, residual, y
        )
    return lambda values, indices, scale, weights, bias, residual, threads, y: multiply_codes(
        values, indices, scale, weights, bias, residual, threads, y
    )


@kernel()
def _project(x, group, infinity, residual, threads, y):
    """`y [1, N]` of a group's projections of `x [1, D]`."""
    gain, eps, unit_offset, block, keep, rounds, rescales, weights, bias = group
    if gain.size:
        normed = np.empty_like(x)
        normalise(x, gain, eps, unit_offset, normed)
        x = normed
    kept = x.shape[1] // block * keep
    values, indices = np.empty((1, kept), x.dtype), np.empty((1, kept), np.int32)
    fill_lists(x, infinity, block, keep, values, indices)
    scale = np.empty(1 if rounds else 0, np.float32)
    if rounds:
        round_list(values, _LEAST, rescales, scale)
    _multiply(values, indices, scale, weights, bias, residual, threads, y)


@kernel()
def _before(x, group, infinity, head_norms, cos, sin, none, threads, query, key, value):
    """Query `[1, H, d]`, key and value `[1, H / G, d]` of `x [1, D]`, after the rotary embedding."""
    q_gain, k_gain, eps, unit_offset = head_norms
    heads, kv_heads, d = query.shape[1], key.shape[1], query.shape[2]
    y = np.empty((1, (heads + 2 * kv_heads) * d), x.dtype)
    _project(x, group, infinity, none, threads, y)
    each = y.reshape(heads + 2 * kv_heads, d)
    if q_gain.size:
        normed = np.empty_like(each)
        normalise(each[:heads], q_gain, eps, unit_offset, normed[:heads])
        normalise(each[heads : heads + kv_heads], k_gain, eps, unit_offset, normed[heads : heads + kv_heads])
        normed[heads + kv_heads :] = each[heads + kv_heads :]
        each = normed
    for head in range(heads):
        _rotate(each[head], cos, sin, query[0, head])
    for head in range(kv_heads):
        _rotate(each[heads + head], cos, sin, key[0, head])
        value[0, head] = each[heads + kv_heads + head]


@kernel()
def _after(x, query, keys, values, scores, scaling, groups, infinity, activation, none, threads, y):
    """`y [1, D]`: attention of `query [1, H, d]` over the cache, its projection, the feed-forward, both sums."""
    of_o, of_gate_up, of_down, inner = groups
    attended = np.empty_like(query)
    attend_kernel(query, keys, values, scores, scaling, attended)
    between = np.empty_like(x)
    _project(attended.reshape(1, query.shape[1] * query.shape[2]), of_o, infinity, x, threads, between)
    both, hidden = np.empty((1, 2 * inner), x.dtype), np.empty((1, inner), x.dtype)
    _project(between, of_gate_up, infinity, none, threads, both)
    _gated(both, activation, hidden)
    _project(hidden, of_down, infinity, between, threads, y)


class CompiledLayer:
    """A prepared layer's arrays, for these calls; made again when a weight or a selection changes."""

    def __init__(self, layer: Any, groups: Sequence[tuple[Sparsify, Rows]]) -> None:
        self.attention = layer.self_attn
        integer, self.infinity = KINDS[layer.input_layernorm.weight.dtype]
        self.none, empty = nothing(integer, 2), nothing(integer, 1)
        qkv, *others = (_group(selector, rows, empty) for selector, rows in groups)
        self.qkv, self.others = qkv, (*others, groups[3][1].weights.shape[0])
        self.head_norms = empty, empty, np.float32(0), False
        if self.attention.qk_norm:
            q_norm, k_norm = self.attention.q_norm, self.attention.k_norm
            self.head_norms = bits_of(q_norm.weight.detach()), bits_of(k_norm.weight.detach()), *_norm_of(q_norm)
        self.heads = self.attention.config.num_attention_heads
        self.kv_heads = self.attention.config.num_key_value_heads
        self.activation = _ACTIVATIONS.index(ACTIVATION_NAMES[type(layer.mlp.activation())])
        self.steps = sum(rows.weights.shape[0] * rows.weights.shape[1] for _, rows in groups)

    def __call__(self, x: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor | None, cache: Any) -> Tensor:
        d, threads = self.attention.head_dim, torch.get_num_threads()
        query = x.new_empty(1, self.heads, d)
        key, value = x.new_empty(1, self.kv_heads, 1, d), x.new_empty(1, self.kv_heads, 1, d)
        row = bits_of(x).reshape(1, -1)
        bits = [bits_of(each).reshape(1, -1, d) for each in (query, key, value)]
        cos, sin = (bits_of(each).reshape(-1) for each in rotary)
        with threads_for(self.steps):
            _before(row, self.qkv, self.infinity, self.head_norms, cos, sin, self.none, threads, *bits)
        if cache is not None:
            key, value = cache.update(key, value, self.attention.layer_idx)
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        scores = scores_of(mask, 1, key.shape[2])
        with threads_for(self.steps):
            _after(
                row,
                bits[0],
                bits_of(key),
                bits_of(value),
                scores,
                np.float32(self.attention.scaling),
                self.others,
                self.infinity,
                self.activation,
                self.none,
                threads,
                bits_of(y).reshape(1, -1),
            )
        return y


def _group(selector: Sparsify, rows: Rows, empty: np.ndarray) -> tuple:
    """What a projection group's product needs, as the kernels take it apart."""
    selection, weights = selector.selection, rows.weights
    features = weights.shape[0]
    gain, (eps, unit_offset) = empty, (np.float32(0), False)
    if isinstance(selector, RMSNormSparsify):
        gain, (eps, unit_offset) = bits_of(selector.weight.detach()), _norm_of(selector)
    block = selection.block_size or features
    stored = (bits_of(weights.values),) if isinstance(weights, FloatWeights) else weights.arrays  # type: ignore[attr-defined]
    bias = empty if rows.bias is None else bits_of(rows.bias)
    rounds, rescales = selection.quantization == "int8", selection.rescale == "l2" and selection.sparsity > 0
    return gain, eps, unit_offset, block, selection.kept_of_block(features), rounds, rescales, stored, bias


def _norm_of(norm: Any) -> tuple[np.float32, bool]:
    """A norm's epsilon, and whether its gain is `1 + weight`."""
    eps = norm.epsilon() if isinstance(norm, RMSNormSparsify) else getattr(norm, "variance_epsilon", None) or norm.eps
    return np.float32(eps), getattr(norm, "unit_offset", False)


class NumbaLayer:
    """A layer on these kernels."""

    def refuses(self, tensors: Sequence[Tensor], asked: bool) -> str | None:
        return refuses_compiling(tensors, asked)

    def refuses_layer(self, layer: Any, groups: Sequence[tuple[Sparsify, Rows]]) -> str | None:
        """Why a layer with these groups does not run here, or None if it does."""
        formats = {type(rows.weights) for _, rows in groups}
        if len(formats) > 1 or not formats <= {FloatWeights, TernaryWeights}:
            return "its projections have weights of several formats"
        selections = [selector.selection for selector, _ in groups]
        if any(each.rescale == "l2" and each.quantization == "none" and each.sparsity for each in selections):
            return "its selections rescale and do not round"
        if type(layer.mlp.activation()) not in ACTIVATION_NAMES:
            return f"its activation is {type(layer.mlp.activation()).__name__}"
        return None

    def compile(self, layer: Any, groups: Sequence[tuple[Sparsify, Rows]]) -> CompiledLayer:
        return CompiledLayer(layer, groups)
