"""Loss, pairs and tasks against loops that are written out, and the two commands on real files."""

import copy
import gzip
import json
import math
import shutil
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch
from conftest import dense_config, make, sparse_config
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, PreTrainedTokenizerFast

from qsparse_hf.cli import main
from qsparse_hf.errors import UserError
from qsparse_hf.evaluation import Protocol, evaluate_pairs, evaluate_perplexity
from qsparse_hf.tasks import find_tasks

TEXT = "the quick brown fox jumps over the lazy dog. " * 3


@torch.no_grad()
def loss_by_hand(model, documents, window: int, stride: int, bos: int | None = None) -> float:
    """Every token by a forward of its own, over just what it may see."""
    losses = []
    for ids in documents:
        ids = ([] if bos is None else [bos]) + list(ids)
        for place in range(1, len(ids)):
            start = 0 if place <= window else stride * math.ceil((place - window) / stride)
            context = ids[start:place]
            assert start == 0 or window - stride <= len(context) <= window
            if bos is not None:
                context = [bos, *context[1:]]
            logits = model(input_ids=torch.tensor([context])).logits[0, -1]
            losses.append(-logits.double().log_softmax(0)[ids[place]].item())
    return sum(losses) / len(losses)


@pytest.mark.parametrize(("window", "stride", "bos"), [(8, None, None), (8, 3, None), (8, 3, True), (40, None, True)])
def test_agrees_with_a_loop_over_single_tokens(family, window, stride, bos, tiny_tokenizer):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.bos_token = "<start>"
    model = make(sparse_config(family, sparsity=0.4))
    documents = [torch.randint(3, 128, (length,)).tolist() for length in (1, 21, 5, 9)]
    found = evaluate_perplexity(model, documents, tokenizer, Protocol(window, stride, bos), batch_size=2)
    assert found.tokens == 32 + (4 if bos else 0)
    assert found.loss == pytest.approx(
        loss_by_hand(model, documents, window, stride or window, 1 if bos else None), abs=1e-4
    )
    assert found.perplexity == pytest.approx(math.exp(found.loss))
    assert found.sparsity.overall == pytest.approx(0.4, abs=0.01)
    assert stride or found.sparsity.tokens == found.tokens  # no padding
    assert found.bits_per_byte is None


def test_a_prepared_model_in_training_is_left_as_it_was(tokens):
    model = make(sparse_config("llama"))
    expected = evaluate_perplexity(model, tokens).loss
    model.prepare_for_decode()
    model.train()
    assert evaluate_perplexity(model, tokens).loss == pytest.approx(expected, abs=1e-6)
    assert model.training
    assert model.is_prepared


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gpu_measures_the_same(family, dtype):
    model = make(sparse_config(family), dtype=dtype)
    documents = [torch.randint(3, 128, (length,)).tolist() for length in (40, 21, 100)]
    expected = evaluate_perplexity(model, documents, protocol=Protocol(16, 12))
    found = evaluate_perplexity(model.cuda(), documents, protocol=Protocol(16, 12))
    assert found.loss == pytest.approx(expected.loss, rel=0.02)  # a top-K amplifies rounding
    assert found.sparsity.overall == expected.sparsity.overall


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_model_that_predicts_nan_has_no_figures(dtype, tokens, tiny_tokenizer):
    model = make(sparse_config("llama"), dtype=dtype)
    if dtype == torch.float32:
        model.model.layers[1].mlp.down_proj.weight.data[0, 0] = torch.nan
    else:
        model.model.embed_tokens.weight.data.fill_(6e4)  # finite, and its logits are not
        model.lm_head.weight.data.fill_(6e4)
    said = f"predicts NaN in {str(dtype).removeprefix('torch.')}"
    with pytest.raises(UserError, match=said):
        evaluate_perplexity(model, tokens)
    with pytest.raises(UserError, match=said):
        evaluate_pairs(model, [("one", "a dog", "dog a")], tiny_tokenizer)


def test_other_families_have_a_loss_and_no_sparsity(tokens):
    model = AutoModelForCausalLM.from_config(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=128)).eval()
    found = evaluate_perplexity(model, tokens)
    assert found.loss == pytest.approx(math.log(128), abs=0.5)
    assert found.sparsity is None


def test_texts_count_their_bytes_and_join_and_stop(tiny_tokenizer):
    model = make(dense_config("llama"))
    texts = ["abc de", "fgh"]
    apart = evaluate_perplexity(model, texts, tiny_tokenizer)
    assert (apart.tokens, apart.bytes, apart.documents) == (
        5 + 2,
        5 + 2,
        2,
    )  # a token is a byte; a first one has no loss
    assert apart.bits_per_byte == pytest.approx(apart.loss / math.log(2))
    joined = evaluate_perplexity(model, texts, tiny_tokenizer, Protocol(joined=True))
    one = evaluate_perplexity(model, ["abc de\n\nfgh"], tiny_tokenizer)
    assert (joined.tokens, joined.documents, joined.loss) == (10, 1, one.loss)
    few = evaluate_perplexity(model, iter([*texts, 1 / 1]), tiny_tokenizer, Protocol(tokens=6))
    assert (few.tokens, few.bytes) == (6, 6)
    assert few.loss == pytest.approx(evaluate_perplexity(model, ["abc de", "fg"], tiny_tokenizer).loss)


def test_letters_of_several_bytes_and_tokens():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: index for index, letter in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model = make(dense_config("llama", vocab_size=256))
    found = evaluate_perplexity(model, ["aé€ b"], PreTrainedTokenizerFast(tokenizer_object=backend))
    assert (found.tokens, found.bytes) == (7, 7)


def test_words_of_several_bytes_behind_a_begin_token():
    """A tokenizer that puts a begin token before a text has every window begin so; a gap belongs to the next word."""
    backend = Tokenizer(models.WordLevel({"<s>": 0, "a": 1, "dog": 2}, unk_token="a"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>")
    model = make(dense_config("llama"))
    found = evaluate_perplexity(model, ["a dog a dog"], tokenizer, Protocol(window=3))
    assert (found.protocol.bos, found.tokens, found.bytes) == (True, 4, 11)
    assert found.loss == pytest.approx(loss_by_hand(model, [[1, 2, 1, 2]], 3, 3, bos=0), abs=1e-4)
    assert found.bits_per_byte == pytest.approx(found.loss * 4 / 11 / math.log(2))
    without = evaluate_perplexity(model, ["a dog a dog"], tokenizer, Protocol(bos=False))
    assert (without.tokens, without.bytes) == (3, 10)


@pytest.mark.parametrize("begin", [1, 2], ids=["begin token", "end token"])
def test_a_pair_counts_where_the_good_sentence_is_likelier(begin, tiny_tokenizer):
    model = make(sparse_config("qwen2"))
    if begin == 1:  # else it has no begin token, so the end token begins a sentence
        tiny_tokenizer = copy.deepcopy(tiny_tokenizer)
        tiny_tokenizer.bos_token = "<start>"
    sentences = [
        ("one", "a dog", "dog a"),
        ("one", "cats", "catz!"),
        ("two", "we see it", "us see it"),
        ("two", "x", "x"),
    ]

    @torch.no_grad()
    def total(sentence: str) -> float:
        ids = tiny_tokenizer(sentence)["input_ids"]
        logits = model(input_ids=torch.tensor([[begin, *ids]])).logits[0].double().log_softmax(-1)
        return sum(logits[place, token].item() for place, token in enumerate(ids))

    expected = [total(good) > total(bad) for _, good, bad in sentences]
    found = evaluate_pairs(model, sentences, tiny_tokenizer)
    assert found.pairs == {"one": 2, "two": 2}
    assert found.right == {"one": sum(expected[:2]), "two": sum(expected[2:])}
    assert found.accuracy == sum(expected) / 4
    swapped = evaluate_pairs(model, [(name, bad, good) for name, good, bad in sentences], tiny_tokenizer)
    assert found.accuracy + swapped.accuracy == 0.75  # equal sentences count for neither


def test_eval_reads_texts_of_every_kind(tiny_checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plain.txt").write_text(TEXT)
    with gzip.open("rows.jsonl.gz", "wt") as file:
        file.write(json.dumps({"text": "abc"}) + "\n" + json.dumps({"text": ""}) + "\n" + json.dumps({"text": "de"}))
    pyarrow.parquet.write_table(pyarrow.table({"body": ["fghi"]}), "table.parquet")
    pair = {"sentence_good": "a dog", "sentence_bad": "dog a", "UID": "order"}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(pair))
    arguments = ["--text", "plain.txt", "x=rows.jsonl.gz", '{"files": "table.parquet", "columns": "body"}']
    arguments += ["--pairs", "pairs.jsonl", "--window", "16", "--stride", "8", "--output", "out/eval.json"]
    assert main(["eval", str(tiny_checkpoint), *arguments]) == 0
    said = capsys.readouterr().out
    assert "windows of 16 tokens, stride 8, no begin token, each document by itself" in said
    written = json.loads((tmp_path / "out" / "eval.json").read_text())["results"]
    assert {name: text["tokens"] for name, text in written["texts"].items()} == {"plain": 134, "x": 3, "table": 3}
    assert written["texts"]["plain"]["sparsity"]["all"] == 0.5
    model, tokenizer = (each.from_pretrained(tiny_checkpoint) for each in (AutoModelForCausalLM, AutoTokenizer))
    loss = loss_by_hand(model, [tokenizer(TEXT)["input_ids"]], 16, 8)
    assert written["texts"]["plain"]["loss"] == pytest.approx(loss, abs=1e-4)
    assert written["pairs"]["pairs"]["pairs"] == 1
    assert f"| plain | {loss:.4f} | {math.exp(loss):.3f} |" in said


def test_mistakes_get_one_line(tiny_checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, content in (
        ("a.txt", TEXT),
        ("short.txt", "a"),
        ("a.gguf", "GGUF"),
        ("pairs.jsonl", '{"sentence_good": "a"}'),
    ):
        (tmp_path / name).write_text(content)
    (tmp_path / "good.jsonl").write_text('{"sentence_good": "a", "sentence_bad": "b", "UID": "c"}')
    model = str(tiny_checkpoint)
    for arguments, said in (
        (["eval", model], "nothing to measure on; name a text, pairs or tasks"),
        (["eval", "nowhere", "--text", "a.txt"], "nowhere"),
        (["eval", "a.gguf", "--text", "a.txt"], "a.gguf is a GGUF file; make a checkpoint of it first, with `qsparse"),
        (["eval", model, "--text", "nowhere.txt"], "no file matches 'nowhere.txt'"),
        (["eval", model, "--text", "a.txt", "./a.txt"], "two texts are named 'a'"),
        (["eval", model, "--text", "short.txt"], "short holds no token that could be scored"),
        (["eval", model, "--text", "a.txt", "--window", "1"], "window must be at least 2, got 1"),
        (["eval", model, "--text", "a.txt", "--window", "129"], "at most the model's 128 positions, got 129"),
        (["eval", model, "--text", "a.txt", "--window", "8", "--stride", "9"], "stride must be at most the window, 8"),
        (["eval", model, "--text", "a.txt", "--stride", "129"], "stride must be at most the window, 128, got 129"),
        (["eval", model, "--text", "a.txt", "--tokens", "0"], "tokens must be at least 1, got 0"),
        (["eval", model, "--text", "a.txt", "--batch-size", "0"], "batch_size must be at least 1, got 0"),
        (["eval", model, "--text", "a.txt", "--dtype", "int8"], "dtype must be auto, float32, bfloat16, float16, got"),
        (["eval", model, "--text", "a.txt", "--bos"], "no begin token"),
        (["eval", model, "--text", "a.txt", "--output", "a.txt/x.json"], "cannot be written"),
        (["eval", model, "--pairs", "pairs.jsonl"], "pairs.jsonl:1: has no column 'UID'"),
        (["eval", model, "--text", "a.txt", "--pairs", "a=good.jsonl"], "two are named 'a'; put another name before"),
        (["eval", model, "--pairs", "good.jsonl", "--tokens", "9"], "are settings of texts, and no text is named"),
        (["eval", model, "--text", "a.txt", "--questions", "9"], "questions are those of tasks, and no task is named"),
        (["compare", model, model, "--text", "a.txt"], "is named twice"),
        (["compare", model, "nowhere", "--text", "a.txt"], "nowhere"),
        (["compare", model, "--text", "a.txt", "--picture", "a.jpg"], "whose name ends with .png, got 'a.jpg'"),
    ):
        assert main(arguments) == 1, arguments
        last = capsys.readouterr().err.splitlines()[-1]
        assert last.startswith("qsparse: error: ")
        assert said in last


def test_compare_puts_dense_and_sparse_into_one_table(tiny_checkpoint, tiny_tokenizer, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text(TEXT)
    make(dense_config("llama")).save_pretrained("dense")
    tiny_tokenizer.save_pretrained("dense")
    shutil.copy("dense/model.safetensors", "dense/consolidated.safetensors")  # as Mistral's have: nothing reads it
    make(dense_config("llama", tie_word_embeddings=True), dtype=torch.bfloat16).save_pretrained("tied")
    tiny_tokenizer.save_pretrained("tied")
    arguments = ["--text", "model=a.txt", "--output", "c.json", "--picture", "c.png"]
    assert main(["compare", "dense", str(tiny_checkpoint), "tied", *arguments]) == 0
    dense, sparse, tied = json.loads((tmp_path / "c.json").read_text())["results"]
    # Of a layer 30,720 weights in projections; beside them two norms of 64, the last norm, and a head of 128 x 64.
    projections, rest = 2 * 30720, 5 * 64 + 128 * 64
    assert (dense["activated_parameters"], sparse["activated_parameters"]) == (projections, projections // 2)
    assert dense["bytes_read_per_token"] == 4 * (projections + rest)
    assert sparse["bytes_read_per_token"] == 4 * (projections // 2 + rest)
    assert tied["bytes_read_per_token"] == dense["bytes_read_per_token"] / 2  # of bfloat16, its embedding as the head
    assert dense["bytes_on_disk"] == (tmp_path / "dense" / "model.safetensors").stat().st_size
    assert dense["texts"]["model"]["loss"] != sparse["texts"]["model"]["loss"]
    assert dense["tokens_per_second"] != sparse["tokens_per_second"]
    assert (tmp_path / "c.png").read_bytes()[:4] == b"\x89PNG"
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert [row[0].strip("| ") for row in rows] == ["model", "---", "dense", str(tiny_checkpoint), "tied"]
    assert rows[2][1] == f"{dense['texts']['model']['loss']:.4f}"
    assert rows[3][2:4] == ["30.72K of 61.44K", "float32"]
    assert rows[4][3] == "bfloat16"


@pytest.fixture
def local_task(tmp_path, monkeypatch):
    """A task of four questions with two answers each, in files of its own."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    data = tmp_path / "questions.jsonl"
    rows = [
        ("cats", "purr", "purrs", 0),
        ("a cat", "purr", "purrs", 1),
        ("dogs", "bark", "barks", 0),
        ("it", "is", "am", 0),
    ]
    data.write_text("\n".join(json.dumps(dict(zip(("q", "a", "b", "label"), row, strict=True))) for row in rows))
    file = tmp_path / "grammar.yaml"
    file.write_text(f"""
task: grammar
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{q}}}}"
doc_to_choice: "{{{{[a, b]}}}}"
doc_to_target: label
metric_list: [{{metric: acc}}]
""")
    return file, rows


def test_a_task_of_ones_own(local_task, tiny_checkpoint, tmp_path, capsys):
    pytest.importorskip("lm_eval")
    file, rows = local_task
    assert main(["eval", str(tiny_checkpoint), "--tasks", f"{file}:0", "--output", str(tmp_path / "e.json")]) == 0
    score = json.loads((tmp_path / "e.json").read_text())["results"]["tasks"]["grammar"]
    model, tokenizer = (each.from_pretrained(tiny_checkpoint) for each in (AutoModelForCausalLM, AutoTokenizer))

    def total(question: str, answer: str) -> float:
        before, ids = len(tokenizer(question)["input_ids"]), tokenizer(f"{question} {answer}")["input_ids"]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        return sum(logits[place - 1, ids[place]].item() for place in range(before, len(ids)))

    right = [(total(q, b) > total(q, a)) == bool(label) for q, a, b, label in rows]
    assert (score["score"], score["questions"], score["shots"]) == (sum(right) / 4, 4, 0)
    assert (score["sparsity"]["all"], score["activated_parameters"]) == (0.5, 30720)
    assert f"| {sum(right) / 4:.3f} ± " in capsys.readouterr().out


def test_lm_eval_loads_our_checkpoints(local_task, tiny_checkpoint):
    """`lm_eval --model hf`, with the package imported: no flag is needed."""
    lm_eval = pytest.importorskip("lm_eval")
    file, _ = local_task
    model = f"pretrained={tiny_checkpoint},dtype=float32"
    tasks = lm_eval.tasks.TaskManager(include_defaults=False)  # all others take seconds to read
    options = {"tasks": [str(file)], "device": "cpu", "batch_size": 2, "task_manager": tasks}
    assert "acc,none" in lm_eval.simple_evaluate("hf", model, **options)["results"]["grammar"]


def test_names_of_tasks(monkeypatch):
    lm_eval = pytest.importorskip("lm_eval")
    folders = ("arc", "hellaswag", "mmlu/default", "winogrande", "truthfulqa", "blimp")  # all take seconds to read
    places = [str(Path(lm_eval.__file__).parent / "tasks" / folder) for folder in folders]
    some = lm_eval.tasks.TaskManager(include_defaults=False, include_path=places)
    monkeypatch.setattr("qsparse_hf.tasks._manager", lambda defaults: some)
    shots = {task.name: task.shots for task in find_tasks(["paper", "blimp", "hellaswag:3"])}
    assert shots == {
        "arc_challenge": 25,
        "hellaswag": 3,
        "mmlu": 5,
        "winogrande": 5,
        "truthfulqa_mc2": 0,
        "blimp": None,
    }
    with pytest.raises(UserError, match="'no_such' is no task of lm-evaluation-harness"):
        find_tasks(["no_such"])


def test_without_the_harness_a_line_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert main(["eval", "nowhere", "--tasks", "paper"]) == 1
    assert capsys.readouterr().err.endswith("pip install 'qsparse-hf[eval]'\n")
