"""What changes over the updates: sparsity and quantization that grow over the first, and a second stage of training."""

from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import (
    PreTrainedConfig,
    SchedulerType,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from ..errors import UserError
from .arguments import RAMPS, QSparseArguments


def ramp_factor(update: int, ramp_steps: int, levels: int = 10) -> float:
    """Share of the configured sparsity, or strength of the quantization, at one optimizer update.

    Args:
        update: counted from 0.
        ramp_steps: the ramp climbs over this many updates and has reached 1 in the last of them; 0 means no ramp.
        levels: equal stairs it climbs in. Every level is one compilation under `torch.compile`, and of a sparsity one
            value of K.
    """
    if update >= ramp_steps:
        return 1.0
    levels = min(levels, ramp_steps)
    return (update * levels // ramp_steps + 1) / levels


def check_quantization_ramp(arguments: QSparseArguments, config: PreTrainedConfig) -> None:
    """Raise a UserError where there is a ramp and a model of this configuration has no weights that it changes."""
    if not arguments.quantization_ramp_steps:
        return
    found = getattr(config, "weight_quantization", "none")
    if found != "ternary":
        raise UserError(
            "quantization_ramp_steps needs a Q-Sparse model whose weight_quantization is 'ternary', got "
            f"{config.model_type} with {found!r}"
        )


def end_ramps(arguments: QSparseArguments, model: Any) -> None:
    """Run `model` as it is configured, and not as far as the ramps have come; the next update goes on with them."""
    for name in RAMPS:
        if arguments.ramp(name)[0]:
            getattr(model, f"scale_{name}")(1.0)


class Ramps(TrainerCallback):
    """Sets the model's sparsity and quantization at the start of every update, from the update's number alone.

    So a resumed run agrees.

    Args:
        arguments: the trainer's. They are read at every call: a hyperparameter search sets them between its trials.
    """

    def __init__(self, arguments: QSparseArguments) -> None:
        self.arguments = arguments

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        stairs = 0
        for name in RAMPS:
            steps, levels = self.arguments.ramp(name)
            if steps > state.max_steps:
                raise UserError(
                    f"{name}_ramp_steps must be at most the number of updates ({state.max_steps}), got {steps}"
                )
            stairs += levels if steps else 0
        if stairs and args.torch_compile:  # every level is a program of its own, and two ramps climb at other updates
            config = torch._dynamo.config
            config.recompile_limit = max(config.recompile_limit, stairs + 8)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        for name in RAMPS:
            steps, levels = self.arguments.ramp(name)
            if steps:
                getattr(kwargs["model"], f"scale_{name}")(ramp_factor(state.global_step, steps, levels))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        end_ramps(self.arguments, kwargs["model"])


class SecondStage(TrainerCallback):
    """Other values of learning rate and weight decay from one update on: the two stages of BitNet b1.58.

    The paper's table 6 has two learning rates for 1.58-bit models (1.8e-3 and 1.5e-3 at 300M) and a weight decay of 0.1
    and then 0; it says no more. What we take from BitNet b1.58's recipe: the second stage begins at half of the
    updates, and its learning rate is the peak of a schedule over the whole run, so that the rate drops once and goes on
    to the same end. With `linear` and these rates it drops from 0.9e-3 to 0.75e-3. Any schedule of Transformers that is
    a function of the update's number may take the place of `linear`.

    Everything follows from the update's number alone, so a resumed run agrees.

    Args:
        arguments: the trainer's, read at every call.
    """

    def __init__(self, arguments: QSparseArguments) -> None:
        self.arguments = arguments
        self._optimizer: Optimizer | None = None
        self._decaying: list[int] = []  # of the optimizer's groups; the others hold norms and biases

    def attach(self, scheduler: LRScheduler, optimizer: Optimizer, updates: int) -> None:
        """Let a new scheduler and its optimizer have two stages in `updates`, where the arguments say so.

        Raises:
            UserError: the scheduler is no function of the update's number.
        """
        arguments = self.arguments
        rate = arguments.second_stage_learning_rate
        if rate is not None:
            if not isinstance(scheduler, LambdaLR):
                raise UserError(
                    "second_stage_learning_rate needs a schedule of the update's number, like linear, got "
                    f"lr_scheduler_type {SchedulerType(arguments.lr_scheduler_type).value}"
                )
            ratio = rate / arguments.learning_rate

            def staged(first: Any) -> Any:
                return lambda update: first(update) * (ratio if arguments.in_second_stage(update, updates) else 1)

            scheduler.lr_lambdas = [staged(first) for first in scheduler.lr_lambdas]
        self._optimizer = optimizer
        self._decaying = [i for i, group in enumerate(optimizer.param_groups) if group.get("weight_decay")]

    def weight_decay(self) -> float | None:
        """What is at work; None where nothing decays or there is no second weight decay."""
        if self._optimizer is None or not self._decaying or self.arguments.second_stage_weight_decay is None:
            return None
        return self._optimizer.param_groups[self._decaying[0]]["weight_decay"]

    def _decay(self, weight_decay: float | None) -> None:
        if self._optimizer is not None and weight_decay is not None:
            for index in self._decaying:
                self._optimizer.param_groups[index]["weight_decay"] = weight_decay

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        second = self.arguments.second_stage_weight_decay
        if second is not None:
            now_second = self.arguments.in_second_stage(state.global_step, state.max_steps)
            self._decay(second if now_second else self.arguments.weight_decay)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.arguments.second_stage_weight_decay is not None:  # the trainer may train again with this optimizer
            self._decay(self.arguments.weight_decay)
