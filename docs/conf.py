"""The documentation site: make docs"""

import importlib.metadata

project = "grinqh_ao"
author = "the grinqh_ao contributors"
copyright = "2026, the grinqh_ao contributors"
version = release = importlib.metadata.version("grinqh_ao")

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
napoleon_use_ivar = True
napoleon_custom_sections = [("Tensor data", "Attributes")]
copybutton_prompt_text = "$ "

html_theme = "furo"
html_title = f"grinqh_ao {version}"
html_show_sphinx = False
exclude_patterns = ["_build"]
