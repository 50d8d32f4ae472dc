# SPDX-License-Identifier: Apache-2.0
"""Q-Sparse Llama."""

from transformers.models.llama.modeling_llama import LlamaAttention, LlamaForCausalLM, LlamaMLP, LlamaModel

from .configuration_qsparse import QSparseLlamaConfig
from .modeling_qsparse import QSparseAttention, QSparseForCausalLM, QSparseMLP, QSparseModel


class QSparseLlamaAttention(QSparseAttention, LlamaAttention):
    pass


class QSparseLlamaMLP(QSparseMLP, LlamaMLP):
    pass


class QSparseLlamaModel(QSparseModel, LlamaModel):
    config: QSparseLlamaConfig
    attention_class = QSparseLlamaAttention
    mlp_class = QSparseLlamaMLP


class QSparseLlamaForCausalLM(QSparseForCausalLM, LlamaForCausalLM):
    config: QSparseLlamaConfig
    base_class = QSparseLlamaModel
