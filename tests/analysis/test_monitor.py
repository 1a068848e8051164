"""The numbers while training, against brute force on whole tables; who computes and writes when."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from models import TABLES, TableSpec, make_batch, make_collection, sample_loss, shard, to_kjt
from plans import EIGHT_TABLES, make_plan
from ranks import on_ranks, run_on_ranks
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer_in_backward
from torch.utils.tensorboard import SummaryWriter
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder

import torchrec_freq
from torchrec_freq import FrequencyConfig, FrequencySGD, TrainingMonitor
from torchrec_freq.analysis.rates import learning_rates
from torchrec_freq.rule import row_multiplier

RATES = [0.5, 0.25, 0.125]
OPTIONS: list[dict[str, Any]] = [{}, {"prior_count": 3.0}, {"normalize": None, "min_count": 2}]


def make_model(kind: str, tables: list[TableSpec], ranks: int) -> nn.Module:
    """Tables whose lr and options differ from one to the next."""
    torch.manual_seed(0)
    collection = make_collection(tables)
    for i, t in enumerate(tables):
        options = {"lr": RATES[i % 3], **OPTIONS[i % 3]}
        weight = collection.embedding_bags[t.name].parameters()
        apply_optimizer_in_backward(FrequencySGD, weight, options)
    plan = make_plan(kind, tables, ranks)
    model: nn.Module = shard(collection, plan, EmbeddingBagCollectionSharder(), {})
    return model


def train(model: nn.Module, tables: list[TableSpec], steps: int, seed: int = 0) -> None:
    rng = random.Random(seed)
    for _ in range(steps):
        # Each rank has a batch of its own.
        features = make_batch(rng, tables, 3 * dist.get_world_size())
        rows = slice(dist.get_rank() * 3, dist.get_rank() * 3 + 3)
        sample_loss(model(to_kjt(features, rows)).to_dict()).mean().backward()


def brute_force(model: nn.Module, tables: list[TableSpec], factor: float = 1) -> dict[str, float]:
    """The numbers as they are defined, row by row, from whole tables."""
    numbers: dict[str, float] = {}
    for (name, state), i in zip(torchrec_freq.table_states(model).items(), range(9), strict=False):
        counts, options = state.counts.numpy(), OPTIONS[i % 3]
        seen, hottest = counts[counts > 0], np.sort(counts)[::-1]
        table = {"rows_seen": len(seen) / len(counts), "lookups": float(counts.sum())}
        # 1% of a small table is part of its hottest row.
        top = len(counts) / 100
        hot = hottest[: int(top)].sum() + (top % 1) * hottest[int(top)]
        table["top_1pct_lookups"] = hot / max(counts.sum(), 1)
        _, squares, occurrences, _ = state.totals.tolist()
        if squares:
            table["scale"] = (squares / occurrences) ** 0.5
        prior = options.get("prior_count", FrequencyConfig().prior_count)
        for quantile, share in {"p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}.items():
            if len(seen) == 0:
                continue
            c = table[f"count_{quantile}"] = float(np.quantile(seen, share, method="inverted_cdf"))
            roots = [max(c, 2) ** 0.5] if "normalize" in options else []
            for own in state.sums[counts == c].flatten().tolist() if squares else []:
                b = prior / (c + prior)
                roots.append(((1 - b) * own + b * squares / occurrences * (c + 1)) ** 0.5)
            if roots:
                logs = np.log(factor * RATES[i % 3] / np.array(roots))
                table[f"lr_at_{quantile}"] = math.exp(logs.mean())
                table[f"lr_spread_at_{quantile}"] = math.exp(logs.std())
        numbers.update({f"{name}/{key}": value for key, value in table.items()})
    return numbers


def check_numbers(kind: str, ranks: int) -> None:
    tables = EIGHT_TABLES if kind == "mixed" else TABLES
    model = make_model(kind, tables, ranks)
    monitor = TrainingMonitor(model, write=lambda step, numbers: None)
    assert monitor.read() == {
        f"{t.name}/{key}": 0.0
        for t in tables
        for key in ("rows_seen", "lookups", "top_1pct_lookups")
    }
    train(model, tables, steps=4)
    numbers = monitor.read()
    assert numbers == pytest.approx(brute_force(model, tables), rel=1e-4)
    assert len(numbers) >= 15 * len(tables)
    assert any(value > 1.01 for key, value in numbers.items() if "lr_spread" in key)
    everywhere: list[Any] = [None] * ranks
    dist.all_gather_object(everywhere, numbers)
    assert all(other == numbers for other in everywhere)
    # What warm-up does: the rate at which the next step updates.
    optimizer: Any = model.fused_optimizer
    for group in optimizer.param_groups:
        group["lr"] *= 3
    optimizer.step()
    train(model, tables, steps=2, seed=1)
    assert monitor.read() == pytest.approx(brute_force(model, tables, 3), rel=1e-4)


PLANS = ["table_wise", "row_wise", "column_wise on one rank", "data_parallel", "mixed"]


@pytest.mark.parametrize(("kind", "ranks"), [("mixed", 1), *((kind, 2) for kind in PLANS)])
def test_numbers_of_every_plan(kind: str, ranks: int) -> None:
    run_on_ranks(ranks, check_numbers, {"kind": kind, "ranks": ranks})


@on_ranks(2)
def test_only_rank_0_writes_and_only_when_due(tmp_path: Path) -> None:
    model, first = make_model("row_wise", TABLES, 2), dist.get_rank() == 0
    written: list[tuple[int, dict[str, float]]] = []
    monitor = TrainingMonitor(
        model, every=3, write=(lambda *args: written.append(args)) if first else None
    )
    writer = SummaryWriter(str(tmp_path)) if first else None
    board = TrainingMonitor(model, every=3, write=writer)
    all_reduce = dist.all_reduce

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("sent between two writes")

    for step in range(7):
        train(model, TABLES, steps=1, seed=step)
        dist.all_reduce = refuse if step % 3 else all_reduce
        monitor.step(step)
        board.step(step)
        dist.all_reduce = all_reduce
    numbers = monitor.read()
    assert [step for step, _ in written] == ([0, 3, 6] if first else [])
    if writer is not None:
        assert written[-1][1] == numbers
        writer.close()
        events = EventAccumulator(str(tmp_path))
        events.Reload()
        assert set(events.Tags()["scalars"]) == set(numbers)
        for name, value in numbers.items():
            scalars = events.Scalars(name)
            assert [s.step for s in scalars][-2:] == [3, 6]
            assert scalars[-1].value == pytest.approx(value, rel=1e-6)


@on_ranks(1)
def test_refuses_wrong_arguments() -> None:
    model = make_model("table_wise", TABLES, 1)
    for every in (0, -1, 1.5, True, "1"):
        with pytest.raises(ValueError, match="Invalid every value"):
            TrainingMonitor(model, every=every, write=print)  # type: ignore[arg-type]
    for write in (None, "runs"):
        with pytest.raises(ValueError, match="Invalid write value.*SummaryWriter"):
            TrainingMonitor(model, write=write)
    with pytest.raises(ValueError, match="No table of this model"):
        TrainingMonitor(nn.Linear(1, 1), write=print)


def test_learning_rates() -> None:
    counts, sums = torch.tensor([0, 1, 9, 9]), torch.tensor([0.0, 0.5, 0.0, 4.0])
    totals = torch.tensor([3.0, 2.0, 8.0, 5.0], dtype=torch.float64)
    config = FrequencyConfig(prior_count=1, admit=2)
    squares = torch.tensor([0.25, (0.5 + 0.25 * 2) / 2, 0.1 * 0.25 * 10, 0.9 * 4 + 0.25])
    expected = 0.1 / (squares.sqrt() + config.eps)
    expected[0] = 0  # its next occurrence is the first
    assert torch.allclose(learning_rates(config, counts, sums, totals, 0.1), expected)
    assert learning_rates(config, counts, None, totals)[1:].isnan().all()
    adagrad = learning_rates(FrequencyConfig(prior_count=0), counts, sums, totals * 0)
    assert adagrad[[1, 3]].tolist() == pytest.approx([2**0.5, 0.5])
    assert adagrad[[0, 2]].isnan().all()
    paper = FrequencyConfig(normalize=None, min_count=4)
    assert torch.equal(learning_rates(paper, counts), row_multiplier(paper, counts))
