"""Knowledge distillation from a dense model."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, PreTrainedModel

from ..errors import UserError, user_errors

_CHUNK = 1024  # tokens whose distributions are in memory at a time, without a compiler


def load_teacher(source: str, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """The model to learn from, whole in every process and without gradients.

    Args:
        source: its checkpoint, a folder or Hub id.
        dtype: to compute in.
        device: to compute on.

    Raises:
        UserError: there is no causal language model there, or weights of it are missing or of another shape.
    """
    with user_errors(f"distill_from: {source}"):
        found: Any = AutoModelForCausalLM.from_pretrained(
            source, dtype=dtype, use_safetensors=True, output_loading_info=True, ignore_mismatched_sizes=True
        )
    teacher, loaded = found  # two with output_loading_info
    for name, theirs, ours in sorted(loaded["mismatched_keys"]):
        raise UserError(f"distill_from: {source} holds {name} as {[*theirs]}, where its config.json says {[*ours]}")
    if missing := sorted(loaded["missing_keys"]):
        raise UserError(f"distill_from: {source} lacks {len(missing):,} tensor(s), {missing[0]} for one")
    return teacher.to(device).eval().requires_grad_(False)


def require_same_vocabulary(teacher: PreTrainedModel, model: PreTrainedModel) -> None:
    """Distributions can be compared over the same tokens alone.

    Raises:
        UserError: the vocabularies differ in size.
    """
    theirs, ours = (m.config.get_text_config().vocab_size for m in (teacher, model))
    if theirs != ours:
        raise UserError(f"distill_from: {teacher.name_or_path} has a vocabulary of {theirs}, the model one of {ours}")


def forward_kl(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, compile_with: str | None = None
) -> Tensor:
    """Sum over the predicted tokens of `KL(teacher || student)`, in nats.

    Both models' distributions are computed in fp32. Without a compiler they exist for a chunk of tokens at a time, and
    are computed again in the backward pass; a compiler never writes them down, and reads the logits a few times only.

    Args:
        student_logits: `[B, T, V]`, any float dtype.
        teacher_logits: `[B, T, V]`, any float dtype; gets no gradient.
        labels: `[B, T]`, as for the loss: position t's logits predict label t + 1, and -100 is left out.
        compile_with: backend of `torch.compile`, `inductor` for instance.

    Returns:
        A scalar in fp32.
    """
    left_out = F.pad(labels[:, 1:], (0, 1), value=-100) == -100
    tokens = student_logits.flatten(0, -2), teacher_logits.flatten(0, -2), left_out.flatten()[:, None]  # views
    if compile_with:
        return _compiled(compile_with)(*tokens)
    total = student_logits.new_zeros((), dtype=torch.float32)
    for chunk in zip(*(part.split(_CHUNK) for part in tokens), strict=True):
        total = total + checkpoint(_divergence, *chunk, use_reentrant=False)
    return total


@cache
def _compiled(backend: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    return torch.compile(_divergence, backend=backend)


def _divergence(student: Tensor, teacher: Tensor, left_out: Tensor) -> Tensor:
    # Equal logits, and finite ones whatever padding gives, diverge by 0 and have no gradient.
    log_p, log_q = (F.log_softmax(logits.masked_fill(left_out, 0).float(), dim=-1) for logits in (teacher, student))
    return F.kl_div(log_q, log_p, reduction="sum", log_target=True)
