"""The plugin for vLLM from the outside, and Transformers' own server; `test_vllm.py` has vLLM itself."""

from importlib.metadata import entry_points
from importlib.util import find_spec

import pytest
from conftest import http_server, make, run_python, sparse_config

needs_server = pytest.mark.skipif(find_spec("fastapi") is None, reason="needs `transformers[serving]`")


def test_the_plugin_loads_nothing_heavy():
    (plugin,) = entry_points(group="vllm.general_plugins", name="qsparse")
    done = run_python(
        f"import sys; from {plugin.module} import {plugin.attr}; print(sorted({{'vllm', 'numba'}} & set(sys.modules)))"
    )
    assert done.stdout.strip() == "[]"


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
