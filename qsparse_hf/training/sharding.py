"""Checkpoints that FSDP wrote, for a run without it: on one GPU, or on none."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.distributed.checkpoint as dcp
from accelerate.utils.constants import FSDP_MODEL_NAME, OPTIMIZER_NAME
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict


def has_shards(checkpoint: str | Path) -> bool:
    """Whether FSDP wrote `checkpoint`, in shards."""
    return (Path(checkpoint) / f"{FSDP_MODEL_NAME}_0").is_dir()


@contextmanager
def without_shards(checkpoint: str | Path) -> Iterator[str]:
    """The files of `checkpoint`, the whole model among them, as a folder that shows no shards."""
    with TemporaryDirectory() as folder:
        for file in Path(checkpoint).absolute().iterdir():
            if file.is_file():
                (Path(folder) / file.name).symlink_to(file)
        yield folder


def load_sharded_optimizer(checkpoint: str | Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Read the state of `optimizer`, over the whole parameters of `model`, from the shards in `checkpoint`."""
    state = {"optimizer": get_optimizer_state_dict(model, optimizer)}
    dcp.load(state, checkpoint_id=Path(checkpoint) / f"{OPTIMIZER_NAME}_0")
    set_optimizer_state_dict(model, optimizer, state["optimizer"])
