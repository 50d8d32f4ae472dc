"""Which implementation runs: one rule for every table of implementations."""

import logging
import os
from collections.abc import Mapping, Sequence
from functools import cache
from hashlib import sha256
from importlib import import_module
from typing import Protocol

import torch
from torch import Tensor

# Operators have one table a process, and a checkpoint's own copy of this file may be loaded beside the package's: a
# second registration under one name would leave the first copy's operators dangling.
_PACKAGED = __name__ == "qsparse_hf.modeling.backend"
NAMESPACE = "qsparse" if _PACKAGED else f"qsparse_{sha256(__name__.encode()).hexdigest()[:16]}"
"""Of the operators that this copy registers."""

logger = logging.getLogger(__name__)
_ASKED = os.environ.get("QSPARSE_BACKEND") or None
_said: set[str] = set()


@cache
def is_numba_available() -> bool:
    """Whether the package is installed and goes with the rest; it is the extra `cpu` of ours."""
    try:
        import_module("numba")
    except ImportError as error:
        say_once(logging.INFO, f"numba is left out: {error}")
        return False
    return True


def say_once(level: int, message: str) -> None:
    """Log a message that has not been logged in this process."""
    if not torch.compiler.is_compiling() and message not in _said:
        _said.add(message)
        logger.log(level, message)


class Implementation(Protocol):
    """What `choose` asks of an implementation."""

    def refuses(self, tensors: Sequence[Tensor], asked: bool) -> str | None:
        """Why it does not run on these, or None if it does; `asked` if somebody named it."""


class Missing:
    """An implementation that needs what is not installed."""

    def __init__(self, reason: str) -> None:
        self.reason = reason

    def refuses(self, tensors: Sequence[Tensor], asked: bool) -> str | None:
        return self.reason


def runs(name: str, implementations: Mapping[str, Implementation], tensors: Sequence[Tensor]) -> bool:
    """Whether that implementation is the one that runs on these."""
    return choose(implementations, tensors, None) is implementations[name]


def choose(
    implementations: Mapping[str, Implementation], tensors: Sequence[Tensor], name: str | None
) -> Implementation:
    """The implementation called `name`, or if that is None the first that takes the tensors.

    The environment variable QSPARSE_BACKEND, read at import, names one where nobody else does, for whole models.
    Passing one over is said once, at info level.

    Raises:
        ValueError: `name` is unknown, or what it names cannot run on them.
    """
    who, nothing, name = ("backend", "None", name) if name else ("QSPARSE_BACKEND", "unset", _ASKED)
    if name is not None:
        if name not in implementations:
            allowed = ", ".join(map(repr, implementations))
            raise ValueError(f"{who} must be {nothing} or one of {allowed}, got {name!r}")
        if reason := implementations[name].refuses(tensors, asked=True):
            raise ValueError(f"{who} {name!r} cannot run here: {reason}")
        return implementations[name]
    for key, implementation in implementations.items():
        reason = implementation.refuses(tensors, asked=False)
        if reason is None:
            return implementation
        say_once(logging.INFO, f"backend {key!r} is passed over: {reason}")
    raise ValueError(f"none of the backends {', '.join(map(repr, implementations))} takes these tensors")
