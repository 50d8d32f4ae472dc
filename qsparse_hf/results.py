"""What was measured of a model, as `qsparse eval`, `qsparse compare` and lm-evaluation-harness write it, for a card."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult

from .checkpoint import read_json
from .errors import UserError

_THIS = "this model"
_MISSING = "–"  # noqa: RUF001


@dataclass(frozen=True)
class Results:
    """What was measured of one model, and of others beside it.

    Attributes:
        figures: one of each metric.
        beside: by the name of another model, its values of the same metrics; None where it has none.
        answers: by prompt, each model's answer; the model's own is the first.
    """

    figures: list[EvalResult]
    beside: Mapping[str, list[float | None]] = field(default_factory=dict)
    answers: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    def table(self) -> str:
        """The figures as a Markdown table, a column for each model."""
        columns = [[each.metric_value for each in self.figures], *self.beside.values()]
        heading = ["task", "metric", *([_THIS, *self.beside] if self.beside else ["value"])]
        lines = [heading, ["---"] * len(heading)]
        for each, *values in zip(self.figures, *columns, strict=True):
            shown = [_MISSING if value is None else str(value) for value in values]
            lines.append([each.dataset_name, each.metric_name, *shown])
        return "".join("| " + " | ".join(map(table_cell, line)) + " |\n" for line in lines)

    def conversation(self) -> str:
        """The answers as Markdown, below each prompt a quotation of each model."""
        parts = [
            f"**{table_cell(prompt)}**\n"
            + "".join(f"\n{table_cell(name)}:\n\n{_quoted(answer)}\n" for name, answer in answers.items())
            for prompt, answers in self.answers.items()
        ]
        return "\n".join(parts)


def table_cell(text: str) -> str:
    """In one line, as a cell of a Markdown table holds it."""
    return "<br>".join(text.strip().replace("|", "\\|").splitlines())


def _quoted(answer: str) -> str:
    """A Markdown quotation. Markdown that the model wrote stays it, code above all; what looks like HTML does not."""
    lines, is_code = [], False
    for line in answer.strip().splitlines() or [""]:
        fence = line.lstrip().startswith("```")
        lines.append(f"> {line if is_code or fence else line.replace('<', '&lt;')}")
        is_code ^= fence
    return "\n".join(lines)


def result(data: str, metric: str, name: str, value: float) -> EvalResult:
    """A figure of a text or task `data`, by which the Hub groups results; `name` is the metric's in words."""
    return EvalResult("text-generation", data, data, metric, round(value, 4), metric_name=name)


def read_results(file: str | Path, folder: str | Path) -> Results:
    """What a file of `qsparse eval`, `qsparse compare` or lm-evaluation-harness holds of the model in `folder`.

    The file names models as they were named on the command line, maybe in another place: a model is that of `folder` if
    it is the same folder, or the only one that is called so.

    Raises:
        UserError: no such file, or none of these; one of other models; a figure that is no number.
    """
    held: Any = read_json(Path(file)).get("results")
    try:
        if isinstance(held, dict) and "model" not in held:
            found = Results([*_harness_figures(held)])
        else:
            found = _of_ours(held if isinstance(held, list) else [held], Path(folder), file)
    except UserError:
        raise
    except (TypeError, KeyError, AttributeError, ValueError, OverflowError):
        found = Results([])
    if not found.figures and not found.answers:
        raise UserError(f"{file} holds no results as `qsparse eval`, `compare` or lm-evaluation-harness write them")
    for each in found.figures:
        if not math.isfinite(each.metric_value):
            raise UserError(f"{file}: {each.metric_name} on {each.dataset_name} is {each.metric_value}")
    return found


def _of_ours(rows: list[dict[str, Any]], folder: Path, file: str | Path) -> Results:
    paths = [Path(row["model"]).resolve() for row in rows]
    same = [path == folder.resolve() for path in paths]
    if not any(same):
        same = [path.name == folder.resolve().name for path in paths]
    if sum(same) != 1:
        raise UserError(f"{file} has no results of {folder}, but of {', '.join(row['model'] for row in rows)}")
    mine = rows[same.index(True)]
    calls = [path.name for path in paths]
    others = {
        path.name if calls.count(path.name) == 1 and path.name != _THIS else f"{path.parent.name}/{path.name}": row
        for path, row in zip(paths, rows, strict=True)
        if row is not mine
    }
    figures = [*_own_figures(mine)]
    beside = {}
    for name, row in others.items():
        values = {(each.dataset_name, each.metric_name): each.metric_value for each in _own_figures(row)}
        beside[name] = [values.get((each.dataset_name, each.metric_name)) for each in figures]
    asked = mine.get("answers", {})
    answers = {
        prompt: {
            name: str(row["answers"][prompt])
            for name, row in ({_THIS: mine} | others).items()
            if prompt in row.get("answers", {})
        }
        for prompt in asked
    }
    return Results(figures, beside, answers)


def _own_figures(held: dict[str, Any]) -> Iterator[EvalResult]:
    for name, text in held.get("texts", {}).items():
        yield result(name, "perplexity", f"perplexity ({text['tokens']:,} tokens)", text["perplexity"])
    for name, pairs in held.get("pairs", {}).items():
        yield result(name, "accuracy", f"accuracy ({pairs['pairs']:,} pairs)", pairs["accuracy"])
    for name, task in held.get("tasks", {}).items():
        shots = "" if task["shots"] is None else f" ({task['shots']} shots)"
        yield result(name, task["metric"], task["metric"] + shots, task["score"])


def _harness_figures(held: dict[str, Any]) -> Iterator[EvalResult]:
    for name, measured in sorted(held.items()):
        for key, value in measured.items():
            metric, comma, variant = key.partition(",")
            if comma and isinstance(value, int | float) and not metric.endswith("_stderr"):
                yield result(name, metric, metric if variant == "none" else f"{metric} ({variant})", value)
