"""The dense control of a run: how much of what training won is training's, and how much sparsity costs.

The control is the run's model at sparsity 0 and without quantization, which is the dense model bit for bit, trained on
the same rows with the same settings, without ramps and without a teacher. A run on top of a run that had a control
(fine-tuning, say) begins its control from that one.
"""

import json
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from ..errors import UserError, user_errors, write_whole
from ..modeling.configuration_qsparse import QSparseConfigMixin
from .arguments import CONTROL, RAMPS
from .recipe import Recipe

_RECORD = "control.json"
# What a control must share with a run to be held against it.
_RUN = ("stage", "model", "config", "model_fields", "dtype", "lora")
_DATA = ("train_data", "eval_data", "sequence_length", "streaming", "shuffle_window", "repeat_data", "on_bad_row")
_TRAINING = (
    *(
        "rows_per_update",
        "max_steps",
        "num_train_epochs",
        "seed",
        "data_seed",
        "bf16",
        "fp16",
        "label_smoothing_factor",
    ),
    *("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "second_stage", "max_grad_norm"),
    *("optim", "optim_args", "adam_beta1", "adam_beta2", "adam_epsilon", "weight_decay"),
)


def overrides_of_control(recipe: Recipe) -> list[str]:
    """What makes a run's recipe that of its control, as overrides after the run's own.

    Raises:
        UserError: the run's model is dense, or its weights are those of a sparse run that had no control.
    """
    run, training = recipe.run, recipe.training
    output_dir, resume = Path(training.output_dir or ""), training.resume_from_checkpoint
    with user_errors(run.source):
        sparse = isinstance(AutoConfig.from_pretrained(run.source), QSparseConfigMixin)
    if not sparse:
        raise UserError(f"control: {run.source} is dense; a control is of a Q-Sparse model")
    begins: dict[str, Any] = {}
    fields = run.model_fields | {"sparsity": 0, "sparsity_per_projection": None}
    fields |= {"weight_quantization": "none", "activation_quantization": "none"}
    if run.model and (Path(run.model) / CONTROL / "config.json").exists():
        begins["model"] = str(Path(run.model) / CONTROL)
    elif run.model and (Path(run.model) / "trainer_state.json").exists():
        raise UserError(
            f"control: {run.model} was trained without one, and its weights at sparsity 0 are no dense model's; "
            "train it with control=true first"
        )
    values = begins | {
        "output_dir": str(output_dir / CONTROL),
        "model_fields": fields,
        "control": False,
        **{f"{name}_ramp_steps": 0 for name in RAMPS},
        "distill_from": None,
        "push_to_hub": False,
        # The others keep one log for a whole process, and the run's own holds the control's losses.
        "report_to": ["tensorboard"] if "tensorboard" in (training.report_to or []) else ["none"],
    }
    if resume and resume.lower() not in ("false", "no", "off", "0"):
        values["resume_from_checkpoint"] = "last"
    return [f"{name}={json.dumps(value)}" for name, value in values.items()]


def _settings(control: Recipe) -> dict[str, Any]:
    parts = ((control.run, _RUN), (control.data, _DATA), (control.training, _TRAINING))
    settings = {name: getattr(part, name) for part, names in parts for name in names}
    return json.loads(json.dumps(settings, default=str))


def read_control(control: Recipe) -> list[dict[str, Any]] | None:
    """The log of a control that was trained to its end; None where there is none yet.

    Raises:
        UserError: it was trained with other settings.
    """
    file = Path(control.training.output_dir or "") / _RECORD
    if not file.exists():
        return None
    with user_errors(file):
        record = json.loads(file.read_text())
        then, now = record["settings"], _settings(control)
    for name, value in now.items():
        if then.get(name) != value:
            raise UserError(
                f"{file.parent} is a control with {name} {then.get(name)}, and no control of a run with {value}; "
                "delete it to train another, or choose another output_dir"
            )
    return record["log_history"]


def write_control(control: Recipe, history: list[dict[str, Any]]) -> None:
    """Mark a control as trained to its end."""
    file = Path(control.training.output_dir or "") / _RECORD
    write_whole(file, json.dumps({"settings": _settings(control), "log_history": history}, indent=1))
