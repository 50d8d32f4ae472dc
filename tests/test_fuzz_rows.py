"""Rows and files as nobody would write them: every row is read or counted, and nothing but a `UserError` comes out."""

import csv
import dataclasses
import io
import itertools
import json
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qsparse_hf.errors import UserError
from qsparse_hf.sources import ROLES, RowCheck, Source, read_documents
from qsparse_hf.training.data import DataArguments, pack_on_disk
from qsparse_hf.training.streaming import PackedStream

quickly = settings(deadline=None, suppress_health_check=list(HealthCheck))

TEXT = st.text(max_size=12) | st.sampled_from(["", " ", "a,b", 'say "hi"', "two\nlines", "\ufeff", "\0", "<end>", "é"])
VALUE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
MESSAGE = st.fixed_dictionaries(
    {},
    optional={
        "role": st.sampled_from(["system", "user", "assistant", ""]) | VALUE,
        "from": st.sampled_from(["human", "gpt"]) | VALUE,
        "content": TEXT | VALUE,
        "value": TEXT | VALUE,
    },
)
ROW = (
    st.fixed_dictionaries(
        {},
        optional={
            "text": TEXT,
            "prompt": TEXT | VALUE,
            "completion": TEXT | VALUE,
            "system": TEXT | VALUE,
            "messages": st.lists(MESSAGE, max_size=3) | VALUE,
        },
    )
    | VALUE
)


def sources_of(path: Path, content: bytes, **fields) -> DataArguments:
    path.write_bytes(content)
    source = json.dumps({"files": str(path), "columns": fields.pop("columns", "text")})
    return DataArguments(train_data=[source], **{"sequence_length": 4, "shuffle_window": 3, **fields})


def read(path: Path, content: bytes, streaming: bool, columns: dict | str = "text") -> list[dict]:
    """All rows of `content`; each is good, or counted with a reason in one line."""
    arguments = sources_of(path, content, columns=columns)
    rows = list(read_documents(arguments.train_sources, streaming=streaming, seed=0)[0])
    check = RowCheck(skip=True)
    good = sum(check.passes(row) for row in rows)
    assert check.rows == len(rows) == good + check.skipped
    for row in rows:
        given = [value for role, value in row.items() if role not in ("origin", "problem") and value is not None]
        assert bool(given) == (row["problem"] is None)
        json.dumps(given, ensure_ascii=False).encode()
        if row["problem"] is not None:
            assert row["problem"].isprintable()
            assert " " in row["problem"]
            with pytest.raises(UserError, match="on_bad_row"):
                RowCheck(skip=False).passes(row)
    return rows


def only_user_errors(work: Callable[[], object]) -> None:
    said = "nothing"
    try:
        work()
    except UserError as error:
        said = str(error)
    assert said.isprintable()


@pytest.fixture(scope="module")
def folder():
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


FIELDS = [field.name for field in dataclasses.fields(Source)]
WRITTEN = TEXT | st.dictionaries(st.sampled_from([*FIELDS, "else"]), VALUE | st.just("text"), max_size=4).map(
    json.dumps
)


@settings(quickly, max_examples=300)
@given(train_data=st.lists(WRITTEN, max_size=3) | VALUE, number=VALUE)
def test_data_arguments(train_data, number):
    """A source takes its fields exactly as they were written, or refuses them."""
    with suppress(UserError):
        DataArguments(train_data=train_data, sequence_length=number)
    with suppress(UserError):
        arguments = DataArguments(train_data=train_data)
        for source, written in zip(arguments.train_sources, train_data, strict=True):
            assert "" not in source.files
            if written.startswith("{"):
                for key in ("skip", "take", "probability", "name"):
                    assert repr(getattr(source, key)) == repr(json.loads(written).get(key, getattr(Source, key)))


@settings(quickly, max_examples=200)
@given(rows=st.lists(ROW, max_size=5), roles=st.sampled_from(ROLES), streaming=st.booleans())
def test_rows_of_json(folder, rows, roles, streaming):
    columns = {role: role for role in roles}
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    read_as = [
        [row | {"origin": ""} for row in read(folder / name, content, streaming, columns)]
        for name, content in (("a.jsonl", lines), ("a.json", json.dumps(rows).encode()))
    ]
    assert len(read_as[0]) == len(rows)
    assert read_as[0] == read_as[1]
    for row, wanted in zip(read_as[0], rows, strict=True):
        if row["problem"] is None:
            assert all(row[role] == wanted[role] for role in roles - {"messages", "system"})


@settings(quickly, max_examples=200)
@given(
    lines=st.lists(st.binary(max_size=30).map(lambda line: line.replace(b"\n", b"")), max_size=6),
    streaming=st.booleans(),
)
def test_lines_of_bytes(folder, lines, streaming):
    assert len(read(folder / "b.jsonl", b"".join(line + b"\n" for line in lines), streaming)) == len(lines)


# Lines of a CSV of two columns, `text` and `id`, each with the text of a good row. A quoted text begins with a letter:
# a comma there could close, with the quote before it, a quote that an earlier line left open.
CELL = st.text(st.characters(exclude_characters='",\r\n', exclude_categories=["Cs"]), min_size=1, max_size=8)
GOOD = st.one_of(
    CELL.filter(str.strip).map(lambda cell: (f"{cell},1", cell)),
    st.lists(CELL | st.just('"') | st.just(","), min_size=1, max_size=3)
    .map("".join)
    .map(lambda c: f"x{c}")
    .map(lambda cell: ('"' + cell.replace('"', '""') + '",1', cell)),
)
BAD = st.one_of(
    CELL,
    CELL.map(lambda cell: f"{cell},1,2"),
    CELL.map(lambda cell: f'"{cell}'),
    CELL.map(lambda cell: f'"{cell},1'),
    CELL.map(lambda cell: f'"{cell}" x,1'),
    st.sampled_from(["", ",", ",1", '"",1', " ,1"]),
).map(lambda line: (line, None))


@settings(quickly, max_examples=300)
@given(
    lines=st.lists(GOOD | BAD, max_size=8),
    end=st.sampled_from(["\n", "\r\n"]),
    mark=st.sampled_from(["", "\ufeff"]),
    streaming=st.booleans(),
)
def test_lines_of_csv(folder, lines, end, mark, streaming):
    content = mark + end.join(["text,id", *(line for line, _ in lines), ""])
    rows = read(folder / "c.csv", content.encode(), streaming)
    assert [row["text"] for row in rows] == [text for _, text in lines]


@settings(quickly, max_examples=100)
@given(cells=st.lists(st.tuples(TEXT, TEXT), max_size=5), streaming=st.booleans())
def test_what_the_csv_module_writes(folder, cells, streaming):
    content = io.StringIO(newline="")
    csv.writer(content).writerows([("id", "text"), *cells])
    rows = read(folder / "d.csv", content.getvalue().encode(), streaming)
    assert [row["text"] for row in rows] == [text if text.strip() else None for _, text in cells]


def mutate(content: bytes, changes: list[tuple[int, int, bytes]]) -> bytes:
    for at, length, new in changes:
        at %= len(content) + 1
        content = content[:at] + new + content[at + length :]
    return content


def table() -> bytes:
    rows = [{"text": f"row {i}", "id": i, "messages": [{"role": "user", "content": "hi"}]} for i in range(20)]
    content = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), content, row_group_size=7)
    return content.getvalue()


CONTENTS = {
    ".jsonl": "".join(json.dumps({"text": f"row {i}", "id": i}) + "\n" for i in range(9)).encode(),
    ".json": json.dumps([{"text": f"row {i}", "id": i} for i in range(9)]).encode(),
    ".csv": ('text,id\n"a, b",1\n"two\nlines",2\n' + 'row "x",3\n' * 5).encode(),
    ".txt": b"one document\n",
    ".parquet": table(),
}
CHANGES = st.lists(
    st.tuples(
        st.integers(0, 1 << 16),
        st.sampled_from([0, 0, 1, 4, 1 << 16]),
        st.binary(max_size=4) | st.sampled_from([b'"', b"\n", b"\r", b",", b"\xff", b"\0", b"\xef\xbb\xbf"]),
    ),
    max_size=4,
)


@pytest.mark.parametrize("ending", CONTENTS)
@settings(quickly, max_examples=100)
@given(changes=CHANGES, columns=st.sampled_from(["text", "id", {"messages": "messages"}]), streaming=st.booleans())
def test_files_that_were_changed(folder, ending, changes, columns, streaming):
    only_user_errors(lambda: read(folder / f"e{ending}", mutate(CONTENTS[ending], changes), streaming, columns))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("ending", CONTENTS)
@settings(quickly, max_examples=12)
@given(changes=CHANGES, on_bad_row=st.sampled_from(["error", "skip"]), data=st.data())
def test_what_is_packed_of_them(folder, tiny_tokenizer, ending, streaming, changes, on_bad_row, data):
    """The door that training goes through; a stream goes on at any of its rows."""
    arguments = sources_of(
        folder / f"f{ending}", mutate(CONTENTS[ending], changes), streaming=streaming, on_bad_row=on_bad_row
    )

    def stream() -> PackedStream:
        return PackedStream(arguments.train_sources, tiny_tokenizer, arguments, seed=0)

    def work() -> None:
        if not streaming:
            pack_on_disk(arguments.train_sources, tiny_tokenizer, arguments, seed=0)
            return
        whole = list(stream())
        if whole:
            first = stream()
            at = data.draw(st.integers(0, len(whole) - 1))
            begun = list(itertools.islice(first, at))
            first.trained = at
            resumed = stream()
            resumed.resume(json.loads(json.dumps(first.state())))
            assert begun + list(resumed) == whole

    only_user_errors(work)
