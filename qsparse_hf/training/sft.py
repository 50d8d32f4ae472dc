"""Supervised fine-tuning: TRL's `SFTTrainer`, which packs, batches and trains what `chat` tokenizes and labels.

Importing this module needs TRL: `pip install "qsparse-hf[sft]"`.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from datasets import Dataset, Features, IterableDataset, List, Value
from datasets.fingerprint import Hasher
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging

from ..errors import UserError, user_errors
from ..sources import FEATURES, RowCheck, Source
from .arguments import QSparseArguments
from .data import DataArguments, identity, prepare_on_disk
from .trainer import QSparseTrainerMixin

try:
    from trl import SFTConfig, SFTTrainer

    from .chat import Learner, NotLearnable
except ImportError as error:
    raise UserError(f'stage sft needs TRL, pip install "qsparse-hf[sft]" brings it: {error}') from error

logger = logging.get_logger(__name__)


@dataclass
class QSparseSFTConfig(QSparseArguments, SFTConfig):
    """TRL's `SFTConfig` and `QSparseArguments`; precision and checkpointing default as in Transformers."""

    bf16: bool = field(default=False, metadata={"help": "Mixed precision in bfloat16."})
    gradient_checkpointing: bool | None = field(  # type: ignore[assignment]  # None as in Transformers
        default=None, metadata={"help": "Compute activations again in the backward pass, for less memory."}
    )

    assistant_only_loss: bool | None = field(  # type: ignore[assignment]  # TRL's has no third value
        default=None,
        metadata={"help": "Of messages, learn the assistant's alone; false: all. A recipe's default is true."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.distill_from is not None:
            raise UserError("distill_from is for language modelling: TRL's loss never has the logits in memory")


class QSparseSFTTrainer(QSparseTrainerMixin, SFTTrainer):  # type: ignore[misc]  # create_model_card
    """TRL's `SFTTrainer` with what `QSparseTrainerMixin` adds."""

    arguments_class = QSparseSFTConfig


_TOKENS = {"input_ids": List(Value("int32")), "labels": List(Value("int32"))}


def prepare_tokenizer(tokenizer: PreTrainedTokenizerBase, arguments: QSparseSFTConfig) -> None:
    """Give `tokenizer` the end token and the chat template that `arguments` ask for.

    `chat_template_path` is a Jinja file, or another tokenizer's folder or Hub id.
    """
    if arguments.eos_token is not None:
        if arguments.eos_token not in tokenizer.get_vocab():
            raise UserError(f"eos_token {arguments.eos_token!r} is no token of {tokenizer.name_or_path}")
        tokenizer.eos_token = arguments.eos_token
    source = arguments.chat_template_path
    if source is None:
        return
    with user_errors(f"chat_template_path: {source}"):
        if Path(source).is_file():
            tokenizer.chat_template = Path(source).read_text(encoding="utf-8")
        else:
            tokenizer.chat_template = AutoTokenizer.from_pretrained(source).get_chat_template()
        tokenizer.apply_chat_template([{"role": "user", "content": ""}], tokenize=False)
    arguments.chat_template_path = None  # TRL would add the other tokenizer's special tokens as well


def learnable(rows: Dataset) -> Dataset:
    """`rows` of TRL's `labels` without those that teach nothing: prompts so long that no answer is left of them.

    Raises:
        UserError: none are left.
    """
    learnt = rows.filter(
        lambda row: any(label != -100 for label in row["labels"]), desc="dropping rows without answers"
    )
    if not len(learnt):
        raise UserError("no example has an answer within sequence_length; make it longer")
    if len(learnt) < len(rows):
        logger.warning(f"{len(rows) - len(learnt):,} of {len(rows):,} rows have no answer within sequence_length")
    return learnt


def truncated(rows: Dataset, length: int, mode: str) -> Dataset:
    """The first `length` tokens of every row, or its last where `mode` is TRL's `keep_end`."""
    kept = slice(-length, None) if mode == "keep_end" else slice(length)
    return rows.map(lambda row: {name: row[name][kept] for name in _TOKENS}, desc="cutting rows to sequence_length")


def read_examples(
    sources: list[Source], tokenizer: PreTrainedTokenizerBase, data: DataArguments, arguments: QSparseSFTConfig
) -> Dataset:
    """The sources' rows as tokens and labels, cached on disk.

    Prompts and completions become a conversation where the tokenizer has a chat template, and stay plain text where it
    has none. Learnt is the completion, of messages what the assistant says, and of `text` all of it.

    Returns:
        Rows of `input_ids` and `labels`, -100 where nothing is learnt; neither cut nor packed.

    Raises:
        UserError: a bad row, sources of different forms, messages without a chat template, or one that does not tell
            what the answers are.
    """
    forms = [frozenset(source.columns) - {"system"} for source in sources]
    form = forms[0]
    if len(set(forms)) > 1:
        raise UserError("all data sources of one run must name the same columns, system aside")
    if data.streaming:
        raise UserError("stage sft prepares its data on disk; leave streaming out")
    chat = tokenizer.chat_template is not None and form != {"text"}
    if "messages" in form and not chat:
        raise UserError("messages need a chat template; set chat_template_path to one, configs/chat/ has examples")
    learner = _learner(form, chat, tokenizer, arguments)

    def generate(documents: IterableDataset, check: RowCheck) -> Iterator[dict]:
        for row in documents:
            if check.passes(row):
                yield {name: row[name] for name in (*form, "system", "origin") if name in row}

    names = sorted({*form, "system", "origin"} & FEATURES.keys())
    rows = prepare_on_disk(
        generate, Features({name: FEATURES[name] for name in names}), sources, data, arguments.seed, ("sft", names)
    )

    def tokenize(row: dict) -> dict:
        try:
            return _tokenize(row, learner, chat) | {"problem": None}
        except NotLearnable as error:
            return {"input_ids": [], "labels": [], "problem": str(error)}

    key = (rows._fingerprint, identity(tokenizer), learner.everything, learner.marked_template)
    tokenized = rows.map(
        tokenize,
        remove_columns=[name for name in names if name != "origin"],
        features=Features(_TOKENS | {"origin": FEATURES["origin"], "problem": FEATURES["problem"]}),
        num_proc=arguments.dataset_num_proc,
        new_fingerprint=Hasher.hash(key),
        desc="tokenizing",
    )
    return _without_problems(tokenized, RowCheck(skip=data.on_bad_row == "skip"))


def _learner(
    form: frozenset[str], chat: bool, tokenizer: PreTrainedTokenizerBase, arguments: QSparseSFTConfig
) -> Learner:
    """What is learnt of rows of `form`, as the two switches of TRL say."""
    if "prompt" not in form and arguments.completion_only_loss is not None:
        raise UserError("completion_only_loss is for columns prompt and completion")
    if not chat and arguments.assistant_only_loss:
        raise UserError(f"assistant_only_loss is for conversations, got plain {' and '.join(sorted(form))}")
    if "messages" in form:
        return Learner.of_conversations(tokenizer, everything=arguments.assistant_only_loss is False, turns=2)
    everything = arguments.completion_only_loss is False and not arguments.assistant_only_loss
    if chat:
        return Learner.of_conversations(tokenizer, everything, turns=1)
    return Learner(tokenizer, everything)


def _tokenize(row: dict, learner: Learner, chat: bool) -> dict[str, list[int]]:
    if "text" in row:
        return learner.text(row["text"])
    if "messages" in row:
        return learner.conversation(row["messages"])
    if not chat:
        return learner.text(row["completion"], prompt="\n".join(filter(None, (row["system"], row["prompt"]))))
    said = {"system": row["system"], "user": row["prompt"], "assistant": row["completion"]}
    return learner.conversation([{"role": role, "content": text} for role, text in said.items() if text])


def _without_problems(rows: Dataset, check: RowCheck) -> Dataset:
    """The rows that could be tokenized; the first other one is named, or they are counted."""
    if rows.unique("problem") != [None]:
        reports = rows.select_columns(["origin", "problem"])
        rows = rows.select([index for index, report in enumerate(reports) if check.passes(report)])
        logger.warning(str(check))
        if not len(rows):
            raise UserError(f"no row is left to learn from: {check}")
    return rows.select_columns(list(_TOKENS))
