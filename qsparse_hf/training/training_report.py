"""What a run did, as one HTML page: its curves and its last figures."""

import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerState

from ..losses import eval_losses
from ..modeling.configuration_qsparse import GROUPS

REPORT = "training_report.html"

# A panel for each group of logged figures that belong on one scale.
_PANELS = {
    "loss (nats a token)": ("loss", "cross_entropy", "distill_kl", "control_loss"),
    "learning rate": ("learning_rate",),
    "gradient norm": ("grad_norm",),
    "weight decay": ("weight_decay",),
    "sparsity": tuple(f"sparsity/{group}" for group in (*GROUPS, "all")),
    "strength of the quantization": ("quantization_strength",),
    "tokens a second": ("tokens_per_second",),
    "model FLOP utilisation": ("mfu",),
}
_FIGURES = {
    "loss": "{:.4f}",
    "control_loss": "{:.4f}",
    "cross_entropy": "{:.4f}",
    "distill_kl": "{:.4f}",
    "tokens_seen": "{:,.0f}",
    "tokens_per_second": "{:,.0f}",
    "mfu": "{:.1%}",
    "sparsity/all": "{:.1%}",
    "quantization_strength": "{:.0%}",
    "activated_parameters": "{:,.0f}",
    "rows_skipped": "{:,.0f}",
}
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<style>body {{ font: 15px sans-serif; max-width: 1000px; margin: 2em auto }} svg {{ width: 100%; height: auto }}
td, th {{ padding: 0.2em 1.5em 0.2em 0; text-align: left }} td {{ font-variant-numeric: tabular-nums }}</style></head>
<body><h1>{title}</h1><p>{updates:,} of {planned:,} updates</p>
<table><tr><th>figure</th><th>first</th><th>last</th></tr>{rows}</table>
{curves}</body></html>
"""


def _curve(history: list[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    points = [(entry["step"], entry[name]) for entry in history if name in entry]
    return [step for step, _ in points], [value for _, value in points]


def write_training_report(state: TrainerState, output_dir: str | Path, title: str) -> Path:
    """Draw the log of a run into `output_dir`; nothing else is needed to look at the page.

    Args:
        state: the trainer's, with its `log_history`; of a resumed run it holds the whole run.
        output_dir: folder, made if it is missing.
        title: heading of the page.

    Returns:
        The path of the page.
    """
    logged = {name: None for entry in state.log_history for name in entry}  # in the order of their first entries
    held_out = [name for name in logged if name.removeprefix("control_") in eval_losses(logged)]
    panels = {"held-out loss (nats a token)": held_out} | _PANELS
    curves = {name: _curve(state.log_history, name) for name in logged}
    rows = "".join(
        f"<tr><td>{name}</td><td>{form.format(curves[name][1][0])}</td><td>{form.format(curves[name][1][-1])}</td></tr>"
        for name, form in (dict.fromkeys(held_out, "{:.4f}") | _FIGURES).items()
        if name in curves
    )
    page = _PAGE.format(
        title=html.escape(title),
        updates=state.global_step,
        planned=state.max_steps,
        rows=rows,
        curves=_draw(panels, curves),
    )
    path = Path(output_dir) / REPORT
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
    return path


def _draw(panels: Mapping[str, Sequence[str]], curves: dict[str, tuple[list[int], list[float]]]) -> str:
    """The panels that have a curve, as SVG; a control's curves are dashed."""
    from matplotlib.figure import Figure

    panels = {title: [n for n in names if n in curves] for title, names in panels.items()}
    panels = {title: names for title, names in panels.items() if names}
    if not panels:
        return "<p>Nothing was logged.</p>"
    lines = (len(panels) + 1) // 2
    figure = Figure(figsize=(11, 3.3 * lines), layout="constrained")
    for index, (title, names) in enumerate(panels.items(), 1):
        axes = figure.add_subplot(lines, 2, index)
        for name in names:
            steps, values = curves[name]
            style = "--" if name.startswith("control_") else "-"
            axes.plot(steps, values, style, label=name, marker="." if len(steps) < 30 else None)
        axes.set_title(title)
        axes.set_xlabel("optimizer updates")
        axes.grid(alpha=0.3)
        if len(names) > 1:
            axes.legend(fontsize="small")
    drawn = io.StringIO()
    figure.savefig(drawn, format="svg", metadata={"Date": None})
    return drawn.getvalue()[drawn.getvalue().index("<svg") :]
