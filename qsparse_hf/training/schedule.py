"""How the sparsity grows over the first updates."""

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..errors import UserError


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
    """Sets the model's sparsity at the start of every update, from the update's number alone: a resumed run agrees."""

    def __init__(self, ramp_steps: int, levels: int) -> None:
        self.ramp_steps = ramp_steps
        self.levels = levels

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model=None, **kwargs
    ) -> None:
        if self.ramp_steps > state.max_steps:
            raise UserError(
                f"sparsity_ramp_steps must be at most the number of updates ({state.max_steps}), got {self.ramp_steps}"
            )

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model=None, **kwargs
    ) -> None:
        model.scale_sparsity(sparsity_factor(state.global_step, self.ramp_steps, self.levels))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model=None, **kwargs
    ) -> None:
        model.scale_sparsity(1)
