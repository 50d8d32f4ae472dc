"""A trial: the teacher's hidden states behind each layer are learnt too, beside its logits.

    python benchmarks/hidden_states.py 3.0 configs/train/continue_smollm2_135m.yaml model=runs/smollm2_135m

As `qsparse train RECIPE key=value ...`. Each layer adds `|h - t|^2 / |t|^2`, averaged over tokens and layers and times
the first argument, to the loss, where `h` and `t` are the model's and its teacher's hidden states.
"""

import sys
from typing import Any

import torch
from torch import Tensor

from qsparse_hf.cli import main
from qsparse_hf.errors import UserError
from qsparse_hf.training import run
from qsparse_hf.training.trainer import QSparseTrainer


def distance(hidden: Tensor, wanted: Tensor) -> Tensor:
    """Squared error over the squared norm, averaged over tokens; massive activations count no more than others."""
    hidden, wanted = hidden.float(), wanted.float()
    return ((hidden - wanted).square().sum(-1) / wanted.square().sum(-1)).mean()


compiled = torch.compile(distance)


class HiddenStatesTrainer(QSparseTrainer):
    """Learns the teacher's hidden states with a weight."""

    weight = 0.0

    def _find_teacher(self, model: Any, args: Any) -> None:
        super()._find_teacher(model, args)
        if self._teacher is None:
            raise UserError("hidden states are a teacher's: distill_from must name one")
        self.seen: dict[str, list[Tensor]] = {"student": [], "teacher": []}
        for watched, states in zip((model, self._teacher), self.seen.values(), strict=True):
            for layer in watched.model.layers:
                layer.register_forward_hook(lambda module, args, output, states=states: states.append(output))

    def compute_loss(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        for states in self.seen.values():
            states.clear()
        found = super().compute_loss(model, *args, **kwargs)
        if not model.training:
            return found
        apart = compiled if self.args.torch_compile else distance
        extra = torch.stack([apart(*pair) for pair in zip(*self.seen.values(), strict=True)]).mean()
        extra = self.weight * extra / self.current_gradient_accumulation_steps
        return (found[0] + extra, *found[1:]) if isinstance(found, tuple) else found + extra


if __name__ == "__main__":
    if len(sys.argv) < 3:
        raise SystemExit(__doc__)
    try:
        HiddenStatesTrainer.weight = float(sys.argv[1])
    except ValueError:
        raise SystemExit(f"the first argument is a weight, got {sys.argv[1]!r}") from None
    run.QSparseTrainer = HiddenStatesTrainer  # type: ignore[misc]
    sys.exit(main(["train", *sys.argv[2:]]))
