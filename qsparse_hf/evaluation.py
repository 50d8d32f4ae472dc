"""How good a model is: the loss of held-out text, its accuracy on minimal pairs of sentences and on tasks.

A text is a sequence of tokens, of which every one but the first is scored once, by its log-probability behind those
before it. `Protocol` says how many are before it.
"""

import logging
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import (
    AutoConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from .errors import UserError, check_writable, user_errors
from .loading import check_dtype, find_base, find_device, load_checkpoint, load_tokenizer
from .measure import print_table, write_json
from .report import SparsityReport, counting, evaluating, projections, token_losses, totals
from .sources import Source, check_whole
from .tasks import Task, TaskScore, find_tasks, run_tasks
from .texts import good_rows

logger = logging.getLogger(__name__)

# A row's text by role: what `sources` calls system, prompt and completion are three columns of text, the first of which
# may be missing in a row.
PAIR_COLUMNS = {"system": "UID", "prompt": "sentence_good", "completion": "sentence_bad"}
_NAMED = re.compile(r"([\w.-]+)=(.+)", re.DOTALL)
_WINDOW = 1024  # where the model's positions are no fewer


@dataclass(frozen=True)
class Protocol:
    """What the loss of a text depends on besides model and text.

    Attributes:
        window: tokens that the model reads at once; None for 1024, or the model's positions where those are fewer.
        stride: tokens from the beginning of one window to that of the next; None for `window`, no overlap. With less,
            a token that an earlier window scored is context: each has at least `window - stride` tokens before it, but
            for those of a text's first window.
        bos: whether every window begins with the tokenizer's begin token, in the first token's place; the text's first
            token is then scored too. None for what the tokenizer does with a text.
        joined: whether documents are one text, with a blank line between them; else each is a text by itself, and no
            window goes over its end.
        tokens: score at most that many tokens, from the first document on; None for all.

    Raises:
        UserError: a value outside its range.
    """

    window: int | None = None
    stride: int | None = None
    bos: bool | None = None
    joined: bool = False
    tokens: int | None = None

    def __post_init__(self) -> None:
        for name, least in (("window", 2), ("stride", 1), ("tokens", 1)):
            value = getattr(self, name)
            if value is not None:
                check_whole(name, value)
                if value < least:
                    raise UserError(f"{name} must be at least {least}, got {value}")
        if self.window is not None and self.stride is not None and self.stride > self.window:
            raise UserError(f"stride must be at most the window, {self.window}, got {self.stride}")

    def resolved(self, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase | None) -> "Protocol":
        """The same with every value that a model's `config` and `tokenizer` decide filled in.

        Raises:
            UserError: a window beyond the model's positions, or a begin token that the tokenizer does not have.
        """
        positions = getattr(config, "max_position_embeddings", None) or _WINDOW
        window = self.window or min(_WINDOW, positions)
        if window > positions:
            raise UserError(f"window must be at most the model's {positions} positions, got {window}")
        begin = None if tokenizer is None else tokenizer.bos_token_id
        bos = self.bos
        if bos is None:
            bos = tokenizer is not None and begin is not None and tokenizer("a")["input_ids"][:1] == [begin]
        elif bos and begin is None:
            raise UserError("the tokenizer has no begin token (bos_token), which windows are to begin with")
        return Protocol(window, self.stride or window, bos, self.joined, self.tokens)

    def __str__(self) -> str:
        parts = [f"windows of {self.window} tokens"]
        parts += ["no overlap" if self.stride == self.window else f"stride {self.stride}"]
        parts += ["each begins with the begin token" if self.bos else "no begin token"]
        parts += ["documents joined by a blank line" if self.joined else "each document by itself"]
        return ", ".join([*parts, f"at most {self.tokens:,} tokens"] if self.tokens else parts)


@dataclass(frozen=True)
class Evaluation:
    """The loss of a text.

    Attributes:
        loss: mean negative log-probability of the scored tokens, in nats.
        tokens: scored ones.
        documents: those that they are of.
        bytes: UTF-8 bytes that the scored tokens stand for; None where token ids were given.
        protocol: with which it was measured, every value filled in.
        sparsity: of what the projections read meanwhile, padding left out and context counted wherever it was read;
            None for a model of a family that is not in `registration.FAMILIES`.
    """

    loss: float
    tokens: int
    documents: int
    bytes: int | None
    protocol: Protocol
    sparsity: SparsityReport | None

    @property
    def perplexity(self) -> float:
        """`exp(loss)`."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def bits_per_byte(self) -> float | None:
        """Loss a byte of the text, in bits: it compares models of different tokenizers."""
        return self.loss * self.tokens / math.log(2) / self.bytes if self.bytes else None

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON takes it, but for the sparsity of single layers."""
        return {
            "loss": self.loss,
            "perplexity": self.perplexity,
            "bits_per_byte": self.bits_per_byte,
            "tokens": self.tokens,
            "documents": self.documents,
            "bytes": self.bytes,
            "protocol": asdict(self.protocol),
        } | totals(self.sparsity)


@dataclass(frozen=True)
class PairAccuracy:
    """How often a model prefers the good sentence of a minimal pair.

    Attributes:
        pairs: of each phenomenon, how many there are.
        right: of each phenomenon, in how many the good sentence has the higher sum of log-probabilities.
        sparsity: as in `Evaluation`.
    """

    pairs: dict[str, int]
    right: dict[str, int]
    sparsity: SparsityReport | None

    @property
    def accuracy(self) -> float:
        """Over all pairs."""
        return sum(self.right.values()) / sum(self.pairs.values())

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON takes it, but for the sparsity of single layers."""
        by_phenomenon = {name: self.right[name] / count for name, count in self.pairs.items()}
        overall = {"accuracy": self.accuracy, "pairs": sum(self.pairs.values()), "accuracy_of": by_phenomenon}
        return overall | totals(self.sparsity)


Result: TypeAlias = Evaluation | PairAccuracy | TaskScore


def evaluate_perplexity(
    model: nn.Module,
    documents: Iterable[str] | Iterable[Sequence[int]] | Tensor,
    tokenizer: PreTrainedTokenizerBase | None = None,
    protocol: Protocol = Protocol(),
    batch_size: int = 8,
    progress: str | None = None,
) -> Evaluation:
    """The loss of `model` on `documents`, and the sparsity meanwhile.

    The model is left as it was, its mode and hooks included; it may be dense or Q-Sparse, prepared or with adapters.
    It runs where it is, in its own dtype; log-probabilities are taken in fp32 and added in fp64.

    Args:
        model: a causal language model.
        documents: texts, of which as many are read as the protocol's `tokens` ask for; or token ids as they are, int64
            `[N, T]` or a sequence for each document, of which `bos` is to hold as for texts.
        tokenizer: of the texts; for token ids only if windows are to begin with its begin token.
        batch_size: windows at once; shorter ones are more at once, in proportion.
        progress: what the progress bar and messages call the text; None for no bar.

    Raises:
        UserError: nothing to score, a prediction that is NaN, or what the protocol asks for is not there.
    """
    model = getattr(model, "_orig_mod", model)  # windows of many lengths would be compiled each
    if batch_size < 1:
        raise UserError(f"batch_size must be at least 1, got {batch_size}")
    config: Any = model.config
    protocol = protocol.resolved(config, tokenizer)
    begin = tokenizer.bos_token_id if tokenizer is not None and protocol.bos else None
    windows: list[_Window] = []
    total = read = 0
    size: int | None = 0
    for document in _texts(documents, protocol.joined):
        if isinstance(document, str):
            if tokenizer is None:
                raise ValueError("texts need a tokenizer")
            ids, ends = _tokenized(document, tokenizer)
        else:
            ids, ends = torch.as_tensor(document, dtype=torch.long, device="cpu"), None
        if begin is not None:
            ids = torch.cat((torch.tensor([begin]), ids))
            ends = ends and [0, *ends]
        scored = min(len(ids) - 1, (protocol.tokens or math.inf) - total)
        if scored < 1:
            continue
        windows += _windows(ids[: int(scored) + 1], protocol)
        size = None if ends is None or size is None else size + ends[int(scored)] - ends[0]
        total += int(scored)
        read += 1
        if total == protocol.tokens:
            break
    if not windows:
        raise UserError(f"{progress or 'the text'} holds no token that could be scored")
    sums, sparsity = _log_probabilities(model, windows, begin, batch_size * (protocol.window or 1), progress)
    return Evaluation(-sums.sum().item() / total, total, read, size, protocol, sparsity)


def _texts(documents: Iterable[Any], joined: bool) -> Iterable[Any]:
    if not joined:
        return documents
    parts = list(documents)
    if all(isinstance(part, str) for part in parts):
        return ["\n\n".join(parts)]
    return [torch.cat([torch.as_tensor(part, dtype=torch.long, device="cpu") for part in parts])]


def _tokenized(text: str, tokenizer: PreTrainedTokenizerBase) -> tuple[Tensor, list[int]]:
    """The token ids of a text, `[T]` int64, without what the tokenizer adds, and the byte that each ends before."""
    tokens = tokenizer(text, add_special_tokens=False, return_offsets_mapping=tokenizer.is_fast, verbose=False)
    ids = torch.tensor(tokens["input_ids"], dtype=torch.long)
    if not tokenizer.is_fast:  # such cannot say where a token stands
        pieces = [str(tokenizer.decode([token])) for token in tokens["input_ids"]]
        return ids, _running(len(piece.encode()) for piece in pieces)
    ends, done, size = [], 0, 0
    for _, end in tokens["offset_mapping"]:
        if end > done:  # else it shares a character with the token before
            size += len(text[done:end].encode())
            done = end
        ends.append(size)
    return ids, ends


def _running(numbers: Iterable[int]) -> list[int]:
    total = 0
    return [total := total + number for number in numbers]


class _Window(NamedTuple):
    """What the model reads at once, `inputs` `[T]`; the last `len(targets)` of them predict `targets`."""

    inputs: Tensor
    targets: Tensor


def _windows(ids: Tensor, protocol: Protocol) -> Iterator[_Window]:
    """Windows in which every token of `ids` but the first is a target once."""
    window, stride = protocol.window or len(ids), protocol.stride or len(ids)
    done, start, last = 0, 0, len(ids) - 1
    while done < last:
        end = min(start + window, last)
        yield _Window(ids[start:end], ids[done + 1 : end + 1])
        done, start = end, start + stride


def _log_probabilities(
    model: nn.Module, windows: Sequence[_Window], begin: int | None, tokens_at_once: int, progress: str | None
) -> tuple[Tensor, SparsityReport | None]:
    """The sum of the targets' log-probabilities in each window, `[len(windows)]` fp64, and the sparsity meanwhile.

    Windows of like length run together, so that little is padding; the longest first, so that memory is short at once
    or never.
    """
    device = next(model.parameters()).device
    order = sorted(range(len(windows)), key=lambda index: -len(windows[index].inputs))
    sums = torch.zeros(len(windows), dtype=torch.float64)
    known = next(projections(model), None) is not None
    with ExitStack() as stack:
        bar = stack.enter_context(
            tqdm(
                total=sum(len(w.targets) for w in windows),
                desc=progress,
                unit="token",
                leave=False,  # within a table, which stays whole
                disable=progress is None,
            )
        )
        counters = stack.enter_context(counting(model)) if known else None
        stack.enter_context(evaluating(model))
        done = 0
        while done < len(order):
            longest = len(windows[order[done]].inputs)
            chosen = order[done : done + max(1, tokens_at_once // longest)]
            done += len(chosen)
            ids = torch.zeros(len(chosen), longest, dtype=torch.long)
            targets = torch.full_like(ids, -100)
            mask = torch.zeros_like(ids)
            for row, index in enumerate(chosen):
                inputs, wanted = windows[index]
                ids[row, : len(inputs)] = inputs
                targets[row, len(inputs) - len(wanted) : len(inputs)] = wanted
                mask[row, : len(inputs)] = 1
            if begin is not None:
                ids[:, 0] = begin
            ids, targets = ids.to(device), targets.to(device)
            padded = None if mask.all() else mask.to(device)
            if counters is not None:
                counters.mask = None if padded is None else padded.bool()
            logits = model(input_ids=ids, attention_mask=padded, use_cache=False).logits
            sums[chosen] = -token_losses(logits, targets.to(logits.device)).double().sum(1).cpu()
            if sums[chosen].isnan().any():
                raise UserError(
                    f"{progress or 'the text'}: the model predicts NaN in {str(logits.dtype).removeprefix('torch.')}; "
                    "its weights hold some, or its activations leave the dtype's range, of which float32 has the widest"
                )
            bar.update(int((targets != -100).sum()))
        return sums, None if counters is None else counters.report()


def evaluate_pairs(
    model: nn.Module,
    pairs: Iterable[tuple[str, str, str]],
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int = 8,
    progress: str | None = None,
) -> PairAccuracy:
    """How often the good sentence of a pair has the higher sum of log-probabilities, as for BLiMP (arXiv 1912.00582).

    Every sentence stands behind the begin token, or the end token where the tokenizer has no begin token, so that its
    first token counts; lm-evaluation-harness does the same.

    Args:
        model: as `evaluate_perplexity` takes it.
        pairs: (phenomenon, good sentence, bad sentence).
        batch_size: so many times 1024 tokens at once.
        progress: what the progress bar and messages call the pairs; None for no bar.

    Raises:
        UserError: there are no pairs, a prediction is NaN, or the tokenizer has neither token.
    """
    begin = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if begin is None:
        raise UserError("pairs need a tokenizer with a begin or an end token, behind which a sentence stands")
    rows = list(pairs)
    if not rows:
        raise UserError(f"{progress or 'the file'} holds no pairs")
    sentences = [sentence for _, good, bad in rows for sentence in (good, bad)]
    tokens = tokenizer(sentences, add_special_tokens=False, verbose=False)["input_ids"]
    windows = [_Window(torch.tensor([begin, *ids[:-1]]), torch.tensor(ids, dtype=torch.long)) for ids in tokens]
    sums, sparsity = _log_probabilities(
        getattr(model, "_orig_mod", model), windows, None, batch_size * _WINDOW, progress
    )
    counts: dict[str, int] = {}
    right: dict[str, int] = {}
    for (phenomenon, _, _), (good, bad) in zip(rows, sums.view(-1, 2).tolist(), strict=True):
        counts[phenomenon] = counts.get(phenomenon, 0) + 1
        right[phenomenon] = right.get(phenomenon, 0) + (good > bad)
    return PairAccuracy(counts, right, sparsity)


@dataclass(frozen=True)
class Suite:
    """What checkpoints are measured on, found before the first of them is loaded.

    Attributes:
        texts: by name.
        pairs: by name.
        tasks: of lm-evaluation-harness.
        protocol: of the texts.
        batch_size: sequences at once.
        questions: at most that many of each task.
    """

    texts: dict[str, Source]
    pairs: dict[str, Source]
    tasks: list[Task]
    protocol: Protocol
    batch_size: int
    questions: int | None

    @classmethod
    def of(
        cls,
        text: Sequence[str] = (),
        pairs: Sequence[str] = (),
        tasks: Sequence[str] = (),
        protocol: Protocol = Protocol(),
        batch_size: int = 8,
        questions: int | None = None,
    ) -> "Suite":
        """What a command names.

        Args:
            text: data sources as `sources.Source.parse` reads them, each with `NAME=` before it or named by its file.
            pairs: the same, of rows with `sentence_good`, `sentence_bad` and `UID`, the phenomenon.
            tasks: as `tasks.find_tasks` reads them.
            protocol: of the texts.
            batch_size: sequences at once.
            questions: at most that many of each task.

        Raises:
            UserError: nothing to measure, a name twice, a file or task that is not there, a number out of range, or a
                setting of what is not measured.
        """
        for name, value in (("batch_size", batch_size), ("questions", 1 if questions is None else questions)):
            if value < 1:
                raise UserError(f"{name} must be at least 1, got {value}")
        if not (text or pairs or tasks):
            raise UserError("nothing to measure on; name a text, pairs or tasks")
        if protocol != Protocol() and not text:
            raise UserError("window, stride, bos, joined and tokens are settings of texts, and no text is named")
        if questions is not None and not tasks:
            raise UserError("questions are those of tasks, and no task is named")
        texts, paired, found = _named(text), _named(pairs, PAIR_COLUMNS), find_tasks(tasks)
        names = [*texts, *paired, *(task.name for task in found)]
        if twice := [name for name in names if names.count(name) > 1]:  # of two results one would be lost
            raise UserError(f"two are named {twice[0]!r}; put another name before one of them, as in other=DATA")
        return cls(texts, paired, found, protocol, batch_size, questions)

    def measure(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[str, Result]]:
        """Each result with its name, as soon as it is there.

        Raises:
            UserError: a text, pairs or a task cannot be read or run.
        """
        for name, source in self.texts.items():
            texts = (row["text"] for row in good_rows(source))
            with user_errors(name):
                yield name, evaluate_perplexity(model, texts, tokenizer, self.protocol, self.batch_size, progress=name)
        for name, source in self.pairs.items():
            rows = ((row["system"] or "", row["prompt"], row["completion"]) for row in good_rows(source))
            with user_errors(name):
                yield name, evaluate_pairs(model, rows, tokenizer, self.batch_size, progress=name)
        for task in self.tasks:
            for score in run_tasks(model, tokenizer, [task], self.batch_size, self.questions):
                yield score.task, score


def _named(written: Sequence[str], columns: dict[str, str] | None = None) -> dict[str, Source]:
    sources: dict[str, Source] = {}
    for text in written:
        name, place = "", text
        if (found := _NAMED.fullmatch(text)) and not Path(text).exists():
            name, place = found.groups()
        source = Source.parse(place)
        if columns is not None:
            source = replace(source, columns=columns)
        name = name or (source.dataset or Path(source.files[0]).name.partition(".")[0])
        if name in sources:
            raise UserError(f"two texts are named {name!r}; put another name before one of them, as in other={place}")
        next(good_rows(source))  # to see that it is there
        sources[name] = source
    return sources


def check_checkpoint(name: str, protocol: Protocol) -> Protocol:
    """`protocol` with every value that the checkpoint decides filled in, before its weights are read.

    Raises:
        UserError: its configuration or tokenizer cannot be read, or does not allow the protocol.
    """
    with user_errors(name):
        return protocol.resolved(AutoConfig.from_pretrained(find_base(name)), load_tokenizer(name))


def evaluate_checkpoint(
    name: str, suite: Suite, device: str | None = None, dtype: str = "auto", output: str | Path | None = None
) -> dict[str, Result]:
    """Load a checkpoint, measure it and print a table; with `output`, write everything there as JSON.

    Args:
        name: as `load_checkpoint` takes it.
        suite: what it is measured on.
        device: as `load_checkpoint` takes it.
        dtype: as `load_checkpoint` takes it.
        output: a JSON file, written again after each result.

    Raises:
        UserError: as `load_checkpoint` and `Suite.measure`; or the output cannot be written, before anything is read.
    """
    if output is not None:
        check_writable(output)
    find_device(device)
    check_dtype(dtype)
    protocol = check_checkpoint(name, suite.protocol)
    model, tokenizer = load_checkpoint(name, device, dtype)
    results: dict[str, Result] = {}

    def rows() -> Iterator[list[str]]:
        for each, result in suite.measure(model, tokenizer):
            results[each] = result
            if output is not None:
                with user_errors(output):
                    write_json(Path(output), {"model": name, "dtype": str(model.dtype)} | results_to_dict(results))
            yield [each, *_cells(result)]

    print(f"{name}, {str(model.dtype).removeprefix('torch.')} on {model.device.type}")
    if suite.texts:
        print(protocol)
    print_table(["on", "loss", "perplexity", "bits/byte", "accuracy", "scored", "activated", "sparsity"], rows())
    return results


def results_to_dict(results: Mapping[str, Result]) -> dict[str, dict[str, Any]]:
    """Results by kind and name, as JSON takes them."""
    kinds = {"texts": Evaluation, "pairs": PairAccuracy, "tasks": TaskScore}
    return {
        kind: {name: result.to_dict() for name, result in results.items() if isinstance(result, of_kind)}
        for kind, of_kind in kinds.items()
    }


def _cells(result: Result) -> list[str]:
    """Loss, perplexity, bits a byte, accuracy, how much was scored, activated parameters, sparsity."""
    if isinstance(result, TaskScore):
        error = "" if result.standard_error is None else f" ± {result.standard_error:.3f}"
        shots = "" if result.shots is None else f", {result.shots} shots"
        asked = "" if result.questions is None else f"{result.questions:,} questions"
        measured = ["", "", "", f"{result.score:.3f}{error} ({result.metric}{shots})", asked]
    elif isinstance(result, PairAccuracy):
        measured = ["", "", "", f"{result.accuracy:.4f}", f"{sum(result.pairs.values()):,} pairs"]
    else:
        bits = "" if result.bits_per_byte is None else f"{result.bits_per_byte:.4f}"
        measured = [f"{result.loss:.4f}", f"{result.perplexity:.3f}", bits, "", f"{result.tokens:,} tokens"]
    if result.sparsity is None:
        return [*measured, "", ""]
    return [*measured, f"{result.sparsity.activated_parameters:,}", f"{100 * result.sparsity.overall:.1f} %"]
