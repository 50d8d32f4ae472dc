"""Fine-tuning through TRL: chat templates, completion-only loss, packing, adapters."""

import copy
import itertools
import json
import shutil
from pathlib import Path

import pytest
import torch
import trl
import yaml
from conftest import REPOSITORY, assert_close, make, sparse_config
from peft import PeftModel
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    TrainingArguments,
)

from qsparse_hf.cli import main
from qsparse_hf.errors import UserError
from qsparse_hf.training.chat import Learner
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


def marked(tokenizer: PreTrainedTokenizerBase, row: dict[str, list[int]]) -> str:
    """The tokens of a row, one after the other, what is learnt of them between [[ and ]]."""
    said, learning = "", False
    for token, label in zip(row["input_ids"], row["labels"], strict=True):
        assert label in (token, -100)
        if learning != (label != -100):
            learning = not learning
            said += "[[" if learning else "]]"
        text = tokenizer.convert_ids_to_tokens(token)
        said += text.replace("Ġ", " ").replace("Ċ", "\n").replace("▁", " ")
    return said + ("]]" if learning else "")


CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QWEN2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are helpful.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MISTRAL = (  # v0.1
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% else %}{{ message['content'] + eos_token + ' ' }}{% endif %}"
    "{% endfor %}"
)
MISTRAL_V3 = (  # its system message goes with the last question, where that is the end
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}{% set turns = messages[1:] %}"
    "{% else %}{% set turns = messages %}{% endif %}{{ bos_token }}{% for message in turns %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' }}{% if loop.last and system is defined %}{{ system + '\n\n' }}"
    "{% endif %}{{ message['content'] + '[/INST]' }}{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}"
    "{% endfor %}"
)
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set system = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}"
    "{% set turns = messages[1:] %}{% else %}{% set system = '' %}{% set turns = messages %}{% endif %}"
    "{% for message in turns %}{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + (system if loop.first else '') + message['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)
# The earlier answers' thoughts are left out, as in Qwen3's and DeepSeek's.
FORGETFUL = (
    "{% for message in messages %}{{ message['role'] + ':' }}"
    "{% if message['role'] == 'assistant' and loop.last %}{{ '<think></think>' }}{% endif %}"
    "{{ message['content'] + eos_token }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)
INSTRUCT = Path(TEMPLATE).read_text()
TRL = Path(trl.__file__).parent / "chat_templates"

TWICE = [("user", "hi"), ("assistant", "ho"), ("user", "why? ho"), ("assistant", "so, hi")]
BRIEFLY = ("system", "be brief")

LABELLED = {
    "chatml": (
        CHATML,
        [BRIEFLY, *TWICE],
        "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
        "[[ho<|im_end|>]]\n<|im_start|>user\nwhy? ho<|im_end|>\n<|im_start|>assistant\n[[so, hi<|im_end|>]]\n",
    ),
    "chatml, an answer first": (
        CHATML,
        TWICE[1:],
        "<|im_start|>assistant\n[[ho<|im_end|>]]\n<|im_start|>user\nwhy? ho<|im_end|>\n<|im_start|>assistant\n"
        "[[so, hi<|im_end|>]]\n",
    ),
    "chatml, two answers, a question last": (
        CHATML,
        [TWICE[0], TWICE[1], TWICE[1], TWICE[0]],
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n[[ho<|im_end|>]]\n<|im_start|>assistant\n"
        "[[ho<|im_end|>]]\n<|im_start|>user\nhi<|im_end|>\n",
    ),
    "chatml, no answer": (CHATML, TWICE[:1], "<|im_start|>user\nhi<|im_end|>\n"),
    "qwen2": (
        QWEN2,
        TWICE,
        "<|im_start|>system\nYou are helpful.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
        "[[ho<|im_end|>]]\n<|im_start|>user\nwhy? ho<|im_end|>\n<|im_start|>assistant\n[[so, hi<|im_end|>]]\n",
    ),
    "qwen2, system": (
        QWEN2,
        [BRIEFLY, *TWICE[:2]],
        "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
        "[[ho<|im_end|>]]\n",
    ),
    "qwen2.5, which TRL knows": (
        (TRL / "qwen2_5.jinja").read_text(),
        [BRIEFLY, *TWICE],
        "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
        "[[ho<|im_end|>]]\n<|im_start|>user\nwhy? ho<|im_end|>\n<|im_start|>assistant\n[[so, hi<|im_end|>]]\n",
    ),
    "qwen3, in TRL's variant": (
        (TRL / "qwen3.jinja").read_text(),
        TWICE,
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n[[<think>\n\n</think>\n\nho<|im_end|>\n]]"
        "<|im_start|>user\nwhy? ho<|im_end|>\n<|im_start|>assistant\n"
        "[[<think>\n\n</think>\n\nso, hi<|im_end|>\n]]",
    ),
    "phi-3, in TRL's variant": (
        (TRL / "phi3.jinja").read_text(),
        [BRIEFLY, *TWICE],
        "<|system|>\nbe brief<|end|>\n<|user|>\nhi<|end|>\n<|assistant|>\n[[ho<|end|>\n]]<|user|>\nwhy? ho<|end|>\n"
        "<|assistant|>\n[[so, hi<|end|>\n<end>]]",
    ),
    "gemma": (
        (TRL / "gemma.jinja").read_text(),
        TWICE,
        "<start><start_of_turn>user\nhi<end_of_turn>\n<start_of_turn>model\n[[ho<end_of_turn>]]\n<start_of_turn>user\n"
        "why? ho<end_of_turn>\n<start_of_turn>model\n[[so, hi<end_of_turn>]]\n",
    ),
    "mistral": (
        MISTRAL,
        TWICE,
        "<start>[INST] hi [/INST][[ho<end>]] [INST] why? ho [/INST][[so, hi<end>]] ",
    ),
    "mistral v0.3": (
        MISTRAL_V3,
        TWICE,
        "<start>[INST] hi[/INST][[ ho<end>]][INST] why? ho[/INST][[ so, hi<end>]]",
    ),
    "llama 2": (
        LLAMA2,
        [BRIEFLY, *TWICE],
        "<start>[INST] <<SYS>>\nbe brief\n<</SYS>>\n\nhi [/INST][[ ho <end>]]<start>[INST] why? ho [/INST]"
        "[[ so, hi <end>]]",
    ),
    "configs/chat": (
        INSTRUCT,
        [BRIEFLY, *TWICE],
        "### System:\nbe brief\n\n### User:\nhi\n\n### Assistant:\n[[ho<end>]]\n\n### User:\nwhy? ho\n\n"
        "### Assistant:\n[[so, hi<end>]]",
    ),
    "configs/chat, no answer": (INSTRUCT, TWICE[:1], "### User:\nhi\n\n"),
}
SPECIALS = ["<|im_start|>", "<|im_end|>", "<|end|>", "<end_of_turn>"]


def with_template(tokenizer: PreTrainedTokenizerBase, template: str | None) -> PreTrainedTokenizerBase:
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_special_tokens({"bos_token": "<start>", "extra_special_tokens": SPECIALS})
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("case", LABELLED)
def test_labels_by_hand(tiny_tokenizer, case):
    """Token by token, every character being one; specials are one too."""
    template, said, expected = LABELLED[case]
    tokenizer = with_template(tiny_tokenizer, template)
    messages = [{"role": role, "content": content} for role, content in said]
    row = Learner.of_conversations(tokenizer, everything=False, turns=2).conversation(messages)
    assert marked(tokenizer, row) == expected
    if "variant" not in case:  # the model's own template, exactly
        assert row["input_ids"] == tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]
        whole = Learner.of_conversations(tokenizer, everything=True, turns=2).conversation(messages)
        assert whole["labels"] == whole["input_ids"] == row["input_ids"]


def test_labels_where_tokens_are_words_with_their_space(tmp_path):
    """As in Llama's and Mistral's: a space belongs to the token after it, and the text's first one is made up."""
    pieces = ["[INST]", "[/INST]", "▁[INST]", "▁[/INST]", "▁hi", "▁ho", "hi", "ho", "▁why", "?", "▁so", ",", "so", "▁"]
    vocabulary = {token: index for index, token in enumerate(["<unk>", "<start>", "<end>", *pieces])}
    model = models.Unigram([(token, -float(len(vocabulary) - len(token))) for token in vocabulary], unk_id=0)
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<start>", eos_token="<end>")
    messages = [{"role": role, "content": content} for role, content in TWICE]
    for template, expected in (
        (MISTRAL, "<start>[INST] hi [/INST][[ho<end>]] [INST] why? ho [/INST][[so, hi<end>]] "),
        (MISTRAL_V3, "<start>[INST] hi[/INST][[ ho<end>]][INST] why? ho[/INST][[ so, hi<end>]]"),
    ):
        tokenizer.chat_template = template
        row = Learner.of_conversations(tokenizer, everything=False, turns=2).conversation(messages)
        assert marked(tokenizer, row) == expected


@pytest.mark.parametrize(
    "file", [f for f in sorted(TRL.glob("*.jinja")) if "_training" not in f.name], ids=lambda f: f.stem
)
def test_every_template_that_trl_knows(tiny_tokenizer, file):
    """The answers are learnt, the questions are not; or the template is refused."""
    tokenizer = with_template(tiny_tokenizer, file.read_text())
    messages = [{"role": role, "content": content} for role, content in (("user", "QA"), ("assistant", "AA"))]
    messages += [{"role": role, "content": content} for role, content in (("user", "QB"), ("assistant", "AB"))]
    if file.stem in ("idefics3", "llava_next", "smolvlm"):  # want images
        with pytest.raises(UserError, match=r"the chat template (leaves out|refuses)"):
            Learner.of_conversations(tokenizer, everything=False, turns=2)
        return
    said = marked(tokenizer, Learner.of_conversations(tokenizer, everything=False, turns=2).conversation(messages))
    learnt = [piece.split("]]")[0] for piece in said.split("[[")[1:]]
    assert len(learnt) == 2
    for piece, answer in zip(learnt, ("AA", "AB"), strict=True):
        assert answer in piece
        assert "Q" not in piece


def test_without_a_template_prompts_stay_plain_text(tmp_path, tiny_tokenizer):
    (tmp_path / "a.jsonl").write_text(
        '{"s": "be brief", "q": "why?", "a": "so"}\n{"s": "", "q": "how?", "a": "thus"}\n'
    )

    def rows(columns: dict, **options) -> list[str]:
        data = DataArguments(train_data=[json.dumps({"files": str(tmp_path / "a.jsonl"), "columns": columns})])
        arguments = QSparseSFTConfig(tmp_path, use_cpu=True, **options)
        return [marked(tokenizer, row) for row in read_examples(data.train_sources, tokenizer, data, arguments)]

    ends = TemplateProcessing("$A <end>", special_tokens=[("<end>", 2)])
    for processor in (None, ends):  # a tokenizer that adds the end token: one is enough
        tokenizer = copy.deepcopy(tiny_tokenizer)
        if processor:
            tokenizer.backend_tokenizer.post_processor = processor
        pairs = {"system": "s", "prompt": "q", "completion": "a"}
        assert rows(pairs) == ["be brief\nwhy?[[so<end>]]", "how?[[thus<end>]]"]
        assert rows(pairs, completion_only_loss=False) == ["[[be brief\nwhy?so<end>]]", "[[how?thus<end>]]"]
        assert rows({"text": "a"}) == ["[[so<end>]]", "[[thus<end>]]"]


def with_messages(run_config: Path, folder: Path, conversations: list[list[tuple[str, str]]], **values) -> str:
    """A recipe of conversations, without a template of its own."""
    rows = [{"messages": [{"role": role, "content": content} for role, content in said]} for said in conversations]
    (folder / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = yaml.safe_load(run_config.read_text())
    del recipe["chat_template_path"]
    recipe["train_data"] = [{"files": str(folder / "chat.jsonl"), "columns": {"messages": "messages"}}]
    recipe |= {"max_steps": 1, "repeat_data": True, "output_dir": str(folder / "out"), "save_strategy": "no"} | values
    (folder / "chat.yaml").write_text(yaml.safe_dump(recipe))
    return str(folder / "chat.yaml")


@pytest.fixture(scope="module")
def chat_checkpoint(tmp_path_factory, tiny_checkpoint, tiny_tokenizer):
    """The tiny checkpoint with another chat template."""

    def make_checkpoint(template: str) -> str:
        folder = tmp_path_factory.mktemp("chat") / "checkpoint"
        shutil.copytree(tiny_checkpoint, folder)
        with_template(tiny_tokenizer, template).save_pretrained(folder)
        return str(folder)

    return make_checkpoint


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("own", [{}, {"assistant_only_loss": True, "dataset_num_proc": 2}])
def test_answers_alone_are_learnt_of_messages(run_config, tmp_path, chat_checkpoint, packing, own):
    """With the model's own ChatML, which marks nothing, by default as when asked for."""
    recipe = with_messages(
        run_config, tmp_path, [[BRIEFLY, *TWICE]] * 8, model=chat_checkpoint(CHATML), packing=packing, **own
    )
    trainer = train(recipe)
    batch = first_batch(trainer)
    tokenizer = trainer.processing_class
    rows = [
        {name: batch[name][index].tolist() for name in ("input_ids", "labels")} for index in range(len(batch["labels"]))
    ]
    expected = LABELLED["chatml"][2]
    for row in rows:
        said = marked(tokenizer, row).replace("<pad>", "")
        assert said == expected * said.count("be brief")
    assert sum(marked(tokenizer, row).count("be brief") for row in rows) >= 2
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == CHATML


def test_whole_conversations_are_learnt_when_asked_for(run_config, tmp_path, chat_checkpoint):
    recipe = with_messages(
        run_config, tmp_path, [TWICE] * 8, model=chat_checkpoint(FORGETFUL), packing=False, assistant_only_loss=False
    )
    trainer = train(recipe)
    batch = first_batch(trainer)
    assert marked(trainer.processing_class, {n: batch[n][0].tolist() for n in ("input_ids", "labels")}) == (
        "[[user:hi<end>assistant:ho<end>user:why? ho<end>assistant:<think></think>so, hi<end>]]"
    )


def test_a_template_that_does_not_tell_answers_names_the_ways_out(run_config, tmp_path, chat_checkpoint, capsys):
    recipe = with_messages(run_config, tmp_path, [TWICE] * 8, model=chat_checkpoint(FORGETFUL))
    assert main(["train", recipe]) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("qsparse: error: the chat template renders earlier turns otherwise once")
    for way_out in ("chat_template_path", "{% generation %}", "assistant_only_loss: false"):
        assert way_out in said
    assert not (tmp_path / "out").exists()


def test_conversations_that_the_template_refuses_are_named_or_counted(run_config, tmp_path, chat_checkpoint, caplog):
    """One turn twice in Mistral's first template; a system message that its third one would lose."""
    for template, bad, reason in (
        (MISTRAL, [TWICE[0], TWICE[0]], "the chat template refuses it: roles must alternate"),
        (MISTRAL_V3, [BRIEFLY, *TWICE], "the chat template renders earlier turns otherwise"),
    ):
        conversations = [TWICE, TWICE[:2], bad, TWICE, bad, TWICE[:2]]
        options = {"model": chat_checkpoint(template), "packing": False}
        recipe = with_messages(run_config, tmp_path, conversations, **options)
        with pytest.raises(UserError, match=rf"chat.jsonl:3: {reason}.*on_bad_row: skip"):
            train(recipe)
        assert not (tmp_path / "out").exists()
        recipe = with_messages(run_config, tmp_path, conversations, on_bad_row="skip", **options)
        caplog.clear()
        trainer = train(recipe)
        assert f"skipped 2 of 6 rows; the first: {tmp_path / 'chat.jsonl'}:3: {reason}" in caplog.text
        assert len(trainer.train_dataset) == 4
        shutil.rmtree(tmp_path / "out")


def test_unpadded_rows_are_each_on_their_own(run_config, tmp_path):
    """Laid end to end without padding: the loss of every example alone, cut at sequence_length like the others."""
    options = ["packing=false", "padding_free=true", "save_strategy=no", "sequence_length=70", "learning_rate=1e-12"]
    trainer = train(str(run_config), [f"output_dir={tmp_path / 'free'}", *options])
    batch = first_batch(trainer)
    assert batch["input_ids"].shape[0] == 1
    assert "attention_mask" not in batch
    assert (batch["position_ids"] == 0).sum() == trainer.args.per_device_train_batch_size == 2
    rows = trainer.train_dataset[:]
    assert max(map(len, rows["input_ids"])) == 70
    padded = train(str(run_config), [f"output_dir={tmp_path / 'padded'}", *options, "padding_free=false"])
    assert rows == padded.train_dataset[:]

    def losses(trainer) -> list[float]:
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    assert losses(trainer) == pytest.approx(losses(padded), rel=1e-5)
    model = trainer.model.eval()
    free = {name: batch[name] for name in ("input_ids", "position_ids")}
    together = model(**free, use_cache=False).logits[0]
    starts = [*(batch["position_ids"][0] == 0).nonzero().flatten().tolist(), together.shape[0]]
    for start, end in itertools.pairwise(starts):
        assert_close(together[start:end], model(batch["input_ids"][:, start:end], use_cache=False).logits[0])


def test_conversations_keep_their_turns(run_config, tmp_path):
    turns = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}] * 2
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"chat": turns}) + "\n" for _ in range(20)))
    source = {"files": str(tmp_path / "a.jsonl"), "columns": {"messages": "chat"}}
    options = [f"train_data=[{json.dumps(source)}]", f"output_dir={tmp_path / 'out'}", "repeat_data=true"]
    trainer = train(str(run_config), [*options, "max_steps=1"])
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
        (["eos_token=<|nowhere|>"], r"eos_token '<\|nowhere\|>' is no token of"),
        (["train_data=[{files: F, columns: {text: q}}]", "assistant_only_loss=true"], "conversations, got plain text"),
        (["train_data=[{files: F, columns: {text: q}}]", "completion_only_loss=true"], "for columns prompt and compl"),
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

    monkeypatch.setitem(sys.modules, "trl", None)
    monkeypatch.delitem(sys.modules, "qsparse_hf.training.sft")
    assert main(["train", str(run_config), "output_dir=x"]) == 1
    assert 'stage sft needs TRL, pip install "qsparse-hf[sft]" brings it' in capsys.readouterr().err
