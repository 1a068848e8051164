"""Settings of Sphinx for `make docs`."""

from torchrec_freq import __version__

project = "torchrec_freq"
author = "The torchrec_freq authors"
copyright = author
version = release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.mathjax", "sphinx.ext.napoleon"]
myst_enable_extensions = ["dollarmath"]
# Links to a heading of a page, as GitHub makes them.
myst_heading_anchors = 3
# Links to files outside the pages are checked by tests/test_docs.py.
suppress_warnings = ["myst.xref_missing"]

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
napoleon_custom_sections = ["Source"]
# Attributes and results are described in words: shapes and units, not types to link to.
napoleon_use_ivar = True
napoleon_use_rtype = False
# Names of other packages have no page here, and looking them up takes a network.
nitpick_ignore_regex = [
    (r"py:.*", r"(collections|fbgemm_gpu|numpy|os|torch|torchrec|typing)\..*"),
    (r"py:class", r"Tensor|rows_B"),
]

exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"torchrec_freq {version}"
