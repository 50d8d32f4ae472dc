"""A model's folder to the Hub: what belongs to the model, and in one commit."""

import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants
from huggingface_hub.errors import (  # HTTPError is httpx's or httpx2's, by version
    HfHubHTTPError,
    HTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
)
from transformers.utils import ADAPTER_CONFIG_NAME, ADAPTER_SAFE_WEIGHTS_NAME

from .checkpoint import (
    COMPANIONS,
    CONFIG,
    INDEX,
    TOKENIZER_CONFIG,
    WEIGHTS,
    code_files,
    locate_tensors,
    read_json,
)
from .errors import UserError, check_writable, may_be_repository, one_line, user_errors, write_whole
from .model_card import Origin, find_origin, for_repository, is_ours, is_repository_id
from .results import read_results

logger = logging.getLogger(__name__)

_CARD = constants.REPOCARD_NAME
# Of an earlier push, what `from_pretrained` might read in place of what is sent now, or beside it.
_REPLACED = ("model*.safetensors", INDEX, "pytorch_model*.bin", "pytorch_model.bin.index.json", "adapter_*")


@dataclass(frozen=True)
class Push:
    """What goes to the Hub.

    Attributes:
        files: sizes in bytes, by name, in the order that they are listed in.
        notes: what else a person should know, a sentence each.
        url: of the commit; None where nothing was sent.
    """

    files: dict[str, int]
    notes: tuple[str, ...] = ()
    url: str | None = None

    def __str__(self) -> str:
        rows = [f"{size:>16,}  {name}" for name, size in self.files.items()]
        total = f"{sum(self.files.values()):>16,}  bytes in {len(self.files)} files"
        return "\n".join((*rows, total, *self.notes, *([self.url] if self.url else [])))


def push_folder(
    folder: str | os.PathLike,
    repository: str,
    *,
    private: bool = False,
    revision: str | None = None,
    message: str | None = None,
    base_model: str | None = None,
    results: str | None = None,
    card: str | None = None,
    dry_run: bool = False,
) -> Push:
    """Send a saved model to the Hub: weights, configuration, code, tokenizer, card and licence, or adapters.

    All of it is one commit, which appears when everything has arrived. In the same commit, weights and adapters of an
    earlier push that are no longer there are deleted. A card that somebody wrote or changed on the Hub stays, unless
    the folder holds one that a person wrote too.

    Args:
        folder: of `save_pretrained`, of a training run, or one of its checkpoints.
        repository: its id on the Hub; it is made where there is none.
        private: a new repository is private; a public one is refused.
        revision: the branch, made where there is none; None: the main one.
        message: the commit's.
        base_model: the Hub id of the model that this one was made from, for the card; adapters are told to load it.
        results: a JSON file of `qsparse eval`, `qsparse compare` or lm-evaluation-harness, which the card is to show.
        card: a file to write the card to as well, as it is sent.
        dry_run: look, and send nothing; the Hub is not asked.

    Raises:
        UserError: a folder that holds no model, an id that cannot be one, a token that is missing or may not write, or
            a connection that fails. Then the repository holds what it held before.
    """
    folder = Path(folder)
    for name, given in (("the repository", repository), ("base_model", base_model)):
        if given is not None and not may_be_repository(given):
            raise UserError(f"{name} must be an id such as your-name/your-model, got {given!r}")
    if card is not None:
        check_writable(card)
    base = Origin(base_model, base_model, True) if base_model else None  # its card is asked for when something is sent
    contents = _contents(folder, repository, find_origin(base_model) if base_model and not dry_run else base, results)
    files = {name: len(data) if isinstance(data, bytes) else data.stat().st_size for name, data in contents.items()}
    if card is not None:
        if _CARD not in contents:
            raise UserError(f"{folder} holds no {_CARD} to write to {card}")
        read = [folder / name for name in contents if name != _CARD] + ([Path(results)] if results else [])
        if Path(card).resolve() in [file.resolve() for file in read]:
            raise UserError(f"the card cannot be written to {card}, which is read")
        _write_card(contents[_CARD], Path(card))
    if dry_run:
        return Push(files, (f"would go to {repository}; nothing was sent",))
    with _hub_errors(repository):
        api = HfApi()
        repository = api.create_repo(repository, private=private or None, exist_ok=True).repo_id
        if private and not api.model_info(repository).private:
            raise UserError(f"{repository} is public already; make it private in its settings, or leave --private out")
        if revision is not None and not revision.startswith("refs/"):
            api.create_branch(repository, branch=revision, exist_ok=True)
        held = set(api.list_repo_files(repository, revision=revision))
        notes = []
        if _CARD in held and _CARD in contents and (note := _keeps_card(api, repository, revision, contents[_CARD])):
            notes.append(note)
            if note.startswith("kept"):
                del contents[_CARD], files[_CARD]
        stale = sorted(name for name in held - files.keys() if any(fnmatch(name, each) for each in _REPLACED))
        notes += [f"deleted {name}, of an earlier push" for name in stale]
        operations: list[Any] = [
            *(
                CommitOperationAdd(name, data if isinstance(data, bytes) else str(data))
                for name, data in contents.items()
            ),
            *map(CommitOperationDelete, stale),
        ]
        message = message or f"Upload {folder.resolve().name} with qsparse_hf"
        commit = api.create_commit(repository, operations, commit_message=message, revision=revision)
    return Push(files, tuple(notes), str(commit.commit_url))


def _write_card(card: Path | bytes, file: Path) -> None:
    """Write to `file` what is sent."""
    with user_errors(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, card.decode() if isinstance(card, bytes) else card.read_text(encoding="utf-8"))


def _contents(folder: Path, repository: str, base_model: Origin | None, results: str | None) -> dict[str, Path | bytes]:
    """What is sent, by its name there: files as they are, or what is written in their place."""
    if not folder.is_dir():
        raise UserError(f"{str(folder)!r} is no folder")
    adapters = (folder / ADAPTER_CONFIG_NAME).exists()
    contents: dict[str, Path | bytes] = {}
    if adapters:
        contents[ADAPTER_CONFIG_NAME] = _adapter_config(
            folder / ADAPTER_CONFIG_NAME, base_model.name if base_model else None
        )
        if not (folder / ADAPTER_SAFE_WEIGHTS_NAME).is_file():
            raise UserError(f"{folder} lacks {ADAPTER_SAFE_WEIGHTS_NAME}; adapters in other formats are not sent")
        contents[ADAPTER_SAFE_WEIGHTS_NAME] = folder / ADAPTER_SAFE_WEIGHTS_NAME
    else:
        if not (folder / CONFIG).is_file():
            raise UserError(
                f"{folder} holds neither {CONFIG} nor {ADAPTER_CONFIG_NAME}; name a folder that a model is saved in"
            )
        code = [
            reference
            for file in (CONFIG, TOKENIZER_CONFIG)
            if (folder / file).exists()
            for references in _references(read_json(folder / file).get("auto_map"))
            for reference in ([references] if isinstance(references, str) else references or [])
        ]
        weights = {tensor.path.name for tensor in locate_tensors(folder).values()}
        index = [] if WEIGHTS in weights else [INDEX]
        with user_errors(folder):
            names = [CONFIG, *sorted(weights), *index, *(file.name for file in sorted(code_files(folder, code)))]
        contents |= {name: folder / name for name in names}
    companions = (file for pattern in (*COMPANIONS, _CARD) for file in sorted(folder.glob(pattern)) if file.is_file())
    contents |= {file.relative_to(folder).as_posix(): file for file in companions}
    card = folder / _CARD
    if card.is_file():
        text = card.read_text(encoding="utf-8")
        if is_ours(text):
            measured = read_results(results, folder) if results else None
            contents[_CARD] = for_repository(text, repository, base_model, measured).encode()
        elif results or (base_model and not adapters):
            raise UserError(f"{card} was written or changed by a person; name the base model and results in it there")
    elif results or (base_model and not adapters):
        raise UserError(f"{folder} holds no {_CARD} that could name a base model or results")
    return contents


def _references(auto_map: Any) -> list[Any]:
    """What an `auto_map` names; old tokenizers have a list in its place."""
    return [*auto_map.values()] if isinstance(auto_map, dict) else [auto_map]


def _adapter_config(file: Path, base_model: str | None) -> Path | bytes:
    """The adapters' configuration, which must name a base model that others can load."""
    described = read_json(file)
    base = str(described.get("base_model_name_or_path") or "")
    if base_model is not None:
        return (json.dumps(described | {"base_model_name_or_path": base_model}, indent=2) + "\n").encode()
    if not is_repository_id(base):
        raise UserError(
            f"{file}: the adapters' base model is {base!r}, which nobody else has; push it first and give its id with "
            "--base-model"
        )
    return file


def _keeps_card(api: HfApi, repository: str, revision: str | None, card: Path | bytes) -> str | None:
    """What happens to a card on the Hub that differs from `card` and was not written here."""
    there = Path(api.hf_hub_download(repository, _CARD, revision=revision)).read_text(encoding="utf-8")
    if is_ours(there):
        return None
    if isinstance(card, bytes):  # ours: what a person wrote goes before it
        return f"kept {_CARD} on the Hub, which somebody wrote or changed there"
    if there == card.read_text(encoding="utf-8"):
        return None
    return f"replaced {_CARD} on the Hub by the one in the folder; the old one is in the history"


@contextmanager
def _hub_errors(repository: str) -> Iterator[None]:
    """What the Hub, or the way to it, says no with becomes one line."""
    try:
        yield
    except UserError:
        raise
    except LocalTokenNotFoundError:
        raise UserError(f"{repository}: the Hub wants a token; log in with `hf auth login`, or set HF_TOKEN") from None
    except HfHubHTTPError as error:
        code = error.response.status_code if error.response is not None else None
        said = {
            401: "the Hub does not accept the token, or there is none; log in with `hf auth login`, or set HF_TOKEN",
            403: f"the token has no right to write there: {one_line(error)}",
            404: "there is no such repository or revision, or the token may not see it",
        }.get(code or 0, f"the Hub refused it: {one_line(error)}")
        raise UserError(f"{repository}: {said}; nothing was changed") from error
    except OfflineModeIsEnabled:
        raise UserError(f"{repository}: HF_HUB_OFFLINE is set, so nothing can be sent") from None
    except ValueError as error:  # the card's metadata, which the Hub checks before anything is sent
        raise UserError(f"{repository}: {one_line(error)}") from error
    except (OSError, HTTPError, RuntimeError) as error:
        cause = error.__cause__ or error
        raise UserError(
            f"{repository}: the connection to {constants.ENDPOINT} failed ({type(cause).__name__}: {one_line(cause)}); "
            "nothing of it is visible there, push again"
        ) from error
