"""Mistakes of the user's, in one line each."""

from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub.errors import StrictDataclassError


class UserError(ValueError):
    """Says in one line what was given, what is wrong with it and what is allowed; commands print it and exit with 1."""


def first_line(error: BaseException) -> str:
    """What `error` says, in one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextmanager
def user_errors() -> Iterator[None]:
    """Around the loading of what the user named: what Transformers raises about it becomes a `UserError`."""
    try:
        yield
    except UserError:
        raise
    except StrictDataclassError as error:  # its own message wraps the field's in a second line
        raise UserError(first_line(error.__cause__ or error)) from error
    except (OSError, ValueError) as error:
        raise UserError(first_line(error)) from error
