"""An ablation of training a sparse model: what teacher, calibration and learning rate give, and each model's card.

    python benchmarks/winning_back.py smollm2 runs/smollm2 --text english=train.jsonl python=python_train.jsonl \\
        --held-out english=eval.jsonl python=python_eval.jsonl --pairs blimp=blimp.jsonl.gz \\
        --settings max_steps=250 eval_steps=125 warmup_steps=30

Every model is one `qsparse` command, on the recipe `continue_smollm2_135m.yaml` with `--settings`; models and logs
stand in the output folder. What is there is not made again, so an interrupted call goes on when it is repeated with the
same arguments. Where there are several GPUs, each takes a model of its own.

The measure is the dense model trained on the same tokens: `taught` trains it first, as the control of all, and a gap is
a loss minus the control's. Then the best model of sparsity 0.5 learns to chat again, beside the control, from
conversations that the dense model makes up (`self_chats.py`); `qsparse compare` measures all, and `cards/` holds each
model's card.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from qsparse_hf.errors import UserError, check_writable, write_whole
from qsparse_hf.evaluation import Protocol, Suite
from qsparse_hf.loading import load_tokenizer
from qsparse_hf.losses import eval_losses, text_of
from qsparse_hf.measure import print_table, write_json
from qsparse_hf.training.recipe import parse

REPOSITORY = Path(__file__).parent.parent
CONTINUE, SFT = (REPOSITORY / "configs" / "train" / f"{stage}_smollm2_135m.yaml" for stage in ("continue", "sft"))
PROMPTS = REPOSITORY / "configs" / "chat" / "prompts.txt"
QSPARSE = ["-m", "qsparse_hf.cli"]
HIDDEN = [str(Path(__file__).with_name("hidden_states.py")), "3.0"]


@dataclass(frozen=True)
class Variant:
    """A sparse model: its name in the table, where it begins, and what its recipe has otherwise."""

    told: str
    begins: str = "calibrated-0.5"
    settings: tuple[str, ...] = ()
    command: Sequence[str] = (*QSPARSE, "train")


TEACHER = "distill_from={control}"
VARIANTS = {
    "taught": Variant("calibrated, 0.7 from the control", settings=("control=true", "distill_from=control")),
    "untaught-one-ratio": Variant("one ratio, no teacher", "one-ratio-0.5", ("distill_from=null",)),
    "untaught": Variant("calibrated, no teacher", settings=("distill_from=null",)),
    "taught-one-ratio": Variant("one ratio, 0.7 from the control", "one-ratio-0.5", (TEACHER,)),
    "taught-by-parent": Variant("calibrated, 0.7 from the parent", settings=("distill_from={parent}",)),
    "taught-alone": Variant("calibrated, the control alone", settings=(TEACHER, "distill_weight=1")),
    "faster": Variant(
        "calibrated, the control alone, twice the learning rate",
        settings=(TEACHER, "distill_weight=1", "learning_rate=6e-4"),
    ),
    "hidden-states": Variant(
        "calibrated, the control alone and its hidden states", settings=(TEACHER, "distill_weight=1"), command=HIDDEN
    ),
    "taught-0.4": Variant("0.4, calibrated, 0.7 from the control", "calibrated-0.4", (TEACHER,)),
}
CHATTING = ("taught", "taught-alone", "faster")
"""Of which the best learns to chat."""


@dataclass(frozen=True)
class Job:
    """A command of Python's, ready when all of `needs` are there."""

    name: str
    command: Sequence[str]
    needs: Sequence[Path] = ()
    trains: Path | None = None  # into this folder, where an interrupted run leaves a checkpoint


@dataclass
class Study:
    """Where everything is, and what all runs share."""

    parent: str
    folder: Path
    text: list[str]
    held_out: list[str]
    pairs: list[str]
    conversations: int
    tokens: int
    calibration_tokens: int
    settings: list[str]
    chat_settings: list[str]
    failed: list[str] = field(default_factory=list)

    @property
    def control(self) -> Path:
        """The dense model trained beside all."""
        return self.folder / "taught" / "control"

    def mark(self, name: str) -> Path:
        """What says that a job is done: models and results are there before they are whole."""
        return self.folder / f"{name}.done"

    def is_done(self, job: Job) -> bool:
        """Whether its mark is there.

        Raises:
            UserError: it was done with other arguments.
        """
        if not (mark := self.mark(job.name)).exists():
            return False
        if mark.read_text() != json.dumps(job.command):
            raise UserError(f"{job.name} in {self.folder} was made with other arguments; choose another output")
        return True

    def train(self, name: str) -> Job:
        """A variant's training."""
        variant = VARIANTS[name]
        words = {"control": self.control, "parent": self.parent}
        own = [each.format_map(words) for each in variant.settings]
        begins = self.folder / variant.begins
        shared = ["control=false", *self.settings, f"model={begins}", f"output_dir={self.folder / name}"]
        needs = [self.mark(variant.begins), *([self.control / "control.json"] if TEACHER in variant.settings else [])]
        return Job(name, [*variant.command, str(CONTINUE), *shared, *own], needs, self.folder / name)

    def conversion(self, name: str) -> Job:
        """The checkpoint that a variant begins from."""
        kind, _, sparsity = name.rpartition("-")
        verb, options = "convert", ["--sparsity", sparsity]
        if kind == "calibrated":
            verb, options = "calibrate", [*options, "--tokens", str(self.calibration_tokens), "--text", *self.text]
        return Job(name, [*QSPARSE, verb, self.parent, str(self.folder / name), *options])

    def chats(self) -> Job:
        """The parent's conversations."""
        command = [str(Path(__file__).with_name("self_chats.py")), self.parent, str(self.folder / "chats")]
        return Job("chats", [*command, "--conversations", str(self.conversations)])

    def first(self, names: list[str]) -> list[Job]:
        """Conversions, conversations and trainings; what others wait for comes first."""
        begins = dict.fromkeys(VARIANTS[name].begins for name in names)
        taught, *others = map(self.train, names)
        conversions = [*map(self.conversion, begins)]
        return [conversions[0], taught, *conversions[1:], *([self.chats()] if self.conversations else []), *others]

    def second(self, names: list[str]) -> list[Job]:
        """What follows the trainings of these variants."""
        best = min((name for name in CHATTING if name in names), key=lambda name: sum(self.losses(name).values()))
        model, sft = self.folder / best, self.folder / "chatting"
        link = model / "control"
        if not link.is_symlink() and not link.exists():
            link.symlink_to(os.path.relpath(self.control, model))
        data = []
        for part in ("train", "eval"):
            source = {"files": str(self.folder / "chats" / f"{part}.jsonl"), "columns": {"messages": "messages"}}
            data.append(f"{part}_data={json.dumps([source])}")
        words = [f"model={model}", f"output_dir={sft}", "control=true", *data, *self.chat_settings]
        compared = [self.control, *(self.folder / name for name in (best, "taught-0.4") if name in names)]
        ask = ["--text", *self.held_out, "--tokens", str(self.tokens), "--batch-size", "64"]
        pairs = ["--pairs", *self.pairs] if self.pairs else []
        chatting = [
            Job("chatting", [*QSPARSE, "train", str(SFT), *words], [self.mark("chats")], sft),
            self.comparison("answers", [sft / "control", sft], [*ask, "--prompts", str(PROMPTS)], "chatting"),
            self.card(sft, "answers"),
        ]
        measuring = [
            self.comparison("compare", compared, [*ask, *pairs], best),
            *(self.card(each, "compare") for each in compared[1:]),
        ]
        return [*(chatting if self.conversations else []), *measuring]

    def comparison(self, name: str, models: list[Path], options: list[str], needs: str) -> Job:
        """Models beside each other, as JSON of that name."""
        output = ["--output", str(self.folder / f"{name}.json")]
        return Job(name, [*QSPARSE, "compare", *map(str, models), *options, *output], [self.mark(needs)])

    def card(self, model: Path, results: str) -> Job:
        """A model's card as it would be pushed."""
        name, card = f"{Path(self.parent).resolve().name}-{model.name}", self.folder / "cards" / f"{model.name}.md"
        measured = ["--results", str(self.folder / f"{results}.json"), "--card", str(card)]
        command = [*QSPARSE, "push", str(model), name, *measured, "--dry-run"]
        return Job(f"card of {model.name}", command, [self.mark(results)])

    def losses(self, name: str) -> dict[str, float]:
        """A trained model's, by text."""
        return {text_of(key): value for key, value in eval_losses(self.results(name)).items()}

    def results(self, name: str) -> dict[str, Any]:
        """All that a run left."""
        return json.loads((self.folder / name / "all_results.json").read_text())

    def run(self, jobs: list[Job], devices: list[str]) -> None:
        """Run what is not done, one job a device; one that fails takes those with it that need it."""
        waiting = [job for job in jobs if not self.is_done(job)]
        running: dict[str, tuple[Job, subprocess.Popen]] = {}
        with tqdm(total=len(waiting), unit="job") as progress, ExitStack() as stack:
            stack.callback(lambda: [process.wait() for _, process in running.values()])
            stack.callback(lambda: [process.terminate() for _, process in running.values()])
            while running or any(ready(job) for job in waiting):
                for device in devices:
                    chosen = next((job for job in waiting if ready(job)), None)
                    if chosen and device not in running:
                        waiting.remove(chosen)
                        running[device] = chosen, self.start(chosen, device)
                for device, (job, process) in [*running.items()]:
                    if process.poll() is not None:
                        del running[device]
                        progress.update()
                        if process.returncode:
                            self.failed.append(job.name)
                            log = (self.folder / f"{job.name}.log").read_text(errors="replace")
                            progress.write(f"{job.name} failed: {log.strip()[-300:] or process.returncode}")
                        else:
                            write_whole(self.mark(job.name), json.dumps(job.command))
                title = ", ".join(job.name for job, _ in running.values())
                if progress.desc != f"{title}: ":
                    progress.set_description(title)
                time.sleep(0.2)
        self.failed += [f"{job.name} (not begun)" for job in waiting]

    def start(self, job: Job, device: str) -> subprocess.Popen:
        """Begin a job, or go on with it, its output into a log."""
        resume = ["resume_from_checkpoint=last"] if job.trains and [*job.trains.rglob("checkpoint-*")] else []
        environment = os.environ | ({"CUDA_VISIBLE_DEVICES": device} if device else {})
        with (self.folder / f"{job.name}.log").open("w") as log:
            command = [sys.executable, *job.command, *resume]
            return subprocess.Popen(command, stdout=log, stderr=log, env=environment)

    def table(self, done: list[str]) -> None:
        """Print losses and gaps, and write them with what else each run left."""
        dense = {text: self.results("taught")[f"control_eval_{text}_loss"] for text in self.losses("taught")}
        rows = [["dense", *(f"{loss:.3f}" for loss in dense.values())]]
        for name in done:
            cells = (f"{loss:.3f} ({loss - dense[text]:+.3f})" for text, loss in self.losses(name).items())
            rows.append([VARIANTS[name].told, *cells])
        print_table(["model", *dense], rows)
        write_json(self.folder / "winning_back.json", {"dense": dense} | {name: self.results(name) for name in done})


def ready(job: Job) -> bool:
    """Whether all that it needs is there."""
    return all(need.exists() for need in job.needs)


def _data(arguments: argparse.Namespace) -> list[str]:
    """The recipe's data: as many documents of each text."""
    train, held_out = ([each.partition("=")[::2] for each in texts] for texts in (arguments.text, arguments.held_out))
    return [
        "train_data=" + json.dumps([{"files": files, "probability": 1 / len(train)} for _, files in train]),
        "eval_data=" + json.dumps(dict(held_out)),
        "save_strategy=no",
    ]


def _check(arguments: argparse.Namespace, study: Study) -> None:
    """Refuse now what would fail an hour later."""
    check_writable(arguments.output / "winning_back.json")
    for each in (*arguments.text, *arguments.held_out):
        if "=" not in each:
            raise UserError(f"a text is NAME=FILES, got {each!r}")
    if "taught" not in arguments.variants:
        raise UserError("--variants must hold taught, whose control is the measure of the others")
    if arguments.conversations and arguments.conversations < 32:
        raise UserError(f"--conversations must be 0 or at least 32, got {arguments.conversations}")
    Suite.of(arguments.text)
    Suite.of(arguments.held_out, arguments.pairs, protocol=Protocol(tokens=arguments.tokens))
    parse(str(CONTINUE), study.settings)
    if not load_tokenizer(arguments.model).chat_template and arguments.conversations:
        raise UserError(f"{arguments.model} has no chat template; --conversations 0 leaves the chat out")
    if arguments.conversations:
        parse(str(SFT), study.chat_settings)


def _run(study: Study, names: list[str]) -> None:
    given = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    devices = given if any(given) else [str(index) for index in range(torch.cuda.device_count())] or [""]
    conversion, *others = study.first(names)
    study.run([conversion], devices)  # a machine that cannot run it shows here
    if study.failed:
        return
    study.run(others, devices)
    done = [name for name in names if study.mark(name).exists()]
    if "taught" in done:
        study.table(done)
    if {name for name in (*CHATTING, "taught-0.4") if name in names} <= set(done):  # the best of them is known
        study.run(study.second(done), devices)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a dense chat model")
    parser.add_argument("output", type=Path, help="folder for everything")
    parser.add_argument("--settings", nargs="+", default=[], metavar="key=value", help="of all models' recipe")
    parser.add_argument("--text", nargs="+", required=True, metavar="NAME=FILES", help="to calibrate and train on")
    parser.add_argument("--held-out", nargs="+", required=True, metavar="NAME=FILES", help="to measure on")
    parser.add_argument("--pairs", nargs="+", default=[], metavar="NAME=FILE", help="minimal pairs, to measure on")
    parser.add_argument("--variants", nargs="+", default=[*VARIANTS], choices=VARIANTS, help="(default: all)")
    parser.add_argument("--chat-settings", nargs="+", default=[], metavar="key=value", help="of the chat's")
    parser.add_argument("--conversations", type=int, default=3072, help="of the chat; 0: none (default %(default)s)")
    parser.add_argument("--tokens", type=int, default=60000, help="measured of each text (default %(default)s)")
    parser.add_argument("--calibration-tokens", type=int, default=49152, help="(default %(default)s)")
    arguments = parser.parse_args()
    shared = ("text", "held_out", "pairs", "conversations", "tokens", "calibration_tokens")
    study = Study(
        parent=arguments.model,
        folder=arguments.output,
        settings=[*_data(arguments), *arguments.settings],
        chat_settings=["save_strategy=no", *arguments.chat_settings],
        **{name: getattr(arguments, name) for name in shared},
    )
    try:
        _check(arguments, study)
        arguments.output.mkdir(parents=True, exist_ok=True)
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the jobs are stopped on the way out
        _run(study, ["taught", *(name for name in arguments.variants if name != "taught")])
    except UserError as error:
        parser.error(str(error))
    if study.failed:
        raise SystemExit(f"failed: {', '.join(study.failed)}; their logs are in {study.folder}")
    print(f"cards in {study.folder / 'cards'}")


if __name__ == "__main__":
    main()
