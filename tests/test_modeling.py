"""Every family through one suite, from the public door: what a Transformers user expects of a causal LM."""

import contextlib
import inspect
import json
import os
import re
import subprocess
import sys
from functools import partial

import pytest
import torch
from conftest import (
    DISTINCT,
    FAMILIES,
    OPTIONS,
    REPOSITORY,
    TINY,
    assert_close,
    dense_config,
    make,
    make_pair,
    run_python,
    sparse_config,
)
from huggingface_hub.errors import StrictDataclassError
from peft import IA3Config, LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AttentionMaskInterface,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    pipeline,
)
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import qsparse_hf
from qsparse_hf.modeling import sparsify
from qsparse_hf.modeling.configuration_qsparse import GROUPS
from qsparse_hf.modeling.sparsify import IMPLS
from qsparse_hf.modeling.sparsity import Selection, kept_features
from qsparse_hf.report import projections

DTYPES = [torch.float32, torch.bfloat16]


def projection_inputs(model, **inputs) -> dict[tuple[int, str], list[torch.Tensor]]:
    """What each projection of a (layer, group) reads in one forward pass."""
    read = {}
    hooks = [
        module.register_forward_pre_hook(lambda _, args, key=(layer, group): read.setdefault(key, []).append(args[0]))
        for layer, group, module in projections(model)
    ]
    with torch.no_grad():
        model(**inputs)
    for hook in hooks:
        hook.remove()
    return read


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_at_sparsity_zero_the_model_is_the_dense_one_bit_for_bit(family, dtype, attention, tokens):
    dense, sparse = make_pair(family, dtype, sparsity=0)
    assert list(sparse.state_dict()) == list(dense.state_dict())
    for model in (dense, sparse):
        model.set_attn_implementation(attention)
    assert torch.equal(sparse(tokens).logits, dense(tokens).logits)


@pytest.mark.parametrize("option", OPTIONS)
def test_a_familys_options_at_sparsity_zero(option, tokens):
    dense, sparse = make_pair(option.split()[0], options=OPTIONS[option], sparsity=0)
    assert list(sparse.state_dict()) == list(dense.state_dict())
    assert torch.equal(sparse(tokens).logits, dense(tokens).logits)
    call = {"inputs": tokens[:, :10], "max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    assert torch.equal(sparse.generate(**call), dense.generate(**call))


def test_what_a_family_cannot_have_is_named():
    with pytest.raises(StrictDataclassError, match="use_bidirectional_attention must be False"):
        sparse_config("gemma3_text", use_bidirectional_attention=True)


def test_a_new_family_starts_where_the_dense_one_does(family):
    """Transformers tells by a module's class how to fill its weights."""
    configs = dense_config(family), sparse_config(family)
    dense, sparse = (AutoModelForCausalLM.from_config(config).state_dict() for config in configs)
    for name, weight in dense.items():
        if "norm" in name:
            assert torch.equal(sparse[name], weight)
        else:
            assert sparse[name].std().item() == pytest.approx(weight.std().item(), rel=0.2)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_every_projection_reads_a_sparsified_input_that_its_group_shares(family, attention, tokens):
    ratios = {"o": [0.25, 0.75], "down": 0.6}
    model = make(sparse_config(family, sparsity_per_projection=ratios), attn_implementation=attention)
    read = projection_inputs(model, input_ids=tokens)
    expected = {"qkv": [0.5, 0.5], "o": [0.25, 0.75], "gate_up": [0.5, 0.5], "down": [0.6, 0.6]}
    assert len(read) == 2 * len(GROUPS)
    for (layer, group), inputs in read.items():
        assert len(inputs) == len(model.config.projection_groups[group].linears)
        assert all(x is inputs[0] for x in inputs)
        kept = kept_features(inputs[0].shape[-1], expected[group][layer])
        assert ((inputs[0] != 0).sum(-1) == kept).all()


def test_blocks_keep_the_same_number_everywhere(family, tokens):
    model = make(sparse_config(family, sparsity_block_size=16, sparsity=0.75))
    for x, *_ in projection_inputs(model, input_ids=tokens).values():
        assert ((x.unflatten(-1, (-1, 16)) != 0).sum(-1) == 4).all()


def test_the_rescale_reaches_every_projection(family, tokens):
    model = make(sparse_config(family, sparsity_rescale="l2"))
    for x, *_ in projection_inputs(model, input_ids=tokens).values():
        assert_close(x.norm(dim=-1), torch.ones(2, 24))


def test_head_dim_sets_the_width_of_the_attention_output(family):
    fields = {"head_dim": 8, "sparsity_block_size": 32}  # 4 heads of 8 are 32 features, beside a hidden size of 64
    assert make(sparse_config(family, **fields)).model.layers[0].self_attn.o_proj.in_features == 32
    with pytest.raises(StrictDataclassError, match=r"num_attention_heads \* head_dim \(24\)"):
        sparse_config(family, head_dim=6, sparsity_block_size=32)


def test_attention_functions_get_dropout_window_and_every_argument(family, tokens):
    seen = []

    def attention(module, query, key, value, mask, **kwargs):
        seen.append(kwargs)
        return torch.zeros_like(query.transpose(1, 2)), None

    ALL_ATTENTION_FUNCTIONS.register("recorder", attention)
    AttentionMaskInterface.register("recorder", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    model = make(sparse_config(family, attention_dropout=0.25), attn_implementation="recorder")
    model.train()(tokens, something="passed on")
    model.eval()(tokens)
    windows = {
        "llama": [None, None],
        "bitnet": [None, None],
        "mistral": [8, 8],
        "phi3": [8, 8],
        "gemma3_text": [8, None],
    }
    windows = windows.get(family, [None, 8])
    assert [call["dropout"] for call in seen] == [0.25, 0.25, 0, 0]
    assert [call["sliding_window"] for call in seen] == windows * 2
    assert [call.get("something") for call in seen] == ["passed on", "passed on", None, None]


def test_families_keep_what_makes_them_differ(tokens):
    mistral, qwen2 = make(sparse_config("mistral")), make(sparse_config("qwen2"))
    assert qwen2.model.layers[0].self_attn.q_proj.bias is not None
    assert qwen2.config.layer_types == ["full_attention", "sliding_attention"]
    assert [layer.self_attn.window() for layer in qwen2.model.layers] == [None, 8]
    assert [layer.self_attn.window() for layer in mistral.model.layers] == [8, 8]
    # Two layers of window 8 see 15 tokens: the 24th does not notice the first.
    changed = tokens.clone()
    changed[:, 0] = (tokens[:, 0] + 1) % TINY["vocab_size"]
    assert torch.equal(mistral(tokens).logits[:, -1], mistral(changed).logits[:, -1])
    assert not torch.equal(qwen2(tokens).logits[:, -1], qwen2(changed).logits[:, -1])


def test_registered_classes(family, tmp_path):
    model = make(sparse_config(family))
    model.save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is FAMILIES[family][1]
    causal_lm = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(causal_lm) is type(model)
    assert type(AutoModel.from_pretrained(tmp_path)) is type(causal_lm.model)
    assert type(causal_lm.model).__name__ == type(model).__name__.replace("ForCausalLM", "Model")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"sparsity": 1.0}, "sparsity .*0 <= sparsity < 1.* got 1.0"),
        ({"sparsity": -0.1}, "sparsity .* got -0.1"),
        ({"sparsity": float("nan")}, "sparsity .* got nan"),
        ({"sparsity": "x"}, "'sparsity' .*'x'.*float"),
        ({"sparsity_block_size": 24}, r"sparsity_block_size .* divides hidden_size \(64\), got 24"),
        ({"sparsity_block_size": 64}, r"sparsity_block_size .* divides intermediate_size \(96\), got 64"),
        ({"sparsity_per_projection": {"gate": 0.5}}, "'gate'.* qkv, o, gate_up, down"),
        ({"sparsity_per_projection": {"o": 1.5}}, r"sparsity_per_projection\['o'\] .* got 1.5"),
        ({"sparsity_per_projection": {"o": [0.5]}}, r"sparsity_per_projection\['o'\] .*one per layer \(2\), got 1"),
        ({"sparsity_per_projection": {"o": [0.5, "x"]}}, r"sparsity_per_projection\['o'\]\[1\] .* got 'x'"),
        ({"sparsity_rescale": "l1"}, "sparsity_rescale .*'none', 'l2', got 'l1'"),
        ({"sparsity_ste": "no"}, "'sparsity_ste' .*bool.*'no'"),
    ],
)
def test_bad_fields_raise_at_construction(family, fields, said):
    with pytest.raises(StrictDataclassError) as error:
        sparse_config(family, **fields)
    assert re.search(said, str(error.value), re.DOTALL)


def test_fields_are_keywords_of_from_pretrained(family, tmp_path, tokens):
    make(sparse_config(family)).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, sparsity=0.25, sparsity_per_projection={"o": 0.75})
    kept = {
        group: (inputs[0] != 0).sum(-1).unique().tolist()
        for (_, group), inputs in projection_inputs(model, input_ids=tokens).items()
    }
    assert kept == {"qkv": [48], "o": [model.config.attention_size // 4], "gate_up": [48], "down": [72]}
    for fields in ({"sparsity": 1.0}, {"sparsity_block_size": 24}, {"sparsity_per_projection": {"gate": 0.5}}):
        with pytest.raises(StrictDataclassError, match=next(iter(fields))):
            AutoModelForCausalLM.from_pretrained(tmp_path, **fields)


def test_eager_and_sdpa_agree_and_outputs_are_captured(family, tokens):
    sdpa = make(sparse_config(family, sparsity=0.25))
    eager = make(sparse_config(family, sparsity=0.25), attn_implementation="eager")
    out = eager(tokens, output_hidden_states=True, output_attentions=True)
    assert len(out.hidden_states) == 3
    assert [tuple(weights.shape) for weights in out.attentions] == [(2, 4, 24, 24)] * 2
    # Rounding may swap the features at the edge of a top-K, so the two are compared where none is taken.
    for model in (eager, sdpa):
        model.scale_sparsity(0)
    assert_close(sdpa(tokens).logits, eager(tokens).logits)


def test_flash_attention_is_selectable_as_in_the_dense_model(family):
    # Neither machine of the tests has flash-attn: both models must give the same reason.
    reasons = []
    for config in (dense_config(family), sparse_config(family)):
        with pytest.raises(ImportError) as error:
            AutoModelForCausalLM.from_config(config, attn_implementation="flash_attention_2")
        reasons.append(str(error.value))
    assert reasons[0] == reasons[1]


def test_generation_modes_agree(family, tokens):
    model = make(sparse_config(family))
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    greedy = model.generate(tokens, **options)
    assert greedy.shape == (2, 36)
    assert torch.equal(model.generate(tokens, use_cache=False, **options), greedy)
    assert torch.equal(model.generate(tokens, cache_implementation="static", **options), greedy)
    dense, twin = make_pair(family, sparsity=0)
    assert torch.equal(*(candidate.generate(tokens, num_beams=3, **options) for candidate in (dense, twin)))
    assert model.generate(tokens, num_beams=3, **options).shape == (2, 36)
    # Transformers 5.17 cannot take tokens back from a full window, of dense models either: here it does not fill.
    window = {} if family == "llama" else {"sliding_window": 64}
    model = make(sparse_config(family, **window))
    assistant = make(sparse_config(family, num_hidden_layers=1, **window), seed=3)
    assisted = model.generate(tokens[:1], assistant_model=assistant, **options)
    assert torch.equal(assisted, model.generate(tokens[:1], **options))


def test_left_padding_changes_nothing(family, tokens):
    model = make(sparse_config(family))
    padded = torch.cat([torch.zeros(2, 5, dtype=torch.long), tokens], dim=1)
    mask = (torch.arange(29) >= 5).long().expand(2, -1)
    positions = (torch.arange(29) - 5).clamp_min(0).expand(2, -1)
    with torch.no_grad():
        logits = model(padded, attention_mask=mask, position_ids=positions).logits[:, 5:]
        assert_close(logits, model(tokens).logits)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    together = model.generate(padded, attention_mask=mask, **options)
    assert torch.equal(together[:, 5:], model.generate(tokens, **options))


def test_gradient_checkpointing_gives_the_same_gradients(family, tokens):
    model = make(sparse_config(family)).train()
    gradients = []
    for enable in (None, model.gradient_checkpointing_enable):
        if enable:
            enable()
        model.zero_grad()
        torch.manual_seed(0)  # of the dropout of some
        model(tokens, labels=tokens).loss.backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        assert torch.equal(plain, checkpointed)


def test_straight_through_gradients_reach_the_lower_layers_undimmed(family, tokens):
    norms = {}
    for ste in (True, False):
        model = make(sparse_config(family, sparsity=0.75, sparsity_ste=ste))
        model(tokens, labels=tokens).loss.backward()
        norms[ste] = model.model.embed_tokens.weight.grad.norm().item()
    assert norms[True] > 1.5 * norms[False]  # fig. 2


@pytest.mark.parametrize("family", DISTINCT)
def test_torch_compile(family, tokens):
    model = make(sparse_config(family))
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    model.scale_sparsity(0)
    assert_close(compiled(tokens).logits, model(tokens).logits)
    model.scale_sparsity(1)
    expected = model(tokens).logits
    # Rounding may swap the two features at the edge of a top-K, which moves some logits a little.
    assert (compiled(tokens).logits - expected).abs().mean() < 0.01 * expected.abs().mean()


def test_resize_token_embeddings(family, tokens):
    model = make(sparse_config(family))
    before = model(tokens).logits
    model.resize_token_embeddings(160)
    after = model(tokens).logits
    assert after.shape[-1] == 160
    assert_close(after[..., :128], before)


def test_scale_sparsity(family, tokens):
    dense, model = make_pair(family)
    configured = model(tokens).logits
    model.scale_sparsity(0)
    assert torch.equal(model(tokens).logits, dense(tokens).logits)
    model.scale_sparsity(0.5)
    for x, *_ in projection_inputs(model, input_ids=tokens).values():
        assert ((x != 0).sum(-1) == kept_features(x.shape[-1], 0.25)).all()
    model.scale_sparsity(1)
    assert torch.equal(model(tokens).logits, configured)
    with pytest.raises(ValueError, match=r"between 0 and 1, got 1.5"):
        model.scale_sparsity(1.5)


def test_lora_merged_and_unmerged_agree(family, tokens):
    model = make(sparse_config(family), dtype=torch.float64)
    targets = [name for group in model.config.projection_groups.values() for name in group.names]
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=targets, init_lora_weights=False)).eval()
    with torch.no_grad():
        unmerged = adapted(tokens).logits
        merged = adapted.merge_and_unload()(tokens).logits
    assert_close(merged, unmerged)


@pytest.mark.parametrize("method", [partial(LoraConfig, r=2), partial(IA3Config, task_type="CAUSAL_LM")])
def test_adapters_have_the_dense_familys_default_targets(family, method):
    """PEFT knows none of Phi-3 and BitNet."""
    adapted = []
    for config in (dense_config(family), sparse_config(family)):
        if family in ("phi3", "bitnet"):
            with pytest.raises(ValueError, match="specify `target_modules`"):
                get_peft_model(make(config), method())
        else:
            model = get_peft_model(make(config), method())
            adapted.append({name for name, parameter in model.named_parameters() if parameter.requires_grad})
    assert len({frozenset(names) for names in adapted}) <= 1
    assert all(adapted)


def test_label_smoothing_shifts_labels(family, tmp_path, tokens):
    arguments = TrainingArguments(tmp_path, label_smoothing_factor=0.1, report_to="none", use_cpu=True)
    batch = {"input_ids": tokens, "labels": tokens}
    dense, sparse = make_pair(family, sparsity=0)
    losses = [Trainer(model, arguments).compute_loss(model, dict(batch)).item() for model in (dense, sparse)]
    assert losses[0] == losses[1]


def test_text_generation_pipeline_and_device_map(family, tmp_path):
    make(sparse_config(family)).save_pretrained(tmp_path)
    vocabulary = {f"w{i}": i for i in range(TINY["vocab_size"])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w2", pad_token="w0").save_pretrained(tmp_path)
    generate = pipeline("text-generation", model=str(tmp_path), device_map="auto")
    text = generate("w5 w6", max_new_tokens=4, min_new_tokens=4, do_sample=False)[0]["generated_text"]
    assert text.startswith("w5 w6")
    assert text.count("w") == 6


REMOTE = """
import sys
sys.modules["qsparse_hf"] = None  # as if it were not installed
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
tokens, *folders = sys.argv[1:]
tokens = load_file(tokens)["tokens"]
for folder in folders:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    base = AutoModel.from_pretrained(folder, trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules"), type(model)
    assert type(base).__name__ == type(model.model).__name__
    assert type(model).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()  # label smoothing shifts for these
    with torch.no_grad():
        logits = model(tokens).logits
    save_file({"logits": logits}, folder + "-logits")
    model.save_pretrained(folder + "-again")
    again = AutoModelForCausalLM.from_pretrained(folder + "-again", trust_remote_code=True)
    assert torch.equal(again(tokens).logits, logits)
    model.generate(tokens, max_new_tokens=2, do_sample=False, pad_token_id=0)
    try:
        model.prepare_for_decode()
    except ImportError as error:
        assert "`pip install qsparse-hf`" in str(error) and "\\n" not in str(error), error
    else:
        raise AssertionError("prepared without kernels")
    assert model.restore() is model
"""


def test_a_saved_folder_carries_little_code(family, tmp_path):
    """Frozen with the checkpoint: no fix reaches it, so it states the mathematics alone."""
    make(sparse_config(family)).save_pretrained(tmp_path)
    code = list(tmp_path.glob("*.py"))
    assert len(code) <= 8
    assert sum(len(path.read_text().splitlines()) for path in code) <= 1500


def test_loads_without_this_package_and_with_it_the_local_classes_win(tmp_path, tokens):
    save_file({"tokens": tokens}, tmp_path / "tokens")
    models = {
        family: make(sparse_config(family, sparsity_per_projection={"down": [0.25, 0.75]})) for family in FAMILIES
    }
    for family, model in models.items():
        model.save_pretrained(tmp_path / family)
        config = json.loads((tmp_path / family / "config.json").read_text())
        assert config["auto_map"].keys() == {"AutoConfig", "AutoModel", "AutoModelForCausalLM"}
    folders = [tmp_path / family for family in FAMILIES]
    run_python(REMOTE, tmp_path / "tokens", *folders, HF_MODULES_CACHE=str(tmp_path / "modules"))
    for family, model in models.items():
        assert torch.equal(load_file(tmp_path / f"{family}-logits")["logits"], model(tokens).logits), family
        local = AutoModelForCausalLM.from_pretrained(tmp_path / family, trust_remote_code=True)
        assert type(local) is type(model)


TENSOR_PARALLEL = """
import sys, torch, torch.distributed as dist
import qsparse_hf
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
tokens, *folders = sys.argv[1:]
tokens = load_file(tokens)["tokens"]
for folder in folders:
    model = AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto")
    for name, linear in model.model.layers[0].named_modules():
        if isinstance(linear, torch.nn.Linear):
            assert linear.weight.to_local().shape[0] * 2 == linear.weight.shape[0], f"{name} is not sharded"
    with torch.no_grad():
        out = model(tokens).logits
    expected = load_file(folder + "-logits")["logits"]
    error = (out - expected).abs().max() / expected.abs().max()
    assert error <= 1e-4, (folder, error)
dist.destroy_process_group()
"""


def test_tensor_parallel_selects_what_one_process_does(tmp_path, tokens):
    save_file({"tokens": tokens}, tmp_path / "tokens")
    for family in FAMILIES:
        model = make(sparse_config(family))
        model.save_pretrained(tmp_path / family)
        save_file({"logits": model(tokens).logits}, tmp_path / f"{family}-logits")
    script = tmp_path / "tensor_parallel.py"
    script.write_text(TENSOR_PARALLEL)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    command += [str(tmp_path / name) for name in ("tokens", *FAMILIES)]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


SHARDED = """
import sys, torch, qsparse_hf
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM
folder, output = sys.argv[1:]
torch.distributed.init_process_group("gloo", init_method=f"file://{output}-store", rank=0, world_size=1)
mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
model = AutoModelForCausalLM.from_pretrained(folder)
fully_shard(model.model, mesh=mesh)
fully_shard(model, mesh=mesh)
kind = type(model)
assert kind.__name__ == "FSDPQSparseLlamaForCausalLM"
model.save_pretrained(output, state_dict={name: tensor.full_tensor() for name, tensor in model.state_dict().items()})
assert type(model) is kind
torch.distributed.destroy_process_group()
"""


def test_a_sharded_model_saves_what_an_unsharded_one_does(tmp_path):
    make(sparse_config("llama")).save_pretrained(tmp_path / "plain")
    run_python(SHARDED, tmp_path / "plain", tmp_path / "sharded")
    files = {path.name for path in (tmp_path / "plain").iterdir()}
    assert {path.name for path in (tmp_path / "sharded").iterdir()} == files
    for name in files:
        assert (tmp_path / "sharded" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes(), name


def test_public_names():
    for family in ("Llama", "Mistral", "Qwen2", "Qwen3", "Phi3", "Gemma3"):
        for kind in ("Config", "Model", "ForCausalLM"):
            assert hasattr(qsparse_hf, f"QSparse{family}{kind}")
    for name in qsparse_hf.__all__:
        assert callable(getattr(qsparse_hf, name))
    with pytest.raises(AttributeError, match="nonsense"):
        _ = qsparse_hf.nonsense


@pytest.mark.interpreted
@pytest.mark.parametrize("family", ["qwen2", "phi3", "gemma3_text"])
def test_a_model_computes_the_same_on_the_kernels(family, tokens, monkeypatch):
    """Through Triton's interpreter where there is no GPU."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokens = tokens.to(device)
    results = []
    monkeypatch.setattr(IMPLS["triton"], "refuses", lambda tensors, asked: None)
    for only in ("torch", "triton"):
        monkeypatch.setattr(sparsify, "IMPLS", {only: IMPLS[only]})
        model = make(sparse_config(family, sparsity_block_size=32)).to(device)
        output = model(tokens, labels=tokens)
        output.loss.backward()
        results.append([output.logits, *(parameter.grad for parameter in model.parameters())])
    for expected, actual in zip(*results, strict=True):
        assert_close(actual, expected)


@pytest.mark.parametrize("activation", [torch.nn.ReLU(), torch.nn.Tanh()])
def test_another_activation_is_not_overlooked(activation, tokens):
    dense, sparse = make_pair("llama", sparsity=0)
    for model in (dense, sparse):
        model.model.layers[0].mlp.act_fn = activation
    assert torch.equal(sparse(tokens).logits, dense(tokens).logits)
    sparse.model.layers[0].mlp.down_sparsify.configure(Selection(0.75))
    hooked = []
    activation.register_forward_hook(lambda *_: hooked.append(True))
    seen = []
    sparse.model.layers[0].mlp.down_proj.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    sparse(tokens)
    assert ((seen[0] != 0).sum(-1) <= 24).all()  # of 96
    assert hooked


def test_an_activation_written_in_python_is_the_dense_one_at_sparsity_zero(tokens):
    dense = make(dense_config("llama", hidden_act="gelu_python"))
    sparse = make(sparse_config("llama", hidden_act="gelu_python", sparsity=0))
    assert torch.equal(sparse(tokens).logits, dense(tokens).logits)


def test_a_backend_is_named_for_whole_models(tokens, monkeypatch):
    """As the environment variable QSPARSE_BACKEND does when the package is imported."""
    monkeypatch.setattr("qsparse_hf.modeling.backend._ASKED", "nonsense")
    with pytest.raises(ValueError, match="one of 'triton', 'numba', 'torch', 'reference', got 'nonsense'"):
        make(sparse_config("llama"))(tokens)


def test_nothing_that_sparsifies_passes_for_a_plain_norm():
    """Engines and kernel hubs replace norms that they know by name or by an attribute of the class."""
    model = make(sparse_config("llama"))
    norms = [layer.input_layernorm for layer in model.model.layers]
    assert not any(type(norm).__name__.endswith("RMSNorm") or hasattr(norm, "kernel_layer_name") for norm in norms)
    assert "sparsity=0.5" in str(norms[0])


def passes_for_a_norm_by_tracing(module: torch.nn.Module) -> bool:
    """As vLLM's Transformers backend decides it: one declared input, and a traced dataflow, however far it gets, whose
    last product is the norm's.
    """
    if len(inspect.signature(type(module).forward).parameters) != 2:  # self and the input
        return False
    tracer = torch.fx.Tracer()
    with contextlib.suppress(Exception):  # the graph so far counts
        tracer.trace(module)
    called = [node.target for node in tracer.graph.nodes if node.op.startswith("call")]
    names = [target if isinstance(target, str) else target.__name__ for target in called]
    return "rsqrt" in names and [name for name in names if name not in ("float", "to", "type_as")][-1] == "mul"


def test_engines_that_trace_take_no_sparsifying_norm_for_a_plain_one(family):
    dense, sparse = make_pair(family)
    norms = {name: module for name, module in dense.named_modules() if "norm" in name.rpartition(".")[-1]}
    selecting = [name for name in norms if isinstance(sparse.get_submodule(name), sparsify.Sparsify)]
    assert len(selecting) == (4 if family == "bitnet" else 2) * dense.config.num_hidden_layers
    assert all(passes_for_a_norm_by_tracing(norm) for norm in norms.values())
    assert not any(passes_for_a_norm_by_tracing(sparse.get_submodule(name)) for name in selecting)


@pytest.mark.parametrize("sparsity", [0, 0.5])
@pytest.mark.parametrize("gradients", [False, True])
def test_exports_as_dense_llama_does(sparsity, gradients, tokens):
    model = make(sparse_config("llama", sparsity=sparsity))
    with torch.set_grad_enabled(gradients):
        program = torch.export.export(model, (tokens,), {"use_cache": False}, strict=True)
    assert_close(program.module()(tokens, use_cache=False).logits, model(tokens).logits)


@pytest.mark.interpreted
@pytest.mark.parametrize(("sparsity", "gradients", "recomputed"), [(0.5, True, 2), (0.5, False, 0), (0, True, 0)])
def test_compiled_training_selects_again_for_backward(sparsity, gradients, recomputed, tokens, monkeypatch):
    """In each layer, from the attention's output; on a GPU `test_gpu.py` measures the memory that saves."""
    pytest.importorskip("triton")
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    monkeypatch.setattr(IMPLS["triton"], "refuses", lambda tensors, asked: None)
    monkeypatch.setattr(sparsify, "IMPLS", {"triton": IMPLS["triton"]})
    model = torch.compile(make(sparse_config("llama", sparsity=sparsity)), backend=backend, fullgraph=True)
    with torch.set_grad_enabled(gradients):
        model(tokens, use_cache=False)
    operations = [str(node.target) for graph in graphs for node in graph.graph.nodes]
    assert operations.count("tag_activation_checkpoint") == recomputed
