"""How fast a model decodes, dense and sparse: end to end through `generate`, the step alone, and each product.

Weights are random: speed does not depend on them, since a top-K keeps the same number of features of any input. The
dense model runs in the fastest mode that Transformers offers: on a GPU with a static cache, `torch.compile` and CUDA
graphs, which `generate` turns on by itself; on a CPU as it is.
"""

import gc
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedConfig,
    PreTrainedModel,
    StaticCache,
)
from transformers.cache_utils import StaticLayer

from .checkpoint import DTYPES
from .configuration import check_config
from .decode.prepare import layer_groups, why_not_prepared
from .decode.sparse_linear import sparse_linear
from .decode.weights import TernaryWeights, Weights
from .errors import UserError, check_writable, user_errors
from .loading import find_device
from .measure import captured, interleaved, medians, print_table, write_json
from .modeling.bitnet import PackedLinear
from .modeling.configuration_qsparse import GROUPS, QSPARSE_FIELDS, QSparseConfigMixin
from .modeling.modeling_qsparse import QSparsePreTrainedModel
from .modeling.sparsify import Sparsify, Survivors, select
from .modeling.sparsity import check_sparsity
from .registration import FAMILIES, projection_groups_of
from .report import count_parameters

T = TypeVar("T")

_PAST_CACHES = 400 << 20
"""Bytes of weights of which no cache holds a part worth mentioning when they are read in turns."""
SPARSITIES = {"float": (0.4, 0.5, 0.6, 0.75), "ternary": (0, 0.5, 0.6)}
"""What is measured, by how weights are stored, where neither the user nor a model's configuration names a sparsity."""
_TERNARY = {
    "weight_quantization": "ternary",
    "activation_quantization": "int8",
    "quantization_config": {"quant_method": "bitnet", "linear_class": "bitlinear"},
}

_LLAMA_2_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "num_hidden_layers": 32}
_LLAMA_3_8B = _LLAMA_2_7B | {"intermediate_size": 14336, "num_key_value_heads": 8, "vocab_size": 128256}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-2-7b": ("llama", _LLAMA_2_7B),
    "llama-3-8b": ("llama", _LLAMA_3_8B),
    "mistral-7b": ("mistral", _LLAMA_3_8B | {"vocab_size": 32000, "sliding_window": None}),
    "1b": (
        "llama",
        {"hidden_size": 2048, "intermediate_size": 5504, "num_attention_heads": 32, "num_hidden_layers": 24},
    ),
    "bitnet-2b": ("bitnet", {}),  # BitNet b1.58 2B4T, which Transformers' defaults describe
    "70b-slice": (  # as wide as a Llama-2-70B, 8 of its 80 layers
        "llama",
        {
            "hidden_size": 8192,
            "intermediate_size": 28672,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "num_hidden_layers": 8,
        },
    ),
}
"""Models by name: the dense `model_type`, and the fields of its config that are not the default."""


class _Clock(LogitsProcessor):
    """Notes the time at which each token's logits arrive."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.times.append(time.perf_counter())
        return scores


def _configs(name: str, weights: str) -> tuple[PreTrainedConfig, QSparseConfigMixin, bool]:
    """The dense config of a shape, folder, file or Hub id, its Q-Sparse twin, and whether that is what is there."""
    is_sparse = False
    if name in SHAPES:
        model_type, fields = SHAPES[name]
        fields = fields | {"max_position_embeddings": 8192}
    else:
        source = f"{name} (none of {', '.join(SHAPES)})"
        check_config(name, named=source)
        with user_errors(source):
            fields = AutoConfig.from_pretrained(name).to_dict()
        is_sparse = fields["model_type"].startswith("qsparse_")
        model_type = fields.pop("model_type").removeprefix("qsparse_")
        if model_type not in FAMILIES:
            raise UserError(f"{name}: model_type must be one of {', '.join(FAMILIES)}, got {model_type!r}")
        for key in ("architectures", "transformers_version", "auto_map"):
            fields.pop(key, None)
        fields["use_cache"] = True  # training turns it off, and that is saved
    if weights == "ternary":
        fields |= _TERNARY
    dense = {key: value for key, value in fields.items() if key not in (*QSPARSE_FIELDS, "quantization_config")}
    return AutoConfig.for_model(model_type, **dense), FAMILIES[model_type].config(**fields), is_sparse


def _check_memory(name: str, config: PreTrainedConfig, device: torch.device, dtype: torch.dtype) -> None:
    """Refuse models, a dense and a sparse one at once, that are larger than the memory of `device`."""
    needed = 2 * dtype.itemsize * _random_model(config, torch.device("meta"), dtype).num_parameters()
    if device.type == "cuda":
        held = torch.cuda.get_device_properties(device).total_memory
    elif hasattr(os, "sysconf"):  # not on Windows
        held = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    else:
        return
    if needed > held:
        sizes = f"{needed / 1e9:,.0f} GB, dense and sparse together, and there are {held / 1e9:,.0f} GB"
        raise UserError(f"{name} takes {sizes}; name a smaller model, such as 1b")


def _random_model(config: PreTrainedConfig, device: torch.device, dtype: torch.dtype) -> Any:
    """A causal LM; `Any`, as Transformers annotates `generate` for a protocol that none of its models meets."""
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
        for module in model.modules():
            if isinstance(module, PackedLinear):
                module.weight.copy_(_random_codes(module.weight.shape))
    return model


def _random_codes(shape: Sequence[int]) -> Tensor:
    """Packed ternary weights, uint8: any of the 81 bytes that hold four of them."""
    legal = [byte for byte in range(256) if all(byte >> shift & 3 < 3 for shift in (0, 2, 4, 6))]
    return torch.tensor(legal, dtype=torch.uint8)[torch.randint(len(legal), tuple(shape))]


def _set_sparsity(model: QSparsePreTrainedModel, sparsity: float | None) -> None:
    """Set the sparsity of every projection, or leave it as it is (None), and prepare the model for decoding."""
    model.restore()
    for module in model.modules():
        if isinstance(module, Sparsify) and sparsity is not None:
            module.configure(replace(module.configured, sparsity=sparsity))
    model.prepare_for_decode()


def _bytes_a_token(model: Any) -> int:
    """Bytes of weights that a model reads for a token of its one sequence: of kept features alone if it is prepared."""
    head = model.get_output_embeddings().weight.nbytes
    if not getattr(model, "is_prepared", False):
        groups = projection_groups_of(model.config).values()
        paths = [path for group in groups for path in group.linears]
        return head + sum(layer.get_submodule(path).weight.nbytes for layer in model.model.layers for path in paths)
    for _, selector, linears in layer_groups(model):
        features = next(iter(linears.values())).in_features
        share = selector.selection.kept(features) / features if selector.few else 1
        head += round(share * sum(linear.weight.nbytes for linear in linears.values()))
    return head


def _size_of(model: PreTrainedModel) -> int:
    """Bytes of a model's weights."""
    return sum(tensor.nbytes for tensor in {*model.parameters(), *model.buffers()})


def _overall_sparsity(model: QSparsePreTrainedModel) -> float:
    """Of all projections as the model's configuration sets them, weighted by their weights."""
    total, activated = count_parameters(model)
    return 1 - activated / total


def _generate(model: Any, prompt: Tensor, new_tokens: int, cache: StaticCache | None) -> tuple[float, float]:
    """Microseconds of `generate`, host and device: a token after the fourth, and the whole call with its prompt."""
    clock = _Clock()
    settled = 3
    if cache is not None:
        cache.reset()
    start = time.perf_counter()
    model.generate(
        prompt,
        past_key_values=cache,
        min_new_tokens=new_tokens,
        max_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
        logits_processor=LogitsProcessorList([clock]),
    )
    if prompt.is_cuda:
        torch.cuda.synchronize()
    end = time.perf_counter()
    return (end - clock.times[settled]) / (new_tokens - settled - 1) * 1e6, (end - start) * 1e6


def _fastest_cache(model: PreTrainedModel, entries: int) -> StaticCache | None:
    """What lets `generate` compile a dense model's decode step, or replay a prepared one's graph, on a GPU."""
    return StaticCache(config=model.config, max_cache_len=entries) if model.device.type == "cuda" else None


def _step(model: PreTrainedModel, cache: StaticCache, sequences: int) -> Callable[[], None]:
    """A dense model's decode step, compiled and captured: a token's time without the host's work in `generate`."""
    run = torch.compile(model, fullgraph=True, dynamic=False)
    device = model.device
    layers = [layer for layer in cache.layers if isinstance(layer, StaticLayer)]
    inputs = {
        "input_ids": torch.ones(sequences, 1, dtype=torch.long, device=device),
        "position_ids": torch.ones(sequences, 1, dtype=torch.long, device=device),
        "attention_mask": torch.ones(sequences, 1, 1, layers[0].max_cache_len, dtype=torch.bool, device=device),
    }
    lengths = [layer.cumulative_length for layer in layers]

    @torch.no_grad()
    def step() -> None:
        run(**inputs, past_key_values=cache, use_cache=True)
        torch._foreach_sub_(lengths, 1)  # the next one writes where this one did

    step()
    return captured(step, 1)


def _graph_step(cache: StaticCache) -> Callable[[], None]:
    """A prepared model's decode step, as `generate` captured it."""
    graph = vars(cache)["decode_graph"]

    def step() -> None:
        graph.graph.replay()
        torch._foreach_sub_([*graph.lengths, graph.positions], 1)

    return step


def _millijoules(step: Callable[[], None], seconds: float = 1.0) -> float | None:
    """Millijoules of a call by the driver's energy counter; None where that cannot be read."""
    try:
        import pynvml

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties().uuid}")
        before = pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except Exception:  # no package, driver, permission or counter: no figure
        return None
    start, calls = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        for _ in range(20):
            step()
        torch.cuda.synchronize()
        calls += 20
    return (pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) - before) / calls


def _decode_rows(
    dense: PreTrainedModel,
    sparse: QSparsePreTrainedModel,
    sparsities: Sequence[float | None],
    sequences: int,
    prompt_length: int,
    new_tokens: int,
    rounds: int,
) -> Iterator[dict]:
    """A row for every sparsity, dense and sparse measured in turns; None is the configuration's own."""
    device = dense.device
    prompt = torch.randint(3, dense.config.vocab_size, (sequences, prompt_length), device=device)
    entries = prompt_length + new_tokens
    dense_cache, sparse_cache = (_fastest_cache(model, entries) for model in (dense, sparse))
    _generate(dense, prompt, 8, dense_cache)  # compiles
    dense_step = _step(dense, dense_cache, sequences) if dense_cache is not None else None
    for sparsity in sparsities:  # None comes first: what is set stays
        _set_sparsity(sparse, sparsity)
        _generate(sparse, prompt, 8, sparse_cache)
        runs = {"dense": (dense, dense_cache), "sparse": (sparse, sparse_cache)}
        times: dict[str, dict[str, list[float]]] = {kind: {name: [] for name in runs} for kind in ("generate", "whole")}
        for _ in range(rounds):
            for name, (model, cache) in runs.items():
                token, whole = _generate(model, prompt, new_tokens, cache)
                times["generate"][name].append(token)
                times["whole"][name].append(whole)
        row: dict[str, Any] = {"sparsity": _overall_sparsity(sparse) if sparsity is None else sparsity}
        row |= {"as_it_is": sparsity is None, "sequences": sequences, "prompt": prompt_length, **times}
        row["bytes_a_token"] = {name: _bytes_a_token(model) for name, (model, _) in runs.items()}
        row["bytes"] = {name: _size_of(model) for name, (model, _) in runs.items()}
        if dense_step is not None and sparse_cache is not None:
            steps = {"dense": dense_step, "sparse": _graph_step(sparse_cache)}
            row["step"] = interleaved(steps, 3 * rounds)
            row["millijoules"] = {name: _millijoules(step) for name, step in steps.items()}
        yield row


def _bandwidth(device: torch.device) -> float:
    """Bytes a second: of a copy on a GPU, reading and writing counted; of a sum on a CPU, where a copy reads more."""
    if device.type == "cpu":
        numbers = torch.zeros(64 << 20)
        times = interleaved({"sum": numbers.sum}, 7)
        return numbers.nbytes / (medians(times)["sum"] * 1e-6)
    source = torch.empty(128 << 20, dtype=torch.bfloat16, device=device)
    target = torch.empty_like(source)

    def copy() -> None:
        target.copy_(source)

    times = interleaved({"copy": captured(copy, 4)}, 7, 4)
    return 2 * source.nbytes / (medians(times)["copy"] * 1e-6)


@torch.no_grad()
def _product_rows(
    config: QSparseConfigMixin,
    device: torch.device,
    sparsities: Sequence[float | None],
    dtype: torch.dtype,
    rounds: int,
) -> Iterator[dict]:
    """A row for each projection group of a layer: its dense products, its sparse product, the selection before it.

    The sparsity None is the configuration's own, mean over its layers; a group that is dense there has no row. The
    share of a copy's bandwidth is None where it would mislead: on a CPU, where a copy also reads what it overwrites,
    and for weights that fit a GPU's caches.
    """
    sparse = _random_model(config, torch.device("meta"), dtype)
    on_gpu, is_ternary = device.type == "cuda", config.weight_quantization == "ternary"
    bandwidth = _bandwidth(device) if on_gpu else None
    groups = list(layer_groups(sparse))[: len(GROUPS)]
    for group, (_, selector, linears) in zip(GROUPS, groups, strict=True):
        features = next(iter(linears.values())).in_features
        sizes = [linear.out_features for linear in linears.values()]
        size = features * sum(sizes) * dtype.itemsize
        copies = min(max(2, -(-_PAST_CACHES // size)), 64)
        usual = [torch.randn(size, features, device=device, dtype=dtype) for _ in range(copies) for size in sizes]
        weights = [
            _weights(usual[first : first + len(sizes)], is_ternary) for first in range(0, len(usual), len(sizes))
        ]
        rows = features * sum(sizes) // 4 if is_ternary else size
        x = torch.randn(1, 1, features, device=device, dtype=dtype)
        own = statistics.mean(config.selection(group, layer).sparsity for layer in range(config.num_hidden_layers))
        for chosen in sparsities:
            sparsity = own if chosen is None else chosen
            if sparsity == 0 and not is_ternary:
                continue
            selection = replace(selector.configured, sparsity=sparsity)
            survivors = partial(select, "topk", selection=selection, compact=True)
            kept = survivors((x,))
            assert isinstance(kept, Survivors)  # as `compact` asks for
            functions: dict[str, Callable[[], object]] = {
                "dense": partial(_each, partial(nn.functional.linear, x), usual),
                "sparse": partial(_each, partial(sparse_linear, kept), weights),
                "selection": partial(_each, survivors, [(x,)] * copies),
            }
            if on_gpu:
                functions = {name: captured(function, 1) for name, function in functions.items()}
            times = interleaved(functions, rounds, copies)
            median = medians(times)
            reading = {"dense": size, "sparse": rows * kept.values.shape[-1] / features}
            past_caches = bandwidth is not None and copies * size >= _PAST_CACHES
            shares = {
                name: count / (median[name] * 1e-6) / bandwidth if past_caches and bandwidth else None
                for name, count in reading.items()
            }
            yield {
                "group": group,
                "shape": [features, sum(sizes)],
                "sparsity": sparsity,
                "as_it_is": chosen is None,
                "microseconds": times,
                "share_of_copy": shares,
                "copy_bytes_per_second": bandwidth,
            }
        del weights, usual


def _weights(linears: Sequence[Tensor], is_ternary: bool) -> Tensor | Weights:
    """Weights `[N, D]` of linears side by side, input-major."""
    if not is_ternary:
        return torch.cat([weight.t() for weight in linears], dim=1)
    packed = [_random_codes((len(weight) // 4, weight.shape[1])).to(weight.device) for weight in linears]
    return TernaryWeights.of(packed, [torch.ones(1, device=weight.device) for weight in linears])


def _each(function: Callable[[T], object], inputs: Iterable[T]) -> None:
    for each in inputs:
        function(each)


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def bench_decode(
    models: Iterable[str] = ("llama-2-7b",),
    sparsities: Iterable[float] | None = None,
    batches: Iterable[int] = (1,),
    prompts: Iterable[int] = (32,),
    device: str | None = None,
    dtype: str = "bfloat16",
    new_tokens: int = 64,
    rounds: int = 5,
    threads: int | None = None,
    weights: str = "float",
    output: str | Path | None = None,
) -> list[dict]:
    """Measure and print; returns the rows that are also written as JSON, with every time in microseconds.

    Args:
        models: names in `SHAPES`, or folders, files or Hub ids of configs or checkpoints, of which the config is used.
        sparsities: fractions of zeros, the same for every projection, besides those that a Q-Sparse configuration has,
            which are measured as they are; None for no others, and for `SPARSITIES` with a dense configuration.
        batches: numbers of sequences decoded at once.
        prompts: numbers of tokens in the prompt.
        device: "cuda" or "cpu"; None for a GPU where there is one.
        new_tokens: decoded in each measurement.
        rounds: measurements of each, in turns.
        threads: CPU threads; None for PyTorch's default.
        weights: "ternary" gives the Q-Sparse model packed ternary weights and int8 activations; "float" leaves it as
            its configuration has it.
        output: a JSON file for all rows, rewritten after each.

    Raises:
        UserError: a value outside these, a model that memory cannot hold, or an output that cannot be written, before
            anything is measured.
    """
    models, sparsities, batches, prompts = list(models), [*(sparsities or ())], list(batches), list(prompts)
    for sparsity in sparsities:
        try:
            check_sparsity(sparsity)
        except ValueError as error:
            raise UserError(str(error)) from error
    for option, word, allowed in (("dtype", dtype, DTYPES), ("weights", weights, SPARSITIES)):
        if word not in allowed:
            raise UserError(f"{option} must be one of {', '.join(allowed)}, got {word!r}")
    least = [("new_tokens", 8, new_tokens), ("rounds", 1, rounds), ("threads", 1, 1 if threads is None else threads)]
    least += [("batch", 1, batch) for batch in batches] + [("prompt", 1, prompt) for prompt in prompts]
    for name, smallest, value in least:
        if value < smallest:
            raise UserError(f"{name} must be at least {smallest}, got {value}")
    place = find_device(device)
    if output is not None:
        check_writable(output)
    configs = {name: _configs(name, weights) for name in models}
    for name, (dense_config, _, _) in configs.items():
        _check_memory(name, dense_config, place, DTYPES[dtype])
        with user_errors(name):  # weights that cannot be packed
            _random_model(configs[name][1], torch.device("meta"), DTYPES[dtype])
    chosen: dict[str, list[float | None]] = {
        name: [None, *sparsities] if is_sparse else [*(sparsities or SPARSITIES[weights])]
        for name, (_, _, is_sparse) in configs.items()
    }
    results: list[dict] = []

    def note(row: dict) -> None:
        results.append(row)
        if output is not None:
            with user_errors(output):
                write_json(Path(output), results)

    def decoded() -> Iterator[list]:
        total = len(batches) * len(prompts) * sum(map(len, chosen.values()))
        with tqdm(total=total, unit="row") as progress:
            for name, (dense_config, sparse_config, _) in configs.items():
                progress.set_description(name)
                dense = _random_model(dense_config, place, DTYPES[dtype])
                sparse = _random_model(sparse_config, place, DTYPES[dtype])
                for sequences, prompt in product(batches, prompts):
                    for row in _decode_rows(dense, sparse, chosen[name], sequences, prompt, new_tokens, rounds):
                        note({"model": name, "dtype": dtype, **row})
                        yield [name, sequences, prompt, _sparsity_of(row), *_summary(row)]
                        progress.update()
                del dense, sparse
                gc.collect()

    def multiplied() -> Iterator[list]:
        for name, (_, sparse_config, _) in configs.items():
            for row in _product_rows(sparse_config, place, chosen[name], DTYPES[dtype], rounds):
                note({"model": name, "dtype": dtype, **row})
                median, share = medians(row["microseconds"]), row["share_of_copy"]
                dense, sparse = (
                    [f"{median[kind]:.1f}", *([_percent(share[kind])] if place.type == "cuda" else [])]
                    for kind in ("dense", "sparse")
                )
                ratios = [f"{median['dense'] / median['sparse']:.2f}", f"{median['selection']:.1f}"]
                yield [name, row["group"], "{} x {}".format(*row["shape"]), _sparsity_of(row), *dense, *sparse, *ratios]

    with _threads(threads):
        print(f"ms a token of `generate`, behind the prompt; all of it, with the prompt and {new_tokens} tokens")
        heading = ["model", "batch", "prompt", "S", "dense", "sparse", "faster", "all: dense", "sparse", "faster"]
        if place.type == "cuda":
            print("the step alone, without the host's work; its energy, if the package nvidia-ml-py can read it")
            heading += ["step: dense", "sparse", "faster", "mJ: dense", "sparse"]
        print_table(heading, decoded())
        bandwidth = _bandwidth(place)
        print(
            f"\nwhat a token reads; share of the time that it takes of what this takes at {bandwidth / 1e9:,.1f} GB/s"
        )
        print_table(["model", "batch", "prompt", "S", *_READING], _reading(results, bandwidth))
        print("\nproducts of one token, us", end="")
        share = ["share"] if place.type == "cuda" else []
        print(
            "; share of a copy's bandwidth at which they read what they need, for weights past the caches"
            if share
            else ""
        )
        heading = ["model", "group", "in x out", "S", "dense", *share, "sparse", *share, "faster", "selection"]
        print_table(heading, multiplied())
    return results


def tokens_per_second(model: PreTrainedModel, prompt: int = 32, new_tokens: int = 32, rounds: int = 3) -> float:
    """Tokens a second of `generate` for one sequence, behind a prompt of random tokens: the median of `rounds`.

    A Q-Sparse model is prepared for decoding meanwhile, if it can be; any other one runs in the fastest mode that
    Transformers offers, on a GPU compiled around a static cache.
    """
    with ExitStack() as stack:
        if isinstance(model, QSparsePreTrainedModel) and not model.is_prepared and why_not_prepared(model) is None:
            model.prepare_for_decode()
            stack.callback(model.restore)
        ids = torch.randint(model.config.vocab_size, (1, prompt), device=model.device)
        cache = _fastest_cache(model, prompt + new_tokens)
        _generate(model, ids, 8, cache)  # compiles
        times = [_generate(model, ids, new_tokens, cache)[0] for _ in range(rounds)]
    return 1e6 / statistics.median(times)


_READING = ["GB: dense", "sparse", "MB a token: dense", "sparse", "share: dense", "sparse"]


def _reading(rows: Iterable[dict], bandwidth: float) -> Iterator[list[str]]:
    """Sizes of both models, what a token reads of them, and how near its time is to that of reading alone."""
    for row in rows:
        median = medians(row.get("step") or row["generate"])
        reads = row["bytes_a_token"]
        shares = [_percent(reads[name] / bandwidth / (median[name] * 1e-6)) for name in reads]
        sizes = [f"{size / 1e9:.2f}" for size in row["bytes"].values()]
        megabytes = [f"{each / 1e6:,.0f}" for each in reads.values()]
        yield [row["model"], row["sequences"], row["prompt"], _sparsity_of(row), *sizes, *megabytes, *shares]


def _sparsity_of(row: dict) -> str:
    return f"{row['sparsity']:.3g} as it is" if row["as_it_is"] else str(row["sparsity"])


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.0%}"


def _summary(row: dict) -> list[str]:
    cells = []
    for kind in ("generate", "whole", "step"):
        if kind in row:
            dense, sparse = (statistics.median(row[kind][name]) for name in ("dense", "sparse"))
            cells += [f"{dense / 1000:.2f}", f"{sparse / 1000:.2f}", f"{dense / sparse:.2f}"]
    energy = row.get("millijoules", {}).values()
    return cells + [f"{each:.0f}" if each else "" for each in energy]
