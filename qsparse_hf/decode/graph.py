"""A decode step as one CUDA graph: a model's forward for one token a sequence over a static cache, replayed.

A step is some three hundred short kernels; launched one by one they cost many times what they compute. PyTorch compiles
a step into a graph too (and Transformers' `generate` asks for that), after half a minute of compiling; this one is
captured from the prepared model as it is.
"""

import logging
from collections.abc import Callable
from weakref import ref

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin, StaticLayer, StaticSlidingWindowLayer
from transformers.modeling_outputs import CausalLMOutputWithPast, ModelOutput
from transformers.utils import is_triton_available

from ..modeling.backend import runs, say_once
from ..modeling.sparsify import SURVIVORS, Sparsify
from .attention import STEP_IMPLS
from .transformers_names import CACHE


def _has_room(layer: CacheLayerMixin) -> bool:
    """Whether the next entry goes where the last one ended: not in a window that is full and moves."""
    if type(layer) is StaticSlidingWindowLayer:
        return layer.is_initialized and layer.cumulative_length_int < layer.max_cache_len
    return type(layer) is StaticLayer and layer.is_initialized


def has_graphs(device: torch.device) -> bool:
    return device.type == "cuda" and is_triton_available()


def _rope_types(config: PreTrainedConfig) -> set[str]:
    """Of all layers: a family may have a rotary embedding for each layer type."""
    parameters = getattr(config, "rope_parameters", None) or {}
    each = [parameters] if "rope_type" in parameters else parameters.values()
    return {of_layers["rope_type"] for of_layers in each if of_layers}


def obstacle(model: nn.Module, cache: object) -> str | None:
    """Why a forward over one token a sequence and this cache cannot be such a step, or None if it can."""
    config, head_size = model.config, model.base_model.layers[0].self_attn.head_dim
    weight = model.base_model.layers[0].mlp.down_proj.weight
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


def fits(model: nn.Module, cache: object, length: int) -> bool:
    """Whether a forward over `length` tokens a sequence and this cache can be such a step; if not, why is logged."""
    if length != 1 or not has_graphs(model.device):
        return False
    if reason := obstacle(model, cache):
        say_once(logging.INFO, f"a step is decoded without a graph of this package: {reason}")
    return reason is None


class DecodeGraph:
    """A model's decode step over one cache, to which it belongs.

    Its inputs are copied to where the graph reads them; its logits are overwritten by the next step.
    """

    def __init__(self, model: nn.Module, cache: Cache, sequences: int) -> None:
        device = model.device
        self.model = ref(model)
        self.cache = ref(cache)
        self.entries = max(layer.max_cache_len for layer in cache.layers)
        self.tokens = torch.zeros(sequences, 1, dtype=torch.long, device=device)
        self.positions = torch.zeros_like(self.tokens)
        self.mask = torch.ones(sequences, 1, 1, self.entries, dtype=torch.bool, device=device)
        self.keys = cache.layers[-1].keys
        self.lengths = [layer.cumulative_length for layer in cache.layers]
        self.windows = [layer for layer in cache.layers if type(layer) is StaticSlidingWindowLayer]
        heads = model.config.num_attention_heads
        self.arrived = torch.zeros(sequences * heads, dtype=torch.int32, device=device)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.captured: object = None

    def __reduce__(self):
        return type(None), ()  # a copy of a cache, or one from a file, has none

    def _inside(self) -> tuple:
        """What a graph was captured with, and cannot notice the change of."""
        model = self.model()
        places = tuple(parameter.data_ptr() for parameter in model.parameters())
        return places, tuple(module.selection for module in model.modules() if isinstance(module, Sparsify))

    @property
    def moved(self) -> bool:
        """Whether the cache's tensors are no longer those of the graph, as beam search replaces them in every step."""
        return self.cache().layers[-1].keys is not self.keys

    def serves(self, sequences: int) -> bool:
        """Whether a step of the cache for that many sequences is this one."""
        same = sequences == self.tokens.shape[0] and not self.moved
        return same and all(_has_room(layer) for layer in self.windows)

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cos: Tensor,
        sin: Tensor,
        layer: StaticLayer,
        mask: Tensor,
        scaling: float,
    ) -> Tensor:
        """What an attention module does between its projections."""
        entries = layer.keys, layer.values, self.lengths[0]
        return STEP_IMPLS["triton"].attend(query, key, value, cos, sin, *entries, mask, scaling, self.arrived)

    def _step(self) -> Tensor:
        outputs = self.model()(
            self.tokens,
            position_ids=self.positions,
            attention_mask=self.mask,
            use_cache=True,
            decode_step=self,
            **{CACHE: self.cache()},
        )
        torch._foreach_add_([*self.lengths, self.positions], 1)
        return outputs.logits

    def _capture(self) -> None:
        # Kernels are compiled and libraries make their plans in a step that is then taken back.
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
        """Take over behind a prefill: where the next token stands, and which entries of the cache count."""
        if self.captured != self._inside():
            self.graph = None
        self.positions.copy_(self.lengths[0] if position_ids is None else position_ids)
        self.mask.fill_(True)
        self.filled = int(self.lengths[0])  # waits for the prefill
        if attention_mask is not None:
            self.mask[:, 0, 0, : attention_mask.shape[1]].copy_(attention_mask)

    @torch.no_grad()
    def __call__(self, input_ids: Tensor) -> CausalLMOutputWithPast:
        """The step after that for the last token.

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
        return CausalLMOutputWithPast(logits=self.logits, **{CACHE: self.cache()})


class Decoding:
    """What one call of `generate` decodes with: the graph's step where it fits, else the forward that was given."""

    def __init__(self, model: nn.Module, forward: Callable) -> None:
        self.model = model
        self.forward = forward
        self.graph: DecodeGraph | None = None

    def goes_on(self, input_ids: Tensor, cache: object) -> bool:
        """Whether the graph takes the next step too: it knows all but the token."""
        graph = self.graph
        if graph is None or cache is None or graph.cache() is not cache or not self.model.is_prepared:
            return False
        return graph.serves(len(input_ids))

    def __call__(self, input_ids: Tensor, **inputs) -> ModelOutput:
        cache = inputs.get(CACHE)  # none where a family begins a new one
        if self.goes_on(input_ids, cache):
            return self.graph(input_ids)
        if inputs.get("output_attentions") or inputs.get("output_hidden_states"):
            return self.model(input_ids=input_ids, **inputs)
        if not fits(self.model, cache, input_ids.shape[1]):
            return self.forward(input_ids=input_ids, **inputs)
        graph = getattr(cache, "decode_graph", None)
        if graph is not None and graph.moved:
            return self.model(input_ids=input_ids, **inputs)
        if graph is None or graph.model() is not self.model or not graph.serves(len(input_ids)):
            graph = cache.decode_graph = DecodeGraph(self.model, cache, len(input_ids))
        self.graph = graph
        graph.start(inputs.get("position_ids"), inputs.get("attention_mask"))
        return graph(input_ids)
