"""The walls of the house, read from the source: who may import whom, and what travels with a checkpoint."""

import ast
import re

import pytest
from conftest import REPOSITORY

PACKAGE = REPOSITORY / "qsparse_hf"
MODELING = sorted((PACKAGE / "modeling").glob("*.py"))
FAMILY_FILES = [path for path in MODELING if re.match(r"modeling_qsparse_\w+", path.stem)]

# Each module and the modules of this package it may import.
LAYERS = [
    {"errors", "modeling.sparsity", "modeling.backend", "modeling.sparsify_triton", "modeling.__init__"},
    {
        "measure",
        "modeling.configuration_qsparse",
        "modeling.decode_numba",
        "modeling.sparsify_ops",
        "modeling.decode_attention_triton",
    },
    {"modeling.sparsify", "modeling.sparse_linear_triton"},
    {"modeling.sparse_linear", "modeling.decode_graph", "modeling.decode_attention"},
    {"modeling.modeling_qsparse"},
    {f"modeling.{path.stem}" for path in FAMILY_FILES},
    {"__init__"},
    {
        "checkpoint",
        "report",
        "training.schedule",
        "training.distillation",
        "training.throughput",
        "training.sources",
        "training.sharding",
    },
    {"conversion", "training.data", "training.faults", "training.training_report"},
    {"bench", "training.streaming"},
    {"training.trainer"},
    {"training.__init__", "training.sft"},
    {"training.recipe"},
    {"training.run"},
    {"quickstart"},
    {"cli"},
]


def local_imports(path) -> list[tuple[int, str]]:
    """(level, module) of every relative import, wherever it stands."""
    tree = ast.parse(path.read_text())
    return [(n.level, n.module or "") for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.level]


def name_of(path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def test_every_module_has_its_layer():
    modules = {name_of(path) for path in PACKAGE.rglob("*.py")}
    assert modules == set().union(*LAYERS)


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=name_of)
def test_imports_go_one_way(path):
    name = name_of(path)
    depth = next(i for i, layer in enumerate(LAYERS) if name in layer)
    below = set().union(*LAYERS[:depth])
    parents = name.split(".")[:-1]
    for level, module in local_imports(path):
        target = ".".join([*parents[: len(parents) - (level - 1)], module]).strip(".")
        assert target in below or (name == "training.__init__" and target == "training.trainer"), f"{name} -> {target}"


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
        "contextlib",
        "dataclasses",
        "difflib",
        "functools",
        "hashlib",
        "importlib",
        "logging",
        "math",
        "os",
        "threading",
        "typing",
        "weakref",
    }
    optional = {"triton": {"triton"}, "numba": {"numba", "numpy", "llvmlite"}}.get(path.stem.split("_")[-1], set())
    assert roots <= allowed | optional
    # The exporter finds imports with a regular expression, in docstrings too.
    assert len(re.findall(r"^\s*from\s+\.(\S+)\s+import", text, re.MULTILINE)) == len(local_imports(path))


@pytest.mark.parametrize("path", FAMILY_FILES, ids=name_of)
def test_a_family_states_only_its_difference(path):
    functions = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)]
    assert all(len(function.body) == 1 for function in functions)
    assert len(path.read_text().splitlines()) < 40
