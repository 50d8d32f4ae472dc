"""One token's attention on a CPU, where Transformers calls PyTorch's in ways in which it is slow.

Behind 2048 entries in bf16 a layer of 32 heads takes 3.5 to 4 ms, six to twelve times what either way here takes:
`benchmarks/NOTES.md`.

B sequences, H query heads, G of them to a key-value head, L entries of the cache, d head size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .backend import is_numba_available, runs
from .sparsify import SURVIVORS

if is_numba_available():
    from .decode_numba import attend_by_heads


def is_slow(query: Tensor, keys: Tensor, mask: Tensor | None, implementation: str, more: dict) -> bool:
    """Whether `attend` takes what Transformers' function by that name would be given, and is faster.

    Not where there is `more` that changes the result, as the paged cache of continuous batching, and not if somebody
    put another function in that one's place.
    """
    return (
        query.shape[2] == 1
        and query.device.type == "cpu"
        and not (torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling())
        and (mask is None or mask.shape[1] == 1)
        and more.get("cache") is None
        and more.get("position_bias") is None
        and ALL_ATTENTION_FUNCTIONS.get(implementation) is sdpa_attention_forward
        and (query.shape[1] > keys.shape[1] or runs("numba", SURVIVORS, [query, keys]))
    )


def attend(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    """One token's attention over the entries of a cache, its own among them; `[B, 1, H, d]`.

    Args:
        query: `[B, H, 1, d]`.
        keys: `[B, H / G, L, d]`, as `values`.
        mask: `[B or 1, 1, 1, L or 1]`, bool, which entries count, or floats that are added to the scores; None for
            all. Where no entry counts there are zeros.
    """
    sequences, heads, _, d = query.shape
    kv_heads = keys.shape[1]
    if heads == kv_heads:
        return attend_by_heads(query, keys, values, mask, scaling)
    tokens = query.reshape(sequences, kv_heads, heads // kv_heads, d)  # the heads of a group pass for tokens
    y = F.scaled_dot_product_attention(tokens, keys, values, mask, scale=scaling)
    return y.reshape(sequences, 1, heads, d)
