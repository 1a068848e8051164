"""What a cache of a table in host memory will see, from measured counts."""

from __future__ import annotations

from typing import Any

import numpy as np
from torchrec.distributed.types import CacheStatistics

from torchrec_freq.analysis.traffic import CountHistogram


class MeasuredCacheStatistics(CacheStatistics):
    """What TorchRec's planner asks about an LRU cache, answered by the counts.

    For ``CacheParams(stats=...)`` in a table's ``ParameterConstraints``;
    :func:`torchrec_freq.planner.make_planner` makes one for each table with counts. It holds a
    histogram of the counts, some kilobytes.

    Args:
        histogram: of the table's counts.
        batch_lookups: lookups of the table in a global batch, above 0: samples of all ranks times
            mean ids a sample.
    """

    def __init__(self, histogram: CountHistogram, batch_lookups: float) -> None:
        self._histogram, self._batch_lookups = histogram, batch_lookups
        self._expected_lookups = histogram.expected_distinct(batch_lookups)
        # Dense where the curve is steep: a cache of few rows.
        dense = np.geomspace(1 / max(histogram.rows, 2), 1, 65)
        clf = np.sort(np.concatenate((np.linspace(0, 1, 17)[:-1], dense)))
        misses = np.array([self.expected_miss_rate(float(x)) for x in clf])
        self._cacheability = float(((misses[1:] + misses[:-1]) / 2) @ np.diff(clf))

    @property
    def expected_lookups(self) -> float:
        """Distinct rows in a global batch, which is what FBGEMM's cache is asked for."""
        return self._expected_lookups

    def expected_miss_rate(self, clf: float) -> float:
        """Share of a batch's distinct rows, 0 to 1, that a cache does not hold.

        Args:
            clf: the cache's part of the table's rows; below 0 taken for 0, above 1 for 1.
        """
        if clf <= 0 and self._expected_lookups > 0:
            return 1.0
        rows = min(clf, 1.0) * self._histogram.rows
        return self._histogram.miss_rate(rows, self._batch_lookups)

    @property
    def cacheability(self) -> float:
        """Area under the miss rate for ``clf`` from 0 to 1: 0 is easy, 1 hard to cache."""
        return self._cacheability

    def __deepcopy__(self, memo: dict[int, Any]) -> MeasuredCacheStatistics:
        # The planner copies it for each sharding option; it never changes.
        return self
