"""The Transformers Trainer with a sparsity ramp and measured sparsity in its log."""

from dataclasses import dataclass, field

import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from ..errors import UserError
from ..report import projections, sparsity_report
from .schedule import SparsityRamp


@dataclass
class QSparseTrainingArguments(TrainingArguments):
    """`TrainingArguments` and the fields below.

    Raises:
        UserError: a field outside its range.
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

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sparsity_ramp_steps < 0:
            raise UserError(f"sparsity_ramp_steps must be at least 0, got {self.sparsity_ramp_steps}")
        if 0 < self.max_steps < self.sparsity_ramp_steps:
            raise UserError(
                f"sparsity_ramp_steps must be at most max_steps ({self.max_steps}), got {self.sparsity_ramp_steps}"
            )
        if self.sparsity_ramp_levels < 1:
            raise UserError(f"sparsity_ramp_levels must be at least 1, got {self.sparsity_ramp_levels}")


class QSparseTrainer(Trainer):
    """A `Trainer` for Q-Sparse models and, for the comparison, their dense twins.

    With every logged loss go `sparsity/<group>`, `sparsity/all` and `activated_parameters`, measured by a forward pass
    of the first row of the latest batch.
    """

    def __init__(self, model: nn.Module, args: QSparseTrainingArguments, *rest, **kwargs) -> None:
        if not isinstance(args, QSparseTrainingArguments):
            raise TypeError(f"args must be QSparseTrainingArguments, got {type(args).__name__}")
        super().__init__(model, args, *rest, **kwargs)
        self._latest_row: dict[str, torch.Tensor] | None = None
        self._measures = args.log_sparsity and any(True for _ in projections(self.model))
        if args.sparsity_ramp_steps:
            if not hasattr(self.model, "scale_sparsity"):
                raise UserError(f"sparsity_ramp_steps needs a Q-Sparse model, got {type(self.model).__name__}")
            self.add_callback(SparsityRamp(args.sparsity_ramp_steps, args.sparsity_ramp_levels))
            if args.torch_compile:  # every level is a program of its own
                config = torch._dynamo.config
                config.recompile_limit = max(config.recompile_limit, args.sparsity_ramp_levels + 8)

    def training_step(self, model: nn.Module, inputs: dict, *args, **kwargs) -> torch.Tensor:
        if self._measures:
            self._latest_row = {
                name: value[:1] for name, value in inputs.items() if isinstance(value, torch.Tensor) and value.ndim > 1
            }
        return super().training_step(model, inputs, *args, **kwargs)

    def evaluate(self, *args, **kwargs) -> dict[str, float]:
        """As in Transformers, at the configured sparsity even while the ramp climbs: what a checkpoint will run at."""
        if self.args.sparsity_ramp_steps:
            self.model.scale_sparsity(1)  # the next update sets it to the ramp's again
        return super().evaluate(*args, **kwargs)

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        if "loss" in logs and self._latest_row is not None:
            row = self._prepare_inputs(self._latest_row)
            if "attention_mask" not in row or row["attention_mask"].any():  # a row of padding alone says nothing
                logs = logs | sparsity_report(self.accelerator.unwrap_model(self.model), row).metrics()
        super().log(logs, *args, **kwargs)
