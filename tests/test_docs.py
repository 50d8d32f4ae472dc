"""The README and the pages: what they tell a reader to type is typed, in their order, on what the quickstart leaves.

Every line of a block without a language is a command. One that stands in no table below runs as it is written, so a new
command either works here or is put into a table, with its reason.
"""

import ast
import glob
import io
import json
import re
import runpy
import shlex
import sys
from argparse import ArgumentParser
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml
from conftest import REPOSITORY, dense_config, make
from test_gguf_file import write

from qsparse_hf.cli import build_parser, main
from qsparse_hf.training.recipe import parse

MAKEFILE, PROJECT, CONF = ((REPOSITORY / name).read_text() for name in ("Makefile", "pyproject.toml", "docs/conf.py"))
PAGES = ["README.md", *(f"{page}.md" for page in re.findall(r"^docs/\w+$", CONF, re.MULTILINE))]

# Run with more words than are written, for the sake of time; what a command says itself stays.
SMALLER = {
    "qsparse train configs/train/continue_tiny_ternary.yaml": "max_steps=2 sparsity_ramp_steps=1 "
    "quantization_ramp_steps=1 logging_steps=1 eval_steps=2 save_steps=2 use_cpu=true",
    "qsparse train": "max_steps=2 sparsity_ramp_steps=1 logging_steps=1 eval_steps=2 save_steps=2 use_cpu=true",
    "qsparse calibrate": "--tokens 6144",
    "qsparse eval runs/trained --tasks": "",
    "qsparse eval": "--tokens 1000",
    "qsparse compare": "--tokens 1000",
    "qsparse report": "--tokens 500",
    "qsparse generate": "--max-new-tokens 8",
    "qsparse bench": "--rounds 1 --new-tokens 8",
    "python benchmarks/rounding.py": "--windows 1 --step-windows 1 --window 64",
}
# Words that name what is not here, and what takes their place.
STAND_INS = {
    "llama-2-7b": "runs/half",  # 27 GB, dense and sparse
    "1b": "runs/half",  # minutes on a CPU
    "paper": "other_task.yaml",  # lm-evaluation-harness takes its tasks' questions from the Hub
    "arc_challenge:25": "other_task.yaml",
    "hellaswag": "other_task.yaml",
}
# Commands that another one does.
DONE_BY = {"make quickstart": "qsparse quickstart --output quickstart"}
# By their beginning: who else runs them.
NOT_RUN = {
    "make test": "it runs this",
    "torchrun --nproc_per_node 2": "tests/test_distributed.py starts processes so",
    "accelerate launch": "eight GPUs; tests/test_distributed.py has two processes with the same settings",
    "vllm serve": "it has an environment of its own; tests/test_vllm.py starts it there",
    "curl": "tests/test_serving.py and tests/test_vllm.py send such a request",
    "python -m qsparse_hf.serving": "it serves until it is stopped; tests/test_serving.py starts it",
}

# Options that a page names of other programs: vLLM's, and Transformers' server's.
OTHERS = {"--trust-remote-code", "--tensor-parallel-size", "--cb-num-blocks"}


class Block(NamedTuple):
    """What stands between two fences of a page, and where."""

    page: str
    line: int
    language: str
    text: str


def blocks(page: str) -> list[Block]:
    text = (REPOSITORY / page).read_text()
    found = re.finditer(r"^```(\S*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [Block(page, text[: each.start()].count("\n") + 2, each[1], each[2]) for each in found]


def commands(block: Block) -> list[str]:
    lines = block.text.replace("\\\n", " ").splitlines()
    return [line for line in lines if line.strip() and not line.startswith("#")]


def beginning(command: str, table: dict[str, str]) -> str | None:
    return next((key for key in table if command == key or command.startswith(f"{key} ")), None)


def words(command: str) -> list[str]:
    """As a shell gives them to the program, with `SMALLER` and `STAND_INS`."""
    command = DONE_BY.get(command, command)
    found = []
    for word in shlex.split(command, comments=True):
        found += sorted(glob.glob(word)) if "*" in word else [STAND_INS.get(word, word)]
    if key := beginning(command, SMALLER):
        said = command.replace("=", " ").split()
        more = re.split(r" (?=--|\w+=)", SMALLER[key])
        found += [word for option in more if re.split("[ =]", option)[0] not in said for word in option.split()]
    return found


def run(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run it in this process: it must not fail."""
    program, *arguments = words(command)
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\n"))
    if program == "qsparse":
        assert main(arguments) == 0
        return
    if program == "lm_eval":
        arguments = ["-c", "from lm_eval.__main__ import cli_evaluate; cli_evaluate()", *arguments]
    else:
        assert program == "python", f"{program} is no program that is run here"
    code = None
    try:
        if arguments[0] == "-c":
            monkeypatch.setattr(sys, "argv", ["-c", *arguments[2:]])
            exec(arguments[1], {"__name__": "__main__"})
        else:
            monkeypatch.setattr(sys, "argv", arguments)
            runpy.run_path(arguments[0], run_name="__main__")
    except SystemExit as end:
        code = end.code
    assert not code


def write_task(name: str) -> None:
    """A task for lm-evaluation-harness, of two questions."""
    rows = [{"q": "cats", "a": "purr", "b": "purrs", "label": 0}, {"q": "a cat", "a": "purr", "b": "purrs", "label": 1}]
    Path(f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = {"task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": f"{name}.jsonl"}}}
    task |= {"output_type": "multiple_choice", "test_split": "test", "metric_list": [{"metric": "acc"}]}
    task |= {"doc_to_text": "{{q}}", "doc_to_choice": "{{[a, b]}}", "doc_to_target": "label"}
    Path(f"{name}.yaml").write_text(yaml.safe_dump(task))


@pytest.fixture
def here(tmp_path, monkeypatch, small_quickstart) -> Path:
    """The repository's folder as a reader has it, before `make quickstart`."""
    for name in ("README.md", "docs", "configs", "benchmarks", "scripts"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "my-model.gguf", make(dense_config("llama")))
    write_task("my_task")
    write_task("other_task")
    return tmp_path


def test_every_command_and_example_runs(here, monkeypatch, subtests):
    pytest.importorskip("lm_eval")
    pytest.importorskip("trl")
    assert "qsparse quickstart --output quickstart" in MAKEFILE
    done = set()  # a page may say again what another said
    for page in PAGES:
        names: dict = {}
        for block in blocks(page):
            where = f"{page}:{block.line}"
            if block.language == "python":
                with subtests.test("Python", where=where):
                    exec(compile(block.text, where, "exec"), names)
            elif not block.language:
                for command in commands(block):
                    if command not in done and not beginning(command, NOT_RUN):
                        with subtests.test(command, where=where):
                            run(command, monkeypatch)
                    done.add(command)


def test_every_recipe_is_one(tmp_path):
    """What a page shows of a recipe, in a recipe that is otherwise whole."""
    shown = [block for page in PAGES for block in blocks(page) if block.language == "yaml"]
    assert shown
    for block in shown:
        whole = {"model": "dense", "output_dir": "runs/x", "train_data": ["a.txt"]} | yaml.safe_load(block.text)
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(whole))
        parse(str(tmp_path / "recipe.yaml"), [])


def test_the_languages_of_blocks_are_known():
    found = {block.language for page in PAGES for block in blocks(page)}
    assert found <= {"", "python", "yaml", "text", "{eval-rst}"}


def test_the_tables_hold_nothing_that_no_page_says():
    said = [command for page in PAGES for block in blocks(page) if not block.language for command in commands(block)]
    for table in (SMALLER, DONE_BY, NOT_RUN):
        assert table.keys() == {key for command in said if (key := beginning(command, table))} - {None}
    assert STAND_INS.keys() <= {word for command in said for word in command.split()}


def test_the_messages_are_the_packages():
    """Each is a part of a string in its source, where "…" stands for what is put in."""
    said = set()
    for file in (REPOSITORY / "qsparse_hf").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            parts = node.values if isinstance(node, ast.JoinedStr) else [node]
            said.add("".join(part.value if isinstance(getattr(part, "value", 0), str) else "…" for part in parts))
    messages = re.findall("^> (.*)", (REPOSITORY / "docs" / "troubleshooting.md").read_text(), re.MULTILINE)
    assert [message for message in messages if not any(message.strip("… ") in text for text in said)] == []


def options(parser: ArgumentParser) -> dict[str, set[str]]:
    """Each verb's."""
    verbs = next(action.choices for action in parser._actions if isinstance(action.choices, dict))
    return {name: {*verb._option_string_actions} for name, verb in verbs.items()}


def test_what_the_text_names_is_there():
    """Verbs and options of the command, targets of the Makefile, extras of the package."""
    known = options(build_parser())
    every = set().union(*known.values())
    for page in PAGES:
        text = re.sub(r"^```.*?^```$", "", (REPOSITORY / page).read_text(), flags=re.MULTILINE | re.DOTALL)
        for span in re.findall(r"`([^`]+)`", text):
            first, _, rest = span.partition(" ")
            if first == "qsparse" and rest:
                assert rest.split()[0] in known, f"{page}: {span}"
                assert {word for word in rest.split() if word.startswith("--")} <= known[rest.split()[0]], span
            elif first.startswith("--"):
                assert first in every | OTHERS, f"{page}: {span}"
            elif first == "make":
                assert re.search(rf"^(?:[\w-]+ )*{rest}\b.*:", MAKEFILE, re.MULTILINE), f"{page}: {span}"
            for extra in re.findall(r'"\.\[(\w+)\]"', span):
                assert re.search(rf"^{extra} = ", PROJECT, re.MULTILINE), f"{page}: {span}"
