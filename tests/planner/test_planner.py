"""The planner's memory against what a sharded model allocates, and plans that it makes possible."""

from __future__ import annotations

import dataclasses
import logging
import os
import random
from typing import Any

import pytest
import torch
import torch.distributed as dist
from fbgemm_gpu.split_embedding_configs import EmbOptimType as OptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import CacheAlgorithm, EmbeddingLocation
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    ComputeDevice,
    SplitTableBatchedEmbeddingBagsCodegen,
)
from models import LR, TABLES, Pair, TableSpec, make_batch, make_collection, sample_loss, to_kjt
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
from torchrec.distributed.sharding_plan import table_wise
from torchrec.distributed.types import CacheParams, DataType, ShardingType
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

import torchrec_freq
from torchrec_freq import FrequencyConfig, FrequencySGD
from torchrec_freq.engine.tbe import FrequencyTBE
from torchrec_freq.planner import (
    cache_statistics,
    make_planner,
    shard_loads,
)
from torchrec_freq.sharded.install import frequency_modules

GIB = 1 << 30


def options(
    topology: Topology, optimizer: Any, by_sharder: bool
) -> dict[tuple[str, str, str], list[Any]]:
    """Storages of the shards of every option: (table, sharding type, kernel) -> shards."""
    collection = make_collection(TABLES, device=torch.device("meta"))
    sharder: Any = EmbeddingBagCollectionSharder()
    if optimizer is not None and by_sharder:
        sharder = EmbeddingBagCollectionSharder(fused_params=torchrec_freq.fused_params(lr=LR))
    elif optimizer is not None:
        apply_optimizer_in_backward(optimizer, collection.parameters(), {"lr": LR})
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
    return {
        (o.name, o.sharding_type, o.compute_kernel): [(s.size, s.storage) for s in o.shards]
        for o in enumerator.enumerate(collection, [sharder])
    }


@pytest.mark.parametrize("by_sharder", [False, True])
@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_counters_are_all_that_comes_on_top_of_sgd(device: str, by_sharder: bool) -> None:
    topology = Topology(world_size=4, local_world_size=2, compute_device=device)
    sgd = options(topology, torch.optim.SGD, by_sharder=False)
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
            assert (extra.hbm + extra.ddr, extra.ssd) == (4 * size[0], 0)
            assert (extra.hbm if device == "cpu" else extra.ddr) == 0


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, RowWiseAdagrad, torch.optim.Adam, None])
def test_other_optimizers_are_estimated_as_before(optimizer: Any) -> None:
    topology = Topology(world_size=2, compute_device="cuda")
    wrapped: Any = EmbeddingStorageEstimator.estimate
    ours = options(topology, optimizer, False)
    EmbeddingStorageEstimator.estimate = wrapped.__wrapped__
    try:
        assert options(topology, optimizer, False) == ours
    finally:
        EmbeddingStorageEstimator.estimate = wrapped


def test_torchrecs_own_planner_does_not_see_a_second_table() -> None:
    """A model that fits stays in the memory of the GPU, as with row-wise Adagrad."""

    def kernels(optimizer: Any) -> set[str]:
        collection: Any = EmbeddingBagCollection(
            tables=[
                EmbeddingBagConfig(
                    name=f"t{i}",
                    num_embeddings=5_000_000,
                    embedding_dim=64,
                    feature_names=[f"f{i}"],
                )
                for i in range(8)
            ],
            device=torch.device("meta"),
        )
        apply_optimizer_in_backward(optimizer, collection.parameters(), {"lr": LR})
        topology = Topology(world_size=1, compute_device="cuda", hbm_cap=16 * GIB)
        planner = EmbeddingShardingPlanner(topology=topology, batch_size=512)
        sharder: Any = EmbeddingBagCollectionSharder()
        plan = planner.plan(collection, [sharder])
        return {sharding.compute_kernel for sharding in plan.plan[""].values()}

    assert kernels(FrequencySGD) == kernels(RowWiseAdagrad) == {"fused"}
    shape = torch.Size([10, 64])
    assert planner_stats._get_optimizer_multipler(FrequencySGD, shape) == 1 / 64


def check_allocation(kind: str, optimizers: dict[str, Any], dtype: DataType) -> None:
    """What ours adds to TorchRec's estimate of SGD is what a sharded model allocates, on each rank.

    Args:
        optimizers: by table; FrequencySGD for those of which none is named.
    """
    ranks, per_host = dist.get_world_size(), int(os.environ["LOCAL_WORLD_SIZE"])
    topology = Topology(world_size=ranks, local_world_size=per_host, compute_device="cpu")
    constraints = {
        t.name: ParameterConstraints(sharding_types=[kind], min_partition=4) for t in TABLES
    }

    class Sharder(EmbeddingBagCollectionSharder):
        def sharding_types(self, compute_device_type: str) -> list[str]:
            return [kind]  # on CPU the stock sharder leaves some out

    sharder: Any = Sharder()

    def collection_with(optimizers: dict[str, Any], device: str | None) -> Any:
        collection: Any = make_collection(
            TABLES, device=torch.device(device) if device else None, dtype=dtype
        )
        for name, bag in collection.embedding_bags.items():
            optimizer = optimizers.get(name, FrequencySGD)
            apply_optimizer_in_backward(optimizer, bag.parameters(), {"lr": LR})
        return collection

    collection = collection_with(optimizers, None)
    planner = make_planner(topology, batch_size=8, constraints=constraints)
    plan = planner.collective_plan(collection, [sharder], dist.group.WORLD)
    model = DistributedModelParallel(
        collection, device=torch.device("cpu"), plan=plan, sharders=[sharder]
    )
    ((_, tables),) = frequency_modules(model)
    tbes = {id(shard.tbe): shard.tbe for shard in tables.shards}.values()
    allocated = sum(tbe.counts.untyped_storage().nbytes() for tbe in tbes)

    def estimated(optimizers: dict[str, Any]) -> int:
        enumerator = EmbeddingEnumerator(
            topology, 8, constraints, estimator=EmbeddingStorageEstimator(topology=topology)
        )
        chosen = {
            o.name: o
            for o in enumerator.enumerate(collection_with(optimizers, "meta"), [sharder])
            if len(o.shards) == len(plan.plan[""][o.name].ranks or [])
        }
        assert len(chosen) == len(TABLES)
        return sum(
            shard.storage.ddr
            for name, option in chosen.items()
            for rank, shard in zip(plan.plan[""][name].ranks, option.shards, strict=True)
            if rank == dist.get_rank()
        )

    sgd = {t.name: optimizers.get(t.name, torch.optim.SGD) for t in TABLES}
    assert estimated(optimizers) - estimated(sgd) == allocated
    whole = torch.tensor(allocated)
    dist.all_reduce(whole)
    assert whole >= 4 * sum(t.rows for t in TABLES if t.name not in optimizers)


@pytest.mark.parametrize("dtype", [DataType.FP32, DataType.FP16])
@pytest.mark.parametrize("kind", ["table_wise", "column_wise", "data_parallel", "row_wise"])
@on_ranks(2)
def test_estimate_equals_allocation(kind: str, dtype: DataType) -> None:
    check_allocation(kind, {}, dtype)


@pytest.mark.parametrize("kind", ["table_row_wise", "table_column_wise", "grid_shard"])
@on_ranks(4, hosts=2)
def test_estimate_equals_allocation_over_hosts(kind: str) -> None:
    check_allocation(kind, {}, DataType.FP32)


@pytest.mark.parametrize("kind", ["table_wise", "column_wise", "row_wise"])
@on_ranks(2)
def test_estimate_beside_other_optimizers(kind: str) -> None:
    check_allocation(kind, {"a": torch.optim.SGD, "c": RowWiseAdagrad}, DataType.FP32)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kernel", ["fused", "fused_uvm", "fused_uvm_caching"])
def test_counters_of_tables_in_host_memory_are_in_hbm(kernel: str) -> None:
    tbe = SplitTableBatchedEmbeddingBagsCodegen(
        [
            (
                1000,
                16,
                EmbeddingLocation.DEVICE
                if kernel == "fused"
                else EmbeddingLocation.MANAGED
                if kernel == "fused_uvm"
                else EmbeddingLocation.MANAGED_CACHING,
                ComputeDevice.CUDA,
            )
        ],
        optimizer=OptimType.EXACT_ROWWISE_ADAGRAD,
    )
    counts = FrequencyTBE.adopt(tbe, FrequencyConfig()).counts
    assert counts.device.type == "cuda" and counts.untyped_storage().nbytes() == 4 * 1000


def test_report_shows_the_bytes_of_the_counters(caplog: pytest.LogCaptureFixture) -> None:
    collection: Any = EmbeddingBagCollection(
        tables=[
            EmbeddingBagConfig(
                name=name, num_embeddings=10 * GIB // 4, embedding_dim=8, feature_names=[name]
            )
            for name in ("ours", "adagrad")
        ],
        device=torch.device("meta"),
    )
    bags = collection.embedding_bags
    apply_optimizer_in_backward(FrequencySGD, bags["ours"].parameters(), {"lr": LR})
    apply_optimizer_in_backward(torch.optim.Adagrad, bags["adagrad"].parameters(), {"lr": LR})
    planner = make_planner(
        Topology(world_size=4, compute_device="cuda", hbm_cap=1000 * GIB),
        constraints={name: ParameterConstraints(["table_wise"], ["fused"]) for name in bags},
    )
    sharder: Any = EmbeddingBagCollectionSharder()
    with caplog.at_level(logging.INFO, "torchrec.distributed.planner.stats"):
        planner.plan(collection, [sharder])
    lines = [line.strip("# ") for line in caplog.messages]
    of = {
        title: lines[lines.index(f"Compute Kernels {title}:") + 1]
        for title in ("Embedding Weights", "Optimizer State", "Row Counters of FrequencySGD")
    }
    assert of["Embedding Weights"] == "fused: 160.0 GB"
    assert of["Optimizer State"] == "fused: 80.0 GB"
    assert of["Row Counters of FrequencySGD"] == "fused: 10.000 GB"


# Three tables, whose hot rows lie at the front, in the middle and at the end.
RANKS, ROWS = 4, 4000


def skewed_counts() -> dict[str, torch.Tensor]:
    zipf = (1e7 / torch.arange(1, ROWS + 1) ** 1.2).long()
    return {"front": zipf, "middle": zipf.roll(ROWS // 2), "end": zipf.flip(0)}


def plan_options(
    counts: Any, constraints: dict[str, ParameterConstraints], per_host: int = 2
) -> tuple[Any, dict[tuple[str, str], Any]]:
    """A planner, and the options that it weighs by table and sharding type."""
    topology = Topology(world_size=RANKS, local_world_size=per_host, compute_device="cuda")
    planner = make_planner(topology, 512, constraints, counts=counts)
    tables = [TableSpec(name, ROWS, 128, [f"f_{name}"]) for name in constraints]
    collection: Any = make_collection(tables, device=torch.device("meta"))
    apply_optimizer_in_backward(FrequencySGD, collection.parameters(), {"lr": LR})
    sharder: Any = EmbeddingBagCollectionSharder()
    options = planner._enumerator.enumerate(collection, [sharder])
    plan = planner.plan(collection, [sharder])
    return plan, {(o.name, o.sharding_type): o for o in options}


ROW_WISE = ["row_wise", "table_row_wise", "grid_shard"]


def constrain(pooling: float, types: list[str]) -> dict[str, ParameterConstraints]:
    return {
        name: ParameterConstraints(types, ["fused"], min_partition=64, pooling_factors=[pooling])
        for name in skewed_counts()
    }


def test_time_of_tables_whose_rows_are_all_alike_is_torchrecs() -> None:
    constraints = constrain(4, [*ROW_WISE, "table_wise", "column_wise"])
    even = {name: torch.full((ROWS,), 7) for name in constraints}
    _, stock = plan_options(None, constraints)
    _, ours = plan_options(even, constraints)
    assert {kind for _, kind in ours} == {*ROW_WISE, "table_wise", "column_wise"}
    for key, option in ours.items():
        for shard, expected in zip(option.shards, stock[key].shards, strict=True):
            for field in dataclasses.fields(shard.perf):
                assert getattr(shard.perf, field.name) == pytest.approx(
                    getattr(expected.perf, field.name), rel=1e-3
                ), (key, field.name)


@pytest.mark.parametrize("kind", ROW_WISE)
def test_time_of_a_hot_shard(kind: str) -> None:
    """It is that which TorchRec gives a table with so many more ids a sample."""
    pooling = 40.0
    counts = skewed_counts()
    _, ours = plan_options(counts, constrain(pooling, [kind]))
    for name, counts_R in counts.items():
        for shard in ours[name, kind].shards:
            first, rows = shard.offset[0], shard.size[0]
            share = float(counts_R[first : first + rows].sum()) / float(counts_R.sum())
            row_shards = ROWS // rows
            _, stock = plan_options(None, constrain(pooling * share * row_shards, [kind]))
            expected = stock[name, kind].shards[0].perf
            if pooling * share * row_shards < 1:
                continue  # TorchRec then takes some bags for empty
            assert shard.perf.fwd_compute == pytest.approx(expected.fwd_compute, rel=1e-3)
            assert shard.perf.bwd_compute == pytest.approx(expected.bwd_compute, rel=1e-3)


def slowest(plan: Any, counts: dict[str, torch.Tensor]) -> float:
    """Elements that the rank which reads most reads, as a multiple of the mean, by brute force."""
    read = [0.0] * RANKS
    for name, sharding in plan.plan[""].items():
        for shard in sharding.sharding_spec.shards:
            first, (rows, columns) = shard.shard_offsets[0], shard.shard_sizes
            looked_up = float(counts[name][first : first + rows].sum())
            read[shard.placement.rank()] += looked_up * columns
    return max(read) * RANKS / sum(read)


def test_planner_avoids_the_rank_that_all_wait_for() -> None:
    counts = dict.fromkeys(("x", "y", "z"), skewed_counts()["front"])
    constraints = {
        name: ParameterConstraints(
            ["row_wise", "column_wise"], ["fused"], min_partition=32, pooling_factors=[40.0]
        )
        for name in counts
    }
    blind, _ = plan_options(None, constraints, per_host=4)
    seeing, _ = plan_options(counts, constraints, per_host=4)
    assert slowest(blind, counts) > 2
    assert slowest(seeing, counts) < 1.2
    for plan in (blind, seeing):
        read = [0.0] * RANKS
        for load in shard_loads(plan, counts):
            read[load.rank] += load.share * load.columns * float(counts[load.table].sum())
        assert max(read) * RANKS / sum(read) == pytest.approx(slowest(plan, counts))


def test_caches_get_the_size_that_serves_their_table() -> None:
    """The same memory, divided by the counts, fetches fewer rows than divided evenly."""
    rows, batch = 100_000, 512
    zipf = 1e7 / torch.arange(1, rows + 1).double()
    counts = {
        "busy": zipf.long(),
        "even": torch.full((rows,), 100),
        "steep": (1e9 * zipf / 1e7 / torch.arange(1, rows + 1)).long(),
    }
    pooling = {"busy": 40.0, "even": 1.0, "steep": 1.0}
    constraints = {
        name: ParameterConstraints(
            ["table_wise"], ["fused_uvm_caching"], pooling_factors=[pooling[name]]
        )
        for name in counts
    }
    tables = [TableSpec(name, rows, 128, [name]) for name in counts]

    def load_factors(known: Any) -> dict[str, float]:
        # One rank, in which the caches of the three tables compete.
        topology = Topology(world_size=1, compute_device="cuda", hbm_cap=110 << 20)
        planner = make_planner(
            topology,
            batch,
            constraints,
            counts=known,
            storage_reservation=FixedPercentageStorageReservation(0.0),
            proposer=EmbeddingOffloadScaleupProposer(),
        )
        collection: Any = make_collection(tables, device=torch.device("meta"))
        apply_optimizer_in_backward(FrequencySGD, collection.parameters(), {"lr": LR})
        sharder: Any = EmbeddingBagCollectionSharder()
        planner.plan(collection, [sharder])
        best: Any = planner._best_plan
        return {o.name: 1.0 if o.compute_kernel == "fused" else o.cache_load_factor for o in best}

    factors = load_factors(counts)
    mean = sum(factors.values()) / 3
    assert mean > 0.25, "the memory was not used"
    assert len({round(factor, 3) for factor in factors.values()}) == 3

    def fetched(of_table: dict[str, float]) -> float:
        total = 0.0
        for name, factor in of_table.items():
            statistics = cache_statistics(counts[name], batch * pooling[name])
            total += statistics.expected_lookups * statistics.expected_miss_rate(factor)
        return total

    assert fetched(factors) < 0.9 * fetched(dict.fromkeys(counts, mean))


def test_constraints_are_kept() -> None:
    given = ParameterConstraints(
        pooling_factors=[3.0],
        cache_params=CacheParams(load_factor=0.4, algorithm=CacheAlgorithm.LFU),
    )
    constraints = {"front": given}
    counts = skewed_counts()
    topology = Topology(world_size=RANKS, compute_device="cuda")
    planner = make_planner(topology, 512, constraints, counts=counts)
    known: Any = planner._constraints
    front = known["front"].cache_params
    assert (front.load_factor, front.algorithm) == (0.4, CacheAlgorithm.LFU)
    expected = cache_statistics(counts["front"], RANKS * 512 * 3, CacheAlgorithm.LFU)
    assert front.stats.expected_miss_rate(0.1) == expected.expected_miss_rate(0.1)
    assert known["end"].cache_params.load_factor == 0.2
    assert given.cache_params is not None and given.cache_params.stats is None
    assert list(constraints) == ["front"], "the caller's constraints were changed"
    with pytest.raises(ValueError, match="'front'"):
        make_planner(topology, counts={"front": torch.tensor([-1])})


@on_ranks(2)
def test_plan_with_counts_trains() -> None:
    pair = Pair(TABLES, {t.name: table_wise(rank=0) for t in TABLES})
    pair.step()
    counts = torchrec_freq.row_counts(pair.model)
    collection: Any = make_collection(TABLES)
    apply_optimizer_in_backward(FrequencySGD, collection.parameters(), {"lr": LR})
    sharder: Any = EmbeddingBagCollectionSharder()
    topology = Topology(world_size=2, compute_device="cpu")
    planner = make_planner(topology, 8, counts=counts)
    plan = planner.collective_plan(collection, [sharder], dist.group.WORLD)
    model = DistributedModelParallel(
        collection, device=torch.device("cpu"), plan=plan, sharders=[sharder]
    )
    features = make_batch(random.Random(dist.get_rank()), TABLES, 4)
    sample_loss(model(to_kjt(features)).to_dict()).mean().backward()
    assert all(counts.any() for counts in torchrec_freq.row_counts(model).values())


@on_ranks(2)
def test_model_that_fits_is_let_in_by_both_planners() -> None:
    """The tables fit, a second copy of them does not, which TorchRec would count for Adagrad."""
    tables = [TableSpec(f"t{i}", 20_000, 64, [f"x{i}"]) for i in range(4)]
    needed = 2 * 20_000 * (64 * 4 + 4)  # two tables a rank
    topology = Topology(world_size=2, compute_device="cpu", ddr_cap=int(needed * 1.3))
    collection: Any = make_collection(tables)
    apply_optimizer_in_backward(FrequencySGD, collection.parameters(), {"lr": LR})
    sharder: Any = EmbeddingBagCollectionSharder()
    constraints = {
        t.name: ParameterConstraints(sharding_types=["table_wise"], pooling_factors=[1.0])
        for t in tables
    }
    reservation = FixedPercentageStorageReservation(0.0)
    stock = EmbeddingShardingPlanner(
        topology=topology,
        batch_size=8,
        constraints=constraints,
        storage_reservation=reservation,
    )
    stock.plan(collection, [sharder])
    other: Any = make_collection(tables)
    apply_optimizer_in_backward(torch.optim.Adagrad, other.parameters(), {"lr": LR})
    with pytest.raises(PlannerError):
        stock.plan(other, [sharder])
    planner = make_planner(topology, 8, constraints, storage_reservation=reservation)
    plan = planner.collective_plan(collection, [sharder], dist.group.WORLD)
    model = DistributedModelParallel(
        collection, device=torch.device("cpu"), plan=plan, sharders=[sharder]
    )
    features = make_batch(random.Random(dist.get_rank()), tables, 4)
    sample_loss(model(to_kjt(features)).to_dict()).mean().backward()
    assert all(counts.any() for counts in torchrec_freq.row_counts(model).values())
