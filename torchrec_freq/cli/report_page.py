"""The report as a page: plots of matplotlib, in a file of HTML that needs no other file."""

from __future__ import annotations

import base64
import io
import re
import warnings
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Final

import jinja2
import numpy as np
from matplotlib.figure import Figure

from torchrec_freq._versions import __version__
from torchrec_freq.analysis.report import POLICIES, Settings, TableReport, rates_of
from torchrec_freq.analysis.traffic import CountHistogram
from torchrec_freq.cli.report_tables import TextTable
from torchrec_freq.cli.terminal import visible
from torchrec_freq.counts.stored import StoredTable
from torchrec_freq.output import write_text, writing
from torchrec_freq.planner import MeasuredCacheStatistics

_LOAD_FACTORS: Final = np.geomspace(1e-4, 1, 41)


def plot(
    report: TableReport, table: StoredTable, histogram: CountHistogram, settings: Settings
) -> bytes:
    """A PNG of what the counts of a table say."""
    figure = Figure(figsize=(11, 7.5), layout="constrained")
    frequency, coverage, rates, caches = figure.subplots(2, 2).flat
    # matplotlib takes what is between two dollars for a formula.
    figure.suptitle(visible(report.name).replace("$", r"\$"))
    if report.lookups:
        _plot_counts(frequency, coverage, report, histogram)
        _plot_rates(rates, report, table, settings)
        _plot_caches(caches, report, histogram, settings)
    else:
        frequency.set_title("no lookups")
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # in a table's name
        # The name of the program that wrote it would be a link.
        figure.savefig(file, format="png", dpi=100, metadata={"Software": None})
    return file.getvalue()


def write(
    folder: Path,
    reports: Sequence[TableReport],
    plots: Sequence[bytes],
    tables: Sequence[TextTable],
) -> None:
    """Writes ``report.html`` and a PNG a table."""
    for number, (report, png) in enumerate(zip(reports, plots, strict=True), start=1):
        # A file name cannot hold every table's, and has an end counted in bytes.
        name = re.sub(r"[^\w.-]", "_", report.name).encode()[:100].decode(errors="ignore")
        with writing(folder / f"{number:02}-{name}.png") as file:
            file.write_bytes(png)
    template = resources.files("torchrec_freq.cli") / "templates" / "report.html"
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    names = [visible(report.name) for report in reports]
    html = environment.from_string(template.read_text(encoding="utf-8")).render(
        version=__version__,
        sources=list(dict.fromkeys(visible(report.source) for report in reports)),
        tables=tables,
        plots=list(zip(names, (base64.b64encode(png).decode() for png in plots), strict=True)),
    )
    write_text(folder / "report.html", html)


def _plot_counts(
    frequency: Any, coverage: Any, report: TableReport, histogram: CountHistogram
) -> None:
    first_B, last_B, count_B = histogram.ranks()
    ranks, counts = np.stack((first_B, last_B), axis=1).ravel(), np.repeat(count_B, 2)
    frequency.loglog(ranks, counts, ".-", markersize=3, label="counts")
    if report.zipf is not None:
        line = np.array([1, report.zipf.last_rank])
        label = f"Zipf, exponent {report.zipf.exponent:.2f}"
        frequency.loglog(line, report.zipf.first * line**-report.zipf.exponent, "--", label=label)
    frequency.set(title="Rank-frequency", xlabel="rank", ylabel="count")
    frequency.legend()
    rows = np.geomspace(min(1, histogram.rows / 10), histogram.rows, 101)
    coverage.semilogx(rows / histogram.rows, [histogram.top_share(float(r)) for r in rows])
    coverage.set(title="Lookups covered by the most frequent rows", ylim=(0, 1.02))
    coverage.set(xlabel="share of the rows", ylabel="share of the lookups")


def _plot_rates(axes: Any, report: TableReport, table: StoredTable, settings: Settings) -> None:
    counts = np.geomspace(1, max(*report.counts.values(), 2), 101)
    rates, unit = rates_of(table, counts.tolist(), settings)
    axes.loglog(counts, rates)
    for name, marker in zip(report.rates, "osD*", strict=True):
        axes.loglog(report.counts[name], report.rates[name], marker, color="C1", label=name)
    axes.legend(title="rows seen")
    axes.set(title="Learning rate", xlabel="count", ylabel=unit or "rate")


def _plot_caches(
    axes: Any, report: TableReport, histogram: CountHistogram, settings: Settings
) -> None:
    for policy in POLICIES:
        statistics = MeasuredCacheStatistics(histogram, report.batch_lookups, policy)
        misses = [statistics.expected_miss_rate(float(x)) for x in _LOAD_FACTORS]
        chosen = report.caches[policy].load_factor
        label = f"{policy.upper()}, {settings.miss_rate:.3g} at {chosen:.2g}"
        axes.semilogx(_LOAD_FACTORS, misses, label=label)
    axes.axhline(settings.miss_rate, color="gray", linewidth=0.5)
    title = f"Cache, {report.batch_lookups:,.0f} lookups a batch"
    axes.set(title=title, xlabel="cache load factor", ylabel="miss rate", ylim=(0, 1.02))
    axes.legend()
