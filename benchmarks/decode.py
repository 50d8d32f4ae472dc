"""Decoding, dense and sparse: through `generate`, the step alone, each product; on a GPU or a CPU.

    python benchmarks/decode.py --output decode.json
    python benchmarks/decode.py --models llama-3-8b 70b-slice --batches 1 2 4 --prompts 32 2048
    python benchmarks/decode.py --device cpu --models 1b --threads 2

The same as `qsparse bench decode`.
"""

import sys

from qsparse_hf.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", "decode", *sys.argv[1:]]))
