"""The plugin for vLLM from the outside, and Transformers' own server; `test_vllm.py` has vLLM itself."""

import inspect
import tomllib
from importlib.util import find_spec
from unittest import mock

import pytest
import torch
from conftest import REPOSITORY, dense_config, http_server, make, run_python, sparse_config
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from qsparse_hf.modeling.modeling_qsparse import QSparseAttention
from qsparse_hf.modeling.sparsify import RMSNormSparsify

needs_server = pytest.mark.skipif(find_spec("fastapi") is None, reason="needs `transformers[serving]`")


def test_the_plugin_loads_nothing_heavy():
    described = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    module, name = described["entry-points"]["vllm.general_plugins"]["qsparse"].split(":")
    done = run_python(f"import sys; from {module} import {name}; print(sorted({{'vllm', 'numba'}} & set(sys.modules)))")
    assert done.stdout.strip() == "[]"


def test_what_vllm_reads_of_our_source_is_there():
    """It finds attention in a forward's text, and takes for RMSNorms modules of one input; `make test-vllm` runs it."""
    source = inspect.getsource(QSparseAttention.forward)
    assert "attend = ALL_ATTENTION_FUNCTIONS.get_interface(" in source
    assert "attend(self, query, key, value, attention_mask, scaling=self.scaling, **options)" in source
    assert len(inspect.signature(RMSNormSparsify.forward).parameters) == 3


def test_attention_of_some_heads_is_refused(tokens):
    """As tensor parallelism without gathering would have it: a top-K of a part is another model."""
    model = make(sparse_config("llama"))
    half = model.config.attention_size // 2
    with (
        mock.patch.dict(ALL_ATTENTION_FUNCTIONS._local_mapping, sdpa=lambda *a, **k: (torch.zeros(2, 24, half), None)),
        pytest.raises(ValueError, match=f"all {2 * half} features of a token's attention, and this process has {half}"),
    ):
        model(tokens)


@needs_server
def test_a_model_that_is_not_there_is_one_line(tmp_path):
    done = run_python(
        "from qsparse_hf.serving.__main__ import main; import sys; main(sys.argv[1:])", tmp_path / "no", check=False
    )
    assert done.returncode == 1
    assert f"error: {tmp_path / 'no'}: is no file or folder here" in done.stderr
    assert "Traceback" not in done.stderr


@needs_server
@pytest.mark.parametrize("options", [[], ["--continuous-batching", "--cb-num-blocks", "16"]], ids=["", "batching"])
def test_transformers_serves(tmp_path, tiny_tokenizer, options):
    model = make(sparse_config("llama"))
    model.save_pretrained(tmp_path)
    tiny_tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    tiny_tokenizer.save_pretrained(tmp_path)
    prompt = tiny_tokenizer("Hello", return_tensors="pt").input_ids
    answer = model.generate(prompt, max_new_tokens=8, do_sample=False, pad_token_id=0)[0, prompt.shape[1] :]
    command = ["qsparse_hf.serving", str(tmp_path), "--device", "cpu", "--dtype", "float32", *options]
    with http_server(command, tmp_path / "log") as post:
        body = {"model": str(tmp_path), "messages": [{"role": "user", "content": "Hello"}], "stream": False}
        body |= {"max_tokens": 8, "generation_config": '{"max_new_tokens": 8, "do_sample": false}'}
        found = post("/v1/chat/completions", body)
    assert len(answer) == 8
    assert found["choices"][0]["message"]["content"] == tiny_tokenizer.decode(answer, skip_special_tokens=True)


def test_the_server_prepares_what_it_loads():
    from qsparse_hf.serving.__main__ import PreparingModelManager

    manager = object.__new__(PreparingModelManager)
    for model in (make(sparse_config("llama")), make(dense_config("llama"))):
        with mock.patch.object(PreparingModelManager.__base__, "_load_model", return_value=model):
            assert manager._load_model("any") is model
        assert getattr(model, "is_prepared", False) == (model.config.model_type == "qsparse_llama")
