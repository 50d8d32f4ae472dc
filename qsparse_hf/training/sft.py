"""Supervised fine-tuning: TRL's `SFTTrainer`, which brings chat templates, completion-only loss and packing.

Importing this module needs TRL: `pip install "qsparse-hf[sft]"`.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from datasets import Dataset, Features, IterableDataset
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging

from ..errors import UserError, user_errors
from .data import DataArguments, identity, prepare_on_disk
from .sources import FEATURES, RowCheck, Source
from .trainer import QSparseArguments, QSparseTrainerMixin

try:
    from trl import SFTConfig, SFTTrainer
except ImportError as error:
    raise UserError(f'stage sft needs TRL, pip install "qsparse-hf[sft]" brings it: {error}') from error

logger = logging.get_logger(__name__)


@dataclass
class QSparseSFTConfig(QSparseArguments, SFTConfig):
    """TRL's `SFTConfig` and `QSparseArguments`; precision and checkpointing default as in Transformers."""

    bf16: bool = field(default=False, metadata={"help": "Mixed precision in bfloat16."})
    gradient_checkpointing: bool | None = field(
        default=None, metadata={"help": "Compute activations again in the backward pass, for less memory."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.distill_from:
            raise UserError("distill_from is for language modelling: TRL's loss never has the logits in memory")


class QSparseSFTTrainer(QSparseTrainerMixin, SFTTrainer):
    """TRL's `SFTTrainer` with what `QSparseTrainerMixin` adds."""

    arguments_class = QSparseSFTConfig

    def create_model_card(self, *args, **kwargs) -> None:
        """Writes none: TRL's names neither the model it came from nor how a Q-Sparse model is loaded."""


def set_chat_template(tokenizer: PreTrainedTokenizerBase, arguments: QSparseSFTConfig) -> None:
    """Give `tokenizer` the template of `chat_template_path`: a Jinja file, or another tokenizer's folder or Hub id."""
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


def read_examples(
    sources: list[Source], tokenizer: PreTrainedTokenizerBase, arguments: DataArguments, seed: int
) -> Dataset:
    """The sources' rows as TRL takes them, cached on disk.

    Prompts and completions become a conversation where the tokenizer has a chat template, and stay plain text where it
    has none.

    Returns:
        Rows of `prompt` and `completion`, of `messages`, or of `text`.

    Raises:
        UserError: a bad row, sources of different forms, or messages without a chat template.
    """
    forms = [frozenset(source.columns) - {"system"} for source in sources]
    if len(set(forms)) > 1:
        raise UserError("all data sources of one run must name the same columns, system aside")
    if arguments.streaming:
        raise UserError("stage sft prepares its data on disk; leave streaming out")
    chat = tokenizer.chat_template is not None
    if "messages" in forms[0] and not chat:
        raise UserError("messages need a chat template; set chat_template_path to one, configs/chat/ has examples")

    def generate(documents: IterableDataset, check: RowCheck) -> Iterator[dict]:
        for row in documents:
            if check.passes(row):
                example = {name: row[name] for name in forms[0]}
                if chat and "prompt" in example:
                    system = [{"role": "system", "content": row["system"]}] if row["system"] else []
                    example["prompt"] = [*system, {"role": "user", "content": row["prompt"]}]
                    example["completion"] = [{"role": "assistant", "content": row["completion"]}]
                elif row["system"]:
                    example["prompt"] = f"{row['system']}\n{row['prompt']}"
                yield example

    types = {name: FEATURES["messages" if chat and name != "text" else name] for name in sorted(forms[0])}
    return prepare_on_disk(
        generate, Features(types), sources, arguments, seed, ("sft", identity(tokenizer), sorted(forms[0]))
    )
