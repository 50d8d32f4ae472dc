"""Training on the Transformers Trainer: arguments and trainer, sparsity schedule, packed data, whole runs from YAML."""

from .trainer import QSparseTrainer, QSparseTrainingArguments

__all__ = ["QSparseTrainer", "QSparseTrainingArguments"]
