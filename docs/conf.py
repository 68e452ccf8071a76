"""Sphinx: one build for each language, `make docs`; pages work from file:// and load nothing from the network."""

from __future__ import annotations

import sys
from pathlib import Path

DOCS = Path(__file__).resolve().parent
# this checkout, not an installed copy of the package, and the extension in reference.py
sys.path[:0] = [str(DOCS.parent), str(DOCS)]

project = "dsrecipes"
author = "the authors of dsrecipes"
copyright = ""
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "reference", "chinese_search"]

# Warnings are errors. References to types of other libraries lead nowhere, since their inventories would be downloaded.
nitpicky = True
nitpick_ignore_regex = [("py:.*", ".*")]

myst_heading_anchors = 3
default_role = "code"
smartquotes = False
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False

html_theme = "furo"
html_title = "dsrecipes"
html_static_path = ["_static"]
html_css_files = ["pages.css"]
html_show_copyright = False
html_show_sphinx = False
html_show_sourcelink = False
html_copy_source = False
html_use_index = False
html_show_search_summary = False  # summaries are fetched, which a browser refuses from file://
templates_path = ["_templates"]
html_sidebars = {
    "**": [
        "sidebar/brand.html",
        "language.html",
        "sidebar/search.html",
        "sidebar/scroll-start.html",
        "sidebar/navigation.html",
        "sidebar/scroll-end.html",
    ]
}
