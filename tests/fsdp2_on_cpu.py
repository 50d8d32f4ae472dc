"""Runs the `qsparse` command under FSDP2 on CPU processes (gloo), as `configs/accelerate/fsdp2.yaml` says.

Accelerate turns to FSDP on accelerators alone. Here it is told that it may on a CPU; all that follows is its own.
"""

import os
import sys

import yaml
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

with open("configs/accelerate/fsdp2.yaml") as file:
    for name, value in yaml.safe_load(file)["fsdp_config"].items():
        os.environ[name.upper()] = str(value).lower() if isinstance(value, bool) else str(value)
os.environ["ACCELERATE_USE_FSDP"] = "true"

initialize = AcceleratorState.__init__


def initialize_with_fsdp(self, *args, fsdp_plugin=None, **kwargs) -> None:
    first = not AcceleratorState._shared_state
    initialize(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if first and fsdp_plugin is not None:
        self.fsdp_plugin = fsdp_plugin
        self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP


AcceleratorState.__init__ = initialize_with_fsdp

if __name__ == "__main__":
    from qsparse_hf.cli import main

    sys.exit(main(sys.argv[1:]))
