"""How the documentation is built: ``python -m sphinx -W --keep-going docs build/docs``."""

import sys
from importlib import metadata
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project = "kmm"
author = "the kmm authors"
copyright = "the kmm authors, BSD-3-Clause"
release = version = metadata.version("kmm")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx_click", "kernel_functions"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_ext"]
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
# Options begin with two hyphens.
smartquotes = False

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_class_signature = "separated"
autodoc_preserve_defaults = True
# Cython's grammar has no lexer of Pygments' that knows all of it.
suppress_warnings = ["misc.highlighting_failure"]

html_theme = "furo"
html_title = "kmm"
