"""One YAML file is one training run, from scratch or from a checkpoint."""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, PreTrainedModel, set_seed
from transformers.trainer_callback import ProgressCallback
from transformers.trainer_utils import get_last_checkpoint

from ..errors import UserError, user_errors
from .data import DataArguments, collate_packed, load_documents, pack_dataset
from .trainer import QSparseTrainer, QSparseTrainingArguments


@dataclass
class ModelArguments:
    """What is trained."""

    model: str | None = field(
        default=None, metadata={"help": "Checkpoint to continue: a folder or Hub id, Q-Sparse or dense."}
    )
    config: str | None = field(
        default=None, metadata={"help": "Or a model configuration (JSON) to train from scratch."}
    )
    tokenizer: str | None = field(default=None, metadata={"help": "Tokenizer folder or Hub id; default: the model's."})
    model_fields: str = field(
        default="{}", metadata={"help": "Fields of the configuration to change, {sparsity: 0.6} for instance."}
    )
    dtype: str = field(default="float32", metadata={"help": "Of the weights; use bf16: true for mixed precision."})

    def __post_init__(self) -> None:
        if bool(self.model) == bool(self.config):
            raise UserError("give either model (a checkpoint to continue) or config (to train from scratch)")
        if self.config and not self.tokenizer:
            raise UserError("training from scratch needs a tokenizer")
        try:
            self.fields = json.loads(self.model_fields)
        except ValueError:
            self.fields = None
        if not isinstance(self.fields, dict):
            raise UserError(f"model_fields must be {{field: value, ...}}, got {self.model_fields!r}")


class _LossBar(ProgressCallback):
    """The progress bar with the latest losses on it, where the default prints every log entry in full."""

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if self.training_bar is not None:
            shown = {name: logs[name] for name in ("loss", "eval_loss", "sparsity/all") if name in logs}
            self._shown = getattr(self, "_shown", {}) | shown
            self.training_bar.set_postfix({name: f"{value:.3f}" for name, value in self._shown.items()})


class _Loader(yaml.SafeLoader):
    """YAML where `no` and `off` are words, as `save_strategy: no` means them; only true and false are booleans."""


_BOOL = "tag:yaml.org,2002:bool"
_Loader.yaml_implicit_resolvers = {
    letter: [(tag, pattern) for tag, pattern in resolvers if tag != _BOOL]
    for letter, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_BOOL, re.compile("^(true|True|false|False)$"), list("tTfF"))


class _Parser(HfArgumentParser):
    def error(self, message: str) -> None:
        raise UserError(message)


def parse(config: str, overrides: list[str]) -> tuple[ModelArguments, DataArguments, QSparseTrainingArguments]:
    """Read a run's YAML file and the `key=value` overrides after it; values are YAML too.

    Raises:
        UserError: an unreadable file, an unknown key or a value of the wrong type.
    """
    try:
        values = yaml.load(Path(config).read_text(), _Loader)
    except OSError as error:
        raise UserError(f"{config}: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{config} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise UserError(f"{config} must hold `key: value` lines, got {type(values).__name__}")
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise UserError(f"overrides look like key=value, got {override!r}")
        try:
            values[key] = yaml.load(value, _Loader)
        except yaml.YAMLError:
            values[key] = value

    # Through the command-line parser, which knows the type of each field: YAML reads 1e-4 as a string.
    arguments = []
    for key, value in values.items():
        if value is None:
            continue
        if isinstance(value, list):
            arguments += [f"--{key}", *map(str, value)]
        else:
            arguments.append(f"--{key}={json.dumps(value) if isinstance(value, dict) else value}")
    parser = _Parser((ModelArguments, DataArguments, QSparseTrainingArguments), allow_abbrev=False)
    try:
        return parser.parse_args_into_dataclasses(arguments)
    except (ValueError, TypeError, ImportError) as error:
        raise UserError(f"{config}: {error}") from error


def load_model(arguments: ModelArguments) -> PreTrainedModel:
    """The model to train: a checkpoint's, or one of a configuration with fresh weights."""
    with user_errors():
        if arguments.model:
            return AutoModelForCausalLM.from_pretrained(arguments.model, dtype=arguments.dtype, **arguments.fields)
        config = AutoConfig.from_pretrained(arguments.config, **arguments.fields)
        return AutoModelForCausalLM.from_config(config, dtype=arguments.dtype)


def train(config: str, overrides: list[str] | None = None) -> QSparseTrainer:
    """Run the training that a YAML file describes; `output_dir` then holds the model, its tokenizer and the metrics.

    Args:
        config: the YAML file: fields of `ModelArguments`, `DataArguments` and `QSparseTrainingArguments`.
        overrides: `key=value` strings that win over it. `resume_from_checkpoint=last` goes on where a run stopped.

    Raises:
        UserError: anything in them that cannot be run, before anything is written.
    """
    model_arguments, data_arguments, training_arguments = parse(config, overrides or [])
    resume = _checkpoint_to_resume(training_arguments)
    set_seed(training_arguments.seed)

    with user_errors():
        tokenizer = AutoTokenizer.from_pretrained(model_arguments.tokenizer or model_arguments.model)
    model = load_model(model_arguments)
    with training_arguments.main_process_first(desc="preparing data"):
        train_set, eval_set = (
            pack_dataset(documents, tokenizer, data_arguments.text_column, data_arguments.sequence_length)
            if documents is not None
            else None
            for documents in load_documents(data_arguments)
        )

    trainer = QSparseTrainer(
        model=model,
        args=training_arguments,
        train_dataset=train_set,
        eval_dataset=eval_set,
        data_collator=collate_packed,
        processing_class=tokenizer,
    )
    if not training_arguments.disable_tqdm:
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(_LossBar)
    result = trainer.train(resume_from_checkpoint=resume)
    trainer.save_model()
    trainer.save_state()
    trainer.save_metrics("train", result.metrics)
    if eval_set is not None:
        trainer.save_metrics("eval", trainer.evaluate())
    return trainer


def _checkpoint_to_resume(arguments: QSparseTrainingArguments) -> str | None:
    last = get_last_checkpoint(arguments.output_dir) if Path(arguments.output_dir).is_dir() else None
    if arguments.resume_from_checkpoint in ("last", "true", "True"):
        return last
    if last is not None and arguments.resume_from_checkpoint is None:
        raise UserError(
            f"{arguments.output_dir} holds {Path(last).name} of an earlier run; "
            "go on with resume_from_checkpoint=last, or choose another output_dir"
        )
    return arguments.resume_from_checkpoint
