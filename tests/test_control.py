"""The dense control beside a run: the dense model's training to the bit, in the same log, trained once."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
import yaml
from conftest import make_pair
from peft import PeftModel
from transformers import AutoModelForCausalLM, TrainerCallback

from qsparse_hf.cli import main
from qsparse_hf.errors import Interrupted, UserError
from qsparse_hf.losses import compare
from qsparse_hf.training import QSparseTrainer
from qsparse_hf.training.run import train

STEPS = 6
NAMES = ("eval_sums_loss", "eval_words_loss")


@pytest.fixture(scope="module")
def twins(tmp_path_factory, tiny_tokenizer) -> Path:
    """A folder with a `dense` model and the `sparse` one converted from it, a text to train on and two held out."""
    folder = tmp_path_factory.mktemp("twins")
    for name, model in zip(("dense", "sparse"), make_pair("llama"), strict=True):
        model.save_pretrained(folder / name)
        tiny_tokenizer.save_pretrained(folder / name)
    (folder / "train.txt").write_text("".join(f"{i} and {i} makes {i + i}. " for i in range(400)))
    (folder / "sums.txt").write_text("".join(f"{i} and {i + 1} makes {i + i + 1}. " for i in range(20)))
    (folder / "words.jsonl").write_text(json.dumps({"text": "nothing to add here " * 9}))
    recipe = {
        "model": str(folder / "sparse"),
        "train_data": [str(folder / "train.txt")],
        "eval_data": {"sums": str(folder / "sums.txt"), "words": [{"files": str(folder / "words.jsonl")}]},
        "sequence_length": 64,
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "logging_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 4,
        "save_steps": 4,
        "use_cpu": True,
        "report_to": "none",
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(recipe))
    return folder


def results(folder: Path) -> dict[str, float]:
    return json.loads((folder / "all_results.json").read_text())


@pytest.fixture(scope="module")
def controlled(twins) -> Path:
    """A run with its control, ramped, and taught by its parent."""
    extra = ["sparsity_ramp_steps=4", f"distill_from={twins / 'dense'}"]
    train(str(twins / "run.yaml"), [f"output_dir={twins / 'run'}", "control=true", *extra])
    return twins / "run"


def test_the_control_is_the_dense_models_training_to_the_bit(twins, controlled, tokens):
    train(str(twins / "run.yaml"), [f"output_dir={twins / 'alone'}", f"model={twins / 'dense'}"])
    expected, found, dense = results(twins / "alone"), results(controlled), results(controlled / "control")
    for name in (*NAMES, *(f"initial_{name}" for name in NAMES)):
        assert found[f"control_{name}"] == dense[name] == expected[name]
        assert found[f"{name}_gap"] == found[name] - expected[name]
        assert found[f"{name}_gap"] != 0
    model = AutoModelForCausalLM.from_pretrained(controlled / "control")
    assert model.config.sparsity == 0
    assert torch.equal(model(tokens).logits, AutoModelForCausalLM.from_pretrained(twins / "alone")(tokens).logits)
    assert AutoModelForCausalLM.from_pretrained(controlled).config.sparsity == 0.5


def test_the_run_is_what_it_is_without_a_control(twins, controlled):
    extra = ["sparsity_ramp_steps=4", f"distill_from={twins / 'dense'}", "save_strategy=no"]
    train(str(twins / "run.yaml"), [f"output_dir={twins / 'uncontrolled'}", *extra])
    alone, beside = results(twins / "uncontrolled"), results(controlled)
    assert {name: beside[name] for name in NAMES} == {name: alone[name] for name in NAMES}
    assert not [name for name in alone if "control" in name or "gap" in name]


def test_the_control_can_be_the_teacher(twins, controlled, tmp_path):
    """`distill_from=control` learns from the folder where the control is, and asks for one."""
    shutil.copytree(controlled / "control", tmp_path / "run" / "control")
    options = ["save_strategy=no", "sparsity_ramp_steps=0"]
    with pytest.raises(UserError, match=r"^distill_from: control is the run's own dense control, which needs control="):
        train(str(twins / "run.yaml"), [f"output_dir={tmp_path / 'run'}", *options, "distill_from=control"])
    train(str(twins / "run.yaml"), [f"output_dir={tmp_path / 'run'}", *options, "distill_from=control", "control=true"])
    named = [f"output_dir={tmp_path / 'named'}", *options, f"distill_from={controlled / 'control'}"]
    train(str(twins / "run.yaml"), named)
    taught, expected = results(tmp_path / "run"), results(tmp_path / "named")
    assert {name: taught[name] for name in NAMES} == {name: expected[name] for name in NAMES}
    assert taught[NAMES[0]] != results(controlled)[NAMES[0]]
    options += ["distill_from=control", "control=true", "max_steps=0"]
    train(str(twins / "run.yaml"), [f"output_dir={tmp_path / 'looked_at'}", *options])
    assert "initial_eval_sums_loss_gap" in results(tmp_path / "looked_at")


def test_the_log_and_the_page_show_both(controlled):
    history = json.loads((controlled / "trainer_state.json").read_text())["log_history"]
    losses = [entry for entry in history if "loss" in entry]
    assert [entry["step"] for entry in losses] == [2, 4, 6]
    dense = json.loads((controlled / "control" / "trainer_state.json").read_text())["log_history"]
    assert [entry["control_loss"] for entry in losses] == [entry["loss"] for entry in dense if "loss" in entry]
    first = [entry for entry in history if entry["step"] == 0]
    assert [entry[name] - entry[f"initial_{name}"] for entry, name in zip(first, NAMES, strict=True)] == [0, 0]
    page = (controlled / "training_report.html").read_text()
    for name in ("control_loss", *NAMES, *(f"control_{name}" for name in NAMES)):
        assert f"<td>{name}</td>" in page
    assert "held-out loss (nats a token)" in page


def test_a_finished_control_is_not_trained_again(twins, controlled, tmp_path, monkeypatch, caplog):
    shutil.copytree(controlled / "control", tmp_path / "run" / "control")
    trained = []
    real = QSparseTrainer.train
    monkeypatch.setattr(
        QSparseTrainer, "train", lambda self, **kwargs: trained.append(self.args.output_dir) or real(self, **kwargs)
    )
    options = [f"output_dir={tmp_path / 'run'}", "control=true"]
    train(str(twins / "run.yaml"), options)
    assert trained == [str(tmp_path / "run")]
    assert results(tmp_path / "run")["control_eval_sums_loss"] == results(controlled)["control_eval_sums_loss"]
    with pytest.raises(
        UserError, match=r"control is a control with learning_rate 0.001, and no control of a run with 0"
    ):
        train(str(twins / "run.yaml"), [*options, "resume_from_checkpoint=last", "learning_rate=2e-3"])


@pytest.mark.parametrize("stopped", ["control", "run"])
def test_both_go_on_after_a_stop(twins, controlled, tmp_path, monkeypatch, stopped):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3 and (Path(args.output_dir).name == "control") == (stopped == "control"):
                os.kill(os.getpid(), signal.SIGTERM)

    real = QSparseTrainer.__init__

    def with_stop(self, *args, **kwargs):
        real(self, *args, **kwargs)
        self.add_callback(Stop())

    extra = ["sparsity_ramp_steps=4", f"distill_from={twins / 'dense'}", "control=true"]
    options = [str(twins / "run.yaml"), [f"output_dir={tmp_path / 'run'}", *extra]]
    with monkeypatch.context() as patched:
        patched.setattr(QSparseTrainer, "__init__", with_stop)
        with pytest.raises(Interrupted, match=f"{'control' if stopped == 'control' else 'run'}/checkpoint-4 is saved"):
            train(*options)
    train(options[0], [*options[1], "resume_from_checkpoint=last"])
    names = [name for name in results(controlled) if name.endswith(("loss", "gap")) and "train" not in name]
    assert {name: results(tmp_path / "run")[name] for name in names} == {
        name: results(controlled)[name] for name in names
    }


def test_without_updates_both_are_evaluated_and_nothing_else(twins, controlled, tmp_path, capsys):
    options = [f"output_dir={tmp_path / 'run'}", "max_steps=0", "control=true", "train_data=[nowhere.txt]"]
    assert main(["train", str(twins / "run.yaml"), *options]) == 0
    found = results(tmp_path / "run")
    for name in NAMES:
        assert found[f"initial_{name}"] == results(controlled)[f"initial_{name}"]
        assert found[f"initial_{name}_gap"] == results(controlled)[f"initial_{name}_gap"]
    said = capsys.readouterr().out
    assert said.startswith("evaluated before the first update, eval_sums_loss ")
    assert f", eval_words_loss_gap {found['initial_eval_words_loss_gap']:.3f}" in said
    left = {str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*") if file.is_file()}
    assert left == {
        *("run/all_results.json", "run/initial_results.json", "run/control_results.json"),
        *("run/control/all_results.json", "run/control/initial_results.json"),
    }


def test_fine_tuning_adapters_has_a_control_that_begins_from_the_models(twins, controlled, tmp_path):
    pytest.importorskip("trl")
    pairs = [json.dumps({"prompt": f"{i} and {i}?", "completion": f"{i + i}"}) for i in range(40)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(pairs))
    sources = f"[{{files: {tmp_path / 'pairs.jsonl'}, columns: {{prompt: prompt, completion: completion}}}}]"
    options = [f"model={controlled}", f"train_data={sources}", f"eval_data={sources}", "max_steps=2", "control=true"]
    lora = "lora={r: 2, target_modules: all-linear}"
    (tmp_path / "sft.yaml").write_text("stage: sft\n" + (twins / "run.yaml").read_text())
    train(str(tmp_path / "sft.yaml"), [*options, f"output_dir={tmp_path / 'out'}", lora, "eval_on_start=true"])
    found = results(tmp_path / "out")
    assert found["eval_loss_gap"] == found["eval_loss"] - found["control_eval_loss"]
    adapters = json.loads((tmp_path / "out" / "control" / "adapter_config.json").read_text())
    assert adapters["base_model_name_or_path"] == str((controlled / "control").resolve())
    base = AutoModelForCausalLM.from_pretrained(adapters["base_model_name_or_path"])
    assert base.config.sparsity == 0
    assert PeftModel.from_pretrained(base, tmp_path / "out" / "control").peft_config["default"].r == 2


def test_what_has_no_control_is_named(twins, controlled, tmp_path):
    options = [f"output_dir={tmp_path / 'out'}", "control=true"]
    with pytest.raises(UserError, match=r"control: .*dense is dense; a control is of a Q-Sparse model"):
        train(str(twins / "run.yaml"), [*options, f"model={twins / 'dense'}"])
    shutil.copytree(controlled, tmp_path / "trained", ignore=shutil.ignore_patterns("control*", "checkpoint*"))
    with pytest.raises(UserError, match=r"trained was trained without one, .*; train it with control=true first"):
        train(str(twins / "run.yaml"), [*options, f"model={tmp_path / 'trained'}"])
    assert not (tmp_path / "out").exists()


def test_gaps_by_hand():
    run = [
        {"step": 0, "eval_loss": 3.0, "initial_eval_loss": 3.0},
        {"step": 2, "loss": 2.5},
        {"step": 2, "eval_loss": 2.25},
    ]
    control = [{"step": 0, "eval_loss": 2.5, "initial_eval_loss": 2.5}, {"step": 2, "loss": 2.0, "eval_loss": 2.0}]
    assert compare(run, control) == {
        "control_loss": 2.0,
        "control_eval_loss": 2.0,
        "control_initial_eval_loss": 2.5,
        "eval_loss_gap": 0.25,
        "initial_eval_loss_gap": 0.5,
    }
