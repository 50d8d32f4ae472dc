"""Fine-tuning through TRL: chat templates, completion-only loss, packing, adapters."""

import itertools
import json
from pathlib import Path

import pytest
import torch
import yaml
from conftest import REPOSITORY, assert_close, make, sparse_config
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

from qsparse_hf.errors import UserError
from qsparse_hf.training.data import DataArguments
from qsparse_hf.training.run import train
from qsparse_hf.training.sft import QSparseSFTConfig, QSparseSFTTrainer, read_examples

TEMPLATE = str(REPOSITORY / "configs" / "chat" / "instruct.jinja")


@pytest.fixture(scope="module")
def run_config(tmp_path_factory, tiny_checkpoint) -> Path:
    folder = tmp_path_factory.mktemp("sft")
    rows = [{"s": "be brief" if i % 2 else "", "q": f"what is {i} twice?", "a": f"it is {2 * i}."} for i in range(80)]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = {
        "stage": "sft",
        "model": str(tiny_checkpoint),
        "chat_template_path": TEMPLATE,
        "train_data": [
            {"files": str(folder / "train.jsonl"), "columns": {"system": "s", "prompt": "q", "completion": "a"}}
        ],
        "sequence_length": 128,
        "packing": True,
        "max_steps": 4,
        "global_batch_size": 4,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_steps": 2,
        "use_cpu": True,
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def first_batch(trainer) -> dict:
    return next(iter(trainer.get_train_dataloader()))


@pytest.fixture(scope="module")
def tuned(run_config, tmp_path_factory):
    return train(str(run_config), [f"output_dir={tmp_path_factory.mktemp('tuned')}"])


def test_a_run_fine_tunes_logs_and_reloads(tuned, tokens):
    assert isinstance(tuned, QSparseSFTTrainer)
    losses = [entry for entry in tuned.state.log_history if "loss" in entry]
    assert len(losses) == 4
    assert losses[-1]["loss"] < losses[0]["loss"]
    assert losses[0]["sparsity/all"] == pytest.approx(0.5)
    assert losses[-1]["tokens_seen"] > losses[0]["tokens_seen"] > 0
    folder = Path(tuned.args.output_dir)
    assert "### Assistant" in AutoTokenizer.from_pretrained(folder).chat_template
    assert torch.equal(AutoModelForCausalLM.from_pretrained(folder)(tokens).logits, tuned.model.eval()(tokens).logits)
    assert (folder / "training_report.html").exists()


def test_only_completions_are_learnt(tuned, tiny_tokenizer):
    batch = first_batch(tuned)
    learnt = tiny_tokenizer.decode(batch["labels"][batch["labels"] != -100])
    everything = tiny_tokenizer.decode(batch["input_ids"][0])
    assert everything.count("### User") > 1
    assert "### System:\nbe brief\n\n### User:\nwhat is" in everything
    answers = learnt.split("<end>")
    assert all(answer.startswith("it is ") and answer.endswith(".") for answer in answers if answer)
    assert "what" not in learnt


def test_packed_examples_do_not_see_each_other(tuned):
    """The packed batch and every example alone give the same log-probabilities."""
    batch = {name: value for name, value in first_batch(tuned).items() if isinstance(value, torch.Tensor)}
    model = tuned.model.eval()
    row, positions = batch["input_ids"], batch["position_ids"][0]
    packed = model(input_ids=row, position_ids=batch["position_ids"], use_cache=False).logits[0]
    starts = [*(positions == 0).nonzero().flatten().tolist(), len(positions)]
    assert len(starts) > 2
    for start, end in itertools.pairwise(starts):
        assert_close(packed[start:end], model(row[:, start:end], use_cache=False).logits[0])


def test_resuming_is_the_uninterrupted_run(run_config, tuned, tmp_path):
    train(str(run_config), [f"output_dir={tmp_path}"])
    for name in ("checkpoint-4/complete", "model.safetensors"):
        (tmp_path / name).unlink()
    train(str(run_config), [f"output_dir={tmp_path}", "resume_from_checkpoint=last"])
    expected, resumed = (load_file(Path(f) / "model.safetensors") for f in (tuned.args.output_dir, tmp_path))
    assert all(torch.equal(expected[name], resumed[name]) for name in expected)


@pytest.mark.parametrize("stage", ["sft", "continue"])
def test_merged_adapters_give_the_unmerged_logits(run_config, tiny_checkpoint, tmp_path, tokens, stage):
    options = ["lora={r: 4, lora_alpha: 64, target_modules: all-linear}", "learning_rate=1e-2", "save_strategy=no"]
    if stage == "continue":
        values = yaml.safe_load(run_config.read_text())
        for name in ("stage", "chat_template_path", "packing"):
            del values[name]
        values["train_data"] = [{"files": values["train_data"][0]["files"], "columns": "q"}]
        values["sequence_length"] = 32
        run_config = tmp_path / "continue.yaml"
        run_config.write_text(yaml.safe_dump(values))
    trainer = train(str(run_config), [f"output_dir={tmp_path / 'out'}", *options])
    assert trainer.state.log_history[0]["sparsity/all"] == pytest.approx(0.5)
    base = AutoModelForCausalLM.from_pretrained(tiny_checkpoint)
    before = base(tokens).logits
    model = PeftModel.from_pretrained(base, tmp_path / "out")
    unmerged = model(tokens).logits
    assert not torch.allclose(unmerged, before, atol=0.1)
    assert_close(model.merge_and_unload()(tokens).logits, unmerged)


def test_without_a_template_prompts_stay_plain_text(tmp_path, tiny_tokenizer):
    (tmp_path / "a.jsonl").write_text(
        '{"s": "be brief", "q": "why?", "a": "so"}\n{"s": "", "q": "how?", "a": "thus"}\n'
    )
    source = {"files": str(tmp_path / "a.jsonl"), "columns": {"system": "s", "prompt": "q", "completion": "a"}}
    data = DataArguments(train_data=[json.dumps(source)])
    examples = read_examples(data.train_sources, tiny_tokenizer, data, seed=0)
    assert examples[:] == {"completion": ["so", "thus"], "prompt": ["be brief\nwhy?", "how?"]}


def test_conversations_keep_their_turns(run_config, tmp_path):
    turns = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}] * 2
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"chat": turns}) + "\n" for _ in range(20)))
    source = {"files": str(tmp_path / "a.jsonl"), "columns": {"messages": "chat"}}
    options = [f"train_data=[{json.dumps(source)}]", f"output_dir={tmp_path / 'out'}", "repeat_data=true"]
    trainer = train(str(run_config), [*options, "assistant_only_loss=true", "max_steps=1"])
    batch = first_batch(trainer)
    learnt = trainer.processing_class.decode(batch["labels"][batch["labels"] != -100])
    assert set(learnt.split("<end>")) == {"ho", ""}


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["chat_template_path=no/such.jinja"], "chat_template_path: no/such.jinja"),
        (["streaming=true"], "prepares its data on disk"),
        (["distill_from=x"], "distill_from is for language modelling"),
        (["train_data=[{files: F, columns: {messages: q}}]", "on_bad_row=skip"], "0 usable document"),
        (["train_data=[{files: F, columns: {prompt: q, completion: b}}]"], "F:1: has no column 'b'; it has s, q, a"),
        (
            ["train_data=[{files: F, columns: {text: q}}, {files: F, columns: {prompt: q, completion: a}}]"],
            "same columns",
        ),
        (
            ["train_data=[{files: F, columns: {messages: q}}]", "chat_template_path=null"],
            "messages need a chat template",
        ),
        (["sequence_length=129"], r"max_position_embeddings \(128\), got 129"),
        (["sequence_length=8"], "no example has an answer within sequence_length"),
        (["max_length=64"], r"max_length is sequence_length here \(128\), got 64"),
        (["max_steps=100"], "needs 400 sequences and the training data holds"),
    ],
)
def test_mistakes_are_named(run_config, tmp_path, overrides, said):
    file = yaml.safe_load(run_config.read_text())["train_data"][0]["files"]
    overrides = [override.replace("files: F", f"files: {file}") for override in overrides]
    with pytest.raises(UserError, match=said.replace("F:1", f"{file}:1")):
        train(str(run_config), [f"output_dir={tmp_path / 'out'}", *overrides])


def test_the_trainer_wants_its_own_arguments(tmp_path):
    arguments = QSparseSFTConfig(tmp_path, use_cpu=True)
    assert not arguments.bf16
    assert not arguments.gradient_checkpointing
    with pytest.raises(TypeError, match="must be QSparseSFTConfig, got TrainingArguments"):
        QSparseSFTTrainer(make(sparse_config("llama")), TrainingArguments(tmp_path))


def test_without_trl_one_line_says_what_to_install(run_config, monkeypatch, capsys):
    import sys

    from qsparse_hf.cli import main

    monkeypatch.setitem(sys.modules, "trl", None)
    monkeypatch.delitem(sys.modules, "qsparse_hf.training.sft")
    assert main(["train", str(run_config), "output_dir=x"]) == 1
    assert 'stage sft needs TRL, pip install "qsparse-hf[sft]" brings it' in capsys.readouterr().err
