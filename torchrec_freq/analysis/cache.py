"""What a cache of a table in host memory will see, from measured counts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
from fbgemm_gpu.split_table_batched_embeddings_ops_common import CacheAlgorithm
from torch import Tensor
from torchrec.distributed.types import CacheStatistics

from torchrec_freq.analysis.traffic import CountHistogram, Policy, TableTraffic, traffic_of

_POLICIES: Final[Mapping[CacheAlgorithm, Policy]] = {
    CacheAlgorithm.LRU: "lru",
    CacheAlgorithm.LFU: "lfu",
}


def cache_statistics(
    counts: Tensor | TableTraffic,
    batch_lookups: float,
    algorithm: CacheAlgorithm = CacheAlgorithm.LRU,
) -> CacheStatistics:
    """What a cache of a table in host memory will see, from measured counts.

    For ``ParameterConstraints(cache_params=CacheParams(stats=...))``; :func:`make_planner` with
    counts does it for every table. It holds a histogram of the counts, some kilobytes.

    - ``expected_lookups``: distinct rows in a global batch, which is what FBGEMM's cache is asked
      for (:meth:`torchrec_freq.analysis.traffic.CountHistogram.expected_distinct`).
    - ``expected_miss_rate(clf)``: share of them that a cache of ``clf`` times the table's rows does
      not hold (:meth:`torchrec_freq.analysis.traffic.CountHistogram.miss_rate`).
    - ``cacheability``: area under the miss rate from ``clf`` 0 to 1; 0 is easy, 1 hard to cache.

    Args:
        counts: [num_embeddings] whole numbers, or the sum of such summaries of parts.
        batch_lookups: lookups of the table in a global batch: samples of all ranks times mean ids
            a sample; above 0.
        algorithm: the cache's, as in ``CacheParams``.

    Raises:
        ValueError: counts that are not whole numbers in range, or no lookups.
    """
    traffic = traffic_of("counts", counts)
    if not batch_lookups > 0:
        raise ValueError(
            f"Invalid batch_lookups value: {batch_lookups}. Must be above 0: samples of all ranks "
            "times mean ids a sample."
        )
    return MeasuredCacheStatistics(traffic.histogram, batch_lookups, _POLICIES[algorithm])


class MeasuredCacheStatistics(CacheStatistics):
    """Result of :func:`cache_statistics`.

    Args:
        histogram: of the table's counts.
        batch_lookups: lookups of the table in a global batch, above 0.
        policy: ``"lru"`` or ``"lfu"``.
    """

    def __init__(self, histogram: CountHistogram, batch_lookups: float, policy: Policy) -> None:
        self._histogram = histogram
        self._batch_lookups = batch_lookups
        self._policy: Policy = policy
        self._expected_lookups = histogram.expected_distinct(batch_lookups)
        # Dense where the curve is steep: a cache of few rows.
        dense = np.geomspace(1 / max(histogram.rows, 2), 1, 65)
        clf = np.sort(np.concatenate((np.linspace(0, 1, 17)[:-1], dense)))
        misses = np.array([self.expected_miss_rate(float(x)) for x in clf])
        self._cacheability = float(((misses[1:] + misses[:-1]) / 2) @ np.diff(clf))

    @property
    def expected_lookups(self) -> float:
        """Distinct rows in a global batch."""
        return self._expected_lookups

    def expected_miss_rate(self, clf: float) -> float:
        """Share of the distinct rows of a batch, 0 to 1, that a cache misses.

        Args:
            clf: the cache's part of the table's rows; below 0 taken for 0, above 1 for 1.
        """
        if clf <= 0 and self._expected_lookups > 0:
            return 1.0
        rows = min(clf, 1.0) * self._histogram.rows
        return self._histogram.miss_rate(rows, self._batch_lookups, self._policy)

    @property
    def cacheability(self) -> float:
        """Area under the miss rate over the cache load factor."""
        return self._cacheability

    def __deepcopy__(self, memo: dict[int, Any]) -> MeasuredCacheStatistics:
        # The planner copies it for each sharding option; it never changes.
        return self

    def __repr__(self) -> str:
        return (
            f"MeasuredCacheStatistics(expected_lookups={self._expected_lookups:.6g}, "
            f"cacheability={self._cacheability:.4g}, {self._policy})"
        )
