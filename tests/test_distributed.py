"""Several processes (gloo): the losses of one, checkpoints that load anywhere, runs that go on with more or fewer."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from conftest import REPOSITORY, assert_close, sparse_config
from packaging.version import Version
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from qsparse_hf.errors import UserError
from qsparse_hf.training.faults import complete_checkpoints
from qsparse_hf.training.run import train
from qsparse_hf.training.sharding import has_shards

COMMANDS = {"ddp": ["scripts/train.py"], "fsdp2": ["tests/fsdp2_on_cpu.py", "train"]}
# Gradients of fp32 summed in another order, over 6 updates.
LOSS_TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def run_config(tmp_path_factory, tiny_checkpoint) -> Path:
    """A streamed run of 6 updates of 4 sequences that saves every 3, with both ramps and a second stage."""
    folder = tmp_path_factory.mktemp("run")
    lines = [json.dumps({"text": f"{i} times {i} makes {i * i}. " * (i % 9 + 1)}) for i in range(120)]
    (folder / "train.jsonl").write_text("\n".join(lines))
    (folder / "eval.txt").write_text("7 and 8 make 15. " * 16)
    config = {
        "model": str(tiny_checkpoint),
        "model_fields": {"weight_quantization": "ternary", "activation_quantization": "int8"},
        "train_data": [str(folder / "train.jsonl")],
        "eval_data": [str(folder / "eval.txt")],
        "streaming": True,
        "shuffle_window": 10,
        "sequence_length": 64,
        "max_steps": 6,
        "global_batch_size": 4,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 1,  # Transformers averages over batches, which processes fill differently
        "learning_rate": 1e-3,
        "sparsity_ramp_steps": 4,
        "sparsity_ramp_levels": 2,
        "quantization_ramp_steps": 5,
        "second_stage_learning_rate": 5e-4,
        "second_stage_weight_decay": 0.0,
        "weight_decay": 0.1,
        "logging_steps": 1,
        "save_steps": 3,
        "use_cpu": True,
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def torchrun(processes: int, engine: str, *arguments) -> subprocess.Popen:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return subprocess.Popen(
        [*launch, *COMMANDS[engine], *map(str, arguments)],
        cwd=REPOSITORY,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def finish(process: subprocess.Popen) -> str:
    said = process.communicate(timeout=180)[1]
    assert process.returncode == 0, said[-4000:]
    return said


def logged(folder: Path, name: str) -> list[float | None]:
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry.get(name) for entry in history if "loss" in entry]


# With DDP the data is a stream; with FSDP2 it is prepared on disk, there is a control, and the model is saved in bf16.
OPTIONS = {
    "ddp": ["streaming=true"],
    "fsdp2": ["streaming=false", "control=true", "eval_on_start=true", "save_dtype=bfloat16"],
}


@pytest.fixture(scope="module", params=COMMANDS)
def engine(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def alone(run_config, engine, tmp_path_factory) -> Path:
    """The run in one process."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    train(str(run_config), [f"output_dir={folder}", *OPTIONS[engine]])
    return folder


@pytest.fixture(scope="module")
def together(run_config, engine, tmp_path_factory) -> Path:
    """The run in two processes."""
    folder = tmp_path_factory.mktemp(engine) / "run"
    finish(torchrun(2, engine, run_config, f"output_dir={folder}", *OPTIONS[engine]))
    return folder


def assert_same(alone: Path, folder: Path) -> None:
    assert logged(folder, "loss") == pytest.approx(logged(alone, "loss"), rel=LOSS_TOLERANCE)
    assert logged(folder, "tokens_seen") == logged(alone, "tokens_seen")
    for name in ("learning_rate", "weight_decay", "quantization_strength"):
        assert logged(folder, name) == logged(alone, name)
    assert logged(folder, "sparsity/all") == pytest.approx(logged(alone, "sparsity/all"))
    expected, actual = (load_file(path / "checkpoint-6" / "model.safetensors") for path in (alone, folder))
    assert expected.keys() == actual.keys()
    for name in expected:
        assert_close(actual[name], expected[name])
    expected, actual = (json.loads((path / "all_results.json").read_text()) for path in (alone, folder))
    losses = [name for name in expected if name.endswith("eval_loss")]
    assert [actual[name] for name in losses] == pytest.approx([expected[name] for name in losses], rel=LOSS_TOLERANCE)


def test_two_processes_train_like_one(alone, together, engine):
    assert_same(alone, together)
    if engine == "fsdp2":
        assert_same(alone / "control", together / "control")
        assert "control_initial_eval_loss" in json.loads((together / "all_results.json").read_text())


def test_a_checkpoint_loads_anywhere(engine, together, tokens):
    """Without a launcher, without this package's trainer."""
    checkpoint = together / "checkpoint-6"
    assert has_shards(checkpoint) == (engine == "fsdp2")
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    assert type(model).__name__ == "QSparseLlamaForCausalLM"
    assert model.dtype == torch.float32
    final = AutoModelForCausalLM.from_pretrained(together, dtype="auto")
    assert final.dtype == (torch.bfloat16 if engine == "fsdp2" else torch.float32)
    same = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=final.dtype)
    assert torch.equal(same(tokens).logits, final(tokens).logits)


def stopped_half_way(run: Path, folder: Path) -> str:
    shutil.copytree(run, folder)
    shutil.rmtree(folder / "checkpoint-6")
    (folder / "model.safetensors").unlink()
    return f"output_dir={folder}"


def test_two_processes_go_on_as_one(run_config, engine, alone, together, tmp_path):
    stopped = stopped_half_way(together, tmp_path / "run")
    train(str(run_config), [stopped, *OPTIONS[engine], "resume_from_checkpoint=last"])
    assert_same(alone, tmp_path / "run")


def test_one_process_goes_on_as_two_and_shards_as_fewer(run_config, engine, alone, together, tmp_path):
    before, processes = (alone, 2) if engine == "ddp" else (together, 1)
    if engine == "ddp" and Version(transformers.__version__) < Version("5.23"):
        pytest.skip("earlier ones restore no optimizer in several CPU processes (device cpu:0); on GPUs they do")
    stopped = stopped_half_way(before, tmp_path / "run")
    finish(torchrun(processes, engine, run_config, stopped, *OPTIONS[engine], "resume_from_checkpoint=last"))
    assert_same(alone, tmp_path / "run")


def test_what_cannot_go_on_is_named(run_config, engine, alone, tmp_path):
    stopped = stopped_half_way(alone, tmp_path / "run")
    options = [stopped, *OPTIONS[engine], "resume_from_checkpoint=last", "control=false"]
    with pytest.raises(UserError, match="a run with rows_per_update 4, and a run with 8 would be another one"):
        train(str(run_config), [*options, "global_batch_size=8"])
    if engine == "fsdp2":
        with pytest.raises(UserError, match="a run with streaming False, and a run with True would be another one"):
            train(str(run_config), [*options, "streaming=true"])
        process = torchrun(1, engine, run_config, *options)
        assert "checkpoint-3 was not written under FSDP" in process.communicate(timeout=120)[1]
        assert process.returncode != 0


def test_sigterm_to_one_process_stops_all_at_the_same_update(run_config, tmp_path):
    folder = tmp_path / "run"
    process = torchrun(
        2, "ddp", run_config, f"output_dir={folder}", "save_steps=100", "max_steps=3000", "repeat_data=true"
    )
    deadline = time.monotonic() + 120
    while not list(folder.glob("runs/*/events*")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(1)
    workers = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    os.kill(workers[-1], signal.SIGTERM)
    said = process.communicate(timeout=120)[1]
    (saved,) = complete_checkpoints(folder)
    assert said.count(f"{saved} is saved, resume_from_checkpoint=last goes on from it") == 1
    assert {path.name for path in saved.glob("rng_state_*")} == {"rng_state_0.pth", "rng_state_1.pth"}


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "deepspeed"])
def test_engine_files_are_what_accelerate_reads(name):
    config = load_config_from_file(str(REPOSITORY / "configs" / "accelerate" / f"{name}.yaml"))
    assert config.distributed_type == {"ddp": "MULTI_GPU", "fsdp2": "FSDP", "deepspeed": "DEEPSPEED"}[name]
    assert config.num_processes == 2
    assert config.mixed_precision in (None, "no")  # the recipe decides
    if name == "fsdp2":
        assert config.fsdp_config["fsdp_version"] == 2
        layers = AutoModelForCausalLM.from_config(sparse_config("llama"))._no_split_modules
        assert set(layers) == {"LlamaDecoderLayer"}  # what TRANSFORMER_BASED_WRAP shards one at a time


def test_one_process_that_sees_several_gpus_is_told_how_to_start(run_config, tmp_path, monkeypatch):
    from qsparse_hf.training.trainer import QSparseTrainingArguments

    monkeypatch.setattr(QSparseTrainingArguments, "n_gpu", property(lambda self: 2))
    with pytest.raises(UserError, match="one process sees 2 GPUs; start one for each with accelerate launch"):
        train(str(run_config), [f"output_dir={tmp_path / 'run'}"])
    assert not (tmp_path / "run").exists()
