"""Every override of Transformers' `GenerationMixin`. A prepared model has them; other models override nothing.

No other file depends on the internals of `generate`, so that a new Transformers asks for changes here alone.
"""

import math
import threading
from functools import wraps
from typing import Any

import torch
from transformers import Cache, GenerationMixin
from transformers.generation import GenerationMode
from transformers.masking_utils import create_masks_for_generate

from ..modeling.modeling_qsparse import QSparseForCausalLM
from .graph import DecodeCall, fits, has_graphs
from .transformers_names import CACHE


class _ThreadState(threading.local):
    """State of the running call of `generate`, one per thread."""

    cache: Cache | None = None
    """The KV cache; offered to the next call of `generate` afterwards."""
    decoding: DecodeCall | None = None


_state = _ThreadState()


def _is_transformers(some_class: type) -> bool:
    return some_class.__module__.partition(".")[0] == "transformers"


# Transformers annotates `self` of these methods as a protocol that its own models do not meet, and their other
# arguments as one of the versions has them: what is ignored below.
class PreparedGeneration(QSparseForCausalLM):
    """A causal LM whose decode steps replay a CUDA graph where they can; mixed in before the model's own class."""

    _spare_cache: Cache | None = None
    """KV cache offered to the next call of `generate`, with the CUDA graph that was captured over it."""

    def __getstate__(self) -> dict:
        return {name: value for name, value in vars(self).items() if name != "_spare_cache"}

    @property
    def _steps_as_usual(self) -> bool:
        """Whether the inputs of a step are Transformers' own: no subclass and no PEFT prompt method changes them."""
        classes = [each for each in type(self).__mro__ if each is not PreparedGeneration]
        return not any(
            name in vars(self) or any(name in vars(each) and not _is_transformers(each) for each in classes)
            for name in ("prepare_inputs_for_generation", "_update_model_kwargs_for_generation")
        )

    @wraps(GenerationMixin.generate)
    def generate(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        outer = _state.cache, _state.decoding
        _state.cache = _state.decoding = None
        try:
            return super().generate(*args, **kwargs)  # type: ignore[misc]
        finally:
            if _state.cache is not None and self.is_prepared:
                self._spare_cache = _state.cache
            _state.cache, _state.decoding = outer

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, generation_mode, *sizes):
        """As in Transformers, but on a GPU a static cache unless another is asked for; the last call's if it fits."""
        batch_size, max_cache_length = sizes
        ours = (
            self._steps_as_usual
            and has_graphs(self.device)
            and generation_mode in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
            and generation_config.cache_implementation in (None, "static")
            and generation_config.use_cache is not False
            and model_kwargs.get(CACHE) is None
            # A returned cache belongs to the caller, who may continue with it.
            and not generation_config.return_dict_in_generate
            and not generation_config.is_assistant
            and not generation_config.prefill_chunk_size
            and not torch.is_autocast_enabled(self.device.type)
            # Phi-3's own `prepare_inputs_for_generation` drops a cache where it grows past this.
            and max_cache_length <= getattr(self.config, "original_max_position_embeddings", math.inf)
        )
        usual: Any = super()._prepare_cache_for_generation  # type: ignore[misc]
        if not ours:
            return usual(generation_config, model_kwargs, generation_mode, *sizes)
        generation_config.cache_implementation = "static"
        sequences = batch_size * generation_config.num_return_sequences
        size = sequences, torch.is_inference_mode_enabled()
        spare = vars(self).pop("_spare_cache", None)  # removed, so that no other call takes it meanwhile
        if spare is not None and spare.size == size and spare.asked >= max_cache_length:
            spare.reset()
            model_kwargs[CACHE] = spare
        else:
            usual(generation_config, model_kwargs, generation_mode, *sizes)
            spare = model_kwargs[CACHE]
            spare.size, spare.asked = size, max_cache_length
        _state.cache = spare

    def create_masks_for_generate(self, config, inputs_embeds, attention_mask, **kwargs):
        """As in Transformers; for a step that runs as a graph, which builds its own mask, the 2D mask is passed on."""
        if self._steps_as_usual and fits(self, kwargs[CACHE], inputs_embeds.shape[1]):
            return attention_mask
        usual = getattr(super(), "create_masks_for_generate", create_masks_for_generate)
        return usual(config=config, inputs_embeds=inputs_embeds, attention_mask=attention_mask, **kwargs)

    def get_compiled_call(self, compile_config):
        """Where Transformers would decode with a compiled forward, decode with this package's graph."""
        compiled = super().get_compiled_call(compile_config)
        if not self._steps_as_usual:
            return compiled
        _state.decoding = DecodeCall(self, compiled)
        return _state.decoding

    @wraps(GenerationMixin.prepare_inputs_for_generation)  # Transformers inspects the signature
    def prepare_inputs_for_generation(self, input_ids: Any, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """As in Transformers; where a graph decodes, only what it reads, as the GPU waits for the host meanwhile."""
        decoding, cache = _state.decoding, kwargs.get(CACHE)
        if kwargs.get("next_sequence_length") == 1 and decoding is not None and decoding.goes_on(input_ids, cache):
            return {"input_ids": input_ids[:, -1:], CACHE: cache}
        return super().prepare_inputs_for_generation(input_ids, *args, **kwargs)  # type: ignore[misc]
