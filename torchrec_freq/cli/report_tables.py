"""The report as tables of text, for the terminal and for the page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torchrec_freq.analysis.rates import QUANTILES
from torchrec_freq.analysis.report import LOAD_FACTORS, POLICIES, TOP_SHARES, Settings, TableReport
from torchrec_freq.cli.terminal import visible


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
    config = settings.config
    options = f"own_weight={config.own_weight:g}"
    if config.normalize is None:
        options = f"normalize=None, min_count={config.min_count:g}"
    skew, rates, caches, shards = [], [], [], []
    for name, r in zip(names, reports, strict=True):
        zipf = ("", "")
        if r.zipf is not None:
            zipf = (f"{r.zipf.exponent:.2f}", f"{r.zipf.last_rank:,.0f}")
        tops = [_percent(share) if r.lookups else "" for share in r.top_shares.values()]
        skew.append([name, f"{r.rows:,}", f"{r.never_seen:,}", f"{r.lookups:,}", *zipf, *tops])
        figures = [r.scale, *map(r.counts.get, QUANTILES), *map(r.rates.get, QUANTILES)]
        rates.append([name, *map(_number, figures), r.rate_unit if r.rates else ""])
        for policy in POLICIES:
            cells = [""] * (len(LOAD_FACTORS) + 4)
            if cache := r.caches.get(policy):
                misses = map(_percent, cache.miss_rates.values())
                cells = [_number(r.batch_lookups), _number(r.distinct_rows), *misses]
                cells += [f"{cache.cacheability:.3f}", f"{cache.load_factor:.2g}"]
            caches.append([name, policy.upper(), *cells])
        shards.append([name, *(_number(r.imbalance.get(str(n))) for n in settings.ranks)])
    return [
        TextTable(
            "Rows and lookups",
            "Zipf: exponent s of count ~ rank^-s, by least squares in the log-log plot, over the "
            "ranks 1 to the one named, of rows with at least 10 lookups. Top: share of the lookups "
            "that go to so many of the rows, the most frequent ones.",
            "table,rows,never seen,lookups,Zipf,to rank".split(",")
            + [f"top {_percent(x)}" for x in TOP_SHARES],
            skew,
        ),
        TextTable(
            "Learning rates",
            "Quantiles of the counts of the rows that were seen, and the rate of a row with such a "
            f"count and an average gradient, for {options}. s: root mean square of the gradient of "
            "an occurrence. A file of counts may not have it, or takes its squares for those of "
            "one occurrence of each row that was seen, as a model does that loads it.",
            ["table", "s", *(f"{what} {q}" for what in ("count", "rate at") for q in QUANTILES)]
            + ["times"],
            rates,
        ),
        TextTable(
            "Caches",
            "Expected share of a batch's distinct rows that a cache of so much of the rows misses, "
            "ids drawn independently. Area: under the miss rate, 0 is easy and 1 hard to cache. "
            f"Load factor: the least that misses at most {_percent(settings.miss_rate)}.",
            "table,policy,lookups a batch,distinct rows".split(",")
            + [*(f"miss at {x:g}" for x in LOAD_FACTORS), "area", "load factor"],
            caches,
        ),
        TextTable(
            "Row-wise shards",
            "Lookups of the busiest shard as a multiple of the mean, by number of ranks.",
            ["table", *map(str, settings.ranks)],
            shards,
        ),
    ]


def markdown(table: TextTable) -> str:
    """A table with a title and a note, in Markdown that is also readable as it is."""
    lines = [[c.replace("|", "\\|") for c in line] for line in (table.header, *table.rows)]
    width, *widths = (max(map(len, column)) for column in zip(*lines, strict=True))
    rows = [
        " | ".join([first.ljust(width), *map(str.rjust, rest, widths)]) for first, *rest in lines
    ]
    rule = f"|{'-' * (width + 2)}|" + "".join(f"{'-' * (w + 1)}:|" for w in widths)
    header, *body = (f"| {row} |" for row in rows)
    return "\n".join([table.title, "", header, rule, *body, "", table.note, ""])


def _percent(share: float) -> str:
    return f"{100 * share:.3g}%"


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
