"""The recipes we ship, held against the paper's tables: batch, length, schedule, data, and the model's shape."""

import math
import re
import time
from copy import copy

import pytest
import torch
import yaml
from conftest import REPOSITORY, make, sparse_config
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, get_scheduler

from qsparse_hf.errors import UserError
from qsparse_hf.modeling.bitnet import CODES_IN_A_BYTE
from qsparse_hf.registration import FAMILIES
from qsparse_hf.report import count_parameters, projections
from qsparse_hf.training.recipe import Recipe, parse
from qsparse_hf.training.run import train
from qsparse_hf.training.schedule import SecondStage

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
DOMAINS = [
    ("HuggingFaceTB/smollm-corpus", TEXT, 0.6),
    ("codeparrot/codeparrot-clean", {"text": "content"}, 0.4),
]
CHATS = {"messages": "messages"}
EXPECTED = {
    "pretrain_300m": (2**19, 95_368, 6.0e-4, 6.0e-5, 0.1, 1, SLIM),
    "pretrain_700m": (2**19, 95_368, 2.5e-4, 2.5e-5, 0.1, 1, SLIM),
    "pretrain_1.3b": (2**19, 95_368, 2.0e-4, 2.0e-5, 0.1, 1, SLIM),
    "pretrain_7b": (2**19, 95_368, 1.5e-4, 1.5e-5, 0.1, 1, SLIM),
    "pretrain_bitnet_300m": (2**19, 95_368, 1.8e-3, 0, 0.1, 1, SLIM),
    "pretrain_bitnet_700m": (2**19, 95_368, 1.5e-3, 0, 0.1, 1, SLIM),
    "pretrain_bitnet_1.3b": (2**19, 95_368, 1.2e-3, 0, 0.1, 1, SLIM),
    "pretrain_bitnet_7b": (2**19, 95_368, 1.0e-3, 0, 0.1, 1, SLIM),
    "continue_mistral_7b": CONTINUE,
    "continue_mistral_7b_distill": CONTINUE,
    "sft_mistral_7b": SFT,
    "sft_qwen1.5_7b": SFT,
    "sft_qwen2_7b_released": (128 * 4096, None, 2e-5, 0, 0, 1, MIXTURE),
    "sft_mistral_7b_lora": (128 * 2048, None, 2e-4, 0, 0, 1, [ORCA]),
    "continue_smollm2_135m": (32 * 1024, 3000, 3e-4, 0, 0.01, 1, DOMAINS),
    "continue_smollm2_135m_ternary": (32 * 1024, 3000, 1e-3, 0, 0.01, 1, DOMAINS),
    "sft_smollm2_135m": (64 * 1024, 2000, 3e-4, 0, 0, 1, [("HuggingFaceTB/smol-smoltalk", CHATS, None)]),
    "pretrain_tiny": (8 * 256, 200, 3e-3, 0, 0.1, 1, [("quickstart/train.jsonl", TEXT, None)]),
    "pretrain_bitnet_tiny": (8 * 256, 200, 3e-3, 0, 0.1, 1, [("quickstart/train.jsonl", TEXT, None)]),
    "continue_tiny": (8 * 256, 100, 1e-3, 0, 0.1, 1, [("quickstart/train.jsonl", TEXT, None)]),
    "continue_tiny_ternary": (8 * 256, 100, 3e-3, 0, 0.1, 1, [("quickstart/train.jsonl", TEXT, None)]),
    "sft_tiny": (8 * 256, 60, 1e-3, 0, 0, 1, [("quickstart/questions.jsonl", PAIRS, None)]),
    "sft_tiny_lora": (8 * 256, 60, 3e-3, 0, 0, 1, [("quickstart/questions.jsonl", PAIRS, None)]),
}

# Peak of the second stage (table 6), which begins at half of the updates and has no weight decay.
SECOND_PEAKS = {
    "pretrain_bitnet_300m": 1.5e-3,
    "pretrain_bitnet_700m": 1.0e-3,
    "pretrain_bitnet_1.3b": 8.0e-4,
    "pretrain_bitnet_7b": 6.0e-4,
    "pretrain_bitnet_tiny": 2e-3,
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
    before = scheduler.lr_lambdas[0]
    SecondStage(training).attach(scheduler, optimizer, updates)
    rates = [training.learning_rate * scheduler.lr_lambdas[0](update) for update in (0, warmup, updates)]
    assert rates == pytest.approx([0, peak, last], abs=1e-12)
    second = SECOND_PEAKS.get(name)
    assert (training.second_stage_learning_rate, training.second_stage_weight_decay) == (second, second and 0)
    peaks = [training.learning_rate * scheduler.lr_lambdas[0](i) / before(i) for i in (updates // 2 - 1, updates // 2)]
    assert peaks == pytest.approx([peak, second or peak])
    assert warmup == (math.ceil(0.03 * updates) if run.stage == "sft" else training.warmup_steps)


# Projection weights N, in millions (table 5).
SHAPES = {"300m": 302, "700m": 680, "1.3b": 1208, "7b": 6476, "tiny": 0.74}


@pytest.mark.parametrize("family", ["llama", "bitnet"])
@pytest.mark.parametrize("size", SHAPES)
def test_a_model_has_the_shape_of_its_name(size, family):
    config = AutoConfig.from_pretrained(REPOSITORY / "configs" / "model" / f"qsparse_{family}_{size}.json")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    sparsity = {"llama": 0.4, "bitnet": 0.6125}[family]  # where the dense loss is met; inference-optimal at 1.58 bit
    total, activated = (count / 1e6 for count in count_parameters(model))
    assert (total, activated) == pytest.approx((SHAPES[size], SHAPES[size] * (1 - sparsity)), rel=0.01)
    rescale = "none" if size == "tiny" or family == "bitnet" else "l2"
    assert (config.hidden_act, config.sparsity, config.sparsity_rescale) == ("relu2", sparsity, rescale)
    quantization = ("ternary", "int8") if family == "bitnet" else ("none", "none")
    assert (config.weight_quantization, config.activation_quantization) == quantization
    if family == "bitnet":  # it can be packed, and but for that it is the Llama of its size
        assert all(linear.out_features % CODES_IN_A_BYTE == 0 for _, _, linear in projections(model))
        llama = AutoConfig.from_pretrained(REPOSITORY / "configs" / "model" / f"qsparse_llama_{size}.json")
        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"):
            assert getattr(config, name) == getattr(llama, name)
        for name in ("tie_word_embeddings", "max_position_embeddings", "rope_parameters", "eos_token_id"):
            assert getattr(config, name) == getattr(llama, name)
    logits = model(torch.zeros(1, 8, dtype=torch.long, device="meta")).logits
    assert logits.shape == (1, 8, config.vocab_size)


DENSE = {
    "runs/smollm2_135m": LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    ),
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
    if run.stage == "pretrain" or "tiny" in name or run.model == "runs/continue_smollm2_135m":
        pytest.skip("nothing is converted")
    dense = DENSE[run.model]
    text = (FOLDER / f"{name}.yaml").read_text()
    assert f"{run.model} --sparsity 0.5" in text or "continue_mistral_7b.yaml" in text  # how to get it
    sparse = FAMILIES[dense.model_type].config(
        **{key: value for key, value in dense.to_dict().items() if key != "model_type"}
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(sparse)
    total, activated = count_parameters(model)
    least, most = (1.0e8, 1.4e8) if "135m" in name else (6e9, 7.3e9)
    assert least < total < most
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


BASE = {"model": "m", "train_data": ["a.jsonl"], "output_dir": "o", "use_cpu": True}


@pytest.fixture
def written(tmp_path):
    """Parses a recipe of these lines and what every recipe needs beside them."""

    def parsed(lines: str, *overrides: str) -> Recipe:
        needed = {key: value for key, value in BASE.items() if not re.search(rf"^{key}:", lines, re.MULTILINE)}
        (tmp_path / "run.yaml").write_text(lines + yaml.safe_dump(needed))
        return parse(str(tmp_path / "run.yaml"), list(overrides))

    return parsed


def test_values_in_mappings_keep_their_type(written):
    run, data, training = written(
        "train_data: [c, {files: d, probability: 0.5}]\nlr_scheduler_kwargs: {lr_end: 1e-6, power: 1.0}\n"
        "model_fields: {sparsity: 6e-1, sparsity_ste: no, 2024-01-01: 2024-01-02, on: 1}\n"
    )
    assert training.lr_scheduler_kwargs == {"lr_end": 1e-6, "power": 1.0}
    assert run.model_fields == {"sparsity": 0.6, "sparsity_ste": False, "2024-01-01": "2024-01-02", "on": 1}
    assert data.train_data == ["c", {"files": "d", "probability": 0.5}]


def test_an_item_is_an_item_and_text_is_text(written):
    _, data, training = written("train_data: [a.jsonl, --seed=7, --]\nrun_name: --seed=8\nreport_to: [none]\n")
    assert data.train_data == ["a.jsonl", "--seed=7", "--"]
    assert (training.seed, training.run_name, training.report_to) == (42, "--seed=8", [])
    _, data, training = written("", "eval_data=[b, --seed=7]", "run_name=--", "report_to=[tensorboard, wandb]")
    assert data.eval_data == ["b", "--seed=7"]
    assert (training.seed, training.run_name, training.report_to) == (42, "--", ["tensorboard", "wandb"])


def test_values_arrive_as_their_field_wants_them(written):
    run, data, training = written(
        "train_data: {files: d}\neval_data:\nrun_name: 2024-13-45\ninclude_num_input_tokens_seen: no\nseed: 0\n"
        "max_grad_norm: inf\nuse_liger_kernel: on\nliger_kernel_config: {rope: false}\n"
        "optim_target_modules: [q, v]\nlora:\n"
        "save_strategy: no\nuse_cpu: on\n"
    )
    assert data.train_data == [{"files": "d"}]
    assert (data.eval_data, run.lora) == ([], {})
    assert (training.run_name, training.include_num_input_tokens_seen) == ("2024-13-45", "no")
    assert (training.seed, training.max_grad_norm, training.use_cpu) == (0, math.inf, True)
    assert training.liger_kernel_config == {"rope": False}
    assert training.optim_target_modules == ["q", "v"]
    assert training.save_strategy == "no"


def test_null_is_a_value_where_the_field_takes_it(written):
    pytest.importorskip("trl")
    assert written("stage: sft\nmax_length: null\n").training.max_length is None
    assert written("stage: sft\n", "max_length=").training.max_length is None
    _, data, training = written(
        "distill_from:\neval_data: [a]\ndebug: ''\n", "run_name=null", "eval_data=null", "lora="
    )
    assert (training.distill_from, training.run_name, data.eval_data) == (None, None, [])


@pytest.mark.parametrize("key", ["packing_strategy", "truncation_mode", "loss_type"])
def test_choices_of_fine_tuning(written, key):
    pytest.importorskip("trl")
    with pytest.raises(UserError, match=f"{key} must be one of .*, got 'bogus'"):
        written(f"stage: sft\n{key}: bogus\n")


def test_a_choice_may_be_left_to_transformers(written):
    lines = "ddp_backend: null\nmetric_for_best_model:\ndataloader_multiprocessing_context: ~\n"
    _, _, training = written(lines + "load_best_model_at_end: true\nsave_strategy: steps\neval_strategy: steps\n")
    assert (training.ddp_backend, training.metric_for_best_model) == (None, "loss")


def test_every_metric_that_may_choose_the_best_is_measured(tiny_checkpoint, tmp_path):
    (tmp_path / "text.txt").write_text("one two three four " * 99)
    recipe = {"model": str(tiny_checkpoint), "sequence_length": 16, "max_steps": 1, "eval_strategy": "steps"}
    recipe |= {key: [str(tmp_path / "text.txt")] for key in ("train_data", "eval_data")}
    recipe |= {"use_cpu": True, "report_to": "none", "save_strategy": "no"}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(recipe))
    for metric in ("eval_loss", "runtime", "samples_per_second", "eval_steps_per_second"):
        overrides = [f"output_dir={tmp_path / metric}", f"metric_for_best_model={metric}", "eval_steps=1"]
        assert train(str(tmp_path / "run.yaml"), overrides).state.best_metric > 0


def test_evaluation_texts_may_have_names(written):
    lines = "eval_data: {english: a.txt, python: [b, {files: c, take: 5}]}\nload_best_model_at_end: true\n"
    lines += "eval_strategy: steps\nmetric_for_best_model: "
    data = written(lines + "eval_python_loss\n").data
    assert {name: [str(source) for source in sources] for name, sources in data.eval_sources.items()} == {
        "english": ["a.txt"],
        "python": ["b", "c"],
    }
    assert data.eval_sources["python"][1].take == 5
    assert [*written("eval_data: {files: a.txt, skip: 1}\n").data.eval_sources] == [""]
    assert written("eval_data: {}\n").data.eval_sources == {}
    for nothing in ("loss", "null", "eval_german_loss"):
        with pytest.raises(
            UserError, match=r"metric_for_best_model must be one of english_loss, .*, eval_python_loss,"
        ):
            written(lines + nothing + "\n")


def test_anchors_and_merges_work_at_the_top_too(written):
    lines = (
        "<<: &base {seed: 3, learning_rate: 1e-4}\nseed: 5\nmodel_fields: &fields {a: 1}\nlora: {<<: *fields, r: 2}\n"
    )
    run, _, training = written(lines)
    assert (training.seed, training.learning_rate) == (5, 1e-4)
    assert run.lora == {"a": 1, "r": 2}


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ("model: a\nmodel: b\n", "line 2: 'model' stands twice"),
        ("lora: {r: 1, r: 2}\n", "line 1: 'r' stands twice"),
        ("train_data:\n  - \n", "line 1: train_data has an empty entry"),
        ("seed: 1\neval_data: [a, '']\n", "line 2: eval_data has an empty entry"),
        ("seed: 1\nresume_from_checkpoint: ''\n", "line 2: resume_from_checkpoint is empty text; write null for none"),
        ("train_data: ''\n", "train_data must be a list of text or mappings, got ''"),
        ("train_data: [[a]]\n", "train_data must be a list of text or mappings, got [['a']]"),
        ("model: [a]\n", "model must be text or null, got ['a']"),
        ("output_dir: {a: 1}\n", "output_dir must be text or null"),
        ("use_cpu: !!bool maybe\n", "use_cpu must be true or false, got 'maybe'"),
        ("lora: {r: !!bool maybe}\n", "line 1: lora: 'maybe' is no bool"),
        ("lora: {r: 0b_}\n", "line 1: lora: '0b_' is no int"),
        ("logging_steps: 0b_\n", "logging_steps must be a number, got '0b_'"),
        ("seed: 2024-13-45\n", "seed must be a whole number, got '2024-13-45'"),
        (f"seed: {'5' * 5000}\n", "seed must be a whole number, got '5555"),
        ("on: 5\n", "line 1: unknown key 'on'"),
        ("~: 5\n", "line 1: unknown key '~'"),
        ("? [a]\n: 3\n", "line 1: a key must be text"),
        ("<<: *base\n", "line 1: found undefined alias 'base'"),
        ("<<: 5\n", "line 1: while constructing a mapping: expected a mapping or list of mappings for merging"),
        ("seed: !!python/object/apply:os.system [ls]\n", "line 1: unknown tag tag:yaml.org,2002:python/object"),
        ("a: &a [*a]\n", "an alias stands within what it repeats"),
        ("a: " + "[" * 2000, "lists or mappings stand too deep within each other"),
        ("a: {b\n", "line 2: while parsing a flow mapping: expected ',' or '}'"),
        ("seed: 5000000000\n", "seed must be at most 4294967295, got 5000000000"),
        ("dataloader_num_workers: -1\n", "dataloader_num_workers must be at least 0, got -1"),
        ("logging_steps: nan\n", "logging_steps must be a finite number, got nan"),
        ("logging_steps: -1\n", "logging_steps must be at least 0, got -1"),
        ("learning_rate: inf\n", "learning_rate must be a finite number, got inf"),
        ("max_grad_norm: nan\n", "max_grad_norm must be a finite number, got nan"),
        ("max_steps: -2\n", "max_steps must be at least -1, got -2"),
        (f"max_steps: {10**30}\n", "max_steps must be at most 9223372036854775807"),
        ("save_total_limit: 0\n", "save_total_limit must be at least 1, got 0"),
        ("label_smoothing_factor: 2\n", "label_smoothing_factor must be at most 1, got 2"),
        ("lr_scheduler_type: bogus\n", "lr_scheduler_type must be one of linear, cosine, "),
        ("log_level: bogus\n", "log_level must be one of detail, debug, "),
        ("log_level_replica: bogus\n", "log_level_replica must be one of detail, debug, "),
        (
            "train_sampling_strategy: bogus\n",
            "train_sampling_strategy must be one of random, sequential, group_by_length",
        ),
        ("ddp_backend: bogus\n", "ddp_backend must be one of nccl, gloo, mpi, xccl, hccl, cncl, mccl, got 'bogus'"),
        ("dataloader_multiprocessing_context: x\n", "dataloader_multiprocessing_context must be one of fork, spawn, "),
        (
            "metric_for_best_model: accuracy\n",
            "line 1: metric_for_best_model must be one of loss, runtime, samples_per_second, steps_per_second, "
            "eval_loss, eval_runtime, eval_samples_per_second, eval_steps_per_second, got 'accuracy'",
        ),
        ("metric_for_best_model: eval_eval_loss\n", "metric_for_best_model must be one of loss, "),
        ("include_num_input_tokens_seen: bogus\n", "must be one of all, non_padding, no, got 'bogus'"),
        ("fsdp_config: {a: 1}\n", "fsdp_config sets nothing without fsdp; give fsdp too, or leave fsdp_config out"),
        ("fsdp_config: nowhere.json\n", "fsdp_config sets nothing without fsdp"),
        ("liger_kernel_config: {rope: false}\n", "liger_kernel_config sets nothing without use_liger_kernel"),
        ("dtype: int8\n", "dtype must be one of float32, bfloat16, float16, auto, got 'int8'"),
        ("debug: bogus\n", "debug: bogus is not a valid DebugOption"),
        ("accelerator_config: bogus.json\n", "accelerator_config: No such file or directory: 'bogus.json'"),
        ("parallelism_config: 3\n", "parallelism_config must be a ParallelismConfig (made in Python alone) or null"),
    ],
)
def test_mistakes_name_their_line_and_key(written, lines, said):
    with pytest.raises(UserError, match=re.escape(said)) as raised:
        written(lines)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 1000


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train_data=[a, ]x", "is not YAML"),
        ("train_data=[a, ~]", "train_data=[a, ~]: train_data has an empty entry"),
        ("train_data=-", "train_data has an empty entry"),
        ("run_name=x\nseed: 7", "run_name=x seed: 7 is not YAML"),
        ("run_name={a: 1}", "run_name must be text or null, got {'a': 1}"),
        ("lora={r: 0b_}", "lora={r: 0b_}: lora: '0b_' is no int"),
        (f"seed={'5' * 5000}", "seed must be a whole number"),
        ("seed=nan", "seed=nan: seed must be a whole number, got 'nan'"),
        ("=x", "unknown key ''"),
        (f"on_bad_row={'9' * 5000}", "on_bad_row must be error or skip, got '999"),
        (
            "resume_from_checkpoint=",
            "resume_from_checkpoint=: resume_from_checkpoint is empty text; write null for none",
        ),
        ("distill_from=", "distill_from is empty text; write null for none"),
        ("distill_from=''", "distill_from is empty text; write null for none"),
        ("tokenizer=' '", "tokenizer is empty text"),
        ("dtype=", "dtype is empty text"),
        ("lr_scheduler_type=", "lr_scheduler_type cannot be empty; leave it out for its default"),
        ("seed=", "seed cannot be empty; leave it out for its default, 42"),
        ("eval_data=", "eval_data must be a list of text or mappings or a mapping, got ''"),
    ],
)
def test_mistakes_in_overrides_name_them(written, override, said):
    with pytest.raises(UserError, match=re.escape(said)) as raised:
        written("", override)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 1000


@pytest.mark.parametrize("merged", [False, True])
def test_aliases_of_aliases_are_refused_at_once(written, merged):
    lines = ["x0: &x0 {a: 1}"]
    for level in range(1, 40):
        aliases = ", ".join([f"*x{level - 1}"] * 9)
        lines.append(f"x{level}: &x{level} " + (f"{{<<: [{aliases}]}}" if merged else f"[{aliases}]"))
    start = time.perf_counter()
    with pytest.raises(UserError, match="is too large: with its aliases written out, at most 1,000,000"):
        written("\n".join([*lines, ""]))
    assert time.perf_counter() - start < 2


@pytest.mark.parametrize("name", ["nothing.yaml", "a\0b", "x" * 300, "loop", "folder"])
def test_a_recipe_that_cannot_be_read_is_named(tmp_path, name):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match=r"^\S*" + re.escape(name[:20])):
        parse(str(tmp_path / name), [])


def test_resume_from_checkpoint_is_a_yes_or_no_too(tiny_checkpoint, tmp_path):
    (tmp_path / "text.txt").write_text("one two three four " * 99)
    recipe = {"model": str(tiny_checkpoint), "train_data": [str(tmp_path / "text.txt")], "sequence_length": 16}
    recipe |= {"output_dir": str(tmp_path / "run"), "use_cpu": True, "save_steps": 1, "report_to": "none"}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(recipe))

    def run(updates: int, resume: str) -> int:
        return train(str(tmp_path / "run.yaml"), [f"max_steps={updates}", resume]).state.global_step

    for word in ("true", "Yes"):
        with pytest.raises(
            UserError, match=r"run holds no complete checkpoint to go on from; .*=last begins at update 0"
        ):
            run(1, f"resume_from_checkpoint={word}")
    assert run(1, "resume_from_checkpoint=false") == 1
    with pytest.raises(UserError, match="run holds checkpoint-1 of an earlier run"):
        run(2, "resume_from_checkpoint=no")
    assert run(2, "resume_from_checkpoint=true") == 2


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
