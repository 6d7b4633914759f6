"""Sphinx configuration: pages mirror the map, their text comes from the modules. Warnings are errors (`make docs`)."""

import importlib.metadata
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project = "refopt"
author = "The refopt authors"
copyright = author
release = version = importlib.metadata.version("refopt")

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx_gallery.gen_gallery",
    "stems",
    "results",
    "columns",
    "overview",
]
exclude_patterns = ["_build", "examples/*.ipynb", "examples/*.py", "examples/*.zip", "sg_execution_times.rst"]
suppress_warnings = ["config.cache"]
default_role = "code"
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 2

autodoc_member_order = "bysource"
autodoc_typehints = "none"

sphinx_gallery_conf = {
    "examples_dirs": "../examples",
    "gallery_dirs": "examples",
    "filename_pattern": r"/[01]\d_",  # those of the front ends are shown, and run by `make examples`
    "within_subsection_order": "FileNameSortKey",
    "download_all_examples": False,
    "show_memory": False,
    "write_computation_times": False,
    "min_reported_time": 1e9,
    "abort_on_example_error": True,
}

html_theme = "furo"
html_title = "refopt"
