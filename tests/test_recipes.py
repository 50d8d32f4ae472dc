"""The recipes we ship, held against the paper's tables: batch, length, schedule, data, and the model's shape."""

import json
import math
from copy import copy

import pytest
import torch
from conftest import REPOSITORY, make, sparse_config
from transformers import AutoConfig, AutoModelForCausalLM, MistralConfig, Qwen2Config, get_scheduler

from qsparse_hf.conversion import FAMILIES
from qsparse_hf.errors import UserError
from qsparse_hf.report import count_parameters
from qsparse_hf.training.recipe import Recipe, parse

FOLDER = REPOSITORY / "configs" / "train"
ORCA = ("Open-Orca/OpenOrca", {"system": "system_prompt", "prompt": "question", "completion": "response"}, None)
TEXT = {"text": "text"}
PAIRS = {"prompt": "prompt", "completion": "completion"}

# Tokens an update, updates (None: one epoch), peak and last learning rate, weight decay, clipping, sources.
SFT = (128 * 2048, None, 5e-6, 0, 0, 1, [ORCA])
CONTINUE = (2048 * 2048, 10_000, 5e-5, 1e-6, 0.01, 2, [("HuggingFaceFW/fineweb-edu", TEXT, None)])
SLIM = [("cerebras/SlimPajama-627B", TEXT, None)]
MIXTURE = [
    (*ORCA[:2], 0.71),
    ("meta-math/MetaMathQA", {"prompt": "query", "completion": "response"}, 0.29),
]
EXPECTED = {
    "pretrain_300m": (2**19, 95_368, 6.0e-4, 6.0e-5, 0.1, 1, SLIM),
    "pretrain_700m": (2**19, 95_368, 2.5e-4, 2.5e-5, 0.1, 1, SLIM),
    "pretrain_1.3b": (2**19, 95_368, 2.0e-4, 2.0e-5, 0.1, 1, SLIM),
    "pretrain_7b": (2**19, 95_368, 1.5e-4, 1.5e-5, 0.1, 1, SLIM),
    "continue_mistral_7b": CONTINUE,
    "continue_mistral_7b_distill": CONTINUE,
    "sft_mistral_7b": SFT,
    "sft_qwen1.5_7b": SFT,
    "sft_qwen2_7b_released": (128 * 4096, None, 2e-5, 0, 0, 1, MIXTURE),
    "sft_mistral_7b_lora": (128 * 2048, None, 2e-4, 0, 0, 1, [ORCA]),
    "pretrain_tiny": (8 * 256, 200, 3e-3, 0, 0.1, 1, [("quickstart/train.jsonl", TEXT, None)]),
    "continue_tiny": (8 * 256, 100, 1e-3, 0, 0.1, 1, [("quickstart/train.jsonl", TEXT, None)]),
    "sft_tiny": (8 * 256, 60, 1e-3, 0, 0, 1, [("quickstart/questions.jsonl", PAIRS, None)]),
    "sft_tiny_lora": (8 * 256, 60, 3e-3, 0, 0, 1, [("quickstart/questions.jsonl", PAIRS, None)]),
}


@pytest.fixture(params=sorted(path.stem for path in FOLDER.glob("*.yaml")))
def recipe(request, monkeypatch) -> tuple[str, Recipe]:
    monkeypatch.chdir(REPOSITORY)
    return request.param, parse(f"configs/train/{request.param}.yaml", ["use_cpu=true"])


def test_a_recipe_is_what_the_paper_says(recipe):
    name, (run, data, training) = recipe
    tokens, updates, peak, last, decay, clip, sources = EXPECTED[name]
    assert run.stage == name.split("_")[0]
    assert training.output_dir == f"runs/{name}"
    assert training.rows_per_update * data.sequence_length == tokens
    assert training.max_steps == (updates or -1)
    assert updates or training.num_train_epochs == 1
    assert (training.adam_beta1, training.adam_beta2) == (0.9, 0.95)
    assert (training.weight_decay, training.max_grad_norm) == (decay, clip)
    read = [(str(source), source.columns, source.probability) for source in data.train_sources]
    assert read == sources

    updates = updates or 1000
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=training.learning_rate)
    warmup = training.get_warmup_steps(updates)
    scheduler = get_scheduler(
        training.lr_scheduler_type, optimizer, warmup, updates, scheduler_specific_kwargs=training.lr_scheduler_kwargs
    )
    rates = [training.learning_rate * scheduler.lr_lambdas[0](update) for update in (0, warmup, updates)]
    assert rates == pytest.approx([0, peak, last], abs=1e-12)
    assert warmup == (math.ceil(0.03 * updates) if run.stage == "sft" else training.warmup_steps)


# Projection weights N and activated ones Na, in millions, at the recipe's sparsity (tables 1 and 5).
SHAPES = {"300m": (302, 181), "700m": (680, 408), "1.3b": (1208, 725), "7b": (6476, 3886), "tiny": (0.74, 0.44)}


@pytest.mark.parametrize("size", SHAPES)
def test_a_model_has_the_shape_of_its_name(size):
    config = AutoConfig.from_pretrained(REPOSITORY / "configs" / "model" / f"qsparse_llama_{size}.json")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    total, activated = (count / 1e6 for count in count_parameters(model))
    assert (total, activated) == pytest.approx(SHAPES[size], rel=0.01)
    assert (config.hidden_act, config.sparsity, config.sparsity_rescale) == (
        "relu2",
        0.4,
        "none" if size == "tiny" else "l2",
    )
    logits = model(torch.zeros(1, 8, dtype=torch.long, device="meta")).logits
    assert logits.shape == (1, 8, config.vocab_size)


DENSE = {
    "runs/mistral_7b": MistralConfig(),  # its defaults are Mistral 7B's
    "runs/qwen1.5_7b": Qwen2Config(intermediate_size=11008, num_key_value_heads=32),
    "runs/qwen2_7b": Qwen2Config(
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        vocab_size=152064,
    ),
}


def test_the_models_that_are_continued_are_named_and_fit(recipe):
    name, (run, data, _) = recipe
    if run.stage == "pretrain" or "tiny" in name:
        pytest.skip("nothing is converted")
    dense = DENSE[run.model]
    text = (FOLDER / f"{name}.yaml").read_text()
    assert f"{run.model} --sparsity 0.5" in text or "continue_mistral_7b.yaml" in text  # how to get it
    sparse = FAMILIES[dense.model_type](**{key: value for key, value in dense.to_dict().items() if key != "model_type"})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(sparse)
    total, activated = count_parameters(model)
    assert 6e9 < total < 7.3e9
    assert activated == pytest.approx(total / 2, rel=1e-3)
    assert data.sequence_length <= dense.max_position_embeddings
    if run.lora:
        from peft import LoraConfig, get_peft_model

        adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **run.lora))
        trained = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
        assert trained == 32 * 16 * (2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 14336))


def test_a_global_batch_is_shared_by_all_processes(recipe, monkeypatch):
    name, (_, _, training) = recipe
    if training.global_batch_size is None:
        pytest.skip("no global batch")
    for processes in (1, 2, 8, 64):
        monkeypatch.setattr(type(training), "world_size", property(lambda self, count=processes: count))
        if training.global_batch_size % (processes * training.per_device_train_batch_size) == 0:
            again = parse(str(FOLDER / f"{name}.yaml"), ["use_cpu=true"]).training
            assert again.rows_per_update == training.global_batch_size
            assert again.gradient_accumulation_steps * processes * again.per_device_train_batch_size == (
                training.global_batch_size
            )
        else:
            with pytest.raises(UserError, match="global_batch_size must be a multiple"):
                parse(str(FOLDER / f"{name}.yaml"), ["use_cpu=true"])


def test_values_in_mappings_keep_their_type(tmp_path):
    (tmp_path / "run.yaml").write_text(
        "config: a\ntokenizer: b\ntrain_data: [c, {files: d, probability: 0.5}]\noutput_dir: e\nuse_cpu: true\n"
        "lr_scheduler_kwargs: {lr_end: 1e-6, power: 1.0}\nmodel_fields: {sparsity: 6e-1, sparsity_ste: no}\n"
    )
    run, data, training = parse(str(tmp_path / "run.yaml"), [])
    assert training.lr_scheduler_kwargs == {"lr_end": 1e-6, "power": 1.0}
    assert run.model_fields == {"sparsity": 0.6, "sparsity_ste": False}
    assert data.train_data == ["c", json.dumps({"files": "d", "probability": 0.5})]


def test_a_key_that_stands_twice_is_refused(tmp_path):
    (tmp_path / "run.yaml").write_text("model: a\nmodel: b\n")
    with pytest.raises(UserError, match="line 2: 'model' stands twice"):
        parse(str(tmp_path / "run.yaml"), [])


def test_the_chat_template_is_plain_text_and_marks_what_is_learnt(tiny_tokenizer):
    template = (REPOSITORY / "configs" / "chat" / "instruct.jinja").read_text()
    turns = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "u"},
        {"role": "assistant", "content": "a"},
        {"role": "user", "content": "v"},
    ]
    tokenizer = copy(tiny_tokenizer)
    tokenizer.chat_template = template
    written = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert written == ("### System:\ns\n\n### User:\nu\n\n### Assistant:\na<end>\n\n### User:\nv\n\n### Assistant:\n")
    assert make(sparse_config("llama")).config.vocab_size >= len(tiny_tokenizer)
