# SPDX-License-Identifier: Apache-2.0
"""Q-Sparse Phi-3. The dropout of the residual sums comes with the dense modules."""

from torch import Tensor, nn
from transformers.models.phi3 import modeling_phi3 as phi3

from .configuration_qsparse import QSparsePhi3Config
from .modeling_qsparse import QSparseAttention, QSparseForCausalLM, QSparseMLP, QSparseModel
from .sparsify import Survivors


class QSparsePhi3Attention(QSparseAttention, phi3.Phi3Attention):
    rotate = staticmethod(phi3.apply_rotary_pos_emb)  # diff with Llama: of a part of each head, perhaps

    def window(self) -> int | None:  # diff with Llama: every layer has the config's window
        return self.config.sliding_window

    def read(self, x: Tensor | Survivors) -> tuple[Tensor, ...]:  # diff with Llama: one linear
        heads = self.config.num_attention_heads, *2 * [self.config.num_key_value_heads]
        return self.project(x, self.qkv_proj)[0].split([count * self.head_dim for count in heads], dim=-1)


class QSparsePhi3MLP(QSparseMLP, phi3.Phi3MLP):
    def activation(self) -> nn.Module:
        return self.activation_fn

    def read(self, x: Tensor | Survivors) -> tuple[Tensor, ...]:  # diff with Llama: one linear
        return self.project(x, self.gate_up_proj)[0].chunk(2, dim=-1)


class QSparsePhi3Model(QSparseModel, phi3.Phi3Model):
    config: QSparsePhi3Config
    attention_class = QSparsePhi3Attention
    mlp_class = QSparsePhi3MLP


class QSparsePhi3ForCausalLM(QSparseForCausalLM, phi3.Phi3ForCausalLM):
    config: QSparsePhi3Config
    base_class = QSparsePhi3Model
