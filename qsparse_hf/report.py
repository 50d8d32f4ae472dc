"""Measured sparsity and activated parameters, per projection group and layer."""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from .configuration import check_config
from .decode.prepare import as_restored
from .errors import UserError, check_writable, user_errors
from .modeling.configuration_qsparse import GROUPS, QSparseConfigMixin
from .modeling.modeling_qsparse import QSparsePreTrainedModel
from .registration import FAMILIES, projection_groups_of

_HEADINGS = {"qkv": "QKV", "o": "Out", "gate_up": "Gate/Up", "down": "Down"}


def projections(model: nn.Module) -> Iterator[tuple[int, str, nn.Linear]]:
    """The linear projections of a model, Q-Sparse or dense, as (layer, group, linear), with adapters or without.

    None of a family that is not in `registration.FAMILIES`.
    """
    with_layers = (each for each in model.modules() if isinstance(getattr(each, "layers", None), nn.ModuleList))
    decoder: Any = next(with_layers, None)
    groups = {} if decoder is None else projection_groups_of(decoder.config)
    for number, layer in enumerate(decoder.layers if groups else ()):
        for name, group in groups.items():
            for path in group.linears:
                yield number, name, layer.get_submodule(path)


def count_parameters(model: PreTrainedModel) -> tuple[int, int]:
    """Weights of the projections, and those that one token reads at the configured sparsity (the paper's N and Na)."""
    total = activated = 0
    config = model.config
    for layer, group, linear in projections(model):
        features = linear.in_features
        kept = features
        if isinstance(config, QSparseConfigMixin) and (selection := config.selection(group, layer)).sparsity > 0:
            kept = selection.kept(features)
        total += linear.out_features * features
        activated += linear.out_features * kept
    return total, activated


@dataclass(frozen=True)
class SparsityReport:
    """What one or more forward passes read.

    Attributes:
        tokens: how many tokens were measured, padding left out.
        sparsity: per layer, the fraction of zeros in the input of each projection group.
        parameters: per layer, the weights of each projection group.
    """

    tokens: int
    sparsity: list[dict[str, float]]
    parameters: list[dict[str, int]]

    @property
    def projection_parameters(self) -> int:
        """Weights of all projections, the paper's `N`."""
        return sum(sum(layer.values()) for layer in self.parameters)

    @property
    def activated_parameters(self) -> int:
        """Weights that a token reads on average, the paper's `Na = N (1 - S)`."""
        return sum(self.activated_of_group(group) for group in GROUPS)

    @property
    def overall(self) -> float:
        """Sparsity of all projections' inputs, weighted by the weights that read them."""
        return self._mean(GROUPS)

    def of_group(self, group: str) -> float:
        """Sparsity of one projection group over all layers."""
        return self._mean([group])

    def activated_of_group(self, group: str) -> int:
        """Weights of one projection group that a token reads on average, over all layers."""
        return sum(_activated(*layer)[group] for layer in zip(self.parameters, self.sparsity, strict=True))

    def _mean(self, groups: Iterable[str]) -> float:
        pairs = [
            (weights[group], sparsity[group])
            for weights, sparsity in zip(self.parameters, self.sparsity, strict=True)
            for group in groups
        ]
        return sum(weights * sparsity for weights, sparsity in pairs) / sum(weights for weights, _ in pairs)

    def metrics(self) -> dict[str, float]:
        """Flat numbers for a training log."""
        groups = {f"sparsity/{group}": self.of_group(group) for group in GROUPS}
        return groups | {"sparsity/all": self.overall, "activated_parameters": self.activated_parameters}

    def to_dict(self) -> dict:
        """Everything, as JSON takes it."""
        return {
            "tokens": self.tokens,
            "projection_parameters": self.projection_parameters,
            "activated_parameters": self.activated_parameters,
            "sparsity": {group: self.of_group(group) for group in GROUPS} | {"all": self.overall},
            "layers": [
                {
                    "sparsity": sparsity,
                    "parameters": parameters,
                    "activated_parameters": _activated(parameters, sparsity),
                }
                for sparsity, parameters in zip(self.sparsity, self.parameters, strict=True)
            ],
        }

    def __str__(self) -> str:
        """A table like the paper's table 2, with a row per layer: percent of zeros in each projection's input."""
        head = f"{'layer':>5}  {'activated':>10}  " + "  ".join(f"{h:>7}" for h in (*_HEADINGS.values(), "All"))
        rows = []
        for index, (sparsity, parameters) in enumerate(zip(self.sparsity, self.parameters, strict=True)):
            layer = SparsityReport(self.tokens, [sparsity], [parameters])
            rows.append(_row(str(index), layer))
        counts = [self.activated_of_group(group) for group in GROUPS] + [self.activated_parameters]
        activated = f"{'activated':<17}  " + "  ".join(f"{_short(count):>7}" for count in counts)
        return "\n".join((head, *rows, "-" * len(head), _row("all", self), activated))

    def save_json(self, path: str | os.PathLike) -> None:
        """Write `to_dict()` to `path`."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n")

    def save_plot(self, path: str | os.PathLike) -> None:
        """Draw a heat map, layers by groups, as a PNG."""
        from matplotlib.figure import Figure

        percent = [[100 * layer[group] for group in GROUPS] for layer in self.sparsity]
        figure = Figure(figsize=(5, 1.5 + 0.25 * len(percent)), layout="constrained")
        axes = figure.subplots()
        image = axes.imshow(percent, vmin=0, vmax=100, cmap="viridis", aspect="auto")
        axes.set_xticks(range(len(GROUPS)), [_HEADINGS[group] for group in GROUPS])
        axes.set_yticks(range(len(percent)))
        axes.set_ylabel("layer")
        axes.set_title(f"Zeros in the input: {self.overall:.1%} over all")
        for row, values in enumerate(percent):
            for column, value in enumerate(values):
                axes.text(column, row, f"{value:.1f}", ha="center", va="center", color="w" if value < 60 else "k")
        figure.colorbar(image, label="percent")
        figure.savefig(path, dpi=120)


def _activated(parameters: dict[str, int], sparsity: dict[str, float]) -> dict[str, int]:
    return {group: round(weights * (1 - sparsity[group])) for group, weights in parameters.items()}


def _row(name: str, report: SparsityReport) -> str:
    percents = [100 * report.of_group(group) for group in GROUPS] + [100 * report.overall]
    return f"{name:>5}  {_short(report.activated_parameters):>10}  " + "  ".join(f"{p:7.1f}" for p in percents)


def _short(count: int) -> str:
    for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if count >= unit:
            return f"{count / unit:.2f}{name}"
    return str(count)


class ZeroCounters:
    """Counts the zeros that a model's projections read; `counting_zeros` makes one.

    Attributes:
        mask: positions of the next forward passes that are counted, `[B, T]` bool; None for all.
    """

    def __init__(self) -> None:
        self.mask: Tensor | None = None
        self._counters: dict[tuple[int, str], _ZeroCounter] = {}
        self._parameters: dict[int, dict[str, int]] = {}

    def report(self) -> SparsityReport:
        """What was counted until now.

        Raises:
            ValueError: no tokens were.
        """
        tokens = next(iter(self._counters.values())).tokens
        if tokens == 0:
            raise ValueError("the batch holds no tokens")
        parameters = self._parameters
        sparsity = [
            {group: self._counters[layer, group].fraction() for group in parameters[layer]} for layer in parameters
        ]
        return SparsityReport(tokens, sparsity, list(parameters.values()))


@contextmanager
def counting_zeros(model: nn.Module) -> Iterator[ZeroCounters]:
    """While this is open, the zeros of every forward pass of `model` are counted; a prepared model is restored for it.

    Args:
        model: as `sparsity_report` takes it, but for compiled ones, whose code does not run the hooks: `_orig_mod`.

    Raises:
        ValueError: the model has no projections of these names.
    """
    counted = ZeroCounters()
    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, QSparsePreTrainedModel) and module.is_prepared:
                stack.enter_context(as_restored(module))  # decode products would not run the hooks
        for layer, group, linear in projections(model):
            weights = counted._parameters.setdefault(layer, dict.fromkeys(GROUPS, 0))
            weights[group] += linear.in_features * linear.out_features
            if (layer, group) not in counted._counters:  # the projections of a group read the same input
                counted._counters[layer, group] = counter = _ZeroCounter(counted)
                stack.callback(linear.register_forward_pre_hook(counter).remove)
        if not counted._counters:
            known = ", ".join(FAMILIES)
            raise ValueError(f"{type(model).__name__} is of none of the families {known}, whose projections are known")
        yield counted


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Without gradients and dropout; afterwards the model trains on if it did before."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def sparsity_report(model: nn.Module, batch: Tensor | Mapping | Iterable[Tensor | Mapping]) -> SparsityReport:
    """Run `batch` through `model` and count the zeros that its projections read.

    Args:
        model: a Q-Sparse model or the dense one beside it; adapters and `torch.compile` do not matter.
        batch: token ids `[B, T]`, or the keyword arguments of `model.forward`, or several of either. Positions that an
            `attention_mask` `[B, T]` leaves out are not counted.

    Raises:
        ValueError: the model has no projections of these names, or the batch no tokens.
    """
    model = getattr(model, "_orig_mod", model)  # compiled code would not run the hooks
    with counting_zeros(model) as counters, evaluating(model):
        for inputs in [batch] if isinstance(batch, Tensor | Mapping) else batch:
            inputs = {"input_ids": inputs} if isinstance(inputs, Tensor) else dict(inputs)
            inputs.pop("labels", None)
            mask = inputs.get("attention_mask")
            counters.mask = mask.bool() if mask is not None else None
            model(**inputs, use_cache=False)
        return counters.report()


def report_checkpoint(
    model: str, text_files: list[str], output: str | None = None, tokens: int = 4096, row_length: int = 512
) -> SparsityReport:
    """Load a checkpoint and report on text files; with `output`, write `sparsity.json` and `sparsity.png` there.

    Args:
        model: folder or Hub id, with its tokenizer.
        tokens: at most this many tokens of the text are run, in rows of `row_length`.

    Raises:
        UserError: the checkpoint or a file cannot be read, or the text is empty.
    """
    if tokens < 1:
        raise UserError(f"tokens must be at least 1, got {tokens}")
    targets = [Path(output) / name for name in ("sparsity.json", "sparsity.png")] if output is not None else []
    for target in targets:
        check_writable(target)
    with user_errors(", ".join(map(str, text_files))):
        text = "\n".join(Path(file).read_text(encoding="utf-8", errors="replace") for file in text_files)
    check_config(model)
    with user_errors(model):
        tokenizer = AutoTokenizer.from_pretrained(model)
        loaded = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"][:tokens])
    if len(ids) == 0:
        raise UserError(f"{', '.join(text_files)}: no text")
    rows = [row[None] for row in ids.split(row_length)]
    with user_errors(model), tqdm(rows, desc="measuring", unit="row") as progress:
        report = sparsity_report(loaded, progress)
    if output is not None:
        with user_errors(output):
            Path(output).mkdir(parents=True, exist_ok=True)
            for save, target in zip((report.save_json, report.save_plot), targets, strict=True):
                save(target)
    return report


class _ZeroCounter:
    """A forward pre-hook that counts zeros where the mask of `shared` is true."""

    def __init__(self, shared: ZeroCounters) -> None:
        self.shared = shared
        self.zeros: Tensor | int = 0  # a tensor stays on its device until `fraction`
        self.entries = self.tokens = 0

    def __call__(self, module: nn.Module, args: tuple[Tensor]) -> None:
        x = args[0].detach()
        mask = self.shared.mask
        if mask is not None and mask.shape == x.shape[:-1]:  # prompt tuning, for one, adds positions
            x = x[mask.to(x.device)]
        x = x.reshape(-1, x.shape[-1])
        self.zeros += (x == 0).sum()
        self.entries += x.numel()
        self.tokens += x.shape[0]

    def fraction(self) -> float:
        return int(self.zeros) / self.entries
