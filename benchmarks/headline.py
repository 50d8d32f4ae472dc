"""The README's picture: time over the dense model's, from the figures in `headline.json` (`NOTES.md` has all of them).

python benchmarks/headline.py --output docs/headline.svg
"""

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

FIGURES = Path(__file__).with_suffix(".json")
COLOURS = {"dense": "#d0d0d0", "S = 0.5": "#9ecae1", "S = 0.75": "#6baed6"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("docs/headline.svg"), help="the SVG to write")
    output = parser.parse_args().output

    # Text stays text, and the same figures give the same file.
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "headline", "font.size": 9})
    panels = json.loads(FIGURES.read_text())
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
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, metadata={"Date": None})


if __name__ == "__main__":
    main()
