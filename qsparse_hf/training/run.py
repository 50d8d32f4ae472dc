"""One YAML file is one training run, from scratch or from a checkpoint."""

import difflib
import json
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path

import yaml
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, PreTrainedModel, set_seed
from transformers.trainer_callback import ProgressCallback
from transformers.trainer_utils import get_last_checkpoint

from ..errors import UserError, first_line, user_errors
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

    def __init__(self) -> None:
        super().__init__()
        self._shown: dict[str, float] = {}

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if self.training_bar is not None:
            shown = {name: logs[name] for name in ("loss", "eval_loss", "sparsity/all") if name in logs}
            self._shown |= shown
            self.training_bar.set_postfix({name: f"{value:.3f}" for name, value in self._shown.items()})


class _Parser(HfArgumentParser):
    def error(self, message: str) -> None:
        raise UserError(message)


def _read_yaml(text: str, source: str) -> dict[str, str | list[str] | None]:
    """The top-level fields of a YAML text, scalars as they are written, mappings as JSON.

    The command-line parser knows each field's type; YAML would read `no` as false and 1e-4 as a string.
    """
    try:
        written, typed = yaml.load(text, yaml.BaseLoader), yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{source} is not YAML: {' '.join(str(error).split())}") from None
    if typed is None:
        raise UserError(f"{source} is empty")
    if not isinstance(typed, dict):
        raise UserError(f"{source} must hold `key: value` lines, got {type(typed).__name__}")
    pairs = zip(written.items(), typed.values(), strict=True)
    return {
        key: None if value is None else json.dumps(value) if isinstance(value, dict) else scalar
        for (key, scalar), value in pairs
    }


def parse(config: str, overrides: list[str]) -> tuple[ModelArguments, DataArguments, QSparseTrainingArguments]:
    """Read a run's YAML file and the `key=value` overrides after it; values are YAML too.

    Raises:
        UserError: an unreadable file, an unknown key or a value of the wrong type.
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

    kinds = (ModelArguments, DataArguments, QSparseTrainingArguments)
    defaults = {f.name: f.default_factory() if f.default is MISSING else f.default for k in kinds for f in fields(k)}
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
    parser = _Parser(kinds, allow_abbrev=False)
    try:
        return parser.parse_args_into_dataclasses(arguments)
    except (ValueError, TypeError, ImportError) as error:
        raise UserError(f"{config}: {error}") from error


def load_model(arguments: ModelArguments) -> PreTrainedModel:
    """The model to train: a checkpoint's, or one of a configuration with fresh weights."""
    source = arguments.model or arguments.config
    with user_errors(source):
        config, unknown = AutoConfig.from_pretrained(source, **arguments.fields, return_unused_kwargs=True)
        if unknown:
            raise UserError(f"model_fields: {config.model_type} has no field {next(iter(unknown))!r}")
        if arguments.model:
            return AutoModelForCausalLM.from_pretrained(source, config=config, dtype=arguments.dtype)
        return AutoModelForCausalLM.from_config(config, dtype=arguments.dtype)


def train(config: str, overrides: list[str] | None = None) -> QSparseTrainer:
    """Run the training that a YAML file describes; `output_dir` then holds the model, its tokenizer and the metrics.

    Args:
        config: the YAML file: fields of `ModelArguments`, `DataArguments` and `QSparseTrainingArguments`.
        overrides: `key=value` strings that win over it. `resume_from_checkpoint=last` goes on where a run stopped.

    Raises:
        UserError: anything in them that cannot be run, before training starts.
    """
    model_arguments, data_arguments, training_arguments = parse(config, overrides or [])
    resume = _checkpoint_to_resume(training_arguments)
    set_seed(training_arguments.seed)
    if training_arguments.device.type == "cpu":
        training_arguments.dataloader_pin_memory = False  # it only warns there

    tokenizer_source = model_arguments.tokenizer or model_arguments.model
    with user_errors(tokenizer_source):
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_source)
    model = load_model(model_arguments)
    longest = model.config.max_position_embeddings
    if data_arguments.sequence_length > longest:
        raise UserError(
            f"sequence_length must be at most the model's max_position_embeddings ({longest}), "
            f"got {data_arguments.sequence_length}"
        )
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
    if Path(arguments.output_dir).exists() and not Path(arguments.output_dir).is_dir():
        raise UserError(f"output_dir {arguments.output_dir} is a file")
    last = get_last_checkpoint(arguments.output_dir) if Path(arguments.output_dir).is_dir() else None
    if arguments.resume_from_checkpoint in ("last", "true", "True"):
        return last
    if last is not None and arguments.resume_from_checkpoint is None:
        raise UserError(
            f"{arguments.output_dir} holds {Path(last).name} of an earlier run; "
            "go on with resume_from_checkpoint=last, or choose another output_dir"
        )
    checkpoint = arguments.resume_from_checkpoint
    if checkpoint is not None and not (Path(checkpoint) / "trainer_state.json").exists():
        raise UserError(f"resume_from_checkpoint must be `last` or a checkpoint's folder, got {checkpoint!r}")
    return checkpoint
