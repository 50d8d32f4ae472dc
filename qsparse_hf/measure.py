"""What the benchmarks share: interleaved timing, medians, tables."""

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import version
from itertools import chain
from pathlib import Path

import torch
from tqdm import tqdm
from transformers.utils import is_triton_available

from .errors import check_writable, write_whole
from .modeling.sparsify import IMPLS
from .modeling.sparsity import check_sparsity


class HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """The description as it stands, and every option's default."""


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The parsed arguments, with `--sparsity` and `--rounds` added to the parser's own, which include `--output`.

    Ends the program with one line where a value cannot be measured, the output cannot be written or there is no GPU,
    unless the parser has a `--device` and it is another.
    """
    parser.add_argument("--sparsity", type=float, default=0.5, help="fraction of zeros")
    parser.add_argument("--rounds", type=int, default=9, help="interleaved measurements of each")
    arguments = parser.parse_args()
    try:
        check_sparsity(arguments.sparsity)
        check_writable(arguments.output)
    except ValueError as error:
        parser.error(str(error))
    if arguments.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {arguments.rounds}")
    if not torch.cuda.is_available() and getattr(arguments, "device", "cuda") == "cuda":
        parser.error("this is measured on a GPU, and there is none")
    return arguments


def captured(function: Callable[[], object], repeats: int) -> Callable[[], None]:
    """`repeats` calls as one CUDA graph, so that the time of small kernels does not include their launches."""
    function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            function()

    def replay(function=function) -> None:  # keeps what the graph reads alive
        graph.replay()

    return replay


def interleaved(functions: Mapping[str, Callable[[], object]], rounds: int, repeats: int = 1) -> dict[str, list[float]]:
    """Microseconds of each function, measured in turns, once in every round; a call does `repeats` of what is timed.

    Every measured call follows an unmeasured one of the same function, since the function before it leaves its own data
    in the caches. Where there is a GPU, its events take the time, else the host's clock.
    """
    timed = _on_gpu if torch.cuda.is_available() else _on_cpu
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            function()
            times[name].append(timed(function) / repeats)
    return times


def _on_gpu(function: Callable[[], object]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1000


def _on_cpu(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return (time.perf_counter() - start) * 1e6


def medians(times: Mapping[str, Sequence[float]]) -> dict[str, float]:
    return {name: statistics.median(values) for name, values in times.items()}


def print_table(heading: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a Markdown table, each row as soon as it is measured."""
    head: list[Sequence[object]] = [heading, ["---"] * len(heading)]
    for row in chain(head, rows):
        tqdm.write("| " + " | ".join(map(str, row)) + " |", file=sys.stdout)  # leaves progress bars intact
        sys.stdout.flush()


def write_json(path: Path, results: object) -> None:
    """Write the results and the machine they were measured on; missing folders are made."""
    machine = {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": version("triton") if is_triton_available() else None,
        "numba": version("numba") if IMPLS["numba"].refuses([torch.empty(1)], asked=True) is None else None,
        "python": platform.python_version(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps({"machine": machine, "results": results}, indent=1) + "\n")
