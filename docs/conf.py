"""How the documentation is built: `make docs`, without the network and without a warning."""

from __future__ import annotations

import sys
from importlib.metadata import version as installed_version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_extensions"))

project = "flask_asyncroute"
copyright = "2026 flask_asyncroute contributors"
author = "flask_asyncroute contributors"
release = installed_version("flask-asyncroute")
version = release

extensions = ["sphinx.ext.autodoc", "pallets_sphinx_themes", "command_help"]
# The page benchmark.rst includes the results.
exclude_patterns = ["_build", "_extensions", "explanation/benchmark-results.rst"]
default_role = "code"
# Types stand in the signatures; the docstrings do not repeat them.
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints = "signature"

html_theme = "flask"
html_title = "flask_asyncroute"
html_static_path = ["_static"]
html_style = "docs.css"
version_banner = False  # it asks pypi.org in the browser of each reader
html_show_sourcelink = False
html_context = {"project_links": []}
