"""The whole path on a CPU in minutes: Python's own sources become a dense Llama, then a Q-Sparse one.

Every step is the one a real checkpoint takes: `train`, `convert_checkpoint`, `train` again, `report_checkpoint`. The
two YAML files it writes can be run again with `qsparse train`.
"""

import json
import math
import shutil
import subprocess
import sys
import sysconfig
import zlib
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast

from .conversion import convert_checkpoint
from .errors import UserError
from .report import SparsityReport, report_checkpoint
from .training.run import train

SPARSITY = 0.5
SEQUENCE_LENGTH = 256
EVALUATED_CHARACTERS = 2000
_MARKER = ".qsparse-quickstart"
_END = "<|end|>"

_MODEL = {
    "vocab_size": 2048,
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
}
_RUN = {
    "eval_strategy": "steps",
    "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 8,
    "sequence_length": SEQUENCE_LENGTH,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 10,
    "adam_beta2": 0.95,
    "weight_decay": 0.1,
    "logging_steps": 5,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "seed": 0,
}
_DENSE_RUN = {"max_steps": 400, "learning_rate": 3e-3, "eval_steps": 50}
_SPARSE_RUN = {"max_steps": 120, "learning_rate": 1e-3, "eval_steps": 20, "eval_on_start": True}


def quickstart(output: str) -> None:
    """Run all of it and leave models, pictures and a summary in `output`.

    Raises:
        UserError: `output` exists and is not an earlier quickstart's.
    """
    folder = Path(output).absolute()
    if folder.exists() and any(folder.iterdir()) and not (folder / _MARKER).exists():
        raise UserError(f"{output} exists and is not a quickstart's; choose another --output")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / _MARKER).touch()

    _say("1/6  Python's standard library as text, and a tokenizer for it")
    corpus = _write_corpus(folder)
    _train_tokenizer(corpus["train_files"], folder / "tokenizer")
    LlamaConfig(**_MODEL, bos_token_id=None, eos_token_id=0, pad_token_id=0).to_json_file(folder / "model.json")

    _say("2/6  A small dense Llama, trained from scratch")
    dense = folder / "dense"
    dense_history = _train(
        folder / "dense.yaml",
        corpus | _DENSE_RUN | {"config": str(folder / "model.json"), "tokenizer": str(folder / "tokenizer")},
        dense,
    )

    _say(f"3/6  Its Q-Sparse twin: every projection reads the {1 - SPARSITY:.0%} largest inputs of each token")
    converted = folder / "converted"
    print(convert_checkpoint(dense, converted, sparsity=SPARSITY))

    _say("4/6  Continue-training the sparse model")
    sparse = folder / "sparse"
    sparse_history = _train(folder / "sparse.yaml", corpus | _SPARSE_RUN | {"model": str(converted)}, sparse)

    _say("5/6  What it reads, measured on held-out modules")
    report = report_checkpoint(str(sparse), corpus["eval_files"], output=str(sparse), tokens=4096)
    print(report)

    _say("6/6  A sample, and the same model again from disk in a fresh process")
    print(_sample(sparse))
    _check_reload(sparse)
    _plot(dense_history, sparse_history, sparse / "loss.png")
    _summarize(dense_history, sparse_history, report, sparse)


def _write_corpus(folder: Path) -> dict[str, list[str]]:
    """JSONL files of the standard library's modules: one in ten is held out, its beginning kept for evaluation."""
    library = Path(sysconfig.get_paths()["stdlib"])
    modules = [
        path
        for path in sorted(library.rglob("*.py"))
        if not {"site-packages", "test", "tests", "idle_test"} & set(path.relative_to(library).parts)
    ]
    texts = {"train": [], "eval": []}
    for path in tqdm(modules, desc="reading modules", unit="file"):
        text = path.read_text(encoding="utf-8", errors="replace")
        if zlib.crc32(path.relative_to(library).as_posix().encode()) % 10:
            texts["train"].append(text)
        else:
            texts["eval"].append(text[:EVALUATED_CHARACTERS])
    corpus = {}
    for split, documents in texts.items():
        target = folder / f"{split}.jsonl"
        target.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents if text.strip()))
        corpus[f"{split}_files"] = [str(target)]
    return corpus


def _train_tokenizer(files: list[str], folder: Path) -> None:
    texts = [json.loads(line)["text"] for file in files for line in Path(file).read_text().splitlines()]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_MODEL["vocab_size"],
        special_tokens=[_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(tqdm(texts, desc="training the tokenizer", unit="file"), trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=_END, pad_token=_END).save_pretrained(folder)


def _train(config: Path, run: dict, output: Path) -> list[dict]:
    config.write_text(yaml.safe_dump(_RUN | run | {"output_dir": str(output)}, sort_keys=False))
    return train(str(config)).state.log_history


def _losses(history: list[dict], key: str) -> tuple[list[int], list[float]]:
    points = [(entry["step"], entry[key]) for entry in history if key in entry]
    return [step for step, _ in points], [loss for _, loss in points]


def _sample(folder: Path) -> str:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    prompt = tokenizer("def __init__(self, ", return_tensors="pt")
    torch.manual_seed(0)
    tokens = model.generate(**prompt, max_new_tokens=60, do_sample=True, temperature=0.7, top_k=40)
    return tokenizer.decode(tokens[0])


_RELOAD = """
import sys, torch, qsparse_hf
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
folder, tokens, logits = sys.argv[1:]
with torch.no_grad():
    save_file({"logits": AutoModelForCausalLM.from_pretrained(folder)(**load_file(tokens)).logits}, logits)
"""


def _check_reload(folder: Path) -> None:
    tokens, logits = folder / "reload-tokens.safetensors", folder / "reload-logits.safetensors"
    batch = {"input_ids": torch.arange(1, 65)[None]}
    save_file(batch, tokens)
    subprocess.run([sys.executable, "-c", _RELOAD, str(folder), str(tokens), str(logits)], check=True)
    with torch.no_grad():
        here = AutoModelForCausalLM.from_pretrained(folder)(**batch).logits
    if not torch.equal(here, load_file(logits)["logits"]):
        raise RuntimeError(f"{folder} gives other logits in a fresh process")
    tokens.unlink()
    logits.unlink()
    print("reloaded with AutoModelForCausalLM in a fresh process: identical logits")


def _plot(dense: list[dict], sparse: list[dict], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    offset = _losses(dense, "eval_loss")[0][-1]
    for history, start, color, name in ((dense, 0, "C0", "dense"), (sparse, offset, "C3", "Q-Sparse")):
        steps, losses = _losses(history, "loss")
        axes.plot([start + step for step in steps], losses, color=color, alpha=0.4, label=f"{name}, training batches")
        steps, losses = _losses(history, "eval_loss")
        axes.plot([start + step for step in steps], losses, color=color, marker="o", label=f"{name}, held-out modules")
    axes.axvline(offset, color="0.5", linestyle=":", label=f"converted at {SPARSITY:.0%} sparsity")
    axes.set_xlabel("optimizer updates")
    axes.set_ylabel("loss (nats per token)")
    axes.legend()
    figure.savefig(path, dpi=120)


def _summarize(dense: list[dict], sparse: list[dict], report: SparsityReport, folder: Path) -> None:
    dense_loss = _losses(dense, "eval_loss")[1][-1]
    converted_loss, *_, trained_loss = _losses(sparse, "eval_loss")[1]
    everything = report.projection_parameters
    rows = (
        ("dense", dense_loss, everything),
        (f"{SPARSITY:.0%} sparse, just converted", converted_loss, report.activated_parameters),
        (f"{SPARSITY:.0%} sparse, {_SPARSE_RUN['max_steps']} updates later", trained_loss, report.activated_parameters),
    )
    _say("Summary: loss on modules never trained on (lower is better)")
    print(f"{'model':<32}{'loss':>8}{'perplexity':>12}{'weights read a token':>26}")
    for name, loss, read in rows:
        print(f"{name:<32}{loss:8.3f}{math.exp(loss):12.1f}{read / 1e6:18.2f}M ({read / everything:4.0%})")
    print(f"\nThe sparse model is in {folder}, with loss.png and sparsity.png beside it. Load it like any other:")
    print(f'  import qsparse_hf; AutoModelForCausalLM.from_pretrained("{folder}")')


def _say(text: str) -> None:
    print(f"\n== {text}", flush=True)
