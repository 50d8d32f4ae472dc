"""A model's configuration as it is written: what no model can have is refused before anything is built from it."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from .errors import UserError, check_source, shortened, user_errors
from .registration import FAMILIES

# The numbers that a model is built with, and far more than any model has of them.
_MOST = dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 10_000) | dict.fromkeys(
    ("num_attention_heads", "num_key_value_heads", "head_dim", "hidden_size", "intermediate_size", "vocab_size"), 10**9
)
_DTYPE_KEYS = ("dtype", "torch_dtype")  # the second is the older name of the first
_DTYPES = ("float32", "bfloat16", "float16", "float64")  # those that torch makes parameters of by default


def check_config(source: str | Path, fields: Mapping[str, object] | None = None, named: str | None = None) -> None:
    """Look at the configuration of a model before anything is built from it.

    Args:
        source: a checkpoint's folder or Hub id, or a configuration's file.
        fields: what is set in it.
        named: what messages call it, if not `source`.

    Raises:
        UserError: it cannot be read, or `check_fields` refuses it.
    """
    from transformers import PreTrainedConfig  # its import is not for every command
    from transformers.utils import ADAPTER_CONFIG_NAME

    check_source(source, named)
    with user_errors(named or source):
        if Path(source).suffix == ".gguf" and Path(source).is_file():
            raise UserError(f"{named or source} is a GGUF file; make a checkpoint of it first, with `qsparse convert`")
        if Path(source, ADAPTER_CONFIG_NAME).exists():
            raise UserError(
                f"{named or source} holds adapters of another model; merge them into it first, with PEFT's "
                "merge_and_unload"
            )
        if Path(source).is_dir() and not Path(source, "config.json").exists():
            is_a_run = any(Path(source).glob("checkpoint-*"))
            hint = "; it is an unfinished run's, name one of the checkpoints in it" if is_a_run else ""
            raise UserError(f"{named or source} holds no config.json{hint}")
        check_fields(named or source, PreTrainedConfig.get_config_dict(source)[0] | dict(fields or {}))


def check_fields(source: object, config: Mapping[str, Any]) -> None:
    """Refuse values that no model can be built with, before a library fails on them midway.

    Numbers and the names of dtypes are checked for every type of model; activations, rotary embeddings and the padding
    token only for the dense and the Q-Sparse types of `FAMILIES`, since other types may give those keys other meanings.

    Args:
        source: where the configuration was found.
        config: its fields as they are written; one that is missing or None has the default of its class.

    Raises:
        UserError: a number or a name that is not allowed; the message gives the key, the value and what is allowed.
    """

    def refuse(key: str, value: object, allowed: str) -> NoReturn:
        raise UserError(f"{source}: {key} must be {allowed}, got {shortened(repr(value))}")

    for key, most in _MOST.items():
        found = config.get(key)
        if found is None or (key == "head_dim" and "kv_lora_rank" in config):  # latent attention has other sizes
            continue
        for number in found if isinstance(found, list) else [found]:  # some models have one for each layer
            if type(number) is not int or not 1 <= number <= most:
                refuse(key, number, f"an integer from 1 to {most:,}")
    family = str(config.get("model_type")).removeprefix("qsparse_")
    if family in FAMILIES:
        _check_names(config, family, refuse)
    for key in _DTYPE_KEYS:
        name = config.get(key)
        if isinstance(name, str) and not _is_floating_point(name):
            refuse(key, name, "the name of a floating-point dtype of torch like 'bfloat16'")


def _check_names(config: Mapping[str, Any], family: str, refuse: Callable[[str, object, str], NoReturn]) -> None:
    """Refuse names that Transformers does not know, and a padding token beyond the vocabulary; for `FAMILIES` alone."""
    from transformers.activations import ACT2FN
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    for key in _DTYPE_KEYS:
        if (name := config.get(key)) is not None and name not in _DTYPES:
            refuse(key, name, f"one of {', '.join(_DTYPES)}")
    for key in ("hidden_act", "hidden_activation"):
        if (name := config.get(key)) is not None and name not in list(ACT2FN):
            refuse(key, name, f"one of {', '.join(ACT2FN)}")
    rope_types = ["default", *ROPE_INIT_FUNCTIONS, *(["su"] if family == "phi3" else [])]  # an old name of "longrope"
    for key in ("rope_parameters", "rope_scaling"):
        rope = config.get(key)
        for held in (rope, *rope.values()) if isinstance(rope, dict) else ():  # Gemma 3 has one for each type of layer
            name = held.get("rope_type", held.get("type", "default")) if isinstance(held, dict) else "default"
            if name not in rope_types:
                refuse(f"the rope_type in {key}", name, f"one of {', '.join(rope_types)}")
    padding, vocabulary = config.get("pad_token_id"), config.get("vocab_size")
    if isinstance(padding, int) and isinstance(vocabulary, int) and not -vocabulary <= padding < vocabulary:
        refuse("pad_token_id", padding, f"below vocab_size, which is {vocabulary}, and at least {-vocabulary}")


def _is_floating_point(name: str) -> bool:
    import torch

    dtype = getattr(torch, name, None)
    return isinstance(dtype, torch.dtype) and dtype.is_floating_point
