"""The Transformers Trainer with a sparsity ramp and measured sparsity in its log."""

from dataclasses import dataclass, field

import torch
from transformers import Trainer, TrainingArguments

from ..errors import UserError
from ..report import sparsity_report
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

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self._latest_row: dict[str, torch.Tensor] | None = None
        ramp_steps = getattr(self.args, "sparsity_ramp_steps", 0)
        if ramp_steps:
            if not hasattr(self.model, "scale_sparsity"):
                raise UserError(f"sparsity_ramp_steps needs a Q-Sparse model, got {type(self.model).__name__}")
            self.add_callback(SparsityRamp(ramp_steps, self.args.sparsity_ramp_levels))
            # Every level of the ramp is a program of its own, for training and for evaluation.
            limit = torch._dynamo.config.recompile_limit
            torch._dynamo.config.recompile_limit = max(limit, 2 * self.args.sparsity_ramp_levels + limit)

    def training_step(self, model: torch.nn.Module, inputs: dict, *args, **kwargs) -> torch.Tensor:
        if getattr(self.args, "log_sparsity", True):
            self._latest_row = {
                name: value[:1] for name, value in inputs.items() if isinstance(value, torch.Tensor) and value.ndim
            }
        return super().training_step(model, inputs, *args, **kwargs)

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        if "loss" in logs and self._latest_row is not None:
            model = self.accelerator.unwrap_model(self.model)
            logs = logs | sparsity_report(model, self._prepare_inputs(self._latest_row)).metrics()
        super().log(logs, *args, **kwargs)
