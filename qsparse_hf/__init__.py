"""Q-Sparse for Transformers: large language models that run on a fraction of their activations."""

from importlib import import_module

from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .modeling.configuration_qsparse import QSparseLlamaConfig, QSparseMistralConfig, QSparseQwen2Config
from .modeling.modeling_qsparse_llama import QSparseLlamaForCausalLM, QSparseLlamaModel
from .modeling.modeling_qsparse_mistral import QSparseMistralForCausalLM, QSparseMistralModel
from .modeling.modeling_qsparse_qwen2 import QSparseQwen2ForCausalLM, QSparseQwen2Model
from .modeling.sparsify import glu_sparsify, rms_norm_sparsify, topk_sparsify

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
    "glu_sparsify",
    "rms_norm_sparsify",
    "topk_sparsify",
]

# Imported on first use: they bring the Trainer, which decoding does not need.
_LAZY = {
    "QSparseTrainer": ".training",
    "QSparseTrainingArguments": ".training",
    "convert_checkpoint": ".conversion",
    "sparsity_report": ".report",
}
__all__ += _LAZY


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LAZY[name], __name__), name)


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
    # PEFT finds a model's default LoRA targets in this table.
    TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING[model_type] = ["q_proj", "v_proj"]
