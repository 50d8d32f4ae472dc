"""Triton kernels of the top-K operator, fused with what produces its input: one pass over the tensor.

The selection is a radix search over bit planes. A word stands for 32 features: their bits are transposed, so that one
word holds the highest magnitude bit of all 32, the next word the second, and so on. Counting the candidates that have a
bit is then a population count, and dropping those without it one logical operation for 32 features. Ties are broken by
going on with the bits of the index, zeros first. Nothing is sorted, no threshold is guessed, and the cost does not
depend on the data.

Shapes: D features of a token, M features of a block, K kept. A tile is `[words]` = tokens x units x words of a unit,
where a unit is what one selection ranks: a token, a block, or for M < 32 a word with `fields` = 32 / M blocks.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
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
def join(parts, FIRST: tl.constexpr, COUNT: tl.constexpr):
    """COUNT tensors of a tuple, from FIRST on, joined along new axes: one a bit of their number, the lowest first."""
    if COUNT == 1:
        return parts[FIRST]
    else:
        return tl.join(join(parts, FIRST, COUNT // 2), join(parts, FIRST + COUNT // 2, COUNT // 2))


@triton.jit
def _matrix(chunks):
    """`32 / C` chunks `[W, C]` of floats, which are `W` words' features, as bits: `[W, 16]` pairs or `[W, 32]` singles.

    Pair `m` has features `2 m` and `2 m + 1` in its halves; single features come with the even ones first. Transposed,
    either has feature `k` at bit `k // 2 + 16 * (k % 2)`.
    """
    W: tl.constexpr = chunks[0].shape[0]
    C: tl.constexpr = chunks[0].shape[1]
    if chunks[0].dtype.primitive_bitwidth == 16:
        if C == 32:
            matrix = tl.reshape(chunks[0], [W, 16, 2])
        else:
            matrix = tl.reshape(join(chunks, 0, 4), [W, 4, 2, 2, 2])
            matrix = tl.permute(matrix, 0, 4, 3, 1, 2)  # W, the chunk's bits, pair
        even, odd = tl.split(matrix.to(tl.uint16, bitcast=True))
        return tl.reshape(even.to(tl.uint32) | (odd.to(tl.uint32) << 16), [W, 16])
    else:
        if C == 32:
            matrix = tl.permute(tl.reshape(chunks[0], [W, 16, 2]), 0, 2, 1)
        else:
            matrix = tl.permute(tl.reshape(join(chunks, 0, 8), [W, 2, 2, 2, 2, 2]), 0, 2, 5, 4, 3, 1)
        return tl.reshape(matrix.to(tl.uint32, bitcast=True), [W, 32])


@triton.jit
def _split(matrix):
    """`[W, C, COUNT]` as a tuple of COUNT tensors `[W, C]`."""
    W: tl.constexpr = matrix.shape[0]
    C: tl.constexpr = matrix.shape[1]
    COUNT: tl.constexpr = matrix.shape[2]
    if COUNT == 1:
        return (tl.reshape(matrix, [W, C]),)
    else:
        low, high = tl.split(tl.permute(tl.reshape(matrix, [W, C, 2, COUNT // 2]), 0, 1, 3, 2))
        return _split(low) + _split(high)


@triton.jit
def _survivors(matrix, kept, DTYPE: tl.constexpr, C: tl.constexpr):
    """The chunks that `_matrix` was given, zero where a feature is not kept."""
    W: tl.constexpr = matrix.shape[0]
    if DTYPE.primitive_bitwidth == 16:
        bits = (kept[:, None] >> tl.arange(0, 16).to(tl.uint32)[None, :]) & 0x00010001
        matrix = matrix & (bits * 0xFFFF)
        pairs = tl.join(matrix.to(tl.uint16), (matrix >> 16).to(tl.uint16))  # W, pair, odd
        chunks = tl.permute(tl.reshape(pairs, [W, 32 // C, C]), 0, 2, 1)
    else:
        bits = (kept[:, None] >> tl.arange(0, 32).to(tl.uint32)[None, :]) & 1
        matrix = matrix & (bits * 0xFFFFFFFF)
        singles = tl.reshape(matrix, [W, 2, 32 // C, C // 2])  # W, odd, chunk, pair
        chunks = tl.reshape(tl.permute(singles, 0, 3, 1, 2), [W, C, 32 // C])
    return _split(chunks.to(DTYPE, bitcast=True))


@triton.jit
def _narrow(candidates, kept, wanted, plane, count):
    """One step of the radix search: the next candidates are either those with this bit or those without it."""
    few = (count - wanted) >> 31  # all ones where those with the bit are too few: then all of them are kept
    bits = few.to(tl.uint32, bitcast=True)
    kept = kept | (candidates & plane & bits)
    return candidates & (plane ^ bits), kept, wanted - (count & few)


@triton.jit
def _order(STEP: tl.constexpr):
    """The bits of a word whose features have an index with a zero at the STEP-th bit from the top."""
    ORDER: tl.constexpr = (0x00FF00FF, 0x0F0F0F0F, 0x33333333, 0x55555555, 0x0000FFFF)
    return ORDER[STEP]


@triton.jit
def _count(x):
    """Set bits in each unit's words; for a single unit as a scalar, which broadcasts to any layout."""
    count = _popcount(x)
    if x.shape[0] * x.shape[2] == 1:
        return tl.sum(tl.reshape(count, [x.shape[1]]))
    else:
        return tl.sum(count, axis=1, keep_dims=True)


@triton.jit
def _narrow_by_two(candidates, kept, wanted, first, second):
    """Two steps for a single unit with one reduction, which includes both counts that the second step may need."""
    one = candidates & first
    # Two counts below 65536 share an integer; the upper one may reach its sign. A plain shift would hide from the
    # compiler that these count bits.
    shift = 0x10000 + tl.program_id(1)
    counts = tl.join(_popcount(one) + _popcount(one & second) * shift, _popcount((candidates ^ one) & second))
    counts, second_alone = tl.split(tl.sum(tl.reshape(counts, [counts.shape[1], 2]), axis=0))
    count = counts & 0xFFFF
    after = tl.where(count < wanted, second_alone, (counts >> 16) & 0xFFFF)
    candidates, kept, wanted = _narrow(candidates, kept, wanted, first, count)
    return _narrow(candidates, kept, wanted, second, after)


@triton.jit
def _select(planes, valid, keep, MANTISSA: tl.constexpr, C: tl.constexpr, BITS: tl.constexpr):
    """The `keep` largest of each unit as words of bits, `[units, words, fields]` like `valid`; all if it has fewer.

    Also returns, in the same shape, how many survivors the unit's earlier words have. Each count decides BITS bits.
    """
    SHAPE: tl.constexpr = [valid.shape[0], valid.shape[1], 1]
    MAGNITUDE: tl.constexpr = len(planes) - 1
    nan = planes[0]
    for bit in tl.static_range(1, MANTISSA):
        nan = nan | planes[bit]
    for bit in tl.static_range(MANTISSA, MAGNITUDE):
        nan = nan & planes[bit]
    ranks = ()
    for bit in tl.static_range(MAGNITUDE - 1, MANTISSA - 1, -1):
        ranks = ranks + (tl.reshape(planes[bit], SHAPE),)
    for bit in tl.static_range(MANTISSA - 1, 0, -1):
        ranks = ranks + (tl.reshape(planes[bit] & (nan ^ 0xFFFFFFFF), SHAPE),)
    ranks = ranks + (tl.reshape(planes[0] | nan, SHAPE),)  # every NaN becomes the first value above infinity
    # Those that are equal then are ranked by index, which is, highest bits first: chunk, word, place in the chunk.
    CHUNK_STEPS: tl.constexpr = 0 if C == 32 else (2 if C == 8 else 3)
    for step in tl.static_range(CHUNK_STEPS):
        ranks = ranks + (tl.full(SHAPE, _order(step), tl.uint32),)

    candidates = valid
    kept = tl.zeros(valid.shape, tl.uint32)
    wanted = keep
    if valid.shape[0] * valid.shape[2] > 1:
        wanted = tl.full([valid.shape[0], 1, valid.shape[2]], keep, tl.int32)
    STEPS: tl.constexpr = MAGNITUDE + CHUNK_STEPS
    for step in tl.static_range(0, STEPS, BITS):
        if BITS == 2 and step + 1 < STEPS:
            candidates, kept, wanted = _narrow_by_two(candidates, kept, wanted, ranks[step], ranks[step + 1])
        else:
            candidates, kept, wanted = _narrow(candidates, kept, wanted, ranks[step], _count(candidates & ranks[step]))
    before = tl.zeros(valid.shape, tl.int32)
    if valid.shape[1] > 1:
        counts = _popcount(kept) + _popcount(candidates) * (0x10000 + tl.program_id(1))
        counts = tl.cumsum(counts, axis=1) - counts
        equal_before = (counts >> 16) & 0xFFFF
        before = (counts & 0xFFFF) + tl.minimum(equal_before, wanted)
        wanted = wanted - equal_before
    for step in tl.static_range(CHUNK_STEPS, 5):
        plane = tl.full(SHAPE, _order(step), tl.uint32)
        candidates, kept, wanted = _narrow(candidates, kept, wanted, plane, _popcount(candidates & plane))
    return tl.where(wanted > 0, kept | candidates, kept), before


@triton.jit
def _places(j: tl.constexpr, C: tl.constexpr):
    """The bits that stand for the features of chunk `j` in a plane's word, `[1, C]`."""
    k = C * j + tl.arange(0, C)
    return (k // 2 + 16 * (k % 2)).to(tl.uint32)[None, :]


@triton.jit
def _token_sum(x, TOKENS: tl.constexpr):
    """`[W]` summed over each token's words, and broadcast to all of them."""
    W: tl.constexpr = x.shape[0]
    total = tl.sum(tl.reshape(x, [TOKENS, W // TOKENS]), axis=1, keep_dims=True)
    return tl.reshape(tl.broadcast_to(total, [TOKENS, W // TOKENS]), [W])


@triton.jit
def _token_max(x, TOKENS: tl.constexpr):
    """As `_token_sum`, with the maximum for the sum."""
    W: tl.constexpr = x.shape[0]
    largest = tl.max(tl.reshape(x, [TOKENS, W // TOKENS]), axis=1, keep_dims=True)
    return tl.reshape(tl.broadcast_to(largest, [TOKENS, W // TOKENS]), [W])


@triton.jit
def _levels(chunks, inverse):
    """Chunks `[W, C]` times their token's `inverse [W]`, rounded to whole numbers, half to even; fp32."""
    ROUND: tl.constexpr = 12582912.0  # 1.5 * 2^23: a sum with it has no bits left for a fraction
    levels = ()
    for j in tl.static_range(len(chunks)):
        product = (chunks[j].to(tl.float32) * inverse[:, None]).to(tl.int32, bitcast=True)
        # Fused with the sum, the product would not be rounded, as the reference does, unless it may be something else.
        product = (product ^ tl.program_id(1)).to(tl.float32, bitcast=True)
        levels = levels + ((product + ROUND) - ROUND,)
    return levels


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


@triton.jit(do_not_specialize=["tokens", "keep"])  # prompts of other lengths do not compile again
def sparsify_kernel(
    x_ptr,
    other_ptr,
    y_ptr,
    values_ptr,
    indices_ptr,
    words_ptr,
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
    BITS: tl.constexpr,
    PRODUCER: tl.constexpr,
    QUANTIZE: tl.constexpr,
    EPILOGUE: tl.constexpr,
    COMPACT: tl.constexpr,
    LANES: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """One tile: produce, select, finish, store.

    The producer is "none", a name in `NORMS` or the activation of a GLU. QUANTIZE rounds survivors to int8 levels. The
    epilogue is "none", "l2" or "mask". Both see all survivors of a token. COMPACT also stores them side by side, with
    their indices; it wants tiles of whole tokens, and y is then what they were taken from. DEPENDENT: see
    `launch_options`.
    """
    if DEPENDENT:
        gdc_wait()
        gdc_launch_dependents()
    DTYPE: tl.constexpr = y_ptr.dtype.element_ty
    VALUE: tl.constexpr = x_ptr.dtype.element_ty if EPILOGUE == "mask" else DTYPE
    MANTISSA: tl.constexpr = 23 if tl.float32 == VALUE else (10 if tl.float16 == VALUE else 7)
    UNIT_OFFSET: tl.constexpr = PRODUCER == "unit_offset_rms_norm"
    NORM: tl.constexpr = PRODUCER == "rms_norm" or UNIT_OFFSET
    W: tl.constexpr = TOKENS * UNITS * WORDS
    word = tl.arange(0, W)
    token = tl.program_id(0).to(tl.int64) * TOKENS + word // (UNITS * WORDS)
    unit = word // WORDS % UNITS
    start = token * D + unit * UNIT

    # Chunk j of a unit's word w is C features from (j * Q + w) * C on: a thread reads 16 bytes, its neighbour reads on.
    # Where a unit is one word, threads so far apart would meet half-written sectors: the compiler exchanges it instead.
    Q: tl.constexpr = WORDS if COMPACT else (UNIT + 31) // 32  # a power of two: cheap to divide by, below
    C: tl.constexpr = 32 if UNIT == 32 and FIELDS == 1 else 128 // VALUE.primitive_bitwidth
    inside = (token < tokens) & (word % WORDS < Q) & (unit * UNIT < D)
    first_of_token = (word % (UNITS * WORDS) == 0) & (token < tokens)
    WHOLE: tl.constexpr = UNIT % 32 == 0 and D % UNIT == 0 and (UNIT == 32 * Q or not COMPACT)
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

    if NORM:
        squares = tl.zeros([W], tl.float32)
        for j in tl.static_range(32 // C):
            wide = values[j].to(tl.float32)
            squares += tl.sum(wide * wide, axis=1)
        rstd = tl.rsqrt(_token_sum(squares, TOKENS) / D + eps)
        tl.store(rstd_ptr + token, rstd, mask=first_of_token)
    if PRODUCER != "none":
        produced = ()
        for j in tl.static_range(32 // C):
            if NORM:
                other = tl.load(other_ptr + unit[:, None] * UNIT + columns[j], mask=masks[j], other=0.0)
                value = values[j].to(tl.float32) * rstd[:, None]
                if UNIT_OFFSET:
                    other = 1 + other.to(tl.float32)
                else:
                    value = value.to(x_ptr.dtype.element_ty)
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
    kept, before = _select(planes, valid, keep, MANTISSA, C, BITS)
    kept = tl.reshape(tl.sum(kept.to(tl.int32, bitcast=True), axis=2), [W]).to(tl.uint32, bitcast=True)

    FINISH: tl.constexpr = EPILOGUE == "l2" or QUANTIZE
    if FINISH or (EPILOGUE == "none" and not COMPACT):
        values = _survivors(matrix, kept, DTYPE, C)
    if FINISH:
        largest = tl.zeros([W], tl.int32)  # as bits, of which NaN's are the largest
        for j in tl.static_range(32 // C):
            bits = values[j].to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF
            largest = tl.maximum(largest, tl.max(bits, axis=1))
        largest = _token_max(largest, TOKENS)
    if QUANTIZE:
        # 1e-5: `bitnet.LEAST_SCALE`.
        gamma = tl.maximum(largest.to(tl.float32, bitcast=True), 1e-5, propagate_nan=tl.PropagateNan.ALL)
        step = tl.div_rn(gamma, 127.0)
        values = _levels(values, tl.div_rn(127.0, gamma))
        if COMPACT and EPILOGUE == "none":
            tl.store(norm_ptr + token, step, mask=first_of_token)
        if not COMPACT:
            scaled = ()
            for j in tl.static_range(32 // C):
                scaled = scaled + ((values[j] * step[:, None]).to(DTYPE),)
            values = scaled
    if EPILOGUE == "l2" and QUANTIZE and COMPACT:
        squares = tl.zeros([W], tl.float32)
        for j in tl.static_range(32 // C):
            squares += tl.sum(values[j] * values[j], axis=1)
        norm = tl.sqrt_rn(_token_sum(squares, TOKENS))
        tl.store(norm_ptr + token, tl.where(norm > 0, 1 / norm, step), mask=first_of_token)
    elif EPILOGUE == "l2":
        # With a power of two that brings the largest near 1, no square over- or underflows.
        exponent = largest >> 23
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
        elif EPILOGUE == "l2" and not (QUANTIZE and COMPACT):
            value = (values[j].to(tl.float32) * scale[:, None] * inverse[:, None]).to(DTYPE)
        else:
            value = values[j].to(DTYPE)
        if PRODUCER != "none" or FINISH or not COMPACT:
            tl.store(y_ptr + start[:, None] + columns[j], value, mask=masks[j])
    if COMPACT:
        # Written by the thread that has them, neighbours in the list would be threads apart. A feature each, they want
        # the words and values that other threads have: these go through memory, which is near.
        before = unit * keep * FIELDS + tl.reshape(tl.sum(before, axis=2), [W])
        words_ptr += tl.program_id(0).to(tl.int64) * W
        tl.store(words_ptr + word, kept.to(tl.int64) | (before.to(tl.int64) << 32))
        tl.debug_barrier()
        if PRODUCER == "none" and not FINISH:
            y_ptr = x_ptr
        # The compiler would give a thread several neighbours if it saw that they are (^ 0), but it may see the range.
        lane = (tl.arange(0, LANES) ^ tl.program_id(1)) & (LANES - 1)
        at = lane[:, None] + tl.arange(0, W * C // LANES)[None, :] * LANES  # in chunk j of all words
        word = tl.load(words_ptr + at // C)
        token = tl.program_id(0).to(tl.int64) * TOKENS + at // (UNITS * WORDS * C)
        unit = at // (WORDS * C) % UNITS
        features = ()
        masks = ()
        values = ()
        for j in tl.static_range((UNIT + WORDS * C - 1) // (WORDS * C)):
            column = j * WORDS * C + at % (WORDS * C)
            feature = unit * UNIT + column
            mask = (token < tokens) & (column < UNIT) & (feature < D)
            features = features + (feature,)
            masks = masks + (mask,)
            values = values + (tl.load(y_ptr + token * D + feature, mask=mask, other=0.0),)
        kept = word.to(tl.uint32)
        start = token * tl.cdiv(keep * (D // (UNIT // FIELDS)), LIST_UNIT) * LIST_UNIT + (word >> 32)
        for j in tl.static_range(len(values)):
            k = C * j + at % C
            place = (k // 2 + 16 * (k % 2)).to(tl.uint32)
            mask = masks[j] & (((kept >> place) & 1) != 0)
            position = start + _popcount(kept & ((1 << place) - 1))
            tl.store(values_ptr + position, values[j], mask=mask)
            tl.store(indices_ptr + position, features[j], mask=mask)


@triton.jit
def glu_backward_kernel(
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
def rescale_backward_kernel(grad_ptr, y_ptr, norm_ptr, grad_x_ptr, D: tl.constexpr, BLOCK: tl.constexpr):
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
def rms_norm_backward_kernel(
    grad_ptr,
    x_ptr,
    weight_ptr,
    rstd_ptr,
    grad_x_ptr,
    grad_weight_ptr,
    tokens,
    UNIT_OFFSET: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gradients of `weight * x * rstd`: the weight's as one partial sum a program, `[programs, D]` in fp32."""
    feature = tl.arange(0, BLOCK)
    inside = feature < D
    weight = tl.load(weight_ptr + feature, mask=inside, other=0.0).to(tl.float32)
    if UNIT_OFFSET:
        weight += 1
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


NORMS = {False: "rms_norm", True: "unit_offset_rms_norm"}
"""Producers that are norms, by whether the gain is `1 + weight`."""

LIST_UNIT = tl.constexpr(16)
"""Survivors' lists are padded to a multiple of this, so that whole vectors can be read from them."""


def padded_length(kept: int) -> int:
    return triton.cdiv(kept, LIST_UNIT.value) * LIST_UNIT.value


def new_lists(x: Tensor, shape: Sequence[int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Empty lists for values and indices of survivors, `[..., K]` each, on `x`'s device, with padded rows."""
    room = *shape[:-1], padded_length(shape[-1])
    values, indices = (x.new_empty(room, dtype=each)[..., : shape[-1]] for each in (dtype, torch.int32))
    return values, indices


def is_padded(part: Tensor) -> bool:
    """Whether `part [..., K]` has padded rows, as from `new_lists`."""
    room = *part.shape[:-1], padded_length(part.shape[-1])
    whole = part.untyped_storage().nbytes() // part.element_size() - part.storage_offset() >= math.prod(room)
    return whole and part.stride() == torch.empty(room, device="meta").stride()


def padded_lists(values: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """Survivors' lists `[..., K]` with padded rows: the same where they have such, else copies."""
    if is_padded(values) and is_padded(indices):
        return values, indices
    lists = new_lists(values, values.shape, values.dtype)
    lists[0].copy_(values)
    lists[1].copy_(indices)
    return lists


INTERPRETED = not isinstance(sparsify_kernel, triton.JITFunction)
"""Whether the kernels were imported under TRITON_INTERPRET=1, and so run on a CPU."""


def launch_options(x: Tensor) -> dict[str, bool]:
    """Options of a decode step's kernels: on Hopper and newer, launch while the kernel before is still running.

    These kernels take microseconds, so launch latency counts. A kernel waits with `gdc_wait`, ahead of its first access
    to memory, for the one before (programmatic dependent launch).
    """
    supported = x.is_cuda and not torch.version.hip and torch.cuda.get_device_capability(x.device) >= (9, 0)
    return {"launch_pdl": True} if supported else {}


@cache
def whole_row(features: int) -> dict[str, int]:
    """Launch arguments of a backward kernel whose program holds a row of fp32 values, 16 of them a thread."""
    block = triton.next_power_of_2(features)
    return {"D": features, "BLOCK": block, "num_warps": min(max(block // 512, 1), 32)}


@dataclass(frozen=True)
class SparsifyTile:
    """What one program works on: `tokens` x `units` x `words` of 32 features each; `fields` blocks share a word."""

    features: int  # of a token, or of a unit where tokens need not be told apart
    unit: int
    fields: int
    tokens: int
    units: int
    words: int
    warps: int
    value_bits: int
    few: bool

    @classmethod
    @cache  # of every launch, and Triton's own arithmetic takes longer than PyTorch's dispatch
    def of(
        cls, features: int, block_size: int | None, whole_tokens: bool, value_bits: int, few: bool = False
    ) -> "SparsifyTile":
        """The tile for a tensor that fills the GPU, or for `few` tokens, where the latency of each counts."""
        unit = block_size or features
        fields = 1
        if block_size in (2, 4, 8, 16):
            unit, fields = 32, 32 // block_size
        if not whole_tokens and features % unit == 0:
            features = unit
        units = triton.next_power_of_2(triton.cdiv(features, unit))
        words = triton.next_power_of_2(triton.cdiv(unit, 32))
        tokens = 1 if units * words >= 64 else 128 // (units * words)
        # One warp takes a unit while its registers hold it; else four share it, or two where that needs less padding.
        words_a_thread = min(max(words // 32, 1), 64 // value_bits)
        if words > 32 * words_a_thread:
            sharing = 2 if words == 256 and unit <= 32 * 192 else 4
            words_a_thread = min(words // (32 * sharing), words_a_thread)
        warps = min(tokens * units * words // (32 * words_a_thread), 32)
        if few:
            warps = min(max(tokens * triton.next_power_of_2(features) // 512, 1), 8 if words <= 512 else 16)
        return cls(features, unit, fields, tokens, units, words, warps, value_bits, few)

    @property
    def bits_per_count(self) -> int:
        """How many bits of the order one count decides: two where a count makes warps wait for each other.

        The two counts share an integer, which 65536 features would overflow.
        """
        return 2 if self.tokens * self.units == 1 and self.warps > 1 and self.words < 2048 else 1

    def registers(self, producer: str) -> int | None:
        """A cap on registers for rows of 16-bit values, where one more program then fits on a multiprocessor and little
        spills; None for no cap. Exact GELU would spill.
        """
        if self.few or self.tokens * self.units > 1 or self.value_bits > 16 or self.warps > 4 or producer == "gelu":
            return None
        words_a_thread = triton.cdiv(triton.cdiv(self.unit, 32), 32 * self.warps)
        return {2: 80 if self.warps > 1 else None, 3: 128, 4: 168}.get(words_a_thread)


def launch_sparsify(
    x: Tensor,
    other: Tensor | None,
    y: Tensor,
    keep: int,
    block_size: int | None,
    producer: str,
    quantize: bool,
    epilogue: str,
    eps: float = 0.0,
    survivors: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Run the kernel over `x [..., D]` into `y`; returns `rstd` and `norm`, fp32 `[...]`, empty where not computed.

    `survivors`, lists `[..., K]` from `new_lists`, are filled in where given, for few tokens; `y` is then scratch.
    Rounded survivors are whole numbers there, and `norm` is what they are to be multiplied by.
    """
    compact = survivors is not None
    features = x.shape[-1]
    norms = producer in NORMS.values()
    rstd = x.new_empty(x.shape[:-1] if norms else 0, dtype=torch.float32)
    norm = x.new_empty(x.shape[:-1] if epilogue == "l2" or (compact and quantize) else 0, dtype=torch.float32)
    if x.numel() == 0:
        return rstd, norm
    value = x if epilogue == "mask" else y
    whole_tokens = norms or quantize or epilogue == "l2" or compact
    tile = SparsifyTile.of(features, block_size, whole_tokens, 8 * value.element_size(), compact)
    tokens = x.numel() // tile.features
    registers = tile.registers(producer)
    options = {"maxnreg": registers} if registers and not torch.version.hip else {}
    programs = triton.cdiv(tokens, tile.tokens)
    values, indices, words = None, None, None
    if survivors is not None:
        options |= launch_options(x)
        values, indices = survivors
        words = x.new_empty(programs * tile.tokens * tile.units * tile.words, dtype=torch.int64)
    with torch.cuda.device_of(x):
        sparsify_kernel[(programs,)](
            x,
            other,
            y,
            values,
            indices,
            words,
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
            BITS=tile.bits_per_count,
            PRODUCER=producer,
            QUANTIZE=quantize,
            EPILOGUE=epilogue,
            COMPACT=compact,
            LANES=32 * tile.warps,
            DEPENDENT="launch_pdl" in options,
            num_warps=tile.warps,
            **options,
        )
    return rstd, norm
