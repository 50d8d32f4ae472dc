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
from conftest import REPOSITORY, dense_config, make, run_python, run_qsparse
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, MixtralConfig

from qsparse_hf.cli import main
from qsparse_hf.conversion import convert_checkpoint
from qsparse_hf.errors import UserError


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
    assert not {"README.md", "pytorch_model.bin", "code.py"} & listing(tmp_path / "sparse")


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


def test_mixed_dtypes_and_overflow(tmp_path):
    model = make(dense_config("llama"), dtype=torch.bfloat16)
    model.model.embed_tokens.float()
    with torch.no_grad():
        model.lm_head.weight[0, 0] = 1e6
    model.save_pretrained(tmp_path / "dense")
    convert_checkpoint(tmp_path / "dense", tmp_path / "sparse")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "sparse", dtype="auto").dtype == torch.bfloat16
    with pytest.raises(UserError, match=r"lm_head\.weight has values beyond float16's range"):
        convert_checkpoint(tmp_path / "dense", tmp_path / "half", dtype="float16")
    assert listing(tmp_path) == {"dense", "sparse"}


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


def test_unknown_tensors_are_left_behind(tmp_path):
    """Old Llama checkpoints carry rotary buffers that no model reads."""
    make(dense_config("llama")).save_pretrained(tmp_path / "dense")
    weights = load_file(tmp_path / "dense" / "model.safetensors")
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    save_file(weights, tmp_path / "dense" / "model.safetensors", metadata={"format": "pt"})
    convert_checkpoint(tmp_path / "dense", tmp_path / "sparse")
    assert not any("inv_freq" in name for name in load_file(tmp_path / "sparse" / "model.safetensors"))


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
        (garble_config, {}, "config.json is not a Transformers configuration"),
        (set_config(model_type="gpt2"), {}, "must be one of llama, .*, gemma3_text, got 'gpt2'"),
        (set_config(model_type="qsparse_llama"), {}, "Q-Sparse already"),
        (set_config(quantization_config={"quant_method": "gptq"}), {}, "quantized"),
        (set_config(model_type=["llama"]), {}, "must be one of llama, mistral, .*got"),
        (set_config(hidden_act="nope"), {}, "nope"),
        (set_config(num_attention_heads=0), {}, "ZeroDivisionError"),
        (set_config(rope_parameters={"rope_type": "bogus", "rope_theta": 1e4}), {}, "bogus"),
        (set_config(intermediate_size=80), {}, r"has shape \(96, 64\), config.json asks for \(80, 64\)"),
        (set_config(num_hidden_layers=3), {}, "lacks 9 tensor"),
        (drop_shard, {}, "model-00002-of-00003.safetensors is missing"),
        (truncate_shard, {}, "model-00002-of-00003.safetensors is truncated or corrupt"),
        (garble_header, {}, "model-00002-of-00003.safetensors is truncated or corrupt"),
        (garble_index, {}, "is not a safetensors index"),
        (escape_index, {}, "is missing"),
        (drop_weights, {}, "neither model.safetensors nor"),
        (drop_tensor, {}, "lacks model.norm.weight"),
        (break_nothing, {"sparsity": 1.0}, "sparsity must be .*got 1.0"),
        (break_nothing, {"sparsity_block_size": 24}, "sparsity_block_size .*got 24"),
        (break_nothing, {"sparsty": 0.5}, "unknown field 'sparsty'"),
        (break_nothing, {"dtype": "int8"}, "dtype must be one of .*'int8'"),
        (break_nothing, {"max_shard_size": "many"}, "max_shard_size .*'many'"),
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


def test_mixtral_is_refused_for_now(tmp_path):
    MixtralConfig().save_pretrained(tmp_path / "dense")
    with pytest.raises(UserError, match="got 'mixtral'"):
        convert_checkpoint(tmp_path / "dense", tmp_path / "sparse")


def test_the_command_says_it_in_one_line(tmp_path, capsys):
    make(dense_config("llama")).save_pretrained(tmp_path / "dense")
    (tmp_path / "taken").mkdir()
    (tmp_path / "papers").mkdir()
    (tmp_path / "papers" / "thesis.txt").touch()
    capsys.readouterr()
    for arguments in (
        ("no/such/folder/anywhere", tmp_path / "sparse"),
        ("not-on-this-machine", tmp_path / "sparse"),
        (tmp_path / "dense", tmp_path / "sparse", "--sparsity", 1),
        (tmp_path / "dense", tmp_path / "sparse", "--per-projection", "gate=0.5"),
        (tmp_path / "dense", tmp_path / "taken"),
        (tmp_path / "dense", tmp_path / "dense", "--overwrite"),
        (tmp_path / "dense", tmp_path, "--overwrite"),
        (tmp_path / "dense", tmp_path / "papers", "--overwrite"),
        (tmp_path / "dense", tmp_path / "papers" / "thesis.txt", "--overwrite"),
        (tmp_path / "dense", tmp_path / "papers" / "thesis.txt" / "below"),
    ):
        assert main(["convert", *map(str, arguments)]) == 1
        said = capsys.readouterr()
        assert said.out == ""
        assert said.err.startswith("qsparse: error: "), said.err
        assert len(said.err.splitlines()) == 1, said.err
    assert listing(tmp_path) == {"dense", "taken", "papers"}
    assert listing(tmp_path / "papers") == {"thesis.txt"}


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
