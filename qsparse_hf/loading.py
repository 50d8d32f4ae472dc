"""A causal language model as the user names it, dense, Q-Sparse or adapters, and its tokenizer."""

import os
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import ADAPTER_CONFIG_NAME, ADAPTER_SAFE_WEIGHTS_NAME

from .checkpoint import DTYPES, TOKENIZER_FILES
from .configuration import check_config
from .errors import UserError, user_errors
from .modeling.configuration_qsparse import QSparseConfigMixin
from .weights import check_packed, make_plain


def find_device(device: str | None) -> torch.device:
    """The device to run on: "cuda" or "cpu", or a GPU where there is one.

    Raises:
        UserError: there is none of that name.
    """
    if device not in (None, "cuda", "cpu"):
        raise UserError(f"device must be cuda or cpu, got {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device 'cuda' is asked for, and there is none; 'cpu' works too")
    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def check_dtype(dtype: str) -> None:
    """Refuse what is neither "auto" nor in `DTYPES`.

    Raises:
        UserError: it is neither.
    """
    if dtype not in ("auto", *DTYPES):
        raise UserError(f"dtype must be auto, {', '.join(DTYPES)}, got {dtype!r}")


def find_base(name: str) -> str:
    """The folder or Hub id of the whole model: `name`, or the base model of the adapters in that folder.

    Raises:
        UserError: its configuration cannot be read or built with.
    """
    base = name
    if Path(name, ADAPTER_CONFIG_NAME).is_file():
        from peft import PeftConfig

        with user_errors(name):
            base = PeftConfig.from_pretrained(name).base_model_name_or_path or ""
    check_config(base, named=None if base == name else f"{name}: its base model {base}")
    return base


def load_tokenizer(source: str | Path) -> Any:
    """The tokenizer of a folder or Hub repository.

    Raises:
        UserError: it has none, or the one that it has does not load.
    """
    if os.path.isdir(source) and not any(any(Path(source).glob(pattern)) for pattern in TOKENIZER_FILES):
        raise UserError(
            f"{source} holds no tokenizer, as an unfinished run's folder may; put its base model's there: "
            f"AutoTokenizer.from_pretrained(BASE).save_pretrained({str(source)!r})"
        )
    with user_errors(source):
        return AutoTokenizer.from_pretrained(source)


def load_checkpoint(
    name: str, device: str | None = None, dtype: str = "auto"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model to run, and its tokenizer; weights are read from safetensors alone, nothing is unpickled.

    Args:
        name: folder or Hub id of a dense or Q-Sparse checkpoint, or a folder of adapters, which are merged.
        device: as `find_device` takes it.
        dtype: "float32", "bfloat16" or "float16"; "auto" for that of the checkpoint.

    Raises:
        UserError: it cannot be read, or there is no such device or dtype.
    """
    place = find_device(device)
    check_dtype(dtype)
    base = find_base(name)
    if base != name and not Path(name, ADAPTER_SAFE_WEIGHTS_NAME).is_file():
        raise UserError(f"{name} lacks {ADAPTER_SAFE_WEIGHTS_NAME}; adapters in other formats are not read")
    tokenizer = load_tokenizer(name)
    with user_errors(name):
        config = AutoConfig.from_pretrained(base)
        is_sparse = isinstance(config, QSparseConfigMixin) and os.path.isdir(base)
        if is_sparse:
            check_packed(Path(base), config)
        try:
            model: Any = AutoModelForCausalLM.from_pretrained(
                base, dtype=DTYPES.get(dtype, "auto"), use_safetensors=True
            )
        except ValueError:
            if is_sparse:
                check_packed(Path(base), config, codes=True)  # which names the file
            raise
        if base != name:
            from peft import PeftModel

            make_plain(model)
            model = PeftModel.from_pretrained(model, name).merge_and_unload()
        return model.to(place).eval(), tokenizer
