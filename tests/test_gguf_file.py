"""GGUF files, written here as llama.cpp's converter writes them, become the model that they were made of."""

import json
import sys

import gguf
import numpy as np
import pytest
import torch
from conftest import assert_close, dense_config, make
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from qsparse_hf import convert_checkpoint
from qsparse_hf.cli import main
from qsparse_hf.errors import UserError

ARCHITECTURES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma3_text": "gemma3", "phi3": "phi3"}
OPTIONS = {
    "llama": {},
    "qwen2": {"use_sliding_window": False},
    "qwen3": {"use_sliding_window": False},
    "gemma3_text": {"sliding_window_pattern": 6, "query_pre_attn_scalar": 256, "final_logit_softcapping": None},
    "phi3": {"sliding_window": None, "partial_rotary_factor": 1.0},
}
TEMPLATE = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"


def llama_cpp_permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """The rows of each head as llama.cpp has them: the two halves of a rotary pair next to each other."""
    return (
        weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)
    )


def write(path, model, kind="F32", scaling=None, extra=None, **fields):
    """Write `model` as a GGUF file of tensors of `kind`; norms and biases are F32, as llama.cpp leaves them."""
    config = model.config
    path.parent.mkdir(exist_ok=True)
    architecture = fields.get("architecture", ARCHITECTURES[config.model_type])
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_rope_dimension_count(head_dim)
    writer.add_key_length(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    rope = config.rope_parameters.get("full_attention", config.rope_parameters)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    if getattr(config, "sliding_window", None):
        writer.add_sliding_window(config.sliding_window)
    if scaling:
        writer.add_rope_scaling_type(gguf.RopeScalingType(scaling))
    letters = sorted({chr(code) for code in range(33, 127)} | {"Ġ", "Ċ"})
    tokens = ["<pad>", "<start>", "<end>", *letters, "he", "hel"]
    tokens += [f"<{index}>" for index in range(len(tokens), config.vocab_size)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(fields.get("pre", "gpt-2"))
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 3 + [1] * (len(tokens) - 3))
    writer.add_token_merges(["h e", "he l"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    writer.add_eos_token_id(2)
    writer.add_chat_template(TEMPLATE)
    for name, value in (extra or {}).items():
        writer.add_uint16(name, value)
    names = gguf.get_tensor_name_map(
        next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture), config.num_hidden_layers
    )
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name not in model.all_tied_weights_keys}
    for name, tensor in {**tensors, **fields.get("tensors", {})}.items():
        data = tensor.float().numpy()
        if architecture == "llama" and (".q_proj." in name or ".k_proj." in name):
            data = llama_cpp_permuted(data, config.num_attention_heads if ".q_" in name else config.num_key_value_heads)
        if architecture == "gemma3" and "norm" in name:
            data = data + 1
        kept = kind if data.ndim == 2 else "F32"
        encoded = gguf.quants.quantize(data, gguf.GGMLQuantizationType[kept])
        stem, _, suffix = name.rpartition(".")
        name = names.get_name(stem)
        writer.add_tensor(
            f"{name}.{suffix}" if name else f"{stem}.{suffix}", encoded, raw_dtype=gguf.GGMLQuantizationType[kept]
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def original(family, **options):
    """A tiny dense model whose rows divide into the blocks of 32 that quantised types have."""
    return make(dense_config(family, **OPTIONS[family] | options))


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_a_gguf_file_becomes_the_model_it_was_made_of(family, tmp_path, tokens):
    dense = original(family)
    convert_checkpoint(write(tmp_path / "model.gguf", dense), tmp_path / "out", sparsity=0)
    converted = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert converted.dtype == torch.float32
    assert converted.config.model_type == f"qsparse_{family}"
    with torch.no_grad():
        assert_close(converted(tokens).logits, dense(tokens).logits)


def test_a_window_is_taken(tmp_path, tokens):
    dense = original("phi3", sliding_window=8)
    convert_checkpoint(write(tmp_path / "model.gguf", dense), tmp_path / "out", sparsity=0)
    converted = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert converted.config.sliding_window == 8
    with torch.no_grad():
        assert_close(converted(tokens).logits, dense(tokens).logits)


@pytest.mark.parametrize(
    ("family", "kind", "dtype", "expected"),
    [
        ("llama", "F16", None, torch.float16),
        ("llama", "BF16", None, torch.bfloat16),
        ("llama", "Q8_0", None, torch.bfloat16),
        ("llama", "Q4_0", "float32", torch.float32),
        ("qwen2", "Q8_0", "float16", torch.float16),
        ("qwen2", "Q5_1", "float32", torch.float32),
    ],
)
def test_types_of_tensors(family, kind, dtype, expected, tmp_path, tokens):
    """The weights are what gguf's own code makes of the blocks, rounded to the dtype."""
    dense = original(family)
    convert_checkpoint(write(tmp_path / "model.gguf", dense, kind), tmp_path / "out", sparsity=0, dtype=dtype)
    converted = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert converted.dtype == expected
    with torch.no_grad():
        for parameter in dense.parameters():
            if parameter.ndim == 2:
                blocks = gguf.quants.quantize(parameter.numpy(), gguf.GGMLQuantizationType[kind])
                values = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[kind])
                parameter.copy_(torch.from_numpy(np.array(values)))
        assert_close(converted(tokens).logits, dense.to(expected)(tokens).logits)


def test_a_folder_of_files_and_what_comes_along(tmp_path, tokens):
    dense = original("qwen2", tie_word_embeddings=True)
    write(tmp_path / "in" / "model-F32.gguf", dense)
    (tmp_path / "in" / "model-Q4.gguf").write_bytes(b"GGUF")
    command = ["convert", tmp_path / "in", tmp_path / "out", "--gguf-file", "model-F32.gguf", "--sparsity", "0.25"]
    assert main([*map(str, command), "--dry-run"]) == 0
    assert not (tmp_path / "out").exists()
    assert main([*map(str, command)]) == 0
    converted = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert converted.config.sparsity == 0.25
    assert converted.config.tie_word_embeddings
    assert not hasattr(converted.config, "quantization_config")
    ours, theirs = (
        AutoTokenizer.from_pretrained(tmp_path / "out"),
        AutoTokenizer.from_pretrained(tmp_path / "in", gguf_file="model-F32.gguf"),
    )
    text = "hello, world\n<end> 12"
    assert ours(text)["input_ids"] == theirs(text)["input_ids"]
    assert len(ours("hel")["input_ids"]) == 1
    chat = [{"role": "user", "content": "hello"}]
    assert ours.apply_chat_template(chat, tokenize=False) == "user: hello\n"
    generation = GenerationConfig.from_pretrained(tmp_path / "out")
    assert (generation.bos_token_id, generation.eos_token_id, generation.pad_token_id) == (1, 2, 0)
    assert {path.name for path in tmp_path.iterdir()} == {"in", "out"}
    assert "gguf" not in json.dumps(json.loads((tmp_path / "out" / "config.json").read_text()))


def test_llama_3_scales_its_rotary_embedding(tmp_path, tokens):
    rope = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0}
    rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    dense = original("llama", rope_parameters=rope, head_dim=32)
    plain = 500000.0 ** (-torch.arange(0, 32, 2) / 32)
    divisors = plain / dense.model.rotary_emb.inv_freq
    assert 1.1 < divisors[8] < 7 < divisors[9]  # one between those that are kept and those that are slowed
    file = write(tmp_path / "model.gguf", dense, tensors={"rope_freqs.weight": divisors})
    convert_checkpoint(file, tmp_path / "out", sparsity=0)
    converted = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(converted.model.rotary_emb.inv_freq, dense.model.rotary_emb.inv_freq)
    with torch.no_grad():
        assert_close(converted(tokens).logits, dense(tokens).logits)


def test_refuses_by_name_and_writes_nothing(tmp_path, monkeypatch):
    dense = original("llama")
    whole = write(tmp_path / "whole.gguf", dense)
    (tmp_path / "text.gguf").write_text("no GGUF at all")
    (tmp_path / "short.gguf").write_bytes(whole.read_bytes()[:-5000])
    (tmp_path / "header.gguf").write_bytes(whole.read_bytes()[:500])
    write(tmp_path / "part.gguf", dense, extra={"split.count": 3})
    write(tmp_path / "yarn.gguf", dense, scaling="yarn")
    write(tmp_path / "odd.gguf", dense, tensors={"rope_freqs.weight": torch.full((8,), 3.0)})
    write(tmp_path / "bias.gguf", dense, tensors={"model.layers.0.self_attn.q_proj.bias": torch.ones(64)})
    write(tmp_path / "falcon.gguf", dense, architecture="starcoder2")
    write(tmp_path / "unknown.gguf", dense, architecture="minicpm")
    there = sorted(path.name for path in tmp_path.iterdir())
    for name, said in {
        "text": "is no GGUF file",
        "short": "short.gguf: ",
        "header": "header.gguf: ",
        "part": "is one of several parts; make one file of them with llama.cpp's llama-gguf-split",
        "yarn": "scales its rotary embedding ('yarn')",
        "odd": "scales its rotary embedding otherwise than Llama 3",
        "bias": "holds 22 tensors, and its model as Transformers reads it 21",
        "falcon": "model_type must be one of llama, .*, got 'starcoder2'",
        "unknown": "GGUF model with architecture minicpm is not supported",
        "nowhere": "no repository of the Hub can have that name",
    }.items():
        with pytest.raises(UserError, match=said.replace("(", "[(]").replace(")", "[)]")) as raised:
            convert_checkpoint(tmp_path / f"{name}.gguf", tmp_path / "out")
        assert len(str(raised.value)) < 700
        assert "\n" not in str(raised.value)
    with pytest.raises(UserError, match=r"holds GGUF files; name one with gguf_file .*: bias.gguf, falcon.gguf"):
        convert_checkpoint(tmp_path, tmp_path.parent / "out")
    with pytest.raises(UserError, match=r"holds no 'x.gguf'; its GGUF files are: bias.gguf"):
        convert_checkpoint(tmp_path, tmp_path.parent / "out", gguf_file="x.gguf")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match="read with the package gguf: pip install 'qsparse-hf"):
        convert_checkpoint(whole, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == there
    assert not (tmp_path.parent / "out").exists()


def test_warns_of_a_tokenizer_that_transformers_splits_otherwise(tmp_path, caplog):
    convert_checkpoint(write(tmp_path / "model.gguf", original("llama"), pre="smollm"), tmp_path / "out")
    assert "does not know how the tokenizer 'smollm' splits text" in caplog.text
