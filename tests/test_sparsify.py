"""The operator: the selection rule, its gradients, and where it has to work."""

import math

import pytest
import torch
from conftest import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from qsparse_hf import topk_sparsify
from qsparse_hf.modeling.sparsify import IMPLS
from qsparse_hf.modeling.sparsity import kept_features

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
nan, inf = math.nan, math.inf


def select(row: list[float], kept: int) -> set[int]:
    """The selection rule in plain Python."""

    def rank(index: int) -> tuple[float, int]:
        return (-inf if math.isnan(row[index]) else -abs(row[index]), index)

    nans = [i for i, value in enumerate(row) if math.isnan(value)]
    others = sorted((i for i, value in enumerate(row) if not math.isnan(value)), key=rank)
    return set((nans + others)[:kept])


@pytest.mark.parametrize(
    ("features", "sparsity", "kept"),
    [
        (4, 0.5, 2),
        (5, 0.5, 3),
        (3, 0.5, 2),
        (1, 0.9, 1),
        (10, 0.99, 1),
        (4096, 0.6, 1638),
        (11008, 0.75, 2752),
        (32, 0.4, 19),
    ],
)
def test_kept_features_rounds_half_up_and_keeps_one(features, sparsity, kept):
    assert kept_features(features, sparsity) == kept


@pytest.mark.parametrize("backend", IMPLS)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("row", "sparsity", "expected"),
    [
        ([3, -1, 2, -4], 0.5, [3, 0, 0, -4]),
        ([1, -1, 1, 1], 0.5, [1, -1, 0, 0]),  # ties: the lowest index
        ([0, 5, 0, 0], 0.5, [0, 5, 0, 0]),
        ([nan, 9, inf, -inf], 0.5, [nan, 0, inf, 0]),  # NaN is largest; infinities tie
        ([2, nan, 1, nan, nan], 0.5, [0, nan, 0, nan, nan]),
        ([inf, nan, 3, 1], 0.75, [0, nan, 0, 0]),
        ([7], 0.9, [7]),
        ([-0.0, 0.0], 0.5, [0, 0]),
    ],
)
def test_hand_computed(row, sparsity, expected, dtype, device, backend):
    y = topk_sparsify(torch.tensor(row, dtype=dtype, device=device), sparsity, backend=backend)
    torch.testing.assert_close(y.cpu(), torch.tensor(expected, dtype=dtype), rtol=0, atol=0, equal_nan=True)


def test_hand_computed_block_and_rescale():
    x = torch.tensor([[3.0, -1.0, 2.0, -4.0, 8.0, 7.0]])
    assert topk_sparsify(x, 0.5, block_size=2).tolist() == [[3, 0, 0, -4, 8, 0]]
    assert topk_sparsify(x, 0.5, block_size=3).tolist() == [[3, 0, 2, 0, 8, 7]]  # half of 3 rounds up to 2
    torch.testing.assert_close(topk_sparsify(x[:, :4], 0.5, rescale="l2"), torch.tensor([[0.6, 0, 0, -0.8]]))
    assert topk_sparsify(torch.zeros(4), 0.5, rescale="l2").tolist() == [0, 0, 0, 0]
    # The norm is the token's, over all its blocks: 4, 5, 20 and 22 survive, sqrt(16 + 25 + 400 + 484) = sqrt(925).
    blocks = topk_sparsify(torch.tensor([4.0, 1.0, 5.0, -2.0, 20.0, 3.0, 1.0, 22.0]), 0.5, block_size=2, rescale="l2")
    torch.testing.assert_close(blocks, torch.tensor([4.0, 0, 5, 0, 20, 0, 0, 22]) / 925**0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1e15, 1e30])
def test_rescale_at_any_scale(scale, dtype):
    x = torch.tensor([3.0, -1.0, 2.0, -4.0], dtype=dtype)
    assert_close(topk_sparsify(x * scale, 0.5, rescale="l2"), topk_sparsify(x, 0.5, rescale="l2"))


@pytest.mark.parametrize("backend", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_selection_rule_holds_for_any_row(backend, dtype, data):
    values = st.one_of(st.floats(width=16), st.sampled_from([0.0, -0.0, 1.0, -1.0, nan, inf, -inf]))
    row = data.draw(st.lists(values, min_size=1, max_size=40))
    sparsity = data.draw(st.floats(0.01, 0.99))
    x = torch.tensor(row, dtype=dtype)
    kept = select(x.tolist(), kept_features(len(row), sparsity))
    expected = [value if i in kept else 0.0 for i, value in enumerate(x.tolist())]
    torch.testing.assert_close(
        topk_sparsify(x, sparsity, backend=backend),
        torch.tensor(expected, dtype=dtype),
        rtol=0,
        atol=0,
        equal_nan=True,
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ste", [True, False])
@pytest.mark.parametrize("rescale", ["none", "l2"])
@pytest.mark.parametrize(("shape", "block_size"), [((7, 33), None), ((2, 3, 96), 32), ((5, 1), None), ((0, 8), None)])
@pytest.mark.parametrize("backend", [name for name in IMPLS if name != "reference"])
def test_implementations_agree_with_the_reference(backend, shape, block_size, rescale, ste, dtype, device):
    generator = torch.Generator().manual_seed(0)
    # Few distinct values, so that many tie.
    x = (torch.randint(-9, 10, shape, generator=generator) / 4).to(device, dtype)
    weight = torch.randn(shape, generator=generator).to(device, dtype)
    results = []
    for name in (backend, "reference"):
        leaf = x.clone().requires_grad_()
        y = topk_sparsify(leaf, 0.4, block_size, rescale, ste, backend=name)
        (y * weight).sum().backward()
        results.append((y.detach(), leaf.grad))
    for actual, expected in zip(*results, strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("features", [1, 2, 3, 1000, 65536])
def test_feature_dimensions(features):
    x = torch.randn(2, features)
    assert (topk_sparsify(x, 0.5) != 0).sum(-1).tolist() == [kept_features(features, 0.5)] * 2


def test_views_with_any_strides():
    x = torch.randn(6, 10, 8)
    for view in (x.transpose(0, 2), x[::2, 1::3], x[..., ::2], x.expand(2, 6, 10, 8)):
        assert torch.equal(topk_sparsify(view, 0.5), topk_sparsify(view.contiguous(), 0.5))
    windows = torch.arange(20.0).unfold(0, 8, 1)
    for view, block_size in ((x.transpose(1, 2), 5), (windows, 4)):
        assert torch.equal(topk_sparsify(view, 0.5, block_size), topk_sparsify(view.contiguous(), 0.5, block_size))


def test_sparsity_zero_is_the_input_itself():
    x = torch.randn(3, 4)
    assert topk_sparsify(x, 0) is x
    assert topk_sparsify(x, 0.0, block_size=2, rescale="l2", ste=False) is x


def test_straight_through_gradient_ignores_the_mask_and_the_ablation_does_not():
    upstream = torch.tensor([1.0, 2.0, 3.0, 4.0])
    for ste, expected in ((True, [1, 2, 3, 4]), (False, [1, 0, 0, 4])):
        x = torch.tensor([3.0, -1.0, 2.0, -4.0], requires_grad=True)
        topk_sparsify(x, 0.5, ste=ste).backward(upstream)
        assert x.grad.tolist() == expected


def test_gradient_through_the_rescale_is_exact_and_the_mask_is_the_identity():
    x = torch.tensor([3.0, -1.0, 2.0, -4.0], dtype=torch.float64, requires_grad=True)
    upstream = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    y = topk_sparsify(x, 0.5, rescale="l2")  # s / |s| with s = (3, 0, 0, -4), |s| = 5
    y.backward(upstream)
    unit = torch.tensor([0.6, 0, 0, -0.8], dtype=torch.float64)
    torch.testing.assert_close(x.grad, (upstream - unit * (unit @ upstream)) / 5)


def test_masked_gradients_pass_gradcheck():
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: topk_sparsify(t, 0.5, 4, "l2", ste=False), x)


def test_straight_through_saves_nothing_for_backward():
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        topk_sparsify(torch.randn(4, 8, requires_grad=True), 0.5)
    assert saved == []


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("block_size", [None, 8])
def test_compiles_to_one_graph(device, block_size):
    def function(x):
        return topk_sparsify(x * 2, 0.5, block_size, "l2").sin()

    x = torch.randn(4, 32, device=device)
    results = []
    for run in (function, torch.compile(function, fullgraph=True)):
        leaf = x.clone().requires_grad_()
        y = run(leaf)
        y.sum().backward()
        results.append((y.detach(), leaf.grad))
    for actual, expected in zip(*results, strict=True):
        assert_close(actual, expected)


def test_under_autocast_and_checkpointing():
    linear = torch.nn.Linear(16, 16)

    def block(x):
        return topk_sparsify(linear(x), 0.5, rescale="l2")

    results = []
    for run in (block, lambda x: checkpoint(block, x, use_reentrant=False)):
        x = torch.linspace(-1, 1, 32).view(2, 16).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            y = run(x)
        y.float().square().sum().backward()
        results.append((y.detach(), x.grad))
    assert results[0][0].dtype == torch.bfloat16
    assert (results[0][0] == 0).sum() == 16
    for plain, checkpointed in zip(*results, strict=True):
        assert torch.equal(plain, checkpointed)


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        ({"sparsity": 1.0}, ValueError, "1.0"),
        ({"sparsity": -0.1}, ValueError, "-0.1"),
        ({"sparsity": nan}, ValueError, "nan"),
        ({"sparsity": "x"}, ValueError, "'x'"),
        ({"sparsity": True}, ValueError, "True"),
        ({"block_size": 3}, ValueError, "divides features .8., got 3"),
        ({"block_size": 0}, ValueError, "got 0"),
        ({"rescale": "l1"}, ValueError, "'none', 'l2', got 'l1'"),
        ({"backend": "cuda"}, ValueError, "'torch', 'reference', got 'cuda'"),
        ({"x": torch.arange(8)}, TypeError, "torch.int64"),
        ({"x": torch.tensor(1.0)}, ValueError, "last dimension"),
        ({"x": torch.empty(3, 0)}, ValueError, "last dimension"),
    ],
)
def test_bad_arguments_are_named(arguments, error, said):
    with pytest.raises(error, match=said):
        topk_sparsify(**{"x": torch.randn(2, 8), "sparsity": 0.5} | arguments)
