"""Cards as they are written: by a conversion, by a run, beside adapters; valid, and never over a person's."""

import json
import re
from pathlib import Path

import pytest
import yaml
from conftest import REPOSITORY, dense_config, make, sparse_config
from hub_server import complaints
from huggingface_hub import EvalResult, ModelCard
from peft import LoraConfig, get_peft_model

from qsparse_hf import QSparseTrainer, QSparseTrainingArguments, convert_checkpoint
from qsparse_hf.model_card import (
    Origin,
    Run,
    find_origin,
    for_repository,
    is_ours,
    non_defaults,
    render_card,
    write_card,
)
from qsparse_hf.results import Results
from qsparse_hf.training.run import train


def read(folder: Path) -> ModelCard:
    """The card in `folder`, which is ours, valid as far as that can be told here, and ends as it begins."""
    text = (folder / "README.md").read_text()
    assert is_ours(text)
    assert not complaints(text)
    card = ModelCard(text)
    assert ModelCard(str(card)).data.to_dict() == card.data.to_dict()
    assert "{{" not in text
    assert "\n\n\n" not in text
    return card


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("dense") / "dense"
    make(dense_config("llama")).save_pretrained(folder)
    (folder / "LICENSE").write_text((REPOSITORY / "LICENSE").read_text())
    return folder


def test_a_conversion_writes_one(dense, tmp_path):
    convert_checkpoint(dense, tmp_path / "sparse", sparsity=0.5, sparsity_per_projection={"down": [0.25, 0.75]})
    card = read(tmp_path / "sparse")
    assert card.data.license == "apache-2.0"
    assert card.data.library_name == "transformers"
    assert card.data.base_model is None  # a folder is no id of the Hub's
    assert (tmp_path / "sparse" / "LICENSE").exists()
    assert "Converted, without training, from a local model, `dense`." in card.text
    # 2 layers of 64 x (64 + 32 + 32), 64 x 64, 2 x 64 x 96 and 96 x 64 weights; of 96 features, 72 and 24 are kept.
    assert "| q, k, v | 50.0 | 16,384 | 8,192 |" in card.text
    assert "| attention's output | 50.0 | 8,192 | 4,096 |" in card.text
    assert "| gate, up | 50.0 | 24,576 | 12,288 |" in card.text
    assert "| down | 25.0 to 75.0, by layer | 12,288 | 6,144 |" in card.text
    assert "reads 30,720 of 61,440 projection weights\n(50.0%)" in card.text
    assert "converted weights, not trained on" in card.text


def test_a_card_of_the_base_model_gives_licence_and_lineage(dense, tmp_path):
    convert_checkpoint(dense, tmp_path / "sparse")
    described = "license: other\nlicense_name: terms\nlicense_link: LICENSE\nbase_model: org/parent"
    (tmp_path / "sparse" / "README.md").write_text(f"---\n{described}\n---\n")
    origin = find_origin(str(tmp_path / "sparse"))
    assert origin.repository == "org/parent"
    write_card(tmp_path, make(sparse_config("llama")), origin, Run({}))
    card = read(tmp_path)
    assert (card.data.license, card.data.license_name, card.data.license_link) == ("other", "terms", "LICENSE")
    assert card.data.base_model == "org/parent"
    assert "Trained further from [org/parent](https://huggingface.co/org/parent)." in card.text


@pytest.mark.parametrize(
    ("text", "licence"),
    [
        ("MIT License\n\nCopyright", {"license": "mit"}),
        ("Terms of ours", {"license": "other", "license_name": "see-file"}),
    ],
)
def test_a_licence_is_read_from_its_text_where_there_is_no_card(tmp_path, text, licence):
    (tmp_path / "LICENSE.txt").write_text(text)
    link = {"license_link": "LICENSE.txt"} if licence["license"] == "other" else {}
    assert find_origin(str(tmp_path)).licence == licence | link


def test_broken_cards_and_unknown_models_say_nothing(tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: [\n---\n")
    assert find_origin(str(tmp_path)).licence == {}
    assert find_origin("org/model").repository == "org/model"  # offline, as all tests are
    assert find_origin("gone").repository is None
    text = render_card("name", make(sparse_config("llama")), find_origin(str(tmp_path)))
    assert "The licence is that of the model it was made from, which is not known here." in text
    assert "license" not in ModelCard(text).data.to_dict()


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_checkpoint) -> Path:
    """A run of two updates, and its control."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "text.txt").write_text("one two three four " * 99)
    recipe = {"model": str(tiny_checkpoint), "sequence_length": 16, "max_steps": 2, "save_steps": 1, "use_cpu": True}
    recipe |= {"control": True}
    (folder / "other.txt").write_text("five six seven " * 99)
    texts = {"a_b": [str(folder / "text.txt")], "other": {"files": str(folder / "other.txt")}}
    recipe |= {"train_data": [{"files": str(folder / "text.txt")}], "eval_data": texts}
    recipe |= {"report_to": "none", "output_dir": str(folder / "out"), "hub_token": "hf_secret", "logging_steps": 1}
    (folder / "run.yaml").write_text(yaml.safe_dump(recipe))
    train(str(folder / "run.yaml"))
    return folder


def test_a_run_writes_what_it_was_and_what_it_measured(trained):
    card = read(trained / "out")
    measured = json.loads((trained / "out" / "all_results.json").read_text())
    assert "| held-out loss, nats a token | before training | after | dense before | dense after |" in card.text
    columns = ("initial_eval", "eval", "control_initial_eval", "control_eval")
    losses = [measured[f"{column}_a_b_loss"] for column in columns]
    assert len({round(loss, 4) for loss in losses}) == 4
    assert "| a_b | {:.4f} | {:.4f} | {:.4f} | {:.4f} |".format(*losses) in card.text
    results = [(each.dataset_name, each.metric_type, each.metric_value) for each in card.data.eval_results]
    assert results == [(name, "loss", round(measured[f"eval_{name}_loss"], 4)) for name in ("a_b", "other")]
    assert "| q, k, v | 50.0 | 50.0 | 16,384 | 8,192 |" in card.text
    assert "- updates: 2 of 8 sequences" in card.text
    assert re.search(r"- tokens: 256\n- hardware: CPU .*\n- wall time: 0:00:\d\d\n", card.text)
    assert re.search(r"Made with qsparse_hf .*, torch .*, transformers [\d.]+\.", card.text)
    recipe = yaml.safe_load(re.search(r"```yaml\n(.*?)```", card.text, re.DOTALL)[1])
    assert recipe["train_data"] == [{"files": str(trained / "text.txt")}]
    assert recipe["max_steps"] == 2
    written = yaml.safe_load((trained / "run.yaml").read_text())
    assert recipe.keys() - {"stage", "eval_on_start"} <= written.keys()
    assert "hf_secret" not in str(card)


def test_the_control_is_called_dense(trained):
    card = read(trained / "out" / "control")
    assert "A dense model of 78,144 parameters, in the form of a Q-Sparse one" in card.text
    assert card.data.tags is None


def test_every_checkpoint_has_one(trained):
    card = read(trained / "out" / "checkpoint-1")
    assert "# out\n" in card.text
    assert "- updates: 1 of 8 sequences" in card.text


def test_the_recipe_of_a_card_runs(trained, tmp_path):
    recipe = re.search(r"```yaml\n(.*?)```", read(trained / "out").text, re.DOTALL)[1]
    (tmp_path / "again.yaml").write_text(recipe)
    train(str(tmp_path / "again.yaml"), [f"output_dir={tmp_path / 'out'}"])
    weights = [(folder / "out" / "model.safetensors").read_bytes() for folder in (trained, tmp_path)]
    assert weights[0] == weights[1]


def tiny_trainer(model, folder: Path, **options) -> QSparseTrainer:
    return QSparseTrainer(model, QSparseTrainingArguments(folder, use_cpu=True, report_to="none", **options))


def test_adapters_have_ours_in_the_place_of_pefts(tiny_checkpoint, tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM

    monkeypatch.chdir(tiny_checkpoint.parent)
    base = AutoModelForCausalLM.from_pretrained(tiny_checkpoint.name)
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=2))
    trainer = tiny_trainer(model, tmp_path)
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        trainer.save_model()
        card = read(tmp_path)
        assert card.data.library_name == "peft"
        assert card.data.base_model is None
        assert f"Adapters for a local model, `{tiny_checkpoint.name}`." in card.text
        assert "AutoPeftModelForCausalLM.from_pretrained(here)" in card.text
    described = json.loads((tmp_path / "adapter_config.json").read_text())
    assert described["base_model_name_or_path"] == str(tiny_checkpoint)


@pytest.mark.parametrize("adapters", [False, True])
def test_what_a_person_wrote_or_changed_stays(adapters, tmp_path):
    model = make(sparse_config("llama"))
    if adapters:
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=2))
    trainer = tiny_trainer(model, tmp_path)
    trainer.save_model()
    file = tmp_path / "README.md"
    for theirs in ("# Mine\n", file.read_text().replace("# ", "# My ", 1), ""):
        file.write_text(theirs)
        trainer.save_model()
        trainer.create_model_card(language="en")
        assert file.read_text() == theirs
    file.unlink()
    trainer.create_model_card(language="en", license="mit", tags="chat", finetuned_from="org/base", model_name="A name")
    card = read(tmp_path)
    assert (card.data.language, card.data.license, card.data.base_model) == ("en", "mit", "org/base")
    assert card.data.tags == ["q-sparse", "activation-sparsity", "chat"]
    assert "# A name\n" in card.text


def test_a_conversion_keeps_a_persons_card(dense, tmp_path):
    convert_checkpoint(dense, tmp_path / "sparse")
    (tmp_path / "sparse" / "README.md").write_text("# Mine\n")
    convert_checkpoint(dense, tmp_path / "sparse", overwrite=True, sparsity=0.25)
    assert (tmp_path / "sparse" / "README.md").read_text() == "# Mine\n"


def test_results_are_shown_once_and_in_the_metadata(tmp_path):
    write_card(tmp_path, make(sparse_config("llama")), None)
    text = (tmp_path / "README.md").read_text()
    result = EvalResult("text-generation", "arc_easy", "ARC", "acc", 0.5, metric_name="acc")
    for _ in range(2):
        text = for_repository(text, "me/model", Origin("org/base", "org/base", True), Results([result]))
    (tmp_path / "README.md").write_text(text)
    card = read(tmp_path)
    assert text.count("| ARC | acc | 0.5 |") == 1
    assert [each.metric_value for each in card.data.eval_results] == [0.5]
    assert card.data.base_model == "org/base"
    assert 'here = "me/model"  # this repository' in text


def test_a_dense_models_card_says_so(tmp_path):
    write_card(tmp_path, make(dense_config("llama")), None, Run({}))
    card = read(tmp_path)
    assert "A dense model" in card.text
    assert "qsparse_hf  #" not in card.text
    assert "## Sparsity" not in card.text


@pytest.mark.parametrize("sparsity", [0, 0.5])
def test_a_quantized_models_card_says_so(tmp_path, sparsity):
    fields = {"weight_quantization": "ternary", "activation_quantization": "int8"}
    write_card(tmp_path, make(sparse_config("bitnet", sparsity=sparsity, **fields)), None)
    card = read(tmp_path)
    assert card.data.tags == ["bitnet", "1.58-bit", *(["q-sparse", "activation-sparsity"] if sparsity else [])]
    said = " ".join(card.text.split())
    assert (
        "weights of -1, 0 and 1 times one scale a tensor, as BitNet b1.58 does (stored in full precision), and" in said
    )
    assert "and with inputs rounded to 255 levels a token, as int8 holds them. Trained from scratch." in said
    write_card(tmp_path, make(sparse_config("llama", activation_quantization="int8")), None)
    assert "Its projections compute with inputs rounded to 255 levels" in read(tmp_path).text


def test_defaults_and_secrets_are_left_out():
    arguments = QSparseTrainingArguments("out", use_cpu=True, hub_token="hf_secret", learning_rate=1e-3)
    found = non_defaults(arguments)
    assert {"output_dir": "out", "use_cpu": True, "learning_rate": 1e-3}.items() <= found.items()
    assert not {"hub_token", "weight_decay", "lr_scheduler_type", "report_to"} & found.keys()


def test_what_ships_names_its_licence(tmp_path):
    make(sparse_config("qwen2")).save_pretrained(tmp_path)
    files = sorted(tmp_path.glob("*.py"))
    assert files
    assert {file.read_text().splitlines()[0] for file in files} == {"# SPDX-License-Identifier: Apache-2.0"}
    modeling = (REPOSITORY / "qsparse_hf" / "modeling").glob("*.py")
    assert all(file.read_text().startswith("# SPDX-License-Identifier: Apache-2.0\n") for file in modeling)
    assert "Apache License" in (REPOSITORY / "LICENSE").read_text()[:200]
