"""Q-Sparse for Transformers: large language models that run on a fraction of their activations."""

from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from .modeling.configuration_qsparse import QSparseLlamaConfig, QSparseMistralConfig, QSparseQwen2Config
from .modeling.modeling_qsparse_llama import QSparseLlamaForCausalLM, QSparseLlamaModel
from .modeling.modeling_qsparse_mistral import QSparseMistralForCausalLM, QSparseMistralModel
from .modeling.modeling_qsparse_qwen2 import QSparseQwen2ForCausalLM, QSparseQwen2Model
from .modeling.sparsify import topk_sparsify

__version__ = "0.1.0"

__all__ = [
    "QSparseLlamaConfig",
    "QSparseLlamaForCausalLM",
    "QSparseLlamaModel",
    "QSparseMistralConfig",
    "QSparseMistralForCausalLM",
    "QSparseMistralModel",
    "QSparseQwen2Config",
    "QSparseQwen2ForCausalLM",
    "QSparseQwen2Model",
    "topk_sparsify",
]

for config_class, model_class, causal_lm_class in (
    (QSparseLlamaConfig, QSparseLlamaModel, QSparseLlamaForCausalLM),
    (QSparseMistralConfig, QSparseMistralModel, QSparseMistralForCausalLM),
    (QSparseQwen2Config, QSparseQwen2Model, QSparseQwen2ForCausalLM),
):
    model_type = config_class.model_type
    AutoConfig.register(model_type, config_class)
    AutoModel.register(config_class, model_class)
    AutoModelForCausalLM.register(config_class, causal_lm_class)
    # What is saved carries the code that defines it, so that it loads where this package is not installed.
    config_class.register_for_auto_class()
    model_class.register_for_auto_class("AutoModel")
    causal_lm_class.register_for_auto_class("AutoModelForCausalLM")
    # Label smoothing and the text-generation pipeline know causal LMs by this table, PEFT its LoRA targets by that.
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type] = causal_lm_class.__name__
    TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING[model_type] = ["q_proj", "v_proj"]
