"""Train from a YAML file, on one process or many.

    python scripts/train.py configs/train/continue_tiny.yaml model=my-checkpoint
    accelerate launch scripts/train.py configs/train/continue_tiny.yaml model=my-checkpoint
    torchrun --nproc_per_node 2 scripts/train.py configs/train/continue_tiny.yaml model=my-checkpoint

The same as `qsparse train`; `--help` lists the options.
"""

import sys

from qsparse_hf.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
