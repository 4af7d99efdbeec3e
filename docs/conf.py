"""Settings of the site: ``sphinx-build -W docs build/site``."""

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from write_pages import write_pages  # noqa: E402 (it lies beside this file)

from qat_tricks import __version__  # noqa: E402

project = "qat_tricks"
author = "The qat_tricks authors"
version = release = __version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = "qat_tricks"
html_copy_source = html_show_sourcelink = False
exclude_patterns = ["generated/*.md"]  # parts of pages

myst_heading_anchors = 3
myst_enable_extensions = ["attrs_inline"]
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True

# The notebooks run with the build: what the site shows is what they print now.
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 300
nb_execution_in_temp = True  # they write files
nb_output_stderr = "remove"  # Lightning's warnings name files of this machine
nb_merge_streams = True

write_pages(HERE.parent, HERE / "generated")
