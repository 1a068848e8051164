"""The report as a page: plots of matplotlib, in an HTML file that needs no other file."""

from __future__ import annotations

import base64
import io
import re
import warnings
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Final

import numpy as np
from matplotlib.figure import Figure

from torchrec_freq._versions import __version__
from torchrec_freq.analysis.report import NOTES, TableReport
from torchrec_freq.cli.terminal import visible
from torchrec_freq.output import write_text, writing

_LOAD_FACTORS: Final = np.geomspace(1e-4, 1, 41)
_STYLE: Final = (
    "body { font: 15px sans-serif; max-width: 1150px; margin: 2em auto } div { overflow-x: auto }"
    "td, th { padding: .2em .7em; text-align: right; border-bottom: 1px solid #ddd }"
)


def plot(report: TableReport, batch_lookups: float) -> bytes:
    """A PNG of what the counts of a table say."""
    figure, histogram = Figure(figsize=(11, 7.5), layout="constrained"), report.histogram
    frequency, coverage, by_count, caches = figure.subplots(2, 2).flat
    # matplotlib takes what is between two dollars for a formula.
    figure.suptitle(visible(report.name).replace("$", r"\$"))
    if histogram.lookups:
        first_B, last_B, count_B = histogram.ranks()
        ranks, counts = np.stack((first_B, last_B), axis=1).ravel(), np.repeat(count_B, 2)
        frequency.loglog(ranks, counts, ".-", markersize=3)
        frequency.set(title="Rank-frequency", xlabel="rank", ylabel="count")
        rows = np.geomspace(min(1, histogram.rows / 10), histogram.rows, 101)
        coverage.semilogx(rows / histogram.rows, [histogram.top_share(float(r)) for r in rows])
        coverage.set(title="Lookups of the most frequent rows", xlabel="share of the rows")
        count_B, rate_B, spread_B = report.rates.curve()
        by_count.loglog(count_B, rate_B)
        by_count.fill_between(count_B, rate_B / spread_B, rate_B * spread_B, alpha=0.3)
        by_count.set(title="Learning rate, of two thirds of the rows", xlabel="count")
        cached = _LOAD_FACTORS * histogram.rows
        misses = [histogram.miss_rate(float(rows), batch_lookups) for rows in cached]
        caches.semilogx(_LOAD_FACTORS, misses)
        caches.set(title="LRU cache", xlabel="cache load factor", ylabel="miss rate")
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # in a table's name
        # The name of the program that wrote it would be a link.
        figure.savefig(file, format="png", dpi=100, metadata={"Software": None})
    return file.getvalue()


def write(
    folder: Path,
    reports: Sequence[TableReport],
    tables: Mapping[str, Sequence[Sequence[str]]],
    batch_lookups: float,
) -> None:
    """Writes ``report.html`` and a PNG for each table."""
    title = escape(f"Row counts of {', '.join(dict.fromkeys(visible(r.source) for r in reports))}")
    html = f'<!doctype html><meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style>\n'
    html += f"<h1>{title}</h1>\n"
    for part, lines in tables.items():
        html += f"<h2>{escape(part)}</h2>\n<div><table>\n"
        for tag, cells in zip(["th", *["td"] * len(reports)], lines, strict=True):
            html += f"<tr>{''.join(f'<{tag}>{escape(cell)}</{tag}>' for cell in cells)}</tr>\n"
        html += f"</table></div>\n<p>{escape(NOTES[part])}</p>\n"
    for number, report in enumerate(reports, start=1):
        png, name = plot(report, batch_lookups), visible(report.name)
        # A file name cannot hold every table's, and has an end counted in bytes.
        file_name = re.sub(r"[^\w.-]", "_", report.name).encode()[:100].decode(errors="ignore")
        with writing(folder / f"{number:02}-{file_name}.png") as file:
            file.write_bytes(png)
        data = base64.b64encode(png).decode()
        html += f'<p><img src="data:image/png;base64,{data}" alt="Plots of {escape(name)}"></p>\n'
    write_text(folder / "report.html", f"{html}<footer>torchrec_freq {__version__}</footer>\n")
