"""Make a Q-Sparse checkpoint from a dense one.

    python scripts/convert.py SOURCE OUTPUT --sparsity 0.5

The same as `qsparse convert`; `--help` lists the options.
"""

import sys

from qsparse_hf.cli import main

if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:]]))
