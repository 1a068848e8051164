"""Row counts: count the rows of a batch, age by halving, and what can be a count at all."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from torchrec_freq.config import CountMode

COUNT_CEILING: Final = 2**30
"""Largest count, at which a counter stays. The rest of int32 is headroom for one batch."""


def check_counts(table: str, counts_R: Tensor) -> None:
    """Refuses what cannot be the counts of a table.

    Args:
        counts_R: [rows] of any dtype, on any device.

    Raises:
        ValueError: not whole numbers from 0 to ``COUNT_CEILING``; the message names the table.
    """
    if counts_R.dim() != 1:
        raise ValueError(
            f"Table {table!r}: counts must have the shape [num_embeddings]; got "
            f"{list(counts_R.shape)}."
        )
    if counts_R.is_complex() or counts_R.dtype == torch.bool:
        raise ValueError(f"Table {table!r}: counts cannot be {counts_R.dtype}.")
    if counts_R.is_floating_point() and not bool((counts_R.frac() == 0).all()):
        raise ValueError(f"Table {table!r}: counts must be whole numbers, without NaN or infinity.")
    least, most = (int(value) for value in counts_R.aminmax()) if counts_R.numel() else (0, 0)
    if least < 0 or most > COUNT_CEILING:
        raise ValueError(
            f"Table {table!r}: counts must lie in 0 to {COUNT_CEILING}; got {least} to {most}."
        )


def count_occurrences_(counts_R: Tensor, rows_L: Tensor, trained_L: Tensor | None) -> Tensor:
    """Adds 1 to the count of each row for each time it occurs and is trained, in place.

    Args:
        counts_R: int32 [rows], at most ``COUNT_CEILING``.
        rows_L: int64 [lookups].
        trained_L: int32 [lookups], 1 where the lookup is trained, else 0; None where all are.

    Returns:
        ``counts_R``.
    """
    if trained_L is None:
        trained_L = torch.ones_like(rows_L, dtype=torch.int32)
    return counts_R.scatter_add_(0, rows_L, trained_L)


def counted(mode: CountMode, before: Tensor, now: Tensor) -> Tensor:
    """Counts after a step, elementwise.

    Args:
        mode: ``FrequencyConfig.count``.
        before: counts before it.
        now: ``before``, and the occurrences in the step; overwritten.
    """
    if mode == "frozen":
        return before
    if mode == "batches":
        now = torch.minimum(before + 1, now)
    return now.clamp_(max=COUNT_CEILING)


def halve_(counts_R: Tensor) -> None:
    """Halves counts in whole numbers, in place."""
    counts_R.bitwise_right_shift_(1)
