# SPDX-License-Identifier: Apache-2.0
"""Q-Sparse Gemma 3 (text). Scaled embeddings, layer types and the cap on the logits come with the dense modules."""

from transformers.models.gemma3.modeling_gemma3 import Gemma3Attention, Gemma3ForCausalLM, Gemma3MLP, Gemma3TextModel

from .configuration_qsparse import QSparseGemma3Config
from .modeling_qsparse import QSparseAttention, QSparseForCausalLM, QSparseMLP, QSparseModel
from .sparsify import RMSNormSparsify


class QSparseGemma3Attention(QSparseAttention, Gemma3Attention):
    qk_norm = True


class QSparseGemma3MLP(QSparseMLP, Gemma3MLP):
    pass


class Gemma3RMSNormSparsify(RMSNormSparsify):
    unit_offset = True
    eps: float

    def epsilon(self) -> float:
        return self.eps


class QSparseGemma3Model(QSparseModel, Gemma3TextModel):
    config: QSparseGemma3Config
    attention_class = QSparseGemma3Attention
    mlp_class = QSparseGemma3MLP
    norm_class = Gemma3RMSNormSparsify


class QSparseGemma3ForCausalLM(QSparseForCausalLM, Gemma3ForCausalLM):
    config: QSparseGemma3Config
    base_class = QSparseGemma3Model
