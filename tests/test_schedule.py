"""What changes over the updates: both ramps by hand, and the two stages of BitNet b1.58."""

import json
import math

import pytest
import torch
import yaml
from conftest import dense_config, make, sparse_config
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from qsparse_hf.errors import UserError
from qsparse_hf.training import QSparseTrainer, QSparseTrainingArguments
from qsparse_hf.training.run import train
from qsparse_hf.training.schedule import ramp_factor

ONE_BIT = {"weight_quantization": "ternary", "activation_quantization": "int8"}
ROWS = [{"input_ids": [(7 * i + j) % 120 + 3 for j in range(16)]} for i in range(32)]
ROWS = [row | {"labels": row["input_ids"]} for row in ROWS]


@pytest.fixture(scope="module")
def run_config(tmp_path_factory, tiny_checkpoint):
    """A run of 8 updates with ternary weights, ramped over 6."""
    folder = tmp_path_factory.mktemp("run")
    for split, count in (("train", 60), ("eval", 4)):
        (folder / f"{split}.txt").write_text("".join(f"{i} times {i} makes {i * i}. " * 9 for i in range(count)))
    config = {
        "model": str(tiny_checkpoint),
        "model_fields": ONE_BIT,
        "train_data": [str(folder / "train.txt")],
        "eval_data": [str(folder / "eval.txt")],
        "sequence_length": 64,
        "max_steps": 8,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "quantization_ramp_steps": 6,
        "quantization_ramp_levels": 3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def small_run(folder, **options) -> QSparseTrainingArguments:
    """8 updates of 2 rows on a CPU that log every time; `options` win."""
    defaults = {"max_steps": 8, "per_device_train_batch_size": 2, "logging_steps": 1, "use_cpu": True}
    return QSparseTrainingArguments(folder, **defaults | {"save_strategy": "no", "report_to": "none"} | options)


def trained(model, arguments: QSparseTrainingArguments, **options) -> QSparseTrainer:
    trainer = QSparseTrainer(model, arguments, train_dataset=Dataset.from_list(ROWS), **options)
    trainer.train()
    return trainer


def logged(trainer: QSparseTrainer, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize(
    ("ramp_steps", "levels", "expected"),
    [(0, 10, [1, 1, 1]), (4, 10, [0.25, 0.5, 0.75, 1, 1]), (6, 3, [1 / 3, 1 / 3, 2 / 3, 2 / 3, 1, 1, 1])],
)
def test_ramp_by_hand(ramp_steps, levels, expected):
    assert [ramp_factor(update, ramp_steps, levels) for update in range(len(expected))] == pytest.approx(expected)


def test_a_ramp_is_logged_and_what_is_saved_is_as_configured(run_config, tmp_path, tokens):
    trainer = train(str(run_config), [f"output_dir={tmp_path}", "sparsity_ramp_steps=2"])
    assert logged(trainer, "quantization_strength") == pytest.approx([1 / 3, 1 / 3, 2 / 3, 2 / 3, 1, 1, 1, 1])
    assert [round(64 * (1 - sparsity)) for sparsity in logged(trainer, "sparsity/qkv")] == [48] + 7 * [32]
    assert logged(trainer, "loss")[-1] < logged(trainer, "loss")[0]
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert reloaded.config.weight_quantization == "ternary"
    assert torch.equal(reloaded(tokens).logits, trainer.model.eval()(tokens).logits)
    page = (tmp_path / "training_report.html").read_text()
    assert "<td>quantization_strength</td><td>33%</td><td>100%</td>" in page
    assert "sparsity_ramp_steps: 2" in (card := (tmp_path / "README.md").read_text())
    assert "quantization_ramp_steps: 6" in card


def test_evaluation_in_the_ramp_is_at_full_strength(run_config, tmp_path):
    """With a learning rate of almost nothing, every evaluation is of the same model."""
    options = ("eval_on_start=true", "eval_strategy=steps", "eval_steps=2", "learning_rate=1e-12")
    trainer = train(str(run_config), [f"output_dir={tmp_path}", *options])
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(losses) > 4
    assert losses == pytest.approx([losses[0]] * len(losses), rel=1e-6)
    assert len({round(loss, 4) for loss in logged(trainer, "loss")[:6]}) > 3  # the ramp goes on after each


@pytest.mark.parametrize("fields", [{"weight_quantization": "ternary"}, ONE_BIT], ids=["ternary", "both"])
def test_a_ramp_goes_with_gradient_checkpointing(tmp_path, fields):
    losses = []
    for again in (False, True):
        options = {"gradient_checkpointing": again, "quantization_ramp_steps": 4, "quantization_ramp_levels": 2}
        trainer = trained(make(sparse_config("llama", **fields)), small_run(tmp_path, learning_rate=1e-3, **options))
        assert logged(trainer, "quantization_strength") == [0.5] * 2 + [1] * 6
        losses.append(logged(trainer, "loss"))
    assert losses[0] == losses[1]


def test_adapters_learn_beside_ternary_weights_that_stay(tmp_path):
    model = make(sparse_config("llama", **ONE_BIT))
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    before = {name: weight.clone() for name, weight in adapted.named_parameters()}
    trainer = trained(adapted, small_run(tmp_path, quantization_ramp_steps=4, quantization_ramp_levels=2))
    assert logged(trainer, "quantization_strength") == [0.5] * 2 + [1] * 6
    for name, weight in adapted.named_parameters():
        assert torch.equal(weight, before[name]) != ("lora" in name)


@torch._dynamo.config.patch(recompile_limit=1)
def test_every_level_is_compiled_once(tmp_path):
    """Sparsity and strength climb at other updates; the last level is the configured model's."""
    losses = []
    for compiled in (False, True):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        options = {"torch_compile": True, "torch_compile_backend": "aot_eager"} if compiled else {}
        options |= {"sparsity_ramp_steps": 4, "sparsity_ramp_levels": 2, "quantization_ramp_steps": 6}
        model = make(sparse_config("llama", num_hidden_layers=1, **ONE_BIT))
        trainer = trained(model, small_run(tmp_path, quantization_ramp_levels=2, log_sparsity=False, **options))
        assert logged(trainer, "quantization_strength") == [0.5] * 3 + [1] * 5
        losses.append(logged(trainer, "loss"))
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 3  # updates 0-1, 2 and from 3 on
    assert torch._dynamo.config.recompile_limit == 2 + 2 + 8


def test_the_control_of_a_ternary_run_is_dense(run_config, tmp_path, tiny_checkpoint, tokens):
    dense = ["model_fields={sparsity: 0}", "quantization_ramp_steps=0", f"output_dir={tmp_path / 'dense'}"]
    train(str(run_config), dense)
    stages = ["second_stage_learning_rate=5e-4"]
    options = ["control=true", "distill_from=control", f"output_dir={tmp_path / 'run'}"]
    trainer = train(str(run_config), options)
    assert min(logged(trainer, "distill_kl")) > 0
    expected, found = (json.loads((tmp_path / name / "all_results.json").read_text()) for name in ("dense", "run"))
    assert found["control_eval_loss"] == expected["eval_loss"]
    control = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "control")
    assert (control.config.weight_quantization, control.config.activation_quantization) == ("none", "none")
    assert torch.equal(control(tokens).logits, AutoModelForCausalLM.from_pretrained(tmp_path / "dense")(tokens).logits)
    with pytest.raises(UserError, match=r"is a control with second_stage None, and no control of a run with {"):
        train(str(run_config), [*options, *stages, "resume_from_checkpoint=last"])


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["quantization_ramp_steps=9"], r"quantization_ramp_steps must be at most max_steps \(8\), got 9"),
        (["quantization_ramp_steps=-1"], "quantization_ramp_steps must be at least 0, got -1"),
        (["quantization_ramp_levels=0"], "quantization_ramp_levels must be at least 1, got 0"),
        (
            ["model_fields={activation_quantization: int8}", "control=true"],
            "quantization_ramp_steps needs a Q-Sparse model whose weight_quantization is 'ternary', .*'none'$",
        ),
        (["second_stage_start=1"], "second_stage_start must be above 0 and below 1, got 1"),
        (["second_stage_start=0.6"], "second_stage_start sets nothing without second_stage_learning_rate or"),
        (["second_stage_learning_rate=-1"], "second_stage_learning_rate must be a finite number of at least 0, got -1"),
        (["second_stage_learning_rate=nan"], "second_stage_learning_rate must be a finite number"),
        (["second_stage_weight_decay=0"], "second_stage_weight_decay needs a weight_decay above 0, got 0"),
        (["second_stage_learning_rate=1e-4", "learning_rate=0"], "needs a learning_rate above 0, got 0"),
        (
            ["second_stage_learning_rate=1e-4", "lr_scheduler_type=reduce_lr_on_plateau", "eval_strategy=epoch"],
            "needs a schedule of the update's number, like linear, got lr_scheduler_type reduce_lr_on_plateau",
        ),
    ],
)
def test_mistakes_are_named_before_anything_is_written(run_config, tmp_path, overrides, said):
    with pytest.raises(UserError, match=said):
        train(str(run_config), [f"output_dir={tmp_path / 'out'}", *overrides])
    assert not (tmp_path / "out").exists()


def test_a_ramp_needs_ternary_weights_in_the_trainer_too(tmp_path):
    for config in (dense_config("llama"), sparse_config("llama")):
        with pytest.raises(UserError, match=f"'ternary', got {config.model_type} with 'none'"):
            QSparseTrainer(make(config), small_run(tmp_path / "run", quantization_ramp_steps=2))


STAGES = {"weight_decay": 0.1, "second_stage_weight_decay": 0.0, "second_stage_learning_rate": 1.5e-3}
STAGES |= {"learning_rate": 1.8e-3, "warmup_steps": 0}


@pytest.mark.parametrize("start", [0.5, 0.6])
def test_two_stages_by_hand(tmp_path, start):
    """Two linear schedules to nothing over 8 updates, of which the second takes over; norms never decay."""
    model = make(sparse_config("llama", **ONE_BIT))
    arguments = small_run(tmp_path, **STAGES, lr_scheduler_type="linear", second_stage_start=start)
    trainer = trained(model, arguments)
    first = math.ceil(8 * start)
    peaks = [1.8e-3] * first + [1.5e-3] * (8 - first)
    assert logged(trainer, "learning_rate") == pytest.approx([peak * (1 - i / 8) for i, peak in enumerate(peaks)])
    assert logged(trainer, "weight_decay") == [0.1] * first + [0] * (8 - first)
    assert [group["weight_decay"] for group in trainer.optimizer.param_groups] == [0.1, 0]  # as when it began
    once = {name: logged(trainer, name) for name in ("learning_rate", "weight_decay")}
    trainer.train()
    assert {name: logged(trainer, name) for name in once} == once


def test_stages_change_the_weights_as_adamw_says(tmp_path):
    """Without gradients AdamW only decays: by `1 - rate * decay` in each update of the first stage, then not."""
    model = make(sparse_config("llama"))
    before = model.model.layers[0].mlp.down_proj.weight.detach().clone()
    norm = model.model.layers[0].input_layernorm.weight.detach().clone()
    rows = [row | {"labels": [-100] * 16} for row in ROWS]
    arguments = small_run(tmp_path, **STAGES | {"second_stage_learning_rate": None}, lr_scheduler_type="constant")
    trainer = QSparseTrainer(model, arguments, train_dataset=Dataset.from_list(rows))
    trainer.compute_loss = lambda model, inputs, *rest, **kwargs: 0 * model(**inputs).logits.sum()
    trainer.train()
    after = model.model.layers[0].mlp.down_proj.weight
    torch.testing.assert_close(after, before * (1 - 1.8e-3 * 0.1) ** 4, rtol=1e-6, atol=0)
    assert torch.equal(model.model.layers[0].input_layernorm.weight, norm)


@pytest.mark.parametrize("stopped_after", [3, 4, 6])
def test_two_stages_and_a_ramp_go_on_where_they_stopped(tmp_path, stopped_after):
    """To the bit, from before, at and after the update where the second stage begins."""

    def trainer(folder, **options) -> QSparseTrainer:
        fields = STAGES | {"quantization_ramp_steps": 5, "save_strategy": "steps", "save_steps": stopped_after}
        arguments = small_run(folder, lr_scheduler_type="cosine", **fields | options)
        model = make(sparse_config("llama", **ONE_BIT))
        return QSparseTrainer(model, arguments, train_dataset=Dataset.from_list(ROWS))

    whole = trainer(tmp_path / "whole")
    whole.train()
    resumed = trainer(tmp_path / "other")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{stopped_after}"))
    for name in ("loss", "learning_rate", "weight_decay", "quantization_strength"):
        assert logged(resumed, name) == logged(whole, name)
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], weight)


def test_a_schedule_of_ones_own_has_no_second_stage(tmp_path):
    model = make(sparse_config("llama"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda update: 1)
    with pytest.raises(UserError, match="needs the trainer's own schedule, and it was given another"):
        trained(model, small_run(tmp_path, **STAGES), optimizers=(optimizer, schedule))


@pytest.mark.parametrize("family", ["llama", "bitnet"])
def test_a_ternary_model_learns_and_half_of_its_inputs_are_nearly_as_good(tmp_path, family):
    """A chain of tokens, each followed by one of three: held-out losses of fp32, of one bit, and of one bit at 0.5.

    An untrained model has 4.9 nats, the chain itself 0.80.
    """
    generator = torch.Generator().manual_seed(0)
    followers = torch.stack([torch.randperm(100, generator=generator)[:3] + 3 for _ in range(128)])
    chosen = torch.multinomial(torch.tensor([0.7, 0.2, 0.1]), 2600 * 32, True, generator=generator).view(2600, 32)
    tokens = torch.randint(3, 103, (2600, 1), generator=generator)
    for position in range(31):
        tokens = torch.cat([tokens, followers[tokens[:, -1], chosen[:, position]][:, None]], dim=1)
    rows = Dataset.from_list([{"input_ids": row, "labels": row} for row in tokens.tolist()])

    def loss(**fields) -> float:
        model = make(sparse_config(family, hidden_act="relu2", **fields))
        options = {"max_steps": 150, "per_device_train_batch_size": 16, "learning_rate": 3e-3}
        arguments = small_run(tmp_path, lr_scheduler_type="cosine", logging_steps=150, **options)
        held_out = rows.select(range(2500, 2600))
        trainer = QSparseTrainer(model, arguments, train_dataset=rows.select(range(2500)), eval_dataset=held_out)
        trainer.train()
        return trainer.evaluate()["eval_loss"]

    full, one_bit, both = loss(sparsity=0), loss(sparsity=0, **ONE_BIT), loss(sparsity=0.5, **ONE_BIT)
    assert full < 1.5
    assert one_bit < full + 0.1
    assert both < one_bit + 0.25
