"""The numbers while training, against brute force on whole tables; who computes and writes when."""

from __future__ import annotations

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
from torch import Tensor, nn
from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer_in_backward
from torch.utils.tensorboard import SummaryWriter
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder

import torchrec_freq
import torchrec_freq.analysis.monitor as monitor_module
from torchrec_freq import COUNT_CEILING, FrequencyConfig, FrequencySGD, TrainingMonitor
from torchrec_freq.analysis.traffic import CountHistogram, bin_counts, sample_bin_counts
from torchrec_freq.sharded.install import frequency_modules

RATES = [0.5, 0.25, 0.125]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"own_weight": 3},
    {"normalize": None, "min_count": 2},
]


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
    """The numbers as they are defined, from whole tables."""
    numbers: dict[str, float] = {}
    ((_, handle),) = frequency_modules(model)
    for i, t in enumerate(tables):
        state = handle.read(t.name)
        counts = np.sort(state.counts.numpy())
        seen = counts[counts > 0]
        table = {"rows_seen": len(seen) / len(counts), "lookups": float(counts.sum())}
        # 1% of a small table is part of its hottest row.
        top = len(counts) / 100
        hottest = counts[::-1][: int(top)].sum() + (top % 1) * counts[::-1][int(top)]
        table["top_1pct_lookups"] = hottest / max(counts.sum(), 1)
        _, squares, total, occurrences = state.totals.tolist()
        options = OPTIONS[i % 3]
        normalized = options.get("normalize", "table") is not None
        if normalized and squares:
            table["scale"] = (squares / occurrences) ** 0.5
        for name, share in {"p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}.items():
            if len(seen) == 0:
                continue
            c = float(np.quantile(seen, share, method="inverted_cdf"))
            table[f"count_{name}"] = c
            if not normalized:
                root = max(c, options["min_count"]) ** 0.5
            elif squares:
                own = (
                    options.get("own_weight", FrequencyConfig().own_weight) * squares / occurrences
                )
                root = ((squares * c / total + own) / 2) ** 0.5
            else:
                continue
            table[f"lr_at_{name}"] = factor * RATES[i % 3] / root
        numbers.update({f"{t.name}/{key}": value for key, value in table.items()})
    return numbers


def check_numbers(kind: str, ranks: int) -> None:
    tables = EIGHT_TABLES if kind == "mixed" else TABLES
    model = make_model(kind, tables, ranks)
    monitor = TrainingMonitor(model, write=lambda step, numbers: None)
    before = monitor.read()
    assert before == brute_force(model, tables)
    assert before == {
        f"{t.name}/{key}": 0.0
        for t in tables
        for key in ("rows_seen", "lookups", "top_1pct_lookups")
    }
    train(model, tables, steps=4)
    numbers = monitor.read()
    assert numbers == pytest.approx(brute_force(model, tables), rel=1e-6)
    assert len(numbers) >= 11 * len(tables)
    everywhere: list[Any] = [None] * ranks
    dist.all_gather_object(everywhere, numbers)
    assert all(other == numbers for other in everywhere)
    # What warm-up does: the rate at which the next step updates.
    optimizer: Any = model.fused_optimizer
    for group in optimizer.param_groups:
        group["lr"] *= 3
    optimizer.step()
    assert monitor.read() == pytest.approx(brute_force(model, tables, 3), rel=1e-6)
    train(model, tables, steps=2, seed=1)
    assert monitor.read() == pytest.approx(brute_force(model, tables, 3), rel=1e-6)


PLANS = ["table_wise", "row_wise", "column_wise", "column_wise on one rank", "data_parallel"]


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("kind", [*PLANS, "mixed"])
def test_numbers_of_every_plan(kind: str, ranks: int) -> None:
    run_on_ranks(ranks, check_numbers, {"kind": kind, "ranks": ranks})


def weights_after(write: bool) -> list[Tensor]:
    model = make_model("row_wise", TABLES, 2)
    monitor = TrainingMonitor(model, every=1, write=lambda step, numbers: None)
    for step in range(4):
        train(model, TABLES, steps=1, seed=step)
        if write:
            monitor.step(step)
    weights: list[Any] = list(model.state_dict().values())
    return [s.tensor.clone() for weight in weights for s in weight.local_shards()]


@on_ranks(2)
def test_training_goes_on_as_without() -> None:
    """Reading the scale early must not change the sums that the next step makes of it."""
    for with_, without in zip(weights_after(True), weights_after(False), strict=True):
        assert torch.equal(with_, without)


@on_ranks(2)
def test_only_rank_0_writes_and_only_when_due() -> None:
    model = make_model("row_wise", TABLES, 2)
    written: list[tuple[int, dict[str, float]]] = []
    write = (lambda *args: written.append(args)) if dist.get_rank() == 0 else None
    monitor = TrainingMonitor(model, every=3, write=write)
    calls = []

    def refuse(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        raise AssertionError("computed or sent between two writes")

    names = ("sample_bin_counts", "named_tables", "learning_rates")
    real = {name: getattr(monitor_module, name) for name in names}
    all_reduce = dist.all_reduce
    for step in range(7):
        train(model, TABLES, steps=1, seed=step)
        if step % 3:
            dist.all_reduce = refuse
            for name in names:
                setattr(monitor_module, name, refuse)
        monitor.step(step)
        dist.all_reduce = all_reduce
        for name, function in real.items():
            setattr(monitor_module, name, function)
    assert not calls
    if dist.get_rank() == 0:
        assert [step for step, _ in written] == [0, 3, 6]
        assert written[-1][1] == monitor.read()
    else:
        assert written == []
        monitor.read()


@on_ranks(2)
def test_tensorboard(folder: str) -> None:
    model = make_model("row_wise", TABLES, 2)
    writer = SummaryWriter(folder) if dist.get_rank() == 0 else None
    monitor = TrainingMonitor(model, every=2, write=writer)
    numbers = []
    for step in range(1, 5):
        train(model, TABLES, steps=1, seed=step)
        monitor.step(step)
        if step % 2 == 0:
            numbers.append(monitor.read())
    if writer is not None:
        writer.close()
        events = EventAccumulator(folder)
        events.Reload()
        assert set(events.Tags()["scalars"]) == set(numbers[-1])
        for name, value in numbers[-1].items():
            scalars = events.Scalars(name)
            assert [s.step for s in scalars] == [2, 4]
            assert scalars[-1].value == pytest.approx(value, rel=1e-6)


@pytest.fixture
def folder(tmp_path: Path) -> str:
    return str(tmp_path)


@on_ranks(1)
def test_refuses_wrong_arguments() -> None:
    model = make_model("table_wise", TABLES, 1)
    for every in (0, -1, 1.5, True, "1"):
        with pytest.raises(ValueError, match="Invalid every value"):
            TrainingMonitor(model, every=every, write=print)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="Invalid max_rows value: 0"):
        TrainingMonitor(model, write=print, max_rows=0)
    for write in (None, "runs"):
        with pytest.raises(ValueError, match="Invalid write value.*SummaryWriter"):
            TrainingMonitor(model, write=write)
    with pytest.raises(ValueError, match="No table of this model"):
        TrainingMonitor(nn.Linear(1, 1), write=print)


@on_ranks(1)
def test_loaded_counts_before_a_gradient() -> None:
    model = make_model("table_wise", TABLES, 1)
    counts = {t.name: torch.zeros(t.rows, dtype=torch.int64) for t in TABLES}
    counts["a"][3] = COUNT_CEILING
    counts["c"][:3] = torch.tensor([4, 9, 16])
    torchrec_freq.load_row_counts(model, counts)
    numbers = TrainingMonitor(model, write=print).read()
    assert numbers["a/count_max"] == COUNT_CEILING
    # Without a gradient there is no scale, and so no rate, but for the table that needs none.
    assert "a/lr_at_max" not in numbers and "a/scale" not in numbers
    assert numbers["c/lr_at_max"] == pytest.approx(RATES[2] / 4, rel=1e-6)


def exact(counts: Tensor) -> CountHistogram:
    return CountHistogram.of_bins(bin_counts(counts))


def sampled(counts: Tensor, max_rows: int) -> CountHistogram:
    return CountHistogram.of_bins(sample_bin_counts(counts, max_rows))


def zipf_counts(rows: int, exponent: float, largest: float) -> Tensor:
    return torch.floor(largest / torch.arange(1, rows + 1, dtype=torch.float64) ** exponent).int()


@pytest.mark.parametrize("order", ["sorted", "shuffled"])
@pytest.mark.parametrize("exponent", [0.0, 0.6, 1.1, 2.0])
def test_a_sample_is_within_its_stated_error(exponent: float, order: str) -> None:
    rows, max_rows = 300_000, 10_000
    counts = zipf_counts(rows, exponent, 1e7)
    if order == "shuffled":
        counts = counts[torch.randperm(rows, generator=torch.Generator().manual_seed(1))]
    whole, part = exact(counts), sampled(counts, max_rows)
    assert part.rows == pytest.approx(rows, rel=1e-12)
    of_rows, of_lookups = 0.5 / max_rows**0.5, rows**0.5 / max_rows
    # Three standard errors.
    assert part.rows_seen / rows == pytest.approx(whole.rows_seen / rows, abs=3 * of_rows)
    assert part.lookups == pytest.approx(whole.lookups, rel=3 * of_lookups)
    for share in (0.0001, 0.01, 0.5):
        top = part.top_share(share * rows)
        assert top == pytest.approx(whole.top_share(share * rows), abs=3 * of_lookups)
    assert part.quantile(1.0) == whole.quantile(1.0)  # the hottest row is never left out


def test_a_sample_leaves_the_random_state_alone_and_is_always_the_same() -> None:
    counts = zipf_counts(10_000, 1.0, 1e5)
    torch.manual_seed(3)
    first = torch.rand(1)
    torch.manual_seed(3)
    once = sample_bin_counts(counts, 100)
    assert torch.equal(torch.rand(1), first)
    assert torch.equal(sample_bin_counts(counts, 100), once)


@pytest.mark.parametrize("rows", [0, 1, 2, 1000])
def test_a_sample_of_odd_tables(rows: int) -> None:
    for counts in (
        torch.zeros(rows, dtype=torch.int32),
        torch.full((rows,), COUNT_CEILING, dtype=torch.int32),
        torch.full((rows,), 2**31 - 1, dtype=torch.int32),
    ):
        for max_rows in (1, 7, 5000):
            part, whole = sampled(counts, max_rows), exact(counts)
            assert (part.rows, part.rows_seen) == pytest.approx((rows, whole.rows_seen))
            assert part.lookups == pytest.approx(whole.lookups)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_bins_on_a_gpu() -> None:
    counts = zipf_counts(100_000, 1.0, 1e9)
    on_gpu = counts.cuda()  # waits
    torch.cuda.set_sync_debug_mode("error")
    try:
        bins = bin_counts(on_gpu)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(bins.cpu(), bin_counts(counts))
    assert sampled(on_gpu, 1000).lookups == pytest.approx(
        exact(counts).lookups, rel=3 * 100_000**0.5 / 1000
    )


@pytest.mark.parametrize("seed", range(5))
def test_quantiles_and_shares_are_exact_below_128(seed: int) -> None:
    counts = np.random.default_rng(seed).integers(0, 127, 50 + seed)
    histogram = exact(torch.from_numpy(counts))
    seen, hottest = counts[counts > 0], np.sort(counts)[::-1]
    for share in (0.001, 0.25, 0.5, 0.9, 0.99, 1.0):
        expected = np.quantile(seen, share, method="inverted_cdf")
        assert histogram.quantile(share) == expected
    for rows in range(len(counts) + 1):
        assert histogram.top_share(rows) == pytest.approx(hottest[:rows].sum() / counts.sum())
