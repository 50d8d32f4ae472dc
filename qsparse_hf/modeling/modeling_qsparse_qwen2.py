# SPDX-License-Identifier: Apache-2.0
"""Q-Sparse Qwen2. The biases of q, k, v and the windows of single layers come with the dense modules."""

from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention, Qwen2ForCausalLM, Qwen2MLP, Qwen2Model

from .configuration_qsparse import QSparseQwen2Config
from .modeling_qsparse import QSparseAttention, QSparseForCausalLM, QSparseMLP, QSparseModel


class QSparseQwen2Attention(QSparseAttention, Qwen2Attention):
    pass


class QSparseQwen2MLP(QSparseMLP, Qwen2MLP):
    pass


class QSparseQwen2Model(QSparseModel, Qwen2Model):
    config: QSparseQwen2Config
    attention_class = QSparseQwen2Attention
    mlp_class = QSparseQwen2MLP


class QSparseQwen2ForCausalLM(QSparseForCausalLM, Qwen2ForCausalLM):
    config: QSparseQwen2Config
    base_class = QSparseQwen2Model
