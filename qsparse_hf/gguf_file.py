"""A dense model in a GGUF file, as llama.cpp writes them: read, dequantised and described by Transformers.

Transformers reads a subset of what a GGUF file can say. What it would drop silently, and what would then be another
model, is refused here: scaled rotary embeddings (but for Llama 3's, which are recognised), and tensors without a place.
"""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from .checkpoint import HEADER_DTYPES, StoredTensor
from .errors import UserError, one_line, user_errors
from .registration import FAMILIES

logger = logging.getLogger(__name__)

_ROPE_FREQUENCIES = "rope_freqs.weight"  # what Llama 3's rotary frequencies are divided by
_PLAIN_SPLITS = ("default", "gpt-2", "gpt2")  # how a byte-level tokenizer splits text that nothing else is said of
_DTYPE_NAMES = {dtype: name for name, dtype in HEADER_DTYPES.items()}


@dataclass(frozen=True)
class LoadedTensor(StoredTensor):
    """A tensor that is in memory already."""

    tensor: torch.Tensor

    def load(self) -> torch.Tensor:
        return self.tensor


class GGUFFile:
    """A GGUF file, whose header is read when this is made.

    Attributes:
        path: the file.
        config: the dense model's configuration, with the dtype that its weights are dequantised to.
    """

    def __init__(self, path: Path, dtype: torch.dtype | None) -> None:
        """Read the header of the file at `path`.

        Args:
            dtype: of the dequantised weights; None for that of a file of floats, and bfloat16 for a quantised one.

        Raises:
            UserError: the package gguf is missing, the file is broken, or its model is none that can be converted.
        """
        try:
            from gguf import GGUFReader
        except ImportError:
            raise UserError(
                f"{path}: GGUF files are read with the package gguf: pip install 'qsparse-hf[gguf]'"
            ) from None

        self.path = path
        with user_errors(path):
            with path.open("rb") as file:
                if file.read(4) != b"GGUF":
                    raise UserError(f"{path} is no GGUF file")
            self._reader = GGUFReader(path)
        architecture = self._field("general.architecture")
        if (self._field("split.count") or 1) > 1:
            raise UserError(f"{path} is one of several parts; make one file of them with llama.cpp's llama-gguf-split")
        scaling = self._field(f"{architecture}.rope.scaling.type")
        if scaling not in (None, "none"):
            raise UserError(
                f"{path} scales its rotary embedding ({scaling!r}), which Transformers does not read from a GGUF file; "
                "convert the original checkpoint"
            )
        with user_errors(path):
            self.config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
        if self.config.model_type not in FAMILIES:
            families = ", ".join(FAMILIES)
            raise UserError(f"{path}: model_type must be one of {families}, got {self.config.model_type!r}")
        head_dim = self._field(f"{architecture}.attention.key_length")
        if head_dim is not None and hasattr(self.config, "head_dim"):
            self.config.head_dim = head_dim
        window = self._field(f"{architecture}.attention.sliding_window")
        if window and getattr(self.config, "sliding_window", window) is None:
            self.config.sliding_window = window
        if any(tensor.name == _ROPE_FREQUENCIES for tensor in self._reader.tensors):
            self._take_rope_frequencies()
        self.config.dtype = dtype or self._own_dtype()

    def describe(self, folder: Path) -> None:
        """Write into `folder` what a dense checkpoint has beside its weights: configuration, tokenizer, generation."""
        self.config.save_pretrained(folder)
        GenerationConfig.from_model_config(self.config).save_pretrained(folder)
        split = self._field("tokenizer.ggml.pre")
        try:
            from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS as known
        except ImportError:
            known = {}
        if self._field("tokenizer.ggml.model") == "gpt2" and split and split not in {*known, *_PLAIN_SPLITS}:
            logger.warning(
                "%s: Transformers does not know how the tokenizer %r splits text, and splits it as GPT-2's does; "
                "compare its tokens with the original tokenizer's, or put that in its place",
                self.path,
                split,
            )
        try:
            tokenizer = AutoTokenizer.from_pretrained(self.path.parent, gguf_file=self.path.name)
        except Exception as error:  # whatever a vocabulary of a kind that it does not know makes Transformers raise
            logger.warning("the tokenizer in %s cannot be read and is left out: %s", self.path, one_line(error))
        else:
            for key in ("is_local", "local_files_only"):
                tokenizer.init_kwargs.pop(key, None)
            tokenizer.save_pretrained(folder)

    def dequantise(self) -> dict[str, LoadedTensor]:
        """The weights by the names of the dense checkpoint, in `config.dtype`, all in memory.

        Raises:
            UserError: the file lacks tensors of the model, or has some that Transformers has no place for.
        """
        dtype: Any = self.config.dtype
        with user_errors(self.path):
            found: Any = AutoModelForCausalLM.from_pretrained(
                self.path.parent,
                gguf_file=self.path.name,
                quantization_config=GgufConfig(dequantize=True),  # for some architectures it keeps the blocks
                config=self.config,
                dtype=dtype,
                output_loading_info=True,
            )
        model, info = found  # two with output_loading_info
        tied = model.all_tied_weights_keys
        state = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
        if missing := sorted(set(info["missing_keys"]) - set(tied)):
            raise UserError(f"{self.path} lacks {len(missing)} tensor(s) of the model, {missing[0]} for one")
        held = [tensor.name for tensor in self._reader.tensors if tensor.name != _ROPE_FREQUENCIES]
        if len(held) != len(state):
            raise UserError(
                f"{self.path} holds {len(held)} tensors, and its model as Transformers reads it {len(state)}: without "
                "the others it would be another model; convert the original checkpoint"
            )
        return {
            name: LoadedTensor(self.path, name, tuple(tensor.shape), _DTYPE_NAMES[tensor.dtype], tensor)
            for name, tensor in state.items()
        }

    def _field(self, name: str) -> Any:
        field = self._reader.get_field(name)
        return None if field is None else field.contents()

    def _own_dtype(self) -> torch.dtype:
        kinds = {tensor.tensor_type.name for tensor in self._reader.tensors}
        if not kinds <= set(HEADER_DTYPES):
            return torch.bfloat16
        return next(HEADER_DTYPES[kind] for kind in ("BF16", "F16", "F32") if kind in kinds)  # norms are F32 in all

    def _take_rope_frequencies(self) -> None:
        """Set the scaling of Llama 3.1 and later, which the file has as the divisors of the frequencies."""
        stored = next(tensor.data for tensor in self._reader.tensors if tensor.name == _ROPE_FREQUENCIES)
        divisors = torch.tensor(stored.tolist()).flatten()
        config: Any = self.config
        base = config.rope_parameters["rope_theta"]
        plain = base ** (-torch.arange(0, 2 * len(divisors), 2) / (2 * len(divisors)))
        config.rope_parameters = {
            "rope_type": "llama3",
            "rope_theta": base,
            "factor": round(divisors.max().item(), 3),
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
        frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
        if frequencies.shape != plain.shape or not torch.allclose(frequencies * divisors, plain, rtol=1e-4):
            raise UserError(f"{self.path} scales its rotary embedding otherwise than Llama 3; convert the original")
