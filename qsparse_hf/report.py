"""Measured sparsity, activated parameters and the use of features, per projection group and layer."""

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from .decode.prepare import as_restored
from .errors import UserError, check_writable, user_errors, write_whole
from .loading import load_checkpoint
from .modeling.bitnet import PackedLinear
from .modeling.configuration_qsparse import GROUPS, ProjectionGroup, QSparseConfigMixin
from .modeling.modeling_qsparse import QSparsePreTrainedModel
from .modeling.sparsify import Sparsify
from .registration import FAMILIES, projection_groups_of

_HEADINGS = {"qkv": "QKV", "o": "Out", "gate_up": "Gate/Up", "down": "Down"}
_EXPLAINED = (
    "dropped: of a token's squared magnitude before the selection, what the dropped features held",
    "never, always: features that no token, and that every token kept",
    "half: the fewest features that half of all survivors are of (50% if all survive alike)",
    "peak: a token's largest magnitude before the selection over its root mean square",
)
_ROWS_OF_LOGITS = 1024  # in fp32 at a time


def projections(model: nn.Module) -> Iterator[tuple[int, str, nn.Linear]]:
    """The linear projections of a model, Q-Sparse or dense, as (layer, group, linear), with adapters or without.

    None of a family that is not in `registration.FAMILIES`.
    """
    for number, name, layer, group in _groups(model):
        for path in group.linears:
            yield number, name, layer.get_submodule(path)


def _groups(model: nn.Module) -> Iterator[tuple[int, str, Any, ProjectionGroup]]:
    """The projection groups of a model as (layer's number, name, layer, group)."""
    with_layers = (each for each in model.modules() if isinstance(getattr(each, "layers", None), nn.ModuleList))
    decoder: Any = next(with_layers, None)
    groups = {} if decoder is None else projection_groups_of(decoder.config)
    for number, layer in enumerate(decoder.layers if groups else ()):
        for name, group in groups.items():
            yield number, name, layer, group


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


def count_weights(model: nn.Module) -> int:
    """All parameters of a model; packed weights, which are none of PyTorch's, count one each."""
    packed = [module for module in model.modules() if isinstance(module, PackedLinear)]
    biases = sum(linear.bias.numel() for linear in packed if linear.bias is not None)
    counts = sum(linear.in_features * linear.out_features for linear in packed)
    return sum(parameter.numel() for parameter in model.parameters()) + counts + biases


@dataclass(frozen=True)
class FeatureUse:
    """Which features of a projection group's input survive, and what the others held.

    Attributes:
        dropped: of a token's squared magnitude before the selection, the share that the dropped features held; mean
            over tokens.
        never: fraction of the features that no token kept.
        always: fraction of the features that every token kept.
        half: the smallest fraction of the features that half of all survivors are of; 0.5 where all features survive
            alike, and less the fewer they concentrate on.
        peak: a token's largest magnitude before the selection over its root mean square; mean over tokens.
    """

    dropped: float
    never: float
    always: float
    half: float
    peak: float


@dataclass(frozen=True)
class SparsityReport:
    """What one or more forward passes read.

    Attributes:
        tokens: how many tokens were measured, padding left out.
        sparsity: per layer, the fraction of zeros in the input of each projection group.
        parameters: per layer, the weights of each projection group.
        features: per layer, how each projection group's input features are used; empty where that was not measured.
        loss: mean over the predicted tokens in nats; None where that was not measured, or the model gives no logits.
        quantization: of the projections' `weights` and their inputs, `activations`, as the configuration names it;
            without those that are not quantized.
    """

    tokens: int
    sparsity: list[dict[str, float]]
    parameters: list[dict[str, int]]
    features: list[dict[str, FeatureUse]] = field(default_factory=list)
    loss: float | None = None
    quantization: dict[str, str] = field(default_factory=dict)

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

    def use_of_group(self, group: str) -> FeatureUse:
        """How the features of one projection group are used, mean over all layers."""
        uses = [layer[group] for layer in self.features]
        return FeatureUse(*(sum(getattr(use, each.name) for use in uses) / len(uses) for each in fields(FeatureUse)))

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
            "loss": self.loss,
            "quantization": self.quantization,
            "projection_parameters": self.projection_parameters,
            "activated_parameters": self.activated_parameters,
            "sparsity": {group: self.of_group(group) for group in GROUPS} | {"all": self.overall},
            "features": {group: asdict(self.use_of_group(group)) for group in GROUPS if self.features},
            "layers": [
                {
                    "sparsity": sparsity,
                    "parameters": parameters,
                    "activated_parameters": _activated(parameters, sparsity),
                    "features": {group: asdict(use) for group, use in features.items()},
                }
                for sparsity, parameters, features in zip(
                    self.sparsity, self.parameters, self.features or [{}] * len(self.sparsity), strict=True
                )
            ],
        }

    def __str__(self) -> str:
        """A row per projection group, like the paper's table 2, and a row per layer for what differs between layers."""
        told = f"{self.tokens:,} tokens"
        if self.loss is not None:
            told += f", loss {self.loss:.3f} nats a token (perplexity {math.exp(min(self.loss, 99)):.4g})"
        told += "".join(f", {kind} {what}" for what, kind in self.quantization.items())
        names = ["dropped", "never", "always", "half", "peak"] if self.features else []
        head = f"{'':<7}" + "".join(f"{name:>11}" for name in ("weights", "activated", "zeros", *names))
        rows = []
        for group in GROUPS:
            weights = sum(layer[group] for layer in self.parameters)
            row = _row(_HEADINGS[group], weights, self.activated_of_group(group), self.of_group(group))
            if self.features:
                *shares, peak = asdict(self.use_of_group(group)).values()
                row += "".join(f"{100 * share:>10.1f}%" for share in shares) + f"{peak:>11.1f}"
            rows.append(row)
        every = _row("all", self.projection_parameters, self.activated_parameters, self.overall)
        lines = [told, "", head, *rows, "-" * len(head), every]
        if self.features:
            lines += ["", *_EXPLAINED]
        return "\n".join([*lines, *self._layers()])

    def _layers(self) -> Iterator[str]:
        """The rows of the layers, of as many quantities as `_maps` has."""
        maps = self._maps()
        if maps:
            yield ""
            yield f"{'':<7}" + "".join(f"{name:^32}" for name, _, _ in maps)
            yield f"{'layer':<7}" + "".join(f"{_HEADINGS[group]:>8}" for group in GROUPS) * len(maps)
        for number in range(len(self.sparsity) if maps else 0):
            yield f"{number:<7}" + "".join(f"{value:>8.1f}" for _, _, values in maps for value in values[number])

    def _maps(self) -> list[tuple[str, str, list[list[float]]]]:
        """What differs between layers, each as name, unit and values `[layers, groups]`."""
        maps = []
        if any(layer != self.sparsity[0] for layer in self.sparsity) or not self.features:
            maps.append(("zeros", "%", [[100 * layer[group] for group in GROUPS] for layer in self.sparsity]))
        if self.features:
            dropped = [[100 * layer[group].dropped for group in GROUPS] for layer in self.features]
            maps += [("dropped", "%", dropped)] if any(map(any, dropped)) else []
            maps.append(("peak", "times", [[layer[group].peak for group in GROUPS] for layer in self.features]))
        return maps

    def save_json(self, path: str | os.PathLike) -> None:
        """Write `to_dict()` to `path`."""
        write_whole(Path(path), json.dumps(self.to_dict(), indent=2) + "\n")

    def save_plot(self, path: str | os.PathLike) -> None:
        """Draw a heat map, layers by groups, as a PNG."""
        from matplotlib.figure import Figure

        maps = self._maps()
        figure = Figure(figsize=(1 + 4.5 * len(maps), 1.5 + 0.25 * len(self.sparsity)), layout="constrained")
        figure.suptitle(f"{self.overall:.1%} of the projections' inputs are zeros")
        for axes, (name, unit, values) in zip(figure.subplots(1, len(maps), squeeze=False)[0], maps, strict=True):
            image = axes.imshow(values, cmap="viridis", aspect="auto", vmin=0)
            axes.set_xticks(range(len(GROUPS)), [_HEADINGS[group] for group in GROUPS])
            axes.set_yticks(range(len(values)))
            axes.set_ylabel("layer")
            axes.set_title({"zeros": "zeros", "dropped": "dropped squared magnitude", "peak": "largest over rms"}[name])
            for number, row in enumerate(values):
                for column, value in enumerate(row):
                    dark = value < 0.6 * image.get_clim()[1]
                    axes.text(column, number, f"{value:.1f}", ha="center", va="center", color="w" if dark else "k")
            figure.colorbar(image, label=unit)
        figure.savefig(path, dpi=120)


def totals(report: SparsityReport | None) -> dict[str, Any]:
    """The sparsity of each group and of all, and the activated parameters, as JSON takes them; None of no report."""
    return {
        "sparsity": report and report.to_dict()["sparsity"],
        "activated_parameters": report and report.activated_parameters,
    }


def _activated(parameters: dict[str, int], sparsity: dict[str, float]) -> dict[str, int]:
    return {group: round(weights * (1 - sparsity[group])) for group, weights in parameters.items()}


def _row(name: str, weights: int, activated: int, sparsity: float) -> str:
    return f"{name:<7}{short_count(weights):>11}{short_count(activated):>11}{100 * sparsity:>10.1f}%"


def short_count(count: int) -> str:
    for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if count >= unit:
            return f"{count / unit:.2f}{name}"
    return str(count)


class Counters:
    """What a model's projections read, counted; `counting` makes one.

    Attributes:
        detailed: also measure the use of features, for which every selection is computed a second time without its
            sparsity.
        mask: positions of the next forward passes that are counted, `[B, T]` bool; None for all.
    """

    def __init__(self, detailed: bool = False) -> None:
        self.detailed = detailed
        self.mask: Tensor | None = None
        self._counters: dict[tuple[int, str], _Counter] = {}
        self._parameters: dict[int, dict[str, int]] = {}
        self._quantization: dict[str, str] = {}

    def report(self, loss: float | None = None) -> SparsityReport:
        """What was counted until now, and the loss that was measured beside it.

        Raises:
            ValueError: no tokens were.
        """
        tokens = next(iter(self._counters.values())).tokens
        if tokens == 0:
            raise ValueError("the batch holds no tokens")
        parameters = self._parameters
        layers = [{group: self._counters[layer, group] for group in parameters[layer]} for layer in parameters]
        sparsity = [{group: counter.fraction() for group, counter in layer.items()} for layer in layers]
        features = [{group: counter.use() for group, counter in layer.items()} for layer in layers if self.detailed]
        return SparsityReport(tokens, sparsity, list(parameters.values()), features, loss, self._quantization)


@contextmanager
def counting(model: nn.Module, detailed: bool = False) -> Iterator[Counters]:
    """While this is open, what every forward pass of `model` reads is counted; a prepared model is restored for it.

    Args:
        model: as `sparsity_report` takes it, but for compiled ones, whose code does not run the hooks: `_orig_mod`.
        detailed: as in `Counters`.

    Raises:
        ValueError: the model has no projections of these names.
    """
    counters = Counters(detailed)
    for what, name in (("weights", "weight_quantization"), ("activations", "activation_quantization")):
        kind = getattr(getattr(model, "config", None), name, "none")
        counters._quantization |= {what: kind} if kind != "none" else {}
    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, QSparsePreTrainedModel) and module.is_prepared:
                stack.enter_context(as_restored(module))  # decode products would not run the hooks
        for number, name, layer, group in _groups(model):
            linears: list[nn.Linear] = [layer.get_submodule(path) for path in group.linears]
            weights = counters._parameters.setdefault(number, dict.fromkeys(GROUPS, 0))
            weights[name] = sum(linear.in_features * linear.out_features for linear in linears)
            counters._counters[number, name] = counter = _Counter(counters)
            stack.callback(linears[0].register_forward_pre_hook(counter).remove)  # they read the same input
            selector = dict(layer.named_modules()).get(group.selector)
            if detailed and isinstance(selector, Sparsify):  # a dense model has none
                stack.callback(selector.register_forward_pre_hook(counter.before_selection).remove)
        if not counters._counters:
            known = ", ".join(FAMILIES)
            raise ValueError(f"{type(model).__name__} is of none of the families {known}, whose projections are known")
        yield counters


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


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Negative log-probabilities, `[B, T]` fp32, of `targets` `[B, T]` under `logits` `[B, T, V]`; 0 for -100."""
    rows = zip(logits.flatten(0, 1).split(_ROWS_OF_LOGITS), targets.flatten().split(_ROWS_OF_LOGITS), strict=True)
    losses = [nn.functional.cross_entropy(some.float(), wanted, reduction="none") for some, wanted in rows]
    return torch.cat(losses).view(targets.shape)


def sparsity_report(
    model: nn.Module, batch: Tensor | Mapping | Iterable[Tensor | Mapping], detailed: bool = True
) -> SparsityReport:
    """Run `batch` through `model` and look at what its projections read.

    Args:
        model: a Q-Sparse model or the dense one beside it; adapters and `torch.compile` do not matter.
        batch: token ids `[B, T]`, or the keyword arguments of `model.forward`, or several of either. Positions that an
            `attention_mask` `[B, T]` leaves out are not counted.
        detailed: also measure the use of features, for which every selection is computed a second time without its
            sparsity, and the loss of each token after the first of its row.

    Raises:
        ValueError: the model has no projections of these names, or the batch no tokens.
    """
    model = getattr(model, "_orig_mod", model)  # compiled code would not run the hooks
    losses = predicted = 0.0
    with counting(model, detailed) as counters, evaluating(model):
        for inputs in [batch] if isinstance(batch, Tensor | Mapping) else batch:
            inputs = {"input_ids": inputs} if isinstance(inputs, Tensor) else dict(inputs)
            inputs.pop("labels", None)
            mask = inputs.get("attention_mask")
            counters.mask = mask.bool() if mask is not None else None
            logits: Any = getattr(model(**inputs, use_cache=False), "logits", None)
            if detailed and (targets := _targets(inputs, logits)) is not None:
                losses += token_losses(logits[:, :-1], targets).sum().item()
                predicted += (targets != -100).sum().item()
        return counters.report(losses / predicted if predicted else None)


def _targets(inputs: Mapping, logits: Tensor | None) -> Tensor | None:
    """What each row's tokens are followed by, `[B, T - 1]`, -100 where a mask leaves one out; None without logits."""
    ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
    if logits is None or ids is None or logits.shape[:-1] != ids.shape:  # prompt tuning, for one, adds positions
        return None
    return ids[:, 1:] if mask is None else ids[:, 1:].masked_fill((mask[:, 1:] * mask[:, :-1]) == 0, -100)


def report_checkpoint(
    model: str, text: list[str], output: str | None = None, tokens: int = 4096, row_length: int = 512
) -> SparsityReport:
    """Load a checkpoint and report on text; with `output`, write `sparsity.json` and `sparsity.png` there.

    Args:
        model: as `load_checkpoint` takes it; it runs on a GPU where there is one.
        text: data sources as `sources.Source.parse` reads them.
        tokens: at most this many of the text are run, as many of each source, in rows of `row_length`.

    Raises:
        UserError: the checkpoint or a source cannot be read, or the text is empty.
    """
    from .sources import Source  # it brings `datasets`, which nothing else here needs
    from .texts import first_tokens, good_rows

    if tokens < 1:
        raise UserError(f"tokens must be at least 1, got {tokens}")
    targets = [Path(output) / name for name in ("sparsity.json", "sparsity.png")] if output is not None else []
    for target in targets:
        check_writable(target)
    sources = [Source.parse(str(each)) for each in text]
    for source in sources:
        next(good_rows(source))  # to see that it is there
    loaded, tokenizer = load_checkpoint(model)
    ids = torch.tensor(first_tokens(sources, tokenizer, tokens), device=loaded.device)
    if len(ids) == 0:
        raise UserError(f"{', '.join(map(str, sources))}: no text")
    rows = [row[None] for row in ids.split(row_length)]
    with user_errors(model), tqdm(rows, desc="measuring", unit="row") as progress:
        report = sparsity_report(loaded, progress)
    if output is not None:
        with user_errors(output):
            Path(output).mkdir(parents=True, exist_ok=True)
            for save, target in zip((report.save_json, report.save_plot), targets, strict=True):
                save(target)
    return report


class _Counter:
    """A forward pre-hook of a linear: what survives in its input where the mask of `shared` is true, and how that
    compares with what was there before the selection, if `before_selection` is a forward pre-hook of what selects.
    """

    def __init__(self, shared: Counters) -> None:
        self.shared = shared
        self.kept: Tensor | Any = 0  # [D], how often each feature was; a tensor stays on its device until it is read
        self.dropped: Tensor | Any = 0
        self.peaks: Tensor | Any = 0
        self.tokens = 0
        self._before: Tensor | None = None

    def before_selection(self, module: Sparsify, args: tuple) -> None:
        at_work = module.selection
        module.selection = replace(at_work, sparsity=0.0, rescale="none", quantization="none")
        try:
            self._before = type(module).forward(module, *args)  # type: ignore[assignment]  # no survivors at 0
        finally:
            module.selection = at_work

    def __call__(self, module: nn.Module, args: tuple[Tensor]) -> None:
        kept = self._rows(args[0]) != 0
        self.kept = self.kept + kept.sum(0)
        self.tokens += kept.shape[0]
        if self.shared.detailed:
            squares = self._rows(args[0] if self._before is None else self._before).float().square()
            mass = squares.sum(-1).clamp_min(torch.finfo(torch.float32).tiny)
            self.dropped = self.dropped + (1 - (squares * kept).sum(-1) / mass).sum()
            self.peaks = self.peaks + (squares.amax(-1) / mass * squares.shape[-1]).sqrt().sum()

    def _rows(self, x: Tensor) -> Tensor:
        x = x.detach()
        mask = self.shared.mask
        if mask is not None and mask.shape == x.shape[:-1]:  # prompt tuning, for one, adds positions
            x = x[mask.to(x.device)]
        return x.reshape(-1, x.shape[-1])

    def fraction(self) -> float:
        return 1 - self.kept.sum().item() / (self.tokens * len(self.kept))

    def use(self) -> FeatureUse:
        features = len(self.kept)
        running = self.kept.sort(descending=True).values.cumsum(0)
        return FeatureUse(
            dropped=max(0.0, float(self.dropped) / self.tokens),
            never=(self.kept == 0).sum().item() / features,
            always=(self.kept == self.tokens).sum().item() / features,
            half=((2 * running < running[-1]).sum().item() + 1) / features,
            peak=float(self.peaks) / self.tokens,
        )
