"""TorchRec around the tables: pipelines, wrappers, resharding, checkpointing, compilation."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping
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
from ranks import on_ranks, run_on_ranks
from reference import Feature
from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer_in_backward
from torch.utils.checkpoint import checkpoint
from torchrec.datasets.utils import Batch
from torchrec.distributed.comm_ops import set_gradient_division
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.mc_embeddingbag import ManagedCollisionEmbeddingBagCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.sharding_plan import (
    column_wise,
    construct_module_sharding_plan,
    row_wise,
    table_wise,
)
from torchrec.distributed.train_pipeline import (
    TrainPipelineBase,
    TrainPipelineSparseDist,
)
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

from torchrec_freq import FrequencySGD, table_states
from torchrec_freq.sharded.install import frequency_modules

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


@pytest.mark.parametrize("pipeline", [TrainPipelineBase, TrainPipelineSparseDist])
@on_ranks(2)
def test_a_pipeline_equals_a_plain_loop(pipeline: Any) -> None:
    results = []
    for piped in (False, True):
        model, optimizer = dlrm()
        start = full_weights(model, only="embedding_bags")
        if piped:
            train, source = pipeline(model, optimizer, torch.device("cpu")), batches(6)
            with pytest.raises(StopIteration):
                while True:
                    train.progress(source)
        else:
            for batch in batches(6):
                optimizer.zero_grad()
                model(batch)[0].backward()
                optimizer.step()
        weights = full_weights(model, only="embedding_bags")
        assert all(not torch.equal(start[name], weights[name]) for name in weights)
        results.append((weights, table_states(model)))
    (weights, states), (piped_weights, piped_states) = results
    for name, state in states.items():
        assert torch.equal(weights[name], piped_weights[name])
        for field in ("counts", "sums", "totals"):
            assert torch.equal(getattr(state, field), getattr(piped_states[name], field)), field
        assert state.totals[3] == 6


def linear_loss(outputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Its gradients do not depend on the weights."""
    return torch.stack([outputs[name].mean(dim=1) for name in sorted(outputs)]).sum(dim=0).mean()


@on_ranks(2)
def test_a_lookup_ahead_of_the_step_before() -> None:
    """As in TorchRec's semi-synchronous pipeline, which runs on GPUs alone."""
    pair = Pair(TABLES, make_plan("mixed", TABLES, 2))
    mine = slice(3 * dist.get_rank(), 3 * dist.get_rank() + 3)
    ahead: list[Any] = []
    for step in range(6):
        if step < 5:
            features = make_batch(pair.rng, TABLES, 6)
            ahead.append((features, pair.forward(to_kjt(features, mine))))
        if step > 0:
            features, outputs = ahead.pop(0)
            linear_loss(outputs).backward()
            pair.reference.step(features, linear_loss)
    pair.check()


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
        "a": {"prior_count": 5, "half_life": 2},
        "b": {"admit": 3},
        "c": {"normalize": None, "min_count": 3},
    }
    pair = Pair(TABLES, make_plan("mixed", TABLES, 2), by_table=options)
    for _ in range(5):
        pair.step()
    pair.check()


@pytest.mark.parametrize("kind", ["table_wise", "row_wise", "column_wise"])
@on_ranks(2)
def test_without_gradient_division(kind: str) -> None:
    """The loss is then the sum of the ranks' means: the rule takes the factor out again."""
    set_gradient_division(False)
    try:
        for options in ({}, {"normalize": None}):
            pair = Pair(TABLES, make_plan(kind, TABLES, 2), options)
            pair.reference.lr *= 2 if options else 1
            for _ in range(4):
                pair.step()
            pair.check(squares=4.0)
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
def test_a_tower_called_twice_before_a_backward() -> None:
    """Both calls are one step; plans agree as they do with stock row-wise Adagrad."""

    def run(kind: str, optimizer: Any) -> tuple[dict[str, torch.Tensor], Any]:
        pair = Pair(TABLES, make_plan(kind, TABLES, 2), optimizer=optimizer)
        rank = slice(3 * dist.get_rank(), 3 * dist.get_rank() + 3)
        for _ in range(4):
            calls = [to_kjt(make_batch(pair.rng, TABLES, 6), rank) for _ in range(2)]
            torch.stack([sample_loss(pair.forward(kjt)) for kjt in calls]).mean().backward()
        states = table_states(pair.model) if optimizer is FrequencySGD else None
        return full_weights(pair.model), states

    kinds = ["table_wise", "row_wise", "column_wise", "data_parallel"]
    ours = {kind: run(kind, FrequencySGD) for kind in kinds}
    stock = {kind: run(kind, RowWiseAdagrad)[0] for kind in kinds[:3]}
    weights, states = ours["table_wise"]
    for kind in kinds:
        for name, state in ours[kind][1].items():
            assert torch.equal(state.counts, states[name].counts), (kind, name)
            assert state.totals[3] == 4 and state.totals[2] == state.counts.sum() > 0
    for kind in ("row_wise", "column_wise"):
        for name in weights:
            off = (ours[kind][0][name] - weights[name]).abs().max()
            theirs = (stock[kind][name] - stock["table_wise"][name]).abs().max()
            assert off < 2 * theirs + 1e-6, (kind, name, off, theirs)
    # DDP sums the gradients of the two calls: one step on the samples of both.
    pair = Pair(TABLES, make_plan("data_parallel", TABLES, 2))
    for _ in range(4):
        first, second = (make_batch(pair.rng, TABLES, 6) for _ in range(2))
        both = [Feature(a.name, a.bags + b.bags) for a, b in zip(first, second, strict=True)]
        pair.reference.step(both, lambda outputs: sample_loss(outputs).mean())
    for name, table in pair.reference.tables.items():
        trained = ours["data_parallel"][0][name].double()
        torch.testing.assert_close(trained, table.weight, rtol=0, atol=1e-6)


@on_ranks(2)
def test_one_bad_gradient() -> None:
    """In step 10; all other rows move on as far as without it, as in row-wise Adagrad."""
    rows, size, bad = 100, 64, 99
    tables = [TableSpec("a", rows, 8, ["f0"])]
    mine = slice(dist.get_rank() * size, (dist.get_rank() + 1) * size)

    def run(optimizer: Any, factor: float) -> Any:
        pair = Pair(tables, make_plan("row_wise", tables, 2), optimizer=optimizer)
        generator = torch.Generator().manual_seed(0)
        for step in range(41):
            if step == 11:
                before = full_weights(pair.model)["a"]
            ids = (rows * torch.rand(2 * size, generator=generator) ** 3).long().tolist()
            gradient = torch.randn(2 * size, 8, generator=generator) / size
            if step == 10:
                ids[0] = bad
                gradient[0] *= factor
            outputs = pair.forward(to_kjt([Feature("f0", [[id_] for id_ in ids])], mine))
            (outputs["f0"] * gradient[mine]).sum().backward()
        moved = full_weights(pair.model)["a"] - before
        return moved[torch.arange(rows) != bad].norm(dim=1)

    for optimizer in (FrequencySGD, RowWiseAdagrad):
        sound = run(optimizer, 1.0)
        assert (sound > 0).all()
        for poison in (math.nan, math.inf, 1e4, 1e20):
            low, high = (run(optimizer, poison) / sound).aminmax()
            assert low > 0.9 and high < 1.1, (optimizer, poison, low, high)


@on_ranks(2)
def test_tables_that_are_trained_in_turn() -> None:
    """Sampled steps do not miss those that train in each 2nd, 4th or 8th step alone."""
    periods = {"f0": 2, "f1": 4, "f2": 8}
    tables = [TableSpec(f"t{n}", 6, 4, [name]) for n, name in enumerate(periods)]
    pair = Pair(tables, make_plan("row_wise", tables, 2))
    mine = slice(dist.get_rank(), dist.get_rank() + 1)
    growth, first = 2.5, 64  # of the squares, from the step on when only some are sampled
    for step in range(384):
        features = [
            Feature(name, [[0, 1], [1, 2, 5]] if step % period == period - 1 else [[], []])
            for name, period in periods.items()
        ]

        def loss(outputs: Any, scale: float = 1 if step < first else growth**0.5) -> torch.Tensor:
            return scale * linear_loss(outputs)

        loss(pair.forward(to_kjt(features, mine))).backward()
        pair.reference.step(features, loss)
        if step == first - 1:
            early = {n: s.totals[1] / s.totals[2] for n, s in table_states(pair.model).items()}
    pair.check(tolerance=1e-5)
    share = first / 384
    for name, state in table_states(pair.model).items():
        every_step = early[name] * (share + (1 - share) * growth)
        torch.testing.assert_close(state.totals[1] / state.totals[2], every_step, rtol=0.1, atol=0)


@on_ranks(3)
def test_a_rank_without_a_shard_takes_part() -> None:
    """In the steps of two lookups, of which one needs the other ranks' sums."""
    plan = {
        "a": table_wise(rank=0, compute_kernel="fused"),
        "b": table_wise(rank=0, compute_kernel="fused"),
        "c": column_wise([0, 1], compute_kernel="fused"),
    }
    pair = Pair(TABLES, plan, {"half_life": 3})
    for _ in range(4):
        pair.step()
    pair.check()
    ((_, handle),) = frequency_modules(pair.model)
    assert bool(handle.shards) == (dist.get_rank() < 2)
    for name, table in pair.reference.tables.items():
        torch.testing.assert_close(handle.table_totals(name), table.totals(), rtol=1e-5, atol=0)
        assert handle.age(name).tolist() == [1]


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
    forward = pair.forward
    pair.forward = lambda kjt: checkpoint(forward, kjt, use_reentrant=False)
    for _ in range(3):
        pair.step()
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
    pair.forward = lambda kjt: compiled(kjt).to_dict()
    for _ in range(4):
        pair.step()
    pair.check()


def hashed(tables: list[TableSpec]) -> Any:
    """A sharded collection that gives rows to ids as they come, evicting others."""
    collection = make_collection(tables)
    apply_optimizer_in_backward(FrequencySGD, collection.parameters(), {"lr": LR})
    hashing = {
        t.name: MCHManagedCollisionModule(
            zch_size=t.rows,
            device=torch.device("cpu"),
            eviction_policy=DistanceLFU_EvictionPolicy(),
            eviction_interval=1,
            input_hash_size=1000,
        )
        for t in tables
    }
    module = ManagedCollisionEmbeddingBagCollection(
        collection,
        ManagedCollisionCollection(hashing, collection.embedding_bag_configs()),
        return_remapped_features=True,
    )
    sharder: Any = ManagedCollisionEmbeddingBagCollectionSharder()
    plan = construct_module_sharding_plan(
        module, {t.name: row_wise() for t in tables}, sharder=sharder, device_type="cpu"
    )
    return DistributedModelParallel(
        module, device=torch.device("cpu"), plan=ShardingPlan({"": plan}), sharders=[sharder]
    )


def evict(ranks: int) -> None:
    tables = [TableSpec("a", 8, 8, ["f0", "f1"]), TableSpec("b", 8, 8, ["f2"])]
    model, rng = hashed(tables), random.Random(0)
    shared = {8 // ranks * (rank + 1) - 1 for rank in range(ranks)}  # by ids without a row
    owners: dict[tuple[str, int], int] = {}
    lost = dict.fromkeys("ab", 0)
    for _ in range(8):
        features = [
            Feature(name, [[rng.randrange(1000)] for _ in range(3)]) for name in ("f0", "f1", "f2")
        ]
        before = table_states(model)
        outputs, remapped = model(to_kjt(features))
        looked_up: dict[str, list[int]] = {"a": [], "b": []}
        evicted: dict[str, set[int]] = {"a": set(), "b": set()}
        for t, feature in [(t, f) for t in tables for f in features if f.name in t.features]:
            rows = remapped[feature.name].values().tolist()
            looked_up[t.name] += rows
            for (id_,), row in zip(feature.bags, rows, strict=True):
                if row not in shared and owners.setdefault((t.name, row), id_) != id_:
                    evicted[t.name].add(row)
                    owners[t.name, row] = id_
        for name, state in table_states(model).items():
            gone = torch.tensor(sorted(evicted[name]), dtype=torch.int64)
            lost[name] += int((before[name].counts[gone] > 0).sum())
            assert torch.equal(state.counts, before[name].counts.index_fill(0, gone, 0))
            assert torch.equal(state.sums, before[name].sums.index_fill(0, gone, 0.0))
            assert torch.equal(state.totals, before[name].totals)
            before[name] = state
        sample_loss(outputs.to_dict()).mean().backward()
        for name, state in table_states(model).items():
            seen = torch.tensor(looked_up[name]).bincount(minlength=8) * ranks
            assert torch.equal(state.counts, before[name].counts + seen)
    assert min(lost.values()) > 3, "the test evicts too little"
    # TorchRec's pruning of rows (ITEP) hands over features.
    ((_, handle),) = frequency_modules(model)
    tbe: Any = handle.shards[0].tbe
    parts = {shard.table: (shard.counts.clone(), shard.sums.clone()) for shard in handle.shards}
    tbe.reset_embedding_weight_momentum(
        torch.tensor([0, 2, 1]), torch.tensor([0, 2, 3]), torch.tensor([2, 1]), torch.tensor([0, 1])
    )
    for name, rows in (("b", [0, 2]), ("a", [1])):
        (shard,) = handle.shards_of(name)
        assert torch.equal(shard.counts, parts[name][0].index_fill(0, torch.tensor(rows), 0))
        assert torch.equal(shard.sums, parts[name][1].index_fill(0, torch.tensor(rows), 0.0))


@pytest.mark.parametrize("ranks", [1, 2])
def test_rows_that_are_given_to_other_ids(ranks: int) -> None:
    """Of the right table, though one has two features; all others stay as they are."""
    run_on_ranks(ranks, evict, {"ranks": ranks})


@on_ranks(1)
def test_index_dedup_is_refused() -> None:
    def build(**options: Any) -> None:
        collection = EmbeddingCollection(
            tables=[
                EmbeddingConfig(name="a", num_embeddings=4, embedding_dim=8, feature_names=["f0"])
            ]
        )
        own = {"lr": LR, **options}
        apply_optimizer_in_backward(FrequencySGD, collection.parameters(), own)
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

    with pytest.raises(ValueError, match="'a': use_index_dedup merges"):
        build()
    build(count="frozen", normalize=None)
