"""`qsparse generate`: what is printed is what the model says, and nothing a user does at the terminal breaks it."""

import json
import shutil
from pathlib import Path

import pytest
from conftest import dense_config, make
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from qsparse_hf.cli import main
from qsparse_hf.errors import UserError
from qsparse_hf.generate import Chat, _Streamer

TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] }}:{{ m.content }};{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
)


@pytest.fixture(scope="module")
def chat_checkpoint(tmp_path_factory, tiny_checkpoint):
    folder = tmp_path_factory.mktemp("chat") / "checkpoint"
    shutil.copytree(tiny_checkpoint, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def said_by(folder, prompt, tokens=8, model=None) -> str:
    """The greedy answer, by plain Transformers."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = model or AutoModelForCausalLM.from_pretrained(folder)
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    new = model.generate(ids, max_new_tokens=tokens, do_sample=False)[0, ids.shape[1] :]
    return tokenizer.decode(new, skip_special_tokens=True)


@pytest.mark.parametrize("options", [[], ["--prepared"]], ids=["plain", "prepared"])
def test_a_prompt_is_answered_by_the_chat_template(chat_checkpoint, capsys, options):
    asked = ["generate", str(chat_checkpoint), "hello", "--max-new-tokens", "8", "--system", "brief", *options]
    assert main(asked) == 0
    printed = capsys.readouterr()
    assert printed.out == said_by(chat_checkpoint, "s:brief;u:hello;a:") + "\n"
    assert " tokens/s behind the first]" in printed.err.splitlines()[-1]


def test_a_prompt_is_continued_without_one(tiny_checkpoint, tmp_path, tiny_tokenizer, capsys):
    """By a dense model too."""
    make(dense_config("qwen2")).save_pretrained(tmp_path / "dense")
    tiny_tokenizer.save_pretrained(tmp_path / "dense")
    for folder in (tiny_checkpoint, tmp_path / "dense"):
        assert main(["generate", str(folder), "hello", "--max-new-tokens", "8"]) == 0
        assert capsys.readouterr().out == "hello" + said_by(folder, "hello") + "\n"
    assert main(["generate", str(tiny_checkpoint), "x" * 125]) == 0
    assert "[3 tokens" in capsys.readouterr().err  # the model takes 128
    with pytest.raises(UserError, match="no chat template, and so no place for a system message"):
        Chat(str(tiny_checkpoint), system="brief")
    assert Chat(str(tiny_checkpoint), prepared=True).model.is_prepared
    with pytest.raises(UserError, match="is a dense model; only Q-Sparse ones are prepared"):
        Chat(str(tmp_path / "dense"), prepared=True)


def test_words_keep_the_space_between_them(tmp_path, capsys):
    """Of a tokenizer that marks the beginning of a word, and drops that of a text."""
    words = {"<unk>": 0, **{f"▁w{number}": number for number in range(1, 128)}}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>").save_pretrained(tmp_path)
    make(dense_config("llama", eos_token_id=None)).save_pretrained(tmp_path)
    assert main(["generate", str(tmp_path), "w5 w6", "--max-new-tokens", "4"]) == 0
    assert capsys.readouterr().out == "w5 w6 " + said_by(tmp_path, "w5 w6", 4) + "\n"


def test_models_answer_prompts_beside_each_other(chat_checkpoint, tiny_checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text("hello\n\n  a|b \n")
    Path("none.txt").write_text("\n")
    models = [str(chat_checkpoint), str(tiny_checkpoint)]
    options = ["--text", "prompts.txt", "--output", "c.json", "--prompts"]
    assert main(["compare", *models, *options, "prompts.txt"]) == 0
    printed = capsys.readouterr().out
    for model, row in zip(models, json.loads(Path("c.json").read_text())["results"], strict=True):
        assert row["answers"].keys() == {"hello", "a|b"}
        for prompt, answer in row["answers"].items():
            whole = f"u:{prompt};a:" if model == models[0] else prompt
            assert answer == said_by(model, whole, 128 - len(whole))
            cell = "<br>".join(answer.strip().replace("|", "\\|").splitlines())
            assert f"| {model} | {cell} |" in printed
    assert "\n**a|b**\n" in printed
    assert main(["compare", *models, *options, "none.txt"]) == 1
    assert capsys.readouterr().err.endswith("\nqsparse: error: none.txt holds no prompt; each line is one\n")


def test_the_speed_leaves_out_what_the_first_tokens_wait_for(tiny_tokenizer):
    """The prompt, and kernels that are compiled: the other three tokens came 0.1 s after one another."""
    streamer = _Streamer(tiny_tokenizer, continues=False)
    streamer.times = [0.0, 12.0, 12.1, 12.2, 12.3]
    assert streamer.speed() == "5 tokens, 10.0 tokens/s behind the first"


def test_sampling_follows_the_seed(tiny_checkpoint):
    first, same, other = (
        Chat(str(tiny_checkpoint), temperature=2.0, seed=seed, max_new_tokens=20).answer("hello") for seed in (1, 1, 2)
    )
    assert first == same != other
    with pytest.raises(UserError, match="seed 1 is of sampling, and at a temperature of 0 nothing is drawn"):
        Chat(str(tiny_checkpoint), seed=1)


def test_a_conversation_goes_on_until_it_ends(chat_checkpoint, capsys, monkeypatch):
    """An empty line asks nothing, Ctrl-C stops an answer and keeps what came of it, what is too long is refused."""
    chat = Chat(str(chat_checkpoint), max_new_tokens=6)
    generate = chat.model.generate

    def stopped(*args, streamer, **kwargs):
        put = streamer.put

        def interrupted(value):
            if len(streamer.ids) == 3:
                raise KeyboardInterrupt
            put(value)

        streamer.put = interrupted
        return generate(*args, streamer=streamer, **kwargs)

    lines = iter(["hello", "", "again", "x" * 200])

    def read(prompt):
        line = next(lines, None)
        if line is None:
            raise EOFError
        monkeypatch.setattr(chat.model, "generate", stopped if line == "again" else generate)
        return line

    chat.talk(read)
    first = said_by(chat_checkpoint, "u:hello;a:", 6)
    second = said_by(chat_checkpoint, f"u:hello;a:{first};u:again;a:", 3)
    printed = capsys.readouterr()
    assert printed.out == f"{first}\n{second}\n"
    assert "[3 tokens" in printed.err
    assert "the conversation has 2" in printed.err
    assert "and the model takes 128" in printed.err
    assert [message["content"] for message in chat.messages] == ["hello", first, "again", second]
