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
from fbgemm_gpu.split_table_batched_embeddings_ops_training import WeightDecayMode
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
def test_state_is_eight_bytes_a_row() -> None:
    model = build(FrequencySGD, every(row_wise()))
    tbes = {shard.tbe for _, tables in install.frequency_modules(model) for shard in tables.shards}
    bytes_ = [t.untyped_storage().nbytes() for tbe in tbes for t in (tbe.counts, tbe.sums)]
    total = torch.tensor(sum(bytes_))
    dist.all_reduce(total)
    assert total == 8 * sum(t.rows for t in TABLES)


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
        fused_params=torchrec_freq.fused_params(lr=LR, prior_count=3)
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
    assert tables.shards and all(s.tbe.frequency.prior_count == 3 for s in tables.shards)


@on_ranks(2)
def test_class_of_a_table_wins_over_the_sharder() -> None:
    torch.manual_seed(0)
    collection = make_collection(TABLES)
    weights = {t.name: collection.embedding_bags[t.name].weight.detach() for t in TABLES}
    apply_optimizer_in_backward(
        RowWiseAdagrad, collection.embedding_bags["a"].parameters(), {"lr": LR}
    )
    sharder = EmbeddingBagCollectionSharder(
        fused_params=torchrec_freq.fused_params(lr=LR, prior_count=7)
    )
    plan = every(table_wise(rank=1, compute_kernel="fused"))
    model = shard(collection, plan, sharder, weights)
    assert list(torchrec_freq.row_counts(model)) == ["b", "c"]
    ((_, tables),) = install.frequency_modules(model)
    assert len(tables.shards) == (2 if dist.get_rank() == 1 else 0)
    assert all(s.tbe.frequency == FrequencyConfig(prior_count=7) for s in tables.shards)


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


REFUSED_OPTIONS: list[tuple[dict[str, Any], str]] = [
    *(
        ({option: value}, rf"'a': {option}: FBGEMM's kernel ignores it on this device.*out")
        for option, value in {
            "weight_decay": 0.1,
            "weight_decay_mode": WeightDecayMode.L2,
            "gradient_clipping": True,
            "max_gradient": 1.0,
            "max_norm": 1.0,
        }.items()
    ),
    ({"beta1": 0.9, "beta2": 0.99}, r"no beta1, beta2.*apply_optimizer_in_backward\(Adam"),
    ({"own_weight": 3}, "own_weight is not an option since version 0.3.*prior_count"),
    ({"count": "batches"}, "'batches'.*'samples'"),
]


@pytest.mark.parametrize(("option", "message"), REFUSED_OPTIONS)
@on_ranks(2)
def test_options_that_are_refused(option: dict[str, Any], message: str) -> None:
    plan = every(table_wise(rank=0, compute_kernel="fused"))
    params = {**torchrec_freq.fused_params(lr=LR), **option}
    with pytest.raises(ValueError, match=message):
        shard(make_collection(TABLES), plan, EmbeddingBagCollectionSharder(params), {})
    with pytest.raises(ValueError, match=message):  # beside a class named by parameter
        collection = make_collection(TABLES)
        apply_optimizer_in_backward(FrequencySGD, collection.parameters(), {"lr": LR})
        shard(collection, plan, EmbeddingBagCollectionSharder(option), {})


@pytest.mark.skipif(not torch.cuda.is_available(), reason="FBGEMM's CPU kernels ignore the options")
@pytest.mark.parametrize(
    "option", [{"weight_decay": 0.1}, {"gradient_clipping": True, "max_gradient": 1e-3}]
)
@on_ranks(1)
def test_options_that_a_gpu_honours(option: dict[str, Any]) -> None:
    """With prior_count=0, as with row-wise Adagrad."""
    nccl, trained = dist.new_group(backend="nccl"), []
    ours = (FrequencySGD, {**option, "prior_count": 0})
    for optimizer, given in (ours, (RowWiseAdagrad, option), (RowWiseAdagrad, {})):
        torch.manual_seed(0)
        collection = make_collection(TABLES)
        weights = {t.name: collection.embedding_bags[t.name].weight.detach() for t in TABLES}
        apply_optimizer_in_backward(optimizer, collection.parameters(), {"lr": LR})
        plan = every(table_wise(rank=0, compute_kernel="fused"))
        sharder = EmbeddingBagCollectionSharder(given)
        model = shard(collection, plan, sharder, weights, group=nccl, device="cuda")
        rng = random.Random(0)
        for _ in range(3):
            kjt = to_kjt(make_batch(rng, TABLES, 4)).to(torch.device("cuda"))
            sample_loss(model(kjt).to_dict()).mean().backward()
        parts = [value.local_shards()[0].tensor.cpu() for value in model.state_dict().values()]
        trained.append(torch.cat([part.flatten() for part in parts]))
    assert torch.equal(trained[0], trained[1]) and not torch.equal(trained[1], trained[2])
