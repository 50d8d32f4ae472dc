"""One token's attention: on a CPU, where the way in which Transformers calls PyTorch's is slow, and in a graph.

Behind 2048 entries in bf16 a layer of 32 heads takes 3.5 to 4 ms on a CPU, six to twelve times what either way here
takes: `benchmarks/NOTES.md`.

B sequences, H query heads, G of them to a key-value head, L entries of the cache, d head size.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..modeling.backend import choose, runs


class AttendImplementation(Protocol):
    """One way to compute `attend`."""

    def refuses(self, tensors: Sequence[Tensor], asked: bool) -> str | None:
        """Why it does not run on query and keys, or None if it does; `asked` if somebody named it."""

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
        """See `attend`."""


class StepImplementation(Protocol):
    """One way to do all that a decode step does between its projections."""

    def refuses(self, tensors: Sequence[Tensor], asked: bool) -> str | None:
        """As above, of the query."""

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cos: Tensor,
        sin: Tensor,
        keys: Tensor,
        values: Tensor,
        length: Tensor,
        mask: Tensor | None,
        scaling: float,
        arrived: Tensor,
    ) -> Tensor:
        """One token's attention over a static cache, which gets its key and value; `[B, 1, H * d]`.

        Args:
            query: `[B, 1, H * d]`; it, key and value `[B, 1, H / G * d]` may be parts of one tensor `[B, 1, N]`.
            cos: `[B, 1, R]`, as `sin`: the rotary embedding at each token's position, of the first R <= d features.
            keys: `[B, H / G, L, d]`, contiguous, as `values`: the cache.
            length: int64, one number on the device: how many entries the cache has. It is left as it is.
            mask: `[B, 1, 1, >= L]`, bool: which entries count, for padding; None for all. The new one counts anyway.
            arrived: int32, at least B * H zeros, and left so: room for the programs of a kernel to count each other.
        """


class TorchAttend:
    """By PyTorch's own attention, to which the heads of a group pass for tokens."""

    def refuses(self, tensors: Sequence[Tensor], asked: bool) -> str | None:
        return None

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
        sequences, heads, _, d = query.shape
        tokens = query.reshape(sequences, keys.shape[1], -1, d)
        y = F.scaled_dot_product_attention(tokens, keys, values, mask, scale=scaling)
        return y.reshape(sequences, 1, heads, d)


IMPLS: dict[str, AttendImplementation] = {"torch": TorchAttend()}
"""Implementations of `attend` by name, the preferred first; kernels add themselves with `backend.prefer`."""

STEP_IMPLS: dict[str, StepImplementation] = {}
"""As `IMPLS`, for the step that runs as a graph."""


def is_slow(query: Tensor, keys: Tensor, mask: Tensor | None, implementation: str, more: dict) -> bool:
    """Whether `attend` takes what Transformers' function by that name would be given, and is faster.

    Not where there is `more` that changes the result, as the paged cache of continuous batching, and not if somebody
    put another function in that one's place.
    """
    return (
        query.shape[2] == 1
        and query.device.type == "cpu"
        and not (torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling())
        and (mask is None or (isinstance(mask, Tensor) and mask.shape[1] == 1))
        and more.get("cache") is None
        and more.get("position_bias") is None
        and ALL_ATTENTION_FUNCTIONS.get(implementation) is sdpa_attention_forward
        and (query.shape[1] > keys.shape[1] or runs("numba", IMPLS, [query, keys]))
    )


def attend(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    """One token's attention over the entries of a cache, its own among them; `[B, 1, H, d]`.

    Args:
        query: `[B, H, 1, d]`.
        keys: `[B, H / G, L, d]`, as `values`.
        mask: `[B or 1, 1, 1, L or 1]`, bool, which entries count, or floats that are added to the scores; None for
            all. Where no entry counts there are zeros.
    """
    return choose(IMPLS, [query, keys], None).attend(query, keys, values, mask, scaling)
