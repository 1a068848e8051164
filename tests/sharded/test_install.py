"""What registering with TorchRec changes, and what it leaves alone."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from models import LR, TABLES, full_weights, make_batch, make_collection, sample_loss, shard, to_kjt
from ranks import on_ranks
from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer_in_backward
from torchrec.distributed.embedding_lookup import GroupedPooledEmbeddingsLookup
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.embeddingbag import (
    EmbeddingBagCollectionSharder,
    ShardedEmbeddingBagCollection,
)
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import EmbeddingShardingPlanner
from torchrec.distributed.sharding_plan import data_parallel, row_wise, table_wise
from torchrec.distributed.types import ShardingEnv2D, ShardingStrategy
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

import torchrec_freq
from torchrec_freq import FrequencyConfig, FrequencySGD
from torchrec_freq.sharded import install


def build(optimizer: Any, plan: dict[str, Any], **options: Any) -> Any:
    torch.manual_seed(0)
    collection = make_collection(TABLES)
    weights = {t.name: collection.embedding_bags[t.name].weight.detach() for t in TABLES}
    apply_optimizer_in_backward(optimizer, collection.parameters(), {"lr": LR, **options})
    return shard(collection, plan, EmbeddingBagCollectionSharder(), weights)


def every(generator: Any) -> dict[str, Any]:
    return {t.name: generator for t in TABLES}


def train(model: Any, steps: int = 3) -> dict[str, torch.Tensor]:
    rng = random.Random(0)
    for _ in range(steps):
        features = make_batch(rng, TABLES, 4)
        sample_loss(model(to_kjt(features)).to_dict()).mean().backward()
    return full_weights(model)


STOCK_RUN = """
import sys, torch, torch.distributed as dist
sys.path.insert(0, {tests!r})
if {imported}: import torchrec_freq
else: sys.modules["torchrec_freq"] = type(sys)("torchrec_freq")
import models, random
from torch.distributed.optim import _apply_optimizer_in_backward as apply
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.sharding_plan import table_wise
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad
dist.init_process_group("gloo", init_method="file://{store}", rank=0, world_size=1)
torch.manual_seed(0)
ebc = models.make_collection(models.TABLES)
weights = {{t.name: ebc.embedding_bags[t.name].weight.detach() for t in models.TABLES}}
apply(RowWiseAdagrad, ebc.parameters(), {{"lr": 0.1}})
plan = {{t.name: table_wise(rank=0) for t in models.TABLES}}
model = models.shard(ebc, plan, EmbeddingBagCollectionSharder(), weights)
rng = random.Random(0)
for _ in range(3):
    batch = models.make_batch(rng, models.TABLES, 4)
    models.sample_loss(model(models.to_kjt(batch)).to_dict()).mean().backward()
torch.save([models.full_weights(model), list(model.fused_optimizer.state_dict()["state"]),
            [type(m).__name__ for m in model.modules()]], {out!r})
dist.destroy_process_group()
"""


def test_other_models_behave_as_before_the_import(tmp_path: Any) -> None:
    results = []
    for imported in (False, True):
        out = tmp_path / f"{imported}.pt"
        code = STOCK_RUN.format(
            tests=str(Path(__file__).parents[1]),
            imported=imported,
            store=tmp_path / f"store{imported}",
            out=str(out),
        )
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
        results.append(torch.load(out, weights_only=False))
    (stock, keys, modules), (with_import, other_keys, other_modules) = results
    assert keys == other_keys and modules == other_modules
    for name in stock:
        assert torch.equal(stock[name], with_import[name])


def test_install_is_idempotent() -> None:
    before = (
        GroupedPooledEmbeddingsLookup._create_embedding_kernel,
        ShardedEmbeddingBagCollection.__init__,
        ShardedEmbeddingBagCollection._create_lookups,
    )
    install.install()
    assert before == (
        GroupedPooledEmbeddingsLookup._create_embedding_kernel,
        ShardedEmbeddingBagCollection.__init__,
        ShardedEmbeddingBagCollection._create_lookups,
    )


@on_ranks(2)
def test_state_is_four_bytes_a_row() -> None:
    model = build(FrequencySGD, every(row_wise()))
    storages = {
        shard.tbe.counts.untyped_storage().data_ptr(): shard.tbe.counts
        for _, tables in install.frequency_modules(model)
        for shard in tables.shards
    }
    total = torch.tensor(sum(counts.untyped_storage().nbytes() for counts in storages.values()))
    dist.all_reduce(total)
    assert total == 4 * sum(t.rows for t in TABLES)


@on_ranks(2)
def test_mixed_optimizers() -> None:
    """Each table trains as if all had its optimizer: TorchRec groups them by optimizer."""
    plan = {"a": table_wise(rank=0), "b": table_wise(rank=0), "c": row_wise()}
    ours = train(build(FrequencySGD, plan))
    theirs = train(build(RowWiseAdagrad, plan))
    # Where only the embeddings of a table feed a loss term, tables do not influence each other.
    torch.manual_seed(0)
    collection = make_collection(TABLES)
    weights = {t.name: collection.embedding_bags[t.name].weight.detach() for t in TABLES}
    for name, optimizer in {"a": FrequencySGD, "b": RowWiseAdagrad, "c": FrequencySGD}.items():
        parameter = collection.embedding_bags[name].weight
        apply_optimizer_in_backward(optimizer, [parameter], {"lr": LR})
    model = shard(collection, plan, EmbeddingBagCollectionSharder(), weights)
    mixed = train(model, steps=1)
    assert list(torchrec_freq.row_counts(model)) == ["a", "c"]
    one = train(build(RowWiseAdagrad, plan), steps=1)
    torch.testing.assert_close(mixed["b"], one["b"])
    assert not torch.equal(ours["a"], theirs["a"])


@on_ranks(2)
def test_plans_of_the_planner_train() -> None:
    """Whatever the stock planner chooses, replicated tables included, from the sharder alone."""
    torch.manual_seed(0)
    collection: Any = make_collection(TABLES)
    sharder: Any = EmbeddingBagCollectionSharder(
        fused_params=torchrec_freq.fused_params(lr=LR, own_weight=3)
    )
    planner = EmbeddingShardingPlanner()
    plan = planner.collective_plan(collection, [sharder], dist.group.WORLD)
    model = DistributedModelParallel(
        collection, device=torch.device("cpu"), plan=plan, sharders=[sharder]
    )
    rng = random.Random(0)
    lookups = dict.fromkeys(("a", "b", "c"), 0)
    for _ in range(3):
        features = make_batch(rng, TABLES, 6)
        for name, table in zip(("a", "b", "b", "c"), features, strict=True):
            lookups[name] += sum(map(len, table.bags))
        rows = slice(3 * dist.get_rank(), 3 * dist.get_rank() + 3)
        sample_loss(model(to_kjt(features, rows)).to_dict()).mean().backward()
    assert {name: int(n.sum()) for name, n in torchrec_freq.row_counts(model).items()} == lookups
    ((_, tables),) = install.frequency_modules(model)
    assert tables.shards and all(s.tbe.frequency.own_weight == 3 for s in tables.shards)


@on_ranks(2)
def test_class_of_a_table_wins_over_the_sharder() -> None:
    torch.manual_seed(0)
    collection = make_collection(TABLES)
    weights = {t.name: collection.embedding_bags[t.name].weight.detach() for t in TABLES}
    apply_optimizer_in_backward(
        RowWiseAdagrad, collection.embedding_bags["a"].parameters(), {"lr": LR}
    )
    sharder = EmbeddingBagCollectionSharder(
        fused_params=torchrec_freq.fused_params(lr=LR, own_weight=7)
    )
    plan = every(table_wise(rank=1, compute_kernel="fused"))
    model = shard(collection, plan, sharder, weights)
    assert list(torchrec_freq.row_counts(model)) == ["b", "c"]
    ((_, tables),) = install.frequency_modules(model)
    assert len(tables.shards) == (2 if dist.get_rank() == 1 else 0)
    assert all(s.tbe.frequency == FrequencyConfig(own_weight=7) for s in tables.shards)


REFUSED = [
    kernel.value
    for kernel in EmbeddingComputeKernel
    if kernel.value not in ("fused", "fused_uvm", "fused_uvm_caching")
]


@pytest.mark.parametrize("kernel", REFUSED)
@on_ranks(2)
def test_kernels_that_are_refused(kernel: str) -> None:
    # Only one rank would make the kernel; all must refuse, or the others would wait for it.
    with pytest.raises(ValueError) as error:
        build(FrequencySGD, every(table_wise(rank=0, compute_kernel=kernel)))
    for word in ("'a'", repr(kernel), "table_wise", "fused_uvm_caching"):
        assert word in str(error.value)


@on_ranks(1)
def test_kernels_that_average_weights_within_a_step_are_refused() -> None:
    environment = ShardingEnv2D.__new__(ShardingEnv2D)  # its __init__ needs a GPU mesh
    environment.sharding_strategy = ShardingStrategy.FULLY_SHARDED
    collection = make_collection(TABLES)
    apply_optimizer_in_backward(FrequencySGD, collection.parameters(), {"lr": LR})
    with pytest.raises(ValueError, match="FULLY_SHARDED"):
        ShardedEmbeddingBagCollection(collection, {}, environment)


@on_ranks(2)
def test_a_table_that_must_not_train_is_refused() -> None:
    for plan in (table_wise(rank=0, compute_kernel="fused"), data_parallel()):
        collection = make_collection(TABLES)
        collection.embedding_bags["b"].weight.requires_grad_(False)
        sharder = EmbeddingBagCollectionSharder(fused_params=torchrec_freq.fused_params(lr=LR))
        with pytest.raises(ValueError, match="'b' has requires_grad=False"):
            shard(collection, every(plan), sharder, {})


@on_ranks(2)
def test_options_that_fbgemm_would_ignore_are_refused() -> None:
    collection = make_collection(TABLES)
    sharder = EmbeddingBagCollectionSharder(
        fused_params={**torchrec_freq.fused_params(lr=LR), "weight_decay": 0.1}
    )
    with pytest.raises(ValueError, match="weight_decay"):
        shard(collection, every(table_wise(rank=0, compute_kernel="fused")), sharder, {})
    sharder = EmbeddingBagCollectionSharder(
        fused_params={**torchrec_freq.fused_params(lr=LR), "coherence": 0.03}
    )
    with pytest.raises(ValueError, match=r"coherence=0\.03.*0\.2"):
        shard(collection, every(table_wise(rank=0, compute_kernel="fused")), sharder, {})
