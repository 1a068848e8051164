"""Cache and load figures from counts, against brute-force simulations of what they predict."""

from __future__ import annotations

import copy
import pickle
import random
from collections import Counter, OrderedDict

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from torchrec_freq import COUNT_CEILING
from torchrec_freq.analysis.cache import MeasuredCacheStatistics
from torchrec_freq.analysis.traffic import BLOCKS, CountHistogram, TableTraffic, bin_of


def zipf(rows: int, exponent: float, lookups: int, seed: int = 0) -> NDArray[np.int64]:
    """Ids drawn from a Zipf distribution over rows in random order."""
    rng = np.random.default_rng(seed)
    p = 1 / np.arange(1, rows + 1) ** exponent
    return rng.choice(rng.permutation(rows), lookups, p=p / p.sum())


def histogram_of(ids: NDArray[np.int64], rows: int) -> CountHistogram:
    return TableTraffic.of(torch.from_numpy(np.bincount(ids, minlength=rows))).histogram


Batches = list[dict[int, int]]  # occurrences of each distinct row


def in_batches(ids: NDArray[np.int64], size: int) -> Batches:
    values = ids.tolist()
    return [Counter(values[i : i + size]) for i in range(0, len(values) - size + 1, size)]


def simulate(batches: Batches, capacity: int) -> float:
    """Miss rate over the second half of the batches, in a cache that works as FBGEMM's does.

    A batch asks once for each distinct row. What it misses is inserted in random order, in place of
    the least recently used row that the batch does not have. Of equally old rows any may go.
    """
    rng = random.Random(1)
    asked = missed = 0
    cached: OrderedDict[int, int] = OrderedDict()  # row -> batch that had it last, oldest first
    for step, batch in enumerate(batches):
        misses = [row for row in batch if row not in cached]
        if step >= len(batches) // 2:
            asked += len(batch)
            missed += len(misses)
        for row in batch.keys() - misses:
            cached[row] = step
            cached.move_to_end(row)
        rng.shuffle(misses)
        for row in misses:
            if len(cached) == capacity:
                oldest = next(iter(cached))
                if cached[oldest] == step:
                    break
                del cached[oldest]
            cached[row] = step
        if len(batch) > 1:
            touched = [row for row in batch if row in cached]
            rng.shuffle(touched)
            for row in touched:
                cached.move_to_end(row)
    return missed / asked


@pytest.mark.parametrize("exponent", [0.7, 1.3])
# The first of these batches is the textbook cache, the last has more rows than most caches.
@pytest.mark.parametrize(("batch", "batches"), [(1, 40_000), (32, 2_000), (1024, 100)])
def test_miss_rate_on_zipf(batch: int, batches: int, exponent: float) -> None:
    rows = 500
    ids = zipf(rows, exponent, batch * batches)
    histogram = histogram_of(ids, rows)
    for load_factor in (0.02, 0.1, 0.5):
        capacity = int(load_factor * rows)
        simulated = simulate(in_batches(ids, batch), capacity)
        got = histogram.miss_rate(capacity, batch)
        assert got == pytest.approx(simulated, abs=0.02), load_factor


def test_bursts_are_cached_better_than_expected() -> None:
    """The bad case of the model: users come in sessions, so they rarely miss."""
    ids = np.repeat(zipf(1000, 0.7, 1000), 100)
    expected = histogram_of(ids, 1000).miss_rate(50, 64)
    assert expected > 0.8 > 2 * simulate(in_batches(ids, 64), 50)


@pytest.mark.parametrize("batch", [1, 100, 10_000])
def test_expected_distinct_rows(batch: int) -> None:
    ids = zipf(3000, 1.0, max(100 * batch, 100_000))
    simulated = np.mean([len(np.unique(part)) for part in ids.reshape(-1, batch)[:2000]])
    got = histogram_of(ids, 3000).expected_distinct(batch)
    assert got == pytest.approx(simulated, rel=0.01)


@pytest.mark.parametrize("seed", range(3))
def test_quantiles_and_shares_are_exact_below_128(seed: int) -> None:
    counts = np.random.default_rng(seed).integers(0, 127, 50 + seed)
    histogram = TableTraffic.of(torch.from_numpy(counts)).histogram
    seen, hottest = counts[counts > 0], np.sort(counts)[::-1]
    for share in (0.001, 0.25, 0.5, 0.9, 0.99, 1.0):
        assert histogram.quantile(share) == np.quantile(seen, share, method="inverted_cdf")
    for rows in range(len(counts) + 1):
        assert histogram.top_share(rows) == pytest.approx(hottest[:rows].sum() / counts.sum())


def test_bins_are_narrow() -> None:
    small = torch.arange(128)
    assert len(bin_of(small).unique()) == 128  # exact below
    edges = np.unique(np.floor(np.geomspace(128, COUNT_CEILING, 20_000)))
    bins = bin_of(torch.from_numpy(edges).to(torch.int32)).numpy()
    assert (np.diff(bins) >= 0).all() and bins[0] > bin_of(small).max()
    for number in np.unique(bins):
        inside = edges[bins == number]
        assert inside.max() / inside.min() <= 1 + 1 / 64


@pytest.mark.parametrize("rows", [1, 7, 1000, 3 * BLOCKS + 5])
def test_shares_of_shards_whatever_the_parts(rows: int) -> None:
    counts = torch.from_numpy(np.floor(1e6 / (np.arange(rows) + 1)).astype(np.int64))
    traffic, whole = TableTraffic(rows), TableTraffic.of(counts)
    for first, part in ((0, counts[: rows // 3]), (rows // 3, counts[rows // 3 :])):
        traffic.add(first, part)
    assert np.array_equal(traffic.histogram.lookups_B, whole.histogram.lookups_B)
    for ranks in (1, 3, 8):
        block = -(-rows // ranks)
        shards = [(min(r * block, rows), min((r + 1) * block, rows)) for r in range(ranks)]
        shares = [traffic.share(first, last) for first, last in shards]
        exact = [float(counts[first:last].sum()) / float(counts.sum()) for first, last in shards]
        # Above BLOCKS rows a shard ends within a block of four.
        assert shares == pytest.approx(exact, abs=1e-12 if rows <= BLOCKS else 1e-5)


def test_tables_at_the_edge() -> None:
    for dtype in (torch.uint8, torch.int16, torch.int32, torch.float64):
        traffic = TableTraffic.of(torch.tensor([0, 1, 100, 7, 100]).to(dtype))
        assert traffic.histogram.rows_B.tolist() == [1, 1, 1, 2]
        assert traffic.share(2, 4) == 107 / 208
    for rows in (0, 10):
        unused = TableTraffic.of(torch.zeros(rows, dtype=torch.int32))
        assert unused.histogram.expected_distinct(100) == unused.histogram.miss_rate(1, 100) == 0
        assert unused.share(0, rows // 2) == rows / 20
    one = TableTraffic.of(torch.tensor([0, COUNT_CEILING, 0])).histogram
    assert one.expected_distinct(5) == 1 and one.miss_rate(1, 5) == 0
    # Both rows are in every batch, and the cache has room for one.
    two = TableTraffic.of(torch.tensor([COUNT_CEILING, 0, COUNT_CEILING])).histogram
    assert two.miss_rate(1, 1000) == pytest.approx(0.5)


@pytest.mark.parametrize("counts", [[-1], [COUNT_CEILING + 1], [0.5], [float("nan")], [[1]]])
def test_refuses_what_cannot_be_counts(counts: list[object]) -> None:
    with pytest.raises(ValueError, match="'hot'"):
        TableTraffic.of(torch.tensor(counts), "hot")


def test_cache_statistics_are_what_the_planner_expects() -> None:
    ids = zipf(2000, 1.05, 400_000)
    statistics = MeasuredCacheStatistics(histogram_of(ids, 2000), 256)
    misses = np.array([statistics.expected_miss_rate(x) for x in np.linspace(0, 1, 501)])
    assert misses[0] == 1 and misses[-1] == 0 and (np.diff(misses) <= 1e-9).all()
    area = float(((misses[1:] + misses[:-1]) / 2).sum() / 500)
    assert statistics.cacheability == pytest.approx(area, abs=2e-3)
    p = np.bincount(ids, minlength=2000) / len(ids)
    assert statistics.expected_lookups == pytest.approx(-np.expm1(256 * np.log1p(-p)).sum())
    # Planner and checkpoints of plans copy them: their size must not follow the table's.
    assert copy.deepcopy(statistics) is statistics
    assert len(pickle.dumps(statistics)) < 1 << 16
