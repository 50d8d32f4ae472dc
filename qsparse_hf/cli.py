"""The `qsparse` command: one thin subcommand per verb."""

import argparse
import os
import sys
from collections.abc import Callable
from importlib.metadata import version
from typing import TYPE_CHECKING

from .errors import Interrupted, UserError, shortened

if TYPE_CHECKING:
    from .evaluation import Suite


_MODEL = "folder or Hub id of a checkpoint, Q-Sparse or dense, or a folder of adapters"
_TEXT = 'files, folders or globs of text, JSONL, parquet or CSV, or {"dataset": ..., "split": ..., "columns": ...}'


def convert(arguments: argparse.Namespace) -> None:
    from .conversion import convert_checkpoint

    fields = {
        "sparsity": arguments.sparsity,
        "sparsity_per_projection": dict(arguments.per_projection) or None,
        "sparsity_block_size": arguments.block_size,
        "sparsity_rescale": arguments.rescale,
        "activation_quantization": arguments.activations,
    }
    plan = convert_checkpoint(
        arguments.source,
        arguments.output,
        weights=arguments.weights,
        dtype=arguments.dtype,
        max_shard_size=arguments.max_shard_size,
        overwrite=arguments.overwrite,
        dry_run=arguments.dry_run,
        revision=arguments.revision,
        gguf_file=arguments.gguf_file,
        **{name: value for name, value in fields.items() if value is not None},
    )
    print(("would write " if arguments.dry_run else "wrote ") + str(plan))


def calibrate(arguments: argparse.Namespace) -> None:
    from .calibration import calibrate_checkpoint

    settings = {key: value for key, value in vars(arguments).items() if key != "run"}
    print(f"wrote {calibrate_checkpoint(**settings)}")


def train(arguments: argparse.Namespace) -> None:
    from .losses import compare, eval_losses
    from .training.run import train

    trainer = train(arguments.config, arguments.overrides)
    if trainer.is_world_process_zero():
        logged = {name: loss for entry in trainer.state.log_history for name, loss in entry.items()}
        losses = [f"{name} {logged[name]:.3f}" for name in ("loss", *eval_losses(logged)) if name in logged]
        if control := trainer.control_history:
            beside = compare(trainer.state.log_history, control)
            losses += [f"{name} {beside[name]:.3f}" for name in beside if "initial" not in name]
        did = f"saved {trainer.args.output_dir}" if trainer.state.global_step else "evaluated before the first update"
        print(did, *losses, sep=", ")


def report(arguments: argparse.Namespace) -> None:
    from .report import report_checkpoint

    print(report_checkpoint(arguments.model, arguments.text, arguments.output, arguments.tokens))


def generate(arguments: argparse.Namespace) -> None:
    from .generate import Chat

    settings = {key: value for key, value in vars(arguments).items() if key not in ("run", "prompt")}
    chat = Chat(**settings)
    if arguments.prompt is None:
        chat.talk()
    else:
        chat.answer(arguments.prompt)


def eval_(arguments: argparse.Namespace) -> None:
    from .evaluation import evaluate_checkpoint

    evaluate_checkpoint(arguments.model, _suite(arguments), arguments.device, arguments.dtype, arguments.output)


def compare(arguments: argparse.Namespace) -> None:
    from .comparison import compare_checkpoints

    where = {name: getattr(arguments, name) for name in ("device", "dtype", "output", "picture", "prompts")}
    compare_checkpoints(arguments.models, _suite(arguments), **where)


def _suite(arguments: argparse.Namespace) -> "Suite":
    from .evaluation import Protocol, Suite

    protocol = Protocol(arguments.window, arguments.stride, arguments.bos, arguments.joined, arguments.tokens)
    return Suite.of(
        arguments.text, arguments.pairs, arguments.tasks, protocol, arguments.batch_size, arguments.questions
    )


def push(arguments: argparse.Namespace) -> None:
    from .hub import push_folder

    settings = {key: value for key, value in vars(arguments).items() if key != "run"}
    print(push_folder(**settings))


def bench(arguments: argparse.Namespace) -> None:
    from .bench import bench_decode

    settings = {key: value for key, value in vars(arguments).items() if key not in ("run", "what")}
    bench_decode(**settings)


def quickstart(arguments: argparse.Namespace) -> None:
    from .quickstart import quickstart

    quickstart(arguments.output)


def _group_ratio(text: str) -> tuple[str, float | list[float]]:
    group, _, ratios = text.partition("=")
    try:
        values = [float(ratio) for ratio in ratios.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"must look like down=0.6 or down=0.5,0.6, got {text!r}") from None
    return group, values[0] if len(values) == 1 else values


def _add_suite(parser: argparse.ArgumentParser) -> None:
    """What a model is measured on, and how."""
    add = parser.add_argument
    add(
        "--text",
        nargs="+",
        default=[],
        metavar="[NAME=]DATA",
        help=f"{_TEXT}; each a row of the table",
    )
    add("--window", type=int, metavar="N", help="tokens read at once (default: 1024, or the model's positions)")
    add("--stride", type=int, metavar="N", help="from window to window (default: the window, no overlap)")
    add("--bos", action=argparse.BooleanOptionalAction, help="begin windows so (default: as the tokenizer does)")
    add(
        "--joined",
        action="store_true",
        help="documents as one text, with blank lines between (default: each by itself)",
    )
    add("--tokens", type=int, metavar="N", help="score at most so many of each text (default: all)")
    add(
        "--pairs",
        nargs="+",
        default=[],
        metavar="[NAME=]DATA",
        help="minimal pairs, as BLiMP's: rows of sentence_good, sentence_bad and UID",
    )
    add(
        "--tasks",
        nargs="+",
        default=[],
        metavar="TASK[:SHOTS]",
        help="of lm-evaluation-harness, or YAML files of your own, whose code runs; paper: ARC-C, HellaSwag, MMLU, "
        "Winogrande and TruthfulQA with 25, 10, 5, 5 and 0 shots",
    )
    add("--questions", type=int, metavar="N", help="ask at most so many of each task (default: all)")
    add("--batch-size", type=int, default=8, metavar="N", help="sequences at once (default %(default)s)")
    add("--device", choices=["cuda", "cpu"], help="(default: cuda where there is one)")
    add("--dtype", default="auto", help="float32, bfloat16 or float16 (default: the checkpoint's)")
    add("--output", metavar="FILE", help="also write everything there, as JSON")


def build_parser() -> argparse.ArgumentParser:
    """The parser of the `qsparse` command."""
    parser = argparse.ArgumentParser(
        prog="qsparse", description="Large language models that run on a fraction of their activations."
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {version('qsparse-hf')}")
    verbs = parser.add_subparsers(required=True, metavar="VERB")

    def verb(function: Callable, summary: str, example: str) -> argparse.ArgumentParser:
        subparser = verbs.add_parser(
            function.__name__.rstrip("_"),  # `eval` is Python's
            help=summary,
            description=summary,
            epilog=f"example:\n  {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        subparser.set_defaults(run=function)
        return subparser

    p = verb(
        convert,
        "Make a Q-Sparse checkpoint from a dense one: Llama, Mistral, Qwen2, Qwen3, Phi-3, Gemma 3 (text) or BitNet; "
        "or write a Q-Sparse one's weights in another form.",
        "qsparse convert mistralai/Mistral-7B-v0.1 mistral-7b-qsparse --sparsity 0.5 --per-projection o=0.4 down=0.6\n"
        "  qsparse convert runs/trained-ternary my-packed-model --weights packed",
    )
    p.add_argument("source", help="folder or Hub id of the checkpoint, or a GGUF file")
    p.add_argument("output", help="folder to write")
    p.add_argument(
        "--weights",
        help="form of the projections' weights: ternary (in full precision, quantized in every product: to train), "
        "packed (two bits each) or plain (ordinary floats); ternary weights are -1, 0 and 1 times a scale "
        "(default: as they are)",
    )
    p.add_argument("--activations", help="none, or int8 to round the projections' inputs (default: as they are)")
    p.add_argument(
        "--sparsity",
        type=float,
        help="fraction of zeros, 0 <= S < 1 (default 0.5; a Q-Sparse source keeps what is not said)",
    )
    p.add_argument(
        "--per-projection",
        type=_group_ratio,
        nargs="+",
        action="extend",
        default=[],
        metavar="GROUP=S",
        help="other ratios for qkv, o, gate_up or down; S is one number, or one per layer joined by commas",
    )
    p.add_argument("--block-size", type=int, metavar="M", help="top-K inside every M features (default: over all)")
    p.add_argument("--rescale", help="none or l2 (default none, which converted weights want)")
    p.add_argument("--dtype", help="float32, bfloat16 or float16 (default: as in the source)")
    p.add_argument("--max-shard-size", default="5GB", help="largest weight file (default %(default)s)")
    p.add_argument("--gguf-file", metavar="NAME", help="the GGUF file to take of those in the source")
    p.add_argument("--revision", help="branch, tag or commit of a Hub repository")
    p.add_argument("--overwrite", action="store_true", help="replace the output if it exists")
    p.add_argument("--dry-run", action="store_true", help="print what would be written and stop")

    p = verb(
        calibrate,
        "Convert a dense checkpoint with a ratio for each projection group and layer, found on text without training.",
        "qsparse calibrate mistralai/Mistral-7B-v0.1 mistral-7b-40 --text README.md notes.jsonl.gz --sparsity 0.4",
    )
    p.add_argument("source", help="folder or Hub id of the dense checkpoint")
    p.add_argument("output", help="folder to write")
    p.add_argument("--text", nargs="+", required=True, metavar="DATA", help=_TEXT)
    p.add_argument("--sparsity", type=float, default=0.5, help="of all projections together (default %(default)s)")
    p.add_argument("--block-size", type=int, metavar="M", help="top-K inside every M features (default: over all)")
    p.add_argument("--tokens", type=int, default=32768, help="at most this many of the text (default %(default)s)")
    p.add_argument("--device", help="cuda or cpu (default: a GPU where there is one)")
    p.add_argument("--dtype", default="auto", help="to calibrate in; the output keeps its own (default: the same)")
    p.add_argument("--overwrite", action="store_true", help="replace the output if it exists")

    p = verb(
        train,
        "Train from a YAML file: from scratch, continuing a checkpoint, or fine-tuning one.",
        "qsparse train configs/train/continue_tiny.yaml model=my-checkpoint learning_rate=1e-4",
    )
    p.add_argument("config", help="YAML file; configs/train/ has examples")
    p.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="win over the file; fields of RunArguments, DataArguments and QSparseTrainingArguments, "
        "which are TrainingArguments and more; resume_from_checkpoint=last goes on where a run stopped",
    )

    p = verb(
        report,
        "Measure sparsity and activated parameters per projection on given text.",
        "qsparse report my-checkpoint --text README.md --output report/",
    )
    p.add_argument("model", help=_MODEL)
    p.add_argument("--text", nargs="+", required=True, metavar="DATA", help=_TEXT)
    p.add_argument("--tokens", type=int, default=4096, help="at most this many tokens (default %(default)s)")
    p.add_argument("--output", metavar="DIR", help="also write sparsity.json and sparsity.png there")

    p = verb(
        generate,
        "Answer a prompt at the terminal, or hold a conversation; without a chat template, continue the prompt.",
        "qsparse generate my-checkpoint --prepared\n  qsparse generate my-checkpoint 'What is a sparse matrix?'",
    )
    p.add_argument("model", help=_MODEL)
    p.add_argument("prompt", nargs="?", help="(default: read from the terminal, one line after the other)")
    p.add_argument("--prepared", action="store_true", help="prepare the model for decoding first")
    p.add_argument("--system", metavar="TEXT", help="the system message of a chat")
    p.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="of an answer (default %(default)s)")
    p.add_argument("--temperature", type=float, default=0.0, help="of sampling (default 0: the likeliest token)")
    p.add_argument("--seed", type=int, help="of sampling")

    p = verb(
        eval_,
        "Measure a model: loss of held-out text, accuracy on minimal pairs and on tasks, and the sparsity meanwhile.",
        "qsparse eval my-checkpoint --text README.md notes=notes.jsonl.gz --output eval.json",
    )
    p.add_argument("model", help=_MODEL)
    _add_suite(p)

    p = verb(
        compare,
        "Measure several models, dense or Q-Sparse, in one table: quality, activated parameters, size, speed.",
        "qsparse compare dense sparse-40 sparse-50 --text README.md --picture compare.png",
    )
    p.add_argument("models", nargs="+", metavar="model", help=_MODEL)
    _add_suite(p)
    p.add_argument("--picture", metavar="FILE", help="draw quality over activated parameters there, as a PNG")
    p.add_argument("--prompts", metavar="FILE", help="show each model's likeliest answer to each of its lines")

    p = verb(
        push,
        "Send a saved model or adapters to the Hub: what belongs to it, in one commit.",
        "qsparse push runs/my-sparse-model my-name/my-sparse-model --private",
    )
    p.add_argument("folder", help="folder of a conversion, a training run or `save_pretrained`")
    p.add_argument("repository", metavar="repo_id", help="id on the Hub; the repository is made if it is missing")
    p.add_argument("--private", action="store_true", help="make the repository private; a public one is refused")
    p.add_argument("--revision", metavar="BRANCH", help="branch to write to, made if it is missing (default: main)")
    p.add_argument("--message", help="of the commit")
    p.add_argument("--base-model", metavar="REPO_ID", help="model that this one was made from; adapters will load it")
    p.add_argument(
        "--results", metavar="FILE", help="JSON of `qsparse eval`, `compare` or lm-evaluation-harness, for the card"
    )
    p.add_argument("--card", metavar="FILE", help="also write the card there, as it is sent")
    p.add_argument("--dry-run", action="store_true", help="list files and sizes, send nothing, and do not ask the Hub")

    p = verb(
        bench,
        "Measure how fast models of random weights decode, dense and sparse, and each of their products.",
        "qsparse bench decode --models llama-2-7b --sparsities 0.5 0.75 --output decode.json\n"
        "  qsparse bench decode --device cpu --models 1b --weights ternary --threads 2",
    )
    p.add_argument("what", choices=["decode"], help="what to measure")
    p.add_argument(
        "--models",
        nargs="+",
        default=["llama-2-7b"],
        metavar="MODEL",
        help="llama-2-7b, llama-3-8b, mistral-7b, 1b, 70b-slice, bitnet-2b, or a config or checkpoint whose config it "
        "takes (default: llama-2-7b)",
    )
    p.add_argument(
        "--sparsities",
        nargs="+",
        type=float,
        metavar="S",
        help="(default: a Q-Sparse model as it is, any other at 0.4, 0.5, 0.6 and 0.75, and with ternary weights at 0, "
        "0.5 and 0.6)",
    )
    p.add_argument(
        "--weights",
        choices=["float", "ternary"],
        default="float",
        help="ternary: the sparse model with packed ternary weights and int8 activations (default: as it is)",
    )
    p.add_argument("--batches", nargs="+", type=int, default=[1], metavar="N", help="sequences at once (default: 1)")
    p.add_argument("--prompts", nargs="+", type=int, default=[32], metavar="N", help="their tokens (default: 32)")
    p.add_argument("--device", choices=["cuda", "cpu"], help="(default: cuda where there is one)")
    p.add_argument("--dtype", default="bfloat16", help="bfloat16, float16 or float32 (default %(default)s)")
    p.add_argument("--new-tokens", type=int, default=64, metavar="N", help="in a measurement (default %(default)s)")
    p.add_argument("--rounds", type=int, default=5, metavar="N", help="measurements of each (default %(default)s)")
    p.add_argument("--threads", type=int, metavar="N", help="of a CPU (default: PyTorch's)")
    p.add_argument("--output", metavar="FILE", help="also write every time there, as JSON")

    p = verb(
        quickstart,
        "The whole path in a few minutes on a CPU: train a small dense model, convert it, continue-train, report.",
        "qsparse quickstart --output quickstart",
    )
    p.add_argument(
        "--output", default="quickstart", help="folder to write, replaced if it exists (default: %(default)s)"
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run one command; a mistake of the user's becomes one line on stderr and exit code 1, a signal 128 plus it."""
    arguments = build_parser().parse_args(argv)
    try:
        arguments.run(arguments)
    except UserError as error:
        print(f"qsparse: error: {shortened(str(error), 2000)}", file=sys.stderr)  # a name may hold line breaks
        return 1
    except Interrupted as error:
        if os.environ.get("RANK", "0") == "0":  # all processes of a run stop together
            print(f"qsparse: {error}", file=sys.stderr)
        return 128 + error.number  # what started the command sees that it is not done
    except KeyboardInterrupt:
        print("qsparse: interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
