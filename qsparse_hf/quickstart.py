"""The whole path on a CPU in minutes: Python's own sources become a dense Llama, then a Q-Sparse one.

Every step is the one a real checkpoint takes: `train`, `convert_checkpoint`, `train` again, `report_checkpoint`. The
YAML files it writes show the runs as `qsparse train` takes them.
"""

import ast
import json
import math
import os
import shutil
import subprocess
import sys
import sysconfig
import textwrap
import zlib
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast

from .conversion import convert_checkpoint
from .errors import Interrupted, UserError, check_writable, user_errors
from .report import SparsityReport, report_checkpoint
from .training.run import train

SPARSITY = 0.5
SEQUENCE_LENGTH = 256
EVALUATED_CHARACTERS = 2000
_MARKER = ".qsparse-quickstart"
_END = "<|end|>"

_MODEL = LlamaConfig(
    vocab_size=2048,
    hidden_size=128,
    intermediate_size=352,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=1024,
    tie_word_embeddings=True,
    bos_token_id=None,
    eos_token_id=0,
    pad_token_id=0,
)
_RUN = {
    "eval_strategy": "steps",
    "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 8,
    "sequence_length": SEQUENCE_LENGTH,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 20,
    "adam_beta2": 0.95,
    "weight_decay": 0.1,
    "logging_steps": 5,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "seed": 0,
}
_PRETRAIN = {"max_steps": 700, "learning_rate": 3e-3, "eval_steps": 100}
_CONTINUE = {"max_steps": 150, "learning_rate": 1e-3, "eval_steps": 25, "eval_on_start": True}


def quickstart(output: str) -> None:
    """Run all of it and leave models, pictures and a summary in `output`.

    Raises:
        UserError: `output` exists and is not an earlier quickstart's, or cannot be written.
    """
    with user_errors("output"):
        folder = Path(os.path.realpath(output))  # of a link, what it points to is replaced
        empty = folder.is_dir() and not any(folder.iterdir())
        if folder.exists() and not empty and not (folder / _MARKER).exists():
            raise UserError(f"{output} is not a quickstart's; choose another --output")
        check_writable(folder / _MARKER)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / _MARKER).touch()

    _say("1/6  Python's standard library as text, and a tokenizer for it")
    corpus = write_corpus(folder)
    _write_questions(folder)
    train_tokenizer(corpus["train_data"], folder / "tokenizer")
    _MODEL.to_json_file(folder / "model.json")

    _say("2/6  A small dense Llama, trained from scratch")
    dense, sparse = folder / "dense", folder / "sparse"
    fresh = {"config": str(folder / "model.json"), "tokenizer": str(folder / "tokenizer")}
    histories = {"dense": _train(folder / "dense.yaml", corpus | _PRETRAIN | fresh, dense)}

    _say(f"3/6  Its Q-Sparse twin: every projection reads the {1 - SPARSITY:.0%} largest inputs of each token")
    print(convert_checkpoint(dense, folder / "converted", sparsity=SPARSITY))

    _say("4/6  Continue-training: the sparse model, and the dense one for comparison")
    for name, start, target in (("sparse", folder / "converted", sparse), ("longer", dense, folder / "dense-longer")):
        histories[name] = _train(folder / f"{target.name}.yaml", corpus | _CONTINUE | {"model": str(start)}, target)

    _say("5/6  What the sparse model reads, measured on held-out modules")
    report = report_checkpoint(str(sparse), corpus["eval_data"], output=str(sparse), tokens=4096)
    print(report)

    _say("6/6  A sample, and the same model again from disk in a fresh process")
    print(_sample(sparse))
    _check_reload(sparse)
    _plot(histories, sparse / "loss.png")
    _summarize(histories, report, sparse)


def write_corpus(folder: Path) -> dict[str, list[str]]:
    """JSONL files of the standard library's modules: one in ten is held out, its beginning kept for evaluation."""
    library = Path(sysconfig.get_paths()["stdlib"])
    modules = [
        path
        for path in sorted(library.rglob("*.py"))
        if not {"site-packages", "test", "tests", "idle_test"} & set(path.relative_to(library).parts)
    ]
    texts: dict[str, list[str]] = {"train": [], "eval": []}
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
        corpus[f"{split}_data"] = [str(target)]
    return corpus


def _write_questions(folder: Path) -> None:
    """Functions with a docstring, as pairs for fine-tuning: what it says asks for the code."""
    lines = []
    for line in (folder / "train.jsonl").read_text().splitlines():
        text = json.loads(line)["text"]
        try:
            functions = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)]
        except SyntaxError:  # another Python's
            continue
        written = text.splitlines()
        for function in functions:
            code = textwrap.dedent("\n".join(written[function.lineno - 1 : function.end_lineno]))
            if (asked := ast.get_docstring(function)) and len(code) < 600:
                lines.append(json.dumps({"prompt": asked, "completion": code}) + "\n")
    (folder / "questions.jsonl").write_text("".join(lines))


def train_tokenizer(files: list[str], folder: Path) -> None:
    """A byte-level BPE of `files` (JSONL), as small as the quickstart's model."""
    texts = [json.loads(line)["text"] for file in files for line in Path(file).read_text().splitlines()]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_MODEL.vocab_size,
        special_tokens=[_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    with tqdm(texts, desc="training the tokenizer", unit="file") as progress:  # else Ctrl-C is lost in its destructor
        tokenizer.train_from_iterator(progress, trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=_END, pad_token=_END).save_pretrained(folder)


def _train(config: Path, run: dict, output: Path) -> list[dict]:
    config.write_text(yaml.safe_dump(_RUN | run | {"output_dir": str(output)}, sort_keys=False))
    try:
        return train(str(config)).state.log_history
    except Interrupted as error:
        raise Interrupted(error.number, "the quickstart was stopped; it begins anew when it is run again") from error


def _losses(history: list[dict], key: str) -> tuple[list[int], list[float]]:
    points = [(entry["step"], entry[key]) for entry in history if key in entry]
    return [step for step, _ in points], [loss for _, loss in points]


def _sample(folder: Path) -> str:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder)  # by its annotations it could not generate
    prompt = tokenizer("def __init__(self, ", return_tensors="pt")
    torch.manual_seed(0)
    tokens = model.generate(**prompt, max_new_tokens=60, do_sample=True, temperature=0.7, top_k=40)
    return tokenizer.batch_decode(tokens)[0]


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


def _plot(histories: dict[str, list[dict]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    converted = _PRETRAIN["max_steps"]
    for name, start, color, label in (
        ("dense", 0, "C0", "dense"),
        ("longer", converted, "C2", "dense, trained further"),
        ("sparse", converted, "C3", f"{SPARSITY:.0%} sparse"),
    ):
        steps, losses = _losses(histories[name], "loss")
        axes.plot([start + step for step in steps], losses, color=color, alpha=0.3)
        steps, losses = _losses(histories[name], "eval_loss")
        axes.plot([start + step for step in steps], losses, color=color, marker=".", label=label)
    axes.axvline(converted, color="0.5", linestyle=":", label="conversion")
    axes.set_xlabel("optimizer updates")
    axes.set_ylabel("loss on held-out modules (pale: training batches)")
    axes.set_ylim(top=_losses(histories["dense"], "eval_loss")[1][0] + 0.5)
    axes.legend()
    figure.savefig(path, dpi=120)


def _summarize(histories: dict[str, list[dict]], report: SparsityReport, folder: Path) -> None:
    first, last = (
        {name: _losses(history, "eval_loss")[1][index] for name, history in histories.items()} for index in (0, -1)
    )
    everything, activated = report.projection_parameters, report.activated_parameters
    later = f"{_CONTINUE['max_steps']} updates later"
    rows = (
        ("dense", last["dense"], everything),
        (f"dense, {later}", last["longer"], everything),
        (f"{SPARSITY:.0%} sparse, just converted", first["sparse"], activated),
        (f"{SPARSITY:.0%} sparse, {later}", last["sparse"], activated),
    )
    _say("Summary: loss on modules never trained on (lower is better)")
    print(f"{'model':<30}{'loss':>8}{'perplexity':>12}{'activated weights':>24}")
    for name, loss, read in rows:
        print(f"{name:<30}{loss:8.3f}{math.exp(loss):12.1f}{read / 1e6:16.2f}M ({read / everything:4.0%})")
    print(f"\nWhat sparsity costs is the gap between the rows marked '{later}'; both learned from the same text.")
    print("Activated weights are those of the projections that meet a non-zero input; after prepare_for_decode() the")
    print("model decodes reading no others.")
    print(f"\nThe sparse model is in {folder}, with loss.png and sparsity.png beside it. Load it like any other:")
    print(f'  import qsparse_hf; AutoModelForCausalLM.from_pretrained("{folder}")')


def _say(text: str) -> None:
    print(f"\n== {text}", flush=True)
