"""Plans of TorchRec's planner for several optimizers, side by side."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.planner import ParameterConstraints
from torchrec.distributed.planner.constants import UVM_CACHING_RATIO
from torchrec.distributed.planner.proposers import EmbeddingOffloadScaleupProposer, Proposer
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import PlannerError, ShardingOption
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from torchrec_freq.optimizer import FrequencySGD
from torchrec_freq.planner.estimates import Counts, FrequencyStats, make_planner, shard_loads
from torchrec_freq.planner.spec import GB, Spec

OPTIMIZERS: Final[Mapping[str, type[torch.optim.Optimizer]]] = {
    "FrequencySGD": FrequencySGD,
    "SGD": torch.optim.SGD,
    "RowWiseAdagrad": RowWiseAdagrad,
    "Adagrad": torch.optim.Adagrad,
    "Adam": torch.optim.Adam,
}

HBM_KERNELS: Final = [EmbeddingComputeKernel.FUSED.value, EmbeddingComputeKernel.DENSE.value]
_CACHED: Final = EmbeddingComputeKernel.FUSED_UVM_CACHING.value


@dataclass(frozen=True, kw_only=True)
class Result:
    """A plan for one optimizer.

    Attributes:
        fits: "in HBM", "with a cache" or "no".
        tables_gb: weights and optimizer state over all ranks, in HBM or DDR, with the space for a
            batch's ids and outputs.
        hbm_gb, ddr_gb: of the rank that has most.
        step_ms: the planner's estimate of a step of the embedding tables, on the slowest rank.
        load_factors: share of a cached table's rows that are in HBM, by table.
        imbalance: elements that the slowest rank reads, as a multiple of the mean; None without
            counts.
        seconds: planning time.
    """

    optimizer: str
    fits: str
    tables_gb: float | None = None
    hbm_gb: float | None = None
    ddr_gb: float | None = None
    step_ms: float | None = None
    load_factors: Mapping[str, float] = dataclasses.field(default_factory=dict)
    imbalance: float | None = None
    seconds: float = 0


def plan(
    spec: Spec, optimizer: str, counts: Counts | None = None, timeout_seconds: int | None = None
) -> Result:
    """Plans a spec's tables with one of :data:`OPTIMIZERS`.

    Args:
        counts: by table name. With them, row-wise shards have their own loads, and caches grow
            into the memory that is left where they serve most.
        timeout_seconds: at least 1; ends the search of each of at most three plans with the best so
            far.

    Returns:
        The plan in HBM; if there is none, the one with cached tables in host memory.
    """
    search = Search(spec, optimizer, counts, timeout_seconds)
    if search.run(spec.constraints(HBM_KERNELS)):
        return search.result("in HBM")
    if not search.run(spec.constraints([*HBM_KERNELS, _CACHED])):
        return Result(optimizer=optimizer, fits="no", seconds=search.seconds)
    if counts is not None:
        # TorchRec divides the memory for caches over tables of which all else is settled.
        search.run(_settled(search.options), EmbeddingOffloadScaleupProposer())
    return search.result("with a cache")


def _settled(options: Sequence[ShardingOption]) -> dict[str, ParameterConstraints]:
    """Constraints that leave of each table only what a plan chose."""
    return {
        option.name: ParameterConstraints(
            sharding_types=[option.sharding_type],
            compute_kernels=[option.compute_kernel],
            min_partition=option.shards[0].size[1],
            pooling_factors=option.input_lengths,
        )
        for option in options
    }


class Search(FrequencyStats):
    """Searches of the planner for one optimizer, and the last plan that was found."""

    def __init__(
        self, spec: Spec, optimizer: str, counts: Counts | None, timeout_seconds: int | None
    ) -> None:
        super().__init__()
        self._spec, self._optimizer, self._counts = spec, optimizer, counts
        self._timeout_seconds = timeout_seconds
        self.seconds = 0.0

    def run(
        self, constraints: dict[str, ParameterConstraints], proposer: Proposer | None = None
    ) -> bool:
        """Whether there is a plan."""
        planner = make_planner(
            self._spec.cluster.topology(),
            self._spec.batch_size,
            constraints,
            counts=self._counts,
            proposer=proposer,
            storage_reservation=FixedPercentageStorageReservation(self._spec.cluster.reserved),
            stats=self,
            timeout_seconds=self._timeout_seconds,
        )
        sharder: Any = EmbeddingBagCollectionSharder()
        try:
            self.plan = planner.plan(self._spec.model(OPTIMIZERS[self._optimizer]), [sharder])
        except PlannerError:
            return False
        self.options = self._reported
        return True

    def log(self, *args: Any, best_plan: list[ShardingOption], **kwargs: Any) -> None:
        """Keeps what the planner reports, also of a failure, besides logging it."""
        super().log(*args, best_plan=best_plan, **kwargs)
        self._reported = best_plan
        self.seconds += kwargs["run_time"]

    def result(self, fits: str) -> Result:
        """Figures of the last plan."""
        ranks = self._spec.cluster.ranks
        hbm, ddr, step, read = [0] * ranks, [0] * ranks, [0.0] * ranks, [0.0] * ranks
        for shard in (shard for option in self.options for shard in option.shards):
            hbm[shard.rank] += shard.storage.hbm
            ddr[shard.rank] += shard.storage.ddr
            step[shard.rank] += shard.perf.total
        if self._counts is not None:
            ids = {table.name: sum(table.pooling_factors) for table in self._spec.tables}
            for load in shard_loads(self.plan, self._counts):
                read[load.rank] += ids[load.table] * load.share * load.columns
        return Result(
            optimizer=self._optimizer,
            fits=fits,
            tables_gb=(sum(hbm) + sum(ddr)) / GB,
            hbm_gb=max(hbm) / GB,
            ddr_gb=max(ddr) / GB,
            step_ms=max(step),
            load_factors={
                option.name: option.cache_load_factor or UVM_CACHING_RATIO
                for option in self.options
                if option.compute_kernel == _CACHED
            },
            imbalance=max(read) * ranks / sum(read) if sum(read) else None,
            seconds=self.seconds,
        )
