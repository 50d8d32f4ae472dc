"""Conversion on real files: what comes out, and what every kind of fault leaves behind (nothing)."""

import http.server
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from conftest import FAMILIES, REPOSITORY, dense_config, make, run_python, run_qsparse
from safetensors import safe_open
from safetensors.torch import load_file, save_file, save_model
from tokenizers import Tokenizer, models, normalizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, MixtralConfig

from qsparse_hf.cli import main
from qsparse_hf.conversion import convert_checkpoint
from qsparse_hf.errors import UserError
from qsparse_hf.model_card import is_ours


@pytest.fixture
def dense(family, tmp_path, tiny_tokenizer):
    """A dense checkpoint in one file, with a tokenizer and a generation config of its own."""
    model = make(dense_config(family))
    model.generation_config.temperature = 0.6
    model.generation_config.do_sample = True
    model.save_pretrained(tmp_path / "dense")
    tiny_tokenizer.save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


def listing(folder) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("max_shard_size", ["5GB", "40KB"])
def test_converted_weights_are_the_dense_ones(family, dense, tmp_path, tokens, max_shard_size):
    output = tmp_path / "sparse"
    ratios = {"down": [0.25, 0.75]}
    plan = convert_checkpoint(
        dense, output, sparsity=0.4, sparsity_per_projection=ratios, max_shard_size=max_shard_size
    )
    before = AutoModelForCausalLM.from_pretrained(dense)
    after = AutoModelForCausalLM.from_pretrained(output)
    assert type(after).__name__ == f"QSparse{type(before).__name__}"
    assert after.config.architectures == [type(after).__name__]
    assert (after.config.sparsity, after.config.sparsity_per_projection) == (0.4, ratios)
    assert before.state_dict().keys() == after.state_dict().keys()
    for name, tensor in before.state_dict().items():
        assert torch.equal(after.state_dict()[name], tensor)
    after.scale_sparsity(0)
    assert torch.equal(after(tokens).logits, before(tokens).logits)

    assert after.generation_config.temperature == 0.6
    assert (
        AutoTokenizer.from_pretrained(output)("a b")["input_ids"]
        == AutoTokenizer.from_pretrained(dense)("a b")["input_ids"]
    )
    weights = [path for path in output.iterdir() if path.suffix == ".safetensors"]
    assert (len(weights) > 3) == (max_shard_size == "40KB")
    assert (output / "model.safetensors.index.json").exists() == (max_shard_size == "40KB")
    assert plan.size == sum(tensor.nbytes for path in weights for tensor in load_file(path).values())
    assert listing(tmp_path) == {"dense", "sparse"}


@pytest.mark.parametrize("source_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [None, "bfloat16", "float16", "float32"])
def test_dtypes_and_sharded_sources(tmp_path, source_dtype, dtype):
    model = make(dense_config("llama"), dtype=source_dtype)
    model.save_pretrained(tmp_path / "dense", max_shard_size="50KB")
    convert_checkpoint(tmp_path / "dense", tmp_path / "sparse", dtype=dtype)
    expected = getattr(torch, dtype) if dtype else source_dtype
    converted = AutoModelForCausalLM.from_pretrained(tmp_path / "sparse", dtype="auto")
    assert converted.dtype == expected
    for name, tensor in model.state_dict().items():
        assert torch.equal(converted.state_dict()[name], tensor.to(expected))


def test_tied_embeddings_stay_tied(family, tmp_path, tokens):
    dense = make(dense_config(family, tie_word_embeddings=True))
    dense.save_pretrained(tmp_path / "dense")
    convert_checkpoint(tmp_path / "dense", tmp_path / "sparse", sparsity=0)
    sparse = AutoModelForCausalLM.from_pretrained(tmp_path / "sparse")
    assert sparse.lm_head.weight is sparse.model.embed_tokens.weight
    with safe_open(tmp_path / "sparse" / "model.safetensors", "pt") as file:
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118 (it is no dict)
    assert torch.equal(sparse(tokens).logits, dense(tokens).logits)


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("kept", ["lm_head.weight", "model.embed_tokens.weight"])
def test_either_of_a_tied_pair_suffices(family, tmp_path, tokens, kept, sharded):
    """`safetensors.torch.save_model` writes the head alone, `save_pretrained` the embedding."""
    dense = make(dense_config(family, tie_word_embeddings=True))
    dense.save_pretrained(tmp_path / "dense")
    weights = tmp_path / "dense" / "model.safetensors"
    save_model(dense, str(weights), metadata={"format": "pt"})
    tensors = load_file(weights)
    assert "model.embed_tokens.weight" not in tensors
    tensors[kept] = tensors.pop("lm_head.weight")
    save_file(tensors, weights, metadata={"format": "pt"})
    if sharded:
        weights.unlink()
        parts = {"a.safetensors": {kept: tensors.pop(kept)}, "b.safetensors": tensors}
        for file, part in parts.items():
            save_file(part, tmp_path / "dense" / file, metadata={"format": "pt"})
        index = {"metadata": {}, "weight_map": {name: file for file, part in parts.items() for name in part}}
        (tmp_path / "dense" / "model.safetensors.index.json").write_text(json.dumps(index))
    convert_checkpoint(tmp_path / "dense", tmp_path / "sparse", sparsity=0, max_shard_size="40KB")
    written = json.loads((tmp_path / "sparse" / "model.safetensors.index.json").read_text())
    assert "lm_head.weight" not in written["weight_map"]
    shard = load_file(tmp_path / "sparse" / written["weight_map"]["model.embed_tokens.weight"])
    assert torch.equal(shard["model.embed_tokens.weight"], dense.lm_head.weight)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "sparse")(tokens).logits, dense(tokens).logits)


def test_where_a_single_file_and_an_index_lie_together_the_file_is_read_as_transformers_does(tmp_path):
    make(dense_config("llama"), seed=1).save_pretrained(tmp_path / "dense", max_shard_size="120KB")
    sharded = {path: path.read_bytes() for path in (tmp_path / "dense").glob("model*")}
    make(dense_config("llama"), seed=2).save_pretrained(tmp_path / "dense")
    for path, content in sharded.items():
        path.write_bytes(content)
    convert_checkpoint(tmp_path / "dense", tmp_path / "sparse")
    before, after = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("dense", "sparse"))
    assert torch.equal(after.model.norm.weight, before.model.norm.weight)
    assert torch.equal(after.lm_head.weight, before.lm_head.weight)


def test_companions_go_along_and_other_files_do_not(tmp_path):
    make(dense_config("llama")).save_pretrained(tmp_path / "dense")
    companions = {"merges.txt", "vocab.json", "chat_template.jinja", "LICENSE.md", "NOTICE", "special_tokens_map.json"}
    for name in companions | {"README.md", "pytorch_model.bin", "code.py"}:
        (tmp_path / "dense" / name).write_text(name)
    (tmp_path / "dense" / "additional_chat_templates").mkdir()
    (tmp_path / "dense" / "additional_chat_templates" / "tools.jinja").touch()
    convert_checkpoint(tmp_path / "dense", tmp_path / "sparse")
    assert companions <= listing(tmp_path / "sparse")
    assert (tmp_path / "sparse" / "additional_chat_templates" / "tools.jinja").exists()
    assert not {"pytorch_model.bin", "code.py"} & listing(tmp_path / "sparse")
    assert is_ours((tmp_path / "sparse" / "README.md").read_text())


def test_a_converted_folder_loads_without_this_package(tmp_path):
    make(dense_config("llama")).save_pretrained(tmp_path / "dense")
    convert_checkpoint(tmp_path / "dense", tmp_path / "sparse")
    code = (
        "import sys; sys.modules['qsparse_hf'] = None\n"
        "from transformers import AutoModel, AutoModelForCausalLM\n"
        "for auto in (AutoModelForCausalLM, AutoModel):\n"
        "    print(type(auto.from_pretrained(sys.argv[1], trust_remote_code=True)).__name__)"
    )
    done = run_python(code, tmp_path / "sparse", HF_MODULES_CACHE=str(tmp_path / "modules"))
    assert done.stdout.split() == ["QSparseLlamaForCausalLM", "QSparseLlamaModel"]


WITHOUT_THE_PACKAGE = """
import json, sys; sys.modules["qsparse_hf"] = None
from transformers import AutoTokenizer
trust = sys.argv[1] == "trust"
ids = [AutoTokenizer.from_pretrained(folder, trust_remote_code=trust)("a</s>a")["input_ids"] for folder in sys.argv[2:]]
print(json.dumps(ids))
"""


def test_a_converted_tokenizer_gives_its_parents_ids_with_this_package_and_without(tmp_path):
    """`AutoTokenizer` knows the dense types, and there often overrules the class that the file names."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, "\u2581": 3, "a": 4, "\u2581a": 5}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("\u2581", "a")], unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    folders, expected = [], []
    for family in FAMILIES:
        for declared in ("LlamaTokenizer", "PreTrainedTokenizerFast", None):
            dense = tmp_path / f"{family}-{declared}"
            make(dense_config(family)).save_pretrained(dense)
            tokenizer.save(str(dense / "tokenizer.json"))
            if declared:
                (dense / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": declared} | special))
            ids = AutoTokenizer.from_pretrained(dense)("a</s>a")["input_ids"]
            sparse, again = tmp_path / f"{dense.name}-sparse", tmp_path / f"{dense.name}-again"
            convert_checkpoint(dense, sparse)
            AutoTokenizer.from_pretrained(sparse).save_pretrained(again)
            shutil.copy(sparse / "config.json", again)
            for folder in (sparse, again):
                assert AutoTokenizer.from_pretrained(folder)("a</s>a")["input_ids"] == ids
                folders.append(folder)
                expected.append(ids)
            if family == "mistral" and declared == "LlamaTokenizer":
                assert ids == [5, 2, 5]
    # Two classes at work, or the comparison would say nothing.
    assert [5, 2, 5] in expected
    assert [5, 2, 4] in expected
    done = run_python(WITHOUT_THE_PACKAGE, "plain", *folders)
    assert json.loads(done.stdout) == expected


@pytest.fixture
def coded(tmp_path):
    """A dense checkpoint whose tokenizer is defined by two files in its folder, which write `run` when they are run."""
    folder = tmp_path / "dense"
    make(dense_config("llama")).save_pretrained(folder)
    mark = f"open({str(tmp_path / 'run')!r}, 'w').close()\n"
    (folder / "letters.py").write_text(mark + "LETTERS = ['<unk>', 'a', '<', '/', 's', '>']\n")
    (folder / "tokenization_letters.py").write_text(
        mark + "from transformers import PreTrainedTokenizer\n"
        "from .letters import LETTERS\n"
        "class LetterTokenizer(PreTrainedTokenizer):\n"
        "    vocab_size = len(LETTERS)\n"
        "    def get_vocab(self): return {letter: number for number, letter in enumerate(LETTERS)}\n"
        "    def _tokenize(self, text): return list(text)\n"
        "    def _convert_token_to_id(self, token): return LETTERS.index(token)\n"
        "    def _convert_id_to_token(self, number): return LETTERS[number]\n"
        "    def save_vocabulary(self, *_, **__): return ()\n"
    )
    (folder / "unrelated.py").touch()
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "LetterTokenizer",
                "auto_map": {"AutoTokenizer": [CLASS, None]},
            }
        )
    )
    return folder


CLASS = "tokenization_letters.LetterTokenizer"


@pytest.mark.parametrize(
    "auto_map",
    [{"AutoTokenizer": [CLASS, None]}, {"AutoTokenizer": [None, CLASS]}, {"AutoTokenizer": CLASS}, [CLASS]],
    ids=["slow", "fast", "alone", "legacy"],
)
def test_a_tokenizer_of_code_goes_along_and_is_not_run(coded, tmp_path, auto_map):
    (coded / "tokenizer_config.json").write_text(json.dumps({"auto_map": auto_map}))
    convert_checkpoint(coded, tmp_path / "sparse")
    assert not (tmp_path / "run").exists()
    assert {"letters.py", "tokenization_letters.py"} <= listing(tmp_path / "sparse")
    assert "unrelated.py" not in listing(tmp_path / "sparse")
    done = run_python(WITHOUT_THE_PACKAGE, "trust", tmp_path / "sparse", HF_MODULES_CACHE=str(tmp_path / "modules"))
    assert json.loads(done.stdout) == [[1, 2, 3, 4, 5, 1]]


@pytest.mark.parametrize(
    ("auto_map", "said"),
    [
        ({"AutoTokenizer": ["absent.Tokenizer", None]}, "absent.py"),
        ({"AutoTokenizer": ["../elsewhere.Tokenizer", None]}, "elsewhere.py"),
        ({"AutoTokenizer": ["broken.Tokenizer", None]}, "gone.py"),
        ({"AutoTokenizer": ["sparsity.Tokenizer", None]}, "would replace a file of Q-Sparse's own"),
        ({"AutoTokenizer": [5, None]}, r"tokenizer_config.json: auto_map must name .* got \[5, None\]"),
        ({"AutoTokenizer": 5}, "auto_map must name the tokenizer's class like 'module.Class', .* got 5"),
        (5, "auto_map must name the tokenizer's class like 'module.Class', .* got 5"),
    ],
)
def test_code_of_a_tokenizer_that_cannot_go_along(coded, tmp_path, auto_map, said):
    (tmp_path / "elsewhere.py").touch()
    (coded / "sparsity.py").touch()
    (coded / "broken.py").write_text("from .gone import x")
    (coded / "tokenizer_config.json").write_text(json.dumps({"auto_map": auto_map}))
    before = listing(tmp_path)
    with pytest.raises(UserError, match=said):
        convert_checkpoint(coded, tmp_path / "sparse")
    assert listing(tmp_path) == before


def test_a_tokenizer_that_does_not_load_is_said_and_copied(tmp_path, caplog):
    make(dense_config("llama")).save_pretrained(tmp_path / "dense")
    (tmp_path / "dense" / "tokenizer.json").write_text("{}")
    convert_checkpoint(tmp_path / "dense", tmp_path / "sparse")
    assert "does not load and is copied as it is" in caplog.text
    assert (tmp_path / "sparse" / "tokenizer.json").read_text() == "{}"


def test_mixed_dtypes(tmp_path):
    model = make(dense_config("llama"), dtype=torch.bfloat16)
    model.model.embed_tokens.float()
    model.save_pretrained(tmp_path / "dense")
    convert_checkpoint(tmp_path / "dense", tmp_path / "sparse")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "sparse", dtype="auto").dtype == torch.bfloat16


@pytest.mark.parametrize(("dtype", "largest", "beyond"), [("float16", 65504.0, 70000.0), ("bfloat16", 1e38, 3.4e38)])
def test_values_beyond_a_dtype_are_refused_also_beside_infinite_ones(tmp_path, dtype, largest, beyond):
    model = make(dense_config("llama"))
    with torch.no_grad():
        model.model.norm.weight[:2] = torch.tensor([torch.inf, largest])
    model.save_pretrained(tmp_path / "dense")
    convert_checkpoint(tmp_path / "dense", tmp_path / "exact", dtype=dtype)
    written = load_file(tmp_path / "exact" / "model.safetensors")["model.norm.weight"]
    assert torch.equal(written[:2], torch.tensor([torch.inf, largest]).to(getattr(torch, dtype)))
    with torch.no_grad():
        model.model.norm.weight[1] = -beyond
    model.save_pretrained(tmp_path / "dense")
    with pytest.raises(UserError, match=rf"model\.norm\.weight has values beyond {dtype}'s range"):
        convert_checkpoint(tmp_path / "dense", tmp_path / "new" / "folders" / "sparse", dtype=dtype)
    assert listing(tmp_path) == {"dense", "exact"}  # nor the folders on the way


def test_an_output_behind_a_link_is_replaced_again_and_again(tmp_path):
    make(dense_config("llama")).save_pretrained(tmp_path / "dense")
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    for sparsity in (0.25, 0.5, 0.75):
        convert_checkpoint(tmp_path / "dense", tmp_path / "link", sparsity=sparsity, overwrite=True)
        assert AutoModelForCausalLM.from_pretrained(tmp_path / "disk").config.sparsity == sparsity
    assert (tmp_path / "link").is_symlink()
    assert listing(tmp_path) == {"dense", "disk", "link"}


def test_ratios_per_projection_on_the_command_line(tmp_path, capsys):
    make(dense_config("llama")).save_pretrained(tmp_path / "dense")
    ratios = ("--per-projection", "o=0.25", "qkv=0", "--per-projection", "down=0.25,0.75")
    assert main(["convert", str(tmp_path / "dense"), str(tmp_path / "sparse"), *ratios]) == 0
    written = json.loads((tmp_path / "sparse" / "config.json").read_text())
    assert written["sparsity_per_projection"] == {"o": 0.25, "qkv": 0, "down": [0.25, 0.75]}
    with pytest.raises(SystemExit):
        main(["convert", "a", "b", "--per-projection", "down:0.5"])
    assert "must look like down=0.6" in capsys.readouterr().err


def add_tensors(folder, *names) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file(
        weights | {name: torch.ones(8) for name in names}, folder / "model.safetensors", metadata={"format": "pt"}
    )


def test_tensors_that_no_model_reads_are_left_behind_and_counted(tmp_path, caplog):
    make(dense_config("llama")).save_pretrained(tmp_path / "dense")
    # Old Llama checkpoints carry rotary buffers; nothing is lost with them, and nothing is said.
    add_tensors(tmp_path / "dense", "model.layers.0.self_attn.rotary_emb.inv_freq")
    convert_checkpoint(tmp_path / "dense", tmp_path / "sparse")
    assert caplog.text == ""
    add_tensors(tmp_path / "dense", "value_head.weight", "value_head.bias")
    convert_checkpoint(tmp_path / "dense", tmp_path / "sparse", overwrite=True)
    assert "holds 2 tensor(s) that the model does not use" in caplog.text
    assert "value_head" in caplog.text
    kept = load_file(tmp_path / "sparse" / "model.safetensors")
    assert not any("inv_freq" in name or "value_head" in name for name in kept)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("model.layers.2.mlp.up_proj.weight", "asks for 2 layers, but the weights hold 3"),
        ("model.layers.1.self_attn.q_proj.bias", "holds 1 tensor.*'model.layers.1.self_attn.q_proj.bias'"),
        ("model.layers.0.self_attn.q_norm.weight", "holds 1 tensor.*'model.layers.0.self_attn.q_norm.weight'"),
        ("lm_head.bias", "holds 1 tensor.*'lm_head.bias'"),
    ],
)
def test_tensors_of_the_model_that_its_configuration_does_not_ask_for_are_refused(tmp_path, name, said):
    make(dense_config("llama")).save_pretrained(tmp_path / "dense")
    add_tensors(tmp_path / "dense", name)
    for dry_run in (True, False):
        with pytest.raises(UserError, match=said):
            convert_checkpoint(tmp_path / "dense", tmp_path / "sparse", dry_run=dry_run)
    assert listing(tmp_path) == {"dense"}


def test_a_link_to_the_folder_above_is_not_followed(tmp_path):
    dense = tmp_path / "dense"
    make(dense_config("llama")).save_pretrained(dense)
    for name in ("chat_templates", "tokenizer_files", "additional_chat_templates"):
        (dense / name).symlink_to("..")
    convert_checkpoint(dense, dense / "sparse")
    assert not {"chat_templates", "tokenizer_files", "additional_chat_templates"} & listing(dense / "sparse")


def test_dry_run_writes_nothing_and_prints_sizes(tmp_path):
    make(dense_config("llama")).save_pretrained(tmp_path / "dense")
    done = run_qsparse(
        "convert", tmp_path / "dense", tmp_path / "sparse", "--dry-run", "--sparsity", 0.75, "--dtype", "bfloat16"
    )
    assert done.returncode == 0, done.stderr
    parameters = 2 * 30720 + 2 * 128 * 64 + 5 * 64
    for said in ("qsparse_llama", f"{parameters:,}", "61,440", "15,360  (25.0%)"):
        assert said in done.stdout
    assert listing(tmp_path) == {"dense"}


def break_nothing(folder): ...


def drop_config(folder):
    (folder / "config.json").unlink()


def garble_config(folder):
    (folder / "config.json").write_text("{")


def set_config(**fields):
    def change(folder):
        config = json.loads((folder / "config.json").read_text()) | fields
        (folder / "config.json").write_text(json.dumps(config))

    return change


def drop_shard(folder):
    (folder / "model-00002-of-00003.safetensors").unlink()


def truncate_shard(folder):
    shard = folder / "model-00002-of-00003.safetensors"
    with shard.open("r+b") as file:
        file.truncate(shard.stat().st_size - 100)


def garble_header(folder):
    with (folder / "model-00002-of-00003.safetensors").open("r+b") as file:
        file.seek(8)
        file.write(b"\xff" * 64)


def garble_index(folder):
    (folder / "model.safetensors.index.json").write_text("[]")


def escape_index(folder):
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.norm.weight"] = "../elsewhere.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def write_index(content):
    def change(folder):
        (folder / "model.safetensors.index.json").write_text(content)

    return change


def index_is_a_folder(folder):
    (folder / "model.safetensors.index.json").unlink()
    (folder / "model.safetensors.index.json").mkdir()


def index_names(file):
    return write_index(json.dumps({"weight_map": {"model.norm.weight": file}}))


def nest_config(folder):
    text = (folder / "config.json").read_text().strip()
    (folder / "config.json").write_text(f'{text[:-1]}, "x": {"[" * 100_000}{"]" * 100_000}}}')


def drop_weights(folder):
    for path in folder.glob("model*"):
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"pickle")


def drop_tensor(folder):
    path = folder / "model-00003-of-00003.safetensors"
    tensors = load_file(path)
    del tensors["model.norm.weight"]
    save_file(tensors, path)


@pytest.mark.parametrize(
    ("break_it", "arguments", "said"),
    [
        (drop_config, {}, "config.json is missing"),
        (garble_config, {}, "config.json cannot be read as JSON"),
        (set_config(model_type="gpt2"), {}, "must be one of llama, .*, bitnet, got 'gpt2'"),
        (set_config(model_type="qsparse_llama"), {}, "Q-Sparse already"),
        (set_config(quantization_config={"quant_method": "gptq"}), {}, "quantized"),
        (set_config(model_type=["llama"]), {}, "must be one of llama, mistral, .*got"),
        *(
            (
                set_config(**{key: value}),
                {},
                f"config.json: {key} must be an integer from 1 to 1,000,000,000, got {value}",
            )
            for key, value in (
                ("num_attention_heads", 0),
                ("num_key_value_heads", 0),
                ("head_dim", 0),
                ("hidden_size", -4),
                ("intermediate_size", 1.5),
                ("vocab_size", -1),
                ("vocab_size", 10**30),
                ("num_attention_heads", True),
            )
        ),
        (set_config(hidden_act="bogus"), {}, "config.json: hidden_act must be one of gelu, .*silu.*, got 'bogus'"),
        (set_config(hidden_act=["silu"]), {}, "hidden_act must be one of .*, got .'silu'."),
        *(
            (set_config(**{key: rope}), {}, f"the rope_type in {key} must be one of default, linear, .*, got {said}")
            for key, rope, said in (
                ("rope_parameters", {"rope_type": "bogus", "rope_theta": 1e4}, "'bogus'"),
                ("rope_parameters", {"full_attention": {"rope_type": "bogus", "rope_theta": 1e4}}, "'bogus'"),
                ("rope_parameters", {"rope_type": None, "rope_theta": 1e4}, "None"),
                ("rope_scaling", {"type": "su", "factor": 2.0}, "'su'"),
            )
        ),
        *(
            (set_config(**{key: name}), {}, f"{key} must be one of float32, bfloat16, float16, float64, got {said}")
            for key, name, said in (
                ("dtype", "bogus", "'bogus'"),
                ("torch_dtype", "save", "'save'"),
                ("dtype", "float8_e4m3fn", "'float8_e4m3fn'"),
                ("dtype", {"": "float32"}, "{'': 'float32'}"),
                ("torch_dtype", [1], ".1."),
            )
        ),
        (set_config(pad_token_id=9999), {}, "pad_token_id must be below vocab_size, which is 128, and .*, got 9999"),
        (set_config(intermediate_size=80), {}, r"has shape \(96, 64\), but config.json asks for \(80, 64\)"),
        (set_config(num_hidden_layers=3), {}, "config.json asks for 3 layers, but the weights hold 2"),
        (drop_shard, {}, "names the file 'model-00002-of-00003.safetensors', which is missing"),
        (truncate_shard, {}, "model-00002-of-00003.safetensors is truncated or corrupt"),
        (garble_header, {}, "model-00002-of-00003.safetensors is truncated or corrupt"),
        (garble_index, {}, "must hold a JSON object, got list"),
        (escape_index, {}, "is missing"),
        (index_is_a_folder, {}, "index.json is missing"),
        (index_names("x" * 300), {}, "xxx', which is missing"),
        (index_names("a\0b"), {}, "a.x00b', which is missing"),
        (index_names("/etc/passwd"), {}, "'/etc/passwd', which is missing"),
        (index_names(".."), {}, "'..', which is missing"),
        (index_names(5), {}, "no weight_map"),
        (write_index("[" * 100_000), {}, "cannot be read as JSON"),
        (nest_config, {}, "config.json cannot be read as JSON"),
        (set_config(num_hidden_layers=0), {}, "num_hidden_layers must be an integer from 1 to 10,000, got 0"),
        (set_config(num_hidden_layers=10**9), {}, "num_hidden_layers must be .*, got 1000000000"),
        (set_config(num_hidden_layers="2"), {}, "num_hidden_layers must be .*, got '2'"),
        (set_config(save_pretrained="x"), {}, "'save_pretrained' would hide"),
        (set_config(attention_size=4), {}, "'attention_size' would hide"),
        (set_config(attribute_map={"sparsity": "vocab_size"}), {}, "'attribute_map' would hide"),
        (set_config(configuration_files=["config.9.0.0.json"]), {}, "configuration_files leads to other files"),
        (set_config(transformers_weights="../x.safetensors"), {}, "transformers_weights leads to other files"),
        (set_config(sparsity_blocksize=32), {}, "did you mean sparsity_block_size"),
        (drop_weights, {}, "neither model.safetensors nor"),
        (drop_tensor, {}, "lacks 'model.norm.weight', which the index says"),
        (break_nothing, {"sparsity": 1.0}, "^the fields asked for: sparsity must be .*got 1.0"),
        (break_nothing, {"sparsity_block_size": 24}, "sparsity_block_size .*got 24"),
        (break_nothing, {"sparsty": 0.5}, "unknown field 'sparsty'"),
        (break_nothing, {"dtype": "int8"}, "dtype must be one of .*'int8'"),
        *(
            (break_nothing, {"max_shard_size": size}, f"max_shard_size must be a positive .*{size!r}")
            for size in ("many", "infGB", "nanGB", "-5GB", -5, 0, "0.0MB", None)
        ),
    ],
)
def test_unsuitable_sources_and_arguments(tmp_path, break_it, arguments, said):
    make(dense_config("llama")).save_pretrained(tmp_path / "dense", max_shard_size="120KB")
    assert (tmp_path / "dense" / "model-00003-of-00003.safetensors").exists()
    break_it(tmp_path / "dense")
    for dry_run in (True, False):
        with pytest.raises(UserError, match=said):
            convert_checkpoint(tmp_path / "dense", tmp_path / "sparse", dry_run=dry_run, **arguments)
    assert listing(tmp_path) == {"dense"}


def test_what_transformers_computes_is_not_taken_from_the_file(tmp_path):
    make(dense_config("llama")).save_pretrained(tmp_path / "dense")
    set_config(use_return_dict=True, is_heterogeneous=False)(tmp_path / "dense")
    convert_checkpoint(tmp_path / "dense", tmp_path / "sparse")
    assert (
        not {"use_return_dict", "is_heterogeneous"} & json.loads((tmp_path / "sparse/config.json").read_text()).keys()
    )


def test_mixtral_is_refused_for_now(tmp_path):
    MixtralConfig().save_pretrained(tmp_path / "dense")
    with pytest.raises(UserError, match="got 'mixtral'"):
        convert_checkpoint(tmp_path / "dense", tmp_path / "sparse")


def test_the_command_says_it_in_one_line(tmp_path, capsys):
    make(dense_config("llama")).save_pretrained(tmp_path / "dense")
    (tmp_path / "taken").mkdir()
    (tmp_path / "papers").mkdir()
    (tmp_path / "papers" / "thesis.txt").touch()
    (tmp_path / "loop").symlink_to("loop")
    capsys.readouterr()
    for arguments in (
        ("no/such/folder/anywhere", tmp_path / "sparse"),
        ("not-on-this-machine", tmp_path / "sparse"),
        (tmp_path / "dense", tmp_path / "sparse", "--sparsity", 1),
        (tmp_path / "dense", tmp_path / "sparse", "--per-projection", "gate=0.5"),
        (tmp_path / "dense", tmp_path / "sparse", "--revision", "main"),
        (tmp_path / "dense", tmp_path / "taken"),
        (tmp_path / "dense", tmp_path / "dense", "--overwrite"),
        (tmp_path / "dense", tmp_path, "--overwrite"),
        (tmp_path / "dense", tmp_path / "papers", "--overwrite"),
        (tmp_path / "dense", tmp_path / "papers" / "thesis.txt", "--overwrite"),
        (tmp_path / "dense", tmp_path / "papers" / "thesis.txt" / "below"),
        (tmp_path / "dense", tmp_path / "new" / "a\0b"),
        (tmp_path / "dense", tmp_path / "new" / ("x" * 300)),
        (tmp_path / "dense", tmp_path / "new" / ("x" * 250)),
        (tmp_path / "dense", tmp_path / "loop" / "sparse"),
        ("a\0b", tmp_path / "sparse"),
    ):
        assert main(["convert", *map(str, arguments)]) == 1
        said = capsys.readouterr()
        assert said.out == ""
        assert said.err.startswith("qsparse: error: "), said.err
        assert len(said.err.splitlines()) == 1, said.err
    assert listing(tmp_path) == {"dense", "taken", "papers", "loop"}
    assert listing(tmp_path / "papers") == {"thesis.txt"}


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs a folder that takes no files, like Linux' /proc")
def test_a_place_that_takes_no_files_is_not_called_taken(tmp_path):
    make(dense_config("llama")).save_pretrained(tmp_path / "dense")
    with pytest.raises(UserError, match="cannot write /proc/x: No such file or directory"):
        convert_checkpoint(tmp_path / "dense", "/proc/x")


def test_overwrite_replaces_and_a_failed_overwrite_keeps(tmp_path):
    make(dense_config("llama")).save_pretrained(tmp_path / "dense")
    convert_checkpoint(tmp_path / "dense", tmp_path / "sparse", sparsity=0.25)
    with pytest.raises(UserError, match="exists already"):
        convert_checkpoint(tmp_path / "dense", tmp_path / "sparse", sparsity=0.5)
    (tmp_path / "sparse" / "mine.txt").touch()
    convert_checkpoint(tmp_path / "dense", tmp_path / "sparse", sparsity=0.5, overwrite=True)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "sparse").config.sparsity == 0.5
    assert "mine.txt" not in listing(tmp_path / "sparse")

    truncated = tmp_path / "dense" / "model.safetensors"
    with truncated.open("r+b") as file:
        file.truncate(truncated.stat().st_size // 2)
    with pytest.raises(UserError, match="truncated"):
        convert_checkpoint(tmp_path / "dense", tmp_path / "sparse", sparsity=0.75, overwrite=True)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "sparse").config.sparsity == 0.5
    assert listing(tmp_path) == {"dense", "sparse"}


@pytest.fixture(scope="module")
def large_dense(tmp_path_factory):
    """About 400 MB in one file, enough to be caught in the middle."""
    config = LlamaConfig(
        vocab_size=1000, hidden_size=1024, intermediate_size=2816, num_hidden_layers=8, num_attention_heads=8
    )
    folder = tmp_path_factory.mktemp("large") / "dense"
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    yield folder
    shutil.rmtree(folder)


def kill_while_writing(source, output) -> None:
    """Start a conversion and kill -9 it when the first of its shards lies on disk."""
    command = [sys.executable, "-m", "qsparse_hf.cli", "convert", str(source), str(output), "--overwrite"]
    process = subprocess.Popen([*command, "--max-shard-size", "20MB"], cwd=REPOSITORY, stderr=subprocess.DEVNULL)
    partial = output.parent / f".{output.name}.partial"
    deadline = time.monotonic() + 60
    while not list(partial.glob("*.safetensors")):
        assert process.poll() is None, "the conversion ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (partial / "config.json").exists()


def test_kill_in_mid_write_leaves_nothing_that_loads_and_the_next_run_succeeds(large_dense, tmp_path):
    output = tmp_path / "sparse"
    kill_while_writing(large_dense, output)
    assert not output.exists()
    for left in tmp_path.iterdir():
        with pytest.raises((OSError, ValueError)):
            AutoModelForCausalLM.from_pretrained(left)
    convert_checkpoint(large_dense, output, sparsity=0.25)
    assert listing(tmp_path) == {"sparse"}

    kill_while_writing(large_dense, output)  # over an existing one: the old stays whole
    assert AutoModelForCausalLM.from_pretrained(output).config.sparsity == 0.25


def test_a_kill_between_the_two_renames_loses_nothing(tmp_path):
    make(dense_config("llama")).save_pretrained(tmp_path / "dense")
    convert_checkpoint(tmp_path / "dense", tmp_path / "sparse", sparsity=0.25)
    (tmp_path / "sparse").rename(tmp_path / ".sparse.replaced")  # as the killed run leaves it
    with pytest.raises(UserError, match="appeared meanwhile"):
        convert_checkpoint(tmp_path / "dense", tmp_path / "sparse")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "sparse").config.sparsity == 0.25


PEAK = """
import re, sys
from qsparse_hf.conversion import convert_checkpoint
source, output, dtype = sys.argv[1:]
convert_checkpoint(source, output + "-first", max_shard_size="20MB", dry_run=True)
def peak():  # of this process alone; getrusage's begins with its parent's
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
before = peak()
convert_checkpoint(source, output, max_shard_size="20MB", dtype=dtype)
print(peak() - before)
"""


@pytest.mark.parametrize(("dtype", "allowed"), [("float32", 30e6), ("bfloat16", 80e6)])
def test_memory_is_a_shard_not_a_model(large_dense, tmp_path, dtype, allowed):
    """A 20 MB shard and some slack; a cast also holds the tensor it reads and what the allocator keeps of the last."""
    extra = int(run_python(PEAK, large_dense, tmp_path / "sparse", dtype).stdout)
    assert (large_dense / "model.safetensors").stat().st_size > 300e6
    assert 10e6 < extra < allowed


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("unshare"), reason="a small disk needs root's tmpfs")
def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path):
    """On a real file system of 1 MB: first refused by the free space, then truly full in mid-write."""
    make(dense_config("llama", intermediate_size=4096)).save_pretrained(tmp_path / "dense")
    disk = tmp_path / "disk"
    disk.mkdir()
    code = (
        "import sys, shutil; from pathlib import Path; from qsparse_hf.cli import main\n"
        "if sys.argv[3] == 'lie': shutil.disk_usage = lambda _: shutil._ntuple_diskusage(0, 0, 10**12)\n"
        "code = main(['convert', *sys.argv[1:3]]); print([p.name for p in Path(sys.argv[2]).parent.iterdir()])\n"
        "sys.exit(code)"
    )
    for honest, said in (("honest", "free"), ("lie", "cannot write")):
        script = f'mount -t tmpfs -o size=1m none {disk} && exec {sys.executable} -c "$0" "$@"'
        done = subprocess.run(
            ["unshare", "-m", "sh", "-c", script, code, tmp_path / "dense", disk / "sparse", honest],
            capture_output=True,
            text=True,
            cwd=REPOSITORY,
        )
        if "mount:" in done.stderr or "unshare:" in done.stderr:
            pytest.skip("mounting is not allowed here")
        assert done.returncode == 1, done.stderr
        assert said in done.stderr
        assert "Traceback" not in done.stderr
        assert done.stdout.strip() == "[]"


def test_two_at_once_to_one_place_are_refused(large_dense, tmp_path):
    output = tmp_path / "sparse"
    command = [sys.executable, "-m", "qsparse_hf.cli", "convert", str(large_dense), str(output)]
    first = subprocess.Popen([*command, "--max-shard-size", "20MB"], cwd=REPOSITORY, stderr=subprocess.DEVNULL)
    while not (tmp_path / ".sparse.partial").exists():
        assert first.poll() is None
        time.sleep(0.005)
    first.send_signal(signal.SIGSTOP)
    try:
        with pytest.raises(UserError, match="another conversion"):
            convert_checkpoint(large_dense, output)
    finally:
        first.send_signal(signal.SIGCONT)
    assert first.wait() == 0
    assert listing(tmp_path) == {"sparse"}


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the Hub's protocol as its client asks for: one repository, `team/dense`, in `root`."""

    root: Path
    fetched: list[str]
    commit = "c" * 40

    def do_GET(self):
        path = self.path.split("?")[0].strip("/")
        kind, _, name = path.rpartition("/")
        if path.startswith("api/models/team/dense/tree/"):
            entries = [
                {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": file.name}
                for file in self.root.iterdir()
            ]
            self.reply(200, json.dumps(entries).encode())
        elif path.startswith("api/models/team/dense"):
            names = [{"rfilename": f.name} for f in self.root.iterdir()]
            self.reply(200, json.dumps({"id": "team/dense", "sha": self.commit, "siblings": names}).encode())
        elif kind.startswith("team/dense/resolve/") and (self.root / name).exists():
            if self.command == "GET":
                self.fetched.append(name)
            self.reply(200, (self.root / name).read_bytes(), ETag=f'"{name}"', **{"X-Repo-Commit": self.commit})
        else:
            self.reply(404, b"", **{"X-Error-Code": "RepoNotFound"})

    do_HEAD = do_GET

    def reply(self, code, body, **headers):
        self.send_response(code)
        for key, value in {"Content-Type": "application/json", "Content-Length": str(len(body)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_): ...


def test_a_hub_id_is_fetched_and_a_dry_run_fetches_the_configuration_alone(tmp_path):
    make(dense_config("llama")).save_pretrained(tmp_path / "dense", max_shard_size="120KB")
    (tmp_path / "dense" / "consolidated.safetensors").write_bytes(b"the same weights in another layout")
    handler = type("Handler", (Hub,), {"root": tmp_path / "dense", "fetched": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
    }
    code = "import sys; from qsparse_hf.cli import main; sys.exit(main(['convert', *sys.argv[1:]]))"
    try:
        done = run_python(code, "team/dense", tmp_path / "sparse", "--dry-run", **environment)
        assert "61,440" in done.stdout
        assert set(handler.fetched) == {"config.json"}
        run_python(code, "team/dense", tmp_path / "sparse", **environment)
        assert "consolidated.safetensors" not in handler.fetched
        done = run_python(code, "team/other", tmp_path / "other", check=False, **environment)
        assert done.returncode == 1
        assert "team/other is not a folder, and the Hub did not give it: 40" in done.stderr
    finally:
        server.shutdown()
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "sparse").config.model_type == "qsparse_llama"
