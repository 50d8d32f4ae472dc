"""The README's second picture: what sparsity costs a real model, from the figures in `quality.json`.

python benchmarks/quality.py --output docs/quality.svg
"""

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

FIGURES = Path(__file__).with_suffix(".json")
COLOURS = {"one ratio": "#d0d0d0", "calibrated": "#3182bd", "English": "#3182bd", "Python": "#e6550d"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("docs/quality.svg"), help="the SVG to write")
    output = parser.parse_args().output

    # Text stays text, and the same figures give the same file.
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "quality", "font.size": 9})
    figures = json.loads(FIGURES.read_text())
    figure, (placed, trained) = plt.subplots(1, 2, figsize=(10, 3), layout="constrained", facecolor="white")
    x, lines = _lines(figures["perplexity"], "sparsity")
    for name, values in lines.items():
        placed.plot(x, values, marker="o", color=COLOURS[name], label=name)
    placed.set_title(f"{figures['model']}, not trained", weight="bold", size=10, loc="left")
    placed.set(xlabel="sparsity", ylabel="perplexity of WikiText-2", xticks=x)
    x, lines = _lines(figures["training"], "tokens")
    for name, values in lines.items():
        text, model = name.split(", ")
        style = "--" if model == "dense" else "-"
        trained.plot(x, values, style, marker="o", color=COLOURS[text], label=name)
    trained.set_title("calibrated at 0.5, and trained as the dense model is", weight="bold", size=10, loc="left")
    trained.set(xlabel="million tokens of training", ylabel="held-out loss, nats a token")
    for axes in (placed, trained):
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, metadata={"Date": None})


def _lines(panel: dict[str, list[float]], along: str) -> tuple[list[float], dict[str, list[float]]]:
    return panel[along], {name: values for name, values in panel.items() if name != along}


if __name__ == "__main__":
    main()
