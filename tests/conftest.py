"""What all tests share: one tiny model per family, one tolerance per dtype, and processes that are really separate."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything of Hugging Face's is imported
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models gain nothing from more, and wait for busy cores

import json
import shutil
import socket
import subprocess
import sys
import sysconfig
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before the kernels are: they then run on a CPU, slowly

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import (
    BitNetConfig,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

import qsparse_hf
from qsparse_hf.kernels import Deferred
from qsparse_hf.modeling.sparsify import IMPLS

REPOSITORY = Path(__file__).parent.parent

TINY = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
# Each family with what makes it differ: a window smaller than the test sequences, window layers, biases, heads wider
# than the hidden size gives, a rotary embedding of half a head, capped logits.
FAMILIES = {
    "llama": (LlamaConfig, qsparse_hf.QSparseLlamaConfig, {}),
    "mistral": (MistralConfig, qsparse_hf.QSparseMistralConfig, {"sliding_window": 8}),
    "qwen2": (
        Qwen2Config,
        qsparse_hf.QSparseQwen2Config,
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    ),
    "qwen3": (
        Qwen3Config,
        qsparse_hf.QSparseQwen3Config,
        {"head_dim": 32, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    ),
    "phi3": (
        Phi3Config,
        qsparse_hf.QSparsePhi3Config,
        {"sliding_window": 8, "resid_pdrop": 0.1, "partial_rotary_factor": 0.5},
    ),
    "gemma3_text": (
        Gemma3TextConfig,
        qsparse_hf.QSparseGemma3Config,
        {
            "head_dim": 32,
            "query_pre_attn_scalar": 24,
            "sliding_window": 8,
            "sliding_window_pattern": 2,
            "final_logit_softcapping": 30.0,
        },
    ),
    "bitnet": (BitNetConfig, qsparse_hf.QSparseBitNetConfig, {"hidden_act": "silu"}),  # without zeros of its own
}


DISTINCT = ("llama", "phi3", "gemma3_text", "bitnet")
"""Families that between them run all code that any family runs: for what takes long."""

# What a family offers besides, which tiny models leave at its default.
ROPE = {
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 32},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "longrope": {
        "short_factor": [1.0 + 0.1 * i for i in range(8)],
        "long_factor": [2.0 + 0.3 * i for i in range(8)],
        "original_max_position_embeddings": 16,  # crossed while tests generate
    },
}
OPTIONS = {
    "llama attention_bias": {"attention_bias": True},
    "llama mlp_bias": {"mlp_bias": True},
    "llama wide heads": {"head_dim": 32},
    "llama heads of no power of two": {"head_dim": 24},
    "llama pretraining_tp": {"pretraining_tp": 2},  # Transformers 5 ignores it
    "llama tied": {"tie_word_embeddings": True},
    "qwen3 attention_bias": {"attention_bias": True},
    "qwen3 without windows": {"use_sliding_window": False},
    "phi3 without windows": {"sliding_window": None, "partial_rotary_factor": 1.0},
    "phi3 activation": {"hidden_act": "gelu", "rms_norm_eps": 1e-2},
    "phi3 longrope": {
        "sliding_window": None,
        "original_max_position_embeddings": 16,
        "rope_parameters": {"rope_type": "longrope", "partial_rotary_factor": 0.5, "short_factor": [1.0, 1.1, 1.2, 1.3]}
        | {"long_factor": [2.0, 2.5, 3.0, 3.5], "rope_theta": 1e4},
    },
    "bitnet squared ReLU": {"hidden_act": "relu2"},
    "bitnet attention_bias": {"attention_bias": True},
    "gemma3_text attention_bias": {"attention_bias": True},
    "gemma3_text uncapped": {"final_logit_softcapping": None, "tie_word_embeddings": False},
    "gemma3_text attention cap": {"attn_logit_softcapping": 5.0},  # Transformers ignores it
    "gemma3_text activation": {"hidden_activation": "silu", "rms_norm_eps": 1e-2},
    "gemma3_text heads of 256": {"head_dim": 256, "query_pre_attn_scalar": 256},
    "gemma3_text rope": {
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        }
    },
} | {
    f"llama {name}": {"rope_parameters": {"rope_type": name, "rope_theta": 1e4} | fields}
    for name, fields in ROPE.items()
}


def backends(implementations: dict) -> list:
    """Every implementation with every device it can be asked to run on here, as parameters of a test."""
    devices = {"triton": ["cuda"] if torch.cuda.is_available() else ["cpu"], "numba": ["cpu"]}
    return [
        pytest.param(device, name, id=f"{name}-{device}", marks=[pytest.mark.gpu] if device == "cuda" else [])
        for name, implementation in implementations.items()
        for device in devices.get(name, ["cpu", "cuda"])
        if not (isinstance(implementation, Deferred) and implementation.missing())
    ]


BACKENDS = backends(IMPLS)

# Relative to the largest magnitude of what is expected: a few units in the last place over a handful of layers.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}


def assert_close(actual: Tensor, expected: Tensor) -> None:
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    if not expected.numel():
        return
    error = (actual.double() - expected.double()).abs().max().item()
    scale = expected.double().abs().max().item()
    assert error <= TOLERANCE[expected.dtype] * max(scale, 1e-3), f"error {error} at scale {scale}"


def dense_config(family: str, **fields) -> PreTrainedConfig:
    return FAMILIES[family][0](**TINY | FAMILIES[family][2] | fields)


def sparse_config(family: str, **fields) -> PreTrainedConfig:
    return FAMILIES[family][1](**TINY | FAMILIES[family][2] | fields)


def make(config: PreTrainedConfig, seed: int = 0, **kwargs) -> PreTrainedModel:
    """A model with weights large enough that its logits differ from token to token, and no norm's are all 0 or 1."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, **kwargs).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
            else:
                parameter.normal_(std=0.2)
    return model


def make_pair(
    family: str, dtype: torch.dtype = torch.float32, options: dict | None = None, **fields
) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A dense model and its Q-Sparse twin with the same weights; `options` are fields of both."""
    dense = make(dense_config(family, **options or {}), dtype=dtype)
    sparse = make(sparse_config(family, **options or {}, **fields), dtype=dtype)
    sparse.load_state_dict(dense.state_dict())
    return dense, sparse


def run_python(code: str, *arguments, check: bool = True, **env: str) -> subprocess.CompletedProcess:
    """Run `code` in a process of its own."""
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        check=check,
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        env=os.environ | env,
    )


def run_qsparse(*arguments) -> subprocess.CompletedProcess:
    """Run the `qsparse` command in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "qsparse_hf.cli", *map(str, arguments)], capture_output=True, text=True, cwd=REPOSITORY
    )


@contextmanager
def http_server(command: list[str], log: Path, **env: str) -> Iterator[Callable[[str, dict], dict]]:
    """Run `python -m COMMAND` with a free port; yields what posts JSON to a path of that server, once it listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = [sys.executable, "-m", *command, "--host", "127.0.0.1", "--port", str(port)]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | env
    with log.open("w") as file:
        server = subprocess.Popen(arguments, stdout=file, stderr=file, cwd=REPOSITORY, env=environment)

    def post(path: str, body: dict) -> dict:
        header = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", json.dumps(body).encode(), header)
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.load(answer)

    try:
        for _ in range(600):
            assert server.poll() is None, log.read_text()[-3000:]
            with suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                break
            time.sleep(0.2)
        yield post
    finally:
        server.terminate()
        server.wait(60)


@pytest.fixture(params=FAMILIES)
def family(request) -> str:
    return request.param


@pytest.fixture(autouse=True)
def precision() -> Iterator[None]:
    """Training with `torch_compile` turns TF32 on for the whole process; the next test wants fp32 as it was."""
    before = torch.backends.fp32_precision
    yield
    torch.backends.fp32_precision = before


@pytest.fixture
def tokens() -> Tensor:
    """`[2, 24]`, longer than the families' windows."""
    return torch.randint(3, TINY["vocab_size"], (2, 24), generator=torch.Generator().manual_seed(1))


def pytest_collection_modifyitems(config, items) -> None:
    for item in items:
        if "triton-cpu" in item.name or "replays" in item.fixturenames:
            item.add_marker("interpreted")
    if not torch.cuda.is_available():
        items[:] = [item for item in items if "gpu" not in item.keywords]


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer within the tiny vocabulary, for ASCII text; every text ends with `<end>` (2)."""
    specials = ["<pad>", "<start>", "<end>"]
    letters = sorted({chr(code) for code in range(33, 127)} | {"Ġ", "Ċ"})
    vocabulary = {token: index for index, token in enumerate([*specials, *letters])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>")


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory, tiny_tokenizer) -> Path:
    """A Q-Sparse Llama on disk, with its tokenizer."""
    folder = tmp_path_factory.mktemp("tiny") / "checkpoint"
    make(sparse_config("llama")).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def small_quickstart(tmp_path_factory, monkeypatch) -> None:
    """A quickstart of three packages of the standard library and two updates."""
    from qsparse_hf import quickstart  # which needs the libraries for training, and few tests do

    library = tmp_path_factory.mktemp("library")
    for name in ("json", "email", "logging"):
        shutil.copytree(Path(sysconfig.get_paths()["stdlib"], name), library / name)
    monkeypatch.setattr(quickstart, "sysconfig", SimpleNamespace(get_paths=lambda: {"stdlib": str(library)}))
    for stage in (quickstart._PRETRAIN, quickstart._CONTINUE):
        monkeypatch.setitem(stage, "max_steps", 2)
        monkeypatch.setitem(stage, "eval_steps", 1)
