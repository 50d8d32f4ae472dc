"""Recipes that nobody would write: whatever comes in, what comes out is a recipe or one line about it."""

import os
import re
import typing
from dataclasses import fields
from datetime import timedelta
from functools import partial
from pathlib import Path
from unittest.mock import patch

import pytest
import yaml
from conftest import REPOSITORY
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from qsparse_hf.errors import UserError
from qsparse_hf.training.data import DataArguments
from qsparse_hf.training.recipe import Recipe, RunArguments, parse
from qsparse_hf.training.trainer import QSparseTrainingArguments

QSparseSFTConfig = pytest.importorskip("qsparse_hf.training.sft", exc_type=UserError).QSparseSFTConfig

BASE = {"model": "m", "train_data": ["a.jsonl"], "output_dir": "o", "use_cpu": True}
RECIPES = [path.read_text() for path in sorted((REPOSITORY / "configs" / "train").glob("*_tiny*.yaml"))]
FIELDS = sorted(
    {
        field.name
        for kind in (RunArguments, DataArguments, QSparseTrainingArguments, QSparseSFTConfig)
        for field in fields(kind)
        if field.init
    }
)
OF_NO_FIELD = re.compile(
    r"is empty|must hold|too large|too deep|an alias stands|unacceptable character"  # of the whole file
    r"|data source|columns|probabilit"  # of an entry of train_data
)


def quick(examples: int) -> settings:
    """So many examples, none of which may take long, however it is written."""
    return settings(max_examples=examples, deadline=timedelta(seconds=2), suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> typing.Iterator[Path]:
    """Where the recipes are written; what their fields set in the environment is taken back."""
    with patch.dict(os.environ):
        yield tmp_path_factory.mktemp("fuzz") / "recipe.yaml"


def outcome(file: Path, text: str, overrides: tuple[str, ...] = ()) -> Recipe | str:
    """The recipe, or what is said of it: one line, not endless, about a key, a line or an override."""
    file.write_text(text, encoding="utf-8", errors="surrogatepass")
    try:
        return parse(str(file), list(overrides))
    except UserError as error:
        said = str(error)
    assert "\n" not in said
    assert len(said) < 1500
    said = said.replace(str(file), "FILE")
    named = re.search(r"line \d+", said) or any(field in said for field in FIELDS) or OF_NO_FIELD.search(said)
    assert named or any(said.startswith(" ".join(override.split())[:40]) for override in overrides), said
    return said


INDICATORS = [
    *"-?:,[]{}#&*!|>'\"%@\n\t~=é",
    "\n  ",
    "---\n",
    "...\n",
    "- ",
    ": ",
    "<<: ",
    "&a ",
    "*a",
    "<<: *a",
    "\ufeff",
    "\0",
]
TAGGED = ["!!bool ", "!!int ", "!!float ", "!!null ", "!!python/name:os.system ", "!x "]
PLAIN = ["null", "0b_", "2024-13-45", "1:99", ".nan", "1e999", "-1", "yes", "on", "9" * 5000]
PIECES = st.sampled_from(INDICATORS + TAGGED + PLAIN)


@st.composite
def mutated(draw) -> str:
    """A recipe with pieces of it taken out, doubled, or replaced by what YAML gives a meaning to."""
    text = draw(st.sampled_from(RECIPES))
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(text)))
        stop = start + draw(st.sampled_from([0, 0, 1, 3, 20]))
        piece = draw(st.one_of(PIECES, st.text(max_size=5), st.just(text[start:stop] * 2)))
        text = text[:start] + piece + text[stop:]
    return text


@quick(600)
@given(text=mutated())
def test_mutated_recipes(file, text):
    outcome(file, text)


SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([0, -1, 2**32, 2**63, 10**30, 10**4000]),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(["no", "", "-", "--seed=7", "bogus", "all", "a/b", "{", "x" * 300, "\0", "~", "nan", "0b_", "{}"]),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)


@quick(800)
@given(
    values=st.dictionaries(st.sampled_from(FIELDS), VALUES, min_size=1, max_size=2),
    stage=st.sampled_from(["continue", "sft"]),
)
def test_any_value_of_any_field(file, values, stage):
    outcome(file, yaml.safe_dump(BASE | {"stage": stage} | values))


@quick(400)
@given(
    key=st.sampled_from(FIELDS) | st.text(max_size=4),
    value=st.one_of(st.text(max_size=8), PIECES, VALUES.map(partial(yaml.safe_dump, default_flow_style=True))),
)
def test_any_override(file, key, value):
    outcome(file, yaml.safe_dump(BASE), (f"{key}={value}",))


@quick(20)
@given(levels=st.integers(1, 400), width=st.integers(1, 12), merged=st.booleans())
@example(levels=9, width=9, merged=False)
@example(levels=400, width=12, merged=True)
def test_aliases_of_aliases(file, levels, width, merged):
    lines = ["x0: &x0 {a: 1}"]
    for level in range(1, levels):
        aliases = "[" + ", ".join([f"*x{level - 1}"] * width) + "]"
        lines.append(f"x{level}: &x{level} " + (f"{{<<: {aliases}}}" if merged else aliases))
    said = outcome(file, "\n".join(lines))
    assert "unknown key 'x0'" in said or "too large" in said
