"""Q-Sparse for Transformers: large language models that run on a fraction of their activations."""

from importlib import import_module

from . import kernels as kernels  # they join the tables of implementations
from .decode import prepare
from .modeling.modeling_qsparse import QSparsePreTrainedModel
from .modeling.sparsify import glu_sparsify, rms_norm_sparsify, topk_sparsify
from .registration import FAMILIES, register

__version__ = "0.2.0"

register()
QSparsePreTrainedModel.decoder = prepare

_CLASSES = {each.__name__: each for family in FAMILIES.values() for each in family}
globals().update(_CLASSES)

# Imported on first use: they bring the Trainer, which decoding does not need.
_LAZY = {
    "QSparseTrainer": ".training",
    "QSparseTrainingArguments": ".training",
    "convert_checkpoint": ".conversion",
    "sparsity_report": ".report",
}
__all__ = ["glu_sparsify", "rms_norm_sparsify", "topk_sparsify", *_CLASSES, *_LAZY]


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LAZY[name], __name__), name)
