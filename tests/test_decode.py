"""Prepared models: the same tokens, the same weights, the same checkpoint; and everything that `generate` can do."""

import copy
import itertools
import logging
import pickle
from functools import partial
from pathlib import Path

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from conftest import DISTINCT, OPTIONS, assert_close, make, run_python, sparse_config
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    CompileConfig,
    DynamicCache,
    GenerationMixin,
    LogitsProcessorList,
    StaticCache,
    TextIteratorStreamer,
)

from qsparse_hf import sparsity_report
from qsparse_hf.decode import generation, graph, layers, prepare
from qsparse_hf.decode.graph import DecodeGraph, why_no_graph
from qsparse_hf.decode.layout import InputMajor, few_tokens
from qsparse_hf.decode.transformers_names import CACHE
from qsparse_hf.decode.weights import FloatWeights, TernaryWeights
from qsparse_hf.modeling.bitnet import PackedLinear, pack

GREEDY = {"max_new_tokens": 16, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
SETTINGS = [
    {},
    {"sparsity_block_size": 32},
    {"sparsity_rescale": "l2"},
    {"sparsity_per_projection": {"down": [0, 0.75]}},
    {"activation_quantization": "int8"},
    {"weight_quantization": "ternary", "activation_quantization": "int8"},
]


@pytest.fixture
def products(monkeypatch) -> list[tuple[int, ...]]:
    """The shapes of the values that sparse products read, in a list that grows; no layer runs as a whole."""
    shapes = []
    monkeypatch.setattr(layers, "LAYER_IMPLS", {})
    for table in (FloatWeights.products, TernaryWeights.products):
        for name, implementation in table.items():
            product = implementation.product
            spied = copy.copy(implementation)
            spied.product = lambda kept, *rest, product=product: (
                shapes.append(tuple(kept.values.shape)) or product(kept, *rest)
            )
            monkeypatch.setitem(table, name, spied)
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
    # Four groups of two layers. A prompt is read by dense products, but for packed weights, which it would unpack.
    prompts = [20] if "weight_quantization" in fields else []
    assert len(products) == (15 + len(prompts)) * (8 - dense_groups)
    assert {shape[:2] for shape in products} == {(1, length) for length in (1, *prompts)}


@pytest.fixture
def whole_layers(monkeypatch) -> list[str]:
    """The dtypes of inputs that layers took as a whole, in a list that grows."""
    pytest.importorskip("numba")
    dtypes = []
    real = layers.PreparedDecoderLayer._function

    def spied(layer, x: torch.Tensor, kwargs: dict):
        function = real(layer, x, kwargs)
        if function is not None:
            dtypes.append(x.dtype)
        return function

    monkeypatch.setattr(layers.PreparedDecoderLayer, "_function", spied)
    return dtypes


ONE_BIT = {"weight_quantization": "ternary", "activation_quantization": "int8"}
LAYER_SETTINGS = [
    {},
    {"sparsity_block_size": 32},
    {"activation_quantization": "int8", "sparsity_rescale": "l2"},
    {"weight_quantization": "ternary"},
    {"weight_quantization": "ternary", "activation_quantization": "int8", "sparsity": 0},
]


@pytest.mark.parametrize("fields", LAYER_SETTINGS, ids=str)
def test_same_tokens_through_whole_layers(family, fields, tokens, whole_layers):
    model = make(sparse_config(family, **fields))
    expected = model.generate(tokens[:1, :20], **GREEDY)
    assert torch.equal(model.prepare_for_decode().generate(tokens[:1, :20], **GREEDY), expected)
    assert len(whole_layers) == (0 if family == "gemma3_text" else 15 * 2)  # whose layers add no product to a sum


@pytest.mark.parametrize("option", [name for name in OPTIONS if not name.startswith("gemma3_text")])
def test_same_tokens_through_whole_layers_of_every_option(option, tokens, whole_layers):
    model = make(sparse_config(option.split()[0], **OPTIONS[option]))
    expected = model.generate(tokens[:1, :20], **GREEDY)
    assert torch.equal(model.prepare_for_decode().generate(tokens[:1, :20], **GREEDY), expected)
    assert whole_layers


@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_pytorch_tanh", "relu2"])
def test_whole_layers_of_every_activation(activation, tokens, whole_layers):
    model = make(sparse_config("llama", hidden_act=activation))
    expected = model.generate(tokens[:1], **GREEDY)
    assert torch.equal(model.prepare_for_decode().generate(tokens[:1], **GREEDY), expected)
    assert whole_layers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_whole_layer_is_its_operators(dtype, tokens, whole_layers, monkeypatch):
    """Also over a static cache, whose free entries are masked, and behind padding."""
    model = make(sparse_config("qwen3", sparsity=0.02), dtype=dtype).prepare_for_decode()
    mask = torch.ones_like(tokens[:1])
    mask[0, :3] = 0
    for cache in (DynamicCache, partial(StaticCache, max_cache_len=40)):
        results = []
        for table in (layers.LAYER_IMPLS, {}):
            with monkeypatch.context() as patch, torch.no_grad():
                patch.setattr(layers, "LAYER_IMPLS", table)
                filled = cache(config=model.config)
                model(tokens[:1, :-1], attention_mask=mask[:, :-1], past_key_values=filled)
                results.append(model(tokens[:1, -1:], attention_mask=mask, past_key_values=filled).logits)
        assert_close(*results)
    assert whole_layers == [dtype] * 4


def test_kernels_of_whole_layers_are_kept_for_the_next_process(tmp_path):
    """Compiling takes ten seconds and more; a second process finds all of it, and adds nothing."""
    pytest.importorskip("numba")
    code = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import torch
from conftest import make, sparse_config
for fields in ({{}}, {ONE_BIT}):
    model = make(sparse_config("llama", **fields)).prepare_for_decode()
    model.generate(torch.tensor([[3, 4, 5]]), max_new_tokens=3, do_sample=False)
    assert model.model.layers[0].compiled[1] is not None
"""
    runs = [run_python(code, NUMBA_CACHE_DIR=str(tmp_path)) for _ in range(2)]
    assert ["compiling the kernels" in run.stderr for run in runs] == [True, False]


def test_a_prepared_packed_model_takes_other_scales(tokens):
    config = sparse_config("llama", **ONE_BIT)
    config.quantization_config = {"quant_method": "bitnet", "linear_class": "bitlinear"}
    models = []
    for scale in (20.0, 5.0):
        model = make(config)
        for module in model.modules():
            if isinstance(module, PackedLinear):
                codes = torch.randint(-1, 2, (module.out_features, module.in_features))
                module.weight.copy_(pack(codes))
                module.weight_scale.fill_(scale)
        models.append(model)
    model, other = models
    expected = other.generate(tokens[:1], **GREEDY)
    model.prepare_for_decode().generate(tokens[:1], **GREEDY)
    model.load_state_dict(other.state_dict())
    assert torch.equal(model.generate(tokens[:1], **GREEDY), expected)


@pytest.mark.parametrize("activations", ["none", "int8"])
def test_nothing_is_rescaled_where_nothing_is_selected(activations, tokens):
    fields = {"weight_quantization": "ternary", "activation_quantization": activations, "sparsity_rescale": "l2"}
    for sparsity, factor in ((0, 1), (0.5, 0)):
        model = make(sparse_config("llama", sparsity=sparsity, **fields))
        model.scale_sparsity(factor)
        expected = model.generate(tokens[:1], **GREEDY)
        assert torch.equal(model.prepare_for_decode().generate(tokens[:1], **GREEDY), expected)


def test_weights_on_their_way_to_ternary_ones_are_not_packed(tokens):
    model = make(sparse_config("llama", **ONE_BIT)).prepare_for_decode()
    model.scale_quantization(0.5)
    assert not model.is_prepared
    with pytest.raises(
        ValueError, match=r"q_proj of layer 0 is on its way to ternary weights; scale_quantization\(1\)"
    ):
        model.prepare_for_decode()
    model.scale_quantization(1)
    assert model.prepare_for_decode().is_prepared
    model.scale_quantization(1)
    assert model.is_prepared
    odd = make(sparse_config("llama", **ONE_BIT, intermediate_size=98))
    with pytest.raises(
        ValueError, match=r"gate_proj of layer 0 has 98 rows, and packed weights need a multiple of four"
    ):
        odd.prepare_for_decode()


def test_an_activation_that_changes_under_a_prepared_model(tokens, whole_layers):
    model, other = make(sparse_config("llama")), make(sparse_config("llama", hidden_act="relu"))
    model.prepare_for_decode().generate(tokens[:1], **GREEDY)
    for layer in model.model.layers:
        layer.mlp.act_fn = nn.ReLU()
    assert torch.equal(model.generate(tokens[:1], **GREEDY), other.generate(tokens[:1], **GREEDY))
    seen = []
    model.model.layers[0].mlp.act_fn.register_forward_hook(lambda *call: seen.append(call))
    model.generate(tokens[:1], **GREEDY)
    assert len(seen) == 16


def test_an_adapter_on_one_of_a_group_is_named(tokens):
    model = make(sparse_config("llama")).prepare_for_decode()
    adapted = get_peft_model(model, LoraConfig(target_modules=["v_proj"]))
    with pytest.raises(RuntimeError, match=r"was replaced by a .*call the model's restore"):
        adapted.generate(input_ids=tokens[:1], **GREEDY)


def test_what_a_whole_layer_would_not_do(tokens, whole_layers):
    """Hooks see their modules, several sequences and gradients take operators, other selections are another layer."""
    model = make(sparse_config("llama", sparsity_rescale="l2")).prepare_for_decode()
    model.generate(tokens[:1], **GREEDY)
    assert not whole_layers  # it rescales and does not round
    model = make(sparse_config("llama")).prepare_for_decode()
    model.generate(tokens, **GREEDY)
    model(tokens[:1, -1:])
    assert not whole_layers
    seen = []
    handle = model.model.layers[0].mlp.register_forward_hook(lambda *call: seen.append(call))
    model.generate(tokens[:1], **GREEDY)
    assert len(seen) == 16
    assert len(whole_layers) == 15  # the other layer's
    handle.remove()
    whole_layers.clear()
    for factor in (1, 0.5, 0):
        model.scale_sparsity(factor)
        expected = make(sparse_config("llama", sparsity=0.5 * factor)).generate(tokens[:1], **GREEDY)
        assert torch.equal(model.generate(tokens[:1], **GREEDY), expected)
    assert len(whole_layers) == 2 * 15 * 2  # a dense layer has nothing to skip
    other = make(sparse_config("llama"), seed=3)
    model.scale_sparsity(1)
    model.load_state_dict(other.state_dict(), assign=True)
    assert torch.equal(model.generate(tokens[:1], **GREEDY), other.generate(tokens[:1], **GREEDY))


@pytest.mark.parametrize(
    ("dtype", "quantized"),  # in 16 bits, rounding moves values from one int8 level to the next
    [
        *itertools.product([torch.float64, torch.float32, torch.bfloat16, torch.float16], [False]),
        *itertools.product([torch.float64, torch.float32], [True]),
    ],
)
def test_logits_in_every_dtype(family, dtype, quantized, tokens):
    """One feature of 64 goes, so that rounding cannot swap many."""
    fields = {"weight_quantization": "ternary", "activation_quantization": "int8"} if quantized else {}
    model = make(sparse_config(family, sparsity=0.02, **fields), dtype=dtype)
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
    for group in model.config.projection_groups.values():
        weights = [model.model.layers[0].get_submodule(path).weight for path in group.linears]
        assert len({weight.untyped_storage().data_ptr() for weight in weights}) == 1
        assert all(weight.stride(0) == 1 for weight in weights)
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
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), model.double().float()):
        assert other.is_prepared
        products.clear()
        if other is not model:
            assert all(linear.rows is None for linear in other.modules() if isinstance(linear, InputMajor))
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
    with pytest.raises(RuntimeError, match=r"was replaced by a torch.*Sequential; call the model's restore\(\) first"):
        model.generate(tokens[:1], **GREEDY)


def test_compiled_steps_read_the_weights_of_now(tokens):
    """Rows are made anew for assigned weights, and for those of a copy, before compiled code reads them."""
    model, other = make(sparse_config("llama")).prepare_for_decode(), make(sparse_config("llama"), seed=1)

    @torch.no_grad()
    def logits(of: nn.Module, step) -> torch.Tensor:
        cache = of(tokens[:1, :6], use_cache=True).past_key_values
        return step(tokens[:1, 6:7], past_key_values=cache).logits

    step = torch.compile(model, backend="eager")
    assert_close(logits(model, step), logits(model, model))
    model.load_state_dict(other.state_dict(), assign=True)
    assert_close(logits(model, step), logits(other, other))
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.mul_(0.5)
    assert_close(logits(copied, torch.compile(copied, backend="eager")), logits(copied.restore(), copied))


def test_prepared_in_inference_mode_and_trained_afterwards(tokens):
    model = make(sparse_config("qwen2"))
    with torch.inference_mode():
        model.prepare_for_decode().generate(tokens[:1], **GREEDY)
        model.load_state_dict(model.state_dict())
    model(tokens, labels=tokens).loss.backward()
    with torch.inference_mode():
        model.restore()
    model(tokens, labels=tokens).loss.backward()
    with torch.inference_mode():
        unchangeable = make(sparse_config("llama"))
    with pytest.raises(ValueError, match="q_proj of layer 0 was made in inference mode"):
        unchangeable.prepare_for_decode()


def test_few_tokens_are_those_of_the_sparsity_at_work():
    model = make(sparse_config("llama", sparsity=0.75)).prepare_for_decode()
    norm, linear = model.model.layers[0].input_layernorm, model.model.layers[0].self_attn.q_proj
    for factor in (1, 0.1):
        model.scale_sparsity(factor)
        assert norm.few == few_tokens(0.75 * factor, linear)
    assert few_tokens(0.75, linear) != few_tokens(0.075, linear)


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
    real = prepare.lay_out
    monkeypatch.setattr(prepare, "lay_out", lambda *linears: (next(calls), real(*linears)))
    with pytest.raises((StopIteration, RuntimeError)):
        model.prepare_for_decode()
    assert [type(module) for module in model.modules()] == classes
    assert all(parameter.is_contiguous() for parameter in model.parameters())


def test_a_state_dict_is_an_ordinary_one(tmp_path):
    model = make(sparse_config("llama"))
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.prepare_for_decode()
    save_file(model.state_dict(), tmp_path / "file")
    model.save_pretrained(tmp_path / "folder", state_dict=model.state_dict())
    rows = model.model.layers[0].mlp.gate_proj.rows
    with torch.no_grad():
        state = model.state_dict()
        state["model.layers.0.mlp.gate_proj.weight"].zero_()
    assert model.model.layers[0].mlp.gate_proj.rows is rows  # a call of `generate` beside this goes on
    assert model.model.layers[0].mlp.gate_proj.weight.any()
    assert model.state_dict(keep_vars=True)["model.layers.0.mlp.gate_proj.weight"].requires_grad
    for saved in (load_file(tmp_path / "file"), load_file(tmp_path / "folder" / "model.safetensors")):
        assert all(torch.equal(tensor, expected[name]) for name, tensor in saved.items())


def test_adapters_on_a_prepared_model(tokens, tmp_path):
    model = make(sparse_config("llama")).prepare_for_decode()
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["down_proj"]))
    with pytest.raises(RuntimeError, match=r"replaced by a peft.*Linear; call the model"):
        adapted.generate(input_ids=tokens[:1], **GREEDY)
    model.restore()
    adapted.generate(input_ids=tokens[:1], **GREEDY)
    assert adapted.merge_and_unload().prepare_for_decode().is_prepared
    with torch.no_grad():
        assert sparsity_report(model, tokens[:1, :1]).tokens == 1  # its hooks see a prepared model too
    assert model.is_prepared


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
    written = model.generate(tokens[:1, :10], **GREEDY)
    assert "".join(streamer) == tiny_tokenizer.decode(written[0])


def test_a_large_batch_is_decoded_densely_and_that_is_said(caplog, products, monkeypatch):
    monkeypatch.setattr("qsparse_hf.modeling.backend._said", set())
    model = make(sparse_config("llama")).prepare_for_decode()
    few = model.model.layers[0].input_layernorm.few
    prompt = torch.full((few + 1, 4), 7)
    with caplog.at_level(logging.WARNING, "qsparse_hf"):
        model.generate(prompt, **GREEDY)
    assert products == []
    assert [record.message for record in caplog.records if "dense" in record.message] == [
        f"decoding {few + 1} sequences at once with dense products: at sparsity 0.5 those that skip zeros are no "
        f"faster beyond {few}"
    ]


def test_what_cannot_be_prepared_is_named(tokens):
    adapted = get_peft_model(make(sparse_config("llama")), LoraConfig(r=2, target_modules=["up_proj"]))
    with pytest.raises(ValueError, match=r"up_proj of layer 0 is a peft.*Linear with .*merge adapters before"):
        adapted.base_model.model.prepare_for_decode()
    assert not adapted.base_model.model.is_prepared
    merged = adapted.merge_and_unload()
    assert merged.prepare_for_decode().is_prepared
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(sparse_config("llama"))
    with pytest.raises(ValueError, match=r"q_proj of layer 0 is a torch.*Linear with a Tensor on meta"):
        empty.prepare_for_decode()


SHORT = GREEDY | {"max_new_tokens": 6}
QUICKLY = {"compile_config": CompileConfig(backend="eager", fullgraph=False)}
"""Where Transformers compiles what no graph takes, without a compiler's minutes."""


@pytest.fixture
def replays(monkeypatch) -> list[DecodeGraph]:
    """Steps run where a GPU replays them, through Triton's interpreter; a list of those captured, which grows."""
    captured = []

    class Replay:
        def __init__(self, step: DecodeGraph) -> None:
            self.step = step

        def replay(self) -> None:
            self.step.logits = self.step._step()

    def capture(step: DecodeGraph) -> None:
        step.graph = Replay(step)
        captured.append(step)

    monkeypatch.setattr(DecodeGraph, "_capture", capture)
    for module in (graph, generation):
        monkeypatch.setattr(module, "has_graphs", lambda device: True)
    monkeypatch.setattr(graph, "runs", lambda *arguments: True)
    monkeypatch.setattr(GenerationMixin, "_valid_auto_compile_criteria", lambda self, kwargs, config: self.is_prepared
                        and isinstance(kwargs.get(CACHE), StaticCache))  # fmt: skip
    return captured


@pytest.mark.parametrize("family", DISTINCT)
def test_one_step_for_many_calls(family, tokens, replays):
    """Lengths within the cache, padding and sampling change, the step stays; the tokens are the unprepared model's."""
    model = make(sparse_config(family))
    longest = 8 if family != "llama" else 10  # the families' windows
    padding = {"attention_mask": torch.tensor([[0, 0, 1, 1]])}
    calls = [
        {"inputs": tokens[:1, :4], "max_new_tokens": longest - 4},
        {"inputs": tokens[1:, :3], "max_new_tokens": 4},
        {"inputs": tokens[:1, 4:8], "max_new_tokens": 3} | padding,
        {"inputs": tokens[:1, :4], "max_new_tokens": 4},
    ]
    expected = [model.generate(**SHORT | call) for call in calls]
    model.prepare_for_decode()
    for call, wanted in zip(calls, expected, strict=True):
        assert torch.equal(model.generate(**SHORT | call), wanted)
    assert len(replays) == 1
    torch.manual_seed(0)
    sampled = model.generate(**SHORT | calls[0] | {"do_sample": True})
    model.scale_sparsity(0.5)
    model.generate(**SHORT | calls[0])
    assert len(replays) == 2  # another K is another step
    model.scale_sparsity(1)
    torch.manual_seed(0)
    assert torch.equal(model.restore().generate(**SHORT | calls[0] | {"do_sample": True}), sampled)
    assert not hasattr(model, "_spare_cache")


@pytest.mark.parametrize("option", OPTIONS)
def test_a_familys_options(option, tokens, request):
    """Decoded without a graph; and with one where there can be, if the option reaches the attention."""
    model = make(sparse_config(option.split()[0], **OPTIONS[option]))
    windows = getattr(model.config, "sliding_window", None) is not None
    call = SHORT | {"inputs": tokens[:, : 4 if windows else 12], "max_new_tokens": 4 if windows else 6}
    expected = model.generate(**call)
    assert torch.equal(model.prepare_for_decode().generate(**call), expected)
    if any(words in option for words in ("mlp", "tied", "tp", "activation", "uncapped", "linear", "yarn", "llama3")):
        return
    replays = request.getfixturevalue("replays")
    if any(words in option for words in ("dynamic", "longrope", "no power of two")):
        cache = StaticCache(config=model.config, max_cache_len=8)
        with torch.no_grad():
            model(tokens[:1, :4], **{CACHE: cache})
        assert why_no_graph(model, cache)
    else:
        assert torch.equal(model.generate(**call), expected)
        assert len(replays) == 1


def test_phi3_begins_a_new_cache_where_its_rotary_embedding_switches(tokens, replays):
    model = make(sparse_config("phi3", **OPTIONS["phi3 longrope"]))
    call = SHORT | QUICKLY | {"inputs": tokens[:, :12]}
    expected = model.generate(**call)
    model.prepare_for_decode()
    assert torch.equal(model.generate(**call), expected)
    assert model._spare_cache is None  # left to Transformers
    assert torch.equal(model.generate(**call, cache_implementation="static"), expected)
    assert replays == []


@pytest.mark.parametrize(
    ("sequences", "fields"), [(2, {}), (3, {"sparsity_per_projection": {"qkv": 0}})], ids=["2", "3 with dense qkv"]
)
@pytest.mark.parametrize("family", DISTINCT)
def test_batches_in_one_step(family, fields, sequences, tokens, replays):
    """Within and beyond the products' profitable size; q, k and v are parts of one tensor, or not."""
    model = make(sparse_config(family, **fields))
    prompts = torch.cat([tokens, tokens.flip(0)])[:sequences, :4]
    call = SHORT | {"inputs": prompts, "max_new_tokens": 4}
    expected = model.generate(**call)
    assert torch.equal(model.prepare_for_decode().generate(**call), expected)
    assert len(replays) == 1


def test_a_window_that_moves_is_left_to_transformers(tokens, replays):
    model = make(sparse_config("mistral"))
    expected = model.generate(tokens[:1, :4], **SHORT)
    assert torch.equal(model.prepare_for_decode().generate(tokens[:1, :4], **SHORT, **QUICKLY), expected)
    assert len(replays) == 1


def test_who_holds_a_cache_keeps_it(tokens, replays):
    model = make(sparse_config("llama"))
    prompt = tokens[:1, :6]
    ways = {
        "returned": {"return_dict_in_generate": True},
        "given": {"past_key_values": StaticCache(config=model.config, max_cache_len=32)},
        "beams": {"num_beams": 3, "cache_implementation": "static"},
        "assisted": {"assistant_model": make(sparse_config("llama"), seed=1).prepare_for_decode()},
        "no cache": {"use_cache": False},
    }
    expected = model.generate(prompt, **SHORT)
    of_beams = model.generate(prompt, **SHORT | {"num_beams": 3})
    model.prepare_for_decode()
    for name, way in ways.items():
        result = model.generate(prompt, **SHORT | way)
        wanted = of_beams if name == "beams" else expected
        assert torch.equal(getattr(result, "sequences", result), wanted), name
    returned = model.generate(prompt, **SHORT | ways["returned"])
    model.generate(tokens[1:, :6], **SHORT)
    goes_on = torch.cat([returned.sequences, tokens[:1, 6:9]], dim=1)
    assert torch.equal(
        model.generate(goes_on, past_key_values=returned.past_key_values, **SHORT), model.generate(goes_on, **SHORT)
    )
    with torch.inference_mode():
        model.generate(prompt, **SHORT)
    assert torch.equal(model.generate(prompt, **SHORT), expected)


def test_calls_at_once_have_caches_of_their_own(tokens, replays):
    model = make(sparse_config("llama")).prepare_for_decode()
    alone = [model.generate(tokens[i : i + 1, :6], **SHORT) for i in range(2)]
    inner = []

    def within(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if input_ids.shape[1] == 8:
            inner.append(model.generate(tokens[1:, :6], **SHORT))
        return scores

    outer = model.generate(tokens[:1, :6], logits_processor=LogitsProcessorList([within]), **SHORT)
    assert torch.equal(outer, alone[0])
    assert torch.equal(inner[0], alone[1])


def test_a_full_cache_is_said(tokens, replays):
    model = make(sparse_config("llama")).prepare_for_decode()
    cache = StaticCache(config=model.config, max_cache_len=8)
    with pytest.raises(ValueError, match="the static cache is full: it has 8 entries"):
        model.generate(tokens[:1, :6], past_key_values=cache, **SHORT)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda model, cache: setattr(model, "hf_device_map", {"a": 0, "b": 1}), "several devices"),
        (lambda model, cache: model.set_attn_implementation("flex_attention"), "'flex_attention'"),
        (lambda model, cache: setattr(model.config, "rope_parameters", {"rope_type": "longrope"}), "'longrope'"),
        (lambda model, cache: setattr(model.config, "rope_parameters", {"rope_type": "dynamic"}), "'dynamic'"),
        (lambda model, cache: setattr(model.model.layers[0].self_attn, "head_dim", 24), "size 24, no power of two"),
        (lambda model, cache: setattr(cache, "offloading", True), "is offloaded"),
        (lambda model, cache: cache.layers.append(DynamicCache(config=model.config).layers[0]), "not static"),
    ],
)
def test_what_stands_in_the_way_of_a_graph_is_said(change, said, tokens, replays):
    model = make(sparse_config("llama")).prepare_for_decode()
    cache = StaticCache(config=model.config, max_cache_len=8)
    with torch.no_grad():
        model(tokens[:1, :4], past_key_values=cache)
    assert why_no_graph(model, cache) is None
    with torch.autocast("cpu", torch.bfloat16):
        assert why_no_graph(model, cache) == "autocast is on"
    change(model, cache)
    assert said in why_no_graph(model, cache)
    assert not graph.fits(model, cache, 1)


def test_a_step_without_a_graph_is_said(tokens, replays, caplog, monkeypatch):
    monkeypatch.setattr("qsparse_hf.modeling.backend._said", set())
    model = make(sparse_config("llama", head_dim=24)).prepare_for_decode()
    with caplog.at_level(logging.INFO, "qsparse_hf"):
        model.generate(tokens[:1, :4], **SHORT, **QUICKLY)
    assert replays == []
    assert "heads are of size 24, no power of two" in caplog.text


def test_restored_within_generate(tokens, replays):
    model = make(sparse_config("llama"))
    expected = model.generate(tokens[:1, :6], **SHORT)

    def within(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if input_ids.shape[1] == 8:  # two steps in, by a graph that reads what is given back
            model.restore()
        return scores

    model.prepare_for_decode()
    assert torch.equal(
        model.generate(tokens[:1, :6], logits_processor=LogitsProcessorList([within]), **SHORT), expected
    )
    assert len(replays) == 1
    assert not hasattr(model, "_spare_cache")


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
        cache.decode_graph = step = DecodeGraph(model, cache, len(prompt))
        assert copy.deepcopy(cache).decode_graph is None
        step.tokens.copy_(new)
        step.positions.copy_(positions[:, -1:])
        step.mask[:, 0, 0, : mask.shape[1]].copy_(mask)
        assert_close(step._step()[:, 0], whole[:, -1])
    assert [layer.cumulative_length.item() for layer in cache.layers] == [7, 7]


def test_from_embeddings(tokens, replays):
    model = make(sparse_config("llama"))
    embeddings = model.get_input_embeddings()(tokens[:1, :4]).detach()
    expected = model.generate(inputs_embeds=embeddings, **GREEDY)
    model.prepare_for_decode()
    assert torch.equal(model.generate(inputs_embeds=embeddings, **GREEDY), expected)
    assert len(replays) == 1


@pytest.mark.parametrize("prompts", [PromptTuningConfig, PrefixTuningConfig])
def test_learned_prompts_say_what_a_step_is_given(tokens, replays, prompts):
    model = get_peft_model(make(sparse_config("llama")), prompts(task_type="CAUSAL_LM", num_virtual_tokens=5))
    prompt = {"input_ids": tokens[:1, :4], "attention_mask": torch.ones(1, 4, dtype=torch.long)}
    expected = model.generate(**prompt, **GREEDY)
    model.get_base_model().prepare_for_decode()
    assert torch.equal(model.generate(**prompt, **GREEDY), expected)
    assert replays == []


def test_subclasses_say_what_a_step_is_given(tokens, replays):
    model = make(sparse_config("llama"))

    class Shifted(type(model)):
        def prepare_inputs_for_generation(self, input_ids, **kwargs):
            inputs = super().prepare_inputs_for_generation(input_ids, **kwargs)
            return inputs | {"position_ids": inputs["position_ids"] + 1}

    class Forgetful(type(model)):
        def _update_model_kwargs_for_generation(self, outputs, model_kwargs, **kwargs):
            model_kwargs = super()._update_model_kwargs_for_generation(outputs, model_kwargs, **kwargs)
            mask = model_kwargs["attention_mask"].clone()
            mask[:, :-4] = 0
            return model_kwargs | {"attention_mask": mask}

    prompt = {"input_ids": tokens[:1, :6], "attention_mask": torch.tensor([[0, 1, 1, 1, 1, 1]])}
    for subclass in (Shifted, Forgetful):
        model.__class__ = subclass
        model.restore()
        expected = model.generate(**prompt, **GREEDY)
        model.prepare_for_decode()
        assert torch.equal(model.generate(**prompt, **GREEDY), expected)
    assert replays == []


def test_a_bias_that_is_replaced(tokens):
    model = make(sparse_config("qwen2")).prepare_for_decode()
    model.generate(tokens[:1, :4], **GREEDY)
    for layer in model.model.layers:
        layer.self_attn.q_proj.bias = nn.Parameter(torch.randn(64))
    logits = []
    with torch.no_grad():
        for _ in range(2):
            cache = model(tokens[:1, :6], use_cache=True).past_key_values
            logits.append(model(tokens[:1, 6:7], past_key_values=cache).logits)
            model.restore()
    assert_close(*logits)


def test_a_copy_has_no_cache_of_the_last_call(tokens, replays):
    model = make(sparse_config("llama")).prepare_for_decode()
    model.generate(tokens[:1, :4], **GREEDY)
    assert model._spare_cache is not None
    assert copy.deepcopy(model)._spare_cache is None


def test_a_decoder_that_was_prepared_alone_is_prepared_whole(tokens, products):
    model = make(sparse_config("llama"))
    expected = model.generate(tokens[:1], **GREEDY)
    model.model.prepare_for_decode()
    assert model.model.is_prepared
    assert model.prepare_for_decode().is_prepared
    assert torch.equal(model.generate(tokens[:1], **GREEDY), expected)
    assert products
    classes = [type(module) for module in make(sparse_config("llama")).modules()]
    assert [type(module) for module in model.restore().modules()] == classes


def hooked(module: nn.Module) -> None:
    add_hook_to_module(module, ModelHook())


def bound(module: nn.Module) -> None:
    module.forward = module.forward


@pytest.mark.parametrize("change", [hooked, bound])
@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
def test_forwards_that_were_bound_to_a_class_follow_it(family, change, first, tokens, products):
    """As accelerate's hooks keep them, of models on several devices for instance."""
    model = make(sparse_config(family))
    expected = model.generate(tokens[:1], **GREEDY)
    if not first:
        model.prepare_for_decode()
    for layer in model.model.layers:
        for module in (layer, layer.self_attn, layer.mlp):
            change(module)
    model.prepare_for_decode()
    assert torch.equal(model.generate(tokens[:1], **GREEDY), expected)
    assert products
    assert torch.equal(model.restore().generate(tokens[:1], **GREEDY), expected)
    assert torch.equal(model.prepare_for_decode().generate(tokens[:1], **GREEDY), expected)


@pytest.mark.parametrize("offloaded", [False, True])
def test_a_dispatched_model(offloaded, tokens, tmp_path):
    model = make(sparse_config("llama"))
    expected = model.generate(tokens[:1], **GREEDY)
    model.save_pretrained(tmp_path / "model")
    places = dict.fromkeys(["model.norm", "lm_head", "model.rotary_emb", "model.layers.0", "model.layers.1"], "cpu")
    places["model.embed_tokens"] = "disk"
    if offloaded:
        places["model.layers.1"] = "disk"
    placed = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map=places, offload_folder=tmp_path / "offload"
    )
    if offloaded:
        with pytest.raises(ValueError, match=r"of layer 1 is a .* on meta"):
            placed.prepare_for_decode()
    else:
        placed.prepare_for_decode()
    assert torch.equal(placed.generate(tokens[:1], **GREEDY), expected)


def test_another_forward_in_its_class_s_place_is_named():
    model = make(sparse_config("llama"))
    mlp = model.model.layers[1].mlp
    mlp.forward = lambda x, inner=mlp.forward: inner(x)
    with pytest.raises(ValueError, match="the mlp of layer 1 has a forward of its own in its class's place"):
        model.prepare_for_decode()
    assert not model.is_prepared


@pytest.mark.parametrize("heads", [2, 4])
@pytest.mark.parametrize("named", ["numba", "torch", "reference"])
def test_a_named_backend_decodes_too(named, heads, tokens, monkeypatch):
    """As the environment variable QSPARSE_BACKEND names one when the package is imported."""
    if named == "numba":
        pytest.importorskip("numba")
    model = make(sparse_config("llama", num_key_value_heads=heads))
    expected = model.generate(tokens[:1], **GREEDY)
    monkeypatch.setattr("qsparse_hf.modeling.backend._ASKED", named)
    assert torch.equal(model.generate(tokens[:1], **GREEDY), expected)
    assert torch.equal(model.prepare_for_decode().generate(tokens[:1], **GREEDY), expected)
