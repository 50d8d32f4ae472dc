"""What Transformers calls things, where its versions differ."""

from inspect import signature

from transformers import GenerationMixin

CACHE = "cache" if "cache" in signature(GenerationMixin.prepare_inputs_for_generation).parameters else "past_key_values"
"""The KV cache among the arguments and outputs of a model and of `generate`: `cache` since Transformers 5.24."""
