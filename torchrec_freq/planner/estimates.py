"""FrequencySGD in TorchRec's planner: the memory of its counters, and what they say of the load."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections import Counter
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

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
from torchrec.distributed.planner.stats import EmbeddingStats
from torchrec.distributed.planner.types import ShardingOption
from torchrec.distributed.planner.utils import bytes_to_gb
from torchrec.distributed.types import CacheParams, ShardingPlan, ShardingType

from torchrec_freq.analysis.cache import cache_statistics
from torchrec_freq.analysis.traffic import TableTraffic, traffic_of
from torchrec_freq.sharded.install import COUNTER_BYTES, is_ours
from torchrec_freq.sharded.opt_in import without_optimizer

Counts = Mapping[str, "Tensor | TableTraffic"]
"""Table name -> counts [num_embeddings], or the summary of counts that are too large to hold."""


def make_planner(
    topology: Topology | None = None,
    batch_size: int | None = None,
    constraints: Mapping[str, ParameterConstraints] | None = None,
    *,
    counts: Counts | None = None,
    **kwargs: Any,
) -> EmbeddingShardingPlanner:
    """TorchRec's planner, which knows what FrequencySGD needs: in place of its constructor.

    >>> planner = make_planner(Topology(world_size=8, compute_device="cuda"), batch_size=1024)

    With counts it also knows which rows are hot. Row-wise shards cost what the rows in them are
    looked up (:class:`FrequencyPerfEstimator`), and tables have :func:`cache_statistics`, from
    which ``proposer=EmbeddingOffloadScaleupProposer()`` divides the memory for caches.

    Args:
        topology: the ranks and their memory; None for those of the default process group.
        batch_size: samples of a rank's batch; None for TorchRec's default.
        constraints: by table name. ``pooling_factors`` should be the mean ids a sample.
        counts: by table name; of :func:`torchrec_freq.row_counts` or
            :func:`torchrec_freq.load_counts`. Cache parameters that the constraints do not give
            are TorchRec's defaults.
        kwargs: further arguments of ``EmbeddingShardingPlanner``, except ``enumerator``.

    Raises:
        ValueError: counts that are not whole numbers in range, named by table.
    """
    if topology is None:
        topology = Topology(
            world_size=dist.get_world_size(),
            local_world_size=get_local_size(),
            compute_device="cuda" if torch.cuda.is_available() else "cpu",
        )
    batch_size = batch_size or BATCH_SIZE
    traffic = {name: traffic_of(name, values) for name, values in (counts or {}).items()}
    known = _with_statistics(dict(constraints or {}), traffic, topology, batch_size)
    estimators = [
        FrequencyPerfEstimator(topology, known, traffic=traffic),
        EmbeddingStorageEstimator(topology, known),
    ]
    return EmbeddingShardingPlanner(
        topology=topology,
        batch_size=batch_size,
        enumerator=EmbeddingEnumerator(topology, batch_size, known, estimator=estimators),
        constraints=known,
        **{"stats": FrequencyStats(), **kwargs},
    )


class FrequencyPerfEstimator(EmbeddingPerfEstimator):
    """TorchRec's estimate of time, with each row-wise shard's own share of the lookups.

    TorchRec gives every row-wise shard equally many. Where ids are sorted by frequency, as those of
    most vocabularies, the first shard has most of them, and its rank is the one that all wait for.
    Other sharding types and tables without counts are TorchRec's, and so is the time to fetch
    rows into a cache: which rows a cache misses depends little on where the hot ones lie.

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
    """Of an evaluator of row-wise shards: one shard's part of the table's lookups."""

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


class FrequencyStats(EmbeddingStats):
    """TorchRec's report of a plan, with the bytes of the counters below those of other optimizers.

    Without it the report shows a second copy of each table that trains with FrequencySGD.
    """

    def log(self, *args: Any, best_plan: list[ShardingOption], **kwargs: Any) -> None:
        """Logs the report, as ``EmbeddingStats`` does."""
        data = getattr(kwargs.get("enumerator"), "_sharder_data_map", {})
        ours = [option for option in best_plan if is_ours(option, data)]
        self._counter_bytes: Counter[str] = Counter()
        for option in ours:
            rows = sum(shard.size[0] for shard in option.shards)
            self._counter_bytes[option.compute_kernel] += COUNTER_BYTES * rows
        with without_optimizer({id(o.tensor): o.tensor for o in ours}.values()):
            super().log(*args, best_plan=best_plan, **kwargs)

    def _log_compute_kernel_stats(
        self, compute_kernels_stats: dict[str, Any], description: str
    ) -> None:
        super()._log_compute_kernel_stats(compute_kernels_stats, description)
        if description == "Compute Kernels Optimizer State" and self._counter_bytes:
            super()._log_compute_kernel_stats(
                {k: f"{bytes_to_gb(b):.3f} GB" for k, b in self._counter_bytes.items()},
                "Compute Kernels Row Counters of FrequencySGD",
            )


class ShardLoad(NamedTuple):
    """How much of a table's lookups go to one of its shards.

    Attributes:
        table: its name.
        rank: where the shard is.
        share: part of the table's lookups that read a row of this shard; column shards have all
            of their rows' lookups each.
        columns: number of columns that are read here.
    """

    table: str
    rank: int
    share: float
    columns: int


def shard_loads(plan: ShardingPlan, counts: Counts) -> list[ShardLoad]:
    """Expected lookups of each shard of a plan; those of ranks differ where hot rows are together.

    Args:
        plan: any plan, of :func:`make_planner` or not.
        counts: by table name; tables without counts are left out.

    Returns:
        A load for each shard, in the order of the plan. Data-parallel tables are left out: each
        rank looks up its own samples in them.
    """
    loads = []
    traffic = {name: traffic_of(name, values) for name, values in counts.items()}
    for module in plan.plan.values():
        for name, sharding in module.items():
            if name not in traffic or sharding.sharding_spec is None:
                continue
            for rank, shard in zip(sharding.ranks, sharding.sharding_spec.shards, strict=True):
                first, (rows, columns) = shard.shard_offsets[0], shard.shard_sizes
                share = traffic[name].share(first, first + rows)
                loads.append(ShardLoad(name, rank, share, columns))
    return loads


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
        if cache.stats is None:
            algorithm = cache.algorithm or CacheAlgorithm.LRU
            cache.stats = cache_statistics(table, topology.world_size * lookups, algorithm)
        constraints[name] = dataclasses.replace(own, cache_params=cache)
    return constraints
