"""Measured sparsity against hand-counted zeros."""

import gzip
import json
import shutil

import pytest
import torch
from conftest import dense_config, make, run_qsparse, sparse_config
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, GPT2Config

from qsparse_hf.cli import main
from qsparse_hf.modeling.configuration_qsparse import GROUPS
from qsparse_hf.modeling.sparsify import Sparsify
from qsparse_hf.modeling.sparsity import Selection
from qsparse_hf.report import Counters, _Counter, count_parameters, report_checkpoint, sparsity_report

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
    rows = {line.split()[0]: line.split()[1:] for line in str(report).splitlines() if line}
    assert rows["all"] == ["61.44K", "34.82K", f"{100 * zeros / 61440:.1f}%"]
    assert rows["Down"][:3] == ["12.29K", "6.14K", "50.0%"]
    assert rows["1"][:4] == ["25.0", "50.0", "50.0", "75.0"]  # zeros, which differ between layers
    down = report.to_dict()["layers"][1]
    assert (down["sparsity"]["down"], down["activated_parameters"]["down"]) == (0.75, 1536)


def test_use_of_features_and_loss_by_hand():
    """One layer whose o_proj reads 4 features: what survives of three tokens is known, and so is what it held."""
    counter = _Counter(Counters(detailed=True))
    selector = Sparsify(Selection(0.5))
    x = torch.tensor([[[3.0, 4.0, 0.0, 1.0], [5.0, -1.0, 0.5, 0.0], [2.0, 0.0, 1.0, 0.0]]])
    counter.before_selection(selector, (x,))
    counter(torch.nn.Linear(4, 1), (selector(x),))
    use = counter.use()
    # kept: features 0 and 1, 0 and 1, 0 and 2; dropped of 26: 1, of 26.25: 0.25, of 5: 0
    assert counter.kept.tolist() == [3, 2, 1, 0]
    assert use.dropped == pytest.approx((1 / 26 + 0.25 / 26.25) / 3, rel=1e-5)
    assert (use.never, use.always, use.half) == (0.25, 0.25, 0.25)  # half of 6 survivors are of feature 0
    peaks = [4 / (26 / 4) ** 0.5, 5 / (26.25 / 4) ** 0.5, 2 / (5 / 4) ** 0.5]
    assert use.peak == pytest.approx(sum(peaks) / 3, rel=1e-5)
    assert selector.selection == Selection(0.5)


def test_use_and_loss_of_a_model(family, tokens):
    model = make(sparse_config(family, sparsity_rescale="l2"))
    mask = torch.ones_like(tokens)
    mask[0, :5] = 0
    report = sparsity_report(model, {"input_ids": tokens, "attention_mask": mask})
    seen = {}
    selector = model.model.layers[0].self_attn.o_sparsify

    def see(module, args: tuple, output) -> None:
        seen["after"], chosen = output, module.selection
        module.selection = Selection(0)
        seen["before"], module.selection = module.forward(*args), chosen  # normalised, where a norm selects

    handle = selector.register_forward_hook(see)
    with torch.no_grad():
        logits = model(tokens, attention_mask=mask).logits
    handle.remove()
    before, after = (seen[name][mask.bool()] for name in ("before", "after"))
    share = (before.square() * (after == 0)).sum(-1) / before.square().sum(-1)
    assert report.features[0]["o"].dropped == pytest.approx(share.mean().item(), rel=1e-4)
    labels = tokens.masked_fill(mask == 0, -100)
    labels[0, 5] = -100  # the first of its row
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert report.loss == pytest.approx(expected.item(), rel=1e-5)
    brief = sparsity_report(model, tokens, detailed=False)
    assert (brief.features, brief.loss) == ([], None)
    assert "zeros" in str(brief)


def test_a_dense_model_drops_nothing(tokens):
    report = sparsity_report(make(dense_config("llama")), tokens)
    assert report.use_of_group("qkv").dropped == 0
    assert report.use_of_group("qkv").always == 1
    assert report.use_of_group("qkv").half == 0.5


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
    assert "100 tokens, loss " in done.stdout
    written = json.loads((tmp_path / "out" / "sparsity.json").read_text())
    assert written["tokens"] == 100
    assert written["layers"][1]["features"]["down"]["dropped"] > 0
    assert 3 < written["loss"] < 30
    assert written["sparsity"] == {**dict.fromkeys(GROUPS, 0.5), "all": 0.5}
    assert (tmp_path / "out" / "sparsity.png").read_bytes()[:4] == b"\x89PNG"


def test_rows_are_read_as_text(tiny_checkpoint, tmp_path):
    text = "one two three " * 50
    (tmp_path / "text.txt").write_text(text)
    with gzip.open(tmp_path / "rows.jsonl.gz", "wt") as file:
        file.write("".join(json.dumps({"text": each}) + "\n" for each in (text, "not read")))
    plain, rows, both = (
        report_checkpoint(str(tiny_checkpoint), [str(tmp_path / name) for name in names], tokens=100, row_length=50)
        for names in (["text.txt"], ["rows.jsonl.gz"], ["text.txt", "rows.jsonl.gz"])
    )
    assert plain == rows
    assert both.tokens == 100
    assert both.loss == pytest.approx(
        report_checkpoint(str(tiny_checkpoint), [str(tmp_path / "text.txt")], tokens=50, row_length=50).loss
    )  # the first 50 of each


def test_report_command_names_mistakes(tiny_checkpoint, tmp_path, capsys):
    text, broken, other = tmp_path / "text.txt", tmp_path / "broken", tmp_path / "gpt2"
    text.write_text("words " * 9)
    shutil.copytree(tiny_checkpoint, broken)
    bare = tmp_path / "bare"
    shutil.copytree(tiny_checkpoint, bare, ignore=shutil.ignore_patterns("token*"))
    (broken / "model.safetensors").write_bytes((broken / "model.safetensors").read_bytes()[:-9])
    shutil.copytree(tiny_checkpoint, other)
    AutoModelForCausalLM.from_config(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=128)).save_pretrained(other)
    for arguments, said in (
        ((tmp_path / "nothing", "--text", text), "nothing"),
        ((tiny_checkpoint, "--text", tmp_path / "nothing"), "nothing"),
        ((tiny_checkpoint, "--text", text, "--tokens", "0"), "tokens must be at least 1, got 0"),
        ((tiny_checkpoint, "--text", text, "--output", text), "text.txt"),
        ((broken, "--text", text), "broken"),
        (
            (bare, "--text", text),
            "bare holds no tokenizer, as an unfinished run's folder may; put its base model's there",
        ),
        ((other, "--text", text), "GPT2LMHeadModel is of none of the families"),
    ):
        assert main(["report", *map(str, arguments)]) == 1
        last = capsys.readouterr().err.splitlines()[-1]
        assert last.startswith("qsparse: error: ")
        assert said in last


def test_a_quantized_model_says_so_and_is_measured_before_the_rounding(tokens):
    """Rounding drops no feature, and the report of what a selection dropped does not count it."""
    fields = {"weight_quantization": "ternary", "activation_quantization": "int8"}
    both = sparsity_report(make(sparse_config("bitnet", sparsity=0.5, **fields)), tokens)
    assert both.quantization == both.to_dict()["quantization"] == {"weights": "ternary", "activations": "int8"}
    assert str(both).splitlines()[0].endswith(", ternary weights, int8 activations")
    rounded, plain = (
        sparsity_report(make(sparse_config("llama", num_hidden_layers=1, activation_quantization=kind)), tokens)
        for kind in ("int8", "none")
    )
    assert plain.quantization == {}
    assert rounded.use_of_group("qkv").peak == plain.use_of_group("qkv").peak
