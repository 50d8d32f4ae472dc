# SPDX-License-Identifier: Apache-2.0
"""Q-Sparse Qwen3. The windows of single layers come with the dense modules."""

from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, Qwen3ForCausalLM, Qwen3MLP, Qwen3Model

from .configuration_qsparse import QSparseQwen3Config
from .modeling_qsparse import QSparseAttention, QSparseForCausalLM, QSparseMLP, QSparseModel


class QSparseQwen3Attention(QSparseAttention, Qwen3Attention):
    qk_norm = True  # diff with Qwen2


class QSparseQwen3MLP(QSparseMLP, Qwen3MLP):
    pass


class QSparseQwen3Model(QSparseModel, Qwen3Model):
    config: QSparseQwen3Config
    attention_class = QSparseQwen3Attention
    mlp_class = QSparseQwen3MLP


class QSparseQwen3ForCausalLM(QSparseForCausalLM, Qwen3ForCausalLM):
    config: QSparseQwen3Config
    base_class = QSparseQwen3Model
