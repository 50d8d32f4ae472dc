"""Mutated checkpoints: a conversion says in one line what is wrong and leaves nothing, or what it writes is right."""

import json
import os
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from conftest import dense_config, make
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qsparse_hf import QSparseLlamaConfig
from qsparse_hf.conversion import convert_checkpoint
from qsparse_hf.errors import UserError

INDEX = "model.safetensors.index.json"
SHARD = "model-00002-of-00003.safetensors"
fuzz = settings(deadline=None, suppress_health_check=list(HealthCheck), database=None)

numbers = st.one_of(
    st.integers(-3, 200),
    st.sampled_from([10**9, 2**31, 2**63, 2**64, 10**30, -(2**63), 0.0, -0.5, 1e308, float("nan"), float("inf")]),
)
paths = st.sampled_from(
    [
        "../outside.safetensors",
        "..",
        ".",
        "",
        "/etc/passwd",
        "sub/model.safetensors",
        "./" + SHARD,
        "a\0b",
        "a\nb",
        "x" * 300,
        "code.py",
        "pytorch_model.bin",
        "link",
        "file:///etc/passwd",
        "https://huggingface.co/gpt2",
    ]
)
scalars = st.one_of(st.none(), st.booleans(), numbers, paths, st.text(max_size=8))
values = st.recursive(
    scalars,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=8), inner, max_size=4)),
    max_leaves=8,
)
nested = st.sampled_from([10, 500, 900, 100_000]).map(lambda depth: "[" * depth + "]" * depth)
keys = st.one_of(
    st.sampled_from(sorted(QSparseLlamaConfig.__dataclass_fields__)),
    st.sampled_from(sorted(name for name in dir(QSparseLlamaConfig))),
    st.sampled_from(
        ["num_labels", "rope_scaling", "auto_map", "transformers_weights", "per_layer_config", "temperature"]
    ),
    st.text(max_size=8),
)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A dense Llama in one file and one in three, beside files that an index must not lead to or that must not run."""
    root = tmp_path_factory.mktemp("fuzz")
    model = make(dense_config("llama", hidden_size=16, intermediate_size=24, num_attention_heads=2, vocab_size=64))
    model.save_pretrained(root / "single")
    model.save_pretrained(root / "sharded", max_shard_size="11KB")
    assert (root / "sharded" / SHARD).exists()
    mark = f"open({str(root / 'run')!r}, 'w').close()\n"
    save_file({"model.norm.weight": torch.zeros(16)}, root / "outside.safetensors")
    for folder in (root / "single", root / "sharded"):
        (folder / "code.py").write_text(
            mark + "from transformers import LlamaConfig as Config, LlamaForCausalLM as Model"
        )
        # What `pickle` would run: open(<root>/run, "w").
        pickled = b"cbuiltins\nopen\n(V%s\nVw\ntR." % str(root / "run").encode()
        (folder / "pytorch_model.bin").write_bytes(pickled)
        (folder / "link").symlink_to("..")
    return root


def check(sources: Path, kind: str, change) -> None:
    """Convert a copy of the checkpoint `kind` that `change` was made to."""
    with tempfile.TemporaryDirectory(dir=sources) as place:
        dense, sparse = Path(place, "dense"), Path(place, "new", "sparse")
        shutil.copytree(sources / kind, dense, symlinks=True)
        shutil.copy(sources / "outside.safetensors", place)
        before = sorted(os.listdir(place))
        change(dense)
        said = None
        try:
            convert_checkpoint(dense, sparse)
        except UserError as error:
            said = str(error)
        if said is not None:
            assert len(said.splitlines()) == 1, said
            assert sorted(os.listdir(place)) == before
        else:
            assert os.listdir(sparse.parent) == ["sparse"]
            held = {}
            for file in sorted(dense.glob("model*.safetensors")):
                held |= load_file(file)
            written = load_file(sparse / "model.safetensors")
            assert len(written) == 21
            for name, tensor in written.items():
                assert tensor.dtype == held[name].dtype
                assert tensor.numpy(force=True).tobytes() == held[name].numpy(force=True).tobytes()
            loaded = AutoModelForCausalLM.from_pretrained(sparse, dtype="auto").state_dict()
            assert loaded.keys() == written.keys()
        assert not (sources / "run").exists()


@settings(fuzz, max_examples=100)
@given(keys, st.one_of(values.map(json.dumps), nested))
@example("num_hidden_layers", "1000000000")
@example("num_labels", "1000000000")
@example("auto_map", '{"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}')
@example("pad_token_id", "-65")
@example("vocab_size", "[64]")
@example("attention_size", "4")
@example("use_return_dict", "true")
@example("configuration_files", '["config.4.0.0.json"]')
@example("x", "9" * 5000)
def test_a_key_of_the_configuration(sources, key, value):
    def change(folder):
        fields = json.loads((folder / "config.json").read_text())
        fields.pop(key, None)
        text = f"{json.dumps(fields)[:-1]}, {json.dumps(key)}: {value}}}"
        (folder / "config.json").write_text(text)

    check(sources, "single", change)


@settings(fuzz, max_examples=40)
@given(st.binary(max_size=40) | values.map(json.dumps).map(str.encode) | nested.map(str.encode))
def test_files_that_are_no_configuration_and_no_index(sources, content):
    check(sources, "single", lambda folder: (folder / "config.json").write_bytes(content))
    check(sources, "sharded", lambda folder: (folder / INDEX).write_bytes(content))
    check(sources, "single", lambda folder: (folder / "tokenizer_config.json").write_bytes(content))


@settings(fuzz, max_examples=100)
@given(st.data(), st.one_of(paths, values))
@example(None, "../outside.safetensors")
def test_an_entry_of_the_index(sources, data, value):
    def change(folder):
        index = json.loads((folder / INDEX).read_text())
        places = [(index, "weight_map"), *((index["weight_map"], name) for name in [*index["weight_map"], "x.weight"])]
        holder, key = data.draw(st.sampled_from(places)) if data else (index["weight_map"], "model.norm.weight")
        holder[key] = value
        (folder / INDEX).write_text(json.dumps(index))

    check(sources, "sharded", change)


@settings(fuzz, max_examples=100)
@given(st.data(), st.sampled_from([("single", "model.safetensors"), ("sharded", SHARD)]))
def test_bytes_of_a_header(sources, data, place):
    kind, file = place

    def change(folder):
        content = bytearray((folder / file).read_bytes())
        header = 8 + int.from_bytes(content[:8], "little")
        at = data.draw(st.integers(0, header - 1))
        match data.draw(st.sampled_from(["flip", "size", "truncate", "delete", "insert"])):
            case "flip":
                content[at] ^= 1 << data.draw(st.integers(0, 7))
            case "size":
                content[:8] = data.draw(st.sampled_from([0, 1, header, 2**40, 2**63, 2**64 - 1])).to_bytes(8, "little")
            case "truncate":
                del content[data.draw(st.integers(0, len(content) - 1)) :]
            case "delete":
                del content[at]
            case "insert":
                content[at:at] = data.draw(st.binary(min_size=1, max_size=4))
        (folder / file).write_bytes(content)

    check(sources, kind, change)


@settings(fuzz, max_examples=100)
@given(st.data())
def test_an_entry_of_a_header(sources, data):
    def change(folder):
        content = (folder / "model.safetensors").read_bytes()
        size = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + size])
        name = data.draw(st.sampled_from(sorted(header)))
        what = data.draw(st.sampled_from(["dtype", "shape", "data_offsets", "name", "layer", "entry"]))
        if what == "name":
            header[data.draw(st.text(max_size=8))] = header.pop(name)
        elif what == "layer":
            header[f"model.layers.{data.draw(numbers)}.mlp.up_proj.weight"] = header.pop(name)
        elif what == "entry" or name == "__metadata__":
            header[name] = data.draw(values)
        else:
            integers = st.lists(st.sampled_from([0, 1, 16, 24, 2**31, 2**63, 2**64, -1]), max_size=3)
            dtypes = st.sampled_from(["F64", "F32", "BF16", "F16", "I64", "F8_E4M3", "BOOL", "F4", "x"])
            header[name][what] = data.draw(st.one_of(dtypes if what == "dtype" else integers, values, st.just("\x85")))
        changed = json.dumps(header).encode()
        (folder / "model.safetensors").write_bytes(len(changed).to_bytes(8, "little") + changed + content[8 + size :])

    check(sources, "single", change)


@settings(fuzz, max_examples=40)
@given(keys | st.sampled_from(["tokenizer_class", "auto_map", "chat_template"]), values)
@example("auto_map", {"AutoTokenizer": ["code.Model", None]})
@example("auto_map", {"AutoTokenizer": ["../code.Model", "code.Model"]})
@example("auto_map", ["code", "", 5])
@example("auto_map", {"AutoTokenizer": "code.Model"})
@example("auto_map", 5)
@example("tokenizer_class", "code.Model")
@example("tokenizer_file", "/etc/passwd")
def test_a_key_of_the_tokenizer(sources, key, value):
    check(sources, "single", lambda folder: (folder / "tokenizer_config.json").write_text(json.dumps({key: value})))
