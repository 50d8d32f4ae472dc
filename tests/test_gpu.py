"""What only an accelerator shows: compiled training and decoding, CUDA graphs, low precision at size."""

import pytest
import torch
from conftest import DISTINCT, assert_close, dense_config, make, make_pair, sparse_config
from datasets import Dataset
from transformers import AutoModelForCausalLM

from qsparse_hf import topk_sparsify
from qsparse_hf.errors import UserError
from qsparse_hf.modeling.sparsify import IMPLS, glu_sparsify, rms_norm_sparsify
from qsparse_hf.modeling.sparsity import Selection
from qsparse_hf.training import QSparseTrainer, QSparseTrainingArguments

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("features", [4096, 11008])
def test_implementations_agree_at_size(features, dtype):
    x = torch.randn(64, features, device="cuda", dtype=dtype)
    masks = {
        name: implementation.mask(x, Selection(0.5))
        for name, implementation in IMPLS.items()
        if implementation.refuses([x], asked=True) is None
    }
    expected = IMPLS["reference"].mask(x.cpu(), Selection(0.5))
    assert masks.keys() >= {"triton", "torch", "reference"}
    assert all(torch.equal(mask.cpu(), expected) for mask in masks.values())


def test_the_kernels_run_unasked_and_in_a_cuda_graph():
    x, gain = torch.randn(8, 1024, device="cuda", dtype=torch.bfloat16), torch.randn(1024, device="cuda").bfloat16()

    def function() -> torch.Tensor:
        y = rms_norm_sparsify(x, gain, 1e-5, 0.5)
        return topk_sparsify(glu_sparsify(y, x, "silu", 0.25), 0.5, 32)

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        function()
    assert sum(event.count for event in profile.key_averages() if event.key == "sparsify_kernel") == 3
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # fails on any host synchronisation
        y = function()
    x.normal_()
    graph.replay()
    assert torch.equal(y, function())


@pytest.mark.parametrize("compile_it", [False, True])
def test_activation_memory_is_at_the_dense_level(compile_it):
    """What a forward pass keeps for backward: selecting adds nothing to a compiled model; an eager one keeps less."""
    fields = {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 4, "vocab_size": 128}
    kept = []
    for config in (dense_config("llama", **fields), sparse_config("llama", **fields)):
        model = make(config, dtype=torch.bfloat16).cuda().train()
        run = torch.compile(model, fullgraph=True) if compile_it else model
        tokens = torch.randint(3, 128, (8, 1024), device="cuda")
        for _ in range(2):
            before = torch.cuda.memory_allocated()
            loss = run(tokens, labels=tokens, use_cache=False).loss
            during = torch.cuda.memory_allocated() - before
            loss.backward()
            model.zero_grad()
        kept.append(during)
    assert kept[1] <= 1.01 * kept[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dense_twin_bit_for_bit(family, dtype, tokens):
    dense, sparse = (model.cuda() for model in make_pair(family, dtype, sparsity=0))
    assert torch.equal(sparse(tokens.cuda()).logits, dense(tokens.cuda()).logits)


@pytest.mark.parametrize("family", DISTINCT)
def test_compiled_gradients(family, tokens):
    tokens = tokens.cuda()
    gradients = []
    for compile_it in (False, True):
        model = make(sparse_config(family)).cuda()  # not in training: one family drops out
        model.scale_sparsity(0.02)  # one feature of 64 goes: rounding cannot swap many at the edge
        run = torch.compile(model, fullgraph=True) if compile_it else model
        run(tokens, labels=tokens).loss.backward()
        gradients.append(model.model.layers[0].mlp.down_proj.weight.grad)
    assert (gradients[0] - gradients[1]).norm() < 0.02 * gradients[0].norm()


@pytest.mark.parametrize("family", DISTINCT)
def test_generate_compiles_the_decode_step(family, tokens):
    model = make(sparse_config(family)).cuda()
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    greedy = model.generate(tokens.cuda(), **options)
    static = model.generate(tokens.cuda(), cache_implementation="static", **options)
    assert (static == greedy).float().mean() > 0.9  # a swapped feature may change a late token
    assert torch.equal(static[:, :25], greedy[:, :25])


def test_device_map(tmp_path, tokens):
    model = make(sparse_config("llama"))
    model.save_pretrained(tmp_path)
    placed = AutoModelForCausalLM.from_pretrained(tmp_path, device_map="auto")
    assert placed.device.type == "cuda"
    placed.scale_sparsity(0)
    model.scale_sparsity(0)
    assert_close(placed(tokens.cuda()).logits.cpu(), model(tokens).logits)


def test_compiled_training_in_bf16_with_a_ramp(tmp_path):
    rows = Dataset.from_list([{"input_ids": [i % 100 + 3] * 32, "labels": [i % 100 + 3] * 32} for i in range(64)])
    arguments = QSparseTrainingArguments(
        tmp_path,
        max_steps=6,
        logging_steps=1,
        bf16=True,
        torch_compile=True,
        sparsity_ramp_steps=4,
        sparsity_ramp_levels=2,
        learning_rate=1e-3,
        save_strategy="no",
    )
    trainer = QSparseTrainer(make(sparse_config("llama")), arguments, train_dataset=rows)
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [round(64 * (1 - entry["sparsity/qkv"])) for entry in log] == [48, 48, 32, 32, 32, 32]
    assert log[-1]["loss"] < log[0]["loss"]


def test_a_run_on_a_gpu_goes_on_and_stops_at_a_loss_that_is_not_finite(tmp_path):
    """Resumed losses within the tolerance that `benchmarks/NOTES.md` states; a bad loss is met one update later."""
    rows = [{"input_ids": [(7 * i + j) % 120 + 3 for j in range(64)]} for i in range(64)]
    rows = Dataset.from_list([row | {"labels": row["input_ids"]} for row in rows])

    def trainer(**fields) -> QSparseTrainer:
        arguments = QSparseTrainingArguments(
            tmp_path, bf16=True, logging_steps=1, report_to="none", per_device_train_batch_size=8, **fields
        )
        return QSparseTrainer(make(sparse_config("llama")), arguments, train_dataset=rows)

    def losses(run: QSparseTrainer) -> list[float]:
        return [entry["loss"] for entry in run.state.log_history if "loss" in entry]

    whole = trainer(max_steps=6, save_steps=3)
    whole.train()
    assert {"mfu", "peak_memory_gib"} <= whole.state.log_history[0].keys()
    resumed = trainer(max_steps=6, save_strategy="no")
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert losses(resumed) == pytest.approx(losses(whole), abs=1e-3)
    poisoned = trainer(max_steps=6, save_strategy="no")
    poisoned.model.lm_head.weight.data.fill_(torch.inf)
    with pytest.raises(UserError, match="the loss is not finite at update 1, micro-batch 0 of process 0"):
        poisoned.train()


GREEDY = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


def test_a_prepared_model_replays_one_graph(family, tokens):
    """Lengths within the cache, sampling and padding change, the graph stays; the tokens are the unprepared model's."""
    model, tokens = make(sparse_config(family)).cuda(), tokens[:1].cuda()
    prompts = [tokens[:, :6], tokens[:, :3], tokens[:, 2:5]]
    lengths = [12, 5, 9]
    if family != "llama":  # windows of 8 entries
        lengths = [2, 3, 4]
    padded = {"inputs": prompts[1], "attention_mask": torch.tensor([[0, 1, 1]], device="cuda")}
    calls = [{"inputs": p, "max_new_tokens": n} for p, n in zip(prompts, lengths, strict=True)]
    calls.append(padded | {"max_new_tokens": lengths[1]})
    expected = [model.generate(**GREEDY | call) for call in calls]
    model.prepare_for_decode()
    graphs = []
    for call, wanted in zip(calls, expected, strict=True):
        assert torch.equal(model.generate(**GREEDY | call), wanted)
        graphs.append(model._spare_cache.decode_graph.graph)
    assert graphs[0] is not None
    assert all(graph is graphs[0] for graph in graphs)
    torch.manual_seed(0)
    model.generate(**GREEDY | calls[0] | {"do_sample": True})
    assert model._spare_cache.decode_graph.graph is graphs[0]
    model.restore()
    assert not hasattr(model, "_spare_cache")


def test_a_window_that_moves_and_a_batch_that_is_large(family, tokens):
    model, tokens = make(sparse_config(family)).cuda(), tokens.cuda()
    batch = tokens[:, :12].repeat(2, 1)
    expected = [model.generate(each, **GREEDY) for each in (tokens[:1], batch)]
    model.prepare_for_decode()
    for each, wanted in zip((tokens[:1], batch), expected, strict=True):
        assert torch.equal(model.generate(each, **GREEDY), wanted)


def test_other_ways_to_generate_when_prepared(tokens):
    model, prompt = make(sparse_config("llama")).cuda(), tokens[:1, :10].cuda()
    ways = {
        "beams": {"num_beams": 3},
        "static beams": {"num_beams": 3, "cache_implementation": "static"},
        "assisted": {"assistant_model": make(sparse_config("llama"), seed=1).cuda()},
        "prompt lookup": {"prompt_lookup_num_tokens": 2},
        "no cache": {"use_cache": False},
        "dynamic": {"cache_implementation": "dynamic"},
    }
    expected = {name: model.generate(prompt, **GREEDY | way) for name, way in ways.items()}
    model.prepare_for_decode()
    for name, way in ways.items():
        assert torch.equal(model.generate(prompt, **GREEDY | way), expected[name]), name
    returned = model.generate(prompt, **GREEDY, return_dict_in_generate=True)
    kept = returned.past_key_values.layers[0].keys.clone()
    model.generate(tokens[1:, :10].cuda(), **GREEDY)
    assert torch.equal(returned.past_key_values.layers[0].keys, kept)  # the caller's cache is the caller's


@pytest.mark.parametrize("heads", [(8, 8), (8, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_decode_step_at_size(dtype, heads):
    """The graph's logits against the forward it replaces, over a cache in several parts.

    All features survive, but as lists: rounding can swap none.
    """
    fields = {"hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": heads[0], "sparsity": 1e-4}
    fields |= {"num_key_value_heads": heads[1], "max_position_embeddings": 2048}
    model = make(sparse_config("llama", **fields), dtype=dtype).cuda()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(0.15)  # as wide as this, rounding alone would change the logits by a tenth
    prompt = torch.randint(3, 128, (1, 700), device="cuda")
    options = GREEDY | {"return_dict_in_generate": True, "output_logits": True, "max_new_tokens": 4}
    expected = model.generate(prompt, **options)
    model.prepare_for_decode()
    actual = model.generate(prompt, **options | {"cache_implementation": "static"})
    assert actual.past_key_values.decode_graph.graph is not None
    same = 1 + (expected.sequences == actual.sequences)[0, 700:].long().cumprod(0).sum()
    for step in range(min(same, 4)):
        assert_close(actual.logits[step].to(dtype), expected.logits[step].to(dtype))  # `generate` makes them fp32
