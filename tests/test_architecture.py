"""The walls of the house, read from the source: who may import whom, and what travels with a checkpoint."""

import ast
import re

import pytest
from conftest import REPOSITORY, run_python

PACKAGE = REPOSITORY / "qsparse_hf"
MODELING = sorted((PACKAGE / "modeling").glob("*.py"))
FAMILY_FILES = [path for path in MODELING if re.match(r"modeling_qsparse_\w+", path.stem)]

# Each room or module, and those that it may import: itself, and all to its left.
ORDER = [
    {"errors", "modeling"},
    {"decode"},
    {"kernels"},
    {"registration"},
    {"__init__"},
    {"configuration", "checkpoint", "losses", "serving", "sources"},
    {"weights"},
    {"loading", "results", "texts"},
    {"measure", "report", "training.arguments", "training.distillation"} | {"training.sharding", "training.throughput"},
    {
        "gguf_file",
        "model_card",
        "tasks",
        "training.data",
        "training.faults",
        "training.schedule",
        "training.training_report",
    },
    {"conversion", "hub"},
    {"bench", "evaluation", "generate", "training.chat", "training.streaming"},
    {"calibration", "comparison", "training.trainer"},
    {"training.__init__", "training.sft"},
    {"training.recipe"},
    {"training.control"},
    {"training.run"},
    {"quickstart"},
    {"cli"},
]


def local_imports(path) -> list[tuple[int, str]]:
    """(level, module) of every relative import, wherever it stands, but for those that only a type checker reads."""
    tree = ast.parse(path.read_text())
    blocks = [n for n in ast.walk(tree) if isinstance(n, ast.If) and getattr(n.test, "id", "") == "TYPE_CHECKING"]
    unread = {id(n) for block in blocks for statement in block.body for n in ast.walk(statement)}
    found = [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.level and id(n) not in unread]
    return [(n.level, n.module or "") for n in found]


def name_of(path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def place_of(module: str) -> int:
    """Where a module, or the room that it is in, stands in the order."""
    room = module.partition(".")[0]
    return next(i for i, names in enumerate(ORDER) if module in names or room in names)


def test_the_order_names_what_is_there():
    modules = {name_of(path) for path in PACKAGE.rglob("*.py")}
    rooms = {module.partition(".")[0] for module in modules} | modules
    assert set().union(*ORDER) <= rooms
    assert all(place_of(module) is not None for module in modules)


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=name_of)
def test_imports_go_one_way(path):
    name = name_of(path)
    parents = name.split(".")[:-1]
    for level, module in local_imports(path):
        target = ".".join([*parents[: len(parents) - (level - 1)], module]).strip(".") or "__init__"
        same_room = target.partition(".")[0] == name.partition(".")[0] != "training"
        public = {name, target} == {"training.__init__", "training.trainer"}
        assert same_room or public or place_of(target) < place_of(name), f"{name} -> {target}"


def test_importing_the_package_costs_little():
    """Numba imported before vLLM starts crashes it; training libraries and pictures are for those who train."""
    code = """
import sys, time
import transformers.models.llama.modeling_llama
known = set(sys.modules)
start = time.process_time()
import qsparse_hf
elapsed = time.process_time() - start
brought = {name.partition(".")[0] for name in set(sys.modules) - known}
heavy = brought & {"numba", "llvmlite", "triton", "datasets", "trl", "matplotlib", "tensorboard", "accelerate"}
print(elapsed, *sorted(heavy))
"""
    runs = [run_python(code).stdout.split() for _ in range(2)]
    assert [heavy for _, *heavy in runs] == [[]] * 2
    assert min(float(elapsed) for elapsed, *_ in runs) <= 0.5


def test_nothing_fails_where_peft_is_absent():
    run_python("import sys; sys.modules['peft'] = None; import qsparse_hf; qsparse_hf.QSparseLlamaConfig()")


@pytest.mark.parametrize("path", MODELING, ids=name_of)
def test_what_ships_to_the_hub_is_flat_and_self_contained(path):
    text = path.read_text()
    for level, module in local_imports(path):
        assert level == 1, f"from {'.' * level}{module}: only `from .name import x` is copied"
        assert (path.parent / f"{module}.py").exists()
    tree = ast.parse(text)
    absolute = [n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and not n.level]
    absolute += [alias.name for n in ast.walk(tree) if isinstance(n, ast.Import) for alias in n.names]
    roots = {module.split(".")[0] for module in absolute}
    allowed = {
        "torch",
        "transformers",
        "huggingface_hub",
        "collections",
        "dataclasses",
        "difflib",
        "inspect",
        "logging",
        "math",
        "os",
        "typing",
    }
    assert roots <= allowed
    # The exporter finds imports with a regular expression, in docstrings too.
    assert len(re.findall(r"^\s*from\s+\.(\S+)\s+import", text, re.MULTILINE)) == len(local_imports(path))


@pytest.mark.parametrize("path", FAMILY_FILES, ids=name_of)
def test_a_family_states_only_its_difference(path):
    functions = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)]
    assert all(len(function.body) <= 2 for function in functions)
    assert len(path.read_text().splitlines()) <= 40
