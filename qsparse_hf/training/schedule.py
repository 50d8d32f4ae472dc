"""How the sparsity grows over the first updates."""

from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..errors import UserError
from .arguments import QSparseArguments


def sparsity_factor(update: int, ramp_steps: int, levels: int = 10) -> float:
    """Share of the configured sparsity at one optimizer update.

    Args:
        update: counted from 0.
        ramp_steps: the ramp climbs over this many updates and has reached 1 in the last of them; 0 means no ramp.
        levels: equal stairs it climbs in. Every level is one value of K, and one compilation under `torch.compile`.
    """
    if update >= ramp_steps:
        return 1.0
    levels = min(levels, ramp_steps)
    return (update * levels // ramp_steps + 1) / levels


class SparsityRamp(TrainerCallback):
    """Sets the model's sparsity at the start of every update, from the update's number alone: a resumed run agrees.

    Args:
        arguments: the trainer's. They are read at every call: a hyperparameter search sets them between its trials.
    """

    def __init__(self, arguments: QSparseArguments) -> None:
        self.arguments = arguments

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        steps = self.arguments.sparsity_ramp_steps
        if steps > state.max_steps:
            raise UserError(
                f"sparsity_ramp_steps must be at most the number of updates ({state.max_steps}), got {steps}"
            )
        if steps and args.torch_compile:  # every level is a program of its own
            config = torch._dynamo.config
            config.recompile_limit = max(config.recompile_limit, self.arguments.sparsity_ramp_levels + 8)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        steps, levels = self.arguments.sparsity_ramp_steps, self.arguments.sparsity_ramp_levels
        if steps:
            kwargs["model"].scale_sparsity(sparsity_factor(state.global_step, steps, levels))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.arguments.sparsity_ramp_steps:
            kwargs["model"].scale_sparsity(1)
