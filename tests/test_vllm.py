"""vLLM serves what we generate: `make test-vllm`, in an environment of its own, since vLLM pins its packages.

Tokens can be compared since the models are small, random and fp32, and the outputs short.
"""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from conftest import DISTINCT, FAMILIES, REPOSITORY, dense_config, http_server, make, run_qsparse, sparse_config
from transformers import AutoModelForCausalLM

from qsparse_hf.modeling.sparsity import Selection

if find_spec("vllm") is None:
    pytest.skip("vLLM is not installed: `make test-vllm` makes an environment that has it", allow_module_level=True)

PROMPTS = [
    [5, 9, 17, 33, 3, 60, 70, 80, 90, 100, 12, 13],
    [40, 41, 42],
]  # longer than the families' windows, and shorter
NEW_TOKENS = 12
WIDE = {"hidden_size": 128, "head_dim": 32}  # the smallest heads that vLLM's attention on a CPU takes
FIELDS = {
    "llama": WIDE,
    "mistral": WIDE,
    "qwen2": WIDE | {"tie_word_embeddings": True},
    "qwen3": WIDE,
    "phi3": {"hidden_size": 128, "num_key_value_heads": 1},  # has no `head_dim`; two ranks share its key-value head
    "gemma3_text": WIDE | {"tie_word_embeddings": False},  # tied, a random one repeats its prompt's last token
}
SPARSITIES = {family: {"sparsity": 0.5} for family in FAMILIES} | {
    "llama": {"sparsity": 0.5, "sparsity_per_projection": {"o": 0.25, "down": [0.5, 0.75]}},
    "qwen3": {"sparsity": 0.5, "sparsity_block_size": 32},
}
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # one process for all families
    "VLLM_DISABLE_COMPILE_CACHE": "1",  # an earlier run's code would hide what has changed
    "VLLM_CPU_KVCACHE_SPACE": "1",
}


def greedy(model) -> list[list[int]]:
    """Our own tokens behind each prompt."""
    fixed = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return [model.generate(torch.tensor([prompt]), **fixed)[0, len(prompt) :].tolist() for prompt in PROMPTS]


@pytest.fixture(scope="module")
def served(tmp_path_factory) -> dict[str, tuple[Path, list[list[int]]]]:
    """A folder of each family, and the tokens that it has to give, which the dense model does not."""
    found = {}
    for family in FAMILIES:
        folder = tmp_path_factory.mktemp("served") / family
        sparse = make(sparse_config(family, **FIELDS[family], **SPARSITIES[family]))
        dense = make(dense_config(family, **FIELDS[family]))
        dense.load_state_dict(sparse.state_dict())
        sparse.save_pretrained(folder)
        found[family] = folder, greedy(sparse)
        assert all(ours != without for ours, without in zip(found[family][1], greedy(dense), strict=True))
    return found


def run_vllm(folders, package: bool, env: dict | None = None, **engine) -> subprocess.CompletedProcess:
    """`serve_with_vllm.py` with the plugin, or with remote code and no plugin."""
    engine = {"enforce_eager": True, "trust_remote_code": not package} | engine
    task = {"folders": list(map(str, folders)), "prompts": PROMPTS, "new_tokens": NEW_TOKENS, "engine": engine}
    plugins = {"VLLM_PLUGINS": "qsparse" if package else "none"}
    settings = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "tests/serve_with_vllm.py", json.dumps(task)],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        env=settings | ENVIRONMENT | plugins | (env or {}),
    )


def found_by_vllm(folders, package: bool, **kwargs) -> list[dict]:
    done = run_vllm(folders, package, **kwargs)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    lines = [line.removeprefix("FOUND ") for line in done.stdout.splitlines() if line.startswith("FOUND ")]
    return [json.loads(line) for line in lines]


def expected_reads(family: str) -> dict[str, list[int]]:
    """Of each projection, by its path: the features of its input, and how many of them survive."""
    config = sparse_config(family, **FIELDS[family], **SPARSITIES[family])
    sizes = {"qkv": config.hidden_size, "gate_up": config.hidden_size, "o": 128, "down": config.intermediate_size}
    reads = {}
    for layer in range(config.num_hidden_layers):
        for group, (_, linears) in config.projection_groups.items():
            selection: Selection = config.selection(group, layer)
            for path in linears:
                reads[f"{layer}.{path}"] = [sizes[group], selection.kept(sizes[group])]
    return reads


@pytest.mark.parametrize("package", [True, False], ids=["package", "remote code"])
def test_tokens_and_what_projections_read(served, package):
    found = found_by_vllm([folder for folder, _ in served.values()], package, distributed_executor_backend="uni")
    assert [each["tokens"] for each in found] == [tokens for _, tokens in served.values()]
    assert [each["read"] for each in found] == [[expected_reads(family)] for family in served]
    assert all(each["package"] == package for each in found)


@pytest.mark.parametrize("package", [True, False], ids=["package", "remote code"])
def test_compiled(served, package):
    families = FAMILIES if package else DISTINCT
    folders = [served[family][0] for family in families]
    found = found_by_vllm(folders, package, enforce_eager=False, distributed_executor_backend="uni")
    assert [each["tokens"] for each in found] == [served[family][1] for family in families]


TWO_RANKS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_CPU_OMP_THREADS_BIND": "0|1"}
needs_two_cores = pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="a core for each rank")


@needs_two_cores
@pytest.mark.parametrize("eager", [True, False], ids=["eager", "compiled"])
def test_tensor_parallel(served, eager):
    families = DISTINCT[:2] if eager else DISTINCT[:1]
    folders = [served[family][0] for family in families]
    found = found_by_vllm(folders, package=True, env=TWO_RANKS, tensor_parallel_size=2, enforce_eager=eager)
    assert [each["tokens"] for each in found] == [served[family][1] for family in families]
    if eager:
        assert [each["read"] for each in found] == [2 * [expected_reads(family)] for family in families]


@needs_two_cores
def test_tensor_parallel_without_the_package_is_refused(served):
    done = run_vllm([served["llama"][0]], package=False, env=TWO_RANKS, tensor_parallel_size=2)
    assert done.returncode != 0
    assert "tensor parallelism in vLLM needs the package" in done.stdout + done.stderr
    assert "FOUND" not in done.stdout


def test_dropped_selections_would_show(served):
    """The same folder without its sparsity: neither tokens nor reads are those that the tests above ask for."""
    (found,) = found_by_vllm(
        [served["qwen2"][0]], package=True, distributed_executor_backend="uni", hf_overrides={"sparsity": 0}
    )
    assert found["tokens"] != served["qwen2"][1]
    assert all(read == features for features, read in found["read"][0].values())


def test_over_http(tmp_path, tiny_tokenizer):
    """`qsparse convert`, then vLLM's server of what it wrote."""
    make(dense_config("llama", **WIDE)).save_pretrained(tmp_path / "dense")
    tiny_tokenizer.save_pretrained(tmp_path / "dense")
    converted = run_qsparse("convert", tmp_path / "dense", tmp_path / "sparse", "--sparsity", "0.5")
    assert converted.returncode == 0, converted.stderr
    model = str(tmp_path / "sparse")
    # What `vllm serve` runs; that command itself does not start in the CPU build.
    command = ["vllm.entrypoints.openai.api_server", "--model", model, "--dtype", "float32", "--enforce-eager"]
    command += ["--max-model-len", "64", "--max-num-seqs", "4"]
    with http_server(command, tmp_path / "log", VLLM_CPU_KVCACHE_SPACE="1") as post:
        body = {"model": model, "prompt": PROMPTS[0], "max_tokens": NEW_TOKENS, "temperature": 0}
        answer = post("/v1/completions", body | {"ignore_eos": True, "return_token_ids": True})
    expected = greedy(AutoModelForCausalLM.from_pretrained(model))
    assert answer["choices"][0]["token_ids"] == expected[0]
