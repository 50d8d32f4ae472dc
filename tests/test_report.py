"""Measured sparsity against hand-counted zeros."""

import json
import shutil

import pytest
import torch
from conftest import dense_config, make, run_qsparse, sparse_config
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, GPT2Config

from qsparse_hf.cli import main
from qsparse_hf.modeling.configuration_qsparse import GROUPS
from qsparse_hf.report import count_parameters, sparsity_report

# Per layer of the tiny model with heads of 16: q 64x64, k and v 32x64, o 64x64, gate and up 96x64, down 64x96.
HEADS = {"head_dim": 16}
PARAMETERS = {"qkv": 8192, "o": 4096, "gate_up": 12288, "down": 6144}


def test_measured_sparsity_and_activated_parameters(family, tokens):
    ratios = {"qkv": 0.25, "down": [0.25, 0.75]}
    model = make(sparse_config(family, **HEADS, sparsity_per_projection=ratios))
    report = sparsity_report(model, tokens)
    assert report.tokens == 48
    assert report.parameters == [PARAMETERS] * 2
    assert [layer["down"] for layer in report.sparsity] == [0.25, 0.75]
    assert report.of_group("qkv") == 0.25
    assert report.of_group("down") == 0.5
    assert report.projection_parameters == 2 * 30720
    zeros = 2 * (8192 * 0.25 + 4096 * 0.5 + 12288 * 0.5 + 6144 * 0.5)
    assert report.overall == pytest.approx(zeros / 61440)
    assert report.activated_parameters == 61440 - zeros
    assert count_parameters(model) == (61440, 61440 - zeros)
    lines = str(report).splitlines()
    assert lines[-2].split() == ["all", "34.82K", "25.0", "50.0", "50.0", "50.0", f"{100 * zeros / 61440:.1f}"]
    assert lines[-1].split() == ["activated", "12.29K", "4.10K", "12.29K", "6.14K", "34.82K"]
    down = report.to_dict()["layers"][1]
    assert (down["sparsity"]["down"], down["activated_parameters"]["down"]) == (0.75, 1536)


def test_counts_follow_blocks(family):
    model = make(sparse_config(family, **HEADS, sparsity=0.6, sparsity_block_size=4))  # keeps 2 of 4
    assert count_parameters(model) == (61440, 30720)


def test_a_dense_model_reads_everything(family, tokens):
    model = make(dense_config(family, **HEADS))
    report = sparsity_report(model, tokens)
    assert report.of_group("qkv") == report.of_group("o") == report.of_group("gate_up") == 0
    assert report.of_group("down") == pytest.approx(0, abs=0.01)  # a GELU may underflow
    assert count_parameters(model) == (61440, 61440)


def test_padding_is_not_counted_and_batches_add_up(family, tokens):
    model = make(sparse_config(family))
    mask = torch.ones_like(tokens)
    mask[:, :5] = 0
    batch = {"input_ids": tokens, "attention_mask": mask, "labels": tokens}
    assert sparsity_report(model, batch).tokens == 38
    assert sparsity_report(model, [batch, tokens]).tokens == 86


def test_leaves_the_model_as_it_was(family, tokens):
    model = make(sparse_config(family)).train()
    sparsity_report(model, tokens)
    assert model.training
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_adapters_and_compiled_models_are_measured(tokens):
    adapted = get_peft_model(make(sparse_config("llama")), LoraConfig(r=2))
    assert sparsity_report(adapted, tokens).overall == 0.5
    compiled = torch.compile(make(sparse_config("llama")), backend="eager")
    compiled(tokens)
    assert sparsity_report(compiled, tokens).overall == 0.5


def test_refuses_what_it_cannot_measure(tokens):
    with pytest.raises(ValueError, match="Linear is of none of the families llama, mistral"):
        sparsity_report(torch.nn.Linear(2, 2), tokens)
    with pytest.raises(ValueError, match="no tokens"):
        sparsity_report(make(sparse_config("llama")), {"input_ids": tokens, "attention_mask": torch.zeros_like(tokens)})


def test_report_command(tiny_checkpoint, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("one two three " * 50)
    done = run_qsparse("report", tiny_checkpoint, "--text", text, "--output", tmp_path / "out", "--tokens", 100)
    assert done.returncode == 0, done.stderr
    assert "Gate/Up" in done.stdout
    written = json.loads((tmp_path / "out" / "sparsity.json").read_text())
    assert written["tokens"] == 100
    assert written["sparsity"] == {**dict.fromkeys(GROUPS, 0.5), "all": 0.5}
    assert (tmp_path / "out" / "sparsity.png").read_bytes()[:4] == b"\x89PNG"


def test_report_command_names_mistakes(tiny_checkpoint, tmp_path, capsys):
    text, broken, other = tmp_path / "text.txt", tmp_path / "broken", tmp_path / "gpt2"
    text.write_text("words " * 9)
    shutil.copytree(tiny_checkpoint, broken)
    (broken / "model.safetensors").write_bytes((broken / "model.safetensors").read_bytes()[:-9])
    shutil.copytree(tiny_checkpoint, other)
    AutoModelForCausalLM.from_config(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=128)).save_pretrained(other)
    for arguments, said in (
        ((tmp_path / "nothing", "--text", text), "nothing"),
        ((tiny_checkpoint, "--text", tmp_path / "nothing"), "nothing"),
        ((tiny_checkpoint, "--text", text, "--tokens", "0"), "tokens must be at least 1, got 0"),
        ((tiny_checkpoint, "--text", text, "--output", text), "text.txt"),
        ((broken, "--text", text), "broken"),
        ((other, "--text", text), "GPT2LMHeadModel is of none of the families"),
    ):
        assert main(["report", *map(str, arguments)]) == 1
        last = capsys.readouterr().err.splitlines()[-1]
        assert last.startswith("qsparse: error: ")
        assert said in last
