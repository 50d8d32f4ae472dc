"""Where sparsity hurts least: a ratio for every projection group of every layer, found on text and without training.

Dropping features changes a model's predictions. For small changes the Kullback-Leibler divergence is a quadratic form
of what was dropped, with the Fisher information as its matrix: `E[(g . d)^2] / 2`, where `d` is what a token's input
of a projection loses, and `g` the gradient there of the log-probability of tokens drawn from the model itself (Amari,
Natural Gradient Works Efficiently in Learning, 1998). One backward pass gives `g` for all projections. With features
in the order in which the top-K drops them, a running sum of `g x` gives the divergence at every sparsity. The ratios
minimise the sum of these curves at a given mean sparsity: one Lagrange multiplier, found by bisection.

A curve knows its projections alone. How groups act together is measured: the loss of the sparse model decides how much
each group's curves weigh.

Shapes: L layers, S sparsities of the grid, T tokens, D features, M features of a block.
"""

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from .conversion import ConversionPlan, convert_checkpoint
from .errors import UserError, check_writable, user_errors, write_whole
from .evaluation import Protocol, Suite, evaluate_perplexity
from .loading import check_dtype, find_device, load_checkpoint
from .measure import print_table
from .modeling.configuration_qsparse import GROUPS, QSparseConfigMixin
from .modeling.sparsify import magnitude, topk_sparsify
from .modeling.sparsity import kept_features
from .report import evaluating, projections
from .texts import first_tokens

GRID = tuple(step / 100 for step in range(96))
"""Sparsities at which curves are known, and between which ratios lie: at least 5 % of the features survive."""
SHOWN = (0.25, 0.4, 0.5)
FILE = "calibration.json"
_STEPS = (0.4, 0.2)  # of the search over the logarithms of the groups' weights


@dataclass(frozen=True)
class Calibration:
    """What dropping costs each projection group, and the ratios that follow.

    Attributes:
        curves: per group `[L, S]`, the estimated divergence in nats a token if it alone has each sparsity of `GRID`.
        parameters: per group, the weights of one layer.
        tokens: how many the curves were measured on.
        block_size: as in `Selection`.
        importance: per group, the factor by which its curves count; what `refined` finds.
    """

    curves: dict[str, Tensor]
    parameters: dict[str, int]
    tokens: int
    block_size: int | None = None
    importance: dict[str, float] = field(default_factory=lambda: dict.fromkeys(GROUPS, 1.0))

    def ratios(self, sparsity: float) -> dict[str, list[float]]:
        """Per group, the sparsity of each layer; their mean over the weights is `sparsity`.

        Raises:
            ValueError: a sparsity outside `GRID`.
        """
        if not 0 <= sparsity <= GRID[-1]:
            raise ValueError(f"sparsity must be at least 0 and at most {GRID[-1]}, got {sparsity}")
        weights = torch.tensor([self.parameters[group] for group in GROUPS], dtype=torch.float64)
        curves = torch.stack([self.importance[group] * self.curves[group] for group in GROUPS])  # [groups, L, S]
        slopes = _convex(curves).diff() / weights[:, None, None]  # a step's cost for each weight that it saves
        share = (weights / weights.sum() / curves.shape[1])[:, None]

        def taken(price: float) -> Tensor:
            return (slopes <= price).sum(-1) / 100

        low, high = -1.0, slopes.max().item()
        for _ in range(100):
            middle = (low + high) / 2
            low, high = (middle, high) if (taken(middle) * share).sum() < sparsity else (low, middle)
        below, above = taken(low), taken(high)  # they differ where slopes are equal: take as much of the difference
        short, step = sparsity - (below * share).sum(), ((above - below) * share).sum()
        found = below + (above - below) * (short / step).clamp(0, 1) if step > 0 else below
        return {group: [round(ratio, 4) for ratio in found[i].tolist()] for i, group in enumerate(GROUPS)}

    def of_groups(self, sparsity: float) -> dict[str, float]:
        """Per group, the mean over layers of `ratios`."""
        return {group: sum(ratios) / len(ratios) for group, ratios in self.ratios(sparsity).items()}


def _convex(curves: Tensor) -> Tensor:
    """The largest convex function below each curve `[..., S]`."""
    flat = curves.reshape(-1, curves.shape[-1]).tolist()
    for curve in flat:
        corners: list[int] = []
        for here, height in enumerate(curve):
            while len(corners) > 1:
                before, last = corners[-2:]
                if (curve[last] - curve[before]) * (here - last) < (height - curve[last]) * (last - before):
                    break
                corners.pop()
            corners.append(here)
        for left, right in pairwise(corners):
            for between in range(left + 1, right):
                part = (between - left) / (right - left)
                curve[between] = curve[left] + part * (curve[right] - curve[left])
    return torch.tensor(flat, dtype=curves.dtype).view_as(curves)


def calibrate(model: PreTrainedModel, rows: Tensor, block_size: int | None = None, seed: int = 0) -> Calibration:
    """Measure what dropping costs each projection group of a dense model, by one backward pass a row.

    Args:
        model: dense, of a family in `registration.FAMILIES`; left as it was.
        rows: token ids `[N, T]`, int64.
        block_size: as in `Selection`.
        seed: of the tokens that are drawn from the model's predictions.

    Raises:
        ValueError: a Q-Sparse model, or one of another family.
    """
    if isinstance(model.config, QSparseConfigMixin):
        raise ValueError(f"a dense model is calibrated, and {type(model).__name__} is sparse already")
    sums: dict[tuple[str, int], Tensor] = {}
    parameters = dict.fromkeys(GROUPS, 0)
    generator = torch.Generator(model.device).manual_seed(seed)
    with ExitStack() as stack:
        stack.enter_context(_frozen(model))
        for layer, group, linear in projections(model):
            parameters[group] += linear.weight.numel() if layer == 0 else 0
            if (group, layer) not in sums:  # the projections of a group read the same input
                sums[group, layer] = torch.zeros(len(GRID), dtype=torch.float64, device=linear.weight.device)
                hook = _CostOfDropping(sums[group, layer], block_size or linear.in_features)
                stack.callback(linear.register_forward_pre_hook(hook).remove)
        if not sums:
            raise ValueError(f"{type(model).__name__} is of no family whose projections are known")
        with torch.enable_grad():
            for row in tqdm(rows.to(model.device).split(1), desc="calibrating", unit="row"):
                logits = model(row, use_cache=False).logits[0].float()
                drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
                nn.functional.cross_entropy(logits, drawn, reduction="sum").backward()
    layers = range(1 + max(layer for _, layer in sums))
    curves = {group: torch.stack([sums[group, layer].cpu() for layer in layers]) / rows.numel() for group in GROUPS}
    return Calibration(curves, parameters, rows.numel(), block_size)


@contextmanager
def _frozen(model: PreTrainedModel) -> Iterator[None]:
    """The model with gradients for activations and none for weights, and without dropout."""
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with evaluating(model):
        hook = model.get_input_embeddings().register_forward_hook(lambda module, args, output: output.requires_grad_())
        try:
            model.requires_grad_(False)
            yield
        finally:
            hook.remove()
            for parameter in wanted:
                parameter.requires_grad_()


class _CostOfDropping:
    """A forward pre-hook that adds to `total` `[S]`, in the backward pass, what a token's dropped features cost."""

    def __init__(self, total: Tensor, block: int) -> None:
        self.total, self.block = total, block
        dropped = [block - kept_features(block, sparsity) for sparsity in GRID]
        self.dropped = torch.tensor(dropped, device=total.device)  # once: it is read in every backward pass

    def __call__(self, module: nn.Module, args: tuple[Tensor]) -> None:
        x = args[0]
        x.register_hook(lambda gradient: self.add(x.detach(), gradient))

    def add(self, x: Tensor, gradient: Tensor) -> None:
        """Of an input `[..., D]` and the gradient there."""
        x, gradient = (each.reshape(-1, each.shape[-1] // self.block, self.block) for each in (x, gradient))
        order = magnitude(x.contiguous()).argsort(dim=-1)
        lost = (gradient.float() * x.float()).gather(-1, order).sum(1).cumsum(-1)  # [T, M], the smallest first
        at_grid = torch.where(self.dropped > 0, lost[:, (self.dropped - 1).clamp_min(0)], 0)
        self.total += at_grid.double().square().sum(0) / 2


@contextmanager
def sparsified(model: nn.Module, ratios: Mapping[str, list[float]], block_size: int | None = None) -> Iterator[None]:
    """A dense model that computes as its Q-Sparse twin of these ratios, per group one a layer."""
    with ExitStack() as stack:
        for layer, group, linear in projections(model):

            def select(module: nn.Module, args: tuple[Tensor], sparsity: float = ratios[group][layer]) -> Any:
                return topk_sparsify(args[0], sparsity, block_size)

            stack.callback(linear.register_forward_pre_hook(select).remove)
        yield


def loss_at(model: PreTrainedModel, ratios: Mapping[str, list[float]], rows: Tensor, block_size: int | None) -> float:
    """Nats a token of `rows` `[N, T]`, of a dense model made sparse by these ratios."""
    with sparsified(model, ratios, block_size):
        return evaluate_perplexity(model, rows, protocol=Protocol(window=rows.shape[1])).loss


def refined(calibration: Calibration, model: PreTrainedModel, rows: Tensor, sparsity: float) -> Calibration:
    """The calibration whose groups weigh what gives the lowest loss on `rows` at that sparsity; coordinate search."""
    with tqdm(desc="weighing groups", unit="try") as progress:

        def tried(candidate: Calibration) -> float:
            progress.update()
            return loss_at(model, candidate.ratios(sparsity), rows, candidate.block_size)

        best = tried(calibration)
        for step in _STEPS:
            for group in GROUPS[:-1]:  # only their proportions count
                for sign in (1, -1):
                    weight = calibration.importance[group] * math.exp(sign * step)
                    candidate = replace(calibration, importance=calibration.importance | {group: weight})
                    if (loss := tried(candidate)) < best:
                        calibration, best = candidate, loss
                        break
    return calibration


def calibrate_checkpoint(
    source: str,
    output: str | Path,
    text: list[str],
    sparsity: float = 0.5,
    block_size: int | None = None,
    tokens: int = 32768,
    device: str | None = None,
    dtype: str = "auto",
    overwrite: bool = False,
) -> ConversionPlan:
    """Convert a dense checkpoint at the ratios that text gives it, and print their losses beside a single ratio's.

    Of the text's windows every fourth is held back: the losses are measured on those. The output is that of
    `convert_checkpoint` and `calibration.json`, with the ratios and the losses.

    Args:
        source: folder or Hub id of a dense checkpoint.
        output: folder to write.
        text: data sources as `qsparse eval` takes them.
        sparsity: of all projections together, weighted by their weights.
        block_size: as in `Selection`.
        tokens: at most that many of the text, in windows of 1024 or the model's positions.
        device: as `load_checkpoint` takes it.
        dtype: as `load_checkpoint` takes it; of the calibration, not of what is written.
        overwrite: replace the output if it exists.

    Raises:
        UserError: an unsuitable source, value, text or output; before the model is loaded where it can be told then.
    """
    if not 0 < sparsity <= 0.9:
        raise UserError(f"sparsity must be above 0 and at most 0.9 to be calibrated, got {sparsity}")
    find_device(device)
    check_dtype(dtype)
    suite = Suite.of(text)
    fields: dict[str, Any] = {"sparsity": sparsity, "sparsity_block_size": block_size}
    convert_checkpoint(source, output, overwrite=overwrite, dry_run=True, **fields)
    check_writable(Path(output, FILE))
    model, tokenizer = load_checkpoint(source, device, dtype)
    config: Any = model.config
    window = min(1024, config.max_position_embeddings)
    if tokens < 4 * window:
        raise UserError(f"tokens must be at least 4 windows of {window}, got {tokens}")
    ids = first_tokens(suite.texts.values(), tokenizer, tokens)
    if len(ids) < 4 * window:
        raise UserError(f"the text holds {len(ids):,} tokens, and calibration needs at least {4 * window:,}")
    rows = torch.tensor(ids[: min(tokens, len(ids)) // window * window]).view(-1, window)
    held_back = torch.arange(len(rows)) % 4 == 3
    rows, unseen = rows[~held_back], rows[held_back]
    with user_errors(source):
        found = refined(calibrate(model, rows, block_size), model, rows[: max(1, len(rows) // 3)], sparsity)
    print(
        f"on {unseen.numel():,} tokens of the text that the ratios were not chosen on; how much each group counts was "
        f"chosen at {sparsity:g} for all rows"
    )
    losses = _compare(found, model, unseen, sorted({*SHOWN, sparsity}))
    means = found.of_groups(sparsity)
    print("ratios: " + ", ".join(f"{group} {mean:.3f}" for group, mean in means.items()) + " (means over layers)")
    ratios = found.ratios(sparsity)
    calibrated = losses[str(sparsity)] | {"tokens": unseen.numel()}
    plan = convert_checkpoint(
        source, output, overwrite=overwrite, calibrated=calibrated, sparsity_per_projection=ratios, **fields
    )
    facts = {"tokens": found.tokens, "sparsity": sparsity, "sparsity_per_projection": ratios, "losses": losses}
    with user_errors(output):
        write_whole(Path(output, FILE), json.dumps(facts | {"importance": found.importance}, indent=2) + "\n")
    return plan


def _compare(found: Calibration, model: PreTrainedModel, rows: Tensor, sparsities: list[float]) -> dict[str, Any]:
    """Losses of one ratio for all and of the calibrated ones, printed and returned by sparsity."""
    layers = next(iter(found.curves.values())).shape[0]
    losses: dict[str, Any] = {}
    dense = loss_at(model, {group: [0.0] * layers for group in GROUPS}, rows, None)

    def table() -> Iterator[list[str]]:
        yield ["0", f"{dense:.4f}", f"{math.exp(dense):.2f}", "", "", ""]
        for sparsity in sparsities:
            uniform = loss_at(model, {group: [sparsity] * layers for group in GROUPS}, rows, found.block_size)
            calibrated = loss_at(model, found.ratios(sparsity), rows, found.block_size)
            losses[str(sparsity)] = {"dense": dense, "uniform": uniform, "calibrated": calibrated}
            before, after = math.exp(uniform) - math.exp(dense), math.exp(uniform) - math.exp(calibrated)
            removed = f"{100 * after / before:.0f} %" if before > 0 else ""
            figures = [(f"{loss:.4f}", f"{math.exp(loss):.2f}") for loss in (uniform, calibrated)]
            yield [f"{sparsity:g}", *figures[0], *figures[1], removed]

    print_table(["sparsity", "loss", "perplexity", "calibrated", "perplexity", "of the gap removed"], table())
    return losses
