"""How a table's lookups spread over its rows: what the counts say, in a few kilobytes.

Everything here treats lookups as independent draws from the counts: row ``i`` with probability
``p_i = c_i / sum(c)``. Ids that come in bursts (a user's sessions) are cached better than that.
Subscripts: ``_R`` rows, ``_B`` bins of rows with about equal counts, ``_K`` blocks of rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from torchrec_freq.counters import COUNT_CEILING, check_counts

Policy = Literal["lru", "lfu"]

BLOCKS: Final = 1 << 16
"""Parts of a table's rows, at most, whose lookups are known: a shard begins at one, nearly."""

# A float32 has 23 bits behind its leading one. With 6 of them a bin is at most 1.6% wide, and every
# count below 128 has its own.
_DROPPED_BITS: Final = 23 - 6
_CHUNK_ROWS: Final = 1 << 24


def _bin_of(counts_R: NDArray[Any]) -> NDArray[np.int64]:
    """Number of each count's bin: 0 for 0, 1 for 1, then log-linear."""
    bits_R = counts_R.astype(np.float32).view(np.int32) >> _DROPPED_BITS
    one = int(np.float32(1).view(np.int32)) >> _DROPPED_BITS
    return np.maximum(bits_R.astype(np.int64) - one + 1, 0)


_BINS: Final = int(_bin_of(np.array([COUNT_CEILING]))[0]) + 1


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
    def lookups(self) -> float:
        """Lookups that were counted."""
        return float(self.lookups_B.sum())

    def expected_distinct(self, lookups: float) -> float:
        r"""Distinct rows among ``lookups`` lookups, :math:`\sum_i 1 - (1 - p_i)^N`."""
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
        if distinct == 0:
            return 0.0
        if cached_rows >= float(self.rows_B @ (self.lookups_B > 0)):
            return 0.0
        held_B = self._held(cached_rows, lookups, seen_B, distinct, policy)
        return float(self.rows_B @ (seen_B * (1 - held_B)) / distinct)

    def _held(
        self,
        cached_rows: float,
        lookups: float,
        seen_B: NDArray[np.float64],
        distinct: float,
        policy: Policy,
    ) -> NDArray[np.float64]:
        """[bins] chance that a row is in the cache."""
        if policy == "lfu":
            more_frequent_B = np.flip(np.cumsum(np.flip(self.rows_B))) - self.rows_B
            held_B: NDArray[np.float64] = np.clip(
                (cached_rows - more_frequent_B) / np.maximum(self.rows_B, 1), 0, 1
            )
            return held_B
        if cached_rows >= distinct:
            # As long ago as any row can have been looked up: e^80 batches.
            return self._fill(
                lambda log_t: self._seen(lookups * math.exp(log_t)), cached_rows, 0, 80
            )

        def resident(log_r: float) -> NDArray[np.float64]:
            inserted_B = seen_B * math.exp(log_r)
            return inserted_B / (1 - seen_B + inserted_B)

        return self._fill(resident, cached_rows, -80, 0)

    def _fill(
        self,
        held: Callable[[float], NDArray[np.float64]],
        cached_rows: float,
        low: float,
        high: float,
    ) -> NDArray[np.float64]:
        """``held(x)``, which rises with ``x``, where it fills the cache; by bisection."""
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
    def of(
        cls, counts_R: Tensor, first: int = 0, rows: int | None = None, *, table: str = ""
    ) -> TableTraffic:
        """The traffic of some rows of a table.

        Args:
            counts_R: whole numbers from 0 to ``torchrec_freq.COUNT_CEILING``, of any dtype, on any
                device; read in chunks.
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
        rows_B, lookups_B = np.zeros(_BINS), np.zeros(_BINS)
        lookups_K = np.zeros(-(-total // _block_rows(total)) if total else 0)
        for start in range(0, counts_R.numel(), _CHUNK_ROWS):
            chunk_R = counts_R[start : start + _CHUNK_ROWS].detach().cpu().numpy()
            bins_R = _bin_of(chunk_R)
            rows_B += np.bincount(bins_R, minlength=_BINS)
            lookups_B += np.bincount(bins_R, weights=chunk_R, minlength=_BINS)
            blocks_R = (first + start + np.arange(len(chunk_R))) // _block_rows(total)
            lookups_K += np.bincount(blocks_R, weights=chunk_R, minlength=len(lookups_K))
        return cls(total, rows_B, lookups_B, lookups_K)

    def __add__(self, other: TableTraffic) -> TableTraffic:
        if self.rows != other.rows:
            raise ValueError(
                f"Parts of two tables, of {self.rows} and {other.rows} rows, cannot be added."
            )
        return TableTraffic(
            self.rows,
            self.rows_B + other.rows_B,
            self.lookups_B + other.lookups_B,
            self.lookups_K + other.lookups_K,
        )

    @property
    def histogram(self) -> CountHistogram:
        """The rows by frequency, without empty bins."""
        used_B = self.rows_B > 0
        return CountHistogram(self.rows_B[used_B], self.lookups_B[used_B])

    def share(self, first: int, last: int) -> float:
        """Share of the table's lookups that go to the rows ``first`` to ``last - 1``.

        Exact for tables of up to ``BLOCKS`` rows. In a larger one, a block that a shard cuts is
        taken to have equally many lookups in each of its rows.

        Returns:
            0 to 1. For a table without lookups, the share of the rows.
        """
        if self.rows == 0:
            return 0.0
        total = float(self.lookups_K.sum())
        if total == 0:
            return (last - first) / self.rows
        ends_K = np.minimum(np.arange(len(self.lookups_K) + 1) * _block_rows(self.rows), self.rows)
        running_K = np.concatenate(([0.0], np.cumsum(self.lookups_K)))
        below = np.interp([first, last], ends_K, running_K)
        return float(below[1] - below[0]) / total


def _block_rows(rows: int) -> int:
    return max(-(-rows // BLOCKS), 1)
