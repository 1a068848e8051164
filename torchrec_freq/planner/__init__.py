"""FrequencySGD in TorchRec's planner, and plans of several optimizers side by side."""

from torchrec_freq.analysis.cache import MeasuredCacheStatistics, cache_statistics
from torchrec_freq.planner.estimates import (
    Counts,
    FrequencyPerfEstimator,
    FrequencyStats,
    ShardLoad,
    make_planner,
    shard_loads,
)

__all__ = [
    "Counts",
    "FrequencyPerfEstimator",
    "FrequencyStats",
    "MeasuredCacheStatistics",
    "ShardLoad",
    "cache_statistics",
    "make_planner",
    "shard_loads",
]
