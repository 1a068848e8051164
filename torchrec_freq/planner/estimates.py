"""TorchRec's planner with counts: what row-wise shards and caches of hot rows cost.

The bytes of FrequencySGD are in every plan of TorchRec's own planner too, once the package is
imported (:mod:`torchrec_freq.sharded.install`).
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Final

import torch
import torch.distributed as dist
from fbgemm_gpu.split_table_batched_embeddings_ops_common import CacheAlgorithm
from torch import Tensor
from torchrec.distributed.comm import get_local_size
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from torchrec.distributed.planner.constants import BATCH_SIZE, NUM_POOLINGS, UVM_CACHING_RATIO
from torchrec.distributed.planner.enumerators import EmbeddingEnumerator
from torchrec.distributed.planner.estimator.estimator import (
    GridShardEvaluator,
    RowWiseEvaluator,
    TableRowWiseEvaluator,
)
from torchrec.distributed.planner.estimator.types import ShardPerfContext
from torchrec.distributed.planner.shard_estimators import (
    EmbeddingPerfEstimator,
    EmbeddingStorageEstimator,
)
from torchrec.distributed.planner.types import ShardingOption
from torchrec.distributed.types import CacheParams, ShardingType

from torchrec_freq.analysis.cache import MeasuredCacheStatistics
from torchrec_freq.analysis.traffic import TableTraffic


def make_planner(
    topology: Topology | None = None,
    batch_size: int | None = None,
    constraints: Mapping[str, ParameterConstraints] | None = None,
    *,
    counts: Mapping[str, Tensor] | None = None,
    **kwargs: Any,
) -> EmbeddingShardingPlanner:
    """TorchRec's planner, which knows from counts which rows are hot: use it as its constructor.

    >>> planner = make_planner(Topology(world_size=8, compute_device="cuda"), batch_size=1024)

    The time of a row-wise shard is that of its own rows' lookups. Each table has statistics of an
    LRU cache, from which ``proposer=EmbeddingOffloadScaleupProposer()`` divides the memory.

    Args:
        topology: the ranks and their memory; None for those of the default process group.
        batch_size: samples in a rank's batch; None for TorchRec's default.
        constraints: by table name. ``pooling_factors`` should be the mean ids in a sample.
        counts: table name -> [num_embeddings] counts, as from :func:`torchrec_freq.row_counts` or
            :func:`torchrec_freq.load_counts`. Cache parameters that the constraints do not give
            are TorchRec's defaults.
        kwargs: further arguments of ``EmbeddingShardingPlanner``, except ``enumerator``.

    Raises:
        ValueError: counts that are not whole numbers in range; the message names the table.
    """
    if topology is None:
        topology = Topology(
            world_size=dist.get_world_size(),
            local_world_size=get_local_size(),
            compute_device="cuda" if torch.cuda.is_available() else "cpu",
        )
    batch_size = batch_size or BATCH_SIZE
    traffic = {name: TableTraffic.of(values, name) for name, values in (counts or {}).items()}
    known = _with_statistics(dict(constraints or {}), traffic, topology, batch_size)
    estimators = [
        _PerfEstimator(topology, known, traffic=traffic),
        EmbeddingStorageEstimator(topology, known),
    ]
    return EmbeddingShardingPlanner(
        topology=topology,
        batch_size=batch_size,
        enumerator=EmbeddingEnumerator(topology, batch_size, known, estimator=estimators),
        constraints=known,
        **kwargs,
    )


class _PerfEstimator(EmbeddingPerfEstimator):
    """TorchRec's estimate of time, with each row-wise shard's own share of the lookups.

    TorchRec gives every row-wise shard equally many. Where ids are sorted by frequency, as those of
    most vocabularies, the first shard has most of them, and its rank is the one that all wait for.
    Other sharding types and tables without counts have TorchRec's estimate, and so has the time to
    fetch rows into a cache: which rows it misses depends little on where the hot ones lie.

    Args:
        topology, constraints, is_inference: as of ``EmbeddingPerfEstimator``.
        traffic: by table name.
    """

    def __init__(
        self,
        topology: Topology,
        constraints: dict[str, ParameterConstraints] | None = None,
        is_inference: bool = False,
        *,
        traffic: Mapping[str, TableTraffic],
    ) -> None:
        super().__init__(topology, constraints, is_inference)
        self._traffic = traffic

    def estimate(
        self, sharding_options: list[ShardingOption], sharder_data_map: dict[str, Any]
    ) -> None:
        """Sets ``perf`` of each option's shards, in milliseconds."""
        super().estimate(sharding_options, sharder_data_map)
        for option in sharding_options:
            traffic = self._traffic.get(option.name)
            evaluator = _BY_SHARE.get(option.sharding_type)
            if traffic is None or evaluator is None:
                continue
            config = self._estimator.config
            contexts = ShardPerfContext.build_shard_perf_contexts(
                config=config,
                shard_sizes=[shard.size for shard in option.shards],
                sharding_option=option,
                topology=self._topology,
                constraints=self._constraints,
                sharder_data=sharder_data_map[option.module_type_key],
                is_inference=self._is_inference,
            )
            for shard, context in zip(option.shards, contexts, strict=True):
                first = shard.offset[0]
                share = traffic.share(first, first + shard.size[0])
                shard.perf = evaluator(share).compute_perf(context, config)


class _ByShare:
    """Gives an evaluator of row-wise shards one shard's part of the table's lookups."""

    def __init__(self, share: float) -> None:
        self._share = share

    def get_batch_inputs_divisor(self, ctx: ShardPerfContext) -> float:
        return 1 / self._share if self._share else float("inf")


_BY_SHARE: Final[Mapping[str, type[Any]]] = {
    kind.value: type(evaluator.__name__, (_ByShare, evaluator), {})
    for kind, evaluator in (
        (ShardingType.ROW_WISE, RowWiseEvaluator),
        (ShardingType.TABLE_ROW_WISE, TableRowWiseEvaluator),
        (ShardingType.GRID_SHARD, GridShardEvaluator),
    )
}


def _with_statistics(
    constraints: dict[str, ParameterConstraints],
    traffic: Mapping[str, TableTraffic],
    topology: Topology,
    batch_size: int,
) -> dict[str, ParameterConstraints]:
    """``constraints`` with cache statistics for the tables that have counts."""
    for name, table in traffic.items():
        own = constraints.get(name) or ParameterConstraints()
        inputs = len(own.pooling_factors)
        poolings = own.num_poolings or [NUM_POOLINGS] * inputs
        samples = own.batch_sizes or [batch_size] * inputs
        lookups = sum(map(math.prod, zip(own.pooling_factors, poolings, samples, strict=True)))
        cache = copy.copy(own.cache_params) or CacheParams(load_factor=UVM_CACHING_RATIO)
        if cache.stats is None and cache.algorithm != CacheAlgorithm.LFU:
            lookups *= topology.world_size
            cache.stats = MeasuredCacheStatistics(table.histogram, lookups)
        constraints[name] = dataclasses.replace(own, cache_params=cache)
    return constraints
