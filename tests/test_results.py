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
    found = read_results(file(held(tmp_path)), tmp_path)
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
    assert found.conversation() == (
        "**What is the capital \\| of France?**\n\nthis model:\n\n> Lyon,\n> or\n> not\n\ndense:\n\n> Paris.\n"
    )


def test_code_in_an_answer_stays_code_and_html_does_not(file, tmp_path):
    answer = "## Like <this>:\n```python\nif a < b:\n    pass"  # cut off inside
    found = read_results(file([held(tmp_path, answer=answer)]), tmp_path)
    quotation = "> ## Like &lt;this>:\n> ```python\n> if a < b:\n>     pass\n"
    assert found.conversation().endswith(f"this model:\n\n{quotation}")


def test_figures_are_matched_by_what_they_are_and_models_by_where(file, tmp_path):
    other, third = held(tmp_path / "a" / "dense"), held(tmp_path / "b" / "dense", 30.0)
    other["texts"] = {"more": {"perplexity": 1.0, "tokens": 5}, "wiki": {"perplexity": 19.0, "tokens": 50000}}
    third["texts"]["wiki"]["tokens"] = 7
    del third["answers"]
    found = read_results(file([other, held("elsewhere/sparse"), third]), tmp_path / "sparse")
    assert found.table().splitlines()[0] == "| task | metric | this model | a/dense | b/dense |"
    assert found.table().splitlines()[2] == "| wiki | perplexity (50,000 tokens) | 21.4322 | 19.0 | – |"  # noqa: RUF001
    assert [*found.answers["What is the capital | of France?"]] == ["this model", "a/dense"]


@pytest.mark.parametrize("wrong", [[], {"a": 1}, {"model": "x"}, [{"model": "x"}], [{}], 3, {"model": "a\0b"}, "x"])
def test_what_is_no_result_is_refused(file, tmp_path, wrong):
    with pytest.raises(UserError, match="no results"):
        read_results(file(wrong), tmp_path)


def test_another_models_results_and_no_numbers_are_refused(file, tmp_path):
    with pytest.raises(UserError, match=r"has no results of .*sparse, but of a, b$"):
        read_results(file([held("a"), held("b")]), tmp_path / "sparse")
    with pytest.raises(UserError, match=r"has no results of .*sparse, but of a$"):
        read_results(file(held("a")), tmp_path / "sparse")
    with pytest.raises(UserError, match="no results"):
        read_results(file(held(tmp_path) | {"texts": {"wiki": {"perplexity": 1.0, "tokens": "5"}}}), tmp_path)
    with pytest.raises(UserError, match=r"perplexity \(50,000 tokens\) on wiki is inf"):  # which metadata cannot hold
        read_results(file(held(tmp_path, perplexity=math.inf)), tmp_path)


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
    weights = (sparse / "model.safetensors").read_bytes()
    for read in (sparse / "model.safetensors", tmp_path / "results.json"):
        with pytest.raises(UserError, match="which is read"):
            push_folder(sparse, "me/model", results=str(file([held(sparse)])), card=str(read), dry_run=True)
    assert (sparse / "model.safetensors").read_bytes() == weights
    with pytest.raises(UserError, match="has no results of"):
        push_folder(sparse, "me/model", results=str(file([held("a")])))
    (sparse / "README.md").write_text("# Mine\n")
    with pytest.raises(UserError, match="was written or changed by a person"):
        push_folder(sparse, "me/model", results=str(file(held(sparse))))
    (sparse / "README.md").unlink()
    with pytest.raises(UserError, match=r"holds no README.md"):
        push_folder(sparse, "me/model", card=str(tmp_path / "card.md"))
