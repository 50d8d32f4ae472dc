"""Mistakes of the user's and interruptions, in one line each, and checks of what the user names before work begins."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from huggingface_hub.errors import StrictDataclassError

_LONGEST_MESSAGE = 600  # characters of a library's message; the longest that were met explain themselves within 500
_MOST_LAYERS = 10_000  # no model has a tenth of them
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")


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


def check_config(source: str | Path, fields: Mapping[str, object] | None = None, named: str | None = None) -> None:
    """Look at the configuration of a model before anything is built from it.

    Args:
        source: a checkpoint's folder or Hub id, or a configuration's file.
        fields: what is set in it.
        named: what messages call it, if not `source`.

    Raises:
        UserError: it cannot be read, or has a number of layers that no model has.
    """
    from transformers import PreTrainedConfig  # its import is not for every command

    with user_errors(named or source):
        if Path(source).is_dir() and not Path(source, "config.json").exists():
            is_a_run = any(Path(source).glob("checkpoint-*"))
            hint = "; it is an unfinished run's, name one of the checkpoints in it" if is_a_run else ""
            raise UserError(f"{source} holds no config.json{hint}")
        check_depth(source, PreTrainedConfig.get_config_dict(source)[0] | dict(fields or {}))


def check_depth(source: object, config: Mapping[str, object]) -> None:
    """Refuse a number of layers that no model has, before anything is built for each of them.

    Args:
        source: where the configuration was found.
        config: its fields as they are written.

    Raises:
        UserError: fewer than one layer, or more than 10,000.
    """
    for name in _LAYERS:
        layers = config.get(name, 1)
        if not isinstance(layers, int) or not 1 <= layers <= _MOST_LAYERS:
            said = shortened(repr(layers))
            raise UserError(f"{source}: {name} must be an integer from 1 to {_MOST_LAYERS:,}, got {said}")
