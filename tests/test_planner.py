"""The planner's memory against what a sharded model allocates, and plans that it makes possible."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
import torch.distributed as dist
from models import LR, TABLES, TableSpec, make_batch, make_collection, sample_loss, to_kjt
from ranks import on_ranks
from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer_in_backward
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from torchrec.distributed.planner.enumerators import EmbeddingEnumerator
from torchrec.distributed.planner.shard_estimators import EmbeddingStorageEstimator
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import PlannerError
from torchrec.distributed.types import ShardingType
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

import torchrec_freq
from torchrec_freq import FrequencySGD
from torchrec_freq.planner import FrequencyStorageEstimator, make_planner
from torchrec_freq.register import frequency_modules

GIB = 1 << 30


def options(
    estimator: type[EmbeddingStorageEstimator], topology: Topology, optimizer: Any, by_sharder: bool
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
        estimator=estimator(topology=topology),
    )
    return {
        (o.name, o.sharding_type, o.compute_kernel): [(s.size, s.storage) for s in o.shards]
        for o in enumerator.enumerate(collection, [sharder])
    }


@pytest.mark.parametrize("by_sharder", [False, True])
@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_counters_are_all_that_comes_on_top_of_sgd(device: str, by_sharder: bool) -> None:
    topology = Topology(world_size=4, local_world_size=2, compute_device=device)
    sgd = options(EmbeddingStorageEstimator, topology, torch.optim.SGD, by_sharder=False)
    ours = options(FrequencyStorageEstimator, topology, FrequencySGD, by_sharder)
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
    arguments = (topology, optimizer, False)
    assert options(FrequencyStorageEstimator, *arguments) == options(
        EmbeddingStorageEstimator, *arguments
    )


@pytest.mark.parametrize("kind", ["table_wise", "column_wise", "data_parallel", "row_wise"])
@on_ranks(2)
def test_estimate_equals_allocation(kind: str) -> None:
    collection: Any = make_collection(TABLES)
    apply_optimizer_in_backward(FrequencySGD, collection.parameters(), {"lr": LR})

    class Sharder(EmbeddingBagCollectionSharder):
        def sharding_types(self, compute_device_type: str) -> list[str]:
            return [kind]  # on CPU the stock sharder leaves some out

    topology = Topology(world_size=2, compute_device="cpu")
    constraints = {t.name: ParameterConstraints(min_partition=4) for t in TABLES}
    sharder: Any = Sharder()
    planner = make_planner(topology, batch_size=8, constraints=constraints)
    plan = planner.collective_plan(collection, [sharder], dist.group.WORLD)
    model = DistributedModelParallel(
        collection, device=torch.device("cpu"), plan=plan, sharders=[sharder]
    )
    ((_, tables),) = frequency_modules(model)
    groups = {id(shard.group): shard.group for shard in tables.shards}.values()
    allocated = sum(g.counters.counts.untyped_storage().nbytes() for g in groups)

    def estimated(estimator: type[EmbeddingStorageEstimator], optimizer: Any) -> int:
        copy = make_collection(TABLES, device=torch.device("meta"))
        apply_optimizer_in_backward(optimizer, copy.parameters(), {"lr": LR})
        enumerator = EmbeddingEnumerator(
            topology, 8, constraints, estimator=estimator(topology=topology)
        )
        chosen = {
            o.name: o
            for o in enumerator.enumerate(copy, [sharder])
            if len(o.shards) == len(plan.plan[""][o.name].ranks or [])
        }
        total = 0
        for name, option in chosen.items():
            ranks = plan.plan[""][name].ranks
            for rank, shard in zip(ranks, option.shards, strict=True):
                total += shard.storage.ddr if rank == dist.get_rank() else 0
        assert len(chosen) == len(TABLES)
        return total

    counters = estimated(FrequencyStorageEstimator, FrequencySGD) - estimated(
        EmbeddingStorageEstimator, torch.optim.SGD
    )
    assert counters == allocated
    whole = torch.tensor(allocated)
    dist.all_reduce(whole)
    assert whole > 0


@on_ranks(2)
def test_model_that_only_ours_lets_in() -> None:
    """The tables fit, a second copy of them does not."""
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
    with pytest.raises(PlannerError):
        stock.plan(collection, [sharder])
    planner = make_planner(topology, 8, constraints, storage_reservation=reservation)
    plan = planner.collective_plan(collection, [sharder], dist.group.WORLD)
    model = DistributedModelParallel(
        collection, device=torch.device("cpu"), plan=plan, sharders=[sharder]
    )
    features = make_batch(random.Random(dist.get_rank()), tables, 4)
    sample_loss(model(to_kjt(features)).to_dict()).mean().backward()
    assert all(counts.any() for counts in torchrec_freq.row_counts(model).values())
