"""Settings of Sphinx for `make docs`."""

import os
import re
from pathlib import Path
from typing import Any

from docutils import nodes  # type: ignore[import-untyped]
from docutils.utils.math.latex2mathml import tex2mathml  # type: ignore[import-untyped]
from sphinx.application import Sphinx

from torchrec_freq import __version__

project = "torchrec_freq"
author = "The torchrec_freq authors"
copyright = author
version = release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_enable_extensions = ["dollarmath"]
# Links to a heading of a page, as GitHub makes them.
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
napoleon_custom_sections = ["Source"]
# Attributes and results are described in words: shapes and units, not types to link to.
napoleon_use_ivar = True
napoleon_use_rtype = False
# Names of other packages have no page here, and looking them up takes a network.
nitpick_ignore_regex = [
    (r"py:.*", r"(collections|fbgemm_gpu|numpy|os|torch|torchrec|typing|typing_extensions)\..*"),
    (r"py:class", r"Tensor|rows_B|torchrec_freq\.config\.Options"),
]

exclude_patterns = ["_build"]
html_theme = "furo"
html_math_renderer = "mathml"
html_title = f"torchrec_freq {version}"


PAGES = Path(__file__).parent
README = PAGES.parent / "README.md"
# Files of the repository that are pages here.
PAGE_OF = {README: "index.md", README.with_name("CONTRIBUTING.md"): "contributing.md"}


def adapt_links(app: Sphinx, page: str, source: list[str]) -> None:
    """Lets pages be read in the repository and here: the index is the README and its contents.

    A link to a file of the repository that is not a page becomes a download.
    """
    folder = PAGES
    if page == "index":
        folder, source[0] = README.parent, README.read_text() + source[0]

    def adapt(match: re.Match[str]) -> str:
        image, name, heading = match.groups(default="")
        file = (folder / name).resolve()
        if not file.is_file():
            return match[0]
        target = PAGE_OF.get(file) or os.path.relpath(file, PAGES)
        download = "path:" if target.startswith("..") and not image else ""
        return f"{image}]({download}{target}{heading})"

    link = r"(!\[[^\]]*)?\]\(([\w./-]+)(#[\w-]+)?\)"
    source[0] = re.sub(link, adapt, source[0])


def math(writer: Any, node: nodes.Element) -> None:
    """Equations as MathML, which browsers show without a script from the network."""
    block = isinstance(node, nodes.math_block)
    # What the converter does not know: it takes the 12 of \frac12 for the numerator.
    tex = re.sub(r"(\\t?frac)(\d)(\d)", r"\1{\2}{\3}", node.astext()).replace(r"\textstyle", "")
    if "&" in tex:
        tex = rf"\begin{{aligned}}{tex}\end{{aligned}}"
    writer.body.append(tex2mathml(tex, as_block=block))
    raise nodes.SkipNode


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.add_html_math_renderer("mathml", (math, None), (math, None))
    app.connect("source-read", adapt_links)
