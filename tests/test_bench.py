"""The decode benchmark, on a model small enough for a test: what it prints and writes, and what it says of mistakes."""

import json

import pytest
from conftest import dense_config, make, run_qsparse, sparse_config

from qsparse_hf import bench
from qsparse_hf.bench import _configs, bench_decode
from qsparse_hf.errors import UserError
from qsparse_hf.modeling.sparsify import IMPLS, select
from qsparse_hf.modeling.sparsity import Selection


def test_a_table_of_models_and_one_of_products(tmp_path):
    dense_config("qwen2").save_pretrained(tmp_path / "dense")
    measured = ["--sparsities", 0.5, 0.75, "--new-tokens", 8, "--rounds", 2, "--threads", 1]
    where = ["--device", "cpu", "--models", tmp_path / "dense", "--output", tmp_path / "decode.json"]
    run = run_qsparse("bench", "decode", *measured, *where)
    assert run.returncode == 0, run.stderr
    rows = [line for line in run.stdout.splitlines() if line.startswith(f"| {tmp_path}")]
    assert len(rows) == 2 + 2 + 2 * 4  # sparsities; and four groups of each
    written = json.loads((tmp_path / "decode.json").read_text())
    assert written["machine"]["gpu"] is None
    assert written["machine"]["threads"] == 1
    assert bool(written["machine"]["numba"]) == (IMPLS["numba"].missing() is None)
    assert "step" not in run.stdout  # alone, it is measured on a GPU
    generate, *_, product = written["results"]
    assert generate["sparsity"] == 0.5
    assert len(generate["generate"]["dense"]) == len(generate["generate"]["sparse"]) == 2
    for token, whole in zip(generate["generate"]["dense"], generate["whole"]["dense"], strict=True):
        assert whole > 4 * token
    assert product["group"] == "down"
    assert product["shape"] == [96, 64]
    assert product["microseconds"].keys() == {"dense", "sparse", "selection"}
    assert product["share_of_copy"] == {"dense": None, "sparse": None}  # it would mislead on a CPU
    assert "share" not in run.stdout.rpartition("products of one token")[2]
    # Four projections of 8192, 4096, 12288 and 6144 weights in two layers, the embedding as the head, in 2 bytes each.
    assert generate["bytes_a_token"]["dense"] == 2 * (2 * (8192 + 4096 + 12288 + 6144) + 128 * 64)


def test_a_sparse_config_is_taken_too(tmp_path, capsys, monkeypatch):
    config = sparse_config("llama", use_cache=False, sparsity_block_size=16, sparsity_rescale="l2")
    config.save_pretrained(tmp_path)  # without a cache, as training leaves it
    selections = []

    def spied(form: str, inputs: tuple, selection: Selection, compact: bool):
        selections.append(selection)
        return select(form, inputs, selection, compact=compact)

    monkeypatch.setattr(bench, "select", spied)
    settings = {"sparsities": [0.5], "device": "cpu", "dtype": "float32", "new_tokens": 8, "rounds": 1}
    assert bench_decode([str(tmp_path)], **settings)[0]["dtype"] == "float32"
    assert "| batch |" in capsys.readouterr().out
    assert _configs(str(tmp_path), "float")[0].use_cache
    assert set(selections) == {Selection(0.5, 16, "l2")}  # as it is, and as asked for


def test_a_checkpoint_is_measured_as_it_is(tmp_path, capsys):
    """With its own ratios and block size; the groups' parameters are 8192, 4096, 12288 and 6144 a layer."""
    ratios = {"qkv": 0.0, "o": [0.25, 0.75], "down": 0.75}
    sparse_config("llama", sparsity_per_projection=ratios, sparsity_block_size=16).save_pretrained(tmp_path)
    rows = bench_decode([str(tmp_path)], device="cpu", dtype="float32", new_tokens=8, rounds=1)
    decoded, *products = rows
    expected = (4096 * 0.5 + 12288 * 0.5 + 6144 * 0.75) / (8192 + 4096 + 12288 + 6144)
    assert decoded["sparsity"] == pytest.approx(expected)
    assert decoded["as_it_is"]
    assert [(row["group"], row["sparsity"]) for row in products] == [("o", 0.5), ("gate_up", 0.5), ("down", 0.75)]
    assert f"| {expected:.3g} as it is |" in capsys.readouterr().out


def test_packed_ternary_weights_are_measured_beside_the_dense_model(tmp_path):
    dense_config("qwen2").save_pretrained(tmp_path)
    settings = {"weights": "ternary", "sparsities": [0, 0.5], "device": "cpu", "dtype": "float32"}
    rows = bench_decode([str(tmp_path)], **settings, new_tokens=8, rounds=1)
    packed, sparse, *products = rows
    projections, head = 2 * (8192 + 4096 + 12288 + 6144), 4 * 128 * 64
    assert packed["bytes_a_token"] == {"dense": 4 * projections + head, "sparse": projections // 4 + head}
    assert sparse["bytes_a_token"]["sparse"] == projections // 8 + head
    assert packed["bytes"]["sparse"] < packed["bytes"]["dense"] / 2
    assert [row["sparsity"] for row in products] == [0, 0.5] * 4


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"weights": "int4"}, "weights must be one of float, ternary, got 'int4'"),
        ({"sparsities": [1.0]}, "sparsity must be a number with 0 <= sparsity < 1"),
        ({"models": ["nowhere/at-all"]}, "nowhere/at-all .none of llama-2-7b, .*70b-slice.: is no file or folder"),
        ({"dtype": "int8"}, "dtype must be one of float32, bfloat16, float16, got 'int8'"),
        ({"batches": [0]}, "batch must be at least 1, got 0"),
        ({"rounds": 0}, "rounds must be at least 1, got 0"),
        ({"new_tokens": 4}, "new_tokens must be at least 8, got 4"),
        ({"threads": 0}, "threads must be at least 1, got 0"),
        (
            {"output": __file__ + "/decode.json"},
            "cannot be written: .*test_bench.py is no folder",
        ),
        ({"output": "/"}, "'/' cannot be written: Is a directory"),
        ({"output": "a\0b"}, "cannot be written: embedded null byte"),
        ({"output": "a" * 256}, "cannot be written: File name too long"),
        ({"prompts": [-1]}, "prompt must be at least 1, got -1"),
    ],
)
def test_mistakes_are_named(settings, said):
    with pytest.raises(UserError, match=said):
        bench_decode(**{"device": "cpu", "models": ["1b"]} | settings)


def test_tokens_per_second_is_the_median_of_a_prepared_model(monkeypatch):
    """And the model is left as it was."""
    calls = []

    def generate(model, prompt, new_tokens, cache):
        calls.append((model.is_prepared, tuple(prompt.shape), new_tokens))
        return [9e9, 1000.0, 50.0, 2000.0][len(calls) - 1], 0.0  # microseconds a token; the first compiles

    monkeypatch.setattr(bench, "_generate", generate)
    model = make(sparse_config("llama"))
    assert bench.tokens_per_second(model, prompt=5, new_tokens=16) == 1000
    assert calls == [(True, (1, 5), 8), *[(True, (1, 5), 16)] * 3]
    assert not model.is_prepared


def test_what_memory_cannot_hold_is_refused(tmp_path):
    """80 layers of some 60 billion weights each, before anything is made of them."""
    config = dense_config("llama", hidden_size=65536, intermediate_size=262144, num_hidden_layers=80)
    config.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"takes [\d,]+ GB, dense and sparse together, and there are [\d,]+ GB; name a"):
        bench_decode([str(tmp_path)], device="cpu")
