"""A dense Llama, Mistral or Qwen2 checkpoint becomes a Q-Sparse one: same weights, same keys, other configuration.

Tensors go from safetensors to safetensors one output shard at a time, so the memory it takes is one shard's, whatever
the model's size. The output is written beside its place and renamed into it when it is whole.
"""

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from huggingface_hub import StateDictSplit, hf_hub_download, snapshot_download, split_torch_state_dict_into_shards
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.dynamic_module_utils import custom_object_save

from .errors import UserError, user_errors
from .modeling.configuration_qsparse import QSPARSE_FIELDS, QSparseConfigMixin
from .modeling.modeling_qsparse import declare_auto_model
from .registration import FAMILIES
from .report import count_parameters

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_HEADER_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}

_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
# What goes along unchanged: how to make tokens, how to generate, under which licence.
_COMPANIONS = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
    "additional_chat_templates*",
    "generation_config.json",
    "LICENSE*",
    "NOTICE*",
)


@dataclass(frozen=True)
class ConversionPlan:
    """What a conversion writes.

    Attributes:
        output: the folder that appears.
        config: the Q-Sparse configuration.
        shards: which tensors go to which file.
        size: bytes of all weights.
        parameters: of the whole model.
        projection_parameters: weights of the linear projections, the paper's `N`.
        activated_parameters: those of them that a token reads, the paper's `Na`.
    """

    output: Path
    config: QSparseConfigMixin
    shards: StateDictSplit
    size: int
    parameters: int
    projection_parameters: int
    activated_parameters: int

    def __str__(self) -> str:
        files = len(self.shards.filename_to_tensors)
        share = self.activated_parameters / self.projection_parameters
        return "\n".join(
            (
                f"{self.output}: {self.config.model_type}, {_size(self.size)} in {files} file(s)",
                f"  parameters            {self.parameters:>16,}",
                f"  in the projections    {self.projection_parameters:>16,}",
                f"  activated by a token  {self.activated_parameters:>16,}  ({share:.1%})",
            )
        )


def convert_checkpoint(
    source: str | os.PathLike,
    output: str | os.PathLike,
    *,
    dtype: str | None = None,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
    dry_run: bool = False,
    revision: str | None = None,
    **fields,
) -> ConversionPlan:
    """Write the Q-Sparse twin of a dense checkpoint.

    Args:
        source: a local folder, or the id of a Hub repository, with safetensors weights.
        output: the folder to write; it appears whole or not at all.
        dtype: `"float32"`, `"bfloat16"` or `"float16"`; None keeps each tensor's own.
        max_shard_size: bytes, or a size like `"5GB"`; also the most memory that weights take here.
        overwrite: replace `output` if it exists.
        dry_run: look and plan, write nothing; of a Hub repository only the configuration is fetched.
        revision: branch, tag or commit of a Hub repository.
        **fields: fields of the Q-Sparse configuration, `sparsity=0.6` for instance.

    Returns:
        What was written, or with `dry_run` would be.

    Raises:
        UserError: an unsuitable source, field, or target. Nothing is left behind.
    """
    source, output = str(source), Path(output)
    if unknown := sorted(set(fields) - set(QSPARSE_FIELDS)):
        raise UserError(f"unknown field {unknown[0]!r}; allowed are {', '.join(QSPARSE_FIELDS)}")
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    _check_target(output, Path(source), overwrite)

    local = os.path.isdir(source)
    config = _qsparse_config(source if local else _download_config(source, revision), fields)
    with torch.device("meta"), user_errors(source):
        model = AutoModelForCausalLM.from_config(config)
    expected = model.state_dict()

    if dry_run and not local:
        held = dict.fromkeys(_required(model), config.dtype or torch.float32)
    else:
        folder = Path(source if local else _download(source, revision))
        where = _locate_tensors(folder)
        held = _check_tensors(where, expected, _required(model), folder)
    written = {
        name: torch.empty_like(expected[name], dtype=DTYPES[dtype] if dtype else held_dtype)
        for name, held_dtype in held.items()
    }
    config.architectures = [type(model).__name__]
    config.dtype = _main_dtype(written.values())
    try:
        limit = int(max_shard_size) if str(max_shard_size).isdigit() else max_shard_size
        shards = split_torch_state_dict_into_shards(written, max_shard_size=limit)
    except ValueError as error:
        raise UserError(f"max_shard_size must be bytes or a size like '5GB', got {max_shard_size!r}") from error
    total, activated = count_parameters(model)
    plan = ConversionPlan(
        output, config, shards, shards.metadata["total_size"], model.num_parameters(), total, activated
    )
    if dry_run:
        return plan

    with _staging(output, overwrite, plan.size) as staging:
        _write_weights(staging, where, written, shards)
        for pattern in _COMPANIONS:
            for companion in folder.glob(pattern):
                (shutil.copytree if companion.is_dir() else shutil.copy)(companion, staging / companion.name)
        # The configuration last: a folder without it does not load.
        declare_auto_model(model)
        custom_object_save(model, staging, config=config)
        config.save_pretrained(staging)
    return plan


def _check_target(output: Path, source: Path, overwrite: bool) -> None:
    if output.resolve() in (source.resolve(), *source.resolve().parents):
        raise UserError(f"the output {output} is or holds the source; choose another folder")
    if not output.exists():
        return
    if not overwrite:
        raise UserError(f"{output} exists already; remove it or pass overwrite=True (--overwrite)")
    if not output.is_dir() or (any(output.iterdir()) and not (output / "config.json").exists()):
        raise UserError(f"{output} is not a checkpoint, so it is not overwritten; remove it or choose another folder")


def _qsparse_config(folder: str | os.PathLike, fields: dict) -> PreTrainedConfig:
    path = Path(folder) / "config.json"
    try:
        described = json.loads(path.read_text())
        model_type = described["model_type"]
    except FileNotFoundError:
        raise UserError(f"{path} is missing: {folder} is not a Transformers checkpoint") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not a Transformers configuration ({type(error).__name__}: {error})") from None
    if model_type not in list(FAMILIES):
        hint = "; it is Q-Sparse already" if str(model_type).startswith("qsparse") else ""
        raise UserError(f"{path}: model_type must be one of {', '.join(FAMILIES)}, got {model_type!r}{hint}")
    if described.get("quantization_config"):
        raise UserError(f"{path}: a quantized checkpoint cannot be converted; give the original weights")
    with user_errors(path):
        dense = AutoConfig.from_pretrained(folder).to_dict()
        for key in ("model_type", "architectures", "transformers_version", "auto_map"):
            dense.pop(key, None)
        return FAMILIES[model_type].config(**dense | fields)


def _locate_tensors(folder: Path) -> dict[str, Path]:
    """The file each tensor lies in."""
    single, index = folder / _WEIGHTS, folder / _INDEX
    if single.exists():  # where both are there, Transformers reads this one
        return dict.fromkeys(_header(single), single)
    if not index.exists():
        raise UserError(
            f"{folder} has neither {_WEIGHTS} nor {_INDEX}; weights in other formats are not read, "
            "save them with `save_pretrained` first"
        )
    try:
        weight_map = json.loads(index.read_text())["weight_map"]
        where = {name: folder / file for name, file in weight_map.items()}
    except (ValueError, KeyError, AttributeError, TypeError):
        raise UserError(f"{index} is not a safetensors index") from None
    for path in sorted(set(where.values())):
        if path.parent != folder or not path.exists():
            raise UserError(f"{path} is missing: {index.name} names it")
    return where


def _header(path: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and dtype of every tensor in a safetensors file, which is thereby known to have its full length."""
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
            return {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is truncated or corrupt: {error}") from None


def _required(model: PreTrainedModel) -> list[str]:
    """Names a checkpoint must hold: all but the tied ones."""
    return [name for name in model.state_dict() if name not in model.all_tied_weights_keys]


def _check_tensors(
    where: dict[str, Path], expected: dict[str, torch.Tensor], required: list[str], folder: Path
) -> dict[str, torch.dtype]:
    """Dtype of each tensor to convert, after a look at every file's header."""
    headers = {path: _header(path) for path in sorted(set(where.values()))}
    if missing := [name for name in required if name not in where]:
        raise UserError(f"{folder} lacks {len(missing)} tensor(s) of the model, {missing[0]} for one")
    held = {}
    for name in expected:
        if name not in where:
            continue
        path = where[name]
        if name not in headers[path]:
            raise UserError(f"{path} lacks {name}, which the index says is there")
        shape, dtype = headers[path][name]
        if shape != tuple(expected[name].shape):
            raise UserError(f"{path}: {name} has shape {shape}, config.json asks for {tuple(expected[name].shape)}")
        if dtype not in _HEADER_DTYPES:
            raise UserError(f"{path}: {name} is of dtype {dtype}; allowed are {', '.join(_HEADER_DTYPES)}")
        held[name] = _HEADER_DTYPES[dtype]
    return held


def _main_dtype(tensors: Iterable[torch.Tensor]) -> torch.dtype:
    """The dtype of most parameters, which is what `dtype="auto"` loads a checkpoint in."""
    parameters = Counter()
    for tensor in tensors:
        parameters[tensor.dtype] += tensor.numel()
    return parameters.most_common(1)[0][0]


def _cast(tensor: torch.Tensor, dtype: torch.dtype, name: str) -> torch.Tensor:
    cast = tensor.to(dtype)
    if dtype == torch.float16 != tensor.dtype and cast.isinf().any() and not tensor.isinf().any():
        raise UserError(f"{name} has values beyond float16's range; use bfloat16")
    return cast


def _write_weights(
    staging: Path, where: dict[str, Path], written: dict[str, torch.Tensor], shards: StateDictSplit
) -> None:
    with tqdm(total=shards.metadata["total_size"], unit="B", unit_scale=True, desc="converting") as progress:
        for file, names in shards.filename_to_tensors.items():
            tensors = {}
            for name in names:
                try:
                    with safe_open(where[name], framework="pt") as shard:
                        tensors[name] = _cast(shard.get_tensor(name), written[name].dtype, name)
                except (SafetensorError, OSError) as error:
                    raise UserError(f"{where[name]}: {name} cannot be read: {error}") from None
                progress.update(tensors[name].nbytes)
            save_file(tensors, staging / file, metadata={"format": "pt"})
    if shards.is_sharded:
        index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
        (staging / _INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


@contextmanager
def _staging(output: Path, overwrite: bool, size: int) -> Iterator[Path]:
    """A folder beside `output` that takes its place when the block ends well, and vanishes when it does not.

    What a killed run left behind is put right by the next one; two at once to the same place are refused.
    """
    output = output.resolve()  # of a link, what it points to is replaced
    parent = output.parent
    staging, retired = (parent / f".{output.name}.{suffix}" for suffix in ("partial", "replaced"))
    lock = FileLock(parent / f".{output.name}.lock")

    def tidy() -> None:
        if retired.exists() and not output.exists():
            retired.rename(output)
        for leftover in (staging, retired):
            shutil.rmtree(leftover, ignore_errors=True)

    try:
        parent.mkdir(parents=True, exist_ok=True)
        with lock.acquire(timeout=0):
            try:
                tidy()
                if (free := shutil.disk_usage(parent).free) < size:
                    raise UserError(f"{parent} has {_size(free)} free, {_size(size)} are needed")
                staging.mkdir()
                yield staging
                if output.exists():
                    if not overwrite:
                        raise UserError(f"{output} has appeared meanwhile")
                    output.rename(retired)
                staging.rename(output)
            finally:
                tidy()
                Path(lock.lock_file).unlink(missing_ok=True)
    except Timeout:
        raise UserError(f"another conversion is writing {output}") from None
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write {output}: {error}") from None


def _download_config(source: str, revision: str | None) -> Path:
    with _hub_errors(source):
        return Path(hf_hub_download(source, "config.json", revision=revision)).parent


def _download(source: str, revision: str | None) -> str:
    patterns = ["config.json", "model*.safetensors", _INDEX, *_COMPANIONS]
    with _hub_errors(source):
        return snapshot_download(source, revision=revision, allow_patterns=patterns)


@contextmanager
def _hub_errors(source: str) -> Iterator[None]:
    try:
        yield
    except HFValidationError:
        raise UserError(f"{source} is neither a folder nor the id of a Hub repository") from None
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = " ".join(line for line in str(error).splitlines()[:3] if line)
        raise UserError(f"{source} is not a folder, and the Hub did not give it: {reason}") from None


def _size(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.2f} MB"
