"""Which implementation runs: one rule for every table of implementations."""

import logging
from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

logger = logging.getLogger(__name__)
_said: set[str] = set()


class Implementation(Protocol):
    """What `choose` asks of an implementation."""

    def refuses(self, x: Tensor, asked: bool) -> str | None:
        """Why it does not run on `x`, or None if it does; `asked` if somebody named it."""


def choose(implementations: Mapping[str, Implementation], x: Tensor, name: str | None) -> Implementation:
    """The implementation called `name`, or if that is None the first that takes `x`.

    Passing one over is said once, at info level.

    Raises:
        ValueError: `name` is unknown, or what it names cannot run on `x`.
    """
    if name is not None:
        if name not in implementations:
            raise ValueError(f"backend must be None or one of {', '.join(map(repr, implementations))}, got {name!r}")
        if reason := implementations[name].refuses(x, asked=True):
            raise ValueError(f"backend {name!r} cannot run here: {reason}")
        return implementations[name]
    for key, implementation in implementations.items():
        reason = implementation.refuses(x, asked=False)
        if reason is None:
            return implementation
        if not torch.compiler.is_compiling() and reason not in _said:
            _said.add(reason)
            logger.info("backend %r is passed over: %s", key, reason)
    raise ValueError(f"no backend takes a tensor of device {x.device} and dtype {x.dtype}")
