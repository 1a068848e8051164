"""How a table's lookups spread over its rows: what the counts say, in a few kilobytes.

Everything here treats lookups as independent draws from the counts: row ``i`` with probability
``p_i = c_i / sum(c)``. Ids that come in bursts (a user's sessions) are cached better than that.
Subscripts: ``_R`` rows, ``_B`` bins of rows with about equal counts, ``_K`` blocks of rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from torchrec_freq.counts.state import COUNT_CEILING, check_counts

Policy = Literal["lru", "lfu"]

BLOCKS: Final = 1 << 16
"""Parts of a table's rows, at most, whose lookups are known: a shard begins at one, nearly."""

# A float32 has 23 bits behind its leading one. With 6 of them a bin is at most 1.6% wide, and every
# count below 128 has its own.
_DROPPED_BITS: Final = 23 - 6
_BIN_OF_ONE: Final = (127 << 23) >> _DROPPED_BITS
_CHUNK_ROWS: Final = 1 << 22


def _bin_of(counts_R: Tensor) -> Tensor:
    """int32 [rows] number of each count's bin: 0 for 0, 1 for 1, then log-linear."""
    bits_R = counts_R.to(torch.float32).view(torch.int32) >> _DROPPED_BITS
    return bits_R.sub_(_BIN_OF_ONE - 1).clamp_(min=0)


BINS: Final = int(_bin_of(torch.tensor([COUNT_CEILING]))) + 1
"""Bins of counts, the same for every table: what is binned in parts adds up."""


def bin_counts(counts_R: Tensor) -> Tensor:
    """Rows and lookups by bin of counts; on a GPU without a host sync.

    Args:
        counts_R: [rows] whole numbers from 0, of any dtype; larger ones are taken for
            ``COUNT_CEILING``.

    Returns:
        int64 [2, BINS], on the device of the counts: rows in each bin, and their lookups together.
    """
    sums_2B = torch.zeros(2, BINS, dtype=torch.int64, device=counts_R.device)
    one = sums_2B.new_ones(1)
    for chunk_R in counts_R.split(_CHUNK_ROWS):
        chunk_R = chunk_R.to(torch.int64).clamp(max=COUNT_CEILING)
        bins_R = _bin_of(chunk_R)
        sums_2B[0].index_add_(0, bins_R, one.expand(len(bins_R)))
        sums_2B[1].index_add_(0, bins_R, chunk_R)
    return sums_2B


def sample_bin_counts(counts_R: Tensor, max_rows: int) -> Tensor:
    r"""As :func:`bin_counts`, from a sample where there are more than ``max_rows`` = ``m`` rows.

    Rows with at least ``1/m`` of the lookups, of which there are ``m`` at most, are all taken; of
    the others one at random from each of ``m`` equal parts of the table, always the same. Two
    passes over the counts find the frequent rows; only ``2 m`` rows are binned. It is meant for
    GPUs, where many rows that fall into one bin wait for each other; on a CPU it saves little.

    The standard error of any share of the rows is at most :math:`1 / (2 \sqrt m)`, that of any
    share of the lookups at most :math:`\sqrt R / m` (each row left out has at most ``1/m`` of
    them, and stands for ``R/m`` rows). The number of rows is exact, that of lookups has that error.

    Args:
        counts_R: [rows] as for :func:`bin_counts`.
        max_rows: ``m``, at least 1.

    Returns:
        float64 [2, BINS].
    """
    rows = counts_R.numel()
    if rows <= max_rows:
        return bin_counts(counts_R).to(torch.float64)
    chunks = counts_R.split(_CHUNK_ROWS)
    lookups = torch.stack([chunk_R.sum(dtype=torch.int64) for chunk_R in chunks]).sum()
    threshold = (-(-lookups // max_rows)).clamp(min=1)
    frequent = bin_counts(torch.cat([chunk_R[chunk_R >= threshold] for chunk_R in chunks]))
    generator = torch.Generator(counts_R.device).manual_seed(0)
    place_M = torch.rand(
        max_rows, generator=generator, dtype=torch.float64, device=counts_R.device
    ).add_(torch.arange(max_rows, device=counts_R.device))
    row_M = place_M.mul_(rows / max_rows).long().clamp_(max=rows - 1)
    sampled_M = counts_R[row_M]
    others = bin_counts(sampled_M[sampled_M < threshold])
    weight = (rows - frequent[0].sum()).to(torch.float64) / others[0].sum().clamp(min=1)
    return frequent + weight * others


@dataclass(frozen=True)
class ZipfFit:
    """A line through the rank-frequency plot: ``count = first * rank ** -exponent``.

    Attributes:
        exponent: of Zipf's law; 0 where all rows are equally frequent.
        first: count of rank 1 on the line.
        last_rank: the fit is over the ranks 1 to this one.
    """

    exponent: float
    first: float
    last_rank: float


@dataclass(frozen=True)
class CountHistogram:
    """Rows by how often they are looked up.

    Attributes:
        rows_B: float64 [bins] number of rows.
        lookups_B: float64 [bins] their lookups together. In a bin, rows differ by 1.6% at most.
    """

    rows_B: NDArray[np.float64]
    lookups_B: NDArray[np.float64]

    @property
    def rows(self) -> float:
        """Rows of the table, those never seen included."""
        return float(self.rows_B.sum())

    @property
    def rows_seen(self) -> float:
        """Rows that have been looked up."""
        return float(self.rows_B @ (self.lookups_B > 0))

    @property
    def lookups(self) -> float:
        """Lookups that were counted."""
        return float(self.lookups_B.sum())

    @classmethod
    def of_bins(cls, sums_2B: Tensor) -> CountHistogram:
        """From :func:`bin_counts`, [2, BINS], perhaps of parts added up; without empty bins."""
        rows_B, lookups_B = sums_2B.to("cpu", torch.float64).numpy()
        return cls(rows_B[rows_B > 0], lookups_B[rows_B > 0])

    def quantile(self, share: float) -> float:
        """The least count that at least ``share`` of the rows that were seen do not exceed.

        Exact below 128, and above within 1.6%: the mean of its bin. 0 where no row was seen.

        Args:
            share: 0 to 1.
        """
        seen_B = self.lookups_B > 0
        if not seen_B.any():
            return 0.0
        rows_B = self.rows_B[seen_B]
        running_B = np.cumsum(rows_B) / rows_B.sum()
        # A share that rounding has put just above a bin's is that bin's.
        bin_ = min(int(np.searchsorted(running_B, share * (1 - 1e-12))), len(rows_B) - 1)
        return float(self.lookups_B[seen_B][bin_] / rows_B[bin_])

    def top_share(self, rows: float) -> float:
        """Share of the lookups that go to the most frequent rows; 0 without lookups.

        Args:
            rows: how many of them, from 0; a part of a row has its part of the lookups.
        """
        if self.lookups == 0:
            return 0.0
        rows_B, lookups_B = np.cumsum(self.rows_B[::-1]), np.cumsum(self.lookups_B[::-1])
        covered = np.interp(rows, np.append(0, rows_B), np.append(0, lookups_B))
        return float(covered) / self.lookups

    def ranks(self) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        """Of each bin of rows that were seen, the most frequent first.

        Returns:
            [bins] rank of its first row, from 1, and of its last; and their mean count.
        """
        seen_B = self.lookups_B > 0
        rows_B, lookups_B = self.rows_B[seen_B][::-1], self.lookups_B[seen_B][::-1]
        last_B = np.cumsum(rows_B)
        return last_B - rows_B + 1, last_B, lookups_B / rows_B

    def zipf(self, min_count: int = 10) -> ZipfFit | None:
        """Zipf's law, fitted to the rows with at least ``min_count`` lookups.

        Least squares of the log of the count on the log of the rank, with the same weight for equal
        lengths of the log of the rank, as the eye sees it in the plot. Rarer rows are left out: the
        order in which chance puts them bends the line down.

        Args:
            min_count: lookups of the rarest row of the fit.

        Returns:
            None for fewer than 10 such rows, or where all have about the same count.
        """
        first_B, last_B, count_B = (values[self.ranks()[2] >= min_count] for values in self.ranks())
        if len(count_B) < 2 or last_B[-1] < 10:
            return None
        weight_B = np.log((last_B + 0.5) / (first_B - 0.5))
        x_B, y_B = (np.log(first_B) + np.log(last_B)) / 2, np.log(count_B)
        x, y = np.average(x_B, weights=weight_B), np.average(y_B, weights=weight_B)
        slope = weight_B @ ((x_B - x) * (y_B - y)) / (weight_B @ (x_B - x) ** 2)
        return ZipfFit(float(-slope), float(np.exp(y - slope * x)), float(last_B[-1]))

    def expected_distinct(self, lookups: float) -> float:
        r"""Distinct rows of a batch, :math:`\sum_i 1 - (1 - p_i)^N`.

        Args:
            lookups: lookups of the batch, :math:`N`, from 0.
        """
        return float(self.rows_B @ self._seen(lookups))

    def miss_rate(self, cached_rows: float, lookups: float, policy: Policy = "lru") -> float:
        r"""Share of a batch's distinct rows that a cache does not hold when the batch comes.

        The cache is FBGEMM's: a batch asks once for each distinct row, and rows of the current
        batch are not evicted. With :math:`q_i = 1 - (1 - p_i)^N` the chance that a batch of ``N``
        lookups has row ``i``, and :math:`h_i` that the cache has it,

        .. math:: \mathrm{miss} = \sum_i q_i (1 - h_i) / \sum_i q_i, \qquad \sum_i h_i = C.

        - LFU holds the ``C`` most frequent rows.
        - LRU that can hold a whole batch holds the rows of the last ``T`` batches (Che's
          approximation): :math:`h_i = 1 - (1 - q_i)^T`.
        - LRU that cannot: what a batch hits stays, and a share ``r`` of what it misses takes the
          place of the rest: :math:`h_i = q_i r / (1 - q_i (1 - r))`.

        ``T`` and ``r`` follow from the size ``C``. With ``N = 1`` this is the textbook cache.

        Args:
            cached_rows: rows that the cache holds, ``C``.
            lookups: lookups of a batch, ``N``, above 0.
            policy: ``"lru"`` or ``"lfu"``.

        Returns:
            0 to 1. 0 for a table without lookups.

        Source:
            Che, Tung, Wang, "Hierarchical Web Caching Systems", IEEE JSAC 2002; FBGEMM's
            ``lru_cache_populate.cu`` and ``lfu_cache_populate.cu``, without their 32-way sets.
        """
        seen_B = self._seen(lookups)
        distinct = float(self.rows_B @ seen_B)
        if distinct == 0 or cached_rows >= self.rows_seen:
            return 0.0
        if policy == "lfu":
            more_frequent_B = np.flip(np.cumsum(np.flip(self.rows_B))) - self.rows_B
            held_B = np.clip((cached_rows - more_frequent_B) / np.maximum(self.rows_B, 1), 0, 1)
        elif cached_rows >= distinct:
            # x = log T, and as long ago as any row can have been looked up: e^80 batches.
            held_B = self._filled(lambda x: self._seen(lookups * math.exp(x)), cached_rows)
        else:
            # x = log r + 80.
            held_B = self._filled(
                lambda x: seen_B / (seen_B + (1 - seen_B) * math.exp(80 - x)), cached_rows
            )
        return float(self.rows_B @ (seen_B * (1 - held_B)) / distinct)

    def _filled(
        self, held: Callable[[float], NDArray[np.float64]], cached_rows: float
    ) -> NDArray[np.float64]:
        """``held(x)``, which rises with ``x`` from 0 to 80, where it fills the cache."""
        low, high = 0.0, 80.0
        for _ in range(50):
            middle = (low + high) / 2
            if float(self.rows_B @ held(middle)) < cached_rows:
                low = middle
            else:
                high = middle
        held_B = held(high)
        # Rows that every batch has stay, once they are in; where they alone are too many, a share.
        return held_B * min(1, cached_rows / float(self.rows_B @ held_B))

    def _seen(self, lookups: float) -> NDArray[np.float64]:
        """[bins] chance that ``lookups`` lookups have a row."""
        if self.lookups == 0:
            return np.zeros_like(self.rows_B)
        share_B = self.lookups_B / np.maximum(self.rows_B, 1) / self.lookups
        with np.errstate(divide="ignore"):  # a table with one row in use
            seen_B: NDArray[np.float64] = -np.expm1(lookups * np.log1p(-np.minimum(share_B, 1)))
        return seen_B


@dataclass(frozen=True)
class TableTraffic:
    """A table's lookups, by frequency of the row and along the rows.

    Of a table that is too large for one host, or that lies in shards, take the parts one by one and
    add them: ``TableTraffic.of(part0, 0, rows) + TableTraffic.of(part1, len(part0), rows)``.

    Attributes:
        rows: rows of the whole table.
        rows_B, lookups_B: float64 [bins] number of rows in each bin of counts, and their lookups.
        lookups_K: float64 [blocks] lookups of each block of equally many neighbouring rows.
    """

    rows: int
    rows_B: NDArray[np.float64]
    lookups_B: NDArray[np.float64]
    lookups_K: NDArray[np.float64]

    @classmethod
    def of_blocks(
        cls, blocks: Iterable[tuple[int, Tensor]], rows: int, *, table: str = ""
    ) -> TableTraffic:
        """The traffic of a table that is read block by block.

        Args:
            blocks: the number of the first row of each, and its counts [rows of the block].
            rows, table: as of :meth:`of`.
        """
        traffic = cls.of(torch.empty(0, dtype=torch.int32), 0, rows)
        for first, counts_R in blocks:
            traffic += cls.of(counts_R, first, rows, table=table)
        return traffic

    @classmethod
    def of(
        cls, counts_R: Tensor, first: int = 0, rows: int | None = None, *, table: str = ""
    ) -> TableTraffic:
        """The traffic of some rows of a table.

        Args:
            counts_R: [rows] whole numbers from 0 to ``torchrec_freq.COUNT_CEILING``, of any dtype,
                on any device; read in chunks.
            first: number of the first of these rows.
            rows: rows of the whole table; None if these are all.
            table: its name, for errors.

        Raises:
            ValueError: counts that are not whole numbers in range, or rows outside the table.
        """
        check_counts(table, counts_R)
        total = counts_R.numel() if rows is None else rows
        if first < 0 or first + counts_R.numel() > total:
            raise ValueError(
                f"Table {table!r}: rows {first} to {first + counts_R.numel() - 1} lie outside its "
                f"{total} rows."
            )
        block = _block_rows(total)
        lookups_K = np.zeros(-(-total // block))
        sums_2B = torch.zeros(2, BINS, dtype=torch.int64)
        for start in range(0, counts_R.numel(), _CHUNK_ROWS):
            chunk_R = counts_R[start : start + _CHUNK_ROWS].detach().cpu()
            sums_2B += bin_counts(chunk_R)
            blocks_R = (first + start + torch.arange(len(chunk_R))) // block
            in_blocks = torch.bincount(blocks_R - blocks_R[0], weights=chunk_R).numpy()
            lookups_K[int(blocks_R[0]) :][: len(in_blocks)] += in_blocks
        rows_B, lookups_B = sums_2B.to(torch.float64).numpy()
        return cls(total, rows_B, lookups_B, lookups_K)

    def __add__(self, other: TableTraffic) -> TableTraffic:
        if self.rows != other.rows:
            raise ValueError(
                f"Parts of two tables, of {self.rows} and {other.rows} rows, cannot be added."
            )
        rows_B, lookups_B = self.rows_B + other.rows_B, self.lookups_B + other.lookups_B
        return TableTraffic(self.rows, rows_B, lookups_B, self.lookups_K + other.lookups_K)

    @property
    def histogram(self) -> CountHistogram:
        """The rows by frequency, without empty bins."""
        return CountHistogram.of_bins(torch.from_numpy(np.stack((self.rows_B, self.lookups_B))))

    def share(self, first: int, last: int) -> float:
        """Share of the table's lookups that go to some neighbouring rows.

        Exact for tables of up to ``BLOCKS`` rows. In a larger one, a block that a shard cuts is
        taken to have equally many lookups in each of its rows.

        Args:
            first: number of the first of them, from 0.
            last: number of the row after the last one, up to the table's rows.

        Returns:
            0 to 1. For a table without lookups, the share of the rows.
        """
        if self.rows == 0:
            return 0.0
        total = float(self.lookups_K.sum())
        if total == 0:
            return (last - first) / self.rows
        ends_K = np.minimum(np.arange(len(self.lookups_K) + 1) * _block_rows(self.rows), self.rows)
        below = np.interp([first, last], ends_K, np.append(0, np.cumsum(self.lookups_K)))
        return float(below[1] - below[0]) / total


def _block_rows(rows: int) -> int:
    return max(-(-rows // BLOCKS), 1)


def traffic_of(table: str, counts: Tensor | TableTraffic) -> TableTraffic:
    """Counts, [rows] whole numbers, summarized, unless they are already."""
    return counts if isinstance(counts, TableTraffic) else TableTraffic.of(counts, table=table)
