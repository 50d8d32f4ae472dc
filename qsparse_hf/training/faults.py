"""What a run survives: signals, kills, full disks and numbers that are not finite.

A checkpoint counts once its last file, `COMPLETE`, is there; a kill at any moment leaves the one before it to go on
from. Once an update all processes learn what happened to any of them, so that they save or stop together.
"""

import json
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..errors import UserError, one_line, write_whole
from .throughput import Stopwatch

COMPLETE = "complete"


def complete_checkpoints(output_dir: str | Path) -> list[Path]:
    """The checkpoints in `output_dir` that were written to their end, oldest first."""
    found = [path.parent for path in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*/{COMPLETE}")]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))


def checkpoint_facts(folder: str | Path) -> dict[str, object] | None:
    """What `whole_checkpoint` was told about the run; None of a checkpoint that it did not finish."""
    mark = Path(folder) / COMPLETE
    return json.loads(mark.read_text() or "{}") if mark.exists() else None


@contextmanager
def whole_checkpoint(
    output_dir: str | Path, update: int, writes: bool, wait: Callable[[], None], facts: dict[str, object] | None = None
) -> Iterator[Path]:
    """Around the writing of a checkpoint, in all processes: marks it complete, or leaves nothing of it.

    Args:
        output_dir: of the run.
        update: the checkpoint's number.
        writes: whether this process writes the checkpoint's shared files.
        wait: returns once every process has called it.
        facts: of the run, kept for `checkpoint_facts`.

    Raises:
        UserError: it cannot be written, because the disk is full for instance. Those before it stay.
    """
    folder = Path(output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{update}"
    if writes:
        shutil.rmtree(folder, ignore_errors=True)  # what a killed run left of it
    wait()
    try:
        yield folder
        wait()
        if writes:
            write_whole(folder / COMPLETE, json.dumps(facts or {}))
    except UserError:
        raise
    except Exception as error:  # safetensors, torch and the file system each raise their own
        shutil.rmtree(folder, ignore_errors=True)
        last = complete_checkpoints(output_dir)
        kept = f"the last complete one is {last[-1]}" if last else "there is no earlier one"
        raise UserError(f"{folder} could not be written: {one_line(error)}; {kept}") from error


class _Watched(NamedTuple):
    update: int
    micro_batch: int
    inputs: dict[str, Tensor]
    finite: Tensor  # on the CPU, there once `copied` has happened
    copied: torch.cuda.Event | None


class Heartbeat(TrainerCallback):
    """Once an update: a signal becomes a checkpoint and an end, a loss that is not finite an error, tokens are counted.

    On an accelerator a loss is looked at one update later, when it has long been computed: nothing waits for it.
    Before a checkpoint is written, it and the weights are looked at right away.

    Attributes:
        stopped_by: SIGTERM or SIGINT, where a process got it and all have stopped.
        stopwatch: measures the speed of training.
        run_dir: where the checkpoints go: `output_dir`, or a folder in it for each trial of a hyperparameter search.
    """

    def __init__(self, run_dir: str | Path) -> None:
        self.run_dir = run_dir
        self.stopped_by: signal.Signals | None = None
        self.stopwatch = Stopwatch()
        self._received: signal.Signals | None = None
        self._tokens: int | Tensor = 0
        self._watched: list[_Watched] = []
        self._group: dist.ProcessGroup | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Around the training: SIGTERM and a first SIGINT (Ctrl-C) are noted instead of ending the process."""
        self.stopped_by = self._received = None
        if threading.current_thread() is not threading.main_thread():  # where Python allows no handler
            yield
            return
        before = {number: signal.signal(number, self._receive) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _receive(self, number: int, frame: object) -> None:
        if self._received == number == signal.SIGINT:
            raise KeyboardInterrupt
        self._received = signal.Signals(number)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        self._tokens, self._watched = 0, []  # an earlier training may have ended within an update
        self.stopwatch.lap()
        if dist.is_available() and dist.is_initialized() and self._group is None:
            self._group = dist.new_group(backend="gloo")  # on the host: no accelerator waits for it

    def watch(self, update: int, inputs: dict[str, Tensor], loss: Tensor, tokens: int | Tensor) -> None:
        """Note one micro-batch.

        Args:
            update: the update's number, from 1.
            inputs: what the model read, to be written to a file where the loss is not finite.
            loss: a scalar on any device.
            tokens: how many it counts for; of a tensor, the value is waited for at the end of the update.
        """
        micro_batch = sum(watched.update == update for watched in self._watched)
        finite = torch.isfinite(loss.detach()).to("cpu", non_blocking=True)
        copied = None
        if loss.is_cuda:
            copied = torch.cuda.Event()
            copied.record()
        self._watched.append(_Watched(update, micro_batch, inputs, finite, copied))
        self._tokens = self._tokens + tokens

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        delay = 0 if args.device.type == "cpu" else 1
        bad = self._bad(state.global_step - delay)
        received, failed, tokens = self._sum(self._received is not None, bool(bad), int(self._tokens))
        self._tokens = 0
        state.num_input_tokens_seen += tokens
        self.stopwatch.tokens += tokens
        if failed:
            self._fail(bad)
        if received:
            self.stopped_by = self._received or signal.SIGTERM
            control.should_save = control.should_training_stop = True

    def require_finite(self, model: nn.Module, args: TrainingArguments, update: int) -> None:
        """In all processes: every loss so far and every weight is finite.

        Raises:
            UserError: one is not.
        """
        bad = self._bad(update)
        flags = [torch.isfinite(_local(weight)).all() for weight in model.parameters()]
        broken = not all(torch.stack([flag.to(args.device) for flag in flags]).tolist())
        failed, anywhere_broken = self._sum(bool(bad), broken)
        if failed:
            self._fail(bad)
        if anywhere_broken:
            last = complete_checkpoints(self.run_dir)
            raise UserError(
                f"a weight is not finite after update {update}; no checkpoint was written"
                + (f"; the last one is {last[-1]}" if last else "")
            )

    def _bad(self, update: int) -> list[_Watched]:
        """What is not finite up to `update`; the rest up to there is forgotten."""
        due = [watched for watched in self._watched if watched.update <= update]
        self._watched = [watched for watched in self._watched if watched.update > update]
        for watched in due:
            if watched.copied is not None:
                watched.copied.synchronize()
        return [watched for watched in due if not watched.finite.item()]

    def _sum(self, *numbers: int) -> list[int]:
        total = torch.tensor(numbers, dtype=torch.int64)
        if self._group is not None:
            dist.all_reduce(total, group=self._group)
        return total.tolist()

    def _fail(self, bad: list[_Watched]) -> None:
        rank = dist.get_rank() if self._group is not None else 0
        said = None
        if bad:
            first = bad[0]
            file = Path(self.run_dir) / f"not-finite-update-{first.update}-process-{rank}.safetensors"
            file.parent.mkdir(parents=True, exist_ok=True)
            save_file({name: read.detach().cpu().contiguous() for name, read in first.inputs.items()}, file)
            said = f"update {first.update}, micro-batch {first.micro_batch} of process {rank} (what it read: {file})"
        everywhere = [said]
        if self._group is not None:
            everywhere = [None] * dist.get_world_size(self._group)
            dist.all_gather_object(everywhere, said, group=self._group)
        last = complete_checkpoints(self.run_dir)
        raise UserError(
            f"the loss is not finite at {'; '.join(filter(None, everywhere))}; "
            + (f"the last complete checkpoint is {last[-1]}" if last else "there is no checkpoint yet")
        )


def _local(weight: Tensor) -> Tensor:
    weight = weight.detach()
    return weight.to_local() if isinstance(weight, DTensor) else weight
