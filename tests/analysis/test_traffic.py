"""Cache and load figures from counts, against brute-force simulations of what they predict."""

from __future__ import annotations

import copy
import heapq
import pickle
import random
from collections import Counter, OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_common import CacheAlgorithm
from numpy.typing import NDArray

from benchmarks.common import movielens
from torchrec_freq import COUNT_CEILING
from torchrec_freq.analysis.traffic import BLOCKS, Policy, TableTraffic, _bin_of
from torchrec_freq.planner import cache_statistics

MOVIELENS = Path(__file__).resolve().parents[2] / ".data" / "ml-100k"
LOAD_FACTORS = (0.01, 0.05, 0.2, 0.5)


def zipf(rows: int, exponent: float, lookups: int, seed: int = 0) -> NDArray[np.int64]:
    """Ids drawn from a Zipf distribution over rows in random order."""
    rng = np.random.default_rng(seed)
    p = 1 / np.arange(1, rows + 1) ** exponent
    return rng.choice(rng.permutation(rows), lookups, p=p / p.sum())


def count(ids: NDArray[np.int64], rows: int) -> torch.Tensor:
    return torch.from_numpy(np.bincount(ids, minlength=rows))


Batches = list[dict[int, int]]  # occurrences of each distinct row


def in_batches(ids: NDArray[np.int64], size: int) -> Batches:
    values = ids.tolist()
    return [Counter(values[i : i + size]) for i in range(0, len(values) - size + 1, size)]


def simulate(batches: Batches, capacity: int, policy: Policy) -> float:
    """Miss rate over the second half of the batches, in a cache that works as FBGEMM's does.

    A batch asks once for each distinct row. What it misses is inserted in random order, in place of
    the least recently used row that the batch does not have (LRU), or of the least frequent row
    if that is less frequent (LFU). Of equally old rows any may go.
    """
    rng = random.Random(1)
    asked = missed = 0
    cached: OrderedDict[int, int] = OrderedDict()  # row -> batch that had it last, oldest first
    frequency: Counter[int] = Counter()
    least: list[tuple[int, int]] = []  # a heap of the cached rows' frequencies, perhaps outdated
    for step, batch in enumerate(batches):
        misses = [row for row in batch if row not in cached]
        if step >= len(batches) // 2:
            asked += len(batch)
            missed += len(misses)
        frequency.update(batch)
        for row in batch.keys() - misses:
            cached[row] = step
            cached.move_to_end(row)
        rng.shuffle(misses)
        for row in misses:
            if len(cached) == capacity:
                if policy == "lru":
                    out = next(iter(cached))
                    if cached[out] == step:
                        break
                else:
                    while least[0][0] != frequency[least[0][1]]:
                        heapq.heapreplace(least, (frequency[least[0][1]], least[0][1]))
                    out = least[0][1]
                    if frequency[out] >= frequency[row]:
                        continue
                    heapq.heappop(least)
                del cached[out]
            cached[row] = step
            heapq.heappush(least, (frequency[row], row))
        if len(batch) > 1:
            touched = [row for row in batch if row in cached]
            rng.shuffle(touched)
            for row in touched:
                cached.move_to_end(row)
    return missed / asked


def check_miss_rates(ids: NDArray[np.int64], rows: int, batch: int, policy: Policy) -> None:
    histogram = TableTraffic.of(count(ids, rows)).histogram
    batches = in_batches(ids, batch)
    for load_factor in LOAD_FACTORS:
        capacity = max(int(load_factor * rows), 1)
        got = histogram.miss_rate(capacity, batch, policy)
        assert got == pytest.approx(simulate(batches, capacity, policy), abs=0.02), load_factor


@pytest.mark.parametrize("policy", ["lru", "lfu"])
@pytest.mark.parametrize("exponent", [0.7, 1.1, 1.5])
# Of these batches the first is the textbook cache, and the last has more rows than most caches.
@pytest.mark.parametrize(("batch", "batches"), [(1, 100_000), (32, 6_000), (1024, 300)])
def test_miss_rate_on_zipf(batch: int, batches: int, exponent: float, policy: Policy) -> None:
    rows = 500
    ids = zipf(rows, exponent, batch * batches)
    check_miss_rates(ids, rows, batch, policy)


@pytest.fixture(scope="module")
def ratings() -> movielens.MovieLens:
    if not MOVIELENS.exists():
        try:
            movielens.fetch(MOVIELENS)
        except RuntimeError as error:
            pytest.skip(f"MovieLens-100K cannot be downloaded: {error}")
    return movielens.read(MOVIELENS)


@pytest.mark.parametrize("policy", ["lru", "lfu"])
@pytest.mark.parametrize("batch", [1, 64, 1024])
@pytest.mark.parametrize("feature", ["user", "item"])
def test_miss_rate_on_movielens(
    ratings: movielens.MovieLens, feature: str, batch: int, policy: Policy
) -> None:
    rows = ratings.tables[feature]
    column = list(ratings.tables).index(feature)
    generator = torch.Generator().manual_seed(0)
    orders = [torch.randperm(len(ratings.ids), generator=generator) for _ in range(2)]
    epochs = [ratings.ids[order, column] for order in orders]
    ids = torch.cat(epochs).numpy()
    check_miss_rates(ids, rows, batch, policy)


def test_bursts_are_cached_better_than_expected(ratings: movielens.MovieLens) -> None:
    """The bad case of the model: users rate in sessions, so in order of time they rarely miss."""
    column = list(ratings.tables).index("user")
    ids = ratings.ids[:, column]
    in_time = ids[ratings.dense[:, 2].argsort(stable=True)].numpy()
    rows = ratings.tables["user"]
    expected = TableTraffic.of(count(in_time, rows)).histogram.miss_rate(rows // 20, 64)
    assert expected > 0.8
    assert simulate(in_batches(in_time, 64), rows // 20, "lru") < expected / 2


@pytest.mark.parametrize("exponent", [0.5, 1.0, 1.5])
@pytest.mark.parametrize("batch", [1, 100, 10_000])
def test_expected_distinct_rows(batch: int, exponent: float) -> None:
    rows = 3000
    ids = zipf(rows, exponent, max(200 * batch, 100_000))
    simulated = np.mean([len(np.unique(part)) for part in ids.reshape(-1, batch)[:2000]])
    got = TableTraffic.of(count(ids, rows)).histogram.expected_distinct(batch)
    assert got == pytest.approx(simulated, rel=0.01)


def test_histogram_loses_little() -> None:
    rng = np.random.default_rng(0)
    counts = np.floor(2 ** rng.uniform(0, 30, 100_000)).astype(np.int64)
    p = counts / counts.sum()
    histogram = TableTraffic.of(torch.from_numpy(counts)).histogram
    assert histogram.rows == len(counts) and histogram.lookups == counts.sum()
    for batch in (10, 10_000, 10_000_000):
        exact = -np.expm1(batch * np.log1p(-p)).sum()
        assert histogram.expected_distinct(batch) == pytest.approx(exact, rel=1e-4)


def test_bins() -> None:
    small = torch.arange(128)
    assert len(_bin_of(small).unique()) == 128  # exact below
    edges = np.unique(np.floor(np.geomspace(128, COUNT_CEILING, 20_000)))
    bins = _bin_of(torch.from_numpy(edges).to(torch.int32)).numpy()
    assert (np.diff(bins) >= 0).all() and bins[0] > _bin_of(small).max()
    for number in np.unique(bins):
        inside = edges[bins == number]
        assert inside.max() / inside.min() <= 1 + 1 / 64


def test_parts_add_up_to_the_table() -> None:
    counts = count(zipf(1000, 1.1, 50_000), 1000)
    whole = TableTraffic.of(counts)
    parts = [(0, 300), (300, 301), (301, 301), (301, 1000)]
    pieces = [TableTraffic.of(counts[a:b], a, 1000) for a, b in parts]
    total = pieces[0] + pieces[1] + pieces[2] + pieces[3]
    for name in ("rows_B", "lookups_B", "lookups_K"):
        np.testing.assert_array_equal(getattr(total, name), getattr(whole, name))
    with pytest.raises(ValueError, match="1000 and 999 rows"):
        whole + TableTraffic.of(counts[:999])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.float64])
def test_counts_of_every_type(dtype: torch.dtype) -> None:
    counts = torch.tensor([0, 1, 100, 7, 100])
    traffic, expected = TableTraffic.of(counts.to(dtype)), TableTraffic.of(counts)
    assert traffic.histogram.rows_B.tolist() == [1, 1, 1, 2]
    assert np.array_equal(traffic.lookups_B, expected.lookups_B)
    assert traffic.share(2, 4) == 107 / 208


@pytest.mark.parametrize("rows", [1, 7, 1000, 3 * BLOCKS + 5])
def test_shares_of_shards(rows: int) -> None:
    counts = torch.from_numpy(np.floor(1e6 / (np.arange(rows) + 1)).astype(np.int64))
    traffic = TableTraffic.of(counts)
    for ranks in (1, 3, 8):
        block = -(-rows // ranks)
        shards = [(min(r * block, rows), min((r + 1) * block, rows)) for r in range(ranks)]
        shares = [traffic.share(first, last) for first, last in shards]
        exact = [float(counts[first:last].sum()) / float(counts.sum()) for first, last in shards]
        assert sum(shares) == pytest.approx(1)
        # Above BLOCKS rows a shard ends within a block of four.
        assert shares == pytest.approx(exact, abs=1e-12 if rows <= BLOCKS else 1e-5)


def test_tables_at_the_edge() -> None:
    unused = TableTraffic.of(torch.zeros(10, dtype=torch.int32))
    assert unused.histogram.expected_distinct(100) == 0
    assert unused.histogram.miss_rate(1, 100) == 0
    assert unused.share(0, 5) == 0.5
    empty = TableTraffic.of(torch.zeros(0, dtype=torch.int64))
    assert empty.histogram.expected_distinct(100) == 0 and empty.share(0, 0) == 0
    for policy in ("lru", "lfu"):
        one = TableTraffic.of(torch.tensor([0, COUNT_CEILING, 0])).histogram
        assert one.expected_distinct(5) == 1
        assert one.miss_rate(1, 5, policy) == 0
        # Both rows are in every batch, and the cache has room for one.
        two = TableTraffic.of(torch.tensor([COUNT_CEILING, 0, COUNT_CEILING])).histogram
        assert two.miss_rate(1, 1000, policy) == pytest.approx(0.5)


@pytest.mark.parametrize("counts", [[-1], [COUNT_CEILING + 1], [0.5], [float("nan")], [[1]]])
def test_refuses_what_cannot_be_counts(counts: list[object]) -> None:
    with pytest.raises(ValueError, match="'hot'"):
        TableTraffic.of(torch.tensor(counts), table="hot")
    with pytest.raises(ValueError, match="rows 3 to 4 lie outside its 4 rows"):
        TableTraffic.of(torch.tensor([1, 1]), first=3, rows=4)


@pytest.mark.parametrize("algorithm", list(CacheAlgorithm))
def test_cache_statistics_are_what_the_planner_expects(algorithm: CacheAlgorithm) -> None:
    counts = count(zipf(2000, 1.05, 400_000), 2000)
    statistics = cache_statistics(counts, 256, algorithm)
    load_factors = np.linspace(0, 1, 501)
    misses = np.array([statistics.expected_miss_rate(x) for x in load_factors])
    assert misses[0] == 1 and misses[-1] == 0
    assert (np.diff(misses) <= 1e-9).all()
    area = float(((misses[1:] + misses[:-1]) / 2).sum() / 500)
    assert statistics.cacheability == pytest.approx(area, abs=2e-3)
    assert statistics.expected_lookups == pytest.approx(
        float(-torch.expm1(256 * torch.log1p(-counts.double() / counts.sum())).sum()), rel=1e-4
    )
    assert copy.deepcopy(statistics) is statistics
    again = pickle.loads(pickle.dumps(statistics))
    assert again.expected_miss_rate(0.1) == statistics.expected_miss_rate(0.1)
    with pytest.raises(ValueError, match="Invalid batch_lookups value: 0"):
        cache_statistics(counts, 0)


def test_harder_to_cache_is_less_cacheable() -> None:
    areas = [
        cache_statistics(count(zipf(2000, exponent, 200_000), 2000), 256).cacheability
        for exponent in (1.5, 1.0, 0.0)
    ]
    assert areas == sorted(set(areas))


def test_statistics_are_compact() -> None:
    """Planner and checkpoints of plans copy them: their size must not follow the table's."""
    counts = (2 ** torch.empty(2_000_000).uniform_(0, 30)).int()
    assert len(pickle.dumps(cache_statistics(counts, 1000))) < 1 << 16
