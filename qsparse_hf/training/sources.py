"""Where documents come from: local files read row by row, datasets of the Hub, and mixtures of them.

Every source yields rows of one shape (`FEATURES`): the text by its role, where the row stood (`origin`), and what is
wrong with it (`problem`), so that a bad row can be named or counted wherever the rows are read.
"""

import csv
import glob
import json
from collections.abc import Iterator
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

from ..errors import UserError, one_line

# What a column of a source can be. Language modelling reads `text`; SFT reads any of these sets.
ROLES = ({"text"}, {"messages"}, {"prompt", "completion"}, {"system", "prompt", "completion"})
_MESSAGE = {"role": Value("string"), "content": Value("large_string")}
FEATURES = Features(
    dict.fromkeys(("text", "system", "prompt", "completion"), Value("large_string"))
    | {"messages": List(_MESSAGE), "origin": Value("string"), "problem": Value("string")}
)

_TABLES = (".jsonl", ".ndjson", ".json", ".parquet", ".csv")
_TEXTS = (".txt", ".md", ".rst", ".py")
_COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
# ShareGPT's names for a message's fields and speakers.
_SPEAKERS = {"human": "user", "gpt": "assistant"}


@dataclass(frozen=True)
class Source:
    """One place that documents come from.

    Attributes:
        files: paths, folders or globs. `.jsonl`, `.ndjson`, `.json`, `.parquet` and `.csv` (also compressed) hold rows;
            any other text file is one document, of a folder those that end in `.txt`, `.md`, `.rst` or `.py`.
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
        if bool(self.files) == bool(self.dataset):
            raise UserError("a data source needs either files or dataset")
        if set(self.columns) not in ROLES:
            allowed = "; ".join("+".join(sorted(roles)) for roles in ROLES)
            raise UserError(f"columns of {self} must name one of {allowed}, got {'+'.join(sorted(self.columns))}")
        if self.probability is not None and not 0 < self.probability <= 1:
            raise UserError(f"probability of {self} must be above 0 and at most 1, got {self.probability}")
        if self.skip < 0 or (self.take is not None and self.take < 1):
            raise UserError(f"{self}: skip must be at least 0 and take at least 1, got {self.skip} and {self.take}")

    def __str__(self) -> str:
        return self.dataset or ", ".join(self.files)

    @classmethod
    def parse(cls, written: str) -> "Source":
        """A source as a recipe writes it: a path, a folder, a glob, or a mapping of the attributes as JSON."""
        if not written.startswith("{"):
            return cls(files=(written,))
        values = json.loads(written)
        known = {f.name for f in fields(cls)}
        for key in values:
            if key not in known:
                raise UserError(f"a data source has no field {key!r}; it has {', '.join(sorted(known))}")
        for key, convert in (("probability", float), ("skip", int), ("take", int)):
            if values.get(key) is not None:
                try:
                    values[key] = convert(values[key])
                except ValueError:
                    raise UserError(f"{key} of a data source must be a number, got {values[key]!r}") from None
        if "files" in values:
            files = [values["files"]] if isinstance(values["files"], str) else values["files"]
            if not isinstance(files, list) or not all(isinstance(file, str) for file in files):
                raise UserError(f"files of a data source must be a path or several, got {files!r}")
            values["files"] = tuple(files)
        if isinstance(values.get("columns"), str):
            values["columns"] = {"text": values["columns"]}
        return cls(**values)


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
    parts, contents = zip(*(_open(source, streaming, seed) for source in sources), strict=True)
    if streaming:  # a buffer of one leaves rows where they are and draws the order of the shards alone
        parts = [part.shuffle(seed=seed, buffer_size=1, max_buffer_input_shards=1) for part in parts]
    if len(parts) == 1:
        documents = parts[0]
    elif probabilities:
        documents = interleave_datasets(list(parts), probabilities, seed=seed, stopping_strategy="first_exhausted")
    else:
        documents = concatenate_datasets(list(parts))
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
        names = rows.column_names or list(next(iter(rows)))
    except Exception as error:  # builders raise what they like
        where = f"dataset {source.dataset!r}" + (f", {source.name}" if source.name else "")
        raise UserError(f"{where}, split {source.split!r}: {reason(error)}") from error
    if missing := sorted(set(source.columns.values()) - set(names)):
        raise UserError(f"{source.dataset} has no column {missing[0]!r}; it has {', '.join(names)}")
    content = Hasher.hash((rows._fingerprint, source.columns)) if isinstance(rows, Dataset) else None
    rows = _slice(rows, source)
    if isinstance(rows, Dataset):
        if source.probability is not None:  # the mixture may end before this source: what is left out is drawn
            rows = rows.shuffle(seed=seed)
        rows = rows.to_iterable_dataset()
    label = partial(_label, columns=source.columns, name=f"{source.dataset}[{source.split}]")
    documents = rows.map(label, with_indices=True, remove_columns=names, features=FEATURES)
    return documents, None if content is None else Hasher.hash((content, source.skip, source.take))


def _slice(rows: Dataset | IterableDataset, source: Source) -> Dataset | IterableDataset:
    if source.skip:
        rows = rows.skip(source.skip)
    return rows if source.take is None else rows.take(source.take)


def _label(row: dict, index: int, columns: dict[str, str], name: str) -> dict:
    return _document(row, columns, f"{name}: row {index}")


def _match(pattern: str) -> list[Path]:
    if Path(pattern).is_dir():
        found = [path for path in Path(pattern).rglob("*") if _kind(path) in _TABLES + _TEXTS and path.is_file()]
    else:
        found = [path for path in map(Path, glob.glob(pattern, recursive=True)) if path.is_file()]
    if not found:
        raise UserError(f"no file matches {pattern!r}")
    return sorted(found)


def _kind(path: Path) -> str:
    """The ending that says how a file is read, without its compression's."""
    return (path.with_suffix("").suffix if path.suffix.lower() in _COMPRESSED else path.suffix).lower()


def _read_files(files: list[str], columns: dict[str, str]) -> Iterator[dict]:
    for file in files:
        kind = _kind(Path(file))
        number = 0
        try:
            for row, number in _READERS.get(kind, _read_text)(file):
                origin = file if kind not in _TABLES else f"{file}:{number}"
                yield _document(row, columns if kind in _TABLES else {"text": "text"}, origin)
        except Exception as error:  # each format and compression raises its own
            after = f" after row {number}" if number else ""
            raise UserError(f"{file}: cannot be read{after}: {reason(error)}") from error


def _read_text(file: str) -> Iterator[tuple[dict | str, int]]:
    with fsspec.open(file, "rt", compression="infer", encoding="utf-8", errors="replace") as opened:
        text = opened.read()
        yield "is not text" if "\0" in text else {"text": text}, 1


def _read_jsonl(file: str) -> Iterator[tuple[dict | str, int]]:
    with fsspec.open(file, "rb", compression="infer") as lines:
        for number, line in enumerate(lines, 1):
            line = line.strip()
            try:
                yield json.loads(line) if line else "is an empty line", number
            except (ValueError, RecursionError) as error:
                yield f"is not JSON: {error}", number


def _read_json(file: str) -> Iterator[tuple[dict | str, int]]:
    with fsspec.open(file, "rt", compression="infer", encoding="utf-8") as text:
        begins = next((line.lstrip()[0] for line in text if line.strip()), "")
        if begins == "[":
            text.seek(0)
            yield from zip(json.load(text), range(1, 1 << 62), strict=False)
            return
    yield from _read_jsonl(file)  # JSON lines by another name


def _read_parquet(file: str) -> Iterator[tuple[dict, int]]:
    number = 0
    with pyarrow.parquet.ParquetFile(file) as table:
        for batch in table.iter_batches(batch_size=256):
            for row in batch.to_pylist():
                number += 1
                yield row, number


def _read_csv(file: str) -> Iterator[tuple[dict, int]]:
    csv.field_size_limit(2**31 - 1)  # documents are longer than the 128 KiB that csv allows by default
    with fsspec.open(file, "rt", compression="infer", encoding="utf-8", newline="") as text:
        rows = csv.DictReader(text)
        yield from ((row, rows.line_num) for row in rows)


_READERS = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".parquet": _read_parquet,
    ".csv": _read_csv,
}


def _empty(origin: str) -> dict:
    return dict.fromkeys(FEATURES) | {"origin": origin}


def _document(row: object, columns: dict[str, str], origin: str) -> dict:
    """`row` in the shape of `FEATURES`; a reader's message about an unreadable row is its problem."""
    document = _empty(origin)
    if not isinstance(row, dict):
        return document | {"problem": row if isinstance(row, str) else f"must be an object, got {row!r:.40}"}
    for role, column in columns.items():
        if column not in row:
            return document | {"problem": f"has no column {column!r}; it has {', '.join(map(str, row)) or 'none'}"}
        value = row[column]
        if role == "messages":
            value = _messages(value)
            if value is None:
                return document | {"problem": f"column {column!r} must hold messages, got {row[column]!r:.60}"}
        elif role == "system" and not value:
            value = None
        elif not isinstance(value, str):
            return document | {"problem": f"column {column!r} must hold text, got {value!r:.40}"}
        elif not value.strip():
            return document | {"problem": f"column {column!r} is empty"}
        if not _encodes(value):
            return document | {"problem": f"column {column!r} holds half of a surrogate pair, which is no text"}
        document[role] = value
    return document


def _encodes(value: str | list[dict[str, str]] | None) -> bool:
    try:
        (value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)).encode()
    except UnicodeEncodeError:
        return False
    return True


def _messages(value: object) -> list[dict[str, str]] | None:
    """A conversation as `[{role, content}]`, from that form or ShareGPT's `[{from, value}]`; None for anything else."""
    if not isinstance(value, list) or not value:
        return None
    messages = []
    for message in value:
        if not isinstance(message, dict):
            return None
        role, content = message.get("role") or message.get("from"), message.get("content") or message.get("value")
        if not isinstance(role, str) or not isinstance(content, str):
            return None
        messages.append({"role": _SPEAKERS.get(role, role), "content": content})
    return messages


def reason(error: BaseException) -> str:
    """What the exception at the bottom says: libraries wrap it in their own."""
    while error.__cause__ is not None:
        error = error.__cause__
    return one_line(error)


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
