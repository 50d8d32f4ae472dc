"""A decode step as one CUDA graph: a model's forward for one token a sequence over a static cache, replayed.

A step is some three hundred short kernels, and launching them one by one takes many times as long as running them.
Transformers' `generate` has `torch.compile` build such a graph, which takes half a minute; this one is captured from
the prepared model without compiling it.
"""

import logging
from collections.abc import Callable
from typing import Any, cast
from weakref import ref

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, StaticLayer, StaticSlidingWindowLayer
from transformers.modeling_outputs import CausalLMOutputWithPast, ModelOutput
from transformers.utils import is_triton_available

from ..modeling.backend import runs, say_once
from ..modeling.sparsify import SURVIVORS, Sparsify
from .attention import STEP_IMPLS, StepCache
from .layout import copied_from
from .transformers_names import CACHE


def _has_room(layer: object) -> bool:
    """Whether the next entry is appended behind the last one. False for a sliding window that is full, which shifts."""
    if type(layer) is StaticSlidingWindowLayer:
        return bool(layer.is_initialized and layer.cumulative_length_int < layer.max_cache_len)
    return type(layer) is StaticLayer and bool(layer.is_initialized)


def has_graphs(device: torch.device) -> bool:
    return device.type == "cuda" and is_triton_available()


def _rope_types(config: PreTrainedConfig) -> set[str]:
    """Of all layers: a family may have a rotary embedding for each layer type."""
    parameters = getattr(config, "rope_parameters", None) or {}
    each = [parameters] if "rope_type" in parameters else parameters.values()
    return {of_layers["rope_type"] for of_layers in each if of_layers}


def why_no_graph(model: Any, cache: object) -> str | None:
    """Why a forward of one token a sequence over this cache cannot run as a CUDA graph, or None if it can."""
    config, head_size = model.config, model.base_model.layers[0].self_attn.head_dim
    weight = model.base_model.layers[0].input_layernorm.weight  # of the dtype of activations
    if not model.is_prepared:
        return "the model is not prepared, or not any more"
    if len(set(getattr(model, "hf_device_map", {}).values())) > 1:
        return "the model is on several devices"
    if config._attn_implementation not in ("sdpa", "eager"):
        return f"its attention is {config._attn_implementation!r}"
    if moving := _rope_types(config) & {"dynamic", "longrope"}:
        return f"its rotary embedding, {min(moving)!r}, looks at the length"
    if head_size & (head_size - 1):
        return f"its heads are of size {head_size}, no power of two"
    if not runs("triton", SURVIVORS, [weight]):
        return f"Triton's kernels do not run for {weight.dtype} on {weight.device}"
    if torch.is_autocast_enabled(model.device.type):
        return "autocast is on"
    if not isinstance(cache, Cache) or cache.offloading or not all(_has_room(layer) for layer in cache.layers):
        return "the cache is not static, is offloaded or has a window that moves"
    return None


def fits(model: Any, cache: object, length: int) -> bool:
    """Whether a forward of `length` tokens a sequence over this cache can run as a CUDA graph; if not, logs why."""
    if length != 1 or not has_graphs(model.device):
        return False
    if reason := why_no_graph(model, cache):
        say_once(logging.INFO, f"a step is decoded without a graph of this package: {reason}")
    return reason is None


class DecodeGraph:
    """A model's decode step over one cache, captured on its first call. The cache owns it, as `cache.decode_graph`.

    A graph reads its inputs from fixed addresses, so each step's inputs are copied there. The logits of a step are
    overwritten by the next one.
    """

    def __init__(self, model: Any, cache: Cache, sequences: int) -> None:
        device = model.device
        layers = cast("list[StaticLayer]", cache.layers)  # as `why_no_graph` has found
        self._model = ref(model)
        self._cache = ref(cache)
        self.entries = max(layer.max_cache_len for layer in layers)
        self.tokens = torch.zeros(sequences, 1, dtype=torch.long, device=device)
        self.positions = torch.zeros_like(self.tokens)
        self.mask = torch.ones(sequences, 1, 1, self.entries, dtype=torch.bool, device=device)
        self.keys = layers[-1].keys
        self.lengths = [layer.cumulative_length for layer in layers]
        self.windows = [layer for layer in layers if type(layer) is StaticSlidingWindowLayer]
        heads = model.config.num_attention_heads
        self.arrived = torch.zeros(sequences * heads, dtype=torch.int32, device=device)
        self.graph: Any = None  # a CUDA graph, once it is captured
        self.captured: object = None

    @property
    def model(self) -> Any:
        """The model, which outlives every step."""
        return self._model()

    @property
    def cache(self) -> Any:
        """The cache, which owns this."""
        return self._cache()

    def __reduce__(self) -> tuple:
        return type(None), ()  # None: a cache that is copied or pickled loses its graph

    def _inside(self) -> tuple:
        """What the graph has baked in, addresses of weights and selections: it is captured again when these change."""
        tensors = (*self.model.parameters(), *self.model.buffers())
        places = tuple(tensor.data_ptr() for tensor in tensors)
        copied = [each for each in map(copied_from, self.model.modules()) if each is not None]
        return (
            places,
            [each._version for each in copied],
            tuple(module.selection for module in self.model.modules() if isinstance(module, Sparsify)),
        )

    @property
    def moved(self) -> bool:
        """Whether the cache has other tensors than when the graph was made: beam search replaces them in every step."""
        return self.cache.layers[-1].keys is not self.keys

    def serves(self, sequences: int) -> bool:
        """Whether this graph can run the cache's next step, for that many sequences."""
        same = sequences == self.tokens.shape[0] and not self.moved
        return same and all(_has_room(layer) for layer in self.windows)

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        rotary: tuple[Tensor, Tensor],
        layer: StaticLayer,
        mask: Tensor | None,
        scaling: float,
    ) -> Tensor:
        """The attention of one layer between its projections; see `StepImplementation`."""
        keys, values = cast("tuple[Tensor, Tensor]", (layer.keys, layer.values))
        cache = StepCache(keys, values, self.lengths[0], mask, self.arrived)
        return STEP_IMPLS["triton"].attend(query, key, value, rotary, cache, scaling)

    def _step(self) -> Tensor:
        outputs = self.model(
            self.tokens,
            position_ids=self.positions,
            attention_mask=self.mask,
            use_cache=True,
            decode_step=self,
            **{CACHE: self.cache},
        )
        torch._foreach_add_([*self.lengths, self.positions], 1)
        return outputs.logits

    def _capture(self) -> None:
        # A first step outside the graph lets kernels compile and libraries choose their algorithms, which must not be
        # captured. Its effect on the cache is undone.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._step()
            torch._foreach_sub_([*self.lengths, self.positions], 1)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            self.logits = self._step()
        self.graph = graph

    def start(self, position_ids: Tensor | None, attention_mask: Tensor | None) -> None:
        """Begin behind a prefill: set the position of the next token, and which entries of the cache are attended."""
        if self.captured != self._inside():
            self.graph = None
        self.positions.copy_(self.lengths[0] if position_ids is None else position_ids)
        self.mask.fill_(True)
        self.filled = int(self.lengths[0])  # waits for the prefill
        if attention_mask is not None:
            self.mask[:, 0, 0, : attention_mask.shape[1]].copy_(attention_mask)

    @torch.no_grad()
    def __call__(self, input_ids: Tensor) -> CausalLMOutputWithPast:
        """The step for `input_ids [B, 1]`; logits `[B, 1, V]`, which the next step overwrites.

        Raises:
            ValueError: the cache is full.
        """
        self.filled += 1
        if self.filled > self.entries:
            raise ValueError(f"the static cache is full: it has {self.entries} entries, and this is one more")
        with torch.cuda.device_of(self.tokens):
            self.tokens.copy_(input_ids)
            if self.graph is None:
                self._capture()
                self.captured = self._inside()
            self.graph.replay()
        for layer in self.windows:
            layer.cumulative_length_int += 1
        outputs: dict[str, Any] = {"logits": self.logits, CACHE: self.cache}
        return CausalLMOutputWithPast(**outputs)


class DecodeCall:
    """The decode function of one call of `generate`: the graph where it fits, else the forward that was given."""

    def __init__(self, model: Any, forward: Callable[..., ModelOutput]) -> None:
        self.model = model
        self.forward = forward
        self.graph: DecodeGraph | None = None

    def goes_on(self, input_ids: Tensor, cache: object) -> bool:
        """Whether the graph runs the next step too, which then needs nothing but the token."""
        graph = self.graph
        if graph is None or cache is None or graph.cache is not cache or not self.model.is_prepared:
            return False
        return graph.serves(len(input_ids))

    def __call__(self, input_ids: Tensor, **inputs: Any) -> ModelOutput:
        cache: Any = inputs.get(CACHE)  # none where a family begins a new one
        if self.graph is not None and self.goes_on(input_ids, cache):
            return self.graph(input_ids)
        if inputs.get("output_attentions") or inputs.get("output_hidden_states"):
            return self.model(input_ids=input_ids, **inputs)
        if not fits(self.model, cache, input_ids.shape[1]):
            return self.forward(input_ids=input_ids, **inputs)
        graph = getattr(cache, "decode_graph", None)
        if graph is not None and graph.moved:
            return self.model(input_ids=input_ids, **inputs)
        if graph is None or graph.model is not self.model or not graph.serves(len(input_ids)):
            graph = cache.decode_graph = DecodeGraph(self.model, cache, len(input_ids))
        self.graph = graph
        graph.start(inputs.get("position_ids"), inputs.get("attention_mask"))
        return graph(input_ids)
