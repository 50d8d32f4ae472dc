"""Training runs as users start them: packed text, the ramp, what is logged, and resuming to the bit."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from accelerate.utils.memory import release_memory
from conftest import REPOSITORY, TINY, assert_close, dense_config, make, run_python, sparse_config
from datasets import Dataset
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import (
    AutoModelForCausalLM,
    HfArgumentParser,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    T5Config,
    TrainerCallback,
    TrainingArguments,
)
from transformers.hyperparameter_search import ALL_HYPERPARAMETER_SEARCH_BACKENDS, HyperParamSearchBackendBase
from transformers.trainer_utils import HPSearchBackend

from qsparse_hf import quickstart
from qsparse_hf.cli import main
from qsparse_hf.errors import UserError
from qsparse_hf.modeling.configuration_qsparse import GROUPS
from qsparse_hf.report import count_parameters
from qsparse_hf.training import QSparseTrainer, QSparseTrainingArguments
from qsparse_hf.training.data import DataArguments, collate_packed
from qsparse_hf.training.distillation import forward_kl
from qsparse_hf.training.faults import checkpoint_facts
from qsparse_hf.training.recipe import parse
from qsparse_hf.training.run import train
from qsparse_hf.training.streaming import PackedStream
from qsparse_hf.training.throughput import count_tokens, peak_flops, training_flops_per_token

STEPS = 8


@pytest.fixture(scope="module")
def run_config(tmp_path_factory, tiny_checkpoint) -> Path:
    """A run of 8 updates, ramped over 6, that saves every 3."""
    folder = tmp_path_factory.mktemp("run")
    for split, count in (("train", 60), ("eval", 4)):
        lines = [json.dumps({"text": f"{i} times {i} makes {i * i}. " * 9}) for i in range(count)]
        (folder / f"{split}.jsonl").write_text("\n".join(lines))
    config = {
        "model": str(tiny_checkpoint),
        "train_data": [str(folder / "train.jsonl")],
        "eval_data": [str(folder / "eval.jsonl")],
        "sequence_length": 64,
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "sparsity_ramp_steps": 6,
        "sparsity_ramp_levels": 3,
        "logging_steps": 1,
        "save_steps": 3,
        "use_cpu": True,
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def test_arguments_are_friendly_to_the_parser():
    (arguments,) = HfArgumentParser(QSparseTrainingArguments).parse_args_into_dataclasses(
        ["--output_dir", "x", "--sparsity_ramp_steps", "5", "--log_sparsity", "false"]
    )
    assert (arguments.sparsity_ramp_steps, arguments.log_sparsity) == (5, False)


def test_a_run_trains_logs_saves_and_reloads(run_config, tmp_path, tokens):
    trainer = train(str(run_config), [f"output_dir={tmp_path}"])
    losses = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == STEPS
    assert losses[-1]["loss"] < losses[0]["loss"]
    # Of 64 features, thirds of 0.5: 53, 43 and 32 are kept.
    measured = [round(64 * (1 - entry["sparsity/qkv"])) for entry in losses]
    assert measured == [53, 53, 43, 43, 32, 32, 32, 32]
    assert losses[-1]["activated_parameters"] == 30720
    assert {f"sparsity/{group}" for group in (*GROUPS, "all")} <= losses[0].keys()
    assert json.loads((tmp_path / "eval_results.json").read_text())["eval_loss"] > 0

    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(reloaded(tokens).logits, trainer.model.eval()(tokens).logits)
    assert reloaded.config.sparsity == 0.5
    assert reloaded.generation_config.use_cache is not False
    assert (tmp_path / "tokenizer.json").exists()


LAUNCHERS = {
    "accelerate": (["-m", "accelerate.commands.launch", "--cpu"], 1),
    "torchrun": (["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"], 2),
}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_from_scratch_under_launchers(run_config, tiny_checkpoint, tmp_path, launcher):
    sparse_config("qwen2", hidden_act="relu2").to_json_file(tmp_path / "model.json", use_diff=False)
    values = yaml.safe_load(run_config.read_text())
    del values["model"]
    values |= {"config": str(tmp_path / "model.json"), "tokenizer": str(tiny_checkpoint), "max_steps": 6}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    launch, processes = LAUNCHERS[launcher]
    fields = ["model_fields={sparsity: 0.25}", "include_num_input_tokens_seen=true"]
    done = subprocess.run(
        [sys.executable, *launch, "scripts/train.py", tmp_path / "run.yaml", f"output_dir={tmp_path / 'out'}", *fields],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert (model.config.model_type, model.config.hidden_act, model.config.sparsity) == ("qsparse_qwen2", "relu2", 0.25)
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    assert state["epoch"] == pytest.approx(6 * 4 * processes / 197, rel=0.05)  # 197 packed rows, 4 a process
    assert state["num_input_tokens_seen"] == 6 * 4 * processes * 64


ROWS = [
    {"input_ids": [5 + i % 90] * 10, "attention_mask": [1] * 7 + [0] * 3, "labels": [5 + i % 90] * 7 + [-100] * 3}
    for i in range(16)
]


def small_run(folder: Path, **options) -> QSparseTrainingArguments:
    """4 updates of 2 rows on a CPU that log every time; `options` win."""
    defaults = {"max_steps": 4, "per_device_train_batch_size": 2, "logging_steps": 1, "use_cpu": True}
    return QSparseTrainingArguments(folder, **defaults | {"save_strategy": "no", "report_to": "none"} | options)


@pytest.mark.parametrize(("counted", "a_row"), [("all", 10), (True, 10), ("non_padding", 7), ("no", 10), (False, 10)])
def test_tokens_are_counted_once_and_on_after_a_resume(tmp_path, counted, a_row):
    def train_until(updates: int, resume: bool | None) -> QSparseTrainer:
        arguments = small_run(
            tmp_path, max_steps=updates, include_num_input_tokens_seen=counted, save_strategy="steps", save_steps=2
        )
        trainer = QSparseTrainer(make(sparse_config("llama")), arguments, train_dataset=Dataset.from_list(ROWS))
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    train_until(2, resume=None)
    trainer = train_until(4, resume=True)
    *logged, last = trainer.state.log_history
    assert trainer.state.num_input_tokens_seen == 4 * 2 * a_row
    assert [entry["tokens_seen"] for entry in logged] == [2 * a_row * update for update in (1, 2, 3, 4)]
    if counted in ("no", False):
        assert "num_input_tokens_seen" not in last
    else:
        assert [entry["num_input_tokens_seen"] for entry in logged] == [entry["tokens_seen"] for entry in logged]


def test_tokens_that_are_no_padding_by_hand():
    ids = torch.tensor([[3, 4, 0, 0], [5, 0, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]])
    assert count_tokens({"input_ids": ids, "attention_mask": mask}) == 8
    assert count_tokens({"input_ids": ids, "attention_mask": mask}, padding=False, pad_token_id=0) == 4
    assert count_tokens({"input_ids": ids}, padding=False, pad_token_id=0) == 3
    assert count_tokens({"input_ids": ids}, padding=False) == 8
    packed = {"input_ids": ids, "position_ids": torch.tensor([[0, 1, 2, 0], [0, 1, 0, 1]])}
    assert count_tokens(packed, padding=False, pad_token_id=0) == 8  # the end token may be the padding's too
    embedded = {"inputs_embeds": torch.zeros(2, 4, 16)}
    assert count_tokens(embedded) == count_tokens(embedded, padding=False, pad_token_id=0) == 8
    assert count_tokens(embedded | {"attention_mask": mask}, padding=False) == 4
    with pytest.raises(UserError, match="must hold input_ids or inputs_embeds, got labels"):
        count_tokens({"labels": ids})


def test_resuming_needs_a_checkpoint(tmp_path):
    trainer = QSparseTrainer(make(sparse_config("llama")), small_run(tmp_path), train_dataset=Dataset.from_list(ROWS))
    with pytest.raises(ValueError, match="No valid checkpoint found in output directory"):
        trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 0
    for nothing in (None, False):
        assert trainer.train(resume_from_checkpoint=nothing).global_step == 4


def test_rows_of_embeddings_train_as_their_tokens_do(tmp_path):
    """Tokens and their embeddings give the same losses, counts and sparsity, where the embeddings are not trained."""

    def history(rows: list[dict], **options) -> list[dict]:
        model = make(sparse_config("llama"))
        model.get_input_embeddings().requires_grad_(False)
        arguments = small_run(tmp_path, include_num_input_tokens_seen="all", **options)
        trainer = QSparseTrainer(model, arguments, train_dataset=Dataset.from_list(rows))
        trainer.train()
        history = [entry for entry in trainer.state.log_history if "loss" in entry]
        clock = ("tokens_per_second", "train_tokens_per_second", "train_runtime")
        return [{name: value for name, value in entry.items() if name not in clock} for entry in history]

    embed = make(sparse_config("llama")).get_input_embeddings()
    with torch.no_grad():
        embedded = [
            {name: row[name] for name in ("attention_mask", "labels")}
            | {"inputs_embeds": embed(torch.tensor(row["input_ids"])).tolist()}
            for row in ROWS
        ]
    tokens, embeddings = history(ROWS), history(embedded)
    assert len(tokens) == 4
    for expected, actual in zip(tokens, embeddings, strict=True):
        assert actual == pytest.approx(expected, rel=1e-5)
        assert actual["sparsity/all"] == 0.5
    assert embeddings[-1]["num_input_tokens_seen"] == embeddings[-1]["tokens_seen"] == 80

    make(dense_config("llama"), seed=1).save_pretrained(tmp_path / "parent")
    taught = history(embedded, distill_from=str(tmp_path / "parent"))
    assert all(entry["distill_kl"] > 0 for entry in taught)


class _Trial:
    """What the Trainer asks of a trial of Optuna's."""

    def __init__(self, number: int, params: dict) -> None:
        self.number, self.params = number, params


class _Grid(HyperParamSearchBackendBase):
    """A backend of Transformers' hyperparameter search that goes through a list, as Optuna's does through its draws."""

    name = "grid"

    @staticmethod
    def is_available() -> bool:
        return True

    def run(self, trainer: QSparseTrainer, n_trials: int, direction: str, trials: list[dict]) -> list[float]:
        objectives = []
        for number, params in enumerate(trials[:n_trials]):
            trainer.train(resume_from_checkpoint=None, trial=_Trial(number, params))
            objectives.append(trainer.compute_objective(trainer.evaluate()))
            trainer.model_wrapped, trainer.model = release_memory(trainer.model_wrapped, trainer.model)
            trainer.accelerator.clear()
        return objectives


def fresh(trial: _Trial | None) -> PreTrainedModel:
    layers = trial.params["layers"] if trial else 1
    return make(sparse_config("llama", num_hidden_layers=layers, sparsity=0.5))


@pytest.fixture
def grid(monkeypatch) -> str:
    monkeypatch.setitem(ALL_HYPERPARAMETER_SEARCH_BACKENDS, HPSearchBackend.OPTUNA, _Grid)
    monkeypatch.setattr("transformers.integrations.hp_params", lambda trial: trial.params)  # knows Optuna's own
    return "optuna"


def test_a_model_may_be_made_anew_for_every_training(tmp_path):
    trainer = QSparseTrainer(
        model_init=fresh, args=small_run(tmp_path), train_dataset=Dataset.from_list(ROWS), eval_dataset=None
    )
    losses = []
    for _ in range(2):
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert len(losses[0]) == 4
    assert losses[0] == losses[1]
    assert trainer.state.num_input_tokens_seen == 80


def test_what_is_measured_follows_a_model_made_anew(tmp_path, monkeypatch):
    monkeypatch.setattr("qsparse_hf.training.trainer.peak_flops", lambda device: 1e12)
    depths = iter([1, 1, 2])  # for the trainer itself, then for every training
    trainer = QSparseTrainer(
        model_init=lambda: fresh(_Trial(0, {"layers": next(depths)})),
        args=small_run(tmp_path),
        train_dataset=Dataset.from_list(ROWS),
    )
    for _ in range(2):
        trainer.train()
        flops = training_flops_per_token(trainer.model, 10)
        for entry in trainer.state.log_history[:-1]:
            assert entry["mfu"] == pytest.approx(entry["tokens_per_second"] * flops / 1e12)
            assert entry["activated_parameters"] == count_parameters(trainer.model)[1]


def test_what_is_measured_follows_the_model_of_each_trial(tmp_path, grid, monkeypatch):
    """Three trials: other depths, ramps and batches; every one logs, saves and runs as it would alone."""
    monkeypatch.setattr("qsparse_hf.training.trainer.peak_flops", lambda device: 1e12)
    make(dense_config("llama"), seed=1).save_pretrained(tmp_path / "parent")
    common = {
        "global_batch_size": 4,
        "distill_from": str(tmp_path / "parent"),
        "save_strategy": "steps",
        "save_steps": 4,
        "train_sampling_strategy": "sequential",
    }
    trials = [
        {"layers": 1, "sparsity_ramp_steps": 0, "per_device_train_batch_size": 2},
        {"layers": 2, "sparsity_ramp_steps": 4, "per_device_train_batch_size": 4},
        {"layers": 1, "sparsity_ramp_steps": 2, "per_device_train_batch_size": 1},
    ]
    histories = []

    class Recorder(TrainerCallback):
        def on_train_end(self, args, state, control, **kwargs):
            histories.append([entry for entry in state.log_history if "loss" in entry])

    rows = Dataset.from_list(ROWS)
    trainer = QSparseTrainer(
        model_init=fresh,
        args=small_run(tmp_path / "search", **common),
        train_dataset=rows,
        eval_dataset=rows,
        callbacks=[Recorder()],
    )
    objectives = trainer.hyperparameter_search(
        hp_space=lambda trial: {name: value for name, value in trial.params.items() if name != "layers"},
        backend=grid,
        n_trials=3,
        trials=trials,
    )
    for number, (params, history, objective) in enumerate(zip(trials, histories, objectives, strict=True)):
        fields = {name: value for name, value in params.items() if name != "layers"}
        model = fresh(_Trial(0, params))
        flops = training_flops_per_token(model, 10)
        alone = QSparseTrainer(
            model, small_run(tmp_path / f"alone-{number}", **common | fields), train_dataset=rows, eval_dataset=rows
        )
        alone.train()
        expected = [entry for entry in alone.state.log_history if "loss" in entry]
        for entry, other in zip(history, expected, strict=True):
            assert entry["mfu"] == pytest.approx(entry["tokens_per_second"] * flops / 1e12)
            for clock in ("mfu", "tokens_per_second"):
                del entry[clock], other[clock]
            assert entry == pytest.approx(other, rel=1e-5)
        assert objective == pytest.approx(alone.evaluate()["eval_loss"], rel=1e-5)
        facts = [
            checkpoint_facts(folder / "checkpoint-4")
            for folder in (tmp_path / "search" / f"run-{number}", tmp_path / f"alone-{number}")
        ]
        assert facts[0] == facts[1]
    assert [round(64 * (1 - entry["sparsity/qkv"])) for entry in histories[1]] == [56, 48, 40, 32]


def test_a_trial_that_cannot_run_is_one_line(tmp_path, grid):
    def search(params: dict, **options) -> None:
        trainer = QSparseTrainer(
            model_init=fresh, args=small_run(tmp_path, **options), train_dataset=Dataset.from_list(ROWS)
        )
        trainer.hyperparameter_search(
            hp_space=lambda trial: trial.params, backend=grid, n_trials=1, trials=[{"layers": 1} | params]
        )

    with pytest.raises(UserError, match=r"sparsity_ramp_steps must be at most max_steps \(4\), got 9"):
        search({"sparsity_ramp_steps": 9})
    with pytest.raises(UserError, match=r"global_batch_size must be a multiple of .*got 4"):
        search({"per_device_train_batch_size": 3}, global_batch_size=4)
    with pytest.raises(UserError, match=r"not finite at update 2.*/run-0/not-finite.*the last .*/run-0/checkpoint-1"):
        search({"learning_rate": 1e30}, save_strategy="steps", save_steps=1, max_grad_norm=0)


def test_a_stream_begins_again_with_every_training(run_config, tiny_tokenizer, tmp_path):
    data = DataArguments(train_data=yaml.safe_load(run_config.read_text())["train_data"], sequence_length=64)
    stream = PackedStream(data.train_sources, tiny_tokenizer, data, seed=0)
    trainer = QSparseTrainer(
        model_init=fresh, args=small_run(tmp_path), train_dataset=stream, data_collator=collate_packed
    )
    losses = []
    for _ in range(2):
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == losses[1]
    assert stream.trained == 8


def test_the_trainer_takes_a_dense_model_and_any_dataset(tmp_path):
    rows = Dataset.from_list(
        [{"input_ids": list(range(i, i + 16)), "labels": list(range(i, i + 16))} for i in range(64)]
    )
    arguments = QSparseTrainingArguments(tmp_path, max_steps=2, logging_steps=1, use_cpu=True, save_strategy="no")
    trainer = QSparseTrainer(make(dense_config("llama")), arguments, train_dataset=rows)
    trainer.train()
    assert trainer.state.log_history[0]["sparsity/all"] == 0
    with pytest.raises(UserError, match="needs a Q-Sparse model, got LlamaForCausalLM"):
        QSparseTrainer(
            make(dense_config("llama")), QSparseTrainingArguments(tmp_path, sparsity_ramp_steps=1, use_cpu=True)
        )


def test_evaluation_in_the_ramp_is_at_the_configured_sparsity(run_config, tmp_path):
    """With a learning rate of almost nothing, every evaluation is of the same model."""
    options = ("eval_on_start=true", "eval_strategy=steps", "eval_steps=2", "learning_rate=1e-12", "save_strategy=no")
    trainer = train(str(run_config), [f"output_dir={tmp_path}", *options])
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(losses) > 4
    assert losses == pytest.approx([losses[0]] * len(losses), rel=1e-6)


def test_adapters_that_add_positions_and_padding_are_logged(tmp_path):
    rows = [{"input_ids": [5] * 16, "attention_mask": [1] * 16, "labels": [5] * 16}] * 8
    arguments = QSparseTrainingArguments(tmp_path, max_steps=2, logging_steps=1, use_cpu=True, save_strategy="no")
    prompted = get_peft_model(make(sparse_config("llama")), PromptTuningConfig("CAUSAL_LM", num_virtual_tokens=4))
    trainer = QSparseTrainer(prompted, arguments, train_dataset=Dataset.from_list(rows))
    trainer.train()
    assert trainer.state.log_history[0]["sparsity/all"] == 0.5

    padded = [row | {"attention_mask": [0] * 16} for row in rows]
    trainer = QSparseTrainer(make(sparse_config("llama")), arguments, train_dataset=Dataset.from_list(padded))
    trainer.train()
    assert "sparsity/all" not in trainer.state.log_history[0]
    with pytest.raises(TypeError, match="must be QSparseTrainingArguments, got TrainingArguments"):
        QSparseTrainer(prompted, TrainingArguments(tmp_path, use_cpu=True))


def test_the_trainer_loads_optional_packages_only_when_they_are_used():
    code = "import sys; import qsparse_hf.training.trainer; print(*sys.modules)"
    loaded = set(run_python(code).stdout.split())
    assert "transformers" in loaded
    assert not loaded & {"trl", "matplotlib", "tensorboard", "torch.utils.tensorboard"}


def test_quickstart_in_small(tmp_path, monkeypatch, capfd, small_quickstart):
    """The whole path with a handful of updates; its real lengths are `make quickstart`'s."""
    monkeypatch.setitem(quickstart._CONTINUE, "max_steps", 4)
    monkeypatch.setitem(quickstart._CONTINUE, "eval_steps", 2)
    monkeypatch.setitem(quickstart._RUN, "logging_steps", 1)
    quickstart.quickstart(str(tmp_path / "out"))
    said = capfd.readouterr().out
    assert "identical logits" in said
    assert said.count("4 updates later") == 3
    for name in ("loss.png", "sparsity.png", "model.safetensors"):
        assert (tmp_path / "out" / "sparse" / name).exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    for taken in (tmp_path / "mine", tmp_path / "mine" / "thesis.txt"):
        with pytest.raises(UserError, match="is not a quickstart's"):
            quickstart.quickstart(str(taken))
    assert (tmp_path / "mine" / "thesis.txt").exists()


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["train_data=[nothing/*.txt]"], "no file matches 'nothing"),
        (["sequence_length=129"], r"max_position_embeddings \(128\), got 129"),
        (["sequence_length=1"], "sequence_length must be at least 2, got 1"),
        (["sparsity_ramp_steps=9"], r"sparsity_ramp_steps must be at most max_steps \(8\), got 9"),
        (["sparsity_ramp_steps=-1"], "at least 0, got -1"),
        (["learning_rate=fast"], "learning_rate.*'fast'"),
        (["lerning_rate=1"], "unknown key 'lerning_rate'; did you mean 'learning_rate'"),
        (["max_grad_norm=null"], "max_grad_norm cannot be empty; leave it out for its default, 1.0"),
        (["resume_from_checkpoint=nowhere"], "resume_from_checkpoint must be .*'nowhere'"),
        (["model_fields={sparsty: 0.5}"], "has no field 'sparsty', .*did you mean sparsity"),
        (["model_fields={bogus: 0.5}"], "qsparse_llama has no field 'bogus'"),
        (["model_fields=3"], "model_fields must be"),
        (["model=no/such/model"], "no/such/model"),
        (["model=null"], "give either model"),
        (["config=x.json"], "give either model"),
        (["train_data=[]"], "train_data must name what to train on"),
        (["train_data=[{file: a}]"], "no field 'file'"),
        (["per_device_train_batch_size=0"], "per_device_train_batch_size must be at least 1, got 0"),
        (["global_batch_size=6"], r"multiple of per_device_train_batch_size \* processes \(4 \* 1\), got 6"),
        (["max_steps=50"], "needs 200 sequences and the training data holds 192: .*repeat_data=true"),
        (["streaming=true", "max_steps=-1"], "a stream has no known length"),
        (["streaming=true", "dataloader_num_workers=1"], "needs dataloader_num_workers 0, got 1"),
        (["on_bad_row=ignore"], "on_bad_row must be error or skip, got 'ignore'"),
        (["stage=distill"], "stage must be one of pretrain, continue, sft, got 'distill'"),
        (["stage=pretrain"], "stage pretrain needs config"),
        (["lora={rank: 4}"], "lora: .*rank"),
        (["distill_from=no/such/model"], "distill_from: no/such/model: is no file or folder here"),
        (["tokenizer=nowhere/tok"], "nowhere/tok: is no file or folder here, and the Hub did not give it: "),
        (["distill_weight=2"], "distill_weight must be above 0 and at most 1, got 2"),
        (["model_fields={sparsity: 2}"], "sparsity must be .*got 2"),
        (["max_steps=0", "eval_data=[]"], "max_steps=0 evaluates alone and needs eval_data"),
        (["save_steps=0"], "save_steps must be at least"),
        (["max_grad_norm=-1"], "max_grad_norm must be at least 0, got -1"),
        (["seed=-1"], "seed must be at least 0, got -1"),
        (["global_batch_size=8", "gradient_accumulation_steps=3"], "makes gradient_accumulation_steps 2, got 3"),
        (["learning_rate=-1"], "optimizer or schedule: .*learning rate"),
        (["adam_beta1=2"], "optimizer or schedule: .*beta"),
        (["lr_scheduler_kwargs={foo: 1}"], "optimizer or schedule: .*foo"),
        (["lr_scheduler_type=cosine_with_min_lr"], "optimizer or schedule"),
        (["optim=adamw_bnb_8bit"], "optimizer or schedule: .*bitsandbytes"),
        (["train_data=[{files: 2024-01-01}]"], "no file matches '2024-01-01'"),
        (["train_data=[{files: 3}]"], "files of a data source must be a path or several, got 3"),
        (["{[a]: 1}=2"], "unknown key '{.a.: 1}'"),
        (["nonsense"], "key=value, got 'nonsense'"),
    ],
)
def test_mistakes_are_named_before_anything_is_written(run_config, tmp_path, overrides, said):
    with pytest.raises(UserError, match=said):
        train(str(run_config), [f"output_dir={tmp_path / 'out'}", *overrides])
    assert not (tmp_path / "out").exists()


def test_a_backend_that_cannot_run_is_named_before_anything_is_written(run_config, tmp_path, monkeypatch):
    monkeypatch.setattr("qsparse_hf.modeling.backend._ASKED", "bogus")  # what QSPARSE_BACKEND said at import
    with pytest.raises(UserError, match=r"QSPARSE_BACKEND must be .*'reference', got 'bogus'"):
        train(str(run_config), [f"output_dir={tmp_path / 'out'}"])
    assert not (tmp_path / "out").exists()


def test_yaml_values_arrive_as_their_field_wants_them(run_config, tmp_path):
    overrides = [
        "save_strategy=no",
        "learning_rate=1e-4",
        "bf16=true",
        "train_data=[a, b]",
        "model_fields={sparsity: 0.5}",
    ]
    model, data, training = parse(str(run_config), [*overrides, f"output_dir={tmp_path}"])
    assert training.save_strategy == "no"
    assert training.learning_rate == 1e-4
    assert training.bf16 is True
    assert data.train_data == ["a", "b"]
    assert model.model_fields == {"sparsity": 0.5}


@pytest.mark.parametrize("content", ["", "- a\n- b", "a: [", "{", "a: \xff"])
def test_bad_yaml_is_one_line(tmp_path, capsys, content):
    (tmp_path / "run.yaml").write_bytes(content.encode("latin-1"))
    assert main(["train", str(tmp_path / "run.yaml")]) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"qsparse: error: {tmp_path / 'run.yaml'}")
    assert len(said.splitlines()) == 1


def test_growth_is_said_and_files_may_be_smaller(run_config, tiny_checkpoint, tmp_path, caplog):
    """A checkpoint in bf16, trained in fp32: weights of 2 bytes become 4, and 12 with the optimizer's state."""
    small = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.bfloat16)
    weights = sum(weight.numel() for weight in small.parameters())
    small.save_pretrained(tmp_path / "small")
    options = [f"model={tmp_path / 'small'}", f"tokenizer={tiny_checkpoint}", "max_steps=6", "save_steps=6"]
    grown = f"holds bfloat16 weights, {2e-9 * weights:.2f} GB; the trained model will take"
    train(str(run_config), [f"output_dir={tmp_path / 'as-is'}", *options])
    assert grown in caplog.text
    caplog.clear()
    train(str(run_config), [f"output_dir={tmp_path / 'cast'}", *options, "save_dtype=bfloat16"])
    assert grown not in caplog.text
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "cast", dtype="auto").dtype == torch.bfloat16
    expected, cast = (load_file(tmp_path / run / "model.safetensors") for run in ("as-is", "cast"))
    assert expected.keys() == cast.keys()
    assert all(torch.equal(cast[name], expected[name].bfloat16()) for name in cast)
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "cast" / "checkpoint-6", dtype="auto")
    assert whole.dtype == torch.float32

    train(str(run_config), [f"output_dir={tmp_path / 'lora'}", *options, "save_dtype=bfloat16", "lora={r: 2}"])
    adapters = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    assert {weight.dtype for weight in adapters.values()} == {torch.bfloat16}


def test_speed_leaves_out_evaluations_of_several_texts(run_config, tmp_path):
    held_out = yaml.safe_load(run_config.read_text())["eval_data"]
    texts = json.dumps({"first": held_out, "second": held_out})
    options = [f"eval_data={texts}", "eval_strategy=steps", "eval_steps=1", "save_strategy=no"]
    history = train(str(run_config), [f"output_dir={tmp_path}", *options]).state.log_history
    assert all(entry["tokens_per_second"] > 0 for entry in history if "loss" in entry)
    initial = {name: value for entry in history for name, value in entry.items() if name.startswith("initial")}
    assert initial == {f"initial_eval_{name}_loss": history[0]["eval_first_loss"] for name in ("first", "second")}


def test_a_resumed_run_has_one_initial_loss(run_config, tmp_path):
    for updates, resume in ((6, "null"), (8, "last")):
        options = [f"output_dir={tmp_path}", f"max_steps={updates}", f"resume_from_checkpoint={resume}"]
        history = train(str(run_config), options).state.log_history
    assert ["initial_eval_loss" in entry for entry in history].count(True) == 1
    assert json.loads((tmp_path / "all_results.json").read_text())["initial_eval_loss"] == history[0]["eval_loss"]


def test_a_trainer_without_updates_says_so(tmp_path):
    trainer = QSparseTrainer(make(sparse_config("llama")), small_run(tmp_path, max_steps=0), train_dataset=ROWS)
    with pytest.raises(UserError, match=r"max_steps=0 trains nothing: call evaluate\(\) instead"):
        trainer.train()


def test_a_run_leaves_tensorboard_and_a_page_with_its_curves(run_config, tmp_path):
    train(str(run_config), [f"output_dir={tmp_path}", "eval_strategy=steps", "eval_steps=4"])
    (folder,) = tmp_path.glob("runs/*")
    board = EventAccumulator(str(folder)).Reload()
    assert {"train/loss", "train/tokens_per_second", "train/sparsity/qkv"} <= set(board.Tags()["scalars"])
    assert [scalar.value for scalar in board.Scalars("train/tokens_seen")] == [4 * 64 * step for step in range(1, 9)]
    page = (tmp_path / "training_report.html").read_text()
    for shown in ("8 of 8 updates", "<svg", "loss (nats a token)", "sparsity", "tokens a second", "30,720"):
        assert shown in page
    assert "mfu" not in page  # a CPU's peak is not known


def test_logs_go_where_report_to_says(run_config, tmp_path):
    train(str(run_config), [f"output_dir={tmp_path}", "report_to=none", "max_steps=6"])
    assert not list(tmp_path.glob("runs/*"))


def test_the_progress_bar_shows_speed_and_time_left(run_config, tmp_path, capsys):
    train(str(run_config), [f"output_dir={tmp_path}"])
    bar = next(line for line in capsys.readouterr().err.split("\r") if "tokens/s" in line)
    assert re.search(r"\d/8 \[\d\d:\d\d<\d\d:\d\d, .*loss=\d\.\d{3}, sparsity/all=0\.\d{3}, tokens/s=[\d,]+\]", bar)


def test_flops_by_hand():
    model = make(sparse_config("llama"))
    # Two layers of q, o [64, 64], k, v [32, 64], gate, up, down [96, 64], and the head [128, 64]; not the embedding.
    weights = 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 96 * 64) + 128 * 64
    assert training_flops_per_token(model, 0) == 6 * weights
    assert training_flops_per_token(model, 10) == 6 * weights + 12 * 2 * 64 * 10
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    assert training_flops_per_token(adapted, 0) == 4 * weights + 6 * 2 * 2 * (64 + 64)
    tied = make(sparse_config("llama", tie_word_embeddings=True))
    assert training_flops_per_token(tied, 0) == 6 * weights
    experts = MixtralForCausalLM(MixtralConfig(**TINY, num_local_experts=4, num_experts_per_tok=2))
    dense = 2 * (2 * 64 * 64 + 2 * 32 * 64 + 4 * 64) + 128 * 64  # with the router
    assert training_flops_per_token(experts, 0) == 6 * (dense + 2 * 2 * 3 * 96 * 64)


def test_utilisation_on_a_known_device(run_config, tmp_path, monkeypatch):
    monkeypatch.setattr("qsparse_hf.training.trainer.peak_flops", lambda device: 1e12)
    trainer = train(str(run_config), [f"output_dir={tmp_path}"])
    flops = training_flops_per_token(trainer.model, 64)
    for entry in trainer.state.log_history[:-1]:
        if "loss" in entry:
            assert entry["mfu"] == pytest.approx(entry["tokens_per_second"] * flops / 1e12)
    assert peak_flops(torch.device("cpu")) is None
    names = {"NVIDIA A100-SXM4-80GB": 312e12, "NVIDIA H200": 989.4e12, "NVIDIA H200 NVL": 835.5e12, "NVIDIA L4": 121e12}
    names |= dict.fromkeys(
        ("NVIDIA RTX A4000", "NVIDIA RTX A1000", "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA GB200")
    )
    for name, peak in names.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert peak_flops(torch.device("cuda", 0)) == peak, name


@pytest.mark.parametrize("backend", [None, "aot_eager"])
def test_forward_kl_by_hand(backend):
    p, q = torch.tensor([0.5, 0.25, 0.25]), torch.tensor([0.25, 0.25, 0.5])
    expected = 0.5 * math.log(2) + 0 + 0.25 * math.log(0.5)
    student, teacher = (x.log().expand(1, 4, 3).clone().requires_grad_() for x in (q, p))
    labels = torch.tensor([[0, 1, -100, 2]])  # the first is never predicted
    kl = forward_kl(student, teacher.detach(), labels, backend)
    assert kl.item() == pytest.approx(2 * expected)
    kl.backward()
    assert_close(student.grad[0, 0], q - p)  # of the softmax
    assert student.grad[0, 1].abs().sum() == 0 == student.grad[0, 3].abs().sum()
    long = torch.randn(1, 3000, 7, requires_grad=True)
    theirs = torch.randn(1, 3000, 7)
    whole = F.kl_div(long[:, :-1].log_softmax(-1), theirs[:, :-1].softmax(-1), reduction="sum")
    ours = forward_kl(long, theirs, torch.zeros(1, 3000, dtype=torch.long), backend)
    assert ours.item() == pytest.approx(whole.item(), rel=1e-5)
    assert_close(*(torch.autograd.grad(loss, long)[0] for loss in (ours, whole)))


def test_distillation_learns_the_parent(run_config, tmp_path, tiny_checkpoint):
    """From other weights, on divergence alone: the student comes nearer; the sum of both losses is as said."""
    make(dense_config("llama"), seed=1).save_pretrained(tmp_path / "parent")
    options = [
        f"distill_from={tmp_path / 'parent'}",
        "sparsity_ramp_steps=0",
        "save_strategy=no",
        "eval_on_start=false",
    ]

    def history(*more: str) -> list[dict]:
        trainer = train(str(run_config), [f"output_dir={tmp_path / 'out'}", *options, *more])
        return [entry for entry in trainer.state.log_history if "loss" in entry]

    alone = history("distill_weight=1", "max_steps=30", "learning_rate=1e-2")
    assert alone[-1]["distill_kl"] < 0.8 * alone[0]["distill_kl"]
    assert all(entry["loss"] == pytest.approx(entry["distill_kl"], rel=1e-5) for entry in alone)
    plain = train(str(run_config), [f"output_dir={tmp_path / 'plain'}", *options[1:]]).state.log_history[0]["loss"]
    for accumulation in ("per_device_train_batch_size=4", "per_device_train_batch_size=2"):
        mixed = history("distill_weight=0.25", "global_batch_size=4", accumulation)[0]
        assert mixed["loss"] == pytest.approx(0.75 * plain + 0.25 * mixed["distill_kl"], rel=1e-5)
        assert mixed["cross_entropy"] == pytest.approx(plain, rel=1e-5)
        assert mixed["distill_kl"] == pytest.approx(alone[0]["distill_kl"], rel=1e-5)


def _no_parent(folder: Path) -> str:
    return "is no file or folder here, and no repository of the Hub can have that name"


def _empty_folder(folder: Path) -> str:
    folder.mkdir()
    return "config.json"


def _other_vocabulary(folder: Path) -> str:
    make(dense_config("llama", vocab_size=99)).save_pretrained(folder)
    return "has a vocabulary of 99, the model one of 128"


def _lacking_a_layer(folder: Path) -> str:
    make(dense_config("llama")).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    return "lacks 9 tensor(s), model.layers.2."


def _other_shape(folder: Path) -> str:
    make(dense_config("llama")).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 80}))
    return "holds model.layers.0.mlp.down_proj.weight as [64, 96], where its config.json says [64, 80]"


def _encoder(folder: Path) -> str:
    T5Config().save_pretrained(folder)
    return "Unrecognized configuration class"


def _cut_weights(folder: Path) -> str:
    make(dense_config("llama")).save_pretrained(folder)
    os.truncate(folder / "model.safetensors", 1000)
    return ""


def _broken_config(folder: Path) -> str:
    folder.mkdir()
    (folder / "config.json").write_text("{")
    return "not a valid JSON file"


@pytest.mark.parametrize(
    "prepare",
    [
        _no_parent,
        _empty_folder,
        _other_vocabulary,
        _lacking_a_layer,
        _other_shape,
        _encoder,
        _cut_weights,
        _broken_config,
    ],
)
def test_a_parent_that_cannot_teach_is_one_line(run_config, tmp_path, capsys, prepare):
    parent = tmp_path / "parent"
    said = prepare(parent)
    assert main(["train", str(run_config), f"output_dir={tmp_path / 'out'}", f"distill_from={parent}"]) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"qsparse: error: run.yaml: distill_from: {parent}") or line.startswith(
        f"qsparse: error: distill_from: {parent}"
    )
    assert said in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["report_to=nonsense"], "nonsense"),
        (["eval_strategy=steps", "eval_data=[]"], "eval"),
        (["output_dir=/proc/nope/x"], "/proc/nope"),
        (["fsdp=full_shard"], "fsdp"),
    ],
)
def test_what_the_trainer_refuses_is_one_line(run_config, tmp_path, capsys, overrides, said):
    assert main(["train", str(run_config), f"output_dir={tmp_path / 'out'}", *overrides]) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("qsparse: error: ")
    assert said in line.lower()


def test_every_family_trains(family, tmp_path):
    rows = Dataset.from_list([{"input_ids": [(i + j) % 7 + 3 for j in range(32)]} for i in range(16)])
    rows = rows.map(lambda row: {"labels": row["input_ids"]})
    arguments = QSparseTrainingArguments(
        tmp_path, max_steps=8, logging_steps=1, learning_rate=1e-2, save_strategy="no", report_to="none", use_cpu=True
    )
    trainer = QSparseTrainer(make(sparse_config(family)), arguments, train_dataset=rows)
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert log[-1]["loss"] < 0.8 * log[0]["loss"]
    assert all(log[-1][f"sparsity/{group}"] == pytest.approx(0.5, abs=0.01) for group in GROUPS)
