"""What all tests share: one tiny model per family, one tolerance per dtype, and processes that are really separate."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything of Hugging Face's is imported
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models gain nothing from more, and wait for busy cores

import subprocess
import sys
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before the kernels are: they then run on a CPU, slowly

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import (
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
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
# Each family with what makes it differ: a window smaller than the test sequences, window layers, biases.
FAMILIES = {
    "llama": (LlamaConfig, qsparse_hf.QSparseLlamaConfig, {}),
    "mistral": (MistralConfig, qsparse_hf.QSparseMistralConfig, {"sliding_window": 8}),
    "qwen2": (
        Qwen2Config,
        qsparse_hf.QSparseQwen2Config,
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    ),
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
    """A model with weights large enough that its logits differ from token to token."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, **kwargs).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.normal_(std=0.2)
    return model


def make_pair(family: str, dtype: torch.dtype = torch.float32, **fields) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A dense model and its Q-Sparse twin with the same weights."""
    dense = make(dense_config(family), dtype=dtype)
    sparse = make(sparse_config(family, **fields), dtype=dtype)
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


@pytest.fixture(params=FAMILIES)
def family(request) -> str:
    return request.param


@pytest.fixture
def tokens() -> Tensor:
    """`[2, 24]`, longer than the families' windows."""
    return torch.randint(3, TINY["vocab_size"], (2, 24), generator=torch.Generator().manual_seed(1))


def pytest_collection_modifyitems(config, items) -> None:
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
