"""Ternary weights and int8 activations: worked cases, gradients, packing, and the layer that holds packed weights."""

import copy
import pickle

import pytest
import torch
from conftest import assert_close, make, sparse_config
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from torch import nn

from qsparse_hf.modeling.bitnet import (
    LEAST_SCALE,
    PackedLinear,
    TernaryLinear,
    holds_illegal_code,
    pack,
    quantize_activations,
    quantize_weight,
    ternary,
    unpack,
)


def test_weights_of_a_worked_case():
    """mean|W| is 0.775; over it W is 0.645, -0.645, 0.129 and -2.58."""
    weight = torch.tensor([[0.5, -0.5], [0.1, -2.0]])
    codes, alpha = ternary(weight)
    assert alpha.item() == pytest.approx(0.775)
    assert codes.tolist() == [[1, -1], [0, -1]]
    assert torch.equal(quantize_weight(weight), codes * alpha)
    halfway = torch.tensor([[0.6375, -0.6375], [0.05, -1.3875]])
    assert_close(quantize_weight(weight, 0.5), halfway)
    assert torch.equal(quantize_weight(weight, 0), weight)


def test_a_code_at_half_is_rounded_to_the_even_one():
    """mean|W| is 1, and half of it is as near to 0 as to 1."""
    assert ternary(torch.tensor([0.5, -0.5, 1.5, 1.5]))[0].tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_weights_of_zeros_stay_zeros(dtype):
    codes, alpha = ternary(torch.zeros(4, 3, dtype=dtype))
    assert not codes.any()
    assert alpha.item() == pytest.approx(LEAST_SCALE)
    assert torch.equal(quantize_weight(torch.zeros(4, 3, dtype=dtype)), torch.zeros(4, 3, dtype=dtype))


def test_activations_of_a_worked_case():
    """127 x over the largest of a token: 127, -63.5, 31.75 and 0, then 127 alone; a token of zeros stays one."""
    x = torch.tensor([[1.0, -0.5, 0.25, 0.0], [0.0, 0.0, -3.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    levels = torch.tensor([[127, -64, 32, 0], [0, 0, -127, 0], [0, 0, 0, 0]])
    assert_close(quantize_activations(x), levels * torch.tensor([[1.0], [3.0], [0.0]]) / 127)


@pytest.mark.parametrize("shape", [(4,), (3, 4), (2, 3, 4)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_activations_are_rounded_token_by_token(dtype, shape):
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(dtype)
    step = x.double().abs().amax(-1, keepdim=True) / 127
    y = quantize_activations(x)
    assert y.dtype == dtype
    assert_close(y, ((x.double() / step).round() * step).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_gradients_pass_both_estimators_as_they_are(dtype):
    """Of a product of rounded activations and ternary weights: what the quantized factors say, in float64."""
    generator = torch.Generator().manual_seed(0)
    x, weight, upstream = (
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((2, 5, 12), (8, 12), (2, 5, 8))
    )
    linear = nn.Linear(12, 8, dtype=dtype)
    linear.weight.data.copy_(weight)
    linear.__class__ = TernaryLinear
    inputs = x.to(dtype).requires_grad_()
    linear(quantize_activations(inputs)).backward(upstream.to(dtype))

    step = x.abs().amax(-1, keepdim=True) / 127
    rounded = (x / step).round() * step
    alpha = weight.abs().mean()
    quantized = (weight / alpha).round().clamp(-1, 1) * alpha
    assert_close(inputs.grad, (upstream @ quantized).to(dtype))
    assert_close(linear.weight.grad, (upstream.flatten(0, 1).T @ rounded.flatten(0, 1)).to(dtype))
    assert_close(linear.bias.grad, upstream.sum((0, 1)).to(dtype))


def test_packed_bits_of_a_worked_case():
    """Row r of the packed weight has rows r, r + 2, r + 4 and r + 6, from the lowest bits up."""
    codes = torch.tensor([[-1], [0], [0], [1], [1], [-1], [1], [0]])
    assert pack(codes).tolist() == [[0b10_10_01_00], [0b01_00_10_01]]
    assert pack(codes).dtype == torch.uint8


matrices = arrays.arrays(
    "int8", st.tuples(st.integers(1, 9).map(lambda n: 4 * n), st.integers(1, 17)), elements=st.integers(-1, 1)
)


@settings(deadline=None, database=None)
@given(matrices, st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.int8]))
def test_any_codes_come_back_from_packing(codes, dtype):
    codes = torch.from_numpy(codes).to(dtype)
    before = codes.clone()
    packed = pack(codes)
    assert torch.equal(codes, before)
    assert packed.shape == (len(codes) // 4, codes.shape[1])
    assert not holds_illegal_code(packed)
    assert torch.equal(unpack(packed, dtype), codes)


@settings(deadline=None, database=None)
@given(arrays.arrays("uint8", (3, 5)))
def test_illegal_codes_are_found(packed):
    by_hand = any(byte >> shift & 3 == 3 for byte in packed.flatten().tolist() for shift in (0, 2, 4, 6))
    assert holds_illegal_code(torch.from_numpy(packed)) == by_hand


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("divides", [False, True])
def test_a_packed_linear_is_the_ternary_one(bias, divides):
    torch.manual_seed(0)
    linear = nn.Linear(12, 8, bias=bias)
    codes, alpha = ternary(linear.weight)
    packed = PackedLinear(12, 8, bias, divides)
    state = {"weight": pack(codes), "weight_scale": (1 / alpha if divides else alpha).reshape(1)}
    packed.load_state_dict(state | ({"bias": linear.bias.data} if bias else {}))
    linear.__class__ = TernaryLinear
    x = torch.randn(2, 3, 12)
    expected = linear(x).detach()
    assert_close(packed(x), expected)
    for copied in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
        assert torch.equal(copied(x), packed(x))
    half = copy.deepcopy(packed).to(torch.bfloat16)
    assert (half.weight.dtype, half.weight_scale.dtype) == (torch.uint8, torch.float32)
    assert torch.equal(half.weight_scale, packed.weight_scale)
    assert_close(half(x.bfloat16()), expected.bfloat16())
    assert torch.equal(half.float().weight_scale, packed.weight_scale)


@pytest.mark.parametrize("rows", [1, 6])
def test_rows_that_do_not_fill_bytes_are_refused(rows):
    with pytest.raises(ValueError, match=f"multiple of four, got {rows}"):
        pack(torch.zeros(rows, 2))
    with pytest.raises(ValueError, match=f"multiple of four, got {rows}"):
        PackedLinear(2, rows, False, True)


def test_a_ramp_leads_from_full_precision_to_ternary_weights(tokens):
    full, quantized = (
        make(sparse_config("llama", sparsity=0)),
        make(sparse_config("llama", sparsity=0, weight_quantization="ternary")),
    )
    at_once = quantized(tokens).logits
    quantized.scale_quantization(0)
    assert torch.equal(quantized(tokens).logits, full(tokens).logits)
    quantized.scale_quantization(0.5)
    assert not torch.allclose(quantized(tokens).logits, at_once)
    quantized.scale_quantization(1)
    assert torch.equal(quantized(tokens).logits, at_once)
    with pytest.raises(ValueError, match="between 0 and 1, got 2"):
        quantized.scale_quantization(2)


def test_a_packed_linear_does_not_overflow_where_a_plain_one_does_not():
    """4,096 codes of 1 times 20 are beyond fp16, and times a scale of 1 / 50 they are not."""
    linear = PackedLinear(4096, 4, bias=False, divides=True)
    linear.weight.copy_(pack(torch.ones(4, 4096)))
    linear.weight_scale.fill_(50.0)
    y = linear(torch.full((1, 4096), 20.0, dtype=torch.float16))
    assert y.tolist() == [[pytest.approx(1638.4, rel=1e-3)] * 4]
