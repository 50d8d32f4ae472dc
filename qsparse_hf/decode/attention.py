"""Attention for one token: on a CPU, where Transformers' call of PyTorch's attention is slow, and in a CUDA graph.

For one token, 32 heads and a cache of 2048 entries in bf16, that call takes 3.5 to 4 ms a layer on two CPU cores, six
to twelve times as long as the implementations here: `benchmarks/NOTES.md`.

B sequences, H query heads, G query heads to a key-value head, L entries of the KV cache, d head size.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..modeling.backend import runs
from ..modeling.sparsify import SURVIVORS


class AttendImplementation(Protocol):
    """One way to compute `attend`."""

    def refuses(self, tensors: Sequence[Tensor], asked: bool) -> str | None:
        """Why it does not run on query and keys, or None if it does; `asked` if the caller named it."""

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
        """See `attend`."""


class StepCache(NamedTuple):
    """A layer's static cache, as a decode step finds it."""

    keys: Tensor
    """`[B, H / G, L, d]`, contiguous."""
    values: Tensor
    """As `keys`."""
    length: Tensor
    """int64, one number on the device: how many entries there are. A step leaves it as it is."""
    mask: Tensor | None
    """`[B, 1, 1, >= L]`, bool: which entries count, for padding; None for all. The new one counts anyway."""
    arrived: Tensor
    """int32, at least B * H zeros, and left so: room for the programs of a kernel to count each other."""


class StepImplementation(Protocol):
    """One way to do all that a decode step does between its projections."""

    def refuses(self, tensors: Sequence[Tensor], asked: bool) -> str | None:
        """As above, of the query."""

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, rotary: tuple[Tensor, Tensor], cache: StepCache, scaling: float
    ) -> Tensor:
        """One token's attention over a static cache, which gets its key and value; `[B, 1, H * d]`.

        Args:
            query: `[B, 1, H * d]`; it, key and value `[B, 1, H / G * d]` may be parts of one tensor `[B, 1, N]`.
            rotary: cosines and sines `[B, 1, R]` of the rotary embedding at each token's position, R <= d.
        """


class TorchAttend:
    """PyTorch's own attention, given the query heads of a key-value head as if they were tokens: keys are read once."""

    def refuses(self, tensors: Sequence[Tensor], asked: bool) -> str | None:
        return None

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
        sequences, heads, _, d = query.shape
        tokens = query.reshape(sequences, keys.shape[1], -1, d)
        y = F.scaled_dot_product_attention(tokens, keys, values, mask, scale=scaling)
        return y.reshape(sequences, 1, heads, d)


class TorchStep:
    """The step as it is written: every kernel is held against it."""

    def refuses(self, tensors: Sequence[Tensor], asked: bool) -> str | None:
        return None

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, rotary: tuple[Tensor, Tensor], cache: StepCache, scaling: float
    ) -> Tensor:
        keys, values, length, mask, _ = cache
        sequences, kv_heads, entries, d = keys.shape
        query, key, value = (each.unflatten(-1, (-1, d)).transpose(1, 2) for each in (query, key, value))
        query, key = _rotated(query, *rotary), _rotated(key, *rotary)
        at = length.view(1)
        keys.index_copy_(2, at, key)
        values.index_copy_(2, at, value)
        place = torch.arange(entries, device=keys.device)
        counts = place < length
        if mask is not None:
            counts = counts & mask[..., :entries]
        counts = (counts | (place == length)).expand(sequences, 1, 1, entries)
        groups = query.view(sequences, kv_heads, -1, d).float()  # the heads of a group pass for tokens
        scores = (groups @ keys.float().mT * scaling).masked_fill(~counts, -torch.inf)
        return (scores.softmax(-1) @ values.float()).to(query.dtype).reshape(sequences, 1, -1)


def _rotated(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`[B, H, 1, d]` after the rotary embedding `[B, 1, R]` of their first R features."""
    turned, rest = heads.split([cos.shape[-1], heads.shape[-1] - cos.shape[-1]], dim=-1)
    first, second = turned.chunk(2, dim=-1)
    turned = turned * cos[:, None] + torch.cat([-second, first], dim=-1) * sin[:, None]
    return torch.cat([turned, rest], dim=-1)


ATTEND_IMPLS: dict[str, AttendImplementation] = {"torch": TorchAttend()}
"""Implementations of `attend` by name, the preferred first; kernels add themselves with `backend.prefer`. The first
that takes the tensors runs: QSPARSE_BACKEND names what selects and multiplies."""

STEP_IMPLS: dict[str, StepImplementation] = {"reference": TorchStep()}
"""The same for `StepImplementation`, which the CUDA graph of a decode step uses."""


def is_slow(query: Tensor, keys: Tensor, mask: Tensor | None, implementation: str, more: dict) -> bool:
    """Whether `attend` can replace the Transformers attention function called `implementation`, and is faster.

    False where keyword arguments (`more`) change the result, as the paged cache of continuous batching does, and where
    a user registered another function under that name.
    """
    return (
        query.shape[2] == 1
        and query.device.type == "cpu"
        and not (torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling())
        and (mask is None or (isinstance(mask, Tensor) and mask.shape[1] == 1))
        and more.get("cache") is None
        and more.get("position_bias") is None
        and ALL_ATTENTION_FUNCTIONS.get(implementation) is sdpa_attention_forward
        and (query.shape[1] > keys.shape[1] or runs("numba", SURVIVORS, [query, keys]))
    )


def attend(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    """Attention of one token a sequence over a cache that holds its own entry already; `[B, 1, H, d]`.

    Args:
        query: `[B, H, 1, d]`.
        keys: `[B, H / G, L, d]`, as `values`.
        mask: `[B or 1, 1, 1, L or 1]`, bool (False: not attended) or floats that are added to the scores; None for
            no mask. A sequence whose entries are all masked gets zeros.
    """
    tensors = [query, keys]
    implementation = next(each for each in ATTEND_IMPLS.values() if each.refuses(tensors, asked=False) is None)
    return implementation.attend(query, keys, values, mask, scaling)
