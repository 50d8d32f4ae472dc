"""A dense checkpoint becomes a Q-Sparse one: same weights, same keys, other configuration.

Or its projections' weights take on another of the forms in `weights`, which those of a Q-Sparse checkpoint may do too.

Tensors go from safetensors to safetensors one output shard at a time, so the memory it takes is one shard's, whatever
the model's size. The output is written beside its place and renamed into it when it is whole.
"""

import dataclasses
import json
import logging
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import NamedTemporaryFile, TemporaryDirectory
from typing import Any, NamedTuple

import torch
from filelock import FileLock, Timeout
from huggingface_hub import StateDictSplit, hf_hub_download, snapshot_download, split_torch_state_dict_into_shards
from huggingface_hub.constants import REPOCARD_NAME
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import save_file
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.dynamic_module_utils import custom_object_save

from .checkpoint import (
    COMPANIONS,
    CONFIG,
    DTYPES,
    HEADER_DTYPES,
    INDEX,
    TOKENIZER_CONFIG,
    TOKENIZER_FILES,
    StoredTensor,
    check_layers,
    code_files,
    locate_tensors,
    match_tensors,
    read_json,
)
from .configuration import check_fields
from .errors import UserError, check_source, one_line, shortened, user_errors
from .gguf_file import GGUFFile
from .model_card import find_origin, keeps_card, write_card
from .modeling.configuration_qsparse import QSPARSE_FIELDS, QSparseConfigMixin, is_bitnet, packed_layout
from .modeling.modeling_qsparse import declare_auto_model
from .registration import FAMILIES
from .report import count_parameters, count_weights
from .weights import FORMS, Rewritten, as_floats, check_rows, fields_of, form_of, projection_names, rewritten

logger = logging.getLogger(__name__)


# Of the dense configuration: what the Q-Sparse class says itself, and what a causal language model does not read.
_NOT_TAKEN = (
    "model_type",
    "architectures",
    "transformers_version",
    "auto_map",
    "_name_or_path",
    "base_model_tp_plan",
    "base_model_pp_plan",
    "num_labels",
)


@dataclasses.dataclass(frozen=True)
class ConversionPlan:
    """What a conversion writes.

    Attributes:
        output: the folder that appears.
        config: the Q-Sparse configuration.
        shards: which tensors go to which file.
        size: bytes of all weights.
        projection_size: bytes of the weights of the linear projections, and of their scales where they are packed.
        parameters: of the whole model.
        projection_parameters: weights of the linear projections, the paper's `N`.
        activated_parameters: those of them that a token reads, the paper's `Na`.
    """

    output: Path
    config: QSparseConfigMixin
    shards: StateDictSplit
    size: int
    projection_size: int
    parameters: int
    projection_parameters: int
    activated_parameters: int

    def __str__(self) -> str:
        files = len(self.shards.filename_to_tensors)
        share = self.activated_parameters / self.projection_parameters
        form = "" if self.config.weight_quantization == "none" else f"{form_of(self.config)}, "
        bits = 8 * self.projection_size / self.projection_parameters
        return "\n".join(
            (
                f"{self.output}: {self.config.model_type}, {_size(self.size)} in {files} file(s)",
                f"  parameters            {self.parameters:>16,}",
                f"  in the projections    {self.projection_parameters:>16,}  "
                f"({form}{bits:.2f} bits each, {_size(self.projection_size)})",
                f"  activated by a token  {self.activated_parameters:>16,}  ({share:.1%})",
            )
        )


def convert_checkpoint(
    source: str | os.PathLike,
    output: str | os.PathLike,
    *,
    weights: str | None = None,
    dtype: str | None = None,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
    dry_run: bool = False,
    revision: str | None = None,
    gguf_file: str | None = None,
    calibrated: Mapping[str, float] | None = None,
    **fields,
) -> ConversionPlan:
    """Write the Q-Sparse twin of a dense checkpoint, or a Q-Sparse one with its weights in another form.

    A dense checkpoint may be a BitNet one in Transformers' format, of any of the families: its weights are then ternary
    already, and its activations rounded to int8, as Transformers' layers do. Of a Q-Sparse checkpoint, what `fields`
    do not say stays.

    Packed and plain weights have the same codes and the same scales, as far as `dtype` holds these: bfloat16 rounds
    them. Ternary weights that are made of such have a mean magnitude which is their scale again, to one rounding of
    `dtype`. The bias of a BitNet checkpoint is taken as it is, where Transformers' `autobitlinear` in its offline mode
    would multiply it with the scale.

    A GGUF file is dequantised by Transformers, all of it in memory: twice the size of what is written. It carries no
    name of the family that llama.cpp does not tell from Llama, so that a Mistral becomes a Q-Sparse Llama, the same
    model without a sliding window. Its tokenizer is what Transformers makes of it.

    Args:
        source: a local folder, or the id of a Hub repository, with safetensors weights; or a `.gguf` file.
        output: the folder to write; it appears whole or not at all.
        weights: the form of the projections' weights: `"ternary"`, in full precision and quantized in every product, to
            train; `"packed"`, two bits each; `"plain"`, ordinary floats, which everything reads. None leaves them as
            they are, and refuses a Q-Sparse source.
        dtype: `"float32"`, `"bfloat16"` or `"float16"`; None keeps each tensor's own, and takes bfloat16 for a
            quantised GGUF file, and for weights that are packed what most others have.
        max_shard_size: bytes, or a size like `"5GB"`; also the most memory that weights take here.
        overwrite: replace `output` if it exists.
        dry_run: look and plan, write nothing; of a Hub repository only the configuration is fetched.
        revision: branch, tag or commit of a Hub repository.
        gguf_file: the GGUF file to convert of those in `source`.
        calibrated: for the card, as `write_card` takes it.
        **fields: fields of the Q-Sparse configuration, `sparsity=0.6` for instance.

    Returns:
        What was written, or with `dry_run` would be.

    Raises:
        UserError: an unsuitable source, field, or target. Nothing is left behind.
    """
    source, output = str(source), Path(output)
    if unknown := sorted(set(fields) - set(QSPARSE_FIELDS)):
        raise UserError(f"unknown field {unknown[0]!r}; allowed are {', '.join(QSPARSE_FIELDS)}")
    if weights is not None and weights not in FORMS:
        raise UserError(f"weights must be one of {', '.join(FORMS)}, got {weights!r}")
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    limit = _shard_limit(max_shard_size)
    _check_target(output, Path(source), overwrite)
    if gguf_file is None:
        check_source(source)
    if revision is not None and os.path.exists(source):
        raise UserError(f"{source} is here and has no revision {revision!r}; only a Hub repository has")
    gguf = _gguf_file(source, gguf_file, revision, DTYPES.get(dtype or ""))
    with TemporaryDirectory() as described:
        if gguf is not None:
            gguf.describe(folder := Path(described))
        else:
            folder = Path(source) if os.path.isdir(source) else _download_config(source, revision)
        dense, plain, config, form = _configs(folder, weights, fields)
        model = _empty_model(plain, source)
        names = projection_names(config)
        if config.packed_as is not None:
            check_rows(names, model, source)
        written_model = _empty_model(config, source)
        expected = written_model.state_dict()
        if dry_run and (gguf is not None or not os.path.isdir(source)):
            untied = [name for name in expected if name not in model.all_tied_weights_keys]
            dtypes = dict.fromkeys(untied, config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32)
        else:
            tokenizer_config: dict[str, Any] | None = None
            code: list[Path] = []
            if gguf is not None:
                tensors: Mapping[str, StoredTensor] = gguf.dequantise()
            else:
                folder = folder if os.path.isdir(source) else _download(source, revision)
                tensors = locate_tensors(folder)
                dense.name_or_path = source  # which decides on some tokenizers' class
                tokenizer_config, code = _describe_tokenizer(folder, dense)
            check_layers(config.num_hidden_layers, tensors, folder)
            if form.packed_as is not None:
                tensors = as_floats(tensors, config, form.packed_as, folder)
            matched = match_tensors(tensors, model, folder)
            held: Mapping[str, StoredTensor | Rewritten] = matched
            if weights is not None or form.packed_as is not None:
                held = rewritten(matched, names, form_of(config), trained=form.name == "ternary")
            dtypes = {name: HEADER_DTYPES[held[name].dtype] for name in expected if name in held}
        written = {
            name: torch.empty_like(
                expected[name], dtype=_written_dtype(expected[name], DTYPES[dtype] if dtype else found, name)
            )
            for name, found in dtypes.items()
        }
        config.architectures = [type(model).__name__]
        config.dtype = _main_dtype(written.values())
        declare_auto_model(written_model)
        shards = split_torch_state_dict_into_shards(written, max_shard_size=limit)
        total, activated = count_parameters(model)
        of_projections = {f"{name}.{part}" for name in names for part in ("weight", "weight_scale")}
        stored = sum(tensor.nbytes for name, tensor in written.items() if name in of_projections)
        plan = ConversionPlan(
            output, config, shards, shards.metadata["total_size"], stored, count_weights(model), total, activated
        )
        if dry_run:
            return plan

        with _staging(output, overwrite, plan.size) as staging:
            _write_weights(staging, held, written, shards)
            custom_object_save(written_model, staging, config=config)  # type: ignore[arg-type]  # no dict, as it allows
            _copy({*code, *(file for pattern in COMPANIONS for file in folder.glob(pattern))}, folder, staging)
            if tokenizer_config:
                (staging / TOKENIZER_CONFIG).write_text(json.dumps(tokenizer_config, indent=2) + "\n")
            if keeps_card(output):  # a person's, of the folder that is replaced
                shutil.copy(output / REPOCARD_NAME, staging)
            origin = find_origin(source, folder if gguf is None else None)
            write_card(staging, written_model, origin, name=output.resolve().name, calibrated=calibrated)
            config.save_pretrained(staging)  # last: a folder without it does not load
    return plan


def _gguf_file(source: str, name: str | None, revision: str | None, dtype: torch.dtype | None) -> GGUFFile | None:
    """The GGUF file that `source` is, or the one called `name` in it; None where `source` is a usual checkpoint."""
    if name is None:
        if source.endswith(".gguf") and os.path.isfile(source):
            return GGUFFile(Path(source), dtype)
        files = sorted(path.name for path in Path(source).glob("*.gguf")) if os.path.isdir(source) else []
        if files and not os.path.exists(Path(source, CONFIG)):
            raise UserError(f"{source} holds GGUF files; name one with gguf_file (--gguf-file): {', '.join(files)}")
        return None
    if os.path.isdir(source):
        if not os.path.isfile(Path(source, name)):
            files = sorted(path.name for path in Path(source).glob("*.gguf"))
            raise UserError(f"{source} holds no {name!r}; its GGUF files are: {', '.join(files) or 'none'}")
        return GGUFFile(Path(source, name), dtype)
    if os.path.isfile(source):
        raise UserError(f"{source} is a file; gguf_file (--gguf-file) names one in a folder or Hub repository")
    check_source(source)
    with _hub_errors(source):
        return GGUFFile(Path(hf_hub_download(source, name, revision=revision)), dtype)


def _shard_limit(size: int | str) -> int | str:
    """`size` as `split_torch_state_dict_into_shards` takes it, if it is a positive number of bytes."""
    found = re.fullmatch(r"(\d{1,18})|(\d{1,9}(?:\.\d+)?)\s*[KMGT]B", str(size).strip(), re.IGNORECASE | re.ASCII)
    if not found or not float(found[1] or found[2]):
        raise UserError(f"max_shard_size must be a positive number of bytes, or a size like '5GB', got {size!r}")
    return int(found[1]) if found[1] else found[0]


def _check_target(output: Path, source: Path, overwrite: bool) -> None:
    try:
        place, origin = output.resolve(), source.resolve()
        exists = output.exists()
        in_use = exists and (not output.is_dir() or (any(output.iterdir()) and not (output / CONFIG).exists()))
    except (OSError, ValueError, RuntimeError) as error:  # too long, a NUL, a loop of links
        raise UserError(f"the output {str(output)!r} cannot be written: {one_line(error)}") from None
    if place in (origin, *origin.parents):
        raise UserError(f"the output {output} is or holds the source; choose another folder")
    if in_use:
        raise UserError(
            f"{output} is there and no checkpoint, so it is not overwritten; remove it or choose another folder"
        )
    if exists and not overwrite:
        raise UserError(f"{output} exists already; remove it or pass overwrite=True (--overwrite)")


class _Form(NamedTuple):
    """How a source holds the weights of its projections."""

    name: str
    """One of `FORMS`."""
    packed_as: str | None
    """Of Transformers' BitNet layers, the one whose layout packed weights have."""


class _Source(NamedTuple):
    """What a source's `config.json` says, and what comes of it."""

    dense: PreTrainedConfig
    plain: QSparseConfigMixin
    """The Q-Sparse configuration without quantized weights, for names and shapes."""
    config: QSparseConfigMixin
    """The one that is written."""
    form: _Form


def _configs(folder: Path, weights: str | None, fields: dict[str, Any]) -> _Source:
    """The dense configuration in `folder`, or that of the Q-Sparse model there, and its Q-Sparse twin with `fields`."""
    path = folder / CONFIG
    if not os.path.isfile(path):
        raise UserError(f"{path} is missing: {folder} is not a Transformers checkpoint")
    described = read_json(path)
    model_type = described.get("model_type")
    dense_type = str(model_type).removeprefix("qsparse_")
    is_sparse = dense_type != model_type and dense_type in FAMILIES
    if dense_type not in FAMILIES or (is_sparse and weights is None):
        hint = "; it is Q-Sparse already"
        hint += ", and --weights writes it in another form" if is_sparse else ""
        hint = hint if str(model_type).startswith("qsparse") else ""
        raise UserError(f"{path}: model_type must be one of {', '.join(FAMILIES)}, got {model_type!r}{hint}")
    form, own = _form(path, described, is_sparse)
    if leads := [key for key in ("configuration_files", "transformers_weights") if described.get(key)]:
        raise UserError(f"{path}: {leads[0]} leads to other files than the ones converted here; remove the key")
    check_fields(path, described)
    described = {key: value for key, value in described.items() if key not in _NOT_TAKEN}
    family = FAMILIES[dense_type].config
    names = {field.name for field in dataclasses.fields(family)}
    for key in [key for key in described if key not in names and hasattr(family, key)]:
        held = getattr(family, key)
        if not isinstance(held, property) or key in vars(QSparseConfigMixin):
            raise UserError(f"{path}: the key {key!r} would hide what the class of the configuration calls so")
        if held.fset is None:  # Transformers computes it
            del described[key]
    with user_errors(path):
        dense = AutoConfig.for_model(dense_type, **described)
        taken = {key: value for key, value in dense.to_dict().items() if key not in _NOT_TAKEN} | own
        family(**taken).to_json_string()  # what cannot be written is said now
    written_as = fields_of(weights or form.name)
    if (asked := fields.pop("weight_quantization", None)) not in (None, written_as["weight_quantization"]):
        if weights is not None or asked != "ternary":
            raise UserError(f"weight_quantization {asked!r} is not that of {weights or form.name} weights")
        written_as = fields_of("ternary")
    with user_errors("the fields asked for"):  # no mistake of the file's
        plain = family(**taken | fields | fields_of("plain"))
        return _Source(dense, plain, family(**taken | fields | written_as), form)


def _form(path: Path, described: dict[str, Any], is_sparse: bool) -> tuple[_Form, dict[str, Any]]:
    """How the weights are held that the configuration in `path` describes, and the Q-Sparse fields of their model.

    `described` loses both.
    """
    own = {name: described.pop(name) for name in QSPARSE_FIELDS if is_sparse and name in described}
    quantization = described.pop("quantization_config", None)
    if quantization:
        if not is_bitnet(quantization):
            method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
            raise UserError(
                f"{path}: a checkpoint quantized by {shortened(repr(method))} cannot be converted, one by 'bitnet' "
                "can; give the original weights"
            )
        with user_errors(path):
            packed_as = packed_layout(quantization)
        if not is_sparse:
            own["activation_quantization"] = "int8"  # as Transformers' layers do
        return _Form("ternary" if packed_as is None else "packed", packed_as), own
    return _Form("ternary" if own.get("weight_quantization") == "ternary" else "plain", None), own


def _empty_model(config: QSparseConfigMixin, source: str) -> PreTrainedModel:
    with torch.device("meta"), user_errors(source):
        return AutoModelForCausalLM.from_config(config)


def _describe_tokenizer(folder: Path, dense: PreTrainedConfig) -> tuple[dict[str, Any] | None, list[Path]]:
    """What the converted `tokenizer_config.json` has to say (None: as it is), and the code that defines the tokenizer.

    For a dense model `AutoTokenizer` picks the class by `model_type`, whatever the file says. It does not know our
    types and takes the class in the file, which therefore becomes the one that it picks for the dense model.
    """
    path = folder / TOKENIZER_CONFIG
    if not any(any(folder.glob(pattern)) for pattern in TOKENIZER_FILES):
        return None, []
    described = read_json(path) if os.path.lexists(path) else {}
    references = _tokenizer_classes(described.get("auto_map"), path)
    if any(references):
        with user_errors(path):
            return described | {"auto_map": {"AutoTokenizer": references}}, code_files(folder, references)
    try:
        picked = AutoTokenizer.from_pretrained(folder, config=dense, trust_remote_code=False, mistral_format=False)
    except Exception as error:  # whatever a broken file, or a missing package, makes a tokenizer raise
        logger.warning("the tokenizer in %s does not load and is copied as it is: %s", folder, one_line(error))
        return None, []
    return described | {"tokenizer_class": type(picked).__name__}, []


def _tokenizer_classes(auto_map: object, path: Path) -> list[str | None]:
    """The slow and the fast class that the `auto_map` in `path` names, in the one form that Transformers loads."""
    named = auto_map.get("AutoTokenizer") if isinstance(auto_map, dict) else auto_map
    classes = [named] if isinstance(named, str) or named is None else named
    if not isinstance(classes, list) or len(classes) > 2 or not all(isinstance(c, str | None) for c in classes):
        raise UserError(
            f"{path}: auto_map must name the tokenizer's class like 'module.Class', or a list of its slow and its fast "
            f"class, got {shortened(repr(named))}"
        )
    return [*classes, None, None][:2]


def _copy(files: Iterable[Path], folder: Path, target: Path) -> None:
    """Copy those of `files` that are files, links to files included, to the same place under `target`."""
    for file in files:
        if file.is_file():
            place = target / file.relative_to(folder)
            place.parent.mkdir(exist_ok=True)
            if place.exists():
                raise UserError(f"{file} would replace a file of Q-Sparse's own of that name; rename it")
            shutil.copy(file, place)


def _written_dtype(tensor: torch.Tensor, floats: torch.dtype, name: str) -> torch.dtype:
    """That of `tensor` where the form of weights decides on it, as on codes and scales, and `floats` for all others."""
    return tensor.dtype if not tensor.is_floating_point() or name.endswith(".weight_scale") else floats


def _main_dtype(tensors: Iterable[torch.Tensor]) -> torch.dtype:
    """The dtype of most parameters, packed ones left out, which is what `dtype="auto"` loads a checkpoint in."""
    parameters: Counter[torch.dtype] = Counter()
    for tensor in tensors:
        if tensor.is_floating_point():
            parameters[tensor.dtype] += tensor.numel()
    return parameters.most_common(1)[0][0]


def _write_weights(
    staging: Path,
    held: Mapping[str, StoredTensor | Rewritten],
    written: dict[str, torch.Tensor],
    shards: StateDictSplit,
) -> None:
    with tqdm(total=shards.metadata["total_size"], unit="B", unit_scale=True, desc="converting") as progress:
        for file, names in shards.filename_to_tensors.items():
            tensors = {}
            for name in names:
                tensors[name] = held[name].read(written[name].dtype)
                progress.update(tensors[name].nbytes)
            save_file(tensors, staging / file, metadata={"format": "pt"})
    if shards.is_sharded:
        index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
        (staging / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


@contextmanager
def _staging(output: Path, overwrite: bool, size: int) -> Iterator[Path]:
    """A folder beside `output` that takes its place when the block ends well, and vanishes when it does not.

    What a killed run left behind is put right by the next one; two at once to the same place are refused.
    """
    output = output.resolve()  # of a link, what it points to is replaced
    parent = output.parent
    staging, retired = (parent / f".{output.name}.{suffix}" for suffix in ("partial", "replaced"))
    lock = FileLock(parent / f".{output.name}.lock")
    made = [folder for folder in (parent, *parent.parents) if not folder.exists()]

    def tidy() -> None:
        if retired.exists() and not output.exists():
            retired.rename(output)
        for leftover in (staging, retired):
            shutil.rmtree(leftover, ignore_errors=True)

    try:
        parent.mkdir(parents=True, exist_ok=True)
        NamedTemporaryFile(dir=parent).close()  # where no file can be made, the lock would seem to be another's
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
        raise UserError(f"cannot write {output}: {one_line(error)}") from None
    finally:
        with suppress(OSError):  # of the first that is not empty
            for folder in made:
                folder.rmdir()


def _download_config(source: str, revision: str | None) -> Path:
    with _hub_errors(source):
        return Path(hf_hub_download(source, CONFIG, revision=revision)).parent


def _download(source: str, revision: str | None) -> Path:
    patterns = [CONFIG, "model*.safetensors", INDEX, "*.py", REPOCARD_NAME, *COMPANIONS]
    with _hub_errors(source):
        return Path(snapshot_download(source, revision=revision, allow_patterns=patterns))


@contextmanager
def _hub_errors(source: str) -> Iterator[None]:
    try:
        yield
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = " ".join(line for line in str(error).splitlines()[:3] if line)
        raise UserError(f"{source} is not a folder, and the Hub did not give it: {reason}") from None


def _size(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.2f} MB"
