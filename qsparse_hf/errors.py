"""Mistakes of the user's and interruptions, in one line each, and whether a place can be written."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from huggingface_hub import constants
from huggingface_hub.errors import HFValidationError, StrictDataclassError
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import validate_repo_id

_LONGEST_MESSAGE = 600  # characters of a library's message; the longest that were met explain themselves within 500
_FILE_SUFFIXES = (".gguf", ".safetensors", ".bin", ".pt", ".json", ".jsonl", ".yaml", ".yml", ".txt")


class UserError(ValueError):
    """Says in one line what was given, what is wrong with it and what is allowed; commands print it and exit with 1."""


class Interrupted(Exception):
    """A signal ended the work; says what was saved and how to go on. Commands print it and exit with 128 + signal."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.number = number


def one_line(error: BaseException) -> str:
    """All that `error` says, in one line, cut where it is very long."""
    said = str(error)
    if isinstance(error, OSError) and error.strerror:
        said = error.strerror + (f": {shortened(str(error.filename), 300)!r}" if error.filename else "")
    return shortened(said, _LONGEST_MESSAGE) or type(error).__name__


def shortened(text: str, most: int = 80) -> str:
    """`text` in one line, or its beginning where it has more than `most` characters."""
    text = " ".join(text.split())
    return text if len(text) <= most else text[: most - 1] + "…"


@contextmanager
def user_errors(source: object) -> Iterator[None]:
    """Around the loading of `source`, which the user named: what a library raises about it becomes a `UserError`."""
    name = shortened(str(source), 200)
    try:
        yield
    except UserError:
        raise
    except StrictDataclassError as error:  # its own message wraps the field's in a second line
        raise UserError(f"{name}: {one_line(error.__cause__ or error)}") from error
    except (OSError, ValueError) as error:
        said = one_line(error)
        if "huggingface.co" in said or "Repo id" in said:
            said = f"is no file or folder here, and the Hub did not give it: {said}"
        raise UserError(f"{name}: {said}") from error
    except Exception as error:  # a field that Transformers looks up or divides by unchecked
        raise UserError(f"{name}: {type(error).__name__}: {one_line(error)}") from error


def may_be_repository(name: str) -> bool:
    """Whether `name` can be the id of a repository of the Hub."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def check_source(source: object, named: str | None = None) -> None:
    """Refuse a name that nothing here has and no repository of the Hub can have, before the Hub is asked for it.

    Args:
        source: a file, a folder or the id of a Hub repository, as the user gave it.
        named: what the message calls it, if not `source`.

    Raises:
        UserError: there is no such file or folder, and the name is not the id of a repository; or it is, but the Hub
            cannot be asked (`HF_HUB_OFFLINE`) and nothing of the repository was downloaded before.
    """
    name = str(source)
    try:
        os.stat(name)
        return
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError) as error:  # too long, a NUL, a loop of links
        raise UserError(f"{shortened(named or name, 200)}: {one_line(error)}") from None
    refused = f"{shortened(named or name, 200)}: is no file or folder here, and "
    if not may_be_repository(name):
        raise UserError(refused + "no repository of the Hub can have that name")
    if Path(name).suffix in _FILE_SUFFIXES:
        raise UserError(refused + f"no repository of the Hub has a name that ends with {Path(name).suffix}")
    cached = Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=name, repo_type="model"))
    if constants.HF_HUB_OFFLINE and not cached.exists():
        raise UserError(refused + "the Hub did not give it: HF_HUB_OFFLINE is set, and nothing of it was downloaded")


def write_whole(file: Path, text: str) -> None:
    """Write a file that holds all of `text` or, where that fails or is killed, what it held before."""
    if file.exists() and not file.is_file():  # a pipe, or /dev/stdout
        file.write_text(text, encoding="utf-8")
        return
    file = file.resolve()  # of a link, what it points to
    unfinished = file.with_name(f".{file.name}.{os.getpid()}")  # no other process writes that one
    try:
        unfinished.write_text(text, encoding="utf-8")
        os.replace(unfinished, file)
    except OSError:
        unfinished.unlink(missing_ok=True)
        raise


def check_writable(file: str | Path) -> None:
    """Make sure that `file` can be written, its missing folders included, and leave everything as it was.

    Raises:
        UserError: it cannot; the message says why.
    """
    file = Path(file)
    made: list[Path] = []
    try:
        made = [folder for folder in file.parents if not folder.exists()]
        file.parent.mkdir(parents=True, exist_ok=True)
        is_new = not file.exists()
        file.open("ab").close()
        if is_new:
            file.unlink()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        why = f"{error.filename} is no folder" if isinstance(error, FileExistsError) else one_line(error)
        raise UserError(f"{shortened(str(file))!r} cannot be written: {why}") from None
    finally:
        for folder in made:
            with suppress(OSError, ValueError):
                folder.rmdir()
