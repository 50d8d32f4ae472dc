"""A recipe: one YAML file that describes one training run, and what the command line changes in it."""

import dataclasses
import difflib
import json
import re
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import NamedTuple

import yaml
from transformers import HfArgumentParser

from ..errors import UserError, first_line
from .data import DataArguments
from .trainer import QSparseArguments, QSparseTrainingArguments

STAGES = ("pretrain", "continue", "sft")


@dataclass
class RunArguments:
    """What is trained, and how.

    Raises:
        UserError: fields that contradict each other.
    """

    stage: str | None = field(
        default=None,
        metadata={"help": "pretrain (config), continue (model) or sft (model, with TRL); default: by config or model."},
    )
    model: str | None = field(
        default=None, metadata={"help": "Checkpoint to begin with: a folder or Hub id, Q-Sparse or dense."}
    )
    config: str | None = field(
        default=None, metadata={"help": "Or a model configuration (JSON) to train from scratch."}
    )
    tokenizer: str | None = field(default=None, metadata={"help": "Tokenizer folder or Hub id; default: the model's."})
    model_fields: str = field(
        default="{}", metadata={"help": "Fields of the configuration to change, {sparsity: 0.6} for instance."}
    )
    dtype: str = field(default="float32", metadata={"help": "Of the weights; use bf16: true for mixed precision."})
    lora: str = field(
        default="{}",
        metadata={"help": "Train adapters: fields of PEFT's LoraConfig, {r: 16, target_modules: all-linear} say."},
    )

    def __post_init__(self) -> None:
        if bool(self.model) == bool(self.config):
            raise UserError("give either model (a checkpoint to begin with) or config (to train from scratch)")
        if self.config and not self.tokenizer:
            raise UserError("training from scratch needs a tokenizer")
        self.stage = self.stage or ("pretrain" if self.config else "continue")
        if self.stage not in STAGES:
            raise UserError(f"stage must be one of {', '.join(STAGES)}, got {self.stage!r}")
        if bool(self.config) != (self.stage == "pretrain"):
            raise UserError(f"stage {self.stage} needs {'config' if self.stage == 'pretrain' else 'model'}")
        self.fields = _mapping("model_fields", self.model_fields)
        self.lora_fields = _mapping("lora", self.lora)


def _mapping(name: str, text: str) -> dict:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise UserError(f"{name} must be {{field: value, ...}}, got {text!r}")
    return value


class Recipe(NamedTuple):
    """The arguments of a run; `training` is `QSparseSFTConfig` where `run.stage` is `sft`."""

    run: RunArguments
    data: DataArguments
    training: QSparseArguments


class _Parser(HfArgumentParser):
    def error(self, message: str) -> None:
        raise UserError(message)


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice, where YAML silently takes the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.YAMLError(f"{key.value!r} stands twice, again in line {key.start_mark.line + 1}")
            seen.add(key.value)
        return super().construct_mapping(node, deep)


# YAML 1.1 takes 1e-6 for text, as it has no dot.
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?\d+[eE][-+]?\d+$"), list("-+0123456789"))


def _read_yaml(text: str, source: str) -> dict[str, str | list[str] | None]:
    """The top-level fields of a YAML text, scalars as they are written, mappings as JSON.

    The command-line parser knows each field's type; YAML would read `no` as false and 1e-4 as a string.
    """
    try:
        typed, written = yaml.load(text, _Loader), yaml.load(text, yaml.BaseLoader)
    except (yaml.YAMLError, TypeError) as error:  # TypeError: a key that is a list
        raise UserError(f"{source} is not YAML: {' '.join(str(error).split())}") from None
    if typed is None:
        raise UserError(f"{source} is empty")
    if not isinstance(typed, dict):
        raise UserError(f"{source} must hold `key: value` lines, got {type(typed).__name__}")

    def as_argument(value: object, scalar: object) -> object:
        return json.dumps(value, default=str) if isinstance(value, dict) else scalar

    values = {}
    for key, value in typed.items():
        scalar = written[key]
        if isinstance(value, list):
            values[key] = [as_argument(*pair) for pair in zip(value, scalar, strict=True)]
        else:
            values[key] = None if value is None else as_argument(value, scalar)
    return values


def parse(config: str, overrides: list[str]) -> Recipe:
    """Read a run's YAML file and the `key=value` overrides after it; values are YAML too.

    Raises:
        UserError: an unreadable file, an unknown key, a value of the wrong type, or `stage: sft` without TRL.
    """
    try:
        text = Path(config).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{config}: {first_line(error)}") from None
    values = _read_yaml(text, config)
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise UserError(f"overrides look like key=value, got {override!r}")
        values |= _read_yaml(f"{key}: {value}", override)

    training = QSparseTrainingArguments
    if values.get("stage") == "sft":
        from .sft import QSparseSFTConfig as training
    kinds = (RunArguments, DataArguments, training)
    defaults = {
        f.name: f.default_factory() if f.default is MISSING else f.default
        for kind in kinds
        for f in dataclasses.fields(kind)
    }
    arguments = []
    for key, value in values.items():
        if key not in defaults:
            close = difflib.get_close_matches(key, defaults, n=1)
            raise UserError(f"{config}: unknown key {key!r}" + (f"; did you mean {close[0]!r}?" if close else ""))
        if value is None or value == []:
            if defaults[key] not in (None, [], value):
                raise UserError(f"{config}: {key} cannot be empty; leave it out for its default, {defaults[key]!r}")
        elif isinstance(value, list):
            arguments += [f"--{key}", *value]
        else:
            arguments.append(f"--{key}={value}")
    try:
        return Recipe(*_Parser(kinds, allow_abbrev=False).parse_args_into_dataclasses(arguments))
    except UserError as error:
        raise UserError(f"{config}: {error}") from error
    except (ValueError, TypeError, ImportError) as error:
        raise UserError(f"{config}: {first_line(error)}") from error
