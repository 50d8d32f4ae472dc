"""A training step of dense and Q-Sparse Llamas: time, tokens a second, peak memory; eager and compiled.

    python benchmarks/train_step.py --output train_step.json
    python benchmarks/train_step.py --models 7b --modes compiled

A step is forward, backward and a fused AdamW update in bf16, on 8 x 2048 random tokens; that takes 25 GB. The models
are slices: a few layers as wide as a 1.3B or a 7B Llama. The variants share one set of weights and take turns: the
dense model, the Q-Sparse model on `torch.topk`, and on our kernels, there also with ternary weights, with int8
activations and with both. Peak memory is a step's own, weights and optimizer included.

`--models tiny --device cpu` shows on any machine that it runs, without a peak; its times say nothing.
"""

import argparse
import gc
import math
from functools import partial
from pathlib import Path
from unittest import mock

import torch
from torch import nn
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

from qsparse_hf import QSparseLlamaConfig, QSparseLlamaForCausalLM
from qsparse_hf.measure import HelpFormatter, interleaved, medians, parse, print_table, write_json
from qsparse_hf.modeling import sparsify

SLICES = {
    "tiny": {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_hidden_layers": 1},
    "1.3b": {"hidden_size": 2048, "intermediate_size": 5504, "num_attention_heads": 32, "num_hidden_layers": 8},
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "num_hidden_layers": 4},
}
TERNARY, INT8 = {"weight_quantization": "ternary"}, {"activation_quantization": "int8"}
QUANTIZATIONS = {
    "torch.topk": {},
    "ours": {},
    "ours, ternary": TERNARY,
    "ours, int8": INT8,
    "ours, ternary + int8": TERNARY | INT8,
}
"""Fields of each sparse variant."""
LENGTH = 2048


class Step:
    """One variant's training step."""

    def __init__(self, variant: str, model: nn.Module, optimizer: torch.optim.Optimizer, compiled: bool) -> None:
        on_cpu = next(model.parameters()).device.type == "cpu"
        backend = "torch" if on_cpu or variant == "torch.topk" else "triton"
        self.implementations = {backend: sparsify.IMPLS[backend]}
        self.run = torch.compile(model, dynamic=False, fullgraph=True) if compiled else model
        self.optimizer = optimizer

    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        with mock.patch.object(sparsify, "IMPLS", self.implementations):
            loss = self.run(input_ids=tokens, labels=tokens, use_cache=False).loss
            loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()

    def peak(self, tokens: torch.Tensor) -> float:
        """Peak memory of a step in GiB, weights and optimizer included; NaN on a CPU, where nothing counts it."""
        if tokens.device.type == "cpu":
            return math.nan
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        self(tokens)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() / 2**30


def build(name: str, sparsity: float, device: str) -> tuple[dict[str, nn.Module], torch.optim.Optimizer]:
    """The variants over the same parameters, and their optimizer."""
    fields = SLICES[name] | {"vocab_size": 32000, "max_position_embeddings": LENGTH}
    with torch.device(device):
        torch.manual_seed(0)
        dense = LlamaForCausalLM(LlamaConfig(**fields)).to(torch.bfloat16).train()
    models = {"dense": dense}
    for variant, quantization in QUANTIZATIONS.items():
        with torch.device("meta"):
            model = QSparseLlamaForCausalLM(QSparseLlamaConfig(**fields, **quantization, sparsity=sparsity))
        model.load_state_dict(dict(dense.named_parameters()), assign=True)
        model.model.rotary_emb = dense.model.rotary_emb  # its frequencies are no parameters
        models[variant] = model.train()
    return models, torch.optim.AdamW(dense.parameters(), lr=1e-5, fused=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--models", nargs="+", choices=SLICES, default=["1.3b", "7b"], help="slices by width")
    parser.add_argument(
        "--modes",
        nargs="+",
        choices=["eager", "compiled"],
        default=["eager", "compiled"],
        help="with torch.compile or without",
    )
    parser.add_argument("--batch", type=int, default=8, help="sequences of 2048 tokens")
    parser.add_argument(
        "--output", type=Path, default=Path("train_step.json"), help="JSON with every time, in microseconds"
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: to see that it runs")
    arguments = parse(parser)

    results, rows = [], []
    for name in arguments.models:
        models, optimizer = build(name, arguments.sparsity, arguments.device)
        tokens = torch.randint(0, 32000, (arguments.batch, LENGTH), device=arguments.device)
        for mode in arguments.modes:
            steps = {variant: Step(variant, model, optimizer, mode == "compiled") for variant, model in models.items()}
            for step in tqdm(steps.values(), desc=f"{name} {mode}"):
                step(tokens)  # compiles
            calls = {variant: partial(step, tokens) for variant, step in steps.items()}
            times = interleaved(calls, arguments.rounds)
            gc.collect()
            peaks = {variant: step.peak(tokens) for variant, step in steps.items()}
            results.append({"model": name, "mode": mode, "microseconds": times, "peak_gib": peaks})
            median = medians(times)
            for variant, value in median.items():
                rows.append(
                    [
                        name,
                        mode,
                        variant,
                        f"{value / 1000:.1f}",
                        f"{value / median['dense']:.3f}",
                        f"{tokens.numel() / value * 1e6:,.0f}",
                        f"{peaks[variant]:.2f}",
                        f"{peaks[variant] / peaks['dense']:.3f}",
                    ]
                )
            write_json(arguments.output, results)
        del models, optimizer, steps, calls
        gc.collect()
        if arguments.device == "cuda":
            torch.cuda.empty_cache()
    heading = ["slice", "mode", "variant", "ms", "of dense", "tokens/s", "peak GiB", "of dense"]
    print_table(heading, rows)


if __name__ == "__main__":
    main()
