"""What the exact top-K costs beside a copy of the tensor, `torch.topk` and `torch.compile`; alone, in blocks, fused.

    python benchmarks/topk.py --output topk.json
    python benchmarks/topk.py --features 4096 --dtype float32

Every row is a GPU time, the median over interleaved rounds of a CUDA graph's replays, and its ratio to the floor. The
floor of a top-K is a copy of the tensor; that of a fused form is the operation it is fused with, compiled, without a
top-K. `torch.topk` is the implementation called "torch": `torch.topk`, a mask, and the order among equals.
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from qsparse_hf.measure import HelpFormatter, captured, interleaved, medians, parse, print_table, write_json
from qsparse_hf.modeling.sparsify import gated, glu_sparsify, rms_norm, rms_norm_sparsify, topk_sparsify

REPEATS = 4


def forms(x: Tensor, block_sizes: list[int], sparsity: float) -> dict[str, dict[str, Callable[[], object]]]:
    """What is compared, by form: the floor first, ours second."""
    y, weight = torch.empty_like(x), torch.randn_like(x[0])
    up = torch.randn_like(x)

    def compiled(function: Callable, *inputs: object) -> Callable[[], object]:
        run = torch.compile(function, dynamic=False)
        return lambda: run(*inputs)

    def copy() -> Tensor:
        return y.copy_(x)

    plain = {
        "copy": copy,
        "ours": lambda: topk_sparsify(x, sparsity),
        "torch.topk": lambda: topk_sparsify(x, sparsity, backend="torch"),
        "compiled torch.topk": compiled(lambda x: topk_sparsify(x, sparsity, backend="torch"), x),
    }
    blocks = {
        f"top-K in blocks of {size}": {
            "copy": copy,
            "ours": lambda size=size: topk_sparsify(x, sparsity, size),
            "torch.topk": lambda size=size: topk_sparsify(x, sparsity, size, backend="torch"),
        }
        for size in block_sizes
    }
    fused = {}
    for in_blocks, size in {"": None, " in blocks of 32": 32}.items():
        for name, dense, ours, inputs in (
            ("RMSNorm", partial(rms_norm, eps=1e-5), partial(rms_norm_sparsify, eps=1e-5), (x, weight)),
            ("SiLU(gate) * up", partial(gated, activation="silu"), partial(glu_sparsify, activation="silu"), (x, up)),
        ):
            ours = partial(ours, sparsity=sparsity, block_size=size)
            fused[f"{name} + top-K{in_blocks}"] = {
                f"compiled {name}": compiled(dense, *inputs),
                "ours": partial(ours, *inputs),
                "copy": copy,
            }
            if size is None:
                fused[f"{name} + top-K, forward and backward"] = {
                    f"compiled {name}": with_gradients(torch.compile(dense, dynamic=False), inputs, up),
                    "ours": with_gradients(ours, inputs, up),
                }
    return {
        "top-K": plain,
        **blocks,
        "top-K, L2 rescale": {"copy": copy, "ours": lambda: topk_sparsify(x, sparsity, rescale="l2")},
        **fused,
    }


def with_gradients(function: Callable, inputs: tuple[Tensor, ...], upstream: Tensor) -> Callable[[], object]:
    """A call of the function and of its gradients, for the gradient `upstream` of its output."""
    leaves = [each.detach().requires_grad_() for each in inputs]
    return lambda: torch.autograd.grad(function(*leaves), leaves, upstream)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument(
        "--features", type=int, nargs="+", default=[2048, 4096, 11008, 14336], metavar="D", help="of a row"
    )
    parser.add_argument(
        "--block-sizes", type=int, nargs="*", default=[4, 8, 16, 32, 64, 128], metavar="M", help="of a block"
    )
    parser.add_argument(
        "--block-features",
        type=int,
        nargs="*",
        default=[4096],
        metavar="D",
        help="where blocks other than 32 are timed",
    )
    parser.add_argument("--tokens", type=int, default=16384, help="rows of the tensor")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16", help="of the tensor")
    parser.add_argument("--output", type=Path, default=Path("topk.json"), help="JSON with every time, in microseconds")
    arguments = parse(parser)

    results, rows = [], []
    for features in tqdm(arguments.features, desc="features"):
        torch.manual_seed(0)
        x = torch.randn(arguments.tokens, features, device="cuda", dtype=getattr(torch, arguments.dtype))
        sizes = [size for size in arguments.block_sizes if features in arguments.block_features or size == 32]
        for form, functions in forms(x, sizes, arguments.sparsity).items():
            graphs = {name: captured(function, REPEATS) for name, function in functions.items()}
            times = interleaved(graphs, arguments.rounds, REPEATS)
            results.append({"form": form, "features": features, "microseconds": times})
            median = medians(times)
            floor = next(iter(median.values()))
            for name, value in median.items():
                rows.append([form, features, name, f"{value:.1f}", f"{value / floor:.2f}"])
            del graphs, functions
            write_json(arguments.output, results)
    print_table(["form", "D", "what", "us", "of the floor"], rows)


if __name__ == "__main__":
    main()
