"""Knowledge distillation from the dense parent."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

_CHUNK = 1024  # tokens whose distributions are in memory at a time


def forward_kl(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> Tensor:
    """Sum over the predicted tokens of `KL(teacher || student)`, in nats.

    Both models' distributions are computed in fp32 and a chunk of tokens at a time, again in the backward pass.

    Args:
        student_logits: `[B, T, V]`, any float dtype.
        teacher_logits: `[B, T, V]`, any float dtype; gets no gradient.
        labels: `[B, T]`, as for the loss: position t's logits predict label t + 1, and -100 is left out.

    Returns:
        A scalar in fp32.
    """
    predicted = labels[:, 1:] != -100
    student, teacher = student_logits[:, :-1][predicted], teacher_logits[:, :-1][predicted]  # [tokens, V]
    total = student.new_zeros((), dtype=torch.float32)
    for ours, theirs in zip(student.split(_CHUNK), teacher.split(_CHUNK), strict=True):
        total = total + checkpoint(_chunk_kl, ours, theirs, use_reentrant=False)
    return total


def _chunk_kl(student: Tensor, teacher: Tensor) -> Tensor:
    log_p, log_q = F.log_softmax(teacher.float(), dim=-1), F.log_softmax(student.float(), dim=-1)
    return F.kl_div(log_q, log_p, reduction="sum", log_target=True)
