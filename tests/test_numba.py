"""What Numba compiles: kept for later processes where that can be, and refused where it cannot run."""

import pytest
from conftest import run_python

pytest.importorskip("numba")

SELECT = """
import resource, sys, torch
from qsparse_hf import topk_sparsify
from qsparse_hf.kernels import sparsify_numba
if len(sys.argv) > 1:
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
for dtype in (torch.float32, torch.bfloat16):
    x = torch.tensor([[1, -4, 2, 3.0]], dtype=dtype)
    values, indices, _ = topk_sparsify(x, 0.5, compact=True)
    assert (values.tolist(), indices.tolist()) == ([[-4, 3]], [[1, 3]])
print(sum(sparsify_numba.fill_lists.stats.cache_hits.values()))
"""


def hits(folder, *arguments) -> int:
    """Of a process that selects for two dtypes: how many were there from an earlier one."""
    return int(run_python(SELECT, *arguments, NUMBA_CACHE_DIR=str(folder)).stdout.split()[-1])


def test_what_was_compiled_is_kept_for_the_next_process(tmp_path):
    """One line says why the first waits."""
    first, second = (run_python(SELECT, NUMBA_CACHE_DIR=str(tmp_path)) for _ in range(2))
    assert (first.stdout.split()[-1], second.stdout.split()[-1]) == ("0", "2")
    assert first.stderr.count("compiling the kernels for this CPU") == 1
    assert "compiling" not in second.stderr


def test_what_cannot_be_kept_is_compiled_again(tmp_path):
    assert hits(tmp_path, "no room") == 0
    hits(tmp_path)
    for file in tmp_path.rglob("*.nb[ic]"):
        file.write_bytes(b"")
    assert hits(tmp_path) == 0
    elsewhere = run_python(SELECT, NUMBA_CACHE_LOCATOR_CLASSES="ZipCacheLocator")  # for files that are none of ours
    assert elsewhere.stdout.split()[-1] == "0"


def test_two_dtypes_under_one_name(tmp_path):
    """As processes leave it that compile for them at once."""
    hits(tmp_path)
    first, second = sorted(tmp_path.rglob("*fill_lists*.nbc"))
    first.write_bytes(second.read_bytes())
    assert hits(tmp_path) == 1


def test_without_a_compiler_other_ways_run():
    run_python(SELECT.split("print(")[0], NUMBA_DISABLE_JIT="1")
