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
from transformers.utils.import_utils import is_serve_available

from ..errors import UserError, check_source, user_errors
from ..modeling.modeling_qsparse import QSparsePreTrainedModel
from ..registration import FAMILIES

_NAME = "python -m qsparse_hf.serving"


class PreparingModelManager(model_manager.ModelManager):
    """Prepares the Q-Sparse models that it loads.

    Raises:
        UserError: the model named at the start cannot be loaded.
    """

    def __init__(self, **settings: Any) -> None:
        model = settings.get("force_model")
        if model is not None and ".gguf" not in model:
            check_source(model.partition("@")[0], named=model)
        with user_errors(model):
            super().__init__(**settings)

    def _load_model(self, *args: Any, **kwargs: Any) -> Any:
        model = super()._load_model(*args, **kwargs)
        return model.prepare_for_decode() if isinstance(model, QSparsePreTrainedModel) else model


def main(arguments: list[str] | None = None) -> None:
    """Run the server until it is stopped; a model that cannot be loaded becomes one line on stderr and exit code 1."""
    for family in FAMILIES.values():
        setattr(transformers, family.causal_lm.__name__, family.causal_lm)  # where it looks for an architecture
    model_manager.ModelManager = PreparingModelManager  # type: ignore[assignment, misc]  # where it takes its manager from
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command(help=__doc__)(Serve)
    if not is_serve_available():
        sys.exit(f"{_NAME}: error: it needs more packages: pip install 'transformers[serving]'")
    try:
        app(sys.argv[1:] if arguments is None else arguments, prog_name=_NAME)
    except UserError as error:
        sys.exit(f"{_NAME}: error: {error}")


if __name__ == "__main__":
    main()
