"""What a prepared model overrides of Transformers' `generate`; the one place that knows its inner workings.

A model that is not prepared overrides nothing.
"""

import math
import threading
from functools import wraps

import torch
from transformers import Cache, GenerationMixin
from transformers.generation import GenerationMode
from transformers.masking_utils import create_masks_for_generate

from ..modeling.modeling_qsparse import QSparseForCausalLM
from .graph import Decoding, fits, has_graphs
from .transformers_names import CACHE


class _Call(threading.local):
    """What a thread's call of `generate` works with."""

    cache: Cache | None = None
    """The KV cache, which is offered to the next call."""
    decoding: Decoding | None = None


_call = _Call()


def _is_transformers(some_class: type) -> bool:
    return some_class.__module__.partition(".")[0] == "transformers"


class PreparedGeneration(QSparseForCausalLM):
    """A causal LM that decodes by replaying a graph, where there are graphs; mixed in before its class."""

    _spare_cache: Cache | None = None
    """The KV cache of the last call, with the graph that decodes over it: offered to the next call."""

    def __getstate__(self) -> dict:
        return {name: value for name, value in vars(self).items() if name != "_spare_cache"}

    @property
    def _steps_as_usual(self) -> bool:
        """Whether nobody else, a subclass or a prompt of PEFT's, has a say in what a step of `generate` is given."""
        classes = [each for each in type(self).__mro__ if each is not PreparedGeneration]
        return not any(
            name in vars(self) or any(name in vars(each) and not _is_transformers(each) for each in classes)
            for name in ("prepare_inputs_for_generation", "_update_model_kwargs_for_generation")
        )

    @wraps(GenerationMixin.generate)
    def generate(self, *args, **kwargs):
        outer = _call.cache, _call.decoding
        _call.cache = _call.decoding = None
        try:
            return super().generate(*args, **kwargs)
        finally:
            if _call.cache is not None and self.is_prepared:
                self._spare_cache = _call.cache
            _call.cache, _call.decoding = outer

    def _prepare_cache_for_generation(
        self, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
    ) -> None:
        """As in Transformers; on a GPU a static cache is taken where any would do, the last call's if it fits."""
        ours = (
            self._steps_as_usual
            and has_graphs(self.device)
            and generation_mode in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
            and generation_config.cache_implementation in (None, "static")
            and generation_config.use_cache is not False
            and model_kwargs.get(CACHE) is None
            # The caller may go on with a cache that is returned.
            and not generation_config.return_dict_in_generate
            and not generation_config.is_assistant
            and not generation_config.prefill_chunk_size
            and not torch.is_autocast_enabled(self.device.type)
            # Phi-3's own `prepare_inputs_for_generation` drops a cache where it grows past this.
            and max_cache_length <= getattr(self.config, "original_max_position_embeddings", math.inf)
        )
        if not ours:
            return super()._prepare_cache_for_generation(
                generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
            )
        generation_config.cache_implementation = "static"
        sequences = batch_size * generation_config.num_return_sequences
        size = sequences, torch.is_inference_mode_enabled()
        spare = vars(self).pop("_spare_cache", None)  # nobody else's then
        if spare is not None and spare.size == size and spare.asked >= max_cache_length:
            spare.reset()
            model_kwargs[CACHE] = spare
        else:
            super()._prepare_cache_for_generation(
                generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
            )
            spare = model_kwargs[CACHE]
            spare.size, spare.asked = size, max_cache_length
        _call.cache = spare

    def create_masks_for_generate(self, config, inputs_embeds, attention_mask, **kwargs):
        """As in Transformers, but for a step that runs as a graph, which has its mask inside."""
        if self._steps_as_usual and fits(self, kwargs[CACHE], inputs_embeds.shape[1]):
            return attention_mask
        usual = getattr(super(), "create_masks_for_generate", create_masks_for_generate)
        return usual(config=config, inputs_embeds=inputs_embeds, attention_mask=attention_mask, **kwargs)

    def get_compiled_call(self, compile_config):
        """What `generate` decodes with over a static cache: the model's own graph."""
        compiled = super().get_compiled_call(compile_config)
        if not self._steps_as_usual:
            return compiled
        _call.decoding = Decoding(self, compiled)
        return _call.decoding

    @wraps(GenerationMixin.prepare_inputs_for_generation)  # whose signature is looked into
    def prepare_inputs_for_generation(self, input_ids, *args, **kwargs):
        """As in Transformers; where a graph decodes, the host has little else to do, and the device waits for it."""
        decoding, cache = _call.decoding, kwargs.get(CACHE)
        if kwargs.get("next_sequence_length") == 1 and decoding is not None and decoding.goes_on(input_ids, cache):
            return {"input_ids": input_ids[:, -1:], CACHE: cache}
        return super().prepare_inputs_for_generation(input_ids, *args, **kwargs)
