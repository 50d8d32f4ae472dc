"""The operator: the selection rule, its gradients, its fused forms, and where it has to work."""

import logging
import math
from functools import partial

import pytest
import torch
from conftest import BACKENDS, assert_close, backends, run_python
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from qsparse_hf import topk_sparsify
from qsparse_hf.decode.sparse_linear import sparse_linear
from qsparse_hf.modeling.sparsify import ACTIVATIONS, IMPLS, SURVIVORS, gated, glu_sparsify, rms_norm, rms_norm_sparsify
from qsparse_hf.modeling.sparsity import kept_features

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
nan, inf = math.nan, math.inf


@pytest.fixture(autouse=True, scope="module")
def poisoned_memory():
    """Memory that nobody wrote holds NaN, so that a kernel that leaves a hole is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


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


@pytest.mark.parametrize(("device", "backend"), BACKENDS)
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


@pytest.mark.parametrize(("device", "backend"), BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_selection_rule_holds_for_any_rows(device, backend, dtype, data):
    values = st.one_of(st.floats(width=16), st.sampled_from([0.0, -0.0, 1.0, -1.0, nan, inf, -inf]))
    row = data.draw(st.lists(values, min_size=1, max_size=40))
    features = len(row)
    sparsity = data.draw(st.floats(0.01, 0.99))
    x = torch.tensor([row[shift:] + row[:shift] for shift in range(min(features, 4))], dtype=dtype)
    expected = []
    for row in x.tolist():
        kept = select(row, kept_features(features, sparsity))
        expected.append([value if i in kept else 0.0 for i, value in enumerate(row)])
    actual = topk_sparsify(x.to(device), sparsity, backend=backend).cpu()
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=dtype), rtol=0, atol=0, equal_nan=True)


SHAPES = [
    ((7, 33), None),
    ((2, 3, 96), 32),
    ((5, 1), None),
    ((0, 8), None),
    ((3, 40), 8),
    ((2, 240), 24),
    ((2, 192), 64),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rescale", "ste", "quantization"),
    [
        ("none", True, "none"),
        ("none", False, "none"),
        ("l2", True, "none"),
        ("none", True, "int8"),
        ("none", False, "int8"),
        ("l2", True, "int8"),
    ],
)
@pytest.mark.parametrize(("shape", "block_size"), SHAPES)
@pytest.mark.parametrize(("device", "backend"), [case for case in BACKENDS if case.values[1] != "reference"])
def test_implementations_agree_with_the_reference(
    device, backend, shape, block_size, rescale, ste, quantization, dtype
):
    generator = torch.Generator().manual_seed(0)
    # Few distinct values, so that many tie.
    x = (torch.randint(-9, 10, shape, generator=generator) / 4).to(device, dtype)
    weight = torch.randn(shape, generator=generator).to(device, dtype)
    results = []
    for name in (backend, "reference"):
        leaf = x.clone().requires_grad_()
        y = topk_sparsify(leaf, 0.4, block_size, rescale, ste, backend=name, quantization=quantization)
        (y * weight).sum().backward()
        results.append((y.detach(), leaf.grad))
    (y, grad), (expected_y, expected_grad) = results
    assert torch.equal(y != 0, expected_y != 0)
    if rescale == quantization == "none":
        assert torch.equal(y, expected_y)
        assert torch.equal(grad, expected_grad)
    elif x.numel():
        assert_close(y, expected_y)
        assert_close(grad, expected_grad)


@pytest.mark.parametrize(("device", "backend"), BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("features", [3000, 8190])
def test_long_rows_with_ties_and_nans(device, backend, features, dtype):
    """Rows of many words, of one warp and of several, where ties are broken across them."""
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(5, features, generator=generator) * 8).round().div(4).to(dtype)
    x[0] = 1  # all equal
    x[1, ::2] = nan  # as many as are kept
    x[2, 5:2900] = inf
    x[3, 7:] = 0
    x[4] *= torch.finfo(dtype).tiny / 4  # subnormal
    for ste in (True, False):  # without it, the kernel writes the mask
        actual = topk_sparsify(x.to(device), 0.5, ste=ste, backend=backend).cpu()
        expected = topk_sparsify(x, 0.5, backend="reference")
        torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


FUSED = {
    name: (
        lambda x, other, *settings, of=of, **options: rms_norm_sparsify(x, other, 1e-5, *settings, **of, **options),
        lambda x, other, of=of: rms_norm(x, other, 1e-5, **of),
    )
    for name, of in {"rms_norm": {}, "unit_offset_rms_norm": {"unit_offset": True}}.items()
} | {
    name: (
        lambda x, other, *settings, name=name, **options: glu_sparsify(x, other, name, *settings, **options),
        lambda x, other, name=name: gated(x, other, name),
    )
    for name in ACTIVATIONS
}


def fused_inputs(form: str, features: int, dtype: torch.dtype, device: str) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    shape = (features,) if form.endswith("rms_norm") else (3, 5, features)
    inputs = torch.randn(3, 5, features, generator=generator), torch.randn(shape, generator=generator)
    return tuple(each.to(device, dtype).requires_grad_() for each in inputs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FUSED)
@pytest.mark.parametrize(("features", "block_size"), [(100, None), (96, 8), (96, 32), (85, 17)])
@pytest.mark.parametrize(("device", "backend"), BACKENDS)
def test_fused_forms(device, backend, features, block_size, form, dtype):
    """The mask is exact on what the form computes; that and its gradients are the dense form's, within rounding."""
    fused, dense = FUSED[form]
    inputs = fused_inputs(form, features, dtype, device)
    whole = fused(*inputs, 1e-9, block_size, backend=backend)  # every feature is kept
    y = fused(*inputs, 0.6, block_size, backend=backend)
    assert torch.equal(y, topk_sparsify(whole, 0.6, block_size, backend="reference"))
    expected = dense(*inputs)
    assert_close(whole.detach(), expected.detach())
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
    for gradient, wanted in zip(
        torch.autograd.grad(y, inputs, upstream), torch.autograd.grad(expected, inputs, upstream), strict=True
    ):
        assert_close(gradient, wanted)


@pytest.mark.parametrize(
    ("form", "features", "block_size", "rescale", "dtype"),
    [
        ("topk", 96, None, "none", torch.bfloat16),
        ("topk", 192, 64, "l2", torch.float16),
        ("rms_norm", 40, 8, "l2", torch.float32),
        ("rms_norm", 96, 32, "none", torch.bfloat16),
        ("unit_offset_rms_norm", 85, 17, "none", torch.bfloat16),
        ("unit_offset_rms_norm", 40, None, "l2", torch.float32),
        ("silu", 85, 17, "none", torch.float16),
        ("silu", 60, 1, "l2", torch.float32),
        ("rms_norm", 4100, None, "none", torch.bfloat16),  # warps share a row
        ("silu", 4100, None, "l2", torch.float32),
    ],
)
@pytest.mark.parametrize("quantization", ["none", "int8"])
@pytest.mark.parametrize(("device", "backend"), backends(SURVIVORS))
def test_survivors_side_by_side(device, backend, form, features, block_size, rescale, quantization, dtype):
    """Put back where they were, they are what the form without `compact` returns."""
    function, inputs = FUSED[form][0] if form in FUSED else topk_sparsify, fused_inputs("silu", features, dtype, device)
    inputs = {"topk": inputs[:1], "silu": inputs}.get(form, (inputs[0], inputs[1][0, 0]))  # a norm's weight
    settings = 0.6, block_size, rescale
    values, indices, scale = function(*inputs, *settings, backend=backend, compact=True, quantization=quantization)
    of_all = partial(function, *inputs, *settings, backend=backend if backend in IMPLS else None)
    expected = of_all(quantization=quantization).detach()
    assert indices.shape == values.shape == (3, 5, features - (of_all()[0, 0] == 0).sum())
    assert indices.dtype == torch.int32
    assert not values.requires_grad
    assert (indices.long().sort(-1).values.diff(dim=-1) > 0).all()
    if quantization == "none":
        assert scale is None
    else:
        assert torch.equal(values, values.round())
        assert (values.abs().amax(-1) == 127).all()
        assert scale.shape == (3, 5, 1)
        values = (values * scale).to(dtype)
    y = torch.zeros_like(expected).scatter(-1, indices.long(), values)
    assert_close(y, expected)
    assert torch.equal(y != 0, expected != 0)


@pytest.mark.parametrize(("device", "backend"), backends(SURVIVORS))
def test_of_an_infinite_token_nothing_is_left(device, backend):
    kept = topk_sparsify(
        torch.tensor([[1.0, inf, 2.0, 3.0]], device=device), 0.5, backend=backend, compact=True, quantization="int8"
    )
    assert (kept.values * kept.scale).isnan().all()


@pytest.mark.parametrize(
    ("rescale", "quantization", "ste"),
    [("l2", "none", True), ("l2", "none", False), ("none", "int8", True), ("l2", "int8", True)],
)
@pytest.mark.parametrize(("features", "block_size"), [(100, None), (100, 5), (100, 1), (4100, None)])
@pytest.mark.parametrize("form", ["rms_norm", "unit_offset_rms_norm", "silu"])
@pytest.mark.parametrize(("device", "backend"), [case for case in BACKENDS if case.values[1] != "reference"])
def test_fused_forms_rounded_and_rescaled(device, backend, form, features, block_size, rescale, quantization, ste):
    inputs = fused_inputs(form, features, torch.float32, device)
    results = []
    for name in (backend, "reference"):
        y = FUSED[form][0](*inputs, 0.6, block_size, rescale, ste, backend=name, quantization=quantization)
        upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(device)
        results.append((y.detach(), *torch.autograd.grad(y, inputs, upstream)))
    for actual, expected in zip(*results, strict=True):
        if quantization == "none":
            assert_close(actual, expected)
            continue
        # What the forms compute differs in its last bit, which now and then decides between two levels.
        error, scale = (actual - expected).abs(), expected.abs().max()
        assert error.max() <= 1.1 * scale / 127
        assert (error <= 1e-5 * scale).float().mean() > 0.999


@pytest.mark.parametrize(("device", "backend"), BACKENDS)
@pytest.mark.parametrize("form", FUSED)
def test_fused_forms_do_not_lose_a_nan(device, backend, form):
    x, other = fused_inputs(form, 32, torch.float32, device)
    with torch.no_grad():
        x[0, 0, 3] = nan
    y = FUSED[form][0](x, other, 0.5, backend=backend)
    assert y[0, 0, 3].isnan()
    y.sum().backward()
    assert not y[1].isnan().any()
    if form != "relu":  # its slope is a step
        assert x.grad[0, 0, 3].isnan()


@pytest.mark.parametrize(("device", "backend"), BACKENDS)
def test_rescale_leaves_a_row_without_a_norm_alone(device, backend):
    rows = [[nan, 1.0, 2.0, 3.0], [inf, 1.0, 2.0, 3.0], [0.0, 0.0, 0.0, 0.0]]
    x = torch.tensor(rows, device=device, requires_grad=True)
    y = topk_sparsify(x, 0.5, rescale="l2", backend=backend)
    assert torch.equal(y.nan_to_num(7), topk_sparsify(x, 0.5, backend=backend).nan_to_num(7))
    upstream = torch.arange(12.0, device=device).view(3, 4)
    assert torch.equal(torch.autograd.grad(y, x, upstream)[0], upstream)


@pytest.mark.parametrize(("device", "backend"), BACKENDS)
@pytest.mark.parametrize(("unit_offset", "dtype"), [(False, torch.float32), (True, torch.bfloat16)])
def test_a_wider_gain_widens_the_norm_unless_it_is_an_offset(device, backend, unit_offset, dtype):
    x, gain = fused_inputs("rms_norm", 64, torch.float32, device)
    y = rms_norm_sparsify(x.bfloat16(), gain, 1e-5, 1e-9, backend=backend, unit_offset=unit_offset)
    expected = rms_norm(x.bfloat16(), gain, 1e-5, unit_offset)
    assert y.dtype == expected.dtype == dtype
    assert_close(y.detach().bfloat16(), expected.detach().bfloat16())  # in between, the norm was rounded to bf16
    kept = rms_norm_sparsify(x.bfloat16(), gain, 1e-5, 0.5, compact=True, unit_offset=unit_offset)
    assert kept.values.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("norm", [LlamaRMSNorm, Gemma3RMSNorm])
def test_the_dense_norms_bit_for_bit(norm, dtype):
    generator = torch.Generator().manual_seed(0)
    norm = norm(96, eps=1e-5).to(dtype)
    torch.nn.init.normal_(norm.weight, generator=generator)
    x = torch.randn(5, 96, generator=generator).to(dtype)
    assert torch.equal(rms_norm(x, norm.weight, 1e-5, unit_offset=type(norm) is Gemma3RMSNorm), norm(x))


@pytest.mark.parametrize(("device", "backend"), [case for case in BACKENDS if case.values[1] == "triton"])
@pytest.mark.parametrize("form", ["rms_norm", "silu"])
def test_fused_forms_save_their_inputs_and_no_more(device, backend, form):
    inputs = fused_inputs(form, 64, torch.bfloat16, device)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        FUSED[form][0](*inputs, 0.5, backend=backend)
    per_token = [t for t in saved if t.data_ptr() not in {each.data_ptr() for each in inputs}]
    assert sum(t.numel() for t in per_token) <= 15  # a number a token: the norm's


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("features", [1, 2, 3, 1000, 4097, 5120, 8192, 65536])  # 2, 4, 16, 32 warps share a row
@pytest.mark.parametrize(("device", "backend"), BACKENDS)
def test_feature_dimensions(device, backend, features, dtype):
    x = torch.randn(2, features, device=device).to(dtype)
    y = topk_sparsify(x, 0.5, backend=backend)
    assert (y != 0).sum(-1).tolist() == [kept_features(features, 0.5)] * 2
    assert torch.equal(y, topk_sparsify(x, 0.5, backend="reference"))


@pytest.mark.parametrize(("device", "backend"), [case for case in BACKENDS if case.values[1] != "reference"])
@pytest.mark.parametrize("value", [1.0, float("nan")])
def test_long_rows_of_equals(device, backend, value):
    """As many as a count in half of an integer can be."""
    x = torch.full((1, 32768), value, device=device, dtype=torch.bfloat16)
    assert (topk_sparsify(x, 0.5, backend=backend) != 0).nonzero()[:, 1].tolist() == list(range(16384))
    kept = topk_sparsify(x, 0.5, backend=backend if backend in SURVIVORS else None, compact=True)
    assert kept.indices.sort().values.tolist() == [list(range(16384))]


def test_a_forked_process_selects_too():
    run_python(
        """
import os, torch
from qsparse_hf import topk_sparsify
x = torch.randn(64, 64)
expected = topk_sparsify(x, 0.5)
child = os.fork()
if child == 0:
    os._exit(0 if torch.equal(topk_sparsify(x, 0.5), expected) else 7)
assert os.waitpid(child, 0)[1] == 0
"""
    )


def test_what_is_exported_needs_no_package():
    class Block(torch.nn.Module):
        def forward(self, x):
            return topk_sparsify(x, 0.5)

    program = torch.export.export(Block(), (torch.randn(2, 64),))
    assert not any("qsparse" in str(node.target) for node in program.graph.nodes)


def test_with_another_default_device():
    x, weight = torch.randn(1, 64), torch.randn(64, 32)
    torch.set_default_device("meta")
    try:
        assert topk_sparsify(x, 0.5).device.type == "cpu"
        assert sparse_linear(topk_sparsify(x, 0.5, compact=True), weight).device.type == "cpu"
    finally:
        torch.set_default_device(None)


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


@pytest.mark.parametrize(("device", "backend"), [case for case in BACKENDS if case.values[1] != "reference"])
def test_compiles_to_one_graph(device, backend):
    def function(x):
        y = rms_norm_sparsify(x * 2, x[0], 1e-5, 0.5, backend=backend)
        y = glu_sparsify(y + x, x, "silu", 0.5, 8, backend=backend)
        return topk_sparsify(y + x, 0.5, None, "l2", backend=backend).sin()

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
        (
            {"backend": "triton", "x": torch.randn(2, 8).double()},
            ValueError,
            r"'triton' cannot run here.*torch.float64",
        ),
        ({"backend": "triton", "x": torch.randn(2, 65537)}, ValueError, "up to 65536 features.* has 65537"),
        ({"x": torch.arange(8)}, TypeError, "torch.int64"),
        ({"x": [1.0, 2.0]}, TypeError, "x must be a tensor of .* got list"),
        ({"x": torch.tensor(1.0)}, ValueError, "last dimension"),
        ({"x": torch.empty(3, 0)}, ValueError, "last dimension"),
    ],
)
def test_bad_arguments_are_named(arguments, error, said):
    with pytest.raises(error, match=said):
        topk_sparsify(**{"x": torch.randn(2, 8), "sparsity": 0.5} | arguments)


def test_bad_arguments_of_the_fused_forms_are_named():
    x = torch.randn(2, 8)
    for activation in ("tanh", ["silu"], torch.nn.SiLU()):
        with pytest.raises(ValueError, match=r"activation must be the name of one of 'silu'.*got"):
            glu_sparsify(x, x, activation, 0.5)
    with pytest.raises(
        ValueError, match=r"must be alike, got torch.float32 \(2, 8\) on cpu and torch.float32 \(1, 8\)"
    ):
        glu_sparsify(x, x[:1], "silu", 0.5)
    with pytest.raises(ValueError, match="alike"):
        glu_sparsify(x, x.to("meta"), "silu", 0.5)
    with pytest.raises(ValueError, match=r"got 1\.5"):
        rms_norm_sparsify(x, x[0], 1e-5, 1.5)
    for weight in (torch.ones(4), torch.ones(1), torch.ones(16)[:9], x, x[0].to("meta")):
        with pytest.raises(ValueError, match=r"weight must have shape \(8,\) on cpu, got"):
            rms_norm_sparsify(x, weight, 1e-5, 0.5)
    with pytest.raises(TypeError, match=r"weight must be a tensor of .* got torch.int64"):
        rms_norm_sparsify(x, x[0].long(), 1e-5, 0.5)
    for eps in (None, -1e-5, nan):
        with pytest.raises(ValueError, match="eps must be a number >= 0, got"):
            rms_norm_sparsify(x, x[0], eps, 0.5)
    with pytest.raises(ValueError, match=r"'triton' cannot run here.*torch.float64"):
        rms_norm_sparsify(x, x[0].double(), 1e-5, 0.5, backend="triton")


@pytest.mark.parametrize(("device", "backend"), BACKENDS)
@pytest.mark.parametrize("form", ["topk", "rms_norm", "silu"])
@pytest.mark.parametrize("rescale", ["none", "l2"])
def test_gradients_of_each_row_alone(device, backend, form, rescale):
    """`torch.vmap(torch.func.grad(...))`, by which gradients of single samples are computed."""
    generator = torch.Generator().manual_seed(0)
    x, other = (torch.randn(4, 3, 32, generator=generator).to(device) for _ in range(2))
    if form == "rms_norm":
        other = other[0, 0]

    def loss(x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        inputs = (x,) if form == "topk" else (x, other)
        function = topk_sparsify if form == "topk" else FUSED[form][0]
        return function(*inputs, 0.5, 16, rescale, backend=backend).pow(3).sum()

    gradient = torch.func.grad(loss, argnums=0 if form == "topk" else (0, 1))
    if backend == "triton":
        with pytest.raises(ValueError, match=r"'triton' cannot run here: transforms of torch.func do not reach"):
            gradient(x[0], other if form == "rms_norm" else other[0])
        backend = None  # another one takes over unasked
    together = torch.vmap(gradient, in_dims=(0, None if form == "rms_norm" else 0))(x, other)
    alone = [gradient(x[i], other if form == "rms_norm" else other[i]) for i in range(4)]
    if form == "topk":
        together, alone = [together], [[each] for each in alone]
    for each, expected in zip(together, zip(*alone, strict=True), strict=True):
        assert_close(each, torch.stack(expected))


COMPILE = """
import os
os.environ.pop("TRITON_INTERPRET")
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from qsparse_hf.kernels.sparsify_triton import SparsifyTile, sparsify_kernel
names = sparsify_kernel.arg_names
widest = 0
for features, block, dtype, bits in [(11008, None, "bf16", 16), (4080, 17, "bf16", 16), (4096, 32, "fp32", 32)]:
    tile = SparsifyTile.of(features, block, False, bits)
    constants = {"other_ptr": None, "D": tile.features, "UNIT": tile.unit, "FIELDS": tile.fields, "TOKENS": tile.tokens,
        "UNITS": tile.units, "WORDS": tile.words, "BITS": tile.bits_per_count, "PRODUCER": "none", "QUANTIZE": True,
        "EPILOGUE": "none"}
    types = {"x_ptr": f"*{dtype}", "y_ptr": f"*{dtype}", "rstd_ptr": "*fp32", "norm_ptr": "*fp32", "tokens": "i32",
        "keep": "i32", "eps": "fp32"}
    source = ASTSource(sparsify_kernel, {name: types.get(name, "constexpr") for name in names},
        {(names.index(name),): value for name, value in constants.items()})
    kernel = triton.compile(source, target=GPUTarget("cuda", 80, 32), options={"num_warps": tile.warps})
    widest = max(widest, kernel.metadata.shared)
print(widest)
"""


def test_the_kernels_compile_within_the_shared_memory_of_every_gpu():
    """48 KiB is what a program may use unasked; compiling needs no GPU."""
    assert int(run_python(COMPILE).stdout) <= 48 * 1024


def test_kernels_that_were_asked_for_and_cannot_run_say_why():
    code = "import torch, qsparse_hf; qsparse_hf.topk_sparsify(torch.randn(2, 8), 0.5, backend='triton')"
    run = run_python(code, check=False, TRITON_INTERPRET="0", CUDA_VISIBLE_DEVICES="")
    assert "backend 'triton' cannot run here: its kernels need a GPU" in run.stderr
    run = run_python(f"import sys; sys.modules['triton'] = None; {code}", check=False)
    assert "backend 'triton' cannot run here: the package triton is not installed" in run.stderr


def test_passing_over_the_kernels_is_said_once(caplog, monkeypatch):
    monkeypatch.setattr("qsparse_hf.modeling.backend._said", set())
    with caplog.at_level(logging.INFO, "qsparse_hf"):
        for _ in range(2):
            topk_sparsify(torch.randn(2, 8), 0.5)
    assert [record.message for record in caplog.records] == [
        "backend 'triton' is passed over: its kernels are for GPUs, and the input is on cpu"
    ]
