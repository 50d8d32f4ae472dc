"""Text into packed sequences.

A document is one row of a dataset or one text file. Documents are tokenized, closed with the end-of-text token, laid
end to end and cut into sequences of one length; the last, incomplete one is dropped. Position ids restart with every
document, which is how Transformers' attention masks (and variable-length flash attention) keep documents apart.
"""

import glob
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from datasets import Dataset, Features, List, Value, concatenate_datasets, load_dataset
from transformers import PreTrainedTokenizerBase

from ..errors import UserError, first_line

# Files of tables are read by the builder of that name; any other file is one document.
_TABLES = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}
_TEXTS = {".txt", ".md", ".rst", ".py"}


@dataclass
class DataArguments:
    """Where the text comes from and how long a sequence is."""

    train_files: list[str] = field(
        default_factory=list,
        metadata={"help": "Files, folders or globs: .jsonl, .json, .parquet and .csv hold rows, others one document."},
    )
    eval_files: list[str] = field(default_factory=list, metadata={"help": "The same for evaluation."})
    dataset: str | None = field(default=None, metadata={"help": "A dataset on the Hub or a local folder, instead."})
    dataset_config: str | None = field(default=None, metadata={"help": "Its configuration (subset)."})
    train_split: str = field(default="train", metadata={"help": "Its split to train on, slices like train[:1%] too."})
    eval_split: str | None = field(default=None, metadata={"help": "Its split to evaluate on."})
    text_column: str = field(default="text", metadata={"help": "The column that holds the text."})
    sequence_length: int = field(default=2048, metadata={"help": "Tokens in a packed sequence."})

    def __post_init__(self) -> None:
        if bool(self.train_files) == bool(self.dataset):
            raise UserError("give either train_files or dataset")
        if self.sequence_length < 2:
            raise UserError(f"sequence_length must be at least 2, got {self.sequence_length}")


def load_documents(arguments: DataArguments) -> tuple[Dataset, Dataset | None]:
    """The training and, where asked for, evaluation documents, with their text in `arguments.text_column`.

    Raises:
        UserError: nothing matches, a source cannot be read, or the column is missing.
    """
    if arguments.dataset is None:
        train = _from_files(arguments.train_files, arguments.text_column)
        return train, _from_files(arguments.eval_files, arguments.text_column) if arguments.eval_files else None

    def split(name: str) -> Dataset:
        try:
            documents = load_dataset(arguments.dataset, arguments.dataset_config, split=name)
        except Exception as error:  # builders raise what they like
            raise UserError(f"dataset {arguments.dataset!r}, split {name!r}: {_reason(error)}") from error
        return _with_text(documents, arguments.text_column, arguments.dataset)

    return split(arguments.train_split), split(arguments.eval_split) if arguments.eval_split else None


def _from_files(patterns: Iterable[str], text_column: str) -> Dataset:
    by_builder: dict[str, list[str]] = {}
    for pattern in patterns:
        files = _match(pattern)
        if not files:
            raise UserError(f"no file matches {pattern!r}")
        for file in files:
            by_builder.setdefault(_TABLES.get(file.suffix, "text"), []).append(str(file))

    parts = []
    for builder, files in by_builder.items():
        options = {"sample_by": "document", "encoding_errors": "replace"} if builder == "text" else {}
        try:
            rows = load_dataset(builder, data_files=files, split="train", **options)
        except Exception as error:  # builders raise what they like
            raise UserError(f"{files[0]} (and {len(files) - 1} more): {_reason(error)}") from error
        if builder == "text" and text_column != "text":
            rows = rows.rename_column("text", text_column)
        parts.append(_with_text(rows, text_column, files[0]).select_columns(text_column))
    return concatenate_datasets(parts)


def _match(pattern: str) -> list[Path]:
    if Path(pattern).is_dir():
        return sorted(path for path in Path(pattern).rglob("*") if path.suffix in _TABLES.keys() | _TEXTS)
    return sorted(path for path in map(Path, glob.glob(pattern, recursive=True)) if path.is_file())


def _with_text(documents: Dataset, column: str, source: str) -> Dataset:
    if column not in documents.column_names:
        raise UserError(f"{source} has no column {column!r}; it has {', '.join(documents.column_names)}")
    return documents


def _reason(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return first_line(error)


def pack(documents: Iterable[list[int]], end: int, sequence_length: int) -> Iterator[dict[str, list[int]]]:
    """Lay documents (token ids) end to end, each closed by the token `end`, and cut sequences from them.

    Yields:
        `input_ids` and `position_ids`, `sequence_length` each; positions count from 0 in every document, and from the
        cut in a document that was cut.
    """
    tokens: list[int] = []
    positions: list[int] = []
    for document in documents:
        document = [*document, end]
        start = 0
        while start < len(document):
            piece = document[start : start + sequence_length - len(tokens)]
            tokens += piece
            positions += range(len(piece))
            start += len(piece)
            if len(tokens) == sequence_length:
                yield {"input_ids": tokens, "position_ids": positions}
                tokens, positions = [], []


def pack_dataset(
    documents: Dataset, tokenizer: PreTrainedTokenizerBase, text_column: str, sequence_length: int
) -> Dataset:
    """Tokenize `documents` and pack them, each step cached on disk by `datasets`.

    Returns:
        Rows of `input_ids` and `position_ids`, both `[sequence_length]`.

    Raises:
        UserError: the tokenizer has no end-of-text token, or the text is shorter than one sequence.
    """
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer {tokenizer.name_or_path!r} has no eos_token; set one to mark where texts end")

    def tokenize(rows: dict[str, list], indices: list[int]) -> dict[str, list[list[int]]]:
        for index, text in zip(indices, rows[text_column], strict=True):
            if not isinstance(text, str):
                raise UserError(f"row {index}: column {text_column!r} must hold text, got {text!r}")
        return {"tokens": tokenizer(rows[text_column], verbose=False)["input_ids"]}

    tokenized = documents.map(
        tokenize,
        batched=True,
        with_indices=True,
        remove_columns=documents.column_names,
        desc="tokenizing",
    )

    def rows(tokenized: Dataset) -> Iterator[dict[str, list[int]]]:
        return pack((row["tokens"] for row in tokenized), tokenizer.eos_token_id, sequence_length)

    if next(rows(tokenized), None) is None:
        raise UserError(f"{len(documents)} document(s) hold less than one sequence of {sequence_length} tokens")
    features = Features(dict.fromkeys(("input_ids", "position_ids"), List(Value("int32"))))
    return Dataset.from_generator(rows, features, gen_kwargs={"tokenized": tokenized})


def collate_packed(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """Stack packed rows into `input_ids`, `position_ids` and `labels`, all `[B, T]` int64.

    No document's first token is predicted: what stands before it belongs to another document.
    """
    batch = {name: torch.tensor([row[name] for row in rows]) for name in ("input_ids", "position_ids")}
    batch["labels"] = batch["input_ids"].masked_fill(batch["position_ids"] == 0, -100)
    return batch
