"""How a table's lookups spread over its rows: what counts say, in a few kilobytes.

Everything here treats lookups as independent draws: row ``i`` with probability ``p_i = c_i /
sum(c)``. Ids that come in bursts, as in a user's session, are cached better than that.
Shape suffixes: ``_R`` rows, ``_B`` bins of rows with about equal counts, ``_K`` blocks of
neighbouring rows, ``_V`` values.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from torchrec_freq.counts.state import COUNT_CEILING, check_counts

BLOCKS: Final = 1 << 16
"""Most blocks of a table's rows whose lookups are kept apart; smaller tables keep each row."""

CHUNK_ROWS: Final = 1 << 22
"""Rows to read at once: bounds the memory."""

# A float32 has 23 bits behind its leading one. With 6 of them a bin is at most 1.6% wide, and every
# count below 128 has its own.
_DROPPED_BITS: Final = 23 - 6
_BIN_OF_ONE: Final = (127 << 23) >> _DROPPED_BITS


def bin_of(counts: Tensor) -> Tensor:
    """int32 [...] number of each count's bin: 0 for 0, 1 for 1, then log-linear."""
    bits = counts.to(torch.float32).clamp(max=COUNT_CEILING).view(torch.int32) >> _DROPPED_BITS
    return bits.sub_(_BIN_OF_ONE - 1).clamp_(min=0)


BINS: Final = int(bin_of(torch.tensor(COUNT_CEILING))) + 1
"""Bins of counts, the same for every table, so the sums of parts add up."""


def sum_by_count(counts_R: Tensor, *values_R: Tensor) -> Tensor:
    """Sums of what rows have, by bin of their counts.

    Args:
        counts_R: [rows] whole numbers from 0, of any dtype; those above ``COUNT_CEILING`` are taken
            for it.
        values_R: each [rows].

    Returns:
        float64 [values, BINS], on the device of the counts.
    """
    sums_VB = torch.zeros(len(values_R), BINS, dtype=torch.float64, device=counts_R.device)
    bins_R = bin_of(counts_R)
    for sums_B, value_R in zip(sums_VB, values_R, strict=True):
        sums_B.index_add_(0, bins_R, value_R.to(torch.float64))
    return sums_VB


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
        """From rows and lookups by bin, [2, BINS]; without empty bins."""
        rows_B, lookups_B = sums_2B.cpu().numpy()
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

    def zipf(self) -> float | None:
        """Exponent ``s`` of Zipf's law, ``count ~ rank ** -s``, for rows with at least 10 lookups.

        Least squares of the log of the count on the log of the rank, with equal weight for equal
        lengths of the log of the rank, as the eye sees it in the plot. Rarer rows are left out: the
        order in which chance puts them bends the line down.

        Returns:
            None for fewer than 10 such rows, or where all have about the same count.
        """
        first_B, last_B, count_B = (values[self.ranks()[2] >= 10] for values in self.ranks())
        if len(count_B) < 2 or last_B[-1] < 10:
            return None
        weight_B = np.log((last_B + 0.5) / (first_B - 0.5))
        x_B, y_B = (np.log(first_B) + np.log(last_B)) / 2, np.log(count_B)
        x_B = x_B - np.average(x_B, weights=weight_B)
        y_B = y_B - np.average(y_B, weights=weight_B)
        return -float((weight_B @ (x_B * y_B)) / (weight_B @ x_B**2))

    def expected_distinct(self, lookups: float) -> float:
        r"""Distinct rows of a batch, :math:`\sum_i 1 - (1 - p_i)^N`.

        Args:
            lookups: lookups of the batch, :math:`N`, from 0.
        """
        return float(self.rows_B @ self._seen(lookups))

    def miss_rate(self, cached_rows: float, lookups: float) -> float:
        r"""Share of a batch's distinct rows that an LRU cache does not hold when the batch comes.

        The cache is FBGEMM's: a batch asks once for each distinct row, and rows of the current
        batch are not evicted. With :math:`q_i = 1 - (1 - p_i)^N` the chance that a batch of ``N``
        lookups has row ``i``, and :math:`h_i` that the cache has it,

        .. math:: \mathrm{miss} = \sum_i q_i (1 - h_i) / \sum_i q_i, \qquad \sum_i h_i = C.

        - One that can hold a whole batch holds the rows of the last ``T`` batches (Che's
          approximation): :math:`h_i = 1 - (1 - q_i)^T`.
        - One that cannot: what a batch hits stays, and a share ``r`` of what it misses takes the
          place of the rest: :math:`h_i = q_i r / (1 - q_i (1 - r))`.

        ``T`` and ``r`` follow from the size ``C``. With ``N = 1`` this is the textbook cache.

        Args:
            cached_rows: rows that the cache holds, ``C``.
            lookups: lookups of a batch, ``N``, above 0.

        Returns:
            0 to 1. 0 for a table without lookups.

        Source:
            Che, Tung, Wang, "Hierarchical Web Caching Systems", IEEE JSAC 2002; FBGEMM's
            ``lru_cache_populate.cu``, without its 32-way sets.
        """
        seen_B = self._seen(lookups)
        distinct = float(self.rows_B @ seen_B)
        if distinct == 0 or cached_rows >= self.rows_seen:
            return 0.0
        if cached_rows >= distinct:
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


class TableTraffic:
    """A table's lookups, by frequency of the row and along the rows.

    A large table is read in parts: ``add`` each of them.

    Args:
        rows: rows of the whole table.
        table: its name, for errors.
    """

    def __init__(self, rows: int, table: str = "") -> None:
        self.rows, self._table = rows, table
        self._sums_2B = torch.zeros(2, BINS, dtype=torch.float64)
        self._block_rows = max(-(-rows // BLOCKS), 1)
        self._lookups_K = torch.zeros(-(-rows // self._block_rows), dtype=torch.float64)

    @classmethod
    def of(cls, counts_R: Tensor, table: str = "") -> TableTraffic:
        """The traffic of a whole table, from its counts [rows]; see :meth:`add`."""
        traffic = cls(len(counts_R), table)
        traffic.add(0, counts_R)
        return traffic

    def add(self, first: int, counts_R: Tensor) -> None:
        """Takes in the next rows.

        Args:
            first: number of the first of them.
            counts_R: [rows] whole numbers from 0 to ``torchrec_freq.COUNT_CEILING``, of any dtype,
                on any device.

        Raises:
            ValueError: counts that are not whole numbers in range; the message names the table.
        """
        check_counts(self._table, counts_R)
        for chunk_R in counts_R.detach().split(CHUNK_ROWS):
            chunk_R = chunk_R.cpu()
            self._sums_2B += sum_by_count(chunk_R, torch.ones(len(chunk_R)), chunk_R)
            rows_R = first + torch.arange(len(chunk_R))
            self._lookups_K.index_add_(0, rows_R // self._block_rows, chunk_R.double())
            first += len(chunk_R)

    @property
    def histogram(self) -> CountHistogram:
        """The rows by frequency, without empty bins."""
        return CountHistogram.of_bins(self._sums_2B)

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
        lookups_K = self._lookups_K.numpy()
        if not lookups_K.any():
            return (last - first) / max(self.rows, 1)
        ends_K = np.minimum(np.arange(len(lookups_K) + 1) * self._block_rows, self.rows)
        below = np.interp([first, last], ends_K, np.append(0, np.cumsum(lookups_K)))
        return float(below[1] - below[0]) / float(lookups_K.sum())
