"""What stored counts say of the tables: how skewed, at which rates, how cacheable, how balanced.

FILE is a file of counts, or the folder of a checkpoint of torch.distributed.checkpoint that has the
fused optimizer's state. Memory holds a block of the counts at a time.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
from tqdm import tqdm

from torchrec_freq.commands.arguments import whole_numbers
from torchrec_freq.config import DEFAULT_OWN_WEIGHT, FrequencyConfig
from torchrec_freq.monitor import QUANTILES, learning_rates
from torchrec_freq.planner import MeasuredCacheStatistics
from torchrec_freq.stored import StoredTable, open_stored
from torchrec_freq.traffic import Policy, TableTraffic, ZipfFit

HELP: Final = "show what counts say: skew, learning rates, caches, balance of shards"

TOP_SHARES: Final = (0.0001, 0.001, 0.01, 0.1)
"""Parts of a table's rows, the most frequent ones, whose share of the lookups is shown."""

LOAD_FACTORS: Final = (0.01, 0.05, 0.1, 0.2, 0.5)
"""Cache load factors whose miss rates are shown."""

POLICIES: Final[Sequence[Policy]] = ("lru", "lfu")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the counts do not say.

    Attributes:
        batch_lookups: lookups of a table in a global batch.
        miss_rate: that the recommended cache may have.
        ranks: numbers of row-wise shards.
        lr: learning rate; None for rates as multiples of it.
        config: the rule's settings.
    """

    batch_lookups: float = 1 << 16
    miss_rate: float = 0.1
    ranks: Sequence[int] = (2, 4, 8, 16, 32, 64)
    lr: float | None = None
    config: FrequencyConfig = FrequencyConfig()


@dataclass(frozen=True, kw_only=True)
class Cache:
    """What a cache of a table in host memory does, by its policy.

    Attributes:
        miss_rates: by load factor, share of a batch's distinct rows that the cache does not hold
            (:meth:`torchrec_freq.traffic.CountHistogram.miss_rate`).
        cacheability: area under the miss rate; 0 is easy, 1 hard to cache.
        load_factor: recommended: the least share of the rows that a cache must hold to miss at most
            ``Settings.miss_rate``.
    """

    miss_rates: Mapping[str, float]
    cacheability: float
    load_factor: float


@dataclass(frozen=True, kw_only=True)
class TableReport:
    """What the counts of a table say.

    Attributes:
        source: file or folder.
        rows, never_seen: of the table, and those of them that have not been looked up.
        lookups: sum of the counts.
        zipf: None where no line fits (:meth:`torchrec_freq.traffic.CountHistogram.zipf`).
        top_shares: by part of the rows, share of the lookups of that most frequent part.
        counts: quantiles of the counts of the rows that have been seen; empty if none was.
        scale: root mean square of the gradient of an occurrence, s; None where unknown.
        rates: learning rate of a row with each of ``counts``, in ``rate_unit``.
        rate_unit: what the rates are multiples of, of ``lr`` and ``1 / s``.
        batch_lookups, distinct_rows: of a global batch; the distinct rows are expected.
        caches: by policy; empty without lookups.
        imbalance: by number of row-wise shards, lookups of the busiest over the mean; empty without
            lookups.
    """

    name: str
    source: str
    rows: int
    never_seen: int
    lookups: int
    zipf: ZipfFit | None
    top_shares: Mapping[str, float]
    counts: Mapping[str, float]
    scale: float | None
    rates: Mapping[str, float]
    rate_unit: str
    batch_lookups: float
    distinct_rows: float
    caches: Mapping[str, Cache]
    imbalance: Mapping[str, float]


class TextTable(NamedTuple):
    """A part of the report, for the terminal and the page."""

    title: str
    note: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


def describe(
    table: StoredTable, traffic: TableTraffic, source: str, settings: Settings
) -> TableReport:
    """What the counts of a table say, once they have been read."""
    histogram = traffic.histogram
    lookups = histogram.lookups
    batch = settings.batch_lookups
    counts = {name: histogram.quantile(share) for name, share in QUANTILES.items() if lookups}
    rates, unit = rates_of(table, list(counts.values()), settings)
    return TableReport(
        name=table.name,
        source=source,
        rows=table.rows,
        never_seen=table.rows - round(histogram.rows_seen),
        lookups=round(lookups),
        zipf=histogram.zipf(),
        top_shares={f"{x:g}": histogram.top_share(x * table.rows) for x in TOP_SHARES},
        counts=counts,
        scale=None if table.totals is None else float(table.totals[1] / table.totals[3]) ** 0.5,
        rates=dict(zip(counts, rates, strict=True)),
        rate_unit=unit,
        batch_lookups=batch,
        distinct_rows=histogram.expected_distinct(batch),
        caches={
            policy: _cache(MeasuredCacheStatistics(histogram, batch, policy), table.rows, settings)
            for policy in POLICIES
            if lookups
        },
        imbalance={str(n): imbalance(traffic, n) for n in settings.ranks if lookups},
    )


def rates_of(
    table: StoredTable, counts: Sequence[float], settings: Settings
) -> tuple[list[float], str]:
    """Learning rates of rows with these counts, and what they are multiples of.

    Where the totals of a normalized table are not known, they are multiples of ``1 / s``.
    """
    config, unit = settings.config, "lr" if settings.lr is None else ""
    totals = None if table.totals is None else table.totals.tolist()
    if config.normalize is not None and totals is None:
        unit = f"{unit or '1'} / s"
    return learning_rates(config, counts, totals, settings.lr or 1.0), unit


def imbalance(traffic: TableTraffic, shards: int) -> float:
    """Lookups of the busiest of TorchRec's row-wise shards, as a multiple of their mean."""
    block = -(-traffic.rows // shards)
    ends = [min(shard * block, traffic.rows) for shard in range(shards + 1)]
    return shards * max(traffic.share(*ends[i : i + 2]) for i in range(shards))


def _cache(statistics: MeasuredCacheStatistics, rows: int, settings: Settings) -> Cache:
    low, high = 0, rows  # the miss rate falls with the size
    while low + 1 < high:
        middle = (low + high) // 2
        if statistics.expected_miss_rate(middle / rows) <= settings.miss_rate:
            high = middle
        else:
            low = middle
    return Cache(
        miss_rates={f"{x:g}": statistics.expected_miss_rate(x) for x in LOAD_FACTORS},
        cacheability=statistics.cacheability,
        load_factor=high / rows,
    )


def text_tables(reports: Sequence[TableReport], settings: Settings) -> list[TextTable]:
    """The reports as tables, a line a table of the model."""
    several = len({report.source for report in reports}) > 1
    names = [f"{r.source}: {r.name}" if several else r.name for r in reports]

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
            "s: root mean square of the gradient of an occurrence, which a file of counts does not "
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
    lines = [table.header, *table.rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(table.header))]

    def row(cells: Sequence[str]) -> str:
        first, *rest = zip(cells, widths, strict=True)
        aligned = [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in rest)]
        return f"| {' | '.join(aligned)} |"

    rule = f"|{'-' * (widths[0] + 2)}|" + "".join(f"{'-' * (w + 1)}:|" for w in widths[1:])
    body = "\n".join([row(table.header), rule, *map(row, table.rows)])
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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares what :func:`run` takes."""
    parser.add_argument("file", nargs="+", type=Path, metavar="FILE", help="counts or checkpoint")
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="FOLDER",
        help="also write report.html (one file, plots inside) and a PNG a table here; needs the "
        "extra torchrec-freq[report]",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures here")
    parser.add_argument(
        "--batch-lookups",
        type=_positive,
        default=Settings.batch_lookups,
        metavar="N",
        help="lookups of a table in a global batch, for caches (default: %(default)s)",
    )
    parser.add_argument(
        "--miss-rate",
        type=_share,
        default=Settings.miss_rate,
        metavar="SHARE",
        help="of a batch's distinct rows that the recommended cache misses (default: %(default)s)",
    )
    parser.add_argument(
        "--ranks",
        type=whole_numbers,
        default=Settings.ranks,
        metavar="N[,N...]",
        help="numbers of row-wise shards (default: 2,4,8,16,32,64)",
    )
    parser.add_argument(
        "--lr", type=_positive, metavar="LR", help="learning rate (default: multiples of it)"
    )
    parser.add_argument(
        "--min-count",
        type=float,
        default=1,
        help="option of FrequencySGD, which is not stored (default: %(default)s)",
    )
    parser.add_argument(
        "--own-weight",
        type=float,
        default=DEFAULT_OWN_WEIGHT,
        help="option of FrequencySGD, which is not stored (default: %(default)s)",
    )
    parser.add_argument(
        "--no-normalize",
        action="store_true",
        help="the tables train with normalize=None, the paper's rule",
    )


def run(arguments: argparse.Namespace) -> None:
    """Reads the counts that the command line names, prints tables, and writes the page.

    Raises:
        ValueError: a file without counts, wrong arguments, or a missing extra.
        OSError: a file cannot be read or written.
    """
    output: Path | None = arguments.output
    if output is not None and output.exists() and not output.is_dir():
        raise ValueError(f"-o {output} is a file; give a folder.")
    page: Any = None if output is None else _page()  # before an hour of reading
    settings = Settings(
        batch_lookups=arguments.batch_lookups,
        miss_rate=arguments.miss_rate,
        ranks=arguments.ranks,
        lr=arguments.lr,
        config=FrequencyConfig(
            min_count=arguments.min_count,
            own_weight=arguments.own_weight,
            normalize=None if arguments.no_normalize else "table",
        ),
    )
    stored = [(str(path), table) for path in arguments.file for table in open_stored(path)]
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
    reports: list[TableReport] = []
    plots: list[bytes] = []
    rows = sum(table.rows for _, table in stored)
    # Without a terminal no bar is drawn.
    with tqdm(total=rows, unit=" rows", unit_scale=True, disable=None) as bar:
        for source, table in stored:
            bar.set_description(table.name)
            traffic = TableTraffic.of(torch.empty(0, dtype=torch.int32), 0, table.rows)
            for first, counts_R in table.blocks():
                traffic += TableTraffic.of(counts_R, first, table.rows, table=table.name)
                bar.update(len(counts_R))
            reports.append(describe(table, traffic, source, settings))
            if page is not None:
                plots.append(page.plot(reports[-1], table, traffic.histogram, settings))
    parts = text_tables(reports, settings)
    print("\n".join(map(markdown, parts)))
    if output is not None:
        page.write(output, reports, plots, parts)
        print(f"{output}: report.html and {len(plots)} plots")
    if arguments.json is not None:
        values = json.dumps([dataclasses.asdict(report) for report in reports], indent=1)
        arguments.json.write_text(values + "\n")


def _page() -> Any:
    try:
        from torchrec_freq.commands import report_page
    except ImportError as error:
        raise ValueError(
            f"-o needs {error.name}: pip install 'torchrec-freq[report]', or do without -o."
        ) from error
    return report_page


def _positive(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return number


def _share(text: str) -> float:
    if (number := _positive(text)) >= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a share between 0 and 1")
    return number
