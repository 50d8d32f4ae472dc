"""`transformers serve` for Q-Sparse models, prepared for decoding; the options are its own.

    python -m qsparse_hf.serving runs/trained --port 8000

By itself `transformers serve` finds no model classes but those in Transformers.
"""

import sys
from typing import Any

import transformers
import typer
from transformers.cli.serve import Serve
from transformers.cli.serving import model_manager

from ..modeling.modeling_qsparse import QSparsePreTrainedModel
from ..registration import FAMILIES


class PreparingModelManager(model_manager.ModelManager):
    """Prepares the Q-Sparse models that it loads."""

    def _load_model(self, *args: Any, **kwargs: Any) -> Any:
        model = super()._load_model(*args, **kwargs)
        return model.prepare_for_decode() if isinstance(model, QSparsePreTrainedModel) else model


def main(arguments: list[str] | None = None) -> None:
    """Run the server until it is stopped."""
    for family in FAMILIES.values():
        setattr(transformers, family.causal_lm.__name__, family.causal_lm)  # where it looks for an architecture
    model_manager.ModelManager = PreparingModelManager  # type: ignore[misc]  # where it takes its manager from
    app = typer.Typer(add_completion=False)
    app.command(help=__doc__)(Serve)
    app(sys.argv[1:] if arguments is None else arguments, prog_name="python -m qsparse_hf.serving")


if __name__ == "__main__":
    main()
