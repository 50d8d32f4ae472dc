"""What was measured, in a card: files of `qsparse eval`, `qsparse compare` and lm-evaluation-harness."""

import json
import math
import shutil

import pytest
from conftest import make, sparse_config
from hub_server import complaints

from qsparse_hf.cli import main
from qsparse_hf.errors import UserError
from qsparse_hf.hub import push_folder
from qsparse_hf.model_card import is_ours, write_card
from qsparse_hf.results import read_results


def held(model: object = "x", perplexity: float = 21.43219, answer: str = "Paris.") -> dict:
    return {
        "model": str(model),
        "texts": {"wiki": {"perplexity": perplexity, "tokens": 50000}},
        "pairs": {"blimp": {"accuracy": 0.79, "pairs": 1200}},
        "tasks": {"arc_easy": {"metric": "acc_norm", "score": 0.5, "shots": 25}},
        "answers": {"What is the capital | of France?": answer},
    }


@pytest.fixture
def file(tmp_path):
    def write(results: object):
        (tmp_path / "results.json").write_text(json.dumps({"machine": {}, "results": results}))
        return tmp_path / "results.json"

    return write


def test_figures_of_eval(file, tmp_path):
    found = read_results(file(held()), tmp_path)
    assert [(each.dataset_name, each.metric_name, each.metric_value) for each in found.figures] == [
        ("wiki", "perplexity (50,000 tokens)", 21.4322),
        ("blimp", "accuracy (1,200 pairs)", 0.79),
        ("arc_easy", "acc_norm (25 shots)", 0.5),
    ]
    assert "| wiki | perplexity (50,000 tokens) | 21.4322 |\n" in found.table()


def test_figures_and_answers_of_compare(file, tmp_path):
    rows = [held(tmp_path / "dense", 19.5), held(tmp_path / "sparse", answer="Lyon,\nor\nnot")]
    found = read_results(file(rows), tmp_path / "sparse")
    assert found.table().splitlines()[:3] == [
        "| task | metric | this model | dense |",
        "| --- | --- | --- | --- |",
        "| wiki | perplexity (50,000 tokens) | 21.4322 | 19.5 |",
    ]
    assert found.conversation().splitlines() == [
        "**What is the capital \\| of France?**",
        "",
        "| model | answer |",
        "| --- | --- |",
        "| this model | Lyon,<br>or<br>not |",
        "| dense | Paris. |",
    ]


@pytest.mark.parametrize("wrong", [[], {"a": 1}, {"model": "x"}, [{"model": "x"}], [{}], 3])
def test_what_is_no_result_is_refused(file, tmp_path, wrong):
    with pytest.raises(UserError, match="no results"):
        read_results(file(wrong), tmp_path)


def test_another_models_results_and_no_numbers_are_refused(file, tmp_path):
    with pytest.raises(UserError, match=r"has no results of .*sparse, but of a, b$"):
        read_results(file([held("a"), held("b")]), tmp_path / "sparse")
    with pytest.raises(UserError, match=r"perplexity \(50,000 tokens\) on wiki is inf"):  # which metadata cannot hold
        read_results(file(held(perplexity=math.inf)), tmp_path)


@pytest.fixture
def sparse(tiny_checkpoint, tmp_path):
    folder = tmp_path / "sparse"
    shutil.copytree(tiny_checkpoint, folder)
    write_card(folder, make(sparse_config("llama")), None)
    return folder


def test_compare_fills_the_card_that_push_sends(sparse, tmp_path):
    (tmp_path / "text.txt").write_text("a few words to measure on " * 20)
    (tmp_path / "prompts.txt").write_text("Hello?\nWho?\n")
    measured, card = str(tmp_path / "it.json"), tmp_path / "cards" / "card.md"
    ask = ["--text", f"words={tmp_path / 'text.txt'}", "--prompts", str(tmp_path / "prompts.txt")]
    assert main(["compare", str(sparse), *ask, "--output", measured]) == 0
    assert main(["push", str(sparse), "me/model", "--results", measured, "--dry-run", "--card", str(card)]) == 0
    text = card.read_text()
    assert is_ours(text)
    assert not complaints(text)
    assert "| words | perplexity (" in text
    assert text.index("### Answers") < text.index("**Hello?**") < text.index("**Who?**") < text.index("## Limits")
    assert text.count("## Limits") == 1
    assert (sparse / "README.md").read_text() != text


def test_results_and_cards_that_cannot_be_are_told_before_anything_is_sent(sparse, file, tmp_path):
    with pytest.raises(UserError, match="cannot be written"):
        push_folder(sparse, "me/model", card=str(tmp_path), dry_run=True)
    with pytest.raises(UserError, match="has no results of"):
        push_folder(sparse, "me/model", results=str(file([held("a")])))
    (sparse / "README.md").write_text("# Mine\n")
    with pytest.raises(UserError, match="was written or changed by a person"):
        push_folder(sparse, "me/model", results=str(file(held())))
    (sparse / "README.md").unlink()
    with pytest.raises(UserError, match=r"holds no README.md"):
        push_folder(sparse, "me/model", card=str(tmp_path / "card.md"))
