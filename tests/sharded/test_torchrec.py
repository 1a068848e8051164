"""TorchRec around the tables: pipelines, wrappers, resharding, checkpointing, compilation."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from models import (
    LR,
    TABLES,
    Pair,
    TableSpec,
    full_weights,
    make_batch,
    make_collection,
    sample_loss,
    to_kjt,
)
from plans import make_plan
from ranks import on_ranks
from reference import Feature
from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer_in_backward
from torch.utils.checkpoint import checkpoint
from torchrec.datasets.utils import Batch
from torchrec.distributed.comm_ops import set_gradient_division
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.mc_embeddingbag import ManagedCollisionEmbeddingBagCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.model_tracker.model_delta_tracker import ModelDeltaTrackerTrec
from torchrec.distributed.sharding_plan import (
    column_wise,
    construct_module_sharding_plan,
    row_wise,
    table_wise,
)
from torchrec.distributed.train_pipeline import TrainPipelineBase, TrainPipelineSparseDist
from torchrec.distributed.types import ShardingEnv, ShardingPlan
from torchrec.models.dlrm import DLRM, DLRMTrain
from torchrec.modules.embedding_configs import EmbeddingConfig
from torchrec.modules.embedding_modules import EmbeddingCollection
from torchrec.modules.mc_embedding_modules import ManagedCollisionEmbeddingBagCollection
from torchrec.modules.mc_modules import (
    DistanceLFU_EvictionPolicy,
    ManagedCollisionCollection,
    MCHManagedCollisionModule,
)
from torchrec.optim.clipping import GradientClipping, GradientClippingOptimizer
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad
from torchrec.optim.warmup import WarmupOptimizer, WarmupPolicy, WarmupStage

from torchrec_freq import FrequencySGD, row_counts
from torchrec_freq.sharded.install import frequency_modules
from torchrec_freq.sharded.kernels import our_kernels

DLRM_TABLES = [t for t in TABLES if t.columns == 16]


def dlrm(plan: Any = None) -> tuple[DistributedModelParallel, CombinedOptimizer]:
    """A sharded DLRM with clipped Adam on its dense part."""
    torch.manual_seed(0)
    model = DLRMTrain(
        DLRM(
            make_collection(DLRM_TABLES),
            dense_in_features=4,
            dense_arch_layer_sizes=[8, 16],
            over_arch_layer_sizes=[8, 1],
        )
    )
    apply_optimizer_in_backward(FrequencySGD, model.model.sparse_arch.parameters(), {"lr": LR})
    sharder: Any = EmbeddingBagCollectionSharder()
    plan = ShardingPlan(
        plan={
            "model.sparse_arch.embedding_bag_collection": construct_module_sharding_plan(
                model.model.sparse_arch.embedding_bag_collection,
                plan or make_plan("row_wise", DLRM_TABLES, 2),
                sharder=sharder,
                device_type="cpu",
            )
        }
    )
    sharded = DistributedModelParallel(
        model, device=torch.device("cpu"), plan=plan, sharders=[sharder]
    )
    dense = KeyedOptimizerWrapper(
        dict(in_backward_optimizer_filter(sharded.named_parameters())),
        lambda parameters: torch.optim.Adam(parameters, lr=1e-2),
    )
    clipped = GradientClippingOptimizer(dense, clipping=GradientClipping.NORM, max_gradient=0.1)
    return sharded, CombinedOptimizer([("", sharded.fused_optimizer), ("dense", clipped)])


def batches(steps: int) -> Iterator[Batch]:
    rank = dist.get_rank()
    rng = random.Random(0)
    for step in range(steps):
        features = make_batch(rng, DLRM_TABLES, 8)
        generator = torch.Generator().manual_seed(step)
        dense, labels = torch.rand(8, 4, generator=generator), torch.arange(8) % 2
        rows = slice(4 * rank, 4 * rank + 4)
        yield Batch(dense[rows], to_kjt(features, rows), labels[rows].float())


@on_ranks(2)
def test_pipelines_equal_a_plain_loop() -> None:
    def plain(model: Any, optimizer: Any) -> None:
        for batch in batches(6):
            optimizer.zero_grad()
            loss, _ = model(batch)
            loss.backward()
            optimizer.step()

    def piped(pipeline: Any) -> Callable[[Any, Any], None]:
        def run(model: Any, optimizer: Any) -> None:
            train, source = pipeline(model, optimizer, torch.device("cpu")), batches(6)
            with pytest.raises(StopIteration):
                while True:
                    train.progress(source)

        return run

    results = []
    for run in (plain, piped(TrainPipelineBase), piped(TrainPipelineSparseDist)):
        model, optimizer = dlrm()
        start = full_weights(model, only="embedding_bags")
        run(model, optimizer)
        weights = full_weights(model, only="embedding_bags")
        assert all(not torch.equal(start[name], weights[name]) for name in weights)
        results.append((weights, row_counts(model)))
    for weights, counts in results[1:]:
        for name in weights:
            assert torch.equal(weights[name], results[0][0][name])
            assert torch.equal(counts[name], results[0][1][name])


@on_ranks(2)
def test_dense_optimizer_gets_no_replicated_table() -> None:
    model, _ = dlrm(make_plan("data_parallel", DLRM_TABLES, 2))
    names = dict(in_backward_optimizer_filter(model.named_parameters()))
    assert names and not [name for name in names if "embedding_bags" in name]
    assert {"a", "b"} == {
        name.split(".")[-2] for name in model.fused_optimizer.params if "embedding_bags" in name
    }


@pytest.mark.parametrize("kind", ["table_wise", "row_wise", "column_wise", "data_parallel"])
@on_ranks(2)
def test_meta_device(kind: str) -> None:
    pair = Pair(TABLES, make_plan(kind, TABLES, 2), meta=True)
    for _ in range(3):
        pair.step()
    pair.check()


@on_ranks(2)
def test_a_config_for_each_table() -> None:
    options: dict[str, dict[str, Any]] = {
        "a": {"own_weight": 5.0, "half_life": 2},
        "b": {"count": "batches"},
        "c": {"normalize": None, "min_count": 3},
    }
    pair = Pair(TABLES, make_plan("mixed", TABLES, 2), by_table=options)
    for _ in range(5):
        pair.step()
    pair.check()


@pytest.mark.parametrize("kind", ["table_wise", "row_wise", "column_wise"])
@on_ranks(2)
def test_without_gradient_division(kind: str) -> None:
    """The loss is then the sum of the ranks' means: the scale takes the factor out again."""
    set_gradient_division(False)
    try:
        pair = Pair(TABLES, make_plan(kind, TABLES, 2))
        for _ in range(4):
            pair.step()
        pair.check()
        pair = Pair(TABLES, make_plan(kind, TABLES, 2), {"normalize": None})
        pair.reference.lr *= 2
        for _ in range(4):
            pair.step()
        pair.check()
    finally:
        set_gradient_division(True)


@on_ranks(2)
def test_reshard_while_training() -> None:
    # TorchRec moves tables among the sharding types that the plan already has.
    plan = {
        "a": table_wise(rank=0),
        "b": table_wise(rank=0),
        "c": column_wise([0, 1], compute_kernel="fused"),
    }
    pair = Pair(TABLES, plan, {"half_life": 4})
    for _ in range(3):
        pair.step()
    changed = construct_module_sharding_plan(
        make_collection(TABLES),
        {**plan, "a": table_wise(rank=1), "c": column_wise([1, 0])},
        device_type="cpu",
    )
    # Only the fused kernel keeps its optimizer when it moves.
    moved = {name: changed[name] for name in ("a", "c")}
    for sharding in moved.values():
        sharding.compute_kernel = "fused"
    EmbeddingBagCollectionSharder().reshard(
        pair.model.module,
        moved,
        ShardingEnv.from_process_group(dist.group.WORLD),
        torch.device("cpu"),
    )
    pair.check()
    for _ in range(3):
        pair.step()
    pair.check()


@on_ranks(2)
def test_warm_up() -> None:
    pair = Pair(TABLES, make_plan("mixed", TABLES, 2))
    stages = [WarmupStage(policy=WarmupPolicy.LINEAR, max_iters=4, value=0.1)]
    optimizer = WarmupOptimizer(pair.model.fused_optimizer, stages=stages, lr=LR)
    rates = []
    for _ in range(6):
        optimizer.zero_grad()
        rates.append(pair.model.fused_optimizer.param_groups[0]["lr"])
        pair.reference.lr = rates[-1]
        pair.step()
        optimizer.step()
    pair.check()
    assert rates[0] < rates[2] < rates[5] == LR


@on_ranks(2)
def test_a_tower_called_twice_before_a_backward() -> None:
    """Each call is a step; plans agree as they do with stock row-wise Adagrad."""

    def run(kind: str, optimizer: Any) -> tuple[dict[str, torch.Tensor], Any]:
        options = {"own_weight": 5} if optimizer is FrequencySGD else {}
        pair = Pair(TABLES, make_plan(kind, TABLES, 2), options, optimizer=optimizer)
        rank = slice(3 * dist.get_rank(), 3 * dist.get_rank() + 3)
        for _ in range(4):
            calls = [to_kjt(make_batch(pair.rng, TABLES, 6), rank) for _ in range(2)]
            losses = [sample_loss(pair.model(kjt).to_dict()) for kjt in calls]
            torch.stack(losses).mean().backward()
        counts = row_counts(pair.model) if optimizer is FrequencySGD else None
        return full_weights(pair.model), counts

    kinds = ["table_wise", "row_wise", "column_wise", "data_parallel"]
    ours = {kind: run(kind, FrequencySGD) for kind in kinds}
    stock = {kind: run(kind, RowWiseAdagrad)[0] for kind in kinds[:3]}
    weights, counts = ours["table_wise"]
    assert sum(int(count.sum()) for count in counts.values()) > 0
    for kind in kinds[1:]:
        for name in weights:
            assert torch.equal(ours[kind][1][name], counts[name]), (kind, name)
    for kind in ("row_wise", "column_wise"):
        for name in weights:
            off = (ours[kind][0][name] - weights[name]).abs().max()
            theirs = (stock[kind][name] - stock["table_wise"][name]).abs().max()
            assert off < 2 * theirs + 1e-6, (kind, name, off, theirs)
    # DDP sums the gradients of the two calls: one step on the samples of both.
    pair = Pair(TABLES, make_plan("data_parallel", TABLES, 2), {"own_weight": 5})
    for _ in range(4):
        first, second = (make_batch(pair.rng, TABLES, 6) for _ in range(2))
        both = [Feature(a.name, a.bags + b.bags) for a, b in zip(first, second, strict=True)]
        pair.reference.step(both, lambda outputs: sample_loss(outputs).mean())
    for name, table in pair.reference.tables.items():
        trained = ours["data_parallel"][0][name].double()
        torch.testing.assert_close(trained, table.weight, rtol=0, atol=1e-6)


@on_ranks(2)
def test_delta_tracking_sees_counts() -> None:
    """Where TorchRec's tracker asks for the state of row-wise Adagrad."""
    pair = Pair(TABLES, make_plan("table_wise", TABLES, 2))
    for _ in range(2):
        pair.step()
    counts = row_counts(pair.model)
    tracker = ModelDeltaTrackerTrec.__new__(ModelDeltaTrackerTrec)
    tracker.tracked_modules = {"": pair.model.module}
    tracker.table_to_fqn = {name: name for name in counts}
    states = tracker.get_latest()
    assert states or not list(frequency_modules(pair.model))[0][1].shards
    for name, state in states.items():
        assert torch.equal(state.long(), counts[name])
    for kernel in our_kernels(pair.model.module._lookups):
        with pytest.raises(ValueError, match=r"EMBEDDING.*ROWWISE_ADAGRAD"):
            tracker.record_momentum(kernel, None)


@on_ranks(2)
def test_one_bad_gradient_on_two_ranks_and_after_a_resume() -> None:
    """One sample's gradient is 1e4 times the rest; the others move on within 5 %."""
    tables = [TableSpec("a", 500, 8, ["f0"])]
    size, rank, bad = 4096, dist.get_rank(), 499

    def run(poison: float, resume: bool) -> Any:
        pair = Pair(tables, make_plan("row_wise", tables, 2))
        rng = random.Random(0)
        generator = torch.Generator().manual_seed(0)
        for step in range(14):
            ids = [[int(500 * rng.random() ** 2)] for _ in range(2 * size)]
            gradient = torch.randn(2 * size, 8, generator=generator)
            if step == 3:
                ids[0] = [bad]  # a rare row: what enters is capped for each occurrence
                gradient[0] *= poison
            mine = slice(rank * size, (rank + 1) * size)
            before = full_weights(pair.model)["a"]
            output = pair.model(to_kjt([Feature("f0", ids)], mine)).values()
            (output * gradient[mine]).sum().backward()
            if step == 6 and resume:
                state = copy.deepcopy(pair.model.fused_optimizer.state_dict())
                weights = full_weights(pair.model)
                pair = Pair(tables, make_plan("row_wise", tables, 2))
                half = slice(250 * rank, 250 * rank + 250)
                for value in pair.model.state_dict().values():
                    value.local_shards()[0].tensor.copy_(weights["a"][half])
                pair.model.fused_optimizer.load_state_dict(state)
        moved = full_weights(pair.model)["a"] - before
        moved[bad] = 0
        return moved.norm(dim=1)

    sound = run(1.0, resume=False)
    for resume in (False, True):
        slowed = run(1e4, resume)
        both = (slowed > 0) & (sound > 0)
        low, high = (slowed[both] / sound[both]).aminmax()
        assert both.sum() > 200 and low > 0.95 and high < 1.05, (resume, low, high)


@on_ranks(2)
def test_each_backward_is_a_step() -> None:
    """Accumulating gradients over micro-batches is a step each, as with any fused optimizer."""
    pair = Pair(TABLES, make_plan("mixed", TABLES, 2))
    for _ in range(3):
        for _ in range(2):
            pair.step()
        pair.model.fused_optimizer.step()
    pair.check()
    ((_, tables),) = frequency_modules(pair.model)
    assert {tables.read(name).age for name in tables.tables} == {6}


@pytest.mark.parametrize("kind", ["table_wise", "row_wise", "column_wise", "data_parallel"])
@on_ranks(2)
def test_activation_checkpointing(kind: str) -> None:
    pair = Pair(TABLES, make_plan(kind, TABLES, 2))

    def forward(kjt: Any) -> torch.Tensor:
        return sample_loss(pair.model(kjt).to_dict()).mean()

    rank = dist.get_rank()
    for _ in range(3):
        features = make_batch(pair.rng, TABLES, 6)
        kjt = to_kjt(features, slice(3 * rank, 3 * rank + 3))
        checkpoint(forward, kjt, use_reentrant=False).backward()
        pair.reference.step(features, lambda outputs: sample_loss(outputs).mean())
    pair.check()


@on_ranks(2)
def test_saved_tensors_on_cpu() -> None:
    pair = Pair(TABLES, make_plan("mixed", TABLES, 2))
    with torch.autograd.graph.save_on_cpu():
        for _ in range(3):
            pair.step()
    pair.check()


@pytest.mark.slow
@on_ranks(2)
def test_compiled_model() -> None:
    pair = Pair(TABLES, make_plan("table_wise", TABLES, 2))
    compiled = torch.compile(pair.model, backend="eager")
    rank = dist.get_rank()
    for _ in range(4):
        features = make_batch(pair.rng, TABLES, 6)
        kjt = to_kjt(features, slice(3 * rank, 3 * rank + 3))
        sample_loss(compiled(kjt).to_dict()).mean().backward()
        pair.reference.step(features, lambda outputs: sample_loss(outputs).mean())
    pair.check()


@on_ranks(1)
def test_zero_collision_hashing() -> None:
    """A row that is given to another id counts from zero, and trains by the whole rule."""
    table = TableSpec("a", 4, 8, ["f0"])
    tables = make_collection([table])
    apply_optimizer_in_backward(FrequencySGD, tables.parameters(), {"lr": LR})
    hashing = MCHManagedCollisionModule(
        zch_size=table.rows,
        device=torch.device("cpu"),
        eviction_policy=DistanceLFU_EvictionPolicy(),
        eviction_interval=1,
        input_hash_size=1000,
    )
    collection = ManagedCollisionEmbeddingBagCollection(
        tables,
        ManagedCollisionCollection({"a": hashing}, tables.embedding_bag_configs()),
        return_remapped_features=True,
    )
    sharder: Any = ManagedCollisionEmbeddingBagCollectionSharder()
    plan = construct_module_sharding_plan(
        collection, {"a": row_wise()}, sharder=sharder, device_type="cpu"
    )
    model = DistributedModelParallel(
        collection, device=torch.device("cpu"), plan=ShardingPlan({"": plan}), sharders=[sharder]
    )
    owners: dict[int, int] = {}
    counts = [0] * table.rows
    evictions = 0
    before = full_weights(model, only="embedding_bags")
    for ids in (
        [100, 100, 200],
        [100, 200, 300],
        [400, 400, 300],
        [500, 500, 500],
        [100, 600, 500],
    ):
        output, remapped = model(to_kjt([Feature("f0", [[id_] for id_ in ids])]))
        for id_, row in zip(ids, remapped.values().tolist(), strict=True):
            # The last row is shared by all ids that have none of their own.
            if owners.get(row, id_) != id_ and row != table.rows - 1:
                evictions += 1
                counts[row] = 0
            owners[row] = id_
            counts[row] += 1
        sample_loss(output.to_dict()).mean().backward()
        assert row_counts(model)["a"].tolist() == counts
    assert evictions > 0, "the test evicts nothing"
    assert not torch.equal(before["a"], full_weights(model, only="embedding_bags")["a"])


@on_ranks(1)
def test_index_dedup_is_refused() -> None:
    def build(**options: Any) -> None:
        collection = EmbeddingCollection(
            tables=[
                EmbeddingConfig(name="a", num_embeddings=4, embedding_dim=8, feature_names=["f0"])
            ]
        )
        apply_optimizer_in_backward(FrequencySGD, collection.parameters(), {"lr": LR, **options})
        sharder: Any = EmbeddingCollectionSharder(use_index_dedup=True)
        plan = construct_module_sharding_plan(
            collection, {"a": table_wise(rank=0)}, sharder=sharder, device_type="cpu"
        )
        DistributedModelParallel(
            collection,
            device=torch.device("cpu"),
            plan=ShardingPlan({"": plan}),
            sharders=[sharder],
        )

    with pytest.raises(ValueError, match="'a': use_index_dedup .* count='batches'"):
        build()
    build(count="batches")
    build(count="frozen")
