"""Text into packed sequences.

Documents are tokenized, closed with the end-of-text token, laid end to end and cut into sequences of one length; the
last, incomplete one is dropped. Position ids restart with every document, which is how Transformers' attention masks
(and variable-length flash attention) keep documents apart.
"""

import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset, Features, IterableDataset, List, Value
from datasets.exceptions import DatasetGenerationError
from datasets.fingerprint import Hasher
from transformers import PreTrainedTokenizerBase

from ..errors import UserError, shortened
from ..sources import RowCheck, Source, check_whole, read_documents, reason

logger = logging.getLogger(__name__)

_TOKENIZED_TOGETHER = 128  # documents: enough for the tokenizer's threads, few enough to read again on resume
_CACHE_VERSION = 2  # goes up when the same files become other rows: what was cached before is then prepared again


@dataclass
class DataArguments:
    """What is read and how it becomes sequences.

    Raises:
        UserError: a field outside its range.
    """

    train_data: list[str | dict[str, Any]] = field(
        default_factory=list,
        metadata={"help": "Sources: paths, folders, globs, or {dataset: ..., columns: ..., probability: ...}."},
    )
    eval_data: list[str | dict[str, Any]] | dict[str, Any] = field(
        default_factory=list,
        metadata={"help": "The same for evaluation; or {name: sources}, for texts whose losses are logged by name."},
    )
    sequence_length: int = field(default=2048, metadata={"help": "Tokens in a sequence."})
    streaming: bool = field(
        default=False, metadata={"help": "Read and pack the training data while training, instead of before, on disk."}
    )
    shuffle_window: int = field(
        default=1024, metadata={"help": "Streaming: so many packed sequences are shuffled among themselves."}
    )
    repeat_data: bool = field(
        default=False, metadata={"help": "Begin anew, in another order, where max_steps needs more than there is."}
    )
    on_bad_row: str = field(
        default="error",
        metadata={"help": "A row that is malformed, empty or without its column: error, or skip and count."},
    )

    def __post_init__(self) -> None:
        if not self.train_data:
            raise UserError("train_data must name what to train on")
        self.train_sources = _parse_sources("train_data", self.train_data)
        self.eval_sources = {
            name: _parse_sources(f"eval_data: {name}" if name else "eval_data", sources)
            for name, sources in texts_by_name(self.eval_data).items()
        }
        for name, least in (("sequence_length", 2), ("shuffle_window", 1)):
            value = getattr(self, name)
            check_whole(name, value)
            if value < least:
                raise UserError(f"{name} must be at least {least}, got {value}")
        for name in ("streaming", "repeat_data"):
            if not isinstance(getattr(self, name), bool):
                raise UserError(f"{name} must be true or false, got {getattr(self, name)!r}")
        if self.on_bad_row not in ("error", "skip"):
            raise UserError(f"on_bad_row must be error or skip, got {shortened(repr(self.on_bad_row))}")


def texts_by_name(eval_data: list[str | dict[str, Any]] | dict[str, Any]) -> dict[str, Any]:
    """The sources of each evaluation text by its name, which is empty where there is a single text without one.

    Raises:
        UserError: a name that cannot be part of a metric's.
    """
    if not isinstance(eval_data, dict):
        return {"": eval_data} if eval_data else {}
    if eval_data.keys() & {"files", "dataset"}:  # a source
        return {"": [eval_data]}
    for name in eval_data:
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_]+", name):
            raise UserError(f"eval_data names texts by letters, digits and _, got {shortened(repr(name))}")
    return {name: sources if isinstance(sources, list) else [sources] for name, sources in eval_data.items()}


def _parse_sources(field_name: str, written: Any) -> list[Source]:
    sources = written if isinstance(written, list) else []
    sources = [json.dumps(source) if isinstance(source, dict) else source for source in sources]
    if not sources or not all(isinstance(source, str) for source in sources):
        raise UserError(f"{field_name} must be a list of data sources, each as text, got {written!r}")
    return [Source.parse(source) for source in sources]


class Packed(NamedTuple):
    """A sequence and how many tokens of the document it ends in are used up, its end token included."""

    row: dict[str, list[int]]
    used: int


def pack(documents: Iterable[list[int]], end: int, sequence_length: int, start: int = 0) -> Iterator[Packed]:
    """Lay documents (token ids) end to end, each closed by the token `end`, and cut sequences from them.

    Args:
        documents: their tokens; a document may end in `end` already, as some tokenizers' templates have it.
        end: closes every document, once.
        sequence_length: tokens in a sequence.
        start: tokens of the first document that are used up already.

    Yields:
        `input_ids` and `position_ids`, `sequence_length` each; positions count from 0 in every document, and from the
        cut in a document that was cut.
    """
    tokens: list[int] = []
    positions: list[int] = []
    for document in documents:
        document = document.copy()
        while document[-1:] == [end]:
            document.pop()
        document.append(end)
        while start < len(document):
            piece = document[start : start + sequence_length - len(tokens)]
            tokens += piece
            positions += range(len(piece))
            start += len(piece)
            if len(tokens) == sequence_length:
                yield Packed({"input_ids": tokens, "position_ids": positions}, start)
                tokens, positions = [], []
        start = 0


def collate_packed(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """Stack packed rows into `input_ids`, `position_ids` and `labels`, all `[B, T]` int64.

    No document's first token is predicted: what stands before it belongs to another document.
    """
    batch = {name: torch.tensor([row[name] for row in rows]) for name in ("input_ids", "position_ids")}
    batch["labels"] = batch["input_ids"].masked_fill(batch["position_ids"] == 0, -100)
    return batch


def text_batches(documents: Iterable[dict], check: RowCheck) -> Iterator[list[str]]:
    """The texts of the rows that pass, as many at a time as are tokenized together."""
    texts = (row["text"] for row in documents if check.passes(row))
    while batch := list(islice(texts, _TOKENIZED_TOGETHER)):
        yield batch


def tokenize(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """The token ids of each text, as the tokenizer's template begins and ends it, with one begin token at most.

    A text that spells the begin token out would otherwise stand behind two.
    """
    documents = tokenizer(texts, verbose=False)["input_ids"]
    for document in documents:
        while document[:2] == [tokenizer.bos_token_id] * 2:
            document.pop(0)
    return documents


def end_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that closes a document."""
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer {tokenizer.name_or_path!r} has no eos_token; set one to mark where texts end")
    return tokenizer.eos_token_id


def require_text(sources: list[Source]) -> None:
    """Language modelling reads one column of text."""
    for source in sources:
        if set(source.columns) != {"text"}:
            raise UserError(f"language modelling reads one column, {{text: ...}}; {source} names {source.columns}")


def prepare_on_disk(
    generate: Callable[[IterableDataset, RowCheck], Iterator[dict]],
    features: Features | None,
    sources: list[Source],
    arguments: DataArguments,
    seed: int,
    key: tuple,
) -> Dataset:
    """What `generate` makes of the rows of `sources`, kept in the cache of `datasets` under their content and `key`.

    Rows that were skipped are counted in a warning, also when the cache answers.

    Raises:
        UserError: a bad row, or nothing to train on.
    """
    documents, content = read_documents(sources, streaming=False, seed=seed)
    check = RowCheck(skip=arguments.on_bad_row == "skip")

    def rows() -> Iterator[dict]:
        found = False
        for row in generate(documents, check):
            found = True
            yield row
        if not found:
            usable = check.rows - check.skipped
            raise UserError(
                f"{', '.join(map(str, sources))}: {usable} usable document(s) of {check.rows} hold less than one "
                f"sequence of {arguments.sequence_length} tokens" + (f"; {check}" if check.skipped else "")
            )

    fingerprint = Hasher.hash((_CACHE_VERSION, content, arguments.on_bad_row, key))
    try:
        dataset = Dataset.from_generator(rows, features, fingerprint=fingerprint)
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        raise UserError(f"{', '.join(map(str, sources))}: cannot be prepared: {reason(error)}") from error
    sidecar = Path(dataset.cache_files[0]["filename"]).with_suffix(".rows.json")
    if check.rows:
        sidecar.write_text(json.dumps(check.counts))
    elif sidecar.exists():
        check = RowCheck(skip=True, **json.loads(sidecar.read_text()))
    if check.skipped:
        logger.warning(str(check))
    return dataset


def pack_on_disk(
    sources: list[Source], tokenizer: PreTrainedTokenizerBase, arguments: DataArguments, seed: int
) -> Dataset:
    """Read, tokenize and pack `sources`, cached on disk.

    Returns:
        Rows of `input_ids` and `position_ids`, both `[sequence_length]` int32.

    Raises:
        UserError: the tokenizer has no end-of-text token, a bad row, or less text than one sequence.
    """
    require_text(sources)
    end = end_token(tokenizer)

    def generate(documents: IterableDataset, check: RowCheck) -> Iterator[dict]:
        batches = text_batches(documents, check)
        tokenized = (tokens for texts in batches for tokens in tokenize(texts, tokenizer))
        return (packed.row for packed in pack(tokenized, end, arguments.sequence_length))

    features = Features(dict.fromkeys(("input_ids", "position_ids"), List(Value("int32"))))
    key = ("pack", identity(tokenizer), arguments.sequence_length)
    return prepare_on_disk(generate, features, sources, arguments, seed, key)


def identity(tokenizer: PreTrainedTokenizerBase) -> str:
    """A fingerprint of what the tokenizer does."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    marks = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.chat_template)
    return Hasher.hash((backend.to_str() if backend else tokenizer, *marks))
