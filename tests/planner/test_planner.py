"""The planner's memory against what a sharded model allocates; plans that counts make better."""

from __future__ import annotations

import os
import random
from typing import Any

import pytest
import torch
import torch.distributed as dist
from fbgemm_gpu.split_table_batched_embeddings_ops_common import CacheAlgorithm
from models import LR, TABLES, TableSpec, make_batch, make_collection, sample_loss, to_kjt
from ranks import on_ranks
from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer_in_backward
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from torchrec.distributed.planner import stats as planner_stats
from torchrec.distributed.planner.enumerators import EmbeddingEnumerator
from torchrec.distributed.planner.proposers import EmbeddingOffloadScaleupProposer
from torchrec.distributed.planner.shard_estimators import EmbeddingStorageEstimator
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import PlannerError
from torchrec.distributed.types import CacheParams, DataType, ShardingType
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

import torchrec_freq
from torchrec_freq import FrequencySGD
from torchrec_freq.analysis.cache import MeasuredCacheStatistics
from torchrec_freq.analysis.traffic import TableTraffic
from torchrec_freq.planner import make_planner
from torchrec_freq.sharded.install import frequency_modules


def collection_of(
    tables: list[TableSpec], optimizer: Any, dtype: DataType = DataType.FP32, device: str = "meta"
) -> Any:
    collection: Any = make_collection(tables, device=torch.device(device), dtype=dtype)
    if optimizer is not None:
        apply_optimizer_in_backward(optimizer, collection.parameters(), {"lr": LR})
    return collection


def options(topology: Topology, optimizer: Any, by_sharder: bool = False) -> dict[Any, list[Any]]:
    """Storages of the shards of every option: (table, sharding type, kernel) -> shards."""
    params = torchrec_freq.fused_params(lr=LR) if by_sharder else None
    sharder: Any = EmbeddingBagCollectionSharder(fused_params=params)
    enumerator = EmbeddingEnumerator(
        topology,
        batch_size=64,
        # TorchRec's own limit for column shards is wider than these tables.
        constraints={
            t.name: ParameterConstraints([t.value for t in ShardingType], min_partition=4)
            for t in TABLES
        },
        estimator=EmbeddingStorageEstimator(topology=topology),
    )
    collection = collection_of(TABLES, None if by_sharder else optimizer)
    return {
        (o.name, o.sharding_type, o.compute_kernel): [(s.size, s.storage) for s in o.shards]
        for o in enumerator.enumerate(collection, [sharder])
    }


@pytest.mark.parametrize("by_sharder", [False, True])
@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_8_bytes_a_row_are_all_that_comes_on_top_of_sgd(device: str, by_sharder: bool) -> None:
    topology = Topology(world_size=4, local_world_size=2, compute_device=device)
    sgd = options(topology, torch.optim.SGD)
    ours = options(topology, FrequencySGD, by_sharder)
    kinds = {kind for _, kind, _ in ours}
    assert {"table_wise", "column_wise", "data_parallel"} <= kinds
    if device == "cuda":
        assert {"row_wise", "table_row_wise", "table_column_wise", "grid_shard"} <= kinds
        assert {"fused_uvm", "fused_uvm_caching"} <= {kernel for _, _, kernel in ours}
    # Of a table that only the sharder gives an optimizer, the planner weighs other kernels too.
    for key in ours.keys() & sgd.keys():
        for (size, storage), (_, without) in zip(ours[key], sgd[key], strict=True):
            extra = storage - without
            assert (extra.hbm + extra.ddr, extra.ssd) == (8 * size[0], 0)
            assert (extra.hbm if device == "cpu" else extra.ddr) == 0


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, RowWiseAdagrad, None])
def test_other_optimizers_are_estimated_as_before(optimizer: Any) -> None:
    topology = Topology(world_size=2, compute_device="cuda")
    wrapped: Any = EmbeddingStorageEstimator.estimate
    ours = options(topology, optimizer)
    EmbeddingStorageEstimator.estimate = wrapped.__wrapped__
    try:
        assert options(topology, optimizer) == ours
    finally:
        EmbeddingStorageEstimator.estimate = wrapped


def check_allocation(kind: str, dtype: DataType) -> None:
    """Every rank allocates 8 bytes for each row of each of its shards."""
    ranks, per_host = dist.get_world_size(), int(os.environ["LOCAL_WORLD_SIZE"])
    topology = Topology(world_size=ranks, local_world_size=per_host, compute_device="cpu")
    constraints = {t.name: ParameterConstraints([kind], min_partition=4) for t in TABLES}

    class Sharder(EmbeddingBagCollectionSharder):
        def sharding_types(self, compute_device_type: str) -> list[str]:
            return [kind]  # on CPU the stock sharder leaves some out

    sharder: Any = Sharder()
    collection = collection_of(TABLES, FrequencySGD, dtype, "cpu")
    planner = make_planner(topology, batch_size=8, constraints=constraints)
    plan = planner.collective_plan(collection, [sharder], dist.group.WORLD)
    model = DistributedModelParallel(
        collection, device=torch.device("cpu"), plan=plan, sharders=[sharder]
    )
    ((_, tables),) = frequency_modules(model)
    tbes = {id(shard.tbe): shard.tbe for shard in tables.shards}.values()
    rows = 0
    for table in TABLES:
        spec = plan.plan[""][table.name].sharding_spec
        shards = [(s.placement.rank(), s.shard_sizes[0]) for s in spec.shards] if spec else []
        shards = shards or [(dist.get_rank(), table.rows)]  # data-parallel
        rows += sum(size for rank, size in shards if rank == dist.get_rank())
    assert sum(v.nbytes for tbe in tbes for v in (tbe.counts, tbe.sums)) == 8 * rows


@pytest.mark.parametrize("dtype", [DataType.FP32, DataType.FP16])
@pytest.mark.parametrize("kind", ["table_wise", "column_wise", "data_parallel", "row_wise"])
@on_ranks(2)
def test_estimate_equals_allocation(kind: str, dtype: DataType) -> None:
    check_allocation(kind, dtype)


@pytest.mark.parametrize("kind", ["table_row_wise", "table_column_wise", "grid_shard"])
@on_ranks(4, hosts=2)
def test_estimate_equals_allocation_over_hosts(kind: str) -> None:
    check_allocation(kind, DataType.FP32)


@on_ranks(2)
def test_a_model_that_fits_is_let_in_by_both_planners_and_trains() -> None:
    """The tables fit, a second copy of them does not, which TorchRec would count for Adagrad."""
    tables = [TableSpec(f"t{i}", 20_000, 64, [f"x{i}"]) for i in range(4)]
    needed = 2 * 20_000 * (64 * 4 + 8)  # two tables a rank
    topology = Topology(world_size=2, compute_device="cpu", ddr_cap=int(needed * 1.3))
    collection = collection_of(tables, FrequencySGD, device="cpu")
    sharder: Any = EmbeddingBagCollectionSharder()
    constraints = {
        t.name: ParameterConstraints(sharding_types=["table_wise"], pooling_factors=[1.0])
        for t in tables
    }
    known: Any = {
        "constraints": constraints,
        "storage_reservation": FixedPercentageStorageReservation(0.0),
    }
    stock = EmbeddingShardingPlanner(topology, 8, **known)
    stock.plan(collection, [sharder])
    with pytest.raises(PlannerError):
        stock.plan(collection_of(tables, torch.optim.Adagrad), [sharder])
    # In TorchRec's report, too.
    assert planner_stats._get_optimizer_multipler(FrequencySGD, torch.Size([9, 64])) == 8 / 256
    planner = make_planner(
        topology, 8, counts={t.name: torch.arange(t.rows) for t in tables}, **known
    )
    plan = planner.collective_plan(collection, [sharder], dist.group.WORLD)
    model = DistributedModelParallel(
        collection, device=torch.device("cpu"), plan=plan, sharders=[sharder]
    )
    features = make_batch(random.Random(dist.get_rank()), tables, 4)
    sample_loss(model(to_kjt(features)).to_dict()).mean().backward()
    assert all(counts.any() for counts in torchrec_freq.row_counts(model).values())


# Three tables, whose hot rows lie at the front, in the middle and at the end.
RANKS, ROWS = 4, 4000
ROW_WISE = ["row_wise", "table_row_wise", "grid_shard"]


def skewed_counts() -> dict[str, torch.Tensor]:
    zipf = (1e7 / torch.arange(1, ROWS + 1) ** 1.2).long()
    return {"front": zipf, "middle": zipf.roll(ROWS // 2), "end": zipf.flip(0)}


def plan_options(
    counts: Any, types: list[str], pooling: float, per_host: int = 2
) -> tuple[Any, dict[tuple[str, str], Any]]:
    """A plan, and the options that were weighed by table and sharding type."""
    constraints = {
        name: ParameterConstraints(types, ["fused"], min_partition=32, pooling_factors=[pooling])
        for name in counts or skewed_counts()
    }
    topology = Topology(world_size=RANKS, local_world_size=per_host, compute_device="cuda")
    planner = make_planner(topology, 512, constraints, counts=counts)
    tables = [TableSpec(name, ROWS, 128, [f"f_{name}"]) for name in constraints]
    collection, sharder = collection_of(tables, FrequencySGD), EmbeddingBagCollectionSharder()
    options = planner._enumerator.enumerate(collection, [sharder])
    plan = planner.plan(collection, [sharder])
    return plan, {(o.name, o.sharding_type): o for o in options}


@pytest.mark.parametrize("kind", ROW_WISE)
def test_time_of_a_hot_shard_is_that_of_as_many_ids(kind: str) -> None:
    counts = skewed_counts()
    _, ours = plan_options(counts, [kind], 40)
    for name, counts_R in counts.items():
        for shard in ours[name, kind].shards:
            first, rows = shard.offset[0], shard.size[0]
            share = float(counts_R[first : first + rows].sum()) / float(counts_R.sum())
            pooling = 40 * share * ROWS / rows
            if pooling < 1:
                continue  # TorchRec then takes some bags for empty
            _, stock = plan_options(None, [kind], pooling)
            expected = stock[name, kind].shards[0].perf
            assert shard.perf.fwd_compute == pytest.approx(expected.fwd_compute, rel=1e-3)
            assert shard.perf.bwd_compute == pytest.approx(expected.bwd_compute, rel=1e-3)


def test_planner_avoids_the_rank_that_all_wait_for() -> None:
    counts = dict.fromkeys(skewed_counts(), skewed_counts()["front"])

    def slowest(known: Any) -> float:
        """Elements that the rank which reads most reads, as a multiple of the mean."""
        plan, _ = plan_options(known, ["row_wise", "column_wise"], 40, per_host=4)
        read = [0.0] * RANKS
        for name, sharding in plan.plan[""].items():
            for shard in sharding.sharding_spec.shards:
                first, (rows, columns) = shard.shard_offsets[0], shard.shard_sizes
                looked_up = float(counts[name][first : first + rows].sum())
                read[shard.placement.rank()] += looked_up * columns
        return max(read) * RANKS / sum(read)

    assert slowest(None) > 2
    assert slowest(counts) < 1.2


def statistics_of(counts_R: torch.Tensor, lookups: float) -> MeasuredCacheStatistics:
    return MeasuredCacheStatistics(TableTraffic.of(counts_R).histogram, lookups)


def test_caches_get_the_size_that_serves_their_table() -> None:
    """The same memory, divided by the counts, fetches fewer rows than divided evenly."""
    rows, batch = 100_000, 512
    rank = torch.arange(1, rows + 1).double()
    counts = {
        "busy": (1e7 / rank).long(),
        "even": torch.full((rows,), 100),
        "steep": (1e9 / rank**2).long(),
    }
    pooling = {"busy": 40.0, "even": 1.0, "steep": 1.0}
    planner = make_planner(
        # One rank, in which the caches of the three tables compete.
        Topology(world_size=1, compute_device="cuda", hbm_cap=110 << 20),
        batch,
        {
            name: ParameterConstraints(["table_wise"], ["fused_uvm_caching"], pooling_factors=[ids])
            for name, ids in pooling.items()
        },
        counts=counts,
        storage_reservation=FixedPercentageStorageReservation(0.0),
        proposer=EmbeddingOffloadScaleupProposer(),
    )
    sharder: Any = EmbeddingBagCollectionSharder()
    tables = [TableSpec(name, rows, 128, [name]) for name in counts]
    planner.plan(collection_of(tables, FrequencySGD), [sharder])
    best: Any = planner._best_plan
    factors = {o.name: 1.0 if o.compute_kernel == "fused" else o.cache_load_factor for o in best}
    mean = sum(factors.values()) / 3
    assert mean > 0.25, "the memory was not used"

    def fetched(of_table: dict[str, float]) -> float:
        total = 0.0
        for name, factor in of_table.items():
            statistics = statistics_of(counts[name], batch * pooling[name])
            total += statistics.expected_lookups * statistics.expected_miss_rate(factor)
        return total

    assert fetched(factors) < 0.9 * fetched(dict.fromkeys(counts, mean))


def test_constraints_are_kept() -> None:
    given = ParameterConstraints(pooling_factors=[3.0], cache_params=CacheParams(load_factor=0.4))
    by_frequency = ParameterConstraints(cache_params=CacheParams(algorithm=CacheAlgorithm.LFU))
    constraints, counts = {"front": given, "middle": by_frequency}, skewed_counts()
    topology = Topology(world_size=RANKS, compute_device="cuda")
    known: Any = make_planner(topology, 512, constraints, counts=counts)._constraints
    front = known["front"].cache_params
    expected = statistics_of(counts["front"], RANKS * 512 * 3)
    assert front.stats.expected_miss_rate(0.1) == expected.expected_miss_rate(0.1)
    assert (front.load_factor, known["end"].cache_params.load_factor) == (0.4, 0.2)
    assert known["middle"].cache_params.stats is None  # its misses are not known
    assert given.cache_params is not None and given.cache_params.stats is None
    assert list(constraints) == ["front", "middle"], "the caller's constraints were changed"
    with pytest.raises(ValueError, match="'front'"):
        make_planner(topology, counts={"front": torch.tensor([-1])})
