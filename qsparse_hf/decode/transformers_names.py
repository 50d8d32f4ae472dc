"""Names that differ between versions of Transformers."""

from inspect import signature

from transformers import GenerationMixin

CACHE = "cache" if "cache" in signature(GenerationMixin.prepare_inputs_for_generation).parameters else "past_key_values"
"""Name of the KV cache in forward, its output and `generate`: since Transformers 5.24 `cache`."""
