"""Q-Sparse for Transformers: large language models that run on a fraction of their activations."""

from importlib import import_module
from typing import TYPE_CHECKING

from . import kernels as kernels  # they join the tables of implementations
from .decode.prepare import prepare, restore
from .modeling.configuration_qsparse import (
    QSparseBitNetConfig,
    QSparseGemma3Config,
    QSparseLlamaConfig,
    QSparseMistralConfig,
    QSparsePhi3Config,
    QSparseQwen2Config,
    QSparseQwen3Config,
)
from .modeling.modeling_qsparse import Preparation, QSparsePreTrainedModel
from .modeling.modeling_qsparse_bitnet import QSparseBitNetForCausalLM, QSparseBitNetModel
from .modeling.modeling_qsparse_gemma3 import QSparseGemma3ForCausalLM, QSparseGemma3Model
from .modeling.modeling_qsparse_llama import QSparseLlamaForCausalLM, QSparseLlamaModel
from .modeling.modeling_qsparse_mistral import QSparseMistralForCausalLM, QSparseMistralModel
from .modeling.modeling_qsparse_phi3 import QSparsePhi3ForCausalLM, QSparsePhi3Model
from .modeling.modeling_qsparse_qwen2 import QSparseQwen2ForCausalLM, QSparseQwen2Model
from .modeling.modeling_qsparse_qwen3 import QSparseQwen3ForCausalLM, QSparseQwen3Model
from .modeling.sparsify import glu_sparsify, rms_norm_sparsify, topk_sparsify
from .registration import register

if TYPE_CHECKING:
    from .conversion import convert_checkpoint
    from .evaluation import evaluate_perplexity
    from .report import sparsity_report
    from .training import QSparseTrainer, QSparseTrainingArguments

__version__ = "0.2.0"

__all__ = [
    "QSparseBitNetConfig",
    "QSparseBitNetForCausalLM",
    "QSparseBitNetModel",
    "QSparseGemma3Config",
    "QSparseGemma3ForCausalLM",
    "QSparseGemma3Model",
    "QSparseLlamaConfig",
    "QSparseLlamaForCausalLM",
    "QSparseLlamaModel",
    "QSparseMistralConfig",
    "QSparseMistralForCausalLM",
    "QSparseMistralModel",
    "QSparsePhi3Config",
    "QSparsePhi3ForCausalLM",
    "QSparsePhi3Model",
    "QSparseQwen2Config",
    "QSparseQwen2ForCausalLM",
    "QSparseQwen2Model",
    "QSparseQwen3Config",
    "QSparseQwen3ForCausalLM",
    "QSparseQwen3Model",
    "QSparseTrainer",
    "QSparseTrainingArguments",
    "convert_checkpoint",
    "evaluate_perplexity",
    "glu_sparsify",
    "rms_norm_sparsify",
    "sparsity_report",
    "topk_sparsify",
]

register()
QSparsePreTrainedModel.preparation = Preparation(prepare, restore)

# Imported on first use: they bring the Trainer, which decoding does not need.
_LAZY = {
    "QSparseTrainer": ".training",
    "QSparseTrainingArguments": ".training",
    "convert_checkpoint": ".conversion",
    "evaluate_perplexity": ".evaluation",
    "sparsity_report": ".report",
}


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LAZY[name], __name__), name)
