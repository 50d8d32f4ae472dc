"""What `test_vllm.py` runs in a process of its own: vLLM on a CPU, and a look at the inputs of the projections.

    python tests/serve_with_vllm.py '{"folders": [...], "prompts": [[1, 2]], "new_tokens": 8, "engine": {...}}'

Prints one line of JSON for each folder: the greedy tokens behind each prompt and, where nothing is compiled, how many
features of a token each projection reads at most, on each rank.
"""

import json
import sys
from functools import partial
from typing import Any

import torch
from vllm import LLM, SamplingParams


class Watch:
    """Methods that vLLM's workers take on."""

    model_runner: Any

    def watch(self) -> None:
        """Let every projection of the layers note how many features of its input are not zero."""
        self.read: dict[str, tuple[int, int]] = {}
        for name, module in self.model_runner.model.model.layers.named_modules():
            if name.endswith("_proj"):
                module.register_forward_pre_hook(partial(self.note, name))

    def note(self, name: str, module: torch.nn.Module, inputs: tuple) -> None:
        most = inputs[0].count_nonzero(-1).max().item()
        features, before = self.read.get(name, (inputs[0].shape[-1], 0))
        self.read[name] = features, max(most, before)

    def seen(self) -> dict[str, tuple[int, int]]:
        """Of each projection: the features of its input, and how many of a token's were not zero at most."""
        return self.read


def main() -> None:
    task = json.loads(sys.argv[1])
    sampling = SamplingParams(temperature=0, max_tokens=task["new_tokens"], ignore_eos=True, detokenize=False)
    for folder in task["folders"]:
        llm = LLM(
            folder,
            dtype="float32",
            skip_tokenizer_init=True,
            max_model_len=64,
            max_num_seqs=4,
            kv_cache_memory_bytes=32 << 20,
            worker_extension_cls="serve_with_vllm.Watch",
            **task["engine"],
        )
        if task["engine"]["enforce_eager"]:
            llm.collective_rpc("watch")
        requests = [{"prompt_token_ids": prompt} for prompt in task["prompts"]]
        outputs = llm.generate(requests, sampling, use_tqdm=False)
        found = {
            "tokens": [list(output.outputs[0].token_ids) for output in outputs],
            "read": llm.collective_rpc("seen") if task["engine"]["enforce_eager"] else None,
            "package": "qsparse_hf" in sys.modules,
        }
        print("FOUND", json.dumps(found), flush=True)
        del llm


if __name__ == "__main__":  # the processes that vLLM spawns import this file
    main()
