"""What stored counts say of a table: how skewed, at which rates, how cacheable, how balanced."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from torchrec_freq.analysis.cache import MeasuredCacheStatistics
from torchrec_freq.analysis.rates import QUANTILES, learning_rates
from torchrec_freq.analysis.traffic import Policy, TableTraffic, ZipfFit
from torchrec_freq.config import FrequencyConfig
from torchrec_freq.counts.stored import StoredTable

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
        miss_rates: by load factor (:meth:`torchrec_freq.analysis.cache.cache_statistics`).
        cacheability: area under the miss rate; 0 is easy, 1 hard to cache.
        load_factor: recommended: the least that misses at most ``Settings.miss_rate``.
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
        zipf: None where no line fits (:meth:`torchrec_freq.analysis.traffic.CountHistogram.zipf`).
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
        imbalance={str(n): _imbalance(traffic, n) for n in settings.ranks if lookups},
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


def _imbalance(traffic: TableTraffic, shards: int) -> float:
    """Lookups of the busiest of TorchRec's row-wise shards, as a multiple of their mean."""
    block = -(-traffic.rows // shards)
    ends = [min(shard * block, traffic.rows) for shard in range(shards + 1)]
    return shards * max(traffic.share(*ends[i : i + 2]) for i in range(shards))


def _cache(statistics: MeasuredCacheStatistics, rows: int, settings: Settings) -> Cache:
    def suffices(cached_rows: int) -> bool:  # the miss rate falls with the size
        return statistics.expected_miss_rate(cached_rows / rows) <= settings.miss_rate

    return Cache(
        miss_rates={f"{x:g}": statistics.expected_miss_rate(x) for x in LOAD_FACTORS},
        cacheability=statistics.cacheability,
        load_factor=(1 + bisect_left(range(1, rows), True, key=suffices)) / rows,
    )
