"""What a training run can be told, beside what Transformers' trainers can."""

import math
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from transformers import TrainingArguments

from ..checkpoint import DTYPES
from ..errors import UserError, shortened

if TYPE_CHECKING:  # what the mixin is mixed into, or a class built on it
    _Arguments = TrainingArguments
else:
    _Arguments = object


CONTROL = "control"
"""The folder of a run's dense control inside that of the run, and how `distill_from` calls it."""

RAMPS = ("sparsity", "quantization")
"""What may grow over the first updates: `<name>_ramp_steps`, and `scale_<name>` of a model."""

# Settings that Transformers leaves unread, without a word, unless another field turns on what they set.
_SETTINGS = {"fsdp_config": "fsdp", "liger_kernel_config": "use_liger_kernel"}


@dataclass
class QSparseArguments(_Arguments):
    """What a Q-Sparse trainer adds to the arguments of the trainer it is mixed into.

    Raises:
        UserError: a field outside its range, or one that is read only along with another that is not given.
    """

    sparsity_ramp_steps: int = field(
        default=0, metadata={"help": "Climb from dense to the configured sparsity over this many updates; 0: no ramp."}
    )
    sparsity_ramp_levels: int = field(
        default=10, metadata={"help": "Stairs of the ramp; each costs one compilation under torch_compile."}
    )
    quantization_ramp_steps: int = field(
        default=0,
        metadata={"help": "Move from full-precision to ternary weights over this many updates; 0: no ramp."},
    )
    quantization_ramp_levels: int = field(default=10, metadata={"help": "Stairs of that ramp."})
    second_stage_learning_rate: float | None = field(
        default=None,
        metadata={
            "help": "From second_stage_start on, the schedule's peak in the place of learning_rate; default: the same."
        },
    )
    second_stage_weight_decay: float | None = field(
        default=None,
        metadata={"help": "From second_stage_start on, in the place of weight_decay; default: the same."},
    )
    second_stage_start: float = field(
        default=0.5, metadata={"help": "Share of the updates after which the second stage begins."}
    )
    log_sparsity: bool = field(
        default=True,
        metadata={"help": "With every logged loss, measure sparsity and activated parameters on one row of the batch."},
    )
    global_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Sequences in an update over all processes; sets gradient_accumulation_steps, so that a run is the "
            "same on any number of them."
        },
    )
    distill_from: str | None = field(
        default=None,
        metadata={
            "help": "Checkpoint of a dense model whose logits are learnt: a folder or Hub id, the parent's for one; "
            "or control, the run's own dense control."
        },
    )
    distill_weight: float = field(
        default=0.5, metadata={"help": "w in loss = (1 - w) * cross entropy + w * KL(teacher || model)."}
    )
    eval_on_start: bool | None = field(  # type: ignore[assignment]  # Transformers' has no third value
        default=None,
        metadata={"help": "Evaluate before the first update; a recipe's default is true for stage continue."},
    )
    save_dtype: str | None = field(
        default=None,
        metadata={
            "help": "Of the trained model's files: float32, bfloat16 or float16; default: as it is trained. "
            "Checkpoints to go on from stay as they are."
        },
    )
    report_to: None | str | list[str] = field(  # noqa: RUF036, the command-line parser wants None first
        default="tensorboard", metadata={"help": "Where logs go: tensorboard, wandb and so on, or none."}
    )
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "A loss that is not finite ends the run here instead of being left out."}
    )

    def __post_init__(self) -> None:
        for name, least in (
            ("per_device_train_batch_size", 1),
            ("per_device_eval_batch_size", 1),
            ("gradient_accumulation_steps", 1),
            *((f"{name}_ramp_steps", 0) for name in RAMPS),
            *((f"{name}_ramp_levels", 1) for name in RAMPS),
            ("max_grad_norm", 0),
            ("seed", 0),
            ("save_steps", 1e-9),
            ("num_train_epochs", 1e-9),
        ):
            if not getattr(self, name) >= least:  # NaN is not either
                raise UserError(f"{name} must be at least {least:g}, got {getattr(self, name)}")
        if self.save_dtype is not None and self.save_dtype not in DTYPES:
            raise UserError(f"save_dtype must be one of {', '.join(DTYPES)}, got {shortened(repr(self.save_dtype))}")
        for setting, switch in _SETTINGS.items():
            if getattr(self, setting) and not getattr(self, switch):
                raise UserError(f"{setting} sets nothing without {switch}; give {switch} too, or leave {setting} out")
        super().__post_init__()
        self.settle()

    def settle(self) -> None:
        """Hold the fields against each other, and derive `gradient_accumulation_steps` from `global_batch_size`.

        Raises:
            UserError: two that contradict each other.
        """
        for name in RAMPS:
            steps, _ = self.ramp(name)
            if 0 < self.max_steps < steps:
                raise UserError(f"{name}_ramp_steps must be at most max_steps ({self.max_steps}), got {steps}")
        self._check_second_stage()
        if not 0 < self.distill_weight <= 1:
            raise UserError(f"distill_weight must be above 0 and at most 1, got {self.distill_weight}")
        if self.global_batch_size is not None:
            together = self.per_device_train_batch_size * self.world_size
            if self.global_batch_size < 1 or self.global_batch_size % together:
                raise UserError(
                    f"global_batch_size must be a multiple of per_device_train_batch_size * processes "
                    f"({self.per_device_train_batch_size} * {self.world_size}), got {self.global_batch_size}"
                )
            if self.gradient_accumulation_steps not in (1, self.global_batch_size // together):
                raise UserError(
                    f"global_batch_size {self.global_batch_size} makes gradient_accumulation_steps "
                    f"{self.global_batch_size // together}, got {self.gradient_accumulation_steps}; leave one out"
                )
            self.gradient_accumulation_steps = self.global_batch_size // together

    def _check_second_stage(self) -> None:
        start = self.second_stage_start
        if not 0 < start < 1:
            raise UserError(f"second_stage_start must be above 0 and below 1, got {start}")
        if self.second_stage is None and start != type(self).second_stage_start:
            raise UserError(
                "second_stage_start sets nothing without second_stage_learning_rate or second_stage_weight_decay"
            )
        for name in ("learning_rate", "weight_decay"):
            first, second = getattr(self, name), getattr(self, f"second_stage_{name}")
            if second is None:
                continue
            if not 0 <= second < math.inf:
                raise UserError(f"second_stage_{name} must be a finite number of at least 0, got {second}")
            if not first > 0:  # what it scales, and which weights decay
                raise UserError(f"second_stage_{name} needs a {name} above 0, got {first}")

    def ramp(self, name: str) -> tuple[int, int]:
        """Updates and stairs of one of `RAMPS`; no updates: no ramp."""
        return getattr(self, f"{name}_ramp_steps"), getattr(self, f"{name}_ramp_levels")

    @property
    def second_stage(self) -> dict[str, float | None] | None:
        """Its fields; None where there is no second stage."""
        if self.second_stage_learning_rate is None and self.second_stage_weight_decay is None:
            return None
        return {name: getattr(self, f"second_stage_{name}") for name in ("learning_rate", "weight_decay", "start")}

    def in_second_stage(self, update: int, updates: int) -> bool:
        """Whether `update`, counted from 0, of a run of `updates` is of its second stage."""
        return update >= self.second_stage_start * updates

    @property
    def teacher(self) -> str | None:
        """The checkpoint that `distill_from` names."""
        return os.path.join(self.output_dir or "", CONTROL) if self.distill_from == CONTROL else self.distill_from

    @property
    def rows_per_update(self) -> int:
        """Sequences in an update over all processes."""
        return self.per_device_train_batch_size * self.world_size * self.gradient_accumulation_steps


@dataclass
class QSparseTrainingArguments(QSparseArguments, TrainingArguments):
    """`TrainingArguments` and the fields of `QSparseArguments`."""
