"""A model at the terminal: a chat where its tokenizer has a chat template, a plain continuation where it has none."""

import statistics
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from itertools import pairwise
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase, TextStreamer, set_seed

from .errors import UserError, user_errors
from .loading import load_checkpoint
from .modeling.modeling_qsparse import QSparsePreTrainedModel


class _Streamer(TextStreamer):
    """Prints the text as it comes, counts its tokens and notes when the first and the last came.

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
        self.settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": temperature > 0}
        if temperature > 0:
            self.settings["temperature"] = temperature
        else:  # what the model's own settings say of sampling
            self.settings |= {"temperature": None, "top_p": None, "top_k": None}
        if self.model.generation_config.pad_token_id is None:
            self.settings["pad_token_id"] = self.tokenizer.pad_token_id or self.tokenizer.eos_token_id
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
        with user_errors("the chat template"):
            inputs: Any = (
                self.tokenizer.apply_chat_template(
                    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
                )
                if self.chats
                else self.tokenizer(prompt, return_tensors="pt")
            )
        length, longest = inputs["input_ids"].shape[1], self.model.config.max_position_embeddings
        if length == 0:
            raise UserError("the prompt is empty")
        if length >= longest:
            raise UserError(f"the conversation has {length} tokens, and the model takes {longest}")
        streamer = _Streamer(self.tokenizer, continues=not self.chats)
        if not self.chats:
            print(prompt, end="", flush=True)
        keys = {key: inputs[key].to(self.model.device) for key in ("input_ids", "attention_mask") if key in inputs}
        most = min(self.settings["max_new_tokens"], longest - length)
        with suppress(KeyboardInterrupt):
            self.model.generate(**keys, **self.settings | {"max_new_tokens": most}, streamer=streamer)
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
