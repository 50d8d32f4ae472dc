"""Where training data comes from: files, folders and datasets, mixtures, bad rows, packing, and streams that go on."""

import bz2
import csv
import gzip
import itertools
import json
import lzma
import math
import zipfile
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch
from conftest import assert_close, make, sparse_config
from datasets import load_dataset
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from qsparse_hf.errors import UserError
from qsparse_hf.sources import read_documents
from qsparse_hf.training.data import DataArguments, collate_packed, pack, pack_on_disk
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


@pytest.fixture
def templated(tiny_tokenizer) -> PreTrainedTokenizerFast:
    """A tokenizer whose template puts `<start>` (1) before every text and `<end>` (2) after it."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tiny_tokenizer.backend_tokenizer.from_str(tiny_tokenizer.backend_tokenizer.to_str()),
        bos_token="<start>",
        eos_token="<end>",
    )
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", 1), ("<end>", 2)]
    )
    return tokenizer


@pytest.mark.parametrize("streaming", [False, True])
def test_a_document_begins_and_ends_once(tmp_path, tiny_tokenizer, templated, streaming):
    texts = ["ab", "c<end>", "<start>de", "f"]
    file = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in texts])
    a, b, c, d, e, f = tiny_tokenizer("abcdef")["input_ids"]

    def packed(tokenizer: PreTrainedTokenizerFast, length: int) -> list[list[int]]:
        data = arguments(file, streaming=streaming, sequence_length=length, shuffle_window=1)
        read = PackedStream if streaming else pack_on_disk
        return [row["input_ids"] for row in read(data.train_sources, tokenizer, data, seed=0)]

    assert templated("ab")["input_ids"] == [1, a, b, 2]
    assert packed(templated, 14) == [[1, a, b, 2, 1, c, 2, 1, d, e, 2, 1, f, 2]]
    assert packed(tiny_tokenizer, 5)[0] == [a, b, 2, c, 2]


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
    (tmp_path / "c.jsonlines").write_text((tmp_path / "a.jsonl").read_text())
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
    (tmp_path / "h.txt").write_text("second")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    assert texts_of(str(tmp_path / "*.[pt][yx]*")) == ["first\ndocument", "second"]
    everything = texts_of({"files": str(tmp_path), "columns": {"text": "body"}})
    assert sorted(everything) == sorted(["one", "two"] * 9 + ["first\ndocument", "second"])


COMPRESSIONS = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize(
    ("ending", "content"),
    [
        (".txt", "é, x"),
        (".jsonl", '{"text": "é, x"}\n'),
        (".ndjson", '{"text": "é, x"}'),
        (".json", '[{"text": "é, x"}]'),
        (".json", '\n{"text": "é, x"}\n'),
        (".csv", 'text,id\r\n"é, x",1\r\n'),
        (".csv", 'text\n"é, x"'),
    ],
)
def test_a_byte_order_mark_is_no_text(tmp_path, ending, content, compression):
    file = tmp_path / f"a{ending}{compression}"
    for mark in ("", "\ufeff"):
        content = mark + content.removeprefix("\n")
        file.write_bytes(COMPRESSIONS[compression](content.encode()))
        assert texts_of(str(file)) == ["é, x"]


def test_archives_and_unknown_compressions_are_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.jsonl.zip", "w") as archive:
        archive.writestr("a.jsonl", '{"text": "x"}\n')
    (tmp_path / "b.tar.gz").write_bytes(gzip.compress(b"tar"))
    (tmp_path / "c.jsonl.snappy").write_bytes(b"x")
    for name, said in (("a.jsonl.zip", "is an archive; unpack it"), ("b.tar.gz", "is an archive"), ("c*", "a package")):
        with pytest.raises(UserError, match=said):
            rows_of(str(tmp_path / name))


@pytest.mark.parametrize("compression", ["", ".gz"])
@pytest.mark.parametrize(
    ("name", "ending"),
    [
        ("a.jsonl.bak", ".jsonl"),
        ("a.jsonl.1", ".jsonl"),
        ("a.json.tmp", ".json"),
        ("a.csv.txt", ".csv"),
        ("a.tsv", ".tsv"),
        ("a.TSV.txt", ".TSV"),
        ("a.v1.Parquet.part", ".Parquet"),
        ("a.csv~", ".csv~"),
        ("a.ndjson_old", ".ndjson_old"),
    ],
)
def test_a_table_under_another_name_is_refused(tmp_path, name, ending, compression):
    file = tmp_path / f"{name}{compression}"
    file.write_bytes(COMPRESSIONS[compression](b'{"text": "x"}\n'))
    for pattern in (file, tmp_path / "a.*"):
        with pytest.raises(UserError) as raised:
            rows_of(str(pattern))
        assert str(raised.value) == (
            f"{file} is named like a table ({ending}) and would be read as text: tables are read from .jsonl, "
            f".jsonlines, .ndjson, .json, .parquet, .csv, and the name of a text wants .txt without {ending}"
        )


def test_a_folder_is_read_for_its_known_endings(tmp_path):
    for name in ("a.jsonl.bak", "b.tsv", "c.json.tmp"):
        (tmp_path / name).write_text('{"text": "left out"}')
    write_jsonl(tmp_path / "rows.v1.jsonl", [{"text": "a row"}])
    (tmp_path / "package.json.md").write_text("about package.json")
    assert sorted(texts_of(str(tmp_path))) == ["a row", "about package.json"]
    (tmp_path / "d.csv.txt").write_text("text\nfine\n")
    with pytest.raises(UserError, match=r"d.csv.txt is named like a table \(.csv\)"):
        rows_of(str(tmp_path))


def test_hidden_files_of_a_folder_are_left_out(tmp_path):
    for folder in (".git", ".home"):
        (tmp_path / folder / "data").mkdir(parents=True)
        (tmp_path / folder / "data" / "a.txt").write_text(folder)
        (tmp_path / folder / "data" / ".b.txt").write_text("hidden")
    with pytest.raises(UserError, match="no file matches"):
        rows_of(str(tmp_path))
    assert texts_of(str(tmp_path / ".home")) == [".home"]  # what is named is not hidden


def test_a_dataset_its_slices_skip_and_take(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", [{"text": f"text {i}"} for i in range(10)])
    assert texts_of({"dataset": str(tmp_path), "split": "train[:2]"}) == ["text 0", "text 1"]
    assert texts_of({"dataset": str(tmp_path), "skip": 3, "take": 2}) == ["text 3", "text 4"]
    assert texts_of({"files": str(tmp_path), "skip": 8}) == ["text 8", "text 9"]
    for place in ("dataset", "files"):
        assert texts_of({place: str(tmp_path), "skip": 9, "take": 10**30}) == ["text 9"]
    assert texts_of({"files": str(tmp_path), "skip": 10**30}) == []
    with pytest.raises(UserError, match=r"split train holds 10 row\(s\), and skip leaves none of them"):
        rows_of({"dataset": str(tmp_path), "skip": 10**30})
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
        ('"hello"', "must be an object, got 'hello'; a row names its columns"),
        ('{"text": "a", "text": "b"}', "column 'text' must hold text, got two values"),
        ('{"body": "x", "id": 1}', "has no column 'text'; it has body, id"),
        ('{"text": null}', "column 'text' must hold text, got None"),
        ('{"text": 7}', "column 'text' must hold text, got 7"),
        ('{"text": "  "}', "column 'text' is empty"),
        ("", "is an empty line; a row is an object"),
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


def checked(path: Path, *, columns: dict | str = "text") -> tuple[list[str], list[str]]:
    """The good rows' texts, and the bad rows as they are named."""
    rows = rows_of({"files": str(path), "columns": columns})
    assert rows == rows_of({"files": str(path), "columns": columns}, streaming=True)
    bad = [f"{row['origin'].removeprefix(str(path))}: {row['problem']}" for row in rows if row["problem"]]
    return [row["text"] for row in rows if not row["problem"]], bad


QUOTES = "is not CSV: a column that opens with a quote must close with one, and double those within"


@pytest.mark.parametrize(
    ("content", "good", "bad"),
    [
        ("text\nHello, world\nfine\n", ["fine"], [":2: has 2 column(s) where the header has 1; a comma or"]),
        ("text,id\nHello,1\nfine\n", ["Hello"], [":3: has 1 column(s) where the header has 2"]),
        ("id,text\n1,\n2,x\n", ["x"], [":2: column 'text' is empty"]),
        ('text\n"Hello\nworld\nfine', ["world", "fine"], [f":2: {QUOTES}"]),
        ('text\n"Hello\nworld\n"so, it is"\nfine\n', ["world", "so, it is", "fine"], [f":2: {QUOTES}"]),
        ('text,id\n"Hello\n",so",1\n",so",2\n', [",so", ",so"], [f":2: {QUOTES}"]),
        ('text\n"a" b\nfine\n', ["fine"], [f":2: {QUOTES}"]),
        ('text\n"say ""a, b""\nto me"\nsay "hi"\n', ['say "a, b"\nto me', 'say "hi"'], []),
        ('text\n"two\nlines",1\nfine\n', ["fine"], [":2: has 2 column(s) where"]),
        ("\n\ntext\n\nfine\n", ["fine"], [":4: is an empty line"]),
        ("id,text,id\n1,fine,2\n", ["fine"], []),
        ("body\nx\ny\n", [], [":2: has no column 'text'; it has body", ":3: has no column 'text'"]),
        ("", [], []),
    ],
)
def test_every_row_of_a_csv_is_read_or_named(tmp_path, content, good, bad):
    (tmp_path / "a.csv").write_text(content, newline="")
    texts, named = checked(tmp_path / "a.csv")
    assert texts == good
    assert [said[: len(start)] for said, start in zip(named, bad, strict=True)] == bad


def test_an_open_quote_takes_no_more_than_fits_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr("qsparse_hf.sources._LONGEST_FIELD", 1000)
    (tmp_path / "a.csv").write_text('text\n"open\n' + "row\n" * 2000 + f'"{"long " * 300}"\nlast\n')
    texts, bad = checked(tmp_path / "a.csv")
    assert texts == ["row"] * 2000 + ["last"]
    assert [said.partition(":")[2].partition(":")[0] for said in bad] == ["2", "2003"]
    assert all("field larger than field limit (1000)" in said for said in bad)


def test_a_column_that_a_header_names_twice_is_refused(tmp_path):
    (tmp_path / "a.csv").write_text("text,text\na,b\n")
    (tmp_path / "b.csv").write_text('"text\na\n')
    column = pyarrow.array(["a"])
    pyarrow.parquet.write_table(pyarrow.table([column, column], names=["text", "text"]), tmp_path / "c.parquet")
    for name, said in (("a.csv", "names the column 'text' twice"), ("b.csv", QUOTES), ("c.parquet", "'text' twice")):
        with pytest.raises(UserError, match=rf"{name}: cannot be read: its header .*{said}"):
            rows_of(str(tmp_path / name))


@pytest.mark.parametrize(
    ("name", "lines", "number"),
    [
        ("a.jsonl", [b'{"text": "good"}', b'{"text": "caf\xe9"}', b'{"other": "caf\xe9", "text": "good"}'], 2),
        ("a.json", [b'[{"text": "good"},', b'{"text": "caf\xe9"},', b'{"other": "caf\xe9", "text": "good"}]'], 2),
        ("a.csv", [b"other,text", b",good", b",caf\xe9", b"caf\xe9,good"], 3),
    ],
)
def test_text_that_is_not_utf8_is_named(tmp_path, name, lines, number):
    (tmp_path / name).write_bytes(b"\n".join(lines))
    assert checked(tmp_path / name) == (
        ["good", "good"],
        [f":{number}: column 'text' holds bytes that are not UTF-8"],
    )


def test_a_text_file_that_says_nothing_or_is_not_utf8_is_named_or_counted(tmp_path, tiny_tokenizer, caplog):
    (tmp_path / "a.txt").write_text("good " * 9)
    (tmp_path / "b.txt").write_bytes(b"caf\xe9")
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress(b"caf\xe9"))
    (tmp_path / "d.txt").write_text(" \n")
    not_utf8 = "holds bytes that are not UTF-8"
    for name, problem in (("b.txt", not_utf8), ("c.txt.gz", not_utf8), ("d.txt", "is empty")):
        assert checked(tmp_path / name) == ([], [f": {problem}"])
    data = arguments(str(tmp_path))
    with pytest.raises(UserError, match=r"b.txt: holds bytes that are not UTF-8 \(on_bad_row: skip"):
        pack_on_disk(data.train_sources, tiny_tokenizer, data, seed=0)
    data = arguments(str(tmp_path), on_bad_row="skip")
    assert len(pack_on_disk(data.train_sources, tiny_tokenizer, data, seed=0)) == 46 // 16
    assert f"skipped 3 of 4 rows; the first: {tmp_path / 'b.txt'}: {not_utf8}" in caplog.text


def test_parquet_columns_are_read_where_they_are_asked_for(tmp_path, tiny_tokenizer):
    dates = pyarrow.array([0, 1 << 50, 0], pyarrow.timestamp("ms"))  # one that Python has no date for
    _, offsets, data = pyarrow.array([b"one", b"tw\xff", b"three"]).buffers()
    texts = pyarrow.StringArray.from_buffers(3, offsets, data)
    (tmp_path / "set").mkdir()
    file = tmp_path / "set" / "train.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["one", "two", "three"], "bad": texts, "date": dates}), file)
    assert texts_of(str(file)) == ["one", "two", "three"]
    assert checked(file, columns="bad") == (
        ["one", "three"],
        [":2: column 'bad' cannot be read: 'utf-8' codec can't decode byte 0xff in position 2: invalid start byte"],
    )
    assert checked(file, columns="date")[1][1] == ":2: column 'date' cannot be read: date value out of range"
    assert checked(file, columns="none")[1] == [
        f":{i}: has no column 'none'; it has text, bad, date" for i in (1, 2, 3)
    ]
    for streaming in (False, True):
        rows = rows_of({"dataset": str(tmp_path / "set")}, streaming=streaming)
        assert [row["text"] for row in rows] == ["one", "two", "three"]


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


@pytest.mark.parametrize(
    "content",
    [
        '{"data":[\n  {"text": "a"},\n  {"text": "b"}\n]}',
        '\n{\n  "text": "a"\n}\n{\n  "text": "b"\n}\n',
    ],
)
@pytest.mark.parametrize("compression", ["", ".gz"])
def test_an_object_over_several_lines_is_refused(tmp_path, tiny_tokenizer, content, compression):
    file = tmp_path / f"a.json{compression}"
    file.write_bytes(COMPRESSIONS[compression](content.encode()))
    data = arguments(str(file), on_bad_row="skip")
    with pytest.raises(UserError) as raised:
        pack_on_disk(data.train_sources, tiny_tokenizer, data, seed=0)
    assert str(raised.value) == (
        f"{file}: cannot be read: its object goes over several lines; it must hold a list of rows, [{{...}}, ...], or "
        "a row a line"
    )


def test_lines_of_json_under_that_name_may_begin_with_a_bad_row(tmp_path):
    for number, bad in enumerate(['{"text": "un', "{}x", '{"text": "a"} {', "]"]):
        file = tmp_path / f"{number}.json"
        file.write_text(bad + '\n{"text": "good"}\n')
        texts, named = checked(file)
        assert texts == ["good"]
        assert [said[:16] for said in named] == [":1: is not JSON:"]


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
        ([{"files": "a", "skip": -1}], "skip must be at least 0"),
        ([{"files": "a", "skip": 1.9}], "skip of a data source must be a whole number, got 1.9"),
        ([{"files": "a", "skip": "1"}], "skip of a data source must be a whole number, got '1'"),
        ([{"files": "a", "skip": None}], "skip of a data source must be a whole number, got None"),
        ([{"files": "a", "take": True}], "take of a data source must be a whole number, got True"),
        ([{"files": "a", "take": math.nan}], "take of a data source must be a whole number, got nan"),
        ([{"files": "a", "probability": True}], "probability of a data source must be a number, got True"),
        ([{"files": "a", "probability": math.nan}], "above 0 and at most 1, got nan"),
        ([{"files": "a", "columns": None}], "columns of a must be a column's name or .*, got None"),
        ([{"files": "a", "columns": {"text": 3}}], r"columns of a must be .*, got \{'text': 3\}"),
        ([{"files": "a", "columns": {"text": ""}}], r"columns of a must be a column's name or .*, got \{'text': ''\}"),
        ([{"files": "a", "columns": " "}], r"columns of a must be a column's name or .*, got \{'text': ' '\}"),
        ([{"dataset": "a", "columns": {"prompt": "q", "completion": ""}}], "columns of a must be a column's name or"),
        ([{"files": ["a", 3]}], r"must be a path or several, got \('a', 3\)"),
        ([{"dataset": "a", "name": 2024}], "name of a data source must be text, got 2024"),
        ([{"dataset": "a", "split": None}], "split of a data source must be text, got None"),
        ([""], "must name a file, a folder, a glob or a dataset, got empty text"),
        (["a", "  "], "got empty text"),
        ([{"files": ["a", ""]}], "got empty text"),
        ([{"dataset": ""}], "got empty text"),
        (["{a: b}"], "a data source is a path, or .* as JSON, got {a: b}: Expecting"),
        (['{"files": "a", "files": "b"}'], "must be a path or several, got two values"),
        (["x" * 300], "no file matches 'xxx"),
        (["a\0b"], "no file matches"),
        ([{"files": "a", "probability": 0.5}, "b"], "to every data source or to none"),
        ([{"files": "a", "probability": 0.5}, {"files": "b", "probability": 0.4}], "add up to 1, got 0.9"),
    ],
)
def test_mistakes_in_sources_are_named(sources, said):
    with pytest.raises(UserError, match=said):
        rows_of(*sources)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"train_data": "a.txt"}, "train_data must be a list of data sources, each as text, got 'a.txt'"),
        ({"eval_data": [None]}, r"eval_data must be a list of data sources, each as text, got \[None\]"),
        ({"eval_data": [""]}, "got empty text"),
        ({"eval_data": {"a b": ["x.txt"]}}, "eval_data names texts by letters, digits and _, got 'a b'"),
        ({"eval_data": {"a": [3]}}, r"eval_data: a must be a list of data sources, each as text, got \[3\]"),
        ({"eval_data": {"a": []}}, r"eval_data: a must be a list of data sources"),
        ({"sequence_length": 16.5}, "sequence_length must be a whole number, got 16.5"),
        ({"sequence_length": True}, "sequence_length must be a whole number, got True"),
        ({"sequence_length": math.nan}, "sequence_length must be a whole number, got nan"),
        ({"sequence_length": 1}, "sequence_length must be at least 2, got 1"),
        ({"shuffle_window": 2.0}, "shuffle_window must be a whole number, got 2.0"),
        ({"shuffle_window": 0}, "shuffle_window must be at least 1, got 0"),
        ({"streaming": "no"}, "streaming must be true or false, got 'no'"),
        ({"repeat_data": 1}, "repeat_data must be true or false, got 1"),
        ({"on_bad_row": "ignore"}, "on_bad_row must be error or skip, got 'ignore'"),
    ],
)
def test_mistakes_in_arguments_are_named(fields, said):
    with pytest.raises(UserError, match=said):
        DataArguments(**{"train_data": ["a.txt"], **fields})


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


@pytest.mark.parametrize(
    ("role", "content", "problem"),
    [
        ("system", "", None),
        ("system", " \n", None),
        ("tool", "", None),
        ("system", None, "column 'chat' must hold messages, got [{'content': None, 'role': 'system'}"),
        ("user", "", "column 'chat' holds an empty message of the user, number 1"),
        ("assistant", " ", "column 'chat' holds an empty message of the assistant, number 1"),
        ("", "x", "column 'chat' must hold messages"),
        ("user", "half \ud800", "column 'chat' holds half of a surrogate pair"),
    ],
)
def test_which_messages_may_be_empty(tmp_path, role, content, problem):
    rest = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    for names in (("role", "content"), ("from", "value")):
        message = dict(zip(names, (role, content), strict=True))
        file = write_jsonl(tmp_path / "a.jsonl", [{"chat": [message, *rest]}])
        (row,) = rows_of({"files": file, "columns": {"messages": "chat"}})
        if problem is None:
            assert row["messages"] == [{"role": role, "content": content}, *rest]
            assert row["problem"] is None
        else:
            assert row["problem"].startswith(problem if names[0] == "role" else problem.partition(", got")[0])


def test_only_a_system_text_may_be_empty(tmp_path):
    values = ["", " ", None, 0, []]
    file = write_jsonl(tmp_path / "a.jsonl", [{"s": value, "q": "why?", "a": "so"} for value in values])
    rows = rows_of({"files": file, "columns": {"system": "s", "prompt": "q", "completion": "a"}})
    assert [row["problem"] for row in rows] == [
        *[None] * 3,
        "column 's' must hold text, got 0",
        "column 's' must hold text, got []",
    ]
    assert [row["system"] for row in rows] == [None] * 5
    for columns in (
        {"system": "a", "prompt": "s", "completion": "a"},
        {"system": "a", "prompt": "q", "completion": "s"},
    ):
        problems = [row["problem"] for row in rows_of({"files": file, "columns": columns})]
        assert problems[:3] == ["column 's' is empty"] * 2 + ["column 's' must hold text, got None"]


def test_a_text_file_holds_no_conversation(tmp_path):
    (tmp_path / "a.md").write_text("about the data")
    write_jsonl(tmp_path / "b.jsonl", [{"chat": [{"role": "user", "content": "hi"}]}])
    rows = rows_of({"files": str(tmp_path), "columns": {"messages": "chat"}})
    assert [row["problem"] for row in rows] == [
        "is one document of text; messages are read from .jsonl, .jsonlines, .ndjson, .json, .parquet, .csv",
        None,
    ]


def test_problems_are_one_line_that_any_terminal_takes(tmp_path):
    (tmp_path / "a.csv").write_bytes(b'"two\nlines",\xff\nx,y\n')
    assert checked(tmp_path / "a.csv") == ([], [":3: has no column 'text'; it has two\\nlines, \\udcff"])
    wide = json.dumps(dict.fromkeys(map(str, range(999)), 0))
    deep = "[" * 300 + "]" * 300
    (tmp_path / "b.jsonl").write_text(f'{wide}\n{{"text": "fine"}}\n{{"text": {deep}}}')
    texts, bad = checked(tmp_path / "b.jsonl")
    assert texts == ["fine"]
    assert [len(said) < 300 for said in bad] == [True, True]


def test_what_a_library_says_is_kept_whole(tmp_path):
    """Its first line alone would be `Couldn't cast`."""
    for name, row in (("a", {"text": "x"}), ("b", {"body": "y"})):
        write_jsonl(tmp_path / f"train_{name}.jsonl", [row])
    with pytest.raises(UserError, match=r"dataset '.*', split 'train': .*body"):
        rows_of({"dataset": str(tmp_path)})


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
