"""A decode step's attention on a CPU: values, and who goes through it."""

import pytest
import torch
from conftest import assert_close, backends, make, sparse_config
from transformers.generation.continuous_batching.cache import PagedAttentionCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from qsparse_hf.decode import layers
from qsparse_hf.decode.attention import STEP_IMPLS, StepCache, attend

pytest.importorskip("numba", reason="heads with keys of their own attend by its kernel")

MASKS = {
    "none": lambda sequences, entries: None,
    "bool": lambda sequences, entries: torch.arange(entries).expand(sequences, 1, 1, -1) >= entries // 3,
    "float": lambda sequences, entries: torch.linspace(-2, 0, entries).expand(sequences, 1, 1, -1),
    "one wide": lambda sequences, entries: torch.full((1, 1, 1, 1), -1.0),
    "one for all": lambda sequences, entries: torch.arange(entries).expand(1, 1, 1, -1) % 2 == 0,
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("sequences", "heads", "kv_heads", "entries", "d"), [(1, 4, 4, 1, 16), (2, 6, 2, 37, 24), (1, 8, 1, 300, 128)]
)
def test_is_the_softmax_it_stands_for(sequences, heads, kv_heads, entries, d, dtype, mask):
    generator = torch.Generator().manual_seed(0)
    query, keys, values = (
        torch.randn(sequences, *shape, d, generator=generator).to(dtype)
        for shape in ((heads, 1), (kv_heads, entries), (kv_heads, entries))
    )
    mask = MASKS[mask](sequences, entries)
    many = [each.double().repeat_interleave(heads // kv_heads, dim=1) for each in (keys, values)]
    scores = query.double() @ many[0].mT * 0.3
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    expected = (scores.softmax(-1) @ many[1]).transpose(1, 2)
    assert_close(attend(query, keys, values, mask, 0.3), expected.to(dtype))


def test_an_entry_that_does_not_count_may_be_anything():
    query, keys, values = (torch.randn(1, 2, length, 8) for length in (1, 5, 5))
    mask = torch.tensor([True, True, False, True, True]).view(1, 1, 1, 5)
    expected = attend(query, keys, values, mask, 1.0)
    keys[:, :, 2] = 1e30
    assert torch.equal(attend(query, keys, values, mask, 1.0), expected)


def test_where_no_entry_counts_there_are_zeros():
    query, keys, values = (torch.randn(2, 2, length, 8) for length in (1, 5, 5))
    mask = torch.tensor([False, True]).view(2, 1, 1, 1).expand(2, 1, 1, 5)
    y = attend(query, keys, values, mask, 1.0)
    assert torch.equal(y[0], torch.zeros(1, 2, 8))
    assert torch.isfinite(y[1]).all()


STEPS = backends(STEP_IMPLS)


@pytest.mark.parametrize(("device", "backend"), STEPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    ("sequences", "heads", "kv_heads", "length", "entries", "d", "rotary"),
    [(1, 4, 4, 0, 8, 16, 16), (2, 6, 2, 37, 64, 32, 16), (2, 4, 1, 300, 520, 64, 64)],
)
def test_a_step_rotates_appends_and_attends(
    sequences, heads, kv_heads, length, entries, d, rotary, padded, dtype, device, backend
):
    """In fp64, from what the step is given: part of one tensor, as the projections of one product are."""
    generator = torch.Generator().manual_seed(0)
    sizes = [heads * d, kv_heads * d, kv_heads * d]
    together = torch.randn(sequences, 1, sum(sizes), generator=generator).to(device, dtype)
    query, key, value = together.split(sizes, dim=-1)
    angles = torch.rand(sequences, 1, rotary // 2, generator=generator).repeat(1, 1, 2).to(device) * 6
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    keys, values = (torch.randn(sequences, kv_heads, entries, d, generator=generator).to(device, dtype) for _ in "kv")
    mask = torch.rand(sequences, 1, 1, entries, generator=generator).to(device) > 0.3 if padded else None
    before = keys.clone(), values.clone()
    arrived = torch.zeros(sequences * heads, dtype=torch.int32, device=device)
    at = torch.tensor([length], device=device)

    cache = StepCache(keys, values, at, mask, arrived)
    y = STEP_IMPLS[backend].attend(query, key, value, (cos, sin), cache, 0.3)

    def rotated(x: torch.Tensor) -> torch.Tensor:
        x = x.double().view(sequences, -1, d)
        half = rotary // 2
        turn, cosine, sine = x[..., :rotary], cos.double(), sin.double()
        across = torch.cat([-turn[..., half:], turn[..., :half]], dim=-1)
        return torch.cat([turn * cosine + across * sine, x[..., rotary:]], dim=-1)

    assert_close(keys[:, :, length], rotated(key).to(dtype))
    assert torch.equal(values[:, :, length], value.view(sequences, kv_heads, d))
    for cache, held in zip((keys, values), before, strict=True):
        assert torch.equal(cache[:, :, :length], held[:, :, :length])
        assert torch.equal(cache[:, :, length + 1 :], held[:, :, length + 1 :])
    each_key, each_value = (
        cache[:, :, : length + 1].double().repeat_interleave(heads // kv_heads, dim=1) for cache in (keys, values)
    )
    scores = (rotated(query)[:, :, None] @ each_key.mT)[:, :, 0] * 0.3
    if mask is not None:
        counts = mask[:, 0, :, : length + 1].clone()
        counts[..., -1] = True
        scores = scores.masked_fill(~counts, -torch.inf)
    expected = (scores.softmax(-1)[:, :, None] @ each_value).flatten(1)[:, None]
    assert_close(y, expected.to(dtype))
    assert not arrived.any()
    assert at.item() == length


def test_a_paged_cache_is_left_to_transformers(tokens, attended):
    """Continuous batching passes it beside what all attention functions are given, and they fill it."""

    class Paged(PagedAttentionCache):
        def __init__(self):
            self.filled = 0

        def update(self, key_states, value_states, *rest, **more):
            self.filled += 1
            return key_states, value_states

    model, paged = make(sparse_config("llama")).prepare_for_decode(), Paged()
    with torch.no_grad():
        model(tokens[:1, :1], cache=paged, use_cache=False)
    assert paged.filled == 2
    assert attended == []


def test_who_replaced_the_attention_is_asked(tokens, attended, monkeypatch):
    asked = []
    monkeypatch.setitem(
        ALL_ATTENTION_FUNCTIONS, "sdpa", lambda *rest, **more: asked.append(1) or sdpa_attention_forward(*rest, **more)
    )
    model = make(sparse_config("llama")).prepare_for_decode()
    model.generate(tokens[:1, :6], max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert len(asked) == 4 * 2
    assert attended == []


@pytest.fixture
def attended(monkeypatch) -> list[tuple[int, ...]]:
    """The shapes of the caches that were attended to, in a list that grows."""
    shapes = []

    def spied(query, keys, *rest):
        shapes.append(tuple(keys.shape))
        return attend(query, keys, *rest)

    monkeypatch.setattr(layers, "attend", spied)
    return shapes


@pytest.mark.parametrize("fields", [{}, {"sparsity_per_projection": {"o": 0}}], ids=str)
def test_prepared_models_decode_with_it(family, fields, tokens, attended):
    """Padded, within and beyond the families' windows; the prompt is read by PyTorch's."""
    model = make(sparse_config(family, **fields))
    call = {"inputs": tokens[:, :6], "attention_mask": torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])}
    call |= {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    expected = model.generate(**call)
    assert attended == []
    assert torch.equal(model.prepare_for_decode().generate(**call), expected)
    assert len(attended) == 7 * 2
    attended.clear()
    model.set_attn_implementation("eager")
    assert torch.equal(model.generate(**call), expected)
    assert attended == []
