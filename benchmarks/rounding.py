"""What rounding does to a real model: one forward computed in two ways, compared token by token and on average.

    qsparse convert DENSE_MODEL runs/sparse --sparsity 0.5
    python benchmarks/rounding.py runs/sparse --text TEXT_FILE --output runs/rounding.json
    python benchmarks/rounding.py runs/sparse --text TEXT_FILE --dtype float64 --windows 2 --step-windows 1

Two ways that are equal but for rounding: attention as "eager" against "sdpa", and the prepared model's cached steps,
one token at a time, against one forward over the window. Both read the same text, whatever either would have generated,
on a CPU. A top-K is discontinuous, so that where two features are nearly equal the last bit decides which one survives,
and the layers behind amplify that. In fp64 steps and forward agree, which says that it is rounding and no mistake;
eager attention still differs there, as Transformers computes its softmax in fp32.
"""

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, PreTrainedModel

import qsparse_hf  # noqa: F401, registers the model types
from qsparse_hf.errors import check_writable
from qsparse_hf.measure import HelpFormatter, print_table, write_json
from qsparse_hf.modeling.sparsity import check_sparsity


class Predictions(NamedTuple):
    """What a model makes of every position of the windows that has a next token, in one row."""

    log_probability: Tensor
    """Of the token that the text goes on with, in nats."""
    greedy: Tensor
    """The likeliest token."""


@torch.no_grad()
def predict(logits_of: Callable[[Tensor], Tensor], windows: Tensor, what: str) -> Predictions:
    """The predictions for `windows [W, T]` by what gives logits `[1, T, V]` of tokens `[1, T]`."""
    log_probability, greedy = [], []
    for window in tqdm(windows.split(1), desc=what, unit="window", leave=False):
        scores = logits_of(window)[0, :-1].double().log_softmax(-1)
        log_probability.append(scores.gather(1, window[0, 1:, None])[:, 0])
        greedy.append(scores.argmax(-1))
    return Predictions(torch.cat(log_probability), torch.cat(greedy))


def steps_of(model: PreTrainedModel) -> Callable[[Tensor], Tensor]:
    """The logits from cached steps of one token each."""

    def logits_of(tokens: Tensor) -> Tensor:
        cache = DynamicCache(config=model.config)
        return torch.cat([model(token, past_key_values=cache).logits for token in tokens.split(1, dim=1)], dim=1)

    return logits_of


def compare(one: Predictions, other: Predictions) -> dict:
    """How far two ways are apart, position by position and in their mean losses."""
    return {
        "positions": one.greedy.numel(),
        "same_greedy_token": (one.greedy == other.greedy).double().mean().item(),
        "mean_absolute_difference": (one.log_probability - other.log_probability).abs().mean().item(),
        "losses": [-each.log_probability.mean().item() for each in (one, other)],
    }


def rows(arguments: argparse.Namespace, windows: Tensor) -> Iterator[dict]:
    """For every sparsity, the two comparisons."""
    for sparsity in arguments.sparsities:
        dtype = getattr(torch, arguments.dtype)
        model = AutoModelForCausalLM.from_pretrained(arguments.model, sparsity=sparsity, dtype=dtype).eval()

        def forward(tokens: Tensor, model: PreTrainedModel = model) -> Tensor:
            return model(tokens, use_cache=False).logits

        forwards = {}
        for attention in ("eager", "sdpa"):
            model.set_attn_implementation(attention)
            forwards[attention] = predict(forward, windows, f"{sparsity:g}, {attention}")
        yield {"sparsity": sparsity, "ways": "eager, sdpa", **compare(*forwards.values())}
        model.prepare_for_decode()
        some = windows[: arguments.step_windows]
        steps = predict(steps_of(model), some, f"{sparsity:g}, steps")
        whole = Predictions(*(each[: steps.greedy.numel()] for each in forwards["sdpa"]))
        yield {"sparsity": sparsity, "ways": "one forward, prepared steps", **compare(whole, steps)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("model", help="a Q-Sparse checkpoint with its tokenizer")
    parser.add_argument("--text", type=Path, required=True, help="a UTF-8 file; windows at even distances are read")
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.0, 0.25, 0.5], help="fractions of zeros")
    parser.add_argument("--window", type=int, default=512, help="tokens of a window")
    parser.add_argument("--windows", type=int, default=16, help="how many the forwards read")
    parser.add_argument("--step-windows", type=int, default=2, help="how many of these the steps read")
    parser.add_argument("--dtype", choices=["float32", "float64", "bfloat16"], default="float32", help="of the model")
    parser.add_argument("--output", type=Path, default=Path("runs/rounding.json"), help="JSON with every figure")
    arguments = parser.parse_args()
    try:
        check_writable(arguments.output)
        for sparsity in arguments.sparsities:
            check_sparsity(sparsity)
        text = arguments.text.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        parser.error(str(error))
    if not 1 <= arguments.step_windows <= arguments.windows or arguments.window < 2:
        parser.error("--windows and --step-windows must be at least 1, the second no more than the first, --window 2")
    tokens = AutoTokenizer.from_pretrained(arguments.model)(text, return_tensors="pt", verbose=False).input_ids[0]
    available = len(tokens) // arguments.window
    if available < arguments.windows:
        parser.error(f"{arguments.text} has {len(tokens)} tokens, which are {available} windows of {arguments.window}")
    windows = tokens[: available * arguments.window].view(available, -1)
    windows = windows[:: available // arguments.windows][: arguments.windows]

    results = []

    def cells() -> Iterator[list[object]]:
        for row in rows(arguments, windows):
            results.append(row)
            write_json(arguments.output, results)
            yield [
                row["sparsity"],
                row["ways"],
                row["positions"],
                f"{row['same_greedy_token']:.1%}",
                f"{row['mean_absolute_difference']:.2g}",
                *(f"{loss:.4f}" for loss in row["losses"]),
            ]

    heading = ["S", "ways", "positions", "same greedy token", "a token's log-probability moves by, nats"]
    print_table([*heading, "mean loss, the first way", "the second"], cells())


if __name__ == "__main__":
    main()
