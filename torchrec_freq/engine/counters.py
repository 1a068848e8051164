"""Row counts: count the rows of a batch, age by halving."""

from __future__ import annotations

import torch
from torch import Tensor

from torchrec_freq.config import CountMode
from torchrec_freq.counts.state import COUNT_CEILING


def count_occurrences_(counts_R: Tensor, rows_L: Tensor, trained_L: Tensor | None) -> Tensor:
    """Adds 1 to the count of each row for each time it occurs and is trained, in place.

    Args:
        counts_R: int32 [rows], at most ``COUNT_CEILING``.
        rows_L: int64 [lookups].
        trained_L: int32 [lookups], 1 where it is trained, else 0; None where all are.

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


def added(mode: CountMode, occurrences: Tensor) -> Tensor:
    """What a step adds to the sum of a table's counts, elementwise.

    Also where a counter stays at ``COUNT_CEILING``: the shares of the other rows stay right.

    Args:
        mode: ``FrequencyConfig.count``.
        occurrences: of the row in the step.
    """
    if mode == "samples":
        return occurrences
    return occurrences.clamp(max=1) if mode == "batches" else torch.zeros_like(occurrences)


def halve_(counts_R: Tensor) -> None:
    """Halves counts in whole numbers, in place."""
    counts_R.bitwise_right_shift_(1)
