"""Mistakes on the command line, in processes of their own: exit code 1, one line, no traceback, nothing written."""

import json
from pathlib import Path

import pytest
import yaml
from conftest import dense_config, make, run_python, run_qsparse
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from qsparse_hf.configuration import check_fields
from qsparse_hf.errors import UserError, check_writable, one_line

LONG = "x" * 300

# What is asked, and a part of what is said of it.
MISTAKES = [
    (["convert", "nowhere", "out"], "nowhere"),
    (["convert", "empty", "out"], "config.json"),
    (["convert", "dense", "out", "--sparsity", "2"], "sparsity"),
    (["convert", "dense", "out", "--dtype", "int8"], "dtype must be one of float32, bfloat16, float16, got 'int8'"),
    (["convert", "dense", "file.txt"], "file.txt"),
    (["train", "nowhere.yaml"], "nowhere.yaml: No such file or directory"),
    (["train", "empty"], "empty: Is a directory"),
    (["train", "broken.yaml"], "broken.yaml is not YAML, line 3: "),
    (["train", "run.yaml", "lerning_rate=1"], "unknown key 'lerning_rate'; did you mean 'learning_rate'?"),
    (["train", "run.yaml", "sparsity=0.9"], "it is a field of the model: write model_fields='{sparsity: ...}'"),
    (["train", "run.yaml", "train_data=[a, ]x"], "is not YAML"),
    (["train", "run.yaml", "seed=5000000000"], "seed must be at most 4294967295, got 5000000000"),
    (["train", "run.yaml", "dataloader_num_workers=-1"], "dataloader_num_workers must be at least 0, got -1"),
    (["train", "run.yaml", "dataloader_persistent_workers=true"], "persistent_workers option needs num_workers > 0"),
    (["train", "run.yaml", "logging_steps=nan"], "logging_steps must be a finite number, got nan"),
    (["train", "run.yaml", "torch_compile_mode=bogus"], "Unrecognized mode=bogus, should be one of: default, "),
    (["train", "run.yaml", "torch_compile_backend=bogus"], "Invalid backend: 'bogus'"),
    (
        ["train", "run.yaml", "metric_for_best_model=x", "load_best_model_at_end=true", "eval_data=[file.txt]"],
        "metric_for_best_model must be one of loss, ",
    ),
    (["train", "run.yaml", "ddp_backend=bogus"], "ddp_backend must be one of nccl, gloo, "),
    (["train", "run.yaml", "fsdp_config={a: 1}"], "fsdp_config sets nothing without fsdp"),
    (["train", "run.yaml", "resume_from_checkpoint="], "resume_from_checkpoint is empty text; write null for none"),
    (["train", "run.yaml", "distill_from="], "distill_from is empty text; write null for none"),
    (["train", "run.yaml", "report_to=bogus"], "bogus is not supported, only "),
    (["train", "run.yaml", "resume_from_checkpoint=true"], "runs/one holds no complete checkpoint to go on from"),
    (["train", "run.yaml", f"resume_from_checkpoint={LONG}"], "File name too long"),
    (["train", "run.yaml", "output_dir=file.txt"], "'file.txt/trainer_state.json' cannot be written: file.txt is no"),
    (["train", "run.yaml", "output_dir=loop"], "'loop/trainer_state.json' cannot be written"),
    (["train", "run.yaml", f"output_dir={LONG}"], "cannot be written: File name too long"),
    (["train", "run.yaml", 'output_dir="a\\0b"'], "cannot be written: embedded null byte"),
    (["train", "run.yaml", f"model={LONG}"], "File name too long"),
    (["train", "run.yaml", "model=unfinished"], "unfinished holds no config.json; it is an unfinished run's"),
    (["train", "run.yaml", "model=deep"], "deep: num_hidden_layers must be an integer from 1 to 10,000, got 1000000"),
    (
        ["train", "run.yaml", "model_fields={num_hidden_layers: 1000000000}"],
        "dense: num_hidden_layers must be an integer from 1 to 10,000, got 1000000000",
    ),
    (
        ["train", "run.yaml", "model_fields={num_attention_heads: 0}"],
        "dense: num_attention_heads must be an integer from 1 to 1,000,000,000, got 0",
    ),
    (
        ["train", "run.yaml", "model_fields={hidden_act: bogus}"],
        "dense: hidden_act must be one of gelu,",
    ),
    (["convert", "./nowhere", "out"], "./nowhere: is no file or folder here, and no repository of the Hub can have"),
    (["convert", "nowhere.gguf", "out"], "nowhere.gguf: is no file or folder here, and no repository of the Hub has a"),
    (["convert", "who/nowhere", "out"], "who/nowhere: is no file or folder here, and the Hub did not give it: HF_HUB_"),
    (["convert", "dense", "out", "--gguf-file", "x.gguf"], "dense holds no 'x.gguf'; its GGUF files are: none"),
    (["train", "run.yaml", "distill_from=a/b/c"], "distill_from: a/b/c: is no file or folder here, and no repository"),
    (
        ["bench", "decode", "--models", "~/model"],
        "(none of llama-2-7b, llama-3-8b, mistral-7b, 1b, bitnet-2b, 70b-slice): is no ",
    ),
    (["report", "nowhere", "--text", "file.txt"], "nowhere: is no file or folder here"),
    (["report", "empty", "--text", "file.txt"], "empty holds no config.json"),
    (["report", "unfinished", "--text", "file.txt"], "it is an unfinished run's, name one of the checkpoints in it"),
    (["report", "dense", "--text", "file.txt"], "dense holds no tokenizer, as an unfinished run's folder may"),
    (["report", "deep", "--text", "file.txt"], "num_hidden_layers must be an integer from 1 to 10,000, got 1000000000"),
    (["report", "dense", "--text", "nowhere.txt", "--output", "out"], "no file matches 'nowhere.txt'"),
    (["report", "dense", "--text", "file.txt", "--output", "file.txt"], "cannot be written: file.txt is no folder"),
    (["report", "dense", "--text", "file.txt", "--output", "loop"], "cannot be written"),
    (["report", "dense", "--text", "file.txt", "--output", LONG], "cannot be written: File name too long"),
    (["report", "dense", "--text", "file.txt", "--output", "a\0b"], "cannot be written: embedded null byte"),
    (
        ["generate", "./nowhere"],
        "./nowhere: is no file or folder here, and no repository of the Hub can have that name",
    ),
    (["generate", "dense", "hi"], "dense holds no tokenizer"),
    (["generate", "dense", "--max-new-tokens", "0"], "max_new_tokens must be at least 1, got 0"),
    (["generate", "dense", "--temperature", "-1"], "temperature must be at least 0, got -1.0"),
    (["generate", "dense", "--seed", "-1"], "seed must be from 0 to 4294967295, got -1"),
    (["push", "nowhere", "me/model"], "'nowhere' is no folder"),
    (["push", "empty", "me/model"], "empty holds neither config.json nor adapter_config.json"),
    (["push", "deep", "me/model"], "deep has neither model.safetensors nor model.safetensors.index.json"),
    (["push", "dense", "me/my/model"], "the repository must be an id such as your-name/your-model, got 'me/my/model'"),
    (["push", "dense", "me/model", "--base-model", "./x"], "base_model must be an id such as your-name/your-model"),
    (
        ["push", "dense", "me/model", "--results", "file.txt"],
        "holds no README.md that could name a base model or results",
    ),
    (["push", "dense", "me/model"], "me/model: HF_HUB_OFFLINE is set, so nothing can be sent"),
    (["bench", "decode", "--models", "nowhere"], "nowhere (none of llama-2-7b, "),
    (["bench", "decode", "--models", "deep"], "num_hidden_layers must be an integer from 1 to 10,000, got 1000000000"),
    (["report", "headless", "--text", "file.txt"], "headless: num_attention_heads must be an integer from 1 to 1,000"),
    (
        ["bench", "decode", "--models", "headless"],
        "num_attention_heads must be an integer from 1 to 1,000,000,000, got",
    ),
    (["bench", "decode", "--models", "1b", "--batches", "0"], "batch must be at least 1, got 0"),
    (["bench", "decode", "--models", "1b", "--output", "empty"], "'empty' cannot be written: Is a directory"),
    (["bench", "decode", "--models", "1b", "--output", "file.txt/x"], "cannot be written: file.txt is no folder"),
    (["bench", "decode", "--models", "1b", "--output", "loop"], "cannot be written: Too many levels of symbolic links"),
    (["bench", "decode", "--models", "1b", "--output", LONG], "cannot be written: File name too long"),
    (["bench", "decode", "--models", "1b", "--output", "a\0b"], "cannot be written: embedded null byte"),
    (["quickstart", "--output", "file.txt"], "file.txt is not a quickstart's; choose another --output"),
    (["quickstart", "--output", "dense"], "dense is not a quickstart's; choose another --output"),
    (["quickstart", "--output", "file.txt/x"], "Not a directory"),
    (["quickstart", "--output", "loop"], "cannot be written"),
    (["quickstart", "--output", LONG], "File name too long"),
    (["quickstart", "--output", "a\0b"], "embedded null byte"),
]

# Every command in a process that is forked after the imports, which take most of a command's time, and that leaves out
# what Python does at its end, which takes most of the rest.
COMMANDS = """
import gc, json, os, sys, traceback
import qsparse_hf.bench, qsparse_hf.quickstart
from qsparse_hf.cli import main
folder, results = sys.argv[1], []
os.chdir(folder)
gc.freeze()
for arguments in json.loads(sys.argv[2]):
    process = os.fork()
    if not process:
        os.dup2(os.open("../said", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        code = 3
        try:
            code = main(arguments)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    left = sorted(os.path.join(at, name) for at, folders, files in os.walk(".") for name in folders + files)
    results.append({"code": code, "said": open("../said").read(), "left": left})
json.dump(results, open("../results.json", "w"))
"""


def fill(folder: Path) -> None:
    """What the mistakes are made with."""
    for name in ("empty", "unfinished/checkpoint-3", "deep", "headless"):
        (folder / name).mkdir(parents=True)
    (folder / "loop").symlink_to("loop")
    (folder / "file.txt").write_text("some text")
    (folder / "deep" / "config.json").write_text('{"model_type": "llama", "num_hidden_layers": 1000000000}')
    (folder / "headless" / "config.json").write_text('{"model_type": "llama", "num_attention_heads": 0}')
    make(dense_config("llama")).save_pretrained(folder / "dense")
    recipe = {"model": "dense", "train_data": ["file.txt"], "output_dir": "runs/one", "use_cpu": True}
    (folder / "run.yaml").write_text(yaml.safe_dump(recipe))
    (folder / "broken.yaml").write_text("model: dense\ntrain_data: [file.txt\noutput_dir: x\n")


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[str, dict]:
    """Exit code, standard error and what lies in the folder, of each of `MISTAKES`."""
    folder = tmp_path_factory.mktemp("cli") / "here"
    folder.mkdir()
    fill(folder)
    there = sorted(f"./{path.relative_to(folder)}" for path in folder.rglob("*"))
    run_python(COMMANDS, folder, json.dumps([arguments for arguments, _ in MISTAKES]))
    found = json.loads((folder.parent / "results.json").read_text())
    return {str(arguments): result | {"there": there} for (arguments, _), result in zip(MISTAKES, found, strict=True)}


@pytest.mark.parametrize(
    ("arguments", "said"), MISTAKES, ids=lambda part: " ".join(part)[:60] if isinstance(part, list) else ""
)
def test_a_mistake_is_one_line_and_leaves_nothing(results, arguments, said):
    result = results[str(arguments)]
    assert result["code"] == 1, result["said"]
    *before, last = result["said"].splitlines()
    assert last.startswith("qsparse: error: "), result["said"]
    assert said in last
    assert len(last) < 1200
    assert all(line.startswith("[transformers]") for line in before), before
    assert result["left"] == result["there"]


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["train", "nowhere.yaml"], 1, "qsparse: error: nowhere.yaml: No such file or directory: 'nowhere.yaml'"),
        (["convert", "a", "b", "--per-projection", "down"], 2, "qsparse convert: error: argument --per-projection: "),
    ],
)
def test_the_command_itself(arguments, code, said):
    done = run_qsparse(*arguments)
    assert done.returncode == code
    assert said in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert not done.stdout


def test_the_configuration_of_every_language_model_of_transformers_is_let_through():
    for model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys() - {"gemma4_assistant"}:  # which has no default
        check_fields(model_type, CONFIG_MAPPING[model_type]().to_dict())


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (
            {"dtype": "bogus"},
            "here: dtype must be the name of a floating-point dtype of torch like 'bfloat16', got 'bogus'",
        ),
        ({"num_attention_heads": 0}, "here: num_attention_heads must be an integer from 1 to 1,000,000,000, got 0"),
        ({"intermediate_size": [8, 0]}, "here: intermediate_size must be an integer from 1 to 1,000,000,000, got 0"),
    ],
)
def test_a_field_of_another_type_of_model_is_checked_too(fields, said):
    with pytest.raises(UserError, match=f"^{said}$"):
        check_fields("here", {"model_type": "mixtral"} | fields)


def test_a_look_at_an_output_changes_nothing(tmp_path):
    check_writable(tmp_path / "new" / "folder" / "file")
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("kept")
    check_writable(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "kept"


def test_a_message_is_whole_and_one_line():
    assert one_line(ValueError("one of:\n  a,\n  b. \n Take one.")) == "one of: a, b. Take one."
    assert one_line(FileNotFoundError(2, "No such file or directory", "a")) == "No such file or directory: 'a'"
    assert one_line(KeyError()) == "KeyError"
    assert len(one_line(ValueError("word " * 1000))) == 600
