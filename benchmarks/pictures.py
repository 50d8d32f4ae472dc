"""The README's pictures, speed and quality, from the figures in `headline.json` and `quality.json` (all in `NOTES.md`).

python benchmarks/pictures.py --output docs
"""

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

HERE = Path(__file__).parent
COLOURS = {"dense": "#d0d0d0", "S = 0.5": "#9ecae1", "S = 0.75": "#6baed6"} | {
    "one ratio": "#d0d0d0",
    "calibrated": "#3182bd",
    "English": "#3182bd",
    "Python": "#e6550d",
}


def headline(panels: list[dict[str, Any]]) -> Figure:
    """Time over the dense model's."""
    figure, axes = plt.subplots(1, len(panels), figsize=(10, 2.2), layout="constrained", facecolor="white")
    for panel, axis in zip(panels, axes, strict=True):
        bars = [("dense", 1.0, "1")]
        for row in panel["milliseconds"]:
            label = f"{row['dense']:g} to {row['sparse']:g} ms, {row['dense'] / row['sparse']:.1f}x as fast"
            bars.append((row["name"], row["sparse"] / row["dense"], label))
        for place, (name, length, label) in enumerate(bars):
            axis.barh(place, length, 0.7, color=COLOURS[name])
            axis.text(0.02, place, label, va="center")
        axis.set_yticks(range(len(bars)), [name for name, _, _ in bars])
        axis.set_ylim(2.5, -0.5)
        axis.set_xlim(0, 1.1)
        axis.set_xticks([])
        axis.set_title(panel["title"], weight="bold", size=10, loc="left")
        axis.set_xlabel(panel["what"], loc="left")
        axis.spines[["top", "right", "bottom"]].set_visible(False)
    return figure


def quality(figures: dict[str, Any]) -> Figure:
    """What sparsity costs a real model, untrained over the sparsity and over the tokens of training."""
    figure, (placed, trained) = plt.subplots(1, 2, figsize=(10, 3), layout="constrained", facecolor="white")
    for axes, panel, along in ((placed, "perplexity", "sparsity"), (trained, "training", "tokens")):
        lines = dict(figures[panel])
        x = lines.pop(along)
        for name, values in lines.items():
            text, _, model = name.partition(", ")
            axes.plot(x, values, "--" if model == "dense" else "-", marker="o", color=COLOURS[text], label=name)
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    placed.set_title(f"{figures['model']}, not trained", weight="bold", size=10, loc="left")
    placed.set(xlabel="sparsity", ylabel="perplexity of WikiText-2", xticks=figures["perplexity"]["sparsity"])
    trained.set_title("calibrated at 0.5, and trained as the dense model is", weight="bold", size=10, loc="left")
    trained.set(xlabel="million tokens of training", ylabel="held-out loss, nats a token")
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("docs"), help="folder for the SVGs")
    output = parser.parse_args().output
    output.mkdir(parents=True, exist_ok=True)
    for draw in (headline, quality):
        # Text stays text, and the same figures give the same file.
        matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": draw.__name__, "font.size": 9})
        figures = json.loads((HERE / f"{draw.__name__}.json").read_text())
        draw(figures).savefig(output / f"{draw.__name__}.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
