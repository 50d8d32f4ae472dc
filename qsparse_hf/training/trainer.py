"""The Transformers Trainer, and any built on it, for Q-Sparse models.

What is added stands in a mixin, so that TRL's trainers take it as well: ramps of sparsity and quantization, a second
stage, distillation from a dense model, what is logged, and checkpoints that are whole or not there.
"""

import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from huggingface_hub.constants import REPOCARD_NAME
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import PreTrainedModel, Trainer
from transformers.trainer import SCHEDULER_NAME
from transformers.trainer_utils import TrainOutput, get_last_checkpoint, rotate_checkpoints
from transformers.utils import logging

from ..checkpoint import CONFIG, DTYPES
from ..errors import UserError, write_whole
from ..losses import eval_losses, losses
from ..model_card import Run, duration, find_origin, hardware, keeps_card, non_defaults, write_card
from ..modeling.bitnet import PackedLinear, TernaryLinear
from ..report import projections, sparsity_report
from ..weights import PACKED_IS_NOT_TRAINED
from .arguments import QSparseArguments, QSparseTrainingArguments
from .distillation import forward_kl, load_teacher, require_same_vocabulary
from .faults import Heartbeat, checkpoint_facts, whole_checkpoint
from .schedule import Ramps, SecondStage, check_quantization_ramp, end_ramps
from .sharding import has_shards, load_sharded_optimizer, without_shards
from .streaming import PackedStream, StreamProgress
from .throughput import (
    attention_flops_per_token,
    count_tokens,
    main_input,
    number_of_experts,
    peak_flops,
    training_flops_per_token,
)

logger = logging.get_logger(__name__)

if TYPE_CHECKING:  # what the mixin is mixed into, or a class built on it
    _Trainer = Trainer
else:
    _Trainer = object

_STREAM_STATE = "stream.json"
# Arguments that a run may go on with other values of, at the price of a schedule that is neither's.
_SCHEDULE = ("learning_rate", "lr_scheduler_type", "max_steps", "num_train_epochs", "warmup_steps", "second_stage")


def _check_trainable(model: nn.Module) -> None:
    """Refuse packed weights.

    Raises:
        UserError: the projections are packed, and no weights of full precision are kept beside.
    """
    if any(isinstance(module, PackedLinear) for module in model.modules()):
        raise UserError(PACKED_IS_NOT_TRAINED)


class QSparseTrainerMixin(_Trainer):
    """What makes a `Trainer` one for Q-Sparse models and, for the comparison, their dense twins.

    With every logged loss go

    - `tokens_seen`, `tokens_per_second` and, on hardware whose peak is known, `mfu`, all over all processes; padding is
      left out of them where `include_num_input_tokens_seen` is `non_padding`;
    - `peak_memory_gib` of this process's GPU;
    - `sparsity/<group>`, `sparsity/all` and `activated_parameters`, measured on the first row of the latest batch;
    - `quantization_strength` of ternary weights, 1 but for a ramp;
    - `weight_decay`, where a second stage has another;
    - `distill_kl` and `cross_entropy`, the parts of the loss where there is a teacher, in nats a token;
    - `rows_skipped` of a stream that skips bad rows, as far as it has been read ahead.

    Speed and `mfu` are of whole updates: a teacher's forward takes part of their time, and counts for no FLOPs. What is
    evaluated before the first update is logged as `initial_eval_loss` too.

    Attributes:
        control_history: `log_history` of a dense control; its losses are logged beside the run's of the same update, as
            `control_loss` and so on.
        facts: what a checkpoint must agree on for a run to go on from it, beside the model, the seed and the rows of an
            update; add to it before `train`.
        settings: what the model's card tells of the run beside the trainer's arguments: fields of a recipe.
        datasets: Hub ids of what is trained on, for the card.
    """

    arguments_class: type[QSparseArguments] = QSparseTrainingArguments
    args: QSparseArguments
    model: Any  # a PreTrainedModel, or what holds adapters or an engine around one
    optimizer: Any  # of the engine, once training has begun
    lr_scheduler: Any

    def __init__(
        self,
        model: Any = None,
        args: QSparseArguments | None = None,
        data_collator: Callable | None = None,
        train_dataset: Dataset | None = None,
        *rest,
        **kwargs,
    ) -> None:
        if not isinstance(args, self.arguments_class):
            raise TypeError(f"args must be {self.arguments_class.__name__}, got {type(args).__name__}")
        stream = train_dataset if isinstance(train_dataset, PackedStream) else None
        if stream and args.dataloader_num_workers:
            raise UserError(
                "a stream packs in a thread of its own and needs dataloader_num_workers 0, "
                f"got {args.dataloader_num_workers}"
            )
        self.facts: dict[str, object] = {}
        self._cast_to: str | None = None
        self.control_history: list[dict[str, float]] = []
        self.settings: Mapping[str, Any] = {}
        self.datasets: tuple[str, ...] = ()
        self._teacher: PreTrainedModel | None = None
        if model is not None and not isinstance(model, str):
            _check_trainable(model)
            self._find_teacher(model, args)  # before anything is written
        super().__init__(model, args, data_collator, train_dataset, *rest, **kwargs)
        self._follow(self.model)
        self.add_callback(Ramps(args))
        self._second_stage = SecondStage(args)
        self.add_callback(self._second_stage)
        self.heartbeat = Heartbeat(self._get_output_dir(trial=None))
        self.add_callback(self.heartbeat)
        if stream:
            stream.rows_per_update = args.rows_per_update
            self.add_callback(StreamProgress(stream))
        self._stream_begin: dict | None = None
        self._restore_rng_from: str | None = None
        self._kl = torch.zeros((), device=args.device)
        self._kl_updates: set[int] = set()

    def call_model_init(self, trial: Any = None) -> Any:
        """As in Transformers, which calls it for every training: what is measured follows the new model."""
        model: Any = super().call_model_init(trial)
        _check_trainable(model)
        self._find_teacher(model, self.args)
        self._follow(model)
        return model

    def _find_teacher(self, model: PreTrainedModel, args: QSparseArguments) -> None:
        """Have the teacher of `model` ready, in the precision that it computes in."""
        if args.teacher is None:
            return
        dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else model.dtype
        if self._teacher is None or self._teacher.dtype != dtype:
            self._teacher = load_teacher(args.teacher, dtype, args.device)
            if args.torch_compile:  # as Accelerate does with the model
                self._teacher.compile(backend=args.torch_compile_backend, mode=args.torch_compile_mode)
        require_same_vocabulary(self._teacher, model)

    def _follow(self, model: PreTrainedModel) -> None:
        """Take from `model`, before an engine shards it, what depends on which model is trained."""
        if self.args.sparsity_ramp_steps and not hasattr(model, "scale_sparsity"):
            raise UserError(f"sparsity_ramp_steps needs a Q-Sparse model, got {type(model).__name__}")
        check_quantization_ramp(self.args, model.config)
        self._text_config = model.config.get_text_config()
        for adapters in getattr(model, "peft_config", {}).values():  # they will be loaded from somewhere else
            if os.path.isdir(base := adapters.base_model_name_or_path or ""):
                adapters.base_model_name_or_path = os.path.abspath(base)
        if self.args.ddp_find_unused_parameters is None:  # experts that no token reached have no gradient
            self.args.ddp_find_unused_parameters = number_of_experts(self._text_config) > 0
        self._measures = self.args.log_sparsity and any(True for _ in projections(model))
        self._latest_row: dict[str, Tensor] | None = None
        self._weight_flops = training_flops_per_token(model, 0)
        weights = sum(parameter.numel() for parameter in model.parameters())
        self._model_fact = f"{model.config.model_type} of {weights:,} weights"

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        """As in Transformers, with a second stage where there is one."""
        if self.lr_scheduler is not None and self.args.second_stage_learning_rate is not None:
            raise UserError("second_stage_learning_rate needs the trainer's own schedule, and it was given another")
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        if self.args.second_stage is not None:
            self._second_stage.attach(scheduler, optimizer or self.optimizer, num_training_steps)
        return scheduler

    def _hp_search_setup(self, trial: Any) -> None:
        """As in Transformers: sets the arguments of a trial; what was derived from them is derived again."""
        if trial is not None and self.args.global_batch_size is not None:
            self.args.gradient_accumulation_steps = 1
        super()._hp_search_setup(trial)
        if trial is not None:
            self.args.settle()
            self._follow(self.model)
        if isinstance(self.train_dataset, PackedStream):
            self.train_dataset.rows_per_update = self.args.rows_per_update
        self.heartbeat.run_dir = self._get_output_dir(trial)

    def _all_facts(self) -> dict[str, object]:
        return {
            "rows_per_update": self.args.rows_per_update,
            "seed": self.args.seed,
            "streaming": isinstance(self.train_dataset, PackedStream),
            "model": self._model_fact,
        } | self.facts

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs) -> TrainOutput:
        """As in Transformers. SIGTERM or SIGINT saves a checkpoint and ends it; `heartbeat.stopped_by` says so."""
        if self.args.max_steps == 0:
            raise UserError("max_steps=0 trains nothing: call evaluate() instead, or set it to -1 to go by epochs")
        folder = resume_from_checkpoint or None
        if folder is True:
            folder = get_last_checkpoint(self.args.output_dir)
        if folder:
            self._check_checkpoint(folder)
            self.args.eval_on_start = False  # the run has begun long ago
        if isinstance(self.train_dataset, PackedStream):
            self._rewind(self.train_dataset, folder)
        self._kl.zero_()
        self._kl_updates.clear()
        with self.heartbeat.listening():
            result = super().train(folder or resume_from_checkpoint, *args, **kwargs)
        self.heartbeat.require_finite(self.model, self.args, self.state.global_step)
        return result

    def _rewind(self, stream: PackedStream, folder: str | None) -> None:
        """Set the stream to where a checkpoint was taken, or to where the first training began."""
        if self._stream_begin is None:
            self._stream_begin = stream.state()
        if folder:
            stream.resume(json.loads(Path(folder, _STREAM_STATE).read_text()))
            self.args.ignore_data_skip = True  # the stream begins there, nothing is left to skip
            self._restore_rng_from = folder
        else:
            stream.resume(self._stream_begin)

    def _check_checkpoint(self, folder: str) -> None:
        """Whether this trainer can go on from a checkpoint as if it had not stopped."""
        if self.is_fsdp_enabled and not has_shards(folder):
            raise UserError(
                f"{folder} was not written under FSDP, which cannot go on from it; go on without, or begin a new run "
                f"from its weights with model={folder}"
            )
        mark = checkpoint_facts(folder)
        if mark is None and Path(folder).absolute().parent == Path(self._get_output_dir(trial=None)).absolute():
            raise UserError(f"{folder} was cut off while it was written; resume_from_checkpoint=last takes a whole one")
        mark = mark or {}
        if mark.get("save_only_model"):
            raise UserError(f"{folder} was saved with save_only_model and holds nothing to go on with but the weights")
        for name, now in self._all_facts().items():
            then = mark.get(name, now)
            if then != now:
                raise UserError(f"{folder} is of a run with {name} {then}, and a run with {now} would be another one")
        for name in _SCHEDULE:
            then, now = mark.get(name), getattr(self.args, name)
            if then is not None and then != str(now):
                logger.warning(f"{name} was {then} when the run began and is {now} now; its schedule is of both")

    def get_batch_samples(self, *args, **kwargs) -> tuple:
        samples = super().get_batch_samples(*args, **kwargs)
        if self._restore_rng_from:  # again: beginning to read drew from it, which the run that goes on did long ago
            self._load_rng_state(self._restore_rng_from)
            self._restore_rng_from = None
        return samples

    def training_step(self, model: nn.Module, inputs: dict, *args, **kwargs) -> Tensor:
        if self._measures:
            self._latest_row = {
                name: value[:1] for name, value in inputs.items() if isinstance(value, Tensor) and value.ndim > 1
            }
        name, read = main_input(inputs)
        longest = getattr(self.args, "max_length", None)  # TRL lays a batch of packed rows end to end
        self._sequence_length = min(read.shape[1], longest or math.inf)
        padding = self.args.include_num_input_tokens_seen != "non_padding"
        tokens = count_tokens(inputs, padding, getattr(self.processing_class, "pad_token_id", None))
        loss = super().training_step(model, inputs, *args, **kwargs)
        self.heartbeat.watch(self.state.global_step + 1, {name: read}, loss, tokens)
        return loss

    def _track_num_input_tokens(self, inputs: dict) -> None:
        """Leaves the counting to the heartbeat, which does it whatever is asked for, and once an update."""

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple:
        if self._teacher is None or not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        labels = inputs["labels"]
        questions = {name: value for name, value in inputs.items() if name != "labels"}
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        with torch.no_grad():
            taught = self._teacher(**questions, use_cache=False).logits
        kl = forward_kl(outputs.logits, taught, labels, compile_with=self.args.torch_compile_backend)
        if num_items_in_batch is None:
            kl = kl / (labels[:, 1:] != -100).sum().clamp(min=1)
        else:  # averaged over the whole update, as the Trainer does with its own loss
            kl = kl / num_items_in_batch
            if self.args.average_tokens_across_devices:
                kl = kl * self.accelerator.num_processes
        self._kl += kl.detach()
        self._kl_updates.add(self.state.global_step)
        weight = self.args.distill_weight
        loss = (1 - weight) * loss + weight * kl
        return (loss, outputs) if return_outputs else loss

    def evaluate(self, *args, **kwargs) -> dict[str, float]:
        """As in Transformers, at the configured sparsity and quantization even while a ramp climbs: what a checkpoint
        will run at.
        """
        end_ramps(self.args, self.accelerator.unwrap_model(self.model))
        if self.is_fsdp_enabled and not self.accelerator._models:  # FSDP2 shards a model and its optimizer together
            optimizer = torch.optim.SGD(self.model.parameters())
            self.model = self.model_wrapped = self.accelerator.prepare(self.model, optimizer)[0]
        with self.heartbeat.stopwatch.paused():
            return super().evaluate(*args, **kwargs)

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        if "loss" in logs:
            logs = logs | self._measure_speed()
            if isinstance(self.train_dataset, PackedStream) and self.train_dataset.check.skip:
                logs["rows_skipped"] = self.train_dataset.check.skipped
            logs |= self._settings_at_work()
            if self._teacher is not None:
                logs |= self._measure_distillation(logs["loss"])
            if self._latest_row is not None:
                with self.heartbeat.stopwatch.paused():
                    logs |= self._measure_sparsity(self._latest_row)
        if self.state.global_step == 0:
            logs = logs | {f"initial_{name}": loss for name, loss in eval_losses(logs).items()}
        for entry in self.control_history:
            if entry["step"] == self.state.global_step:
                logs = logs | {f"control_{name}": entry[name] for name in losses(entry) if name in logs}
        super().log(logs, *args, **kwargs)

    def _measure_speed(self) -> dict[str, float]:
        speed = self.heartbeat.stopwatch.lap()
        measured = {"tokens_seen": self.state.num_input_tokens_seen, "tokens_per_second": speed}
        if peak := peak_flops(self.args.device):
            flops = self._weight_flops + attention_flops_per_token(self._text_config, self._sequence_length)
            measured["mfu"] = speed * flops / (peak * self.args.world_size)
        if self.args.device.type == "cuda":
            measured["peak_memory_gib"] = torch.cuda.max_memory_allocated(self.args.device) / 2**30
        return measured

    def _settings_at_work(self) -> dict[str, float]:
        """What the latest update was made with that another one may not be."""
        model = self.accelerator.unwrap_model(self.model)
        strength = next((each.strength for each in model.modules() if isinstance(each, TernaryLinear)), None)
        found = {"quantization_strength": strength, "weight_decay": self._second_stage.weight_decay()}
        return {name: value for name, value in found.items() if value is not None}

    def _measure_distillation(self, loss: float) -> dict[str, float]:
        kl = self.accelerator.gather(self._kl).mean().item() / len(self._kl_updates)
        self._kl.zero_()
        self._kl_updates.clear()
        weight = self.args.distill_weight
        return {"distill_kl": kl} | ({"cross_entropy": (loss - weight * kl) / (1 - weight)} if weight < 1 else {})

    def _measure_sparsity(self, row: dict[str, Tensor]) -> dict[str, float]:
        row = self._prepare_inputs(row)
        if "attention_mask" in row and not row["attention_mask"].any():  # a row of padding alone says nothing
            return {}
        return sparsity_report(self.accelerator.unwrap_model(self.model), row, detailed=False).metrics()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As in Transformers; under FSDP the folder always holds the whole model, whatever form the shards take."""
        checkpoint = _internal_call and output_dir is not None  # stays as it is, to go on from
        self._cast_to = None if checkpoint else self.args.save_dtype
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        if plugin is None or "FULL" in str(plugin.state_dict_type):
            super().save_model(output_dir, _internal_call)
        else:
            self._save(output_dir, state_dict=self.accelerator.get_state_dict(self.model))

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """As in Transformers, the trained model in `save_dtype`, and with a card in the place of the one that PEFT
        writes; a person's stays as it is.
        """
        folder = Path(output_dir or self._get_output_dir(trial=None))
        writes = self.args.should_save
        kept = (folder / REPOCARD_NAME).read_bytes() if writes and keeps_card(folder) else None
        model = self.accelerator.unwrap_model(self.model)
        super()._save(output_dir, self._narrowed(model, state_dict) if self._cast_to else state_dict)
        if not writes:
            return
        if self._cast_to and not hasattr(model, "peft_config"):  # Transformers writes down the dtype in memory
            config = folder / CONFIG
            write_whole(config, json.dumps(json.loads(config.read_text()) | {"dtype": self._cast_to}, indent=2) + "\n")
        (folder / REPOCARD_NAME).unlink(missing_ok=True)
        if kept is not None:
            (folder / REPOCARD_NAME).write_bytes(kept)
        self._write_card(folder)

    def _narrowed(self, model: nn.Module, state_dict: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        """The state dict with its weights in `save_dtype`; of a model with adapters, these alone."""
        adapters = {name for name, weight in model.named_parameters() if weight.requires_grad}
        whole = not hasattr(model, "peft_config")
        done: dict[tuple, Tensor] = {}  # weights with two names stay one
        state_dict = dict(model.state_dict() if state_dict is None else state_dict)
        for name, weight in state_dict.items():
            if weight.is_floating_point() and (whole or name in adapters):
                narrow = weight.to(DTYPES[cast(str, self._cast_to)])
                state_dict[name] = done.setdefault((weight.data_ptr(), weight.shape), narrow)
        return state_dict

    def create_model_card(  # type: ignore[override]  # those of Transformers' and of TRL's arguments that say something
        self,
        model_name: str | None = None,
        tags: str | list[str] | None = None,
        language: str | list[str] | None = None,
        license: str | None = None,
        finetuned_from: str | None = None,
        dataset_tags: str | list[str] | None = None,
    ) -> None:
        """Write the model's card into `output_dir`, unless a person wrote one; what is given wins over what is found.

        Args:
            model_name: in the place of the folder's.
            tags: beside those of Q-Sparse models.
            language: of the model, `en` for instance.
            license: in the place of the base model's.
            finetuned_from: the base model's Hub id.
            dataset_tags: Hub ids of the training data.
        """
        if self.is_world_process_zero():
            given = {"tags": tags, "language": language, "license": license, "base_model": finetuned_from}
            given |= {"datasets": dataset_tags, "model_name": model_name}
            self._write_card(Path(self._get_output_dir(trial=None)), **given)

    def _write_card(self, folder: Path, **metadata: Any) -> None:
        model: Any = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        adapters = next(iter(getattr(model, "peft_config", {}).values()), None)
        base = self.settings.get("model") or (adapters and adapters.base_model_name_or_path)
        if base is None and "config" not in self.settings:
            base = model.config._name_or_path
        derived = ["dataloader_pin_memory", "resume_from_checkpoint"]
        derived += ["gradient_accumulation_steps"] if self.args.global_batch_size else []
        run = Run(
            settings=dict(self.settings) | non_defaults(self.args, without=derived),
            history=self.state.log_history,
            facts=self._card_facts(),
            datasets=self.datasets,
        )
        output_dir = Path(self._get_output_dir(trial=None)).resolve()
        write_card(folder, model, find_origin(base) if base else None, run, name=output_dir.name, **metadata)

    def _card_facts(self) -> dict[str, str]:
        state = self.state
        seen = {name: value for entry in state.log_history for name, value in entry.items()}
        facts = {"updates": f"{state.global_step:,} of {self.args.rows_per_update:,} sequences"}
        if "tokens_seen" in seen:
            facts["tokens"] = f"{seen['tokens_seen']:,}"
        facts["hardware"] = hardware(self.args.device, self.args.world_size)
        if "train_runtime" in seen:
            since = ", since it last went on from a checkpoint" if self.args.resume_from_checkpoint else ""
            facts["wall time"] = f"{duration(seen['train_runtime'])}{since}"
        return facts

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.is_fsdp_enabled or not has_shards(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            with without_shards(resume_from_checkpoint) as folder:
                super()._load_from_checkpoint(folder, model)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """As in Transformers, but tied weights are not missing."""
        if self._text_config.tie_word_embeddings:
            missing = load_result.missing_keys
            missing[:] = [key for key in missing if not key.endswith("lm_head.weight")]
        super()._issue_warnings_after_load(load_result)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or self.is_fsdp_enabled or not has_shards(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)
        else:
            load_sharded_optimizer(checkpoint, self.model, self.optimizer.optimizer)
            self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint, SCHEDULER_NAME), weights_only=True))

    def _save_checkpoint(self, model: nn.Module, trial: object) -> None:
        """As in Transformers, but whole or not there; older ones are deleted only once the new one is whole."""
        update, writes, run_dir = self.state.global_step, self.args.should_save, self._get_output_dir(trial=trial)
        schedule = {name: str(getattr(self.args, name)) for name in _SCHEDULE}
        facts = self._all_facts() | schedule | {"save_only_model": self.args.save_only_model}
        self.heartbeat.require_finite(self.model, self.args, update)
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            with (
                self.heartbeat.stopwatch.paused(),
                whole_checkpoint(run_dir, update, writes, self.accelerator.wait_for_everyone, facts) as folder,
            ):
                super()._save_checkpoint(model, trial)
                if isinstance(self.train_dataset, PackedStream) and writes:
                    (folder / _STREAM_STATE).write_text(json.dumps(self.train_dataset.state()))
        finally:
            self.args.save_total_limit = limit
        if writes:
            rotate_checkpoints(run_dir, limit, self.state.best_model_checkpoint, use_mtime=True)


class QSparseTrainer(QSparseTrainerMixin, Trainer):
    """The `Trainer` of Transformers with what `QSparseTrainerMixin` adds."""
