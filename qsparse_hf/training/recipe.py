"""A recipe: one YAML file that describes one training run, and what the command line changes in it."""

import dataclasses
import difflib
import math
import re
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, field
from enum import Enum
from inspect import isclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

import yaml

from ..checkpoint import DTYPES
from ..errors import UserError, one_line, shortened
from ..modeling.configuration_qsparse import QSPARSE_FIELDS
from .arguments import QSparseArguments, QSparseTrainingArguments
from .data import DataArguments, texts_by_name

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
    model_fields: dict[str, Any] = field(
        default_factory=dict,
        metadata={"help": "Fields of the configuration to change, {sparsity: 0.6} for instance."},
    )
    dtype: str = field(default="float32", metadata={"help": "Of the weights; use bf16: true for mixed precision."})
    lora: dict[str, Any] = field(
        default_factory=dict,
        metadata={"help": "Train adapters: fields of PEFT's LoraConfig, {r: 16, target_modules: all-linear} say."},
    )

    control: bool = field(
        default=False,
        metadata={
            "help": "Train the dense twin first, on the same rows with the same settings, into OUTPUT_DIR/control."
        },
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
        dtypes = [*DTYPES, "auto"] if self.model else list(DTYPES)
        if self.dtype not in dtypes:
            raise UserError(f"dtype must be one of {', '.join(dtypes)}, got {shortened(self.dtype)!r}")

    @property
    def source(self) -> str:
        """Where the model's configuration is: `model` or `config`, of which one is given."""
        return self.model or self.config or ""


class Recipe(NamedTuple):
    """The arguments of a run; `training` is `QSparseSFTConfig` where `run.stage` is `sft`."""

    run: RunArguments
    data: DataArguments
    training: QSparseArguments


class _Value(NamedTuple):
    """A field's value: scalars as they are written, and where that is."""

    written: "_Written"
    where: str


_Written = str | list["_Written"] | dict[str, Any] | None

# What a mapping in a recipe may hold: what JSON can.
_TAGS = {name: f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float", "str", "seq", "map")}
_MERGE = "tag:yaml.org,2002:merge"
_MOST_CHARACTERS = 1_000_000  # of a recipe whose aliases are written out


class _Loader(yaml.SafeLoader):
    """YAML without what recipes have no use for: dates and other tags, keys that are no text, keys that stand twice.

    All of it raises `yaml.MarkedYAMLError`.
    """

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):  # of a node that was looked at
            return super().compose_node(parent, index)
        node: Any = super().compose_node(parent, index)
        if node.tag not in {*_TAGS.values(), _MERGE}:
            raise yaml.MarkedYAMLError(problem=f"unknown tag {node.tag}", problem_mark=node.start_mark)
        if isinstance(node, yaml.MappingNode):
            node.value = [(self._as_text(key), value) for key, value in node.value]
            seen = set()
            for key, _ in node.value:
                if key.value in seen:
                    raise yaml.MarkedYAMLError(problem=f"{key.value!r} stands twice", problem_mark=key.start_mark)
                seen.add(key.value)
        return node

    @staticmethod
    def _as_text(key: yaml.Node) -> yaml.ScalarNode:
        """A key as it is written, where YAML reads `on` as true."""
        if not isinstance(key, yaml.ScalarNode):
            raise yaml.MarkedYAMLError(problem="a key must be text", problem_mark=key.start_mark)
        tag = _MERGE if key.tag == _MERGE else _TAGS["str"]
        return yaml.ScalarNode(tag, key.value, key.start_mark, key.end_mark)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError):  # `!!bool maybe`, `0b_`, 5,000 digits
            kind = node.tag.rpartition(":")[2]
            problem = f"{shortened(str(node.value))!r} is no {kind}"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark) from None


_Loader.yaml_constructors = {tag: yaml.SafeLoader.yaml_constructors[tag] for tag in _TAGS.values()}
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag in {*_TAGS.values(), _MERGE}]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
# YAML 1.1 takes 1e-6 for text, as it has no dot.
_Loader.add_implicit_resolver(_TAGS["float"], re.compile(r"[-+]?\d+[eE][-+]?\d+$"), list("-+0123456789"))


def _characters(node: yaml.Node, known: dict[int, float]) -> float:
    """Characters of `node` with its aliases written out; infinitely many where it contains itself."""
    if id(node) not in known:
        known[id(node)] = math.inf  # until it is known: met again meanwhile, it is within itself
        if isinstance(node, yaml.ScalarNode):
            characters: float = len(node.value)
        elif isinstance(node, yaml.SequenceNode):
            characters = sum(_characters(item, known) for item in node.value)
        else:
            characters = sum(_characters(item, known) for pair in node.value for item in pair)
        known[id(node)] = 1 + characters
    return known[id(node)]


@contextmanager
def _yaml(text: str, source: str) -> Iterator[tuple[_Loader, yaml.Node | None]]:
    """The root of a YAML text, and the loader that constructs its parts; None for an empty text.

    Raises:
        UserError: it is no YAML, or too large once its aliases are written out.
    """
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
        characters = 0 if root is None else _characters(root, {})
        if characters == math.inf:
            raise UserError(f"{source} is not YAML: an alias stands within what it repeats")
        if characters > _MOST_CHARACTERS:
            raise UserError(
                f"{source} is too large: with its aliases written out, at most {_MOST_CHARACTERS:,} characters are "
                "allowed"
            )
        yield loader, root
    except yaml.MarkedYAMLError as error:
        said = ": ".join(part for part in (error.context, error.problem) if part)
        mark = error.problem_mark or error.context_mark
        raise UserError(f"{source} is not YAML{f', line {mark.line + 1}' if mark else ''}: {said}") from None
    except yaml.YAMLError as error:  # characters that no YAML holds
        raise UserError(f"{source} is not YAML: {one_line(error)}") from None
    except RecursionError:
        raise UserError(f"{source} is not YAML: lists or mappings stand too deep within each other") from None


def _read_node(node: yaml.Node, loader: _Loader) -> _Written:
    """Scalars as they are written: their field's type is known, while YAML would read `no` as false."""
    if isinstance(node, yaml.SequenceNode):
        return [_read_node(item, loader) for item in node.value]
    if isinstance(node, yaml.MappingNode):
        return loader.construct_object(node, deep=True)
    return None if node.tag == _TAGS["null"] else node.value


def _read_file(config: str) -> dict[str, _Value]:
    try:
        text = Path(config).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:  # ValueError: no UTF-8, or a NUL in the name
        raise UserError(f"{shortened(config, 200)}: {one_line(error)}") from None
    with _yaml(text, config) as (loader, root):
        if root is None or root.tag == _TAGS["null"]:
            raise UserError(f"{config} is empty")
        if not isinstance(root, yaml.MappingNode):
            raise UserError(f"{config} must hold `key: value` lines")
        loader.flatten_mapping(root)
        return {
            key.value: _read_value(key.value, node, loader, f"{config}, line {key.start_mark.line + 1}")
            for key, node in root.value
        }


def _read_override(override: str) -> dict[str, _Value]:
    key, equals, text = override.partition("=")
    if not equals:
        raise UserError(f"overrides look like key=value, got {shortened(override)!r}")
    where = shortened(override)
    with _yaml(text, where) as (loader, root):
        return {key: _Value("", where) if root is None else _read_value(key, root, loader, where)}


def _read_value(key: str, node: yaml.Node, loader: _Loader, where: str) -> _Value:
    try:
        return _Value(_read_node(node, loader), where)
    except yaml.MarkedYAMLError as error:
        raise UserError(f"{where}: {key}: {error.problem}") from None


BOOLEANS: dict[str, bool] = {**yaml.SafeLoader.bool_values, "1": True, "0": False}
"""The words for true and false, in lower case."""


_RANK: dict[Any, int] = {
    str: 1,
    list: 2,
}  # text takes what the other members of a union do not, and a list takes one text, too
_NAMES: dict[Any, str] = {
    NoneType: "null",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    dict: "a mapping",
}


def _members(kind: Any) -> list[Any]:
    """The types of a union, or the type itself."""
    members = list(get_args(kind)) if get_origin(kind) in (Union, UnionType) else [kind]
    if any(isclass(member) and issubclass(member, Enum) for member in members):
        members = [member for member in members if member is not str]  # Transformers makes the enumeration of it
    return members


def _convert(kind: Any, written: _Written) -> object:
    """What stands in a recipe, as a field of type `kind` takes it.

    Raises:
        ValueError: it takes none such; the message says what it takes.
    """
    members = _members(kind)
    for member in sorted(members, key=lambda member: _RANK.get(get_origin(member) or member, 0)):
        try:
            return _as_member(member, written)
        except (ValueError, LookupError):
            continue
    raise ValueError(f"must be {' or '.join(map(_name, members))}, got {shortened(repr(written))}")


def _as_member(member: Any, written: _Written) -> object:
    kind, choices = get_origin(member) or member, get_args(member)
    if (kind is NoneType and written is None) or (kind is dict and isinstance(written, dict)):
        return written
    if kind is list and written not in (None, ""):
        entries = written if isinstance(written, list) else [written]
        return [_convert(choices[0], entry) for entry in entries]
    if isinstance(written, str):
        if kind is bool:
            return BOOLEANS[written.lower()]
        if kind is Literal:
            return {str(choice).lower(): choice for choice in choices}[written.lower()]
        if kind in (int, float, str) or (isclass(kind) and issubclass(kind, Enum)):
            return kind(written)
    raise ValueError


def _name(member: Any) -> str:
    if get_origin(member) is Literal:
        return " or ".join(map(repr, get_args(member)))
    if isclass(member) and issubclass(member, Enum):
        return f"one of {', '.join(str(choice.value) for choice in member)}"
    kind = get_origin(member) or member
    if kind is list:
        entries = ("mappings" if get_origin(entry) is dict else _name(entry) for entry in _members(*get_args(member)))
        return f"a list of {' or '.join(entries)}"
    return _NAMES.get(kind, f"a {kind.__name__} (made in Python alone)")


# The least and the most that a number may be, where Transformers takes any and stops late or computes nonsense.
_RANGES: dict[str, tuple[float, float]] = {
    "max_steps": (-1, sys.maxsize),
    "seed": (0, 2**32 - 1),
    "data_seed": (0, 2**32 - 1),
    "label_smoothing_factor": (0, 1),
    "max_grad_norm": (0, math.inf),
    **dict.fromkeys(
        ("eval_steps", "eval_delay", "logging_steps", "neftune_noise_alpha", "router_aux_loss_coef", "warmup_steps"),
        (0, sys.float_info.max),
    ),
    "dataloader_num_workers": (0, sys.maxsize),
    **dict.fromkeys(
        (
            "dataloader_prefetch_factor",
            "dataset_num_proc",
            "ddp_bucket_cap_mb",
            "ddp_timeout",
            "eval_accumulation_steps",
            "max_length",
            "pad_to_multiple_of",
            "save_total_limit",
        ),
        (1, sys.maxsize),
    ),
}
# What an evaluation measures of every text.
_METRICS = ("loss", "runtime", "samples_per_second", "steps_per_second")
# What a text may be, where any is taken and a wrong one stops late or does nothing; beside the `choices` that a field's
# metadata names for the command line of Transformers, which alone holds to them.
_CHOICES: dict[str, Collection[object]] = {
    "include_num_input_tokens_seen": (True, False, "all", "non_padding", "no"),
    "loss_type": ("nll", "dft"),
}


def _check_value(field: dataclasses.Field, value: object, written: _Written) -> None:
    name = field.name
    choices = _CHOICES.get(name, field.metadata.get("choices"))
    if choices and value is not None and value not in choices:
        allowed = ", ".join(choice for choice in choices if isinstance(choice, str))
        raise ValueError(f"must be one of {allowed}, got {shortened(repr(written))}")
    if isinstance(value, int | float) and not isinstance(value, bool):
        most = sys.maxsize if isinstance(value, int) else sys.float_info.max
        low, high = _RANGES.get(name, (-most, most))
        if not low <= value <= high:
            limit = f"at least {low}" if value < low else f"at most {high}"
            if isinstance(value, float) and not math.isfinite(value):
                limit = "a finite number"
            raise ValueError(f"must be {limit}, got {shortened(str(written))}")


def parse(config: str, overrides: list[str]) -> Recipe:
    """Read a run's YAML file and the `key=value` overrides after it; values are YAML too.

    Raises:
        UserError: an unreadable file, an unknown key, a value of the wrong type or out of its range, or `stage: sft`
            without TRL.
    """
    values = _read_file(config)
    for override in overrides:
        values |= _read_override(override)

    training: type[QSparseArguments] = QSparseTrainingArguments
    if "stage" in values and values["stage"].written == "sft":
        from .sft import QSparseSFTConfig

        training = QSparseSFTConfig
    kinds = (RunArguments, DataArguments, training)
    fields = {field.name: field for kind in kinds for field in dataclasses.fields(kind) if field.init}
    types = {name: each for kind in kinds for name, each in get_type_hints(kind).items()}
    converted: dict[str, object] = {}
    for key, (written, where) in values.items():
        if key not in fields:
            close = difflib.get_close_matches(key, fields, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            if key in QSPARSE_FIELDS:
                hint = f"; it is a field of the model: write model_fields='{{{key}: ...}}'"
            raise UserError(f"{where}: unknown key {shortened(key)!r}{hint}")
        try:
            converted |= _field(fields[key], types[key], written)
        except ValueError as error:
            raise UserError(f"{where}: {key} {error}") from None
    if metric := converted.get("metric_for_best_model"):
        _check_metric(metric, converted.get("eval_data", []), values["metric_for_best_model"].where)
    try:
        recipe = Recipe(
            *(
                _build(kind, {name: converted[name] for name in converted if name in _field_names(kind)})
                for kind in kinds
            )
        )
    except UserError as error:
        raise UserError(f"{config}: {error}") from error
    if metric := recipe.training.metric_for_best_model:  # Transformers' choice, where the recipe makes none
        _check_metric(metric, recipe.data.eval_data, config)
    return recipe


def _check_metric(metric: object, eval_data: Any, where: str) -> None:
    """What chooses the best model must be measured; a recipe's trainer is given no `compute_metrics`."""
    texts = texts_by_name(eval_data) or [""]
    measured = [f"{name}_{each}" if name else each for name in texts for each in _METRICS]
    measured += [f"eval_{each}" for each in measured]
    if metric not in measured:
        raise UserError(
            f"{where}: metric_for_best_model must be one of {', '.join(measured)}, got {shortened(repr(metric))}"
        )


def _build(kind: type, arguments: dict[str, Any]) -> Any:
    try:
        return kind(**arguments)
    except UserError:
        raise
    except Exception as error:  # Transformers' checks, and those of the libraries that it hands values to
        said = one_line(error)
        if not any(re.search(rf"\b{name}\b", said) for name in arguments):
            said = f"{_culprit(kind, arguments)}: {said}"
        raise UserError(said) from error


def _culprit(kind: type, arguments: dict[str, Any]) -> str:
    """The argument without which `kind` would take the others."""
    for name in arguments:
        try:
            kind(**{other: value for other, value in arguments.items() if other != name})
        except Exception:
            continue
        return name
    return f"one of {', '.join(arguments)}"


def _field_names(kind: type) -> set[str]:
    return {field.name for field in dataclasses.fields(kind) if field.init}


def _field(field: dataclasses.Field, kind: Any, written: _Written) -> dict[str, object]:
    """A field's value by its name, or nothing where its default is meant.

    Raises:
        ValueError: the field does not take it.
    """
    if isinstance(written, list) and any(entry in (None, "") for entry in written):
        raise ValueError("has an empty entry")
    if isinstance(written, str) and not written.strip() and written != field.default:
        members = _members(kind)
        if str in members:  # from a variable of the shell that is not set, most likely: it is no choice of none
            raise ValueError(f"is empty text{'; write null for none' if NoneType in members else ''}")
        if all(get_origin(member) is not list for member in members):
            written = None  # `max_length=` is as `max_length: ` in the file
    try:
        value = _convert(kind, written)
    except ValueError:
        if written is not None:
            raise
        default = field.default if field.default_factory is MISSING else field.default_factory()
        if default not in ([], {}):
            raise ValueError(f"cannot be empty; leave it out for its default, {default!r}") from None
        return {}
    _check_value(field, value, written)
    return {field.name: value}
