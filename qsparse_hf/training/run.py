"""One recipe is one run: from scratch, continuing a checkpoint, or fine-tuning one."""

import math
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
    AutoTokenizer,
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
from transformers.utils import logging

from ..configuration import check_config
from ..errors import Interrupted, UserError, check_writable, one_line, user_errors
from ..model_card import is_repository_id, non_defaults
from ..modeling.backend import choose
from ..modeling.sparsify import IMPLS
from .arguments import QSparseArguments
from .data import collate_packed, pack_on_disk
from .faults import complete_checkpoints
from .recipe import BOOLEANS, Recipe, RunArguments, parse
from .streaming import PackedStream
from .trainer import QSparseTrainer, QSparseTrainerMixin
from .training_report import write_training_report

logger = logging.get_logger(__name__)


class _ProgressBar(ProgressCallback):
    """The progress bar with the latest figures on it, where the default prints every log entry in full."""

    _SHOWN = ("loss", "eval_loss", "sparsity/all")

    def __init__(self) -> None:
        super().__init__()
        self._shown: dict[str, str] = {}

    def close(self) -> None:
        """Leave the line to what is said next; an error in training would otherwise be said behind the bar."""
        if self.training_bar is not None:
            self.training_bar.close()
            self.training_bar = None

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if self.training_bar is not None:
            self._shown |= {name: f"{logs[name]:.3f}" for name in self._SHOWN if name in logs}
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
        if (Path(source) / "adapter_config.json").exists():
            raise UserError(
                f"{source} holds adapters of another model; merge them into it first (PEFT: merge_and_unload)"
            )
        config, unknown = AutoConfig.from_pretrained(source, **arguments.model_fields, return_unused_kwargs=True)
        if unknown:
            raise UserError(f"model_fields: {config.model_type} has no field {next(iter(unknown))!r}")
        if arguments.model:
            model = AutoModelForCausalLM.from_pretrained(source, config=config, dtype=arguments.dtype)
        else:
            model = AutoModelForCausalLM.from_config(config, dtype=arguments.dtype)
    if not arguments.lora:
        return model
    if trained:
        return PeftModel.from_pretrained(model, trained, is_trainable=True)
    with user_errors("lora"):
        return get_peft_model(model, LoraConfig(**{"task_type": "CAUSAL_LM"} | arguments.lora))


def train(config: str, overrides: list[str] | None = None) -> Trainer:
    """Run the training that a recipe describes; `output_dir` then holds the model, its tokenizer, metrics and curves.

    Args:
        config: the YAML file: fields of `RunArguments`, `DataArguments` and `QSparseTrainingArguments`, which for
            `stage: sft` are `QSparseSFTConfig`.
        overrides: `key=value` strings that win over it. `resume_from_checkpoint=last` goes on where a run stopped.

    Raises:
        UserError: anything in them that cannot be run, before training starts; data that ends, a loss that is not
            finite or a checkpoint that cannot be written, while it runs.
        Interrupted: SIGTERM or Ctrl-C came; a checkpoint was saved.
    """
    recipe = parse(config, overrides or [])
    arguments = recipe.training
    _check(recipe)
    resume = _checkpoint_to_resume(arguments)
    set_seed(arguments.seed)
    if arguments.device.type == "cpu":
        arguments.dataloader_pin_memory = False  # it only warns there

    check_config(recipe.run.source, recipe.run.model_fields)
    tokenizer_source = recipe.run.tokenizer or recipe.run.model
    with user_errors(tokenizer_source):
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_source)
    finished = _finished(resume, arguments)
    model = load_model(recipe.run, resume if finished else None)
    longest = model.config.max_position_embeddings
    if recipe.data.sequence_length > longest:
        raise UserError(
            f"sequence_length must be at most the model's max_position_embeddings ({longest}), "
            f"got {recipe.data.sequence_length}"
        )
    build = _fine_tuner if recipe.run.stage == "sft" else _language_modeller
    with user_errors(Path(config).name):
        trainer = build(recipe, model, tokenizer)
    trainer.facts |= {
        "train_data": recipe.data.train_data,
        "sequence_length": recipe.data.sequence_length,
        "lora": recipe.run.lora,
    }
    trainer.settings = non_defaults(recipe.run) | non_defaults(recipe.data)
    sources = (source.dataset for source in recipe.data.train_sources)
    trainer.datasets = tuple(name for name in sources if name and is_repository_id(name))
    if finished:
        trainer.state = finished
        for callback in get_reporting_integration_callbacks(arguments.report_to):  # they log what is trained
            trainer.remove_callback(callback)
    else:
        _train(trainer, resume)
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
    if trainer.is_world_process_zero():
        write_training_report(trainer.state, _output_dir(arguments), title=Path(config).stem)
    with user_errors(arguments.output_dir):
        trainer.create_model_card()  # again, with what was measured since the model was saved
    return trainer


def _language_modeller(
    recipe: Recipe, model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase
) -> QSparseTrainer:
    data, arguments = recipe.data, recipe.training
    with arguments.main_process_first(desc="preparing data"):
        evaluated = pack_on_disk(data.eval_sources, tokenizer, data, arguments.seed) if data.eval_sources else None
        if data.streaming:
            trained = PackedStream(data.train_sources, tokenizer, data, arguments.seed)
        else:
            trained = pack_on_disk(data.train_sources, tokenizer, data, arguments.seed)
            trained = _whole_updates(trained, arguments, data.repeat_data)
    return QSparseTrainer(
        model=model,
        args=arguments,
        train_dataset=trained,
        eval_dataset=evaluated,
        data_collator=collate_packed,
        processing_class=tokenizer,
    )


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
        evaluated = read_examples(data.eval_sources, tokenizer, data, arguments) if data.eval_sources else None
        if arguments.padding_free and not arguments.packing:  # TRL cuts nothing then, and wants no length named
            arguments.max_length = None
            mode = arguments.truncation_mode
            trained = learnable(truncated(trained, data.sequence_length, mode))
            evaluated = truncated(evaluated, data.sequence_length, mode) if evaluated is not None else None
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
    if recipe.data.streaming and recipe.training.max_steps < 1:
        raise UserError("a stream has no known length: set max_steps to the number of updates")
    arguments = recipe.training
    try:
        choose(IMPLS, [torch.empty(1, device=arguments.device)], None)  # QSPARSE_BACKEND may name what cannot run
    except ValueError as error:
        raise UserError(str(error)) from None
    with user_errors("optimizer or schedule"):
        optimizer_class, options = Trainer.get_optimizer_cls_and_kwargs(arguments)
        optimizer = optimizer_class([torch.zeros(1, requires_grad=True)], **options)
        kwargs = cast(dict | None, arguments.lr_scheduler_kwargs)  # a text has been parsed
        get_scheduler(arguments.lr_scheduler_type, optimizer, 1, 10, scheduler_specific_kwargs=kwargs)
    with user_errors("dataloader"):
        DataLoader(
            TensorDataset(torch.zeros(1)),
            num_workers=arguments.dataloader_num_workers,
            prefetch_factor=arguments.dataloader_prefetch_factor,
            persistent_workers=arguments.dataloader_persistent_workers,
            multiprocessing_context=arguments.dataloader_multiprocessing_context,
        )
    if arguments.torch_compile:
        with user_errors("torch_compile"):
            backend = arguments.torch_compile_backend or "inductor"
            torch.compile(nn.Identity(), backend=backend, mode=arguments.torch_compile_mode)
    with user_errors("report_to"):
        get_reporting_integration_callbacks(arguments.report_to)
    if arguments.process_index == 0:
        check_writable(_output_dir(arguments) / "trainer_state.json")


def _output_dir(arguments: TrainingArguments) -> Path:
    """Where the run goes; Transformers chooses a folder where nobody does."""
    return Path(cast(str, arguments.output_dir))  # None until they are made


def _checkpoint_to_resume(arguments: QSparseArguments) -> str | None:
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


def _train(trainer: QSparseTrainerMixin, resume: str | None) -> None:
    bar = None
    if not trainer.args.disable_tqdm:
        bar = _ProgressBar()
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
