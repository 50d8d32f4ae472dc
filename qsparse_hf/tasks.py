"""Tasks of lm-evaluation-harness, with a model that is loaded already. The harness is imported when tasks are named."""

import logging
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn
from transformers import PreTrainedTokenizerBase

from .errors import UserError, user_errors
from .report import SparsityReport, counting, projections, totals

PAPER = {"arc_challenge": 25, "hellaswag": 10, "mmlu": 5, "winogrande": 5, "truthfulqa_mc2": 0}
"""The tasks of the paper's tables 7 and 8 (arXiv 2407.10969), with the Open LLM Leaderboard's numbers of shots."""

_ACCURACIES = ("acc_norm", "acc")  # the leaderboard takes the first where a task has both


class Task(NamedTuple):
    """A task to run.

    Attributes:
        name: of a task, a group or a tag of the harness, or the path of a YAML file that defines one.
        shots: solved examples before each question; None for what the task says.
    """

    name: str
    shots: int | None


@dataclass(frozen=True)
class TaskScore:
    """How a model did.

    Attributes:
        metric: what `score` is: `acc_norm` where the task has it, else `acc`, else its first one.
        questions: that were asked; of a group, those of its tasks.
        shots: solved examples before each; None for a group.
        standard_error: of `score`; None where the harness gives none.
        metrics: all of the task's.
        sparsity: of what the projections read meanwhile, padding included; of tasks that were run as one group, of all;
            None for a model of a family that is not in `registration.FAMILIES`.
    """

    task: str
    metric: str
    score: float
    questions: int | None
    shots: int | None
    standard_error: float | None
    metrics: dict[str, float]
    sparsity: SparsityReport | None

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON takes it, but for the sparsity of single layers."""
        return vars(self) | totals(self.sparsity)


def find_tasks(names: Iterable[str]) -> list[Task]:
    """The tasks that `names` mean: a task, group, tag or YAML file, with `:SHOTS` or without, or `paper` for `PAPER`.

    Raises:
        UserError: the harness is not installed, or a name is none of these.
    """
    tasks: dict[str, Task] = {}
    for name in names:
        head, colon, shots = name.rpartition(":")
        if name == "paper":
            tasks |= {each: Task(each, count) for each, count in PAPER.items()}
        elif colon and shots.isdecimal():
            tasks[head] = Task(head, int(shots))
        else:
            tasks[name] = Task(name, None)
    if not tasks:
        return []
    if find_spec("lm_eval") is None:
        raise UserError("tasks are run by lm-evaluation-harness: pip install 'qsparse-hf[eval]'")
    for task in tasks:
        if not _is_file(task) and task not in _manager(defaults=True).task_index:
            raise UserError(
                f"{task!r} is no task of lm-evaluation-harness (`lm_eval ls tasks` lists them) and no YAML file of one"
            )
    return list(tasks.values())


def run_tasks(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Iterable[Task],
    batch_size: int = 8,
    questions: int | None = None,
) -> list[TaskScore]:
    """Run `tasks`, one after the other.

    Args:
        model: a causal language model; it runs where it is, in its own dtype.
        tasks: from `find_tasks`.
        batch_size: sequences at once.
        questions: ask at most that many of each task; None for all.

    Raises:
        UserError: a task's data cannot be loaded, or it does not run.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of a model that it did not load itself
    scores = []
    known = next(projections(model), None) is not None
    wrapped: Any = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    for task in tasks:
        manager = _manager(defaults=not _is_file(task.name))
        with ExitStack() as stack:
            counters = stack.enter_context(counting(model)) if known else None
            stack.enter_context(user_errors(f"task {task.name}"))
            found = simple_evaluate(
                wrapped, tasks=[task.name], num_fewshot=task.shots, limit=questions, task_manager=manager
            )
        names = [task.name] if task.name in found["results"] else list(found["results"])
        scores += [_score(name, found, None if counters is None else counters.report()) for name in names]
    return scores


def _is_file(task: str) -> bool:
    return task.endswith((".yaml", ".yml")) and Path(task).is_file()


@cache
def _manager(defaults: bool) -> Any:
    """The harness's tasks, 14,000 files that take it seconds to read; or none, for tasks in files of their own."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_defaults=defaults)


def _score(name: str, found: dict[str, Any], sparsity: SparsityReport | None) -> TaskScore:
    values = {key.partition(",")[0]: value for key, value in found["results"][name].items() if "," in key}
    metrics = {key: value for key, value in values.items() if isinstance(value, int | float)}
    scores = {key: value for key, value in metrics.items() if not key.endswith("_stderr")}
    metric = next((key for key in (*_ACCURACIES, *scores) if key in scores), None)
    if metric is None:
        raise UserError(f"task {name} gave no number")
    parts = found.get("group_subtasks", {}).get(name) or [name]
    asked = [found["n-samples"][part]["effective"] for part in parts if part in found.get("n-samples", {})]
    return TaskScore(
        name,
        metric,
        scores[metric],
        sum(asked) or None,
        found["n-shot"].get(name),
        metrics.get(f"{metric}_stderr"),
        metrics,
        sparsity,
    )
