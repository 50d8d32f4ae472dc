"""Kernels for GPUs (Triton) and CPUs (Numba): files `<operator>_<backend>.py`, put into the operators' tables here.

Triton and Numba are imported when a tensor first comes that a kernel could take. Until then importing and using this
package neither takes their time nor needs them installed.
"""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from ..decode import attention, layers
from ..decode.weights import FloatWeights, TernaryWeights
from ..modeling.backend import prefer
from ..modeling.sparsify import IMPLS, SURVIVORS

_DEVICES = {"cpu": "CPUs", "cuda": "GPUs"}


class Deferred:
    """An implementation whose module is imported when it is first needed.

    Attributes:
        package: the package that the module needs.
        device_type: the device type of the tensors that it takes, "cuda" or "cpu".
    """

    def __init__(self, package: str, device_type: str, load: Callable[[], object]) -> None:
        self.package = package
        self.device_type = device_type
        self._load = load
        self._loaded: Any = None
        self._missing: str | None = None

    def refuses(self, tensors: Sequence[Tensor], asked: bool) -> str | None:
        """The implementation's own answer, or that its package is not installed."""
        device = tensors[0].device.type
        if device != self.device_type and not asked:
            return f"its kernels are for {_DEVICES[self.device_type]}, and the input is on {device}"
        return self.missing() or self._loaded.refuses(tensors, asked)

    def missing(self) -> str | None:
        """Why the implementation cannot be imported here, or None if it can."""
        if self._loaded is None and self._missing is None:
            try:
                self._loaded = self._load()
            except ImportError as error:
                self._missing = f"the package {self.package} is not installed, or does not go with the others ({error})"
        return self._missing

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or self.missing():
            raise AttributeError(name)
        return getattr(self._loaded, name)


# Import statements, one a function: `torch.compile` traces these, and no call of `importlib`, where a model's first use
# is compiled.
def _sparsify_triton() -> object:
    from .sparsify_triton_ops import TritonSparsify

    return TritonSparsify()


def _sparsify_numba() -> object:
    from .sparsify_numba import NumbaSparsify

    return NumbaSparsify()


def _survivors_numba() -> object:
    from .sparsify_numba import NumbaSurvivors

    return NumbaSurvivors()


def _sparse_linear_triton() -> object:
    from .sparse_linear_triton import TritonSparseLinear

    return TritonSparseLinear()


def _sparse_linear_numba() -> object:
    from .sparse_linear_numba import NumbaSparseLinear

    return NumbaSparseLinear()


def _ternary_linear_triton() -> object:
    from .ternary_linear_triton import TritonTernaryLinear

    return TritonTernaryLinear()


def _ternary_linear_numba() -> object:
    from .ternary_linear_numba import NumbaTernaryLinear

    return NumbaTernaryLinear()


def _attend_numba() -> object:
    from .decode_attention_numba import NumbaAttend

    return NumbaAttend()


def _layer_numba() -> object:
    from .decode_layer_numba import NumbaLayer

    return NumbaLayer()


def _step_triton() -> object:
    from .decode_attention_triton import TritonStep

    return TritonStep()


_sparsify = Deferred("triton", "cuda", _sparsify_triton)
for table, name, implementation in (
    (IMPLS, "numba", Deferred("numba", "cpu", _sparsify_numba)),
    (IMPLS, "triton", _sparsify),
    (SURVIVORS, "numba", Deferred("numba", "cpu", _survivors_numba)),
    (SURVIVORS, "triton", _sparsify),
    (FloatWeights.products, "numba", Deferred("numba", "cpu", _sparse_linear_numba)),
    (FloatWeights.products, "triton", Deferred("triton", "cuda", _sparse_linear_triton)),
    (TernaryWeights.products, "numba", Deferred("numba", "cpu", _ternary_linear_numba)),
    (TernaryWeights.products, "triton", Deferred("triton", "cuda", _ternary_linear_triton)),
    (attention.ATTEND_IMPLS, "numba", Deferred("numba", "cpu", _attend_numba)),
    (layers.LAYER_IMPLS, "numba", Deferred("numba", "cpu", _layer_numba)),
    (attention.STEP_IMPLS, "triton", Deferred("triton", "cuda", _step_triton)),
):
    prefer(table, name, implementation)
