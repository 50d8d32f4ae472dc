"""The plugin by which vLLM knows the Q-Sparse families: the entry point `vllm.general_plugins` of this package."""

from ..modeling.sparsify import IMPLS
from ..registration import FAMILIES


def register() -> None:
    """Tell vLLM which of its model classes serves each family; vLLM calls it in every process that it starts.

    That this package is imported has by then told Transformers of the families, so that no remote code is needed.
    """
    from vllm import ModelRegistry

    for family in FAMILIES.values():
        ModelRegistry.register_model(family.causal_lm.__name__, f"{__name__}.vllm_model:QSparseForVLLM")
    IMPLS.pop("numba", None)  # its threads and vLLM's own on a CPU break each other; PyTorch's operators run instead
