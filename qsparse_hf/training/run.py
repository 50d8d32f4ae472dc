"""One recipe is one run: from scratch, continuing a checkpoint, or fine-tuning one."""

import gc
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import cast

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerState,
    TrainingArguments,
    get_scheduler,
    set_seed,
)
from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer_callback import ProgressCallback
from transformers.training_args import OptimizerNames
from transformers.utils import logging

from ..checkpoint import DTYPES
from ..configuration import check_config
from ..errors import Interrupted, UserError, check_writable, one_line, user_errors
from ..loading import load_tokenizer
from ..losses import compare, eval_losses
from ..model_card import is_repository_id, non_defaults
from ..modeling.backend import choose
from ..modeling.sparsify import IMPLS
from ..sources import Source
from ..weights import PACKED_IS_NOT_TRAINED
from .arguments import CONTROL, QSparseArguments
from .control import overrides_of_control, read_control, write_control
from .data import DataArguments, collate_packed, pack_on_disk
from .faults import complete_checkpoints
from .recipe import BOOLEANS, Recipe, RunArguments, parse
from .schedule import SecondStage, check_quantization_ramp
from .streaming import PackedStream
from .trainer import QSparseTrainer, QSparseTrainerMixin
from .training_report import write_training_report

logger = logging.get_logger(__name__)


class _ProgressBar(ProgressCallback):
    """The progress bar with the latest figures on it, where the default prints every log entry in full."""

    def __init__(self, title: str) -> None:
        super().__init__()
        self._title = title
        self._shown: dict[str, str] = {}

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        if self.training_bar is not None:
            self.training_bar.set_description(self._title)

    def close(self) -> None:
        """Leave the line to what is said next; an error in training would otherwise be said behind the bar."""
        if self.training_bar is not None:
            self.training_bar.close()
            self.training_bar = None

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if self.training_bar is not None:
            shown = ("loss", *eval_losses(logs), "sparsity/all")
            self._shown |= {name: f"{logs[name]:.3f}" for name in shown if name in logs}
            if "tokens_per_second" in logs:
                self._shown["tokens/s"] = f"{logs['tokens_per_second']:,.0f}"
            self.training_bar.set_postfix(self._shown)


def load_model(arguments: RunArguments, trained: str | None = None) -> PreTrainedModel | PeftModel:
    """The model to train: a checkpoint's, or a configuration's with fresh weights; with adapters where asked for.

    Args:
        arguments: what to load.
        trained: a checkpoint of a run with these arguments, whose weights or adapters are wanted instead.
    """
    if trained and not arguments.lora:
        arguments = replace(arguments, stage="continue", model=trained, config=None)
    source = arguments.source
    with user_errors(source):
        config, unknown = AutoConfig.from_pretrained(source, **arguments.model_fields, return_unused_kwargs=True)
        if unknown:
            raise UserError(f"model_fields: {config.model_type} has no field {next(iter(unknown))!r}")
        if arguments.model:
            model = AutoModelForCausalLM.from_pretrained(
                source, config=config, dtype=arguments.dtype, use_safetensors=True
            )
        else:
            model = AutoModelForCausalLM.from_config(config, dtype=arguments.dtype)
    if not arguments.lora:
        return model
    if trained:
        return PeftModel.from_pretrained(model, trained, is_trainable=True)
    with user_errors("lora"):
        return get_peft_model(model, LoraConfig(**{"task_type": "CAUSAL_LM"} | arguments.lora))


def train(config: str, overrides: list[str] | None = None) -> QSparseTrainerMixin:
    """Run the training that a recipe describes; `output_dir` then holds the model, its tokenizer, metrics and curves.

    With `control`, the dense twin is trained first, into `output_dir/control`. `max_steps=0` evaluates what the run and
    its control would begin with, writes the losses as `initial_eval_loss` into `initial_results.json` and
    `all_results.json`, and neither reads the training data nor saves a model.

    Args:
        config: the YAML file: fields of `RunArguments`, `DataArguments` and `QSparseTrainingArguments`, which for
            `stage: sft` are `QSparseSFTConfig`.
        overrides: `key=value` strings that win over it. `resume_from_checkpoint=last` goes on where a run stopped.

    Raises:
        UserError: anything in them that cannot be run, before training starts; data that ends, a loss that is not
            finite or a checkpoint that cannot be written, while it runs.
        Interrupted: SIGTERM or Ctrl-C came; a checkpoint was saved.
    """
    overrides = overrides or []
    recipe = parse(config, overrides)
    _check(recipe)
    resume = _checkpoint_to_resume(recipe.training)
    check_config(recipe.run.source, recipe.run.model_fields)
    with user_errors(recipe.run.source):
        if getattr(AutoConfig.from_pretrained(recipe.run.source), "packed_as", None):
            raise UserError(f"{recipe.run.source}: {PACKED_IS_NOT_TRAINED}")
        check_quantization_ramp(
            recipe.training, AutoConfig.from_pretrained(recipe.run.source, **recipe.run.model_fields)
        )
    history = _train_control(parse(config, [*overrides, *overrides_of_control(recipe)])) if recipe.run.control else []
    return _run(recipe, resume, history, name=Path(config).name)


def _train_control(control: Recipe) -> list[dict[str, float]]:
    """Train a control, unless that has been done, and leave nothing of it in memory but its log."""
    _check(control)
    history = read_control(control) if control.training.max_steps else None
    if history is not None:
        logger.warning(f"{control.training.output_dir} holds the dense control, which is not trained again")
        return history
    trainer = _run(control, _checkpoint_to_resume(control.training), [], name=CONTROL)
    history = trainer.state.log_history
    if control.training.max_steps and trainer.is_world_process_zero():
        write_control(control, history)
    trainer.accelerator.wait_for_everyone()  # every process may learn from it
    trainer.accelerator.free_memory()
    del trainer
    gc.collect()
    torch._dynamo.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return history


def _run(recipe: Recipe, resume: str | None, control: list[dict[str, float]], name: str) -> QSparseTrainerMixin:
    """Train what a recipe says and write all that a run leaves, its losses beside those of its dense control."""
    arguments = recipe.training
    if arguments.eval_on_start is None:
        arguments.eval_on_start = recipe.run.stage == "continue" and bool(recipe.data.eval_sources)
    if arguments.max_steps == 0:
        arguments.distill_from = None  # nothing is learnt, and a control is not there yet
    set_seed(arguments.seed)
    if arguments.device.type == "cpu":
        arguments.dataloader_pin_memory = False  # it only warns there

    tokenizer = load_tokenizer(recipe.run.tokenizer or recipe.run.source)
    finished = _finished(resume, arguments)
    model = load_model(recipe.run, resume if finished else None)
    longest = model.config.max_position_embeddings
    if recipe.data.sequence_length > longest:
        raise UserError(
            f"sequence_length must be at most the model's max_position_embeddings ({longest}), "
            f"got {recipe.data.sequence_length}"
        )
    build = _fine_tuner if recipe.run.stage == "sft" else _language_modeller
    with user_errors(name):
        trainer = build(recipe, model, tokenizer)
    trainer.control_history = control
    trainer.facts |= {
        "train_data": recipe.data.train_data,
        "sequence_length": recipe.data.sequence_length,
        "lora": recipe.run.lora,
    }
    trainer.settings = non_defaults(recipe.run) | non_defaults(recipe.data)
    sources = (source.dataset for source in recipe.data.train_sources)
    trainer.datasets = tuple(each for each in sources if each and is_repository_id(each))
    if finished or arguments.max_steps == 0:
        for callback in get_reporting_integration_callbacks(arguments.report_to):  # they log what is trained
            trainer.remove_callback(callback)
    if arguments.max_steps == 0:
        trainer.evaluate()
        _save_losses(trainer, control)
        return trainer
    if finished:
        trainer.state = finished
    else:
        if trainer.is_world_process_zero() and recipe.run.model and not recipe.run.lora:
            _say_growth(recipe.run.model, model, arguments)
        _train(trainer, resume, Path(name).stem)
    try:
        trainer.save_model()
        trainer.save_state()
    except Exception as error:  # safetensors, torch and the file system each raise their own
        raise UserError(
            f"{arguments.output_dir}: the trained model could not be written: {one_line(error)}; "
            "resume_from_checkpoint=last tries again"
        ) from error
    if trainer.eval_dataset is not None:
        trainer.save_metrics("eval", trainer.evaluate())
    _save_losses(trainer, control)
    if trainer.is_world_process_zero():
        write_training_report(trainer.state, _output_dir(arguments), title=Path(name).stem)
    with user_errors(arguments.output_dir):
        trainer.create_model_card()  # again, with what was measured since the model was saved
    return trainer


def _say_growth(source: str, model: nn.Module, arguments: QSparseArguments) -> None:
    """Say how large the run's files are where the trained model will take more room than the one it came from."""
    with user_errors(source):
        came_as = AutoConfig.from_pretrained(source).dtype
    trained_as = next(model.parameters()).dtype
    saved_as = DTYPES[arguments.save_dtype] if arguments.save_dtype else trained_as
    if came_as is None or saved_as.itemsize <= came_as.itemsize:
        return
    weights = sum(weight.numel() for weight in model.parameters()) / 1e9
    before, after, name = weights * came_as.itemsize, weights * saved_as.itemsize, str(came_as).removeprefix("torch.")
    state = ""
    if arguments.optim in (OptimizerNames.ADAMW_TORCH, OptimizerNames.ADAMW_TORCH_FUSED):  # two moments of every weight
        state = f", every checkpoint {3 * weights * trained_as.itemsize:.2f} GB with the optimizer's state"
    logger.warning(
        f"{source} holds {name} weights, {before:.2f} GB; the trained model will take {after:.2f} GB in "
        f"{str(saved_as).removeprefix('torch.')}{state}. save_dtype={name} writes the model in {before:.2f} GB again"
    )


def _save_losses(trainer: QSparseTrainerMixin, control: list[dict[str, float]]) -> None:
    """Write the losses before the first update and those of the control, also into `all_results.json`."""
    history = trainer.state.log_history
    if initial := {name: entry[name] for entry in history for name in entry if name.startswith("initial_")}:
        trainer.save_metrics("initial", initial)
    if control:
        trainer.save_metrics("control", compare(history, control))


def _language_modeller(
    recipe: Recipe, model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase
) -> QSparseTrainer:
    data, arguments = recipe.data, recipe.training
    with arguments.main_process_first(desc="preparing data"):
        evaluated = _each_text(data, lambda sources: pack_on_disk(sources, tokenizer, data, arguments.seed))
        trained: Dataset | PackedStream | None = None
        if arguments.max_steps == 0:
            pass
        elif data.streaming:
            trained = PackedStream(data.train_sources, tokenizer, data, arguments.seed)
        else:
            rows = pack_on_disk(data.train_sources, tokenizer, data, arguments.seed)
            trained = _whole_updates(rows, arguments, data.repeat_data)
    return QSparseTrainer(
        model=model,
        args=arguments,
        train_dataset=trained,
        eval_dataset=evaluated,
        data_collator=collate_packed,
        processing_class=tokenizer,
    )


def _each_text(data: DataArguments, read: Callable[[list[Source]], Dataset]) -> Dataset | dict[str, Dataset] | None:
    """The evaluation texts, as the Trainer takes them: one, several by name, or none."""
    texts = {name: read(sources) for name, sources in data.eval_sources.items()}
    return texts.get("", texts) or None


def _fine_tuner(
    recipe: Recipe, model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase
) -> QSparseTrainerMixin:
    from .sft import QSparseSFTConfig, QSparseSFTTrainer, learnable, prepare_tokenizer, read_examples, truncated

    data, arguments = recipe.data, recipe.training
    assert isinstance(arguments, QSparseSFTConfig)  # as a recipe has it where `stage` is sft
    if arguments.max_length not in (None, type(arguments).max_length, data.sequence_length):
        raise UserError(f"max_length is sequence_length here ({data.sequence_length}), got {arguments.max_length}")
    prepare_tokenizer(tokenizer, arguments)
    with arguments.main_process_first(desc="preparing data"):
        trained = read_examples(data.train_sources, tokenizer, data, arguments)
        evaluated = _each_text(data, lambda sources: read_examples(sources, tokenizer, data, arguments))
        if arguments.padding_free and not arguments.packing:  # TRL cuts nothing then, and wants no length named
            arguments.max_length = None
            mode = arguments.truncation_mode
            trained = learnable(truncated(trained, data.sequence_length, mode))
            if isinstance(evaluated, dict):
                evaluated = {name: truncated(rows, data.sequence_length, mode) for name, rows in evaluated.items()}
            elif evaluated is not None:
                evaluated = truncated(evaluated, data.sequence_length, mode)
        else:
            arguments.max_length = data.sequence_length
    arguments.assistant_only_loss = None  # the labels are there
    trainer = QSparseSFTTrainer(
        model=model, args=arguments, train_dataset=trained, eval_dataset=evaluated, processing_class=tokenizer
    )
    arguments.max_length = data.sequence_length
    with arguments.main_process_first(desc="looking for answers"):
        learnt = learnable(trainer.train_dataset)
    if not arguments.packing and len(learnt) < len(trained):  # TRL has dropped them without a word
        logger.warning(
            f"{len(trained) - len(learnt):,} of {len(trained):,} examples have no answer within sequence_length"
        )
    trainer.train_dataset = _whole_updates(learnt, arguments, data.repeat_data)
    return trainer


def _check(recipe: Recipe) -> None:
    if recipe.training.n_gpu > 1:
        raise UserError(
            f"one process sees {recipe.training.n_gpu} GPUs; start one for each with accelerate launch or torchrun, "
            "or show it a single one with CUDA_VISIBLE_DEVICES"
        )
    arguments = recipe.training
    if recipe.data.streaming and arguments.max_steps < 0:
        raise UserError("a stream has no known length: set max_steps to the number of updates")
    for name, asks in (
        ("max_steps=0 evaluates alone and", arguments.max_steps == 0),
        ("eval_on_start", arguments.eval_on_start),
    ):
        if asks and not recipe.data.eval_sources:
            raise UserError(f"{name} needs eval_data")
    if arguments.distill_from == CONTROL:
        if not recipe.run.control:
            raise UserError(f"distill_from: {CONTROL} is the run's own dense control, which needs control=true")
    elif arguments.distill_from is not None:
        check_config(arguments.distill_from, named=f"distill_from: {arguments.distill_from}")
    try:
        choose(IMPLS, [torch.empty(1, device=arguments.device)], None)  # QSPARSE_BACKEND may name what cannot run
    except ValueError as error:
        raise UserError(str(error)) from None
    with user_errors("optimizer or schedule"):
        optimizer_class, options = Trainer.get_optimizer_cls_and_kwargs(arguments)
        optimizer = optimizer_class([torch.zeros(1, requires_grad=True)], **options)
        kwargs = cast(dict | None, arguments.lr_scheduler_kwargs)  # a text has been parsed
        scheduler = get_scheduler(arguments.lr_scheduler_type, optimizer, 1, 10, scheduler_specific_kwargs=kwargs)
        SecondStage(arguments).attach(scheduler, optimizer, 10)
    with user_errors("dataloader"):
        DataLoader(
            TensorDataset(torch.zeros(1)),
            num_workers=arguments.dataloader_num_workers,
            prefetch_factor=arguments.dataloader_prefetch_factor,
            persistent_workers=arguments.dataloader_persistent_workers,
            multiprocessing_context=arguments.dataloader_multiprocessing_context,
        )
    if backend := arguments.torch_compile_backend:
        with user_errors("torch_compile"):
            torch.compile(nn.Identity(), backend=backend, mode=arguments.torch_compile_mode)
    with user_errors("report_to"):
        get_reporting_integration_callbacks(arguments.report_to)
    if arguments.process_index == 0:
        check_writable(_output_dir(arguments) / "trainer_state.json")


def _output_dir(arguments: TrainingArguments) -> Path:
    """Where the run goes; Transformers chooses a folder where nobody does."""
    return Path(cast(str, arguments.output_dir))  # None until they are made


def _checkpoint_to_resume(arguments: QSparseArguments) -> str | None:
    if arguments.max_steps == 0:
        return None
    complete = complete_checkpoints(_output_dir(arguments))
    checkpoint = arguments.resume_from_checkpoint
    asked = BOOLEANS.get((checkpoint or "").lower())
    if asked is False:
        checkpoint = None
    if asked and not complete:
        raise UserError(
            f"{arguments.output_dir} holds no complete checkpoint to go on from; "
            "resume_from_checkpoint=last begins at update 0 where there is none"
        )
    if asked or checkpoint == "last":
        if not complete:
            logger.warning(f"{arguments.output_dir} holds no complete checkpoint; the run begins at update 0")
        return str(complete[-1]) if complete else None
    if complete and checkpoint is None:
        raise UserError(
            f"{arguments.output_dir} holds {complete[-1].name} of an earlier run; "
            "go on with resume_from_checkpoint=last, or choose another output_dir"
        )
    with user_errors("resume_from_checkpoint"):
        if checkpoint is not None and not (Path(checkpoint) / "trainer_state.json").exists():
            raise UserError(
                f"resume_from_checkpoint must be `last`, true, false or a checkpoint's folder, got {checkpoint!r}"
            )
    return checkpoint


def _whole_updates(rows: Dataset, arguments: QSparseArguments, repeat: bool) -> Dataset:
    """`rows` without what does not fill an update, so that an epoch is the same on any number of processes."""
    per_update = arguments.rows_per_update
    if len(rows) > per_update:
        rows = rows.select(range(len(rows) // per_update * per_update))
    needed = arguments.max_steps * per_update
    if needed > len(rows) and not repeat:
        raise UserError(
            f"max_steps {arguments.max_steps} needs {needed:,} sequences and the training data holds {len(rows):,}: "
            f"set repeat_data=true to go over them again, or max_steps={math.ceil(len(rows) / per_update)}"
        )
    return rows


def _finished(checkpoint: str | None, arguments: QSparseArguments) -> TrainerState | None:
    """The state of a run that was stopped after its last update; the Trainer would train one more."""
    if checkpoint is None:
        return None
    state = TrainerState.load_from_json(str(Path(checkpoint) / "trainer_state.json"))
    planned: float = arguments.max_steps
    if planned < 0:
        planned = state.max_steps if state.num_train_epochs == math.ceil(arguments.num_train_epochs) else math.inf
    if state.global_step > planned:
        raise UserError(f"{checkpoint} is further than max_steps {planned}")
    return state if state.global_step == planned else None


def _train(trainer: QSparseTrainerMixin, resume: str | None, title: str) -> None:
    bar = None
    if not trainer.args.disable_tqdm:
        bar = _ProgressBar(title)
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(bar)
    try:
        result = trainer.train(resume_from_checkpoint=resume)
    except ImportError as error:  # a package that an argument asks for, liger-kernel for one, is looked for only here
        raise UserError(one_line(error)) from error
    finally:
        if bar:
            bar.close()
    if isinstance(trainer.train_dataset, PackedStream) and trainer.train_dataset.check.skipped:
        logger.warning(str(trainer.train_dataset.check))
    _check_end(trainer)
    trainer.save_metrics("train", result.metrics)


def _check_end(trainer: QSparseTrainerMixin) -> None:
    """Say why a training ended before its last update."""
    state, data = trainer.state, trainer.train_dataset
    if state.global_step >= state.max_steps:
        return
    if stopped_by := trainer.heartbeat.stopped_by:
        saved = complete_checkpoints(_output_dir(trainer.args))[-1]
        raise Interrupted(
            stopped_by,
            f"stopped by {stopped_by.name} after update {state.global_step} of {state.max_steps}; {saved} is saved, "
            "resume_from_checkpoint=last goes on from it",
        )
    if isinstance(data, PackedStream):
        held = f" of {data.rows:,} sequences" if data.rows is not None else ""
        raise UserError(
            f"the training data{held} ended after update {state.global_step} of {state.max_steps}, which is saved; "
            "go on with resume_from_checkpoint=last and repeat_data=true"
        )
