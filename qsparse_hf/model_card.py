"""A model's card: made from the model and from the run itself, rendered by huggingface_hub from `model_card.md`.

It ends in a line with a checksum. A card whose checksum holds is ours and is written anew; one that a person wrote or
changed stays as it is.
"""

import dataclasses
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from enum import Enum
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.constants import REPOCARD_NAME
from torch import nn

from .checkpoint import LICENCES
from .errors import may_be_repository
from .losses import eval_losses, text_of
from .modeling.configuration_qsparse import GROUPS, QSparseConfigMixin
from .report import count_weights, projections
from .results import Results, result

logger = logging.getLogger(__name__)

_TEMPLATE = Path(__file__).with_suffix(".md")
_SIGNATURE = re.compile(r"\n<!-- Written by qsparse_hf, which renews it until you change it \(([0-9a-f]{16})\) -->\n\Z")
_HERE = re.compile(r'^(here = )".*"(  # this repository)', re.MULTILINE)
_RESULTS = re.compile(r"^<!-- results -->\n(?:(?!## ).*\n)*", re.MULTILINE)  # to the next heading
_LOCAL = re.compile(r"a local model, `[^`\n]*`")
_UNKNOWN_LICENCE = " The licence is that of the model it was made from, which is not known here."
_GROUPS = {"qkv": "q, k, v", "o": "attention's output", "gate_up": "gate, up", "down": "down"}
# The licences that a file's first lines tell without doubt; any other is `other`, with a link to the file.
_LICENCE_TEXTS = {
    "apache-2.0": re.compile(r"\s*Apache License\s+Version 2\.0,"),
    "mit": re.compile(r"\s*(The )?MIT License\b", re.IGNORECASE),
}
_NO_LICENCE = " No licence has been chosen for these weights."
_NOT_MEASURED = "–"  # noqa: RUF001
_SECRETS = ("hub_token", "push_to_hub_token")


@dataclass(frozen=True)
class Origin:
    """What a model was made from, as that model's own card or folder tells.

    Attributes:
        name: a Hub id, or a folder's name.
        repository: the Hub id of it, or of the one that its card names as its base; None where none is known.
        is_repository: whether it is itself one of the Hub.
        licence: the `license`, `license_name` and `license_link` of a card; empty where nothing is known.
        files: the texts of its licence, and notices.
    """

    name: str
    repository: str | None = None
    is_repository: bool = False
    licence: Mapping[str, str] = field(default_factory=dict)
    files: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Run:
    """What a training run tells its model's card.

    Attributes:
        settings: the fields of its recipe that are no defaults.
        history: what was logged, in order.
        facts: other things worth a line each: hardware, data and so on.
        datasets: Hub ids of the datasets that were trained on.
    """

    settings: Mapping[str, Any]
    history: Iterable[Mapping[str, float]] = ()
    facts: Mapping[str, str] = field(default_factory=dict)
    datasets: Iterable[str] = ()

    @property
    def recipe(self) -> str:
        """The settings as YAML."""
        plain = json.loads(json.dumps(dict(self.settings), default=str))
        return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=120).strip()


def non_defaults(settings: Any, without: Collection[str] = ()) -> dict[str, Any]:
    """The fields of a dataclass that differ from their defaults and that YAML can hold, but for secrets."""
    found = {}
    for each in dataclasses.fields(settings):
        value = getattr(settings, each.name, None)
        value = value.value if isinstance(value, Enum) else value
        default = each.default if each.default_factory is dataclasses.MISSING else each.default_factory()
        same = value in (default, [default]) or (not value and not default)
        plain = isinstance(value, str | int | float | list | dict)
        if each.init and plain and not same and each.name not in (*_SECRETS, *without):
            found[each.name] = value
    return found


def is_repository_id(name: str) -> bool:
    """Whether `name` may be the id of a Hub repository; a folder of that name goes before."""
    return may_be_repository(name) and not os.path.exists(name)


def find_origin(source: str, folder: Path | None = None) -> Origin:
    """What is known of a model that another one is made from; what cannot be read is left out.

    Args:
        source: its folder or Hub id.
        folder: of a Hub repository, where its files are; None fetches its card.
    """
    is_repository = is_repository_id(source)
    place = Path(source) if not is_repository else folder
    metadata = _fetched_metadata(source) if place is None else _metadata(place / REPOCARD_NAME)
    if is_repository and folder is None and "/" not in source:  # a folder that has gone meanwhile looks alike
        is_repository = bool(metadata)
    files = tuple(sorted(file for pattern in LICENCES for file in place.glob(pattern)) if place is not None else ())
    keys = ("license", "license_name", "license_link")
    licence = {key: metadata[key] for key in keys if isinstance(metadata.get(key), str)}
    if "license" not in licence:
        licence = _read_licence(files)
    if is_repository and not files and "://" not in (link := licence.get("license_link", "://")):
        licence["license_link"] = f"https://huggingface.co/{source}/blob/main/{link}"
    base = metadata.get("base_model")
    repository = source if is_repository else base if isinstance(base, str) and is_repository_id(base) else None
    return Origin(source if is_repository else Path(source).resolve().name, repository, is_repository, licence, files)


def _metadata(card: str | Path) -> dict[str, Any]:
    """Of a card, by its file or its Hub id; empty where there is none."""
    try:
        if isinstance(card, str) or card.is_file():
            return ModelCard.load(card, ignore_metadata_errors=True).data.to_dict()
    except Exception as error:  # no connection, or broken YAML: it says nothing then
        logger.info("the card %s cannot be read: %s", card, error)
    return {}


_fetched_metadata = cache(_metadata)


def _read_licence(files: Iterable[Path]) -> dict[str, str]:
    for file in files:
        if file.name.startswith("LICENSE"):
            text = file.read_text(encoding="utf-8", errors="replace")
            for name, beginning in _LICENCE_TEXTS.items():
                if beginning.match(text):
                    return {"license": name}
            return {"license": "other", "license_name": "see-file", "license_link": file.name}
    return {}


def is_ours(card: str) -> bool:
    """Whether `card` was written here and nobody has changed it since."""
    found = _SIGNATURE.search(card)
    return found is not None and found[1] == _checksum(card[: found.start()])


def keeps_card(folder: Path) -> bool:
    """Whether `folder` holds a card that somebody else wrote or changed."""
    file = folder / REPOCARD_NAME
    return file.exists() and not is_ours(file.read_text(encoding="utf-8", errors="replace"))


def write_card(
    folder: Path,
    model: nn.Module,
    origin: Origin | None,
    run: Run | None = None,
    name: str | None = None,
    calibrated: Mapping[str, float] | None = None,
    **metadata: Any,
) -> None:
    """Write the card of `model` into `folder`, with the licence of what it was made from.

    Args:
        folder: where the model is saved, or will be. A card there that somebody else wrote stays.
        model: Q-Sparse or dense, on any device, with PEFT's adapters or without.
        origin: what it was made from; None: trained from scratch.
        run: the training; None: converted and not trained.
        name: the model's; None: the folder's.
        calibrated: of a conversion at calibrated ratios, losses in nats a token, `dense`, `uniform` (one ratio for all)
            and `calibrated`, and the number of `tokens` that they are of.
        **metadata: fields of huggingface_hub's `ModelCardData` that win over what is found.
    """
    for file in origin.files if origin else ():
        if not (folder / file.name).exists():
            shutil.copy(file, folder / file.name)
    if not keeps_card(folder):
        (folder / REPOCARD_NAME).write_text(
            render_card(name or folder.resolve().name, model, origin, run, calibrated, **metadata), encoding="utf-8"
        )


def render_card(
    name: str,
    model: Any,
    origin: Origin | None,
    run: Run | None = None,
    calibrated: Mapping[str, float] | None = None,
    **metadata: Any,
) -> str:
    """The text of the card that `write_card` writes; `name` is the model's."""
    config = model.config
    adapters = hasattr(model, "peft_config")
    seen = {key: value for entry in run.history for key, value in entry.items()} if run else {}
    losses = _losses(seen)
    rows = _sparsity_rows(model, seen)
    total, activated = (sum(row[key] for row in rows) for key in ("weights", "activated"))
    sparse = isinstance(config, QSparseConfigMixin)
    dense = activated == total
    metadata = {key: value for key, value in metadata.items() if value is not None}
    tags = metadata.pop("tags", None) or []
    tags = [tags] if isinstance(tags, str) else [*tags]
    if sparse and not dense:
        tags = ["q-sparse", "activation-sparsity", *tags]
    ternary = _ternary(config) if sparse else None
    if ternary:
        tags = ["bitnet", "1.58-bit", *tags]
    base = None
    if origin is not None:  # adapters fit that very model alone, not the one that it was made from
        base = origin.repository if origin.is_repository or not adapters else None
    title = metadata.pop("model_name", name)
    measured = [row for row in losses if row["after"] != _NOT_MEASURED]
    results = [
        result(row["data"], "loss", "held-out loss, nats a token", float(row["after"])) for row in measured
    ] or None
    described: dict[str, Any] = {
        "model_name": title if results else None,
        "library_name": "peft" if adapters else "transformers",
        "pipeline_tag": "text-generation",
        "base_model": base,
        "datasets": sorted(set(run.datasets)) or None if run else None,
        "tags": tags or None,
        "eval_results": results,
        **(origin.licence if origin else {}),
    } | metadata
    card = ModelCard.from_template(
        ModelCardData(**described),
        template_path=str(_TEMPLATE),
        name=title,
        model_id=name,
        dense=dense,
        sparsity=[_shown(row) for row in rows] if sparse else None,
        ternary=ternary,
        int8=getattr(config, "activation_quantization", "none") == "int8",
        measured=any(row["measured"] is not None for row in rows),
        block=getattr(config, "sparsity_block_size", None),
        activated=f"{activated:,}",
        weights=f"{total:,}",
        share=f"{activated / total:.1%}" if total else "all",
        parameters=f"{count_weights(model):,}",
        adapters=adapters,
        fields="".join(f", {key}={value!r}" for key, value in (run.settings.get("model_fields") or {}).items())
        if run
        else "",
        origin=origin,
        made=_made(origin, run, adapters, calibrated is not None),
        licence="" if "license" in described else _UNKNOWN_LICENCE if origin else _NO_LICENCE,
        losses=losses,
        calibrated=calibrated,
        control=any(row["control_after"] != _NOT_MEASURED for row in losses),
        run=run,
        versions=_versions(adapters, run),
    )
    return _signed(str(card))


def _ternary(config: QSparseConfigMixin) -> str | None:
    """How ternary weights are stored; None where they are none, or cannot be told from others."""
    if config.weight_quantization == "none":
        return None
    return "stored in full precision" if config.packed_as is None else "stored in two bits each"


def _signed(card: str) -> str:
    card = re.sub(r"\n{3,}", "\n\n", card.rstrip()) + "\n"  # the template leaves more where a part is left out
    return f"{card}\n<!-- Written by qsparse_hf, which renews it until you change it ({_checksum(card)}) -->\n"


def _checksum(text: str) -> str:
    return hashlib.sha256(text.strip().encode()).hexdigest()[:16]


def for_repository(card: str, repository: str, base: Origin | None = None, results: Results | None = None) -> str:
    """Our card as it goes to the Hub: it loads `repository`, names `base` and its licence, and shows `results`."""
    loaded: Any = ModelCard(card[: _SIGNATURE.search(card).start()])  # type: ignore[union-attr]  # it is ours
    if base is not None:
        loaded.data.base_model = base.name
        link = f"[{base.name}](https://huggingface.co/{base.name})"
        loaded.text = _LOCAL.sub(lambda _: link, loaded.text, count=1)
        if loaded.data.license is None and base.licence:
            loaded.data.__dict__.update(base.licence)
            loaded.text = loaded.text.replace(_UNKNOWN_LICENCE, "")
    if results:
        loaded.data.model_name = loaded.data.model_name or repository.rpartition("/")[2]
        earlier = loaded.data.eval_results or []
        others = [old for old in earlier if not any(old.is_equal_except_value(new) for new in results.figures)]
        loaded.data.eval_results = [*others, *results.figures] or None
        shown = [results.table()] if results.figures else []
        if results.answers:
            shown.append(f"### Answers\n\n{results.conversation()}")
        loaded.text = _RESULTS.sub(lambda _: "\n".join(("<!-- results -->\n", *shown, "")), loaded.text)
    loaded.text = _HERE.sub(rf'\g<1>"{repository}"\g<2>', loaded.text)
    return _signed(str(loaded))


def _sparsity_rows(model: nn.Module, seen: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Of each projection group: its ratios in percent, what was measured, its weights, and those that a token reads."""
    config: Any = model.config
    rows = {group: {"group": group, "ratios": [], "weights": 0, "activated": 0} for group in GROUPS}
    for layer, group, linear in projections(model):
        row: Any = rows[group]
        kept = features = linear.in_features
        if isinstance(config, QSparseConfigMixin) and (selection := config.selection(group, layer)).sparsity > 0:
            kept = selection.kept(features)
        row["ratios"].append(1 - kept / features)
        row["weights"] += linear.out_features * features
        row["activated"] += linear.out_features * kept
    for group, row in rows.items():
        row["measured"] = seen.get(f"sparsity/{group}")
    return [row for row in rows.values() if row["weights"]]


def _shown(row: Mapping[str, Any]) -> dict[str, str]:
    low, high = (f"{100 * bound(row['ratios']):.1f}" for bound in (min, max))
    return {
        "group": _GROUPS[row["group"]],
        "zeros": low if low == high else f"{low} to {high}, by layer",
        "measured": "" if row["measured"] is None else f"{100 * row['measured']:.1f}",
        "weights": f"{row['weights']:,}",
        "activated": f"{row['activated']:,}",
    }


def _losses(seen: Mapping[str, Any]) -> list[dict[str, str]]:
    """A row for each evaluation text, with what came before training, and the control."""

    def shown(name: str) -> str:
        value = seen.get(name)
        return f"{value:.4f}" if isinstance(value, int | float) else _NOT_MEASURED

    columns = {"before": "initial_", "after": "", "control_before": "control_initial_", "control_after": "control_"}
    return [
        {"data": text_of(name) or "evaluation data"}
        | {column: shown(f"{prefix}{name}") for column, prefix in columns.items()}
        for name in eval_losses(seen)
    ]


def _made(origin: Origin | None, run: Run | None, adapters: bool, calibrated: bool) -> str:
    if origin is None:
        return "Trained from scratch"
    if run is None:
        return f"Converted{' at calibrated ratios' if calibrated else ''}, without training, from"
    if adapters:
        return "Adapters for"
    return "Fine-tuned from" if run.settings.get("stage") == "sft" else "Trained further from"


def _versions(adapters: bool, run: Run | None) -> str:
    from . import __version__

    packages = ["torch", "transformers", *(["peft"] if adapters else [])]
    if run and run.settings.get("stage") == "sft":
        packages.append("trl")
    return ", ".join([f"qsparse_hf {__version__}", *(f"{package} {version(package)}" for package in packages)])


def hardware(device: torch.device, processes: int) -> str:
    """The machine that a run is on, in words."""
    if device.type == "cuda":
        return f"{processes} x {torch.cuda.get_device_name(device)}"
    capability, threads = torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()
    return f"CPU ({capability}); processes: {processes}, threads of each: {threads}"


def duration(seconds: float) -> str:
    """`1:02:03`, hours, minutes and seconds."""
    return str(timedelta(seconds=round(seconds)))
