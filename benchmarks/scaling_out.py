"""Tokens a second on one GPU and on two, under DDP and FSDP2; and what 64 GPUs and a 7B model would take.

    python benchmarks/scaling_out.py --output scaling_out.json
    python benchmarks/scaling_out.py --engines ddp --updates 12

Every run is a process group of its own, started by `accelerate launch` with this repository's engine files and
`scripts/train.py`, on the Python standard library as text. The model is `configs/model/qsparse_llama_1.3b.json` in bf16
mixed precision, 16,384 tokens a GPU and update: gradients are exchanged in every update, the hardest case. Runs of one
engine are interleaved, `--rounds` times; figures are medians over logged updates after the first half of a run.

With `--resume` a run on two GPUs is also stopped half-way and resumed on one and on two GPUs; the losses of its second
half are compared with the uninterrupted run's.
"""

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

import qsparse_hf  # noqa: F401, registers the model types
from qsparse_hf.quickstart import train_tokenizer, write_corpus
from qsparse_hf.training.throughput import peak_flops, training_flops_per_token

REPOSITORY = Path(__file__).parent.parent
MODEL = REPOSITORY / "configs" / "model" / "qsparse_llama_1.3b.json"
MODEL_7B = REPOSITORY / "configs" / "model" / "qsparse_llama_7b.json"
SEQUENCE_LENGTH = 2048
ROWS = 8  # a GPU and update


def run(engine: str, processes: int, output: Path, corpus: dict, updates: int, *overrides: str) -> list[dict]:
    """One training; returns its log, an entry an update."""
    recipe = {
        "config": str(MODEL),
        "tokenizer": str(corpus["tokenizer"]),
        "train_data": corpus["train_data"],
        "sequence_length": SEQUENCE_LENGTH,
        "repeat_data": True,
        "output_dir": str(output),
        "max_steps": updates,
        "per_device_train_batch_size": ROWS,
        "bf16": True,
        "learning_rate": 2e-4,
        "warmup_steps": 4,
        "max_grad_norm": 1.0,
        "logging_steps": 1,
        "log_sparsity": False,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    file = output.with_suffix(".json")  # JSON is YAML
    file.write_text(json.dumps(recipe))
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", str(processes)]
    if engine == "ddp" and processes == 1:
        launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    else:
        launch += ["--config_file", str(REPOSITORY / "configs" / "accelerate" / f"{engine}.yaml")]
    command = [*launch, str(REPOSITORY / "scripts" / "train.py"), str(file), *overrides]
    visible = {"CUDA_VISIBLE_DEVICES": ",".join(map(str, range(processes)))}
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, env=os.environ | visible)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr[-4000:]}")
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return [entry for entry in history if "loss" in entry]


def measure(engines: list[str], counts: list[int], updates: int, rounds: int, corpus: dict, folder: Path) -> list[dict]:
    """A row for every engine and number of GPUs, with all raw speeds."""
    speeds: dict[tuple[str, int], list[dict]] = {(engine, count): [] for engine in engines for count in counts}
    for turn in range(rounds):
        for engine, count in speeds:
            log = run(engine, count, folder / f"{engine}-{count}-{turn}", corpus, updates)
            speeds[engine, count] += log[len(log) // 2 :]
            shutil.rmtree(folder / f"{engine}-{count}-{turn}")
            print(f"round {turn + 1}: {engine} on {count}: {log[-1]['tokens_per_second']:,.0f} tokens/s", flush=True)
    rows = []
    for (engine, count), entries in speeds.items() if rounds else ():
        speed = statistics.median(entry["tokens_per_second"] for entry in entries)
        alone = statistics.median(entry["tokens_per_second"] for entry in speeds[engine, counts[0]]) / counts[0]
        rows.append(
            {
                "engine": engine,
                "gpus": count,
                "tokens_per_second": speed,
                "efficiency": speed / count / alone,
                "mfu": statistics.median(entry.get("mfu", math.nan) for entry in entries),
                "peak_memory_gib": entries[-1]["peak_memory_gib"],
                "raw_tokens_per_second": [entry["tokens_per_second"] for entry in entries],
            }
        )
    return rows


def resume(engines: list[str], corpus: dict, folder: Path) -> list[dict]:
    """Stop after half of the updates on two GPUs, resume on one and on two, compare the losses of the second half."""
    rows = []
    for engine in engines:
        batch = f"global_batch_size={2 * ROWS}"
        whole = run(engine, 2, folder / f"{engine}-whole", corpus, 8, batch, "save_strategy=steps", "save_steps=4")
        shutil.rmtree(folder / f"{engine}-whole" / "checkpoint-8")
        for count in (1, 2):
            output = folder / f"{engine}-resumed-{count}"
            shutil.copytree(folder / f"{engine}-whole", output)
            resumed = run(engine, count, output, corpus, 8, batch, "resume_from_checkpoint=last")
            losses = [[entry["loss"] for entry in log[4:]] for log in (whole, resumed)]
            errors = [abs(theirs - ours) for theirs, ours in zip(*losses, strict=True)]
            if any(
                a["tokens_per_second"] == b["tokens_per_second"] for a, b in zip(whole[4:], resumed[4:], strict=True)
            ):
                sys.exit(f"{engine} 2 -> {count}: the log of the resumed run is not its own")
            row = {"engine": engine, "gpus": f"2 -> {count}", "largest_loss_difference": max(errors)}
            rows.append(row | {"losses": losses[0], "resumed_losses": losses[1]})
            print(f"{engine} 2 -> {count}: losses within {max(errors):.1e}", flush=True)
            shutil.rmtree(output)
        model = AutoModelForCausalLM.from_pretrained(folder / f"{engine}-whole" / "checkpoint-4")
        rows[-1]["checkpoint_loads_whole"] = all(torch.isfinite(p).all().item() for p in model.parameters())
        shutil.rmtree(folder / f"{engine}-whole")
    return rows


def estimate(row: dict, device: torch.device) -> str:
    """What a 7B model on 64 such GPUs would take under FSDP2, from the measured utilisation of `row`."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(MODEL_7B))
    weights = sum(parameter.numel() for parameter in model.parameters())
    flops, peak = training_flops_per_token(model, SEQUENCE_LENGTH), peak_flops(device)
    gpus, rows, network = 64, 4, 50e9
    tokens = rows * SEQUENCE_LENGTH
    compute = tokens * flops / (row["mfu"] * peak)
    exchanged = (2 + 2 + 2) * weights  # gathered forward and backward, gradients reduced: all in bf16
    exchange = exchanged / network
    step, worst = max(compute, exchange), compute + exchange
    state = weights * (4 + 4 + 8) / gpus / 2**30
    lines = [
        f"An estimate, not a measurement: {weights / 1e9:.2f}B parameters on {gpus} GPUs under FSDP2",
        f"  FLOPs a token            6 N + 12 L d T = {flops / 1e9:.1f} G",
        f"  compute a micro-batch    {tokens:,} tokens * {flops / 1e9:.1f} G / ({row['mfu']:.1%} * {peak / 1e12:.0f} T)"
        f" = {compute:.2f} s",
        f"  exchanged a micro-batch  (2 + 2 + 2) B * {weights / 1e9:.2f} G = {exchanged / 1e9:.0f} GB a GPU,"
        f" {exchange:.2f} s at {network / 1e9:.0f} GB/s (one 400 Gb/s port a GPU)",
        f"  speed                    {gpus} * {tokens:,} / {step:.2f} s = {gpus * tokens / step:,.0f} tokens/s if the"
        f" exchange hides behind compute, {gpus * tokens / worst:,.0f} if not at all",
        f"  an update of 4M tokens   {2**22 / (gpus * tokens / step):.1f} to {2**22 / (gpus * tokens / worst):.1f} s",
        f"  40B tokens (table 7)     {40e9 * step / (gpus * tokens) / 86400:.1f} to"
        f" {40e9 * worst / (gpus * tokens) / 86400:.1f} days",
        f"  weights, gradients and Adam's moments in fp32, sharded: {state:.1f} GiB a GPU, activations come on top",
        "The utilisation is the 1.3B model's; the wider products of a 7B use the GPU better. Where the activations do",
        "not fit, checkpointing them costs a third of the compute again.",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", nargs="+", default=["ddp", "fsdp2"], help="files of configs/accelerate")
    parser.add_argument("--gpus", nargs="+", type=int, help="numbers of GPUs; default: 1 and all there are")
    parser.add_argument("--updates", type=int, default=20, help="updates a run (default %(default)s)")
    parser.add_argument(
        "--rounds", type=int, default=2, help="runs of every kind, interleaved (default %(default)s; 0: none)"
    )
    parser.add_argument("--resume", action="store_true", help="also stop and go on across numbers of GPUs")
    parser.add_argument("--output", help="write all figures there, as JSON")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("scaling_out.py: error: needs a GPU")
    counts = arguments.gpus or sorted({1, torch.cuda.device_count()})
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        corpus = write_corpus(folder)
        train_tokenizer(corpus["train_data"], folder / "tokenizer")
        corpus["tokenizer"] = folder / "tokenizer"
        rows = measure(arguments.engines, counts, arguments.updates, arguments.rounds, corpus, folder)
        resumed = resume(arguments.engines, corpus, folder) if arguments.resume else []

    print(f"\n{torch.cuda.get_device_name()}, {MODEL.stem}, bf16, {ROWS} x {SEQUENCE_LENGTH} tokens a GPU and update")
    print(f"{'engine':<10}{'GPUs':>5}{'tokens/s':>12}{'efficiency':>12}{'MFU':>8}{'peak GiB':>10}")
    for row in rows:
        print(
            f"{row['engine']:<10}{row['gpus']:>5}{row['tokens_per_second']:>12,.0f}{row['efficiency']:>12.1%}"
            f"{row['mfu']:>8.1%}{row['peak_memory_gib']:>10.1f}"
        )
    for row in resumed:
        print(f"{row['engine']:<10}{row['gpus']:>7}  resumed, losses within {row['largest_loss_difference']:.1e}")
    text = estimate(rows[-1], torch.device("cuda")) if rows else ""
    print(f"\n{text}")
    if arguments.output:
        figures = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "rows": rows, "resume": resumed}
        Path(arguments.output).write_text(json.dumps(figures | {"estimate": text.splitlines()}, indent=2) + "\n")


if __name__ == "__main__":
    main()
