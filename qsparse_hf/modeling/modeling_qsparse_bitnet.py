# SPDX-License-Identifier: Apache-2.0
"""Q-Sparse BitNet: squared ReLU, and norms before o and down too, which do the selecting there.

They stand where BitNet b1.58 2B4T has them; the first BitNet b1.58 has one inside each projection instead.
"""

from torch import Tensor
from transformers.models.bitnet.modeling_bitnet import BitNetAttention, BitNetForCausalLM, BitNetMLP, BitNetModel

from .configuration_qsparse import QSparseBitNetConfig
from .modeling_qsparse import QSparseAttention, QSparseForCausalLM, QSparseMLP, QSparseModel
from .sparsify import RMSNormSparsify, Survivors


class QSparseBitNetAttention(QSparseAttention, BitNetAttention):
    attn_sub_norm: RMSNormSparsify  # type: ignore[assignment]

    @property
    def o_sparsify(self) -> RMSNormSparsify:  # type: ignore[override]  # diff with Llama: a norm selects
        return self.attn_sub_norm


class QSparseBitNetMLP(QSparseMLP, BitNetMLP):
    ffn_sub_norm: RMSNormSparsify  # type: ignore[assignment]

    def hidden(self, x: Tensor | Survivors) -> Tensor | Survivors:  # diff with Llama: a norm selects
        gate, up = self.read(x)
        return self.ffn_sub_norm(self.activation()(gate) * up)


class QSparseBitNetModel(QSparseModel, BitNetModel):
    config: QSparseBitNetConfig
    attention_class = QSparseBitNetAttention
    mlp_class = QSparseBitNetMLP


class QSparseBitNetForCausalLM(QSparseForCausalLM, BitNetForCausalLM):
    config: QSparseBitNetConfig
    base_class = QSparseBitNetModel
