"""Where training data comes from: files, folders and datasets, mixtures, bad rows, packing, and streams that go on."""

import csv
import gzip
import itertools
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch
from conftest import assert_close, make, sparse_config
from datasets import load_dataset

from qsparse_hf.errors import UserError
from qsparse_hf.training.data import DataArguments, collate_packed, pack, pack_on_disk
from qsparse_hf.training.sources import read_documents
from qsparse_hf.training.streaming import PackedStream


def write_jsonl(path: Path, rows: list, *, raw: str = "") -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + raw)
    return str(path)


def arguments(*sources: str | dict, **fields) -> DataArguments:
    written = [json.dumps(source) if isinstance(source, dict) else str(source) for source in sources]
    return DataArguments(train_data=written, **{"sequence_length": 16, **fields})


def rows_of(*sources: str | dict, streaming: bool = False) -> list[dict]:
    documents, _ = read_documents(arguments(*sources).train_sources, streaming=streaming, seed=0)
    return list(documents)


def texts_of(*sources: str | dict) -> list[str]:
    rows = rows_of(*sources)
    assert all(row["problem"] is None for row in rows)
    return [row["text"] for row in rows]


def test_pack_by_hand():
    packed = list(pack([[5, 6, 7], [8], [9, 10, 11, 12, 13]], end=2, sequence_length=4))
    rows = [row for row, _ in packed]
    assert rows == [
        {"input_ids": [5, 6, 7, 2], "position_ids": [0, 1, 2, 3]},
        {"input_ids": [8, 2, 9, 10], "position_ids": [0, 1, 0, 1]},
        {"input_ids": [11, 12, 13, 2], "position_ids": [0, 1, 2, 3]},
    ]
    assert [used for _, used in packed] == [4, 2, 6]
    assert list(pack([[9, 10, 11, 12, 13]], end=2, sequence_length=4, start=2)) == packed[2:]
    assert list(pack([[5]], end=2, sequence_length=4)) == []
    assert collate_packed(rows)["labels"].tolist() == [[-100, 6, 7, 2], [-100, 2, -100, 10], [-100, 12, 13, 2]]


def test_packed_documents_do_not_see_each_other(family):
    model = make(sparse_config(family))
    first, second = list(range(3, 13)), list(range(20, 34))
    ((row, _),) = pack([first, second], end=2, sequence_length=26)
    batch = collate_packed([row])
    logits = [
        model(batch["input_ids"], position_ids=positions, use_cache=False).logits[0, 11:]
        for positions in (batch["position_ids"], torch.arange(26)[None])
    ]
    alone = model(torch.tensor([[*second, 2]]), use_cache=False).logits[0]
    assert_close(logits[0], alone)
    assert not torch.allclose(logits[1], alone, atol=0.1)  # without the restart they do see each other


def test_files_of_every_kind(tmp_path):
    rows = [{"body": "one", "id": 1}, {"body": "two", "id": 2}]
    write_jsonl(tmp_path / "a.jsonl", rows)
    (tmp_path / "b.json").write_text(json.dumps(rows))
    (tmp_path / "c.json").write_text((tmp_path / "a.jsonl").read_text())  # lines by another name
    (tmp_path / "c.NDJSON").write_text((tmp_path / "a.jsonl").read_text())
    (tmp_path / "b2.json").write_text("\n " + json.dumps(rows))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "d.parquet")
    with open(tmp_path / "e.csv", "w", newline="") as file:
        csv.writer(file).writerows([["body", "id", "more"], ["one", 1, "x" * 200_000], ["two", 2, ""]])
    (tmp_path / "f.jsonl.gz").write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes()))
    for path in sorted(tmp_path.iterdir()):
        assert texts_of({"files": str(path), "columns": "body"}) == ["one", "two"], path

    (tmp_path / "package.py").mkdir()
    (tmp_path / "g.py").write_text("first\ndocument")
    (tmp_path / "h.txt").write_bytes(b"sec\xffond")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    assert texts_of(str(tmp_path / "*.[pt][yx]*")) == ["first\ndocument", "sec�ond"]
    everything = texts_of({"files": str(tmp_path), "columns": {"text": "body"}})
    assert sorted(everything) == sorted(["one", "two"] * 8 + ["first\ndocument", "sec�ond"])


def test_a_dataset_its_slices_skip_and_take(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", [{"text": f"text {i}"} for i in range(10)])
    assert texts_of({"dataset": str(tmp_path), "split": "train[:2]"}) == ["text 0", "text 1"]
    assert texts_of({"dataset": str(tmp_path), "skip": 3, "take": 2}) == ["text 3", "text 4"]
    assert texts_of({"files": str(tmp_path), "skip": 8}) == ["text 8", "text 9"]
    streamed = rows_of({"dataset": str(tmp_path), "skip": 3, "take": 2}, streaming=True)
    assert [row["text"] for row in streamed] == ["text 3", "text 4"]


def test_mixtures_follow_their_probabilities(tmp_path):
    files = [write_jsonl(tmp_path / f"{name}.jsonl", [{"text": name}] * 3000) for name in "ab"]
    mixed = texts_of({"files": files[0], "probability": 0.71}, {"files": files[1], "probability": 0.29})
    assert mixed.count("a") / len(mixed) == pytest.approx(0.71, abs=0.02)
    assert mixed.count("a") == 3000  # it ends with the first that ends
    assert texts_of(*files) == ["a"] * 3000 + ["b"] * 3000  # without probabilities one follows the other


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ('{"text": "un', "is not JSON: Unterminated string"),
        ("[1]", "must be an object, got [1]"),
        ('{"body": "x", "id": 1}', "has no column 'text'; it has body, id"),
        ('{"text": null}', "column 'text' must hold text, got None"),
        ('{"text": 7}', "column 'text' must hold text, got 7"),
        ('{"text": "  "}', "column 'text' is empty"),
        ("", "is an empty line"),
        ('{"text": "half \\ud800 pair"}', "column 'text' holds half of a surrogate pair"),
        ("[" * 100_000, "is not JSON: maximum recursion depth"),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_bad_rows_are_named_or_counted(tmp_path, tiny_tokenizer, caplog, row, problem, streaming):
    file = write_jsonl(tmp_path / "rows.jsonl", [{"text": "good " * 9}] * 4, raw=row + "\n")
    with open(file, "a") as rows:
        rows.write(json.dumps({"text": "more " * 9}) + "\n")

    def read(**fields) -> list[dict]:
        data = arguments(file, streaming=streaming, **fields)
        if streaming:
            return list(PackedStream(data.train_sources, tiny_tokenizer, data, seed=0))
        return list(pack_on_disk(data.train_sources, tiny_tokenizer, data, seed=0))

    with pytest.raises(UserError) as raised:
        read()
    assert f"{file}:5: {problem}" in str(raised.value)
    assert "on_bad_row" in str(raised.value)
    for _ in range(2):  # the second time from the cache
        caplog.clear()
        kept = read(on_bad_row="skip")
        assert len(kept) == 5 * 46 // 16
        if not streaming:
            assert f"skipped 1 of 6 rows; the first: {file}:5: {problem}" in caplog.text


def test_unreadable_files_are_named(tmp_path, tiny_tokenizer):
    half = gzip.compress(b'{"text": "good"}\n' * 9000)
    contents = {"a.parquet": b"PAR1 no", "b.json": b"[{]", "c.jsonl.gz": b"plain", "d.jsonl.gz": half[: len(half) // 2]}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        data = arguments(str(tmp_path / name), on_bad_row="skip")  # what follows is lost: that is not skipped
        with pytest.raises(UserError, match=f"{name}: cannot be read"):
            pack_on_disk(data.train_sources, tiny_tokenizer, data, seed=0)
        with pytest.raises(UserError, match=f"{name}: cannot be read"):
            list(PackedStream(data.train_sources, tiny_tokenizer, data, seed=0))
    (tmp_path / "e.arrow").write_bytes(b"ARROW1\0\0")
    data = arguments(str(tmp_path / "e.arrow"))
    with pytest.raises(UserError, match=r"e.arrow: is not text"):
        pack_on_disk(data.train_sources, tiny_tokenizer, data, seed=0)


def test_nothing_to_train_on_is_named(tmp_path, tiny_tokenizer):
    (tmp_path / "short.txt").write_text("short")
    data = arguments(str(tmp_path / "short.txt"))
    with pytest.raises(UserError, match=r"1 usable document\(s\) of 1 hold less than one sequence of 16 tokens"):
        pack_on_disk(data.train_sources, tiny_tokenizer, data, seed=0)
    (tmp_path / "none.jsonl").touch()
    data = arguments(str(tmp_path / "none.jsonl"), streaming=True, repeat_data=True)
    with pytest.raises(UserError, match="holds no usable row"):
        list(PackedStream(data.train_sources, tiny_tokenizer, data, seed=0))


def test_the_cache_notices_what_changed(tmp_path, tiny_tokenizer):
    def first_tokens() -> list[int]:
        data = arguments(str(tmp_path / "a.txt"))
        return pack_on_disk(data.train_sources, tiny_tokenizer, data, seed=0)[0]["input_ids"]

    (tmp_path / "a.txt").write_text("some text of a file")
    before = first_tokens()
    (tmp_path / "a.txt").write_text("another text that is")
    assert first_tokens() != before


@pytest.mark.parametrize(
    ("sources", "said"),
    [
        (["nothing/*.txt"], "no file matches 'nothing"),
        ([{"dataset": "a", "files": "b"}], "either files or dataset"),
        ([{"dataset": "no/such/data"}], "no/such/data"),
        ([{"file": "a"}], "no field 'file'; it has columns"),
        ([{"files": "a", "probability": "much"}], "probability of a data source must be a number, got 'much'"),
        ([{"files": "a", "probability": 2}], "probability of a must be above 0 and at most 1, got 2"),
        ([{"files": "a", "columns": {"answer": "b"}}], "columns of a must name one of .*text.*, got answer"),
        ([{"files": "a", "take": 0}], "take at least 1"),
        ([{"files": "a", "probability": 0.5}, "b"], "to every data source or to none"),
        ([{"files": "a", "probability": 0.5}, {"files": "b", "probability": 0.4}], "add up to 1, got 0.9"),
    ],
)
def test_mistakes_in_sources_are_named(sources, said):
    with pytest.raises(UserError, match=said):
        rows_of(*sources)


def test_a_missing_column_of_a_dataset_is_named_at_once(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", [{"body": "x"}])
    for streaming in (False, True):
        with pytest.raises(UserError, match="has no column 'text'; it has body"):
            rows_of({"dataset": str(tmp_path)}, streaming=streaming)


def test_conversations_come_in_two_spellings(tmp_path):
    said = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    sharegpt = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]
    file = write_jsonl(tmp_path / "a.jsonl", [{"chat": said}, {"chat": sharegpt}, {"chat": [{"from": "human"}]}])
    rows = rows_of({"files": file, "columns": {"messages": "chat"}})
    assert [row["messages"] for row in rows] == [said, said, None]
    assert rows[2]["problem"].startswith("column 'chat' must hold messages, got [{'from'")


@pytest.fixture
def corpus(tmp_path) -> list[str]:
    """Three files of documents of many lengths, every seventh of them empty."""
    return [
        write_jsonl(tmp_path / f"{file}.jsonl", [{"text": f"{file}{i} " * (i % 7)} for i in range(150)])
        for file in range(3)
    ]


@pytest.mark.parametrize("repeat", [False, True])
@pytest.mark.parametrize("mixed", [False, True])
def test_a_stream_goes_on_exactly_where_it_was(corpus, tiny_tokenizer, mixed, repeat):
    sources = corpus
    if mixed:
        sources = [{"files": corpus[:2], "probability": 0.6}, {"files": corpus[2], "probability": 0.4}]

    def fresh() -> PackedStream:
        data = arguments(*sources, streaming=True, shuffle_window=7, on_bad_row="skip", repeat_data=repeat)
        return PackedStream(data.train_sources, tiny_tokenizer, data, seed=3)

    def take(stream: PackedStream, count: int) -> list[dict]:
        return list(itertools.islice(stream, count))

    whole = take(fresh(), 300 if repeat else 1000)
    assert len(whole) == 300 if repeat else 50 < len(whole) < 1000
    assert take(fresh(), 1000)[:40] == whole[:40]
    for at in (*range(16), 40, len(whole) - 1):
        stream = fresh()
        before = take(stream, at)
        stream.trained = at
        state = json.loads(json.dumps(stream.state()))
        resumed = fresh()
        resumed.resume(state)
        assert before + take(resumed, len(whole) - at) == whole, at
    assert resumed.check.skipped > 10
    assert len(json.dumps(state)) < 2000  # positions, not text


def test_a_stream_shuffles_within_windows_and_anew_when_it_repeats(corpus, tiny_tokenizer):
    def rows(seed: int = 0, **fields) -> list[tuple]:
        data = arguments(corpus[0], streaming=True, on_bad_row="skip", **fields)
        stream = PackedStream(data.train_sources, tiny_tokenizer, data, seed=seed)
        return [tuple(row["input_ids"]) for row in itertools.islice(stream, 60)]

    plain, shuffled = rows(shuffle_window=1), rows(shuffle_window=20)
    assert plain != shuffled
    assert [sorted(plain[i : i + 20]) for i in (0, 20, 40)] == [sorted(shuffled[i : i + 20]) for i in (0, 20, 40)]
    assert shuffled != rows(seed=1, shuffle_window=20)
    order = [tuple(i for i in range(20) if plain[i] == row) for row in shuffled[:20]]
    again = [tuple(i for i in range(20, 40) if plain[i] == row) for row in shuffled[20:40]]
    assert [i for (i, *_) in order] != [i - 20 for (i, *_) in again]


def test_another_window_cannot_go_on(corpus, tiny_tokenizer):
    streams = []
    for window in (7, 8):
        data = arguments(corpus[0], streaming=True, shuffle_window=window)
        streams.append(PackedStream(data.train_sources, tiny_tokenizer, data, seed=0))
    with pytest.raises(UserError, match="shuffle_window was 7 when the run began, got 8"):
        streams[1].resume(streams[0].state())


def test_what_datasets_reads_is_what_we_read(tmp_path):
    """The same file through this package's reader and through the library's."""
    rows = [{"text": f"row {i} \u2028 é"} for i in range(5)]
    file = write_jsonl(tmp_path / "a.jsonl", rows)
    theirs = load_dataset("json", data_files=file, split="train")["text"][:]
    assert texts_of(file) == theirs
