"""How Sphinx builds the pages: `make docs`. Its source is the repository, so that links are the same here and there."""

import dataclasses
from typing import Any

from sphinx.application import Sphinx

import qsparse_hf

project = "qsparse_hf"
version = release = qsparse_hf.__version__
html_title = f"qsparse_hf {release}"
html_theme = "furo"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
root_doc = "README"
other_pages = ["CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/NOTES.md", "model_cards/*.md"]
include_patterns = ["README.md", "docs/*.md", *other_pages]
exclude_patterns = [".*", "docs/_build", "quickstart", "runs"]  # walked otherwise
myst_heading_anchors = 3
html_show_copyright = False

default_role = "code"  # docstrings write `name`, as Markdown does
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True

# The README names the pages in its text; on the site they are the sidebar too.
_PAGES = """
```{toctree}
:hidden:

docs/method
docs/converting
docs/calibrating
docs/training
docs/decoding
docs/evaluating
docs/publishing
docs/serving
docs/troubleshooting
docs/api
benchmarks/NOTES
model_cards/README
CONTRIBUTING
CHANGELOG
```
"""


_CARDS = """
```{toctree}
:hidden:
:glob:

*
```
"""
CONTENTS = {root_doc: _PAGES, "model_cards/README": _CARDS}


def _add_contents(app: Sphinx, page: str, source: list[str]) -> None:
    source[0] += CONTENTS.get(page, "")


def _add_fields(app: Sphinx, what: str, name: str, documented: Any, options: Any, lines: list[str]) -> None:
    """The keys of a recipe carry what the command line says of them."""
    for field in dataclasses.fields(documented) if what == "class" and dataclasses.is_dataclass(documented) else ():
        if (said := field.metadata.get("help")) and field.name in documented.__annotations__:
            default = "" if field.default is dataclasses.MISSING else f" (`{field.default}`)"
            lines += [f"- `{field.name}`{default}: {said}", ""]


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("source-read", _add_contents)
    app.connect("autodoc-process-docstring", _add_fields)
