# SPDX-License-Identifier: Apache-2.0
"""A selection: what a sparsity, a block size, a rescale and a rounding may be, and how many features they keep."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

RESCALES = ("none", "l2")
QUANTIZATIONS = ("none", "int8")


def kept_features(features: int, sparsity: float) -> int:
    """`K`, how many of `features` inputs survive at `sparsity` (the fraction of zeros): at least one."""
    return max(1, math.floor((1 - sparsity) * features + 0.5))


def check_sparsity(value: object, name: str = "sparsity") -> None:
    """Raise a ValueError that begins with `name` unless `value` is a number with 0 <= value < 1; NaN is none."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
        raise ValueError(f"{name} must be a number with 0 <= {name} < 1 (the fraction of zeros), got {value!r}")


def check_choice(value: object, allowed: Sequence[str], name: str) -> None:
    """Raise a ValueError that begins with `name` unless `value` is one of the words `allowed`."""
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def check_block_size(value: object, features: int, name: str = "block_size", features_name: str = "features") -> None:
    """Raise a ValueError unless `value` is None or a positive int that divides `features`."""
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < 1 or features % value:
        raise ValueError(
            f"{name} must be None or a positive integer that divides {features_name} ({features}), got {value!r}"
        )


@dataclass(frozen=True)
class Selection:
    """Which features of a token survive, and how the gradient passes (eq. 2-3, 13).

    Attributes:
        sparsity: fraction of zeros, 0 <= sparsity < 1; at 0 nothing is selected.
        block_size: None for a top-K over all features, `M` for one inside every `M` of them (Block Q-Sparse, N:M).
        rescale: `"l2"` divides what survived by its L2 norm.
        ste: the mask is the identity in the backward pass (eq. 13); False masks the gradient too (eq. 12).
        quantization: `"int8"` rounds what survived to 255 levels of each token (eq. 4-7), before the rescale.
    """

    sparsity: float
    block_size: int | None = None
    rescale: str = "none"
    ste: bool = True
    quantization: str = "none"

    def check(self, features: int) -> None:
        """Raise a ValueError that names the value unless this selects from tokens of that many features."""
        check_sparsity(self.sparsity)
        check_choice(self.rescale, RESCALES, "rescale")
        check_choice(self.quantization, QUANTIZATIONS, "quantization")
        check_block_size(self.block_size, features)

    def scaled(self, factor: float) -> "Selection":
        """The same selection at `factor` times its sparsity."""
        return replace(self, sparsity=self.sparsity * factor)

    def kept(self, features: int) -> int:
        """How many of a token's features survive, in all of its blocks together."""
        block = self.block_size or features
        return features // block * self.kept_of_block(features)

    def kept_of_block(self, features: int) -> int:
        """`K` of the top-K of each block, of a token of that many features."""
        return kept_features(self.block_size or features, self.sparsity)
