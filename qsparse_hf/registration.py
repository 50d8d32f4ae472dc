"""One table of the families: what a dense model type becomes, and all that other libraries look up by model type."""

from typing import NamedTuple

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from .modeling.configuration_qsparse import (
    ProjectionGroup,
    QSparseBitNetConfig,
    QSparseConfigMixin,
    QSparseGemma3Config,
    QSparseLlamaConfig,
    QSparseMistralConfig,
    QSparsePhi3Config,
    QSparseQwen2Config,
    QSparseQwen3Config,
)
from .modeling.modeling_qsparse_bitnet import QSparseBitNetForCausalLM, QSparseBitNetModel
from .modeling.modeling_qsparse_gemma3 import QSparseGemma3ForCausalLM, QSparseGemma3Model
from .modeling.modeling_qsparse_llama import QSparseLlamaForCausalLM, QSparseLlamaModel
from .modeling.modeling_qsparse_mistral import QSparseMistralForCausalLM, QSparseMistralModel
from .modeling.modeling_qsparse_phi3 import QSparsePhi3ForCausalLM, QSparsePhi3Model
from .modeling.modeling_qsparse_qwen2 import QSparseQwen2ForCausalLM, QSparseQwen2Model
from .modeling.modeling_qsparse_qwen3 import QSparseQwen3ForCausalLM, QSparseQwen3Model


class Family(NamedTuple):
    """The Q-Sparse twin of a dense family."""

    config: type[QSparseConfigMixin]
    model: type[PreTrainedModel]
    causal_lm: type[PreTrainedModel]


FAMILIES = {
    "llama": Family(QSparseLlamaConfig, QSparseLlamaModel, QSparseLlamaForCausalLM),
    "mistral": Family(QSparseMistralConfig, QSparseMistralModel, QSparseMistralForCausalLM),
    "qwen2": Family(QSparseQwen2Config, QSparseQwen2Model, QSparseQwen2ForCausalLM),
    "qwen3": Family(QSparseQwen3Config, QSparseQwen3Model, QSparseQwen3ForCausalLM),
    "phi3": Family(QSparsePhi3Config, QSparsePhi3Model, QSparsePhi3ForCausalLM),
    "gemma3_text": Family(QSparseGemma3Config, QSparseGemma3Model, QSparseGemma3ForCausalLM),
    "bitnet": Family(QSparseBitNetConfig, QSparseBitNetModel, QSparseBitNetForCausalLM),
}
"""By the `model_type` of the dense model."""


def register() -> None:
    """Make every family known to the Auto classes and, where PEFT is installed, to its methods."""
    for dense_type, (config_class, model_class, causal_lm_class) in FAMILIES.items():
        AutoConfig.register(config_class.model_type, config_class)
        AutoModel.register(config_class, model_class)
        AutoModelForCausalLM.register(config_class, causal_lm_class)
        # What is saved carries the code that defines it, so that it loads where this package is not installed.
        config_class.register_for_auto_class()
        model_class.register_for_auto_class("AutoModel")
        causal_lm_class.register_for_auto_class("AutoModelForCausalLM")
        _register_adapter_targets(dense_type, config_class.model_type)


def _register_adapter_targets(dense_type: str, model_type: str) -> None:
    """Each method of PEFT has a table of the modules that it adapts unasked: the dense family's serve ours."""
    try:
        from peft.utils import constants
    except ImportError:
        return
    for name, table in vars(constants).items():
        if name.startswith("TRANSFORMERS_MODELS_TO_") and name.endswith("_MODULES_MAPPING") and dense_type in table:
            table[model_type] = table[dense_type]


def projection_groups_of(config: PreTrainedConfig) -> dict[str, ProjectionGroup]:
    """The projection groups of a model, Q-Sparse or dense, by name; none of a family that is not in `FAMILIES`."""
    family = FAMILIES.get(config.model_type.removeprefix("qsparse_"))
    return {} if family is None else family.config.projection_groups
