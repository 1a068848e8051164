"""Every sharding plan trains like one process that sees the whole batch."""

from __future__ import annotations

import math
import random
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
    shard,
    to_kjt,
)
from plans import EIGHT_TABLES, FOUR_RANKS, TWO_RANKS, make_plan
from ranks import on_ranks, run_on_ranks
from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer_in_backward
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.modules.embedding_configs import DataType

import torchrec_freq
from torchrec_freq import FrequencySGD

RULES: dict[str, dict[str, Any]] = {
    "full": {},
    "prior 1": {"prior_count": 1, "eps": 1e-3},
    "row-wise Adagrad": {"prior_count": 0},
    "frequency alone": {"prior_count": math.inf},
    "admit": {"admit": 4},
    "paper": {"normalize": None},
    "paper from 3": {"normalize": None, "min_count": 3},
    "half-life": {"half_life": 3},
}


def train(
    kind: str,
    ranks: int,
    rule: str = "full",
    weighted: bool = False,
    mean: bool = False,
    by_sharder: bool = False,
    tables: list[TableSpec] = TABLES,
) -> None:
    # TorchRec cuts grid shards 128 columns wide.
    tables = [
        TableSpec(t.name, t.rows, 256 if kind == "grid_shard" else t.columns, t.features, mean)
        for t in tables
    ]
    pair = Pair(
        tables,
        make_plan(kind, tables, ranks),
        RULES[rule],
        weighted=weighted,
        by_sharder=by_sharder,
    )
    pair.check()
    for step in range(7):
        # In step 2 a feature of a shared table has no id anywhere, in step 4 a whole table.
        loss, expected = pair.step(skip={2: "f1", 4: "f0"}.get(step))
        assert loss == pytest.approx(expected, rel=1e-6, abs=1e-6)
        pair.check()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("kind", TWO_RANKS)
@on_ranks(2)
def test_rule_under_every_plan(kind: str, rule: str) -> None:
    train(kind, 2, rule)


@pytest.mark.parametrize("kind", [*TWO_RANKS, "mixed"])
@on_ranks(2)
def test_features_that_the_loss_leaves_out(kind: str) -> None:
    """In turn: one of two of a table, a table, none. They count all the same, under every plan."""
    pair = Pair(TABLES, make_plan(kind, TABLES, 2), {"half_life": 2})
    for unused in ("f1", "f0", None, "f3", "f2", "f1", None):
        pair.step(unused=unused)
        pair.check()


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("mean", [False, True], ids=["sum", "mean"])
@pytest.mark.parametrize("kind", TWO_RANKS)
@pytest.mark.parametrize("ranks", [1, 2])
def test_pooling_and_weights(ranks: int, kind: str, mean: bool, weighted: bool) -> None:
    if kind == "row_wise" and mean and weighted:
        pytest.skip("TorchRec's row-wise shards divide by the sum of the weights, others by length")
    arguments = {"kind": kind, "ranks": ranks, "mean": mean, "weighted": weighted}
    run_on_ranks(ranks, train, arguments)


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("kind", [*TWO_RANKS, *FOUR_RANKS])
@on_ranks(4, hosts=2)
def test_two_hosts(kind: str, weighted: bool) -> None:
    train(kind, 4, weighted=weighted)


@pytest.mark.parametrize("kind", ["table_row_wise", "table_column_wise"])
@on_ranks(4, hosts=2)
def test_mean_pooling_on_two_hosts(kind: str) -> None:
    # TorchRec's own mean pooling is wrong under grid sharding.
    train(kind, 4, mean=True)


@pytest.mark.parametrize("rule", RULES)
@on_ranks(2)
def test_mixed_plan(rule: str) -> None:
    train("mixed", 2, rule, tables=EIGHT_TABLES)


@on_ranks(4, hosts=2)
def test_mixed_plan_on_two_hosts() -> None:
    train("mixed", 4, tables=EIGHT_TABLES)


@on_ranks(4, hosts=2)
def test_shards_of_one_row_and_of_none() -> None:
    # FBGEMM on CPU needs a row in some table of each rank.
    rows = {"a": 1, "b": 2, "c": 3, "d": 20}
    tables = [TableSpec(name, n, 16, [f"x_{name}"]) for name, n in rows.items()]
    train("row_wise", 4, tables=tables)


@on_ranks(2)
def test_opt_in_by_sharder() -> None:
    train("mixed", 2, by_sharder=True)


@on_ranks(2)
def test_half_precision_of_small_gradients() -> None:
    """Rates beyond what float16 holds, in data-parallel tables as in sharded ones."""
    trained = []
    for kind, dtype in (("data_parallel", DataType.FP16), ("row_wise", DataType.FP32)):
        torch.manual_seed(0)
        collection = make_collection(TABLES, dtype=dtype)
        start = {t.name: collection.embedding_bags[t.name].weight.detach() for t in TABLES}
        options = {"lr": LR}
        apply_optimizer_in_backward(FrequencySGD, collection.parameters(), options)
        plan = make_plan(kind, TABLES, 2)
        model = shard(collection, plan, EmbeddingBagCollectionSharder(), start)
        rng = random.Random(dist.get_rank())
        for _ in range(3):
            outputs = model(to_kjt(make_batch(rng, TABLES, 4))).to_dict()
            # Gradients of some 1e-5, so a rate of some 1e5 times lr; rounded to float16 in both.
            (2e-4 * sample_loss({k: v.half().float() for k, v in outputs.items()}).sum()).backward()
        trained.append(full_weights(model))
    for t in TABLES:
        half, full = (weights[t.name].float() for weights in trained)
        assert (full - start[t.name]).abs().max() > 0.02
        # A step is at most lr. float16 keeps a gradient to 3e-8, so of rows whose gradient is 1e-6,
        # the least here, a step is off by 3 % of that, and three steps by 3e-3.
        torch.testing.assert_close(half, full, rtol=0, atol=3e-3)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("kind", TWO_RANKS)
@on_ranks(2)
def test_two_gpus(kind: str) -> None:
    """As on the CPU, with NCCL."""
    rank = dist.get_rank()
    torch.cuda.set_device(rank)
    nccl = dist.new_group(backend="nccl")
    trained = []
    for device, group in (("cpu", None), ("cuda", nccl)):
        torch.manual_seed(0)
        collection = make_collection(TABLES)
        start = {t.name: collection.embedding_bags[t.name].weight.detach() for t in TABLES}
        options = {"lr": LR, "half_life": 3}
        apply_optimizer_in_backward(FrequencySGD, collection.parameters(), options)
        sharder = EmbeddingBagCollectionSharder()
        plan = make_plan(kind, TABLES, 2)
        model = shard(collection, plan, sharder, start, group=group, device=device)
        rng = random.Random(0)
        for _ in range(5):
            kjt = to_kjt(make_batch(rng, TABLES, 6), slice(3 * rank, 3 * rank + 3))
            sample_loss(model(kjt.to(torch.device(device))).to_dict()).mean().backward()
        counts = torchrec_freq.row_counts(model)
        local = [
            part.tensor.cpu()
            for value in model.state_dict().values()
            for part in (value.local_shards() if hasattr(value, "local_shards") else [])
        ]
        trained.append((counts, local))
    (cpu_counts, cpu_weights), (gpu_counts, gpu_weights) = trained
    for name in cpu_counts:
        assert torch.equal(cpu_counts[name], gpu_counts[name])
    for a, b in zip(cpu_weights, gpu_weights, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
