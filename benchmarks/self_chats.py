"""Conversations that a chat model makes up: it is asked for a question, then for its answer.

    python benchmarks/self_chats.py CHAT_MODEL runs/chats --conversations 3072

After the beginning of a user's turn a chat model writes what a user might say (Magpie, arXiv 2406.08464). Writes
`train.jsonl` and `eval.jsonl`, one in 32 held out; a row is `{"messages": [...]}`, as recipes of `stage: sft` read it.
For fine-tuning a model that forgot how to chat, where no conversations of better origin are at hand.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from qsparse_hf.errors import UserError, check_writable, write_whole
from qsparse_hf.loading import load_checkpoint

QUESTION, ANSWER = 40, 200  # most tokens
HELD_OUT = 32  # one of so many
MARK = "\N{OBJECT REPLACEMENT CHARACTER}"


class SelfChat:
    """Batches of questions and answers of one model."""

    def __init__(self, model: Any, tokenizer: Any, batch: int) -> None:
        self.model, self.tokenizer, self.batch = model, tokenizer, batch
        tokenizer.padding_side = "left"
        whole = tokenizer.apply_chat_template([{"role": "user", "content": MARK}], tokenize=False)
        self.beginning, _, rest = whole.partition(MARK)
        if not rest.strip():
            raise UserError("its chat template does not tell where a user's turn ends")
        self.end = tokenizer(rest.strip(), add_special_tokens=False)["input_ids"][0]
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token

    def _written(self, prompts: list[str], most: int, temperature: float) -> list[str | None]:
        """What follows each prompt; None where it has no end."""
        inputs = self.tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
        ids = self.model.generate(
            **inputs.to(self.model.device),
            max_new_tokens=most,
            do_sample=True,
            temperature=temperature,
            top_p=0.95,
            eos_token_id=self.end,
            pad_token_id=self.end,
        )
        rows = ids[:, inputs["input_ids"].shape[1] :].tolist()
        return [
            self.tokenizer.decode(row[: row.index(self.end)], skip_special_tokens=True).strip()
            if self.end in row
            else None
            for row in rows
        ]

    def conversations(self) -> list[dict[str, Any]]:
        """A batch of them; fewer than were asked for, since what has no end is left out."""
        questions = [each for each in self._written([self.beginning] * self.batch, QUESTION, 1.0) if each]
        turns = [[{"role": "user", "content": question}] for question in questions]
        prompts = [
            self.tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True) for turn in turns
        ]
        answers = self._written(prompts, ANSWER, 0.3) if prompts else []
        return [
            {"messages": [*turn, {"role": "assistant", "content": answer}]}
            for turn, answer in zip(turns, answers, strict=True)
            if answer
        ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or Hub id of a model with a chat template")
    parser.add_argument("output", type=Path, help="folder to write")
    parser.add_argument("--conversations", type=int, default=3072, help="(default %(default)s)")
    parser.add_argument("--batch", type=int, default=768, help="at most, at once (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.conversations < HELD_OUT or arguments.batch < 1:
        parser.error(f"--conversations must be at least {HELD_OUT}, and --batch at least 1")
    try:
        check_writable(arguments.output / "train.jsonl")
        model, tokenizer = load_checkpoint(arguments.model)
    except UserError as error:
        parser.error(str(error))
    if not tokenizer.chat_template:
        parser.error(f"{arguments.model} has no chat template, so it is no chat model")
    torch.manual_seed(arguments.seed)
    try:
        chat = SelfChat(model, tokenizer, min(arguments.batch, 2 * arguments.conversations))
    except UserError as error:
        parser.error(f"{arguments.model}: {error}")
    found: dict[str, dict[str, Any]] = {}  # by the question
    with tqdm(total=arguments.conversations, unit="conversation") as progress:
        while len(found) < arguments.conversations:
            new = {each["messages"][0]["content"]: each for each in chat.conversations()}
            if not new.keys() - found.keys():
                raise SystemExit(f"{arguments.model} makes up no conversations that come to an end")
            found |= new
            progress.update(min(len(found), arguments.conversations) - progress.n)
    rows = [*found.values()][: arguments.conversations]
    arguments.output.mkdir(parents=True, exist_ok=True)
    for part, chosen in (("eval", rows[::HELD_OUT]), ("train", [row for i, row in enumerate(rows) if i % HELD_OUT])):
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in chosen)
        write_whole(arguments.output / f"{part}.jsonl", text)


if __name__ == "__main__":
    main()
