# SPDX-License-Identifier: Apache-2.0
"""Q-Sparse Mistral."""

from transformers.models.mistral.modeling_mistral import MistralAttention, MistralForCausalLM, MistralMLP, MistralModel

from .configuration_qsparse import QSparseMistralConfig
from .modeling_qsparse import QSparseAttention, QSparseForCausalLM, QSparseMLP, QSparseModel


class QSparseMistralAttention(QSparseAttention, MistralAttention):
    def window(self) -> int | None:  # diff with Llama: every layer has the config's window
        return self.config.sliding_window


class QSparseMistralMLP(QSparseMLP, MistralMLP):
    pass


class QSparseMistralModel(QSparseModel, MistralModel):
    config: QSparseMistralConfig
    attention_class = QSparseMistralAttention
    mlp_class = QSparseMistralMLP


class QSparseMistralForCausalLM(QSparseForCausalLM, MistralForCausalLM):
    config: QSparseMistralConfig
    base_class = QSparseMistralModel
