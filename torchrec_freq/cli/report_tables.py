"""The report as tables of text, for the terminal and for the page."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torchrec_freq.analysis.rates import QUANTILES
from torchrec_freq.analysis.report import LOAD_FACTORS, POLICIES, TOP_SHARES, Settings, TableReport
from torchrec_freq.analysis.traffic import Policy
from torchrec_freq.cli.terminal import visible
from torchrec_freq.config import FrequencyConfig


class TextTable(NamedTuple):
    """A part of the report, for the terminal and the page."""

    title: str
    note: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


def text_tables(reports: Sequence[TableReport], settings: Settings) -> list[TextTable]:
    """The reports as tables, a line a table of the model."""
    several = len({report.source for report in reports}) > 1
    names = [visible(f"{r.source}: {r.name}" if several else r.name) for r in reports]

    def lines(cells: Callable[[TableReport], list[str]]) -> list[list[str]]:
        return [[name, *cells(report)] for name, report in zip(names, reports, strict=True)]

    def skew(r: TableReport) -> list[str]:
        zipf = (
            ["", ""] if r.zipf is None else [f"{r.zipf.exponent:.2f}", f"{r.zipf.last_rank:,.0f}"]
        )
        shares = [_percent(share) if r.lookups else "" for share in r.top_shares.values()]
        return [f"{r.rows:,}", f"{r.never_seen:,}", f"{r.lookups:,}", *zipf, *shares]

    def rates(r: TableReport) -> list[str]:
        counts = [_number(r.counts.get(name)) for name in QUANTILES]
        unit = r.rate_unit if r.rates else ""
        return [
            _number(r.scale),
            *counts,
            *(_number(r.rates.get(name)) for name in QUANTILES),
            unit,
        ]

    def cache(policy: Policy) -> Callable[[TableReport], list[str]]:
        def cells(r: TableReport) -> list[str]:
            c = r.caches.get(policy)
            if c is None:
                return [policy.upper()] + [""] * (len(LOAD_FACTORS) + 4)
            return [
                policy.upper(),
                _number(r.batch_lookups),
                _number(r.distinct_rows),
                *(_percent(miss) for miss in c.miss_rates.values()),
                f"{c.cacheability:.3f}",
                f"{c.load_factor:.2g}",
            ]

        return cells

    by_policy = [lines(cache(policy)) for policy in POLICIES]
    return [
        TextTable(
            "Rows and lookups",
            "Zipf: exponent s of count ~ rank^-s, by least squares in the log-log plot, over the "
            "ranks 1 to the one named, of rows with at least 10 lookups. Top: share of the lookups "
            "that go to so many of the rows, the most frequent ones.",
            ["table", "rows", "never seen", "lookups", "Zipf", "to rank"]
            + [f"top {_percent(x)}" for x in TOP_SHARES],
            lines(skew),
        ),
        TextTable(
            "Learning rates",
            "Quantiles of the counts of the rows that were seen, and the rate of a row with such a "
            f"count and an average gradient, for {_options(settings.config)}. "
            "s: root mean square of the gradient of an occurrence, which a file of counts may not "
            "have.",
            ["table", "s"]
            + [f"count {name}" for name in QUANTILES]
            + [f"rate at {name}" for name in QUANTILES]
            + ["times"],
            lines(rates),
        ),
        TextTable(
            "Caches",
            "Expected share of a batch's distinct rows that a cache of so much of the rows misses, "
            "ids drawn independently. Area: under the miss rate, 0 is easy and 1 hard to cache. "
            f"Load factor: the least that misses at most {_percent(settings.miss_rate)}.",
            ["table", "policy", "lookups a batch", "distinct rows"]
            + [f"miss at {x:g}" for x in LOAD_FACTORS]
            + ["area", "load factor"],
            [line for pair in zip(*by_policy, strict=True) for line in pair],
        ),
        TextTable(
            "Row-wise shards",
            "Lookups of the busiest shard as a multiple of the mean, by number of ranks.",
            ["table", *(str(n) for n in settings.ranks)],
            lines(lambda r: [_number(r.imbalance.get(str(n))) for n in settings.ranks]),
        ),
    ]


def markdown(table: TextTable) -> str:
    """A table with a title and a note, in Markdown that is also readable as it is."""
    lines = [[c.replace("|", "\\|") for c in line] for line in (table.header, *table.rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(table.header))]

    def row(cells: Sequence[str]) -> str:
        first, *rest = zip(cells, widths, strict=True)
        aligned = [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in rest)]
        return f"| {' | '.join(aligned)} |"

    rule = f"|{'-' * (widths[0] + 2)}|" + "".join(f"{'-' * (w + 1)}:|" for w in widths[1:])
    header, *rows = map(row, lines)
    body = "\n".join([header, rule, *rows])
    return f"{table.title}\n\n{body}\n\n{table.note}\n"


def _percent(share: float) -> str:
    return f"{100 * share:.3g}%"


def _options(config: FrequencyConfig) -> str:
    if config.normalize is None:
        return f"normalize=None, min_count={config.min_count:g}"
    return f"own_weight={config.own_weight:g}"


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
