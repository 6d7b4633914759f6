"""Sphinx configuration: pages mirror the map, their text comes from the modules. Warnings are errors (`make docs`)."""

import importlib.metadata
import os
import sys
from pathlib import Path

os.environ["NUMBA_ENABLE_CUDASIM"] = "1"  # one example breaks into a kernel; no page needs a GPU

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project = "refopt"
author = "The refopt authors"
copyright = author
release = version = importlib.metadata.version("refopt")

extensions = ["myst_parser", "sphinx.ext.autodoc"]
extensions += ["sphinx_gallery.gen_gallery", "stems", "results", "columns", "overview", "public"]
exclude_patterns = ["_build", "examples/*.ipynb", "examples/*.py", "examples/*.zip", "sg_execution_times.rst"]
suppress_warnings = ["config.cache"]
default_role = "code"
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 2

autodoc_member_order = "bysource"
autodoc_typehints = "none"


def plain(gallery: dict, example: str) -> None:
    """The look of every picture of the gallery."""
    import matplotlib

    matplotlib.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "figure.dpi": 120})
    matplotlib.rcParams["figure.constrained_layout.use"] = True


sphinx_gallery_conf = {
    "examples_dirs": "../examples",
    "gallery_dirs": "examples",
    "filename_pattern": r"/[01]\d_",  # those of the front ends are shown; their tests run them
    "ignore_pattern": r"/exercise/|/torchrun/",
    "default_thumb_file": str(Path(__file__).parent / "_static" / "thumb.png"),
    "reset_modules": ("matplotlib", plain),
    "within_subsection_order": "FileNameSortKey",
    "capture_repr": (),
    "download_all_examples": False,
    "show_memory": False,
    "write_computation_times": False,
    "min_reported_time": 1e9,
    "abort_on_example_error": True,
}

html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["refopt.css"]
html_title = "refopt"
