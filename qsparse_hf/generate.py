"""A model at the terminal: a chat where its tokenizer has a chat template, a plain continuation where it has none."""

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase, TextStreamer, set_seed

from .errors import UserError, user_errors
from .loading import load_checkpoint
from .modeling.modeling_qsparse import QSparsePreTrainedModel


class _Streamer(TextStreamer):
    """Prints the text as it comes, and notes its tokens and when each came.

    What continues the prompt is decoded with it: the first word of a text would have no space before it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, continues: bool) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.continues = continues
        self.times: list[float] = []
        self.ids: list[int] = []

    def put(self, value: torch.Tensor) -> None:
        if not self.next_tokens_are_prompt:
            self.times.append(time.perf_counter())
            self.ids += value.flatten().tolist()
        elif self.continues:
            self.token_cache = value.flatten().tolist()
            self.print_len = len(str(self.tokenizer.decode(self.token_cache, **self.decode_kwargs)))
        super().put(value)

    def speed(self) -> str:
        """Tokens and their speed, in words: the median behind the first, which waits for the prompt.

        The second may wait for kernels to be compiled, which a mean over a short answer would take for the speed.
        """
        told = f"{len(self.times)} tokens"
        if len(self.times) > 1:
            seconds = statistics.median(later - before for before, later in pairwise(self.times))
            told += f", {1 / seconds:.1f} tokens/s behind the first"
        return told


class Chat:
    """A model that answers, and the conversation so far.

    Args:
        model: as `load_checkpoint` takes it; it runs on a GPU where there is one.
        prepared: prepare a Q-Sparse model for decoding.
        system: the system message.
        max_new_tokens: most tokens of an answer.
        temperature: of sampling; 0 for the likeliest token.
        seed: of sampling.

    Raises:
        UserError: the model does not load, or an option does not go with it.
    """

    def __init__(
        self,
        model: str,
        *,
        prepared: bool = False,
        system: str | None = None,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        seed: int | None = None,
    ) -> None:
        if max_new_tokens < 1:
            raise UserError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
        if not 0 <= temperature < float("inf"):
            raise UserError(f"temperature must be at least 0, got {temperature}")
        if seed is not None and not 0 <= seed < 2**32:
            raise UserError(f"seed must be from 0 to {2**32 - 1}, got {seed}")
        if seed is not None and temperature == 0:
            raise UserError(f"seed {seed} is of sampling, and at a temperature of 0 nothing is drawn")
        self.model: Any
        self.tokenizer: Any
        self.model, self.tokenizer = load_checkpoint(model)
        self.chats = self.tokenizer.chat_template is not None
        if system is not None and not self.chats:
            raise UserError(f"{model}: its tokenizer has no chat template, and so no place for a system message")
        if prepared:
            if not isinstance(self.model, QSparsePreTrainedModel):
                raise UserError(f"{model} is a dense model; only Q-Sparse ones are prepared for decoding")
            with user_errors(model):
                self.model.prepare_for_decode()
        self.most = max_new_tokens
        self.settings = _settings(self.model, self.tokenizer, temperature)
        if seed is not None:
            set_seed(seed)
        self.messages = [] if system is None else [{"role": "system", "content": system}]

    def answer(self, prompt: str) -> str:
        """Print the answer to `prompt`, or its continuation, as it comes; its speed goes to stderr.

        Returns:
            The answer. One that Ctrl-C stops is kept in the conversation as far as it came.

        Raises:
            UserError: the prompt is empty, or longer than the model takes.
        """
        messages = [*self.messages, {"role": "user", "content": prompt}]
        inputs = _inputs(self.model, self.tokenizer, messages)
        streamer = _Streamer(self.tokenizer, continues=not self.chats)
        if not self.chats:
            print(prompt, end="", flush=True)
        with suppress(KeyboardInterrupt):
            self.model.generate(**inputs, **self.settings | _room(self.model, inputs, self.most), streamer=streamer)
        if not streamer.next_tokens_are_prompt:  # stopped: `generate` ends the text by itself
            streamer.end()
        tqdm.write(f"[{streamer.speed()}]", file=sys.stderr)
        said = self.tokenizer.decode(streamer.ids, skip_special_tokens=True)
        if self.chats:
            self.messages = [*messages, {"role": "assistant", "content": said}]
        return said

    def talk(self, read: Callable[[str], str] = input) -> None:
        """Answer what is read until it ends: Ctrl-D at a terminal, or Ctrl-C while nothing is being answered."""
        kind = "Chat" if self.chats else "The tokenizer has no chat template: prompts are continued"
        print(f"{kind}. Ctrl-C stops an answer, Ctrl-D ends.", file=sys.stderr)
        while True:
            try:
                prompt = read("> " if sys.stdin.isatty() else "")
            except (EOFError, KeyboardInterrupt):
                print(file=sys.stderr)
                return
            if prompt.strip():
                try:
                    self.answer(prompt)
                except UserError as error:
                    print(error, file=sys.stderr)


def read_prompts(file: str | Path) -> list[str]:
    """The lines of a file, without the empty ones.

    Raises:
        UserError: it cannot be read, or has no line.
    """
    with user_errors(file):
        prompts = [line.strip() for line in Path(file).read_text(encoding="utf-8").splitlines() if line.strip()]
    if not prompts:
        raise UserError(f"{file} holds no prompt; each line is one")
    return prompts


def answer_prompts(
    model: Any, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], max_new_tokens: int = 128
) -> list[str]:
    """The likeliest answer to each prompt, each a conversation of its own; without a chat template a continuation.

    Args:
        model: any causal language model.
        tokenizer: the model's.
        prompts: text.
        max_new_tokens: most tokens of an answer.

    Raises:
        UserError: a prompt is empty, or longer than the model takes.
    """
    settings = _settings(model, tokenizer, temperature=0)
    answers: list[Any] = []
    for prompt in tqdm(prompts, desc="answering", unit="prompt"):
        inputs = _inputs(model, tokenizer, [{"role": "user", "content": prompt}])
        ids = model.generate(**inputs, **settings | _room(model, inputs, max_new_tokens))[0]
        behind = ids[inputs["input_ids"].shape[1] :]
        answers.append(tokenizer.decode(behind, skip_special_tokens=True))
    return answers


def _settings(model: Any, tokenizer: Any, temperature: float) -> dict[str, Any]:
    """What `generate` is told of sampling, and of padding where the model's own settings say nothing."""
    settings: dict[str, Any] = {"do_sample": temperature > 0, "temperature": temperature or None}
    if not temperature:  # what the model's own settings say of sampling
        settings |= {"top_p": None, "top_k": None}
    if model.generation_config.pad_token_id is None:
        settings["pad_token_id"] = tokenizer.pad_token_id or tokenizer.eos_token_id
    return settings


def _inputs(model: Any, tokenizer: Any, messages: list[dict[str, str]]) -> dict[str, torch.Tensor]:
    """A conversation in the chat template; without one, its last message alone."""
    with user_errors("the chat template"):
        inputs: Any = (
            tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
            if tokenizer.chat_template is not None
            else tokenizer(messages[-1]["content"], return_tensors="pt")
        )
    length, longest = inputs["input_ids"].shape[1], model.config.max_position_embeddings
    if length == 0:
        raise UserError("the prompt is empty")
    if length >= longest:
        raise UserError(f"the conversation has {length} tokens, and the model takes {longest}")
    return {key: inputs[key].to(model.device) for key in ("input_ids", "attention_mask") if key in inputs}


def _room(model: Any, inputs: dict[str, torch.Tensor], most: int) -> dict[str, int]:
    """At most so many new tokens as there are positions."""
    return {"max_new_tokens": min(most, model.config.max_position_embeddings - inputs["input_ids"].shape[1])}
