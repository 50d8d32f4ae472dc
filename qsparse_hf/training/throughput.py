"""Tokens, tokens a second, and how much of the hardware's peak they use (model FLOP utilisation)."""

import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from ..errors import UserError

# Peak of dense bf16 matrix products in FLOP/s, from the vendors' data sheets, by words of the device's name. The first
# match counts; laptop variants are slower and not listed.
PEAK_FLOPS = {
    "B200": 2250e12,
    "GH200": 989.4e12,
    "H200 NVL": 835.5e12,
    "H200": 989.4e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835.5e12,
    "H100": 989.4e12,
    "H800": 989.4e12,
    "A100": 312e12,
    "A800": 312e12,
    "A40": 149.7e12,
    "A10G": 70e12,
    "A10": 125e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "RTX 6000 Ada": 364e12,
    "RTX 5090": 209.5e12,
    "RTX 4090": 165.2e12,
    "RTX 3090": 71e12,
    "MI355X": 2500e12,
    "MI325X": 1307e12,
    "MI300X": 1307e12,
    "MI250X": 383e12,
}


def peak_flops(device: torch.device) -> float | None:
    """The device's peak in FLOP/s for dense bf16 products; None where it is not in `PEAK_FLOPS`, as for every CPU."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    if "Laptop" in name:
        return None
    return next((peak for words, peak in PEAK_FLOPS.items() if re.search(rf"\b{words}\b", name)), None)


def main_input(inputs: Mapping[str, Tensor]) -> tuple[str, Tensor]:
    """What a batch gives the model to read: `input_ids` `[B, T]`, or `inputs_embeds` `[B, T, D]` in their place.

    Raises:
        UserError: the batch holds neither.
    """
    for name in ("input_ids", "inputs_embeds"):
        if inputs.get(name) is not None:
            return name, inputs[name]
    raise UserError(f"training rows must hold input_ids or inputs_embeds, got {', '.join(inputs) or 'none'}")


def count_tokens(inputs: Mapping[str, Tensor], padding: bool = True, pad_token_id: int | None = None) -> int | Tensor:
    """Tokens of a batch.

    Args:
        inputs: arguments of `model.forward`.
        padding: whether padding counts too. Without it, an `attention_mask` says what is padding, or else the token
            `pad_token_id`. Rows laid end to end, which bring `position_ids` and no mask, have no padding.
        pad_token_id: the tokenizer's.

    Returns:
        Their number; on the batch's device, as a scalar in int64, where it depends on the values in the batch.
    """
    name, read = main_input(inputs)
    if not padding and inputs.get("attention_mask") is not None:
        return inputs["attention_mask"].sum()
    if not padding and name == "input_ids" and pad_token_id is not None and inputs.get("position_ids") is None:
        return (read != pad_token_id).sum()
    return read.shape[:2].numel()


def training_flops_per_token(model: PreTrainedModel, sequence_length: int) -> float:
    """Floating-point operations of one token's forward and backward pass, as PaLM counts them (arXiv 2204.02311, B).

    Every weight of a matrix product takes 2 forward, 2 for the gradient of its input, and 2 for its own gradient if it
    is trained; attention takes `12 layers * heads * head size * sequence_length` on top, the causal mask not taken into
    account. Products are counted dense, which is what training computes; recomputation is not counted. Of experts,
    those that a token reaches count.

    Args:
        model: a causal LM of Transformers, with adapters or without; its parameters may lie on the meta device, but not
            be sharded.
        sequence_length: tokens that attend to each other; 0 leaves attention out.
    """
    config = model.config.get_text_config()
    experts = number_of_experts(config)
    reached = config.num_experts_per_tok / experts if experts else 1.0
    embedding = model.get_input_embeddings().weight
    tied = model.get_output_embeddings() is not None and model.get_output_embeddings().weight is embedding
    flops = attention_flops_per_token(config, sequence_length)
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2 or (parameter is embedding and not tied):
            continue
        share = reached if ".experts." in name else 1.0
        flops += (6 if parameter.requires_grad else 4) * parameter.numel() * share
    return flops


def number_of_experts(config: PreTrainedConfig) -> int:
    """Experts of a layer; 0 of a dense model."""
    return getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None) or 0


def attention_flops_per_token(config: PreTrainedConfig, sequence_length: float) -> float:
    """The part of `training_flops_per_token` that grows with the sequence."""
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 12.0 * config.num_hidden_layers * config.num_attention_heads * head_size * sequence_length


class Stopwatch:
    """Seconds and tokens of training alone, since the last `lap`.

    Attributes:
        tokens: add what has been trained on here.
    """

    def __init__(self) -> None:
        self.tokens = 0
        self._began = time.perf_counter()
        self._is_paused = False

    def lap(self) -> float:
        """Tokens a second since the last lap, pauses left out."""
        now = time.perf_counter()
        speed = self.tokens / (now - self._began)
        self.tokens, self._began = 0, now
        return speed

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Around what is not training: evaluation and saving; a pause within a pause counts once."""
        if self._is_paused:  # an evaluation of several texts is one of evaluations
            yield
            return
        began, self._is_paused = time.perf_counter(), True
        try:
            yield
        finally:
            self._is_paused = False
            self._began += time.perf_counter() - began
