"""Prepared models: the same tokens, the same weights, the same checkpoint; and everything that `generate` can do."""

import copy
import logging

import pytest
import torch
from conftest import assert_close, make, sparse_config
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, StaticCache, TextIteratorStreamer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from qsparse_hf.modeling import modeling_qsparse, sparse_linear
from qsparse_hf.modeling.decode_graph import DecodeGraph

GREEDY = {"max_new_tokens": 16, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
SETTINGS = [
    {},
    {"sparsity_block_size": 32},
    {"sparsity_rescale": "l2"},
    {"sparsity_per_projection": {"down": [0, 0.75]}},
]


@pytest.fixture
def products(monkeypatch) -> list[tuple[int, ...]]:
    """The shapes of the values that sparse products read, in a list that grows."""
    shapes = []
    for name, implementation in sparse_linear.IMPLS.items():
        product = implementation.product
        spied = copy.copy(implementation)
        spied.product = lambda values, *rest, product=product: (
            shapes.append(tuple(values.shape)) or product(values, *rest)
        )
        monkeypatch.setitem(sparse_linear.IMPLS, name, spied)
    return shapes


@pytest.mark.parametrize("fields", SETTINGS, ids=str)
def test_same_tokens_through_sparse_products(family, fields, tokens, products):
    model = make(sparse_config(family, **fields))
    prompt = tokens[:1, :20]
    expected = model.generate(prompt, **GREEDY)
    assert products == []
    assert model.prepare_for_decode() is model
    assert model.is_prepared
    assert torch.equal(model.generate(prompt, **GREEDY), expected)
    dense_groups = 1 if "sparsity_per_projection" in fields else 0  # nothing to skip: it stays as it was
    assert len(products) == 15 * (8 - dense_groups)  # 4 groups of 2 layers; the prompt is read by dense products
    assert {shape[:2] for shape in products} == {(1, 1)}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_logits_in_every_dtype(family, dtype, tokens):
    """One feature of 64 goes, so that rounding cannot swap many."""
    model = make(sparse_config(family, sparsity=0.02), dtype=dtype)
    with torch.no_grad():
        expected = model(tokens).logits
        model.prepare_for_decode()
        assert_close(model(tokens).logits, expected)  # input-major, dense
        cache = model(tokens[:, :-1], use_cache=True).past_key_values
        assert_close(model(tokens[:, -1:], past_key_values=cache).logits[:, 0], expected[:, -1])


def test_restore_gives_everything_back(family, tmp_path, tokens):
    model = make(sparse_config(family))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    classes = [type(module) for module in model.modules()]
    parameters = dict(model.named_parameters())
    model.prepare_for_decode().prepare_for_decode()
    assert {name: tensor.shape for name, tensor in model.state_dict().items()} == {
        k: v.shape for k, v in before.items()
    }
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    query, key = (model.model.layers[0].self_attn.get_submodule(name).weight for name in ("q_proj", "k_proj"))
    assert query.untyped_storage().data_ptr() == key.untyped_storage().data_ptr()
    assert query.stride(0) == 1
    model.save_pretrained(tmp_path)
    assert model.is_prepared
    assert model.restore().restore() is model
    assert [type(module) for module in model.modules()] == classes
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
        assert tensor.is_contiguous()
    saved = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in saved.state_dict().items())


def test_a_prepared_model_moves_and_is_copied(tokens, products):
    model = make(sparse_config("llama")).prepare_for_decode()
    expected = model.generate(tokens[:1], **GREEDY)
    for other in (copy.deepcopy(model), model.double().float()):
        assert other.is_prepared
        products.clear()
        assert torch.equal(other.generate(tokens[:1], **GREEDY), expected)
        assert len(products) == 15 * 8
        rows = other.model.layers[0].self_attn.q_proj.rows
        assert rows.are_those_of(
            [getattr(other.model.layers[0].self_attn, name) for name in ("q_proj", "k_proj", "v_proj")]
        )


def test_weights_that_change_under_a_prepared_model(family, tokens, products):
    """Whether written in place or assigned, they are what decodes next; a module in their place is named."""
    model, other = make(sparse_config(family)).prepare_for_decode(), make(sparse_config(family), seed=1)
    expected = other.generate(tokens[:1], **GREEDY)
    model.load_state_dict(other.state_dict())
    assert torch.equal(model.generate(tokens[:1], **GREEDY), expected)
    assert products
    other = make(sparse_config(family), seed=2)
    expected = other.generate(tokens[:1], **GREEDY)
    model.load_state_dict(other.state_dict(), assign=True)
    assert torch.equal(model.generate(tokens[:1], **GREEDY), expected)
    model.model.layers[0].mlp.down_proj = nn.Sequential(model.model.layers[0].mlp.down_proj)
    with pytest.raises(RuntimeError, match="was replaced by a Sequential; call restore"):
        model.generate(tokens[:1], **GREEDY)


def test_under_autocast_the_products_are_those_of_autocast(tokens, products):
    model = make(sparse_config("llama"))
    with torch.autocast("cpu", torch.bfloat16):
        expected = model.generate(tokens[:1], **GREEDY)
        assert torch.equal(model.prepare_for_decode().generate(tokens[:1], **GREEDY), expected)
    assert products == []


def test_a_failure_leaves_the_model_as_it_was(monkeypatch, tokens):
    model = make(sparse_config("llama"))
    classes = [type(module) for module in model.modules()]
    calls = iter(range(3))
    real = modeling_qsparse.lay_out
    monkeypatch.setattr(modeling_qsparse, "lay_out", lambda *linears: (next(calls), real(*linears)))
    with pytest.raises((StopIteration, RuntimeError)):
        model.prepare_for_decode()
    assert [type(module) for module in model.modules()] == classes
    assert all(parameter.is_contiguous() for parameter in model.parameters())


def test_training_a_prepared_model_goes_through_the_dense_products(tokens, products):
    model = make(sparse_config("llama"))
    model(tokens, labels=tokens).loss.backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    model.prepare_for_decode()(tokens[:, :24], labels=tokens).loss.backward()
    for name, parameter in model.named_parameters():
        assert_close(parameter.grad, expected[name])
    assert products == []


def test_other_ways_to_generate(tokens, tiny_tokenizer, products):
    model = make(sparse_config("llama"))
    ways = {
        "beams": {"num_beams": 2},
        "static cache": {"cache_implementation": "static"},
        "assisted": {"assistant_model": make(sparse_config("llama"), seed=1)},
        "prompt lookup": {"prompt_lookup_num_tokens": 2},
        "batch": {},
    }
    prompts = {name: tokens[:, :10] if name == "batch" else tokens[:1, :10] for name in ways}
    expected = {name: model.generate(prompts[name], **GREEDY | way) for name, way in ways.items()}
    model.prepare_for_decode()
    for name, way in ways.items():
        products.clear()
        assert torch.equal(model.generate(prompts[name], **GREEDY | way), expected[name]), name
        assert products, name
    torch.manual_seed(0)
    sampled = model.generate(tokens[:1, :10], **GREEDY | {"do_sample": True})
    torch.manual_seed(0)
    assert torch.equal(model.restore().generate(tokens[:1, :10], **GREEDY | {"do_sample": True}), sampled)
    streamer = TextIteratorStreamer(tiny_tokenizer)
    model.prepare_for_decode().generate(tokens[:1, :10], **GREEDY, streamer=streamer)
    assert len("".join(streamer)) > 0


def test_a_large_batch_is_decoded_densely_and_that_is_said(caplog, products):
    model = make(sparse_config("llama")).prepare_for_decode()
    few = model.model.layers[0].input_layernorm.few
    prompt = torch.full((few + 1, 4), 7)
    with caplog.at_level(logging.WARNING, "qsparse_hf"):
        model.generate(prompt, **GREEDY)
    assert products == []
    assert [record.message for record in caplog.records if "dense" in record.message] == [
        f"decoding {few + 1} sequences at once with dense products: at sparsity 0.5 those that skip zeros pay off for "
        f"up to {few}"
    ]


def test_what_cannot_be_prepared_is_named(tokens):
    adapted = get_peft_model(make(sparse_config("llama")), LoraConfig(r=2, target_modules=["up_proj"]))
    with pytest.raises(ValueError, match=r"up_proj of layer 0 is Linear with .*merge adapters before"):
        adapted.base_model.model.prepare_for_decode()
    assert not adapted.base_model.model.is_prepared
    merged = adapted.merge_and_unload()
    assert merged.prepare_for_decode().is_prepared
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(sparse_config("llama"))
    with pytest.raises(ValueError, match="q_proj of layer 0 is Linear with a Tensor on meta"):
        empty.prepare_for_decode()


@pytest.mark.parametrize("padding", [0, 3])
def test_a_decode_step_is_the_forward_it_replaces(family, padding, tokens):
    """What the graph replays, without the graph: a CPU has none."""
    model = make(sparse_config(family)).prepare_for_decode()
    prompt = tokens[:, :6]  # within the families' windows
    mask = torch.ones_like(prompt)
    mask[1, :padding] = 0
    cache = StaticCache(config=model.config, max_cache_len=8)
    with torch.no_grad():
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        new = (
            model(prompt, attention_mask=mask, position_ids=positions, past_key_values=cache).logits[:, -1:].argmax(-1)
        )
        mask = torch.cat([mask, torch.ones_like(new)], dim=1)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        whole = model(torch.cat([prompt, new], dim=1), attention_mask=mask, position_ids=positions).logits
        model.decode_graph = step = DecodeGraph(model, cache, len(prompt))
        assert copy.deepcopy(model).decode_graph is None
        step.tokens.copy_(new)
        step.positions.copy_(positions[:, -1:])
        step.mask[:, 0, 0, : mask.shape[1]].copy_(mask)
        assert_close(step._step()[:, 0], whole[:, -1])
    assert [layer.cumulative_length.item() for layer in cache.layers] == [7, 7]
    assert isinstance(model.model.layers[0].mlp.down_proj, nn.Linear)
    assert ALL_ATTENTION_FUNCTIONS.get_interface(model.config._attn_implementation, None) is not None
