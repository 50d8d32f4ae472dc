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


@dataclass(frozen=True)
class Results:
    """What was measured of one model, and of others beside it.

    Attributes:
        figures: one of each metric.
        beside: by the name of another model, its values of the same metrics.
        answers: by prompt, each model's answer; the model's own is the first.
    """

    figures: list[EvalResult]
    beside: Mapping[str, list[float]] = field(default_factory=dict)
    answers: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    def table(self) -> str:
        """The figures as a Markdown table, a column for each model."""
        models = [_THIS, *self.beside] if self.beside else ["value"]
        rows = zip(*([each.metric_value for each in self.figures], *self.beside.values()), strict=True)
        return _table(
            ["task", "metric", *models],
            ([each.dataset_name, each.metric_name, *row] for each, row in zip(self.figures, rows, strict=True)),
        )

    def conversation(self) -> str:
        """The answers as Markdown, a table for each prompt."""
        parts = []
        for prompt, answers in self.answers.items():
            rows = ([name, cell(answer)] for name, answer in answers.items())
            parts.append(f"**{cell(prompt)}**\n\n{_table(['model', 'answer'], rows)}")
        return "\n".join(parts)


def _table(heading: list[str], rows: Any) -> str:
    lines = (heading, ["---"] * len(heading), *rows)
    return "".join("| " + " | ".join(map(str, line)) + " |\n" for line in lines)


def cell(answer: str) -> str:
    """As a cell of a Markdown table holds it."""
    return "<br>".join(answer.strip().replace("|", "\\|").splitlines())


def result(data: str, metric: str, name: str, value: float) -> EvalResult:
    """A figure of a text or task `data`, by which the Hub groups results; `name` is the metric's in words."""
    return EvalResult("text-generation", data, data, metric, round(value, 4), metric_name=name)


def read_results(file: str | Path, folder: str | Path) -> Results:
    """What a file of `qsparse eval`, `qsparse compare` or lm-evaluation-harness holds of the model in `folder`.

    Raises:
        UserError: no such file, or none of these; one without that model; a figure that is no number.
    """
    held: Any = read_json(Path(file)).get("results")
    try:
        if isinstance(held, list):
            found = _compared(held, Path(folder), file)
        else:
            found = Results([*(_own_figures(held) if "model" in held else _harness_figures(held))])
    except (TypeError, KeyError, AttributeError):
        found = Results([])
    if not found.figures and not found.answers:
        raise UserError(f"{file} holds no results as `qsparse eval`, `compare` or lm-evaluation-harness write them")
    for each in found.figures:
        if not math.isfinite(each.metric_value):
            raise UserError(f"{file}: {each.metric_name} on {each.dataset_name} is {each.metric_value}")
    return found


def _compared(rows: list[dict[str, Any]], folder: Path, file: str | Path) -> Results:
    mine = [row for row in rows if Path(row["model"]).resolve() == folder.resolve()]
    if not mine:
        raise UserError(f"{file} has no results of {folder}, but of {', '.join(row['model'] for row in rows)}")
    names = {_THIS: mine[0]} | {Path(row["model"]).name: row for row in rows if row is not mine[0]}
    figures = {name: [*_own_figures(row)] for name, row in names.items()}
    beside = {name: [each.metric_value for each in figures[name]] for name in names if name != _THIS}
    answers = {
        prompt: {name: row["answers"][prompt] for name, row in names.items()} for prompt in mine[0].get("answers", {})
    }
    return Results(figures[_THIS], beside, answers)


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
