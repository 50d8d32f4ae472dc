"""Models to the Hub and back, by its own client, over a server that speaks its protocol on loopback."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import REPOSITORY, make, sparse_config
from hub_server import OWNER, READER, Hub, Repository, complaints, identify, serving
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from qsparse_hf.checkpoint import INDEX
from qsparse_hf.errors import UserError
from qsparse_hf.hub import push_folder
from qsparse_hf.model_card import find_origin, is_ours, write_card

# What is pushed, in this order: the arguments of `qsparse push`, and whose token.
PUSHES = {
    "first": (["model", "team/model", "--private"], OWNER),
    "again": (["model", "team/model"], OWNER),
    "results": (["model", "team/model", "--base-model", "org/dense", "--results", "results.json"], OWNER),
    "branch": (["other", "team/model", "--revision", "trial", "--message", "A trial"], OWNER),
    "sharded": (["sharded", "team/sharded"], OWNER),
    "whole instead": (["model", "team/sharded"], OWNER),
    "adapters of a folder": (["adapters", "team/adapters"], OWNER),
    "adapters": (["adapters", "team/adapters", "--base-model", "team/model"], OWNER),
    "broken off": (["sharded", "team/broken"], OWNER),
    "edited there": (["model", "team/edited"], OWNER),
    "written here": (["own-card", "team/edited"], OWNER),
    "bad card": (["bad-card", "team/bad"], OWNER),
    "public": (["model", "team/sharded", "--private"], OWNER),
    "wrong token": (["model", "team/model"], "hf_wrong"),
    "no token": (["model", "team/model"], ""),
    "reader": (["model", "team/model"], READER),
    "no server": (["model", "team/model"], "nowhere"),
}

DRIVER = """
import contextlib, io, json, os, sys, time
os.chdir(sys.argv[1])
from huggingface_hub import constants, hf_api
from qsparse_hf.cli import main
time.sleep = lambda seconds: None  # between attempts to go on
results = {}
for name, (arguments, token) in json.loads(sys.argv[2]).items():
    if token == "nowhere":
        constants.ENDPOINT = hf_api.api.endpoint = "http://127.0.0.1:9"
        constants.HUGGINGFACE_CO_URL_TEMPLATE = constants.ENDPOINT + "/{repo_id}/resolve/{revision}/{filename}"
    os.environ["HF_TOKEN"] = token
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        code = main(["push", *arguments])
    results[name] = {"code": code, "out": out.getvalue(), "err": err.getvalue()}
    if name == "first":  # how the Trainer does it
        from transformers import AutoModelForCausalLM
        from qsparse_hf import QSparseTrainer, QSparseTrainingArguments
        options = dict(hub_model_id="team/trained", report_to="none", use_cpu=True)
        model = AutoModelForCausalLM.from_pretrained("model")
        QSparseTrainer(model, QSparseTrainingArguments("run", **options)).push_to_hub(language="en")
print(json.dumps(results))
"""

STRANGER = """
import json, os, sys
sys.modules["qsparse_hf"] = None
import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
os.chdir(sys.argv[1])
tokens = torch.arange(3, 27)[None]
logits = {}

@torch.no_grad()
def run(name, load, *repository, **options):
    model = load(*repository, trust_remote_code=True, **options).eval()
    assert any("transformers_modules" in type(module).__module__ for module in model.modules()), name
    logits[name] = model(tokens).logits.clone()

run("model", AutoModelForCausalLM.from_pretrained, "team/model")
run("branch", AutoModelForCausalLM.from_pretrained, "team/model", revision="trial")
run("whole instead", AutoModelForCausalLM.from_pretrained, "team/sharded")
run("sharded", AutoModelForCausalLM.from_pretrained, "team/sharded", revision=sys.argv[2])
run("adapters", AutoPeftModelForCausalLM.from_pretrained, "team/adapters")
save_file(logits, "logits")
tokenizer = AutoTokenizer.from_pretrained("team/model", trust_remote_code=True)
assert tokenizer.decode(tokenizer("a b")["input_ids"]).startswith("a b")
refused = {}
for name, token in {"team/model": False, "team/pickled": None}.items():
    try:
        AutoModelForCausalLM.from_pretrained(name, token=token, trust_remote_code=True, force_download=True)
    except Exception as error:
        refused[name] = str(error)
print(json.dumps(refused))
"""


class Touch:
    """Unpickled, it leaves a file."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple:
        return open, (self.path, "w")


def fill(here: Path, checkpoint: Path, tokenizer) -> None:
    """The folders that `PUSHES` names, the model with what lies about in one that was trained in."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    for folder in ("model", "own-card", "bad-card"):
        model.save_pretrained(here / folder)
        tokenizer.save_pretrained(here / folder)
    write_card(here / "model", model, find_origin(str(checkpoint)))
    (here / "model" / "LICENSE").write_text("Apache License\nVersion 2.0, January 2004\n")
    for name in (
        "optimizer.pt",
        "training_args.bin",
        "train.py",
        "trainer_state.json",
        "model-00009-of-00009.safetensors",
    ):
        (here / "model" / name).write_bytes(b"no part of it")
    (here / "model" / "checkpoint-1").mkdir()
    (here / "model" / "checkpoint-1" / "model.safetensors").write_bytes(b"an earlier one")
    (here / "own-card" / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n")
    (here / "bad-card" / "README.md").write_text("---\nbase_model: /home/me/dense\n---\n# Mine\n")
    other = make(sparse_config("llama", sparsity=0.25), seed=1)
    other.save_pretrained(here / "other")
    make(sparse_config("llama"), seed=2).save_pretrained(here / "sharded", max_shard_size="120KB")
    base = AutoModelForCausalLM.from_pretrained(here / "model")
    adapted = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=2))
    torch.manual_seed(3)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    adapted.save_pretrained(here / "adapters")
    write_card(here / "adapters", adapted, find_origin(str(here / "model")))
    (here / "adapters" / "README.md").unlink()  # PEFT's
    write_card(here / "adapters", adapted, find_origin(str(here / "model")))
    measured = {"acc,none": 0.61234, "acc_stderr,none": 0.01, "alias": "arc_easy"}
    (here / "results.json").write_text(json.dumps({"results": {"arc_easy": measured}}))


@pytest.fixture(scope="module")
def story(tmp_path_factory, tiny_checkpoint, tiny_tokenizer):
    """All of `PUSHES`, one after the other, and what a stranger without this package pulls; in two processes."""
    here = tmp_path_factory.mktemp("hub")
    fill(here, tiny_checkpoint, tiny_tokenizer)
    with serving() as hub:
        hub.breaks_after["team/broken"] = 1
        hub.repositories["org/dense"] = Repository(False)
        hub.repositories["org/dense"].branches["main"][0]["README.md"] = b"---\nlicense: mit\n---\n# Dense\n"
        hub.repositories["team/edited"] = Repository(False)
        hub.repositories["team/edited"].branches["main"][0]["README.md"] = b"---\nlicense: mit\n---\n# Edited there\n"
        environment = {
            "HF_ENDPOINT": hub.endpoint,
            "HF_HOME": str(here / "home"),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }
        pushes = json.loads(run(DRIVER, here, json.dumps(PUSHES), **environment))
        torch.save({"weights": Touch(here / "unpickled")}, here / "pickle")
        config = (here / "model" / "config.json").read_bytes()
        code = {file.name: file.read_bytes() for file in (here / "other").glob("*.py")}
        files = {"config.json": config, "pytorch_model.bin": (here / "pickle").read_bytes(), **code}
        hub.repositories["team/pickled"] = Repository(False, {"main": [files]})
        revision = next(identify(c) for c in hub.repositories["team/sharded"].branches["main"] if INDEX in c)
        refused = json.loads(run(STRANGER, here, revision, HF_TOKEN=READER, **environment))
    return SimpleNamespace(here=here, hub=hub, pushes=pushes, refused=refused, logits=load_file(here / "logits"))


def run(code: str, *arguments, **environment: str) -> str:
    """What a process of its own prints last."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    environment = os.environ | environment | {"PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()[-1]


def hub_files(hub: Hub, name: str, revision: str = "main") -> dict[str, bytes]:
    found = hub.repositories[name].find(revision)
    assert found is not None
    return found[1]


CODE = {"backend.py", "configuration_qsparse.py", "modeling_qsparse.py", "modeling_qsparse_llama.py"}
CODE |= {"bitnet.py", "sparsify.py", "sparsity.py"}
MODEL = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}


def test_what_belongs_to_a_model_is_sent_in_one_commit(story):
    assert story.pushes["first"]["code"] == 0, story.pushes["first"]["err"]
    repository = story.hub.repositories["team/model"]
    assert repository.private
    first = repository.branches["main"][1]
    assert first.keys() == CODE | MODEL | {"README.md", "LICENSE", ".gitattributes"}
    assert first["model.safetensors"] == (story.here / "model" / "model.safetensors").read_bytes()
    assert repository.messages == ["Upload model with qsparse_hf", "Upload model with qsparse_hf", "A trial"]
    assert "14 files" in story.pushes["first"]["out"]
    assert f"{story.hub.endpoint}/team/model/commit/" in story.pushes["first"]["out"]


def test_what_has_not_changed_makes_no_commit(story):
    assert story.pushes["again"]["code"] == 0
    assert story.hub.uploads["team/model"] == 2  # `first` and `branch`


def test_a_card_goes_with_the_repositorys_name(story):
    card = hub_files(story.hub, "team/model")["README.md"].decode()
    assert is_ours(card)
    assert not complaints(card)
    assert 'here = "team/model"  # this repository' in card
    assert "base_model: org/dense\n" in card
    assert "license: mit\n" in card
    assert "Converted, without training, from [org/dense](https://huggingface.co/org/dense).\n" in card
    assert "| arc_easy | acc | 0.6123 |" in card
    assert "value: 0.6123" in card


def test_a_branch_is_written_beside_the_main_one(story):
    assert (
        hub_files(story.hub, "team/model", "trial")["config.json"] != hub_files(story.hub, "team/model")["config.json"]
    )
    assert (story.here / "other" / "config.json").read_bytes() == hub_files(story.hub, "team/model", "trial")[
        "config.json"
    ]


def test_weights_of_an_earlier_push_do_not_stay_beside_others(story):
    assert story.pushes["sharded"]["code"] == 0
    assert story.hub.uploads["team/sharded"] == 3 + 1  # shards, then a single file
    weights = {name for name in hub_files(story.hub, "team/sharded") if "safetensors" in name}
    assert weights == {"model.safetensors"}
    assert f"deleted {INDEX}, of an earlier push" in story.pushes["whole instead"]["out"]


def test_adapters_name_a_base_that_others_have(story):
    failed = story.pushes["adapters of a folder"]
    assert failed["code"] == 1
    assert f"the adapters' base model is '{story.here / 'model'}', which nobody else has" in failed["err"]
    files = hub_files(story.hub, "team/adapters")
    assert files.keys() == {
        ".gitattributes",
        "README.md",
        "LICENSE",
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "team/model"
    assert "base_model: team/model" in files["README.md"].decode()
    assert "AutoPeftModelForCausalLM" in files["README.md"].decode()


def test_a_connection_that_breaks_leaves_nothing_visible(story):
    assert story.pushes["broken off"]["code"] == 1
    last = story.pushes["broken off"]["err"].splitlines()[-1]
    assert last.startswith("qsparse: error: team/broken: the connection to ")
    assert last.endswith("nothing of it is visible there, push again")
    assert story.hub.uploads["team/broken"] == 1
    assert [set(commit) for commit in story.hub.repositories["team/broken"].branches["main"]] == [{".gitattributes"}]


def test_a_persons_card_stays_on_the_hub_until_another_persons_comes(story):
    assert "kept README.md on the Hub, which somebody wrote or changed there" in story.pushes["edited there"]["out"]
    before, kept, replaced = story.hub.repositories["team/edited"].branches["main"]
    assert kept["README.md"] == before["README.md"]
    assert "model.safetensors" in kept
    assert replaced["README.md"] == (story.here / "own-card" / "README.md").read_bytes()
    assert "replaced README.md on the Hub" in story.pushes["written here"]["out"]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("wrong token", "team/model: the Hub does not accept the token, or there is none; log in with `hf auth login`"),
        ("no token", "team/model: the Hub does not accept the token, or there is none; log in with `hf auth login`"),
        ("reader", "team/model: the token has no right to write there: 403 Forbidden: You don't have the rights"),
        ("bad card", '"base_model" with value "/home/me/dense" is not valid'),
        ("public", "team/sharded is public already; make it private in its settings, or leave --private out"),
        ("no server", "team/model: the connection to http://127.0.0.1:9 failed"),
    ],
)
def test_a_push_that_cannot_be_is_one_line(story, name, said):
    push = story.pushes[name]
    assert push["code"] == 1
    (line,) = [line for line in push["err"].splitlines() if line]
    assert line.startswith("qsparse: error: ")
    assert said in line


def test_the_trainer_sends_its_card(story):
    card = hub_files(story.hub, "team/trained")["README.md"].decode()
    assert is_ours(card)
    assert "language: en" in card
    assert "# trained" in card


@torch.no_grad()
def test_a_stranger_without_the_package_gets_the_same_logits(story):
    tokens = torch.arange(3, 27)[None]
    folders = {"model": "model", "branch": "other", "whole instead": "model", "sharded": "sharded"}
    for name, folder in folders.items():
        model = AutoModelForCausalLM.from_pretrained(story.here / folder)
        assert torch.equal(story.logits[name], model(tokens).logits), name
    base = AutoModelForCausalLM.from_pretrained(story.here / "model")
    adapted = PeftModel.from_pretrained(base, story.here / "adapters")
    assert torch.equal(story.logits["adapters"], adapted(tokens).logits)
    assert not torch.allclose(story.logits["adapters"], story.logits["model"], atol=0.1)


def test_a_private_model_needs_a_token_and_a_pickle_is_not_unpickled(story):
    assert story.refused.keys() == {"team/model", "team/pickled"}
    assert not (story.here / "unpickled").exists()


def test_a_dry_run_lists_files_and_sizes_and_asks_nobody(tiny_checkpoint):
    push = push_folder(tiny_checkpoint, "team/model", dry_run=True)
    assert push.files.keys() == CODE | MODEL
    size = (tiny_checkpoint / "model.safetensors").stat().st_size
    assert f"{size:>16,}  model.safetensors" in str(push)
    assert str(push).endswith("\nwould go to team/model; nothing was sent")
    assert push.url is None


def test_a_folder_that_holds_no_model_is_refused(tmp_path, tiny_checkpoint):
    with pytest.raises(UserError, match="is no folder"):
        push_folder(tmp_path / "nowhere", "team/model", dry_run=True)
    with pytest.raises(UserError, match=r"holds neither config.json nor adapter_config.json"):
        push_folder(tmp_path, "team/model", dry_run=True)
    with pytest.raises(UserError, match="the repository must be an id such as your-name/your-model, got 'a/b/c'"):
        push_folder(tiny_checkpoint, "a/b/c", dry_run=True)
    (tmp_path / "config.json").write_bytes((tiny_checkpoint / "config.json").read_bytes())
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"has neither model.safetensors nor .*; weights in other formats are not read"):
        push_folder(tmp_path, "team/model", dry_run=True)
