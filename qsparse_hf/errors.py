"""Mistakes of the user's and interruptions, in one line each."""

from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub.errors import StrictDataclassError


class UserError(ValueError):
    """Says in one line what was given, what is wrong with it and what is allowed; commands print it and exit with 1."""


class Interrupted(Exception):
    """A signal ended the work; says what was saved and how to go on. Commands print it and exit with 128 + signal."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.number = number


def first_line(error: BaseException) -> str:
    """What `error` says, in one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextmanager
def user_errors(source: object) -> Iterator[None]:
    """Around the loading of `source`, which the user named: what a library raises about it becomes a `UserError`."""
    try:
        yield
    except UserError:
        raise
    except StrictDataclassError as error:  # its own message wraps the field's in a second line
        raise UserError(f"{source}: {first_line(error.__cause__ or error)}") from error
    except (OSError, ValueError) as error:
        said = first_line(error)
        if "huggingface.co" in str(error) or "Repo id" in said:
            said = f"is no file or folder here, and the Hub did not give it: {said}"
        raise UserError(f"{source}: {said}") from error
    except Exception as error:  # a field that Transformers looks up or divides by unchecked
        raise UserError(f"{source}: {type(error).__name__}: {first_line(error)}") from error
