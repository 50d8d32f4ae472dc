"""Which of what a run logs is a loss, and how the losses of two runs are held against each other."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

_EVAL_LOSS = re.compile(r"eval_(\w+_)?loss")


def eval_losses(logs: Mapping[str, Any]) -> dict[str, Any]:
    """The losses of evaluation texts among metrics: `eval_loss`, or `eval_<name>_loss` of texts with names."""
    return {name: value for name, value in logs.items() if _EVAL_LOSS.fullmatch(name)}


def text_of(name: str) -> str:
    """The text whose loss is called `name`; empty where it has no name."""
    found = _EVAL_LOSS.fullmatch(name)
    return ((found and found[1]) or "").removesuffix("_")


def losses(logs: Mapping[str, Any]) -> dict[str, Any]:
    """What in a log entry can be held against another run's: `loss`, and `eval_losses` with their initial values."""
    return {
        name: value
        for name, value in logs.items()
        if name == "loss" or _EVAL_LOSS.fullmatch(name.removeprefix("initial_"))
    }


def compare(history: Sequence[Mapping[str, Any]], control: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The last loss of each kind in the logs of a run and its control.

    Returns:
        `control_<name>` for what the control logged (`loss`, `eval_loss`, `initial_eval_loss` and so on), and
        `<name>_gap` for what both measured on evaluation texts: the run's minus the control's, in nats a token.
    """
    ours, theirs = (
        {name: value for entry in log for name, value in losses(entry).items()} for log in (history, control)
    )
    gaps = {f"{name}_gap": ours[name] - theirs[name] for name in ours if name in theirs and name != "loss"}
    return {f"control_{name}": value for name, value in theirs.items()} | gaps
