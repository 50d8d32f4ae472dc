"""Fused Triton kernels of the top-K operator: select, and compute what is selected from, in one pass over the tensor.

The selection is a radix search over bit planes. A word stands for 32 features: their bits are transposed, so that one
word holds the highest magnitude bit of all 32, the next word the second, and so on. Counting the candidates that have a
bit is then a population count, and dropping those without it one logical operation for 32 features. Ties are broken by
going on with the bits of the index, zeros first. Nothing is sorted, no threshold is guessed, and the cost does not
depend on the data.

Shapes: D features of a token, M features of a block, K kept. A tile is `[words]` = tokens x units x words of a unit,
where a unit is what one selection ranks: a token, a block, or for M < 32 a word with `fields` = 32 / M blocks.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("the fused kernels need the package triton") from error


@triton.jit
def _popcount(x):
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return ((x * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def _transpose_bits(words, SIZE: tl.constexpr):
    """`[W, 2 * SIZE]` words, whose halves of `2 * SIZE` bits are the rows of bit matrices, as a tuple of columns.

    Swaps off-diagonal squares of SIZE bits, then goes on inside the squares (Hacker's Delight, 7-3).
    """
    W: tl.constexpr = words.shape[0]
    LOW: tl.constexpr = ((1 << SIZE) - 1) * (0xFFFFFFFF // ((1 << 2 * SIZE) - 1))
    # One three-input instruction merges by a mask unless the compiler sees a constant. program_id(1) is zero.
    low = tl.full([1, 1], LOW, tl.uint32) + tl.program_id(1).to(tl.uint32)
    upper, lower = tl.split(tl.permute(tl.reshape(words, [W, 2, SIZE]), 0, 2, 1))
    left, right = lower << SIZE, upper >> SIZE
    upper, lower = left ^ ((left ^ upper) & low), lower ^ ((lower ^ right) & low)
    if SIZE == 1:
        return (tl.reshape(upper, [W]), tl.reshape(lower, [W]))
    else:
        return _transpose_bits(upper, SIZE // 2) + _transpose_bits(lower, SIZE // 2)


@triton.jit
def _join(parts, FIRST: tl.constexpr, COUNT: tl.constexpr):
    """COUNT tensors of a tuple, from FIRST on, with an axis more for each bit of their number, the lowest bit first."""
    if COUNT == 1:
        return parts[FIRST]
    else:
        return tl.join(_join(parts, FIRST, COUNT // 2), _join(parts, FIRST + COUNT // 2, COUNT // 2))


@triton.jit
def _matrix(chunks):
    """`32 / C` chunks `[W, C]` of floats, which are `W` words' features, as bits: `[W, 16]` pairs or `[W, 32]` singles.

    Pair `m` has features `2 m` and `2 m + 1` in its halves; single features come with the even ones first. Transposed,
    either has feature `k` at bit `k // 2 + 16 * (k % 2)`.
    """
    W: tl.constexpr = chunks[0].shape[0]
    if chunks[0].dtype.primitive_bitwidth == 16:
        matrix = tl.reshape(_join(chunks, 0, 4), [W, 4, 2, 2, 2]).to(tl.uint16, bitcast=True)
        even, odd = tl.split(tl.permute(matrix, 0, 4, 3, 1, 2))  # W, the chunk's bits, pair
        return tl.reshape(even.to(tl.uint32) | (odd.to(tl.uint32) << 16), [W, 16])
    else:
        matrix = tl.reshape(_join(chunks, 0, 8), [W, 2, 2, 2, 2, 2]).to(tl.uint32, bitcast=True)
        return tl.reshape(tl.permute(matrix, 0, 2, 5, 4, 3, 1), [W, 32])


@triton.jit
def _split(matrix):
    """`[W, C, COUNT]` as a tuple of COUNT tensors `[W, C]`."""
    W: tl.constexpr = matrix.shape[0]
    C: tl.constexpr = matrix.shape[1]
    COUNT: tl.constexpr = matrix.shape[2]
    low, high = tl.split(tl.permute(tl.reshape(matrix, [W, C, 2, COUNT // 2]), 0, 1, 3, 2))
    if COUNT == 2:
        return (tl.reshape(low, [W, C]), tl.reshape(high, [W, C]))
    else:
        return _split(low) + _split(high)


@triton.jit
def _survivors(matrix, kept, DTYPE: tl.constexpr):
    """The chunks that `_matrix` was given, zero where a feature is not kept."""
    W: tl.constexpr = matrix.shape[0]
    if DTYPE.primitive_bitwidth == 16:
        bits = (kept[:, None] >> tl.arange(0, 16).to(tl.uint32)[None, :]) & 0x00010001
        matrix = matrix & (bits * 0xFFFF)
        pairs = tl.join(matrix.to(tl.uint16), (matrix >> 16).to(tl.uint16))  # W, pair, odd
        chunks = tl.permute(tl.reshape(pairs, [W, 4, 8]), 0, 2, 1)
    else:
        bits = (kept[:, None] >> tl.arange(0, 32).to(tl.uint32)[None, :]) & 1
        matrix = matrix & (bits * 0xFFFFFFFF)
        chunks = tl.reshape(tl.permute(tl.reshape(matrix, [W, 2, 8, 2]), 0, 3, 1, 2), [W, 4, 8])
    return _split(chunks.to(DTYPE, bitcast=True))


@triton.jit
def _narrow(candidates, kept, wanted, plane, count):
    """One step of the radix search: the next candidates, either those with this bit or those without it."""
    few = (count - wanted) >> 31  # all ones where those with the bit are too few: then all of them are kept
    bits = few.to(tl.uint32, bitcast=True)
    kept = kept | (candidates & plane & bits)
    return candidates & (plane ^ bits), kept, wanted - (count & few)


@triton.jit
def _order(STEP: tl.constexpr):
    """The bits of a word whose features' numbers have a zero at their highest bit, the next, and so on."""
    ORDER: tl.constexpr = (0x00FF00FF, 0x0F0F0F0F, 0x33333333, 0x55555555, 0x0000FFFF)
    return ORDER[STEP]


@triton.jit
def _select(planes, valid, keep, MANTISSA: tl.constexpr, C: tl.constexpr):
    """The `keep` largest of each unit as words of bits, `[units, words, fields]` like `valid`; all if it has fewer."""
    SHAPE: tl.constexpr = [valid.shape[0], valid.shape[1], 1]
    MAGNITUDE: tl.constexpr = len(planes) - 1
    nan = planes[0]
    for bit in tl.static_range(1, MANTISSA):
        nan = nan | planes[bit]
    for bit in tl.static_range(MANTISSA, MAGNITUDE):
        nan = nan & planes[bit]

    candidates = valid
    kept = tl.zeros(valid.shape, tl.uint32)
    wanted = tl.zeros([valid.shape[0], 1, valid.shape[2]], tl.int32) + keep
    for bit in tl.static_range(MAGNITUDE - 1, -1, -1):
        plane = planes[bit]
        if bit == 0:
            plane = plane | nan  # every NaN becomes the first value above infinity
        elif bit < MANTISSA:
            plane = plane & (nan ^ 0xFFFFFFFF)
        plane = tl.reshape(plane, SHAPE)
        count = tl.sum(_popcount(candidates & plane), axis=1, keep_dims=True)
        candidates, kept, wanted = _narrow(candidates, kept, wanted, plane, count)

    # What is left is equal: the first by index. An index is, highest first: chunk, word, place in the chunk.
    CHUNK_STEPS: tl.constexpr = 2 if C == 8 else 3
    for step in tl.static_range(CHUNK_STEPS):
        plane = tl.full(SHAPE, _order(step), tl.uint32)
        count = tl.sum(_popcount(candidates & plane), axis=1, keep_dims=True)
        candidates, kept, wanted = _narrow(candidates, kept, wanted, plane, count)
    if valid.shape[1] > 1:
        count = _popcount(candidates)
        wanted = wanted - (tl.cumsum(count, axis=1) - count)
    for step in tl.static_range(CHUNK_STEPS, 5):
        plane = tl.full(SHAPE, _order(step), tl.uint32)
        candidates, kept, wanted = _narrow(candidates, kept, wanted, plane, _popcount(candidates & plane))
    return tl.where(wanted > 0, kept | candidates, kept)


@triton.jit
def _places(j: tl.constexpr, C: tl.constexpr):
    """Where the features of chunk `j` stand in a plane's word, `[1, C]`."""
    k = C * j + tl.arange(0, C)
    return (k // 2 + 16 * (k % 2)).to(tl.uint32)[None, :]


@triton.jit
def _token_sum(x, TOKENS: tl.constexpr):
    """`[W]` summed over each token's words, and handed back to all of them."""
    W: tl.constexpr = x.shape[0]
    total = tl.sum(tl.reshape(x, [TOKENS, W // TOKENS]), axis=1, keep_dims=True)
    return tl.reshape(tl.broadcast_to(total, [TOKENS, W // TOKENS]), [W])


@triton.jit
def _token_max(x, TOKENS: tl.constexpr):
    """As `_token_sum`, the largest."""
    W: tl.constexpr = x.shape[0]
    largest = tl.max(tl.reshape(x, [TOKENS, W // TOKENS]), axis=1, keep_dims=True)
    return tl.reshape(tl.broadcast_to(largest, [TOKENS, W // TOKENS]), [W])


@triton.jit
def _activate(x, ACTIVATION: tl.constexpr):
    """The activation of fp32 values and its derivative."""
    if ACTIVATION == "silu":
        inverse = 1 + tl.exp(-x)
        return x / inverse, (1 + x * (1 - 1 / inverse)) / inverse
    elif ACTIVATION == "relu":
        return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL), tl.where(x <= 0, 0.0, 1.0)
    elif ACTIVATION == "relu2":
        positive = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
        return positive * positive, 2 * positive
    elif ACTIVATION == "gelu":
        gate = 0.5 * (1 + tl.erf(x * 0.7071067811865476))
        return x * gate, gate + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    else:
        tl.static_assert(ACTIVATION == "gelu_pytorch_tanh")
        gate = 1 / (1 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))  # (1 + tanh(u)) / 2 = sigmoid(2 u)
        return x * gate, gate + x * gate * (1 - gate) * 1.5957691216057308 * (1 + 3 * 0.044715 * x * x)


@triton.jit
def _sparsify_kernel(
    x_ptr,
    other_ptr,
    y_ptr,
    rstd_ptr,
    norm_ptr,
    tokens,
    keep,
    eps,
    D: tl.constexpr,
    UNIT: tl.constexpr,
    FIELDS: tl.constexpr,
    TOKENS: tl.constexpr,
    UNITS: tl.constexpr,
    WORDS: tl.constexpr,
    PRODUCER: tl.constexpr,
    EPILOGUE: tl.constexpr,
):
    """One tile: produce, select, finish, store.

    The producer is "none", "rms_norm" or the activation of a GLU. The epilogue is "none", "l2" or "mask"; it sees all
    survivors of a token, as a quantization would want to.
    """
    DTYPE: tl.constexpr = y_ptr.dtype.element_ty
    VALUE: tl.constexpr = x_ptr.dtype.element_ty if EPILOGUE == "mask" else DTYPE
    MANTISSA: tl.constexpr = 23 if VALUE == tl.float32 else (10 if VALUE == tl.float16 else 7)
    W: tl.constexpr = TOKENS * UNITS * WORDS
    word = tl.arange(0, W)
    token = tl.program_id(0).to(tl.int64) * TOKENS + word // (UNITS * WORDS)
    unit = word // WORDS % UNITS
    start = token * D + unit * UNIT

    # Chunk j of a unit's word w is C features from (j * Q + w) * C on: a thread reads 16 bytes, its neighbour reads on.
    C: tl.constexpr = 128 // VALUE.primitive_bitwidth
    Q: tl.constexpr = (UNIT + 31) // 32
    inside = (token < tokens) & (word % WORDS < Q) & (unit * UNIT < D)
    first_of_token = (word % (UNITS * WORDS) == 0) & (token < tokens)
    WHOLE: tl.constexpr = UNIT % 32 == 0 and D % UNIT == 0
    columns = ()
    masks = ()
    values = ()
    for j in tl.static_range(32 // C):
        column = (j * Q + word % WORDS)[:, None] * C + tl.arange(0, C)[None, :]
        if WHOLE:
            mask = tl.broadcast_to(inside[:, None], [W, C])
        else:
            mask = inside[:, None] & (column < UNIT) & (unit[:, None] * UNIT + column < D)
        columns = columns + (column,)
        masks = masks + (mask,)
        values = values + (tl.load(x_ptr + start[:, None] + column, mask=mask, other=0.0),)

    if PRODUCER == "rms_norm":
        squares = tl.zeros([W], tl.float32)
        for j in tl.static_range(32 // C):
            wide = values[j].to(tl.float32)
            squares += tl.sum(wide * wide, axis=1)
        rstd = tl.rsqrt(_token_sum(squares, TOKENS) / D + eps)
        tl.store(rstd_ptr + token, rstd, mask=first_of_token)
    if PRODUCER != "none":
        produced = ()
        for j in tl.static_range(32 // C):
            if PRODUCER == "rms_norm":
                other = tl.load(other_ptr + unit[:, None] * UNIT + columns[j], mask=masks[j], other=0.0)
                value = (values[j].to(tl.float32) * rstd[:, None]).to(x_ptr.dtype.element_ty)
            else:
                other = tl.load(other_ptr + start[:, None] + columns[j], mask=masks[j], other=0.0)
                value, _ = _activate(values[j].to(tl.float32), PRODUCER)
                value = value.to(DTYPE)
            produced = produced + ((value.to(tl.float32) * other.to(tl.float32)).to(DTYPE),)
        values = produced

    if WHOLE:
        valid = tl.where(inside, 0xFFFFFFFF, 0).to(tl.uint32)
    else:
        valid = tl.zeros([W], tl.uint32)
        for j in tl.static_range(32 // C):
            valid = valid | tl.sum(masks[j].to(tl.uint32) << _places(j, C), axis=1).to(tl.uint32)
    # A field is the bits of M neighbouring features, in both halves of the word.
    FIELD: tl.constexpr = ((1 << (16 // FIELDS)) - 1) * 0x00010001
    fields = tl.full([FIELDS], FIELD, tl.uint32) << (tl.arange(0, FIELDS) * (16 // FIELDS)).to(tl.uint32)
    valid = tl.reshape(valid, [TOKENS * UNITS, WORDS, 1]) & fields[None, None, :]
    matrix = _matrix(values)
    planes = _transpose_bits(matrix, VALUE.primitive_bitwidth // 2)
    kept = _select(planes, valid, keep, MANTISSA, C)
    kept = tl.reshape(tl.sum(kept.to(tl.int32, bitcast=True), axis=2), [W]).to(tl.uint32, bitcast=True)

    if EPILOGUE != "mask":
        values = _survivors(matrix, kept, DTYPE)
    if EPILOGUE == "l2":
        largest = tl.zeros([W], tl.float32)
        for j in tl.static_range(32 // C):
            largest = tl.maximum(largest, tl.max(tl.abs(values[j].to(tl.float32)), axis=1))
        # With a power of two that brings the largest near 1, no square over- or underflows.
        exponent = (_token_max(largest, TOKENS).to(tl.int32, bitcast=True) >> 23) & 0xFF
        scale = (tl.minimum(tl.maximum(254 - exponent, 1), 253) << 23).to(tl.float32, bitcast=True)
        squares = tl.zeros([W], tl.float32)
        for j in tl.static_range(32 // C):
            wide = values[j].to(tl.float32) * scale[:, None]
            squares += tl.sum(wide * wide, axis=1)
        norm = tl.sqrt(_token_sum(squares, TOKENS))
        known = (norm > 0) & (norm < float("inf"))
        scale = tl.where(known, scale, 1.0)
        inverse = tl.where(known, 1 / norm, 1.0)
        tl.store(norm_ptr + token, tl.where(known, norm / scale, 0.0), mask=first_of_token)
    for j in tl.static_range(32 // C):
        if EPILOGUE == "mask":
            value = ((kept[:, None] >> _places(j, C)) & 1) != 0
        elif EPILOGUE == "l2":
            value = (values[j].to(tl.float32) * scale[:, None] * inverse[:, None]).to(DTYPE)
        else:
            value = values[j]
        tl.store(y_ptr + start[:, None] + columns[j], value, mask=masks[j])


@triton.jit
def _glu_backward_kernel(
    grad_ptr, gate_ptr, up_ptr, grad_gate_ptr, grad_up_ptr, elements, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr
):
    """Gradients of `activation(gate) * up`; the mask is the identity (eq. 13)."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < elements
    grad = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + at, mask=inside, other=0.0).to(tl.float32)
    activated, slope = _activate(tl.load(gate_ptr + at, mask=inside, other=0.0).to(tl.float32), ACTIVATION)
    tl.store(grad_gate_ptr + at, (grad * up * slope).to(grad_gate_ptr.dtype.element_ty), mask=inside)
    tl.store(grad_up_ptr + at, (grad * activated).to(grad_up_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _rescale_backward_kernel(grad_ptr, y_ptr, norm_ptr, grad_x_ptr, D: tl.constexpr, BLOCK: tl.constexpr):
    """Gradient of `y = s / |s|` by `s`: `(g - y (y . g)) / |s|`; a token without a norm was left as it is."""
    token = tl.program_id(0).to(tl.int64)
    feature = tl.arange(0, BLOCK)
    inside = feature < D
    at = token * D + feature
    grad = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32)
    y = tl.load(y_ptr + at, mask=inside, other=0.0).to(tl.float32)
    norm = tl.load(norm_ptr + token)
    projected = (grad - y * tl.sum(grad * y, axis=0)) / tl.where(norm > 0, norm, 1.0)
    grad = tl.where(norm > 0, projected, grad)
    tl.store(grad_x_ptr + at, grad.to(grad_x_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _rms_norm_backward_kernel(
    grad_ptr,
    x_ptr,
    weight_ptr,
    rstd_ptr,
    grad_x_ptr,
    grad_weight_ptr,
    tokens,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gradients of `weight * x * rstd`: the weight's as one partial sum a program, `[programs, D]` in fp32."""
    feature = tl.arange(0, BLOCK)
    inside = feature < D
    weight = tl.load(weight_ptr + feature, mask=inside, other=0.0).to(tl.float32)
    grad_weight = tl.zeros([BLOCK], tl.float32)
    at = tl.program_id(0).to(tl.int64) * D + feature
    for token in range(tl.program_id(0), tokens, tl.num_programs(0)):
        rstd = tl.load(rstd_ptr + token)
        grad = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32)
        normed = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32) * rstd
        grad_weight += grad * normed
        grad *= weight
        grad = rstd * (grad - normed * (tl.sum(grad * normed, axis=0) / D))
        tl.store(grad_x_ptr + at, grad.to(grad_x_ptr.dtype.element_ty), mask=inside)
        at += tl.num_programs(0) * D
    tl.store(grad_weight_ptr + tl.program_id(0) * D + feature, grad_weight, mask=inside)


@dataclass(frozen=True)
class _Tile:
    """What one program works on: `tokens` x `units` x `words` of 32 features; `fields` blocks share a word."""

    features: int  # of a token, or of a unit where tokens need not be told apart
    unit: int
    fields: int
    tokens: int
    units: int
    words: int
    warps: int

    @classmethod
    def of(cls, features: int, block_size: int | None, whole_tokens: bool, bits: int) -> "_Tile":
        unit = block_size or features
        fields = 1
        if block_size in (2, 4, 8, 16):
            unit, fields = 32, 32 // block_size
        if not whole_tokens and features % unit == 0:
            features = unit
        units = triton.next_power_of_2(triton.cdiv(features, unit))
        words = triton.next_power_of_2(triton.cdiv(unit, 32))
        tokens = 1 if units * words >= 64 else 128 // (units * words)
        # A wide unit gives a thread several words, up to its registers' end: few warps wait for each other in a count.
        words_a_thread = min(max(words // 32, 1), 64 // bits)
        warps = min(tokens * units * words // (32 * words_a_thread), 32)
        return cls(features, unit, fields, tokens, units, words, warps)

    @property
    def registers(self) -> int | None:
        """A cap, where with it one more program fits beside the others and nothing spills: three words a thread."""
        return 128 if triton.cdiv(triton.cdiv(self.unit, 32), 32 * self.warps) == 3 else None


def _launch(
    x: Tensor,
    other: Tensor | None,
    y: Tensor,
    keep: int,
    block_size: int | None,
    producer: str,
    epilogue: str,
    eps: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Run the kernel over `x [..., D]` into `y`; returns `rstd` and `norm`, fp32 `[...]`, empty where not computed."""
    features = x.shape[-1]
    rstd = x.new_empty(x.shape[:-1] if producer == "rms_norm" else 0, dtype=torch.float32)
    norm = x.new_empty(x.shape[:-1] if epilogue == "l2" else 0, dtype=torch.float32)
    if x.numel() == 0:
        return rstd, norm
    value = x if epilogue == "mask" else y
    tile = _Tile.of(features, block_size, producer == "rms_norm" or epilogue == "l2", 8 * value.element_size())
    tokens = x.numel() // tile.features
    options = {"maxnreg": tile.registers} if tile.registers and not torch.version.hip else {}
    with torch.cuda.device_of(x):
        _sparsify_kernel[(triton.cdiv(tokens, tile.tokens),)](
            x,
            other,
            y,
            rstd,
            norm,
            tokens,
            keep,
            eps,
            D=tile.features,
            UNIT=tile.unit,
            FIELDS=tile.fields,
            TOKENS=tile.tokens,
            UNITS=tile.units,
            WORDS=tile.words,
            PRODUCER=producer,
            EPILOGUE=epilogue,
            num_warps=tile.warps,
            **options,
        )
    return rstd, norm


def _row_warps(block: int) -> int:
    """Warps for a row of `block` fp32 values: 16 a thread."""
    return min(max(block // 512, 1), 32)


@torch.library.custom_op("qsparse::topk", mutates_args=())
def _topk(x: Tensor, keep: int, block_size: int | None, rescale: bool) -> tuple[Tensor, Tensor]:
    x = x.contiguous()
    y = torch.empty_like(x)
    _, norm = _launch(x, None, y, keep, block_size, "none", "l2" if rescale else "none")
    return y, norm


@torch.library.custom_op("qsparse::topk_mask", mutates_args=())
def _topk_mask(x: Tensor, keep: int, block_size: int | None) -> Tensor:
    x = x.contiguous()
    mask = torch.empty_like(x, dtype=torch.bool)
    _launch(x, None, mask, keep, block_size, "none", "mask")
    return mask


@torch.library.custom_op("qsparse::rms_norm_topk", mutates_args=())
def _rms_norm_topk(
    x: Tensor, weight: Tensor, eps: float, keep: int, block_size: int | None, rescale: bool
) -> tuple[Tensor, Tensor, Tensor]:
    x = x.contiguous()
    y = torch.empty_like(x, dtype=torch.promote_types(x.dtype, weight.dtype))
    rstd, norm = _launch(x, weight.contiguous(), y, keep, block_size, "rms_norm", "l2" if rescale else "none", eps)
    return y, rstd, norm


@torch.library.custom_op("qsparse::glu_topk", mutates_args=())
def _glu_topk(
    gate: Tensor, up: Tensor, activation: str, keep: int, block_size: int | None, rescale: bool
) -> tuple[Tensor, Tensor]:
    gate = gate.contiguous()
    y = torch.empty_like(gate)
    _, norm = _launch(gate, up.contiguous(), y, keep, block_size, activation, "l2" if rescale else "none")
    return y, norm


@torch.library.custom_op("qsparse::rescale_backward", mutates_args=())
def _rescale_backward(grad: Tensor, y: Tensor, norm: Tensor) -> Tensor:
    grad_x = torch.empty_like(y)
    features = y.shape[-1]
    block = triton.next_power_of_2(features)
    if y.numel():
        with torch.cuda.device_of(y):
            _rescale_backward_kernel[(y.numel() // features,)](
                grad.contiguous(), y, norm, grad_x, D=features, BLOCK=block, num_warps=_row_warps(block)
            )
    return grad_x


@torch.library.custom_op("qsparse::rms_norm_backward", mutates_args=())
def _rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    x = x.contiguous()
    features = x.shape[-1]
    tokens = x.numel() // features
    # A few programs for each multiprocessor walk over all tokens: few partial sums, and enough loads under way.
    programs = 4 * torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 2
    programs = min(programs, tokens)
    grad_x = torch.empty_like(x)
    grad_weight = x.new_empty(programs, features, dtype=torch.float32)
    block = triton.next_power_of_2(features)
    if programs:
        with torch.cuda.device_of(x):
            _rms_norm_backward_kernel[(programs,)](
                grad.contiguous(),
                x,
                weight.contiguous(),
                rstd,
                grad_x,
                grad_weight,
                tokens,
                D=features,
                BLOCK=block,
                num_warps=_row_warps(block),
            )
    return grad_x, grad_weight.sum(0).to(weight.dtype)


@torch.library.custom_op("qsparse::glu_backward", mutates_args=())
def _glu_backward(grad: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    gate, up = gate.contiguous(), up.contiguous()
    grad_gate, grad_up = torch.empty_like(gate), torch.empty_like(up)
    block = 1024
    if gate.numel():
        with torch.cuda.device_of(gate):
            _glu_backward_kernel[(triton.cdiv(gate.numel(), block),)](
                grad.contiguous(), gate, up, grad_gate, grad_up, gate.numel(), ACTIVATION=activation, BLOCK=block
            )
    return grad_gate, grad_up


def _row_values(x: Tensor, wanted: bool) -> Tensor:
    return x.new_empty(x.shape[:-1] if wanted else 0, dtype=torch.float32)


@_topk.register_fake
def _(x, keep, block_size, rescale):
    return torch.empty_like(x, memory_format=torch.contiguous_format), _row_values(x, rescale)


@_topk_mask.register_fake
def _(x, keep, block_size):
    return torch.empty_like(x, dtype=torch.bool, memory_format=torch.contiguous_format)


@_rms_norm_topk.register_fake
def _(x, weight, eps, keep, block_size, rescale):
    dtype = torch.promote_types(x.dtype, weight.dtype)
    y = torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)
    return y, _row_values(x, True), _row_values(x, rescale)


@_glu_topk.register_fake
def _(gate, up, activation, keep, block_size, rescale):
    return torch.empty_like(gate, memory_format=torch.contiguous_format), _row_values(gate, rescale)


@_rescale_backward.register_fake
def _(grad, y, norm):
    return torch.empty_like(y)


@_rms_norm_backward.register_fake
def _(grad, x, weight, rstd):
    contiguous = torch.contiguous_format
    return torch.empty_like(x, memory_format=contiguous), torch.empty_like(weight, memory_format=contiguous)


@_glu_backward.register_fake
def _(grad, gate, up, activation):
    contiguous = torch.contiguous_format
    return torch.empty_like(gate, memory_format=contiguous), torch.empty_like(up, memory_format=contiguous)


# The straight-through estimator lets gradients pass the selection as if it were not there, so backward needs nothing of
# it; a rescale needs its output, which the projection behind it saves anyway.


def _save_topk(ctx, inputs, output):
    y, norm = output
    ctx.rescale = inputs[-1]
    ctx.save_for_backward(*((y, norm) if ctx.rescale else ()))


def _topk_backward(ctx, grad, _):
    return _rescale_backward(grad, *ctx.saved_tensors) if ctx.rescale else grad, None, None, None


def _save_rms_norm_topk(ctx, inputs, output):
    x, weight, *_, ctx.rescale = inputs
    y, rstd, norm = output
    ctx.save_for_backward(x, weight, rstd, *((y, norm) if ctx.rescale else ()))


def _rms_norm_topk_backward(ctx, grad, *_):
    x, weight, rstd, *rescaled = ctx.saved_tensors
    if ctx.rescale:
        grad = _rescale_backward(grad, *rescaled)
    return *_rms_norm_backward(grad, x, weight, rstd), None, None, None, None


def _save_glu_topk(ctx, inputs, output):
    gate, up, ctx.activation, *_, ctx.rescale = inputs
    ctx.save_for_backward(gate, up, *(output if ctx.rescale else ()))


def _glu_topk_backward(ctx, grad, _):
    gate, up, *rescaled = ctx.saved_tensors
    if ctx.rescale:
        grad = _rescale_backward(grad, *rescaled)
    return *_glu_backward(grad, gate, up, ctx.activation), None, None, None, None


_topk.register_autograd(_topk_backward, setup_context=_save_topk)
_rms_norm_topk.register_autograd(_rms_norm_topk_backward, setup_context=_save_rms_norm_topk)
_glu_topk.register_autograd(_glu_topk_backward, setup_context=_save_glu_topk)


class Kernels:
    """The operator on these kernels."""

    def refuses(self, tensors: Sequence[Tensor], asked: bool) -> str | None:
        x = tensors[0]
        for each in tensors:
            if each.dtype not in (torch.bfloat16, torch.float16, torch.float32):
                return f"its kernels take bf16, fp16 and fp32, and got {each.dtype}"
        if x.shape[-1] > 65536:
            return f"its kernels take up to 65536 features, and x has {x.shape[-1]}"
        if not x.is_cuda and not asked:
            return f"its kernels are for GPUs, and x is on {x.device.type}"
        if not x.is_cuda and isinstance(_sparsify_kernel, triton.JITFunction):
            return (
                "its kernels need a GPU (or, to test them, TRITON_INTERPRET=1 in the environment before they are "
                f"imported), and x is on {x.device.type}"
            )
        return None

    def mask(self, x: Tensor, kept: int, block_size: int | None) -> Tensor:
        return _topk_mask(x, kept, block_size)

    def topk(self, x: Tensor, kept: int, block_size: int | None, rescale: bool) -> Tensor:
        return _topk(x, kept, block_size, rescale)[0]

    def rms_norm_topk(self, x: Tensor, weight: Tensor, eps: float, *settings) -> Tensor:
        return _rms_norm_topk(x, weight, eps, *settings)[0]

    def glu_topk(self, gate: Tensor, up: Tensor, activation: str, *settings) -> Tensor:
        return _glu_topk(gate, up, activation, *settings)[0]
