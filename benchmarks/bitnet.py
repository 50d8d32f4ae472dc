"""Decoding with packed ternary weights beside the dense bf16 model: through `generate`, the step alone, each product.

    python benchmarks/bitnet.py --output bitnet.json
    python benchmarks/bitnet.py --device cpu --models 1b bitnet-2b --threads 2

The same as `qsparse bench decode --weights ternary`; on a GPU then each product of a layer beside PyTorch's int4
weight-only product (`torch._weight_int4pack_mm`, groups of 128).
"""

import sys

import torch

from qsparse_hf.bench import SHAPES
from qsparse_hf.cli import main
from qsparse_hf.measure import captured, interleaved, medians, print_table

_COPIES = 24
"""Of each weight, read in turns, so that no cache holds it."""


def int4_products(model: str) -> list[list[str]]:
    """Microseconds of the dense bf16 and of the int4 product of each projection group, for one token."""
    fields = SHAPES[model][1]
    hidden, intermediate = fields["hidden_size"], fields["intermediate_size"]
    heads = fields["num_attention_heads"]
    attention = hidden * (heads + 2 * fields.get("num_key_value_heads", heads)) // heads
    groups = {
        "qkv": (hidden, attention),
        "o": (hidden, hidden),
        "gate_up": (hidden, 2 * intermediate),
        "down": (intermediate, hidden),
    }
    rows, totals = [], {"bf16": 0.0, "int4": 0.0}
    for group, (features, out) in groups.items():
        x = torch.randn(1, features, dtype=torch.bfloat16, device="cuda")
        dense = [torch.randn(out, features, dtype=torch.bfloat16, device="cuda") for _ in range(_COPIES // 4)]
        codes = torch.randint(256, (out, features // 2), dtype=torch.uint8, device="cuda")
        packed = [torch.ops.aten._convert_weight_to_int4pack(codes, 8) for _ in range(_COPIES)]
        scales = torch.ones(features // 128, out, 2, dtype=torch.bfloat16, device="cuda")

        def in_bf16(x=x, dense=dense) -> None:
            for weight in dense:
                torch.nn.functional.linear(x, weight)

        def in_int4(x=x, packed=packed, scales=scales) -> None:
            for weight in packed:
                torch.ops.aten._weight_int4pack_mm(x, weight, 128, scales)

        bf16 = medians(interleaved({"bf16": captured(in_bf16, 1)}, 9, len(dense)))["bf16"]
        int4 = medians(interleaved({"int4": captured(in_int4, 1)}, 9, len(packed)))["int4"]
        totals = {"bf16": totals["bf16"] + bf16, "int4": totals["int4"] + int4}
        rows.append([model, group, f"{features} x {out}", f"{bf16:.1f}", f"{int4:.1f}"])
    return [*rows, [model, "all", "", f"{totals['bf16']:.1f}", f"{totals['int4']:.1f}"]]


if __name__ == "__main__":
    status = main(["bench", "decode", "--weights", "ternary", *sys.argv[1:]])
    if status == 0 and torch.cuda.is_available() and "cpu" not in sys.argv:
        print("\nPyTorch's own products of one token, us")
        print_table(["model", "group", "in x out", "bf16", "int4"], int4_products("llama-2-7b"))
    sys.exit(status)
