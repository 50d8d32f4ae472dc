"""Packed sequences straight from a stream of documents: nothing is prepared on disk, and a run goes on where it was.

Which sequences make an update depends on the seed and the update's number alone, not on the number of processes: one
process reads the stream and Accelerate deals it out to the others.
"""

import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import numpy as np
import torch.utils.data
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..errors import UserError, user_errors
from ..sources import RowCheck, Source, read_documents
from .data import DataArguments, end_token, pack, require_text, text_batches, tokenize


class PackedStream(torch.utils.data.IterableDataset):
    """Packed rows of a stream of documents, shuffled within windows, that can go on at any row.

    A window is prepared by a thread while the one before it is trained on. Its order depends on the seed and its
    number, and where it begins in the documents is remembered until it has been trained on.

    Attributes:
        trained: rows that have been trained on; whoever trains counts them here. `state` is taken at this row.
        rows_per_update: the stream gives multiples of this many rows and leaves out what is over at its end.
        check: counts the documents read.
        rows: how many rows the stream held, once it has ended in the middle of a window; None before.
    """

    def __init__(
        self, sources: list[Source], tokenizer: PreTrainedTokenizerBase, arguments: DataArguments, seed: int
    ) -> None:
        require_text(sources)
        self.tokenizer = tokenizer
        self.end = end_token(tokenizer)
        self.sequence_length = arguments.sequence_length
        self.window = arguments.shuffle_window
        self.repeat = arguments.repeat_data
        self.seed = seed
        self.check = RowCheck(skip=arguments.on_bad_row == "skip")
        self.rows: int | None = None
        self.documents, _ = read_documents(sources, streaming=True, seed=seed)
        self.trained = 0
        self.rows_per_update = 1
        self._begins: dict[int, dict] = {0: {"epoch": 0, "documents": None, "document": 0, "used": 0}}  # by window

    def state(self) -> dict:
        """What `resume` needs to go on after the rows trained on, as JSON takes it; what lies before is forgotten."""
        window = self.trained // self.window
        for number in list(self._begins):  # in place: the packing thread adds to it
            if number < window:
                del self._begins[number]
        return {"trained": self.trained, "window": self.window, "begin": self._begins[window]}

    def resume(self, state: dict) -> None:
        """Go on where `state` was taken.

        Raises:
            UserError: the windows were of another size then.
        """
        if state["window"] != self.window:
            raise UserError(f"shuffle_window was {state['window']} when the run began, got {self.window}")
        logging.getLogger("datasets.iterable_dataset").addFilter(_says_something)
        self.trained = state["trained"]
        self._begins = {self.trained // self.window: state["begin"]}

    def __iter__(self) -> Iterator[dict[str, list[int]]]:
        rows = self._rows()
        while len(update := list(islice(rows, self.rows_per_update))) == self.rows_per_update:
            yield from update

    def _rows(self) -> Iterator[dict[str, list[int]]]:
        number = self.trained // self.window
        skipped = self.trained % self.window
        packed = self._pack(self._begins[number])
        pool = ThreadPoolExecutor(1, thread_name_prefix="packing")
        try:
            upcoming = pool.submit(self._fill, packed, number)
            while window := upcoming.result():
                number += 1
                upcoming = pool.submit(self._fill, packed, number)
                yield from window[skipped:]
                skipped = 0
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _fill(self, packed: Iterator[tuple[dict, dict]], number: int) -> list[dict[str, list[int]]]:
        with user_errors("the training data"):  # a library's dataset raises what it likes, in the middle too
            window = list(islice(packed, self.window))
        if len(window) == self.window:
            self._begins[number + 1] = window[-1][1]
        elif window:
            self.rows = number * self.window + len(window)
        order = np.random.default_rng((self.seed, number)).permutation(len(window))
        return [window[index][0] for index in order]

    def _pack(self, begin: dict) -> Iterator[tuple[dict, dict]]:
        """Rows from `begin` on, each with where the next one begins."""
        self.check = RowCheck(self.check.skip, **begin.get("counts", {}))
        here = dict(begin)
        for packed in pack(self._tokenize(here), self.end, self.sequence_length, begin["used"]):
            yield packed.row, here | {"used": packed.used}

    def _tokenize(self, here: dict) -> Iterator[list[int]]:
        """Documents from `here` on; `here` is kept at the one that was yielded last."""
        first = here["document"]
        while True:
            self.documents.set_epoch(here["epoch"])
            if here["documents"] is not None:
                self.documents.load_state_dict(here["documents"])
            found = False
            here |= {"counts": self.check.counts}
            rows = iter(self.documents)
            state = here["documents"] or self.documents.state_dict()
            for texts in text_batches(rows, self.check):
                found = True
                here["documents"] = state
                for index, tokens in enumerate(tokenize(texts, self.tokenizer)):
                    if index >= first:
                        here["document"] = index
                        yield tokens
                first = 0
                state = self.documents.state_dict()
                here["counts"] = self.check.counts
            if not found and here["documents"] is None:
                counts = f"; {self.check}" if self.check.rows else ""
                raise UserError(f"the training data holds no usable row{counts}")
            if not self.repeat:
                return
            here |= {"epoch": here["epoch"] + 1, "documents": None}


def _says_something(record: logging.LogRecord) -> bool:
    return "shuffle buffer" not in record.getMessage()  # it holds nothing here, and nothing is lost with it


class StreamProgress(TrainerCallback):
    """Counts what a run has trained on of its stream, and ends the run where the stream does."""

    def __init__(self, stream: PackedStream) -> None:
        self.stream = stream

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        self.stream.trained += self.stream.rows_per_update
        state.epoch = state.global_step / state.max_steps  # the Trainer's own count begins anew in a resumed run

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        if state.global_step < state.max_steps and not control.should_training_stop:
            control.should_save = control.should_training_stop = True
