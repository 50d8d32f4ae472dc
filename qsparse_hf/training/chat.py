"""Examples into tokens and labels: a model learns what it has to write itself, the answers.

Which part of a conversation that is depends on the chat template, and there are three ways to know:
- the template marks it with `{% generation %}`;
- the conversation up to an answer, and through it, are rendered too: the answer is what comes on top;
- where earlier turns look different once there are later ones, TRL has variants with marks of some known templates.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from transformers import PreTrainedTokenizerBase
from transformers.utils import logging
from trl import get_training_chat_template
from trl.chat_template_utils import has_generation_markers, is_chat_template_stop_token_trained

from ..errors import UserError, one_line
from .data import end_token

logger = logging.get_logger(__name__)

Messages = Sequence[dict[str, str]]
Span = tuple[int, int]  # characters, the second one exclusive

_WAYS_OUT = (
    "set chat_template_path to a template with {% generation %} around the answers (configs/chat/ has one), or learn "
    "whole conversations with assistant_only_loss: false (of prompts and completions, completion_only_loss: false)"
)


class NotLearnable(ValueError):
    """A row that the chat template refuses, or of which it does not tell what the answers are."""


@dataclass(frozen=True)
class Learner:
    """Tokenizes examples and labels what is learnt of them.

    Attributes:
        tokenizer: a fast one, except where `everything` is learnt.
        everything: learn questions, system messages and markup as well.
        marked_template: the chat template to render with, which marks answers; None: the tokenizer's own, and the
            answers are found by rendering beginnings of the conversation.
    """

    tokenizer: PreTrainedTokenizerBase
    everything: bool = False
    marked_template: str | None = None

    @classmethod
    def of_conversations(cls, tokenizer: PreTrainedTokenizerBase, everything: bool, turns: int) -> "Learner":
        """The way that fits the tokenizer's chat template.

        Args:
            tokenizer: with a chat template.
            everything: learn whole conversations.
            turns: 1 where every conversation is a question and its answer, 2 where there may be more.

        Raises:
            UserError: the template leaves messages out, or does not tell what the answers are.
        """
        spoken = {"user": "a question", "assistant": "an answer"}
        probe = [{"role": role, "content": text} for role, text in spoken.items()] * turns  # no system: some refuse it
        by_boundaries = cls(tokenizer)
        try:
            rendered = by_boundaries._apply(probe, tokenize=False)
        except NotLearnable as error:
            raise UserError(str(error)) from error
        if not all(rendered.count(text) == turns for text in spoken.values()):
            raise UserError(
                "the chat template leaves out messages that are plain text; set chat_template_path to another"
            )
        if everything:
            return cls(tokenizer, everything=True)
        if not tokenizer.is_fast:
            raise UserError(f"{type(tokenizer).__name__} does not tell where its tokens stand in a text; {_WAYS_OUT}")
        template = tokenizer.get_chat_template()
        if not has_generation_markers(template):
            try:
                by_boundaries._answers(probe, rendered)
                return by_boundaries
            except NotLearnable as error:
                try:  # None would say that the template has marks
                    template = get_training_chat_template(tokenizer) or template
                except ValueError:
                    raise UserError(f"{error}; {_WAYS_OUT}") from None
        if not is_chat_template_stop_token_trained(tokenizer, chat_template=template):
            logger.warning("the chat template ends answers outside {% generation %}: the model does not learn to stop")
        return cls(tokenizer, marked_template=template)

    def conversation(self, messages: Messages) -> dict[str, list[int]]:
        """`input_ids` and `labels` of a conversation, both `[T]`; -100 where nothing is learnt.

        Raises:
            NotLearnable: the chat template refuses it, or renders it other than its beginning.
        """
        if self.marked_template is not None:
            tokens = self._apply(
                messages,
                chat_template=self.marked_template,
                tokenize=True,
                return_dict=True,
                return_assistant_tokens_mask=True,
            )
            return _labelled(tokens["input_ids"], tokens["assistant_masks"])
        text = self._apply(messages, tokenize=False)
        if self.everything:
            ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            return _labelled(ids, [True] * len(ids))
        return self._label_spans(text, self._answers(messages, text), add_special_tokens=False)

    def text(self, text: str, prompt: str = "") -> dict[str, list[int]]:
        """`input_ids` and `labels` of plain text after a plain prompt, closed by one end token; both `[T]`.

        Raises:
            UserError: the tokenizer has no end token.
        """
        end = end_token(self.tokenizer)
        if prompt and not self.everything:
            row = self._label_spans(prompt + text, [(len(prompt), len(prompt + text))], add_special_tokens=True)
        else:
            ids = self.tokenizer(prompt + text, verbose=False)["input_ids"]
            row = _labelled(ids, [True] * len(ids))
        has_end = row["input_ids"][-1:] == [end]  # the tokenizer has added it, or the text ends in it
        return {name: [*(values[:-1] if has_end else values), end] for name, values in row.items()}

    def _answers(self, messages: Messages, text: str) -> list[Span]:
        """Where the answers are in `text`, which is `messages` rendered; the end of the turn is part of them."""
        spans = []
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            through = self._apply(messages[: index + 1], tokenize=False)
            begin = self._begin_of_answer(messages[:index], through)
            if begin is None or not text.startswith(through):
                raise NotLearnable("the chat template renders earlier turns otherwise once there are later ones")
            spans.append((begin, begin + len(through[begin:].rstrip())))  # white space at the end is between turns
        return spans

    def _begin_of_answer(self, asked: Messages, through: str) -> int | None:
        """Where in `through`, which is rendered, the answer to `asked` begins; None where it does not go on from it."""
        if not asked:  # it begins after what would ask for it
            before, found, _ = through.partition(self._generation_prompt)
            return len(before + found) if found else None
        prompt = self._apply(asked, tokenize=False, add_generation_prompt=True)
        if through.startswith(prompt):
            return len(prompt)
        if not through.startswith(self._apply(asked, tokenize=False)):
            return None
        logger.warning_once("the chat template asks for an answer otherwise than it renders it in a conversation")
        return next(at for at, pair in enumerate(zip(prompt, through, strict=False)) if pair[0] != pair[1])

    @cached_property
    def _generation_prompt(self) -> str:
        """What the chat template ends a question with, to have it answered."""
        question = [{"role": "user", "content": "x"}]
        asked = self._apply(question, tokenize=False)
        return self._apply(question, tokenize=False, add_generation_prompt=True).removeprefix(asked)

    def _apply(self, messages: Messages, **options):
        try:
            return self.tokenizer.apply_chat_template(list(messages), **options)
        except Exception as error:  # a template is a program, and raises what it likes
            raise NotLearnable(f"the chat template refuses it: {one_line(error)}") from error

    def _label_spans(self, text: str, spans: list[Span], add_special_tokens: bool) -> dict[str, list[int]]:
        """Learn the tokens that hold a character of one of `spans`."""
        learnt = bytearray(len(text))
        for begin, end in spans:
            learnt[begin:end] = b"\1" * (end - begin)
        tokens = self.tokenizer(text, add_special_tokens=add_special_tokens, return_offsets_mapping=True, verbose=False)
        return _labelled(tokens["input_ids"], [any(learnt[begin:end]) for begin, end in tokens["offset_mapping"]])


def _labelled(input_ids: list[int], learnt: Iterable[bool | int]) -> dict[str, list[int]]:
    labels = [token if is_learnt else -100 for token, is_learnt in zip(input_ids, learnt, strict=True)]
    return {"input_ids": input_ids, "labels": labels}
