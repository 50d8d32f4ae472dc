"""What a training run can be told, beside what Transformers' trainers can."""

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
            ("sparsity_ramp_steps", 0),
            ("sparsity_ramp_levels", 1),
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
        if 0 < self.max_steps < self.sparsity_ramp_steps:
            raise UserError(
                f"sparsity_ramp_steps must be at most max_steps ({self.max_steps}), got {self.sparsity_ramp_steps}"
            )
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
