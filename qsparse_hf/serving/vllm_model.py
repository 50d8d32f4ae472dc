"""Q-Sparse models in vLLM's Transformers backend, which runs our own forward around vLLM's attention and linears.

Written for vLLM 0.32. Imported by vLLM alone, where it loads a model.

T tokens, H query heads, G key-value heads, d head size.
"""

from torch import Tensor
from vllm.config import VllmConfig
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_gather,
)
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.transformers import TransformersForCausalLM
from vllm.model_executor.models.utils import PPMissingLayer


class HeadParallelAttention(Attention):
    """Attention of this rank's heads, told all of them and returning all: a top-K ranks whole tokens.

    vLLM's own expects and returns this rank's heads alone.
    """

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:  # [T, H * d], [T, G * d] twice; [T, H * d]
        rank, ranks = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
        query = query.narrow(-1, rank * self.num_heads * self.head_size, self.num_heads * self.head_size)
        heads = key.shape[-1] // self.head_size
        first = rank * heads // ranks  # with fewer heads than ranks, several ranks have the same one
        key, value = (
            each.narrow(-1, first * self.head_size, self.num_kv_heads * self.head_size) for each in (key, value)
        )
        output = super().forward(query.contiguous(), key.contiguous(), value.contiguous())
        return tensor_model_parallel_all_gather(output)


class QSparseForVLLM(TransformersForCausalLM):
    """vLLM's wrapper of a Transformers model, for tensor parallelism too, and sure that the model is still sparse.

    Raises:
        ValueError: the heads do not divide among the ranks, or this vLLM has replaced a module that selects.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        for number, layer in enumerate(self.model.layers):
            if isinstance(layer, PPMissingLayer):
                continue
            for group in self.config.projection_groups.values():
                if not hasattr(layer.get_submodule(group.selector), "selection"):
                    raise ValueError(f"this vLLM replaces {group.selector} of layer {number}, and with it its top-K")

    def _get_attn_cls(self) -> type:
        ranks = get_tensor_model_parallel_world_size()
        if ranks == 1:
            return super()._get_attn_cls()
        heads, kv_heads = self.config.num_attention_heads, self.config.num_key_value_heads
        if heads % ranks or (kv_heads % ranks and ranks % kv_heads):
            raise ValueError(
                f"tensor_parallel_size must divide {heads} query heads, and divide or be a multiple of {kv_heads} "
                f"key-value heads, got {ranks}"
            )
        return HeadParallelAttention
