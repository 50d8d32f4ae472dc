"""Many streams at once through Transformers' continuous batching (`generate_batch`): tokens a second, dense and sparse.

    python benchmarks/serving.py --output serving.json
    python benchmarks/serving.py --modes eager graphs --streams 1 2 8
    python benchmarks/serving.py --device cpu --layers 2 --dtype float32 --streams 1 4 --rounds 1

Three models share one set of random weights, of a 1B Llama's shape: the dense model, the Q-Sparse model, and the same
prepared for decoding. They take turns. A rate is counted from the first token of all streams to the last one, so
prompts and what a call sets up are not in it. In mode `graphs` Transformers captures each step as a CUDA graph, without
padding streams.

First, a small fp32 model has to give the same tokens in all three forms as `generate` gives, or nothing is measured.
For the large one the share of tokens that are those of the unprepared Q-Sparse model is told: a top-K is discontinuous,
so rounding parts them after a while.
"""

import argparse
import statistics
from itertools import product
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import ContinuousBatchingConfig, GenerationConfig, LlamaConfig, LlamaForCausalLM

from qsparse_hf import QSparseLlamaConfig, QSparseLlamaForCausalLM
from qsparse_hf.bench import SHAPES
from qsparse_hf.checkpoint import DTYPES
from qsparse_hf.errors import check_writable
from qsparse_hf.loading import find_device
from qsparse_hf.measure import HelpFormatter, print_table, write_json
from qsparse_hf.modeling.sparsity import check_sparsity

VARIANTS = ("dense", "sparse", "prepared")
SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_hidden_layers": 2}
PROMPT = 32


def build(fields: dict[str, Any], sparsity: float, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """The three models, over the same weights but for those that preparing lays out anew."""
    fields = fields | {"max_position_embeddings": 4096}
    with device:
        torch.manual_seed(0)
        dense = LlamaForCausalLM(LlamaConfig(**fields)).to(dtype).eval()
        models = {"dense": dense}
        for name in VARIANTS[1:]:
            model = QSparseLlamaForCausalLM(QSparseLlamaConfig(**fields, sparsity=sparsity)).to(dtype).eval()
            model.load_state_dict(dense.state_dict(), assign=name == "sparse")
            models[name] = model
    models["prepared"].prepare_for_decode()
    return models


def serve(model: Any, prompts: list[list[int]], new_tokens: int, mode: str) -> tuple[list[list[int]], float]:
    """The greedy tokens of each stream, and all streams' tokens a second."""
    pages = 8 * len(prompts) + 16
    batching = ContinuousBatchingConfig(num_blocks=pages, max_batch_tokens=PROMPT * max(len(prompts), 8))
    batching.use_cuda_graph = mode == "graphs"
    if mode == "graphs":
        batching.q_padding_interval_size, batching.kv_padding_interval_size = len(prompts), 1024
    greedy = GenerationConfig(max_new_tokens=new_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0)
    found = model.generate_batch(
        prompts, generation_config=greedy, continuous_batching_config=batching, record_timestamps=True
    )
    streams = list(found.values())
    if [len(stream.generated_tokens) for stream in streams] != [new_tokens] * len(prompts):
        raise SystemExit(f"generate_batch failed: {next((each.error for each in streams if each.error), 'no tokens')}")
    by_prompt = {tuple(stream.prompt_ids): stream.generated_tokens for stream in streams}
    times = sorted(time for stream in streams for time in stream.timestamps)
    return [by_prompt[tuple(prompt)] for prompt in prompts], (len(times) - len(prompts)) / (times[-1] - times[0])


def check_tokens(sparsity: float, device: torch.device, mode: str) -> None:
    """Small fp32 models: `generate_batch` gives what `generate` gives, prepared or not."""
    models = build(SMALL | {"vocab_size": 128}, sparsity, torch.float32, device)
    prompts = torch.randint(3, 128, (4, PROMPT), generator=torch.Generator().manual_seed(1))
    fixed = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    expected = {
        name: [models[name].generate(prompt[None].to(device), **fixed)[0, PROMPT:].tolist() for prompt in prompts]
        for name in ("dense", "sparse")
    }
    for name, model in models.items():
        for some in (prompts[:1], prompts):
            found, _ = serve(model, some.tolist(), 8, mode)
            if found != expected["dense" if name == "dense" else "sparse"][: len(some)]:
                raise SystemExit(f"a {name} model gives other tokens in {len(some)} streams ({mode}) than `generate`")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--streams", nargs="+", type=int, default=[1, 8, 32], help="sequences decoded at once")
    parser.add_argument("--modes", nargs="+", choices=["eager", "graphs"], default=["eager"], help="of each step")
    parser.add_argument("--sparsity", type=float, default=0.5, help="fraction of zeros")
    parser.add_argument("--layers", type=int, default=24, help="of the model")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--device", choices=["cuda", "cpu"], help="a GPU where there is one")
    parser.add_argument("--new-tokens", type=int, default=64, help="of each stream")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each, in turns")
    parser.add_argument("--output", type=Path, default=Path("serving.json"), help="JSON with every rate")
    arguments = parser.parse_args()
    counts = {"streams": min(arguments.streams), "layers": arguments.layers, "rounds": arguments.rounds}
    for name, least, value in [(name, 1, value) for name, value in counts.items()] + [
        ("new-tokens", 2, arguments.new_tokens)
    ]:
        if value < least:
            parser.error(f"--{name} must be at least {least}, got {value}")
    try:
        check_sparsity(arguments.sparsity)
        check_writable(arguments.output)
        device = find_device(arguments.device)
    except ValueError as error:
        parser.error(str(error))
    if device.type == "cpu" and "graphs" in arguments.modes:
        parser.error("--modes graphs needs a GPU")

    for mode in arguments.modes:
        check_tokens(arguments.sparsity, device, mode)
    print("small fp32 models: the tokens of `generate`, in all three forms")
    shape = SHAPES["1b"][1] | {"num_hidden_layers": arguments.layers}
    models = build(shape, arguments.sparsity, DTYPES[arguments.dtype], device)
    results, rows = [], []
    cases = list(product(arguments.modes, arguments.streams))
    with tqdm(total=len(cases) * len(models) * (arguments.rounds + 1), unit="run") as progress:
        for mode, streams in cases:
            prompts = torch.randint(3, 32000, (streams, PROMPT), generator=torch.Generator().manual_seed(2)).tolist()
            rates: dict[str, list[float]] = {name: [] for name in models}
            tokens = {}
            for turn in range(arguments.rounds + 1):
                for name, model in models.items():
                    progress.set_description(f"{mode}, {streams} streams, {name}")
                    tokens[name], rate = serve(model, prompts, arguments.new_tokens, mode)
                    if turn:  # kernels compile in the first one
                        rates[name].append(rate)
                    progress.update()
            pairs = [
                pair
                for prepared, sparse in zip(tokens["prepared"], tokens["sparse"], strict=True)
                for pair in zip(prepared, sparse, strict=True)
            ]
            same = sum(ours == theirs for ours, theirs in pairs) / len(pairs)
            results.append(
                {"mode": mode, "streams": streams, "sparsity": arguments.sparsity, "dtype": arguments.dtype}
                | {"layers": arguments.layers, "new_tokens": arguments.new_tokens, "prompt": PROMPT}
                | {"tokens_per_second": rates, "same_tokens_prepared": same}
            )
            median = {name: statistics.median(values) for name, values in rates.items()}
            ratios = [f"{median[name] / median['dense']:.2f}" for name in VARIANTS[1:]]
            rows.append([mode, streams, *(f"{median[name]:,.0f}" for name in VARIANTS), *ratios, f"{same:.0%}"])
            write_json(arguments.output, results)
    print(f"tokens/s of all streams, sparsity {arguments.sparsity:g}, {arguments.dtype}, {arguments.layers} layers")
    heading = ["mode", "streams", *VARIANTS, "sparse / dense", "prepared / dense", "same tokens, prepared"]
    print_table(heading, rows)


if __name__ == "__main__":
    main()
