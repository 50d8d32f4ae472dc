"""What a checkpoint on disk holds: its configuration as written, where each tensor lies, and which files go with them.

Only JSON and the headers of safetensors files are read here; nothing is unpickled and nothing is run.
"""

import json
import logging
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel
from transformers.dynamic_module_utils import get_relative_import_files

from .errors import UserError, one_line

logger = logging.getLogger(__name__)

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
TOKENIZER_CONFIG = "tokenizer_config.json"

# What goes along with weights unchanged: how to make tokens, how to generate, under which licence.
TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt")
LICENCES = ("LICENSE*", "NOTICE*")
COMPANIONS = (
    *TOKENIZER_FILES,
    "chat_template*",
    "additional_chat_templates/*.jinja",
    "generation_config.json",
    *LICENCES,
)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""The dtypes of weights, by the names that users give."""

HEADER_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""The dtypes that are converted, by their names in a safetensors header."""

_LAYER = re.compile(r"(?:model\.)?layers\.(\d{1,9})\.")
# Old Llama checkpoints carry these; Transformers computes them from the configuration, and ignores them too.
_DERIVED = re.compile(r"rotary_emb\.inv_freq$")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        UserError: it is not there, cannot be read, or holds something else.
    """
    if not os.path.isfile(path):
        raise UserError(f"{path} is missing")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as JSON: {one_line(error)}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold a JSON object, got {type(content).__name__}")
    return content


def code_files(folder: Path, references: Iterable[str | None]) -> list[Path]:
    """The files in `folder` that define the classes an `auto_map` names (`module.Class`), with what they import.

    Raises:
        UserError: one is missing.
    """
    files = []
    for reference in references:
        if reference and "--" not in reference:  # which names another repository
            module = folder / f"{reference.rpartition('.')[0]}.py"
            files += [module, *map(Path, get_relative_import_files(module))]
    for file in files:
        if file.parent != folder or not os.path.isfile(file):
            raise UserError(f"{folder} lacks {str(file)!r}, which defines a class of it")
    return files


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a safetensors file, described by the file's header.

    Attributes:
        path: the file.
        name: the tensor's name there.
        shape: its shape.
        dtype: its dtype by the name that safetensors gives it, `"BF16"` for instance.
    """

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: str

    def read(self, dtype: torch.dtype) -> torch.Tensor:
        """The tensor as `dtype`.

        Raises:
            UserError: it cannot be read, or a finite value of it is infinite as `dtype`.
        """
        tensor = self.load()
        cast = tensor.to(dtype)
        if cast is not tensor and (infinite := cast.isinf()).any() and infinite.sum() != tensor.isinf().sum():
            wider = "float32" if dtype == torch.bfloat16 else "bfloat16"
            kind = str(dtype).removeprefix("torch.")
            raise UserError(f"{self.name} has values beyond {kind}'s range; use {wider}")
        return cast

    def load(self) -> torch.Tensor:
        """The tensor as it is stored.

        Raises:
            UserError: it cannot be read.
        """
        try:
            with safe_open(self.path, framework="pt") as file:
                return file.get_tensor(self.name)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{self.path}: {self.name} cannot be read: {one_line(error)}") from None


def locate_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of the checkpoint in `folder`, from the headers of its files, which thereby have their full length.

    Raises:
        UserError: a file that is missing, broken, or outside the folder.
    """
    if os.path.isfile(folder / WEIGHTS):  # where both are there, Transformers reads this one
        return {tensor.name: tensor for tensor in _header(folder / WEIGHTS)}
    if not os.path.lexists(folder / INDEX):
        raise UserError(
            f"{folder} has neither {WEIGHTS} nor {INDEX}; weights in other formats are not read, "
            "save them with `save_pretrained` first"
        )
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise UserError(f"{folder / INDEX} is not a safetensors index: it has no weight_map of tensors and files")
    for file in sorted(set(weight_map.values())):
        if file != os.path.basename(file) or not os.path.isfile(folder / file):
            raise UserError(f"{folder / INDEX} names the file {file!r}, which is missing from {folder}")
    tensors = {
        tensor.name: tensor
        for file in sorted(set(weight_map.values()))
        for tensor in _header(folder / file)
        if weight_map.get(tensor.name, file) == file
    }
    if absent := [name for name in weight_map if name not in tensors]:
        raise UserError(f"{folder / weight_map[absent[0]]} lacks {absent[0]!r}, which the index says is there")
    return tensors


def _header(path: Path) -> list[StoredTensor]:
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
            return [StoredTensor(path, name, tuple(s.get_shape()), s.get_dtype()) for name, s in slices.items()]
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is truncated or corrupt: {one_line(error)}") from None


def check_layers(layers: int, tensors: Iterable[str], folder: Path) -> None:
    """Compare the layers that the configuration asks for with those that the names of `tensors` speak of.

    Raises:
        UserError: they differ.
    """
    numbers = [int(found[1]) for name in tensors if (found := _LAYER.match(name))]
    held = max(numbers, default=-1) + 1
    if layers != held:
        raise UserError(f"{folder / CONFIG} asks for {layers} layers, but the weights hold {held}")


def match_tensors(tensors: Mapping[str, StoredTensor], model: PreTrainedModel, folder: Path) -> dict[str, StoredTensor]:
    """The stored tensor of each tensor of `model`'s state dict; of a tied pair, one suffices.

    A tied tensor that is stored alone, under whichever name, gets the name that Transformers ties the other to.

    Raises:
        UserError: a tensor that is missing, of another shape or an unknown dtype; or one that is stored and belongs
            to a layer or a module of the model, which the configuration gives no place for it.
    """
    expected, tied = model.state_dict(), model.all_tied_weights_keys
    found = {name: tensors[name] for name in expected if name in tensors}
    for twin, name in tied.items():
        if twin in found and name not in found:
            found[name] = found.pop(twin)
    if missing := [name for name in expected if name not in found and name not in tied]:
        raise UserError(f"{folder} lacks {len(missing)} tensor(s) of the model, {missing[0]} for one")
    for name, tensor in found.items():
        shape = tuple(expected[name].shape)
        if tensor.shape != shape:
            raise UserError(f"{tensor.path}: {name} has shape {tensor.shape}, but {CONFIG} asks for {shape}")
        if tensor.dtype not in HEADER_DTYPES:
            raise UserError(f"{tensor.path}: {name} is of dtype {tensor.dtype}; allowed are {', '.join(HEADER_DTYPES)}")
    _check_unknown([name for name in tensors if name not in expected and not _DERIVED.search(name)], model, folder)
    return {name: found[name] for name in expected if name in found}


def _check_unknown(unknown: list[str], model: PreTrainedModel, folder: Path) -> None:
    """Say how many stored tensors the model does not read; refuse them where the model computes with their like."""
    modules = {name for name, _ in model.named_modules() if name}
    layers = f"{model.base_model_prefix}.layers."
    if own := [name for name in unknown if name.startswith(layers) or name.rpartition(".")[0] in modules]:
        raise UserError(
            f"{folder} holds {len(own)} tensor(s) of the model's own layers that {CONFIG} gives no place for, "
            f"{own[0]!r} for one; without them it would be another model"
        )
    if unknown:
        logger.warning(
            "%s holds %d tensor(s) that the model does not use and that are left out, %r for one",
            folder,
            len(unknown),
            unknown[0],
        )
