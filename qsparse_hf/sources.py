"""Where documents come from: local files read row by row, datasets of the Hub, and mixtures of them.

Every source yields rows of one shape (`FEATURES`): the text by its role, where the row stood (`origin`), and what is
wrong with it (`problem`), so that a bad row can be named or counted wherever the rows are read.
"""

import csv
import glob
import json
import os
import re
import reprlib
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path

import fsspec
import pyarrow.parquet
from datasets import (
    Dataset,
    Features,
    IterableDataset,
    List,
    Value,
    concatenate_datasets,
    interleave_datasets,
    load_dataset,
)
from datasets.fingerprint import Hasher
from fsspec.utils import infer_compression

from .errors import UserError

# What a column of a source can be. Language modelling reads `text`; SFT reads any of these sets.
ROLES = ({"text"}, {"messages"}, {"prompt", "completion"}, {"system", "prompt", "completion"})
_MESSAGE = {"role": Value("string"), "content": Value("large_string")}
FEATURES = Features(
    dict.fromkeys(("text", "system", "prompt", "completion"), Value("large_string"))
    | {"messages": List(_MESSAGE), "origin": Value("string"), "problem": Value("string")}
)

_TABLES = (".jsonl", ".jsonlines", ".ndjson", ".json", ".parquet", ".csv")
_TEXTS = (".txt", ".md", ".rst", ".py")
# These say what a file is, whatever stands before them: `package.json.md` is text. `.txt` does not, as systems that
# hide endings append it: `rows.csv.txt` may well be a table.
_CERTAIN = tuple(ending for ending in (*_TABLES, *_TEXTS) if ending != ".txt")
_COMPRESSED = (".gz", ".bz2", ".xz", ".lzma", ".zst", ".lz4", ".snappy")
_ARCHIVES = (".zip", ".tar", ".tgz", ".tbz2", ".txz", ".7z", ".rar")
# ShareGPT's names for a message's fields and speakers.
_SPEAKERS = {"human": "user", "gpt": "assistant"}
# A model has nothing to learn where one of these says nothing; a system message or a tool's answer may be empty.
_SAY_SOMETHING = ("user", "assistant")
# A CSV's field may be longer than the 128 KiB that Python allows by default. What a quote that nothing closes takes up
# is read again as rows, so it has to end before memory does.
_LONGEST_FIELD = 1 << 26
# A record of CSV whose quotes are all where RFC 4180 has them.
_FIELD = r'(?:"[^"]*+(?:""[^"]*+)*+"|[^",\r\n]*+)'
_WELL_QUOTED = re.compile(rf"{_FIELD}(?:,{_FIELD})*+[\r\n]*")


@dataclass(frozen=True)
class Source:
    """One place that documents come from.

    Attributes:
        files: paths, folders or globs. `.jsonl`, `.jsonlines`, `.ndjson`, `.json`, `.parquet` and `.csv` (also
            compressed) hold rows; any other text file is one document, of a folder those that end in `.txt`, `.md`,
            `.rst` or `.py`. A name such as `a.csv.txt` or `a.jsonl.bak` says both and is refused; in a folder, those
            of other endings are left out, and so is what is hidden (`.git`). Text is UTF-8, with or without a
            byte-order mark.
        dataset: or a dataset on the Hub or a local folder that `load_dataset` understands.
        name: its configuration (subset).
        split: its split; slices like `train[:1%]` too, unless it is streamed.
        columns: which column holds what: `{text: body}`, or for SFT `{messages: conversations}` or
            `{system: system_prompt, prompt: question, completion: response}`, where an empty system text is left out.
        probability: share of the mixture's documents; given for all sources or for none.
        skip: leave out that many rows at the beginning.
        take: read at most that many rows.

    Raises:
        UserError: fields that contradict each other or are out of range.
    """

    files: tuple[str, ...] = ()
    dataset: str | None = None
    name: str | None = None
    split: str = "train"
    columns: dict[str, str] = field(default_factory=lambda: {"text": "text"})
    probability: float | None = None
    skip: int = 0
    take: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.files, tuple) or not all(isinstance(file, str) for file in self.files):
            raise UserError(f"files of a data source must be a path or several, got {self.files!r}")
        for key, value in (("dataset", self.dataset), ("name", self.name), ("split", self.split)):
            if not isinstance(value, str) and (value is not None or key == "split"):
                raise UserError(f"{key} of a data source must be text, got {value!r}")
        if not all(file.strip() for file in self.files) or (self.dataset is not None and not self.dataset.strip()):
            raise UserError("a data source must name a file, a folder, a glob or a dataset, got empty text")
        if bool(self.files) == bool(self.dataset):
            raise UserError("a data source needs either files or dataset")
        if not isinstance(self.columns, dict) or not all(
            isinstance(name, str) and name.strip() for name in self.columns.values()
        ):
            raise UserError(f"columns of {self} must be a column's name or {{role: column}}, got {self.columns!r}")
        if set(self.columns) not in ROLES:
            allowed = "; ".join("+".join(sorted(roles)) for roles in ROLES)
            raise UserError(f"columns of {self} must name one of {allowed}, got {'+'.join(sorted(self.columns))}")
        if self.probability is not None:
            if isinstance(self.probability, bool) or not isinstance(self.probability, int | float):
                raise UserError(f"probability of a data source must be a number, got {self.probability!r}")
            if not 0 < self.probability <= 1:
                raise UserError(f"probability of {self} must be above 0 and at most 1, got {self.probability}")
        check_whole("skip of a data source", self.skip)
        if self.take is not None:
            check_whole("take of a data source", self.take)
        if self.skip < 0 or (self.take is not None and self.take < 1):
            raise UserError(f"{self}: skip must be at least 0 and take at least 1, got {self.skip} and {self.take}")

    def __str__(self) -> str:
        return self.dataset or ", ".join(self.files)

    @classmethod
    def parse(cls, written: str) -> "Source":
        """A source as a recipe writes it: a path, a folder, a glob, or a mapping of the attributes as JSON."""
        if not written.startswith("{"):
            return cls(files=(written,))
        try:
            values = _JSON.decode(written)
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"a data source is a path, or {{files: ..., columns: ...}} as JSON, got {written:.60}: {error}"
            ) from None
        known = {f.name for f in fields(cls)}
        for key in values:
            if key not in known:
                raise UserError(f"a data source has no field {key!r}; it has {', '.join(sorted(known))}")
        if "files" in values:
            files = [values["files"]] if isinstance(values["files"], str) else values["files"]
            values["files"] = tuple(files) if isinstance(files, list) else files
        if isinstance(values.get("columns"), str):
            values["columns"] = {"text": values["columns"]}
        return cls(**values)


def check_whole(name: str, value: object) -> None:
    """Refuse what is no `int`; a bool is none, and a float is not rounded.

    Raises:
        UserError: with `name`, a field of the user's.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise UserError(f"{name} must be a whole number, got {value!r}")


def read_documents(sources: list[Source], *, streaming: bool, seed: int) -> tuple[IterableDataset, str | None]:
    """All sources as one stream of `FEATURES`, whose `state_dict` is exact to the row.

    Sources with probabilities are interleaved, drawn by `seed`, until the first of them ends; others follow one
    another. With `streaming`, the order of files and shards is drawn by `seed` and the epoch too.

    Returns:
        The rows and a fingerprint of their content; None where that is not known, as on a stream from the Hub.

    Raises:
        UserError: no file matches, a dataset cannot be opened, or a column is missing in it.
    """
    probabilities = [source.probability for source in sources if source.probability is not None]
    if probabilities and len(probabilities) != len(sources):
        raise UserError("give a probability to every data source or to none")
    if probabilities and abs(sum(probabilities) - 1) > 1e-6:
        raise UserError(f"the probabilities of the data sources must add up to 1, got {sum(probabilities):g}")
    opened = [_open(source, streaming, seed) for source in sources]
    parts, contents = [part for part, _ in opened], [content for _, content in opened]
    if streaming:  # a buffer of one leaves rows where they are and draws the order of the shards alone
        parts = [part.shuffle(seed=seed, buffer_size=1, max_buffer_input_shards=1) for part in parts]
    if len(parts) == 1:
        documents = parts[0]
    elif probabilities:
        documents = interleave_datasets(parts, probabilities, seed=seed, stopping_strategy="first_exhausted")
    else:
        documents = concatenate_datasets(parts)
    return documents, None if None in contents else Hasher.hash((contents, probabilities, seed))


def _open(source: Source, streaming: bool, seed: int) -> tuple[IterableDataset, str | None]:
    if source.files:
        files = [file for pattern in source.files for file in _match(pattern)]
        documents = IterableDataset.from_generator(
            _read_files, FEATURES, gen_kwargs={"files": [str(file) for file in files], "columns": source.columns}
        )
        stamps = [(str(file.absolute()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        content = Hasher.hash((stamps, source.columns, source.skip, source.take))
        return _slice(documents, source), content

    try:
        rows = load_dataset(source.dataset, source.name, split=source.split, streaming=streaming)
        names = rows.column_names or list(next(iter(rows), {}))
    except Exception as error:  # builders raise what they like
        where = f"dataset {source.dataset!r}" + (f", {source.name}" if source.name else "")
        raise UserError(f"{where}, split {source.split!r}: {reason(error)}") from error
    if missing := sorted(set(source.columns.values()) - set(names)):
        raise UserError(f"{source.dataset} {_no_column(missing[0], names)}")
    if rows.column_names:  # the others are not even decoded; where names are unknown, rows may differ in them
        names = sorted(set(source.columns.values()))
        rows = rows.select_columns(names)
    content = Hasher.hash((rows._fingerprint, source.columns)) if isinstance(rows, Dataset) else None
    count = rows.num_rows if isinstance(rows, Dataset) else None
    rows = _slice(rows, source)
    if isinstance(rows, Dataset):
        if not len(rows):
            raise UserError(
                f"{source.dataset}: split {source.split} holds {count:,} row(s), and skip leaves none of them"
            )
        if source.probability is not None:  # the mixture may end before this source: what is left out is drawn
            rows = rows.shuffle(seed=seed)
        rows = rows.to_iterable_dataset()
    label = partial(_label, columns=source.columns, name=f"{source.dataset}[{source.split}]")
    documents = rows.map(label, with_indices=True, remove_columns=names, features=FEATURES)
    return documents, None if content is None else Hasher.hash((content, source.skip, source.take))


def _slice(rows: Dataset | IterableDataset, source: Source) -> Dataset | IterableDataset:
    if source.skip:
        rows = rows.skip(min(source.skip, sys.maxsize))
    return rows if source.take is None else rows.take(min(source.take, sys.maxsize))


def _label(row: dict, index: int, columns: dict[str, str], name: str) -> dict:
    return _document(row, columns, f"{name}: row {index}")


def _match(pattern: str) -> list[Path]:
    if os.path.isdir(pattern):
        found = [path for path in Path(pattern).rglob("*") if _kind(path) in _TABLES + _TEXTS and path.is_file()]
        found = [path for path in found if not any(p.startswith(".") for p in path.relative_to(pattern).parts)]
    else:
        found = [Path(path) for path in glob.glob(pattern, recursive=True) if os.path.isfile(path)]
    if not found:
        raise UserError(f"no file matches {pattern!r}")
    for path in found:
        if _kind(path) not in (*_CERTAIN, *_ARCHIVES) and (ending := _table_within(path)):
            raise UserError(
                f"{path} is named like a table ({ending}) and would be read as text: tables are read from "
                f"{', '.join(_TABLES)}, and the name of a text wants .txt without {ending}"
            )
        if _kind(path) in _ARCHIVES:
            raise UserError(
                f"{path} is an archive; unpack it, or compress each file by itself ({', '.join(_COMPRESSED)})"
            )
        if path.suffix.lower() in _COMPRESSED and infer_compression(path.name) is None:
            raise UserError(f"{path}: reading {path.suffix} needs a package that is not installed (zstandard for .zst)")
    return sorted(found)


def _kind(path: Path) -> str:
    """The ending that says how a file is read, without its compression's."""
    return (path.with_suffix("").suffix if path.suffix.lower() in _COMPRESSED else path.suffix).lower()


def _table_within(path: Path) -> str | None:
    """The first ending of a name that begins like a table's: `.jsonl` of `a.jsonl.bak`, `.csv~` of `a.csv~`."""
    return next((ending for ending in path.suffixes if ending.lower().startswith((*_TABLES, ".tsv"))), None)


def _read_files(files: list[str], columns: dict[str, str]) -> Iterator[dict]:
    for file in files:
        kind = _kind(Path(file))
        number = 0
        try:
            if kind in _READERS:
                for row, number in _READERS[kind](file, sorted(set(columns.values()))):
                    yield _document(row, columns, f"{file}:{number}")
            else:
                yield _document(_read_text(file, columns), {"text": "text"}, file)
        except Exception as error:  # each format and compression raises its own
            after = f" after row {number}" if number else ""
            raise UserError(f"{file}: cannot be read{after}: {reason(error)}") from error


class _BadRow(ValueError):
    """Says what is wrong with a row. A reader yields it in the place of a row that it cannot read."""


# A row as its file has it, and the number of its line (in a list or a parquet file, of the row), counted from 1.
_Rows = Iterator[tuple[object, int]]


def _open_text(file: str, newline: str | None = None) -> fsspec.core.OpenFile:
    """`file` as text without its byte-order mark. Bytes that are not UTF-8 stay in it, for their row to be named."""
    return fsspec.open(file, "rt", compression="infer", encoding="utf-8-sig", errors="surrogateescape", newline=newline)


def _read_text(file: str, columns: dict[str, str]) -> object:
    if "text" not in columns:
        return _BadRow(f"is one document of text; {', '.join(columns)} are read from {', '.join(_TABLES)}")
    with _open_text(file) as opened:
        text = opened.read()
    if "\0" in text:
        return _BadRow("is not text; it holds NUL bytes")
    try:
        return {"text": _text(text)}
    except _BadRow as bad:  # of the file, which has no column to name
        return bad


class _Twice:
    """In the place of a value whose name an object holds twice."""

    def __repr__(self) -> str:
        return "two values"


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        found |= {name: _Twice() for name, count in Counter(name for name, _ in pairs).items() if count > 1}
    return found


_JSON = json.JSONDecoder(object_pairs_hook=_object)


def _read_jsonl(file: str, asked: Sequence[str]) -> _Rows:
    with fsspec.open(file, "rb", compression="infer") as lines:
        for number, line in enumerate(lines, 1):
            text = line.strip().decode("utf-8-sig", "surrogateescape")
            row: object
            try:
                row = _JSON.decode(text) if text else _BadRow("is an empty line; a row is an object in one line")
            except (ValueError, RecursionError) as error:
                row = _BadRow(f"is not JSON: {error}")
            yield row, number


def _read_json(file: str, asked: Sequence[str]) -> _Rows:
    with _open_text(file) as text:
        first = next((line.strip() for line in text if line.strip()), "")
        text.seek(0)
        if first.startswith("["):
            for number, row in enumerate(_JSON.decode(text.read()), 1):
                yield row, number
            return
        if first and not _length_of_json(first) and _length_of_json(text.read().strip()):
            raise ValueError(
                "its object goes over several lines; it must hold a list of rows, [{...}, ...], or a row a line"
            )
    yield from _read_jsonl(file, asked)  # JSON lines by another name


def _length_of_json(text: str) -> int:
    """Characters of the value that `text` begins with; 0 where it begins with none that is whole."""
    try:
        return _JSON.raw_decode(text)[1]
    except (ValueError, RecursionError):
        return 0


def _read_parquet(file: str, asked: Sequence[str]) -> _Rows:
    number = 0
    with pyarrow.parquet.ParquetFile(file) as table:
        names = table.schema_arrow.names
        _check_header(names, asked)
        missing = [name for name in asked if name not in names]
        for batch in table.iter_batches(batch_size=256, columns=[name for name in asked if name in names]):
            for index in range(batch.num_rows):
                number += 1
                yield _no_column(missing[0], names) if missing else _parquet_row(batch, index, asked), number


def _parquet_row(batch: pyarrow.RecordBatch, index: int, asked: Sequence[str]) -> dict[str, object] | _BadRow:
    row = {}
    for name in asked:
        try:
            row[name] = batch.column(name)[index].as_py()
        except Exception as error:  # a date outside Python's years, text that is not UTF-8
            return _BadRow(f"column {name!r} cannot be read: {reason(error)}")
    return row


def _read_csv(file: str, asked: Sequence[str]) -> _Rows:
    csv.field_size_limit(_LONGEST_FIELD)
    with _open_text(file, newline="") as lines:
        records = _csv_records(lines)
        header, _ = next((record for record in records if record[0]), ([], 0))
        if isinstance(header, _BadRow):
            raise ValueError(f"its header {header}")
        _check_header(header, asked)
        for cells, number in records:
            if isinstance(cells, list):
                if not cells:
                    cells = _BadRow("is an empty line; a row has the header's columns")
                elif len(cells) != len(header):
                    cells = _BadRow(
                        f"has {len(cells)} column(s) where the header has {len(header)}; "
                        "a comma or a line break within a column needs quotes around the column"
                    )
            yield dict(zip(header, cells, strict=True)) if isinstance(cells, list) else cells, number


def _csv_records(lines: Iterable[str]) -> Iterator[tuple[list[str] | _BadRow, int]]:
    """The cells of each record, and the line on which it begins.

    Of a record whose quotes are wrong, the first line alone is bad, and reading goes on with the second: a quote that
    nothing closes would otherwise take all rows after it along.
    """
    lines = iter(lines)
    ahead: deque[str] = deque()
    taken: list[str] = []

    def pull() -> Iterator[str]:
        while ahead:
            taken.append(ahead.popleft())
            yield taken[-1]
        for line in lines:
            taken.append(line)
            yield line

    reader, number = csv.reader(pull(), strict=True), 1
    while True:
        taken.clear()
        wrong = ""
        cells: list[str] | None = None
        try:
            cells = next(reader, None)
            if len(taken) > 1 and not _WELL_QUOTED.fullmatch("".join(taken)):
                wrong = "a quote within a column that opens with none"
        except csv.Error as error:
            wrong = str(error)
        if wrong:
            ahead.extendleft(reversed(taken[1:]))
            del taken[1:]
            reader = csv.reader(pull(), strict=True)
            rule = "a column that opens with a quote must close with one, and double those within"
            yield _BadRow(f"is not CSV: {rule} ({wrong})"), number
        elif cells is None:
            return
        else:
            yield cells, number
        number += len(taken)


_READERS: dict[str, Callable[[str, Sequence[str]], _Rows]] = {
    ".jsonl": _read_jsonl,
    ".jsonlines": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".parquet": _read_parquet,
    ".csv": _read_csv,
}


def _check_header(names: Sequence[str], asked: Sequence[str]) -> None:
    for name in asked:
        if names.count(name) > 1:
            raise ValueError(f"its header names the column {name!r} twice, and only one can be read")


def _no_column(name: str, names: Iterable[object]) -> _BadRow:
    return _BadRow(f"has no column {name!r}; it has {', '.join(map(str, names)) or 'none':.200}")


def _document(row: object, columns: dict[str, str], origin: str) -> dict:
    """`row` in the shape of `FEATURES`."""
    document = dict.fromkeys(FEATURES) | {"origin": origin}
    try:
        return document | _by_role(row, columns)
    except _BadRow as bad:
        return document | {"problem": _printable(str(bad))}


def _by_role(row: object, columns: dict[str, str]) -> dict[str, object]:
    """The values of the columns asked for, each under its role.

    Raises:
        _BadRow: what is wrong with it.
    """
    if isinstance(row, _BadRow):
        raise row
    if not isinstance(row, dict):
        raise _BadRow(f"must be an object, got {_shown(row)}; a row names its columns, {{column: value, ...}}")
    values: dict[str, object] = {}
    for role, column in columns.items():
        if column not in row:
            raise _no_column(column, row)
        try:
            if role == "messages":
                values[role] = _messages(row[column])
            else:
                values[role] = _text(row[column], empty=role == "system")
        except _BadRow as bad:
            raise _BadRow(f"column {column!r} {bad}") from None
    return values


def _text(value: object, empty: bool = False) -> str | None:
    """`value` if it is text that says something; with `empty`, None for text that says nothing, and for None."""
    if empty and value is None:
        return None
    if not isinstance(value, str):
        raise _BadRow(f"must hold text, got {_shown(value)}")
    _check_unicode(value)
    if value.strip():
        return value
    if not empty:
        raise _BadRow("is empty")
    return None


def _messages(value: object) -> list[dict[str, str]]:
    """A conversation as `[{role, content}]`, from that form or ShareGPT's `[{from, value}]`."""
    if not isinstance(value, list) or not value:
        raise _BadRow(f"must hold messages, got {_shown(value)}; they are a list of {{role: ..., content: ...}}")
    messages = []
    for number, message in enumerate(value, 1):
        role = content = None
        if isinstance(message, dict):
            role = message.get("role") or message.get("from")
            content = message.get("content")
            content = message.get("value") if content is None else content
        if not isinstance(role, str) or not role or not isinstance(content, str):
            raise _BadRow(
                f"must hold messages, got {_shown(value)}; number {number} has no text as role and content, or as from "
                "and value"
            )
        role = _SPEAKERS.get(role, role)
        if role in _SAY_SOMETHING and not content.strip():
            raise _BadRow(f"holds an empty message of the {role}, number {number}; only others may be empty")
        _check_unicode(role + content)
        messages.append({"role": role, "content": content})
    return messages


def _check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        if "\udc80" <= text[error.start] <= "\udcff":  # what `surrogateescape` makes of a byte
            raise _BadRow("holds bytes that are not UTF-8") from None
        raise _BadRow("holds half of a surrogate pair, which is no text") from None


def _shown(value: object) -> str:
    """`value` for a message, however deep or long it is."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = 60
    return short.repr(value)


def reason(error: BaseException) -> str:
    """What the exception at the bottom says, in one line: libraries wrap it in their own."""
    while error.__cause__ is not None:
        error = error.__cause__
    said = " ".join(str(error).split())
    if isinstance(error, KeyError) or not said:  # a name alone says nothing
        said = f"{type(error).__name__} {said}".strip()
    return _printable(f"{said:.300}")


def _printable(text: str) -> str:
    """`text` in one line that any terminal and any file takes."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


class RowCheck:
    """Lets good rows pass; names the first bad one, or counts them.

    Attributes:
        rows: rows seen, bad ones included.
        skipped: bad ones among them.
        first: the first bad one, as `origin: problem`.
    """

    def __init__(self, skip: bool, rows: int = 0, skipped: int = 0, first: str | None = None) -> None:
        self.skip = skip
        self.rows, self.skipped, self.first = rows, skipped, first

    def passes(self, row: dict) -> bool:
        """Whether `row`, of `FEATURES`, can be trained on.

        Raises:
            UserError: it cannot, and bad rows are not to be skipped.
        """
        self.rows += 1
        if row["problem"] is None:
            return True
        said = f"{row['origin']}: {row['problem']}"
        if not self.skip:
            raise UserError(f"{said} (on_bad_row: skip leaves such rows out and counts them)")
        self.skipped += 1
        self.first = self.first or said
        return False

    @property
    def counts(self) -> dict:
        """What the constructor takes to count on."""
        return {"rows": self.rows, "skipped": self.skipped, "first": self.first}

    def __str__(self) -> str:
        return f"skipped {self.skipped:,} of {self.rows:,} rows; the first: {self.first}"
