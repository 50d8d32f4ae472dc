"""Checkpoints beside each other, dense and Q-Sparse: what they are worth, and what they cost."""

import gc
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from transformers import PreTrainedModel
from transformers.utils import ADAPTER_SAFE_WEIGHTS_NAME

from .bench import tokens_per_second
from .checkpoint import locate_tensors
from .errors import UserError, check_writable, user_errors
from .evaluation import (
    Evaluation,
    PairAccuracy,
    Result,
    Suite,
    check_checkpoint,
    results_to_dict,
)
from .generate import answer_prompts, read_prompts
from .loading import check_dtype, find_base, find_device, load_checkpoint
from .measure import print_table, write_json
from .modeling.bitnet import CODES_IN_A_BYTE, PackedLinear
from .report import count_parameters, count_weights, short_count
from .results import table_cell


def compare_checkpoints(
    names: Sequence[str],
    suite: Suite,
    device: str | None = None,
    dtype: str = "auto",
    output: str | Path | None = None,
    picture: str | Path | None = None,
    prompts: str | Path | None = None,
) -> list[dict[str, Any]]:
    """Measure each checkpoint and print a table.

    Args:
        names: each as `load_checkpoint` takes it.
        suite: what they are measured on.
        device: "cuda" or "cpu"; None for a GPU where there is one.
        dtype: of all of them; "auto" for each checkpoint's own.
        output: a JSON file for everything, written again after each checkpoint.
        picture: a PNG file for quality over activated parameters.
        prompts: a text file; each model answers each of its lines.

    Returns:
        Of each checkpoint, what is written as JSON.

    Raises:
        UserError: a checkpoint or an output that cannot be, before anything is measured; or what cannot be read later.
    """
    find_device(device)
    check_dtype(dtype)
    for target in (output, picture):
        if target is not None:
            check_writable(target)
    if picture is not None and Path(picture).suffix.lower() != ".png":
        raise UserError(f"a picture is a PNG, whose name ends with .png, got {str(picture)!r}")
    for number, name in enumerate(names):
        if name in names[:number]:
            raise UserError(f"{name} is named twice")
    asked = read_prompts(prompts) if prompts is not None else []
    protocols = {name: str(check_checkpoint(name, suite.protocol)) for name in names}
    rows: list[dict[str, Any]] = []

    def measured() -> Iterator[list[tuple[str, str]]]:
        for name in names:
            model, tokenizer = load_checkpoint(name, device, dtype)
            results = dict(suite.measure(model, tokenizer))
            with user_errors(name):
                cost = _cost(name, model)
            rows.append({"model": name, "dtype": str(model.dtype)} | cost | results_to_dict(results))
            if asked:
                rows[-1]["answers"] = dict(zip(asked, answer_prompts(model, tokenizer, asked), strict=True))
            del model
            gc.collect()
            if output is not None:
                with user_errors(output):
                    write_json(Path(output), rows)
            yield [("model", name), *((each, _quality(result)) for each, result in results.items()), *_cells(rows[-1])]

    if suite.texts:
        same = set(protocols.values())
        print(*(same if len(same) == 1 else (f"{name}: {each}" for name, each in protocols.items())), sep="\n")
    print("loss of a text in nats a token, accuracy on pairs and tasks; speed of one sequence, sparse models prepared")
    table = measured()
    first = next(table)  # which knows what tasks are called
    print_table([heading for heading, _ in first], ([cell for _, cell in row] for row in chain([first], table)))
    for prompt in asked:
        print(f"\n**{prompt}**\n")
        print_table(["model", "answer"], ([row["model"], table_cell(row["answers"][prompt])] for row in rows))
    if picture is not None:
        with user_errors(picture):
            _draw(rows, Path(picture))
    return rows


def _cost(name: str, model: PreTrainedModel) -> dict[str, Any]:
    """What a token costs, as JSON takes it; for parameters of projections None where the family is not known."""
    projections, activated = count_parameters(model)
    packed = [module for module in model.modules() if isinstance(module, PackedLinear)]
    held = [*model.parameters(), *(buffer for linear in packed for buffer in linear.buffers())]
    unread = (projections - activated) * (1 / CODES_IN_A_BYTE if packed else model.dtype.itemsize)
    embedding: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()
    if head is None or head.weight is not embedding.weight:  # of which one row is read
        unread += embedding.weight.nbytes
    return {
        "parameters": count_weights(model),
        "projection_parameters": projections or None,
        "activated_parameters": activated or None,
        "bytes_read_per_token": round(sum(tensor.nbytes for tensor in held) - unread),
        "bytes_on_disk": _size_on_disk(name),
        "tokens_per_second": tokens_per_second(model),
    }


def _size_on_disk(name: str) -> int:
    """Bytes of a checkpoint's weights, which are there, as they were loaded; of adapters, with their base model's."""
    base = find_base(name)
    folder = Path(base)
    if not folder.is_dir():
        folder = Path(snapshot_download(base, allow_patterns="*.safetensors*", local_files_only=True))
    files = {tensor.path for tensor in locate_tensors(folder).values()}
    if base != name:
        files.add(Path(name, ADAPTER_SAFE_WEIGHTS_NAME))
    return sum(file.stat().st_size for file in files)


def _quality(result: Result) -> str:
    if isinstance(result, Evaluation):
        return f"{result.loss:.4f}"
    return f"{result.accuracy:.4f}" if isinstance(result, PairAccuracy) else f"{result.score:.4f}"


def _cells(row: Mapping[str, Any]) -> list[tuple[str, str]]:
    projections, activated = row["projection_parameters"], row["activated_parameters"]
    return [
        ("activated", f"{short_count(activated)} of {short_count(projections)}" if activated else ""),
        ("dtype", row["dtype"].removeprefix("torch.")),
        ("read a token", f"{row['bytes_read_per_token'] / 1e6:,.1f} MB"),
        ("on disk", f"{row['bytes_on_disk'] / 1e6:,.1f} MB"),
        ("tokens/s", f"{row['tokens_per_second']:.1f}"),
    ]


def _draw(rows: Sequence[Mapping[str, Any]], file: Path) -> None:
    """A panel for each text, pairs and task: loss or accuracy over activated parameters, a point for each model."""
    from matplotlib.figure import Figure

    values = {"texts": "loss", "pairs": "accuracy", "tasks": "score"}
    panels = [(kind, name) for kind in values for name in rows[0][kind]]
    figure = Figure(figsize=(4.5 * len(panels), 4), layout="constrained")
    for axes, (kind, name) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for row in rows:
            millions = (row["activated_parameters"] or row["parameters"]) / 1e6
            value = row[kind][name][values[kind]]
            axes.scatter(millions, value)
            label = Path(row["model"]).name or row["model"]
            axes.annotate(label, (millions, value), xytext=(4, 4), textcoords="offset points", fontsize=8)
        axes.set_title(name)
        axes.set_xlabel("weights of projections that a token reads, millions")
        axes.set_ylabel("loss, nats a token" if kind == "texts" else "accuracy")
        axes.margins(0.2)
    figure.savefig(file, dpi=120)
