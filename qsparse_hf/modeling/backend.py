# SPDX-License-Identifier: Apache-2.0
"""Which implementation of an operator runs: one rule for every table of implementations."""

import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

logger = logging.getLogger(__name__)
_ASKED = os.environ.get("QSPARSE_BACKEND") or None
_said: set[str] = set()


def say_once(level: int, message: str) -> None:
    """Log a message that has not been logged in this process."""
    if not torch.compiler.is_compiling() and message not in _said:
        _said.add(message)
        logger.log(level, message)


class Implementation(Protocol):
    """What `choose` asks of an implementation."""

    def refuses(self, tensors: Sequence[Tensor], asked: bool) -> str | None:
        """Why it does not run on these, or None if it does; `asked` if somebody named it."""


T = TypeVar("T", bound=Implementation)


def prefer(implementations: dict[str, Any], name: str, implementation: Implementation) -> None:
    """Add an implementation ahead of those that a table holds: the first that takes the tensors runs."""
    rest = dict(implementations)
    implementations.clear()
    implementations.update({name: implementation} | rest)


def runs(name: str, implementations: Mapping[str, T], tensors: Sequence[Tensor]) -> bool:
    """Whether that implementation is there and is the one that runs on these."""
    return name in implementations and choose(implementations, tensors, None) is implementations[name]


def choose(implementations: Mapping[str, T], tensors: Sequence[Tensor], name: str | None) -> T:
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
