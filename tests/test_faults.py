"""What a run survives: kill -9 at any moment, SIGTERM, losses that are not finite, full disks, data that ends."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from conftest import REPOSITORY, make, sparse_config
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from qsparse_hf.cli import main
from qsparse_hf.errors import UserError
from qsparse_hf.training import QSparseTrainer, QSparseTrainingArguments
from qsparse_hf.training.faults import COMPLETE, complete_checkpoints, whole_checkpoint
from qsparse_hf.training.run import train
from qsparse_hf.training.training_report import REPORT

STEPS = 12


@pytest.fixture(scope="module")
def run_config(tmp_path_factory, tiny_checkpoint) -> Path:
    """A streamed run with dropout of 12 updates of 2 micro-batches over a mixture, saved every 2.

    Both ramps are in it, and a second stage.
    """
    folder = tmp_path_factory.mktemp("run")
    for name in "ab":
        lines = [json.dumps({"text": f"{name}: {i} times {i} makes {i * i}. " * (i % 9 + 1)}) for i in range(90)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    config = {
        "model": str(tiny_checkpoint),
        "model_fields": {
            "attention_dropout": 0.1,
            "weight_quantization": "ternary",
            "activation_quantization": "int8",
        },
        "train_data": [
            {"files": str(folder / "a.jsonl"), "probability": 0.7},
            {"files": str(folder / "b.jsonl"), "probability": 0.3},
        ],
        "streaming": True,
        "shuffle_window": 10,
        "repeat_data": True,
        "sequence_length": 64,
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "global_batch_size": 4,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 2,
        "sparsity_ramp_steps": 6,
        "sparsity_ramp_levels": 3,
        "quantization_ramp_steps": 5,
        "second_stage_learning_rate": 5e-4,
        "second_stage_weight_decay": 0.0,
        "weight_decay": 0.1,
        "logging_steps": 1,
        "save_steps": 2,
        "use_cpu": True,
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def start(run_config: Path, output: Path, *overrides: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "qsparse_hf.cli", "train", str(run_config), f"output_dir={output}", *overrides],
        cwd=REPOSITORY,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(process: subprocess.Popen, seen, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not seen():
        assert process.poll() is None, process.stderr.read()[-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.002)


def curve(folder: Path) -> list[tuple]:
    """What training did, update by update: everything logged but the clock."""
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    clock = {"tokens_per_second", "mfu", "train_runtime", "train_samples_per_second", "train_steps_per_second"}
    return [sorted((k, v) for k, v in entry.items() if k not in clock) for entry in history if "loss" in entry]


def assert_same_run(expected: Path, actual: Path) -> None:
    weights, others = load_file(expected / "model.safetensors"), load_file(actual / "model.safetensors")
    assert weights.keys() == others.keys()
    assert all(torch.equal(weights[name], others[name]) for name in weights)
    assert curve(expected) == curve(actual)


@pytest.fixture(scope="module")
def whole_run(run_config, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    train(str(run_config), [f"output_dir={folder}"])
    assert len(curve(folder)) == STEPS
    return folder


@pytest.mark.parametrize("streaming", [True, False])
def test_resuming_after_kill_9_is_the_uninterrupted_run_to_the_bit(run_config, whole_run, tmp_path, streaming):
    """Killed once in the middle of writing a checkpoint and once somewhere in between."""
    options = [] if streaming else ["streaming=false"]
    expected = whole_run
    if not streaming:
        expected = tmp_path / "whole"
        train(str(run_config), [f"output_dir={expected}", *options])

    killed = tmp_path / "killed"
    process = start(run_config, killed, *options)
    wait_for(process, lambda: (killed / "checkpoint-4").exists())  # its first file is being written
    process.kill()
    process.wait()
    assert [path.name for path in complete_checkpoints(killed)] in (["checkpoint-2"], ["checkpoint-2", "checkpoint-4"])
    assert not (killed / "model.safetensors").exists()

    process = start(run_config, killed, "resume_from_checkpoint=last", *options)
    wait_for(process, lambda: (killed / "checkpoint-6" / COMPLETE).exists())
    time.sleep(random.random() * 0.2)
    process.kill()
    process.wait()
    with pytest.raises(UserError, match="go on with resume_from_checkpoint=last, or choose another output_dir"):
        train(str(run_config), [f"output_dir={killed}", *options])
    train(str(run_config), [f"output_dir={killed}", "resume_from_checkpoint=last", *options])
    assert_same_run(expected, killed)


def test_a_half_written_checkpoint_is_never_taken(run_config, whole_run, tmp_path):
    """Whatever a kill leaves of the newest checkpoint, the run goes on from the one before and ends the same."""
    half = tmp_path / "run"
    train(str(run_config), [f"output_dir={half}", "save_total_limit=2"])
    assert [path.name for path in complete_checkpoints(half)] == ["checkpoint-10", "checkpoint-12"]
    (half / "checkpoint-12" / COMPLETE).unlink()
    weights = half / "checkpoint-12" / "model.safetensors"
    os.truncate(weights, weights.stat().st_size // 2)
    (half / "checkpoint-12" / "left.over").touch()
    train(str(run_config), [f"output_dir={half}", "resume_from_checkpoint=last"])
    assert_same_run(whole_run, half)
    assert not (half / "checkpoint-12" / "left.over").exists()
    assert (half / "checkpoint-12" / COMPLETE).exists()


def test_a_kill_before_the_first_checkpoint_begins_anew(run_config, whole_run, tmp_path):
    (tmp_path / "run" / "checkpoint-2").mkdir(parents=True)
    (tmp_path / "run" / "checkpoint-2" / "trainer_state.json").write_text("{")
    train(str(run_config), [f"output_dir={tmp_path / 'run'}", "resume_from_checkpoint=last"])
    assert_same_run(whole_run, tmp_path / "run")


def test_sigterm_saves_and_ends_in_one_line(run_config, whole_run, tmp_path):
    process = start(run_config, tmp_path / "run", "save_steps=100")
    wait_for(process, lambda: list((tmp_path / "run").glob("runs/*/events*")))  # training begins
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=120)[1]
    assert process.returncode == 143, said[-3000:]
    assert "Traceback" not in said
    (saved,) = complete_checkpoints(tmp_path / "run")
    assert f"{saved} is saved, resume_from_checkpoint=last goes on from it" in said.splitlines()[-1]
    train(str(run_config), [f"output_dir={tmp_path / 'run'}", "resume_from_checkpoint=last"])
    assert_same_run(whole_run, tmp_path / "run")


def test_the_handler_is_given_back(run_config, tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    train(str(run_config), [f"output_dir={tmp_path}", "max_steps=6"])
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_loss_that_is_not_finite_names_update_and_batch(run_config, tmp_path, capsys):
    out = tmp_path / "run"
    options = ["learning_rate=1e30", "warmup_steps=0", "quantization_ramp_steps=0", "model_fields={}"]
    options += ["weight_decay=0", "second_stage_weight_decay=null"]
    assert main(["train", str(run_config), f"output_dir={out}", *options]) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert "the loss is not finite at update 2, micro-batch 0 of process 0" in said
    assert "there is no checkpoint yet" in said
    assert load_file(out / "not-finite-update-2-process-0.safetensors")["input_ids"].shape == (2, 64)
    assert complete_checkpoints(out) == []


def test_embeddings_of_a_loss_that_is_not_finite_are_kept(tmp_path):
    rows = [
        {"inputs_embeds": [[0.5] * 64] * 6, "labels": [7] * 6},
        {"inputs_embeds": [[torch.inf] * 64] * 6, "labels": [7] * 6},
    ]
    arguments = QSparseTrainingArguments(
        tmp_path, use_cpu=True, per_device_train_batch_size=2, report_to="none", max_steps=1
    )
    trainer = QSparseTrainer(make(sparse_config("llama")), arguments, train_dataset=Dataset.from_list(rows))
    with pytest.raises(UserError, match="the loss is not finite at update 1, micro-batch 0 of process 0"):
        trainer.train()
    kept = load_file(tmp_path / "not-finite-update-1-process-0.safetensors")["inputs_embeds"]
    assert sorted(kept[:, 0, 0].tolist()) == [0.5, torch.inf]
    assert kept.shape == (2, 6, 64)


def test_weights_that_are_not_finite_are_not_saved(run_config, tmp_path, monkeypatch):
    """The loss was fine, the update after it was not: the checkpoint before it stays the last."""
    plain = QSparseTrainer._save_checkpoint

    def poisoned(self, model, trial):
        if self.state.global_step == 4:
            with torch.no_grad():
                next(model.parameters())[0, 0] = torch.inf
        plain(self, model, trial)

    monkeypatch.setattr(QSparseTrainer, "_save_checkpoint", poisoned)
    with pytest.raises(UserError, match=r"a weight is not finite after update 4; .*checkpoint-2"):
        train(str(run_config), [f"output_dir={tmp_path}", "save_total_limit=1"])
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["checkpoint-2"]


def test_a_full_disk_keeps_the_last_checkpoint(run_config, tmp_path):
    """No file may grow past what the weights need, from the second checkpoint on: writing it fails half-way."""
    code = """
import resource, signal, sys
from qsparse_hf.cli import main
from qsparse_hf.training.trainer import QSparseTrainer
plain = QSparseTrainer._save_checkpoint
def save(self, model, trial):
    if self.state.global_step == 4:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, resource.RLIM_INFINITY))
    plain(self, model, trial)
QSparseTrainer._save_checkpoint = save
sys.exit(main(["train", *sys.argv[1:]]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, run_config, f"output_dir={tmp_path / 'run'}", "save_total_limit=1"],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        timeout=120,
    )
    assert done.returncode == 1, done.stderr[-2000:]
    said = done.stderr.splitlines()[-1]
    assert "checkpoint-4 could not be written: " in said
    assert said.endswith(f"the last complete one is {tmp_path / 'run' / 'checkpoint-2'}")
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-2"]
    AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "checkpoint-2")


def test_whatever_fails_leaves_no_half_checkpoint(tmp_path):
    for name in ("checkpoint-2", "checkpoint-10"):
        (tmp_path / name).mkdir()
        (tmp_path / name / COMPLETE).touch()

    def write() -> None:
        with whole_checkpoint(tmp_path, 12, True, lambda: None) as folder:
            folder.mkdir()
            (folder / "half").touch()
            raise OSError("full")

    with pytest.raises(UserError, match=r"checkpoint-12 could not be written: full; the last .*checkpoint-10"):
        write()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-2"]


@pytest.mark.parametrize(("rows", "window"), [(6, 7), (16, 1000)])
def test_data_that_ends_is_saved_and_said(run_config, tmp_path, rows, window):
    options = [
        f"output_dir={tmp_path / 'run'}",
        "max_steps=100",
        "sparsity_ramp_steps=0",
        "quantization_ramp_steps=0",
        "save_steps=1000",
    ]
    options += [f"shuffle_window={window}", f"global_batch_size={rows}"]
    with pytest.raises(UserError, match=r"training data.* ended after update (\d+) of 100, which is saved") as raised:
        train(str(run_config), [*options, "repeat_data=false"])
    last = complete_checkpoints(tmp_path / "run")[-1]
    assert f"after update {last.name.rpartition('-')[2]} of" in str(raised.value)
    trainer = train(str(run_config), [*options, "repeat_data=true", "resume_from_checkpoint=last"])
    assert trainer.state.global_step == 100
    assert trainer.train_dataset.trained == 100 * rows


def test_more_epochs_go_on_after_the_last(run_config, tmp_path):
    options = [
        f"output_dir={tmp_path}",
        "streaming=false",
        "max_steps=-1",
        "sparsity_ramp_steps=0",
        "quantization_ramp_steps=0",
    ]
    once = train(str(run_config), [*options, "num_train_epochs=1"]).state.global_step
    twice = train(str(run_config), [*options, "num_train_epochs=2", "resume_from_checkpoint=last"])
    assert twice.state.global_step == 2 * once


def test_ctrl_c_saves_too(run_config, whole_run, tmp_path):
    process = start(run_config, tmp_path / "run", "save_steps=100", "max_steps=10000")
    wait_for(process, lambda: list((tmp_path / "run").glob("runs/*/events*")))
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=120)[1]
    assert process.returncode == 130, said[-3000:]
    (saved,) = complete_checkpoints(tmp_path / "run")
    assert f"stopped by SIGINT after update {saved.name.rpartition('-')[2]} of 10000" in said.splitlines()[-1]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("train_data=[OTHER]", "train_data"),
        ("sequence_length=32", "sequence_length 64, and a run with 32 would be another one"),
        ("seed=7", "seed 42, and a run with 7"),
        ("streaming=false", "streaming True, and a run with False"),
        ("shuffle_window=11", "shuffle_window was 10"),
        ("global_batch_size=8", "rows_per_update 4, and a run with 8"),
        ("lora={r: 4}", "model qsparse_llama of"),
        ("model_fields={num_hidden_layers: 1, weight_quantization: ternary}", "model qsparse_llama of"),
    ],
)
def test_another_run_cannot_go_on(run_config, whole_run, tmp_path, change, said):
    (tmp_path / "other.txt").write_text("some other text. " * 500)
    options = [f"output_dir={tmp_path / 'run'}", change.replace("OTHER", str(tmp_path / "other.txt"))]
    with pytest.raises(UserError) as raised:
        train(str(run_config), [*options, f"resume_from_checkpoint={whole_run / 'checkpoint-4'}"])
    assert said in str(raised.value)


def test_checkpoints_that_cannot_go_on_are_named(run_config, tmp_path):
    options = [f"output_dir={tmp_path}", "max_steps=6"]
    train(str(run_config), [*options, "save_only_model=true"])
    with pytest.raises(UserError, match="save_only_model and holds nothing to go on with"):
        train(str(run_config), [*options, "max_steps=8", "resume_from_checkpoint=last"])
    (tmp_path / "checkpoint-4" / COMPLETE).unlink()
    with pytest.raises(UserError, match="checkpoint-4 was cut off while it was written"):
        train(str(run_config), [*options, f"resume_from_checkpoint={tmp_path / 'checkpoint-4'}"])


@pytest.mark.parametrize("lora", ["{}", "{r: 4}"])
def test_a_kill_after_the_last_update_leaves_the_rest_to_do(run_config, tmp_path, lora):
    options = [f"output_dir={tmp_path}", "max_steps=6", f"lora={lora}"]
    train(str(run_config), options)
    name = "model.safetensors" if lora == "{}" else "adapter_model.safetensors"
    expected = load_file(tmp_path / name)
    (tmp_path / name).unlink()
    (tmp_path / REPORT).unlink()
    trainer = train(str(run_config), [*options, "resume_from_checkpoint=last"])
    assert trainer.state.global_step == 6
    assert (tmp_path / REPORT).exists()
    actual = load_file(tmp_path / name)
    assert all(torch.equal(expected[name], actual[name]) for name in expected)
    with pytest.raises(UserError, match="checkpoint-6 is further than max_steps 5"):
        train(
            str(run_config),
            [
                *options,
                "resume_from_checkpoint=last",
                "max_steps=5",
                "sparsity_ramp_steps=0",
                "quantization_ramp_steps=0",
            ],
        )


def test_skipped_rows_are_logged(run_config, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n' + (json.dumps({"text": "something else. " * 20}) + "\n") * 60)
    options = [f"train_data=[{tmp_path / 'a.jsonl'}]", f"output_dir={tmp_path / 'run'}", "on_bad_row=skip"]
    trainer = train(str(run_config), options)
    assert [entry["rows_skipped"] for entry in trainer.state.log_history if "loss" in entry] == [1] * STEPS
