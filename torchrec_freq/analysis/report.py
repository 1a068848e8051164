"""What stored counts say of a table: how skewed, at which rates, how cacheable, how balanced."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch

from torchrec_freq.analysis.cache import MeasuredCacheStatistics
from torchrec_freq.analysis.rates import QUANTILES, RatesByCount, learning_rates, sum_rates
from torchrec_freq.analysis.traffic import BINS, CountHistogram, TableTraffic
from torchrec_freq.config import FrequencyConfig
from torchrec_freq.counts.stored import StoredTable

TOP_SHARES: Final = (0.0001, 0.001, 0.01, 0.1)
LOAD_FACTORS: Final = (0.01, 0.05, 0.1, 0.2, 0.5)

NOTES: Final = {
    "Rows and lookups": "Zipf: exponent s of count ~ rank^-s, fitted to rows with at least 10 "
    "lookups. Top: share of the lookups that go to the most frequent rows.",
    "Learning rates": "By quantile of the counts of the rows seen: the count, those rows' mean "
    "rate (geometric), and the factor within which two thirds of them are. s: root mean square of "
    "the gradient of an occurrence. Counts alone give no rates but the paper's.",
    "Caches": "Share of a batch's distinct rows that an LRU cache is expected to miss, by its part "
    "of the rows, for ids drawn independently. Area: under the miss rate, 0 is easy, 1 hard to "
    "cache. Load factor: the least that misses as little as asked.",
    "Row-wise shards": "Lookups of the busiest shard as a multiple of the mean, by their number.",
}
"""The parts of a report, and what each one's figures are."""


@dataclass(frozen=True)
class TableReport:
    """What a table's counts and sums say.

    Attributes:
        source: file or folder.
        figures: for each of :data:`NOTES`, figures by name; None where they are not known.
        histogram, rates: for plots.
    """

    source: str
    name: str
    figures: Mapping[str, Mapping[str, float | None]]
    histogram: CountHistogram
    rates: RatesByCount


def describe(
    table: StoredTable,
    source: str,
    config: FrequencyConfig,
    *,
    lr: float,
    batch_lookups: float,
    miss_rate: float,
    ranks: Sequence[int],
    progress: Callable[[int], object],
) -> TableReport | None:
    """Reads a table, block by block, and says what is in it; None for one without counts.

    Args:
        config: the rule's settings.
        lr: learning rate, above 0.
        batch_lookups: lookups of the table in a global batch, above 0.
        miss_rate: of the recommended cache, 0 to 1.
        ranks: numbers of row-wise shards.
        progress: is told the rows of each block.
    """
    traffic = TableTraffic(table.rows, table.name)
    rate_sums = torch.zeros(4, BINS, dtype=torch.float64)
    for first, counts_R, sums_R in table.blocks():
        if counts_R is None:  # of row-wise Adagrad
            return None
        traffic.add(first, counts_R)
        rates_R = learning_rates(config, counts_R, sums_R, table.totals, lr)
        rate_sums += sum_rates(counts_R, rates_R)
        progress(len(counts_R))
    histogram, rates = traffic.histogram, RatesByCount(rate_sums)
    seen, totals = histogram.lookups > 0, table.totals
    skew: dict[str, float | None] = {
        "rows": table.rows,
        "never seen": table.rows - round(histogram.rows_seen),
        "lookups": round(histogram.lookups),
        "Zipf": histogram.zipf(),
    }
    for share in TOP_SHARES:
        skew[f"top {100 * share:g}%"] = histogram.top_share(share * table.rows) if seen else None
    by_count = {"s": None if totals is None else float(totals[1] / totals[2]) ** 0.5}
    for name, share in QUANTILES.items():
        count = histogram.quantile(share) if seen else None
        rate, spread = rates.at(count or 0) or (None, None)
        by_count |= {f"{name} count": count, f"{name} rate": rate, f"{name} spread": spread}
    cache = MeasuredCacheStatistics(histogram, batch_lookups)
    caches = {"distinct rows": cache.expected_lookups}
    caches |= {f"miss at {part}": cache.expected_miss_rate(part) for part in LOAD_FACTORS}
    caches |= {"area": cache.cacheability, "load factor": _least(cache, table.rows, miss_rate)}
    shards = {str(number): _imbalance(traffic, number) if seen else None for number in ranks}
    parts = (skew, by_count, caches if seen else dict.fromkeys(caches), shards)
    figures = dict(zip(NOTES, parts, strict=True))
    return TableReport(source, table.name, figures, histogram, rates)


def _least(cache: MeasuredCacheStatistics, rows: int, miss_rate: float) -> float:
    """The load factor of the smallest cache that misses no more."""

    def suffices(cached_rows: int) -> bool:  # the miss rate falls with the size
        return cache.expected_miss_rate(cached_rows / rows) <= miss_rate

    return (1 + bisect_left(range(1, rows), True, key=suffices)) / max(rows, 1)


def _imbalance(traffic: TableTraffic, shards: int) -> float:
    """Lookups of the busiest of TorchRec's row-wise shards, as a multiple of their mean."""
    block = -(-traffic.rows // shards)
    ends = [min(shard * block, traffic.rows) for shard in range(shards + 1)]
    return shards * max(traffic.share(*ends[i : i + 2]) for i in range(shards))
