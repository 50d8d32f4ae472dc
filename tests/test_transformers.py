"""What must hold on every Transformers that pip may choose: this file runs on the oldest, the pinned and the newest.

Whatever this package overrides or is passed by name there shows here: tokens, caches, masks, adapters, saved folders.
"""

import importlib.metadata
import re
import tomllib

import pytest
import torch
from conftest import DISTINCT, REPOSITORY, assert_close, make, make_pair, run_python, sparse_config
from safetensors.torch import save_file
from transformers import ContinuousBatchingConfig, GenerationConfig, GenerationMixin, LogitsProcessorList, StaticCache

from qsparse_hf.decode import generation, graph
from qsparse_hf.decode.graph import DecodeGraph
from qsparse_hf.decode.transformers_names import CACHE
from qsparse_hf.modeling.modeling_qsparse import NEWEST_TESTED

SHORT = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
WAYS = {
    "dynamic": {},
    "static": {"cache_implementation": "static"},
    "beams": {"num_beams": 3},
    "static beams": {"num_beams": 3, "cache_implementation": "static"},
    "assisted": {"assistant": True},
    "prompt lookup": {"prompt_lookup_num_tokens": 2},
    "padded": {"attention_mask": torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1, 1]])},
    "padded static": {
        "attention_mask": torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1, 1]]),
        "cache_implementation": "static",
    },
}


def generated(model, prompt: torch.Tensor, family: str, **way) -> torch.Tensor:
    if way.pop("assistant", False):
        way["assistant_model"] = make(sparse_config(family), seed=1)
    return model.generate(prompt, **SHORT | way)


@pytest.mark.parametrize("prepared", [False, True], ids=["plain", "prepared"])
@pytest.mark.parametrize("way", WAYS)
def test_with_a_cache_as_without_one(family, way, prepared, tokens):
    # Within the families' windows where an assistant looks ahead: Transformers 5.17 fails beyond, dense models too.
    model, prompt = make(sparse_config(family)), tokens[:1, : 2 if way == "assisted" else 10]
    without = {name: value for name, value in WAYS[way].items() if name in ("num_beams", "attention_mask")}
    expected = generated(model, prompt, family, use_cache=False, **without)
    if prepared:
        model.prepare_for_decode()
    assert torch.equal(generated(model, prompt, family, **WAYS[way]), expected)


@pytest.mark.parametrize("family", DISTINCT)
@pytest.mark.parametrize("prepared", [False, True], ids=["plain", "prepared"])
def test_continuous_batching(family, prepared):
    """One stream, which sparse products decode in a prepared model, and more than they take."""
    model = make(sparse_config(family))
    prompts = [list(range(3, 3 + length)) for length in (12, 3, 5, 1)]
    expected = [model.generate(torch.tensor([prompt]), **SHORT)[0, len(prompt) :].tolist() for prompt in prompts]
    if prepared:
        model.prepare_for_decode()
    config = GenerationConfig(max_new_tokens=SHORT["max_new_tokens"], do_sample=False, eos_token_id=-1, pad_token_id=0)
    room = ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=64)
    for some in (prompts[:1], prompts):
        found = model.generate_batch(some, generation_config=config, continuous_batching_config=room)
        assert [each.generated_tokens for each in found.values()] == expected[: len(some)]


@pytest.mark.parametrize("prepared", [False, True], ids=["plain", "prepared"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_at_sparsity_zero_as_dense(family, dtype, prepared, tokens):
    dense, sparse = make_pair(family, dtype, sparsity=0)
    if prepared:
        sparse.prepare_for_decode()
    assert torch.equal(sparse(tokens).logits, dense(tokens).logits)
    for way in WAYS.values():
        if "assistant" not in way:
            assert torch.equal(*(generated(model, tokens[:1, :10], family, **way) for model in (sparse, dense)))


@pytest.mark.interpreted
@pytest.mark.parametrize("padding", [0, 3])
def test_a_step_that_a_graph_replays(family, padding, tokens, monkeypatch):
    """Where there is a GPU; its kernels, through Triton's interpreter, and none of its launches."""
    pytest.importorskip("triton")
    steps = []

    def capture(step: DecodeGraph) -> None:
        step.graph = type("Replay", (), {"replay": lambda _: setattr(step, "logits", step._step())})()
        steps.append(step)

    monkeypatch.setattr(DecodeGraph, "_capture", capture)
    for module in (graph, generation):
        monkeypatch.setattr(module, "has_graphs", lambda device: True)
    monkeypatch.setattr(graph, "runs", lambda *arguments: True)
    monkeypatch.setattr(
        GenerationMixin,
        "_valid_auto_compile_criteria",
        lambda self, kwargs, config: self.is_prepared and isinstance(kwargs.get(CACHE), StaticCache),
    )
    model, prompt = make(sparse_config(family)), tokens[:1, :4]
    mask = torch.ones_like(prompt)
    mask[0, :padding] = 0
    call = SHORT | {"max_new_tokens": 4, "attention_mask": mask}
    expected = model.generate(prompt, **call)
    model.prepare_for_decode()
    for _ in range(2):  # the second call takes the first one's cache
        assert torch.equal(model.generate(prompt, **call), expected)
    assert len(steps) == 1


def test_a_model_that_is_not_prepared_overrides_nothing_of_generate(family):
    """Frozen with every checkpoint, such an override would break with the next Transformers."""
    model = make(sparse_config(family))
    dense = [base for base in type(model).__mro__ if base.__module__.startswith("transformers.")]
    ours = [base for base in type(model).__mro__ if base.__module__.startswith("qsparse_hf.")]
    assert ours
    assert dense
    for name in dir(GenerationMixin):
        if not name.startswith("__"):
            assert not any(name in vars(base) for base in ours), name
    model.prepare_for_decode()
    assert type(model).generate is not GenerationMixin.generate
    assert type(model.restore()).generate is GenerationMixin.generate


def test_restored_within_generate(tokens):
    model = make(sparse_config("llama"))
    expected = model.generate(tokens[:1, :6], **SHORT)

    def within(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if input_ids.shape[1] == 8:
            model.restore()
        return scores

    model.prepare_for_decode()
    processors = LogitsProcessorList([within])
    assert torch.equal(model.generate(tokens[:1, :6], logits_processor=processors, **SHORT), expected)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_cached_logits_are_those_of_one_forward(family, attention, tokens):
    """One feature of 64 goes, so that rounding cannot swap many."""
    model = make(sparse_config(family, sparsity=0.02), attn_implementation=attention)
    for _ in range(2):
        with torch.no_grad():
            whole = model(tokens).logits
            past = model(tokens[:, :-1], use_cache=True)[CACHE]
            assert_close(model(tokens[:, -1:], **{CACHE: past}).logits[:, 0], whole[:, -1])
        model.prepare_for_decode()


FROZEN = """
import sys
sys.modules["qsparse_hf"] = None  # as if it were not installed
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
folder, saved = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
assert type(model).__module__.startswith("transformers_modules")
saved = load_file(saved)
with torch.no_grad():
    assert torch.equal(model(saved["prompt"]).logits, saved["logits"])
for way in ({}, {"cache_implementation": "static"}, {"use_cache": False}, {"num_beams": 2}):
    new = model.generate(saved["prompt"], max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None, **way)
    assert torch.equal(new, saved["beams" if way.get("num_beams") else "greedy"]), way
"""


def test_a_saved_folder_generates_without_this_package(family, tmp_path, tokens):
    model, prompt = make(sparse_config(family)), tokens[:1, :10]
    model.save_pretrained(tmp_path / "model")
    with torch.no_grad():
        saved = {"prompt": prompt, "logits": model(prompt).logits}
    saved |= {"greedy": model.generate(prompt, **SHORT), "beams": model.generate(prompt, num_beams=2, **SHORT)}
    save_file({name: each.contiguous() for name, each in saved.items()}, tmp_path / "saved")
    run_python(FROZEN, tmp_path / "model", tmp_path / "saved", HF_MODULES_CACHE=str(tmp_path / "modules"))


NEWER = """
import transformers.models.llama.modeling_llama  # which sets the version again
transformers.__version__ = "5.99.0"
import qsparse_hf
"""


FROZEN_TWICE = """
import sys
sys.modules["qsparse_hf"] = None  # as if it were not installed
from transformers import AutoModelForCausalLM
for folder in sys.argv[1:]:
    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
"""


def test_a_saved_folder_says_of_a_newer_transformers_what_to_do(tmp_path):
    """Once, however many folders a process loads."""
    folders = [tmp_path / name for name in ("one", "two")]
    for folder in folders:
        make(sparse_config("llama")).save_pretrained(folder)
        code = folder / "modeling_qsparse.py"
        code.write_text(code.read_text().replace(f"NEWEST_TESTED = {NEWEST_TESTED}", "NEWEST_TESTED = (5, 0)"))
    run = run_python(FROZEN_TWICE, *folders, HF_MODULES_CACHE=str(tmp_path / "modules"))
    said = re.findall(r"Q-Sparse models were tested.*", run.stderr)
    assert len(said) == 1
    assert "up to 5.0, and this is" in said[0]
    assert "`transformers<5.1`" in said[0]


def test_a_newer_transformers_than_tested_is_said_once():
    said = re.findall(r"Q-Sparse models were tested.*", run_python(NEWER).stderr)
    assert len(said) == 1
    newest = ".".join(map(str, NEWEST_TESTED))
    assert f"up to {newest}, and this is 5.99.0" in said[0]
    assert f"`transformers<{NEWEST_TESTED[0]}.{NEWEST_TESTED[1] + 1}`" in said[0]
    assert "tested with" not in run_python("import qsparse_hf").stderr


def test_pip_chooses_among_versions_that_were_tested():
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    wanted = next(each for each in project["dependencies"] if each.startswith("transformers"))
    lowest, beyond = re.fullmatch(r"transformers>=([\d.]+),<([\d.]+)", wanted).groups()
    assert beyond == f"{NEWEST_TESTED[0]}.{NEWEST_TESTED[1] + 1}"

    def held(name: str) -> str:
        return re.search(r"^transformers==(\S+)", (REPOSITORY / "constraints" / name).read_text(), re.MULTILINE)[1]

    assert held("oldest.txt").startswith(f"{lowest}.")
    assert held("newest.txt").startswith(".".join(map(str, NEWEST_TESTED)))
    assert importlib.metadata.version("transformers") in {
        held(f"{each}.txt") for each in ("oldest", "pinned", "newest")
    }
