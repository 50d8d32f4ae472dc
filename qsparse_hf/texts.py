"""Texts to measure on: those rows of a source that can be read, and the first tokens of several sources."""

import logging
from collections.abc import Collection, Iterator
from typing import Any

from transformers import PreTrainedTokenizerBase

from .errors import UserError
from .sources import RowCheck, Source, read_documents

logger = logging.getLogger(__name__)


def good_rows(source: Source) -> Iterator[dict[str, Any]]:
    """The rows that can be read; what is wrong with the others is said once.

    Raises:
        UserError: there are none.
    """
    check = RowCheck(skip=True)
    documents, _ = read_documents([source], streaming=False, seed=0)  # a stream's order would be drawn
    for row in documents:
        if check.passes(row):
            yield row
    if check.skipped == check.rows:
        raise UserError(check.first or f"{source} holds no row")
    if check.skipped:
        logger.warning("%s: %s", source, check)


def first_tokens(sources: Collection[Source], tokenizer: PreTrainedTokenizerBase, most: int) -> list[int]:
    """As many of each source, from its first document on, `most` in all; where one is short, the next gives more."""
    ids: list[int] = []
    for number, source in enumerate(sources, start=1):
        share = most * number // len(sources)
        for row in good_rows(source):
            if len(ids) >= share:
                break
            ids += tokenizer(row["text"], verbose=False)["input_ids"][: share - len(ids)]
    return ids
