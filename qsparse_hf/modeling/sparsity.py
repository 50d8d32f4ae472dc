"""What a sparsity, a block size and a rescale may be, and how many features a sparsity keeps."""

import math

RESCALES = ("none", "l2")


def kept_features(features: int, sparsity: float) -> int:
    """`K`, how many of `features` inputs survive at `sparsity` (the fraction of zeros): at least one."""
    return max(1, math.floor((1 - sparsity) * features + 0.5))


def check_sparsity(value: object, name: str = "sparsity") -> float:
    """Return `value` if it is a number with 0 <= value < 1.

    Raises:
        ValueError: it is anything else (a bool and NaN included); the message begins with `name`.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
        raise ValueError(f"{name} must be a number with 0 <= {name} < 1 (the fraction of zeros), got {value!r}")
    return value


def check_rescale(value: object, name: str = "rescale") -> str:
    """Return `value` if it names a rescale, else raise a ValueError that begins with `name`."""
    if value not in RESCALES:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, RESCALES))}, got {value!r}")
    return value


def check_block_size(value: object, features: int, name: str = "block_size", features_name: str = "features") -> None:
    """Raise a ValueError unless `value` is None or a positive int that divides `features`."""
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < 1 or features % value:
        raise ValueError(
            f"{name} must be None or a positive integer that divides {features_name} ({features}), got {value!r}"
        )
