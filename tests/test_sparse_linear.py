"""The decode product: values, where it rounds, what it refuses."""

from itertools import product

import pytest
import torch
from conftest import assert_close, backends

from qsparse_hf import topk_sparsify
from qsparse_hf.decode.sparse_linear import sparse_linear
from qsparse_hf.decode.weights import FloatWeights, TernaryWeights
from qsparse_hf.modeling.bitnet import pack, ternary
from qsparse_hf.modeling.sparsify import SURVIVORS, Survivors

BACKENDS = backends(FloatWeights.products)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize(("device", "backend"), BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_hand_computed(device, backend, dtype):
    kept = Survivors(torch.tensor([[2.0, -1.0]]), torch.tensor([[2, 0]], dtype=torch.int32))
    weight = torch.tensor([[1.0, 10.0, 100.0], [7.0, 7.0, 7.0], [4.0, 5.0, 6.0], [7.0, 7.0, 7.0]])
    bias, residual = torch.tensor([0.5, 0.0, -1.0]), torch.tensor([[0.0, 1000.0, 1.0]])
    tensors = [each.to(device, dtype) for each in (kept.values, weight, bias, residual)]
    kept, (weight, bias, residual) = Survivors(tensors[0], kept.indices.to(device)), tensors[1:]
    assert sparse_linear(kept, weight, backend=backend).tolist() == [[7, 0, -88]]
    assert sparse_linear(kept, weight, bias, residual, backend=backend).tolist() == [[7.5, 1000, -88]]


@pytest.mark.parametrize(("device", "backend"), BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "shape"),
    [
        *product([(1,), (2, 3), (0, 1)], [(100, 72), (33, 130), (1, 1), (300, 64)]),
        *product([(1,)], [(40, 0), (1300, 2050), (4100, 2050), (600, 5200)]),  # nothing; a kernel's other tiles
    ],
)
def test_is_the_dense_product_of_what_survived(device, backend, dtype, tokens, shape):
    features, out = shape
    generator = torch.Generator().manual_seed(0)
    x, weight, bias, residual = (
        torch.randn(shape, generator=generator).to(device, dtype)
        for shape in ((*tokens, features), (features, out), (out,), (*tokens, out))
    )
    y = sparse_linear(topk_sparsify(x, 0.6, compact=True), weight, bias, residual, backend=backend)
    dense = topk_sparsify(x, 0.6).double() @ weight.double() + bias.double() + residual.double()
    assert_close(y, dense.to(dtype))


def ternary_weights(features: int, sizes: tuple[int, ...], device: str) -> tuple[TernaryWeights, torch.Tensor]:
    """Of linears of these sizes, and what they stand for, `[D, N]`."""
    generator = torch.Generator().manual_seed(0)
    codes, scales = zip(*(ternary(torch.randn(size, features, generator=generator)) for size in sizes), strict=True)
    weights = TernaryWeights.of([pack(each).to(device) for each in codes], [each.to(device) for each in scales])
    dense = torch.cat([code * scale for code, scale in zip(codes, scales, strict=True)])
    return weights, dense.t().to(device)


@pytest.mark.parametrize(("device", "backend"), backends(TernaryWeights.products))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quantization", ["int8", "none"])
@pytest.mark.parametrize(
    ("tokens", "features", "sizes"),
    [
        ((1,), 100, (72,)),  # bytes that make no whole words
        ((2, 3), 33, (16, 8, 4)),
        ((0, 1), 33, (16,)),
        ((2,), 600, (640, 128, 128)),  # several linears that read one input
        ((1,), 1300, (2064,)),
        ((1,), 1100, (8256,)),  # a kernel's other tile
    ],
)
def test_ternary_is_the_dense_product_of_what_survived(device, backend, dtype, quantization, tokens, features, sizes):
    weights, dense = ternary_weights(features, sizes, device)
    assert weights.shape == (features, sum(sizes))
    assert weights.nbytes < features * sum(sizes) / 4 + 4 * sum(sizes)
    generator = torch.Generator().manual_seed(0)
    x, bias, residual = (
        torch.randn(shape, generator=generator).to(device, dtype)
        for shape in ((*tokens, features), (sum(sizes),), (*tokens, sum(sizes)))
    )
    kept = topk_sparsify(x, 0.4, compact=True, quantization=quantization)
    y = sparse_linear(kept, weights, bias, residual, backend=backend)
    values = kept.values.double() * (1 if kept.scale is None else kept.scale.double())
    sparse = torch.zeros(x.shape, dtype=torch.float64, device=device).scatter(-1, kept.indices.long(), values)
    assert_close(y, (sparse @ dense.double() + bias.double() + residual.double()).to(dtype))
    if quantization == "none":
        assert torch.equal(sparse.to(dtype), topk_sparsify(x, 0.4))


@pytest.mark.parametrize(("device", "backend"), backends(TernaryWeights.products))
def test_ternary_hand_computed(device, backend):
    """Codes 1, -1, 0, 1 of four outputs that share a byte, in two linears with a scale each."""
    codes = [torch.tensor([[1.0, 0], [-1, 1], [0, 1], [1, -1]]), torch.tensor([[0.0, 1], [1, 1], [-1, 0], [0, 0]])]
    weights = TernaryWeights.of([pack(each).to(device) for each in codes], torch.tensor([0.5, 2.0], device=device))
    assert weights.codes.tolist() == [[0b10010010, 0b01001001], [0b00101001, 0b01011010]]
    kept = Survivors(torch.tensor([[3.0, 4.0]]), torch.tensor([[0, 1]], dtype=torch.int32), torch.tensor([[10.0]]))
    kept = Survivors(*(each.to(device) for each in kept))
    assert sparse_linear(kept, weights, backend=backend).tolist() == [[15, 5, 20, -5, 80, 140, -60, 0]]


@pytest.mark.parametrize(("device", "backend"), BACKENDS)
def test_is_the_same_every_time(device, backend):
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(n, 4096, generator=generator).to(device, torch.bfloat16) for n in (1, 4096))
    kept = topk_sparsify(x, 0.5, compact=True)
    first = sparse_linear(kept, weight, backend=backend)
    for _ in range(3 if device == "cuda" else 1):
        assert torch.equal(sparse_linear(kept, weight, backend=backend), first)


@pytest.mark.parametrize(("device", "backend"), BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_room_beside_the_lists_counts_for_nothing(device, backend, dtype, monkeypatch):
    """Lists have room for whole vectors; what stands there is what the memory held before."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    x, weight = (torch.randn(n, 50, device=device).to(dtype) for n in (3, 50))
    selects = backend if backend in SURVIVORS else None
    torch.use_deterministic_algorithms(True)  # empty tensors are filled with NaN and the largest integers
    try:
        kept = topk_sparsify(x, 0.5, compact=True, backend=selects)
        y = sparse_linear(kept, weight, backend=backend)
        of_copies = sparse_linear(Survivors(kept.values.clone(), kept.indices.clone()), weight, backend=backend)
    finally:
        torch.use_deterministic_algorithms(False)
    assert_close(y, (topk_sparsify(x, 0.5).double() @ weight.double()).to(dtype))
    assert torch.equal(of_copies, y)


@pytest.mark.parametrize("backend", [case.values[1] for case in BACKENDS if case.values == ("cpu", "numba")])
def test_is_the_same_for_any_number_of_threads(backend):
    x, weight = torch.randn(1, 512), torch.randn(512, 700)
    kept = topk_sparsify(x, 0.5, compact=True)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(sparse_linear(kept, weight, backend=backend))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*results)


def test_bad_arguments_are_named():
    x, weight = torch.randn(2, 8), torch.randn(8, 6)
    kept = topk_sparsify(x, 0.5, compact=True)
    for arguments, error, said in [
        ((kept, weight.t().contiguous().t()), ValueError, r"contiguous, got shape \(8, 6\) with strides \(1, 8\)"),
        ((kept, weight[None]), ValueError, r"got shape \(1, 8, 6\)"),
        ((kept, weight.double()), TypeError, "got torch.float32, torch.float64"),
        ((Survivors(kept.values.int(), kept.indices), weight.int()), TypeError, "got torch.int32, torch.int32"),
        ((kept, weight, torch.randn(5)), ValueError, r"bias must have shape \(6,\), got \(5,\)"),
        ((kept, weight, None, x), ValueError, r"residual must have shape \(2, 6\), got \(2, 8\)"),
        ((kept, torch.randn(3, 6)), ValueError, "at most 3 features"),
        ((Survivors(kept.values, kept.indices[:1]), weight), ValueError, "must be alike"),
    ]:
        with pytest.raises(error, match=said):
            sparse_linear(*arguments)
    with pytest.raises(ValueError, match="'reference', got 'cuda'"):
        sparse_linear(kept, weight, backend="cuda")
